"""Atomic file writes, and the lock that lets only one run at a time use a run folder.

Read in this order: run_folder.py (the name of every file), atomic.py (how a file is written), locks.py (who may write
to a folder), processes.py (whether a process is still running).
"""
