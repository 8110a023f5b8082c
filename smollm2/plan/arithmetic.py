"""What a run will take, by arithmetic, before it starts: parameters, FLOPs, memory, disk and time.

Nothing is measured and nothing heavy imported. The seconds come from a small table of what training reaches on a kind
of device, until a run has left in the cache folder what it reached here (`measured.json`).
"""

import contextlib
import datetime
import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from smollm2.config.reading import load_config
from smollm2.config.schema import Config, ModelConfig
from smollm2.formatting import format_bytes, format_estimate, format_step_time
from smollm2.storage.atomic import write_atomically

REACHED_FLOPS = {"H200": 280e12, "H100": 250e12, "A100": 100e12, "L40S": 80e12, "RTX 4090": 60e12, "L4": 25e12}
REACHED_FLOPS |= {"T4": 15e12, "mps": 2e12}
"""FLOP/s in training on one device whose name holds the word; estimates."""

CARDS = {"H200": 141, "H100": 80, "A100": 80, "L40S": 48, "RTX 4090": 24, "L4": 24, "T4": 16}
"""GB of memory of the GPUs that people rent or own."""

OTHER_GPU_FLOPS = 30e12
CORE_FLOPS = {"cpu-float32": 86e9, "cpu-bf16": 190e9}
CORE_SECONDS_PER_NUMBER = 125e-9
"""A CPU core's FLOP/s in the products, and its seconds besides them for each number of the residual stream, in each layer.
From tokens a second on two idle cores of an AMD EPYC with avx512_bf16, 2026-11-24: nano 15,300, micro 3,050, the user's 768 wide
model with gradient checkpointing 263 in bf16; 12M parameters 1,756 in float32."""

SECONDS_PER_BLOCK = {"cpu": 3e-3, "gpu": 2e-3}
"""What a block costs in one forward and backward pass however small it is; a GPU hides it behind its products."""

LIBRARIES = 365_000_000
"""Bytes that Python and torch hold besides what is counted, all their files read; measured at the first update, 2026-11-24."""

QUERY_BLOCK, LONGEST_KEPT = 128, 512
"""Queries that attention in blocks takes at once (twice as many of sequences over 1,024), and the longest sequence of which it
keeps the probabilities. Both fastest on two cores with avx512_bf16, 2026-11-24, forward and backward of 8 sequences, 6 heads,
256 positions: 128 queries 9.2 ms, 256 queries 11.0, computed again 14.0."""

MAPPED = 32 * 2**20
"""From this size on glibc maps each piece of memory by itself and gives it back; smaller ones share one heap, which keeps what
is freed in it. The largest that mallopt takes everywhere (`runtime.keep_freed_memory`)."""

HEAP_GAPS = {"one micro-batch": 0.3, "several": 0.5}
"""So much of what passes through lies free in that heap when it is fullest, between pieces that stay; where gradients are
accumulated, those of the first micro-batch stay among what was its activations. micro, batch_size 8, 2026-11-24, MB at most
with 1, 2 and 4 micro-batches: 978, 1093, 1090 in float32, 847, 902, 921 in bf16."""

MUON_STEPS = 4
"""Steps of Muon's orthogonalization (training/muon.py)."""

MEASURED = "measured.json"
KEPT_PACES = 5
"""Of each kind of device: so many runs until a machine that has become slower is believed."""


@dataclass(frozen=True)
class Pace:
    """What a device reaches: FLOP/s in the products, and the seconds that a block costs besides them."""

    flops: float
    seconds_per_block: float
    measured: str = ""  # the day, empty where this is the table's


@dataclass(frozen=True)
class Corpus:
    """How many tokens the text has, and into how many ids it is cut."""

    train_tokens: int
    vocab_size: int
    is_counted: bool  # by an earlier run, or estimated from the size of the file


