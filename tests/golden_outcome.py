"""What the golden tests compare: the weights and moments of a state, and the kind of CPU that computed them."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return AdamW's moments and all weights of a checkpoint's state by name."""
    adamw = state["optimizer"]["adamw"]
    moments = {
        f"{name}.{moment}": adamw["state"]["state"][index][moment]
        for index, name in enumerate(adamw["parameters"])
        for moment in ("exp_avg", "exp_avg_sq")
    }
    aliases = {alias: state["model"][name] for alias, name in state.get("tied", [])}  # a file holds a tied tensor once
    return {**state["model"], **aliases, **moments}


def digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the weights and moments; equal means bit-identical."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors_of(state).items()):
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def describe_cpu() -> str:
    """Return the kind of CPU as far as float32 products depend on it: its maker, family and vector units."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return torch.backends.cpu.get_cpu_capability()
    fields = dict(re.findall(r"^(\w[\w ]*?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    # The matrix library looks at the CPU itself, so AVX-512 counts even when torch is told to compute as AVX2 does.
    widest = "AVX-512" if "avx512f" in fields.get("flags", "").split() else "no AVX-512"
    vendor, family = fields.get("vendor_id", "unknown"), fields.get("cpu family", "?")
    return f"{vendor} family {family}, {widest}, torch uses {torch.backends.cpu.get_cpu_capability()}"
