"""Generation on a GPU against the same model on the CPU, and a batch against its prompts alone."""

import copy

import pytest
import torch
from gpu_runs import MODEL

from smollm2.config.schema import ModelConfig
from smollm2.data.tokenizer import Tokenizer, load_tokenizer
from smollm2.inference.generation import generate
from smollm2.model.transformer import SmolLM2

PROMPTS = ["a", "the quick brown fox jumps", "and nobody minds. " * 4]


@pytest.fixture
def model() -> SmolLM2:
    """A model with large weights: the best token leads by so much that rounding does not change it."""
    model = SmolLM2(ModelConfig.model_validate({**MODEL, "vocab_size": 257, "initializer_range": 0.5})).eval()
    model.initialize(torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer("bytes")
    tokenizer.end_of_text = -1  # no token ends a text: each has all its length
    return tokenizer


def test_the_gpu_writes_the_text_of_the_cpu(device: torch.device, model: SmolLM2, tokenizer: Tokenizer) -> None:
    expected = generate(copy.deepcopy(model), tokenizer, PROMPTS, max_new_tokens=24, temperature=0)
    found = generate(model.to(device), tokenizer, PROMPTS, max_new_tokens=24, temperature=0)
    assert found == expected


def test_a_batch_gives_each_prompt_its_own_text(device: torch.device, model: SmolLM2, tokenizer: Tokenizer) -> None:
    model.to(device)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=24, temperature=0)[0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=24, temperature=0) == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sampling_in_each_format_repeats_with_its_seed(
    device: torch.device, model: SmolLM2, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("16 bits are for GPUs here; tests/inference has the CPU's")
    model.to(device, dtype)
    first, second, third = (generate(model, tokenizer, ["a"], max_new_tokens=32, seed=seed) for seed in (1, 1, 2))
    assert first == second != third


def test_a_text_longer_than_the_context_slides_its_window(
    device: torch.device, model: SmolLM2, tokenizer: Tokenizer
) -> None:
    (text,) = generate(model.to(device), tokenizer, ["b" * 120], max_new_tokens=40, temperature=0)
    assert text
