"""The config of a run: its keys, and how files and flags are combined into one config.

Read schema.py (the keys and their contradictions; values.py has its durations and paths), then vocabulary.py (aliases,
suggestions, descriptions), then reading.py (file, flags and arguments to a Config, using sources.py and yaml_nodes.py).
"""
