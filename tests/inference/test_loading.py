"""Folders in Hugging Face's layout are read as they are; what this model does not compute is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import blocks_of, small_model, transformers_twin, write_hugging_face_folder

from smollm2.config.model_folder import DEFAULTS, REQUIRED_VALUES, read_hugging_face_config
from smollm2.data.tokenizer import load_tokenizer
from smollm2.errors import CheckpointError
from smollm2.inference.loading import load_hugging_face_model, load_model
from smollm2.inference.weights import build_model

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
    load_tokenizer("bytes").save(tmp_path)
    write_hugging_face_folder(small_model(), tmp_path)
    _, tokenizer = load_model(tmp_path)
    assert tokenizer.decode(tokenizer.encode("naïve")) == "naïve"


def test_the_released_config_is_understood(smollm2_tokenizer_folder: Path) -> None:
    config = read_hugging_face_config(smollm2_tokenizer_folder)
    assert (config.rope_theta, config.num_hidden_layers, config.norm) == (130000.0, 24, "rmsnorm")


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported. Use llama or stablelm"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type 'llama3' needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, "rope_type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"model_type": "stablelm"}, "partial_rotary_factor 0.25 is not supported"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_theta": "high"}, "rope_theta"),
        ({"rope_parameters": "default"}, "rope_parameters 'default' is not an object"),
        ({"rope_scaling": 2.0}, "rope_scaling 2.0 is not an object"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config: quantized models"),
        ({"compression_config": {"format": "pack"}}, "compression_config: quantized models"),
        ({"intermediate_size": 96}, r"up_proj.weight has shape \(160, 64\) instead of \(96, 64\)"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_a_setting_of_another_model_is_refused_by_name(
    change: dict[str, object], reported: str, tmp_path: Path
) -> None:
    write_hugging_face_folder(small_model(), tmp_path, **change)
    with pytest.raises(CheckpointError, match=reported):
        load_hugging_face_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("config.json", b"{", "cannot be read as JSON"),
        ("config.json", b"[]", "contains JSON of type list instead of an object"),
        ("model.safetensors", b"\xff" * 64, "is incomplete, or is not a safetensors file"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, reported: str, tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*{reported}"):
        load_hugging_face_model(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is outside the folder"):
        load_hugging_face_model(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a folder, and .* contains no checkpoints.* should contain config\.json"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path)
    model = small_model()
    with torch.no_grad():
        blocks_of(model)[1].mlp.up_proj.weight[3, 5] = value
    write_hugging_face_folder(model, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN or infinite values"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "stablelm"])
def test_a_key_that_is_null_or_absent_means_what_transformers_makes_of_it(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, StableLmConfig

    names = [name for name in DEFAULTS[kind] if name not in ("rope_theta", "partial_rotary_factor", "head_dim")]
    theirs: Any = (LlamaConfig if kind == "llama" else StableLmConfig)()
    assert [DEFAULTS[kind][name] or theirs.num_attention_heads for name in names if "num_key" in name] == [32]
    expected = {name: getattr(theirs, name) for name in names if "num_key" not in name}
    assert {name: DEFAULTS[kind][name] for name in expected} == expected
    assert DEFAULTS[kind]["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert DEFAULTS[kind]["partial_rotary_factor"] == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    whole_rotation = {"model_type": kind, "partial_rotary_factor": 1.0}
    found = []
    for content in (whole_rotation, dict.fromkeys([*DEFAULTS[kind], *REQUIRED_VALUES[kind]]) | whole_rotation):
        (tmp_path / "config.json").write_text(json.dumps(content))
        found.append(read_hugging_face_config(tmp_path))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": None},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": None, "rope_type": None, "partial_rotary_factor": None}},
        {"rope_scaling": {"type": None}},
    ],
    ids=str,
)
def test_a_rotary_setting_that_is_null_is_the_default(change: dict[str, object], tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
    assert read_hugging_face_config(tmp_path).rope_theta == 10000.0


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"])
def test_rotary_tables_that_old_folders_store_are_ignored(name: str, tmp_path: Path) -> None:
    model = small_model()
    write_hugging_face_folder(model, tmp_path)
    add_tensors(tmp_path, {name: torch.rand(8)})
    with torch.no_grad():
        assert torch.equal(load_hugging_face_model(tmp_path)(IDS), model(IDS))


def test_a_tensor_that_could_change_the_model_is_refused(tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    add_tensors(tmp_path, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is unknown"):
        load_hugging_face_model(tmp_path)


def test_a_tied_head_that_is_stored_too_and_equal_is_accepted(tmp_path: Path) -> None:
    model = small_model()
    write_hugging_face_folder(model, tmp_path)
    add_tensors(tmp_path, {"lm_head.weight": model.lm_head.weight.detach().clone()})
    with torch.no_grad():
        assert torch.equal(load_hugging_face_model(tmp_path)(IDS), model(IDS))


def test_a_tied_head_that_is_stored_with_other_values_is_refused_with_the_difference(tmp_path: Path) -> None:
    model = small_model()
    write_hugging_face_folder(model, tmp_path)
    head = model.lm_head.weight.detach().clone()
    head[3, 5] += 0.25
    add_tensors(tmp_path, {"lm_head.weight": head})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight to model\.embed_tokens\.weight, .* difference is 0\.25"
    ):
        load_hugging_face_model(tmp_path)


def test_a_checkpoint_of_ours_whose_tied_tensors_differ_is_refused() -> None:
    model = small_model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] += 1
    with pytest.raises(CheckpointError, match="the largest difference is 1"):
        build_model(model.config, weights, Path("step_0001.pt"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_weights_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model()
    write_hugging_face_folder(model, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    add_tensors(tmp_path, {name: model.state_dict()[name].to(dtype)})
    with pytest.raises(CheckpointError, match=f"up_proj.weight has dtype {str(dtype)[6:]}: quantized weights"):
        load_hugging_face_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_every_plain_float_format_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model().to(dtype)
    write_hugging_face_folder(model, tmp_path)
    assert torch.equal(load_hugging_face_model(tmp_path).lm_head.weight, model.lm_head.weight.float())


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n"

HALF_DOWNLOADED = {
    "an index without weight_map": ({"model.safetensors.index.json": "{}"}, "weight_map is missing"),
    "an index whose weight_map is no map": (
        {"model.safetensors.index.json": '{"weight_map": ["a"]}'},
        "weight_map is mis",
    ),
    "an index that names no files": (
        {"model.safetensors.index.json": '{"weight_map": {"a": 1}}'},
        "weight_map is missing",
    ),
    "a shard that is absent": (
        {"model.safetensors.index.json": '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'},
        "model-00001-of-00002.safetensors: not found. Download",
    ),
    "a pointer in place of the weights": ({"model.safetensors": POINTER}, "model.safetensors: is a Git LFS pointer"),
    "a pointer in place of the config": ({"config.json": POINTER}, "config.json: is a Git LFS pointer"),
    "a pointer in place of the index": ({"model.safetensors.index.json": POINTER}, "index.json: is a Git LFS pointer"),
    "no weights": ({"model.safetensors": None}, "model.safetensors: not found. Download"),
    "weights in a pickle": (
        {"model.safetensors": None, "pytorch_model.bin": "x"},
        "pytorch_model.bin is not read, because opening it may run code",
    ),
    "an empty file": ({"model.safetensors": ""}, "is incomplete, or is not a safetensors file"),
}


@pytest.mark.parametrize(("files", "reason"), HALF_DOWNLOADED.values(), ids=HALF_DOWNLOADED.keys())
def test_a_folder_that_was_half_downloaded_is_refused_in_one_line(
    files: dict[str, str | None], reason: str, tmp_path: Path
) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=reason) as raised:
        load_hugging_face_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_weights_that_are_cut_off_are_refused_in_one_line(tmp_path: Path) -> None:
    write_hugging_face_folder(small_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is incomplete, or is not a safetensors file"):
        load_hugging_face_model(tmp_path)