@dataclass(frozen=True)
class Memory:
    """Bytes at the highest point of an update, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    gaps: int  # free, and of no use to what is needed
    libraries: int = LIBRARIES

    @property
    def total(self) -> int:
        """All together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What a run takes; memory is that of one device, seconds leave out validation, samples and saves."""

    parameters: int
    flops_per_token: int
    tokens_per_step: int
    memory: Memory
    checkpoint_bytes: int
    checkpoints: int
    seconds_per_step: float
    seconds: float

    @property
    def disk_bytes(self) -> int:
        """All checkpoints that will lie there at once."""
        return self.checkpoint_bytes * self.checkpoints


def make_plan(
    config: Config, device: str, cores: int, *, pace: Pace | None = None, tokens_per_second: float | None = None
) -> Plan:
    """The plan for one device: `cpu-float32`, `cpu-bf16`, `mps` or a GPU's name. Seconds come from `tokens_per_second`,
    a rate of this very config, else from `pace`, else from the table."""
    t = config.training
    tokens = config.global_batch_size * t.sequence_length
    seconds = tokens / tokens_per_second if tokens_per_second else estimate_step(config, device, cores, pace)
    memory = estimate_memory(config, device)
    return Plan(
        parameters=count_parameters(config.model),
        flops_per_token=flops_per_token(config.model, t.sequence_length),
        tokens_per_step=tokens,
        memory=memory,
        checkpoint_bytes=4 * count_parameters(config.model) + memory.optimizer,
        checkpoints=count_checkpoints(config),
        seconds_per_step=seconds,
        seconds=seconds * t.train_steps,
    )


def describe_plan(config: Config, device: str, cores: int) -> list[tuple[str, str]]:
    """What the config takes on this machine, as the rows of a page."""
    corpus = find_corpus(config)
    if corpus and corpus.is_counted:
        config = config.with_vocab_size(corpus.vocab_size)
    pace = find_pace(config, device, cores)
    plan = make_plan(config, device, cores, pace=pace)
    embeddings = plan.parameters - count_non_embedding(config.model)
    tied = "also the head" if config.model.tie_word_embeddings else "the head besides"
    origin = (
        f"as a run reached here on {pace.measured}" if pace.measured else "an estimate: no run has left its rate yet"
    )
    return [
        (
            "parameters",
            f"{plan.parameters:,}: {embeddings:,} in embeddings ({tied}), {plan.parameters - embeddings:,} else",
        ),
        ("arithmetic", f"{plan.flops_per_token / 1e9:.3g} GFLOP a token, {plan.tokens_per_step:,} tokens a step"),
        (
            "memory",
            f"about {format_bytes(plan.memory.total)} on one {device} with {config.training.batch_size} sequences at once",
        ),
        *((f"  {part}", format_bytes(size)) for part, size in asdict(plan.memory).items()),
        ("checkpointing", describe_checkpointing(config, device, cores, pace)),
        ("disk", f"{format_bytes(plan.disk_bytes)}: {plan.checkpoints:,} x {format_bytes(plan.checkpoint_bytes)}"),
        ("tokens", describe_tokens(config, plan, corpus)),
        ("time here", f"about {describe_time(plan)} on {device}, {cores} cores; {origin}"),
        *((f"  one {card}", describe_card(config, card, cores, size)) for card, size in CARDS.items()),
    ]


def describe_tokens(config: Config, plan: Plan, corpus: Corpus | None) -> str:
    """Tokens of the run, for each parameter, and how often that reads the text."""
    tokens = plan.tokens_per_step * config.training.train_steps
    rows = f"{tokens:,} in the run, {tokens / plan.parameters:.3g} for each parameter"
    if corpus is None:
        return f"{rows}; epochs unknown: {config.data.input} is not there"
    fresh = tokens * config.data.stride / config.training.sequence_length
    origin = "as an earlier run counted" if corpus.is_counted else "an estimate from its size"
    return f"{rows}; {fresh / max(1, corpus.train_tokens):.3g} epochs of {corpus.train_tokens:,} ({origin})"


def describe_checkpointing(config: Config, device: str, cores: int, pace: Pace) -> str:
    """What gradient checkpointing gains and costs."""
    on, off = (make_plan(with_checkpointing(config, chosen), device, cores, pace=pace) for chosen in (True, False))
    state = "on" if config.training.gradient_checkpointing else "off"
    share = on.seconds_per_step / off.seconds_per_step - 1
    costs = [f"{format_bytes(p.memory.total)}, {format_step_time(p.seconds_per_step)}" for p in (on, off)]
    saved = format_bytes(off.memory.total - on.memory.total)
    return f"{state}; on: {costs[0]}, off: {costs[1]}: it saves {saved} and costs {share:.0%} of the time"


def with_checkpointing(config: Config, chosen: bool) -> Config:
    """The same config with gradient checkpointing on or off."""
    training = config.training.model_copy(update={"gradient_checkpointing": chosen})
    return config.model_copy(update={"training": training})


def describe_card(config: Config, card: str, cores: int, gigabytes: int) -> str:
    """What the run would take on a common GPU."""
    plan = make_plan(config, card, cores)
    if plan.memory.total > gigabytes * 1e9:
        return f"does not fit: {format_bytes(plan.memory.total)} of {gigabytes} GB; lower training.batch_size"
    return f"about {describe_time(plan)}, {format_bytes(plan.memory.total)} of {gigabytes} GB; an estimate"


def count_parameters(model: ModelConfig) -> int:
    """Every weight once: a tied head is the embedding."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return embeddings + count_non_embedding(model)


