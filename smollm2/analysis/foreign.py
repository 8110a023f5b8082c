"""Somebody else's model under the checks: how it is loaded, called, trained for a moment, and compared with another one."""

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smollm2.analysis.checks import Check, Finding, judge, skip_check, skipped
from smollm2.analysis.gradient_checks import DIFFERENCES
from smollm2.analysis.model_checks import ANY_MODEL
from smollm2.analysis.probe import IN_16_BITS, Probe, evaluating
from smollm2.config.schema import IGNORE_INDEX
from smollm2.errors import ConfigError

LENGTHS = (64, 32, 16, 8, 128, 256, 512, 1024)
"""Positions of the inputs: the first number with which the model can be called."""

LEARNED_STEPS, LEARNED_IDS, LEARNED_RATE, LEARNED = 300, 16, 1e-3, 0.9
"""The steps of the next-token task at most, the ids in it, AdamW's rate, and the share of predictions that ends it. Most
models need less than 60 steps."""


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
    loader = SourceFileLoader(f"_verified_{file.stem}", str(file))  # whatever the file's suffix is
    spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        sys.modules[spec.name] = module
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
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
    model = call(
        load_object(where, "MODEL"), where, "MODEL", "make it a function without arguments that returns the model"
    )
    if not isinstance(model, nn.Module):
        raise ConfigError("MODEL", f"{where} returned {type(model).__name__}", "return a torch.nn.Module")
    return model


def open_data(where: str) -> Iterable[Any]:
    """Return the batches that `path/file.py:batches` is or returns. Raise ConfigError if there are none to iterate over."""
    found, advice = load_object(where, "--data"), "make it a function without arguments that yields (input_ids, labels)"
    found = call(found, where, "--data", advice) if callable(found) else found
    if not isinstance(found, Iterable):
        raise ConfigError("--data", f"{where} returned {type(found).__name__}", advice)
    return found


def call(function: Callable[[], Any], where: str, flag: str, advice: str) -> Any:
    """Return what a function returns. Raise ConfigError, with the first line of its message, if it raises an error."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise ConfigError(flag, f"{where} ended with {type(error).__name__}: {lines[0]}", advice) from None


def logits_of(output: Any) -> Tensor:
    """Return the logits (B, T, V) of a model's output: a tensor, a tuple that begins with them, or an object's `.logits`."""
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) else found
    found = found.get("logits") if isinstance(found, Mapping) else found
    if not isinstance(found, Tensor) or found.ndim != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError("MODEL", f"the model returns {shape}", SHAPE)
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
    most = min([max(LENGTHS), *(one for one in found if isinstance(one, int))])
    problem = None
    for length in dict.fromkeys(min(one, most) for one in LENGTHS):
        try:
            vocabulary, padding = find_ids(model, torch.zeros(1, length, dtype=torch.int64, device=first.device))
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines() or ["no message"]
            what = f"it cannot be called with ids of shape (1, {length}): {type(error).__name__}: {lines[0]}"
            problem = problem or ConfigError("MODEL", what, WRAP)
        else:
            probe = Probe(model, vocabulary, first.device, length, lambda ids, _: logits_of(model(ids)))
            return Foreign(replace(probe, may_freeze=True, padding_id=padding), loss, batches)
    assert problem
    raise problem from None


WRAP = "return a module that maps token ids (batch, positions) to logits, if need be one that calls yours"
SHAPE = "return logits of shape (batch, positions, vocabulary), one row for each position"


def find_ids(model: nn.Module, ids: Tensor) -> tuple[int, int | None]:
    """Return the number of ids that the model takes and gives logits, and its padding id; `ids` (1, T) are zeros.

    The number may be smaller than the head, whose last rows are often padding. Raise ConfigError if the logits' shape is wrong.
    """
    read: list[nn.Embedding] = []

    def keep(module: nn.Embedding, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and torch.equal(inputs[0], ids):  # and not positions
            read.append(module)

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_pre_hook(keep) for module in embeddings]
    try:
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(ids))
    finally:
        for handle in handles:
            handle.remove()
    if logits.shape[:2] != ids.shape or not logits.is_floating_point():
        raise ConfigError(
            "MODEL",
            f"the model returns {logits.dtype} {tuple(logits.shape)} for ids of shape {tuple(ids.shape)}",
            SHAPE,
        )
    used = (logits != -torch.inf).any(1)[0].nonzero()  # minus infinity excludes ids that no token has
    tokens = max(read, key=lambda one: one.num_embeddings, default=None)
    count = min(tokens.num_embeddings if tokens else logits.shape[-1], int(used.max()) + 1 if len(used) else 0)
    if count < 2:
        raise ConfigError("MODEL", f"the model has {count} ids", "return a model with a vocabulary of two or more")
    return count, tokens.padding_idx if tokens else None


def list_foreign_checks(foreign: Foreign) -> list[tuple[Check[Any], Any]]:
    """Return the checks of somebody else's model, each with its subject.

    The model of the checks is a copy as copy_for_checks makes it. A model that cannot be copied is checked itself, and what
    moves weights is skipped.
    """
    try:
        model = copy_for_checks(foreign.probe.module)
        trained = make_foreign(copy.deepcopy(model) if foreign.loss else model, foreign.loss)
    except Exception as error:  # locks, weights that are computed from others
        reason = f"the model cannot be copied ({type(error).__name__})"
        probe, trained = foreign.probe, foreign
        moving = [skip_check(DIFFERENCES, reason), skip_check(FOREIGN[0], reason)]
    else:
        probe, moving = make_foreign(model).probe, [DIFFERENCES, FOREIGN[0]]
    read_only = [check for check in ANY_MODEL if check.name != "documents"]
    return [
        *((check, probe) for check in (*read_only, moving[0])),
        (moving[1], trained),
        (FOREIGN[1], foreign),
    ]


@torch.no_grad()
def copy_for_checks(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every check can see what it looks for.

    Parameters that are zero everywhere are drawn: projections that begin at zero would hide what comes before them. A model
    in 16 bits, whose rounding hides small effects, is converted to float32 if it can be called so.
    """
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.is_floating_point() and not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    if not any(parameter.dtype in IN_16_BITS for parameter in copied.parameters()):
        return copied
    wide = copy.deepcopy(copied).float()
    try:
        make_foreign(wide)
    except ConfigError:
        return copied
    return wide


