"""docs/data.md: each command is understood, and its input is read, from files made by the formats' own libraries."""

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from runs import ROOT

from smollm2.cli.main import build_parser
from smollm2.cli.run_flags import load_run_config
from smollm2.config.reading import load_config
from smollm2.data.sources import open_input, rules_of
from smollm2.data.token_files import open_token_files
from smollm2.data.token_inputs import find_token_input

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\|[^|]*\| `(smollm2 train [^`]*)` \|$", PAGE, re.MULTILINE)
TEXT = "A document. " * 50


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the page's commands name."""
    for folder in ("notes/drafts", "repository/src", "fineweb-sample/data"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("novel.txt", "notes/a.md", "notes/b.txt", "notes/drafts/c.md", "repository/src/main.py"):
        (tmp_path / name).write_text(TEXT)
    rows = "".join(json.dumps({"role": "user", "content": TEXT}) + "\n" for _ in range(3))
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    for name in ("dump.parquet", "fineweb-sample/data/train-00000-of-00001.parquet"):
        parquet.write_table(arrow.table({"text": 3 * [TEXT]}), tmp_path / name)
    (tmp_path / "shards").mkdir()
    for name in ("shards/0.ds", "train.bin"):
        (tmp_path / name).write_bytes(np.frombuffer(TEXT.encode(), np.uint8).astype("<u2").tobytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_read_their_input(command: str, inputs: Path) -> None:
    args, unknown = build_parser().parse_known_args(shlex.split(command)[1:])
    config, _ = load_run_config(args, unknown)
    for name in config.data.inputs:
        if tokens := find_token_input(name):
            assert len(open_token_files(tokens)) == len(TEXT)
        elif name != "OWNER/NAME":
            assert open_input(name, inputs / "cache", rules_of(config.data)).characters % len(TEXT) == 0


def test_the_page_has_a_command_for_each_kind_of_input() -> None:
    assert len(COMMANDS) == 13


def test_smollm2s_stages_are_a_valid_config(tmp_path: Path) -> None:
    (table,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "config.yaml").write_text(table)
    config = load_config(tmp_path / "config.yaml", training={"train_steps": 10**8})
    assert config.stage_steps == [0, *(-(-tokens // (48 * 2048)) for tokens in (6 * 10**12, 8 * 10**12, 10**13))]
