"""The live objects of a run: what they are, how they are opened, and how a checkpoint puts them back.

Before anything slow starts, the ranks agree on code, config, text and checkpoint; what a resume changes is said or refused;
the disk is compared with the checkpoints of the whole run.
"""

import contextlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.checkpoint.saving import Saver
from smollm2.config.reading import changed_on_resume, effective_config_yaml
from smollm2.config.schema import Config
from smollm2.data.batches import Batches
from smollm2.data.store import TokenStore
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.windows import Windows
from smollm2.errors import (
    CheckpointError,
    ConfigError,
    ResourceError,
    TrainingError,
)
from smollm2.formatting import format_bytes
from smollm2.model.attention import check_backend, choose_backend
from smollm2.model.transformer import Block, SmolLM2
from smollm2.plan.arithmetic import estimate_disk
from smollm2.report.tracker import ReportTracker
from smollm2.runtime.device import Runtime, compile_blocks, environment
from smollm2.storage.atomic import write_atomically
from smollm2.storage.run_folder import METRICS
from smollm2.tracking.base import Fanout, Fence
from smollm2.tracking.console import ConsoleTracker
from smollm2.tracking.jsonl import JsonlTracker, read_values
from smollm2.tracking.tensorboard import start_tensorboard
from smollm2.tracking.wandb import start_wandb
from smollm2.tracking.wandb_environment import make_run_id, prepare_environment
from smollm2.training.optim import (
    build_optimizers,
    learning_rate_at,
)

State = dict[str, Any]
"""A checkpoint's content, as checkpoint.py describes it."""


@dataclass(frozen=True)
class Run:
    """The live objects of a run, which its functions share."""

    config: Config
    runtime: Runtime
    tokenizer: Tokenizer
    store: TokenStore
    batches: Batches
    validation: Windows | None
    model: SmolLM2
    prepared: nn.Module  # the model as it is called in training: itself, or wrapped for several ranks
    optimizers: Mapping[str, Optimizer]
    tracker: Fanout
    saver: Saver | None  # rank 0's
    wandb_run_id: str
    resumed_step: int


