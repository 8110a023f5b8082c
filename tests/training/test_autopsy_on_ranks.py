"""Two ranks examine a spike together and decide alike."""

import json
from pathlib import Path

import pytest
import torch
from runs import outcome
from spikes import FLAGS, LAST, SPIKE, write_text
from two_ranks import run_ranks

from smollm2.cli.main import main

pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks share no GPU"), pytest.mark.slow]


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


def test_a_model_that_is_shared_out_has_no_autopsy_but_follows_the_policy(tmp_path: Path) -> None:
    write_text(tmp_path, with_garbage=True)
    events = train_on_two_ranks(tmp_path, training__on_spike="rewind", training__sharding="full")
    assert any(f"step {SPIKE}: rewound to step_0140" in event for event in events)
    assert not (tmp_path / "checkpoints/events").exists()
    log = (tmp_path / "checkpoints/run.log").read_text()
    assert f"step {SPIKE}: no autopsy, because the model is shared out" in log
