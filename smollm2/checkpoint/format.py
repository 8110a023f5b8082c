"""`step_XXXX.pt`: one file that is complete alone, whole or not there, and read as if a stranger had made it.

A state is a dictionary of plain values and tensors; ENTRIES says what it must hold. torch.load notices no flipped bit
(588 of 600 loaded with wrong numbers), but the archive holds checksums: they are compared at each save and each load.
`latest.json` is a hint for people and scripts; what exists is found by looking.
"""

import copy
import hashlib
import json
import math
import re
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from smollm2.errors import CheckpointError, ResourceError, TrainingError
from smollm2.storage.atomic import IO_OPS, IoOps, write_atomically
from smollm2.storage.run_folder import BEST, CHECKPOINT, LATEST, checkpoint_path, step_of

FORMAT = "smollm2-train/1"

State = dict[str, Any]

ENTRIES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "step": (int,),
    "tokens": (int,),
    "loss": (float,),
    "model": (dict,),
    "tied": (list,),
    "optimizer": (dict,),
    "scheduler": (dict,),
    "scheduler.step": (int,),
    "scheduler.learning_rate": (float,),
    "scaler": (dict,),
    "data": (dict,),
    "data.seed": (int,),
    "data.epoch": (int,),
    "data.next_batch": (int,),
    "data.order_version": (int, str),
    "data.tokens_fingerprint": (str,),
    "data.tokens": (int,),
    "data.windows": (int,),
    "rng": (dict,),
    "rng.torch": (Tensor,),
    "rng.cuda": (list,),
    "rng.python": (tuple,),
    "rng.numpy": (dict,),
    "stability": (dict,),
    "stability.skipped": (list,),
    "stability.losses": (list,),
    "stability.spikes": (list,),
    "stability.pending": (list,),
    "best": (dict,),
    "config": (str,),
    "tokenizer": (dict,),
    "tokenizer.text": (str,),
    "tokenizer.fingerprint": (str,),
    "tokenizer.vocab_size": (int,),
    "tokenizer.end_of_text": (int,),
    "env": (dict,),
    "wandb_run_id": (str,),
    "created_unix": (int, float),
}
"""What every checkpoint holds, by dotted name, and as what. `tied` is written and taken out again here: pairs of names
in `model` that are one tensor, which is stored once, under the second name."""

LATER_ENTRIES: dict[str, tuple[type, ...]] = {"stability.clipped": (list,)}
"""What older checkpoints of this format lack, and no weight depends on: of this type where it is there."""

SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype)
MAX_DEPTH = 16
MAX_RECORDS = 100_000
TENSOR_RECORD = re.compile(r"[^/]+/data/[0-9]+")


def take_snapshot(state: State, buffers: dict[str, Tensor]) -> State:
    """A copy in the host's memory that training no longer touches, for `save_checkpoint` to write while it goes on.

    `buffers` keeps the tensors of the copy for the next one: memory that is new costs the system ten times the copying.
    Raises TypeError for a state that is not made of plain values, which is a bug of the caller.
    """

    def copy_to_host(tensor: Tensor, name: str) -> Tensor:
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)

    model, tied = _separate_ties(state["model"])
    content: State = _to_plain({**state, "model": model, "tied": tied}, "state", copy_to_host)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies from the device were only begun
    return content


