"""The live objects of a run: what they are, how they are opened, and how a checkpoint puts them back.

Before anything slow starts, the ranks agree on code, config, text and checkpoint; what a resume changes is said or refused;
the disk is compared with the checkpoints of the whole run.
"""

import contextlib
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from smollm2.checkpoint.discovery import find_resumable, list_checkpoints, load_checkpoint
from smollm2.checkpoint.format import FORMAT
from smollm2.checkpoint.saving import Saver
from smollm2.config.reading import changed_on_resume, effective_config_yaml
from smollm2.config.schema import Config, TrainingConfig
from smollm2.data.batches import ORDER_VERSION, Batches
from smollm2.data.sample import write_sample_corpus
from smollm2.data.store import TokenStore, open_tokens, prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.data.windows import Windows
from smollm2.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    ResourceError,
    Smollm2Error,
    TrainingError,
)
from smollm2.formatting import format_bytes
from smollm2.inference.evaluation import spread
from smollm2.inference.loading import check_shapes
from smollm2.model.attention import check_backend, choose_backend
from smollm2.model.transformer import Block, SmolLM2
from smollm2.plan import arithmetic as plan
from smollm2.report.tracker import ReportTracker
from smollm2.runtime.device import (
    Runtime,
    compile_blocks,
    environment,
    is_lost_rank,
    machine_facts,
    memory_limit,
    random_state,
    restore_random_state,
)
from smollm2.runtime.ranks import Watch, find_disagreement
from smollm2.storage.atomic import probe_folder, write_atomically
from smollm2.tracking.base import Fanout, Fence
from smollm2.tracking.console import ConsoleTracker, RunLog
from smollm2.tracking.jsonl import JsonlTracker
from smollm2.tracking.tensorboard import start_tensorboard
from smollm2.tracking.wandb import start_wandb
from smollm2.tracking.wandb_environment import make_run_id, prepare_environment
from smollm2.training.optim import (
    build_optimizers,
    learning_rate_at,
    load_optimizer_states,
    optimizer_states,
    set_learning_rate,
)
from smollm2.training.step import (
    SPIKE_WINDOW,
    StepResult,
    is_spike,
    micro_batch_size,
    smaller_micro_batch,
)

State = dict[str, Any]
"""A checkpoint's content, as checkpoint.py describes it."""


@dataclass(frozen=True)
class Progress:
    """All that the loop remembers.

    `loss` is that of the last update, `losses` the last 128 that were finite; `skipped` are the updates that were not,
    `spikes` those whose loss stood out, `pending` the duties of this step that are not done: validation, samples.
    `clipped` counts the updates since the last look inside the model whose gradient was clipped, and all of them.
    """

    step: int = 0
    tokens: int = 0
    loss: float = math.nan
    best_validation_loss: float = math.inf
    skipped: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    spikes: tuple[int, ...] = ()
    pending: tuple[str, ...] = ()
    clipped: tuple[int, int] = (0, 0)

    def after(self, result: StepResult) -> "Progress":
        """One update further; a skipped one counts."""
        step = self.step + 1
        skipped, losses, spikes = self.skipped, self.losses, self.spikes
        if result.skipped:
            skipped = (*skipped, step)
        else:  # what is not finite stays out of the statistics, which it would spoil for 128 steps
            spikes = (*spikes, step) if is_spike(losses, result.loss) else spikes
            losses = (*losses, result.loss)[-SPIKE_WINDOW:]
        tokens, clipped = self.tokens + result.tokens, (self.clipped[0] + result.clipped, self.clipped[1] + 1)
        return Progress(step, tokens, result.loss, self.best_validation_loss, skipped, losses, spikes, (), clipped)


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


