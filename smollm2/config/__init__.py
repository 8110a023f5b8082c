"""The config of a run: its keys, and how files and flags are combined into one config.

Read in this order: schema.py (the keys and which values contradict each other; values.py defines durations and paths),
vocabulary.py (aliases, suggestions, descriptions), reading.py (builds a Config from a file, flags and arguments, using
sources.py and yaml_nodes.py).
"""
