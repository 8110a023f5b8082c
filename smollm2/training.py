"""A run, from the first line to the last: open what it needs, make the updates, leave a model behind.

What the loop remembers between two updates is `Progress`, saved whole; the rate is a function of the step, a batch of
the seed and its number, a sample of the seed and the step. So a run that was killed and resumed goes on bit for bit.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smollm2 import checkpoint, plan
from smollm2.attention import check_backend, choose_backend
from smollm2.config import Config, TrainingConfig
from smollm2.config_file import changed_on_resume, effective_config_yaml
from smollm2.data.batches import ORDER_VERSION, Batches, prefetched
from smollm2.data.sample import write_sample_corpus
from smollm2.data.store import TokenStore, open_tokens, prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.windows import Ints, Windows
from smollm2.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    ResourceError,
    Smollm2Error,
    TrainingError,
)
from smollm2.evaluation import evaluate_on_ranks, spread
from smollm2.files import lock_folder, probe_folder, write_atomically
from smollm2.generation import generate
from smollm2.loading import check_shapes
from smollm2.model import Block, SmolLM2
from smollm2.optim import build_optimizers, learning_rate_at, load_optimizer_states, optimizer_states, set_learning_rate
from smollm2.ranks import Watch, find_disagreement, find_odd_replica
from smollm2.runtime import (
    Runtime,
    compile_blocks,
    environment,
    is_lost_rank,
    machine_facts,
    memory_limit,
    random_state,
    restore_random_state,
    start_runtime,
    weight_sums,
)
from smollm2.step import (
    SPIKE_WINDOW,
    MicroBatchTooLarge,
    StepResult,
    is_spike,
    micro_batch_size,
    rehearse,
    smaller_micro_batch,
    too_many_skips,
    update,
)
from smollm2.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.tracking.base import Fanout, Sample
from smollm2.tracking.console import ConsoleTracker, RunLog, find_secrets
from smollm2.tracking.jsonl import JsonlTracker
from smollm2.tracking.wandb import make_run_id, prepare_environment, start_wandb

MAX_FAILED_SAVES = 3
REPLICA_INTERVAL = 1000
"""Updates between two comparisons of the ranks' weights; each save compares them as well."""

TIME_UP = 1000
"""Stands among the numbers of signals for the end of the run's own time."""

State = dict[str, Any]
"""A checkpoint's content, as checkpoint.py describes it."""


@dataclass(frozen=True)
class Progress:
    """All that the loop remembers.

    `loss` is that of the last update, `losses` the last 128 that were finite; `skipped` are the updates that were not,
    `spikes` those whose loss stood out, `pending` the duties of this step that are not done: validation, samples.
    """

    step: int = 0
    tokens: int = 0
    loss: float = math.nan
    best_validation_loss: float = math.inf
    skipped: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    spikes: tuple[int, ...] = ()
    pending: tuple[str, ...] = ()

    def after(self, result: StepResult) -> "Progress":
        """One update further; a skipped one counts."""
        step = self.step + 1
        skipped, losses, spikes = self.skipped, self.losses, self.spikes
        if result.skipped:
            skipped = (*skipped, step)
        else:  # what is not finite stays out of the statistics, which it would spoil for 128 steps
            spikes = (*spikes, step) if is_spike(losses, result.loss) else spikes
            losses = (*losses, result.loss)[-SPIKE_WINDOW:]
        tokens = self.tokens + result.tokens
        return Progress(step, tokens, result.loss, self.best_validation_loss, skipped, losses, spikes)


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
    rows: JsonlTracker | None
    wandb_run_id: str
    resumed_step: int


