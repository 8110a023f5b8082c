"""The suite's own test: each of these sabotages, made in a copy of the tree, must turn a named test red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Sabotage(NamedTuple):
    """`old` stands once in `file` and becomes `new`; the named test must notice."""

    what: str
    file: str
    old: str
    new: str
    test: str


SABOTAGES = [
    Sabotage(
        "a generator's state is not put back",
        "runtime/random_state.py",
        '    torch.set_rng_state(state["torch"])',
        "    pass",
        "runtime/test_random_state.py::test_every_generator_continues_from_its_state",
    ),
    Sabotage(
        "a file is not synced",
        "storage/atomic.py",
        "                io_ops.fsync(file)\n",
        "",
        "storage/test_atomic.py::test_the_data_is_synced_before_the_rename_and_the_folder_after_it",
    ),
    Sabotage(
        "a file gets its name before it is checked",
        "storage/atomic.py",
        "            if check:\n                check(temporary)\n            io_ops.replace(temporary, path)\n",
        "            io_ops.replace(temporary, path)\n            if check:\n                check(path)\n",
        "storage/test_atomic.py::test_the_check_sees_the_synced_file_before_it_has_its_name",
    ),
    Sabotage(
        "older checkpoints go before the new one is saved",
        "checkpoint/saving.py",
        "        path = save_state",
        "        if t.keep_last is not None:\n"
        "            prune_checkpoints(self.folder, t.keep_last)\n        path = save_state",
        "training/test_faults.py::test_a_spike_is_reported_and_the_checkpoint_from_before_it_outlives_keep_last",
    ),
    Sabotage(
        "a checkpoint is written from the weights that training moves",
        "checkpoint/saving.py",
        "state = state if waits else take_snapshot(state, self.buffers)",
        "pass",
        "checkpoint/test_saving.py::test_training_continues_bit_identically_while_a_checkpoint_is_written",
    ),
    Sabotage(
        "the loss is divided by the number of micro-batches",
        "training/step.py",
        "scale = runtime.world_size / count.float()",
        "scale = runtime.world_size / torch.tensor(float(len(micro_batches)))",
        "training/test_step.py::test_accumulation_gives_the_gradient_of_the_whole_batch",
    ),
    Sabotage(
        "the schedule begins anew at a resume",
        "training/loop.py",
        "learning_rate=learning_rate_at(step - 1, t)",
        "learning_rate=learning_rate_at(step - 1 - run.resumed_step, t)",
        "training/test_resume.py::test_a_resumed_run_ends_with_the_same_bits",
    ),
    Sabotage(
        "a checkpoint may run code",
        "checkpoint/validation.py",
        "mmap=True, weights_only=True",
        "mmap=True, weights_only=False",
        "test_architecture.py::test_no_file_that_we_load_can_run_code",
    ),
    Sabotage(
        "the newest checkpoint is the youngest by the clock",
        "checkpoint/discovery.py",
        "key=lambda path: (step_of(path), path.name)",
        "key=lambda path: path.stat().st_mtime",
        "checkpoint/test_retention.py::test_clocks_do_not_decide_which_checkpoint_is_newest_or_deleted",
    ),
    Sabotage(
        "gradients are not clipped",
        "training/step.py",
        "        if clipped:\n",
        "        if False:\n",
        "training/test_step.py::test_clipping_scales_to_the_limit_and_never_up",
    ),
    Sabotage(
        "a label is the token itself",
        "data/windows.py",
        "labels[context : len(ids) - 1] = ids[context + 1 :]",
        "labels[context : len(ids) - 1] = ids[context:-1]",
        "data/test_windows.py::test_every_token_but_the_first_is_a_target_exactly_once",
    ),
    Sabotage(
        "a packed window does not read the token before its first piece",
        "data/packing.py",
        "max(0, starts[0] - 1)",
        "starts[0]",
        "data/test_packing.py::test_every_token_but_the_first_of_the_stream_is_a_target_exactly_once",
    ),
    Sabotage(
        "packing takes any window with room instead of the one with the least",
        "data/packing.py",
        "rooms.pop(at)",
        "rooms.pop()",
        "data/test_packing.py::test_a_piece_goes_where_the_least_room_is_left",
    ),
    Sabotage(
        "a step that is not finite is made",
        "training/step.py",
        "        if found.updates:\n",
        "        if True:\n",
        "training/test_step.py::test_a_step_that_is_not_finite_moves_neither_weights_nor_moments",
    ),
    Sabotage(
        "a checkpoint forgets which batches a rewind left out",
        "training/resume.py",
        "**progress.to_state(),",
        "**dataclasses.replace(progress, skips=()).to_state(),",
        "training/test_autopsy.py::test_a_rewound_run_that_is_resumed_ends_with_the_same_bits",
    ),
    Sabotage(
        "a resume begins with empty moments",
        "training/resume.py",
        '        load_optimizer_states(run.optimizers, state["optimizer"])\n',
        "        pass\n",
        "training/test_resume.py::test_a_resumed_run_ends_with_the_same_bits",
    ),
    Sabotage(
        "a resume begins with the first batch",
        "training/loop.py",
        "prefetched(run.batches, progress.step, first_row",
        "prefetched(run.batches, 0, first_row",
        "training/test_resume.py::test_a_resumed_run_ends_with_the_same_bits",
    ),
    Sabotage(
        "a step that ran out of memory keeps half of its gradients",
        "training/step.py",
        "        recover(model)\n        raise MicroBatchTooLarge",
        "        raise MicroBatchTooLarge",
        "training/test_faults.py::test_out_of_memory_begins_the_step_anew_in_smaller_parts_with_the_bits_of_a_run_that_began_so",
    ),
    Sabotage(
        "checksums are not compared",
        "checkpoint/validation.py",
        "damaged = archive.testzip()",
        "damaged = None",
        "checkpoint/test_validation.py::test_a_damaged_checkpoint_loads_equal_or_is_refused_by_name",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without what is not tracked."""
    folder = tmp_path_factory.mktemp("mutations") / "tree"
    leave_out = shutil.ignore_patterns("__pycache__", ".*", "checkpoints*", "cache", "wandb", "*.egg-info", "*.pt")
    shutil.copytree(ROOT, folder, ignore=leave_out)
    return folder


def run_test(tree: Path, test: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-m", "", "-p", "no:cacheprovider", f"tests/{test}"]
    paths = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tree, env=paths, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=[sabotage.what for sabotage in SABOTAGES])
def test_a_sabotage_turns_its_test_red(copy: Path, sabotage: Sabotage) -> None:
    path = copy / "smollm2" / sabotage.file
    sound = path.read_text(encoding="utf-8")
    assert sound.count(sabotage.old) == 1
    path.write_text(sound.replace(sabotage.old, sabotage.new), encoding="utf-8")
    try:
        done = run_test(copy, sabotage.test)
    finally:
        path.write_text(sound, encoding="utf-8")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_the_copy_itself_is_green(copy: Path) -> None:
    """Else a red test would prove nothing."""
    assert run_test(copy, SABOTAGES[3].test).returncode == 0
