"""The pages at the start and the end of a run, and the same facts as events."""

import contextlib
import dataclasses
import datetime
import platform
from pathlib import Path
from typing import cast

import torch

from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.errors import (
    Interrupted,
    ResourceError,
    Smollm2Error,
)
from smollm2.formatting import format_bytes, format_estimate
from smollm2.model.transformer import Block
from smollm2.plan.describe import Plan, describe_origin, make_plan
from smollm2.runtime.commands import shown_path, smollm2_command
from smollm2.runtime.device import (
    machine_facts,
)
from smollm2.runtime.throughput import machine_of, measure_if_long
from smollm2.storage.run_folder import step_of
from smollm2.training.progress import Progress
from smollm2.training.setup import Run


def plan_run(run: Run) -> Plan:
    """Return what the run needs on this machine."""
    machine = machine_of(run.runtime)
    plan = make_plan(run.config, machine)
    if plan.throughput.measured:
        return plan
    return make_plan(run.config, machine, measure_if_long(run.runtime, machine, plan.duration.total))


def start_page(run: Run, progress: Progress, plan: Plan) -> list[tuple[str, str]]:
    """What is trained, on what, with which data, and what it will take."""
    t, m, runtime = run.config.training, run.config.model, run.runtime
    block = cast(Block, run.model.model.layers[0])
    heads = f"{m.num_attention_heads} heads ({m.num_key_value_heads} key-value)"
    ranks = f", {runtime.world_size} processes" if runtime.world_size > 1 else ""
    epochs = run.batches.epoch_of(t.train_steps)
    batch, length = run.config.global_batch_size, t.sequence_length
    return [
        (
            "model",
            f"{plan.parameters:,} parameters: {m.num_hidden_layers} layers, {m.hidden_size} wide, {heads}, {m.norm}",
        ),
        ("device", f"{runtime.device.type}, {torch.get_num_threads()} threads{ranks}"),
        (
            "precision",
            f"{runtime.precision.name}: {runtime.precision.reason}; attention: {block.self_attn.backend}; "
            f"compile: {'each block, at the first update' if t.compile else 'off'}",
        ),
        (
            "text",
            f"{run.config.data.input}: {len(run.batches.windows):,} windows of {length:,} tokens"
            f"{', documents isolated' * run.config.data.document_mask}",
        ),
        ("batch", f"{batch} sequences = {batch * length:,} tokens an update"),
        ("updates", f"{progress.step:,} of {t.train_steps:,} done; {epochs:.1f} epochs in all"),
        (
            "optimizer",
            f"{t.optimizer}, rate {t.learning_rate:g}, {t.warmup_steps} updates of warmup, then {t.schedule}",
        ),
        (
            "memory",
            f"about {format_bytes(plan.memory.total)}; checkpoints {format_bytes(plan.disk.total)}",
        ),
        (
            "time",
            f"about {format_estimate(plan.duration.of(t.train_steps - progress.step))}, {describe_origin(plan.throughput)}",
        ),
        ("run folder", t.save_dir),
    ]


def note_start(run: Run, progress: Progress) -> None:
    """Leave in events.jsonl what the report says of data and machine; the console's start page has said it."""
    windows, config = run.batches.windows, run.config
    run.tracker.log_event(
        "data",
        "",
        progress.step,
        input=config.data.input,
        tokenizer=config.data.tokenizer,
        vocab_size=run.tokenizer.vocab_size,
        **dataclasses.asdict(run.store.statistics),
        windows=len(windows),
        window_tokens=windows.length,
        tokens_used=windows.tokens_used,
        epochs=float(run.batches.epoch_of(config.training.train_steps)),
    )
    facts = {"system": f"{platform.system()} {platform.machine()}", **machine_facts(run.runtime)}
    run.tracker.log_event("start", "", progress.step, **facts)


def note_stop(run: Run, error: Exception) -> None:
    """Leave in events.jsonl why the run ends early, at the step from which it can go on; the command says it."""
    saved: list[Path] = []
    with contextlib.suppress(ResourceError):  # what ends the run is said, not what follows from it
        saved = list_checkpoints(Path(run.config.training.save_dir))
    kind = "stopped" if isinstance(error, Interrupted) else "failed"
    reason = str(error) if isinstance(error, Smollm2Error) else type(error).__name__
    run.tracker.log_event(kind, "", step_of(saved[-1]) if saved else 0, reason=reason)


def end_page(run: Run, progress: Progress, seconds: float) -> list[tuple[str, str]]:
    """What the run left behind."""
    folder = Path(run.config.training.save_dir)
    rows = [
        ("time", str(datetime.timedelta(seconds=round(seconds)))),
        ("logging overhead", f"{run.tracker.seconds:.1f} s of {seconds:.0f} s ({run.tracker.seconds / seconds:.1%})"),
        ("loss", f"{progress.loss:.4f}"),
        ("model", str(folder / f"step_{progress.step:04d}.pt")),
        ("samples", str(folder / "samples.jsonl")),
        ("metrics", str(folder / "metrics.jsonl")),
        ("report", str(folder / "report.html")),
        ("generate text", f'{smollm2_command()} generate {shown_path(folder)} --prompt "Once upon a time"'),
    ]
    if run.validation:
        rows.insert(3, ("best validation loss", f"{progress.best_validation_loss:.4f}"))
    return rows
