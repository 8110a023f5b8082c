"""`smollm2 verify` on models that we did not write: transformers' pass, faults are named, and layers are compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis.foreign_model import FAULT
from twins import small_model, write_hugging_face_folder

from smollm2.analysis.checks import describe_result, run_checks
from smollm2.analysis.foreign import list_foreign_checks, make_foreign
from smollm2.analysis.layers import compare_layers
from smollm2.cli.main import main

HERE = Path(__file__).with_name("foreign_model.py")
WORDS = ["verify", f"{HERE}:build", "--loss", f"{HERE}:loss", "--data", f"{HERE}:batches"]

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 211, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("llama", SHAPE),
        ("mistral", SHAPE),
        ("qwen2", SHAPE),
        ("qwen3", {**SHAPE, "head_dim": 8}),
        ("stablelm", SHAPE),
        ("gpt2", GPT2),
    ],
)
def test_a_model_of_transformers_raises_no_alarm(kind: str, shape: dict[str, int]) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **shape)
    from_config: Any = transformers.AutoModelForCausalLM.from_config
    model = from_config(config)
    foreign = make_foreign(model, lambda model, ids: model(ids, labels=ids).loss)
    results = run_checks(list_foreign_checks(foreign))
    assert [describe_result(one) for one in results if one.verdict in ("warn", "fail")] == []
    assert {one.name for one in results if one.verdict == "skip"} <= {"batches", "modes"}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("no mask", "causality"),
        ("no positions", "positions"),
        ("detached", "gradients"),
        ("dropout", "evaluation"),
        ("batch", "batch"),
        ("no shift", "next token"),
        ("double shift", "next token"),
        ("shifted data", "batches"),
        ("same batch", "batches"),
    ],
)
def test_a_fault_is_named_with_exit_code_5(
    fault: str, check: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FAULT, fault)
    assert main([*WORDS, "--json"]) == 5
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    assert found[check]["verdict"] == "fail", found[check]
    assert found[check]["cause"] and found[check]["advice"]


def test_a_sound_model_passes_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--strict"]) == 0
    shown = capsys.readouterr().out
    assert "11 passed, in " in shown and "skip" not in shown


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["absent.py:build"], "absent.py does not exist"),
        (["model.py"], "does not name a function in a file"),
        (["model.py:nothing"], "has no nothing"),
        (["broken.py:build"], "cannot be imported (ZeroDivisionError: division by zero)"),
        (["model.py:number"], "returned int"),
        (["model.py:fails"], "ended with RuntimeError: no"),
        (["model.py:hidden"], "returns (1, 256)"),
        (["model.py:empty"], "has no parameters"),
        (["model.py:picky"], "cannot be called with ids"),
        (["model.py:leaves"], "ended with SystemExit: 3"),
        (["leaves.txt:build"], "leaves.txt cannot be imported (SystemExit: 4)"),
        (["model.py:one"], "the model has 1 ids"),
        (["model.py:last"], "returns torch.float32 (1, 1, 5) for ids of shape (1, 64)"),
        (["model.py:right", "--data", "model.py:fails"], "--data: model.py:fails ended with RuntimeError: no"),
        (["model.py:right", "--data", "model.py:number"], "--data: model.py:number returned int"),
        (["model.py:right", "--against", "keras:x"], "keras:x is not known"),
        (["model.py:right", "--against", "transformers:absent"], "transformers cannot load absent"),
    ],
)
def test_what_cannot_be_verified_is_one_sentence(
    words: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0\n")
    Path("leaves.txt").write_text("raise SystemExit(4)\n")
    Path("model.py").write_text(MODELS)
    assert main(["verify", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and what in error, error


MODELS = """
import torch
from torch import nn

def number(): return 1
def fails(): raise RuntimeError("no")
def empty(): return nn.Identity()
def hidden(): return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(1))
def right(): return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
def picky(): return nn.Linear(3, 5)
def leaves(): raise SystemExit(3)
def one(): return nn.Sequential(nn.Embedding(1, 4), nn.Linear(4, 1))
class Last(nn.Sequential):
    def forward(self, ids): return super().forward(ids)[:, -1:]
def last(): return Last(nn.Embedding(5, 4), nn.Linear(4, 5))
"""


def test_the_first_layer_that_differs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    write_hugging_face_folder(model, tmp_path / "there")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    Path("ours.py").write_text(
        "import torch\nfrom twins import small_model\n"
        "def build():\n    model = small_model()\n    model.load_state_dict(torch.load('weights.pt'))\n    return model\n"
        "def wrong():\n    model = build()\n    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1\n    return model\n"
    )
    assert main(["verify", "ours.py:build", "--against", "transformers:there"]) == 0
    assert main(["verify", "ours.py:wrong", "--against", "transformers:there"]) == 5
    assert "the first difference is at model.layers.1.mlp.up_proj" in capsys.readouterr().out


def test_models_whose_names_differ_are_compared_in_order() -> None:
    class Renamed(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.wrapped = torch.nn.ModuleDict({name.replace(".", "_"): m for name, m in inner.named_children()})

        def forward(self, ids: torch.Tensor) -> Any:
            return self.wrapped["lm_head"](self.wrapped["model"](ids))

    ids = torch.arange(20).unsqueeze(0)
    assert compare_layers(Renamed(small_model()), small_model(), ids).place == ""
    other = small_model()
    other.model.norm.weight.data.add_(1)
    found = compare_layers(Renamed(small_model()), other, ids)
    assert "norm" in found.place and found.agreed > 20
