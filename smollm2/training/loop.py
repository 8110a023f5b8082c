"""A run, from the first line to the last: open what it needs, make the updates, leave a model behind.

What the loop remembers between two updates is `Progress`, saved whole; the rate is a function of the step, a batch of
the seed and its number, a sample of the seed and the step. So a run that was killed and resumed goes on bit for bit.
"""

import contextlib
import dataclasses
import datetime
import os
import platform
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

import torch

from smollm2.analysis.diagnostics import Look, measure_activations
from smollm2.analysis.landscape import choose_side, choose_windows, list_points, measure_landscape
from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.checkpoint.retention import set_aside_later
from smollm2.checkpoint.saving import list_before
from smollm2.config.schema import Config
from smollm2.data.batches import prefetched
from smollm2.data.windows import Batch
from smollm2.errors import (
    DataError,
    Interrupted,
    ResourceError,
    Smollm2Error,
    TrainingError,
)
from smollm2.formatting import format_bytes, format_estimate
from smollm2.inference.evaluation import evaluate_on_ranks, spread
from smollm2.inference.generation import generate
from smollm2.model.transformer import Block
from smollm2.plan import arithmetic as plan
from smollm2.runtime.device import (
    Runtime,
    environment,
    machine_facts,
    start_runtime,
    weight_sums,
)
from smollm2.runtime.ranks import find_odd_replica
from smollm2.storage.atomic import probe_folder
from smollm2.storage.locks import lock_folder
from smollm2.storage.run_folder import step_of
from smollm2.tracking.base import Sample
from smollm2.tracking.console import ConsoleTracker, RunLog, find_secrets
from smollm2.training.optim import learning_rate_at
from smollm2.training.setup import (
    Progress,
    Run,
    choose_micro_batch,
    config_facts,
    describe_out_of_memory,
    find_start,
    fingerprint_code,
    open_run,
    refuse_disagreement,
    restore,
    share_corpus,
    start_facts,
    state_of,
    watched,
)
from smollm2.training.step import (
    SPIKE_WINDOW,
    MicroBatch,
    MicroBatchTooLarge,
    StepResult,
    micro_batch_size,
    rehearse,
    smaller_micro_batch,
    too_many_skips,
    update,
)

REPLICA_INTERVAL = 1000
"""Updates between two comparisons of the ranks' weights; each save compares them as well."""

TIME_UP = 1000
"""Stands among the numbers of signals for the end of the run's own time."""


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
        if runtime.rank == 0 and (aside := set_aside_later(folder, progress.step)):
            console.say(f"set aside, since the run goes on from before them: {', '.join(path.name for path in aside)}")
        started = time.perf_counter()
        console.show_page("SmolLM2 Training", start_page(run, progress))
        note_start(run, progress)
        try:
            progress = run_steps(run, progress, size, clock)
        except Exception as error:
            log.write_error(error)
            note_stop(run, error)
            if isinstance(error, DataError):  # each rank reads windows of its own
                error.rank = runtime.rank
            if isinstance(error, TrainingError):
                raise TrainingError(f"{error} ({log.path})") from None
            if isinstance(error, torch.OutOfMemoryError):
                short = ResourceError(
                    f"training.batch_size: {config.training.batch_size} - out of memory - lower it, and raise "
                    "training.gradient_accumulation_steps by as much; the checkpoints are intact"
                )
                short.rank = runtime.rank
                raise short from None
            raise
        seconds = time.perf_counter() - started
        console.show_page("Done", end_page(run, progress, seconds))
        run.tracker.log_event("done", "", progress.step, seconds=round(seconds, 3))
        stack.close()
        if runtime.stop.number:  # it came during the last save, or while the trackers closed
            raise_stopped(runtime.stop.number, progress.step)
    return progress


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
    meter = Meter()
    with contextlib.closing(prefetched(run.batches, progress.step, first_row, first_row + share)) as batches:
        while progress.pending or progress.step < t.train_steps:
            runtime.pulse.step = progress.step + 1
            clock.begin_step()
            if not progress.pending:  # else a signal cut this step's duties short, and they come first
                batch, look = next(batches), begin_look(run, progress.step + 1)
                result, size = update_or_shrink(run, progress.step, batch, size, look)
                progress = end_look(run, progress.after(result), look, batch, size)
                progress = dataclasses.replace(progress, pending=duties_of(run, progress.step))
                meter.add(result)
                note_trouble(run, progress, result)
                if progress.step == 1 or due(progress.step, t.log_interval, progress.step == t.train_steps):
                    tracker.log(report(run, progress, result, meter), progress.step)
            step, last = progress.step, progress.step == t.train_steps
            if run.saver:
                run.saver.note_finished()
            progress, validation_loss = do_duties(run, progress, size)
            save_seconds = run.saver.seconds if run.saver else 0.0
            time_up = clock.is_up(2 * save_seconds) and not last
            stop = runtime.stop_requested(TIME_UP if time_up else 0)
            if stop or due(step, t.save_interval, last):
                check_replicas(run, step)
                save(run, progress, validation_loss, must_succeed=last or bool(stop))
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


