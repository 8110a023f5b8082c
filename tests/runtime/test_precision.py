"""The precision is a table; what this machine lacks is refused."""

import math
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch.utils._python_dispatch import TorchDispatchMode
from twins import small_model, without_bf16

from smollm2.analysis.diagnostics import make_histograms, measure_activations
from smollm2.cli.main import main
from smollm2.config.schema import TrainingConfig
from smollm2.data.tokenizer import load_tokenizer
from smollm2.errors import ConfigError
from smollm2.inference.generation import generate
from smollm2.runtime.device import start_runtime
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
    with pytest.raises(
        ConfigError, match=f"^training.precision: {requested} is not supported here: .*{reason}.* Use auto or float32.$"
    ):
        choose_precision(requested, device, frozenset())


@without_bf16
def test_training_in_bf16_on_a_cpu_that_emulates_it_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "nano", "--disable_wandb", "--input_file", "absent.txt"]
    assert main(["train", *flags, "--training.precision", "bf16"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training.precision: bf16 is not supported here: this CPU has no bf16 units")
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


@pytest.mark.parametrize("name", ["float32", "tf32"])
def test_a_run_sets_the_precision_of_float32_products_whatever_an_earlier_run_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr("smollm2.runtime.device.device_features", lambda device: frozenset({"tf32"}))
    try:
        for earlier in ("highest", "high"):
            torch.set_float32_matmul_precision(earlier)
            start_runtime(TrainingConfig.model_validate({"precision": name}))
            assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_an_apple_gpu_measures_a_model_without_float64() -> None:
    model = small_model().to("mps")
    found = measure_activations(model, torch.zeros(1, 32, dtype=torch.int64, device="mps"))
    assert all(math.isfinite(value) for block in found.values() for value in block.values())
    assert sum(make_histograms({"a": torch.randn(1000, device="mps")})["a"].counts) == 1000
    assert generate(small_model(vocab_size=257).to("mps"), load_tokenizer("bytes"), "ab", max_new_tokens=4)


def test_diagnostics_make_no_float64_tensor() -> None:
    """MPS has no float64; any that is made on the model's device would end a run there."""

    class NoFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), func
            return out

    with NoFloat64():  # type: ignore[no-untyped-call]
        measure_activations(small_model(), torch.zeros(1, 32, dtype=torch.int64))
        make_histograms({"a": torch.randn(1000)})
