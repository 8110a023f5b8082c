"""The training run. Read `loop.py` first: prepare, run, report a failure; then `step.py`, the optimizer step.

`progress.py` is what the loop remembers, `setup.py` what a run is made of, `resume.py` how a checkpoint is put back.
`actions.py` holds what happens between two steps, `pages.py` what is shown at the start and the end. `optim.py` has the
optimizers and the schedule, `memory.py` the micro-batches, `agreement.py` and `corpus.py` what several ranks share.
"""
