"""What the tests in tests/gpu share: a small model, its batch and its runtime on the device under test."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smollm2.config.schema import Config
from smollm2.model.transformer import SmolLM2
from smollm2.runtime.device import Runtime, start_runtime
from smollm2.runtime.precision import Precision, device_features
from smollm2.training.setup import build_model
from smollm2.training.step import MicroBatch

MODEL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "norm": "rmsnorm",
    "initializer_range": 0.1,
}
"""Head width 16, which every attention kernel takes; the grouped heads of the presets."""


def make_config(*, document_mask: bool = False, **training: Any) -> Config:
    """Return a config of the small model; float32 unless `precision` is given."""
    given = {"precision": "float32", "learning_rate": 1e-2, "sequence_length": 64, **training}
    data = {"document_mask": True, "document_separator": "\f"} if document_mask else {}
    return Config.model_validate({"model": MODEL, "training": given, "data": data})


def start(config: Config) -> Runtime:
    """Return the runtime of the device under test. A CPU, in a rehearsal, emulates 16 bits, which a run would refuse."""
    precision = config.training.precision
    if precision in ("bf16", "fp16") and not torch.cuda.is_available():
        runtime = start_runtime(make_config().training)
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
        return replace(runtime, precision=Precision(precision, "a rehearsal"), scaler=scaler)
    return start_runtime(config.training)


def has_feature(device: torch.device, name: str) -> bool:
    """Whether the hardware computes a number format."""
    return name in device_features(device)


def make_batch(device: torch.device, *, documents: bool = False, rows: int = 4, length: int = 64) -> MicroBatch:
    """Return input ids and labels of a sequence that can be learned, and document ids if asked for."""
    first = torch.arange(rows).unsqueeze(1) * 7
    ids = (first + torch.arange(length + 1) * 3) % 61
    parts: list[Tensor] = [ids[:, :-1], ids[:, 1:]]
    if documents:
        parts.append((torch.arange(length) >= torch.arange(4, 4 + rows)[:, None]).long())
    return tuple(part.contiguous().to(device) for part in parts)


def loss_and_gradient(config: Config, batch: MicroBatch) -> tuple[float, Tensor]:
    """Return the mean loss of one batch and the gradient of all weights in one vector, float32 on the CPU."""
    runtime = start(config)
    model = build_model(config, runtime)
    with runtime.autocast():
        loss, count = model(*batch)
    mean = loss / count
    torch.autograd.backward(mean)
    return mean.item(), gradient_of(model)


def gradient_of(model: SmolLM2) -> Tensor:
    """Return the gradient of all weights in one vector, float32 on the CPU."""
    return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])