@dataclass
class Clock:
    """Whether another step, with its duties and its save, still fits into the time limit."""

    limit: float | None
    started: float = field(default_factory=time.monotonic)
    step_began: float = 0.0
    longest: float = 0.0

    def begin_step(self) -> None:
        """A step, its duties and its save begin; how long the longest of the run took is remembered."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.step_began if self.step_began else 0.0)
        self.step_began = now

    def is_up(self, save_seconds: float) -> bool:
        """Whether the next step might end too late. Asked at the end of a step, before its save."""
        now = time.monotonic()
        return self.limit is not None and now - self.started + max(
            self.longest, now - self.step_began
        ) + save_seconds > (self.limit)


@dataclass
class Meter:
    """Tokens and seconds of the updates since the last report; evaluation, samples and saves are outside."""

    tokens: int = 0
    seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))

    def add(self, result: StepResult) -> None:
        """One update more."""
        self.recent.append(result.seconds)
        self.tokens += result.tokens
        self.seconds += result.seconds

    def take(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return rate


def train(
    config: Config,
    *,
    resume: str = "",
    checkpoint_path: str | Path | None = None,
    origins: Mapping[str, str] | None = None,
) -> Progress:
    """Train as `config` says, and return where the run ended.

    `resume="auto"` goes on from the newest valid checkpoint in save_dir, if there is one; `checkpoint_path` from that
    one. `origins` says where each value came from, for the run folder's config.yaml. Raises a Smollm2Error for what a
    user can mend, among them Interrupted after a signal or at the time limit, when the run is saved.
    """
    clock = Clock(config.training.time_limit)
    runtime = start_runtime(config.training)
    folder = Path(config.training.save_dir)
    is_new = not folder.exists()
    log = RunLog(folder, runtime.rank, find_secrets(environment()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.stop.listening())
        watch = stack.enter_context(watched(config.training, runtime, log))
        quiet = None if runtime.rank == 0 else stack.enter_context(Path(os.devnull).open("w"))
        console = ConsoleTracker(config.training.train_steps, 0, quiet, log)
        try:
            with runtime.together():
                micro_batch_size(config.global_batch_size, runtime.world_size, config.training.batch_size)
                if runtime.rank == 0:
                    probe_folder(folder)
                    if not stack.enter_context(lock_folder(folder)):
                        console.say(f"{folder}: this file system has no locks; take care that no other run writes here")
            if runtime.world_size > 1:
                watch.start()
            refuse_disagreement(runtime, {"the code": fingerprint_code(), **config_facts(config)})
            with runtime.together():
                start = find_start(folder, resume, checkpoint_path, console)
            tokenizer, store = share_corpus(config, runtime, start, origins or {}, console)
            refuse_disagreement(runtime, start_facts(runtime, start, tokenizer, store))
            with runtime.together():
                run = open_run(config, runtime, start, tokenizer, store, origins or {}, console, stack)
                progress = restore(run, *start) if start else Progress()
            run = dataclasses.replace(run, prepared=runtime.prepare_model(run.model))
            size = choose_micro_batch(run)
            if number := runtime.stop_requested():
                raise Interrupted(f"stopped by {signal.Signals(number).name} before a step; nothing was lost", number)
        except Smollm2Error:
            stack.close()
            if is_new and runtime.rank == 0:  # nothing was trained: leave nothing behind
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if progress.step == config.training.train_steps and not progress.pending:
            more = f"--resume auto --train_steps {2 * progress.step}"
            console.say(f"{folder}: all {progress.step} updates are done; for more: {more}")
            return progress
        if runtime.rank == 0 and (aside := checkpoint.set_aside_later(folder, progress.step)):
            console.say(f"set aside, since the run goes on from before them: {', '.join(path.name for path in aside)}")
        started = time.perf_counter()
        console.show_page("SmolLM2 Training", start_page(run, progress))
        try:
            progress = run_steps(run, progress, size, clock)
        except Exception as error:
            log.write_error(error)
            if isinstance(error, DataError):  # each rank reads windows of its own
                error.rank = runtime.rank
            if isinstance(error, TrainingError):
                raise TrainingError(f"{error} ({log.path})") from None
            if isinstance(error, torch.OutOfMemoryError):
                raise ResourceError(
                    f"training.batch_size: {config.training.batch_size} - out of memory - lower it, and raise "
                    "training.gradient_accumulation_steps by as much; the checkpoints are intact"
                ) from None
            raise
        console.show_page("Done", end_page(run, progress, time.perf_counter() - started))
        stack.close()
        if runtime.stop.number:  # it came during the last save, or while the trackers closed
            raise_stopped(runtime.stop.number, progress.step)
    return progress


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
    device = "cpu-bf16" if runtime.precision.name == "bf16" else "cpu-float32"

    def needed(size: int) -> int:
        smaller = config.model_copy(update={"training": t.model_copy(update={"batch_size": size})})
        return processes * plan.estimate_memory(smaller, device).total

    asked = cast(int, size)
    while size and needed(size) > limit:
        size = smaller_micro_batch(share, size)
    if not size:
        raise ResourceError(
            f"{describe_out_of_memory(config, 1)}: {plan.show_bytes(needed(1))} are needed, and this machine has "
            f"{plan.show_bytes(limit)}"
        )
    if size < asked:
        run.tracker.log_event(
            "micro_batch",
            f"training.batch_size: {asked} sequences at once need about {plan.show_bytes(needed(asked))} and this machine has "
            f"{plan.show_bytes(limit)}; {size} at once, as many an update",
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


def raise_stopped(number: int, step: int) -> NoReturn:
    """Raises Interrupted, by a signal or by TIME_UP, with the step that is saved."""
    if number == TIME_UP:
        raise Interrupted(f"training.time_limit is reached after step {step}, which is saved", 0)
    raise Interrupted(f"stopped by {signal.Signals(number).name} after step {step}, which is saved", number)


def run_steps(run: Run, progress: Progress, size: int, clock: Clock) -> Progress:
    """From `progress` to the last step, in micro-batches of `size`. Raises Interrupted after a signal or at the time
    limit, TrainingError where the numbers fail."""
    t, runtime, tracker = run.config.training, run.runtime, run.tracker
    share = run.config.global_batch_size // runtime.world_size
    first_row = runtime.rank * share
    meter, failed_saves, save_seconds = Meter(), 0, 0.0
    with contextlib.closing(prefetched(run.batches, progress.step, first_row, first_row + share)) as batches:
        while progress.pending or progress.step < t.train_steps:
            runtime.pulse.step = progress.step + 1
            clock.begin_step()
            if not progress.pending:  # else a signal cut this step's duties short, and they come first
                result, size = update_or_shrink(run, progress.step, next(batches), size)
                progress = progress.after(result)
                progress = dataclasses.replace(progress, pending=duties_of(run, progress.step))
                meter.add(result)
                note_trouble(run, progress, result)
                if progress.step == 1 or due(progress.step, t.log_interval, progress.step == t.train_steps):
                    tracker.log(report(run, progress, result, meter), progress.step)
            step, last = progress.step, progress.step == t.train_steps
            progress, validation_loss = do_duties(run, progress, size)
            time_up = clock.is_up(2 * save_seconds) and not last
            stop = runtime.stop_requested(TIME_UP if time_up else 0)
            if stop or due(step, t.save_interval, last):
                check_replicas(run, step)
                began = time.monotonic()
                must_succeed = last or bool(stop) or failed_saves + 1 == MAX_FAILED_SAVES
                is_saved = save(run, progress, validation_loss, must_succeed=must_succeed)
                failed_saves = 0 if is_saved else failed_saves + 1
                save_seconds = max(save_seconds, time.monotonic() - began)
            elif due(step, REPLICA_INTERVAL, last):
                check_replicas(run, step)
            if stop or last:
                leave_pace(run, meter)
            if stop and (progress.pending or not last):
                raise_stopped(stop, step)
    return progress


def leave_pace(run: Run, meter: Meter) -> None:
    """Leave in the cache folder how long an update took, for `smollm2 plan`; a guess about speed never ends a run."""
    device, cores = plan.find_device()
    on_cpu = run.runtime.device.type == "cpu"
    is_whole = run.runtime.world_size == 1 and torch.get_num_threads() == cores
    is_known = on_cpu == device.startswith("cpu") and (is_whole or not on_cpu)
    if run.runtime.rank == 0 and is_known and len(meter.recent) >= 3:
        seconds = statistics.median(list(meter.recent)[1:]) * run.runtime.world_size
        with contextlib.suppress(OSError, ResourceError):
            plan.keep_pace(run.config, device, cores, seconds)


def update_or_shrink(run: Run, step: int, batch: tuple[Ints, Ints], size: int) -> tuple[StepResult, int]:
    """Update `step` + 1 in micro-batches of `size`, or from its beginning in smaller ones where memory runs out; and of
    how many. Raises ResourceError where one sequence at once is too much."""
    t, runtime = run.config.training, run.runtime
    while True:
        with contextlib.suppress(MicroBatchTooLarge):
            if step == run.resumed_step and runtime.world_size > 1 and runtime.device.type == "cuda":
                rehearse(run.prepared, *split(batch, size, runtime)[0], runtime)
            result = update(
                run.prepared,
                run.optimizers,
                split(batch, size, runtime),
                runtime,
                learning_rate=learning_rate_at(step, t),
                max_grad_norm=t.max_grad_norm,
                z_loss=t.z_loss,
            )
            return result, size
        smaller = smaller_micro_batch(len(batch[0]), size)
        if smaller is None:
            raise ResourceError(describe_out_of_memory(run.config, 1))
        run.tracker.log_event(
            "out_of_memory",
            f"step {step + 1}: out of memory with {size} sequences at once; from here on {smaller} at once, as many an update. "
            f"To begin that way: {describe_out_of_memory(run.config, smaller)}",
            step + 1,
        )
        size = smaller
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def duties_of(run: Run, step: int) -> tuple[str, ...]:
    """What follows the update `step`, besides its report and its save."""
    t, last = run.config.training, step == run.config.training.train_steps
    validation = run.validation is not None and due(step, t.eval_interval, last)
    samples = t.sample_tokens > 0 and due(step, t.sample_interval, last)
    return ("validation",) * validation + ("samples",) * samples


def do_duties(run: Run, progress: Progress, size: int) -> tuple[Progress, float | None]:
    """Validation and samples; what a signal cuts short stays pending and is done again. And the validation loss."""
    step, validation_loss = progress.step, None
    with contextlib.suppress(Interrupted):
        if "validation" in progress.pending:
            validation_loss = validate(run, step, size, whole=step == run.config.training.train_steps)
            best = min(progress.best_validation_loss, validation_loss)
            rest = tuple(duty for duty in progress.pending if duty != "validation")
            progress = dataclasses.replace(progress, best_validation_loss=best, pending=rest)
        if "samples" in progress.pending:
            run.tracker.log_text(draw_samples(run, step), step)
            progress = dataclasses.replace(progress, pending=())
    return progress, validation_loss


def due(step: int, interval: int, last: bool) -> bool:
    """Whether a duty of this interval (0: never) falls on this step; every duty falls on the last."""
    return last or (interval > 0 and step % interval == 0)


def split(batch: tuple[Ints, Ints], size: int, runtime: Runtime) -> list[tuple[Tensor, Tensor]]:
    """This rank's input_ids and labels as micro-batches of `size` sequences, on the device."""
    input_ids, labels = (torch.split(runtime.to_device(array), size) for array in batch)
    return list(zip(input_ids, labels, strict=True))


