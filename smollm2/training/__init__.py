"""The training run. Read `loop.py` first: prepare, run, report a failure; then `step.py`, the optimizer step.

`progress.py` holds the loop's state, `setup.py` the parts of a run; `resume.py` restores a checkpoint.
`actions.py` holds what happens between steps, `pages.py` what is shown at the start and the end. `optim.py` has the
optimizers and the schedule, `memory.py` the micro-batches, `agreement.py` and `corpus.py` what several ranks share.
"""
