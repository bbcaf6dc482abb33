"""The diffusion process as pure functions: `schedule` (rates, targets) and `samplers` (denoise, noise, times)."""
