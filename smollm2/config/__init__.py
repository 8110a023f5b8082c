"""The config of a run: its keys, and how files and flags become one.

Read schema.py (the keys and what contradicts what; values.py has its durations and paths), then vocabulary.py (aliases,
suggestions, descriptions), then reading.py (file, flags and arguments to a Config; sources.py and yaml_nodes.py below it).
"""
