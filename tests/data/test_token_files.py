"""Token files of other projects, laid out here as their own code writes them."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from smollm2.data.token_files import is_token_file, open_token_files
from smollm2.data.windows import Windows
from smollm2.errors import DataError

IDS = [15496, 995, 50256, 40, 716, 50256]
ENDS = [3, 6]


def write_nanogpt(path: Path, ids: Sequence[int] = IDS) -> Path:
    np.array(ids, "<u2").tofile(path)
    return path


def write_llmc(
    path: Path, ids: Sequence[int] = IDS, magic: int = 20240520, version: int = 1, item: str = "<u2"
) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, item).tobytes())
    return path


def write_datatrove(
    path: Path,
    ids: Sequence[int] = IDS,
    item: str = "<u2",
    ends: Sequence[int] | None = ENDS,
    metadata: str | None = "HuggingFaceTB/SmolLM2-135M|2\n6\n6 T",
) -> Path:
    np.array(ids, item).tofile(path)
    if ends is not None:
        np.array(ends, "<u8").tofile(f"{path}.index")
    if metadata is not None:
        Path(f"{path}.metadata").write_text(metadata)
    return path


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str, str, bool, str | None]] = {
    "nanoGPT": (lambda folder: write_nanogpt(folder / "train.bin"), "nanoGPT .bin", "uint16", False, None),
    "llm.c GPT-2": (lambda folder: write_llmc(folder / "a.bin"), "llm.c .bin", "uint16", False, None),
    "llm.c Llama 3": (
        lambda folder: write_llmc(folder / "a.bin", magic=20240801, version=7, item="<u4"),
        *("llm.c .bin", "uint32", False, None),
    ),
    "datatrove": (
        lambda folder: write_datatrove(folder / "a.ds"),
        *("datatrove .ds", "uint16", True, "HuggingFaceTB/SmolLM2-135M"),
    ),
    "datatrove uint32": (
        lambda folder: write_datatrove(folder / "a.ds", item="<u4", metadata="meta-llama/Llama-3|4\n6\n6 T"),
        *("datatrove .ds", "uint32", True, "meta-llama/Llama-3"),
    ),
    "datatrove without a size": (
        lambda folder: write_datatrove(folder / "a.ds", metadata="gpt2\n6\n6 T"),
        *("datatrove .ds", "uint16", True, "gpt2"),
    ),
    "datatrove without a tokenizer": (
        lambda folder: write_datatrove(folder / "a.ds", metadata="Unknown Tokenizer|2|2\n6\n6 T"),
        *("datatrove .ds", "uint16", True, None),
    ),
    "datatrove without metadata": (
        lambda folder: write_datatrove(folder / "a.ds", metadata=None),
        *("datatrove .ds", "uint16", True, None),
    ),
    "datatrove uint32 without metadata": (
        lambda folder: write_datatrove(folder / "a.ds", item="<u4", metadata=None),
        *("datatrove .ds", "uint32", True, None),
    ),
    "datatrove alone": (
        lambda folder: write_datatrove(folder / "a.ds", ends=None, metadata=None),
        *("datatrove .ds", "uint16", False, None),
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_layout_is_read_as_its_project_documents_it(kind: str, tmp_path: Path) -> None:
    write, name, dtype, has_index, tokenizer = LAYOUTS[kind]
    files = open_token_files([write(tmp_path)])
    assert files.arrays[0].tolist() == IDS
    assert (files.format, files.dtype.name, files.tokenizer_name, len(files)) == (name, dtype, tokenizer, len(IDS))
    assert (files.ends.tolist() if files.ends is not None else None) == (ENDS if has_index else None)


def test_several_files_are_one_stream_in_the_given_order(tmp_path: Path) -> None:
    paths = [write_datatrove(tmp_path / f"{name}.ds") for name in "ba"]
    files = open_token_files(paths)
    assert [Path(str(array.filename)) for array in files.arrays if isinstance(array, np.memmap)] == paths
    assert files.ends is not None and files.ends.tolist() == [3, 6, 9, 12]
    assert files.ends.dtype == np.uint64


def test_there_are_no_ends_if_one_file_has_no_index(tmp_path: Path) -> None:
    paths = [
        write_datatrove(tmp_path / "a.ds", metadata=None),
        write_datatrove(tmp_path / "b.ds", ends=None, metadata=None),
    ]
    assert open_token_files(paths).ends is None


def test_an_id_outside_the_vocabulary_is_found_when_its_window_is_read(tmp_path: Path) -> None:
    windows = Windows(open_token_files([write_nanogpt(tmp_path / "train.bin")]).stream, 4, 4, 50_000)
    with pytest.raises(DataError, match=r"train\.bin: token 2 has id 50256, but the vocabulary size is 50000"):
        windows.read(0)


@pytest.mark.parametrize(
    ("name", "expected"), [("train.bin", True), ("00000_shuffled.DS", True), ("a.ds.index", False), ("a.txt", False)]
)
def test_the_end_of_the_name_tells_a_token_file(name: str, expected: bool) -> None:
    assert is_token_file(Path(name)) == expected


def cut(path: Path, count: int) -> Path:
    path.write_bytes(path.read_bytes()[:-count])
    return path


def extend(path: Path, data: bytes) -> Path:
    path.write_bytes(path.read_bytes() + data)
    return path


def with_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def fold(path: Path) -> Path:
    path.mkdir()
    return path


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda f: f / "a.bin", r"a\.bin: the file cannot be read \(No such file"),
    "a folder": (lambda f: fold(f / "a.bin"), "not a file"),
    "another ending": (
        lambda f: with_bytes(f / "a.txt", b"text"),
        "not a token file. Name files that end in .bin or .ds",
    ),
    "empty": (lambda f: with_bytes(f / "a.bin", b""), "a.bin: the file is empty"),
    "empty .ds": (lambda f: with_bytes(f / "a.ds", b""), "a.ds: the file is empty"),
    "a PyTorch model": (lambda f: with_bytes(f / "pytorch_model.bin", b"PK\x03\x04" + bytes(96)), "a zip archive"),
    "llm.c's evaluation": (lambda f: write_llmc(f / "a.bin", magic=20240522), "an evaluation file of llm.c"),
    "an odd size": (
        lambda f: cut(write_nanogpt(f / "a.bin"), 1),
        r"\(11 bytes\) is not a multiple of 2 bytes \(uint16\)",
    ),
    "an odd .ds": (
        lambda f: cut(write_datatrove(f / "a.ds", item="<u4", metadata="x|4\n6\n6 T"), 2),
        "22 bytes.*multiple of 4 bytes",
    ),
    "truncated": (lambda f: cut(write_llmc(f / "a.bin"), 2), r"6 tokens \(1,036 bytes\), but it has 1,034 bytes"),
    "longer": (lambda f: extend(write_llmc(f / "a.bin"), b"\0\0"), "but it has 1,038 bytes"),
    "a header alone": (lambda f: write_llmc(f / "a.bin", ids=[]), "its header announces 0 tokens"),
    "half a header": (lambda f: cut(write_llmc(f / "a.bin"), 500), "its header announces 6 tokens"),
    "a version": (lambda f: write_llmc(f / "a.bin", version=2), r"version 2, but only version 1 .*\(magic 20240520\)"),
    "another index": (
        lambda f: write_datatrove(f / "a.ds", ends=[3, 7]),
        r"it has 6 tokens of 2 bytes, but according to a\.ds\.index it has 7",
    ),
    "another count": (
        lambda f: write_datatrove(f / "a.ds", metadata="x|2\n9\n9 T"),
        r"according to a\.ds\.metadata it has 9",
    ),
    "an empty index": (lambda f: write_datatrove(f / "a.ds", ends=[]), r"a\.ds\.index: the file is empty"),
    "half an index": (
        lambda f: cut(Path(f"{write_datatrove(f / 'a.ds')}.index"), 3).with_suffix(""),
        r"a\.ds\.index: its size \(13 bytes\) is not a multiple of 8",
    ),
    "falling ends": (
        lambda f: write_datatrove(f / "a.ds", ends=[5, 3, 6]),
        r"document 1 ends at token 3, before document 0 \(token 5\)",
    ),
    "other metadata": (
        lambda f: write_datatrove(f / "a.ds", metadata="{}"),
        r"a\.ds\.metadata: this is not the metadata",
    ),
    "an unknown size": (lambda f: write_datatrove(f / "a.ds", metadata="x|3\n6"), "this is not the metadata"),
    "binary metadata": (
        lambda f: with_bytes(Path(f"{write_datatrove(f / 'a.ds')}.metadata"), b"\xff\xfe").with_suffix(""),
        "this is not the metadata",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    make, message = BROKEN[kind]
    with pytest.raises(DataError, match=message) as caught:
        open_token_files([make(tmp_path)])
    assert "\n" not in str(caught.value)


MIXED: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "formats": (
        lambda f: [write_nanogpt(f / "a.bin"), write_llmc(f / "b.bin")],
        r"b\.bin: its format \(llm\.c \.bin\) and that of .*a\.bin \(nanoGPT \.bin\) are different",
    ),
    "dtypes": (
        lambda f: [write_llmc(f / "a.bin"), write_llmc(f / "b.bin", magic=20240801, version=7, item="<u4")],
        r"b\.bin: its ids \(uint32\) and that of .*a\.bin \(uint16\)",
    ),
    "tokenizers": (
        lambda f: [write_datatrove(f / "a.ds"), write_datatrove(f / "b.ds", metadata="gpt2|2\n6\n6 T")],
        r"b\.ds: its tokenizer \(gpt2\) and that of .*a\.ds \(HuggingFaceTB/SmolLM2-135M\)",
    ),
}


@pytest.mark.parametrize("kind", MIXED)
def test_files_of_different_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = MIXED[kind]
    with pytest.raises(DataError, match=message):
        open_token_files(make(tmp_path))


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    first, second = (open_token_files([write_datatrove(f / "a.ds")]) for f in (tmp_path, tmp_path / "copy"))
    assert first.fingerprint == second.fingerprint


MANY = [i % 50_000 for i in range(999_999)]

CHANGES: dict[str, Callable[[Path], Path]] = {
    "the first id": lambda f: write_nanogpt(f / "b.bin", [1, *MANY[1:]]),
    "the last id": lambda f: write_nanogpt(f / "b.bin", [*MANY[:-1], 0]),
    "the length": lambda f: write_nanogpt(f / "b.bin", MANY[:-1]),
    "the format": lambda f: write_llmc(f / "b.bin", MANY),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_content_has_another_fingerprint(change: str, tmp_path: Path) -> None:
    original = open_token_files([write_nanogpt(tmp_path / "a.bin", MANY)])
    assert open_token_files([CHANGES[change](tmp_path)]).fingerprint != original.fingerprint


def test_another_index_is_another_fingerprint(tmp_path: Path) -> None:
    first, second = (
        open_token_files([write_datatrove(tmp_path / f"{end}.ds", ends=[end, 6])]).fingerprint for end in (2, 3)
    )
    assert first != second


def test_every_byte_of_a_small_file_is_in_the_fingerprint(tmp_path: Path) -> None:
    data = bytes(9_000)
    prints = {
        open_token_files([with_bytes(tmp_path / "a.bin", data[:at] + b"\1" + data[at + 1 :])]).fingerprint
        for at in range(0, 9_000, 100)
    }
    assert len(prints) == 90


def read_count() -> int:
    """The bytes that this process has read by system calls."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def resident_bytes(path: Path) -> int:
    """The bytes of a mapped file that this process has touched."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
    return 1024 * sum(map(int, found))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_a_file_of_100_gigabytes_opens_without_being_read(tmp_path: Path) -> None:
    path, ends = tmp_path / "a.ds", 2**20
    with path.open("wb") as file:
        file.truncate(100 * 10**9)
    tokens = 50 * 10**9
    np.linspace(tokens / ends, tokens, ends).astype("<u8").tofile(f"{path}.index")
    before = read_count()
    files = open_token_files([path])
    assert read_count() - before < 5 * 2**20
    assert len(files) == tokens and files.arrays[0][-1] == 0
    assert resident_bytes(path) < 2**20
    assert files.ends is not None and len(files.ends) == ends
