"""Names and descriptions of config keys: aliases, synonyms from other projects, and suggestions for unknown keys."""

import json
from difflib import get_close_matches
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from smollm2.config.schema import FIELDS

ALIASES: dict[str, tuple[str, dict[bool, str | bool]]] = {
    "model.flash_attention": ("training.attention", {True: "auto", False: "eager"}),
    "model.gradient_checkpointing": ("training.gradient_checkpointing", {True: True, False: False}),
}
"""Keys that people expect under `model`, with the key that each one sets and the values for true and false."""

KEYS = [*FIELDS, *ALIASES]

DERIVED = {
    "model.num_key_value_heads": "model.num_attention_heads",
    "model.head_dim": "model.hidden_size / model.num_attention_heads",
    "training.sequence_length": "model.max_position_embeddings",
    "training.decay_steps": "training.train_steps / 5",
    "data.stride": "training.sequence_length",
    "data.cache_dir": "training.save_dir",
}
"""Keys whose default depends on another key."""

SYNONYMS = {
    "training.learning_rate": "lr max_lr peak_lr step_size",
    "training.min_learning_rate": "min_lr end_lr",
    "training.train_steps": "steps max_steps max_iters num_steps total_steps iterations",
    "training.batch_size": "micro_batch_size per_device_train_batch_size device_batch_size bs",
    "training.gradient_accumulation_steps": "grad_accum accumulation_steps accumulation grad_accumulation",
    "training.sequence_length": "block_size seq_len seq_length max_length max_seq_len context_length context",
    "training.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio",
    "training.schedule": "scheduler lr_scheduler lr_scheduler_type lr_decay_style",
    "training.decay_steps": "decay_iters lr_decay_iters cooldown",
    "training.weight_decay": "wd",
    "training.betas": "beta1 beta2 beta_1 beta_2 adam_beta1 adam_beta2",
    "training.eps": "epsilon adam_eps adam_epsilon",
    "training.max_grad_norm": "grad_clip clip_grad gradient_clipping clip",
    "training.attention": "attn attention_backend attn_implementation",
    "training.precision": "dtype mixed_precision torch_dtype fp16 bf16 amp",
    "training.log_interval": "log_every logging_steps",
    "training.eval_interval": "eval_every eval_steps",
    "training.save_interval": "save_every save_steps checkpoint_interval checkpoint_every",
    "training.sample_interval": "sample_every",
    "training.save_dir": "out_dir output_dir checkpoint_dir run_dir",
    "training.keep_last": "save_total_limit total_limit",
    "model.num_hidden_layers": "n_layer n_layers num_layers layers depth",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_key_value_heads": "n_kv_heads n_kv_head num_kv_heads kv_heads",
    "model.hidden_size": "n_embd d_model dim hidden_dim embed_dim width",
    "model.intermediate_size": "ffn_dim d_ff mlp_dim ffn_hidden_size",
    "model.max_position_embeddings": "max_positions n_positions n_ctx",
    "model.tie_word_embeddings": "tie_weights tied weight_tying tie_embeddings",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "model.rope_theta": "theta rope_base",
    "model.norm": "normalization norm_type",
    "model.initializer_range": "init_std",
    "model.flash_attention": "flash_attn use_flash_attention flash",
    "data.input": "input_file dataset train_file data_path path text",
    "data.validation_fraction": "val_fraction val_split valid_fraction test_size",
    "data.pack": "packing sample_packing",
    "data.document_separator": "separator delimiter",
    "data.document_mask": "doc_mask document_masking intra_document_masking mask_documents block_diagonal",
    "wandb.project": "project_name wandb_project",
    "wandb.name": "run_name wandb_name",
    "wandb.enabled": "use_wandb wandb_log",
}
"""Names that other projects use for these keys."""

NOUNS = {bool: "true or false", int: "a whole number", float: "a number"}


