"""The machine: device, processes, number format, random state, signals. The only reader of the environment.

Accelerate says which device and which rank this process is, and carries the collectives; precision and the loss scale
are kept here, because the launcher's own setting must not outrank the config's.
"""

import contextlib
import os
import platform
import random
import re
import signal
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import smollm2
from smollm2.config import TrainingConfig
from smollm2.errors import ConfigError, Interrupted


@dataclass(frozen=True)
class Precision:
    """The number format of the products, and why it was taken."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which products are computed."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name, torch.float32)


def choose_precision(requested: str, device_type: str, features: frozenset[str]) -> Precision:
    """The format for a device with `features` (of `bf16`, `tf32`): a table, never a stopwatch, so that a resume agrees.

    Raises ConfigError where the request cannot be met: fp16 on a CPU is 13 to 25 times slower than float32.
    """
    if requested == "auto":
        if "bf16" in features:
            return Precision("bf16", f"this {device_type} computes it")
        if device_type == "cuda":
            return Precision("fp16", "this GPU does not compute bf16")
        return Precision("float32", f"this {device_type} does not compute bf16")
    where = f"training.precision: {requested}"
    if requested == "fp16" and device_type != "cuda":
        raise ConfigError(f"{where} needs a CUDA GPU and this run is on {device_type}; use auto")
    if requested == "tf32" and "tf32" not in features:
        raise ConfigError(f"{where} needs a CUDA GPU of compute capability 8 or more; use auto")
    if requested == "bf16" and device_type == "cuda" and "bf16" not in features:
        raise ConfigError(f"{where} is not computed by this GPU; use auto")
    slow = requested == "bf16" and "bf16" not in features
    return Precision(requested, "as asked; emulated here, slower than float32" if slow else "as asked")


def device_features(device: torch.device) -> frozenset[str]:
    """Which formats the hardware computes: bf16 on AVX512-BF16 or AMX, and on GPUs of capability 8 or more."""
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device)[0] >= 8
        return frozenset({"bf16", "tf32"} if modern else ())
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return frozenset({"bf16"} if any(getattr(torch.cpu, probe, bool)() for probe in probes) else ())
    return frozenset()


class StopSignal:
    """The first SIGINT, SIGTERM or SIGUSR1 is remembered until a safe moment; the second ends the process at once."""

    def __init__(self) -> None:
        self.number = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block, in the main thread; elsewhere they stay the caller's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        before = {getattr(signal, name): signal.signal(getattr(signal, name), self._handle) for name in names}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if_set(self) -> None:
        """For work that keeps nothing: raises Interrupted."""
        if self.number:
            name = signal.Signals(self.number).name
            raise Interrupted(f"stopped by {name} before the first step; nothing was lost", self.number)


@dataclass(frozen=True)
class Runtime:
    """What a run needs to know of its machine."""

    accelerator: Accelerator
    precision: Precision
    scaler: torch.amp.GradScaler
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return int(self.accelerator.num_processes)

    def autocast(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.dtype != torch.float32)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        return values if self.world_size == 1 else self.accelerator.reduce(values, "sum")

    def stop_requested(self, otherwise: int = 0) -> int:
        """The number of the signal that some rank has received, else `otherwise`: the ranks agree, or some would wait
        for ever."""
        return self.highest(self.stop.number or otherwise)

    def raise_if_stopped(self) -> None:
        """For work between two updates that can be done again: raises Interrupted, on all ranks or on none."""
        if number := self.stop_requested():
            raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    def highest(self, number: int) -> int:
        """The highest of the ranks' numbers; every rank must ask at the same place."""
        if self.world_size == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())

    def to_device(self, array: np.ndarray) -> Tensor:
        """An int64 array as a tensor where this rank computes."""
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )


def start_runtime(config: TrainingConfig) -> Runtime:
    """Find device and ranks, choose the precision, seed everything. Raises ConfigError for a precision without hardware."""
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    accelerator = Accelerator(mixed_precision="no", cpu=not accelerated)
    device = accelerator.device
    precision = choose_precision(config.precision, device.type, device_features(device))
    if precision.name == "tf32":
        torch.set_float32_matmul_precision("high")
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    return Runtime(accelerator, precision, scaler)


def compile_blocks(layers: nn.ModuleList) -> None:
    """Compile each block in place: seconds instead of minutes, and names stay as they are."""
    for layer in layers:
        layer.compile()


def random_state() -> dict[str, object]:
    """The state of every generator, in plain types."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
    }


def restore_random_state(state: dict[str, object]) -> None:
    """The inverse of `random_state`; CUDA generators only where as many devices are there."""
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    cuda: list[Tensor] = state["cuda"]  # type: ignore[assignment]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(state["python"])  # type: ignore[arg-type]
    numpy: dict[str, object] = state["numpy"]  # type: ignore[assignment]
    keys = numpy["keys"].numpy().astype(np.uint32)  # type: ignore[attr-defined]
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))  # type: ignore[arg-type]


def machine_facts(runtime: Runtime) -> dict[str, str | int]:
    """What bit-exactness depends on besides the config; a resume compares it, a checkpoint keeps it."""
    device = runtime.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}",
        "precision": runtime.precision.name,
        "threads": torch.get_num_threads(),
        "world_size": runtime.world_size,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "smollm2": smollm2.__version__,
    }


def memory_limit() -> int | None:
    """Bytes of memory that this machine or this container has; None where the system does not say.

    What it has, not what is free: the same run must be cut the same way when it goes on tomorrow.
    """
    sources = (("/proc/meminfo", r"MemTotal:\s+(\d+) kB", 1024), ("/sys/fs/cgroup/memory.max", r"(\d+)\n", 1))
    found = []
    for path, pattern, unit in sources:
        with contextlib.suppress(OSError):
            if match := re.match(pattern, Path(path).read_text()):
                found.append(int(match[1]) * unit)
    return min(found, default=None)


def environment() -> MutableMapping[str, str]:
    """The environment's variables, for the parts that are handed what they need of them."""
    return os.environ
