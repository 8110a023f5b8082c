"""A spike is examined before the update: its cause is named, it can be replayed, and the run follows training.on_spike."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, outcome, weights
from spikes import LAST, SPIKE, config_of, event_of, write_text

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.saving import save_checkpoint
from smollm2.cli.main import main
from smollm2.errors import TrainingError
from smollm2.report.reading import read_run
from smollm2.training import autopsy, loop
from smollm2.training.causes import Evidence, Numbers, describe_verdict, find_jump, weigh
from smollm2.training.loop import train


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a batch of garbage at step SPIKE, whose update was made."""
    folder = write_text(tmp_path_factory.mktemp("spoiled"), with_garbage=True)
    train(config_of(folder))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a spike."""
    folder = write_text(tmp_path_factory.mktemp("sound"), with_garbage=False)
    train(config_of(folder))
    return folder


def test_a_sound_run_has_no_events(sound: Path) -> None:
    assert not (sound / "checkpoints/events").exists()


def test_a_batch_of_garbage_is_named_as_the_cause(spoiled: Path) -> None:
    event = event_of(spoiled, SPIKE)
    assert (event["problem"], event["cause"]) == ("loss", "data")
    assert "The cause is the data: the batch before has a loss of " in event["verdict"]


def test_the_documents_of_the_batch_are_ranked_by_their_loss(spoiled: Path) -> None:
    documents = event_of(spoiled, SPIKE)["documents"]
    assert [one["loss"] for one in documents] == sorted((one["loss"] for one in documents), reverse=True)
    assert len(documents) == 4 and all(set(one["text"][:-1]) <= set("~^|{}@#$%&*<>=_") for one in documents)
    page = (spoiled / "checkpoints/events" / f"step_{SPIKE:04d}" / "documents.md").read_text()
    assert f"      {documents[0]['text']}" in page


def test_an_event_has_the_norms_of_each_parameter_and_the_extremes_of_each_block(spoiled: Path) -> None:
    event, names = event_of(spoiled, SPIKE), set(weights(spoiled / "checkpoints", LAST))
    for kind in ("gradient_norms", "weight_norms", "update_norms"):
        assert set(event[kind]) == names - {"lm_head.weight"} and all(value > 0 for value in event[kind].values())
    assert event["optimizer_norms"]["model.norm.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert event["activations"]["model.layers.1"]["max_abs"] > 0
    total = sum(value**2 for value in event["gradient_norms"].values()) ** 0.5
    assert total == pytest.approx(event["grad_norm"], rel=1e-5)


def continued(source: Path, folder: Path, step: int = 120, **flags: object) -> Path:
    """A copy of the run, trained again from the checkpoint of `step`: a resume has the same bits as a run from the start."""
    copy = Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("events")))
    train(config_of(copy, **flags), checkpoint_path=copy / "checkpoints" / f"step_{step:04d}.pt")
    return copy


def test_an_autopsy_changes_no_bit_of_the_run(spoiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autopsy, "MAX_EVENTS", 0)
    without = continued(spoiled, tmp_path / "without")
    assert not (without / "checkpoints/events").exists()
    assert outcome(without / "checkpoints", LAST) == outcome(spoiled / "checkpoints", LAST)


def test_a_replay_gives_the_recorded_numbers_bit_for_bit(spoiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = [row for row in metrics(spoiled / "checkpoints") if row["step"] == SPIKE and "loss" in row]
    assert main(["replay", str(spoiled / "checkpoints/events" / f"step_{SPIKE:04d}")]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = f"loss {row['loss']:.10g}, gradient norm {row['grad_norm']:.10g}"
    assert lines == [f"step {SPIKE} recorded: {numbers}", f"step {SPIKE} replayed: {numbers}", "bit-exact"]


def change_record(event: Path) -> None:
    content = json.loads((event / "event.json").read_text())
    content["exact"]["recorded"]["loss"] = (content["loss"] + 1e-3).hex()
    content["env"]["threads"] = 64
    (event / "event.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (change_record, 5, "the replay differs: loss by 0.001, gradient norm by 0; what differs: threads 64 -> "),
        (lambda event: (event / f"step_{SPIKE - 1:04d}.pt").unlink(), 4, f"has no step_{SPIKE - 1:04d}.pt"),
        (lambda event: (event / "batch.npz").write_bytes(b"PK"), 4, "batch.npz: is missing or damaged"),
        (lambda event: (event / "event.json").write_text("{}"), 4, "event.json: is damaged"),
        (lambda event: (event / "event.json").unlink(), 4, "event.json: cannot be read"),
    ],
    ids=["other numbers", "no weights", "no batch", "no facts", "no event"],
)
def test_a_replay_that_differs_or_lacks_a_part_says_so(
    spoiled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    code: int,
    message: str,
) -> None:
    event = Path(shutil.copytree(spoiled / "checkpoints/events" / f"step_{SPIKE:04d}", tmp_path / "event"))
    change(event)
    assert main(["replay", str(event)]) == code
    assert message in capsys.readouterr().err


def test_a_jump_of_the_rate_is_named_as_the_cause(sound: Path, tmp_path: Path) -> None:
    folder = continued(sound, tmp_path / "run", 140, training__learning_rate=1)
    step = min(int(path.name[5:]) for path in (folder / "checkpoints/events").iterdir())
    event = event_of(folder, step)
    assert event["cause"] == "rate"
    assert (
        "The cause is the learning rate: it rose from 0.01 to 1 at step 141, and the batch before" in event["verdict"]
    )


def flip_once(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Flip the highest bit of the exponent in one number of a weight's gradient, once, in the backward pass of `step`."""
    original, taken = loop.train_step, [0]  # type: ignore[attr-defined]

    def flip(gradient: torch.Tensor) -> torch.Tensor:
        handles.pop().remove()
        flipped = gradient.clone()
        flipped.view(torch.int32)[0, 0] ^= 1 << 30
        return flipped

    handles: list[Any] = []

    def train_step(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        taken[0] += 1
        if taken[0] == step:
            handles.append(model.get_parameter("model.layers.0.mlp.down_proj.weight").register_hook(flip))  # type: ignore[no-untyped-call]
        return original(model, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", train_step)


def test_a_bit_flipped_once_in_a_gradient_is_transient_and_the_run_has_the_bits_of_a_sound_one(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_once(monkeypatch, SPIKE - 120)
    folder = continued(sound, tmp_path / "run")
    event = event_of(folder, SPIKE)
    assert event["cause"] == "transient" and "The step continues with the gradient of the rerun" in event["verdict"]
    assert outcome(folder / "checkpoints", LAST) == outcome(sound / "checkpoints", LAST)
    capsys.readouterr()
    assert main(["replay", str(folder / "checkpoints/events" / f"step_{SPIKE:04d}")]) == 0
    assert "the recorded numbers came from a transient fault" in capsys.readouterr().out


def test_a_spike_is_skipped_if_so_configured(spoiled: Path, tmp_path: Path) -> None:
    flags = {"training__on_spike": "skip", "training__save_interval": 1}
    folder = continued(spoiled, tmp_path / "run", 140, **flags) / "checkpoints"
    before, after, later = (weights(folder, step) for step in (SPIKE - 1, SPIKE, SPIKE + 1))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["model.norm.weight"], later["model.norm.weight"])
    assert [row["skipped"] for row in metrics(folder) if "loss" in row][-7:] == [0] + [1] * 6


def test_a_run_stops_at_a_spike_if_so_configured_and_is_saved(spoiled: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=rf"^step {SPIKE}: the loss .* is a spike, and training.on_spike is stop; the"
    ):
        continued(spoiled, tmp_path / "run", training__on_spike="stop")
    assert (tmp_path / "run/checkpoints" / f"step_{SPIKE:04d}.pt").exists()


@pytest.fixture(scope="module")
def rewound(spoiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with the spike, rewound and finished."""
    return continued(spoiled, tmp_path_factory.mktemp("rewound") / "run", training__on_spike="rewind")


def test_a_rewind_leaves_out_the_batches_and_ends_with_the_same_weights_twice(
    spoiled: Path, rewound: Path, tmp_path: Path
) -> None:
    again = continued(spoiled, tmp_path / "again", training__on_spike="rewind")
    assert outcome(again / "checkpoints", LAST) == outcome(rewound / "checkpoints", LAST)
    events = [json.loads(line) for line in (again / "checkpoints/events.jsonl").read_text().splitlines()]
    (event,) = [event["message"] for event in events if event["kind"] == "rewind"]
    assert "rewound to step_0140.pt; the 5 batches from there to the spike are left out" in event
    losses = [row["loss"] for row in metrics(again / "checkpoints") if "loss" in row]
    assert len(losses) == LAST and max(losses[120:]) < 3


def test_a_rewound_run_that_is_resumed_ends_with_the_same_bits(rewound: Path, tmp_path: Path) -> None:
    folder = continued(rewound, tmp_path / "run", 140, training__on_spike="rewind") / "checkpoints"
    assert outcome(folder, LAST) == outcome(rewound / "checkpoints", LAST)
    assert "resume: step 141 is bit-exact with the run before" in (folder / "run.log").read_text()


def test_a_run_that_has_rewound_three_times_stops(spoiled: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(spoiled, tmp_path / "run"))
    state = load_checkpoint(copy / "checkpoints/step_0140.pt")
    state["stability"]["skips"] = [10, 0, 10, 0, 10, 0]
    save_checkpoint(copy / "checkpoints", state, step=140)
    with pytest.raises(TrainingError, match="it has a problem again after 3 rewinds"):
        train(config_of(copy, training__on_spike="rewind"), checkpoint_path=copy / "checkpoints/step_0140.pt")


def test_the_report_has_the_verdict_of_a_step_that_was_rewound(rewound: Path) -> None:
    found = [event["message"] for event in read_run(rewound / "checkpoints").events if event["kind"] == "autopsy"]
    assert found == [event_of(rewound, SPIKE)["verdict"]]


def test_an_autopsy_that_cannot_be_written_does_not_end_the_run(spoiled: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(spoiled, tmp_path / "run", ignore=shutil.ignore_patterns("events")))
    (copy / "checkpoints/events").write_text("a file where the folder should be")
    train(config_of(copy), checkpoint_path=copy / "checkpoints/step_0140.pt")
    assert outcome(copy / "checkpoints", LAST) == outcome(spoiled / "checkpoints", LAST)
    assert "step_0145 could not be written (" in (copy / "checkpoints/run.log").read_text()


def test_only_the_first_events_keep_the_weights(spoiled: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(spoiled, tmp_path / "run", ignore=shutil.ignore_patterns("events")))
    for step in (1, 2, 3):
        (copy / f"checkpoints/events/step_000{step}").mkdir(parents=True)
        (copy / f"checkpoints/events/step_000{step}/step_000{step}.pt").write_bytes(b"weights")
    train(config_of(copy), checkpoint_path=copy / "checkpoints/step_0140.pt")
    assert event_of(copy, SPIKE)["weights"] == "the weights are not kept, because 3 events have theirs"


def evidence(**found: Any) -> Evidence:
    """A step whose loss of 9 stands out from 128 near 1, in bf16, at a steady rate."""
    usual = [1.0 + 0.01 * (-1) ** i for i in range(128)]
    bad = Numbers(9.0, 1.0)
    known: dict[str, Any] = {"step": 200, "problem": "loss", "recorded": bad, "again": bad, "float32": bad}
    known |= {"before": Numbers(1.0, 1.0), "losses": usual, "norms": usual, "rates": [1e-3] * 128, "precision": "bf16"}
    return Evidence(**(known | {"is_transient": False} | found))


BAD, NAN = Numbers(8.0, 1.0), Numbers(math.nan, math.nan)


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        ({}, "data"),
        ({"float32": Numbers(1.1, 1.0)}, "precision"),
        ({"float32": None}, "data"),
        ({"before": BAD}, "weights"),
        ({"before": BAD, "rates": [1e-3] * 126 + [1e-2] * 2}, "rate"),
        ({"before": BAD, "rates": [1e-3] * 100 + [1e-2] * 28}, "weights"),
        ({"before": Numbers(1.0, 1.0), "rates": [1e-3] * 126 + [1e-2] * 2}, "data"),
        ({"is_transient": True, "again": Numbers(1.0, 1.0)}, "transient"),
        (
            {"before": None, "losses": [], "rates": [], "problem": "not finite", "recorded": NAN, "float32": NAN},
            "unknown",
        ),
        ({"problem": "not finite", "recorded": NAN, "float32": BAD}, "precision"),
        ({"problem": "not finite", "recorded": NAN, "float32": NAN, "before": NAN}, "weights"),
        ({"problem": "not finite", "recorded": NAN, "float32": NAN}, "data"),
        ({"problem": "gradient norm", "recorded": Numbers(1.0, 50.0), "float32": Numbers(1.0, 49.0)}, "data"),
        ({"problem": "gradient norm", "recorded": Numbers(1.0, 50.0), "float32": Numbers(1.0, 2.0)}, "precision"),
    ],
)
def test_the_causes_are_weighed(found: dict[str, Any], cause: str) -> None:
    weighed = weigh(evidence(**found))
    assert weighed.cause == cause
    assert describe_verdict(weighed).startswith("step 200: loss ")


def test_the_warmup_of_a_run_is_no_jump_of_the_rate() -> None:
    assert find_jump([1e-3 * (step + 1) / 200 for step in range(128)], 129) is None
