"""The ranks of a run: which one is late, which has ended, and how they differ.

A collective that waits for a stuck rank does not name it, and NCCL waits even for a dead one. So each rank has a thread
that writes the rank's position to a file every second and reads the positions of the others.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from smollm2.errors import Smollm2Error, TrainingError
from smollm2.runtime.sharding import local
from smollm2.storage.processes import is_running
from smollm2.storage.run_folder import RANKS

SECONDS_BETWEEN_CHECKS = 1.0
SECONDS_AFTER_A_LOSS = 5.0
"""A rank that has made no progress for this many seconds while another has ended must be waiting for it, and ends
too."""

ADVICE = "check that process or machine, then resume with --resume auto"


@dataclass(frozen=True)
class Position:
    """A rank's position in the run: `count` increases with each operation it begins; `code` is None until it ends.

    `reporter` is set if the rank gives up because of the others: it is the rank of its machine that reports why.
    """

    rank: int
    count: int
    place: str
    pid: int
    host: str
    code: int | None = None
    reporter: int | None = None

    def has_ended(self) -> bool:
        """Return whether the rank wrote an exit code or its process is gone.

        On another machine, only the exit code can be checked.
        """
        return self.code is not None or (self.host == socket.gethostname() and not is_running(self.pid))


class Watch:
    """A thread with which a rank watches the other ranks. `position` is a function such as `Pulse.read`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        position: Callable[[], tuple[int, str, float, bool]],
        timeout: float,
        end: Callable[[Smollm2Error], None],
        report: Callable[[str], None],
    ) -> None:
        """`end` is called on the thread with the reason for giving up; it ends the process.

        `report` receives a message about a wait that may legitimately be long, as when rank 0 reads the text or saves.
        """
        self.folder, self.rank, self.world_size = folder / RANKS, rank, world_size
        self.position, self.timeout, self.end = position, timeout, end
        self.report, self.reported = report, -1
        self.reporter: int | None = None
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> None:
        """Start writing this rank's position and reading the others'."""
        self._write(None)
        self.thread.start()

    def close(self, code: int) -> None:
        """Stop the thread. If `code` is not 0, write it for the ranks that wait for this one."""
        if self.closed.is_set() or not self.thread.is_alive():
            return
        self.closed.set()
        self.thread.join()
        if code:
            self._write(code)
            return
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink()
            self.folder.rmdir()

    def explain_loss(self) -> Smollm2Error:
        """Return an error that says which rank was lost, after waiting briefly for that rank's exit code."""
        for _ in range(10):
            ended = self._find_ended()
            if ended and ended[0].reporter is None:
                break
            time.sleep(0.2)
        error = self._describe_loss(ended) if ended else self._describe_silence("lost contact with each other")
        self.reporter = error.rank
        return error

    def others(self) -> list[Position]:
        """Return the positions last written by the other ranks; a rank that has written none is left out."""
        found = []
        for path in self.folder.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):  # being written at this moment
                found.append(Position(**json.loads(path.read_bytes())))
        return sorted((p for p in found if p.rank != self.rank and p.rank < self.world_size), key=lambda p: p.rank)

    def _find_ended(self) -> list[Position]:
        """Return the positions of the ranks that have ended, those that ended because of others last."""
        ended = (position for position in self.others() if position.has_ended())
        return sorted(ended, key=lambda p: (p.reporter is not None, p.rank))

    def _watch(self) -> None:
        while not self.closed.wait(SECONDS_BETWEEN_CHECKS):
            self._write(None)
            count, _, since, waits = self.position()
            waited = time.monotonic() - since
            ended = self._find_ended()
            if ended and waited > SECONDS_AFTER_A_LOSS:
                self._give_up(self._describe_loss(ended))
            elif waits and waited > self.timeout:
                self.closed.wait(2 * SECONDS_BETWEEN_CHECKS)  # until all have written their positions
                if self.position()[0] == count and not self.closed.is_set():
                    self._give_up(self._describe_silence(f"made no progress for {waited:.0f} s"))
            elif waited > self.timeout and self.reported != count:
                self.reported = count
                self._report_wait(waited)

    def _give_up(self, error: Smollm2Error) -> None:
        """End this process, whose position then says that another rank is the reason."""
        self.reporter = error.rank
        self._write(error.exit_code)
        self.end(error)

    def _report_wait(self, waited: float) -> None:
        """Report a long wait once, and from only one of the waiting ranks."""
        everyone = self._everyone()
        late = find_late(everyone)
        if late and self.rank == min(p.rank for p in everyone if p not in late):
            self.report(f"waiting for {waited:.0f} s: {describe_late(late)}")

    def _describe_loss(self, ended: Sequence[Position]) -> Smollm2Error:
        """Return the error that names the first of the ended ranks."""
        first = ended[0]
        how = (
            "was killed or crashed"
            if first.code is None
            else f"ended with exit code {first.code} and reports the reason"
        )
        error = TrainingError(
            "the ranks", f"rank {first.rank} {how}, at {first.place}; the run cannot continue without it", ADVICE
        )
        error.exit_code = first.code or TrainingError.exit_code
        error.rank = self._find_reporter({position.rank for position in ended if position.reporter is None})
        return error

    def _describe_silence(self, what: str) -> Smollm2Error:
        """Return the error for ranks that do not hear from each other although none is known to have ended."""
        late = find_late(self._everyone())
        error = TrainingError("the ranks", f"{what}; {describe_late(late)}", ADVICE)
        error.rank = self._find_reporter({position.rank for position in late})
        return error

    def _find_reporter(self, others: Collection[int]) -> int:
        """Return the rank of this machine that reports an error: the lowest that is not one of the `others`.

        Each machine has its own, because the machine of rank 0 may be the one that was lost. The first rank of a
        machine that gives up decides, because the ranks after it see it as ended.
        """
        here = [p for p in self._everyone() if p.host == socket.gethostname()]
        decided = [p.reporter for p in here if p.reporter is not None]
        left = [p.rank for p in here if p.rank not in others]
        return min(decided or left or [p.rank for p in here])

    def _everyone(self) -> list[Position]:
        return [self._position(None), *self.others()]

    def _position(self, code: int | None) -> Position:
        count, place, _, _ = self.position()
        return Position(self.rank, count, place, os.getpid(), socket.gethostname(), code, self.reporter)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:04d}.json"

    def _write(self, code: int | None) -> None:
        """Write this rank's position without fsync, because it matters only during the run.

        Errors are ignored: a full disk must not end the run.
        """
        path = self._path(self.rank)
        temporary = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(asdict(self._position(code))))
            temporary.replace(path)


