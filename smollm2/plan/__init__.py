"""Estimates of what a run needs, made without torch: parameters, FLOPs, memory, disk space and time.

Read in this order: arithmetic.py (what can be calculated), machine.py (cores, kind of CPU or GPU, memory),
throughput.py (seconds, from a table or from earlier runs), describe.py (the plan and the table that shows it).
"""
