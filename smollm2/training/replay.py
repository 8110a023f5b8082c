"""Replay of an autopsy: the step's batch runs again on the weights before it, and the numbers are compared bit by bit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.config.schema import Config
from smollm2.data.windows import Batch
from smollm2.errors import CheckpointError
from smollm2.runtime.device import machine_facts, start_runtime
from smollm2.storage.run_folder import EVENT, checkpoint_path
from smollm2.training.autopsy import rerun
from smollm2.training.causes import TRANSIENT, Numbers
from smollm2.training.setup import build_model
from smollm2.training.spike_events import BATCH
from smollm2.training.step import split


@dataclass(frozen=True)
class Replay:
    """The numbers of a step as recorded and as replayed. `expected` is what the replay must give: the recorded numbers,
    or, after a transient fault, those of the run's own rerun. `changed` lists what differs between the machines."""

    step: int
    verdict: str
    recorded: Numbers
    expected: Numbers
    replayed: Numbers
    changed: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Return whether the replay gave exactly the expected numbers."""
        return self.expected.equals(self.replayed, is_exact=True)


def replay_event(folder: Path) -> Replay:
    """Run the batch of an event again. Raise CheckpointError if the folder lacks a part, and ConfigError if this machine
    does not support the run's precision."""
    event = read_event(folder)
    step, env = event["step"], event["env"]
    recorded = read_numbers_of(event, "recorded", folder)
    expected = read_numbers_of(event, "again", folder) if event["cause"] == TRANSIENT else recorded
    weights = checkpoint_path(folder, step - 1)
    if not weights.exists():
        raise CheckpointError(
            folder, f"has no {weights.name}: {event.get('weights')}", "replay one of the first events of the run"
        )
    state = load_checkpoint(weights)
    config = Config.model_validate_json(state["config"]).with_training(precision=env["precision"], sharding="none")
    runtime = start_runtime(config.training)
    model = build_model(config, runtime)
    model.load_state_dict(state["model"])
    if state["scaler"]:
        runtime.scaler.load_state_dict(state["scaler"])
    micro_batches = split(read_batch(folder), event["micro_batch"], runtime)
    replayed = rerun(model, micro_batches, runtime, z_loss=config.training.z_loss)
    now = machine_facts(runtime)
    changed = tuple(f"{name} {old} -> {now.get(name)}" for name, old in env.items() if now.get(name) != old)
    return Replay(step, str(event.get("verdict", "")), recorded, expected, replayed, changed)


def read_event(folder: Path) -> dict[str, Any]:
    """Return event.json. Raise CheckpointError if it is missing or damaged."""
    try:
        event: dict[str, Any] = json.loads((folder / EVENT).read_bytes())
        wanted = {"step": int, "env": dict, "cause": str, "exact": dict, "micro_batch": int}
        if all(isinstance(event[name], kind) for name, kind in wanted.items()) and "precision" in event["env"]:
            return event
        problem = "is damaged"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, RecursionError):
        problem = "is damaged"
    raise CheckpointError(folder / EVENT, problem, "give a folder such as checkpoints/events/step_0500")


def read_numbers_of(event: dict[str, Any], name: str, folder: Path) -> Numbers:
    """Return exact numbers of an event."""
    try:
        found = event["exact"][name]
        return Numbers(float.fromhex(found["loss"]), float.fromhex(found["grad_norm"]))
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(folder / EVENT, "is damaged", "replay another event") from None


def read_batch(folder: Path) -> Batch:
    """Return the batch of an event. Raise CheckpointError if it is missing or damaged."""
    try:
        with np.load(folder / BATCH, allow_pickle=False) as arrays:
            return Batch(**{name: arrays[name] for name in Batch._fields if name in arrays})
    except (OSError, ValueError, TypeError, KeyError, BadZipFile, EOFError):
        raise CheckpointError(folder / BATCH, "is missing or damaged", "replay another event") from None