def choose_micro_batch(run: Run) -> int:
    """Sequences in one forward pass. On a CPU, which Linux relieves by killing, `plan`'s memory decides beforehand.

    Raises ResourceError where not even one sequence fits.
    """
    config, runtime = run.config, run.runtime
    t, share = config.training, config.global_batch_size // runtime.world_size
    size: int | None = micro_batch_size(config.global_batch_size, runtime.world_size, t.batch_size)
    limit = memory_limit()
    if runtime.device.type != "cpu" or limit is None:
        return cast(int, size)
    processes = int(environment().get("LOCAL_WORLD_SIZE", "1"))

    def needed(size: int) -> int:
        smaller = config.model_copy(update={"training": t.model_copy(update={"batch_size": size})})
        return processes * plan.estimate_memory(smaller, runtime.planned_device).total

    asked = cast(int, size)
    while size and needed(size) > limit:
        size = smaller_micro_batch(share, size)
    if not size:
        raise ResourceError(
            f"{describe_out_of_memory(config, 1)}: {format_bytes(needed(1))} are needed, and this machine has "
            f"{format_bytes(limit)}"
        )
    if size < asked:
        run.tracker.log_event(
            "micro_batch",
            f"training.batch_size: {asked} sequences at once need about {format_bytes(needed(asked))} and this machine has "
            f"{format_bytes(limit)}; {size} at once, as many an update",
            run.resumed_step,
        )
    return size


def describe_out_of_memory(config: Config, size: int) -> str:
    """What to set where the memory does not suffice for micro-batches of `size`."""
    if size > 1:
        return f"set training.batch_size {size} and training.gradient_accumulation_steps {config.global_batch_size // size}"
    return (
        f"training.batch_size: {config.training.batch_size} - out of memory even with one sequence at once - set "
        "training.gradient_checkpointing true, a shorter training.sequence_length or a smaller model"
    )


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


def share_corpus(
    config: Config,
    runtime: Runtime,
    start: tuple[Path, State] | None,
    origins: Mapping[str, str],
    console: ConsoleTracker,
) -> tuple[Tokenizer, TokenStore]:
    """The tokenizer and the tokens. Rank 0 alone reads the text, which may be standard input; the others open what it
    made. Raises DataError where a rank cannot."""
    opened, made = None, None
    with runtime.together():
        if runtime.rank == 0:
            opened = open_corpus(config, runtime, start, origins, console)
            made = (opened[0].text, opened[0].end_of_text, str(opened[1].folder))
    text, end_of_text, folder = runtime.gather(made)[0]
    with runtime.together():
        if opened is None:
            store = open_tokens(Path(folder))
            if store is None:
                raise DataError(
                    f"{folder} - rank 0 has made the tokens there and this rank finds none - set data.cache_dir to a folder "
                    "that all machines share"
                )
            opened = tokenizer_from_text(text, end_of_text), store
    return opened


def open_corpus(
    config: Config,
    runtime: Runtime,
    start: tuple[Path, State] | None,
    origins: Mapping[str, str],
    console: ConsoleTracker,
) -> tuple[Tokenizer, TokenStore]:
    """The tokenizer and the tokens, made where they are absent."""
    data, cache = config.data, Path(config.data.cache_dir)
    stop = runtime.stop.raise_if_set
    asked_for = data.input != "input.txt" or origins.get("data.input", "default").startswith("--")
    if not asked_for and not Path(data.input).exists():
        console.say(f"{data.input}: not there, so the sample corpus is made: {write_sample_corpus(Path(data.input))}")
    text = open_text(data.input, cache, data.document_separator, stop=stop)
    for note in text.notes:
        console.say(note)
    if start:
        saved = start[1]["tokenizer"]
        tokenizer = tokenizer_from_text(saved["text"], saved["end_of_text"])
    elif data.tokenizer != "auto":
        tokenizer = load_tokenizer(data.tokenizer, say=console.say)
    else:
        key = hashlib.sha256(f"1 {text.sha256} {text.separator} {config.model.vocab_size}".encode()).hexdigest()
        trained = cache / f"tokenizer-{key[:32]}.json"
        if not trained.exists():
            console.say(f"training a tokenizer of up to {config.model.vocab_size:,} entries on {text.name}")
            made = train_tokenizer(text.sample(stop=stop), config.model.vocab_size)
            probe_folder(cache)
            write_atomically(trained, made.text.encode())
        tokenizer = tokenizer_from_text(trained.read_text(encoding="utf-8"))
    store = prepare_tokens(
        text,
        tokenizer,
        cache,
        data.validation_fraction,
        report=lambda f: console.show_progress("tokenizing", f),
        stop=stop,
    )
    for note in store.notes:
        console.say(note)
    return tokenizer, store


