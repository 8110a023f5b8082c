"""The config: its keys, and how files and flags become one."""
