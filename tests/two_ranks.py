"""Two ranks on this machine in a third of a second: forks of this process that find one another as torchrun's do."""

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # with the next two, what DDP, AdamW and checkpoints in parts import: here once instead of in each fork, 5 s
import torch.distributed.checkpoint
import torch.distributed.tensor
from accelerate.state import AcceleratorState, PartialState


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (negative: the signal), what it wrote, and after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Ranks:
    """Processes at work."""

    pids: list[int]
    folder: Path
    started: float

    def wait(self, seconds: float = 60) -> list[Ended]:
        """Until all have ended; those that do not are killed, and then it is an error."""
        ended: dict[int, tuple[int, float]] = {}
        while len(ended) < len(self.pids) and time.monotonic() < self.started + seconds:
            for rank, pid in enumerate(self.pids):
                if rank not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[rank] = (os.waitstatus_to_exitcode(found[1]), time.monotonic() - self.started)
            time.sleep(0.01)
        stuck = [rank for rank in range(len(self.pids)) if rank not in ended]
        for rank in stuck:
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
        words = [self.read(rank) for rank in range(len(self.pids))]
        assert not stuck, f"ranks {stuck} did not end: {words}"
        return [Ended(ended[rank][0], *words[rank], ended[rank][1]) for rank in range(len(self.pids))]

    def read(self, rank: int) -> tuple[str, str]:
        """What a rank has written so far on its two streams."""
        out, err = (self.folder / f"rank_{rank}.{name}" for name in ("out", "err"))
        return out.read_text(), err.read_text()


def start_ranks(work: Callable[[int], int], folder: Path, world_size: int = 2, per_machine: int = 0) -> Ranks:
    """Fork `world_size` processes that run work(rank) and end with what it returns; `folder` is where they work. As
    if on several machines if there are fewer `per_machine`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pids, started = [], time.monotonic()
    for rank in range(world_size):
        for name in ("out", "err"):
            (folder / f"rank_{rank}.{name}").touch()
        pid = os.fork()
        if pid == 0:
            _be_rank(work, folder, rank, world_size, per_machine or world_size, port)
        pids.append(pid)
    return Ranks(pids, folder, started)


def run_ranks(work: Callable[[int], int], folder: Path, world_size: int = 2, per_machine: int = 0) -> list[Ended]:
    """`start_ranks`, waited for."""
    return start_ranks(work, folder, world_size, per_machine).wait()


def _be_rank(work: Callable[[int], int], folder: Path, rank: int, world_size: int, per_machine: int, port: int) -> None:
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"rank_{rank}.{name}", os.O_WRONLY | os.O_TRUNC), number)
        with _own_streams():
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % per_machine), "WORLD_SIZE": str(world_size)}
            os.environ |= {
                "LOCAL_WORLD_SIZE": str(per_machine),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            AcceleratorState._reset_state(True)
            PartialState._reset_state()
            torch.set_num_threads(1)  # the threads of the parent are not in a fork
            os.chdir(folder)
            try:
                code = work(rank)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def _own_streams() -> Iterator[None]:
    """Python's streams over the file descriptors, whatever pytest has put in their place."""
    with (
        open(1, "w", closefd=False) as out,
        open(2, "w", closefd=False) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        yield
