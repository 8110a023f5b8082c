"""Export to a Hugging Face folder, Llama or StableLM (for LayerNorm), that transformers 4.57 and 5 both read correctly.

Every field is written: if one is missing, transformers uses its own default (5 reads rope_theta in rope_parameters,
4.57 at the top level, and each silently ignores the other place). The folder is written under a temporary name,
reloaded from disk, compared with the source (certificate.py) and then renamed.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from smollm2.data.text import expand_home
from smollm2.data.tokenizer import Tokenizer
from smollm2.errors import CheckpointError, ConfigError, ResourceError
from smollm2.exporting.card import write_card
from smollm2.exporting.certificate import certify, choose_text
from smollm2.formatting import format_bytes
from smollm2.inference.loading import load_source, read_config
from smollm2.inference.weight_files import open_weights
from smollm2.model.transformer import SmolLM2
from smollm2.storage.atomic import IO_OPS, IoOps, sync_file, write_atomically, write_folder_atomically

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SHARD_BYTES = 5 * 10**9
OTHER_FILES = 40_000_000
"""Bytes reserved for the tokenizer, the model card and the configs; the largest tokenizer.json in use takes 33 MB."""

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
"""The files of an export besides model*.safetensors; --force replaces a folder only if it holds no other files."""


@dataclass(frozen=True)
class Source:
    """The model to export, its tokenizer, and facts about its training for the model card."""

    model: SmolLM2
    tokenizer: Tokenizer
    facts: Mapping[str, str]


def export(
    path: str | Path,
    folder: str | Path,
    format: str = "huggingface",
    *,
    dtype: str = "",
    best: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    text_file: str | Path | None = None,
    report: Callable[[str], None] = lambda message: None,
    io_ops: IoOps = IO_OPS,
) -> dict[str, Any]:
    """Write the model in `path` (a `.pt`, a run folder or a Hugging Face folder) to `folder`.

    Return the results of the verification, as in parity.json.

    The folder appears only if this package, and transformers if it is usable here, can load it from disk and reproduce
    the source's logits, loss, greedy text and token ids on the beginning of `text_file` (default: Python's language
    reference). From a run folder, the newest checkpoint or the `best` one is exported; `report` is called with a line
    for each checkpoint skipped. `force` replaces an earlier export. Raise ConfigError for an unknown format or dtype,
    CheckpointError, DataError or ResourceError.
    """
    path, folder = expand_home(path), expand_home(folder)
    dtype = dtype or stored_dtype(path)
    check_options(format, dtype, shard_bytes)
    check_target(path, folder, force=force)
    text = choose_text(text_file)
    source = read_source(path, best=best, report=report)
    check_architecture(source, path)
    check_range(source.model, dtype)
    check_room(source.model, folder, dtype, io_ops)
    certificate: dict[str, Any] = {}

    def fill(temporary: Path) -> None:
        write_model_folder(source, temporary, dtype=dtype, shard_bytes=shard_bytes, io_ops=io_ops)
        certificate.update(certify(temporary, source.model, source.tokenizer, DTYPES[dtype], text))
        if not certificate["passed"]:
            what = f"the exported model differs from its source ({'; '.join(certificate['problems'][:3])})"
            raise CheckpointError(folder, what, "nothing was written; please report this")
        write_json(temporary / "parity.json", certificate, io_ops)
        card = write_card(source.model.config, source.facts, certificate, folder.name)
        write_atomically(temporary / "README.md", card.encode(), io_ops=io_ops)
        finish_files(temporary)

    write_folder_atomically(folder, fill, replaces=folder.exists(), io_ops=io_ops)
    return certificate


def stored_dtype(path: Path) -> str:
    """Return the dtype of all weights in a Hugging Face folder; float32 if they differ, or for a checkpoint."""
    if not (path / "config.json").exists():
        return "float32"
    found = set(open_weights(path).dtypes.values())
    return next((name for name, dtype in DTYPES.items() if found == {dtype}), "float32")


def check_options(format: str, dtype: str, shard_bytes: int) -> None:
    """Raise ConfigError for an invalid option."""
    if format != "huggingface":
        raise ConfigError("format", f"{format!r} is unknown", "use 'huggingface'")
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"{dtype!r} is unknown", f"use one of {', '.join(DTYPES)}")
    if shard_bytes < 1:
        raise ConfigError("shard_bytes", f"{shard_bytes} is too small", "use 1 or more")


def read_source(path: Path, *, best: bool, report: Callable[[str], None]) -> Source:
    """Return the model to export, with its tokenizer and what is known of its training. Raise CheckpointError."""
    model, tokenizer, state = load_source(path, best=best, report=report)
    if state is None:
        return Source(model, tokenizer, facts={})
    t = read_config(state, path).training
    facts = {
        "steps": f"{state['step']:,}",
        "tokens seen": f"{state['tokens']:,}",
        "training loss of the last step": f"{state['loss']:.4f} nats per token",
        "tokens per window": f"{t.sequence_length:,}",
        "windows per step": f"{t.batch_size * t.gradient_accumulation_steps:,}",
        "optimizer": f"{t.optimizer}, learning rate {t.learning_rate:g}, {t.schedule} schedule, {t.warmup_steps:,} warmup steps",
    }
    return Source(model, tokenizer, facts)


def check_target(path: Path, folder: Path, *, force: bool) -> None:
    """Raise CheckpointError if writing to the target would damage the source or files not written by an export."""
    source, target = path.resolve(), folder.resolve()
    if source.is_dir() and target.is_relative_to(source):
        raise CheckpointError(folder, f"the folder is inside the source {path}", "choose a folder outside it")
    if target in source.parents:
        raise CheckpointError(folder, f"the folder contains the source {path}", "choose another folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(folder, "this is a file or a link, not a folder", "choose another path")
    if not folder.exists():
        return
    if not force:
        raise CheckpointError(folder, "the folder already exists", "choose another folder, or replace it with --force")
    foreign = [file.name for file in folder.iterdir() if not is_own_file(file)]
    if foreign:
        raise CheckpointError(
            folder, f"the folder contains {foreign[0]}, which was not written by an export", "choose another folder"
        )


def is_own_file(file: Path) -> bool:
    """Return whether a file may be removed, because exports write files of that name."""
    is_weights = file.name.startswith("model") and file.suffix == ".safetensors"
    return file.is_file() and (file.name in OWN_FILES or is_weights)


def check_architecture(source: Source, path: Path) -> None:
    """Raise CheckpointError for a model that neither Llama nor StableLM can represent, or that transformers refuses."""
    c = source.model.config
    width = c.num_attention_heads * c.head_dim
    if c.norm == "layernorm" and width != c.hidden_size:
        what = f"StableLM (with LayerNorm) needs heads with a total width of hidden_size ({c.hidden_size}), not {width}"
        raise CheckpointError(path, what, "train with norm: rmsnorm, or without head_dim")
    if c.hidden_size % c.num_attention_heads:
        what = f"transformers 5 cannot load a model whose hidden_size ({c.hidden_size}) is not a multiple of its heads"
        raise CheckpointError(
            path, f"{what} ({c.num_attention_heads})", "train with a hidden_size that is a multiple of them"
        )
    if source.tokenizer.vocab_size > c.vocab_size:
        what = f"the tokenizer has {source.tokenizer.vocab_size:,} ids, but the model has only {c.vocab_size:,}"
        raise CheckpointError(path, what, "export the model with the tokenizer it was trained with")


def check_range(model: SmolLM2, dtype: str) -> None:
    """Raise CheckpointError if a weight is not finite in this dtype."""
    for name, tensor in model.named_parameters():
        if not tensor.to(DTYPES[dtype]).isfinite().all():
            what = f"a weight is outside the range of {dtype} ({tensor.abs().max().item():g})"
            raise CheckpointError(name, what, "export as float32 or bf16")


def check_room(model: SmolLM2, folder: Path, dtype: str, io_ops: IoOps) -> None:
    """Raise ResourceError if the disk has too little space, before anything is written."""
    need = count_bytes(exported_weights(model), DTYPES[dtype]) + OTHER_FILES
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        free = io_ops.free_bytes(existing)
    except OSError as error:
        what = f"the free space cannot be determined ({error.strerror})"
        raise ResourceError(existing, what, "choose another folder") from None
    if free < need:
        what = f"the export needs {format_bytes(need)}, but only {format_bytes(free)} is free"
        raise ResourceError(folder, what, "free some space or choose another disk")


def write_model_folder(
    source: Source, folder: Path, *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES, io_ops: IoOps = IO_OPS
) -> None:
    """Write the configs, weights and tokenizer of a model to an existing folder."""
    write_json(folder / "config.json", describe_model(source.model, source.tokenizer, dtype), io_ops)
    write_json(folder / "generation_config.json", describe_generation(source.tokenizer), io_ops)
    write_weights(folder, exported_weights(source.model), DTYPES[dtype], shard_bytes, io_ops)
    source.tokenizer.save(folder)
    complete_tokenizer_config(folder / "tokenizer_config.json", source.model.config.max_position_embeddings, io_ops)


def exported_weights(model: SmolLM2) -> dict[str, Tensor]:
    """Return the weights by name, without a tied head, which shares the tensor of the embedding."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int, io_ops: IoOps
) -> None:
    """Write model.safetensors, or shards of up to `shard_bytes` with an index if the weights are larger."""
    shards = list(split_shards(weights, dtype, shard_bytes))
    if len(shards) == 1:
        write_shard(folder / "model.safetensors", weights, dtype)
        return
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: weights[name] for name in names}, dtype)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": count_bytes(weights, dtype)}, "weight_map": files}
    write_json(folder / "model.safetensors.index.json", index, io_ops)


