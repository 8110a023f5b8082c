"""Report verdicts on a run while it trains: each once, and again only after it had stopped being true.

What has been reported depends on the run's records alone. A resumed run reads them from the files of its folder, so it
reports neither less nor more than one that was not interrupted.
"""

from collections.abc import Sequence
from pathlib import Path

from smollm2.analysis.history import Facts, History
from smollm2.analysis.verdicts import Verdict, judge
from smollm2.config.schema import Config
from smollm2.data.corpus import Corpus
from smollm2.data.overlap import Overlap
from smollm2.formatting import format_bytes
from smollm2.report.json_files import Row, read_rows
from smollm2.report.reading import parse_diagnosis, parse_sample
from smollm2.storage.run_folder import DIAGNOSTICS, EVENTS, METRICS, SAMPLES
from smollm2.tracking.base import Event, Fanout, Message, Metrics, Report, Sample, Samples, Tracker, describe

QUIET = 20
"""The records without it after which a verdict has stopped being true: one at its limit is not reported again and again."""


REPETITIVE = 0.75
"""A share of the validation 13-grams that occur in training. Memory alone lowers a loss to a quarter only above this."""


class VerdictTracker(Tracker):
    """Reports verdicts as events to other trackers. An error turns it off, and the run continues."""

    def __init__(self, facts: Facts, tracker: Fanout, report: Report, records: Sequence[Message] = ()) -> None:
        """`records` are those of the steps before a resume."""
        self.history, self.tracker, self.report = History(facts), tracker, report
        self.last_true: dict[str, int] = {}
        self.count, self.is_off = 0, False
        for message in records:
            self._attempt(message)

    def on(self, message: Message) -> None:
        """Report what is newly true."""
        for verdict in self._attempt(message):
            text, step = f"step {message.step}: {verdict.text}", message.step
            self.tracker.log_event("verdict", text, step, name=verdict.name, is_problem=verdict.is_problem)

    def close(self) -> None:
        """Nothing is open."""

    def _attempt(self, message: Message) -> list[Verdict]:
        try:
            return [] if self.is_off else self._judge(message)
        except Exception as error:
            self.is_off = True
            self.report(f"verdicts: turned off after an error ({describe(error)}). The run continues.")
            return []

    def _judge(self, message: Message) -> list[Verdict]:
        """Return the verdicts that have become true with this message."""
        if not self.history.add(message):
            return []
        self.count += 1
        found = judge(self.history)
        new = [one for one in found if self.count - self.last_true.get(one.name, -QUIET - 1) > QUIET]
        self.last_true |= {one.name: self.count for one in found}
        return new


def facts_of(config: Config, corpus: Corpus, overlaps: Sequence[Overlap]) -> Facts:
    """Return what the rules need to know of a run."""
    statistics = corpus.statistics
    return Facts(
        warmup_steps=config.training.warmup_steps,
        is_from_scratch=not config.model.init_from,
        is_chat=corpus.is_chat,
        is_mixed_in_stages=len(config.stage_steps) > 1,
        is_repetitive=any((overlap.share or 0.0) > REPETITIVE for overlap in overlaps),
        is_validated_elsewhere=bool(config.data.validation_input),
        text=format_bytes(statistics.bytes) if statistics.bytes else f"{statistics.train_tokens:,} tokens",
    )


def read_records(folder: Path) -> list[Message]:
    """Return the records in a run folder that verdicts depend on, in the order in which they were logged."""
    found: list[tuple[int, int, Message]] = []
    unread: list[str] = []

    def keep(order: int, row: Row, content: Event | Metrics | Samples) -> None:
        found.append((row["step"], order, Message(row["step"], content)))

    read_rows(folder / EVENTS, unread, lambda row: keep(0, row, Event(row["kind"], "", row)))
    for step, diagnosis in read_rows(folder / DIAGNOSTICS, unread, parse_diagnosis):
        found.append((step, 1, Message(step, diagnosis)))
    read_rows(folder / METRICS, unread, lambda row: keep(2, row, Metrics(row)))
    rounds: dict[int, list[Sample]] = {}
    for row in read_rows(folder / SAMPLES, unread, parse_sample):
        rounds.setdefault(row["step"], []).append(Sample(row["prompt"], row["text"]))
    found += [(step, 3, Message(step, Samples(samples))) for step, samples in rounds.items()]
    return [message for _, _, message in sorted(found, key=lambda one: one[:2])]
