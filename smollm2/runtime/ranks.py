"""Several processes, one run: which rank is late, which has ended, in what they differ.

A collective that waits for a rank that is stuck says nothing of it, and with NCCL a dead rank is waited for as well. So
each rank has a thread that writes down every second where its rank stands, and reads where the others do.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from smollm2.errors import Smollm2Error, TrainingError
from smollm2.storage.processes import is_running

FOLDER = ".ranks"
SECONDS_BETWEEN_LOOKS = 1.0
PATIENCE_AFTER_A_LOSS = 5.0
"""A rank that has not moved for so long after another ended waits for it, and ends too."""

ADVICE = "look at that process or machine, then go on with --resume auto"


@dataclass(frozen=True)
class Position:
    """Where a rank stands: `count` goes up with everything that it begins, `code` is None until it ends."""

    rank: int
    count: int
    place: str
    pid: int
    host: str
    code: int | None = None

    def has_ended(self) -> bool:
        """Whether it said so, or its process is gone; of another machine's processes only the first is known."""
        return self.code is not None or (self.host == socket.gethostname() and not is_running(self.pid))


class Watch:
    """The thread of one rank. `where` says (count, place, since when, whether it waits for others there)."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        where: Callable[[], tuple[int, str, float, bool]],
        timeout: float,
        end: Callable[[Smollm2Error], None],
        say: Callable[[str], None],
    ) -> None:
        """`end` is called, in the thread, with the sentence on which this rank must give up; it ends the process. `say`
        hears for whom it waits where a wait may be long: while rank 0 reads the text, or saves."""
        self.folder, self.rank, self.where, self.timeout, self.end = folder / FOLDER, rank, where, timeout, end
        self.say, self.said = say, -1
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._look_around, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to write and look."""
        self._write(None)
        self.thread.start()

    def close(self, code: int) -> None:
        """End the thread; a rank that failed leaves its exit code behind, for those who wait for it."""
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
        """The error of a rank that was left alone by another; it waits a moment for that one's last word."""
        for _ in range(10):
            if ended := [position for position in self.others() if position.has_ended()]:
                return self._describe_loss(ended)
            time.sleep(0.2)
        late = find_late(self._everyone())
        return TrainingError(f"the ranks lost one another; {describe_late(late)} - {ADVICE}")

    def others(self) -> list[Position]:
        """Where the other ranks stood at their last look; those that have written nothing are left out."""
        found = []
        for path in self.folder.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):  # being written at this moment
                found.append(Position(**json.loads(path.read_bytes())))
        return sorted((p for p in found if p.rank != self.rank), key=lambda p: p.rank)

    def _look_around(self) -> None:
        while not self.closed.wait(SECONDS_BETWEEN_LOOKS):
            self._write(None)
            count, _, since, waits = self.where()
            waited = time.monotonic() - since
            ended = [position for position in self.others() if position.has_ended()]
            if ended and waited > PATIENCE_AFTER_A_LOSS:
                self.end(self._describe_loss(ended))
            elif waits and waited > self.timeout:
                self.closed.wait(2 * SECONDS_BETWEEN_LOOKS)  # until all have written where they stand
                if self.where()[0] == count and not self.closed.is_set():
                    self.end(self._describe_stall(waited))
            elif waited > self.timeout and self.said != count:
                self.said = count
                self._say_for_whom(waited)

    def _say_for_whom(self, waited: float) -> None:
        """Once, and by one rank of those that wait."""
        everyone = self._everyone()
        late = find_late(everyone)
        if late and self.rank == min(p.rank for p in everyone if p not in late):
            self.say(f"waiting for {waited:.0f} s: {describe_late(late)}")

    def _describe_loss(self, ended: Sequence[Position]) -> Smollm2Error:
        first = ended[0]
        how = "was killed, or crashed" if first.code is None else f"ended with exit code {first.code} and says why"
        error = TrainingError(f"rank {first.rank} {how}, at {first.place}: the run cannot go on without it - {ADVICE}")
        error.exit_code = first.code or TrainingError.exit_code
        gone = {position.rank for position in ended}
        error.rank = min(p.rank for p in self._everyone() if p.rank not in gone)
        return error

    def _describe_stall(self, waited: float) -> Smollm2Error:
        everyone = self._everyone()
        late = find_late(everyone)
        error = TrainingError(f"no progress for {waited:.0f} s; {describe_late(late)} - {ADVICE}")
        behind = {position.rank for position in late}
        error.rank = min((p.rank for p in everyone if p.rank not in behind), default=0)
        return error

    def _everyone(self) -> list[Position]:
        return [self._position(None), *self.others()]

    def _position(self, code: int | None) -> Position:
        count, place, _, _ = self.where()
        return Position(self.rank, count, place, os.getpid(), socket.gethostname(), code)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:04d}.json"

    def _write(self, code: int | None) -> None:
        """Not synced: it is for the living. A disk that is full must not end a run over it."""
        path = self._path(self.rank)
        temporary = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(asdict(self._position(code))))
            temporary.replace(path)


def find_late(positions: Sequence[Position]) -> list[Position]:
    """The ranks that stand behind the others; empty where all stand at the same place."""
    least, most = min(p.count for p in positions), max(p.count for p in positions)
    return [p for p in positions if p.count == least] if least < most else []


def describe_late(late: Sequence[Position]) -> str:
    """Who is behind, where and in which process."""
    if not late:
        return "all ranks stand at the same place, so the network between them, or a device, does not answer"
    return ", ".join(f"rank {p.rank} is behind: it stands at {p.place} (process {p.pid} on {p.host})" for p in late)


def find_disagreement(facts: Sequence[Mapping[str, object]]) -> tuple[int, list[str]] | None:
    """The first rank whose facts are not rank 0's, and `name theirs -> its own` of each; None where all agree."""
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
    """(rank, index) of the first value that is not what most ranks have; of two ranks the higher is named."""
    for index, values in enumerate(zip(*sums, strict=True)):
        usual = max(values, key=lambda value: (values.count(value), -values.index(value)))
        for rank, value in enumerate(values):
            if value != usual:
                return rank, index
    return None


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


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone, rather than this one having gone wrong."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text


def close_ranks() -> None:
    """Take leave of the other ranks, which all have come to the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def weight_sums(model: nn.Module) -> Tensor:
    """One integer per parameter, the sum of its bits read as integers: any single flipped bit changes it."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.detach().view(widths[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()]
    return torch.stack(sums)
