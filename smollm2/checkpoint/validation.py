"""Read checkpoints as untrusted files.

torch.load does not detect a flipped bit (588 of 600 such files loaded with wrong numbers). The archive has checksums,
which are verified on each save and each load.
"""

import copy
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from smollm2.checkpoint.format import ENTRIES, FORMAT, LATER_ENTRIES, SCALARS, State, walk
from smollm2.errors import CheckpointError

MAX_RECORDS = 100_000
TENSOR_RECORD = re.compile(r"[^/]+/data/[0-9]+")


def read_checked(path: Path) -> State:
    """Return the verified state stored in a file, with its tensors memory-mapped.

    Raise CheckpointError, whose message is only the reason, if the file is not a valid checkpoint.
    """
    try:
        tensor_bytes = _check_archive(path)
        with _no_added_globals():
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        problem = (
            _find_wrong_format(state)
            or _find_wrong_value(state, tensor_bytes)
            or find_wrong_entry(state)
            or find_wrong_weight(state["model"])
        )
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # given arbitrary bytes, the parsers can raise almost any exception
        # torch's message is not passed on: it advises weights_only=False, which runs the file's code.
        raise CheckpointError(f"is damaged, or is not a checkpoint of this program ({type(error).__name__})") from None
    if problem:
        raise CheckpointError(problem)
    checked: State = state
    return checked


def detach_from_disk(state: State) -> State:
    """Return a copy of the state that is not memory-mapped, with each tied tensor under all of its names."""
    state = copy.deepcopy(state)
    for alias, name in state.pop("tied"):
        state["model"][alias] = state["model"][name]
    return state


def _check_archive(path: Path) -> int:
    """Return the total size in bytes of the tensors in a zip archive as torch writes it.

    Raise CheckpointError if the file is not such an archive, or is damaged. Nothing in the file is interpreted before
    this check.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("is not a regular file")
    if status.st_size == 0:
        raise CheckpointError("is empty")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        names = {record.filename for record in records}
        if len(names) < len(records) or len(records) > MAX_RECORDS:
            raise CheckpointError("is an archive with duplicate names, or with too many files")
        if any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError("is a TorchScript program, not a checkpoint")
        if not all(map(_is_plain_record, records)) or sum(r.file_size for r in records) > status.st_size:
            raise CheckpointError("is an archive that is compressed, or that has paths leading out of it")
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f"is damaged: {damaged!r} does not match its checksum")
    return sum(record.file_size for record in records if TENSOR_RECORD.fullmatch(record.filename))


def _is_plain_record(record: zipfile.ZipInfo) -> bool:
    parts = record.filename.split("/")
    return (
        record.compress_type == zipfile.ZIP_STORED and "\\" not in record.filename and not {"", ".", ".."} & set(parts)
    )


@contextmanager
def _no_added_globals() -> Iterator[None]:
    """Disable, inside the `with` block, the classes that other packages in this process have allowed for torch.load."""
    added = get_safe_globals()
    clear_safe_globals()
    try:
        yield
    finally:
        add_safe_globals(added)


def _find_wrong_format(state: object) -> str | None:
    found = state.get("format") if type(state) is dict else None
    if type(found) is not str or not found.startswith("smollm2-train/"):
        return "is not a checkpoint of this program"
    if found != FORMAT:
        return f"has the format {found[:40]!r}, but this version reads {FORMAT!r}; use a newer version of the program"
    return None


def _find_wrong_value(state: State, tensor_bytes: int) -> str | None:
    """Return what is wrong if a value's type is not allowed or the tensors' size is not `tensor_bytes`; else None."""
    storages: dict[int, int] = {}
    for name, value in walk(state):
        if type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu":
            # A file of 1.5 kB can contain a tensor of 10^12 elements that all share the same byte.
            storages[value.data_ptr()] = value.nbytes
            if value.untyped_storage().nbytes() != value.nbytes:
                return f"{name[:80]!r} is a tensor whose storage has another size"
        elif type(value) not in SCALARS:
            return f"{name[:80]!r} is of type {type(value).__name__}, which is not allowed in a checkpoint"
    if sum(storages.values()) != tensor_bytes:
        return f"has tensors of {sum(storages.values()):,} bytes instead of {tensor_bytes:,}"
    return None


def find_wrong_entry(state: State) -> str | None:
    """Return what is wrong with the first entry that is missing or has the wrong type, or None."""
    for name, kinds in {**ENTRIES, **LATER_ENTRIES}.items():
        value: object = state
        for part in name.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is ... and name in ENTRIES:
            return f"{name} is missing"
        if value is not ... and type(value) not in kinds:
            return f"{name} is of type {type(value).__name__}, but must be a {kinds[0].__name__}"
    for name, optimizer in state["optimizer"].items():
        if not isinstance(optimizer, dict):
            return f"optimizer.{str(name)[:80]!r} is of type {type(optimizer).__name__}, but must be a dict"
        for part, kind in (("parameters", list), ("state", dict)):
            if type(optimizer.get(part)) is not kind:
                return f"optimizer.{str(name)[:80]!r}: {part} is missing or not a {kind.__name__}"
    model = state["model"]
    for name, weight in model.items():
        if type(name) is not str or type(weight) is not Tensor:
            return f"{str(name)[:80]!r} in model is not a tensor"
    for pair in state["tied"]:
        if not (type(pair) is list and len(pair) == 2 and all(type(name) is str for name in pair) and pair[1] in model):
            return "tied does not consist of pairs of tensor names"
    return None


def find_wrong_weight(model: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong if a weight has a NaN or infinite value, or None.

    Checking the minimum and maximum needs no copy of the weight.
    """
    for name, weight in model.items():
        if weight.is_floating_point() and weight.numel() and not all(map(torch.isfinite, weight.aminmax())):
            return f"{name[:80]!r} in model contains values that are not finite"
    return None
