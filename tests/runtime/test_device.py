"""Devices and compilation."""

import pytest
import torch
import torch._inductor.config

from smollm2.errors import ConfigError
from smollm2.runtime.device import compile_blocks


def test_a_machine_without_a_compiler_is_refused_before_the_first_step() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    without = {"cpp.cxx": (None, "/absent/compiler"), "force_disable_caches": True}
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(without),
        pytest.raises(ConfigError, match=r"training\.compile: torch cannot compile .* Set it"),
    ):
        compile_blocks(layers)
    torch.compiler.reset()
