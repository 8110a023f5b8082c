"""Learning against an outside reference: nanoGPT's CPU setting on Shakespeare, where its own code ends at a validation loss of
1.905 after 2,000 steps. Here each optimizer gets a fraction of them; `benchmarks/learning.py` has the runs of 2,000."""

from pathlib import Path

import pytest
from runs import metrics, tiny_config, write_tiny

from smollm2.training.loop import train

NANOGPT_CPU = """
model: {hidden_size: 128, intermediate_size: 344, num_hidden_layers: 4, num_attention_heads: 4,
  max_position_embeddings: 64, norm: rmsnorm, %s}
training: {batch_size: 12, gradient_accumulation_steps: 1, weight_decay: 0.1, log_interval: 100, eval_interval: 0,
  save_interval: 0, sample_tokens: 0, %s}
data: {tokenizer: bytes, validation_fraction: 0.1}
"""
ADAMW = ("", "optimizer: adamw, learning_rate: 1e-3, min_learning_rate: 1e-4, warmup_steps: 100, betas: [0.9, 0.99]")
MUON = (
    "initializer_range: 0.05",
    "optimizer: muon, learning_rate: 6e-3, schedule: linear, warmup_steps: 30, betas: [0.8, 0.99]",
)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "steps", "limit"), [(ADAMW, 800, 1.90), (MUON, 400, 1.82)], ids=["adamw", "muon"])
def test_shakespeare_is_learned_better_than_by_nanogpt(
    recipe: tuple[str, str], steps: int, limit: float, shakespeare: Path, tmp_path: Path
) -> None:
    """In 800 and 400 of nanoGPT's 2,000 steps."""
    write_tiny(tmp_path, text=shakespeare.read_text(encoding="utf-8"), config=NANOGPT_CPU % recipe)
    train(tiny_config(tmp_path, training__train_steps=steps))
    last = metrics(tmp_path / "checkpoints")[-1]
    assert last["step"] == steps
    assert 1.0 < last["validation_loss"] <= limit
