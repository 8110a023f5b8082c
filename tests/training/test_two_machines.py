"""Two machines with a cable between them: what training does over it, without it, and without one of the machines."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_trials import differences
from runs import TINY, outcome, write_tiny
from two_machines import PORT, Launched, Machine, describe_missing, two_machines, wait_until
from two_ranks import run_ranks

from smollm2.checkpoint.discovery import list_checkpoints, load_checkpoint
from smollm2.cli.main import main

MISSING = describe_missing() if os.name == "posix" else "needs Linux"
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")

STEPS = 160
CONFIG = TINY.replace("train_steps: 12", f"train_steps: {STEPS}").replace("save_interval: 4", "save_interval: 50")
CONFIG = CONFIG.replace("eval_interval: 5", "eval_interval: 0, rank_timeout: 6").replace(
    "sample_interval: 6", "sample_interval: 0"
)
PATIENCE = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"

Pair = tuple[Machine, Machine]


@pytest.fixture
def machines() -> Iterator[Pair]:
    with two_machines() as pair:
        yield pair


def start(machine: Machine, first: Machine, folder: Path, nodes: str = "2", restarts: int = 0) -> Launched:
    """The same command on both machines."""
    rendezvous = ["--rdzv_id", "test", "--rdzv_endpoint", f"{first.address}:{PORT}", "--rdzv_conf", PATIENCE]
    options = ["--nnodes", nodes, "--max_restarts", str(restarts), *rendezvous]
    words = ["--config", "config.yaml", "--disable_wandb", "--save_dir", "run", "--resume", "auto"]
    return machine.torchrun(folder, options, words)


def start_both(pair: Pair, folder: Path, nodes: str = "2", restarts: int = 0) -> list[Launched]:
    return [start(machine, pair[0], folder, nodes, restarts) for machine in pair]


def train_to_step_70(pair: Pair, folder: Path, nodes: str = "2", restarts: int = 0) -> list[Launched]:
    """A run that is past the checkpoint of step 50, and goes on."""
    write_tiny(folder, config=CONFIG)
    launched = start_both(pair, folder, nodes, restarts)
    wait_until(lambda: steps_done(folder) >= 70, lambda: "\n".join(one.read()[-2000:] for one in launched))
    return launched


def steps_done(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def count_ranks(folder: Path) -> int:
    """How many training processes work in a folder, on either machine."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += b"\0-u\0" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == folder
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run over the cable, and one by a single process; `sent` has the bytes of the first machine."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder, config=CONFIG)
    with two_machines() as pair:
        launched = start_both(pair, folder)
        assert [one.wait(120) for one in launched] == [0, 0], launched[0].read()
        (folder / "sent").write_text(str(pair[0].bytes_sent()))
    words = ["train", "--config", "config.yaml", "--disable_wandb", "--save_dir", "one"]
    run_ranks(lambda rank: main(words), folder, world_size=1)
    return folder


@pytest.mark.slow
def test_the_gradients_go_over_the_cable_and_the_losses_are_those_of_one_process(whole: Path) -> None:
    assert int((whole / "sent").read_text()) > STEPS * 4 * 26_816
    assert max(differences(whole / "run", whole / "one")) <= 1e-4


@pytest.mark.slow
def test_a_cut_shorter_than_the_timeout_changes_no_bit(machines: Pair, whole: Path, tmp_path: Path) -> None:
    launched = train_to_step_70(machines, tmp_path)
    machines[1].plug("down")
    time.sleep(2)
    machines[1].plug("up")
    assert [one.wait(120) for one in launched] == [0, 0], launched[0].read()
    assert outcome(tmp_path / "run", STEPS) == outcome(whole / "run", STEPS)


@pytest.mark.slow
def test_a_cut_longer_than_the_timeout_ends_both_sides_and_the_resumed_run_has_the_same_bits(
    machines: Pair, whole: Path, tmp_path: Path
) -> None:
    launched = train_to_step_70(machines, tmp_path)
    assert count_ranks(tmp_path) == 2
    machines[1].plug("down")

    def both() -> str:
        return "".join(one.read() for one in launched)

    wait_until(lambda: "made no progress for" in both(), both, 30)
    wait_until(lambda: not count_ranks(tmp_path), both, 30)
    for machine in machines:  # torchrun's own agents wait for one another for minutes; a scheduler would end them
        machine.switch_off()
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path / "run")][-1] >= 50
    machines[1].plug("up")
    again = start_both(machines, tmp_path)
    assert [one.wait(120) for one in again] == [0, 0], again[0].read()
    assert outcome(tmp_path / "run", STEPS) == outcome(whole / "run", STEPS)


@pytest.mark.slow
def test_after_a_machine_dies_the_other_one_finishes_the_run_from_the_last_checkpoint(
    machines: Pair, whole: Path, tmp_path: Path
) -> None:
    launched = train_to_step_70(machines, tmp_path, "1:2", restarts=3)
    machines[1].switch_off()
    assert launched[0].wait(150) == 0, launched[0].read()
    assert "not bit-exact, because of world_size 2 -> 1" in launched[0].read()
    assert max(differences(tmp_path / "run", whole / "run")) <= 1e-4


@pytest.mark.slow
def test_a_machine_that_comes_back_restores_the_run_with_the_same_bits(
    machines: Pair, whole: Path, tmp_path: Path
) -> None:
    launched = train_to_step_70(machines, tmp_path)
    machines[1].switch_off()
    assert launched[0].wait(150) != 0
    again = start_both(machines, tmp_path)
    assert [one.wait(150) for one in again] == [0, 0], again[0].read()
    assert outcome(tmp_path / "run", STEPS) == outcome(whole / "run", STEPS)
