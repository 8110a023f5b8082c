"""What is in a checkpoint: what is saved is what is loaded, and what cannot be saved is named."""

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import save_steps, small_state
from torch import Tensor

from smollm2.checkpoint.discovery import load_checkpoint
from smollm2.checkpoint.format import content_hash
from smollm2.checkpoint.saving import save_checkpoint
from smollm2.errors import TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 500)
    loaded = load_checkpoint(path)
    assert path.name == "step_0500.pt"
    assert loaded.keys() == small_state(500).keys()
    assert content_hash({**loaded, "rng": 0}) == content_hash({**small_state(500), "rng": 0})
    assert loaded["rng"]["python"] == random.Random(500).getstate()


def test_any_torch_load_opens_a_checkpoint_and_finds_the_users_five_entries(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 7)
    content = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "scheduler", "step", "loss"} <= content.keys()


def test_a_loaded_state_is_saved_again_as_it_was(tmp_path: Path) -> None:
    first = load_checkpoint(save_steps(tmp_path, 3)[0])
    second = load_checkpoint(save_checkpoint(tmp_path, first, step=3))
    assert content_hash(first) == content_hash(second)


def test_a_loaded_state_does_not_lean_on_its_file(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 3)
    loaded = load_checkpoint(path)
    before = content_hash(loaded)
    path.write_bytes(bytes(path.stat().st_size))
    assert content_hash(loaded) == before


def test_tied_weights_are_stored_once_and_are_one_tensor_again(tmp_path: Path) -> None:
    [path] = save_steps(tmp_path, 1)
    content = torch.load(path, weights_only=True)
    assert "lm_head.weight" not in content["model"]
    assert content["tied"] == [["lm_head.weight", "model.embed_tokens.weight"]]
    model = load_checkpoint(path)["model"]
    assert model["lm_head.weight"] is model["model.embed_tokens.weight"]


def test_equal_weights_that_are_not_tied_stay_two(tmp_path: Path) -> None:
    state = small_state()
    state["model"]["lm_head.weight"] = state["model"]["lm_head.weight"].clone()
    model = load_checkpoint(save_checkpoint(tmp_path, state, step=1))["model"]
    assert model["lm_head.weight"].data_ptr() != model["model.embed_tokens.weight"].data_ptr()


def test_a_view_is_saved_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    state = small_state()
    state["model"]["model.norm.weight"] = torch.ones(1_000_000)[:4].requires_grad_()
    path = save_checkpoint(tmp_path, state, step=1)
    assert path.stat().st_size < 100_000
    assert torch.equal(load_checkpoint(path)["model"]["model.norm.weight"], torch.ones(4))


def test_an_ordered_dictionary_as_modules_give_it_is_saved(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    path = save_checkpoint(tmp_path, {**small_state(), "model": module.state_dict()}, step=1)
    assert type(module.state_dict()) is OrderedDict
    assert torch.equal(load_checkpoint(path)["model"]["weight"], module.weight)


@pytest.mark.parametrize(
    "value",
    [np.float64(1), np.ones(2), Path("x"), frozenset(), {(1, 2): 3}, torch.__version__, torch.Size([1])],
    ids=repr,
)
def test_a_value_that_no_load_would_take_is_refused_at_the_save_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"state\.best\.there"):
        save_checkpoint(tmp_path, {**small_state(), "best": {"there": [value]}}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_step_is_refused_at_the_save(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="step 1, not 2"):
        save_checkpoint(tmp_path, small_state(1), step=2)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    state = small_state()
    state["model"]["model.norm.weight"][1] = float("inf")
    with pytest.raises(TrainingError, match=r"step_0001\.pt: was not saved: 'model\.norm\.weight' in model contains"):
        save_checkpoint(tmp_path, state, step=1)
    assert list(tmp_path.iterdir()) == []


def one_bit_more(state: dict[str, Any]) -> None:
    state["model"]["model.norm.weight"].view(torch.int16)[2] ^= 1


def another_type(state: dict[str, Any]) -> None:
    weight: Tensor = state["model"]["model.norm.weight"]
    state["model"]["model.norm.weight"] = weight.view(torch.float16)


def another_shape(state: dict[str, Any]) -> None:
    weight: Tensor = state["model"]["model.norm.weight"]
    state["model"]["model.norm.weight"] = weight.view(2, 2)


@pytest.mark.parametrize("change", [one_bit_more, another_type, another_shape, lambda state: state.update(step=2)])
def test_the_content_hash_sees_each_difference(change: Callable[[dict[str, Any]], None]) -> None:
    state = small_state()
    change(state)
    assert content_hash(state) != content_hash(small_state())


def test_the_content_hash_does_not_see_the_order_of_entries() -> None:
    state = small_state()
    assert content_hash(state) == content_hash(dict(reversed(state.items())))
