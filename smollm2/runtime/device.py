"""The device and the processes of a run, and the collectives between them.

Accelerate detects the device and this process's rank, and runs the collectives. The precision and the loss scaler are
chosen here, so that the launcher's own setting cannot override the config's.
"""

import contextlib
import datetime
import os
import platform
import random
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import smollm2
from smollm2.config.schema import TrainingConfig
from smollm2.errors import EXIT_CODE_FILE, ConfigError, Interrupted, Smollm2Error, TrainingError
from smollm2.runtime.memory import keep_freed_memory
from smollm2.runtime.precision import Precision, choose_precision, device_features
from smollm2.runtime.ranks import Pulse, is_lost_rank
from smollm2.runtime.sharding import ALONE, Layout
from smollm2.runtime.signals import StopSignal

SECONDS_AFTER_THE_WATCH = 30
"""How much longer than rank_timeout torch waits: the watch names the rank that is late, and torch's error does not."""


@dataclass(frozen=True)
class Runtime:
    """A run's device, precision and ranks."""

    accelerator: Accelerator
    precision: Precision
    scaler: torch.amp.GradScaler
    stop: StopSignal = field(default_factory=StopSignal)
    pulse: Pulse = field(default_factory=Pulse)
    patient_group: Any = None  # process group for long waits, as when rank 0 reads the text or saves
    layout: Layout = ALONE

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """The number of processes that train together."""
        return int(self.accelerator.num_processes)

    @property
    def planned_device(self) -> str:
        """The device's name in the tables of `smollm2 plan`."""
        name = self.device.type
        return name if name != "cpu" else "cpu-bf16" if self.precision.name == "bf16" else "cpu-float32"

    def autocast(self) -> torch.autocast:
        """Return the autocast context in which the model is run."""
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.dtype != torch.float32)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all ranks."""
        if self.world_size == 1:
            return values
        self.pulse.mark("a sum over the ranks", waits=True)
        total: Tensor = self.accelerator.reduce(values, "sum")
        self.pulse.mark("work after a sum")
        return total

    def all_agree(self, flag: bool) -> bool:
        """Return whether the flag is set on every rank."""
        return flag if self.world_size == 1 else self.sum(torch.tensor(not flag, device=self.device).long()).item() == 0

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value, in rank order. This wait is not limited by rank_timeout."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        self.pulse.mark("a gather of all ranks")
        dist.all_gather_object(values, value, group=self.patient_group)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the `with` block, and fail on every rank if it fails on any, so that no rank waits for a failed one.

        The block must not contain a collective: the ranks exchange their outcomes after it. The lowest failed rank
        reports the reason.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # whatever it is, the other ranks must learn of it first
            error = caught
        codes = self.gather(0 if error is None else getattr(error, "exit_code", 1))
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            return
        if error is None:
            code, sentence = codes[failed[0]], f"rank {failed[0]} failed and reports the reason"
            error = Interrupted(sentence, code - 128) if code > 128 else Smollm2Error(sentence)
            error.exit_code = code
        if isinstance(error, Smollm2Error):
            error.rank = failed[0]
        raise error

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model that training calls: wrapped in DistributedDataParallel if each of several ranks has all of it."""
        if self.layout.is_sharded:
            return model
        # The rotary tables are the same on every rank. Broadcasting them would turn each forward pass into a
        # collective; `broadcast_buffers=False` is deprecated.
        tables = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)  # type: ignore[no-untyped-call]
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def leave(self, code: int) -> NoReturn:
        """End this process at once with this exit code; any thread may call this."""
        leave_exit_code(code)
        os._exit(code)

    def stop_requested(self, otherwise: int = 0) -> int:
        """Return the number of a signal that any rank has received, else `otherwise`. All ranks get the same result."""
        return self.highest(self.stop.number or otherwise)

    def raise_if_stopped(self) -> None:
        """Raise Interrupted, on all ranks or on none, if a stop signal was received.

        It is for work between two steps that a resumed run can repeat.
        """
        if number := self.stop_requested():
            raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    def highest(self, number: int) -> int:
        """Return the highest number of all ranks. It is a collective, so every rank must call it at the same point."""
        if self.world_size == 1:
            return number
        self.pulse.mark("the stop flag", waits=True)
        number = int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())
        self.pulse.mark("work after the stop flag")
        return number

    def to_device(self, array: np.ndarray) -> Tensor:
        """Return an int64 array as a tensor on this rank's device."""
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor.to(self.device)
        )