def save_checkpoint(folder: Path, state: State, *, step: int, io_ops: IoOps = IO_OPS) -> Path:
    """Write `step_XXXX.pt`, then `latest.json`, each whole or not at all; what was written is read back before it counts.

    `state` may be a snapshot. Raises ResourceError where the disk refuses, and then every older file is intact; TypeError
    for a state that is not made of plain values, which is a bug of the caller; TrainingError for weights that are not
    finite.
    """
    content = state
    if "tied" not in state:
        model, tied = _separate_ties(state["model"])
        content = _to_plain({**state, "model": model, "tied": tied}, "state")
    problem = _find_wrong_entry(content)
    if problem or content["step"] != step:
        raise TypeError(problem or f"the state is of step {content['step']}, not {step}")
    path = checkpoint_path(folder, step)
    if problem := _find_wrong_weight(content["model"]):
        raise TrainingError(
            f"{path} - it was not saved: {problem} - lower training.learning_rate and go on from the checkpoint before"
        )
    hint: dict[str, str | int] = {"file": path.name, "step": step}

    def check(temporary: Path) -> None:
        try:
            _read(temporary)
        except CheckpointError as error:
            raise ResourceError(
                f"{path} - it was not saved, because it does not read back as written: {error} - check the disk; the "
                "checkpoints before it are intact"
            ) from error
        with temporary.open("rb") as file:
            hint["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        hint["size"] = temporary.stat().st_size

    # torch asks of a file only that it can write and flush.
    write_atomically(
        path,
        lambda file: torch.save(content, file),  # type: ignore[arg-type]
        size=_estimate_size(content),
        check=check,
        io_ops=io_ops,
    )
    write_atomically(folder / LATEST, _to_json(hint), io_ops=io_ops)
    return path


def load_checkpoint(path: Path) -> State:
    """The state in a file of any name, on the CPU. Runs no code from it. Raises CheckpointError naming what is wrong."""
    try:
        absent = path.is_dir() or not path.exists()
    except OSError:
        absent = False  # it cannot be looked at, and reading it says why
    if absent:
        raise CheckpointError(describe_missing(path))
    try:
        return _detach_from_disk(_read(path))
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} - {error} - name another checkpoint, or take the newest valid one by --resume auto"
        ) from None


def find_resumable(folder: Path, report: Callable[[str], None]) -> tuple[Path, State] | None:
    """The newest valid checkpoint of a folder and its state; each newer one that is refused is reported.

    None where there are none. Raises CheckpointError where there are some and none is valid: a run must not begin anew
    over them.
    """
    refused = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, _detach_from_disk(_read_own_step(path))
        except CheckpointError as error:
            refused.append(f"{path.name}: {error}")
            report(f"{path} - refused: {error} - the next older one is tried")
    if not refused:
        return None
    more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
    raise CheckpointError(
        f"{folder} - none of its {len(refused)} checkpoints can be used: {'; '.join(refused[:3])}{more} - put back a copy "
        "of one, or start afresh with another --save_dir"
    )


