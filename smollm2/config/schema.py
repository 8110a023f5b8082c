"""The config keys: type, default, bounds, description, resume rule; those of `data` are in data_section.py.

docs/config.md is generated from the two files.
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from smollm2.config.data_section import DataConfig
from smollm2.config.mixture import (
    UNITS,
    first_step,
    list_stages,
)
from smollm2.config.section import Contradiction, Section, key, refuse
from smollm2.config.values import (
    Beta,
    Duration,
    FilePath,
    FolderPath,
    Switch,
    Text,
    expand_path,
    find_scaling_problem,
    name_folder,
)

IGNORE_INDEX = -100
"""The label of positions without a target, in data, loss and evaluation (PyTorch's `ignore_index`)."""


class ModelConfig(Section):
    """What the model computes."""

    vocab_size: int = key(32000, "refused", ge=2, le=2**31 - 1)
    """Number of token ids; set to the tokenizer's vocabulary size, and a change is reported."""
    hidden_size: int = key(768, "refused", ge=1, le=65536)
    """Width of the residual stream."""
    intermediate_size: int = key(3072, "refused", ge=1, le=2**20)
    """Width inside the SwiGLU feed-forward block."""
    num_hidden_layers: int = key(12, "refused", ge=1, le=1024)
    """Number of transformer blocks."""
    num_attention_heads: int = key(12, "refused", ge=1, le=1024)
    """Number of query heads."""
    num_key_value_heads: int = key(lambda data: data["num_attention_heads"], "refused", ge=1, le=1024)
    """Number of key and value heads; default: num_attention_heads."""
    head_dim: int = key(
        lambda data: data["hidden_size"] // data["num_attention_heads"], "refused", ge=2, le=1024, multiple_of=2
    )
    """Width of one head; default: hidden_size / num_attention_heads."""
    max_position_embeddings: int = key(2048, "refused", ge=2, le=2**24)
    """Longest context, in tokens."""
    rope_theta: float = key(10000.0, "refused", gt=1, le=1e12)
    """Base of the rotary position embedding."""
    rope_scaling: dict[Text, float] = key({}, "refused", "Llama 3's four numbers by name, or an empty mapping")
    """Llama 3's scaling of the rotary embedding: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings."""
    norm: Literal["rmsnorm", "layernorm"] = key("layernorm", "refused")
    """Normalization: rmsnorm, or layernorm with weight and bias, computed in float32."""
    norm_eps: float = key(1e-5, "refused", gt=0, le=0.1)
    """Epsilon of the normalization."""
    initializer_range: float = key(0.02, "refused", gt=0, le=10)
    """Standard deviation of the initial weights; for output projections, divided by sqrt(2 x layers)."""
    tie_word_embeddings: bool = key(True, "refused")
    """Use the token embedding as the output head."""
    init_from: FilePath | None = key(None, "refused", "a folder, a hub name or null")
    """A model to start from: a Hugging Face folder or hub name, or a run folder. Its shape and tokenizer are used, so leave these out."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield a contradiction if the numbers of heads do not fit hidden_size or each other."""
        heads, width = "model.num_attention_heads", "model.hidden_size"
        if "head_dim" not in self.model_fields_set:
            if not self.is_divided_by_heads:
                what = f"must be a divisor of {width} = {self.hidden_size} (got {self.num_attention_heads})"
                yield Contradiction((heads, width), what, f"change {heads} or {width}")
            elif self.head_dim % 2 or not 2 <= self.head_dim <= 1024:
                what = f"{width} = {self.hidden_size} gives {self.num_attention_heads} heads a width of {self.head_dim}"
                yield Contradiction((heads, width), what, "choose values that give an even width from 2 to 1,024")
        if self.num_attention_heads % self.num_key_value_heads:
            what = f"must be a divisor of {heads} = {self.num_attention_heads} (got {self.num_key_value_heads})"
            yield Contradiction(("model.num_key_value_heads", heads), what, f"use a divisor of {heads}")
        if problem := find_scaling_problem(self.rope_scaling):
            yield Contradiction(("model.rope_scaling",), problem, "correct it, or leave it out")

    @property
    def is_divided_by_heads(self) -> bool:
        """Whether hidden_size is a multiple of the number of heads; transformers 5 cannot load other models."""
        return self.hidden_size % self.num_attention_heads == 0


class TrainingConfig(Section):
    """How the model is trained."""

    train_steps: int = key(5000, "noted", ge=1, le=10**9)
    """Optimizer steps in the whole run."""
    batch_size: int = key(12, "noted", ge=1, le=10**6)
    """Sequences in one forward pass; each device splits its share into the fewest equal parts of at most this size."""
    gradient_accumulation_steps: int = key(4, "noted", ge=1, le=10**6)
    """batch_size x this = sequences in one step, on any number of devices."""
    sequence_length: int = key(2048, "refused", ge=1, le=2**24)
    """Tokens in one window; default: max_position_embeddings."""

    optimizer: Literal["adamw", "muon"] = key("adamw", "refused")
    """adamw, or muon on the matrices of the blocks with AdamW on the rest."""
    learning_rate: float = key(1e-4, "noted", gt=0, le=10)
    """Peak learning rate."""
    min_learning_rate: float = key(0.0, "noted", ge=0, le=10)
    """Learning rate to which the schedule decays."""
    warmup_steps: int = key(100, "noted", ge=0, le=10**9)
    """Steps over which the learning rate rises linearly to learning_rate."""
    schedule: Literal["cosine", "linear", "wsd"] = key("cosine", "noted")
    """After the warmup: cosine, linear, or wsd (stable, then linear over the last decay_steps)."""
    decay_steps: int = key(lambda data: data["train_steps"] // 5, "noted", ge=0, le=10**9)
    """Steps in the final decay of wsd; default: a fifth of train_steps."""
    weight_decay: float = key(0.01, "noted", ge=0, le=10)
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = key("matrices", "refused")
    """Parameters that decay: matrices only, or all as in SmolLM2's own pretraining."""
    betas: tuple[Beta, Beta] = key((0.9, 0.95), "noted", "two numbers from 0 to below 1, as [0.9, 0.95]")
    """AdamW's beta coefficients; the first is also Muon's momentum."""
    eps: float = key(1e-8, "noted", gt=0, le=1)
    """AdamW's epsilon."""
    max_grad_norm: float = key(1.0, "noted", ge=0, le=1e9)
    """Gradients are clipped to this global norm; 0: no clipping."""
    z_loss: float = key(0.0, "noted", ge=0, le=1)
    """Weight of the squared log-normalizer of the logits; 0: off."""
    on_nonfinite: Literal["skip", "stop", "rewind"] = key("skip", "free")
    """If the loss or the gradient of a step is not finite: skip the step (10 in a row or 1 % of the last 1000 stop the run), stop, or rewind."""
    on_spike: Literal["keep", "skip", "stop", "rewind"] = key("keep", "noted")
    """If the loss or gradient norm exceeds the last 128 by 6 deviations: keep or skip the update, stop, or rewind and leave out the batches."""

    precision: Literal["auto", "float32", "tf32", "bf16", "fp16"] = key("auto", "noted")
    """Number format of the matrix products; auto: bf16 if the hardware supports it."""
    attention: Literal["auto", "sdpa", "blocks", "varlen", "flex", "eager"] = key("auto", "noted")
    """Attention backend; auto chooses one and checks it. varlen and flex need a GPU."""
    gradient_checkpointing: bool = key(False, "noted")
    """Recompute each block in the backward pass: less memory, about 30 % more arithmetic."""
    compile: Switch = key("auto", "noted", "auto, true or false")
    """Compile each block with torch.compile, up to a minute at the first step; auto: if the run is long enough to gain from it."""
    deterministic: bool = key(False, "noted")
    """Use only deterministic GPU kernels: a run repeated on the same GPU is bit-identical, but slower."""
    seed: int = key(1337, "refused", ge=0, le=2**63 - 1)
    """Seed of weights, data order and samples."""

    log_interval: int = key(10, "free", ge=1, le=10**9)
    """Steps between two reports."""
    eval_interval: int = key(100, "free", ge=0, le=10**9)
    """Steps between two validations; 0: at the end only."""
    eval_windows: int = key(256, "free", ge=1, le=10**9)
    """Number of windows in one validation, spread over the validation split; the final one reads all."""
    save_interval: int = key(500, "free", ge=0, le=10**9)
    """Steps between two checkpoints; 0: at the end only."""
    sample_interval: int = key(200, "free", ge=0, le=10**9)
    """Steps between two rounds of samples; 0: at the end only."""
    sample_prompts: tuple[Text, ...] = key(("Once upon a time", "The"), "free", max_length=64)
    """Prompts of the samples; one sample without a prompt follows them."""
    sample_tokens: int = key(64, "free", ge=0, le=10**6)
    """Tokens in one sample; 0: no samples."""
    diagnostics_interval: int = key(50, "free", ge=0, le=10**9)
    """Steps between two diagnostics: norms, update ratios, activations (diagnostics.jsonl); 0: never, and no landscape."""

    preflight: bool = key(True, "free")
    """Check model, loss, step, data and machine before the first step, and do not train if a check fails."""
    sharding: Literal["none", "auto", "full", "hybrid"] = key("auto", "free")
    """Several devices: each holds the whole model (none), a share of it (full), or a share within each machine (hybrid); auto: none if it fits."""
    checkpoints: Literal["auto", "file", "folder"] = key("auto", "free")
    """A checkpoint is one file, or a folder with a part from each device; auto: a folder if shared out and over 30 s in one file."""
    rank_timeout: int = key(600, "free", ge=5, le=10**6)
    """Seconds to wait for a process that does not respond, before the run ends and names it."""
    save_dir: FolderPath = key("checkpoints", "free", "a path")
    """The run folder."""
    keep_last: int | None = key(None, "free", ge=2, le=10**9)
    """Keep only this many newest checkpoints, and the best; default: keep all."""
    keep_every: int | None = key(None, "free", ge=1, le=10**9)
    """With keep_last: also keep every checkpoint whose step is a multiple of this."""
    time_limit: Duration | None = key(
        None, "free", "seconds above 0, or a duration such as 90m, 2h or 1-12:00:00, or null", gt=0, le=1e9
    )
    """Time after which the run saves and ends with exit code 75; default: never."""
    tensorboard: bool = key(False, "free")
    """Mirror metrics, samples and histograms to <save_dir>/tensorboard; needs the extra tensorboard."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield a contradiction if min_learning_rate is above learning_rate, or keep_every is set without keep_last."""
        low, high = "training.min_learning_rate", "training.learning_rate"
        if self.min_learning_rate > self.learning_rate:
            what = f"is above {high} = {self.learning_rate:g} (got {self.min_learning_rate:g})"
            yield Contradiction((low, high), what, "lower it")
        if self.keep_every is not None and self.keep_last is None:
            keys = ("training.keep_every", "training.keep_last")
            yield Contradiction(keys, "has no effect without training.keep_last", "set both, or neither")


class WandbConfig(Section):
    """Weights & Biases."""

    enabled: bool = key(False, "free")
    """Mirror the run to Weights & Biases; offline if there is no key or no network."""
    mode: Literal["auto", "online", "offline"] = key("auto", "free")
    """auto: online if there is a key and the host answers, else offline."""
    project: Text = key("smollm2", "free", min_length=1, max_length=128)
    """Project name."""
    entity: Text | None = key(None, "free", min_length=1)
    """Team or user; default: the account's own."""
    name: Text | None = key(None, "free", min_length=1, max_length=128)
    """Name of the run; default: the name of the run folder."""
    tags: tuple[Text, ...] = key((), "free", max_length=64)
    """Tags of the run."""
    log_checkpoints: Literal["none", "best", "all"] = key("all", "free")
    """Checkpoints to upload: none, those with a new lowest validation loss, or all."""
    log_gradients: bool = key(True, "free")
    """Send norms, histograms and the flow of gradients and weights, by layer."""
    log_code: bool = key(True, "free")
    """Send the Python files of this package, and train.py."""
    landscape_interval: int = key(0, "free", ge=0, le=10**9)
    """Steps between two loss landscapes, each at most 1.5 % of the run; 0: one, at the end."""


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "wandb": WandbConfig,
}
FIELDS = {f"{name}.{key}": field for name, section in SECTIONS.items() for key, field in section.model_fields.items()}


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
        """Set the defaults that depend on another section: sequence_length, stride and cache_dir."""
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
        positions = ModelConfig.model_fields["max_position_embeddings"].default
        training.setdefault("sequence_length", model.get("max_position_embeddings", positions))
        text.setdefault("stride", training["sequence_length"])
        with contextlib.suppress(ValueError):  # an invalid save_dir is reported on its own
            folder = Path(name_folder(expand_path(str(training.get("save_dir", "checkpoints")))))
            text.setdefault("cache_dir", str(folder.parent / "cache"))
        return {**given, "training": training, "data": text}

    @model_validator(mode="after")
    def refuse_contradictions(self) -> Self:
        """Raise ValidationError if two sections contradict each other."""
        refuse("Config", list(self.contradictions()), parts=2)
        return self

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield a second tokenizer, and what contradicts max_position_embeddings in sequence_length, and sequence_length or pack in stride."""
        if self.model.init_from and self.data.tokenizer not in ("auto", self.model.init_from):
            keys = ("data.tokenizer", "model.init_from")
            what = f"is {self.data.tokenizer}, but the model of {keys[1]} has its own tokenizer"
            yield Contradiction(keys, what, "leave it out")
        length, positions = self.training.sequence_length, self.model.max_position_embeddings
        if length > positions:
            keys = ("training.sequence_length", "model.max_position_embeddings")
            yield Contradiction(
                keys, f"is greater than {keys[1]} = {positions} (got {length})", f"lower it, or raise {keys[1]}"
            )
        if self.data.stride > length:
            keys = ("data.stride", "training.sequence_length")
            what = (
                f"is greater than {keys[1]} = {length} (got {self.data.stride}): tokens between windows would be lost"
            )
            yield Contradiction(keys, what, "lower it")
        elif self.data.pack == "best_fit" and self.data.stride != length:
            keys = ("data.stride", "data.pack")
            what = f"has no effect with {keys[1]} = best_fit (got {self.data.stride})"
            yield Contradiction(keys, what, f"leave it out, or set {keys[1]} to windows")
        starts = self.stage_steps
        if any(second <= first for first, second in pairwise(starts)):
            what = f"must ascend (got the steps {', '.join(map(str, starts[1:]))})"
            yield Contradiction(("data.stages",), what, "give each stage a later start")

    @property
    def stage_steps(self) -> list[int]:
        """The step, counted from 0, at which each stage of the mixture begins; the first begins at 0."""
        tokens = self.global_batch_size * self.training.sequence_length
        return [0, *(first_step(start, tokens) for start in self.data.stages)]

    @property
    def shares(self) -> list[float]:
        """The share of the windows of the whole run that is drawn from each input."""
        starts = [min(step, self.training.train_steps) for step in self.stage_steps]
        lengths = [after - before for before, after in pairwise([*starts, self.training.train_steps])]
        stages = list_stages(self.data.mixture, len(starts)) if self.data.mixture else [[UNITS]]
        shares = (sum(n * units[i] for n, units in zip(lengths, stages, strict=True)) for i in range(len(stages[0])))
        return [share / (UNITS * self.training.train_steps) for share in shares]

    def with_vocab_size(self, vocab_size: int) -> Self:
        """Return a copy of this config for a tokenizer with `vocab_size` ids."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})

    def with_data(self, **values: object) -> Self:
        """Return the same config with other, valid values of keys in the section `data`."""
        return self.model_copy(update={"data": self.data.model_copy(update=values)})

    def with_training(self, **values: object) -> Self:
        """Return the same config with other, valid values of keys in the section `training`."""
        return self.model_copy(update={"training": self.training.model_copy(update=values)})

    @property
    def global_batch_size(self) -> int:
        """Sequences in one step, on any number of devices."""
        return self.training.batch_size * self.training.gradient_accumulation_steps

    def warnings(self) -> list[str]:
        """Return a one-line warning for each setting that a later stage, such as loading the export, will reject."""
        model, found = self.model, []
        width, heads = model.hidden_size, model.num_attention_heads
        if not model.is_divided_by_heads:
            found.append(
                f"warning: model.hidden_size {width} is not a multiple of model.num_attention_heads {heads}: "
                "transformers 5 will not load the exported model"
            )
        if model.norm == "layernorm" and heads * model.head_dim != width:
            found.append(
                f"warning: with model.norm layernorm, heads whose total width is {heads * model.head_dim} instead of "
                f"model.hidden_size {width} cannot be exported"
            )
        if model.norm == "layernorm" and model.rope_scaling:
            found.append("warning: with model.norm layernorm, model.rope_scaling cannot be exported to gguf")
        return found
