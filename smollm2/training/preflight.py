"""The preflight: the checks that a run makes before its first step, and that `smollm2 doctor` makes at greater depth.

The run's own objects are checked: its model, tokens, optimizers and functions. Nothing of them is changed: gradients and
the random state are put back, and what steps, saves or moves weights does so on a small twin of the model.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from smollm2.analysis.checks import (
    GROUPS,
    Check,
    Result,
    as_json,
    describe_counts,
    describe_result,
    run_checks,
    skip_check,
    worst_of,
)
from smollm2.analysis.gradient_checks import DIFFERENCES
from smollm2.analysis.model_checks import ANY_MODEL
from smollm2.analysis.own_checks import OWN_MODEL, Own
from smollm2.errors import TrainingError
from smollm2.runtime.random_state import random_state, restore_random_state
from smollm2.storage.atomic import write_atomically
from smollm2.storage.run_folder import DOCTOR
from smollm2.tracking.console import ConsoleTracker
from smollm2.training.checklist import DATA, MACHINE, STEP
from smollm2.training.setup import Run
from smollm2.training.twin import make_probe, make_twin

FEWEST_POSITIONS = 8
"""A model with a shorter context is not checked: there is too little past to shuffle."""

OF_THE_TWIN = (*(check.name for check in OWN_MODEL if check.on_twin), DIFFERENCES.name)
"""Checks of the model that need only the twin's weights."""

Pairs = list[tuple[Check[Any], Any]]
"""Checks, each with what it checks."""


def check_run(run: Run, *, deep: bool, show: Callable[[float], None] = lambda fraction: None) -> list[Result]:
    """Return the results of the checks of a run; all ranks must call this together.

    The short form leaves out what is deep, and a resumed run also what cannot have changed since it began. The random
    state and the gradients are put back.
    """
    kept, is_resumed = random_state(), run.resumed_step > 0
    try:
        chosen = [
            (check, subject)
            for check, subject in list_checks(run)
            if deep or (not check.deep and (check.on_resume or not is_resumed))
        ]
        return run_checks(chosen, show=show)
    finally:
        restore_random_state(kept)


def list_checks(run: Run) -> Pairs:
    """Return all checks, each with its subject: the model, the twin, or the run."""
    twin, m = make_twin(run), run.config.model
    probe, is_new = make_probe(run), run.resumed_step == 0 and m.init_from is None
    own = Own(m, run.model, probe, twin.model, twin.probe, run.runtime.precision.dtype, is_new)
    needs_16_bits = run.model.model.attention_backend == "varlen"
    # Attention in weights that are drawn this small is uniform to the last bit; the twin's are not.
    seen = twin.run if is_new and m.initializer_range < 0.1 * m.hidden_size**-0.5 else run
    wide = make_probe(seen, in_float32=not needs_16_bits)  # the effect of positions may be small
    of_the_past = {"past": make_probe(seen), "positions": wide}
    model: Pairs = [(check, of_the_past.get(check.name, probe)) for check in ANY_MODEL]
    model += [(check, own) for check in OWN_MODEL]
    model.append((DIFFERENCES, make_probe(make_twin(run).run, in_float32=True)))
    if run.runtime.layout.is_sharded:
        model = skip(model, "each rank has a share of the model only", but=OF_THE_TWIN)
    if m.max_position_embeddings < FEWEST_POSITIONS:
        model = skip(model, f"the context is shorter than {FEWEST_POSITIONS} tokens")
    if needs_16_bits:
        model = [*model[:-1], *skip(model[-1:], "the attention backend has no float32 form")]
    checks: Pairs = [*model, *((check, twin) for check in STEP), *((check, run) for check in (*DATA, *MACHINE))]
    return sorted(checks, key=lambda pair: GROUPS.index(pair[0].group))


def skip(pairs: Pairs, reason: str, but: Collection[str] = ()) -> Pairs:
    """Return the checks with all but some skipped, for a reason."""
    return [(check if check.name in but else skip_check(check, reason), subject) for check, subject in pairs]


def preflight(run: Run, console: ConsoleTracker) -> dict[str, Any]:
    """Make the short form of the checks, report warnings and the count, and return the content of doctor.json.

    Raise TrainingError, on all ranks, if a check fails on any of them.
    """
    results = check_run(run, deep=False, show=lambda fraction: console.show_progress("preflight", fraction))
    if console.is_terminal:
        console.show_progress("preflight", 1.0)
    for result in worst_of(results, "warn"):
        console.report(describe_result(result))
    console.report(f"preflight: {describe_counts(results)}")
    with run.runtime.together():
        refuse_failures(results)
    return as_json(results, deep=False, step=run.resumed_step)


def refuse_failures(results: Sequence[Result]) -> None:
    """Raise TrainingError, with a line for each failed check, if there are any."""
    failed = worst_of(results, "fail")
    if not failed:
        return
    lines = "\n".join(f"  {describe_result(result)}" for result in failed)
    count = "a check" if len(failed) == 1 else f"{len(failed)} checks"
    raise TrainingError(
        f"error: the preflight found that this run is not right: {count} failed\n{lines}\n"
        "smollm2 doctor with the same flags tells more; --skip_preflight trains all the same."
    )


def record_preflight(run: Run, content: dict[str, Any] | None) -> None:
    """Write doctor.json to the run folder, on rank 0, and record whether the checks were made."""
    if content is None:
        run.tracker.log_event("preflight", "the preflight was skipped (training.preflight)", run.resumed_step)
        return
    verdicts = Counter(one["verdict"] for one in content["checks"])
    run.tracker.log_event("preflight", "", run.resumed_step, **verdicts)
    write_results(run, content)


def write_results(run: Run, content: dict[str, Any]) -> None:
    """Write doctor.json to the run folder, on rank 0."""
    if run.runtime.rank == 0:
        write_atomically(run.folder / DOCTOR, (json.dumps(content, indent=1) + "\n").encode())