def list_checkpoints(folder: Path, io_ops: IoOps = IO_OPS) -> list[Path]:
    """The files of a folder that have a checkpoint's name, oldest step first. Links are not followed."""
    try:
        paths = [folder / name for name in io_ops.listdir(folder) if CHECKPOINT.fullmatch(name)]
        files = [path for path in paths if path.is_file() and not path.is_symlink()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ResourceError(f"{folder} - it cannot be read: {error.strerror} - make it readable") from error
    # By the number: as text, step_10000 comes before step_9500. Never by the clock, which jumps.
    return sorted(files, key=lambda path: (step_of(path), path.name))


def prune_checkpoints(
    folder: Path,
    keep_last: int,
    keep_every: int | None = None,
    *,
    protected: Collection[int] = (),
    io_ops: IoOps = IO_OPS,
) -> list[Path]:
    """Remove what is older than the newest `keep_last` valid checkpoints; returns what went.

    Stays: the best, the steps in `protected` (the one resumed from), multiples of `keep_every`. A damaged file counts
    for nothing: it neither takes the place of a valid one nor goes before it is that old. Call it after a save, under
    the folder's lock. Raises ResourceError where a file cannot be removed.
    """
    if keep_last < 2:
        raise ValueError(f"keep_last is {keep_last}; below 2 one damaged file is the end of a run")
    newest_first = list_checkpoints(folder, io_ops)[::-1]
    valid, older = 0, []
    for position, path in enumerate(newest_first):
        valid += _is_valid(path)
        if valid == keep_last:
            older = newest_first[position + 1 :]
            break
    best = _read_best(folder)
    if not older or (best is None and (folder / BEST).exists()):
        return []  # without knowing which one is the best, none may go
    removed = []
    for path in reversed(older):
        step = step_of(path)
        if step in protected or path.name == (best or {}).get("file") or (keep_every and step % keep_every == 0):
            continue
        try:
            io_ops.unlink(path)
        except OSError as error:
            raise ResourceError(f"{path} - it cannot be removed: {error.strerror} - remove it by hand") from error
        removed.append(path)
    return removed


def note_best(folder: Path, path: Path, step: int, validation_loss: float, io_ops: IoOps = IO_OPS) -> bool:
    """Write `best.json` where this checkpoint has a lower validation loss than the one that it names; whether it has."""
    best = _read_best(folder)
    if best and (folder / best["file"]).is_file() and validation_loss >= best["validation_loss"]:
        return False
    if not math.isfinite(validation_loss):
        return False
    found: dict[str, str | int | float] = {"file": path.name, "step": step, "validation_loss": float(validation_loss)}
    write_atomically(folder / BEST, _to_json(found), io_ops=io_ops)
    return True


def set_aside_later(folder: Path, step: int, io_ops: IoOps = IO_OPS) -> list[Path]:
    """Rename the checkpoints after `step` to `step_XXXX.pt.superseded`; returns the new names.

    A run that goes on from an older checkpoint takes another course: after a kill, `--resume auto` must not find the
    newer files of the course that was left.
    """
    later = [path for path in list_checkpoints(folder, io_ops) if step_of(path) > step]
    for path in later:
        io_ops.replace(path, path.with_name(f"{path.name}.superseded"))
    return [path.with_name(f"{path.name}.superseded") for path in later]


def describe_missing(path: Path) -> str:
    """A sentence for a checkpoint that does not exist, which lists those that do."""
    folder = path if path.is_dir() else path.parent
    names = [found.name for found in list_checkpoints(folder)]
    what = "it is a folder" if path.is_dir() else "there is no such file"
    if "XXXX" in path.name:
        what += "; XXXX stands for the number of a step"
    if not names:
        return f"{path} - {what}, and {folder} holds no checkpoint - train first, or name another file"
    more = f", and {len(names) - 20} older ones" if len(names) > 20 else ""
    return f"{path} - {what} - {folder} holds {', '.join(names[-20:])}{more}"


def content_hash(state: Mapping[str, Any]) -> str:
    """One number for all values and tensors of a state, whatever the order of its entries: equal means bitwise equal."""
    digest = hashlib.sha256()
    for name, value in sorted(_walk(_to_plain(state, "state")), key=lambda leaf: leaf[0]):
        if isinstance(value, Tensor):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name}|{value!r}|".encode())
    return digest.hexdigest()


def _read(path: Path) -> State:
    """The checked state in a file, its tensors still on the disk. Raises CheckpointError with the reason alone."""
    try:
        tensor_bytes = _check_archive(path)
        with _no_added_globals():
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        problem = (
            _find_wrong_format(state)
            or _find_wrong_value(state, tensor_bytes)
            or _find_wrong_entry(state)
            or _find_wrong_weight(state["model"])
        )
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror or error}") from None
    except Exception as error:  # over bytes that anyone may have written, the parsers raise nearly everything
        # Their words are not passed on: torch advises to load with weights_only=False, which runs the file's code.
        raise CheckpointError(f"it is damaged, or no checkpoint of this program ({type(error).__name__})") from None
    if problem:
        raise CheckpointError(problem)
    checked: State = state
    return checked


def _read_own_step(path: Path) -> State:
    """`_read`, for a file that is found by its name: the step inside must be that of the name."""
    state = _read(path)
    if state["step"] != step_of(path):
        raise CheckpointError(f"its own step is {state['step']}, which is not that of its name")
    return state


