"""Two ranks examine a spike together and decide alike."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import outcome
from spikes import FLAGS, LAST, SPIKE, write_text
from two_ranks import run_ranks

from smollm2.cli.main import main
from smollm2.training.replay import replay_event

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks share no GPU")


def train_on_two_ranks(folder: Path, **flags: object) -> list[str]:
    """Train on two ranks, and return the messages of the events."""
    words = [word for name, value in (FLAGS | flags).items() for word in (f"--{name.replace('__', '.')}", str(value))]
    ended = run_ranks(
        lambda rank: main(["train", "--config", "config.yaml", "--disable_wandb", "--input_file", "input.txt", *words]),
        folder,
    )
    assert [rank.code for rank in ended] == [0, 0], ended
    rows = (folder / str(flags.get("training__save_dir", "checkpoints")) / "events.jsonl").read_text().splitlines()
    return [json.loads(row)["message"] for row in rows]


def flatten(value: Any) -> Iterator[float]:
    """The numbers of nested dictionaries, in the order of their keys."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from flatten(value[key])
    else:
        yield value


@pytest.mark.slow
def test_two_ranks_name_the_data_and_rewind_alike_twice_and_after_a_resume(tmp_path: Path) -> None:
    write_text(tmp_path, with_garbage=True)
    ends = []
    for name in ("first", "second"):
        events = train_on_two_ranks(tmp_path, training__save_dir=name, training__on_spike="rewind")
        assert any(": rewound to step_" in event for event in events)
        ends.append(outcome(tmp_path / name, LAST))
    assert ends[0] == ends[1]
    found = [json.loads(path.read_text()) for path in (tmp_path / "first/events").glob("*/event.json")]
    assert {(event["cause"], len(event["documents"])) for event in found} == {("data", 4)}
    assert max(event["documents"][0]["loss"] for event in found) > 7  # the garbage
    (tmp_path / "first" / f"step_{LAST:04d}.pt").unlink()
    events = train_on_two_ranks(tmp_path, training__save_dir="first", training__on_spike="rewind", resume="auto")
    assert any("resume: step 141 is bit-exact with the run before" in event for event in events)
    assert outcome(tmp_path / "first", LAST) == ends[0]


@pytest.mark.slow
def test_the_autopsy_of_a_model_that_is_shared_out_is_that_of_one_that_is_not(tmp_path: Path) -> None:
    """Both layouts continue from one checkpoint: over 140 steps, their rounding would grow to different spikes."""
    write_text(tmp_path, with_garbage=True)
    train_on_two_ranks(tmp_path, training__save_dir="none", training__train_steps=140)
    shutil.rmtree(tmp_path / "none/events", ignore_errors=True)
    shutil.copytree(tmp_path / "none", tmp_path / "full")
    found = {}
    for sharding in ("none", "full"):
        train_on_two_ranks(tmp_path, training__save_dir=sharding, training__sharding=sharding, resume="auto")
        found[sharding] = json.loads((tmp_path / sharding / f"events/step_{SPIKE:04d}/event.json").read_text())
    one, other = found["none"], found["full"]
    assert (one["cause"], one["windows"], one["weights"]) == (other["cause"], other["windows"], other["weights"])
    assert [document["text"] for document in one["documents"]] == [document["text"] for document in other["documents"]]
    for name in ("gradient_norms", "weight_norms", "optimizer_norms", "activations"):
        numbers = [list(flatten(event[name])) for event in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6), name  # some gradients are nearly zero


@pytest.mark.slow
def test_the_event_of_a_model_that_is_shared_out_is_replayed_by_one_process(tmp_path: Path) -> None:
    write_text(tmp_path, with_garbage=True)
    train_on_two_ranks(tmp_path, training__sharding="full")
    replay = replay_event(tmp_path / "checkpoints/events" / f"step_{SPIKE:04d}")
    assert replay.replayed.loss == pytest.approx(replay.recorded.loss, rel=1e-5)
    assert replay.replayed.grad_norm == pytest.approx(replay.recorded.grad_norm, rel=1e-5)
    assert "world_size 2 -> 1" in replay.changed