def remove_positions(folder: Path) -> None:
    """Remove the positions that an earlier, killed run left in its run folder: they would count as lost ranks."""
    for path in (folder / RANKS).glob("rank_*.json"):
        with contextlib.suppress(OSError):
            path.unlink()


def find_late(positions: Sequence[Position]) -> list[Position]:
    """Return the ranks that are behind the others, or an empty list if all are at the same place."""
    least, most = min(p.count for p in positions), max(p.count for p in positions)
    return [p for p in positions if p.count == least] if least < most else []


def describe_late(late: Sequence[Position]) -> str:
    """Describe which ranks are behind, at which place and in which process."""
    if not late:
        return "all ranks have reached the same point, so the network between them or a device is not responding"
    return ", ".join(f"rank {p.rank} is behind, at {p.place} (process {p.pid} on {p.host})" for p in late)


def find_disagreement(facts: Sequence[Mapping[str, object]]) -> tuple[int, list[str]] | None:
    """Return the first rank whose facts differ from rank 0's, and a list of the differences; None if all agree."""
    for rank, other in enumerate(facts):
        names = sorted(facts[0].keys() | other.keys())
        differing = [
            f"{name} {facts[0].get(name)} -> {other.get(name)}"
            for name in names
            if facts[0].get(name) != other.get(name)
        ]
        if differing:
            return rank, differing
    return None


def find_odd_replica(sums: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Return (rank, index) of the first value that differs from that of most ranks, or None.

    With two ranks, which have no majority, the higher one is named.
    """
    for index, values in enumerate(zip(*sums, strict=True)):
        usual = max(values, key=lambda value: (values.count(value), -values.index(value)))
        for rank, value in enumerate(values):
            if value != usual:
                return rank, index
    return None


class Pulse:
    """This rank's current operation, for the watcher thread. Its attributes are plain, so that `mark` is cheap."""

    def __init__(self) -> None:
        self.step, self.count, self.place, self.waits, self.since = 0, 0, "the setup", False, time.monotonic()
        self.waited = 0.0  # seconds in operations that wait for other ranks

    def mark(self, place: str, *, waits: bool = False) -> None:
        """Record that an operation begins; with `waits`, the other ranks must reach it too, within rank_timeout."""
        now = time.monotonic()
        self.waited += now - self.since if self.waits else 0.0
        self.count, self.place, self.waits, self.since = self.count + 1, place, waits, now

    def read(self) -> tuple[int, str, float, bool]:
        """Return the number of operations begun, the last one, its start time, and whether it waits for other ranks."""
        where = f"step {self.step}, {self.place}" if self.step else self.place
        return self.count, where, self.since, self.waits


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank is gone, not because of this rank."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text


def close_ranks() -> None:
    """Close the process group; all ranks must have reached the end of the run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def weight_sums(model: nn.Module) -> Tensor:
    """Return one integer per parameter: the sum of this rank's elements' bits read as integers. Any flipped bit changes it."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = [local(p.detach()) for p in model.parameters()]
    sums = [p.view(widths[p.element_size()]).sum(dtype=torch.int64) for p in parts]
    return torch.stack(sums)
