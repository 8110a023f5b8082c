"""Where a run starts: at step 0, or after a checkpoint, which is put back whole."""

import time
from pathlib import Path

from smollm2.checkpoint.discovery import find_resumable, list_checkpoints, load_checkpoint
from smollm2.checkpoint.format import FORMAT
from smollm2.data.batches import ORDER_VERSION
from smollm2.errors import (
    CheckpointError,
)
from smollm2.inference.weights import check_shapes
from smollm2.runtime.device import machine_facts
from smollm2.runtime.random_state import random_state, restore_random_state
from smollm2.tracking.console import ConsoleTracker
from smollm2.training.optim import (
    describe_arithmetic_changes,
    learning_rate_at,
    load_optimizer_states,
    optimizer_states,
    set_learning_rate,
)
from smollm2.training.progress import Progress
from smollm2.training.setup import Run, State, free_folder


def find_start(
    folder: Path, resume: str, checkpoint_path: str | Path | None, console: ConsoleTracker
) -> tuple[Path, State] | None:
    """The checkpoint to go on from. Raises CheckpointError where it is absent, or where a run would bury another."""
    if checkpoint_path is not None:
        return Path(checkpoint_path), load_checkpoint(Path(checkpoint_path))
    if resume == "auto":
        return find_resumable(folder, console.say)
    existing = list_checkpoints(folder)
    if existing:
        raise CheckpointError(
            f"{folder} - it holds {len(existing)} checkpoints of an earlier run, the newest {existing[-1].name} - go on with it by "
            f"--resume auto, or start afresh in another folder by --save_dir {free_folder(folder)}"
        )
    return None


def restore(run: Run, path: Path, state: State) -> Progress:
    """Put a checkpoint back, everything or nothing, the random state last."""
    check_shapes(run.model.state_dict(), state["model"], path)
    try:
        load_optimizer_states(run.optimizers, state["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} - its optimizer state does not fit: {error} - start afresh with another --save_dir"
        ) from None
    run.model.load_state_dict(state["model"])
    set_learning_rate(run.optimizers, learning_rate_at(max(0, state["step"] - 1), run.config.training))
    if state["scaler"]:
        run.runtime.scaler.load_state_dict(state["scaler"])
    facts = machine_facts(run.runtime)
    moved = [f"{name} {old} -> {facts.get(name)}" for name, old in state["env"].items() if facts.get(name) != old]
    moved += describe_arithmetic_changes(run.optimizers, state["optimizer"])
    exact = f"not bit-exact, because of {', '.join(moved)}" if moved else "bit-exact"
    run.tracker.log_event("resume", f"resuming from {path} after step {state['step']}: {exact}", state["step"])
    restore_random_state(state["rng"])
    return Progress(
        step=state["step"],
        tokens=state["tokens"],
        loss=state["loss"],
        best_validation_loss=state["stability"]["best_validation_loss"],
        skipped=tuple(state["stability"]["skipped"]),
        losses=tuple(state["stability"]["losses"]),
        spikes=tuple(state["stability"]["spikes"]),
        pending=tuple(state["stability"]["pending"]),
        clipped=tuple(state["stability"].get("clipped", (0, 0))),
    )


def state_of(run: Run, progress: Progress) -> State:
    """All that a run needs to go on, and the tokenizer, so that a checkpoint is complete alone; plain types only."""
    t, batches = run.config.training, run.batches
    return {
        "format": FORMAT,
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": progress.loss,
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
            "tokens_fingerprint": run.store.fingerprint,
            "tokens": len(run.store.train),
            "windows": len(batches.windows),
        },
        "rng": random_state(),
        "stability": {
            "skipped": list(progress.skipped),
            "losses": list(progress.losses),
            "spikes": list(progress.spikes),
            "pending": list(progress.pending),
            "clipped": list(progress.clipped),
            "best_validation_loss": progress.best_validation_loss,
        },
        "best": {},
        "config": run.config.model_dump_json(),
        "tokenizer": {
            "text": run.tokenizer.text,
            "fingerprint": run.tokenizer.fingerprint,
            "vocab_size": run.tokenizer.vocab_size,
            "end_of_text": run.tokenizer.end_of_text,
        },
        "env": machine_facts(run.runtime),
        "wandb_run_id": run.wandb_run_id,
        "created_unix": time.time(),
    }
