"""Tasks of lm-eval give the numbers of lm-eval's own `hf` model over the exported folder, on a CPU in float32."""

import builtins
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import small_model

from smollm2.cli.main import main
from smollm2.cli.tasks import SIZES, choose_sizes, describe_tasks, find_published
from smollm2.data.tokenizer import Tokenizer, train_tokenizer
from smollm2.errors import ConfigError, DataError
from smollm2.exporting.hugging_face import write_model_folder
from smollm2.exporting.source import Source
from smollm2.inference.harness import Metric, load_tasks, make_language_model, run_tasks
from smollm2.inference.loading import load_model
from smollm2.inference.scoring import Scorer, TextEncoder, read_settings

pytest.importorskip("lm_eval")

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = (
    "the of and to in is was for that it as with on be at by this had not are but from or have an they which one you "
)
CONTEXT = 64

CHOICES = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/colours.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""

ROLLING = """\
task: pages
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/pages.jsonl}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""

GENERATION = """\
task: endings
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/endings.jsonl}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "the of"
generation_kwargs: {until: [" not", "<|im_end|>"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match}
"""


def ignore(message: str) -> None:
    """Take a line about the progress."""


def write_tasks(folder: Path) -> Path:
    """Three tasks with their data; some inputs are longer than the context, and one has no context."""
    words = WORDS.split()
    colours = [
        {
            "question": " ".join(words[: n % 9]) + " " * (n in (1, 5)),
            "choices": [" " + words[n], words[n] + " b", "to it"],
            "answer": n % 3,
        }
        for n in range(12)
    ]
    colours.append({"question": WORDS * 6, "choices": [" a", " b", " c"], "answer": 1})
    texts = [WORDS * 4, "one page", " ".join(reversed(words)) * 3, ""]
    prompts = [" ".join(words[n : n + 3 + n % 4]) for n in range(0, 27, 3)] + [WORDS * 4, "<|im_start|>user the"]
    for name, task, rows in (
        ("colours", CHOICES, colours),
        ("pages", ROLLING, [{"text": text} for text in texts]),
        ("endings", GENERATION, [{"text": text} for text in prompts]),
    ):
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of data sets for this file alone."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that knows its text by heart; its tokenizer has a begin of text and the tokens of a chat."""
    folder = tmp_path_factory.mktemp("model")
    backend = train_tokenizer([WORDS * 50], 320).backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer(backend.to_str(), "<|endoftext|>", name="a tokenizer", files=files)
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)
    ids = backend.encode(f"<|im_start|>{WORDS[:40]}<|im_end|>{WORDS[40:]}<|endoftext|>").ids * 3
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(80):
        window = torch.tensor([ids[start : start + CONTEXT + 1] for start in range(step % 7, len(ids) - CONTEXT, 7)])
        loss, count = model(window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert loss / count < 0.5
    write_model_folder(Source(model.eval(), tokenizer, {}), folder)
    (folder / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])  # an export makes it the end of text
    return folder