def _is_valid(path: Path) -> bool:
    try:
        _read_own_step(path)
    except CheckpointError:
        return False
    return True


def _detach_from_disk(state: State) -> State:
    """The state in memory of its own, with tied tensors under each of their names."""
    state = copy.deepcopy(state)
    for alias, name in state.pop("tied"):
        state["model"][alias] = state["model"][name]
    return state


def _check_archive(path: Path) -> int:
    """Bytes of tensors in such a zip as torch writes. Raises CheckpointError where it is another, or a checksum fails.

    All of it before anything in the file is interpreted.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("it is not a regular file")
    if status.st_size == 0:
        raise CheckpointError("it is empty")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        names = {record.filename for record in records}
        if len(names) < len(records) or len(records) > MAX_RECORDS:
            raise CheckpointError("its archive has a name twice, or too many")
        if any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError("it is a TorchScript program, not a checkpoint")
        if not all(map(_is_plain_record, records)) or sum(r.file_size for r in records) > status.st_size:
            raise CheckpointError("its archive is packed, or has paths that leave it")
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f"it is damaged: {damaged!r} does not match its checksum")
    return sum(record.file_size for record in records if TENSOR_RECORD.fullmatch(record.filename))


def _is_plain_record(record: zipfile.ZipInfo) -> bool:
    parts = record.filename.split("/")
    return (
        record.compress_type == zipfile.ZIP_STORED and "\\" not in record.filename and not {"", ".", ".."} & set(parts)
    )


@contextmanager
def _no_added_globals() -> Iterator[None]:
    """Without the classes that other packages of this process declared harmless to torch.load."""
    added = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        add_safe_globals(added)


def _find_wrong_format(state: object) -> str | None:
    found = state.get("format") if type(state) is dict else None
    if type(found) is not str or not found.startswith("smollm2-train/"):
        return "it is no checkpoint of this program"
    if found != FORMAT:
        return (
            f"it is of format {found[:40]!r} and this version reads {FORMAT!r}; a newer version of the program reads it"
        )
    return None


def _find_wrong_value(state: State, tensor_bytes: int) -> str | None:
    """A value of a kind that no checkpoint has, or tensors of another size than the file's; None where there is none."""
    storages: dict[int, int] = {}
    for name, value in _walk(state):
        if type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu":
            # A file of 1.5 kB can hold a tensor of 10^12 entries that are all the same byte.
            storages[value.data_ptr()] = value.nbytes
            if value.untyped_storage().nbytes() != value.nbytes:
                return f"{name[:80]!r} is a tensor that is not as large as it says"
        elif type(value) not in SCALARS:
            return f"{name[:80]!r} is a {type(value).__name__}, which no checkpoint holds"
    if sum(storages.values()) != tensor_bytes:
        return f"its tensors should take {tensor_bytes:,} bytes and take {sum(storages.values()):,}"
    return None


def _find_wrong_entry(state: State) -> str | None:
    """The first entry that is absent, or is not what it must be; None where there is none."""
    for name, kinds in {**ENTRIES, **LATER_ENTRIES}.items():
        value: object = state
        for part in name.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is ... and name in ENTRIES:
            return f"{name} is missing"
        if value is not ... and type(value) not in kinds:
            return f"{name} is a {type(value).__name__} and must be a {kinds[0].__name__}"
    for name, optimizer in state["optimizer"].items():
        if not isinstance(optimizer, dict):
            return f"optimizer.{str(name)[:80]!r} is a {type(optimizer).__name__} and must be a dict"
        for part, kind in (("parameters", list), ("state", dict)):
            if type(optimizer.get(part)) is not kind:
                return f"optimizer.{str(name)[:80]!r}: {part} is missing or no {kind.__name__}"
    model = state["model"]
    for name, weight in model.items():
        if type(name) is not str or type(weight) is not Tensor:
            return f"{str(name)[:80]!r} in model is no tensor"
    for pair in state["tied"]:
        if not (type(pair) is list and len(pair) == 2 and all(type(name) is str for name in pair) and pair[1] in model):
            return "tied does not name tensors of the model"
    return None