def count_non_embedding(model: ModelConfig) -> int:
    """The blocks and the last norm."""
    norm = model.hidden_size * (2 if model.norm == "layernorm" else 1)
    return model.num_hidden_layers * (count_block_matrices(model) + 2 * norm) + norm


def count_block_matrices(model: ModelConfig) -> int:
    """The entries of one block's matrices."""
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    return model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size)


def muon_flops(model: ModelConfig, device: str) -> int:
    """Return the FLOPs of one Muon step, products only, whatever the number of tokens.

    An M x N matrix (M <= N) takes 4 M^2 N + 2 M^3 in each step of the iteration: X X^T, the square of that, and the product
    with X. In float32 with M < N the iteration is on the M x M Gram matrix: 4 products a step, of which the first leaves out
    one and the last two, and 4 M^2 N in all.
    """
    on_gram = device == "cpu-float32"
    flops = 0
    hidden, head_dim = model.hidden_size, model.head_dim
    query, key_value = model.num_attention_heads * head_dim, model.num_key_value_heads * head_dim
    for side, count in ((query, 2), (key_value, 2), (model.intermediate_size, 3)):
        m, n = sorted((side, hidden))
        if on_gram and m < n:
            flops += count * (4 * m * m * n + (4 * MUON_STEPS - 3) * 2 * m**3)
        else:
            flops += count * MUON_STEPS * (4 * m * m * n + 2 * m**3)
    return model.num_hidden_layers * flops


def flops_per_token(model: ModelConfig, length: int) -> int:
    """Forward and backward, causal: 6 N + 6 V d + 6 L d_attention T, with N outside the embeddings."""
    attention = model.num_hidden_layers * model.num_attention_heads * model.head_dim * length
    return 6 * (count_non_embedding(model) + model.vocab_size * model.hidden_size + attention)


