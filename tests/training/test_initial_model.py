"""A run that starts from another model's weights, and the way of a model through import and export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import WORDS, metrics, outcome, tiny_config, write_tiny
from safetensors.torch import load_file
from tokenizer_kinds import ENDS, KINDS, make_tokenizer
from twins import small_model, transformers_twin, write_hugging_face_folder

from smollm2.cli.main import main
from smollm2.config.model_folder import read_hugging_face_config
from smollm2.config.reading import load_config
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text
from smollm2.exporting.export import export
from smollm2.exporting.readers import HOSTILE
from smollm2.inference.loading import load_hugging_face_model, load_model
from smollm2.plan.arithmetic import count_parameters
from smollm2.report.reading import read_runs
from smollm2.report.verdict import describe_change, notes_of
from smollm2.training.loop import train

SIZES = {
    "135M": (576, 1536, 30, 9, 3, 100_000, 134_515_008),
    "360M": (960, 2560, 32, 15, 5, 100_000, 361_821_120),
    "1.7B": (2048, 8192, 24, 32, 32, 130_000, 1_711_376_384),
}
"""Width, inner width, layers, heads, key-value heads, rotary base and parameters of the released SmolLM2 models."""

START = """
training: {train_steps: 4, batch_size: 2, gradient_accumulation_steps: 1, sequence_length: 32, learning_rate: 1e-3,
  warmup_steps: 1, precision: float32, log_interval: 1, eval_interval: 2, eval_windows: 4, save_interval: 2,
  sample_tokens: 4, sample_prompts: [a], preflight: false}
data: {validation_fraction: 0.1}
"""


def write_twin(folder: Path, size: str, dtype: torch.dtype, tokenizer: Path, **changes: Any) -> Path:
    """A folder that transformers writes for SmolLM2's shape of this size, with random weights."""
    import transformers

    width, inner, layers, heads, kv, theta, _ = SIZES[size]
    values: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    llama_config: Any = transformers.LlamaConfig
    torch.manual_seed(1)
    twin: Any = transformers.LlamaForCausalLM(llama_config(**{**values, **changes}))
    twin.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