def free_folder(folder: Path) -> Path:
    """A name beside `folder` that nothing has."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 10**6))
    return next(path for path in numbered if not path.exists())


def open_run(
    config: Config,
    runtime: Runtime,
    start: tuple[Path, State] | None,
    tokenizer: Tokenizer,
    store: TokenStore,
    origins: Mapping[str, str],
    console: ConsoleTracker,
    stack: contextlib.ExitStack,
) -> Run:
    """Windows, model, optimizers and trackers. Raises the error of whatever cannot be had."""
    t, folder = config.training, Path(config.training.save_dir)
    if tokenizer.vocab_size != config.model.vocab_size:
        console.say(f"model.vocab_size: {config.model.vocab_size:,} -> {tokenizer.vocab_size:,}, the tokenizer's")
        config = config.with_vocab_size(tokenizer.vocab_size)
        origins = {**origins, "model.vocab_size": "the tokenizer"}
    if start:
        check_changes(config, start, store, console)
    if runtime.rank == 0:
        check_disk(config, folder)
    end_of_text = tokenizer.end_of_text if config.data.document_mask else None
    windows = Windows(store.train, t.sequence_length, config.data.stride, tokenizer.vocab_size, end_of_text)
    validation = None
    if len(store.validation) > 1:
        length = t.sequence_length
        validation = Windows(store.validation, length, length, tokenizer.vocab_size, end_of_text)
    console.say(store.statistics.describe(windows))
    model = build_model(config, runtime)
    trackers: list[Any] = [console]
    rows = None
    if runtime.rank == 0:
        rows = JsonlTracker(folder, start[1]["step"] if start else 0, console.say)
        console.restore_smoothing(read_values(folder / METRICS, "loss"))
        trackers.append(rows)
        write_atomically(folder / "config.yaml", effective_config_yaml(config, dict(origins)).encode())
        tokenizer.save(folder / "tokenizer")
    run_id = start[1]["wandb_run_id"] if start else ""
    if runtime.rank == 0 and config.wandb.enabled:
        run_id = run_id or make_run_id()
        found = prepare_environment(environment(), folder)
        wandb = start_wandb(config, folder, run_id, found, console.say, start[1]["step"] if start else 0)
        trackers += [wandb] if wandb else []
    if runtime.rank == 0 and t.tensorboard:
        tensorboard = start_tensorboard(folder, start[1]["step"] if start else 0, console.say)
        trackers += [tensorboard] if tensorboard else []
    if runtime.rank == 0:
        trackers.append(Fence("report.html", lambda: ReportTracker(folder), console.say))
    tracker = Fanout(trackers)
    stack.callback(tracker.close)
    saver = None
    if rows:
        saver = Saver(config, rows, tracker)
        stack.callback(saver.finish)
    return Run(
        config=config,
        runtime=runtime,
        tokenizer=tokenizer,
        store=store,
        batches=Batches(windows, t.seed, config.global_batch_size),
        validation=validation,
        model=model,
        prepared=model,
        optimizers=build_optimizers(model, t),
        tracker=tracker,
        saver=saver,
        wandb_run_id=run_id,
        resumed_step=start[1]["step"] if start else 0,
    )


def check_disk(config: Config, folder: Path) -> None:
    """Raises ResourceError where the checkpoints of the whole run will not fit, with the keep_last that does."""
    disk = estimate_disk(config)
    held = sum(path.stat().st_size for path in list_checkpoints(folder))
    free = shutil.disk_usage(folder).free
    if disk.total <= free + held:
        return
    fits = int((free + held) / disk.checkpoint_bytes) - 1  # one more lies there while the new one is checked
    advice = f"set training.keep_last: {fits - 1}" if fits > 2 else "free some space"
    raise ResourceError(
        f"{folder} - the run's {disk.checkpoints} checkpoints need {format_bytes(disk.total)} and "
        f"{format_bytes(free)} are free - {advice}, or save less often, or choose another --save_dir"
    )


def check_changes(config: Config, start: tuple[Path, State], store: TokenStore, console: ConsoleTracker) -> None:
    """Say what a resume changes. Raises CheckpointError for what makes it another run, ConfigError for a run that is
    shorter than what was done."""
    path, state = start
    t = config.training
    if state["step"] > t.train_steps:
        raise ConfigError(
            f"training.train_steps: {t.train_steps} is less than the {state['step']} that {path} has done; raise it"
        )
    changes = changed_on_resume(Config.model_validate_json(state["config"]), config)
    refused = [f"{c.key} {c.old} -> {c.new}" for c in changes if c.rule == "refused"]
    if state["data"]["tokens_fingerprint"] != store.fingerprint and not refused:
        refused = ["the text behind data.input is another one"]
    if refused:
        raise CheckpointError(
            f"{path} - it belongs to another run: {', '.join(refused)} - undo that, or start afresh with "
            f"--save_dir {free_folder(Path(t.save_dir))}"
        )
    for change in changes:
        if change.rule == "noted":
            console.say(
                f"{change.key}: {change.old} -> {change.new}; from here the run is not bit-exact with the uninterrupted one"
            )
    old, new = state["scheduler"]["learning_rate"], learning_rate_at(max(0, state["step"] - 1), t)
    if not math.isclose(old, new):
        console.say(f"learning rate at step {state['step']}: {old:.3e} -> {new:.3e}")


def build_model(config: Config, runtime: Runtime) -> SmolLM2:
    """The model on its device, at the weights of the seed, with attention, checkpointing and compilation as asked."""
    t, m = config.training, config.model
    torch.manual_seed(t.seed)
    model = SmolLM2(m).to(runtime.device)
    heads = (m.num_attention_heads, m.num_key_value_heads, m.head_dim)
    dtype, isolates = runtime.precision.dtype, config.data.document_mask
    backend = choose_backend(t.attention, runtime.device.type, dtype, isolates=isolates)
    problem = check_backend(backend, runtime.device, dtype, heads, isolates=isolates)
    if problem:
        raise TrainingError(f"{problem}; use training.attention: {'eager' if backend == 'sdpa' else 'sdpa'}")
    for block in model.model.layers:
        cast(Block, block).self_attn.backend = backend
    model.model.checkpointing = t.gradient_checkpointing
    if t.compile:
        compile_blocks(model.model.layers)
    return model