def estimate_memory(config: Config, device: str) -> Memory:
    """Of one micro-batch on one device: exact for what is held, counted tensor by tensor for what passes through."""
    m, t = config.model, config.training
    parameters = count_parameters(m)
    size = 4 if needs_float32(config, device) else 2
    rows = t.batch_size * t.sequence_length
    kept = 4 * [m.hidden_size] + 3 * [m.intermediate_size]  # numbers a row in each piece that a block keeps
    kept += 3 * [m.num_attention_heads * m.head_dim] + 2 * [m.num_key_value_heads * m.head_dim]
    if m.norm == "layernorm":  # computed on a float32 copy
        kept += 2 * [4 * m.hidden_size // size]
    if t.attention == "eager":  # the scores, and their probabilities
        kept += 2 * [m.num_attention_heads * t.sequence_length * (4 + size) // (2 * size)]
    in_blocks = t.attention == "blocks" or (t.attention == "auto" and device.startswith("cpu") and size == 2)
    if in_blocks and t.sequence_length <= LONGEST_KEPT:
        kept += [m.num_attention_heads * (t.sequence_length + QUERY_BLOCK) // 2]
    block = size * sum(kept)
    blocks = block * m.num_hidden_layers
    if t.gradient_checkpointing:
        blocks = block + size * m.hidden_size * m.num_hidden_layers
    passing = size * (4 * m.intermediate_size + 3 * m.hidden_size)
    chunk = min(rows, 512 if device.startswith("cpu") else 8192)
    by_muon = m.num_hidden_layers * count_block_matrices(m) if t.optimizer == "muon" else 0
    gradients = 4 * parameters
    activations = rows * (blocks + passing)
    loss = chunk * m.vocab_size * (8 + size) + 4 * m.vocab_size * m.hidden_size
    small = sum(width for width in kept if rows * size * width < MAPPED) / sum(kept)
    gaps = HEAP_GAPS["several" if t.gradient_accumulation_steps > 1 else "one micro-batch"]
    return Memory(
        weights=parameters * (4 if size == 4 else 6),  # the 16-bit copies of the products beside the float32
        gradients=gradients,
        optimizer=8 * parameters - 4 * by_muon,  # AdamW keeps two moments, Muon one
        activations=activations,
        loss=loss,
        gaps=int(gaps * small * (gradients + activations + loss)) if device.startswith("cpu") else 0,
    )


def estimate_step(config: Config, device: str, cores: int, pace: Pace | None = None) -> float:
    """Seconds of one update at this pace, by default the table's."""
    products, besides = split_step(config, device, pace or table_pace(config, device, cores))
    return products + besides if device.startswith("cpu") else max(products, besides)


def split_step(config: Config, device: str, pace: Pace) -> tuple[float, float]:
    """Seconds of one update that grow with its tokens, and those that do not."""
    m, t = config.model, config.training
    tokens = config.global_batch_size * t.sequence_length
    flops: float = flops_per_token(m, t.sequence_length)
    if device.startswith("cpu"):  # the work besides the products, as the products that take as long
        core_flops = CORE_FLOPS["cpu-float32" if needs_float32(config, device) else device]
        flops += m.num_hidden_layers * m.hidden_size * CORE_SECONDS_PER_NUMBER * core_flops
    work = tokens * flops * (4 / 3 if t.gradient_checkpointing else 1)
    return work / pace.flops, t.gradient_accumulation_steps * m.num_hidden_layers * pace.seconds_per_block


def table_pace(config: Config, device: str, cores: int) -> Pace:
    """The pace of a kind of device on which nothing was measured."""
    kind = "cpu" if device.startswith("cpu") else "gpu"
    return Pace(reached_flops(config, device, cores), SECONDS_PER_BLOCK[kind])


def measured_pace(config: Config, device: str, cores: int, seconds: float) -> Pace:
    """The pace at which `config` takes so many seconds a step: the table's, faster or slower by one factor.

    A run too small to be bound by its products says nothing of them.
    """
    table = table_pace(config, device, cores)
    products, besides = split_step(config, device, table)
    factor = seconds / estimate_step(config, device, cores)
    flops = table.flops / factor if products > besides else table.flops
    return Pace(flops, table.seconds_per_block * factor, datetime.datetime.now().astimezone().date().isoformat())


def find_pace(config: Config, device: str, cores: int) -> Pace:
    """The fastest of the paces that recent runs left in the cache folder, else the table's: another program's work makes a
    pace slower, nothing makes it faster than the machine."""
    paces = read_paces(Path(config.data.cache_dir) / MEASURED).get(pace_key(config, device, cores))
    if not paces:
        return table_pace(config, device, cores)
    return min(paces, key=lambda pace: estimate_step(config, device, cores, pace))


def keep_pace(config: Config, device: str, cores: int, seconds: float) -> None:
    """Leave in the cache folder that an update of `config` took so many seconds. Raises OSError."""
    path, key = Path(config.data.cache_dir) / MEASURED, pace_key(config, device, cores)
    table, pace = table_pace(config, device, cores), measured_pace(config, device, cores, seconds)
    paces = read_paces(path)
    larger = [earlier for earlier in paces.get(key, []) if earlier.flops != table.flops]
    if pace.flops == table.flops and larger:  # a small run; what larger ones found of the products stands
        return
    earlier = paces.get(key, []) if pace.flops == table.flops else larger
    paces[key] = [*earlier, pace][-KEPT_PACES:]
    text = json.dumps({key: [asdict(pace) for pace in kept] for key, kept in paces.items()}, indent=1)
    write_atomically(path, f"{text}\n".encode())


def read_paces(path: Path) -> dict[str, list[Pace]]:
    """The paces in a file; what is not one is left out, for a cache may be of any age."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    paces: dict[str, list[Pace]] = {}
    for key, values in found.items() if isinstance(found, dict) else ():
        for value in values if isinstance(values, list) else ():
            with contextlib.suppress(TypeError, ValueError, KeyError):
                pace = Pace(float(value["flops"]), float(value["seconds_per_block"]), str(value["measured"]))
                if 0 < pace.flops < math.inf and 0 < pace.seconds_per_block < math.inf:
                    paces.setdefault(key, []).append(pace)
    return paces


def pace_key(config: Config, device: str, cores: int) -> str:
    """What a pace holds for."""
    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if needs_float32(config, device) else "bf16"
    return f"{device}, {precision}{', compiled' * config.training.compile}, {cores} cores"


def find_corpus(config: Config) -> Corpus | None:
    """What is known of the text: as an earlier run counted it, else by its size. None where it is not there."""
    data = config.data
    try:
        size = Path(data.input).stat().st_size
    except (OSError, ValueError):
        return None
    vocab_size = 257 if data.tokenizer == "bytes" else config.model.vocab_size
    for counted_size, corpus in read_counts(Path(data.cache_dir)):
        # A count under another vocabulary is another run's: nano's 4,096 says nothing of a model of 32,000.
        if counted_size == size and corpus.vocab_size == vocab_size:
            return corpus
    tokens = size / bytes_per_token(config)
    return Corpus(round(tokens * (1 - data.validation_fraction)), config.model.vocab_size, False)


def read_counts(cache: Path) -> list[tuple[int, Corpus]]:
    """(bytes, corpus) of every text in the token cache."""
    found = []
    for path in sorted(cache.glob("*/header.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            header = json.loads(path.read_text(encoding="utf-8"))
            counts = header["statistics"]
            found.append((int(counts["bytes"]), Corpus(int(counts["train_tokens"]), int(header["vocab_size"]), True)))
    return found


def bytes_per_token(config: Config) -> float:
    """Bytes of English that one token stands for: a third more with every doubling of the vocabulary."""
    if config.data.tokenizer == "bytes":
        return 1.0
    return max(1.0, math.log2(config.model.vocab_size) / 3 - 0.7)


def needs_float32(config: Config, device: str) -> bool:
    """Whether the products are 32 bits wide."""
    precision = config.training.precision
    return precision in ("float32", "tf32") or (precision == "auto" and device in ("cpu-float32", "mps"))


def reached_flops(config: Config, device: str, cores: int) -> float:
    """FLOP/s that training reaches there."""
    if device.startswith("cpu"):
        return CORE_FLOPS["cpu-float32" if needs_float32(config, device) else device] * cores
    flops = next((flops for word, flops in REACHED_FLOPS.items() if word in device), OTHER_GPU_FLOPS)
    return flops / 8 if config.training.precision == "float32" and device != "mps" else flops


def count_checkpoints(config: Config) -> int:
    """How many lie in the run folder at the end: the last step always saves, keep_last spares the best besides."""
    t = config.training
    every = math.ceil(t.train_steps / t.save_interval) if t.save_interval else 1
    if t.keep_last is None:
        return every
    milestones = t.train_steps // math.lcm(t.keep_every, t.save_interval or t.train_steps) if t.keep_every else 0
    return min(every, t.keep_last + 1 + milestones)


def estimated_seconds(config: Config, device: str, cores: int) -> float:
    """Of the whole run."""
    return make_plan(config, device, cores).seconds


def estimate_here(path: Path) -> float:
    """Seconds that the config in the file `path` would take on this machine."""
    return estimated_seconds(load_config(path), *find_device())


def find_device() -> tuple[str, int]:
    """The kind of device that training would take here, and the number of cores, without asking torch."""
    available = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = len(available(0)) if available else os.cpu_count() or 1
    for card in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        return card.read_text(errors="replace").partition("\n")[0].partition(":")[2].strip(), cores
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "mps", cores
    info = Path("/proc/cpuinfo")
    features = info.read_text(errors="replace") if info.exists() else ""
    has_bf16 = "avx512_bf16" in features or "amx_tile" in features
    return "cpu-bf16" if has_bf16 else "cpu-float32", cores


def describe_time(plan: Plan) -> str:
    """Return `2.5 hours, 0.34 s per step`."""
    return f"{format_estimate(plan.seconds)}, {format_step_time(plan.seconds_per_step)}"