def update_or_shrink(run: Run, step: int, batch: Batch, size: int, look: Look | None) -> tuple[StepResult, int]:
    """Update `step` + 1 in micro-batches of `size`, or from its beginning in smaller ones where memory runs out; and of
    how many. Raises ResourceError where one sequence at once is too much."""
    t, runtime = run.config.training, run.runtime
    while True:
        with contextlib.suppress(MicroBatchTooLarge):
            if step == run.resumed_step and runtime.world_size > 1 and runtime.device.type == "cuda":
                rehearse(run.prepared, split(batch, size, runtime)[0], runtime)
            result = update(
                run.prepared,
                run.optimizers,
                split(batch, size, runtime),
                runtime,
                learning_rate=learning_rate_at(step, t),
                max_grad_norm=t.max_grad_norm,
                z_loss=t.z_loss,
                look=look,
            )
            return result, size
        smaller = smaller_micro_batch(len(batch.input_ids), size)
        if smaller is None:
            raise ResourceError(describe_out_of_memory(run.config, 1))
        note_out_of_memory(run, step + 1, size, smaller)
        size = smaller
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def duties_of(run: Run, step: int) -> tuple[str, ...]:
    """What follows the update `step`, besides its report and its save."""
    t, last = run.config.training, step == run.config.training.train_steps
    validation = run.validation is not None and due(step, t.eval_interval, last)
    samples = t.sample_tokens > 0 and due(step, t.sample_interval, last)
    landscape = t.diagnostics_interval > 0 and due(step, run.config.wandb.landscape_interval, last)
    return ("validation",) * validation + ("samples",) * samples + ("landscape",) * landscape


def do_duties(run: Run, progress: Progress, size: int) -> tuple[Progress, float | None]:
    """What is pending, in order; what a signal cuts short stays so and is done again. And the validation loss."""
    step, best, validation_loss = progress.step, progress.best_validation_loss, None
    with contextlib.suppress(Interrupted):
        while progress.pending:
            if progress.pending[0] == "validation":
                validation_loss = validate(run, step, size, whole=step == run.config.training.train_steps)
                best = min(best, validation_loss)
            elif progress.pending[0] == "samples":
                run.tracker.log_text(draw_samples(run, step), step)
            else:
                log_landscape(run, step, size)
            progress = dataclasses.replace(progress, best_validation_loss=best, pending=progress.pending[1:])
    return progress, validation_loss


def due(step: int, interval: int, last: bool) -> bool:
    """Whether a duty of this interval (0: never) falls on this step; every duty falls on the last."""
    return last or (interval > 0 and step % interval == 0)


def split(batch: Batch, size: int, runtime: Runtime) -> list[MicroBatch]:
    """This rank's batch as micro-batches of `size` sequences, on the device."""
    parts = (torch.split(runtime.to_device(array), size) for array in batch if array is not None)
    return list(zip(*parts, strict=True))


def begin_look(run: Run, step: int) -> Look | None:
    """A look inside the model at update `step`, where one is due; rank 0's."""
    t = run.config.training
    is_due = t.diagnostics_interval > 0 and due(step, t.diagnostics_interval, step == t.train_steps)
    if not is_due or run.runtime.rank:
        return None
    drawn = (run.config.wandb.enabled and run.config.wandb.log_gradients) or t.tensorboard
    return Look(run.model, run.tracker.counted, histograms=drawn)


