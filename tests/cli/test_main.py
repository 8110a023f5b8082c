"""The command line: CPU time of a question, one line for each mistake, exit codes, and the command that resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Command, check_refused, run, run_function
from runs import TINY, WORDS, metrics, outcome, write_tiny

from smollm2.cli.main import main
from smollm2.cli.train import resume_command

QUESTIONS = {
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "help of train": (["train", "--help"], 0),
    "plan": (["plan", "--preset", "smollm2-135m"], 0),
    "plan of a cluster": (["plan", "--preset", "smollm2-135m", "--devices", "8", "--machines", "2"], 0),
    "a config error": (["train", "--training.learning_rate", "fast"], 2),
    "no config": (["train", "--config", "absent.yaml"], 2),
}


@pytest.mark.parametrize(("arguments", "code"), QUESTIONS.values(), ids=QUESTIONS.keys())
def test_help_plan_and_config_errors_import_neither_torch_nor_numpy_and_take_under_0_6_s_of_cpu(
    arguments: list[str], code: int, tmp_path: Path
) -> None:
    write_tiny(tmp_path)
    program = (
        "import sys, json, time\nfrom smollm2.cli.main import main\ncode = 0\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code or 0\n"
        "heavy = [name for name in ('torch', 'numpy', 'transformers', 'accelerate') if name in sys.modules]\n"
        "print(json.dumps([code, heavy, time.process_time()]))"
    )
    measured = []
    for _ in range(3):  # CPU seconds, but of a shared machine: the best of three
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        if measured[-1][2] < 0.6:
            break
    assert measured[-1][:2] == [code, []]
    assert min(answer[2] for answer in measured) < 0.6


MISTAKES = {
    "an unknown flag": (["--training.learnin_rate", "1"], 2, "Did you mean --training.learning_rate?"),
    "a flag without its section": (["--eval_interval", "20"], 2, "Did you mean --training.eval_interval?"),
    "a flag of another project": (["--lr=1"], 2, "--lr: unknown option. Did you mean --training.learning_rate?"),
    "a short flag with a typing error": (["--resum", "auto"], 2, "--resum: unknown option. Did you mean --resume?"),
    "a flag that resembles none": (["--zzz"], 2, "--zzz: unknown option. See smollm2 train --help."),
    "a text without its flag": (["input.txt"], 2, "Did you mean --input_file input.txt?"),
    "an unknown key in the file": (
        ["--config", "wrong.yaml"],
        2,
        "wrong.yaml:2: training.lr: unknown key. Did you mean",
    ),
    "a value that is not a number": (
        ["--train_steps", "many"],
        2,
        "--train_steps: must be a whole number from 1 to 1,000,000,000 (got 'many')",
    ),
    "a preset that does not exist": (["--preset", "nanno"], 2, "Did you mean nano?"),
    "two places to resume from": (["--resume", "auto", "--checkpoint_path", "x"], 2, "Use one of the two."),
    "one key twice": (
        ["--save_dir", "a", "--training.save_dir", "b"],
        2,
        "--save_dir: --training.save_dir sets the same",
    ),
    "the root folder as run folder": (["--save_dir", "/"], 2, "--save_dir: must be a path (got '/')"),
    "an input that is not there": (["--input_file", "absent.txt"], 3, "absent.txt: file not found"),
    "the default input asked for by name": (["--input_file", "nowhere/input.txt"], 3, "nowhere/input.txt"),
    "a folder with a file of another encoding": (["--input_file", "."], 3, "latin1.txt:2: byte 0xe9 at offset 7"),
    "an empty pattern": (["--input_file", "*.rst"], 3, "*.rst: no file to read there"),
    "an empty input": (["--input_file", "empty.txt"], 3, "empty.txt: the file is empty"),
    "only white space": (["--input_file", "blank.txt"], 3, "blank.txt: the file contains only white space"),
    "UTF-16": (["--input_file", "utf16.txt"], 3, "this is UTF-16 text"),
    "a PDF": (["--input_file", "paper.pdf"], 3, "this is a PDF file"),
    "bytes that are not UTF-8": (
        ["--input_file", "latin1.txt"],
        3,
        "latin1.txt:2: byte 0xe9 at offset 7 is not UTF-8",
    ),
    "a tokenizer that is not there": (["--data.tokenizer", "./absent"], 3, "./absent"),
    "one character": (["--input_file", "one.txt", "--data.tokenizer", "bytes"], None, ""),
    "the user's own placeholder": (
        ["--checkpoint_path", "checkpoints/step_XXXX.pt"],
        4,
        "XXXX stands for a step number",
    ),
    "a text as checkpoint": (["--checkpoint_path", "input.txt"], 4, "input.txt: is damaged, or is not a checkpoint"),
    "a file in the run folder's place": (["--save_dir", "input.txt"], 6, "input.txt: cannot be written to"),
    "fp16 on a CPU": (
        ["--training.precision", "fp16"],
        2,
        "training.precision: fp16 is not supported here: a CPU computes fp16",
    ),
}
FILES = {
    "wrong.yaml": b"training:\n  lr: 1e-4\n",
    "empty.txt": b"",
    "blank.txt": b" \n\t\n",
    "utf16.txt": "hello there".encode("utf-16"),
    "paper.pdf": b"%PDF-1.7 ...",
    "latin1.txt": b"a\nhello\xe9 there",
    "one.txt": b"x",
}


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_its_exit_code_and_leaves_no_file(
    arguments: list[str],
    code: int | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tiny(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    if code is None:
        assert main(["train", *arguments]) == 0
    else:
        check_refused(["train", *arguments], code, words, tmp_path, capsys)


def test_a_config_error_lists_every_problem(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model:\n  n_layer: 3\ntraining:\n  warmup_steps: -1\n")
    done = run("train", "--training.seed", "x", folder=tmp_path)
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["config.yaml:2", "config.yaml:4", "--training.seed"]
    assert done.returncode == 2


def test_standard_input_is_a_text(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    done = run("train", "--input_file", "-", "--train_steps", "1", folder=tmp_path, text=WORDS * 40)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints" / "step_0001.pt").exists()


def test_the_output_off_a_terminal_is_one_plain_line_per_report(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    done = run("train", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(character.isprintable() or character == "\n" for character in done.stdout)
    reports = [line for line in done.stdout.splitlines() if line.startswith("step ") and "  loss " in line]
    assert len(reports) == 12


def write_long(folder: Path) -> None:
    """A run of 150 steps that saves only at its end."""
    long = TINY.replace("train_steps: 12", "train_steps: 150").replace("save_interval: 4", "save_interval: 0")
    long = long.replace("eval_interval: 5", "eval_interval: 0").replace("sample_interval: 6", "sample_interval: 0")
    write_tiny(folder, config=long)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the long run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_long(folder)
    assert run("train", folder=folder).returncode == 0
    return folder / "checkpoints"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_the_resumed_run_is_bit_identical(name: str, whole: Path, tmp_path: Path) -> None:
    write_long(tmp_path)
    process = Command("train", folder=tmp_path)
    rows = tmp_path / "checkpoints" / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size > 300):
        time.sleep(0.01)
    number = getattr(signal, name)
    os.kill(process.pid, number)
    done = process.wait(60)
    assert done.returncode == 128 + number
    assert f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}; step " in done.stderr
    assert "Resume with: smollm2 train --resume auto" in done.stderr
    assert run("train", "--resume", "auto", folder=tmp_path).returncode == 0
    assert outcome(tmp_path / "checkpoints", 150) == outcome(whole, 150)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/x/smollm2", "train", "--preset", "nano"], "smollm2 train --preset nano --resume auto"),
        (["train.py", "--config", "my config.yaml"], "python train.py --config 'my config.yaml' --resume auto"),
        (["train.py", "--checkpoint_path", "a.pt", "--resume=auto"], "python train.py --resume auto"),
    ],
)
def test_the_resume_command_is_the_same_command_with_resume(argv: list[str], command: str) -> None:
    assert resume_command(argv) == command


def test_a_launcher_that_started_one_process_instead_of_two_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    lost = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}
    done = run("train", folder=tmp_path, env=lost)
    assert done.returncode == 2
    assert "accelerate launch --multi_gpu --num_processes 2" in done.stderr


def test_the_sample_corpus_is_made_if_no_text_is_named(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "input.txt").unlink()
    few_windows = ["--model.max_position_embeddings", "512", "--data.validation_fraction", "0.001"]
    done = run("train", "--train_steps", "1", *few_windows, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a sample corpus is made" in done.stdout
    assert metrics(tmp_path / "checkpoints")[0]["step"] == 1


def train_without_wandb(folder: Path) -> None:
    """Train; write the exit code, the connections, and whether wandb was imported."""
    os.chdir(folder)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args)) if event == "socket.connect" else None)
    code = main(["train", "--disable_wandb", "--train_steps", "2"])
    (folder / "answer").write_text(json.dumps([code, opened, "wandb" in sys.modules]))


def test_with_wandb_disabled_it_is_not_imported_and_no_connection_is_opened(tmp_path: Path) -> None:
    """Promise E7."""
    write_tiny(tmp_path, config=TINY + "wandb: {enabled: true}\n")
    run_function(train_without_wandb, tmp_path)
    assert json.loads((tmp_path / "answer").read_text()) == [0, [], False]


def test_with_wandb_and_no_key_the_run_is_recorded_offline_and_the_upload_command_is_printed(tmp_path: Path) -> None:
    write_tiny(tmp_path, config=TINY + "wandb: {enabled: true}\n")
    without = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
        "HOME": str(tmp_path)
    }
    done = run("train", "--train_steps", "2", folder=tmp_path, env=without)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "W&B" in line]
    assert len(lines) == 3
    assert "offline, no key for" in lines[0] and "will be uploaded" in lines[1]
    folder = lines[2].partition("Upload it with: wandb sync ")[2]
    assert list((tmp_path / folder).glob("*.wandb"))
