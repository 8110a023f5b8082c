"""The folder `events/step_XXXX` of an autopsy: what happened, the documents of the batch, and what a replay needs.

event.json      numbers, verdict, norms by parameter, activations by block
documents.md    the documents of the batch, decoded, the one with the highest loss first
batch.npz       the batch, for the replay
step_XXXX.pt    the checkpoint before the step, of the first events of a run
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smollm2.analysis.diagnostics import measure_activations
from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.format import State
from smollm2.checkpoint.saving import save_state
from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.windows import Batch, number_documents
from smollm2.errors import Smollm2Error
from smollm2.runtime.device import machine_facts
from smollm2.runtime.sharding import ALONE, Layout, gather_state, is_part, local
from smollm2.storage.atomic import write_atomically
from smollm2.storage.run_folder import EVENT, EVENT_FOLDERS, checkpoint_path, event_path
from smollm2.tracking.base import CONTROLS, describe
from smollm2.tracking.jsonl import replace_nonfinite
from smollm2.training.causes import NOT_FINITE, Evidence, describe_verdict
from smollm2.training.optim import learning_rate_at
from smollm2.training.progress import Progress
from smollm2.training.resume import state_of
from smollm2.training.setup import Run

DOCUMENTS, BATCH = "documents.md", "batch.npz"
MAX_WEIGHTS = 3
"""Events of one run that keep the checkpoint before the step."""

MAX_DOCUMENTS, MAX_CHARACTERS = 100, 2000

DECISIONS = {
    "keep": "The update is made",
    "skip": "The update is not made",
    "stop": "The update is not made, and the run stops",
    "rewind": "The update is not made, and the run rewinds",
}


def count_events(folder: Path) -> int:
    """Return the number of autopsies in a run folder."""
    return len(list((folder / EVENT_FOLDERS).glob(f"*/{EVENT}")))


@dataclass(frozen=True)
class SharedFacts:
    """What an event has from all ranks: norms by parameter, and the state before the step, or why it is not kept."""

    norms: Mapping[str, object]
    state: State
    problem: str = ""


def gather_facts(run: Run, progress: Progress) -> SharedFacts:
    """Return what the event of the step after `progress` has from all ranks. All ranks call this; rank 0 gets the state."""
    layout = run.runtime.layout
    norms = {
        "gradient_norms": {n: norm(p.grad, layout) for n, p in run.model.named_parameters() if p.grad is not None},
        "weight_norms": {name: norm(p, layout) for name, p in run.model.named_parameters()},
        "optimizer_norms": optimizer_norms(run),
    }
    if run.runtime.gather(len(list((run.folder / EVENT_FOLDERS).glob("*/step_*.pt"))))[0] >= MAX_WEIGHTS:
        return SharedFacts(norms, {}, f"the weights are not kept, because {MAX_WEIGHTS} events have theirs")
    if run.saves_folders:
        return SharedFacts(norms, {}, "the weights are not kept, because one file of them takes long to write")
    return SharedFacts(norms, gather_state(state_of(run, progress), tied=run.config.model.tie_word_embeddings))


def write_event(
    run: Run, progress: Progress, size: int, evidence: Evidence, shared: SharedFacts, *, takes_rerun: bool
) -> None:
    """Write the folder of the step after `progress`, and report the verdict. A failure is reported; the run continues.

    The model must be whole on this rank.
    """
    step = progress.step + 1
    folder, text = event_path(run.folder, step), f"{describe_verdict(evidence)}. {decision(run, evidence, takes_rerun)}"
    kept = f"{folder} has the batch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        batch = run.batches.read(progress.step, 0, run.config.global_batch_size)
        documents = rank_documents(run, batch, run.batches.window_ids(progress.step).tolist())
        weights = save_weights(shared, folder)
        content = {
            **facts(run, progress, size, evidence),
            **shared.norms,
            "verdict": text,
            "weights": weights,
            "documents": [{**one, "text": one["text"][:200]} for one in documents[:MAX_DOCUMENTS]],
        }
        arrays = {name: array for name, array in batch._asdict().items() if array is not None}
        np.savez_compressed(buffer := io.BytesIO(), **arrays)
        write_atomically(folder / BATCH, buffer.getvalue())
        write_atomically(folder / DOCUMENTS, to_markdown(text, documents).encode("utf-8", "backslashreplace"))
        write_atomically(folder / EVENT, to_json(content))
        kept += (
            f" and the weights before it: smollm2 replay {folder}" if (folder / weights).is_file() else f"; {weights}"
        )
    except Exception as error:  # a full disk, for example: the run matters more than its autopsy
        kept = f"{folder} could not be written ({describe(error)})"
    run.tracker.log_event("autopsy", f"{text}. {kept}", step, cause=evidence.cause)


def decision(run: Run, evidence: Evidence, takes_rerun: bool) -> str:
    """Return what becomes of the step."""
    if takes_rerun:
        return "The step continues with the gradient of the rerun"
    if evidence.problem == NOT_FINITE:
        return "The update is not made"
    return f"{DECISIONS[run.config.training.on_spike]} (training.on_spike {run.config.training.on_spike})"


def save_weights(shared: SharedFacts, folder: Path) -> str:
    """Write the checkpoint before the step into `folder`; return its name, or why it was not written."""
    if shared.problem:
        return shared.problem
    try:
        return save_state(folder, shared.state, is_newest=False).name
    except Smollm2Error as error:
        return f"the weights are not kept ({error})"


def facts(run: Run, progress: Progress, size: int, e: Evidence) -> dict[str, Any]:
    """Return the entries of event.json that are known before the update."""
    batch = run.batches.read(progress.step, 0, min(size, run.config.global_batch_size))
    ids, _, *documents = (run.runtime.to_device(array) for array in batch if array is not None)
    with run.runtime.autocast():
        activations = measure_activations(run.model, ids, *documents)
    pairs = {"recorded": e.recorded, "again": e.again, "float32": e.float32, "batch_before": e.before}
    return {
        "step": e.step,
        "problem": e.problem,
        "cause": e.cause,
        "loss": e.recorded.loss,
        "grad_norm": e.recorded.grad_norm,
        "exact": {n: {"loss": one.loss.hex(), "grad_norm": one.grad_norm.hex()} for n, one in pairs.items() if one},
        "learning_rate": learning_rate_at(progress.step, run.config.training),
        "rates": list(progress.rates),
        "losses": list(progress.losses),
        "norms": list(progress.norms),
        "windows": run.batches.window_ids(progress.step).tolist(),
        "micro_batch": size,
        "activations": activations,
        "env": machine_facts(run.runtime),
    }


def norm(tensor: Tensor, layout: Layout = ALONE) -> float:
    """Return the norm of a tensor. For a DTensor this is a collective."""
    own = torch.linalg.vector_norm(local(tensor.detach()), dtype=torch.float32)
    return float(layout.combine_norms([own])[0] if is_part(tensor) else own)


def optimizer_norms(run: Run) -> dict[str, dict[str, float]]:
    """Return the norm of each tensor of the optimizers' state by parameter."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in run.model.named_parameters()}
    return {
        names[parameter]: {
            key: norm(value, run.runtime.layout) for key, value in state.items() if isinstance(value, Tensor)
        }
        for optimizer in run.optimizers.values()
        for parameter, state in optimizer.state.items()
    }


