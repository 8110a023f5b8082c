"""The section about the data: the sources of data.json, in tables, notes and a histogram."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from report_pages import HOSTILE, page_of
from run_folders import write_data

from smollm2.report.data import data_section
from smollm2.report.reading import read_run


def section_of(run: Path) -> dict[str, Any]:
    return cast(dict[str, Any], data_section(read_run(run))["sources"])


def write_sources(run: Path, *sources: dict[str, Any]) -> None:
    (run / "data.json").write_text(json.dumps({"sources": sources}))


def test_a_run_without_the_file_has_the_facts_alone(copy: Path) -> None:
    (copy / "data.json").unlink()
    assert data_section(read_run(copy))["sources"] is None
    text = page_of(copy).text
    assert "531,380, 3.67 characters each" in text and "Document lengths" not in text
    assert read_run(copy).problems == []


def test_a_run_without_events_has_the_sources_alone(copy: Path) -> None:
    (copy / "events.jsonl").write_text("")
    text = page_of(copy).text
    assert "data/documentation" in text and "Unencodable bytes" in text and "in a window" not in text


def test_each_source_is_a_row_of_the_table(run: Path) -> None:
    section = section_of(run)
    assert [row[0] for row in section["rows"]] == ["data/documentation", "data/stories"]
    first = dict(zip(section["header"], section["rows"][0], strict=True))
    assert {name: first[name] for name in ("Documents", "Duplicates", "Blank", "Weight", "Epochs")} == {
        "Documents": "400",
        "Duplicates": "10",
        "Blank": "3",
        "Weight": "0.5",
        "Epochs": "1.50",
    }
    assert {name: first[name] for name in ("Characters per token", "Unencodable bytes", "Overlap")} == {
        "Characters per token": "4.00",
        "Unencodable bytes": "0.00%",
        "Overlap": "3.4%",
    }


def test_a_column_without_values_is_omitted(copy: Path) -> None:
    write_sources(copy, {"name": "a", "tokens": 5, "weight": None})
    assert section_of(copy)["header"] == ("Source", "Tokens")


def test_duplicates_and_the_overlap_are_noted_and_a_high_one_is_marked(copy: Path) -> None:
    write_data(copy, "a", "b", "c")
    notes = section_of(copy)["notes"]
    assert [(name, is_high) for name, _, is_high in notes] == [(n, False) for n in "aabbc"] + [("c", True)]
    assert notes[0][1].startswith("10 documents with the content of an earlier one: ")
    assert notes[5][1] == "13.4% of the validation 13-grams also occur in training."


def test_of_many_sources_only_the_first_and_a_high_overlap_have_notes(copy: Path) -> None:
    quiet, high = ({"share": share, "text": "x", "is_high": share > 0.1} for share in (0.01, 0.5))
    write_sources(copy, *({"name": str(i), "overlap": high if i == 11 else quiet} for i in range(12)))
    assert [name for name, *_ in section_of(copy)["notes"]] == [*map(str, range(8)), "11"]


def test_the_histogram_has_a_bar_for_each_source_and_length(run: Path) -> None:
    data = section_of(run)["figure"]["data"]
    assert [one["name"] for one in data["sources"]] == ["data/documentation", "data/stories"]
    for one in data["sources"]:
        assert len(one["shares"]) == len(data["bins"]) and sum(one["documents"]) == 400
        assert sum(one["shares"]) == pytest.approx(100)
    assert all(below == 2 * at_least for at_least, below in data["bins"])


def test_the_figure_is_described_in_words(run: Path) -> None:
    lengths = json.loads((run / "data.json").read_text())["sources"][0]["summary"]["lengths"]
    summary = section_of(run)["figure"]["summary"]
    assert f"data/documentation: median {lengths['median']:,} tokens" in summary
    assert f"longest {lengths['longest']:,}." in summary


def test_more_sources_than_can_be_told_apart_are_counted(copy: Path) -> None:
    write_data(copy, *(f"source {i}" for i in range(11)))
    figure = section_of(copy)["figure"]
    assert len(figure["data"]["sources"]) == 8
    assert figure["summary"].endswith("Not drawn: 3 more sources.")


def test_the_ten_longest_documents_of_each_source_are_listed(run: Path) -> None:
    longest = json.loads((run / "data.json").read_text())["sources"][1]["summary"]["longest"]
    rows = section_of(run)["longest"]
    assert len(rows) == 20
    index, tokens, characters = (f"{longest[0][name]:,}" for name in ("index", "tokens", "characters"))
    assert rows[10] == ("data/stories", index, tokens, characters)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.isprintable()])
def test_a_sources_name_is_text(copy: Path, text: str) -> None:
    write_data(copy, text, "other")
    page = page_of(copy)
    assert text in page.text
    assert any(data["sources"][0]["name"] == text for data in page.data if "sources" in data)


DAMAGED: dict[str, object] = {
    "a list": [],
    "no sources": {},
    "sources that are no list": {"sources": 5},
    "a source that is text": {"sources": ["a"]},
    "no name": {"sources": [{"tokens": 5}]},
    "a number as text": {"sources": [{"name": "a", "tokens": "5"}]},
    "a summary that is a list": {"sources": [{"name": "a", "summary": [1]}]},
    "half a bin": {"sources": [{"name": "a", "summary": {"histogram": [{"at_least": 1}]}}]},
    "a bin of null": {
        "sources": [{"name": "a", "summary": {"histogram": [{"at_least": 1, "below": 2, "documents": None}]}}]
    },
    "an overlap as text": {"sources": [{"name": "a", "overlap": "high"}]},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_description_is_named_and_the_page_built_without_it(kind: str, copy: Path) -> None:
    (copy / "data.json").write_text(json.dumps(DAMAGED[kind]))
    [problem] = read_run(copy).problems
    assert problem.startswith("data.json: is not a")
    assert "Document lengths" not in page_of(copy).text


EXTREME: dict[str, dict[str, Any]] = {
    "empty": {},
    "zeros": {"documents": 0, "bytes": 0, "tokens": 0, "unknown_bytes": 0},
    "huge": {"documents": 1e308, "tokens": 1e99, "characters": 1e99, "weight": -1e99},
    "empty bins": {"summary": {"histogram": [{"at_least": 1, "below": 2, "documents": 0}]}},
    "nothing in the summary": {"summary": {"lengths": None, "histogram": [], "duplicates": None, "longest": None}},
    "no share": {"overlap": {"share": None, "text": "the overlap was not measured"}},
}


@pytest.mark.parametrize("kind", EXTREME)
def test_numbers_beyond_all_bounds_draw_a_section(kind: str, copy: Path) -> None:
    write_sources(copy, {"name": "a source", **EXTREME[kind]})
    assert read_run(copy).problems == []
    assert "a source" in page_of(copy).text
