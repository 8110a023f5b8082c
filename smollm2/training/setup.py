"""The parts of a run: its settings, the objects that it uses, and its trackers."""

import contextlib
import dataclasses
import datetime
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer

from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.checkpoint.format import State
from smollm2.checkpoint.saving import Saver
from smollm2.config.reading import effective_config_yaml
from smollm2.config.schema import IGNORE_INDEX, Config
from smollm2.data.batches import Batches
from smollm2.data.corpus import Corpus, evaluation_windows, validation_windows
from smollm2.data.overview import describe_sources, measure_overlaps
from smollm2.data.tokenizer import Tokenizer
from smollm2.data.windows import JoinedWindows, TokenWindows, WindowSource
from smollm2.errors import CheckpointError, ResourceError, TrainingError
from smollm2.formatting import format_bytes
from smollm2.model.attention import check_backend, choose_backend
from smollm2.model.transformer import SmolLM2
from smollm2.plan.arithmetic import estimate_disk
from smollm2.plan.scale import SHARDINGS, choose_sharding
from smollm2.plan.throughput import is_compiled
from smollm2.report.tracker import ReportTracker
from smollm2.runtime.device import Runtime, compile_blocks, compiler_problem, environment
from smollm2.runtime.memory import return_freed_memory_at_once
from smollm2.runtime.precision import device_features
from smollm2.runtime.sharding import make_layout, share_out
from smollm2.runtime.throughput import cluster_of, machine_of, memory_of
from smollm2.storage.atomic import write_atomically
from smollm2.storage.run_folder import CONFIG, DATA, METRICS, REPORT, TOKENIZER, count_checkpoint_bytes
from smollm2.tracking.base import Fanout, Fence, Tracker
from smollm2.tracking.console import ConsoleTracker
from smollm2.tracking.jsonl import JsonlTracker, read_values
from smollm2.tracking.tensorboard import start_tensorboard
from smollm2.tracking.wandb import start_wandb
from smollm2.tracking.wandb_environment import make_run_id, prepare_environment
from smollm2.training.initial_model import load_initial_model
from smollm2.training.optim import build_optimizers
from smollm2.training.verdicts import VerdictTracker, facts_of, read_records

LONGEST_FILE, DISK_SPEED = 30.0, 250e6
"""The seconds that one file may take, and the bytes per second that one process writes: a disk of a cloud machine."""

LONGEST_SAVE = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a run resumes."""

    path: Path
    state: State

    @property
    def step(self) -> int:
        """The number of steps completed at the checkpoint."""
        step: int = self.state["step"]
        return step


@dataclass(frozen=True)
class Setup:
    """The settings with which a run starts. `origins` says where each config value comes from, for config.yaml."""

    config: Config
    origins: Mapping[str, str]
    runtime: Runtime
    console: ConsoleTracker
    start: Start | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.training.save_dir)

    def report(self, message: str) -> None:
        """Show a message to the user."""
        self.console.report(message)


@dataclass(frozen=True)
class Run:
    """The objects of a run, such as model, data and optimizers, which its functions share."""

    config: Config
    runtime: Runtime
    corpus: Corpus
    batches: Batches
    validation: JoinedWindows | None  # those of each source, with the sources' names
    regression: TokenWindows | None  # of the text that must not get worse
    model: SmolLM2
    prepared: nn.Module  # the model that training calls: wrapped in DistributedDataParallel if there are several ranks
    optimizers: Mapping[str, Optimizer]
    tracker: Fanout
    saver: Saver | None  # from the first step on, on rank 0; on all ranks if checkpoints are folders
    wandb_run_id: str
    resumed_step: int
    saves_folders: bool = False
    resumed_from: Path | None = None
    save_group: Any = None  # of all ranks, if they write a checkpoint together

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus."""
        return self.corpus.tokenizer

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.training.save_dir)


def fit_vocabulary(setup: Setup, tokenizer: Tokenizer) -> Setup:
    """Return the setup with model.vocab_size set to the tokenizer's vocabulary size."""
    wanted, found = setup.config.model.vocab_size, tokenizer.vocab_size
    if wanted == found:
        return setup
    if name := setup.config.model.init_from:
        if found > wanted and setup.config.data.add_tokens:
            setup.report(f"{name}: {found - wanted:,} rows are added to the embedding, near the mean of the others")
            origins = {**setup.origins, "model.vocab_size": "data.add_tokens"}
            return dataclasses.replace(setup, config=setup.config.with_vocab_size(found), origins=origins)
        if found > wanted:
            what = f"the tokenizer has {found:,} ids, but the embedding only {wanted:,} rows"
            raise CheckpointError(name, what, "use the tokenizer that the model was trained with")
        setup.report(f"{name}: the tokenizer uses {found:,} of the embedding's {wanted:,} rows")
        return setup
    setup.report(f"model.vocab_size: {wanted:,} -> {found:,}, the tokenizer's")
    origins = {**setup.origins, "model.vocab_size": "the tokenizer"}
    return dataclasses.replace(setup, config=setup.config.with_vocab_size(found), origins=origins)


