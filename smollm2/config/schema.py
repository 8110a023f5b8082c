"""The keys of a config: their types, bounds, sentences, and what may change on a resume.

`model` is meaning (what function the weights compute), `training` is manner (how they are found), `data` is the text,
`wandb` who hears of it. A key stands here once; the command line, docs/config.md, the JSON schema and the resume table
are all read off these classes. Values are checked one by one here; contradictions between keys in `contradictions`.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Resume = Literal["free", "noted", "refused"]
"""On a resume a changed key is `free` (the numbers do not depend on it), `noted` (allowed, one line says old and new,
no longer bit-exact) or `refused` (the run would be another run)."""

IGNORE_INDEX = -100
"""The label of a position that has no target, in data, loss and evaluation alike (PyTorch's `ignore_index`)."""

A_PATH = {"min_length": 1, "pattern": r"^[^\x00]*$"}
"""Bounds of a text that names a file: no operating system takes a NUL character."""


def key(default: Any, sentence: str, *, resume: Resume, **bounds: Any) -> Any:
    """One key: default (or a function of the keys above it), bounds, its sentence, and its rule on a resume."""
    how = {"default_factory": default} if callable(default) else {"default": default}
    return Field(description=sentence, json_schema_extra={"resume": resume}, **how, **bounds)


class Section(BaseModel):
    """A frozen section that knows its keys; numbers must be finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def resume_rule(cls, name: str) -> Resume:
        """What may happen to the key `name` on a resume."""
        rule: Resume = cls.model_fields[name].json_schema_extra["resume"]  # type: ignore[index,assignment]
        return rule


class ModelConfig(Section):
    """What function the weights compute."""

    vocab_size: int = key(
        32000,
        "Number of token ids; follows the tokenizer, and the change is said.",
        resume="refused",
        ge=2,
        le=2**31 - 1,
    )
    hidden_size: int = key(768, "Width of the residual stream.", resume="refused", ge=1, le=65536)
    intermediate_size: int = key(
        3072, "Width inside the SwiGLU feed-forward block.", resume="refused", ge=1, le=1048576
    )
    num_hidden_layers: int = key(12, "Number of transformer blocks.", resume="refused", ge=1, le=1024)
    num_attention_heads: int = key(12, "Number of query heads.", resume="refused", ge=1, le=1024)
    num_key_value_heads: int = key(
        lambda data: data["num_attention_heads"],
        "Number of key and value heads; default: as many as query heads.",
        resume="refused",
        ge=1,
        le=1024,
    )
    head_dim: int = key(
        lambda data: max(1, data["hidden_size"] // data["num_attention_heads"]),
        "Width of one head; default: hidden_size / num_attention_heads.",
        resume="refused",
        ge=2,
        le=1024,
        multiple_of=2,
    )
    max_position_embeddings: int = key(2048, "Longest context, in tokens.", resume="refused", ge=2, le=2**24)
    rope_theta: float = key(10000.0, "Base of the rotary position embedding.", resume="refused", gt=1, le=1e12)
    norm: Literal["rmsnorm", "layernorm"] = key(
        "layernorm", "Normalization: rmsnorm, or layernorm with weight and bias, computed in float32.", resume="refused"
    )
    norm_eps: float = key(1e-5, "Added to the variance inside the normalization.", resume="refused", gt=0, le=0.1)
    initializer_range: float = key(
        0.02,
        "Standard deviation of the initial weights; output projections divide it by sqrt(2 x layers).",
        resume="refused",
        gt=0,
        le=10,
    )
    tie_word_embeddings: bool = key(True, "Use the token embedding as the output head.", resume="refused")


class DataConfig(Section):
    """The text and how it becomes windows of tokens."""

    input: str = key(
        "input.txt",
        "Text file, UTF-8; `-` is standard input. The sample corpus is made where the default is absent.",
        resume="noted",
        **A_PATH,
    )
    tokenizer: str = key(
        "auto",
        "`auto` (a byte-level BPE trained on the text), `bytes`, a folder with tokenizer.json, or a hub name.",
        resume="refused",
        **A_PATH,
    )
    cache_dir: str = key("cache", "Folder of the token cache; default: cache beside save_dir.", resume="free", **A_PATH)
    validation_fraction: float = key(
        0.05,
        "Share of the text kept for validation: whole documents, or the tail of one long text.",
        resume="refused",
        ge=0,
        le=0.5,
    )
    stride: int = key(
        2048,
        "Tokens from one window to the next; default: sequence_length. Below it, shared tokens are context, not targets.",
        resume="refused",
        ge=1,
        le=2**24,
    )
    document_separator: str | None = key(
        None,
        "Text between two documents of one file, such as a form feed; default: the file is one document.",
        resume="refused",
        min_length=1,
    )
    document_mask: bool = key(
        False,
        "Documents in one window see nothing of one another, and the first token of each is no target.",
        resume="refused",
    )


class TrainingConfig(Section):
    """How the weights are found."""

    train_steps: int = key(5000, "Optimizer updates in the whole run.", resume="noted", ge=1, le=10**9)
    batch_size: int = key(
        12,
        "Sequences in one forward pass; on several devices the largest divisor of a device's share up to this.",
        resume="noted",
        ge=1,
        le=10**6,
    )
    gradient_accumulation_steps: int = key(
        4, "batch_size x this = sequences in one update, on any number of devices.", resume="noted", ge=1, le=10**6
    )
    sequence_length: int = key(
        2048, "Tokens in one window; default: max_position_embeddings.", resume="refused", ge=1, le=2**24
    )

    optimizer: Literal["adamw", "muon"] = key(
        "adamw", "adamw, or muon on the matrices of the blocks with AdamW on the rest.", resume="refused"
    )
    learning_rate: float = key(1e-4, "Highest learning rate.", resume="noted", gt=0, le=10)
    min_learning_rate: float = key(0.0, "Learning rate towards which the schedule falls.", resume="noted", ge=0, le=10)
    warmup_steps: int = key(
        100, "Updates over which the rate rises linearly to learning_rate.", resume="noted", ge=0, le=10**9
    )
    schedule: Literal["cosine", "linear", "wsd"] = key(
        "cosine",
        "After the warmup: cosine, linear, or wsd (stable, then linear over the last decay_steps).",
        resume="noted",
    )
    decay_steps: int = key(
        lambda data: data["train_steps"] // 5,
        "Updates in the final decay of wsd; default: a fifth of train_steps.",
        resume="noted",
        ge=0,
        le=10**9,
    )
    weight_decay: float = key(0.01, "Decoupled weight decay.", resume="noted", ge=0, le=10)
    decay: Literal["matrices", "all"] = key(
        "matrices", "What decays: matrices only, or all parameters as in SmolLM2's own pretraining.", resume="refused"
    )
    betas: tuple[float, float] = key(
        (0.9, 0.95), "AdamW's two averaging factors; the first is Muon's momentum too.", resume="noted"
    )
    eps: float = key(1e-8, "AdamW's epsilon.", resume="noted", gt=0, le=1)
    max_grad_norm: float = key(
        1.0, "Gradients are scaled down to this global norm; 0: never.", resume="noted", ge=0, le=1e9
    )
    z_loss: float = key(0.0, "Weight of the squared log-normalizer of the logits; 0: off.", resume="noted", ge=0, le=1)
    on_nonfinite: Literal["skip", "stop"] = key(
        "skip",
        "A step whose loss or gradient is not finite: skip it (10 in a row or 1 % of the last 1000 stop the run), or stop at once.",
        resume="free",
    )

    precision: Literal["auto", "float32", "tf32", "bf16", "fp16"] = key(
        "auto", "Number format of the products; auto: bf16 where the hardware computes it.", resume="noted"
    )
    attention: Literal["auto", "sdpa", "blocks", "varlen", "flex", "eager"] = key(
        "auto",
        "Attention backend; auto picks, checks and names one. varlen and flex need a GPU.",
        resume="noted",
    )
    gradient_checkpointing: bool = key(
        False, "Recompute each block in the backward pass: less memory, about 30 % more arithmetic.", resume="noted"
    )
    compile: bool = key(
        False,
        "Compile each block with torch.compile; on a CPU it wins about a tenth, after up to a minute at the first update.",
        resume="noted",
    )
    deterministic: bool = key(
        False,
        "Use only deterministic GPU kernels: a run repeated on the same GPU is bit-identical, but slower.",
        resume="noted",
    )
    seed: int = key(1337, "Seed of weights, data order and samples.", resume="refused", ge=0, lt=2**63)

    log_interval: int = key(10, "Updates between two reports.", resume="free", ge=1, le=10**9)
    eval_interval: int = key(100, "Updates between two validations; 0: at the end only.", resume="free", ge=0, le=10**9)
    eval_windows: int = key(
        256,
        "Windows, spread over the validation split, that one validation reads; the end reads all.",
        resume="free",
        ge=1,
        le=10**9,
    )
    save_interval: int = key(500, "Updates between two checkpoints; 0: at the end only.", resume="free", ge=0, le=10**9)
    sample_interval: int = key(
        200, "Updates between two rounds of samples; 0: at the end only.", resume="free", ge=0, le=10**9
    )
    sample_prompts: tuple[str, ...] = key(
        ("Once upon a time", "The"),
        "Prompts of the samples; one sample without a prompt follows them.",
        resume="free",
        max_length=64,
    )
    sample_tokens: int = key(64, "Tokens in one sample; 0: no samples.", resume="free", ge=0, le=10**6)

    diagnostics_interval: int = key(
        50,
        "Updates between two looks inside the model: norms, update ratios, activations (diagnostics.jsonl); 0: never, and no landscape.",
        resume="free",
        ge=0,
        le=10**9,
    )

    rank_timeout: int = key(
        600,
        "Seconds that the processes of a run wait for one of them that does not answer; then the run ends and names it.",
        resume="free",
        ge=5,
        le=10**6,
    )
    save_dir: str = key("checkpoints", "The run folder.", resume="free", **A_PATH)
    keep_last: int | None = key(
        None, "Keep only this many newest checkpoints, with the best; default: keep all.", resume="free", ge=2, le=10**9
    )
    keep_every: int | None = key(
        None,
        "With keep_last: also keep every checkpoint whose step is a multiple of this.",
        resume="free",
        ge=1,
        le=10**9,
    )
    time_limit: float | None = key(
        None,
        "Seconds after which the run ends by itself, in time for its own save; default: never.",
        resume="free",
        gt=0,
        le=1e9,
    )
    tensorboard: bool = key(
        False,
        "Mirror metrics, samples and histograms to <save_dir>/tensorboard; needs the extra tensorboard.",
        resume="free",
    )


class WandbConfig(Section):
    """Weights & Biases."""

    enabled: bool = key(
        False, "Mirror the run to Weights & Biases; offline where no key or no network is found.", resume="free"
    )
    mode: Literal["auto", "online", "offline"] = key(
        "auto", "auto: online where a key is present and the host answers, else offline.", resume="free"
    )
    project: str = key("smollm2", "Project name.", resume="free", min_length=1, max_length=128)
    entity: str | None = key(None, "Team or user; default: the account's own.", resume="free", min_length=1)
    name: str | None = key(
        None, "Name of the run; default: the name of the run folder.", resume="free", min_length=1, max_length=128
    )
    tags: tuple[str, ...] = key((), "Tags of the run.", resume="free", max_length=64)
    log_checkpoints: Literal["none", "best", "all"] = key(
        "all", "Checkpoints that are uploaded: none, those of a new lowest validation loss, or all.", resume="free"
    )
    log_gradients: bool = key(
        True, "Send norms, histograms and the flow of gradients and weights, by layer.", resume="free"
    )
    log_code: bool = key(True, "Send the Python files of this package, and train.py.", resume="free")
    landscape_interval: int = key(
        0,
        "Updates between two loss landscapes, each at most 1.5 % of the run; 0: one, at the end.",
        resume="free",
        ge=0,
        le=10**9,
    )


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "wandb": WandbConfig,
}

ALIASES: dict[str, tuple[str, dict[bool, str | bool]]] = {
    "model.flash_attention": ("training.attention", {True: "auto", False: "eager"}),
    "model.gradient_checkpointing": ("training.gradient_checkpointing", {True: True, False: False}),
}
"""Keys that people look for under `model`: where their value goes, and as what."""


class Config(BaseModel):
    """A whole run. Build it with `load_config`, or from nested dictionaries with `Config.model_validate`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="before")
    @classmethod
    def follow_other_sections(cls, data: Any) -> Any:
        """Defaults that another section decides: sequence_length, stride and cache_dir."""
        if not isinstance(data, dict):
            return data
        given = {
            name: value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            for name, value in data.items()
        }
        model, training, text = (given.get(name, {}) for name in ("model", "training", "data"))
        if not (isinstance(model, dict) and isinstance(training, dict) and isinstance(text, dict)):
            return data
        training, text = dict(training), dict(text)
        training.setdefault(
            "sequence_length",
            model.get("max_position_embeddings", ModelConfig.model_fields["max_position_embeddings"].default),
        )
        text.setdefault("stride", training["sequence_length"])
        text.setdefault("cache_dir", str(Path(str(training.get("save_dir", "checkpoints"))).parent / "cache"))
        return {**given, "training": training, "data": text}

    def with_vocab_size(self, vocab_size: int) -> Self:
        """The same config for a tokenizer of `vocab_size` ids."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})

    @property
    def global_batch_size(self) -> int:
        """Sequences in one update, on any number of devices."""
        return self.training.batch_size * self.training.gradient_accumulation_steps


def contradictions(config: Config) -> list[tuple[str, str]]:
    """What each key allows alone but not together: (key, sentence), empty where all is well."""
    m, t, d = config.model, config.training, config.data
    found: list[tuple[str, str]] = []

    def check(holds: bool, name: str, sentence: str) -> None:
        if not holds:
            found.append((name, sentence))

    if "head_dim" not in m.model_fields_set:
        check(
            m.hidden_size % m.num_attention_heads == 0,
            "model.num_attention_heads",
            f"{m.num_attention_heads} heads do not divide model.hidden_size {m.hidden_size}; change one of them, or set model.head_dim",
        )
    check(
        m.num_attention_heads % m.num_key_value_heads == 0,
        "model.num_key_value_heads",
        f"{m.num_key_value_heads} key-value heads do not divide {m.num_attention_heads} query heads; use a divisor of model.num_attention_heads",
    )
    check(
        t.sequence_length <= m.max_position_embeddings,
        "training.sequence_length",
        f"{t.sequence_length} is longer than model.max_position_embeddings {m.max_position_embeddings}; lower it, or raise the positions",
    )
    check(
        d.stride <= t.sequence_length,
        "data.stride",
        f"{d.stride} is longer than training.sequence_length {t.sequence_length}: the tokens between two windows would never be read; lower it",
    )
    check(
        t.min_learning_rate <= t.learning_rate,
        "training.min_learning_rate",
        f"{t.min_learning_rate:g} is above training.learning_rate {t.learning_rate:g}; lower it",
    )
    check(
        not d.document_mask or d.document_separator is not None,
        "data.document_mask",
        "true acts only where data.document_separator is set; without that the file is one document",
    )
    for position, beta in enumerate(t.betas):
        check(0 <= beta < 1, "training.betas", f"beta {position + 1} is {beta:g}; it must be at least 0 and below 1")
    check(
        t.keep_every is None or t.keep_last is not None,
        "training.keep_every",
        "it acts only where training.keep_last is set; without that every checkpoint is kept",
    )
    return found
