"""The proof of a resume: the first step after it is compared with the same step of the run before.

The step after each save is recorded beside the checkpoint, in `step_XXXX.next.json`, when it has been taken. Loss and
gradient norm depend on every weight and on the batch; the moments of the optimizer only show one step later.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from smollm2.config.reading import changed_on_resume
from smollm2.config.schema import Config
from smollm2.runtime.device import machine_facts
from smollm2.storage.run_folder import next_step_path
from smollm2.training.setup import Run
from smollm2.training.step import StepResult

NUMBERS = {"loss": "loss", "grad_norm": "gradient norm"}


def check_first_step(run: Run, step: int, result: StepResult, size: int) -> None:
    """After a save, record step `step` beside the checkpoint; after a resume, first compare it with that record.

    `size` is the number of sequences in a micro-batch. Only rank 0 does this, and no other step costs anything.
    """
    if run.runtime.rank or run.saver is None:
        return
    start = run.resumed_from if step == run.resumed_step + 1 else None
    if start is None and run.saver.step != step - 1:
        return
    record = describe_step_inputs(run, result, size)

    def describe() -> Mapping[str, object]:
        return {"step": step, **record, "batch": hash_batch(run, step)}

    if start:
        run.tracker.log_event("first_step", compare(read_record(start, step), describe(), run, step), step)
    if start is None or start.resolve().parent == run.folder.resolve():
        run.saver.record_next_step(step - 1, describe)


def describe_step_inputs(run: Run, result: StepResult, size: int) -> dict[str, object]:
    """Return the numbers of a step, exactly as hexadecimal text, and what they depend on besides the batch."""
    return {
        "loss": result.loss.hex(),
        "grad_norm": result.grad_norm.hex(),
        "learning_rate": result.learning_rate.hex(),
        "tokens": result.tokens,
        "micro_batch": size,
        "env": machine_facts(run.runtime),
        "config": run.config.model_dump_json(),
    }


def hash_batch(run: Run, step: int) -> str:
    """Return a hash of the tokens, labels and documents in the batch of a step, on all ranks."""
    digest = hashlib.sha256()
    for array in run.batches.read(step - 1, 0, run.config.global_batch_size):
        if array is not None:
            digest.update(array.tobytes())
    return digest.hexdigest()


def read_record(checkpoint: Path, step: int) -> Mapping[str, object]:
    """Return the record beside a checkpoint, or an empty one if it is missing, damaged or of another step."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found: object = json.loads(next_step_path(checkpoint).read_bytes())
        texts = ("loss", "grad_norm", "learning_rate", "config", "batch")
        if not isinstance(found, dict) or not isinstance(found.get("env"), dict) or found.get("step") != step:
            return {}
        if all(isinstance(found.get(name), str) for name in texts):
            [float.fromhex(found[name]) for name in texts[:3]]
            return found
    return {}


def compare(before: Mapping[str, object], now: Mapping[str, object], run: Run, step: int) -> str:
    """Return whether the step is bit-exact, or by how much its numbers differ and which of its inputs do."""
    if not before:
        return f"resume: step {step} cannot be compared: the run before ended before it recorded this step"
    shown = ", ".join(f"{name} {float.fromhex(str(now[key])):.10g}" for key, name in NUMBERS.items())
    if all(before[key] == now[key] for key in NUMBERS):
        return f"resume: step {step} is bit-exact with the run before ({shown})"
    differences = ", ".join(
        f"{name} by {float.fromhex(str(now[key])) - float.fromhex(str(before[key])):.1e}"
        for key, name in NUMBERS.items()
        if before[key] != now[key]
    )
    return f"resume: step {step} differs from the run before: {differences} ({shown}); {explain(before, now, run)}"


def explain(before: Mapping[str, object], now: Mapping[str, object], run: Run) -> str:
    """Return which inputs of the step differ, or that none is known to."""
    old_facts, facts = before["env"], now["env"]
    assert isinstance(old_facts, dict) and isinstance(facts, dict)
    found = [f"{name} {old} -> {facts.get(name)}" for name, old in old_facts.items() if facts.get(name) != old]
    with contextlib.suppress(ValueError):  # the config of another version; the text is compared through the batch
        changes = changed_on_resume(Config.model_validate_json(str(before["config"])), run.config)
        found += [f"{c.key} {c.old} -> {c.new}" for c in changes if c.rule != "free" and c.key != "data.input"]
    if before.get("micro_batch") != now["micro_batch"]:
        found.append(f"sequences at once {before.get('micro_batch')} -> {now['micro_batch']}")
    if before["batch"] != now["batch"]:
        found.append("the tokens of the batch")
    if found:
        return f"what differs: {', '.join(found)}"
    if run.runtime.device.type != "cpu" and not run.config.training.deterministic:
        return "some GPU kernels add in a varying order (training.deterministic true: bit-exact)"
    return "nothing that is known differs, so the memory, the device, a file or a library may be faulty"
