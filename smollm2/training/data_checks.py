"""Checks of a run's tokens, windows and batches, on evenly spread samples of them."""

from collections.abc import Iterator

import numpy as np

from smollm2.analysis.checks import Finding, judge, passed, skipped
from smollm2.config.schema import IGNORE_INDEX
from smollm2.data.chat import END, ChatEncoder, DocumentEncoder, choose_template
from smollm2.data.corpus import MANY_EPOCHS
from smollm2.data.encoding import Encoder
from smollm2.data.overlap import HIGH_SHARE, measure_overlap
from smollm2.data.packing import ConversationWindows
from smollm2.data.stream import MARK
from smollm2.data.windows import Batch, TokenWindows, WindowSource, read_ids
from smollm2.inference.evaluation import spread
from smollm2.training.setup import Run

SAMPLED_WINDOWS = 64
"""Windows of each source that are read."""

OVERLAP_TOKENS = 500_000
"""Tokens of each split that are compared; `smollm2 prepare` compares up to 5 million."""

COPIED = 0.9
"""From this share of common 13-grams on, the validation text is a part of the training text."""

LIKE_ITSELF = 2.5
"""How much more of the validation text than of a half of the training text may be known from the training text. Where a token
is a character, much of any text is; and a whole training text knows up to twice as much as its other half."""

DUPLICATES = 0.3
"""From this share of tokens in repeated documents on, the text is said to repeat itself."""

HARD_TEXT = "  two spaces\n\ttab, 1234567890 digits, größer, 猫, \N{GRINNING FACE} and e\N{COMBINING ACUTE ACCENT}\n"
"""What tokenizers are known to change: spaces, digits, composed characters."""

EMPTY = 0.1
"""The share of windows without a target above which many steps would be made for nothing."""

FITS = 1.3
"""Bytes per token below which a tokenizer with a large vocabulary does not fit the text. Three to five are usual."""


def sampled(run: Run) -> Iterator[tuple[WindowSource, int, Batch]]:
    """Yield (windows, number, window) of a sample of each source."""
    for windows in run.batches.windows.sources:
        for number in spread(len(windows), SAMPLED_WINDOWS):
            yield windows, number, windows.read(number)


def check_targets(run: Run) -> Finding:
    """Compare labels with the tokens after them, and count how many positions are trained on."""
    positions = targets = wrong = empty = windows = 0
    for _, _, window in sampled(run):
        kept = np.flatnonzero(window.labels[:-1] != IGNORE_INDEX)[:-1]  # padding may follow the last target
        wrong += int((window.labels[kept] != window.input_ids[kept + 1]).sum())
        here = int((window.labels != IGNORE_INDEX).sum())
        positions, targets = positions + window.labels.size, targets + here
        windows, empty = windows + 1, empty + (not here)
    evidence = {"targets": targets, "of positions": positions, "labels that are not the next token": wrong}
    if not targets:
        advice = "raise training.sequence_length" if run.corpus.is_chat else "look at the text"
        return Finding("fail", evidence, "no position has a target: nothing is trained", advice)
    if empty > EMPTY * windows and not wrong:
        what = f"{empty} of {windows} windows have no target: their answers begin later than a window is long"
        return Finding("warn", evidence, what, "raise training.sequence_length, or leave such conversations out")
    return judge(
        not wrong, "labels are not the token after their position", "look at how windows are cut", evidence=evidence
    )


def check_ends(run: Run) -> Finding:
    """Count the ends of documents (and of turns) among the tokens of the sample, and among its labels."""
    ends, labelled = 0, 0
    is_chat = run.corpus.is_chat
    end = run.tokenizer.id_of(END) if is_chat else run.tokenizer.document_end
    if end is None:
        return skipped("the chat template has no end-of-turn token of its own")
    for windows, number, window in sampled(run):
        if not isinstance(windows, TokenWindows):
            continue
        labelled += int((window.labels == end).sum())
        for at, (first, last) in enumerate(windows.spans(number)):
            first += 1 if at == 0 or is_chat else 0
            first += windows.context(number) if at == 0 else 0
            if first >= last:
                continue
            marked = read_ids(windows.tokens, first, last, windows.vocab_size, marks=False) if not is_chat else None
            if marked is not None:
                ends += int((marked == end).sum())
            elif isinstance(windows, ConversationWindows):
                found = windows.tokens[first:last].astype(np.int64)
                ends += int((found == end).sum())  # a mark means that it is not a target
    name = "end-of-turn" if is_chat else "end-of-text"
    if not ends:
        return skipped(f"there is no {name} token in the sample")
    return judge(
        labelled >= 0.9 * ends,
        f"{name} tokens are masked, so the model never learns to stop",
        "mask only padding: an end-of-text token may not double as padding in the labels",
        evidence={f"{name} tokens": ends, "among the labels": labelled},
    )


