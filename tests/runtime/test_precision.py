"""The precision is a table; what this machine lacks is refused."""

from pathlib import Path

import pytest
import torch
import torch._inductor.config
from twins import without_bf16

from smollm2.cli.main import main
from smollm2.errors import ConfigError
from smollm2.runtime.precision import choose_precision, has_bf16_units, packs_weights


@pytest.mark.parametrize(
    ("requested", "device", "features", "name"),
    [
        ("auto", "cpu", {"bf16"}, "bf16"),
        ("auto", "cpu", set(), "float32"),
        ("auto", "cpu", {"packed_bf16", "packed_float32"}, "float32"),
        ("auto", "cuda", {"fp16", "bf16", "tf32"}, "bf16"),
        ("auto", "cuda", {"fp16"}, "fp16"),
        ("auto", "mps", {"fp16", "bf16"}, "float32"),
        ("float32", "cuda", {"bf16", "tf32"}, "float32"),
        ("tf32", "cuda", {"bf16", "tf32"}, "tf32"),
        ("float32", "cpu", set(), "float32"),
        ("bf16", "cpu", {"bf16"}, "bf16"),
        ("bf16", "mps", {"fp16", "bf16"}, "bf16"),
        ("fp16", "cuda", {"fp16"}, "fp16"),
    ],
)
def test_precision_is_a_table_over_device_and_features(
    requested: str, device: str, features: set[str], name: str
) -> None:
    assert choose_precision(requested, device, frozenset(features)).name == name


@pytest.mark.parametrize(
    ("requested", "device", "reason"),
    [
        ("fp16", "cpu", "a CPU computes fp16 13 to 25 times slower"),
        ("bf16", "cpu", "this CPU has no bf16 units"),
        ("tf32", "cpu", "capability 8"),
        ("bf16", "cuda", "capability 8"),
        ("bf16", "mps", "macOS 14"),
        ("tf32", "mps", "capability 8"),
    ],
)
def test_a_precision_without_hardware_is_refused(requested: str, device: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^training.precision: {requested}: .*{reason}.* Use auto or float32.$"):
        choose_precision(requested, device, frozenset())


@without_bf16
def test_training_in_bf16_on_a_cpu_that_emulates_it_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "nano", "--disable_wandb", "--input_file", "absent.txt"]
    assert main(["train", *flags, "--training.precision", "bf16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training.precision: bf16: this CPU has no bf16 units")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hints", "kept"),
    [
        ({}, True),
        ({"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "ALL"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
        ({"ATEN_CPU_CAPABILITY": "", "ONEDNN_MAX_CPU_ISA": ""}, True),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, False),
        ({"ATEN_CPU_CAPABILITY": "default"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False),
        ({"DNNL_MAX_CPU_ISA": "AVX2"}, False),
    ],
)
def test_the_features_of_a_cpu_obey_the_variables_by_which_torch_acts_as_a_smaller_one(
    hints: dict[str, str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert has_bf16_units(hints) == kept


def test_weights_are_packed_only_in_a_dtype_that_onednn_multiplies_here() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if packs_weights(dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(8, 8, dtype=dtype), 2)
            rows = torch.ones(2, 8, dtype=dtype)
            assert (torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "") == 8).all()
    assert not packs_weights(torch.int64)
