"""Every message of the package's errors: one snapshot, and the rules of their layout."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "write_messages.py"))
MESSAGES = SCRIPT["find_messages"](ROOT / "smollm2")
THREE_PARTS = [message for message in MESSAGES if message.what and message.kind != "Interrupted"]
CONVERTED = ("cli.", "config.")
"""Folders in which every message is given as where, what and advice."""

IN_ONE_PIECE = {
    "cli.main": "lines that are laid out already",
    "config.reading": "lines that are laid out already",
    "cli.run_flags": "lines that are laid out already",
}
"""Messages of these files that have no parts of their own."""

BANNED = re.compile(r"will not do|goes on|go on|\bstands\b|\btold\b|\bsaid\b|\blies\b|set aside|cut short|broken off")


def test_the_snapshot_of_all_messages_is_current() -> None:
    """If this fails: read the difference, then python scripts/write_messages.py."""
    assert (ROOT / "tests" / "messages.txt").read_text(encoding="utf-8") == SCRIPT["render"]()


@pytest.mark.parametrize("message", THREE_PARTS, ids=lambda message: f"{message.module}:{message.line}")
def test_a_message_follows_the_rules_of_its_layout(message: object) -> None:
    what, advice = message.what, message.advice  # type: ignore[attr-defined]
    assert not what.endswith(".")
    assert not advice.endswith(".") or advice.endswith("...")
    assert not BANNED.search(f"{what} {advice}")
    assert " - " not in re.sub(r"\{.*?\}", "", f"{what} {advice}")  # the separator of parts before they were arguments


@pytest.mark.parametrize(
    "message", [message for message in THREE_PARTS if message.module.startswith(CONVERTED)], ids=str
)
def test_a_message_names_what_to_do(message: object) -> None:
    what, advice = message.what, message.advice  # type: ignore[attr-defined]
    assert advice or what.startswith("must be ")


def test_messages_of_the_converted_folders_have_parts() -> None:
    whole = {message.module for message in MESSAGES if not message.what and message.module.startswith(CONVERTED)}
    assert whole <= IN_ONE_PIECE.keys()


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('ConfigError("a", f"b {x}", "c")', "m | ConfigError | a | b {x} | c"),
        ('ConfigError("a", advice="c", what="b")', "m | ConfigError | a | b | c"),
        ('ConfigError(f"{a}: b; c")', "m | ConfigError | {a}: b; c | - | -"),
        ('what = f"b {x}"\nConfigError("a", what, d)', "m | ConfigError | a | b {x} | {d}"),
        ('ConfigError("a", "b" if x else "c")', "m | ConfigError | a | b / c | -"),
    ],
)
def test_messages_are_found_in_each_form(source: str, line: str) -> None:
    import ast

    [found] = SCRIPT["find_in"](ast.parse(source), "m")
    assert str(found) == line