def evaluate_with(model: Any, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results, with the answer to each request."""
    from lm_eval.evaluator import evaluate

    found = {}
    for name, loaded in tasks.items():
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
        results = evaluate(model, loaded, bootstrap_iters=0)
        found[name] = results["results"][name], [sample["resps"] for sample in results["samples"][name]]
    return found


@pytest.fixture(scope="module")
def expected(model_folder: Path, tasks_folder: Path) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    tasks = load_tasks(["colours", "pages", "endings"], tasks_folder, ignore)
    model = HFLM(pretrained=str(model_folder), device="cpu", dtype="float32", batch_size=1)
    return evaluate_with(model, tasks)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", ["colours", "pages", "endings"])
def test_each_answer_is_that_of_lm_evals_hf_model(
    name: str, batch_size: int, expected: dict[str, Any], model_folder: Path, tasks_folder: Path
) -> None:
    tasks = load_tasks([name], tasks_folder, ignore)
    model = make_language_model(Scorer(*load_model(model_folder), CONTEXT, batch_size))
    metrics, answers = evaluate_with(model, tasks)[name]
    wanted_metrics, wanted = expected[name]
    for metric, value in wanted_metrics.items():
        assert metrics[metric] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    for answer, other in zip(flatten(answers), flatten(wanted), strict=True):
        assert answer == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


def flatten(answers: Any) -> list[Any]:
    """The numbers, flags and texts in nested lists of answers."""
    if isinstance(answers, list | tuple):
        return [value for answer in answers for value in flatten(answer)]
    return [answers]


def test_the_generated_texts_end_at_stop_strings_control_tokens_and_the_limit(expected: dict[str, Any]) -> None:
    texts = flatten(expected["endings"][1])
    assert any(text.endswith(" had") for text in texts)
    assert any(text.endswith(" as w") for text in texts)


@pytest.mark.parametrize(("prefix", "files"), [("<|endoftext|>", {}), ("<|im_start|>", None)])
def test_a_text_without_a_context_follows_the_begin_of_text_or_else_the_end(
    prefix: str, files: dict[str, bytes] | None, model_folder: Path
) -> None:
    tokenizer = load_model(model_folder)[1]
    plain = Tokenizer(tokenizer.text, "<|endoftext|>", files=tokenizer.files if files is None else files)
    assert TextEncoder(plain).prefix == plain.id_of(prefix)


def test_requests_with_the_same_input_share_a_row_and_each_keeps_its_score(model_folder: Path) -> None:
    scorer = Scorer(*load_model(model_folder), CONTEXT, batch_size=8)
    pairs = [([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2], [3, 4]), ([7] * 200, [8])]
    alone = [scorer.score([pair])[0] for pair in pairs]
    for found, wanted in zip(scorer.score(pairs), alone, strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=1e-6) and found[1] == wanted[1]


@pytest.mark.parametrize("continuation", [[], [1] * (CONTEXT + 1)])
def test_a_continuation_that_cannot_be_scored_is_refused(continuation: list[int], model_folder: Path) -> None:
    scorer = Scorer(*load_model(model_folder), CONTEXT, batch_size=8)
    with pytest.raises(DataError, match=f"request 1: has {len(continuation)} tokens, and the context {CONTEXT}"):
        scorer.score([([1], continuation)])


def test_the_settings_of_a_task_mean_what_they_mean_in_lm_eval() -> None:
    sampling, length, stop = read_settings({"until": "x", "do_sample": False, "temperature": 0.7, "num_beams": 1})
    assert (sampling.temperature, length, stop) == (0, 256, ["x"])
    sampling, length, stop = read_settings({"temperature": 0.7, "max_new_tokens": 9, "top_p": 0.9})
    assert (sampling.temperature, sampling.top_p, length, stop) == (0.7, 0.9, 9, [])
    with pytest.raises(ConfigError, match=r"generation_kwargs.num_beams: 4 is not supported"):
        read_settings({"num_beams": 4})


def test_a_task_that_generates_more_than_the_context_is_refused(model_folder: Path, tasks_folder: Path) -> None:
    scorer = Scorer(*load_model(model_folder), 24, batch_size=8)
    tasks = load_tasks(["endings"], tasks_folder, ignore)
    with pytest.raises(ConfigError, match="task endings: context: 24 tokens leave no room for a prompt"):
        run_tasks(tasks, scorer, limit=None, num_fewshot=None, report=ignore)


def evaluate_command(model_folder: Path, tasks_folder: Path, *flags: str, tasks: str = "colours,pages") -> int:
    """The exit code of the command."""
    words = ["evaluate", str(model_folder), "--device", "cpu", "--tasks", tasks, "--tasks_folder", str(tasks_folder)]
    return main([*words, *flags])


def test_the_command_prints_a_table_and_notes(
    model_folder: Path, tasks_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_command(model_folder, tasks_folder, "--limit", "5") == 0
    out, err = capfd.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["task", "metric", "value", "95", "%", "n", "shots"]
    assert [line[:2] for line in lines[1:]] == [
        ["colours", "acc"],
        ["colours", "acc_norm"],
        ["pages", "word_perplexity"],
        ["pages", "bits_per_byte"],
    ]
    assert lines[1][4] == "to" and [line[-2] for line in lines[1:]] == ["5", "5", "4", "4"]
    assert lines[3][3] == "-"  # no standard error, so no interval
    assert [line.split(":")[0] for line in err.splitlines()] == ["colours", "pages", "colours", "pages"]


def test_json_has_the_numbers_of_the_table(
    model_folder: Path, tasks_folder: Path, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_command(model_folder, tasks_folder, "--json", "--batch_size", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["context"], found["limit"]) == (CONTEXT, None)
    row = found["tasks"][1]
    wanted = expected["colours"][0]
    assert (row["metric"], row["documents"], row["shots"], row["published"]) == ("acc_norm", 13, 0, {})
    assert row["value"] == wanted["acc_norm,none"]
    error = (row["value"] * (1 - row["value"]) / 12) ** 0.5
    assert row["interval"] == pytest.approx([row["value"] - 1.96 * error, row["value"] + 1.96 * error])


def test_the_published_figures_are_those_of_the_nearest_size_with_the_same_protocol() -> None:
    assert choose_sizes(SIZES["360M"] * 21 // 20) == ["360M"]
    assert choose_sizes(SIZES["360M"] * 22 // 20) == list(SIZES)
    metric = Metric("hellaswag", "acc_norm", 0.4, (0.39, 0.41), 10042, 0)
    assert find_published(metric, ["135M"]) == {"135M": 0.421}
    for other in ({"metric": "acc"}, {"shots": 5}, {"task": "lambada_openai"}):
        assert find_published(dataclasses.replace(metric, **other), ["135M"]) == {}
    rows = [{**dataclasses.asdict(metric), "published": {"135M": 0.421}}]
    head, line, protocol = describe_tasks(rows, ["135M"])
    assert head.endswith("shots  SmolLM2-135M") and line.split()[-3:] == ["10,042", "0", "0.421"]
    assert "lighteval" in protocol and protocol.endswith("same normalisation: hellaswag")


BROKEN = {
    "an unknown task": (["--tasks", "colour"], 2, "--tasks colour: unknown task. Did you mean colours?"),
    "no task": (["--tasks", ","], 2, "--tasks: must name a task"),
    "a folder that is none": (["--tasks_folder", "absent"], 2, "--tasks_folder: absent is not a folder"),
    "a flag for texts": (["--stride", "4"], 2, "--stride: has no effect with --tasks. Omit it."),
    "data that is not here": (["--tasks", "remote"], 3, "task remote: its data is not on this machine and cannot be"),
    "a broken task": (["--tasks", "broken"], 3, "task broken: cannot be loaded ("),
    "a task that fails": (["--tasks", "failing"], 3, "task failing: failed ("),
}


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and only the local tasks: lm-eval's own take 15 s to list."""
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, **_: manager(include_path=include_path, include_defaults=False),
    )


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(("name", "rows"), [("pair", ["pair"]), ("tagged", ["colours", "colours", "endings"])])
def test_a_group_has_one_result_and_a_tag_those_of_its_tasks(
    name: str,
    rows: list[str],
    model_folder: Path,
    tasks_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for task, text in (("colours", CHOICES), ("endings", GENERATION)):
        (tmp_path / f"{task}.yaml").write_text("tag: tagged\n" + text.replace("FOLDER", str(tasks_folder)))
    group = "group: pair\ntask: [colours]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    (tmp_path / "pair.yaml").write_text(group)
    assert evaluate_command(model_folder, tmp_path, "--json", "--limit", "4", "--num_fewshot", "2", tasks=name) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert [row["task"] for row in found] == rows
    assert {(row["documents"], row["shots"]) for row in found} == {(4, 2)}


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(("flags", "code", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_mistake_gets_one_sentence(
    flags: list[str],
    code: int,
    message: str,
    model_folder: Path,
    tasks_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    task = CHOICES.replace("FOLDER", str(tasks_folder))
    (tmp_path / "colours.yaml").write_text(task)
    (tmp_path / "remote.yaml").write_text(
        "task: remote\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n"
    )
    (tmp_path / "broken.yaml").write_text(task.replace("colours\n", "broken\n").replace("acc}", "absent}"))
    (tmp_path / "failing.yaml").write_text(
        task.replace("colours\n", "failing\n").replace("question", "question if answer < 2 else x.y")
    )
    assert evaluate_command(model_folder, tmp_path, *flags, tasks="colours") == code
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {message}")
    assert all(line.endswith((": loading", ": running")) or line.startswith("listing") for line in lines[:-1])


def test_a_missing_model_is_reported_before_the_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "absent.pt", "--tasks", "hellaswag"]) == 4
    assert capsys.readouterr().err.startswith("error: absent.pt: ")


def test_flags_of_tasks_need_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "m", "--input_file", "x", "--limit", "3"]) == 2
    assert capsys.readouterr().err == "error: --limit: has no effect with --input_file. Omit it.\n"


def test_a_missing_package_is_named_with_its_installation(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("builtins.__import__", without_lm_eval(builtins.__import__))
    assert main(["evaluate", str(model_folder), "--tasks", "hellaswag"]) == 2
    wanted = "error: --tasks: lm-eval is not installed. Run `pip install 'smollm2-training[eval]'`.\n"
    assert capsys.readouterr().err == wanted


def without_lm_eval(imported: Any) -> Any:
    """The import statement of a Python without lm-eval."""

    def refuse(name: str, *rest: Any, **words: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return imported(name, *rest, **words)

    return refuse


@pytest.mark.parametrize("words", [["--help"], ["evaluate", "m", "--tasks", ","]])
def test_help_and_config_errors_import_neither_torch_nor_lm_eval(words: list[str]) -> None:
    code = (
        "import sys; from smollm2.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(sorted({'torch', 'lm_eval', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
