"""Folders in Hugging Face's layout are read as they are; what this model does not compute is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from twins import small_model, transformers_twin, write_hugging_face_folder

from smollm2.data.tokenizer import load_tokenizer
from smollm2.errors import CheckpointError
from smollm2.inference.hugging_face_folder import load_hugging_face_model, read_hugging_face_config
from smollm2.inference.loading import load_model

IDS = torch.randint(0, 320, (1, 64), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
def test_a_folder_that_transformers_wrote_gives_its_logits(norm: str, shard_size: str, tmp_path: Path) -> None:
    twin = transformers_twin(small_model(norm=norm, rope_theta=100000.0))
    twin.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "200KB")
    with torch.no_grad():
        assert torch.equal(load_hugging_face_model(tmp_path)(IDS), twin(IDS).logits)


def test_a_folder_with_theta_at_top_level_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    model = small_model(rope_theta=100000.0)
    write_hugging_face_folder(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_hugging_face_model(tmp_path)(IDS), model(IDS))


def test_a_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    load_tokenizer("bytes", say=print).save(tmp_path)
    write_hugging_face_folder(small_model(), tmp_path)
    _, tokenizer = load_model(tmp_path)
    assert tokenizer.decode(tokenizer.encode("naïve")) == "naïve"


def test_the_released_config_is_understood(smollm2_tokenizer_folder: Path) -> None:
    config = read_hugging_face_config(smollm2_tokenizer_folder)
    assert (config.rope_theta, config.num_hidden_layers, config.norm) == (130000.0, 24, "rmsnorm")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type 'llama3' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"model_type": "stablelm"}, "partial_rotary_factor 0.25 is not supported"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"intermediate_size": 96}, r"up_proj.weight is \(160, 64\) and should be \(96, 64\)"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_a_setting_of_another_model_is_refused_by_name(change: dict[str, object], said: str, tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path, **change)
    with pytest.raises(CheckpointError, match=said):
        load_hugging_face_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "cannot be read as JSON"),
        ("config.json", b"[]", "not an object"),
        ("model.safetensors", b"\xff" * 64, "cannot be read as safetensors"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
        load_hugging_face_model(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        load_hugging_face_model(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder, and .* holds no checkpoint.* would hold config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    load_tokenizer("bytes", say=print).save(tmp_path)
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    write_hugging_face_folder(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite values"):
        load_model(tmp_path)
