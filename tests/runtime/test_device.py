"""Precision as a table, the random state whole, signals remembered."""

import os
import platform
import random
import signal

import numpy as np
import pytest
import torch
import torch._inductor.config

from smollm2.errors import ConfigError, Interrupted
from smollm2.runtime.device import (
    StopSignal,
    choose_precision,
    compile_blocks,
    keep_freed_memory,
    random_state,
    restore_random_state,
)


@pytest.mark.parametrize(
    ("requested", "device", "features", "name"),
    [
        ("auto", "cpu", {"bf16"}, "bf16"),
        ("auto", "cpu", set(), "float32"),
        ("auto", "cuda", {"bf16", "tf32"}, "bf16"),
        ("auto", "cuda", set(), "fp16"),
        ("auto", "mps", set(), "float32"),
        ("float32", "cuda", {"bf16", "tf32"}, "float32"),
        ("tf32", "cuda", {"bf16", "tf32"}, "tf32"),
        ("bf16", "cpu", set(), "bf16"),
        ("fp16", "cuda", {"bf16"}, "fp16"),
    ],
)
def test_precision_is_a_table_over_device_and_features(
    requested: str, device: str, features: set[str], name: str
) -> None:
    assert choose_precision(requested, device, frozenset(features)).name == name


@pytest.mark.parametrize(
    ("requested", "device", "said"),
    [
        ("fp16", "cpu", "needs a CUDA GPU"),
        ("tf32", "cpu", "capability 8"),
        ("bf16", "cuda", "not computed by this GPU"),
    ],
)
def test_a_precision_without_hardware_is_refused(requested: str, device: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_precision(requested, device, frozenset())


def test_a_machine_without_a_compiler_is_told_before_the_first_update() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    without = {"cpp.cxx": (None, "/absent/compiler"), "force_disable_caches": True}
    torch.compiler.reset()
    with torch._inductor.config.patch(without), pytest.raises(ConfigError, match=r"training\.compile: true .* set it"):
        compile_blocks(layers)
    torch.compiler.reset()


def test_every_generator_goes_on_where_it_stood() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.standard_normal()), torch.rand(1).item()]

    draw()
    state = random_state()
    expected = draw()
    draw()
    restore_random_state(state)
    assert draw() == expected


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_remembered_and_raised_where_asked(name: str) -> None:
    stop = StopSignal()
    number = getattr(signal, name)
    with stop.listening():
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=name) as raised:
            stop.raise_if_set()
    assert raised.value.exit_code == 128 + number


def test_the_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with StopSignal().listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_the_handlers_of_the_caller_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_what_an_update_frees_is_there_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource  # Windows has none

    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    keep_freed_memory()
    page_faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pieces = [torch.ones(6 * 2**20) for _ in range(5)]  # 120 MB
        del pieces
        page_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(page_faults) < 10_000  # of 30,000
