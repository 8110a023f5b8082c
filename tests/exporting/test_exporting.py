"""An exported folder is the same model for every reader, or it does not appear; a faulty exporter is caught."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, chat_tokenizer
from commands import run_function
from io_faults import WatchedIo
from runs import tiny_config, write_tiny
from safetensors.torch import load_file, save_file
from twins import small_model

from smollm2 import export, load_model, train
from smollm2.checkpoint.discovery import list_checkpoints
from smollm2.cli.main import main
from smollm2.data.tokenizer import load_tokenizer, train_tokenizer
from smollm2.errors import CheckpointError, ConfigError, ResourceError
from smollm2.exporting.certificate import certify, choose_text
from smollm2.exporting.hugging_face import DTYPES, write_model_folder
from smollm2.exporting.source import Source
from smollm2.model.transformer import SmolLM2
from smollm2.storage.atomic import write_folder_atomically

MODELS: dict[str, dict[str, object]] = {
    "like nano": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384},
    "grouped heads": {"rope_theta": 100000.0},
    "as many key-value heads": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "LayerNorm": {"norm": "layernorm"},
    "LayerNorm, untied, theta 100,000": {"norm": "layernorm", "tie_word_embeddings": False, "rope_theta": 100000.0},
    "wide heads, another epsilon": {"head_dim": 32, "norm_eps": 1e-6},
}


ROOT = str(Path(__file__).resolve().parents[2])

pytestmark = pytest.mark.usefixtures("one_thread")


def source(**changes: object) -> Source:
    """A small model whose end of text is neither of the ids that transformers would choose."""
    return Source(small_model(vocab_size=257, **changes), load_tokenizer("bytes"), {})


def written(folder: Path, **changes: object) -> Path:
    """A folder of a small model, unproved."""
    folder.mkdir()
    write_model_folder(source(**changes), folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a tiny run."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny(folder)
    train(tiny_config(folder))
    return folder / "checkpoints" / "step_0012.pt"


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_transformers_gives_our_logits_and_our_greedy_text(changes: dict[str, object], tmp_path: Path) -> None:
    certificate = export(written(tmp_path / "source", **changes), tmp_path / "out")
    names = [reading["reader"].split()[0] for reading in certificate["readers"]]
    assert names == ["smollm2", "transformers"]
    for reading in certificate["readers"]:
        assert reading["max_logit_difference"] <= 1e-5
        assert reading["greedy_equal"] == reading["greedy_tokens"] == 64
        assert reading["texts_equal"] == reading["texts"]
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == certificate


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_an_exported_folder_comes_back_bit_for_bit(changes: dict[str, object], tmp_path: Path) -> None:
    folder = written(tmp_path / "source", **changes)
    model, tokenizer = load_model(folder)
    wanted = source(**changes).model
    assert model.config == wanted.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (256, 257)


@pytest.mark.slow
def test_transformers_4_57_gives_our_logits_and_our_greedy_text(tmp_path: Path) -> None:
    library = tmp_path / "library"
    packages = ["transformers==4.57.1", "huggingface_hub<1", "tokenizers==0.22.1", "regex", "requests", "tqdm"]
    packages += ["charset-normalizer", "idna", "urllib3", "certifi", "hf-xet"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(library), *packages]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=280)
    if installed.returncode:
        pytest.skip(f"pip cannot install transformers 4.57.1: {installed.stderr.strip().splitlines()[-1:]}")
    for number, changes in enumerate(MODELS.values()):
        written(tmp_path / f"source-{number}", **changes)
    program = (
        "import json, sys, torch\nfrom smollm2 import export\nfrom transformers import AutoTokenizer\n"
        f"found = [export(f'source-{{n}}', f'out-{{n}}') for n in range({len(MODELS)})]\n"
        "assert sorted(AutoTokenizer.from_pretrained('out-0')('a')) == ['attention_mask', 'input_ids']\n"
        "print(json.dumps(found))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(library), ROOT])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for certificate in json.loads(done.stdout.splitlines()[-1]):
        reading = certificate["readers"][1]
        assert reading["reader"] == "transformers 4.57.1"
        assert reading["max_logit_difference"] <= 1e-5
        assert reading["greedy_equal"] == reading["greedy_tokens"] == 64
        assert reading["texts_equal"] == reading["texts"]


def edit_config(folder: Path, **changes: object) -> None:
    """config.json with some values changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """model.safetensors with tensors changed."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def write_wrong_theta(folder: Path) -> None:
    edit_config(folder, rope_theta=5e5, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})


def write_theta_of_version_5_alone(folder: Path) -> None:
    edit_config(folder, rope_theta=5e5)


def lose_the_tie(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)


def swap_gate_and_up(folder: Path) -> None:
    names = [f"model.layers.{layer}.mlp." for layer in range(3)]
    edit_weights(
        folder,
        lambda w: w.update({n + a: w[n + b] for n in names for a, b in PAIR}),
    )


PAIR = [("gate_proj.weight", "up_proj.weight"), ("up_proj.weight", "gate_proj.weight")]


def write_wrong_epsilon(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=1e-6)


def write_wrong_end_of_text(folder: Path) -> None:
    edit_config(folder, eos_token_id=2)


def write_wrong_end_of_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')


def shift_the_vocabulary(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"].roll(1, 0)}))


def shift_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    spec: dict[str, Any] = json.loads(path.read_text())
    vocabulary = spec["model"]["vocab"]
    spec["model"]["vocab"] = {token: (number + 1) % 256 for token, number in vocabulary.items()}
    path.write_text(json.dumps(spec))


def write_interleaved_heads(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(folder, lambda w: w.update({name: w[name].view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)}))


SABOTAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "wrong theta": (write_wrong_theta, "rope_theta is 500000.0 and should be 10000.0"),
    "theta in one of two places": (write_theta_of_version_5_alone, "rope_theta is 500000.0 in config.json"),
    "lost tie": (lose_the_tie, "lm_head.weight is missing"),
    "swapped gate and up": (swap_gate_and_up, "gate_proj.weight differs from the source's"),
    "wrong norm epsilon": (write_wrong_epsilon, "norm_eps is 1e-06 and should be 1e-05"),
    "wrong end-of-text id": (write_wrong_end_of_text, "eos_token_id is 2 in config.json and should be 256"),
    "wrong end of generation": (write_wrong_end_of_generation, "eos_token_id is 2 in generation_config.json"),
    "shifted vocabulary": (shift_the_vocabulary, "embed_tokens.weight differs from the source's"),
    "shifted tokenizer": (shift_the_tokenizer, "the tokenizer gives"),
    "interleaved heads": (write_interleaved_heads, "q_proj.weight differs from the source's"),
}


@pytest.mark.parametrize(("sabotage", "problem"), SABOTAGES.values(), ids=SABOTAGES.keys())
def test_a_faulty_exporter_is_caught(sabotage: Callable[[Path], None], problem: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    sabotage(folder)
    right = source()
    certificate = certify(folder, right.model, right.tokenizer, torch.float32, choose_text())
    assert not certificate["passed"]
    assert any(problem in found for found in certificate["problems"]), certificate["problems"]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def end_only_at_the_end_of_text(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=END_OF_TEXT)


def lose_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def lose_the_chat_template(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=None)


def begin_with_the_end_of_text(folder: Path) -> None:
    edit_config(folder, bos_token_id=END_OF_TEXT)


CHAT_SABOTAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing end of turn": (end_only_at_the_end_of_text, "generation stops at [256] and should stop at [256, 258]"),
    "lost generation config": (lose_the_generation_config, "its configs cannot be read"),
    "changed generation config": (end_only_at_the_end_of_text, "generation_config.json is not the file that came with"),
    "lost chat template": (lose_the_chat_template, "the chat template is missing or differs from the source's"),
    "wrong begin of text": (begin_with_the_end_of_text, "bos_token_id is 256 in config.json and should be 257"),
}


def chat_source() -> Source:
    return Source(small_model(vocab_size=259), chat_tokenizer(), {})


@pytest.mark.parametrize(("sabotage", "problem"), CHAT_SABOTAGES.values(), ids=CHAT_SABOTAGES.keys())
def test_an_exporter_that_loses_a_part_of_the_chat_is_caught(
    sabotage: Callable[[Path], None], problem: str, tmp_path: Path
) -> None:
    write_model_folder(chat_source(), tmp_path)
    sabotage(tmp_path)
    right = chat_source()
    certificate = certify(tmp_path, right.model, right.tokenizer, torch.float32, choose_text())
    assert not certificate["passed"]
    assert any(problem in found for found in certificate["problems"]), certificate["problems"]


def test_the_files_that_came_with_a_tokenizer_are_exported_as_they_were(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_model_folder(chat_source(), source)
    certificate = export(source, tmp_path / "out")
    files = chat_tokenizer().files
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == START_OF_TURN
    for reading in certificate["readers"]:
        assert reading["greedy_equal"] == reading["greedy_tokens"]
    (_, tokenizer) = load_model(tmp_path / "out")
    assert tokenizer.stops == {END_OF_TEXT, END_OF_TURN}
    export(source, tmp_path / "out", force=True)


SEEN_BY_TRANSFORMERS = ["wrong theta", "lost tie", "swapped gate and up", "shifted vocabulary", "shifted tokenizer"]


@pytest.mark.parametrize("name", SEEN_BY_TRANSFORMERS)
def test_transformers_alone_catches_what_moves_a_number(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    SABOTAGES[name][0](folder)
    right = source()
    certificate = certify(folder, right.model, right.tokenizer, torch.float32, choose_text())
    assert certificate["readers"][1]["problems"]


def test_an_export_that_fails_its_proof_exits_4_and_leaves_nothing(tmp_path: Path) -> None:
    right = source()

    def fill(folder: Path) -> None:
        write_model_folder(right, folder)
        swap_gate_and_up(folder)
        if not certify(folder, right.model, right.tokenizer, torch.float32, choose_text())["passed"]:
            raise CheckpointError("caught")

    with pytest.raises(CheckpointError, match="caught"):
        write_folder_atomically(tmp_path / "new" / "out", fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_16_bit_export_holds_the_rounded_weights_and_reports_the_difference(dtype: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "source")
    certificate = export(folder, tmp_path / "out", dtype=dtype)
    wanted = source().model.state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, wanted[name].to(DTYPES[dtype])) for name, tensor in found.items())
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
        == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    )
    assert 0 < certificate["rounding"]["max_logit_difference"] < 0.5
    assert certificate["readers"][1]["max_logit_difference"] <= 1e-5


def test_a_large_model_is_written_in_shards(tmp_path: Path) -> None:
    export(written(tmp_path / "source"), tmp_path / "out", shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in source().model.parameters())


def test_a_checkpoint_away_from_its_run_folder_is_exported_with_its_tokenizer_and_history(
    checkpoint: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "alone.pt"
    moved.write_bytes(checkpoint.read_bytes())
    export(moved, tmp_path / "out")
    (_, mine), (_, theirs) = load_model(moved), load_model(tmp_path / "out")
    assert theirs.encode("naïve <|endoftext|>") == mine.encode("naïve <|endoftext|>")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 12 |" in card
    assert "| transformers 5" in card


def test_a_bpe_with_merges_encodes_hostile_texts_alike(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat and the hat, 1999; the cat's naïve\n"] * 20, 300)
    folder = tmp_path / "source"
    folder.mkdir()
    write_model_folder(Source(small_model(vocab_size=tokenizer.vocab_size), tokenizer, {}), folder)
    certificate = export(folder, tmp_path / "out")
    assert certificate["tokenizer"] == {"texts": 17, "texts_that_come_back": 17}


def refused(action: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        action()
    assert "\n" not in str(error.value)


def test_a_target_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    folder = written(tmp_path / "source")
    export(folder, tmp_path / "out")
    refused(lambda: export(folder, tmp_path / "out"), CheckpointError, "the folder already exists. .*--force")
    export(folder, tmp_path / "out", dtype="bf16", force=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_force_never_removes_what_no_export_wrote(tmp_path: Path) -> None:
    folder = written(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(lambda: export(folder, tmp_path / "out", force=True), CheckpointError, "contains thesis.txt")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("source", "inside the source"),
        ("source/deeper/out", "inside the source"),
        (".", "contains the source"),
        ("file", "a file or a link"),
        ("link", "a file or a link"),
    ],
)
def test_a_target_in_the_way_is_refused(target: str, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    refused(lambda: export(folder, tmp_path / target, force=True), CheckpointError, message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_space_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    class Full(WatchedIo):
        def free_bytes(self, folder: Path) -> int:
            return 1000

    folder = written(tmp_path / "source")
    full = Full(lambda *_: None)
    refused(
        lambda: export(folder, tmp_path / "out", io_ops=full),
        ResourceError,
        "the export needs 40.6 MB, but only 1 kB is free",
    )


OPERATIONS = ["open_temporary", "allocate", "write", "fsync", "replace", "fsync_dir"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_that_fails_leaves_the_earlier_export_and_nothing_else(operation: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "source")
    export(folder, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for wanted in (0, 2):
        seen = 0

        def fail(number: int, name: str, arguments: tuple[Any, ...], wanted: int = wanted) -> None:
            nonlocal seen
            if name == operation:
                seen += 1
                if seen > wanted:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        action = lambda: export(folder, tmp_path / "out", force=True, dtype="bf16", io_ops=WatchedIo(fail))  # noqa: E731
        refused(action, ResourceError, "no space left on device")
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def export_beyond_a_limit(folder: Path) -> None:
    """Export where no file can have more than 100 kB; write the error."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        export(folder / "source", folder / "out")
    except ResourceError as error:
        (folder / "error").write_text(str(error))