def check_tokenizer(run: Run) -> Finding:
    """Compare the tokenizer with the one that made the tokens, and decode what it encodes."""
    tokenizer = run.tokenizer
    for store in run.corpus.stores:
        encoders: list[Encoder] = [tokenizer]
        if store.index.marks_targets:
            template = choose_template(tokenizer)
            encoders = [ChatEncoder(template, run.config.data.train_on), DocumentEncoder(tokenizer)]
        known = [encoder.fingerprint for encoder in encoders]
        if store.index.tokenizer not in known:
            made_by = {"tokens made by": store.index.tokenizer[:12], "the run's tokenizer": known[0][:12]}
            return Finding("fail", made_by, "the tokens were made by another tokenizer", "make them again")
    texts = [HARD_TEXT]
    for store in run.corpus.stores:
        for start in spread(max(1, len(store.train) - 256), 8):
            ids = store.train[start : start + 256].astype(np.int64)
            texts.append(tokenizer.decode((ids % MARK if store.index.marks_targets else ids).tolist()))
    changed = [
        text
        for text in texts
        if (back := tokenizer.decode(tokenizer.encode(text))) != text and back.strip() != text.strip()
    ]
    evidence = {"excerpts": len(texts), "changed": len(changed)}
    return judge(
        not changed,
        "the tokenizer changes the text that it encodes",
        "this is right for a tokenizer that normalizes, or that does not know some characters",
        warns=True,
        evidence=evidence,
    )


def check_coverage(run: Run) -> Finding:
    """Count the tokens that the windows read."""
    windows, total = run.batches.windows, run.corpus.train_tokens
    share = windows.tokens_used / total
    return judge(
        share > 0.95,
        "a part of the text is never read",
        "look at training.sequence_length, data.stride and data.pack",
        warns=share > 0.5,
        evidence={"tokens read": windows.tokens_used, "of": total, "share": share},
    )


def check_validation(run: Run) -> Finding:
    """Look for the validation text in the training text, and for one half of the training text in the other."""
    shares = []
    for name, store in zip(run.corpus.names, run.corpus.stores, strict=True):
        if not len(store.validation):
            continue
        found = measure_overlap(store.train, store.validation, OVERLAP_TOKENS)
        if found.share is None:
            continue
        half = len(store.train) // 2
        itself = measure_overlap(store.train[0:half], store.train[half : 2 * half], OVERLAP_TOKENS).share or 0.0
        shares.append((found.share, itself, name))
    if not shares:
        return skipped("there is no validation text")
    share, itself, name = max(shares)
    evidence = {"share of validation 13-grams in training": share, "of training in itself": itself}
    is_copy = share > COPIED and itself < share / 2
    return judge(
        share <= max(HIGH_SHARE, LIKE_ITSELF * itself),
        f"{name}: the validation text is {'part of' if is_copy else 'much like'} the training text, so the validation loss measures memory",
        "hold back other documents" if is_copy else "remove repeated text",
        warns=not is_copy,
        evidence=evidence,
    )


def check_duplicates(run: Run) -> Finding:
    """Read the share of tokens in repeated documents, which was counted when the tokens were made."""
    found = [s.index.summary["duplicates"]["token_share"] for s in run.corpus.stores if s.index.summary]
    if not found:
        return skipped("nothing is known of the documents of these token files")
    share = max(found)
    return judge(
        share <= DUPLICATES,
        "much of the text is repeated documents",
        "remove them",
        warns=True,
        evidence={"share": share},
    )


