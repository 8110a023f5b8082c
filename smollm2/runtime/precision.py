"""The number format of matrix products, and a table of what each device computes at full speed.

Every choice that depends on a device's features (precision, attention, decoding, Muon's dtype) uses `device_features`.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from smollm2.errors import ConfigError
from smollm2.plan.machine import leaves_bf16


@dataclass(frozen=True)
class Precision:
    """The number format of matrix products, and why it was chosen."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which matrix products are computed."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name, torch.float32)


REFUSALS = {
    (
        "bf16",
        "cpu",
    ): "this CPU has no bf16 units (AVX-512 BF16 or AMX) and emulates it about 100 times slower than float32",
    ("bf16", "cuda"): "bf16 needs a GPU of compute capability 8 or higher",
    ("bf16", "mps"): "bf16 needs macOS 14 or newer",
    ("fp16", "cpu"): "a CPU computes fp16 13 to 25 times slower than float32",
}
"""Why a number format is refused on a type of device that does not compute it at full speed."""


TF32_REFUSAL = "tf32 needs a CUDA GPU of compute capability 8 or higher"


def choose_precision(
    requested: str,
    device_type: str,
    features: frozenset[str],
    where: str = "training.precision",
    advice: str = "use auto or float32",
) -> Precision:
    """Return the number format for a device with `features`.

    It follows from fixed rules, never from timing, so a resumed run makes the same choice. Raise ConfigError, which
    names `where`, if the device does not support the requested format.
    """
    if requested == "auto":
        if device_type == "mps":
            return Precision("float32", "16 bits on Apple GPUs are opt-in")
        if "bf16" in features:
            return Precision("bf16", f"this {device_type} computes it")
        if "fp16" in features:
            return Precision("fp16", "this GPU does not compute bf16")
        return Precision("float32", f"this {device_type} does not compute bf16")
    if requested != "float32" and requested not in features:
        raise ConfigError(
            where, f"{requested} is not supported here: {REFUSALS.get((requested, device_type), TF32_REFUSAL)}", advice
        )
    return Precision(requested, "as requested")


def muon_dtype(features: frozenset[str]) -> torch.dtype:
    """Return the dtype of Muon's matrix products on a device with `features`.

    bf16 gives the same loss, but on a device that emulates it, it is 100 times slower than float32
    (docs/decisions/0006-muon-of-our-own.md).
    """
    return torch.bfloat16 if "bf16" in features else torch.float32


def device_features(device: torch.device) -> frozenset[str]:
    """Return what this device computes at full speed; every choice that depends on a feature uses this set.

    `bf16`, `fp16`, `tf32`: matrix products in that format. `varlen`: torch's flash attention over documents of any
    length. `packed_float32`, `packed_bf16`: products in that format with a matrix that oneDNN has packed in advance.
    """
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device)[0] >= 8
        return frozenset({"fp16", "bf16", "tf32", "varlen"} if modern else {"fp16"})
    if device.type == "mps":
        return frozenset({"fp16", "bf16"} if torch.backends.mps.is_macos_or_newer(14, 0) else {"fp16"})
    found = {name for name, dtype in PACKED_DTYPES.items() if packs_weights(dtype)}
    return frozenset(found | {"bf16"} if device.type == "cpu" and has_bf16_units(os.environ) else found)


PACKED_DTYPES = {"packed_float32": torch.float32, "packed_bf16": torch.bfloat16}


def has_bf16_units(environment: Mapping[str, str]) -> bool:
    """Return whether this CPU computes bf16 products in hardware: AVX-512 BF16 or AMX.

    The result is False if ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA limits torch to instructions without these units.
    """
    if environment.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2") or not leaves_bf16(environment):
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # some builds of torch lack them
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


@functools.cache
def packs_weights(dtype: torch.dtype) -> bool:
    """Return whether oneDNN can pack and multiply a matrix of this dtype.

    This is tried out on a small matrix, because only oneDNN knows which cases it supports.
    """
    matrix = torch.zeros(16, 16, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 1)
        torch.ops.mkldnn._linear_pointwise(matrix[:1], packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True