@pytest.mark.skipif(os.name != "posix", reason="needs a limit of the size of files")
def test_weights_that_the_disk_does_not_take_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    written(tmp_path / "source")
    run_function(export_beyond_a_limit, tmp_path)
    error = (tmp_path / "error").read_text()
    assert "\n" not in error and "model.safetensors: the weights cannot be written (" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error", "source"]


def test_a_folder_that_a_killed_export_left_goes_after_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / f".export.tmp.{2**22 + n}-00000000" for n in (1, 2))
    for path in (old, new):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    write_folder_atomically(tmp_path / "out", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "out"]


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    large = source()
    with torch.no_grad():
        large.model.model.norm.weight[0] = 1e5
    folder = tmp_path / "source"
    folder.mkdir()
    write_model_folder(large, folder)
    refused(
        lambda: export(folder, tmp_path / "out", dtype="fp16"),
        CheckpointError,
        r"model.norm.weight: a weight is outside the range of fp16 \(100000\)",
    )


def test_layer_norm_with_wide_heads_has_no_architecture_to_be_exported_as(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    config = json.loads(state["config"])
    config["model"] |= {"norm": "layernorm", "head_dim": 32}
    model = SmolLM2(tiny_model_config(config["model"]))
    state |= {"config": json.dumps(config), "model": dict(model.state_dict())}
    state["tied"] = []
    torch.save(state, tmp_path / "wide.pt")
    refused(lambda: export(tmp_path / "wide.pt", tmp_path / "out"), CheckpointError, "StableLM")


def tiny_model_config(values: dict[str, object]) -> Any:
    from smollm2.config.schema import ModelConfig

    return ModelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format: 'onnx' is unknown"),
        ({"dtype": "int3"}, "dtype: 'int3' is unknown"),
        ({"shard_bytes": 0}, "shard_bytes: 0 is too small"),
    ],
)
def test_an_unknown_option_is_a_config_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(lambda: export(tmp_path, tmp_path / "out", **options), ConfigError, message)


