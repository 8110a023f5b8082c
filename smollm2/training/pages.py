"""The pages shown at the start and the end of a run, and the same facts as events for the report."""

import contextlib
import dataclasses
import datetime
import platform
from collections.abc import Iterator

import torch

from smollm2.analysis.baselines import find_baselines
from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.config.schema import TrainingConfig
from smollm2.data.corpus import MANY_EPOCHS
from smollm2.errors import Interrupted, ResourceError, Smollm2Error
from smollm2.formatting import format_bytes, format_estimate
from smollm2.plan.describe import Plan, describe_origin, make_plan
from smollm2.plan.scale import cluster_memory, estimate_cluster_step, links_of
from smollm2.report.verdict import describe_change
from smollm2.runtime.commands import shown_path, smollm2_command
from smollm2.runtime.device import machine_facts
from smollm2.runtime.throughput import cluster_of, machine_of, measure_if_long
from smollm2.storage.run_folder import METRICS, REPORT, SAMPLES, find_checkpoint, step_of
from smollm2.tracking.base import describe
from smollm2.tracking.jsonl import read_values
from smollm2.training.optim import learning_rate_at
from smollm2.training.progress import Progress
from smollm2.training.resume import count_compared_windows, describe_resume, list_compared_windows
from smollm2.training.setup import Run, Start

Rows = list[tuple[str, str]]


def plan_run(run: Run) -> Plan:
    """Return the plan of the run on this machine: the memory, disk space and time that it needs."""
    machine = machine_of(run.runtime)
    windows = max(1, count_compared_windows(run.config, run.validation))  # eval_windows may be more than there are
    config = run.config.with_training(eval_windows=windows)
    plan = make_plan(config, machine)
    if plan.throughput.measured:
        return plan
    return make_plan(config, machine, measure_if_long(run.runtime, machine, plan.duration.total))


def start_page(run: Run, progress: Progress, plan: Plan, baselines: str) -> Rows:
    """Return the rows of the start page: what is trained, on which data, and which resources it will take."""
    t, m, runtime = run.config.training, run.config.model, run.runtime
    seconds = plan.duration.of(t.train_steps - progress.step)
    heads = f"{m.num_attention_heads} heads ({m.num_key_value_heads} key-value)"
    ranks = f", {runtime.world_size} processes" if runtime.world_size > 1 else ""
    isolated = ", documents isolated" if run.config.data.document_mask else ""
    origin = f"; from {m.init_from}" if m.init_from else ""
    batch, length = run.config.global_batch_size, t.sequence_length
    return [
        (
            "model",
            f"{plan.parameters:,} parameters: {m.num_hidden_layers} layers, {m.hidden_size} wide, {heads}, {m.norm}{origin}",
        ),
        ("device", f"{runtime.device.type}, {torch.get_num_threads()} threads{ranks}"),
        *([("sharing", describe_sharing(run, plan))] if runtime.world_size > 1 else []),
        ("precision", describe_numerics(run)),
        (
            "text",
            f"{', '.join(run.config.data.inputs)}: {len(run.batches.windows):,} windows of {length:,} tokens{isolated}",
        ),
        ("validation", describe_validation(run)),
        ("baselines", baselines),
        ("batch", f"{batch} sequences = {batch * length:,} tokens per step"),
        ("steps", f"{progress.step:,} of {t.train_steps:,} done; {describe_epochs(run)}"),
        (
            "optimizer",
            f"{t.optimizer}, learning rate {t.learning_rate:g}, {t.warmup_steps} steps of warmup, then {t.schedule}",
        ),
        ("memory", f"about {format_bytes(plan.memory.total)}; checkpoints {format_bytes(plan.disk.total)}"),
        ("time", f"about {format_estimate(seconds)}, {describe_origin(plan.throughput)}"),
        ("run folder", t.save_dir),
    ]


def describe_sharing(run: Run, plan: Plan) -> str:
    """Describe how the ranks share the model, the memory that each needs, and what communication may take of a step."""
    layout, cluster, machine = run.runtime.layout, cluster_of(run.runtime), machine_of(run.runtime)
    sharding = run.config.training.sharding if layout.is_sharded else "none"
    memory = cluster_memory(run.config, machine.device, cluster, sharding).total
    links = links_of(machine.device, cluster)
    step = estimate_cluster_step(run.config, machine, cluster, sharding, links, plan.throughput)
    copies = f"{layout.replicas} copies" if layout.replicas > 1 else "one copy"
    parts = f" in {layout.shards} parts" if layout.shards > 1 else ""
    return (
        f"{copies} of the model{parts} ({sharding}) on {cluster.machines} x {cluster.devices} devices; about "
        f"{format_bytes(memory)} on each; communication about {step.communication_share:.0%} of a step"
    )


def describe_numerics(run: Run) -> str:
    """Describe the precision, the attention backend and the compilation of the run."""
    precision, backend = run.runtime.precision, run.model.model.attention_backend
    compiled = "each block, at the first step" if run.config.training.compile else "off"
    return f"{precision.name}: {precision.reason}; attention: {backend}; compile: {compiled}"


def describe_epochs(run: Run) -> str:
    """Describe how many times the run will have read each source at its end."""
    epochs = run.batches.epochs_of(run.config.training.train_steps)
    if len(epochs) == 1:
        return f"{epochs[0]:.1f} epochs in all"
    each = (f"{name} {count:.1f}" for name, count in zip(run.corpus.names, epochs, strict=True))
    return f"epochs in all: {', '.join(each)}"


