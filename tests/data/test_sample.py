"""The sample corpus: enough English, the same every time, and no module imported to get it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from smollm2.data.sample import clean_prose, write_sample_corpus
from smollm2.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the corpus with a new interpreter; beside it, list what that process imported and the line it returned."""
    folder = tmp_path_factory.mktemp("sample")
    program = (
        "import sys; from pathlib import Path; from smollm2.data.sample import write_sample_corpus\n"
        "before = set(sys.modules); line = write_sample_corpus(Path('input.txt'))\n"
        "Path('line').write_text(line); Path('imported').write_text('\\n'.join(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder / "input.txt"


def test_it_is_one_and_a_half_to_three_megabytes(corpus: Path) -> None:
    assert 1_500_000 < corpus.stat().st_size < 3_000_000


def test_documents_are_between_form_feeds_and_none_is_empty(corpus: Path) -> None:
    documents = corpus.read_text(encoding="utf-8").split("\f")
    assert len(documents) > 300
    assert min(len(document.strip()) for document in documents) > 50


def test_it_is_prose(corpus: Path) -> None:
    text = corpus.read_text(encoding="utf-8")
    assert ">>>" not in text
    assert len(re.findall(r"\bthe\b", text)) / len(text.split()) > 0.03


def test_a_docstring_that_many_functions_share_is_kept_once(corpus: Path) -> None:
    assert corpus.read_text(encoding="utf-8").count("\nReturn repr(self).\n") <= 1


def test_no_module_of_the_library_is_imported_for_its_text(corpus: Path) -> None:
    imported = set((corpus.parent / "imported").read_text().split())
    assert not imported & {"antigravity", "this", "idlelib", "tkinter", "turtle", "pydoc_data", "pydoc_data.topics"}


def test_its_source_is_described_in_one_line(corpus: Path) -> None:
    assert re.fullmatch(
        r"the language reference and the docstrings of Python 3\.\d+\.\S+ standard library: "
        r"[\d,]+ documents, [12]\.\d million characters",
        (corpus.parent / "line").read_text(),
    )


def test_a_second_writing_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    write_sample_corpus(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == corpus.read_bytes()


def test_a_python_without_sources_asks_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="--input_file"):
        write_sample_corpus(tmp_path / "input.txt")
    assert not (tmp_path / "input.txt").exists()


def test_examples_and_separators_are_left_out() -> None:
    assert clean_prose("One.\n\n    >>> 1 + 1\n    2\n\nTwo\f.\n") == "One.\n\nTwo."
