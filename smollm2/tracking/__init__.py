"""Who hears of what happens: files in the run folder, the console, and mirrors such as Weights & Biases.

The files are the truth and are written in-line. Mirrors stand behind a fence: none can delay, gate or end a run.
"""
