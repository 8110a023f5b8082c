"""What a run needs, calculated without torch: parameters, FLOPs, memory, disk and time.

Read in this order: arithmetic.py (what can be counted exactly), machine.py (cores, kind of CPU or GPU, memory),
throughput.py (seconds, from a table or from earlier runs), describe.py (the plan and the table that shows it).
"""
