"""Trackers: where a run's metrics and events go (run folder, console, Weights & Biases, TensorBoard).

`base.py` has the messages and the fence, `jsonl.py` the files of the run folder, `console.py` what a person sees.
The files are the record and are written synchronously. The others run behind a fence and cannot delay or end a run.
"""
