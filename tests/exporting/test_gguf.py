"""A GGUF file is the same model for llama.cpp, or it does not appear; a faulty writer is caught without llama.cpp."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_tokenizer import CHATML, END_OF_TEXT, END_OF_TURN, START_OF_TURN, chat_tokenizer
from io_faults import WatchedIo
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from twins import small_model

from smollm2 import export
from smollm2.cli.main import main
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_text, train_tokenizer
from smollm2.errors import CheckpointError, ConfigError, DataError, ResourceError
from smollm2.exporting.certificate import choose_text
from smollm2.exporting.gguf import describe_scaling, describe_source, list_tensors, write_gguf
from smollm2.exporting.gguf_contents import expected_factors
from smollm2.exporting.gguf_readers import certify_gguf
from smollm2.exporting.gguf_tokenizer import describe_tokenizer
from smollm2.exporting.hugging_face import write_model_folder
from smollm2.exporting.modelfile import write_modelfile
from smollm2.exporting.source import Source

gguf: Any = pytest.importorskip("gguf")

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, object]] = {
    "Llama": {"rope_theta": 100000.0},
    "Llama, untied": {"tie_word_embeddings": False},
    "Llama, wide heads": {"head_dim": 32, "norm_eps": 1e-6},
    "StableLM": {"norm": "layernorm", "rope_theta": 100000.0},
    "StableLM, untied": {"norm": "layernorm", "tie_word_embeddings": False},
}


def source(tokenizer: Tokenizer | None = None, **changes: Any) -> Source:
    """A small model with a chat template; its vocabulary is larger than its tokenizer's."""
    return Source(small_model(**changes), tokenizer or chat_tokenizer(), {})