def settle_chat(setup: Setup, corpus: Corpus) -> Setup:
    """Return the setup for conversations, if the text is made of them: packed whole, and apart from one another."""
    data = setup.config.data
    if not corpus.is_chat or (data.pack == "best_fit" and data.document_mask):
        return setup
    values = {"pack": "best_fit", "document_mask": True, "stride": setup.config.training.sequence_length}
    changed = {f"data.{name}": value for name, value in values.items() if getattr(data, name) != value}
    for key, value in changed.items():
        origin = setup.origins.get(key, "default")
        if key == "data.stride" or not origin.startswith(("default", "from ")):  # a default stride needs no change
            before = getattr(data, key.removeprefix("data."))
            setup.report(f"{key}: {before} -> {value}, because the text is conversations")
    origins = {**setup.origins, **dict.fromkeys(changed, "the text is conversations")}
    return dataclasses.replace(setup, config=setup.config.with_data(**values), origins=origins)


def settle_compilation(setup: Setup) -> Setup:
    """Return the setup with training.compile set to true or false.

    If it is auto, a resumed run keeps the checkpoint's value.
    """
    config, runtime = setup.config, setup.runtime
    if config.training.compile != "auto":
        return setup
    if setup.start:
        compiles = Config.model_validate_json(setup.start.state["config"]).training.compile
    else:
        compiles = is_compiled(config, machine_of(runtime))
        problem = compiler_problem(runtime.device) if compiles else ""
        if problem:
            setup.report(f"training.compile: auto -> false, because {problem}")
        compiles = all(runtime.gather(compiles and not problem))
    origins = {**setup.origins, "training.compile": "auto"}
    return dataclasses.replace(setup, config=config.with_training(compile=compiles), origins=origins)


def settle_sharding(setup: Setup) -> Setup:
    """Return the setup with training.sharding decided, and the layout that it stands for in the runtime."""
    config, runtime = setup.config, setup.runtime
    cluster, memory = cluster_of(runtime), memory_of(runtime)
    if config.training.sharding == "auto":
        found = runtime.gather(choose_sharding(config, runtime.planned_device, memory, cluster))
        sharding = max(found, key=SHARDINGS.index)  # of the device with the least memory
        if sharding != "none":
            setup.report(
                f"training.sharding: auto -> {sharding}, because the whole run does not fit into the "
                f"{format_bytes(memory)} of one device"
            )
        origins = {**setup.origins, "training.sharding": "auto"}
        setup = dataclasses.replace(setup, config=config.with_training(sharding=sharding), origins=origins)
    layout = make_layout(setup.config.training.sharding, runtime.device, runtime.world_size, cluster.machines)
    if layout.is_sharded and runtime.device.type == "cpu":
        return_freed_memory_at_once()
    return dataclasses.replace(setup, runtime=dataclasses.replace(runtime, layout=layout))


def build_run(setup: Setup, corpus: Corpus) -> Run:
    """Return the run with its windows, model and optimizers, with the console as the only tracker. Write no files."""
    config, runtime, start = setup.config, setup.runtime, setup.start
    t = config.training
    batches = corpus.batches(config)
    for line in corpus.describe(batches):
        setup.report(line)
    model = build_model(config, runtime, None if start else corpus.tokenizer)
    return Run(
        config=config,
        runtime=runtime,
        corpus=corpus,
        batches=batches,
        validation=open_validation(config, corpus),
        regression=evaluation_windows(config, corpus.tokenizer, corpus.regression, 0) if corpus.regression else None,
        model=model,
        prepared=model,
        optimizers=build_optimizers(model, t, runtime.layout),
        tracker=Fanout([setup.console]),
        saver=None,
        wandb_run_id=start.state["wandb_run_id"] if start else "",
        resumed_step=start.step if start else 0,
        resumed_from=start.path if start else None,
        saves_folders=saves_folders(config, runtime),
    )


def saves_folders(config: Config, runtime: Runtime) -> bool:
    """Return whether the run's checkpoints are folders."""
    chosen = config.training.checkpoints
    if chosen == "auto":
        return runtime.layout.is_sharded and estimate_disk(config).checkpoint_bytes > LONGEST_FILE * DISK_SPEED
    return chosen == "folder"


def open_validation(config: Config, corpus: Corpus) -> JoinedWindows | None:
    """Return the validation windows of each source whose targets encode any text, or None if there is no such source."""
    found = [
        (name, windows)
        for name, store in zip(corpus.names, corpus.stores, strict=True)
        if (windows := validation_windows(config, corpus.tokenizer, store)) and has_text(windows, corpus.tokenizer)
    ]
    return JoinedWindows([windows for _, windows in found], [name for name, _ in found]) if found else None


