"""Several processes do the run that one does, and end together, with one sentence, whatever happens to one of them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, WORDS, metrics, outcome, write_tiny
from torch.utils.hooks import RemovableHandle
from twins import needs_bf16
from two_ranks import Ended, Ranks, run_ranks, start_ranks

from smollm2.checkpoint import saving
from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.cli.main import main
from smollm2.data import corpus as data_corpus
from smollm2.data.batches import Batches
from smollm2.data.tokenizer import Tokenizer, train_tokenizer
from smollm2.data.tokenizer_files import Files
from smollm2.data.windows import Batch
from smollm2.errors import DataError, ResourceError
from smollm2.runtime import device
from smollm2.runtime.ranks import Position, Watch, find_disagreement, find_late, find_odd_replica
from smollm2.training import agreement, corpus, loop
from smollm2.training import step as training_step
from smollm2.training.step import train_step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked ranks share no GPU")

Work = Callable[[int], int]

MIXTURE = ("--data.mixture", "{input.txt: [0.75, 0.25], other.txt: [0.25, 0.75]}", "--data.stages", "[6]")


def train_words(*flags: str) -> list[str]:
    return ["train", "--config", "config.yaml", "--disable_wandb", *flags]


def training_with(*flags: str) -> Work:
    """The user's command, on any rank."""
    return lambda rank: main(train_words(*flags))


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [float(str(row[name])) for row in metrics(folder) if name in row]


def run_both(folder: Path, *flags: str) -> tuple[Path, Path]:
    """The run folders of the same run by one process and by two, without saves and samples on the way."""
    flags += ("--training.save_interval", "0", "--training.sample_interval", "0")
    write_tiny(folder)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    [one] = run_ranks(training_with("--save_dir", "one", *flags), folder, world_size=1)
    two = run_ranks(training_with("--save_dir", "two", *flags), folder)
    assert [one.code, *(rank.code for rank in two)] == [0, 0, 0], two
    return folder / "one", folder / "two"


def relative(mine: list[float], theirs: list[float]) -> list[float]:
    return [abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)]


def test_two_ranks_have_the_losses_of_one(tmp_path: Path) -> None:
    """Promise B1."""
    one, two = run_both(tmp_path, "--train_steps", "50")
    for name in ("loss", "grad_norm"):
        differences = relative(losses(two, name), losses(one, name))
        assert differences[0] <= 1e-6
        assert max(differences) <= 1e-4
    assert max(relative(losses(two, "validation_loss"), losses(one, "validation_loss"))) <= 1e-4


