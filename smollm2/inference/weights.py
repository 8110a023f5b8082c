"""Check weights against a model and load them into it, one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smollm2.config.model_folder import NOT_QUANTIZED
from smollm2.config.schema import ModelConfig
from smollm2.errors import CheckpointError
from smollm2.inference.weight_files import DTYPES, WeightFiles
from smollm2.model.transformer import EMBEDDING, HEAD, SmolLM2

ROTARY_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Buffers that old Llama folders contain. They are computed from rope_theta, so stored ones are ignored."""

SHOWN_PROBLEMS = 3


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], path: Path) -> SmolLM2:
    """Return a float32 model with this config and these weights.

    Raise CheckpointError naming the weights that do not fit, have an unsupported dtype or are not finite. With tied
    embeddings, the output head may be absent, or present if it equals the embedding.
    """
    names = [name for name in weights if not name.endswith(ROTARY_BUFFERS)]
    check_dtypes({name: dtype_of(weights, name) for name in names}, path)
    shapes = {name: shape_of(weights, name) for name in names}
    if config.tie_word_embeddings and EMBEDDING in shapes:
        check_tied(weights, path)
        shapes[HEAD] = shapes[EMBEDDING]
    with torch.device("meta"), SkipInitialization():
        expected = SmolLM2(config).state_dict()
    check_shapes({name: tuple(tensor.shape) for name, tensor in expected.items()}, shapes, path)
    with torch.device("cpu"), SkipInitialization():  # `to_empty` would import sympy, which takes over a second
        model = SmolLM2(config)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(weights[name])
        if not all(map(torch.isfinite, parameter.detach().aminmax())):  # NaN propagates to both
            raise CheckpointError(path, f"{name} contains NaN or infinite values", "use an undamaged copy")
    return model


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor, without reading it if it is in a file."""
    return weights.shapes[name] if isinstance(weights, WeightFiles) else tuple(weights[name].shape)


def dtype_of(weights: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the dtype of a tensor, without reading it if it is in a file."""
    return weights.dtypes[name] if isinstance(weights, WeightFiles) else weights[name].dtype


class SkipInitialization(TorchFunctionMode):
    """Skips weight initialization, which on the meta device would import torch's compiler (as slow as torch itself)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor unchanged if `func` initializes it, else call `func`."""
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **kwargs)


def check_dtypes(dtypes: Mapping[str, torch.dtype], path: Path) -> None:
    """Raise CheckpointError for integer and 8-bit float weights: they are quantized and useless without scales."""
    for name, dtype in dtypes.items():
        if dtype not in DTYPES.values():
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(path, f"{name} has dtype {kind}: quantized weights are not supported", NOT_QUANTIZED)


def check_tied(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError if a stored output head differs from the embedding to which the config ties it."""
    head, embedding = weights.get(HEAD), weights[EMBEDDING]
    if head is None or torch.equal(head, embedding):
        return
    difference = "the shapes differ"
    if head.shape == embedding.shape:
        difference = f"the largest difference is {(head.double() - embedding.double()).abs().max().item():.2g}"
    raise CheckpointError(
        path,
        f"the config ties {HEAD} to {EMBEDDING}, but both are stored and {difference}",
        "set tie_word_embeddings to false in the config to use the stored head",
    )


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise CheckpointError if names or shapes differ, before anything is copied."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f", and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = ", ".join(problems[:SHOWN_PROBLEMS])
        raise CheckpointError(
            path, f"the weights do not fit the model: {listed}{more}", "use the config that belongs to these weights"
        )