def describe_key(key: str) -> str:
    """Return the one-sentence description of a key."""
    if key in ALIASES:
        target, values = ALIASES[key]
        return f"true and false set {target} to {to_yaml(values[True])} and {to_yaml(values[False])}."
    return FIELDS[key].description or ""


def describe_default(key: str) -> str:
    """Return the default of a key as YAML, or the key that it depends on."""
    if key in ALIASES:
        return f"that of {ALIASES[key][0]}"
    return f"from {DERIVED[key]}" if key in DERIVED else to_yaml(FIELDS[key].default)


def describe_kind(key: str) -> str:
    """Return the kind of value that a key accepts, such as `a number above 0 and at most 10`."""
    if key in ALIASES:
        return NOUNS[bool]
    field = FIELDS[key]
    if takes := field.json_schema_extra["takes"]:  # type: ignore[index]
        return str(takes)
    kind, optional = field.annotation, get_origin(field.annotation) in (Union, UnionType)
    kind = get_args(kind)[0] if optional else kind
    if get_origin(kind) is tuple:
        noun = "a list of texts, as [a, b]"
    elif get_origin(kind) is Literal:
        *some, last = get_args(kind)
        noun = f"{', '.join(some)} or {last}"
    else:
        noun = NOUNS.get(kind, "text")  # type: ignore[arg-type]
    return f"{noun}{describe_bounds(key)}{', or null' if optional else ''}"


def describe_bounds(key: str) -> str:
    """Return the bounds of a key, phrased to follow its noun, such as ` from 1 to 64`."""
    names = ("ge", "gt", "le", "multiple_of", "min_length", "max_length")
    bounds = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:g}"
        for bound in FIELDS[key].metadata
        for name in names
        if (value := getattr(bound, name, None)) is not None
    }
    words = []
    if "ge" in bounds and "le" in bounds:
        words.append(f" from {bounds['ge']} to {bounds['le']}")
    elif "gt" in bounds:
        words.append(f" above {bounds['gt']} and at most {bounds['le']}")
    if "multiple_of" in bounds:
        words.append(f", a multiple of {bounds['multiple_of']}")
    if "min_length" in bounds:
        words.append(", not empty")
    if "max_length" in bounds:
        words.append(f", at most {bounds['max_length']} long")
    return "".join(words)


def find_key(name: str) -> str:
    """Return the key that an unknown name most likely stands for, or an empty string."""
    word = name.rpartition(".")[2].strip().lower().replace("-", "_")
    section = f"{name.partition('.')[0]}."
    own_first = sorted(KEYS, key=lambda known: not known.startswith(section))
    names = {key.rpartition(".")[2]: key for key in reversed(own_first)}
    synonyms = {synonym: key for key, words in SYNONYMS.items() for synonym in words.split()}
    for table in (names, synonyms):
        if word in table:
            return table[word]
    own = [word for word, key in names.items() if key.startswith(section)]
    for words in (own, list(names), list(synonyms)):
        if near := get_close_matches(word, words, 1, 0.7):
            return {**synonyms, **names}[near[0]]
    return ""


def suggest_key(name: str, *, prefix: str = "", otherwise: str = "see docs/config.md, or remove the line") -> str:
    """Return advice on an unknown key; `prefix` is put before the suggested key, such as `--` for a flag."""
    word = name.rpartition(".")[2].lower()
    if word == "dropout":
        return "SmolLM2 has no dropout; remove it"
    if "epochs" in word:
        return f"the length of a run is set in steps; use {prefix}training.train_steps"
    found = find_key(name)
    return f"did you mean {prefix}{found}?" if found else otherwise


def to_yaml(value: object) -> str:
    """Return a value as one line of YAML that every YAML parser reads as the same type."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_yaml(name)}: {to_yaml(each)}' for name, each in value.items())}}}"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    # JSON, but with YAML's escapes for unprintable characters: YAML reads JSON's surrogate pairs as two characters.
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(value, ensure_ascii=False))
