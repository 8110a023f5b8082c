"""A plain trainer, readable from top to bottom: what `smollm2 train` computes, without what makes it safe and convenient.

    python examples/plain_training.py --config configs/nano.yaml --input_file input.txt \
        --training.optimizer adamw --training.schedule cosine

It trains in float32 on the CPU with AdamW and the cosine schedule, and prints the losses that `smollm2 train` writes to
metrics.jsonl for the same config and seed; a test compares them. The text is one document. There are no checkpoints, no
validation, no samples and no checks: for these, read docs/how-it-works.md.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from smollm2.config.reading import load_config
from smollm2.config.schema import Config
from smollm2.data.batches import Batches
from smollm2.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from smollm2.data.windows import Windows
from smollm2.model.transformer import SmolLM2


def main() -> None:
    """Read the config as `smollm2 train` does, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--input_file", default="input.txt")
    args, rest = parser.parse_known_args()
    keys = {flag.removeprefix("--"): (flag, value) for flag, value in zip(rest[::2], rest[1::2], strict=True)}
    train(load_config(args.config, flags=keys), Path(args.input_file))


def train(config: Config, path: Path) -> list[float]:
    """Train as `config` says on the text in `path`, and return the loss of every step."""
    t = config.training

    # The text becomes one stream of tokens, closed by an end-of-text token. Its tail is kept for validation.
    text = path.read_bytes().decode("utf-8")
    tokenizer = make_tokenizer(text, config)
    tokens = [*tokenizer.encode(text), tokenizer.end_of_text]
    held_out = max(2, round(len(tokens) * config.data.validation_fraction)) if config.data.validation_fraction else 0
    stream = np.array(tokens[: len(tokens) - held_out], np.uint32)

    # The stream is cut into windows: input_ids are T tokens, labels the tokens after each of them, -100 where there is none.
    # Batch n is a function of the seed and n alone: each epoch reads all windows in an order of its own.
    windows = Windows(stream, t.sequence_length, config.data.stride, tokenizer.vocab_size)
    batches = Batches([windows], t.seed, config.global_batch_size)

    # The seed decides the first weights.
    torch.manual_seed(t.seed)
    model = SmolLM2(config.with_vocab_size(tokenizer.vocab_size).model)

    # Weight decay pulls the matrices towards zero, not the norms' vectors.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=t.learning_rate, betas=t.betas, eps=t.eps, fused=True)

    losses = []
    for step in range(t.train_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)

        # The batch goes through the model in micro-batches, whose gradients add up. Each loss is a sum over tokens, divided by
        # the number of tokens in the whole batch: how the batch is cut does not change the result.
        batch = batches.read(step, 0, config.global_batch_size)
        count = int((batch.labels != -100).sum())
        total = 0.0
        for first in range(0, config.global_batch_size, t.batch_size):
            rows = slice(first, first + t.batch_size)
            loss, _ = model(torch.from_numpy(batch.input_ids[rows]), torch.from_numpy(batch.labels[rows]))
            (loss / count).backward()
            total += loss.item()

        # A gradient longer than max_grad_norm is shortened to that length.
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
        print(f"step {step + 1}/{t.train_steps}  loss {losses[-1]:.4f}", flush=True)
    return losses


def make_tokenizer(text: str, config: Config) -> Tokenizer:
    """Return the tokenizer that the config names: `auto` is a byte-pair encoding learned from the text."""
    if config.data.tokenizer == "auto":
        return train_tokenizer([text], config.model.vocab_size)
    return load_tokenizer(config.data.tokenizer)


def learning_rate_at(step: int, config: Config) -> float:
    """Return the rate after `step` finished steps: up in a line during warmup, then down along half a cosine."""
    t = config.training
    if step < t.warmup_steps:
        return t.learning_rate * (step + 1) / t.warmup_steps
    done = (step - t.warmup_steps) / max(1, t.train_steps - t.warmup_steps)
    return t.min_learning_rate + (t.learning_rate - t.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2


if __name__ == "__main__":
    main()