@torch.no_grad()
def rank_documents(run: Run, batch: Batch, windows: list[int]) -> list[dict[str, Any]]:
    """Return the documents of a batch, or the parts of them that a window has, with the highest loss first."""
    found: list[dict[str, Any]] = []
    for row, window in enumerate(windows):
        ids, labels = batch.input_ids[row], batch.labels[row]
        losses = token_losses(run, Batch(*(None if array is None else array[row : row + 1] for array in batch)))  # type: ignore[arg-type]
        numbers = number_documents(ids, run.tokenizer.document_end)
        for number in np.unique(numbers):
            here = (numbers == number) & (labels != IGNORE_INDEX)
            if here.any():
                text = CONTROLS.sub(" ", run.tokenizer.decode(ids[here].tolist()))
                found.append(
                    {"loss": float(losses[here].mean()), "tokens": int(here.sum()), "window": window, "text": text}
                )
    return sorted(found, key=lambda one: np.inf if np.isnan(one["loss"]) else one["loss"], reverse=True)


def token_losses(run: Run, window: Batch) -> np.ndarray:
    """Return the loss of each target of one window (1, T); 0 where there is none."""
    ids, labels, *documents = (run.runtime.to_device(array) for array in window if array is not None)
    with run.runtime.autocast(), torch.compiler.set_stance("force_eager"):
        logits = run.model.lm_head(run.model.model(ids, *documents))
    losses = F.cross_entropy(logits[0].float(), labels[0], ignore_index=IGNORE_INDEX, reduction="none")
    found: np.ndarray = losses.cpu().numpy()
    return found


def to_markdown(verdict: str, documents: list[dict[str, Any]]) -> str:
    """Return documents.md. The texts are indented, so that nothing in them is read as markup."""
    lines = [f"{verdict}.", ""]
    for one in documents[:MAX_DOCUMENTS]:
        lines += [f"- loss {one['loss']:.4f}, {one['tokens']} tokens, window {one['window']}:", ""]
        lines += ["      " + one["text"][:MAX_CHARACTERS], ""]
    if len(documents) > MAX_DOCUMENTS:
        lines.append(f"{len(documents) - MAX_DOCUMENTS} more have a lower loss.")
    return "\n".join(lines) + "\n"


def to_json(content: dict[str, Any]) -> bytes:
    """Return event.json; JSON has no NaN, so a number that is not finite is null there and exact in `exact`."""
    return (json.dumps(replace_nonfinite(content), indent=1, allow_nan=False) + "\n").encode()


def add_update_norms(run: Run, step: int) -> None:
    """Add the norm of each parameter's update to the event of a step, now that it is made, if the weights are kept.

    If the model is shared out, no rank has all of an update, and the event is left as it is.
    """
    folder = event_path(run.folder, step)
    weights = checkpoint_path(folder, step - 1)
    try:
        if not weights.is_file() or run.runtime.layout.is_sharded:
            return
        before, content = load_checkpoint(weights)["model"], json.loads((folder / EVENT).read_bytes())
        changes = {name: norm(p.detach().cpu() - before[name]) for name, p in run.model.named_parameters()}
        write_atomically(folder / EVENT, to_json({**content, "update_norms": changes}))
    except Exception as error:
        run.tracker.log_event("autopsy", f"step {step}: no norms of the update ({describe(error)})", step)
