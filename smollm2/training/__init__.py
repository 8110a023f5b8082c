"""The training run. Read `loop.py` first (prepare, run, report a failure), then `step.py` (the optimizer step).

`progress.py` defines the loop's state, `setup.py` builds the parts of a run, `resume.py` restores a checkpoint.
`actions.py` has the work between steps, such as validation; `pages.py` the pages shown at the start and the end.
`optim.py` has the optimizers and the learning rate schedule, `memory.py` chooses the micro-batches, `agreement.py`
checks that all ranks start the same run, and `corpus.py` opens its data on every rank. `preflight.py` makes the checks of
`checklist.py` before the first step, those that step or save on the small model of `twin.py`.
"""
