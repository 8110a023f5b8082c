"""The losses of n-gram models, compared with the same formula on plain dictionaries."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import TINY, WORDS, tiny_config, write_tiny

from smollm2.analysis.baselines import Baselines, find_baselines, measure_baselines
from smollm2.analysis.ngrams import CHUNK, ORDERS, join, lay_out, number, read_text, score_targets
from smollm2.config.reading import load_config
from smollm2.config.schema import IGNORE_INDEX, Config
from smollm2.data.corpus import Corpus, Listener, open_corpus
from smollm2.data.sample import write_sample_corpus
from smollm2.data.windows import Batch, JoinedWindows
from smollm2.tracking.charts import BASELINES
from smollm2.training.loop import train
from smollm2.training.resume import list_compared_windows
from smollm2.training.setup import open_validation

Event = tuple[tuple[int, ...], int]
"""The tokens before a target that the model may attend to, and the target."""


def list_events(windows: Sequence[Batch]) -> Iterator[Event]:
    """Yield each target of the windows, with its context."""
    for ids, labels, documents in windows:
        begin = 0
        for at, label in enumerate(labels.tolist()):
            if documents is not None and at and documents[at] != documents[at - 1]:
                begin = at
            if label != IGNORE_INDEX:
                yield tuple(ids[max(begin, at - 3) : at + 1].tolist()), label


class KneserNey:
    """Interpolated Kneser-Ney on dictionaries: counts[k] of the highest order k, kinds[k] of an order below another."""

    def __init__(self, events: list[Event], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts = {order: group(grams_of(events, order)) for order in range(1, 6)}
        self.kinds = {order - 1: group(gram[1:] for gram in set(grams_of(events, order))) for order in range(2, 6)}
        self.discounts = {id(table): discount_of(table) for table in (*self.counts.values(), *self.kinds.values())}
        self.lower = cache(self.lower)  # type: ignore[method-assign]

    def lower(self, order: int, context: tuple[int, ...], token: int) -> float:
        """The distribution of an order below another."""
        return self.level(self.kinds[order], order, context, token) if order else 1 / self.vocab_size

    def probability(self, order: int, context: tuple[int, ...], token: int) -> float:
        return self.level(self.counts[order], order, context, token) if order else 1 / self.vocab_size

    def level(
        self, table: dict[tuple[int, ...], Counter[int]], order: int, context: tuple[int, ...], token: int
    ) -> float:
        below = self.lower(order - 1, context[-(order - 2) :] if order > 2 else (), token)
        history = context[len(context) - order + 1 :]
        if len(context) < order - 1 or not table.get(history):
            return below
        followers, discount = table[history], self.discounts[id(table)]
        kept = max(followers[token] - discount, 0.0) if token in followers else 0.0
        return (kept + discount * len(followers) * below) / followers.total()


def grams_of(events: list[Event], order: int) -> Iterator[tuple[int, ...]]:
    for context, token in events:
        if len(context) >= order - 1:
            yield (*context[len(context) - order + 1 :], token)


def group(grams: Iterator[tuple[int, ...]]) -> dict[tuple[int, ...], Counter[int]]:
    table: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for *history, token in grams:
        table[tuple(history)][token] += 1
    return dict(table)


def discount_of(table: dict[tuple[int, ...], Counter[int]]) -> float:
    times = Counter(count for followers in table.values() for count in followers.values())
    return (times[1] + 0.5) / (times[1] + 2 * times[2] + 1)


def brute_force(counted: list[Batch], scored: list[Batch], vocab_size: int) -> dict[str, float]:
    """The mean loss of each model."""
    model, asked = KneserNey(list(list_events(counted)), vocab_size), list(list_events(scored))
    orders = {"uniform": 0, **ORDERS}
    return {
        name: -sum(math.log(model.probability(order, *event)) for event in asked) / len(asked)
        for name, order in orders.items()
    }


def losses_of(counted: list[Batch], scored: list[Batch], vocab_size: int) -> dict[str, float]:
    known, asked = (
        join([lay_out(Batch(*(a[None] for a in one if a is not None))) for one in each]) for each in (counted, scored)
    )
    return {name: float(-np.log(p).mean()) for name, p in score_targets(known, asked, vocab_size).items()}


def random_windows(noise: np.random.Generator, count: int, length: int, vocab_size: int) -> list[Batch]:
    """Windows of a few documents each, some of whose tokens are no targets."""
    windows = []
    for _ in range(count):
        ids = noise.integers(0, vocab_size, length + 1)
        documents = np.cumsum((noise.random(length) < 0.2).astype(np.int64))
        labels = np.where(noise.random(length) < 0.8, ids[1:], IGNORE_INDEX)
        labels[:-1][np.diff(documents) > 0] = IGNORE_INDEX
        windows.append(Batch(ids[:-1], labels, documents))
    ids, end = noise.integers(0, vocab_size, length + 1), int(noise.integers(1, length + 1))
    used = np.arange(length) < end  # the last window is padded
    labels, ids = np.where(used, ids[1:], IGNORE_INDEX), np.where(used, ids[:-1], 0)
    return [*windows, Batch(ids, labels, np.zeros(length, np.int64))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_losses_are_those_of_dictionaries(count: int, length: int, vocab_size: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    counted, scored = (random_windows(noise, count, length, vocab_size) for _ in range(2))
    assert losses_of(counted, scored, vocab_size) == pytest.approx(brute_force(counted, scored, vocab_size), rel=1e-9)


def test_every_distribution_adds_up_to_one() -> None:
    """Also after a context that never occurs, and after fewer tokens than a model reads."""
    noise, vocab_size = np.random.default_rng(0), 6
    counted = random_windows(noise, 30, 20, vocab_size)
    counted = [Batch(np.minimum(ids, 4), np.minimum(labels, 4), d) for ids, labels, d in counted]  # 5 never occurs
    for length in range(1, 7):
        for context in (noise.integers(0, 5, length), np.full(length, 5), np.append(noise.integers(0, 5, length), 5)):
            labels = np.full((vocab_size, len(context)), IGNORE_INDEX)
            labels[:, -1] = np.arange(vocab_size)
            asked = lay_out(Batch(np.tile(context, (vocab_size, 1)), labels))
            known = join([lay_out(Batch(*(a[None] for a in one if a is not None))) for one in counted])
            for name, probabilities in score_targets(known, asked, vocab_size).items():
                assert probabilities.sum() == pytest.approx(1, abs=1e-12), name
                assert (probabilities > 0).all()


def test_numbers_are_the_same_if_a_value_and_its_place_do_not_fit_into_one_integer() -> None:
    values = np.random.default_rng(0).integers(0, 50, 1000)
    for factor in (1, 2**55):
        kept, inverse = number(values * factor)
        assert kept.tolist() == (np.unique(values) * factor).tolist()
        assert kept[inverse].tolist() == (values * factor).tolist()


def open_all(config: Config) -> tuple[Corpus, JoinedWindows, JoinedWindows, list[int]]:
    """The corpus of a config, its training and validation windows, and those that are compared."""
    corpus = open_corpus(config, Listener(lambda line: None, lambda *progress: None), is_chosen=True)
    validation = open_validation(config, corpus)
    assert validation
    return corpus, corpus.batches(config).windows, validation, list_compared_windows(config, validation)


def check(config: Config) -> Baselines:
    """Compare the baselines of a config with dictionaries, to three digits behind the point."""
    corpus, training, validation, compared = open_all(config)
    found = measure_baselines(corpus, training, config.shares, validation, compared)
    counted, scored = (
        [windows.read(i) for i in indices]
        for windows, indices in ((training, range(len(training))), (validation, compared))
    )
    expected = brute_force(counted, scored, corpus.tokenizer.vocab_size)
    assert {name: round(loss, 3) for name, loss in found.losses.items()} == {
        name: round(loss, 3) for name, loss in expected.items()
    }
    assert tuple(found.losses) == BASELINES
    return found


@pytest.mark.parametrize("mask", ["true", "false"])
def test_documents_are_isolated_if_the_model_sees_them_so(mask: str, tmp_path: Path) -> None:
    text = "|".join(f"{WORDS[n % 50 :]}{n * n}" for n in range(60))
    write_tiny(
        tmp_path, text=text, config=TINY.replace("0.1}", f"0.1, document_separator: '|', document_mask: {mask}}}")
    )
    check(tiny_config(tmp_path))


def test_of_conversations_only_the_targets_are_counted(tmp_path: Path) -> None:
    write_tiny(tmp_path, config=TINY.replace("tokenizer: bytes", "tokenizer: bytes, chat_template: chatml"))
    with (tmp_path / "chat.jsonl").open("w") as file:
        for n in range(60):
            turns = (("user", f"What is {n} + {n % 7}?"), ("assistant", f"{n + n % 7}, of course."))
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    found = check(settled(tiny_config(tmp_path, data__input=tmp_path / "chat.jsonl")))
    assert found.counted < found.train_tokens / 2


def settled(config: Config) -> Config:
    return config.with_data(pack="best_fit", document_mask=True)


def test_each_source_of_a_mixture_gives_its_share(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for name, word in (("a", "aa "), ("b", "bb ")):
        (tmp_path / f"{name}.txt").write_text(word * 3000)
    mixture = f"{{{tmp_path}/a.txt: 0.75, {tmp_path}/b.txt: 0.25}}"
    config = load_config(tmp_path / "config.yaml", flags={"data.mixture": ("--data.mixture", mixture)})
    corpus, training, validation, compared = open_all(config)
    found = measure_baselines(corpus, training, config.shares, validation, compared, limit=3200)
    assert found.counted == 3200
    # Validation has as much of each source, and a letter of either is 2 of 3 tokens.
    frequencies = {"a": 0.5, "b": 0.5 / 3, " ": 1 / 3}
    expected = -math.fsum(math.log(p) for p in (frequencies["a"], frequencies["b"], frequencies[" "])) / 3
    assert found.losses["unigram"] == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_baselines_of_shakespeare(shakespeare: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path, text=shakespeare.read_text(encoding="utf-8"))
    found = check(tiny_config(tmp_path, training__eval_windows=10**6))
    assert found.losses["unigram"] > found.losses["bigram"] > found.losses["trigram"] > found.losses["5-gram"]


@pytest.mark.slow
def test_baselines_of_the_sample_corpus(tmp_path: Path) -> None:
    write_tiny(tmp_path, config=TINY.replace("tokenizer: bytes", "tokenizer: auto, document_separator: '\\f'"))
    write_sample_corpus(tmp_path / "input.txt")
    check(tiny_config(tmp_path, model__vocab_size=4096, training__eval_windows=10**6))


def test_bits_per_byte_of_two_tokenizers_differ_as_they_should(shakespeare: Path, tmp_path: Path) -> None:
    """A uniform model needs log2 V bits for each token; a unigram model of longer tokens knows more of the text."""
    write_tiny(tmp_path, text=shakespeare.read_text(encoding="utf-8")[:200_000])
    found = {}
    for tokenizer in ("bytes", "auto"):
        config = tiny_config(tmp_path, data__tokenizer=tokenizer, model__vocab_size=1000, training__eval_windows=10**6)
        corpus, training, validation, compared = open_all(config)
        found[tokenizer] = measure_baselines(corpus, training, config.shares, validation, compared)
        targets = np.concatenate([validation.read(i).labels for i in compared])
        lengths = corpus.tokenizer.bytes_per_token[targets[targets != IGNORE_INDEX]]
        bits = math.log2(corpus.tokenizer.vocab_size) * found[tokenizer].targets / lengths.sum()
        assert found[tokenizer].bits_per_byte["uniform"] == pytest.approx(bits)
    assert found["auto"].losses["unigram"] > found["bytes"].losses["unigram"]
    assert found["auto"].bits_per_byte["unigram"] < found["bytes"].bits_per_byte["unigram"]


def test_a_long_text_is_counted_in_evenly_spread_windows(tmp_path: Path) -> None:
    write_tiny(tmp_path, text=WORDS * 400)
    config = tiny_config(tmp_path)
    corpus, training, validation, compared = open_all(config)
    found = measure_baselines(corpus, training, config.shares, validation, compared, limit=3200)
    assert found.counted == 3200 and found.train_tokens == corpus.train_tokens > 30_000
    assert "counted on 3,200 of " in found.describe()
    assert CHUNK > 3200
    read = read_text(training, [0, len(training) // 2])
    assert len(read.tokens) == 2 * 33 and read.is_target.sum() == 64


def test_the_cache_is_read_again_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = tiny_config(tmp_path, data__cache_dir=tmp_path / "cache")
    arguments = open_all(config)
    first = find_baselines(config, *arguments)
    (path,) = (tmp_path / "cache").glob("baselines-*.json")
    written = path.read_text()
    values = json.loads(written)
    path.write_text(json.dumps({**values, "targets": 7}))
    assert find_baselines(config, *arguments).targets == 7
    for damaged in ("", "[]", written[:50], "{}", json.dumps({**values, "losses": {"uniform": 1.0}})):
        path.write_text(damaged)
        assert find_baselines(config, *arguments) == first
        assert path.read_text() == written
    other = tiny_config(tmp_path, data__cache_dir=tmp_path / "cache", training__eval_windows=3)
    assert find_baselines(other, *open_all(other)).targets == 3 * 32


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = tiny_config(tmp_path, data__cache_dir=tmp_path / "cache")
    arguments = open_all(config)
    first = find_baselines(config, *arguments)
    (path,) = (tmp_path / "cache").glob("baselines-*.json")
    path.unlink()
    path.mkdir()
    assert find_baselines(config, *arguments) == first


@pytest.mark.parametrize(
    ("fraction", "row"), [(0.0, "none, because there is no validation text"), (0.1, "uniform 5.55, ")]
)
def test_the_start_page_has_a_row(
    fraction: float, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    train(tiny_config(tmp_path, data__validation_fraction=fraction, training__train_steps=1))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  baselines ")]
    assert line.split(maxsplit=1)[1].startswith(row)