def _find_wrong_weight(model: Mapping[str, Tensor]) -> str | None:
    """A weight that is NaN or infinite; None where there is none. Its extremes say so without a copy of its size."""
    for name, weight in model.items():
        if weight.is_floating_point() and weight.numel() and not all(map(torch.isfinite, weight.aminmax())):
            return f"{name[:80]!r} in model holds values that are not finite"
    return None


def _walk(state: object) -> Iterator[tuple[str, object]]:
    """Every value that is no container, by its dotted name; a file may nest 100,000 deep, so nothing recurses.

    Raises CheckpointError for a container that is too deep, or stands in two places: in itself, it would have no end.
    """
    waiting: list[tuple[str, object, int]] = [("", state, 0)]
    seen: set[int] = set()
    while waiting:
        name, value, depth = waiting.pop()
        if not isinstance(value, dict | list | tuple):
            yield name, value
            continue
        if depth > MAX_DEPTH or (value and id(value) in seen):
            raise CheckpointError(f"{name[:80]!r} is nested in a way that no checkpoint is")
        seen.add(id(value))
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if type(key) not in (str, int):
                raise CheckpointError(f"{name[:80]!r} has a key that is a {type(key).__name__}")
            waiting.append((f"{name}.{key}" if name else str(key), child, depth + 1))


def _to_plain(value: Any, name: str, to_host: Callable[[Tensor, str], Tensor] = lambda tensor, _: tensor.cpu()) -> Any:
    """A copy of plain containers and values, tensors on the CPU. Raises TypeError naming what a checkpoint cannot hold."""
    if isinstance(value, Tensor):
        return _stand_alone(to_host(value.detach(), name), name)
    if isinstance(value, Mapping):
        wrong = next((key for key in value if type(key) not in (str, int)), None)
        if wrong is not None:
            raise TypeError(f"{name} has the key {wrong!r}, a {type(wrong).__name__}")
        return {key: _to_plain(child, f"{name}.{key}", to_host) for key, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_plain(child, f"{name}.{number}", to_host) for number, child in enumerate(value))
    if type(value) not in SCALARS:
        # A numpy number looks like one of Python's until weights_only refuses the file that holds it.
        raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; convert it first")
    return value


def _stand_alone(host: Tensor, name: str) -> Tensor:
    """The tensor alone in its storage: a view would write all that it is a view of."""
    host = host.contiguous()
    if type(host) is not Tensor:
        raise TypeError(f"{name} is a {type(host).__name__}, which a checkpoint cannot hold; gather it first")
    return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()


def _separate_ties(model: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Each tensor once, and pairs (another name, the name it is kept under). On the device: copies share nothing."""
    kept: dict[str, Tensor] = {}
    tied: list[list[str]] = []
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in model.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = names.setdefault(place, name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor
        else:
            tied.append([name, first])
    return kept, tied


def _estimate_size(content: State) -> int:
    """Bytes of the file, a little too many: tensors with their records, texts, and 2 % more."""
    total = 1 << 16
    for name, value in _walk(content):
        total += len(name) + 64
        if isinstance(value, Tensor):
            total += value.nbytes + 512
        elif isinstance(value, str | bytes):
            total += 4 * len(value)
    return int(total * 1.02)


def _read_best(folder: Path) -> dict[str, Any] | None:
    """What best.json says; None where it is absent or damaged."""
    try:
        best = json.loads((folder / BEST).read_bytes())
    except (OSError, ValueError):
        return None
    sound = isinstance(best, dict) and isinstance(best.get("file"), str) and CHECKPOINT.fullmatch(best["file"])
    return best if sound and type(best.get("validation_loss")) is float else None


def _to_json(value: Mapping[str, str | int | float]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
