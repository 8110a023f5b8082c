"""Calculate the parameters, FLOPs, memory and disk space of a run, without running or measuring anything."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from smollm2.config.schema import Config, ModelConfig
from smollm2.errors import DataError
from smollm2.storage.input_files import find_files, is_pattern

LIBRARIES = 365_000_000
"""Bytes that Python and torch need in addition to the tensors; measured after the first step on 2026-11-24."""

QUERY_BLOCK, LONGEST_KEPT = 128, 512
"""The number of queries that the attention backend `blocks` processes at once (twice as many above 1,024 positions),
and the longest sequence whose probabilities it keeps for the backward pass. Both were the fastest choice on two cores
with avx512_bf16 on 2026-11-24: forward and backward passes with 8 sequences, 6 heads and 256 positions took 9.2 ms with
128 queries, 11.0 ms with 256 queries, and 14.0 ms with recomputed probabilities."""

MAPPED = 32 * 2**20
"""glibc maps allocations of this many bytes or more separately and unmaps them when freed. Smaller ones share one heap,
which keeps freed memory. This is the largest threshold that mallopt accepts everywhere (`keep_freed_memory` in the
runtime)."""

HEAP_GAPS = {"one micro-batch": 0.3, "several": 0.5}
"""The memory lost to gaps in the heap at peak use, as a fraction of the memory of small tensors. With gradient
accumulation, the gradients of the first micro-batch remain between freed activations. Measured with micro at batch_size
8 on 2026-11-24, the peak with 1, 2 and 4 micro-batches was 978, 1093 and 1090 MB in float32, and 847, 902 and 921 MB in
bf16."""

BF16_CPUS = ("cpu-bf16", "cpu-amx")
"""CPU classes (machine.py) with bf16 units."""

MUON_STEPS = 4
"""The number of iterations in Muon's orthogonalization (training/muon.py)."""


@dataclass(frozen=True)
class Corpus:
    """The size of the text in tokens."""

    train_tokens: int
    vocab_size: int
    is_counted: bool  # counted by an earlier run; otherwise estimated from the file size


@dataclass(frozen=True)
class Memory:
    """Bytes in use at the peak of a step, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    gaps: int  # free, but in pieces too small to use
    libraries: int = LIBRARIES

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Disk:
    """The size of one checkpoint in bytes, and how many checkpoints the run folder contains at the end."""

    checkpoint_bytes: int
    checkpoints: int

    @property
    def total(self) -> int:
        """The size of all checkpoints in bytes."""
        return self.checkpoint_bytes * self.checkpoints


def count_parameters(model: ModelConfig) -> int:
    """Return the number of weights; a tied head shares the embedding's weights, which count once."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return embeddings + count_non_embedding(model)


def count_non_embedding(model: ModelConfig) -> int:
    """Return the number of weights in the blocks and the final norm."""
    return model.num_hidden_layers * count_block(model) + count_norm(model)


def count_block(model: ModelConfig) -> int:
    """Return the number of weights in one block: its matrices and its two norms."""
    return count_block_matrices(model) + 2 * count_norm(model)


def count_norm(model: ModelConfig) -> int:
    """Return the number of weights in one norm."""
    return model.hidden_size * (2 if model.norm == "layernorm" else 1)


def count_block_matrices(model: ModelConfig) -> int:
    """Return the number of weights in the matrices of one block."""
    return sum(rows * columns for rows, columns in block_matrices(model))


def block_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    """Return the shapes of one block's matrices: query, key, value, output, gate, up, down; the smaller side first."""
    hidden, inner = model.hidden_size, model.intermediate_size
    query, value = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    shapes = [(query, hidden), (value, hidden), (value, hidden), (query, hidden), *3 * [(hidden, inner)]]
    return [(min(shape), max(shape)) for shape in shapes]


def flops_per_token(model: ModelConfig, length: int) -> int:
    """Return 6 N + 6 V d + 6 L d_attention T: the FLOPs of forward and backward if causal. N excludes embeddings."""
    attention = model.num_hidden_layers * model.num_attention_heads * model.head_dim * length
    return 6 * (count_non_embedding(model) + model.vocab_size * model.hidden_size + attention)


def muon_flops(model: ModelConfig, device: str) -> int:
    """Return the FLOPs of the matrix products of one Muon step, which do not depend on the number of tokens.

    An M x N matrix (M <= N) needs 4 M^2 N + 2 M^3 FLOPs per iteration: X X^T, its square, and the product with X. In
    float32 with M < N, Muon iterates on the M x M Gram matrix: 4 products per iteration, but one fewer in the first and
    two fewer in the last, plus 4 M^2 N in total.
    """
    flops = 0
    for m, n in block_matrices(model):
        if m < n and not has_bf16(device):
            flops += 4 * m * m * n + (4 * MUON_STEPS - 3) * 2 * m**3
        else:
            flops += MUON_STEPS * (4 * m * m * n + 2 * m**3)
    return model.num_hidden_layers * flops


