"""No check of a sound run warns or fails: presets, shapes, norms, packings, precisions, tokenizers, chats, imported weights."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from preparing import prepare_config, prepare_run
from runs import ROOT, write_tiny
from twins import small_model, write_hugging_face_folder

from smollm2.analysis.checks import describe_result
from smollm2.config.reading import load_config_with_origins
from smollm2.data.tokenizer import tokenizer_from_text
from smollm2.runtime.precision import Precision
from smollm2.training.loop import Prepared
from smollm2.training.preflight import check_run

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "rst", "l", "ß", "猫")]


def write_documents(path: Path, count: int = 300, seed: int = 0) -> Path:
    """Documents of random words, which have an order that can be learned and do not repeat each other."""
    r = random.Random(seed)
    texts = (" ".join(r.choices(WORDS, range(len(WORDS), 0, -1), k=r.randint(20, 200))) for _ in range(count))
    path.write_text("\f".join(texts), encoding="utf-8")
    return path


def alarms(prepared: Prepared, *, deep: bool = True) -> list[str]:
    """What the checks say against a run."""
    results = check_run(prepared.run, deep=deep)
    assert len(results) > 35
    return [describe_result(one) for one in results if one.verdict in ("warn", "fail")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    write_documents(tmp_path / "input.txt")
    return tmp_path


SOUND = {
    "as it is": {},
    "layernorm": {"model.norm": "layernorm"},
    "untied": {"model.tie_word_embeddings": "false"},
    "one layer": {"model.num_hidden_layers": "1"},
    "six layers": {"model.num_hidden_layers": "6"},
    "as many key heads as heads": {"model.num_key_value_heads": "2"},
    "four heads, two key heads": {"model.num_attention_heads": "4", "model.num_key_value_heads": "2"},
    "wide heads": {"model.head_dim": "64"},
    "narrow heads": {"model.num_attention_heads": "16", "model.num_key_value_heads": "4"},
    "large theta": {"model.rope_theta": "1e6"},
    "scaled positions": {
        "model.rope_scaling": "{factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 16}"
    },
    "small weights": {"model.initializer_range": "0.005"},
    "tiny weights": {"model.initializer_range": "1e-6"},
    "large weights": {"model.initializer_range": "0.1"},
    "short context": {"model.max_position_embeddings": "8"},
    "long context": {"model.max_position_embeddings": "512"},
    "isolated documents": {"data.document_separator": "\f", "data.document_mask": "true"},
    "packed documents": {"data.document_separator": "\f", "data.pack": "best_fit"},
    "packed and isolated": {"data.document_separator": "\f", "data.pack": "best_fit", "data.document_mask": "true"},
    "overlapping windows": {"data.stride": "7"},
    "no validation": {"data.validation_fraction": "0"},
    "muon": {"training.optimizer": "muon"},
    "muon, all decay": {"training.optimizer": "muon", "training.decay": "all"},
    "all decay": {"training.decay": "all", "training.weight_decay": "0.1"},
    "no decay": {"training.weight_decay": "0"},
    "strong decay": {"training.weight_decay": "10"},
    "no warmup": {"training.warmup_steps": "0"},
    "warmup only": {"training.warmup_steps": "12"},
    "wsd": {"training.schedule": "wsd", "training.train_steps": "100"},
    "linear to a floor": {"training.schedule": "linear", "training.min_learning_rate": "1e-3"},
    "one step": {"training.train_steps": "1"},
    "a tiny rate": {"training.learning_rate": "1e-9"},
    "no clipping": {"training.max_grad_norm": "0"},
    "z-loss": {"training.z_loss": "1e-4"},
    "one sequence": {"training.batch_size": "1", "training.gradient_accumulation_steps": "1"},
    "eager attention": {"training.attention": "eager"},
    "blocks attention": {"training.attention": "blocks"},
    "gradient checkpointing": {"training.gradient_checkpointing": "true"},
    "a trained tokenizer": {"data.tokenizer": "auto", "model.vocab_size": "700"},
}
"""Configs by what is special about them."""


@pytest.mark.parametrize("name", ["packed and isolated", "muon", "tiny weights"])
def test_a_sound_run_raises_no_alarm(name: str, folder: Path) -> None:
    assert alarms(prepare_run(folder, SOUND[name])) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_no_sound_config_raises_an_alarm(name: str, folder: Path) -> None:
    assert alarms(prepare_run(folder, SOUND[name])) == []


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # shrinking would run hundreds of times
)
@given(
    groups=st.sampled_from([1, 2, 4]),
    key_heads=st.integers(1, 4),
    half=st.integers(2, 24),
    inner=st.integers(8, 300),
    layers=st.integers(1, 4),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    tied=st.booleans(),
    std=st.floats(0.01, 0.05),
    seed=st.integers(0, 2**40),
)
def test_no_shape_raises_an_alarm(
    groups: int,
    key_heads: int,
    half: int,
    inner: int,
    layers: int,
    norm: str,
    tied: bool,
    std: float,
    seed: int,
    folder: Path,
) -> None:
    heads = groups * key_heads
    flags = {
        "model.num_attention_heads": heads,
        "model.num_key_value_heads": key_heads,
        "model.hidden_size": heads * 2 * half,
        "model.intermediate_size": inner,
        "model.num_hidden_layers": layers,
        "model.norm": norm,
        "model.tie_word_embeddings": tied,
        "model.initializer_range": std,
        "training.seed": seed,
    }
    assert alarms(prepare_run(folder, {key: str(value).lower() for key, value in flags.items()})) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "blocks", "eager"])
def test_bf16_raises_no_alarm_on_any_cpu(backend: str, folder: Path) -> None:
    prepared = prepare_run(folder, {"training.attention": backend})
    runtime = dataclasses.replace(prepared.run.runtime, precision=Precision("bf16", "emulated"))
    run = dataclasses.replace(prepared.run, runtime=runtime)
    assert alarms(dataclasses.replace(prepared, run=run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nano", "micro", "smollm2-135m", "smollm2-360m"])
def test_no_preset_raises_an_alarm(preset: str, tmp_path: Path) -> None:
    """Two layers of the large ones; the largest takes minutes on a CPU."""
    write_documents(tmp_path / "input.txt", 3000)
    flags = {
        "data.input": str(tmp_path / "input.txt"),
        "training.save_dir": str(tmp_path / "checkpoints"),
        "data.tokenizer": "auto",
        "model.vocab_size": "2000",
        **({"model.num_hidden_layers": "2"} if "smollm2" in preset else {}),
        "training.keep_last": "2",
    }
    config, _ = load_config_with_origins(None, preset=preset, flags={key: (key, text) for key, text in flags.items()})
    assert [one for one in alarms(prepare_config(config), deep=False) if not one.startswith("resources")] == []


@pytest.mark.slow
def test_smollm2s_tokenizer_raises_no_alarm(smollm2_tokenizer_folder: Path, shakespeare: Path, folder: Path) -> None:
    flags = {"data.tokenizer": str(smollm2_tokenizer_folder), "data.input": str(shakespeare)}
    assert alarms(prepare_run(folder, flags)) == []


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}])
def test_imported_weights_raise_no_alarm(changes: dict[str, object], folder: Path) -> None:
    source = write_hugging_face_folder(small_model(**changes), folder / "source")
    tokenizer_from_text("bytes").save(source)
    config = folder / "config.yaml"
    text = config.read_text().splitlines()
    at = next(n for n, line in enumerate(text) if line.startswith("training:"))
    config.write_text("\n".join([f"model: {{init_from: {source}}}", *text[at:]]).replace("tokenizer: bytes, ", ""))
    assert alarms(prepare_run(folder)) == []


@pytest.mark.slow
def test_source_code_raises_no_alarm(folder: Path) -> None:
    """In bytes, a quarter of its 13-grams are known from elsewhere in it, and half of that from a half of it."""
    (folder / "input.txt").write_text((ROOT / "smollm2" / "training" / "loop.py").read_text())
    assert alarms(prepare_run(folder)) == []


@pytest.mark.slow
def test_conversations_raise_no_alarm(folder: Path) -> None:
    r = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(r.choices(WORDS, k=8))},
                {"role": "assistant", "content": " ".join(r.choices(WORDS, k=12))},
            ]
        }
        for _ in range(200)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"data.input": str(folder / "chat.jsonl"), "model.max_position_embeddings": "256"}
    assert alarms(prepare_run(folder, flags)) == []


@pytest.mark.slow
def test_compiled_blocks_raise_no_alarm(folder: Path) -> None:
    assert alarms(prepare_run(folder, {"training.compile": "true"})) == []


def test_the_checks_raise_no_alarm_and_change_nothing_of_a_run(folder: Path) -> None:
    prepared = prepare_run(folder)
    weights = {name: p.detach().clone() for name, p in prepared.run.model.named_parameters()}
    modes = [module.training for module in prepared.run.model.modules()]
    state = torch.get_rng_state()
    assert alarms(prepared) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in prepared.run.model.named_parameters())
    assert all(p.grad is None for p in prepared.run.model.parameters())
    assert [module.training for module in prepared.run.model.modules()] == modes