@pytest.mark.parametrize(
    "flags",
    [pytest.param(("--training.precision", "bf16"), marks=needs_bf16), ("--training.optimizer", "muon")],
)
def test_coarser_numbers_stay_within_two_hundredths(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Promise B1."""
    one, two = run_both(tmp_path, "--train_steps", "20", *flags)
    assert max(relative(losses(two), losses(one))) <= 2e-2


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny run, by two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("sound")
    write_tiny(folder)
    ended = run_ranks(training_with(), folder)
    assert [rank.code for rank in ended] == [0, 0], ended
    return folder / "checkpoints"


def note_windows() -> None:
    """From here on this process writes every window that it reads for training to a file."""

    class Noting(Batches):
        def read(self, n: int, start: int, stop: int) -> Batch:
            ids = self.window_ids(n)[start:stop].tolist()
            with Path("windows.txt").open("a") as file:
                file.write("".join(f"{n} {start + row} {window}\n" for row, window in enumerate(ids)))
            return super().read(n, start, stop)

    data_corpus.Batches = Noting  # type: ignore[attr-defined]


def noting_windows(work: Work) -> Work:
    """`work`, with the windows that it reads written down."""

    def noted(rank: int) -> int:
        note_windows()
        return work(rank)

    return noted


def windows_read(folder: Path) -> set[str]:
    """Lines `batch row window`; the batch that is fetched ahead and never used is left out."""
    lines = (folder / "windows.txt").read_text().splitlines()
    (folder / "windows.txt").unlink()
    return {line for line in lines if int(line.split()[0]) < 12}


@pytest.mark.parametrize("flags", [(), MIXTURE], ids=["one source", "a mixture with two stages"])
def test_a_run_that_changes_its_number_of_ranks_reads_the_windows_of_one_that_does_not(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Promise B1; the second stage begins at step 6."""
    write_tiny(tmp_path)
    (tmp_path / "other.txt").write_text("another text, of which a quarter of the windows is drawn at first. " * 30)
    run_ranks(noting_windows(training_with(*flags, "--save_dir", "whole")), tmp_path, world_size=1)
    expected = windows_read(tmp_path)
    reported = ""
    for steps, world_size in ((4, 2), (8, 1), (12, 2)):
        resumed = ("--save_dir", "changing", "--resume", "auto", "--train_steps", str(steps))
        ended = run_ranks(noting_windows(training_with(*flags, *resumed)), tmp_path, world_size)
        assert [rank.code for rank in ended] == [0] * world_size, ended
        reported += ended[0].out
    assert windows_read(tmp_path) == expected
    assert "not bit-exact, because of world_size 2 -> 1" in reported
    assert "not bit-exact, because of world_size 1 -> 2" in reported


def on_the_second_machine(folder: Path, text: str) -> Work:
    """Training on rank 1 in a folder of its own, with its own cache and its own copy of the text."""
    write_tiny(folder / "second", text=text)

    def work(rank: int) -> int:
        os.chdir(folder / ("second" if rank else "."))
        return main(train_words("--save_dir", str(folder / "run"), "--data.cache_dir", "cache"))

    return work


def test_a_machine_with_a_cache_of_its_own_prepares_the_same_tokens(tmp_path: Path, sound: Path) -> None:
    write_tiny(tmp_path)
    ended = run_ranks(on_the_second_machine(tmp_path, WORDS * 40), tmp_path, per_machine=1)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert list((tmp_path / "second").rglob("index.json"))
    assert max(relative(losses(tmp_path / "run"), losses(sound))) <= 1e-4


def test_a_machine_with_another_text_in_its_cache_is_named_before_the_first_step(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    ended = run_ranks(on_the_second_machine(tmp_path, WORDS * 39 + "other"), tmp_path, per_machine=1)
    assert {rank.code for rank in ended} == {5}, ended
    assert reported_once(ended, "rank 1: was started differently from rank 0: the tokens")


def test_a_rank_that_the_others_wait_for_is_named_once_with_its_seconds(tmp_path: Path) -> None:
    write_tiny(tmp_path)

    def work(rank: int) -> int:
        split = training_step.split

        def slow(*arguments: Any) -> Any:
            time.sleep(0.1 * rank)
            return split(*arguments)

        vars(loop)["split"] = slow
        return main(train_words())

    ended = run_ranks(work, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert ended[0].out.count("rank 1 is slow") == 1
    rows = map(json.loads, (tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines())
    row = [row for row in rows if "loss" in row][-1]
    assert row["rank_seconds_max"] >= 0.1 > row["rank_seconds_median"] >= row["rank_seconds_min"]


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_nearest_that_they_can(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    ended = run_ranks(
        training_with("--training.batch_size", "3", "--training.gradient_accumulation_steps", "1"), tmp_path
    )
    assert [rank.code for rank in ended] == [2, 2]
    assert reported_once(ended, "which 2 devices cannot share equally. The nearest possible size is 2 or 4")


def reported_once(ended: list[Ended], sentence: str) -> bool:
    """Whether the ranks together wrote one line of errors, with this in it."""
    errors = "".join(rank.err for rank in ended)
    assert sentence in errors, ended
    lines = [line for line in errors.splitlines() if line.startswith(("error: ", "stopped by "))]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return True


@pytest.mark.parametrize(
    ("flags", "code", "reported"),
    [
        (("--input_file", "absent.txt"), 3, "absent.txt: file not found"),
        (("--checkpoint_path", "absent.pt"), 4, "absent.pt"),
        (("--save_dir", "input.txt"), 6, "input.txt: cannot be written to"),
        (("--training.precision", "fp16"), 2, "fp16 is not supported here: a CPU computes fp16"),
    ],
)
def test_a_mistake_is_reported_by_one_rank_and_ends_all(
    flags: tuple[str, ...], code: int, reported: str, tmp_path: Path
) -> None:
    write_tiny(tmp_path)
    ended = run_ranks(training_with(*flags), tmp_path)
    assert [rank.code for rank in ended] == [code, code]
    assert reported_once(ended, reported)
    assert max(rank.seconds for rank in ended) < 15
    assert not (tmp_path / "checkpoints").exists()


def change_seed(rank: int) -> list[str]:
    return ["--training.seed", "2"] if rank else []


def change_code(rank: int) -> list[str]:
    if rank:
        loop.fingerprint_code = lambda: "0123"  # type: ignore[attr-defined]
    return []


def change_tokens(rank: int) -> list[str]:
    if rank:
        agreement.fingerprint_tokens = lambda corpus: "4567"
    return []


def change_tokenizer(rank: int) -> list[str]:
    def another(text: str, end_of_text: int | None = None, files: Files | None = None) -> Tokenizer:
        return train_tokenizer(["a b c"] * 9, 300)

    if rank:
        corpus.tokenizer_from_text = another  # type: ignore[attr-defined]
    return []


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (change_seed, "rank 1: was started differently from rank 0: training.seed 1337 -> 2"),
        (change_code, "the code "),
        (change_tokens, "the tokens "),
        (change_tokenizer, "the tokenizer "),
    ],
)
def test_ranks_that_are_not_in_the_same_run_are_refused(
    change: Callable[[int], list[str]], reported: str, tmp_path: Path
) -> None:
    """Promise F5."""
    write_tiny(tmp_path)
    ended = run_ranks(lambda rank: main(train_words(*change(rank))), tmp_path)
    assert [rank.code for rank in ended] == [5, 5]
    assert reported_once(ended, reported)
    assert not list(tmp_path.glob("checkpoints/step_*.pt"))


def test_the_text_on_standard_input_is_read_by_one_rank(tmp_path: Path) -> None:
    write_tiny(tmp_path)

    def work(rank: int) -> int:
        sys.stdin = (tmp_path / "input.txt").open() if rank == 0 else None
        return main(train_words("--input_file", "-", "--train_steps", "2"))

    assert [rank.code for rank in run_ranks(work, tmp_path)] == [0, 0]


def failing_saves(steps: set[int], work: Work) -> Work:
    """`work` on a disk that is full at these steps, as rank 0 finds."""
    whole = saving.save_checkpoint

    def save(folder: Path, state: dict[str, object], *, step: int, **named: Any) -> Path:
        if step in steps:
            raise ResourceError("the disk is full")
        return whole(folder, state, step=step, **named)

    def failing(rank: int) -> int:
        saving.save_checkpoint = save
        return work(rank)

    return failing


def test_a_save_that_fails_on_rank_0_is_reported_and_all_continue(tmp_path: Path) -> None:
    """Promise F4."""
    write_tiny(tmp_path)
    ended = run_ranks(failing_saves({4}, training_with()), tmp_path)
    assert [rank.code for rank in ended] == [0, 0]
    assert "the disk is full" in ended[0].out
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step_0008.pt",
        "step_0012.pt",
    ]


def test_a_last_save_that_fails_on_rank_0_ends_all_with_its_code(tmp_path: Path) -> None:
    """Promise F4."""
    write_tiny(tmp_path)
    ended = run_ranks(failing_saves({2}, training_with("--train_steps", "2")), tmp_path)
    assert [rank.code for rank in ended] == [6, 6]
    assert reported_once(ended, "the disk is full")


def on_rank_1_before_step(step: int, act: Callable[[torch.nn.Module], object], work: Work) -> Work:
    """`work`, with something done on rank 1 before an update."""
    done: list[torch.nn.Module] = []

    def step_or_act(model: torch.nn.Module, *arguments: Any, **named: Any) -> object:
        done.append(model)
        if len(done) == step:
            act(model)
        return train_step(model, *arguments, **named)

    def acting(rank: int) -> int:
        if rank == 1:
            loop.train_step = step_or_act  # type: ignore[assignment, attr-defined]
        return work(rank)

    return acting


def spoil_one_gradient(model: torch.nn.Module, times: int = 1) -> None:
    """The next gradients of one parameter are not finite on this rank, before the ranks share them."""
    parameter = next(model.parameters())
    left = [times]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            handle.remove()
        return gradient * float("nan")

    handle: RemovableHandle = parameter.register_hook(spoil)  # type: ignore[no-untyped-call]


def spoil_the_step_and_its_rerun(model: torch.nn.Module) -> None:
    """Spoil both of the micro-batches, in the step and in the rerun of its autopsy."""
    spoil_one_gradient(model, times=4)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    """Promise C2."""
    write_tiny(tmp_path)
    work = on_rank_1_before_step(3, spoil_the_step_and_its_rerun, training_with("--train_steps", "6"))
    ended = run_ranks(work, tmp_path)
    assert [rank.code for rank in ended] == [0, 0]
    assert [row["skipped"] for row in metrics(tmp_path / "checkpoints") if "loss" in row] == [0, 0] + [1] * 4


def test_a_gradient_that_was_not_finite_once_on_one_rank_is_computed_again_by_all(tmp_path: Path, sound: Path) -> None:
    write_tiny(tmp_path)
    ended = run_ranks(on_rank_1_before_step(3, spoil_one_gradient, training_with()), tmp_path)
    assert [rank.code for rank in ended] == [0, 0]
    assert outcome(tmp_path / "checkpoints", 12) == outcome(sound, 12)


def flip_a_bit(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1).view(torch.int32)[7] ^= (
            1 << 22
        )  # rounding would take in the lowest bit at the next update


def test_weights_that_differ_by_one_bit_stop_the_run_before_they_are_saved(tmp_path: Path) -> None:
    """Promise C7."""
    write_tiny(tmp_path)
    ended = run_ranks(on_rank_1_before_step(6, flip_a_bit, training_with()), tmp_path)
    assert [rank.code for rank in ended] == [5, 5]
    assert reported_once(ended, "step 8: the weights of rank 1 differ from those of the other ranks")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_0004.pt"]


def have_room_for_one_sequence(model: torch.nn.Module) -> None:
    """From here on this rank runs out of memory with more than one sequence at once."""

    def refuse(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("no room")

    model.register_forward_pre_hook(refuse)


def in_parts_of(size: int) -> tuple[str, ...]:
    return ("--training.batch_size", str(size), "--training.gradient_accumulation_steps", str(8 // size))


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps by two ranks with one sequence at once."""
    folder = tmp_path_factory.mktemp("one_at_a_time")
    write_tiny(folder)
    ended = run_ranks(training_with("--train_steps", "6", *in_parts_of(1)), folder)
    assert [rank.code for rank in ended] == [0, 0], ended
    return folder / "checkpoints"


@pytest.mark.parametrize("size", [2, 4])
def test_out_of_memory_on_one_rank_makes_the_micro_batch_of_all_smaller_bit_for_bit_as_if_begun_so(
    tmp_path: Path, one_at_a_time: Path, size: int
) -> None:
    """Promise C10. With 4 each rank has one micro-batch, after whose forward pass the ranks meet."""
    write_tiny(tmp_path)
    flags = ("--save_dir", "cramped", "--train_steps", "6", *in_parts_of(size))
    cramped = on_rank_1_before_step(1, have_room_for_one_sequence, training_with(*flags))
    ended = run_ranks(cramped, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert f"step 1: out of memory with {size} sequences at once. Continuing with {size // 2} at once" in ended[0].out
    assert outcome(tmp_path / "cramped", 6) == outcome(one_at_a_time, 6)


def have_no_room_for_gradients(model: torch.nn.Module) -> None:
    """From here on this rank runs out of memory in every backward pass."""

    def refuse(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no room")

    model.register_forward_hook(lambda module, arguments, output: output[0].register_hook(refuse) and None)


def test_out_of_memory_where_the_ranks_meet_ends_all_with_one_sentence_of_that_rank(tmp_path: Path) -> None:
    """Promise C10. One micro-batch for each rank: the last."""
    write_tiny(tmp_path)
    ended = run_ranks(on_rank_1_before_step(6, have_no_room_for_gradients, training_with()), tmp_path)
    assert [rank.code for rank in ended] == [6, 6], ended
    assert "error: rank 1: training.batch_size: 4 is too large: out of memory. Lower it" in ended[1].err
    assert "rank 1 ended with exit code 6 and reports the reason" in ended[0].err
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_0004.pt"]


def raise_a_data_error(model: torch.nn.Module) -> None:
    raise DataError("a window cannot be read")


def kill_itself(model: torch.nn.Module) -> None:
    time.sleep(1.5)  # the watch has written where the ranks are
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("act", "codes", "reported"),
    [
        (raise_a_data_error, [3, 3], ("error: rank 1: a window cannot be read", "rank 1 ended with exit code 3")),
        (kill_itself, [5, -9], ("rank 1 was killed or crashed",)),
    ],
)
def test_a_rank_that_ends_ends_the_run_and_is_named(
    act: Callable[[torch.nn.Module], object], codes: list[int], reported: tuple[str, ...], tmp_path: Path
) -> None:
    """Promise F1."""
    write_tiny(tmp_path)
    ended = run_ranks(on_rank_1_before_step(6, act, training_with()), tmp_path)
    assert [rank.code for rank in ended] == codes, ended
    assert ended[0].seconds - ended[1].seconds < 10
    assert all(sentence in ended[0].err + ended[1].err for sentence in reported), ended
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_0004.pt"]


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_finds_no_other_ends_with_one_sentence(absent: int, tmp_path: Path) -> None:
    write_tiny(tmp_path)

    def work(rank: int) -> int:
        device.SECONDS_AFTER_THE_WATCH = -3
        return 0 if rank == absent else main(train_words("--training.rank_timeout", "5"))

    ended = run_ranks(work, tmp_path)
    assert ended[1 - absent].code == 5, ended
    assert reported_once(ended, f"rank {1 - absent} of 2 did not find the others through 127.0.0.1:")
    assert ended[1 - absent].err.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("victim", [0, 2])
def test_one_of_the_ranks_that_are_left_names_the_lost_one(victim: int, tmp_path: Path) -> None:
    """Promise F1. The ranks notice one after another, and each sees those before it as ended."""
    write_tiny(tmp_path)
    done: list[int] = []

    def work(rank: int) -> int:
        def step_or_end(model: torch.nn.Module, *arguments: Any, **named: Any) -> object:
            done.append(rank)
            if len(done) == 6:
                kill_itself(model) if rank == victim else time.sleep(0.25 * rank)
            return train_step(model, *arguments, **named)

        loop.train_step = step_or_end  # type: ignore[assignment, attr-defined]
        return main(train_words())

    ended = run_ranks(work, tmp_path, 4)
    assert [rank.code for rank in ended] == [-9 if rank == victim else 5 for rank in range(4)], ended
    assert reported_once(ended, f"rank {victim} was killed or crashed, at step 6, ")


def test_a_rank_that_stalls_is_named_and_the_run_ends(tmp_path: Path) -> None:
    """Promise F2."""
    write_tiny(tmp_path)
    work = on_rank_1_before_step(6, lambda model: time.sleep(60), training_with("--training.rank_timeout", "5"))
    ended = run_ranks(work, tmp_path)
    assert [rank.code for rank in ended] == [5, 5], ended
    assert "rank 1 is behind, at step 6, " in ended[0].err
    assert ended[0].seconds < 5 + 10
    assert ended[1].seconds < 25


def test_a_rank_that_takes_long_over_a_save_is_named_and_waited_for(tmp_path: Path) -> None:
    """Promise F2."""
    write_tiny(tmp_path)
    whole = saving.save_checkpoint

    def save(folder: Path, state: dict[str, object], *, step: int, **named: Any) -> Path:
        time.sleep(8 if step == 12 else 0)
        return whole(folder, state, step=step, **named)

    def slow(rank: int) -> int:
        saving.save_checkpoint = save
        return training_with("--training.rank_timeout", "5")(rank)

    ended = run_ranks(slow, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "rank 0 is behind, at step 12, a save" in ended[1].err


def wait_for_step(folder: Path, ranks: Ranks) -> None:
    deadline = time.monotonic() + 30
    while not list(folder.glob("step_*.pt")):
        assert time.monotonic() < deadline, [ranks.read(0), ranks.read(1)]
        time.sleep(0.01)


@pytest.mark.parametrize("receivers", [[0], [1], [0, 1], [0, 1, 0, 1]], ids=["rank 0", "rank 1", "both", "both, twice"])
def test_a_signal_to_any_rank_stops_all_at_the_same_step(receivers: list[int], tmp_path: Path) -> None:
    """Promise F3. Twice at once is what a launcher makes of a Ctrl-C that the terminal has sent to all."""
    write_tiny(tmp_path)
    ranks = start_ranks(training_with("--train_steps", "100000"), tmp_path)
    wait_for_step(tmp_path / "checkpoints", ranks)
    for rank in receivers:
        os.kill(ranks.pids[rank], signal.SIGTERM)
    ended = ranks.wait()
    assert [rank.code for rank in ended] == [143, 143]
    assert reported_once(ended, "stopped by SIGTERM; step ")
    step = int(re.search(r"step (\d+) is saved", ended[0].err)[1])  # type: ignore[index]
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == f"step_{step:04d}.pt"
    assert "torchrun --nproc_per_node 2" in ended[0].err
    assert not (tmp_path / "checkpoints" / ".ranks").exists()


@pytest.mark.parametrize(
    ("counts", "late"), [([3, 3], []), ([3, 2], [1]), ([2, 3, 2], [0, 2])], ids=["none", "one", "two"]
)
def test_the_rank_that_has_begun_least_is_late(counts: list[int], late: list[int]) -> None:
    positions = [Position(rank, count, "a place", 1, "here") for rank, count in enumerate(counts)]
    assert [position.rank for position in find_late(positions)] == late


def test_positions_of_a_killed_larger_run_are_removed_before_the_ranks_watch_each_other(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    left = tmp_path / "checkpoints" / ".ranks"
    left.mkdir(parents=True)
    (left / "rank_0003.json").write_text(json.dumps(asdict(Position(3, 70, "step 9", 2**22 + 1, socket.gethostname()))))
    ended = run_ranks(training_with("--train_steps", "2"), tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert not left.exists()


def watch_of(folder: Path, rank: int, world_size: int) -> Watch:
    return Watch(folder, rank, world_size, lambda: (7, "step 7", 0.0, True), 60, lambda error: None, lambda text: None)


def test_a_position_of_a_rank_that_this_run_does_not_have_is_ignored(tmp_path: Path) -> None:
    for rank in (1, 2):
        watch_of(tmp_path, rank, 3)._write(5)
    assert [position.rank for position in watch_of(tmp_path, 0, 2).others()] == [1]


@pytest.mark.parametrize(("rank", "code", "reporter"), [(1, 5, 1), (2, 5, 2), (3, 5, 2), (2, None, 2), (3, None, 2)])
def test_each_machine_reports_the_loss_of_a_rank(
    rank: int, code: int | None, reporter: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0, on the first of two machines, has ended; its machine may be cut off, so the other one reports as well."""
    hosts = ["a", "a", "b", "b"]
    for one, host in enumerate(hosts):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        watch_of(tmp_path, one, 4)._write(code if one == 0 else None)
    monkeypatch.setattr(socket, "gethostname", lambda: hosts[rank])
    error = watch_of(tmp_path, rank, 4).explain_loss()
    assert (error.rank, error.exit_code) == (reporter, 5)
    assert ("rank 0 ended with exit code 5" if code else "lost contact with each other") in str(error)


@pytest.mark.parametrize(
    ("sums", "odd"),
    [([[1, 2], [1, 2]], None), ([[1, 2], [1, 3]], (1, 1)), ([[9, 2], [1, 2], [1, 2]], (0, 0))],
)
def test_the_replica_that_differs_from_most_is_found(sums: list[list[int]], odd: tuple[int, int] | None) -> None:
    assert find_odd_replica(sums) == odd


def test_what_only_one_rank_knows_is_a_disagreement() -> None:
    assert find_disagreement([{"a": 1}, {"a": 1}]) is None
    assert find_disagreement([{"a": 1}, {"a": 1, "b": 2}]) == (1, ["b None -> 2"])


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "accelerate with our file": [
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs" / "accelerate" / "two_cpu_processes.yaml"),
    ],
}


NOTING_TRAIN = f"""
import runpy, sys
sys.path += [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "training")!r}]
from test_distributed import note_windows
note_windows()
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_every_launcher_gives_two_ranks_that_do_the_same_run_on_the_same_windows(tmp_path: Path) -> None:
    """Promise B1."""
    write_tiny(tmp_path)
    (tmp_path / "noting_train.py").write_text(NOTING_TRAIN)
    run_ranks(noting_windows(training_with("--save_dir", "one")), tmp_path, world_size=1)
    windows = windows_read(tmp_path)
    for name, words in LAUNCHERS.items():
        command = [sys.executable, "-m", *words, "noting_train.py", *train_words("--save_dir", name)[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "2 processes" in done.stdout
        assert windows_read(tmp_path) == windows
        assert max(relative(losses(tmp_path / name), losses(tmp_path / "one"))) <= 1e-4
