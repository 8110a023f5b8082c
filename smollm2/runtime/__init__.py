"""The machine on which a run computes: device, precision, processes, signals, memory, random state.

Read in this order: precision.py (the device's features and the number format), device.py (the run's Runtime, with its
collectives), ranks.py (which process is late or lost), signals.py, random_state.py, memory.py.
"""
