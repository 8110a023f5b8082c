"""Where a run starts: at step 0, or at a checkpoint, which is restored completely or not at all."""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from smollm2.checkpoint.discovery import find_resumable, list_checkpoints, load_checkpoint
from smollm2.checkpoint.format import FORMAT, State
from smollm2.config.reading import changed_on_resume
from smollm2.config.schema import Config
from smollm2.data.batches import ORDER_VERSION
from smollm2.data.corpus import Corpus
from smollm2.data.windows import JoinedWindows
from smollm2.errors import CheckpointError, ConfigError
from smollm2.inference.evaluation import spread
from smollm2.inference.weights import check_shapes
from smollm2.runtime.device import machine_facts
from smollm2.runtime.random_state import random_state
from smollm2.runtime.sharding import lay_out_like
from smollm2.training.optim import (
    describe_arithmetic_changes,
    learning_rate_at,
    load_optimizer_states,
    optimizer_states,
    set_learning_rate,
)
from smollm2.training.progress import Progress
from smollm2.training.setup import Run, Setup, Start

NOT_BIT_EXACT = "from here on the run is not bit-identical to an uninterrupted one"


def find_start(setup: Setup, resume: str, checkpoint_path: str | Path | None) -> Start | None:
    """Return the checkpoint to resume from, if any.

    Raise CheckpointError if it is missing or damaged, or if the run would overwrite another run's folder.
    """
    folder = setup.folder
    existing = list_checkpoints(folder)
    if checkpoint_path is not None:
        path = Path(checkpoint_path)
        start = Start(path, load_checkpoint(path))
        if existing and path.resolve().parent != folder.resolve():
            raise CheckpointError(
                path,
                f"belongs to another run than the checkpoints in {folder}",
                f"continue it in its own folder with --save_dir {path.parent}, or in an empty one with --save_dir "
                f"{free_folder(folder)}",
            )
        return start
    if resume == "auto":
        found = find_resumable(folder, setup.report)
        return Start(*found) if found else None
    if existing:
        raise CheckpointError(
            folder,
            f"contains checkpoints of an earlier run ({len(existing)}; the newest is {existing[-1].name})",
            f"resume it with --resume auto, or start a new run with --save_dir {free_folder(folder)}",
        )
    return None


def free_folder(folder: Path) -> Path:
    """Return an unused folder name next to `folder`, such as `checkpoints-2`."""
    if folder.name in ("", ".."):  # `.`, for example, has no name of its own
        folder = folder.resolve()
    numbered = (folder.with_name(f"{folder.name or 'checkpoints'}-{number}") for number in itertools.count(2))
    return next(path for path in numbered if not os.path.lexists(path))


def check_changes(setup: Setup, start: Start, corpus: Corpus) -> None:
    """Report what changes on this resume.

    Raise CheckpointError if the checkpoint belongs to another run, ConfigError if it is past the config's last step.
    """
    config, state, t = setup.config, start.state, setup.config.training
    if start.step > t.train_steps:
        raise ConfigError(
            "training.train_steps", f"{t.train_steps} is less than the {start.step} steps of {start.path}", "raise it"
        )
    changes = changed_on_resume(Config.model_validate_json(state["config"]), config)
    refused = [f"{c.key} {c.old} -> {c.new}" for c in changes if c.rule == "refused"]
    if state["data"]["tokens_fingerprint"] != corpus.fingerprint and not refused:
        refused = ["data.input is a different text"]
    if refused:
        raise CheckpointError(
            start.path,
            f"belongs to another run ({', '.join(refused)})",
            f"undo the change, or start a new run with --save_dir {free_folder(setup.folder)}",
        )
    noted = [f"{c.key}: {c.old} -> {c.new}" for c in changes if c.rule == "noted"]
    if (order := state["data"]["order_version"]) != ORDER_VERSION:
        noted.append(f"order of the batches: version {order} -> {ORDER_VERSION}")
    for change in noted:
        setup.report(f"{change}; {NOT_BIT_EXACT}")
    old, new = state["scheduler"]["learning_rate"], learning_rate_at(max(0, start.step - 1), t)
    if not math.isclose(old, new):
        setup.report(f"learning rate at step {start.step}: {old:.3e} -> {new:.3e}")


