"""`step_XXXX.pt`: what is in it, and how it is written and read."""
