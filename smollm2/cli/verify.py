"""`smollm2 verify`: the checks of a model on somebody else's model."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from smollm2.cli.flags import Commands, Parser, add_command
from smollm2.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from smollm2.analysis.checks import Result
    from smollm2.analysis.foreign import Foreign


def add_parser(commands: "Commands[Parser]") -> None:
    """Add `smollm2 verify`."""
    text = (
        "Check a causal language model that you wrote: causality, positions, gradients and more. MODEL is a function that "
        "returns a torch module, which maps token ids to logits. Exit code 5 if a check fails. See docs/verify.md."
    )
    parser = add_command(commands, "verify", run, "check a model that you wrote", text)
    parser.add_argument("model", metavar="MODEL", help="path/model.py:build")
    text = "path/file.py:function with (model, input_ids) -> the mean loss of the next tokens"
    parser.add_argument("--loss", metavar="WHERE", help=text)
    text = "path/file.py:function that yields (input_ids, labels)"
    parser.add_argument("--data", metavar="WHERE", help=text)
    text = "name the first layer that differs from transformers:FOLDER, a model with the same weights"
    parser.add_argument("--against", metavar="WHERE", help=text)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--strict", action="store_true", help="exit code 5 for warnings too")


def run(args: argparse.Namespace) -> None:
    """Make the checks, and print the table or the JSON."""
    from smollm2.analysis.checks import as_json, describe_counts, list_rows, run_checks, worst_of
    from smollm2.analysis.foreign import build_model, list_foreign_checks, load_object, make_foreign, open_data
    from smollm2.tracking.console import ConsoleTracker

    loss = load_object(args.loss, "--loss") if args.loss else None
    data = open_data(args.data) if args.data else None
    foreign = make_foreign(build_model(args.model), loss, data)
    console = ConsoleTracker(0, 0, sys.stderr)
    checks = list_foreign_checks(foreign)
    results = run_checks(checks, show=lambda part: console.show_progress("checking", part))
    results += compare(args.against, foreign) if args.against else []
    console.show_progress("checking", 1.0)
    if args.json:
        print(json.dumps(as_json(results, deep=True, model=args.model), indent=1))
    else:
        ConsoleTracker(0, 0).show_page(args.model, list(list_rows(results)))
        print(describe_counts(results))
    for verdict in ("fail", "warn") if args.strict else ("fail",):
        if found := worst_of(results, verdict):
            names = ", ".join(one.name for one in found)
            count = "a check" if len(found) == 1 else f"{len(found)} checks"
            what = f"{count} {'warned' if verdict == 'warn' else 'failed'}: {names}"
            raise TrainingError(args.model, what, "the table says what to do")


def compare(where: str, foreign: "Foreign") -> "list[Result]":
    """Return the result of the comparison with a model of transformers."""
    from smollm2.analysis.checks import Finding, Result
    from smollm2.analysis.layers import compare_layers
    from smollm2.exporting.readers import open_with_transformers

    kind, _, folder = where.partition(":")
    if kind != "transformers" or not folder:
        raise ConfigError("--against", f"{where} is not known", "write it as transformers:FOLDER")
    other = open_with_transformers(folder, "--against")
    found = compare_layers(foreign.probe.module, other, foreign.probe.draw())
    evidence = {"logits differ by": found.logits, "layers that agree before it": found.agreed}
    if not found.place:
        return [Result("against", "model", Finding("pass", evidence), 0.0)]
    cause = f"the first difference is at {found.place}, by {found.difference:.1e} of its largest value"
    return [Result("against", "model", Finding("fail", evidence, cause, "compare this layer's code and weights"), 0.0)]
