"""The flags of `train` and `plan`: all problems at once, the run's own config, escapes and warnings."""

from pathlib import Path

import pytest
from runs import TINY, write_tiny

from smollm2.cli.main import build_parser, main
from smollm2.cli.run_flags import TORCHRUN_OPTIONS, load_run_config
from smollm2.config.reading import EFFECTIVE_HEADERS
from smollm2.config.schema import Config
from smollm2.storage.run_folder import CONFIG


def load(*words: str) -> Config:
    args, unknown = build_parser().parse_known_args(["train", *words])
    return load_run_config(args, unknown)[0]


def test_every_unknown_flag_and_every_wrong_value_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--eval_interval", "20", "--trian_steps=3", "--training.seed", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["--eval_interval", "--trian_steps", "--training.seed"]


def test_an_unknown_flag_is_reported_although_there_is_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--confg", "my.yaml"]) == 2
    assert "--confg: unknown option. Did you mean --config?\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--nnodes", "2", "--nproc-per-node=8", "--standalone"],
            "error: --nnodes, --nproc-per-node, --standalone: options of torchrun, not of train.py. "
            "Start the run with torchrun --nnodes 2 --nproc-per-node=8 --standalone train.py ...\n",
        ),
        (
            ["--rdzv_endpoint", "host:29400"],
            "error: --rdzv_endpoint: an option of torchrun, not of train.py. "
            "Start the run with torchrun --rdzv_endpoint host:29400 train.py ...\n",
        ),
        (
            ["--trian_steps", "3", "--nnodes", "2", "x"],
            "--nnodes: an option of torchrun, not of train.py. Start the run with torchrun --nnodes 2 train.py ...\n"
            "--trian_steps: unknown option. Did you mean --train_steps?\n"
            "x: unexpected argument. See smollm2 train --help.\n",
        ),
    ],
)
def test_options_of_torchrun_are_sent_back_to_it_in_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", "nano", *words]) == 2
    assert capsys.readouterr().err == message


def test_torchrun_has_these_options() -> None:
    from torch.distributed.run import get_args_parser

    known = {name.lstrip("-") for action in get_args_parser()._actions for name in action.option_strings}
    assert set(TORCHRUN_OPTIONS) <= known


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "a", "Once upon"], "Once upon: unexpected argument. Did you mean --prompt 'Once upon'?"),
        (["generate", "a", "--temprature", "1"], "--temprature: unknown option. Did you mean --temperature?"),
        (["export", "a", "b", "c"], "c: unexpected argument. See smollm2 export --help."),
        (["evaluat", "a"], "smollm2 evaluat: unknown command. Did you mean smollm2 evaluate?"),
        (["generate"], "smollm2 generate: the following arguments are required: MODEL. See smollm2 generate --help."),
    ],
)
def test_what_a_command_does_not_take_is_named_with_what_was_meant(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(("typed", "text"), [(r"\n\n", "\n\n"), (r"\f", "\f"), ("\n\n", "\n\n"), ("--", "--")])
def test_a_separator_on_the_command_line_has_escapes(typed: str, text: str) -> None:
    assert load("--preset", "nano", "--data.document_separator", typed).data.document_separator == text


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that holds the config of its run, with the vocabulary of its tokenizer."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(f"{EFFECTIVE_HEADERS[0]}\n{TINY}wandb: {{name: own}}\n")
    return folder


RESUME = ["--resume", "auto", "--save_dir", "runs/a"]


def test_a_resume_uses_the_config_of_the_run_if_there_is_no_other(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(*RESUME).wandb.name == "own"
    assert "config: runs/a/config.yaml, that of the run being resumed" in capsys.readouterr().err


def test_a_resume_uses_the_config_of_the_run_if_the_other_is_of_another_run(run_folder: Path) -> None:
    Path("config.yaml").write_text(
        TINY.replace("num_hidden_layers: 2", "num_hidden_layers: 3") + "wandb: {name: other}\n"
    )
    assert load(*RESUME).wandb.name == "own"


def test_a_resume_uses_an_edited_config_of_the_same_run(run_folder: Path) -> None:
    Path("config.yaml").write_text(TINY.replace("train_steps: 12", "train_steps: 20"))
    assert load(*RESUME).training.train_steps == 20


@pytest.mark.parametrize("words", [["--preset", "nano"], ["--config", "chosen.yaml"]])
def test_a_chosen_config_is_used(words: list[str], run_folder: Path) -> None:
    Path("chosen.yaml").write_text(TINY)
    assert load(*RESUME, *words).wandb.name is None


def test_without_resume_the_config_of_a_run_is_not_used(run_folder: Path) -> None:
    Path("config.yaml").write_text(TINY)
    assert load("--save_dir", "runs/a").wandb.name is None


def test_a_run_in_the_current_folder_names_a_free_one_at_the_second_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    flags = ["train", "--config", str(config), "--input_file", "../input.txt", "--train_steps", "1", "--save_dir", "."]
    assert main(flags) == 0
    assert (tmp_path / "cache").is_dir()
    assert main(flags) == 4
    assert f"--save_dir {folder}-2" in capsys.readouterr().err


def test_a_run_does_not_write_its_config_over_the_one_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--save_dir", "."]) == 2
    assert capsys.readouterr().err.startswith(
        "error: training.save_dir: the run would overwrite config.yaml with its own config"
    )
    assert config.read_text() == TINY


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_shape_that_transformers_5_does_not_load_is_a_warning_before_training(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    shape = ["--model.hidden_size", "20", "--model.num_attention_heads", "3", "--model.num_key_value_heads", "1"]
    assert main([command, *shape, "--model.head_dim", "4", "--train_steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("warning: model.hidden_size 20 is not a multiple of model.num_attention_heads 3") == 1


def test_the_help_names_every_preset_and_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: smollm2 train [--config FILE | --preset NAME] [--FLAG VALUE ...]"
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    assert (
        "a shipped config: chat-1.7b, chat-135m, chat-360m, continue-135m, micro, nano, smollm2-1.7b, smollm2-135m, smollm2-360m"
        in shown
    )
