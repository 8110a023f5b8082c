"""Trackers: they record and show a run's metrics and events (run folder, console, Weights & Biases, TensorBoard).

`base.py` defines the messages, `jsonl.py` writes the files of the run folder, `console.py` shows the run to the user.
These two are called synchronously. The other trackers each run on their own thread in a `Fence` (`base.py`), so they
can neither delay nor end a run.
"""