def start_runtime(config: TrainingConfig) -> Runtime:
    """Detect the device and ranks, choose the precision, and seed every random number generator.

    Raise ConfigError if the device does not support the precision, and TrainingError if the other ranks are not found.
    """
    try:
        accelerator, patient_group = join_ranks(config.rank_timeout + SECONDS_AFTER_THE_WATCH)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise describe_absence(error, os.environ) from None
    device = accelerator.device
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    runtime = Runtime(accelerator, Precision("float32", "not chosen yet"), scaler, patient_group=patient_group)
    with runtime.together():
        precision = choose_precision(config.precision, device.type, device_features(device))
    if device.type == "cpu":
        keep_freed_memory()
    # Set in either case: an earlier run in this process may have changed it.
    torch.set_float32_matmul_precision("high" if precision.name == "tf32" else "highest")
    if config.deterministic:
        # cuBLAS is deterministic only with a fixed workspace size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    return replace(runtime, precision=precision, scaler=scaler)


def join_ranks(seconds: float) -> tuple[Accelerator, Any]:
    """Find the device and the other ranks; return the accelerator, and a process group for long waits if there are any.

    `seconds` limits the search, and each collective. Raise RuntimeError if it ends without them.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    handlers = [
        InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=seconds)),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    with without_stack_frames() if os.environ.get("WORLD_SIZE", "1") != "1" else contextlib.nullcontext():
        accelerator = Accelerator(mixed_precision="no", cpu=not accelerated, kwargs_handlers=handlers)
        if accelerator.num_processes == 1:
            return accelerator, None
        return accelerator, dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


@contextlib.contextmanager
def without_stack_frames() -> Iterator[None]:
    """Hold back standard error: if the block raises, torch's C++ code has written its stack frames there, once a try."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            if is_lost_rank(error):
                held.truncate(0)
            raise
        finally:
            os.dup2(stderr, 2)
            held.seek(0)
            with os.fdopen(stderr, "wb") as stream:
                shutil.copyfileobj(held, stream)


def describe_absence(error: RuntimeError, environment: Mapping[str, str]) -> TrainingError:
    """Return the error of a rank that has not found the others; under torchrun, one rank of each machine reports it."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size, host, port = (environment.get(name, "0") for name in names)
    reason = str(error).splitlines()[0].rstrip(".")
    try:
        socket.getaddrinfo(host, port)
    except OSError as unknown:
        reason = f"{host}: {unknown.strerror}"
    absence = TrainingError(
        "the ranks",
        f"rank {rank} of {world_size} did not find the others through {host}:{port} ({reason})",
        f"start all {world_size} processes with the same MASTER_ADDR and MASTER_PORT, which torchrun does, or unset "
        "RANK and WORLD_SIZE to train in one process",
    )
    is_reporter = not dist.is_torchelastic_launched() or environment.get("LOCAL_RANK", "0") == "0"
    absence.rank = int(rank) if is_reporter else -1
    return absence


def leave_exit_code(code: int) -> None:
    """Write rank 0's exit code to the file that the launcher of run_training.sh reads."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            Path(path).write_text(str(code))


def compile_blocks(layers: nn.ModuleList) -> None:
    """Compile each block in place: compared with compiling the whole model, this takes seconds instead of minutes.

    Parameter names do not change. Raise ConfigError if torch has no usable compiler here, instead of letting the first
    step fail.
    """
    if problem := compiler_problem(next(layers.parameters()).device):
        raise ConfigError("training.compile", problem, "set it to false")
    for layer in layers:
        layer.compile()


def compiler_problem(device: torch.device) -> str:
    """Return why torch cannot compile for this device, or "" if it can.

    This takes seconds, because it compiles a small function.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:
        return f"torch cannot compile here ({str(error).splitlines()[0]})"
    return ""


def machine_facts(runtime: Runtime) -> dict[str, str | int]:
    """Return what bit-exactness depends on besides the config, in particular the device and the versions.

    A checkpoint stores these facts, and a resume compares them.
    """
    device = runtime.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}",
        "precision": runtime.precision.name,
        "threads": torch.get_num_threads(),
        "world_size": runtime.world_size,
        "sharding": runtime.layout.name,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "smollm2": smollm2.__version__,
    }


def environment() -> MutableMapping[str, str]:
    """Return the environment variables, for functions that take them as an argument."""
    return os.environ
