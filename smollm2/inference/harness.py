"""Run tasks of lm-eval (EleutherAI's evaluation harness) on a model. lm_eval is imported only inside these functions.

A task is a YAML file: lm-eval's own, whose data comes from the Hugging Face hub or its cache, or a local one. As a task
file may name Python functions beside it, it is code: use task folders that you trust.
"""

import contextlib
import difflib
import io
import logging
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smollm2.errors import ConfigError, DataError, ResourceError, Smollm2Error
from smollm2.inference.scoring import Scorer, TextEncoder

FEWSHOT_SEED = 1234
"""lm-eval's default."""

BOOTSTRAP_SAMPLES = 1000
"""For metrics without a formula for the standard error; lm-eval's 100,000 take minutes and change about 2 % of it."""


@dataclass(frozen=True)
class Metric:
    """One number that a task reports; `interval` is the 95 % interval, None if the task gives no standard error."""

    task: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    documents: int
    shots: int


Tasks = Mapping[str, Any]
"""What lm-eval loaded for each requested name: a task, a group of tasks, or several."""


def load_tasks(names: Sequence[str], folder: Path | None, report: Callable[[str], None]) -> Tasks:
    """Return the tasks with their data, by requested name. `report` receives lines about the progress.

    Raise ConfigError if lm-eval is not installed or a name is unknown, DataError if a task or its data cannot be loaded.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError("--tasks_folder", f"{folder} is not a folder", "name a folder of task files")
    try:
        manager = find_tasks(names, folder, report)
    except ImportError as error:
        missing = error.name == "lm_eval"
        what = "lm-eval is not installed" if missing else f"lm-eval cannot be imported ({describe(error)})"
        raise ConfigError("--tasks", what, "run `pip install 'smollm2-training[eval]'`") from None
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {near[0]}?" if near else "use a task such as hellaswag, or --tasks_folder"
            raise ConfigError(f"--tasks {name}", "unknown task", advice)
    return {name: load_task(manager, name, report) for name in names}


def find_tasks(names: Sequence[str], folder: Path | None, report: Callable[[str], None]) -> Any:
    """Return the TaskManager that knows `names`. lm-eval's own 14,000 tasks are listed only if one is not in `folder`."""
    with quiet():
        from lm_eval.tasks import TaskManager

        if folder is not None:
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            if set(names) <= set(manager.all_subtasks):
                return manager
    report("listing the tasks of lm-eval (about 15 s)")
    with quiet():
        return TaskManager(include_path=None if folder is None else str(folder))


def load_task(manager: Any, name: str, report: Callable[[str], None]) -> Any:
    """Return what lm-eval loads for a name. Raise DataError if it cannot be loaded."""
    report(f"{name}: loading")
    random.seed(0)  # some tasks shuffle their documents
    np.random.seed(FEWSHOT_SEED)
    try:
        with quiet():
            return manager.load([name])
    except OSError as error:
        what = f"its data is not on this machine and cannot be downloaded ({describe(error)})"
        raise DataError(f"task {name}", what, "run the command once with network access, or omit the task") from None
    except Exception as error:  # a task file can be wrong in any way, and can run code
        raise DataError(f"task {name}", f"cannot be loaded ({describe(error)})", "correct or omit it") from None


def run_tasks(
    tasks: Tasks, scorer: Scorer, *, limit: int | None, num_fewshot: int | None, report: Callable[[str], None]
) -> list[Metric]:
    """Return the metrics of each task in order; of a group of tasks, those of the group.

    Each task is run on its first `limit` documents. Tasks that fix the number of examples in the prompt at 0 keep it.
    `report` receives lines about the progress. Raise DataError if a task fails.
    """
    model = make_language_model(replace(scorer, report=pass_quiet(report)))
    metrics: list[Metric] = []
    for name, loaded in tasks.items():
        report(f"{name}: running")
        for task in loaded["tasks"].values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (fixed and num_fewshot is not None):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        metrics += read_metrics(name, run_task(name, loaded, model, limit))
    return metrics


def run_task(name: str, loaded: Any, model: Any, limit: int | None) -> Mapping[str, Any]:
    """Return lm-eval's results of one task or group."""
    from lm_eval.evaluator import evaluate

    try:
        with quiet():
            results: Mapping[str, Any] = evaluate(
                model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False
            )
    except Smollm2Error as error:
        raise type(error)(f"task {name}: {error}") from None
    except torch.OutOfMemoryError:
        raise ResourceError("--batch_size", f"out of memory in task {name}", "lower it, or lower --context") from None
    except Exception as error:  # a task's own functions can fail in any way
        raise DataError(f"task {name}", f"failed ({describe(error)})", "correct or omit it") from error
    return results


def read_metrics(name: str, results: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the metrics of the requested name, or of all its tasks if it is a tag, which has no metrics of its own."""
    found = results["results"]
    for task, row in [(name, found[name])] if name in found else found.items():
        for key, value in row.items():
            metric, _, selection = key.partition(",")
            if not selection or metric.endswith("_stderr") or not is_number(value):
                continue
            error = row.get(f"{metric}_stderr,{selection}")
            interval = (value - 1.96 * error, value + 1.96 * error) if is_number(error) else None
            label = metric if selection == "none" else f"{metric} ({selection})"
            shots = results["n-shot"].get(task, 0)
            yield Metric(task, label, float(value), interval, row["sample_len"], shots)


def is_number(value: Any) -> bool:
    """Return whether a result is a finite number; lm-eval writes "N/A" for some."""
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def make_language_model(scorer: Scorer) -> Any:
    """Return the lm_eval model that passes its requests to `scorer`; the class exists only if lm_eval is installed."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    encoder = TextEncoder(scorer.tokenizer)

    class LanguageModel(TemplateLM):  # type: ignore[misc]
        """Splits requests into tokens as TemplateLM and lm-eval's `hf` model do."""

        eot_token_id = scorer.tokenizer.end_of_text
        prefix_token_id = encoder.prefix
        max_length = scorer.context

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encoder.encode(string, add_special_tokens=add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return scorer.score([(context or [self.prefix_token_id], scored) for _, context, scored in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            totals, owners, pairs = [0.0] * len(requests), [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                for window in map(make_disjoint_window, windows):
                    owners.append(number)
                    pairs.append(window)
            for owner, (score, _) in zip(owners, scorer.score(pairs), strict=True):
                totals[owner] += score
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return scorer.generate([(self.tok_encode(text), settings) for text, settings in (r.args for r in requests)])

    return LanguageModel()


def describe(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what lm-eval, datasets and their progress bars print, warn and log inside a `with` block."""
    level, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def pass_quiet(report: Callable[[str], None]) -> Callable[[str], None]:
    """Return `report`, writing to the present standard error inside `quiet` too."""
    stderr = sys.stderr

    def show(message: str) -> None:
        with contextlib.redirect_stderr(stderr):
            report(message)

    return show
