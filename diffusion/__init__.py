"""The diffusion process as pure functions: `schedule`, `targets`, `times`, `samplers` and `guidance`."""