def check_order(run: Run) -> Finding:
    """Read the first epoch and the next: each must hold every window once, in another order; batches must differ."""
    size, batch = len(run.batches.windows), run.batches.global_batch_size
    first, second = run.batches.window_ids(0), run.batches.window_ids(1)
    if len(run.batches.windows.sources) > 1:
        return judge(
            not np.array_equal(first, second),
            "two batches in a row are the same windows",
            "look at the order of the batches",
            evidence={"different windows in two batches": len(set(first) | set(second))},
        )
    count = min(size, 4096)
    now, then = (read_order(run, epoch * size, count) for epoch in (0, 1))
    repeated = count - len(set(now.tolist()))
    evidence = {"windows": size, "compared": count, "read twice in one epoch": repeated}
    if repeated:
        return Finding("fail", evidence, "an epoch reads windows twice", "look at the permutation of the windows")
    if size > batch and np.array_equal(first, second):
        return Finding(
            "fail", evidence, "two batches in a row are the same windows", "look at the order of the batches"
        )
    return judge(
        count < 4 or not np.array_equal(now, then),
        "two epochs have the same order",
        "draw the order from the seed and the epoch",
        evidence=evidence,
    )


def read_order(run: Run, position: int, count: int) -> np.ndarray:
    """Return the windows at `count` positions of the run, beginning at `position`."""
    batch = run.batches.global_batch_size
    first, last = position // batch, (position + count - 1) // batch
    ids = np.concatenate([run.batches.window_ids(n) for n in range(first, last + 1)])
    return ids[position - first * batch :][:count]


def check_rows(run: Run) -> Finding:
    """Read the rows of the next batch one by one: they must be the windows of the order, in its order."""
    n = run.resumed_step
    wanted = run.batches.window_ids(n)[:SAMPLED_WINDOWS]
    rows = run.batches.read(n, 0, len(wanted))
    wrong = sum(
        not np.array_equal(rows.input_ids[at], run.batches.windows.read(int(number)).input_ids)
        for at, number in enumerate(wanted)
    )
    return judge(
        not wrong,
        "the rows of a batch are not its windows",
        "look at how a batch is read",
        evidence={"rows": len(wanted), "different windows": len(set(wanted.tolist()))},
    )


def check_epochs(run: Run) -> Finding:
    """Count how often the run reads its text."""
    epochs = run.batches.epoch_of(run.config.training.train_steps)
    return judge(
        epochs <= MANY_EPOCHS,
        "repeated text teaches less than new text",
        "add text, or train for fewer steps",
        warns=True,
        evidence={"epochs": epochs},
    )


def check_special_tokens(run: Run) -> Finding:
    """Count special tokens inside documents."""
    if run.corpus.is_chat:
        return skipped("the chat template puts them there")
    tokenizer = run.tokenizer
    special = tokenizer.controls - {*tokenizer.begin, *tokenizer.end, *tokenizer.closing}
    found = total = 0
    for _, _, window in sampled(run):
        real = window.labels[window.labels != IGNORE_INDEX]
        found, total = found + int(np.isin(real, list(special)).sum()), total + real.size
    return judge(
        not found,
        "the text contains the names of special tokens, which are encoded as such",
        "remove them from the text, unless they are meant",
        warns=True,
        evidence={"special tokens": found, "of": total},
    )


def check_fit(run: Run) -> Finding:
    """Read the bytes per token and the share of bytes that the tokenizer does not know."""
    ratio, size = run.corpus.bytes_per_token, run.tokenizer.vocab_size
    if ratio != ratio:
        return skipped("the text of these token files is not known")
    unknown = run.corpus.statistics.unknown_share
    if unknown > 0.001:
        evidence = {"share of unknown bytes": unknown}
        return Finding("warn", evidence, "the tokenizer does not know a part of the text", "use another tokenizer")
    return judge(
        size < 1000 or ratio > FITS,
        "the tokenizer does not fit the text",
        "use the tokenizer of a model for this language, or `auto`",
        warns=True,
        evidence={"bytes per token": ratio, "ids": size, "share of unknown bytes": unknown},
    )


def check_shards(run: Run) -> Finding:
    """Read all shards of tokens and compare their checksums."""
    count = sum(store.verify(run.runtime.stop.raise_if_set) for store in run.corpus.stores)
    return passed({"shards": count})