def report(run: Run, progress: Progress, result: StepResult, meter: Meter) -> dict[str, float | int]:
    """The row of one update; everything but tokens_per_second is the same whenever and wherever it is computed again."""
    return {
        "tokens": progress.tokens,
        "epoch": run.batches.epoch_of(progress.step),
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "skipped": len(progress.skipped),
        "tokens_per_second": meter.take(),
    }


def note_trouble(run: Run, progress: Progress, result: StepResult) -> None:
    """Say what is wrong with an update, and on which windows."""
    step = progress.step
    if result.skipped:
        handle_skip(run, progress, result)
    elif step in progress.spikes[-1:]:
        before = [path.name for path in list_before(Path(run.config.training.save_dir), step)]
        kept = f"{before[-1]} is from before and stays" if before else "no checkpoint is from before"
        windows = run.batches.window_ids(step - 1).tolist()
        message = (
            f"step {step}: the loss {result.loss:g} stands out from those of the last {SPIKE_WINDOW} updates; {kept}"
        )
        run.tracker.log_event("spike", message, step, windows=windows)


def list_before(folder: Path, step: int) -> list[Path]:
    """The checkpoints of less than `step` updates."""
    return [path for path in checkpoint.list_checkpoints(folder) if checkpoint.step_of(path) < step]