def test_heads_that_transformers_5_refuses_are_named_by_the_export(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", hidden_size=96, num_attention_heads=5, num_key_value_heads=1, head_dim=16)
    refused(
        lambda: export(folder, tmp_path / "out"),
        CheckpointError,
        r"hidden_size \(96\) is not a multiple of its heads \(5\)",
    )


@pytest.mark.parametrize("changes", [{}, {"norm": "layernorm"}], ids=["Llama", "StableLM"])
def test_the_tokenizers_output_goes_to_generate_as_people_write_it(changes: dict[str, object], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    export(written(tmp_path / "source", **changes), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'tokenizer("Once upon a time", return_tensors="pt")' in card
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = "Once upon a time"
    ids = model.generate(**tok(text, return_tensors="pt"), max_new_tokens=4)
    assert ids.shape[1] <= len(text) + 4
    assert pipeline("text-generation", model=str(tmp_path / "out"))(text)[0]["generated_text"].startswith(text)


def run_export(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smollm2", "export", str(source), str(target)]
    env = {**os.environ, "PYTHONPATH": ROOT, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)


@pytest.mark.slow  # it compiles every module anew, without docstrings
def test_a_transformers_that_cannot_run_here_is_named_and_the_other_reader_decides(tmp_path: Path) -> None:
    """With PYTHONOPTIMIZE=2 there are no docstrings, of which transformers builds its own."""
    done = run_export(written(tmp_path / "source"), tmp_path / "out", PYTHONOPTIMIZE="2")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    certificate = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert [reading["reader"].split()[0] for reading in certificate["readers"]] == ["smollm2"]
    (unusable,) = certificate["unusable_readers"]
    assert unusable["reader"].startswith("transformers 5") and unusable["reason"].startswith("ValueError: ")
    assert f"{unusable['reader']}: not used to check the folder ({unusable['reason']})" in done.stdout
    assert unusable["reason"] in (tmp_path / "out" / "README.md").read_text()


def export_with_library(library: Path, folder: Path) -> None:
    """Export with another library of packages before the others; write what is printed."""
    sys.path.insert(0, str(library))
    with (folder / "stdout").open("w") as out, contextlib.redirect_stdout(out):
        assert main(["export", str(folder / "source"), str(folder / "out")]) == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise RuntimeError('broken\\nhere')", "RuntimeError: broken"),
        ("raise ModuleNotFoundError('No module named transformers', name='transformers')", "it is not installed"),
    ],
    ids=["broken", "not installed"],
)
def test_a_transformers_that_is_not_installed_or_broken_is_named(content: str, reason: str, tmp_path: Path) -> None:
    library = tmp_path / "library" / "transformers"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(content)
    written(tmp_path / "source")
    run_function(export_with_library, library.parent, tmp_path)
    assert f"transformers: not used to check the folder ({reason})" in (tmp_path / "stdout").read_text()


@pytest.mark.parametrize("flags", [[], ["--best"]])
def test_the_command_takes_the_newest_or_the_best_checkpoint_of_a_run_folder(
    flags: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    run = checkpoint.parent
    assert main(["export", str(run), *flags, str(tmp_path / "out")]) == 0
    name = json.loads((run / "best.json").read_text())["file"] if flags else list_checkpoints(run)[-1].name
    (mine, _), (theirs, _) = load_model(tmp_path / "out"), load_model(run / name)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_the_command_prints_what_each_reader_found(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("smollm2 ") and "logits differ by at most 0," in lines[0]
    assert lines[1].startswith("transformers ")
    assert lines[-1] == f"{tmp_path / 'out'}: the same model, in bfloat16; parity.json and README.md hold the proof"


MISTAKES = {
    "no checkpoint": (["absent.pt", "out"], 4),
    "not a checkpoint": (["input.txt", "out"], 4),
    "an empty folder": (["empty", "out"], 4),
    "no text": (["step_0012.pt", "out", "--input_file", "absent.txt"], 3),
    "an unknown dtype": (["step_0012.pt", "out", "--dtype", "int3"], 2),
    "shards of nothing": (["step_0012.pt", "out", "--shard_gb", "0"], 2),
    "an existing target": (["step_0012.pt", "empty"], 4),
    "no target": (["step_0012.pt"], 2),
}


@pytest.mark.parametrize(("arguments", "code"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_line_and_its_exit_code(
    arguments: list[str],
    code: int,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "input.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "step_0012.pt").write_bytes(checkpoint.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
