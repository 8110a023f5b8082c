"""Generated text depends on the model, the prompt and the seed, and follows the model's distribution."""

import pytest
import torch
from twins import small_model, transformers_twin

from smollm2.generation import generate, sample
from smollm2.model import SmolLM2
from smollm2.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes", say=print)


@pytest.fixture(scope="module")
def model() -> SmolLM2:
    return small_model(vocab_size=257)


def test_greedy_text_is_that_of_transformers(model: SmolLM2, tokenizer: Tokenizer) -> None:
    prompt = "To be, or not"
    ids = torch.tensor([tokenizer.encode(prompt)])
    expected = transformers_twin(model).generate(
        ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.end_of_text, pad_token_id=0
    )[0, ids.shape[1] :]
    text = tokenizer.decode(int(i) for i in expected if i != tokenizer.end_of_text)
    assert generate(model, tokenizer, [prompt], max_new_tokens=40, temperature=0) == [text]


def test_the_same_seed_gives_the_same_text_whatever_stands_beside_it(model: SmolLM2, tokenizer: Tokenizer) -> None:
    alone = generate(model, tokenizer, ["abc"], max_new_tokens=20, seed=3)
    torch.manual_seed(99)
    assert generate(model, tokenizer, ["xyz", "abc"], max_new_tokens=20, seed=3)[1:] == alone
    assert generate(model, tokenizer, ["abc"], max_new_tokens=20, seed=4) != alone


def test_torchs_random_state_is_left_alone(model: SmolLM2, tokenizer: Tokenizer) -> None:
    before = torch.get_rng_state()
    generate(model, tokenizer, [""], max_new_tokens=5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_text_longer_than_the_context_slides(model: SmolLM2, tokenizer: Tokenizer) -> None:
    long = "word " * 60
    cut = long[-model.config.max_position_embeddings :]
    texts = [generate(model, tokenizer, [p], max_new_tokens=10, temperature=0) for p in (long, cut)]
    assert texts[0] == texts[1]


def test_sampling_follows_the_distribution_of_the_likeliest() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(logits, generator, temperature=0.5, top_k=3) for _ in range(4000)])
    expected = torch.cat(((logits[:3] / 0.5).softmax(-1), torch.zeros(1)))
    assert (drawn.bincount(minlength=4) / 4000 - expected).abs().max() < 0.02