def handle_skip(run: Run, progress: Progress, result: StepResult) -> None:
    """Say which update was skipped, on which windows. Raises TrainingError, with a checkpoint, where it must not go on."""
    step, fp16 = progress.step, run.runtime.scaler.is_enabled()
    windows = run.batches.window_ids(step - 1).tolist()
    numbers = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
    run.tracker.log_event(
        "skip", f"step {step}: not finite ({numbers}); weights left as they were", step, windows=windows
    )
    reason = too_many_skips(progress.skipped, step, fp16=fp16)
    if reason is None and run.config.training.on_nonfinite == "stop" and not fp16:
        reason = f"step {step} was not finite ({numbers}) and training.on_nonfinite is stop"
    if reason:
        save(run, progress, None)
        raise TrainingError(
            f"{reason}; the run is saved at step {step}. Lower training.learning_rate, or use training.precision float32"
        )


def validate(run: Run, step: int, size: int, *, whole: bool) -> float:
    """Log validation loss and bits per byte over a fixed spread of windows, at the end over all of them."""
    assert run.validation is not None
    count = len(run.validation)
    indices = spread(count, count if whole else run.config.training.eval_windows)
    bytes_per_token = run.tokenizer.bytes_per_token
    found = evaluate_on_ranks(run.model, run.validation, indices, bytes_per_token, batch_size=size, runtime=run.runtime)
    run.tracker.log({"validation_loss": found.loss, "validation_bpb": found.bits_per_byte}, step)
    return found.loss