def list_epoch_warnings(run: Run) -> Iterator[str]:
    """Yield a warning for each source that is read so often that more epochs gain little."""
    epochs = run.batches.epochs_of(run.config.training.train_steps)
    for name, count in zip(run.corpus.names, epochs, strict=True):
        if count > MANY_EPOCHS:
            advice = "add text, train for fewer steps" + (", or lower its weight" if len(epochs) > 1 else "")
            yield (
                f"{name}: the run reads this text {count:.1f} times; after about {MANY_EPOCHS} times, repeated text "
                f"teaches much less than new text: {advice}"
            )


def describe_validation(run: Run) -> str:
    """Describe the size of the validation split, or why there is none."""
    if run.validation:
        return f"{run.corpus.validation_tokens:,} tokens in {len(run.validation):,} windows"
    if run.config.data.validation_fraction == 0:
        return "none, because data.validation_fraction is 0"
    return "none, because the text is too short to hold a part of it back"


def describe_warmup(t: TrainingConfig) -> str:
    """Return a warning if the warmup takes up the whole run, else an empty string."""
    if t.warmup_steps < t.train_steps:
        return ""
    reached, most = learning_rate_at(t.train_steps - 1, t), t.train_steps // 10
    return (
        f"training.warmup_steps: {t.warmup_steps} is the whole run of {t.train_steps} steps: the learning rate reaches "
        f"{reached:.3g} of {t.learning_rate:g} at its end and never decays. Set it to {most}{' or less' if most else ''}."
    )


def report_start(run: Run, progress: Progress, start: Start | None) -> None:
    """Report a resume and a warning about the warmup, if any, and record the run's data and machine for the report."""
    if start:
        run.tracker.log_event("resume", describe_resume(run, start), progress.step)
    from_start = list_epoch_warnings(run) if not progress.step else ()
    for warning in (describe_warmup(run.config.training), *from_start):
        if warning:
            run.tracker.log_event("warning", warning, progress.step)
    windows, config = run.batches.windows, run.config
    run.tracker.log_event(
        "data",
        "",
        progress.step,
        input=", ".join(config.data.inputs),
        tokenizer=config.data.tokenizer,
        vocab_size=run.tokenizer.vocab_size,
        **dataclasses.asdict(run.corpus.statistics),
        windows=len(windows),
        window_tokens=windows.length,
        tokens_used=windows.tokens_used,
        epochs=float(run.batches.epoch_of(config.training.train_steps)),
    )
    facts = {"system": f"{platform.system()} {platform.machine()}", **machine_facts(run.runtime)}
    run.tracker.log_event("start", "", progress.step, **facts)


def report_baselines(run: Run, step: int) -> str:
    """Record the losses of n-gram models of the run's own text; return the line of the start page. Only rank 0 counts."""
    if run.runtime.rank:
        return ""
    if run.validation is None:
        return "none, because there is no validation text"
    compared = list_compared_windows(run.config, run.validation)
    try:
        found = find_baselines(run.config, run.corpus, run.batches.windows, run.validation, compared)
    except Exception as error:  # they are optional: the run continues without them
        return f"not measured ({describe(error)})"
    run.tracker.log_event("baselines", "", step, **dataclasses.asdict(found))
    return found.describe()


def report_end(run: Run, error: Exception) -> None:
    """Record, at the step of the last checkpoint, why the run ended early. The command line shows the reason."""
    last_step = 0
    with contextlib.suppress(ResourceError):  # the error that ended the run matters, not one that follows from it
        last_step = max(map(step_of, list_checkpoints(run.folder)), default=0)
    kind = "stopped" if isinstance(error, Interrupted) else "failed"
    reason = str(error) if isinstance(error, Smollm2Error) else type(error).__name__
    run.tracker.log_event(kind, "", last_step, reason=reason)


def end_page(run: Run, progress: Progress, seconds: float) -> Rows:
    """Return the rows of the end page: the results of the run and the files that it wrote."""
    overhead = f"{run.tracker.seconds:.1f} s of {seconds:.0f} s ({run.tracker.seconds / seconds:.1%})"
    rows = [
        ("time", str(datetime.timedelta(seconds=round(seconds)))),
        ("logging overhead", overhead),
        ("loss", f"{progress.loss:.4f}"),
    ]
    if run.validation and progress.best_validation_loss < float("inf"):
        compared, count = count_compared_windows(run.config, run.validation), len(run.validation)
        windows = f", on {compared} of {count:,} windows" if compared < count else ""
        rows.append(("best validation loss", f"{progress.best_validation_loss:.4f}{windows}"))
    if len(bits := read_values(run.folder / METRICS, "regression_bpb")) > 1:
        rows.append(("the other text", describe_change(bits[0], bits[-1])))
    files = {"model": find_checkpoint(run.folder, progress.step)}
    files |= {
        name: run.folder / file for name, file in (("samples", SAMPLES), ("metrics", METRICS), ("report", REPORT))
    }
    rows += [(name, str(path)) for name, path in files.items()]
    if run.corpus.is_chat:
        return [*rows, ("chat", f"{smollm2_command()} chat {shown_path(run.folder)}")]
    command = f'{smollm2_command()} generate {shown_path(run.folder)} --prompt "Once upon a time"'
    return [*rows, ("generate text", command)]
