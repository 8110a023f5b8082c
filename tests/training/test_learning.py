"""Learning against an outside reference: nanoGPT's CPU setting on Shakespeare, where its own code ends at 1.905."""

from pathlib import Path

import pytest
from runs import metrics, tiny_config, write_tiny

from smollm2.training.loop import train

NANOGPT_CPU = """
model: {hidden_size: 128, intermediate_size: 344, num_hidden_layers: 4, num_attention_heads: 4,
  max_position_embeddings: 64, norm: rmsnorm}
training: {train_steps: 2000, batch_size: 12, gradient_accumulation_steps: 1, warmup_steps: 100, weight_decay: 0.1,
  betas: [0.9, 0.99], log_interval: 100, eval_interval: 500, save_interval: 0, sample_tokens: 0}
data: {tokenizer: bytes, validation_fraction: 0.1}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "rate", "floor", "limit"), [("adamw", 1e-3, 1e-4, 1.72), ("muon", 3e-3, 3e-4, 1.62)]
)
def test_shakespeare_is_learnt_better_than_by_nanogpt(
    optimizer: str, rate: float, floor: float, limit: float, shakespeare: Path, tmp_path: Path
) -> None:
    write_tiny(tmp_path, text=shakespeare.read_text(encoding="utf-8"), config=NANOGPT_CPU)
    train(
        tiny_config(
            tmp_path,
            training__optimizer=optimizer,
            training__learning_rate=rate,
            training__min_learning_rate=floor,
        )
    )
    last = metrics(tmp_path / "checkpoints")[-1]
    assert last["step"] == 2000
    assert 1.0 < last["validation_loss"] <= limit
