"""Networks only; they know nothing of noise, files of a run, losses or training."""