def draw_samples(run: Run, step: int) -> list[Sample]:
    """What the model writes after each prompt, and after none; drawn from the seed and the step alone.

    Raises Interrupted between two prompts.
    """
    t, samples, seed = run.config.training, [], (run.config.training.seed + step) % 2**63
    for prompt in (*t.sample_prompts, ""):
        run.runtime.raise_if_stopped()
        with run.runtime.autocast():
            text = generate(run.model, run.tokenizer, [prompt], max_new_tokens=t.sample_tokens, seed=seed)[0]
        samples.append(Sample(prompt, text))
    return samples


def find_start(
    folder: Path, resume: str, checkpoint_path: str | Path | None, console: ConsoleTracker
) -> tuple[Path, State] | None:
    """The checkpoint to go on from. Raises CheckpointError where it is absent, or where a run would bury another."""
    if checkpoint_path is not None:
        return Path(checkpoint_path), checkpoint.load_checkpoint(Path(checkpoint_path))
    if resume == "auto":
        return checkpoint.find_resumable(folder, console.say)
    existing = checkpoint.list_checkpoints(folder)
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
    windows = Windows(store.train, t.sequence_length, config.data.stride, tokenizer.vocab_size)
    validation = None
    if len(store.validation) > 1:
        validation = Windows(store.validation, t.sequence_length, t.sequence_length, tokenizer.vocab_size)
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
        found = prepare_environment(environment())
        wandb = start_wandb(config.wandb, config.model_dump(mode="json"), folder, run_id, found, console.say)
        trackers += [wandb] if wandb else []
    tracker = Fanout(trackers)
    stack.callback(tracker.close)
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
        rows=rows,
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
    held = sum(path.stat().st_size for path in checkpoint.list_checkpoints(folder))
    free = shutil.disk_usage(folder).free
    if estimate.disk_bytes <= free + held:
        return
    fits = int((free + held) / estimate.checkpoint_bytes) - 1  # one more lies there while the new one is checked
    advice = f"set training.keep_last: {fits - 1}" if fits > 2 else "free some space"
    raise ResourceError(
        f"{folder} - the run's {estimate.checkpoints} checkpoints need {plan.show_bytes(estimate.disk_bytes)} and "
        f"{plan.show_bytes(free)} are free - {advice}, or save less often, or choose another --save_dir"
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
    backend = choose_backend(t.attention, runtime.device.type, runtime.precision.dtype)
    problem = check_backend(
        backend, runtime.device, runtime.precision.dtype, (m.num_attention_heads, m.num_key_value_heads, m.head_dim)
    )
    if problem:
        raise TrainingError(f"{problem}; use training.attention: eager")
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
    )


def start_page(run: Run, progress: Progress) -> list[tuple[str, str]]:
    """What is trained, on what, with which data, and what it will take."""
    t, m, runtime = run.config.training, run.config.model, run.runtime
    device, cores = plan.find_device()
    pace = plan.find_pace(run.config, device, cores)
    estimate = plan.make_plan(run.config, device, cores, pace=pace)
    seconds = estimate.seconds_per_step * (t.train_steps - progress.step)
    block = cast(Block, run.model.model.layers[0])
    heads = f"{m.num_attention_heads} heads ({m.num_key_value_heads} key-value)"
    ranks = f", {runtime.world_size} processes" if runtime.world_size > 1 else ""
    epochs = run.batches.epoch_of(t.train_steps)
    batch, length = run.config.global_batch_size, t.sequence_length
    return [
        (
            "model",
            f"{estimate.parameters:,} parameters: {m.num_hidden_layers} layers, {m.hidden_size} wide, {heads}, {m.norm}",
        ),
        ("device", f"{runtime.device.type}, {torch.get_num_threads()} threads{ranks}"),
        ("precision", f"{runtime.precision.name}: {runtime.precision.reason}; attention: {block.self_attn.backend}"),
        ("text", f"{run.config.data.input}: {len(run.batches.windows):,} windows of {length:,} tokens"),
        ("batch", f"{batch} sequences = {batch * length:,} tokens an update"),
        ("updates", f"{progress.step:,} of {t.train_steps:,} done; {epochs:.1f} epochs in all"),
        (
            "optimizer",
            f"{t.optimizer}, rate {t.learning_rate:g}, {t.warmup_steps} updates of warmup, then {t.schedule}",
        ),
        (
            "memory",
            f"about {plan.show_bytes(estimate.memory.total)}; checkpoints {plan.show_bytes(estimate.disk_bytes)}",
        ),
        (
            "time",
            f"about {plan.show_seconds(seconds)} by {f'the pace measured here on {pace.measured}' if pace.measured else 'the table of smollm2 plan'}; "
            "the pace of the first updates corrects it",
        ),
        ("run folder", t.save_dir),
    ]