def end_look(run: Run, progress: Progress, look: Look | None, batch: Batch, size: int) -> Progress:
    """Tell what the look saw, with the activations of rank 0's first micro-batch; the clipped updates count anew."""
    if look is None:
        return progress
    with run.tracker.counted(), run.runtime.autocast():
        input_ids, _, *documents = split(batch, size, run.runtime)[0]
        activations = measure_activations(run.model, input_ids, *documents)
    clipped, updates = progress.clipped
    diagnosis = dataclasses.replace(look.diagnosis, activations=activations, clipped=clipped / updates)
    run.tracker.log_diagnosis(diagnosis, progress.step)
    return dataclasses.replace(progress, clipped=(0, 0))


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
        if run.saver:
            run.saver.finish()  # its file may be the last from before
        before = [path.name for path in list_before(Path(run.config.training.save_dir), step)]
        kept = f"{before[-1]} is from before and stays" if before else "no checkpoint is from before"
        windows = run.batches.window_ids(step - 1).tolist()
        message = (
            f"step {step}: the loss {result.loss:g} stands out from those of the last {SPIKE_WINDOW} updates; {kept}"
        )
        run.tracker.log_event("spike", message, step, windows=windows)


def note_out_of_memory(run: Run, step: int, size: int, smaller: int) -> None:
    """Say that an update begins anew in smaller micro-batches, and how to begin that way."""
    message = (
        f"step {step}: out of memory with {size} sequences at once; from here on {smaller} at once, as many an update. "
        f"To begin that way: {describe_out_of_memory(run.config, smaller)}"
    )
    run.tracker.log_event("out_of_memory", message, step)


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
        save(run, progress, None, must_succeed=True)
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


def log_landscape(run: Run, step: int, size: int) -> None:
    """Measure the loss around the weights, on all ranks, and tell it. Raises Interrupted, the weights as they were."""
    side, seed = choose_side(run.config, run.runtime.planned_device, size), run.config.training.seed
    advice = "smollm2 landscape draws one from the checkpoint"
    if not side:
        run.tracker.log_event("landscape", f"no loss landscape: the run is short, or its memory full; {advice}", step)
        return
    windows = run.validation or run.batches.windows
    indices, targets = choose_windows(windows)
    run.tracker.log_event(
        "landscape", f"the loss around the weights: {len(list_points(side))} points on {targets:,} tokens each", step
    )

    def measure_loss() -> float:
        bytes_per_token = run.tokenizer.bytes_per_token
        return evaluate_on_ranks(
            run.model, windows, indices, bytes_per_token, batch_size=size, runtime=run.runtime
        ).loss

    try:
        landscape = measure_landscape(run.model, measure_loss, side=side, seed=seed, targets=targets)
    except torch.OutOfMemoryError:
        if run.runtime.world_size > 1:  # the others wait for its share
            raise
        run.tracker.log_event("landscape", f"no loss landscape: out of memory; {advice}", step)
        return
    run.tracker.log_landscape(landscape, step)


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
            f"about {format_bytes(estimate.memory.total)}; checkpoints {format_bytes(estimate.disk_bytes)}",
        ),
        (
            "time",
            f"about {format_estimate(seconds)} by {f'the pace measured here on {pace.measured}' if pace.measured else 'the table of smollm2 plan'}; "
            "the pace of the first updates corrects it",
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
        ("watching", f"{run.tracker.seconds:.1f} s of {seconds:.0f} s ({run.tracker.seconds / seconds:.1%})"),
        ("loss", f"{progress.loss:.4f}"),
        ("model", str(folder / f"step_{progress.step:04d}.pt")),
        ("samples", str(folder / "samples.jsonl")),
        ("metrics", str(folder / "metrics.jsonl")),
        ("report", str(folder / "report.html")),
    ]
    if run.validation:
        rows.insert(3, ("best validation loss", f"{progress.best_validation_loss:.4f}"))
    return rows


def save(run: Run, progress: Progress, validation_loss: float | None, *, must_succeed: bool) -> None:
    """Rank 0 writes the checkpoint; it fails on every rank alike. Raises ResourceError where it must succeed and cannot."""
    run.runtime.pulse.mark("a save")
    with run.runtime.together():
        if run.saver:
            spikes, resumed = progress.spikes, run.resumed_step
            run.saver.save(state_of(run, progress), validation_loss, spikes, resumed, must_succeed=must_succeed)


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
