"""The keys of the section `data`: type, default, bounds, description, resume rule."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from smollm2.config.mixture import MOST_SOURCES, Mixture, StageStart, find_problems
from smollm2.config.section import Contradiction, Section, key
from smollm2.config.values import FilePath, FolderPath, Text

INPUT = "input.txt"
"""The default input; a config that leaves it as it is may have a mixture."""


class DataConfig(Section):
    """The text, and how it becomes windows of tokens."""

    input: FilePath = key(INPUT, "noted", "a path, a pattern, a hub name or `-`")
    """Text, JSONL or parquet: a file, folder, pattern, name on the hub, or `-` for standard input; without input.txt, a sample is made."""
    mixture: Mixture = key(
        {}, "noted", "inputs with their weights, as {web: 0.9, code: [0.1, 0.3]}", max_length=MOST_SOURCES
    )
    """Several inputs in place of `input`, each with the share of the windows drawn from it, or its share in each stage."""
    stages: tuple[StageStart, ...] = key((), "noted", "a list of steps or tokens, as [3000, 6e9 tokens]", max_length=64)
    """Where the second and each later stage of the mixture begins: after this many steps or tokens."""
    include: tuple[Text, ...] = key((), "noted", max_length=64)
    """Patterns of the files to read from a folder; default: text, source code, JSONL and parquet."""
    exclude: tuple[Text, ...] = key((), "noted", max_length=64)
    """Patterns of the files in a folder that are not read."""
    text_field: Text | None = key(None, "noted", min_length=1)
    """Field of JSONL and parquet rows that holds the text; default: text, content, body, ... (docs/data.md)."""
    on_bad_line: Literal["stop", "skip"] = key("stop", "noted")
    """What to do with a line of JSONL that holds no text: stop with its number, or skip and count it."""
    tokenizer: FilePath = key("auto", "refused", "`auto`, `bytes`, a path or a hub name")
    """`auto` (a byte-level BPE trained on the text), `bytes`, a folder with tokenizer.json, or a hub name."""
    cache_dir: FolderPath = key("cache", "free", "a path")
    """Folder of the token cache; default: cache beside save_dir."""
    validation_fraction: float = key(0.05, "refused", ge=0, le=0.5)
    """Share of the text kept for validation: whole documents, or the end of one long text."""
    validation_input: FilePath | None = key(None, "refused", "a path, a pattern, a hub name or null")
    """Another input whose documents are the validation text; validation_fraction is then not used."""
    train_on: Literal["assistant", "all"] = key("assistant", "refused")
    """Of conversations: the assistant's answers and the token that ends each, or every token."""
    chat_template: Text | None = key(None, "refused", "smollm2, chatml, a Jinja file, or null", min_length=1)
    """How conversations become text; default: the tokenizer's own template, or SmolLM2's."""
    add_tokens: tuple[Text, ...] = key((), "refused", max_length=1024)
    """Special tokens to add to the tokenizer; the rows of a model to start from begin near the mean of its embedding."""
    regression_input: FilePath | None = key(None, "free", "a path, a pattern, a hub name or null")
    """A text that must not get worse, such as general text while another is learned: measured before, during and after the run."""
    stride: int = key(2048, "refused", ge=1, le=2**24)
    """Tokens from one window to the next; default: sequence_length. If it is less, shared tokens are context, not targets."""
    pack: Literal["windows", "best_fit"] = key("windows", "refused")
    """How the tokens become windows: windows (contiguous), or best_fit (whole documents, of which only those longer than a window are cut)."""
    document_separator: Text | None = key(None, "refused", min_length=1)
    """Text between two documents of one file, such as a form feed; default: the file is one document."""
    document_mask: bool = key(False, "refused")
    """Documents in one window do not attend to one another, and the first token of each is not a target."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield a mask without documents, a validation text that is the training text, and invalid mixtures."""
        if self.mixture and self.input != INPUT:
            yield Contradiction(
                ("data.mixture", "data.input"), "cannot be combined with data.input", "set only one of the two"
            )
        if self.stages and not self.mixture:
            yield Contradiction(
                ("data.stages", "data.mixture"), "has no effect without data.mixture", "set both, or neither"
            )
        for what, advice in find_problems(self.mixture, len(self.stages) + 1) if self.mixture else ():
            yield Contradiction(("data.mixture", "data.stages"), what, advice)
        if self.validation_input is not None and self.validation_input in self.inputs:
            names = ("data.validation_input", "data.input")
            yield Contradiction(
                names, "is the training text", "choose another text, or leave data.validation_input out"
            )
        if self.document_mask and self.document_separator is None and self.is_one_text:
            keys = ("data.document_mask", "data.document_separator")
            yield Contradiction(keys, "has no effect without data.document_separator", "set both, or neither")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the run: those of the mixture, or the one input."""
        return tuple(self.mixture) or (self.input,)

    @property
    def is_one_text(self) -> bool:
        """Whether each input is a text file by its name, or standard input: one document, unless a separator is set."""

        def is_text(name: str) -> bool:
            is_pattern = any(character in name for character in "*?[")
            return name == "-" or (Path(name).suffix.lower() in (".txt", ".md") and not is_pattern)

        return len(self.inputs) == 1 and is_text(self.inputs[0])

    @property
    def held_out_fraction(self) -> float:
        """Share of `input` that is kept for validation: none if the validation text is another input."""
        return self.validation_fraction if self.validation_input is None else 0.0