def check_disk(config: Config, folder: Path) -> None:
    """Raises ResourceError where the checkpoints of the whole run will not fit, with the keep_last that does."""
    estimate = plan.make_plan(config, "cpu-float32", 1)
    held = sum(path.stat().st_size for path in list_checkpoints(folder))
    free = shutil.disk_usage(folder).free
    if estimate.disk_bytes <= free + held:
        return
    fits = int((free + held) / estimate.checkpoint_bytes) - 1  # one more lies there while the new one is checked
    advice = f"set training.keep_last: {fits - 1}" if fits > 2 else "free some space"
    raise ResourceError(
        f"{folder} - the run's {estimate.checkpoints} checkpoints need {format_bytes(estimate.disk_bytes)} and "
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


def refuse_disagreement(runtime: Runtime, facts: Mapping[str, object]) -> None:
    """Raises TrainingError, naming the rank and what differs, where the ranks are not about to do the same run."""
    found = find_disagreement(runtime.gather(dict(facts)))
    if found:
        rank, differing = found
        raise TrainingError(
            f"rank {rank} is not in the same run as rank 0: {', '.join(differing)} - start every rank with the same code, "
            "flags and files"
        )


def config_facts(config: Config) -> dict[str, object]:
    """The values of a config by dotted key."""
    sections = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def start_facts(
    runtime: Runtime, start: tuple[Path, State] | None, tokenizer: Tokenizer, store: TokenStore
) -> dict[str, object]:
    """What the ranks have found, each for itself, and must have found alike."""
    return {
        "the checkpoint": f"step {start[1]['step']}" if start else "none",
        "the tokenizer": tokenizer.fingerprint[:12],
        "the tokens": f"{store.fingerprint[:12]} {fingerprint_tokens(store)[:12]}",
        "precision": runtime.precision.name,
        "torch": str(torch.__version__),
    }


def fingerprint_code() -> str:
    """A short hash of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def fingerprint_tokens(store: TokenStore) -> str:
    """A hash of the number of tokens and of 64 pieces of them: a copy that another machine keeps may have gone bad."""
    digest = hashlib.sha256()
    for tokens in (store.train, store.validation):
        digest.update(f"{len(tokens)}|".encode())
        for first in spread(len(tokens), 64):
            digest.update(tokens[first : first + 1024].tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def watched(t: TrainingConfig, runtime: Runtime, log: RunLog) -> Iterator[Watch]:
    """A watch over the ranks, to be started once the run folder is there. Where a rank is lost in the block its name is
    found. A run that came to its end, or was asked to, ends on all ranks together: a launcher kills the others when
    the first has gone."""

    def say(message: str) -> None:
        log.write(message)
        ConsoleTracker(0, 0, sys.stderr).say(message)

    def end(error: Smollm2Error) -> None:
        if runtime.rank == error.rank:
            say(f"error: {error}")
        else:
            log.write(str(error))
        runtime.leave(error.exit_code)

    watch = Watch(Path(t.save_dir), runtime.rank, runtime.pulse.read, t.rank_timeout, end, say)
    code = 1
    try:
        try:
            yield watch
        except RuntimeError as error:
            if runtime.world_size == 1 or not is_lost_rank(error):
                raise
            log.write_error(error)
            raise watch.explain_loss() from None
        except Interrupted:
            with contextlib.suppress(RuntimeError):  # another ended otherwise
                runtime.gather("leaving")
            raise
        runtime.gather("leaving")
        code = 0
    except Smollm2Error as error:
        code = 0 if isinstance(error, Interrupted) else error.exit_code
        raise
    finally:
        watch.close(code)


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