def split_shards(weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the tensor names of each shard, in order; a tensor larger than `shard_bytes` gets a shard of its own."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        more = tensor.numel() * dtype.itemsize
        if names and size + more > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def write_shard(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write one safetensors file. Raise ResourceError if this fails.

    It need not be written atomically, because the whole folder is; `finish_files` syncs it. safetensors makes no copy,
    so only a conversion to 16 bits takes memory, and less than the verification takes afterwards.
    """
    try:
        save_file(
            {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}, path, {"format": "pt"}
        )
    except (OSError, SafetensorError) as error:
        what = f"the weights cannot be written ({error})"
        raise ResourceError(path, what, "free some space or choose another disk") from None


def count_bytes(weights: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Return the size in bytes of the weights when stored as `dtype`."""
    return sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize


def describe_model(model: SmolLM2, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the content of config.json, with every field that either version of transformers reads."""
    c = model.config
    name = str(DTYPES[dtype]).removeprefix("torch.")
    scaling = {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None
    if scaling:  # transformers compares it with an integer
        scaling["original_max_position_embeddings"] = int(c.rope_scaling["original_max_position_embeddings"])
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})}
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
        "rope_scaling": scaling,
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
    """Return the content of generation_config.json: without it, transformers would use its default ids, 1 and 2."""
    return {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text, "do_sample": False}


def complete_tokenizer_config(path: Path, positions: int, io_ops: IoOps) -> None:
    """Add the context length, which transformers reads, and the token that lm-eval prepends to a text."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"bos_token": config["eos_token"], "model_max_length": positions}
    write_json(path, config, io_ops)


def write_json(path: Path, value: Mapping[str, Any], io_ops: IoOps) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode(), io_ops=io_ops)


def finish_files(folder: Path) -> None:
    """Give the files, which only this user could access so far, the folder's permissions, and sync them to disk."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)
        sync_file(path)
