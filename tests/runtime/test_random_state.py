"""The random state is saved and restored whole."""

import random

import numpy as np
import torch
import torch._inductor.config

from smollm2.runtime.random_state import random_state, restore_random_state


def test_every_generator_continues_from_its_state() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.standard_normal()), torch.rand(1).item()]

    draw()
    state = random_state()
    expected = draw()
    draw()
    restore_random_state(state)
    assert draw() == expected
