"""Text from a model: one token after the other, each drawn from the distribution after those before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smollm2.model import SmolLM2
from smollm2.tokenizer import Tokenizer


@torch.inference_mode()
def generate(
    model: SmolLM2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, without the prompt, up to `max_new_tokens` or the end of text.

    An empty prompt starts a new document. Temperature 0 takes the likeliest token. A prompt and its continuation may be
    longer than the context: the window slides. The result depends on (model, prompt, seed) alone, not on its neighbours
    nor on torch's random state.
    """
    was_training = model.training
    model.eval()
    texts = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)
        ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
        new: list[int] = []
        while len(new) < max_new_tokens:
            token = sample(next_token_logits(model, ids + new), generator, temperature=temperature, top_k=top_k)
            if token == tokenizer.end_of_text:
                break
            new.append(token)
        texts.append(tokenizer.decode(new))
    model.train(was_training)
    return texts


SHAPE_STEP = 64
"""Lengths are padded to multiples of this: for each new shape oneDNN compiles its kernels anew, 0.4 s a token in bf16."""


def next_token_logits(model: SmolLM2, ids: Sequence[int]) -> Tensor:
    """Logits (V,) float32 on the CPU for the token after `ids`, of which the last max_position_embeddings are read."""
    positions = model.config.max_position_embeddings
    window = list(ids[-positions:])
    padding = min(-len(window) % SHAPE_STEP, positions - len(window))  # behind the last token, which does not see it
    rows = torch.tensor([window + [0] * padding], device=model.lm_head.weight.device)
    logits: Tensor = model.lm_head(model.model(rows)[0, len(window) - 1])
    return logits.float().cpu()


def sample(logits: Tensor, generator: torch.Generator, *, temperature: float, top_k: int | None) -> int:
    """One token id from logits (V,): the likeliest at temperature 0, else drawn among the `top_k` likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = (logits / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