def written(folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
    """A Hugging Face folder of a small model, to export from."""
    folder.mkdir()
    write_model_folder(source(tokenizer, **changes), folder)
    return folder


def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


@pytest.mark.parametrize("dtype", ["float32", "fp16", "bf16", "q8_0"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_every_key_token_and_tensor_comes_back(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    certificate = export(written(tmp_path / "source", **changes), tmp_path / "out", "gguf", dtype=dtype)
    assert certificate["passed"] and certificate["problems"] == []
    assert certificate["file"]["reader"].startswith("gguf 0.")
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == certificate


@pytest.mark.parametrize(
    ("dtype", "name", "file_type"),
    [
        ("float32", "float32", 0),
        ("float16", "float16", 1),
        ("fp16", "float16", 1),
        ("bf16", "bfloat16", 32),
        ("q8_0", "q8_0", 7),
    ],
)
def test_the_folder_holds_a_file_named_after_it_and_its_dtype(
    dtype: str, name: str, file_type: int, tmp_path: Path
) -> None:
    export(written(tmp_path / "source"), tmp_path / "out", "gguf", dtype=dtype)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(["Modelfile", "README.md", f"out-{name}.gguf", "parity.json"])
    reader = gguf.GGUFReader(tmp_path / "out" / f"out-{name}.gguf")
    assert reader.fields["general.file_type"].contents() == file_type
    norms = {tensor.tensor_type.name for tensor in reader.tensors if "norm" in tensor.name}
    assert norms == {"F32"}


def read_keys(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.gguf")
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_the_tokenizers_ids_template_and_holes_are_in_the_file(tmp_path: Path) -> None:
    export(written(tmp_path / "source"), tmp_path / "out", "gguf")
    keys = read_keys(tmp_path / "out")
    ids = {role: keys[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": START_OF_TURN, "eos": END_OF_TEXT, "eot": END_OF_TURN, "padding": END_OF_TURN}
    assert keys["tokenizer.chat_template"] == CHATML
    assert keys["tokenizer.ggml.token_type"] == [1] * 256 + [3] * 3 + [5] * 61
    assert keys["tokenizer.ggml.tokens"][257:260] == ["<|im_start|>", "<|im_end|>", "[PAD259]"]
    assert keys["tokenizer.ggml.add_bos_token"] is False


def test_a_tokenizer_that_begins_texts_says_so() -> None:
    backend = chat_tokenizer().backend
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", START_OF_TURN)])
    keys = describe_tokenizer(tokenizer_from_text(backend.to_str(), END_OF_TEXT), 320)
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.bos_token_id"] == START_OF_TURN


@pytest.mark.parametrize(("tokenizer", "pre"), [("bytes", "gpt-2"), ("trained", "smollm")])
def test_the_way_to_split_a_text_has_llama_cpps_name(tokenizer: str, pre: str) -> None:
    found = load_tokenizer("bytes") if tokenizer == "bytes" else train_tokenizer(["the cat and the hat\n"] * 20, 280)
    keys = describe_tokenizer(found, found.vocab_size)
    assert keys["tokenizer.ggml.pre"] == pre
    assert keys["tokenizer.ggml.merges"]


SYSTEM = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


def test_the_modelfile_of_a_chat_has_the_template_in_ollamas_language() -> None:
    assert write_modelfile("m.gguf", chat_tokenizer(), 128) == (
        f'FROM ./m.gguf\nTEMPLATE """{SYSTEM}"""\nSYSTEM """You are helpful."""\n'
        'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 128\n'
    )


def test_the_modelfile_of_a_base_model_has_no_template() -> None:
    text = write_modelfile("m.gguf", load_tokenizer("bytes"), 128)
    assert text == 'FROM ./m.gguf\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 128\n'


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "{% if %}", CHATML + "{{ messages | length }}"],
)
def test_a_template_of_another_form_is_left_to_ollama(template: str) -> None:
    text = write_modelfile("m.gguf", chat_tokenizer(template), 128)
    assert "\nTEMPLATE" not in text and "# No TEMPLATE" in text


Fields = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def keep_the_order_of_rows(fields: Fields, tensors: Tensors, model: Any) -> None:
    tensors["blk.1.attn_q.weight"] = model.state_dict()["model.layers.1.self_attn.q_proj.weight"]


def write_wrong_theta(fields: Fields, tensors: Tensors, model: Any) -> None:
    fields["llama.rope.freq_base"] = 500000.0


def untie(fields: Fields, tensors: Tensors, model: Any) -> None:
    tensors["output.weight"] = torch.zeros_like(tensors["token_embd.weight"])


def swap_gate_and_up(fields: Fields, tensors: Tensors, model: Any) -> None:
    gate, up = "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def write_wrong_epsilon(fields: Fields, tensors: Tensors, model: Any) -> None:
    fields["llama.attention.layer_norm_rms_epsilon"] = 1e-6


def write_wrong_end_of_text(fields: Fields, tensors: Tensors, model: Any) -> None:
    fields["tokenizer.ggml.eos_token_id"] = 2


def shift_the_vocabulary(fields: Fields, tensors: Tensors, model: Any) -> None:
    tokens = fields["tokenizer.ggml.tokens"]
    fields["tokenizer.ggml.tokens"] = tokens[-1:] + tokens[:-1]


def shift_the_embedding(fields: Fields, tensors: Tensors, model: Any) -> None:
    tensors["token_embd.weight"] = tensors["token_embd.weight"].roll(1, 0)


def lose_the_end_of_turn(fields: Fields, tensors: Tensors, model: Any) -> None:
    del fields["tokenizer.ggml.eot_token_id"]


Sabotage = Callable[[Fields, Tensors, Any], None]

SABOTAGES: dict[str, tuple[Sabotage, str]] = {
    "no permutation": (keep_the_order_of_rows, "q_proj rows are not in the order that llama.cpp expects"),
    "wrong theta": (write_wrong_theta, "llama.rope.freq_base is 500000 and should be 10000"),
    "lost tie": (untie, "output.weight should not be in the file: the head is tied to the embedding"),
    "swapped gate and up": (swap_gate_and_up, "blk.0.ffn_gate.weight has the weights of blk.0.ffn_up.weight"),
    "wrong norm epsilon": (write_wrong_epsilon, "layer_norm_rms_epsilon is 1e-06 and should be 1e-05"),
    "wrong end-of-text id": (write_wrong_end_of_text, "tokenizer.ggml.eos_token_id is 2 and should be 256"),
    "shifted vocabulary": (shift_the_vocabulary, "tokenizer.ggml.tokens[0] is '[PAD319]' and should be"),
    "shifted embedding": (shift_the_embedding, "token_embd.weight differs from the source's"),
    "missing end of turn": (lose_the_end_of_turn, "tokenizer.ggml.eot_token_id is missing and should be 258"),
}


def sabotaged(sabotage: Sabotage, path: Path, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """The certificate of a file from a writer with a fault."""
    right = source(**changes)
    fields, tensors = describe_source(right, "out", dtype), list_tensors(right.model)
    sabotage(fields, tensors, right.model)
    write_gguf(path / f"out-{dtype}.gguf", fields, tensors, dtype)
    return certify_gguf(path / f"out-{dtype}.gguf", right.model, right.tokenizer, dtype, choose_text())


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
@pytest.mark.parametrize(("sabotage", "problem"), SABOTAGES.values(), ids=SABOTAGES.keys())
def test_a_faulty_writer_is_caught_and_named(sabotage: Sabotage, problem: str, dtype: str, tmp_path: Path) -> None:
    certificate = sabotaged(sabotage, tmp_path, dtype)
    assert not certificate["passed"]
    assert problem in certificate["problems"][0], certificate["problems"]
    assert certificate["unusable_readers"] == [{"reader": "llama.cpp", "reason": "the file is faulty"}]


def lose_the_head(fields: Fields, tensors: Tensors, model: Any) -> None:
    del tensors["output.weight"]


HEADS: dict[str, tuple[Sabotage, str]] = {
    "missing": (lose_the_head, "output.weight is missing: llama.cpp does not load a StableLM without it"),
    "wrong": (untie, "output.weight differs from the embedding, to which the head is tied"),
}


@pytest.mark.parametrize(("sabotage", "problem"), HEADS.values(), ids=HEADS.keys())
def test_a_tied_stablelm_needs_its_head(sabotage: Sabotage, problem: str, tmp_path: Path) -> None:
    certificate = sabotaged(sabotage, tmp_path, norm="layernorm")
    assert any(problem in found for found in certificate["problems"]), certificate["problems"]


def test_a_writer_without_a_fault_passes(tmp_path: Path) -> None:
    assert sabotaged(lambda fields, tensors, model: None, tmp_path)["passed"]


def test_llama_cpp_is_named_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_llama_cpp(monkeypatch)
    folder = written(tmp_path / "source")
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "gguf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gguf 0.") and lines[0].endswith(" 29 tensors, 320 tokens equal")
    assert lines[1] == "llama.cpp: not used to check the folder (llama-cpp-python is not installed)"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama.cpp was not used to check this folder when it was made (llama-cpp-python is not installed)" in card
    assert "ollama create out -f Modelfile" in card


def refused(action: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        action()
    assert "\n" not in str(error.value)


def test_a_missing_package_is_one_sentence_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    folder = written(tmp_path / "source")
    message = r"needs the package gguf, .* Run `pip install 'smollm2-training\[gguf\]'`\."
    refused(lambda: export(folder, tmp_path / "out", "gguf"), ConfigError, message)


def word_tokenizer() -> Tokenizer:
    backend = Backend(models.WordLevel({"a": 0, "<|endoftext|>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer_from_text(backend.to_str())


def prefixed_tokenizer() -> Tokenizer:
    backend = load_tokenizer("bytes").backend
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer_from_text(backend.to_str())


INEXPRESSIBLE: dict[str, tuple[dict[str, Any], str, type[Exception], str]] = {
    "words": ({"tokenizer": word_tokenizer()}, "float32", DataError, "GGUF files are written for byte-level BPE"),
    "a space before": (
        {"tokenizer": prefixed_tokenizer()},
        "float32",
        DataError,
        "byte-level BPE tokenizers that split",
    ),
    "rows of 48": (
        {"intermediate_size": 48},
        "q8_0",
        CheckpointError,
        r"blk.0.ffn_down.weight: q8_0 needs rows whose length is a multiple of 32, not 48",
    ),
}


@pytest.mark.parametrize(("changes", "dtype", "kind", "message"), INEXPRESSIBLE.values(), ids=INEXPRESSIBLE.keys())
def test_what_llama_cpp_cannot_represent_is_refused(
    changes: dict[str, Any], dtype: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "source", **changes)
    refused(lambda: export(folder, tmp_path / "out", "gguf", dtype=dtype), kind, message)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_wide_heads_of_a_stablelm_are_refused(tmp_path: Path) -> None:
    from smollm2.exporting.gguf import check_source

    wide = source(norm="layernorm", head_dim=32)
    refused(lambda: check_source(wide, tmp_path, "float32"), CheckpointError, r"StableLM .* not 128")


def test_heads_that_transformers_refuses_can_be_exported(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", hidden_size=96, num_attention_heads=5, num_key_value_heads=1, head_dim=16)
    assert export(folder, tmp_path / "out", "gguf")["passed"]


def test_q8_0_is_refused_for_hugging_face(tmp_path: Path) -> None:
    refused(lambda: export(tmp_path, tmp_path / "out", dtype="q8_0"), ConfigError, "unknown for the format huggingface")


def test_force_replaces_an_export_and_no_other_gguf_file(tmp_path: Path) -> None:
    folder, out = written(tmp_path / "source"), tmp_path / "out"
    export(folder, out, "gguf")
    refused(lambda: export(folder, out, "gguf"), CheckpointError, "the folder already exists")
    export(folder, out, "gguf", dtype="q8_0", force=True)
    assert [path.name for path in out.glob("*.gguf")] == ["out-q8_0.gguf"]
    (out / "mine.gguf").write_bytes(b"mine")
    refused(lambda: export(folder, out, force=True), CheckpointError, "contains mine.gguf")


def test_a_disk_without_space_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    class Full(WatchedIo):
        def free_bytes(self, folder: Path) -> int:
            return 1000

    folder = written(tmp_path / "source")
    full = Full(lambda *_: None)
    message = "the export needs 40.2 MB, but only 1 kB is free"
    refused(lambda: export(folder, tmp_path / "out", "gguf", dtype="q8_0", io_ops=full), ResourceError, message)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    right = source()
    path = tmp_path / "absent" / "out.gguf"
    fields, tensors = describe_source(right, "out", "float32"), list_tensors(right.model)
    refused(lambda: write_gguf(path, fields, tensors, "float32"), ResourceError, "the weights cannot be written")


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def scaled_config(norm: str = "rmsnorm") -> Any:
    return SimpleNamespace(norm=norm, head_dim=64, rope_theta=500000.0, rope_scaling=SCALING)


def test_the_factors_of_llama_3s_scaling_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **SCALING}
    config: Any = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = describe_scaling(scaled_config(), Path("model"))
    assert factors is not None
    torch.testing.assert_close(factors, plain / scaled)
    torch.testing.assert_close(factors, torch.tensor(expected_factors(scaled_config())))


def test_a_scaled_stablelm_is_refused() -> None:
    message = "llama.cpp does not scale the positions of stablelm"
    refused(lambda: describe_scaling(scaled_config("layernorm"), Path("model")), CheckpointError, message)


def test_a_scaled_model_is_written_with_its_factors(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", rope_scaling=SCALING)
    assert export(folder, tmp_path / "out", "gguf")["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer_name", ["trained here", "SmolLM2's"])
@pytest.mark.parametrize("changes", [{}, {"norm": "layernorm", "rope_theta": 100000.0}], ids=["Llama", "StableLM"])
def test_llama_cpp_computes_the_same(
    changes: dict[str, object], tokenizer_name: str, tmp_path: Path, smollm2_tokenizer_folder: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'smollm2-training[gguf]'")
    tokenizer = load_tokenizer(str(smollm2_tokenizer_folder))
    if tokenizer_name == "trained here":
        tokenizer = train_tokenizer([choose_text()], 1000)
    size = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 256}
    folder = written(tmp_path / "source", tokenizer, **size, **changes)
    certificate = export(folder, tmp_path / "out", "gguf")
    (reading,) = certificate["readers"]
    assert certificate["text"]["tokens"] >= 500
    assert reading["reader"].startswith("llama.cpp (llama-cpp-python ")
    assert reading["max_logit_difference"] <= 1e-3
    assert reading["argmax_agreement"] == 1.0
    assert reading["greedy_equal"] == reading["greedy_tokens"]
    assert reading["texts_equal"] == reading["texts"] == 17
    (rounded,) = export(folder, tmp_path / "small", "gguf", dtype="q8_0")["readers"]
    change = torch.tensor(rounded["loss"] - certificate["source"]["loss"]).expm1().item()
    print(
        f"{reading['max_logit_difference']:.2g}, q8_0: {rounded['max_logit_difference']:.2g}, perplexity {change:+.3%}"
    )
    assert abs(change) <= 0.01
