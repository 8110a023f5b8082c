"""Somebody else's model under the checks: how it is loaded, called, trained for a moment, and compared with another one."""

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smollm2.analysis.checks import Check, Finding, judge, skipped
from smollm2.analysis.model_checks import ANY_MODEL, DIFFERENCES
from smollm2.analysis.probe import Probe, evaluating, largest
from smollm2.config.schema import IGNORE_INDEX
from smollm2.errors import ConfigError

LENGTH = 64
LEARNED_STEPS, LEARNED_IDS, LEARNED_RATE = 60, 16, 1e-3
"""The steps of the next-token task, the ids in it, and AdamW's rate."""

SAME = 1e-4
"""The largest difference of two outputs, relative to the largest value, that rounding of float32 explains."""


@dataclass(frozen=True)
class Foreign:
    """A model, and the loss function and data that came with it, if any."""

    probe: Probe
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None
    batches: Iterable[Any] | None = None


def load_object(where: str, flag: str) -> Any:
    """Return what `path/file.py:name` names. The file is executed, as python would.

    Raise ConfigError if it cannot be found or imported.
    """
    path, _, name = where.rpartition(":")
    advice = "write it as path/model.py:build"
    if not path or not name.isidentifier():
        raise ConfigError(flag, f"{where} does not name a function in a file", advice)
    file = Path(path)
    if not file.is_file():
        raise ConfigError(flag, f"{file} does not exist", advice)
    spec = importlib.util.spec_from_file_location(f"_verified_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            flag, f"{file} cannot be imported ({type(error).__name__}: {error})", "run it with python"
        ) from None
    finally:
        sys.path.pop(0)
    if not hasattr(module, name):
        raise ConfigError(flag, f"{file} has no {name}", advice)
    return getattr(module, name)


def build_model(where: str) -> nn.Module:
    """Return the model that `path/file.py:build` returns. Raise ConfigError if it does not return one."""
    build = load_object(where, "MODEL")
    try:
        model = build()
    except Exception as error:
        what = f"{where} ended with {type(error).__name__}: {error}"
        raise ConfigError("MODEL", what, "call it without arguments, and return the model") from None
    if not isinstance(model, nn.Module):
        raise ConfigError("MODEL", f"{where} returned {type(model).__name__}", "return a torch.nn.Module")
    return model


def logits_of(output: Any) -> Tensor:
    """Return the logits (B, T, V) of a model's output: a tensor, a tuple that begins with them, or an object's `.logits`."""
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) else found
    found = found.get("logits") if isinstance(found, Mapping) else found
    if not isinstance(found, Tensor) or found.ndim != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            "MODEL", f"the model returns {shape}", "return logits of shape (batch, positions, vocabulary)"
        )
    return found


def make_foreign(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor] | None = None, batches: Iterable[Any] | None = None
) -> Foreign:
    """Return the model with a probe. Raise ConfigError if it cannot be called with token ids."""
    first = next(model.parameters(), None)
    if first is None:
        raise ConfigError("MODEL", "the model has no parameters", "return the model that trains")
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "block_size"))
    length = min([LENGTH, *(one for one in found if isinstance(one, int))])
    ids = torch.zeros(1, length, dtype=torch.int64, device=first.device)
    try:
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(ids))
    except ConfigError:
        raise
    except Exception as error:
        what = f"it cannot be called with ids of shape (1, {length}): {type(error).__name__}: {error}"
        raise ConfigError("MODEL", what, "return a module that maps token ids (batch, positions) to logits") from None
    rows = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=logits.shape[-1])
    vocabulary = min(rows, logits.shape[-1])
    probe = Probe(model, vocabulary, first.device, length, lambda ids, documents: logits_of(model(ids)))
    return Foreign(probe, loss, batches)


def list_foreign_checks(foreign: Foreign) -> list[tuple[Check[Any], Any]]:
    """Return the checks of somebody else's model, each with its subject; what moves weights gets a copy."""
    copied = copy.deepcopy(foreign.probe.module)
    twin = make_foreign(copied).probe
    return [
        *((check, foreign.probe) for check in ANY_MODEL if check.name != "documents"),
        (DIFFERENCES, twin),
        *((check, foreign) for check in FOREIGN),
    ]


