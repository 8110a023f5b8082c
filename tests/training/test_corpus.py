"""The text of a run and its validation text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs import WORDS, tiny_config, write_tiny

from smollm2.data.building import prepare_tokens
from smollm2.data.text import open_text
from smollm2.data.tokenizer import tokenizer_from_text
from smollm2.errors import DataError
from smollm2.inference.evaluation import evaluate
from smollm2.inference.loading import load_model
from smollm2.training.corpus import Place, find_tokens
from smollm2.training.loop import train

HELD_OUT = "A text that was written for validation alone, and that no training step has read. " * 20


def test_a_validation_text_of_its_own_is_validated_on_and_nothing_else_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": HELD_OUT}))
    config = tiny_config(tmp_path, data__validation_input=tmp_path / "held_out.jsonl", training__eval_windows=10**6)
    result = train(config)
    shown = capsys.readouterr().out
    assert f"; {len(WORDS * 40) + 1:,} for training, {len(HELD_OUT) + 1:,} for validation" in shown
    model, tokenizer = load_model(result.checkpoint_path)
    scored = evaluate(model, tokenizer, HELD_OUT, stride=32)
    rows = [json.loads(line) for line in (tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation_loss"] == pytest.approx(scored["loss"], rel=1e-3)


def test_tokens_that_a_rank_cannot_find_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    text = open_text(str(tmp_path / "a.txt"), tmp_path)
    store = prepare_tokens(text, tokenizer_from_text("bytes"), tmp_path / "cache", 0.0)
    with pytest.raises(DataError, match=r"this rank cannot find them\. Set data\.cache_dir"):
        find_tokens(replace(Place.of(store), folder=tmp_path / "absent"))