def estimate_memory(config: Config, device: str, shards: int = 1) -> Memory:
    """Return the peak memory on one device; `device` is a CPU class, `mps` or a GPU's name.

    `shards` is the number of devices over which weights, gradients and optimizer state are split; these three are exact
    if it is 1. Activations are counted tensor by tensor.
    """
    m, t = config.model, config.training
    parameters = count_parameters(m)
    size = 4 if needs_float32(config, device) else 2
    rows = t.batch_size * t.sequence_length
    kept = 4 * [m.hidden_size] + 3 * [m.intermediate_size]  # values per row of each tensor that a block keeps
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
    temporary = size * (4 * m.intermediate_size + 3 * m.hidden_size)
    chunk = min(rows, 512 if device.startswith("cpu") else 8192)
    gradients = math.ceil(4 * parameters / shards)
    activations = rows * (blocks + temporary)
    loss = chunk * m.vocab_size * (8 + size) + 4 * m.vocab_size * m.hidden_size
    small = sum(width for width in kept if rows * size * width < MAPPED) / sum(kept)
    gaps = HEAP_GAPS["several" if t.gradient_accumulation_steps > 1 else "one micro-batch"]
    return Memory(
        weights=weight_bytes(m, size, shards),
        gradients=gradients,
        optimizer=math.ceil(optimizer_bytes(config) / shards),
        activations=activations,
        loss=loss,
        gaps=int(gaps * small * (gradients + activations + loss)) if device.startswith("cpu") and shards == 1 else 0,
    )


def weight_bytes(model: ModelConfig, size: int, shards: int) -> int:
    """Return the bytes of the weights on one device: float32, and those that the matrix products read.

    Matrix products read values of `size` bytes: 16-bit copies of all weights, or if the weights are split over several
    devices, what FSDP2 gathers at one time: the root group (embeddings, final norm, head), a block and the next one.
    """
    parameters = count_parameters(model)
    if shards == 1:
        return parameters * (4 if size == 4 else 6)
    gathered = parameters - max(0, model.num_hidden_layers - 2) * count_block(model)
    return math.ceil(4 * parameters / shards) + size * gathered


def needs_float32(config: Config, device: str) -> bool:
    """Return whether matrix products are computed in float32."""
    precision = config.training.precision
    return precision in ("float32", "tf32") or (precision == "auto" and not has_bf16(device))


def has_bf16(device: str) -> bool:
    """Return whether a device computes matrix products in bf16; older GPUs, which use fp16 instead, count as well."""
    return device in BF16_CPUS or not device.startswith(("cpu", "mps"))


def estimate_disk(config: Config) -> Disk:
    """Return the disk space for the checkpoints, which contain float32 weights and the optimizer state."""
    parameters = count_parameters(config.model)
    return Disk(4 * parameters + optimizer_bytes(config), count_checkpoints(config))


def optimizer_bytes(config: Config) -> int:
    """Return the size of the optimizer state in bytes: two moments per weight for AdamW, one for Muon."""
    m = config.model
    by_muon = m.num_hidden_layers * count_block_matrices(m) if config.training.optimizer == "muon" else 0
    return 8 * count_parameters(m) - 4 * by_muon


def count_checkpoints(config: Config) -> int:
    """Return how many checkpoints remain at the end. The last step is always saved; keep_last keeps the best too."""
    t = config.training
    every = math.ceil(t.train_steps / t.save_interval) if t.save_interval else 1
    if t.keep_last is None:
        return every
    milestones = t.train_steps // math.lcm(t.keep_every, t.save_interval or t.train_steps) if t.keep_every else 0
    return min(every, t.keep_last + 1 + milestones)


def find_corpus(config: Config, name: str) -> Corpus | None:
    """Return the size of an input, counted by an earlier run or estimated from the file; None if there is no file."""
    data = config.data
    try:
        path = Path(name)
        several = is_pattern(name) or path.is_dir()
        size = find_files(name, data.include, data.exclude).bytes if several else path.stat().st_size
    except (OSError, ValueError, DataError):
        return None
    vocab_size = 257 if data.tokenizer == "bytes" else config.model.vocab_size
    for counted_size, corpus in read_counts(Path(data.cache_dir)):
        # A count made with another vocabulary size, such as nano's 4,096, does not apply.
        if counted_size == size and corpus.vocab_size == vocab_size:
            return corpus
    tokens = size / bytes_per_token(config)
    return Corpus(round(tokens * (1 - data.held_out_fraction)), config.model.vocab_size, False)


def read_counts(cache: Path) -> Iterator[tuple[int, Corpus]]:
    """Yield (text size in bytes, corpus) for each entry of the token cache."""
    for path in sorted(cache.glob("*/index.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            header = json.loads(path.read_text(encoding="utf-8"))
            counts = header["statistics"]
            yield int(counts["bytes"]), Corpus(int(counts["train_tokens"]), int(header["vocab_size"]), True)


def bytes_per_token(config: Config) -> float:
    """Return the estimated bytes of English text per token: 1/3 byte more for each doubling of the vocabulary size."""
    if config.data.tokenizer == "bytes":
        return 1.0
    return max(1.0, math.log2(config.model.vocab_size) / 3 - 0.7)