def restore(run: Run, start: Start) -> Progress:
    """Restore the checkpoint's weights, optimizer moments and loss scale, and return its progress."""
    state = start.state
    shapes = [
        {name: tuple(one.shape) for name, one in each.items()} for each in (run.model.state_dict(), state["model"])
    ]
    check_shapes(shapes[0], shapes[1], start.path)
    try:
        load_optimizer_states(run.optimizers, state["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            start.path,
            f"its optimizer state does not fit: {error}",
            f"start a new run with --save_dir {free_folder(run.folder)}",
        ) from None
    own = run.model.state_dict()
    run.model.load_state_dict({name: lay_out_like(full, own[name]) for name, full in state["model"].items()})
    set_learning_rate(run.optimizers, learning_rate_at(max(0, start.step - 1), run.config.training))
    if state["scaler"]:
        run.runtime.scaler.load_state_dict(state["scaler"])
    progress = Progress.from_state(state)
    before = count_compared_windows(Config.model_validate_json(state["config"]), run.validation)
    if before != count_compared_windows(run.config, run.validation):  # losses over different windows are not comparable
        progress = dataclasses.replace(progress, best_validation_loss=math.inf)
    return progress


def list_compared_windows(config: Config, validation: JoinedWindows) -> list[int]:
    """Return the validation windows on which checkpoints are compared: from each source the same number, spread evenly."""
    wanted = max(1, config.training.eval_windows // len(validation.sources))
    return [
        first + i
        for first, source in zip(validation.first, validation.sources, strict=False)
        for i in spread(len(source), wanted)
    ]


def count_compared_windows(config: Config, validation: JoinedWindows | None) -> int:
    """Return the number of validation windows on which checkpoints are compared."""
    return len(list_compared_windows(config, validation)) if validation else 0


def describe_resume(run: Run, start: Start) -> str:
    """Return where the run resumes from, and whether it will be bit-identical to an uninterrupted run."""
    facts = machine_facts(run.runtime)
    changed = [
        f"{name} {old} -> {facts.get(name)}" for name, old in start.state["env"].items() if facts.get(name) != old
    ]
    changed += describe_arithmetic_changes(run.optimizers, start.state["optimizer"])
    exactness = describe_exactness(changed, run.runtime.device.type, deterministic=run.config.training.deterministic)
    return f"resuming from {start.path} after step {start.step}: {exactness}"


def describe_exactness(changed: Sequence[str], device_type: str, *, deterministic: bool) -> str:
    """Return whether a resumed run is bit-exact, given what changed. On a GPU this requires deterministic kernels."""
    if changed:
        return f"not bit-exact, because of {', '.join(changed)}"
    if device_type == "cpu" or deterministic:
        return "bit-exact"
    return (
        "equal up to rounding, because some GPU kernels add in a varying order (training.deterministic true: bit-exact)"
    )


def state_of(run: Run, progress: Progress) -> State:
    """Return all that a resume needs, plus the tokenizer, so that a checkpoint is self-contained."""
    t, batches = run.config.training, run.batches
    return {
        **progress.to_state(),
        "format": FORMAT,
        "model": run.model.state_dict(),
        "optimizer": optimizer_states(run.optimizers),
        "scheduler": {
            "schedule": t.schedule,
            "step": progress.step,
            "learning_rate": learning_rate_at(max(0, progress.step - 1), t),
            "warmup_steps": t.warmup_steps,
            "train_steps": t.train_steps,
            "decay_steps": t.decay_steps,
        },
        "scaler": run.runtime.scaler.state_dict(),
        "data": {
            "seed": t.seed,
            "epoch": int(batches.epoch_of(progress.step)),
            "next_batch": progress.step,
            "order_version": ORDER_VERSION,
            "tokens_fingerprint": run.corpus.fingerprint,
            "sources": [store.fingerprint for store in run.corpus.stores],
            "tokens": run.corpus.train_tokens,
            "windows": len(batches.windows),
        },
        "rng": random_state(),
        "best": {},
        "config": run.config.model_dump_json(),
        "tokenizer": {
            "text": run.tokenizer.text,
            "fingerprint": run.tokenizer.fingerprint,
            "vocab_size": run.tokenizer.vocab_size,
            "end_of_text": run.tokenizer.end_of_text,
            "files": dict(run.tokenizer.files),
        },
        "env": machine_facts(run.runtime),
        "wandb_run_id": run.wandb_run_id,
        "created_unix": time.time(),
    }
