"""Checks that all ranks start the same run, and that they end together."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from smollm2.config.schema import Config
from smollm2.data.corpus import Corpus
from smollm2.errors import Interrupted, Smollm2Error, TrainingError
from smollm2.inference.evaluation import spread
from smollm2.runtime.device import Runtime
from smollm2.runtime.ranks import Watch, find_disagreement, is_lost_rank
from smollm2.tracking.console import ConsoleTracker, RunLog
from smollm2.training.setup import Setup


def refuse_disagreement(runtime: Runtime, facts: Mapping[str, object]) -> None:
    """Raise TrainingError, naming the rank and what differs, if the ranks are not about to start the same run."""
    found = find_disagreement(runtime.gather(dict(facts)))
    if found:
        rank, differing = found
        raise TrainingError(
            f"rank {rank}",
            f"was started differently from rank 0: {', '.join(differing)}",
            "start every rank with the same code, flags and files",
        )


def config_facts(config: Config) -> dict[str, object]:
    """Return the values of a config by dotted key."""
    sections = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def start_facts(setup: Setup, corpus: Corpus) -> dict[str, object]:
    """Return the facts that each rank determines on its own and that must be the same on all ranks."""
    return {
        "the checkpoint": f"step {setup.start.step}" if setup.start else "none",
        "the tokenizer": corpus.tokenizer.fingerprint[:12],
        "the tokens": f"{corpus.fingerprint[:12]} {fingerprint_tokens(corpus)[:12]}",
        "precision": setup.runtime.precision.name,
        "torch": str(torch.__version__),
    }


def fingerprint_code() -> str:
    """Return a short hash of this package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def fingerprint_tokens(corpus: Corpus) -> str:
    """Return a hash of the number of tokens and of 64 excerpts of each split.

    It can reveal that another machine's copy of the file is damaged.
    """
    digest = hashlib.sha256()
    for tokens in (split for store in corpus.stores for split in (store.train, store.validation)):
        digest.update(f"{len(tokens)}|".encode())
        for first in spread(len(tokens), 64):
            digest.update(tokens[first : first + 1024].tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def watch_ranks(config: Config, runtime: Runtime, log: RunLog) -> Iterator[Watch]:
    """Watch the ranks inside the `with` block; the caller starts the watch once the run folder exists.

    If a rank is lost inside the block, the error names it. After the last step or a request to stop, all ranks end
    together, because a launcher kills the other ranks once the first has exited.
    """

    def report(message: str) -> None:
        log.write(message)
        ConsoleTracker(0, 0, sys.stderr).report(message)

    def end(error: Smollm2Error) -> None:
        if runtime.rank == error.rank:
            report(f"error: {error}")
        else:
            log.write(str(error))
        runtime.leave(error.exit_code)

    folder, timeout = Path(config.training.save_dir), config.training.rank_timeout
    watch = Watch(folder, runtime.rank, runtime.world_size, runtime.pulse.read, timeout, end, report)
    code = 1
    try:
        try:
            yield watch
        except RuntimeError as error:
            if runtime.world_size == 1 or not is_lost_rank(error):
                raise
            log.write_error(error)
            raise watch.explain_loss() from None
        except Interrupted:
            with contextlib.suppress(RuntimeError):  # another rank ended differently
                runtime.gather("leaving")
            raise
        runtime.gather("leaving")
        code = 0
    except Smollm2Error as error:
        code = 0 if isinstance(error, Interrupted) else error.exit_code
        raise
    finally:
        watch.close(code)
