"""Trackers: where a run's metrics and events go (run folder, console, Weights & Biases, TensorBoard).

`base.py` has the messages and the fence, `jsonl.py` the files of the run folder, `console.py` what a person sees.
The files are the record and are written in line. The other trackers run behind a fence: none can delay or end a run.
"""
