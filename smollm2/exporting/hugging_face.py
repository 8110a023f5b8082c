"""A Hugging Face folder, Llama or StableLM (for LayerNorm), that transformers 4.57 and 5 both read right.

Every field is written: what an exporter leaves out, transformers fills with a default of its own (facts of both versions:
5 keeps rope_theta in rope_parameters, 4.57 at top level, and each ignores the other's place without a word). The folder is
made under a temporary name, loaded again from the disk and compared with the source (certificate.py), then renamed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import CheckpointError, ConfigError, ResourceError
from smollm2.exporting.card import write_card
from smollm2.exporting.certificate import certify, choose_text
from smollm2.exporting.safetensors import DTYPES, count_bytes, write_weights
from smollm2.inference.loading import load_source, read_config
from smollm2.model.transformer import SmolLM2
from smollm2.storage.atomic import IO_OPS, IoOps, sync_file, write_atomically, write_folder_atomically

Dtype = Literal["float32", "bf16", "fp16"]

SHARD_BYTES = 5 * 10**9
OTHER_FILES = 40_000_000
"""Room for tokenizer, card and configs; the largest tokenizer.json in use takes 33 MB."""

OWN_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "parity.json",
    "README.md",
}
"""What a model folder holds besides model*.safetensors; --force removes a folder of these alone."""


@dataclass(frozen=True)
class Source:
    """What is exported, and what is known of how it was trained."""

    model: SmolLM2
    tokenizer: Tokenizer
    facts: Mapping[str, str]


def export(
    path: str | Path,
    folder: str | Path,
    format: str = "huggingface",
    *,
    dtype: str = "float32",
    best: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    text_file: str | Path | None = None,
    say: Callable[[str], None] = lambda message: None,
    io_ops: IoOps = IO_OPS,
) -> dict[str, Any]:
    """Write the model in `path` (a `.pt`, a run folder or a Hugging Face folder) to `folder`, and return its certificate.

    The folder appears only when it was loaded from the disk, by this package and by transformers where that is installed,
    and gave the source's logits, loss, greedy text and token ids on the beginning of `text_file` (default: Python's language
    reference). Of a run folder the newest checkpoint is taken, or the `best`; `say` hears of those that are passed over.
    `force` replaces an earlier export. Raises CheckpointError, ConfigError for an unknown format or dtype, DataError,
    ResourceError.
    """
    if format != "huggingface":
        raise ConfigError(f"format {format!r} is unknown; huggingface is known")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; {', '.join(DTYPES)} are known")
    if shard_bytes < 1:
        raise ConfigError(f"shards of {shard_bytes} bytes are too small; use 1 or more")
    path, folder = Path(path), Path(folder)
    check_target(path, folder, force=force)
    text = choose_text(text_file)
    source = read_source(path, best=best, say=say)
    check_architecture(source, path)
    check_range(source.model, dtype)
    check_room(source.model, folder, dtype, io_ops)
    certificate: dict[str, Any] = {}

    def fill(temporary: Path) -> None:
        write_model_folder(source, temporary, dtype=dtype, shard_bytes=shard_bytes, io_ops=io_ops)
        certificate.update(certify(temporary, source.model, source.tokenizer, DTYPES[dtype], text))
        if not certificate["passed"]:
            problems = "; ".join(certificate["problems"][:3])
            raise CheckpointError(
                f"{folder} - the exported model is not the source: {problems} - nothing was written; please report it"
            )
        write_json(temporary / "parity.json", certificate, io_ops)
        card = write_card(source.model.config, source.facts, certificate, folder.name)
        write_atomically(temporary / "README.md", card.encode(), io_ops=io_ops)
        settle_files(temporary)

    write_folder_atomically(folder, fill, replaces=folder.exists(), io_ops=io_ops)
    return certificate


def read_source(path: Path, *, best: bool, say: Callable[[str], None]) -> Source:
    """The model to export. Raises CheckpointError."""
    model, tokenizer, state = load_source(path, best=best, say=say)
    if state is None:
        return Source(model, tokenizer, facts={})
    t = read_config(state, path).training
    facts = {
        "updates": f"{state['step']:,}",
        "tokens seen": f"{state['tokens']:,}",
        "training loss of the last update": f"{state['loss']:.4f} nats per token",
        "tokens per window": f"{t.sequence_length:,}",
        "windows per update": f"{t.batch_size * t.gradient_accumulation_steps:,}",
        "optimizer": f"{t.optimizer}, learning rate {t.learning_rate:g}, {t.schedule} schedule, {t.warmup_steps:,} warmup updates",
    }
    return Source(model, tokenizer, facts)


def check_target(path: Path, folder: Path, *, force: bool) -> None:
    """Raises CheckpointError where the target is in the way of something."""
    source, target = path.resolve(), folder.resolve()
    if source.is_dir() and target.is_relative_to(source):
        raise CheckpointError(f"{folder} - it lies inside the source {path} - name a folder outside it")
    if target in source.parents:
        raise CheckpointError(f"{folder} - the source {path} lies inside it - name another folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} - it is a file or a link, not a folder - name another one")
    if not folder.exists():
        return
    if not force:
        raise CheckpointError(f"{folder} - it exists - name another folder, or replace it with --force")
    foreign = [file.name for file in folder.iterdir() if not is_own_file(file)]
    if foreign:
        raise CheckpointError(f"{folder} - it holds {foreign[0]}, which no export wrote - name another folder")


def is_own_file(file: Path) -> bool:
    """Whether a file of this name may be removed with an earlier export."""
    is_weights = file.name.startswith("model") and file.suffix == ".safetensors"
    return file.is_file() and (file.name in OWN_FILES or is_weights)


def check_architecture(source: Source, path: Path) -> None:
    """Raises CheckpointError for a model that the two architectures do not compute."""
    config = source.model.config
    width = config.num_attention_heads * config.head_dim
    if config.norm == "layernorm" and width != config.hidden_size:
        raise CheckpointError(
            f"{path} - its {config.num_attention_heads} heads of {config.head_dim} are {width} wide and the model {config.hidden_size}: "
            "StableLM, the architecture with LayerNorm, cannot say that - train with norm rmsnorm, or without head_dim"
        )
    if source.tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} - its tokenizer has {source.tokenizer.vocab_size:,} ids and the model {config.vocab_size:,} - "
            "export it with the tokenizer it was trained with"
        )


def check_range(model: SmolLM2, dtype: str) -> None:
    """Raises CheckpointError where a weight is not finite, or not in this dtype."""
    for name, tensor in model.named_parameters():
        if not tensor.to(DTYPES[dtype]).isfinite().all():
            largest = tensor.abs().max().item()
            raise CheckpointError(
                f"{name} - it holds {largest:g}, which {dtype} cannot hold - export as float32 or bf16"
            )


def check_room(model: SmolLM2, folder: Path, dtype: str, io_ops: IoOps) -> None:
    """Raises ResourceError where the disk has no room, before anything is written."""
    need = count_bytes(exported_weights(model), DTYPES[dtype]) + OTHER_FILES
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        free = io_ops.free_bytes(existing)
    except OSError as error:
        raise ResourceError(f"{existing} - it cannot be looked at: {error.strerror} - choose another folder") from None
    if free < need:
        raise ResourceError(
            f"{folder} - {need:,} bytes are needed and {free:,} are free - free some space or choose another disk"
        )


def write_model_folder(
    source: Source, folder: Path, *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES, io_ops: IoOps = IO_OPS
) -> None:
    """Configs, weights and tokenizer of a model, into a folder that exists."""
    write_json(folder / "config.json", describe_model(source.model, source.tokenizer, dtype), io_ops)
    write_json(folder / "generation_config.json", describe_generation(source.tokenizer), io_ops)
    write_weights(folder, exported_weights(source.model), DTYPES[dtype], shard_bytes, io_ops)
    source.tokenizer.save(folder)
    complete_tokenizer_config(folder / "tokenizer_config.json", source.model.config.max_position_embeddings, io_ops)


def exported_weights(model: SmolLM2) -> dict[str, Tensor]:
    """The tensors by name; a tied head is the embedding and not written again."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def describe_model(model: SmolLM2, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json, every field that either version of transformers reads."""
    c = model.config
    name = str(DTYPES[dtype]).removeprefix("torch.")
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "use_cache": True,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "pad_token_id": None,
        "dtype": name,
        "torch_dtype": name,
    }
    if c.norm == "rmsnorm":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **shared,
            "rope_parameters": rope,
            "rms_norm_eps": c.norm_eps,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
        }
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        **shared,
        "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "layer_norm_eps": c.norm_eps,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "hidden_dropout": 0.0,
    }


def describe_generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: without it generation ends at ids 1 and 2 of transformers' own choosing."""
    return {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text, "do_sample": False}


def complete_tokenizer_config(path: Path, positions: int, io_ops: IoOps) -> None:
    """Add what transformers reads besides: the context, and the token that lm-eval puts before a text."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"bos_token": config["eos_token"], "model_max_length": positions}
    write_json(path, config, io_ops)


def write_json(path: Path, value: Mapping[str, Any], io_ops: IoOps) -> None:
    """One JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode(), io_ops=io_ops)


def settle_files(folder: Path) -> None:
    """Let everyone read the files whom the folder lets in (files.py makes them for this user alone), and sync them."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)
        sync_file(path)