def check_next_token(foreign: Foreign) -> Finding:
    """Train the model with its own loss on a sequence in which each token determines the next, and see what it predicts."""
    if foreign.loss is None:
        return skipped("no loss function was given (--loss)")
    shares, losses = learn_cycle(foreign.probe, foreign.loss)
    evidence = {"share of the token itself": shares[0], "of the next": shares[1], "of the one after": shares[2]}
    causes = ("the model learns the token that it reads: nothing shifts the labels", "", "the labels are shifted twice")
    if max(shares) < 0.5:
        if not all(parameter.requires_grad for parameter in foreign.probe.module.parameters()):
            return skipped("too much of the model is frozen to learn a new sequence")
        evidence |= {"first loss": losses[0], "last": losses[-1]}
        cause = f"the model does not learn in {LEARNED_STEPS} steps which token follows"
        is_slow = losses[-1] < FALLEN * losses[0]
        return Finding("warn" if is_slow else "fail", evidence, cause, "look at the loss function")
    return judge(
        shares[1] > 0.5,
        causes[max(range(3), key=shares.__getitem__)],
        "compare the logits at t with the token at t + 1, once",
        evidence=evidence,
    )


FALLEN = 0.95
"""The share of the first loss below which a model learns, though slowly."""


def learn_cycle(probe: Probe, loss_function: Callable[[nn.Module, Tensor], Tensor]) -> tuple[list[float], list[float]]:
    """Train the probe's model on sequences in which ids follow each other in a cycle, until it predicts one of them.

    Return the shares of predictions that are the token itself, the next and the one after; and the losses by step.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(LEARNED_IDS, probe.vocab_size)
    cycle, offsets = torch.randperm(count, generator=generator), torch.arange(probe.length)
    wanted = cycle[offsets % count].unsqueeze(0).to(probe.device)
    trained = [parameter for parameter in probe.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNED_RATE) if trained else None
    losses: list[float] = []
    shares = [0.0]
    while len(losses) < LEARNED_STEPS and max(shares) < LEARNED and optimizer:
        starts = torch.randint(count, (4, 1), generator=generator)
        with torch.compiler.set_stance("force_eager"):
            loss = loss_function(probe.module, cycle[(starts + offsets) % count].to(probe.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            chosen = probe.read(wanted).argmax(-1)[0].cpu()
            shares = [(chosen == cycle[(offsets + shift) % count]).float().mean().item() for shift in range(3)]
    return shares, losses


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
        batch = batch["input_ids"], batch["labels"]
    ids, labels, *_ = batch
    return torch.as_tensor(ids), torch.as_tensor(labels)


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