def check_next_token(foreign: Foreign) -> Finding:
    """Train a copy with its own loss on a sequence in which each token determines the next, and see what it predicts."""
    if foreign.loss is None:
        return skipped("no loss function was given (--loss)")
    model = copy.deepcopy(foreign.probe.module)
    probe = make_foreign(model).probe
    generator = torch.Generator().manual_seed(0)
    count = min(LEARNED_IDS, probe.vocab_size)
    cycle = torch.randperm(count, generator=generator)
    starts = torch.randint(count, (LEARNED_STEPS, 4), generator=generator)
    offsets = torch.arange(probe.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNED_RATE)
    losses = []
    for step in range(LEARNED_STEPS):
        ids = cycle[(starts[step].unsqueeze(1) + offsets) % count].to(probe.device)
        loss = foreign.loss(model, ids)
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    ids = cycle[offsets % count].unsqueeze(0).to(probe.device)
    chosen = probe.read(ids).argmax(-1)[0].cpu()
    shares = [(chosen == cycle[(offsets + shift) % count]).float().mean().item() for shift in range(3)]
    evidence = {"share of the token itself": shares[0], "of the next": shares[1], "of the one after": shares[2]}
    causes = ("the model learns the token that it reads: nothing shifts the labels", "", "the labels are shifted twice")
    if max(shares) < 0.5:
        cause = "the model does not learn which token follows"
        return Finding(
            "fail", {**evidence, "first loss": losses[0], "last": losses[-1]}, cause, "look at the loss function"
        )
    return judge(
        shares[1] > 0.5,
        causes[max(range(3), key=shares.__getitem__)],
        "compare the logits at t with the token at t + 1, once",
        evidence=evidence,
    )


def check_batches(foreign: Foreign) -> Finding:
    """Compare the labels of two batches with their ids, and the batches with each other."""
    if foreign.batches is None:
        return skipped("no data were given (--data)")
    found = [as_pair(batch) for batch in islice(foreign.batches, 2)]
    if not found:
        return Finding("fail", {}, "there is no batch in the data", "yield (input_ids, labels)")
    ids, labels = found[0]
    kept = labels[:, :-1] != IGNORE_INDEX
    if not kept.any():
        return Finding(
            "fail", {"labels": labels.numel()}, "every label is -100: nothing is trained", "look at the labels"
        )
    ahead = (labels[:, :-1][kept] == ids[:, 1:][kept]).float().mean().item()
    here = (labels == ids)[labels != IGNORE_INDEX].float().mean().item()
    evidence = {"share of labels that are the next token": ahead, "the token itself": here}
    if len(found) == 2 and torch.equal(found[0][0], found[1][0]):
        return Finding("fail", evidence, "two batches are the same", "look at how the data are drawn")
    return judge(
        max(ahead, here) > 0.99,
        "the labels are neither the next tokens nor the tokens themselves",
        "shift by one, in the data or in the loss",
        evidence=evidence,
    )


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return (input_ids, labels), each (B, T), of a batch: a pair, or a mapping with these names."""
    if isinstance(batch, Mapping):
        return batch["input_ids"], batch["labels"]
    ids, labels, *_ = batch
    return ids, labels


FOREIGN: list[Check[Foreign]] = [
    Check(
        "next token",
        "loss and step",
        "The loss function trains the model to predict the next token.",
        "A copy is trained for 60 steps on a sequence in which each token determines the next; it must predict the next one.",
        "A shift that depends on the data.",
        check_next_token,
    ),
    Check(
        "batches",
        "data",
        "Labels are the next tokens, or the tokens themselves for a loss that shifts; batches differ.",
        "Two batches of the data are compared.",
        "Batches after the second.",
        check_batches,
    ),
]


@dataclass(frozen=True)
class Divergence:
    """The first place at which two models differ, and the places that agreed before it."""

    place: str
    difference: float
    agreed: int
    logits: float


def compare_layers(first: nn.Module, second: nn.Module, ids: Tensor) -> Divergence:
    """Return where two models, run on the same ids (B, T), first differ; `place` is empty if nowhere.

    Submodules are matched by name if the names agree after their prefixes are cut, else by the order of outputs that have
    the same shape. Differences are relative to the largest value.
    """
    ours, theirs = record(first, ids), record(second, ids)
    logits = relative(ours.pop(""), theirs.pop(""))
    pairs = list(match(ours, theirs))
    for agreed, (name, one, other) in enumerate(pairs):
        if not (found := relative(one, other)) <= SAME:
            return Divergence(name, found, agreed, logits)
    return Divergence("the logits" if not logits <= SAME else "", logits, len(pairs), logits)


def record(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the output (B, T, ...) of every submodule in order of completion; the logits are under the empty name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.ndim > 2 and first.shape[:2] == ids.shape:
            found.setdefault(name, first.detach().float())

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(ids)).float()
    finally:
        for handle in handles:
            handle.remove()
    found[""] = logits
    return found


def match(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Yield (name, output, output) of the submodules that belong together, in the order of ours."""
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    if len(shared) * 2 >= min(len(ours), len(theirs)):
        yield from ((name, ours[name], theirs[name]) for name in shared)
        return
    wide = [[(n, x) for n, x in side.items() if not list_children(n, side)] for side in (ours, theirs)]
    for (name, one), (other_name, other) in zip(*wide, strict=False):
        if one.shape != other.shape:
            return
        yield f"{name} (there {other_name})", one, other


def list_children(name: str, names: Iterable[str]) -> list[str]:
    """Return the submodules inside `name`."""
    return [one for one in names if one.startswith(f"{name}.")]


def relative(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite if the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return largest(one - other) / max(largest(other), 1e-30)
