"""Files that are written whole or not at all, and folders that one run holds.

Read in this order: run_folder.py (the name of every file), atomic.py (how a file is written), locks.py (who may write
in a folder), processes.py (whether a process is still running).
"""
