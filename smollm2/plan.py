"""What a run will take, by arithmetic, before it starts: parameters, FLOPs, memory, disk and time.

Nothing is measured and nothing heavy imported. The seconds come from a small table of what training reaches on a kind
of device; the first measured steps replace it (`tokens_per_second`).
"""

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from smollm2.config import Config, ModelConfig
from smollm2.config_file import load_config

REACHED_FLOPS = {"H200": 280e12, "H100": 250e12, "A100": 100e12, "mps": 2e12}
"""FLOP/s in training on one device whose name holds the word; estimates."""

OTHER_GPU_FLOPS = 30e12
CORE_FLOPS = {"cpu-float32": 55e9, "cpu-bf16": 100e9}
"""FLOP/s a core: benchmarks/train_speed.py on two cores of an AMD EPYC with avx512_bf16, 2026-11-24."""

SECONDS_PER_BLOCK = {"cpu": 10e-3, "gpu": 2e-3}
"""What a block costs in one forward and backward pass besides its products; a GPU hides it behind them."""

LIBRARIES = 350_000_000
"""Bytes that Python and torch hold before there is a model."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the highest point of an update, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    libraries: int = LIBRARIES

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.libraries


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


def make_plan(config: Config, device: str, cores: int, *, tokens_per_second: float | None = None) -> Plan:
    """The plan for one device: `cpu-float32`, `cpu-bf16`, `mps` or a GPU's name. `tokens_per_second` is a measured rate."""
    t = config.training
    tokens = config.global_batch_size * t.sequence_length
    seconds = tokens / tokens_per_second if tokens_per_second else estimate_step(config, device, cores)
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


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
    """The plan as rows of a page."""
    per_step = f"{plan.seconds_per_step:.2f} s" if plan.seconds_per_step < 10 else f"{plan.seconds_per_step:,.0f} s"
    return [
        ("parameters", f"{plan.parameters:,}"),
        ("arithmetic", f"{plan.flops_per_token / 1e9:.3g} GFLOP a token, {plan.tokens_per_step:,} tokens a step"),
        ("memory", f"about {show_bytes(plan.memory.total)}"),
        ("disk", f"{show_bytes(plan.disk_bytes)}: {plan.checkpoints:,} x {show_bytes(plan.checkpoint_bytes)}"),
        ("time", f"about {show_seconds(plan.seconds)}, {per_step} a step"),
    ]


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
    attention = 3 * m.num_attention_heads + 2 * m.num_key_value_heads
    block = size * (4 * m.hidden_size + attention * m.head_dim + 3 * m.intermediate_size)
    if m.norm == "layernorm":  # computed on a float32 copy
        block += 8 * m.hidden_size
    if t.attention == "eager":  # the scores, and their probabilities
        block += m.num_attention_heads * t.sequence_length * (4 + size)
    kept = block * m.num_hidden_layers
    if t.gradient_checkpointing:
        kept = block + size * m.hidden_size * m.num_hidden_layers
    passing = 4 * size * m.intermediate_size
    chunk = min(rows, 512 if device.startswith("cpu") else 8192)
    by_muon = m.num_hidden_layers * count_block_matrices(m) if t.optimizer == "muon" else 0
    return Memory(
        weights=parameters * (4 if size == 4 else 6),  # the 16-bit copies of the products beside the float32
        gradients=4 * parameters,
        optimizer=8 * parameters - 4 * by_muon,  # AdamW keeps two moments, Muon one
        activations=rows * (kept + passing + 3 * size * m.hidden_size),
        loss=chunk * m.vocab_size * (8 + size) + 4 * m.vocab_size * m.hidden_size,
    )


def estimate_step(config: Config, device: str, cores: int) -> float:
    """Seconds of one update, from the table."""
    m, t = config.model, config.training
    tokens = config.global_batch_size * t.sequence_length
    work = tokens * flops_per_token(m, t.sequence_length) * (4 / 3 if t.gradient_checkpointing else 1)
    products = work / reached_flops(config, device, cores)
    blocks = t.gradient_accumulation_steps * m.num_hidden_layers
    if device.startswith("cpu"):
        return products + blocks * SECONDS_PER_BLOCK["cpu"]
    return max(products, blocks * SECONDS_PER_BLOCK["gpu"])


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


def show_bytes(number: float) -> str:
    """`1.6 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def show_seconds(seconds: float) -> str:
    """`3 minutes`, `2.5 hours`, `12 days`, `620 years`."""
    for unit, size in (("years", 31557600), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} seconds"
