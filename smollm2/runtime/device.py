"""The machine: device, processes, number format, random state, signals. The only reader of the environment.

Accelerate says which device and which rank this process is, and carries the collectives; precision and the loss scale
are kept here, because the launcher's own setting must not outrank the config's.
"""

import contextlib
import ctypes
import datetime
import os
import platform
import random
import signal
import threading
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import smollm2
from smollm2.config.schema import TrainingConfig
from smollm2.errors import EXIT_CODE_FILE, ConfigError, Interrupted, Smollm2Error
from smollm2.plan.arithmetic import MAPPED

SAME_SIGNAL_SECONDS = 2.0
"""A launcher passes on what the terminal already sent to every process: within this time it is the same request."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


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
        self.number, self.came = 0, 0.0
        self.grace = SAME_SIGNAL_SECONDS if "LOCAL_RANK" in os.environ else 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self.came >= self.grace:
            os._exit(128 + number)
        if not self.number:
            self.number, self.came = number, time.monotonic()

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


class Pulse:
    """Where this rank stands, for the thread that watches over it: attributes, so that a mark costs nothing."""

    def __init__(self) -> None:
        self.step, self.count, self.place, self.waits, self.since = 0, 0, "the setup", False, time.monotonic()

    def mark(self, place: str, *, waits: bool = False) -> None:
        """Something begins; with `waits` it cannot end before the other ranks come to it, within rank_timeout."""
        self.count, self.place, self.waits, self.since = self.count + 1, place, waits, time.monotonic()

    def read(self) -> tuple[int, str, float, bool]:
        """How much was begun, what last, when, and whether it waits for the others."""
        where = f"step {self.step}, {self.place}" if self.step else self.place
        return self.count, where, self.since, self.waits


@dataclass(frozen=True)
class Runtime:
    """What a run needs to know of its machine."""

    accelerator: Accelerator
    precision: Precision
    scaler: torch.amp.GradScaler
    stop: StopSignal = field(default_factory=StopSignal)
    pulse: Pulse = field(default_factory=Pulse)
    patient_group: Any = None  # for waits that may be long: while rank 0 reads the text, or saves

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

    @property
    def planned_device(self) -> str:
        """The device as smollm2 plan names it."""
        name = self.device.type
        return name if name != "cpu" else "cpu-bf16" if self.precision.name == "bf16" else "cpu-float32"

    def autocast(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.dtype != torch.float32)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world_size == 1:
            return values
        self.pulse.mark("a sum over the ranks", waits=True)
        total: Tensor = self.accelerator.reduce(values, "sum")
        self.pulse.mark("work after a sum")
        return total

    def all_agree(self, flag: bool) -> bool:
        """Whether the flag is set on every rank: what one must not do, none does."""
        return flag if self.world_size == 1 else self.sum(torch.tensor(not flag, device=self.device).long()).item() == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, by rank. Waits as long as it takes."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        self.pulse.mark("a meeting of the ranks")
        dist.all_gather_object(values, value, group=self.patient_group)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on every rank where it fails on one: nobody waits for a rank that is not coming.

        The ranks meet behind the block, so there must be no other meeting in it. The lowest rank that failed says why.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # whatever it is, the others must hear of it before it goes on its way
            error = caught
        codes = self.gather(0 if error is None else getattr(error, "exit_code", 1))
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            return
        if error is None:
            code, sentence = codes[failed[0]], f"rank {failed[0]} ended and says why"
            error = Interrupted(sentence, code - 128) if code > 128 else Smollm2Error(sentence)
            error.exit_code = code
        if isinstance(error, Smollm2Error):
            error.rank = failed[0]
        raise error

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: itself, or wrapped so that ranks share their gradients."""
        # The rotary tables are the same on every rank: sent around before each forward pass, they would make that a
        # meeting of the ranks. `broadcast_buffers=False` is deprecated.
        tables = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)  # type: ignore[no-untyped-call]
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def leave(self, code: int) -> NoReturn:
        """End this process at once, from any thread."""
        leave_exit_code(code)
        os._exit(code)

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
        self.pulse.mark("the stop flag", waits=True)
        number = int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())
        self.pulse.mark("work after the stop flag")
        return number

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
    handlers = [
        # Behind the watch, which names the rank that is late; torch's own error names none.
        InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.rank_timeout + 30)),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    accelerator = Accelerator(mixed_precision="no", cpu=not accelerated, kwargs_handlers=handlers)
    patient_group = None
    if accelerator.num_processes > 1:
        patient_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    device = accelerator.device
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    runtime = Runtime(accelerator, Precision("float32", "until one is chosen"), scaler, patient_group=patient_group)
    with runtime.together():
        precision = choose_precision(config.precision, device.type, device_features(device))
    if device.type == "cpu":
        keep_freed_memory()
    if precision.name == "tf32":
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    return replace(runtime, precision=precision, scaler=scaler)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next update; by default each update gives 100 MB back, and has every page of it
    made anew: 10 % of its time (benchmarks/README.md). Who set MALLOC_* in the environment is left alone."""
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone, rather than this one having gone wrong."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text


def close_ranks() -> None:
    """Take leave of the other ranks, which all have come to the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave_exit_code(code: int) -> None:
    """Write rank 0's exit code where the launcher of run_training.sh looks for it."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            Path(path).write_text(str(code))


def weight_sums(model: nn.Module) -> Tensor:
    """One integer per parameter, the sum of its bits read as integers: any single flipped bit changes it."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.detach().view(widths[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()]
    return torch.stack(sums)


def compile_blocks(layers: nn.ModuleList) -> None:
    """Compile each block in place: seconds instead of minutes, and names stay as they are.

    Raises ConfigError where this machine has no compiler that torch can use, before the first update finds it out.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2, device=next(layers.parameters()).device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"training.compile: true - torch cannot compile here ({reason}) - set it to false") from None
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


def environment() -> MutableMapping[str, str]:
    """The environment's variables, for the parts that are handed what they need of them."""
    return os.environ