def as_version_4(folder: Path) -> None:
    """Write config.json as transformers 4 did."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("size", SIZES)
def test_the_released_sizes_have_their_parameters(size: str, tmp_path: Path, smollm2_tokenizer_folder: Path) -> None:
    small = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    folder = write_twin(tmp_path / "twin", size, torch.float32, smollm2_tokenizer_folder, **small)
    width, inner, layers, heads, kv, _, parameters = SIZES[size]
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 49152}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert count_parameters(read_hugging_face_config(folder)) == parameters


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("size", SIZES)
def test_a_twin_gives_transformers_logits_and_comes_back_byte_for_byte(
    size: str, version: int, tmp_path: Path, smollm2_tokenizer_folder: Path
) -> None:
    import transformers

    dtype = torch.bfloat16 if version == 5 else torch.float32
    few = {"num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 1024}
    if size == "1.7B":
        few |= {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    twin = write_twin(tmp_path / "twin", size, dtype, smollm2_tokenizer_folder, **few)
    tokenizer_from_text("bytes").save(twin)
    if version == 4:
        as_version_4(twin)
    ids = torch.arange(0, 1000, 10).view(2, 50)
    own = load_hugging_face_model(twin).eval()
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(own(ids), theirs(ids).logits)
    export(twin, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (twin / "model.safetensors").read_bytes()
    for path in twin.glob("*token*.json"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_run_from_a_folder_resumes_bit_identically_without_the_folder(tmp_path: Path) -> None:
    folder = write_hugging_face_folder(small_model(vocab_size=257), tmp_path / "model")
    tokenizer_from_text("bytes").save(folder)
    write_tiny(tmp_path, config=START)
    for run in ("whole", "parts"):
        train(tiny_config(tmp_path, run, model__init_from=folder), quiet=True)
    (tmp_path / "parts/step_0004.pt").unlink()
    shutil.rmtree(folder)
    train(load_config(tmp_path / "parts/config.yaml"), resume="auto", quiet=True)
    assert outcome(tmp_path / "parts", 4) == outcome(tmp_path / "whole", 4)


def test_a_run_begins_with_the_loss_of_the_model_it_starts_from(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    last = train(tiny_config(tmp_path, "first"), quiet=True).best_validation_loss
    write_tiny(tmp_path, config=START)
    train(tiny_config(tmp_path, "second", model__init_from=tmp_path / "first", training__train_steps=1), quiet=True)
    before = metrics(tmp_path / "second")[0]
    assert before["step"] == 0 and before["validation_loss"] == pytest.approx(last, abs=0.2)


@pytest.mark.parametrize("preset", ["nano", "smollm2-135m"])
def test_the_shape_and_the_tokenizer_of_a_preset_give_way_to_those_of_the_model(preset: str, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, "base", training__train_steps=1), quiet=True)
    shape = load_config(tmp_path / "base/config.yaml").model
    values = {"model.init_from": str(tmp_path / "base"), "training.sequence_length": 8}
    found = load_config(preset=preset, **values)  # type: ignore[arg-type]
    assert found.model.model_dump(exclude={"init_from", "initializer_range"}) == shape.model_dump(
        exclude={"init_from", "initializer_range"}
    )
    assert found.data.tokenizer == "auto"


def test_the_text_that_must_not_get_worse_is_measured_before_during_and_after(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    (tmp_path / "other.txt").write_text("0123456789" * 300)
    train(tiny_config(tmp_path, "run", data__regression_input=tmp_path / "other.txt"))
    found = {row["step"]: row["regression_bpb"] for row in metrics(tmp_path / "run") if "regression_bpb" in row}
    assert list(found) == [0, 5, 10, 12] and len(set(found.values())) == 4
    change = describe_change(found[0], found[12])
    assert change in capfd.readouterr().out
    assert any(change in note for note in notes_of(read_runs([tmp_path / "run"])[0]))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--init_from", "nowhere"], 2, "--init_from: there is no folder 'nowhere'"),
        (["--init_from", "empty"], 4, "config.json: not found"),
        (
            ["--init_from", "model", "--model.hidden_size", "96"],
            2,
            "--model.hidden_size: is 96, but model/config.json has 64",
        ),
        (
            ["--init_from", "model", "--data.tokenizer", "bytes"],
            2,
            "data.tokenizer: is bytes, but the model of model.init_from has",
        ),
        (["--init_from", "small"], 4, "small: the tokenizer has 257 ids, but the embedding only 100 rows"),
        (["--init_from", "weightless"], 4, "model.safetensors: not found"),
    ],
)
def test_what_a_run_cannot_start_from_is_one_sentence(
    flags: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, vocab_size in (("model", 257), ("small", 100), ("weightless", 257)):
        write_hugging_face_folder(small_model(vocab_size=vocab_size), tmp_path / name)
        tokenizer_from_text("bytes").save(tmp_path / name)
    (tmp_path / "weightless/model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    write_tiny(tmp_path, config=START)
    assert main(["train", "--save_dir", "run", *flags]) == code
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_embedding_larger_than_its_tokenizer_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_hugging_face_folder(small_model(vocab_size=320), tmp_path / "model")
    tokenizer_from_text("bytes").save(folder)
    write_tiny(tmp_path, config=START)
    flags = {"model__init_from": folder, "training__train_steps": 1, "training__preflight": "true"}
    train(tiny_config(tmp_path, "run", **flags))
    assert "the tokenizer uses 257 of the embedding's 320 rows" in capfd.readouterr().out
    assert load_model(tmp_path / "run")[0].config.vocab_size == 320


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_llama_3_rope_scaling_is_that_of_transformers(tmp_path: Path) -> None:
    model = small_model(rope_scaling=SCALING, max_position_embeddings=256).eval()
    twin = transformers_twin(model)
    ids = torch.randint(0, 320, (2, 250), generator=torch.Generator().manual_seed(0))
    plain = small_model(max_position_embeddings=256).eval()
    with torch.no_grad():
        assert (model(ids) - twin(ids).logits).abs().max() < 1e-5 < (model(ids) - plain(ids)).abs().max()
    twin.save_pretrained(tmp_path)
    assert read_hugging_face_config(tmp_path).rope_scaling == SCALING


def foreign(kind: str) -> tuple[Tokenizer, Any]:
    """A tokenizer as this package reads it, and as transformers does."""
    import transformers

    backend = make_tokenizer(kind)
    fast: Any = transformers.PreTrainedTokenizerFast
    return Tokenizer(backend.to_str(), ENDS.get(kind)), fast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_texts_have_transformers_ids(kind: str) -> None:
    own, theirs = foreign(kind)
    for text in (*HOSTILE, WORDS * 5):
        assert own.encode_prompt(text) == theirs(text, split_special_tokens=True)["input_ids"], text


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_has_transformers_ids(kind: str, tmp_path: Path) -> None:
    from smollm2.data.building import prepare_tokens
    from smollm2.data.text import open_text

    own, theirs = foreign(kind)
    text = " ".join(f"the cat {n} sat\non the mat." for n in range(9000))
    (tmp_path / "input.txt").write_text(text)
    store = prepare_tokens(open_text(str(tmp_path / "input.txt"), tmp_path), own, tmp_path / "cache", 0.0)
    assert store.train.tolist() == [*theirs(text)["input_ids"], own.end_of_text]


def test_what_came_with_a_model_leaves_with_it_after_training(tmp_path: Path) -> None:
    folder = write_hugging_face_folder(small_model(vocab_size=257), tmp_path / "model")
    tokenizer_from_text("bytes").save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {
        "tokenizer_config.json": json.dumps(
            {**config, "chat_template": "{{ messages }}", "pad_token": "<|endoftext|>"}
        ),
        "generation_config.json": json.dumps({"eos_token_id": [256, 3], "temperature": 0.6}),
        "special_tokens_map.json": json.dumps({"pad_token": "<|endoftext|>"}),
    }
    for name, text in kept.items():
        (folder / name).write_text(text)
    write_tiny(tmp_path, config=START)
    train(tiny_config(tmp_path, "run", model__init_from=folder, training__train_steps=1), quiet=True)
    assert load_tokenizer(str(tmp_path / "run/tokenizer")).stops == {256, 3}
    export(tmp_path / "run", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in kept} == kept
    assert load_file(tmp_path / "out/model.safetensors")
