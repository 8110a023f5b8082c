"""The training run: setup, step, loop."""
