"""Processes on this machine: whether one is still running, and when the current one started."""

import psutil

START_TOLERANCE = 10.0
"""Seconds by which two readings of the same process's start time may differ: the clock may be adjusted in between."""


def is_running(pid: int, started: float | None = None) -> bool:
    """Return whether process `pid` is running; with `started`, whether it is the process that started at that time.

    A zombie (ended, but not yet waited for) does not count as running. `started` is in seconds since the epoch.
    """
    try:
        process = psutil.Process(pid)
        if started is not None and abs(process.create_time() - started) > START_TOLERANCE:
            return False
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def start_time() -> float:
    """Return when this process started, in seconds since the epoch."""
    return float(psutil.Process().create_time())