def end_page(run: Run, progress: Progress, seconds: float) -> list[tuple[str, str]]:
    """What the run left behind."""
    folder = Path(run.config.training.save_dir)
    rows = [
        ("time", str(datetime.timedelta(seconds=round(seconds)))),
        ("loss", f"{progress.loss:.4f}"),
        ("model", str(folder / f"step_{progress.step:04d}.pt")),
        ("samples", str(folder / "samples.jsonl")),
        ("metrics", str(folder / "metrics.jsonl")),
    ]
    if run.validation:
        rows.insert(2, ("best validation loss", f"{progress.best_validation_loss:.4f}"))
    return rows


def save(run: Run, progress: Progress, validation_loss: float | None, *, must_succeed: bool = True) -> bool:
    """Rank 0 writes the checkpoint; whether that worked, on every rank alike.

    A disk that is full is said, and the run goes on to its next save. Raises ResourceError where it must succeed.
    """
    is_saved = True
    run.runtime.pulse.mark("a save")
    with run.runtime.together():
        if run.rows is not None:
            is_saved = write_checkpoint(run, run.rows, progress, validation_loss, must_succeed=must_succeed)
    return bool(run.runtime.gather(is_saved)[0])


def write_checkpoint(
    run: Run, rows: JsonlTracker, progress: Progress, validation_loss: float | None, *, must_succeed: bool
) -> bool:
    """Write step_XXXX.pt, then thin out the older ones as keep_last and keep_every say; whether that worked."""
    t, folder = run.config.training, Path(run.config.training.save_dir)
    try:
        rows.sync()
        path = checkpoint.save_checkpoint(folder, state_of(run, progress), step=progress.step)
        if validation_loss is not None:
            checkpoint.note_best(folder, path, progress.step, validation_loss)
        if t.keep_last is not None:
            before_spikes = {checkpoint.step_of(path) for s in progress.spikes for path in list_before(folder, s)[-1:]}
            protected = {run.resumed_step, *before_spikes}
            checkpoint.prune_checkpoints(folder, t.keep_last, t.keep_every, protected=protected)
    except ResourceError as error:
        run.tracker.log_event("save_failed", str(error), progress.step)
        if must_succeed:
            raise
        return False
    run.tracker.log_event("checkpoint", f"saved {path}", progress.step, path=str(path))
    return True


def check_replicas(run: Run, step: int) -> None:
    """Raises TrainingError, naming the rank and a parameter, where the ranks' weights are no longer the same bits."""
    if run.runtime.world_size == 1:
        return
    odd = find_odd_replica(run.runtime.gather(weight_sums(run.model).tolist()))
    if odd:
        name = list(dict(run.model.named_parameters()))[odd[1]]
        raise TrainingError(
            f"step {step}: the weights of rank {odd[0]} are no longer those of the others, first in {name}; nothing was saved. "
            "Its memory or its device computes wrongly: take that machine out, and go on with --resume auto"
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
    for path in sorted(Path(__file__).parent.rglob("*.py")):
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

    def end(error: Smollm2Error) -> None:
        log.write(str(error))
        if runtime.rank == error.rank:
            ConsoleTracker(0, 0, sys.stderr).say(f"error: {error}")
        runtime.leave(error.exit_code)

    watch = Watch(Path(t.save_dir), runtime.rank, runtime.pulse.read, t.rank_timeout, end)
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
        "format": checkpoint.FORMAT,
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