def has_text(windows: WindowSource, tokenizer: Tokenizer) -> bool:
    """Return whether any target of the windows stands for a byte of text; an end of text stands for none."""
    labels = (windows.read(index).labels for index in range(len(windows)))
    return any(tokenizer.bytes_per_token[row[row != IGNORE_INDEX]].any() for row in labels)


def build_model(config: Config, runtime: Runtime, tokenizer: Tokenizer | None = None) -> SmolLM2:
    """Return the model on its device, initialized from the seed, or, if there is a `tokenizer`, with the weights of model.init_from.

    The attention backend, gradient checkpointing and compilation are set as configured.
    """
    t, m = config.training, config.model
    torch.manual_seed(t.seed)
    model = load_initial_model(m, tokenizer, t.seed) if m.init_from and tokenizer else SmolLM2(m)
    if not runtime.layout.is_sharded:  # else each block goes to the device when it has been split
        model = model.to(runtime.device)
    heads = (m.num_attention_heads, m.num_key_value_heads, m.head_dim)
    dtype, isolates = runtime.precision.dtype, config.data.document_mask
    features = device_features(runtime.device)
    backend = choose_backend(t.attention, runtime.device.type, dtype, features, isolates=isolates)
    problem = check_backend(backend, runtime.device, dtype, heads, isolates=isolates)
    if problem:
        raise TrainingError("training.attention", problem, f"set it to {'eager' if backend == 'sdpa' else 'sdpa'}")
    model.model.attention_backend = backend
    model.model.checkpointing = t.gradient_checkpointing
    if t.compile is True:
        compile_blocks(model.model.layers)
    share_out(model, runtime.layout, dtype)
    return model


def check_disk(config: Config, folder: Path) -> None:
    """Raise ResourceError, which names the keep_last that fits, if the disk has no room for the run's checkpoints."""
    disk = estimate_disk(config)
    held = sum(map(count_checkpoint_bytes, list_checkpoints(folder)))
    free = shutil.disk_usage(folder).free
    if disk.total <= free + held:
        return
    fits = int((free + held) / disk.checkpoint_bytes) - 1  # a new checkpoint is written before an old one is removed
    advice = f"set training.keep_last to {fits - 1}" if fits > 2 else "free some space"
    raise ResourceError(
        folder,
        f"the run's {disk.checkpoints} checkpoints need {format_bytes(disk.total)}, but only {format_bytes(free)} "
        "is free",
        f"{advice}, save less often, or choose another --save_dir",
    )


def open_trackers(run: Run, setup: Setup, stack: contextlib.ExitStack) -> Run:
    """Return the run with all its trackers and its saver, and write the run folder's config.yaml and tokenizer.

    This removes the rows after the resumed step, so any check that could still refuse the run must come before it.
    """
    config, folder, step = setup.config, setup.folder, run.resumed_step
    if run.saves_folders and run.runtime.world_size > 1:
        run = dataclasses.replace(run, save_group=dist.new_group(backend="gloo", timeout=LONGEST_SAVE))
    if run.runtime.rank:
        saver = Saver(config, None, run.tracker) if run.saves_folders else None
        if saver:
            stack.callback(saver.finish)
        return dataclasses.replace(run, saver=saver)
    # A run that resumes in another folder starts new rows there.
    is_own = setup.start is not None and setup.start.path.resolve().parent == folder.resolve()
    rows = JsonlTracker(folder, step if is_own else 0, setup.report)
    setup.console.restore_smoothing(read_values(folder / METRICS, "loss"))
    write_atomically(folder / CONFIG, effective_config_yaml(config, dict(setup.origins)).encode())
    run.tokenizer.save(folder / TOKENIZER)
    overlaps = measure_overlaps(run.corpus)
    sources = describe_sources(config, run.corpus, run.batches, overlaps)
    write_atomically(folder / DATA, (json.dumps(sources, indent=1) + "\n").encode())
    trackers: list[Tracker] = [setup.console, rows]
    run_id = run.wandb_run_id
    if config.wandb.enabled:
        run_id = run_id or make_run_id()
        found = prepare_environment(environment(), folder)
        wandb = start_wandb(config, folder, run_id, found, setup.report, step)
        trackers += [wandb] if wandb else []
    if config.training.tensorboard:
        tensorboard = start_tensorboard(folder, step, setup.report)
        trackers += [tensorboard] if tensorboard else []
    trackers.append(Fence(REPORT, lambda: ReportTracker(folder), setup.report))
    facts, records = facts_of(config, run.corpus, overlaps), read_records(folder) if step else []
    trackers.append(VerdictTracker(facts, Fanout(trackers), setup.report, records))
    tracker = Fanout(trackers)
    stack.callback(tracker.close)
    for name, overlap in zip(run.corpus.names, overlaps, strict=True):
        if overlap.is_high and not step:
            tracker.log_event("warning", f"{name}: {overlap.describe()}: validation partly measures memory", step)
    saver = Saver(config, rows, tracker)
    stack.callback(saver.finish)
    return dataclasses.replace(run, tracker=tracker, saver=saver, wandb_run_id=run_id)
