"""Files that are written atomically, and run folders that one run at a time may hold.

Read in this order: run_folder.py (the name of every file), atomic.py (how a file is written), locks.py (who may write
to a folder), processes.py (whether a process is still running).
"""
