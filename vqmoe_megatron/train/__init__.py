"""One training run: preflight, model, loop, checkpoints, stop requests."""
