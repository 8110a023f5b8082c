"""The diagnostics section: heat maps of gradients, weights and updates by layer, and of activations by block.

The healthy ranges are rules of thumb from published runs of this size. A value outside its range deserves a look; it
is not necessarily a failure.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from smollm2.formatting import format_number
from smollm2.report.curves import shorten, split_evenly
from smollm2.report.figures import Context
from smollm2.report.reading import RunFolder
from smollm2.tracking.base import Diagnosis
from smollm2.tracking.charts import flow_by_layer, layer_of

SHOWN_PARAMETERS = 400
SHOWN_STEPS = 240
CELLS_OF_A_PAGE = 60_000


class Measure(NamedTuple):
    """One quantity that the heat map shows: its meaning, its healthy range in words, and that range's upper bound."""

    meaning: str
    healthy: str
    highest: float = math.inf


MEASURES = {
    "gradient norm": Measure("Norm of the gradient before clipping.", "the same order of magnitude in every layer"),
    "update ratio": Measure(
        "Norm of one update divided by the norm of the weights.",
        "0.0001 to 0.01 at the full learning rate, with Muon up to 0.1; more is too high a learning rate",
        0.1,
    ),
    "weight norm": Measure("Norm of the weights.", "slow growth that levels off"),
    "rms": Measure("Root mean square of a block's output.", "slow growth with depth, below 100", 100.0),
    "max_abs": Measure(
        "Largest activation of a block.", "below 1,000; fp16 overflows at 65,504, and bf16 loses digits", 1000.0
    ),
    "max_attention_logit": Measure(
        "Largest attention score before the softmax.", "below 50; above 100 attention sticks to one token", 50.0
    ),
    "dead_units": Measure("Share of feed-forward units that are never active.", "below 0.1", 0.1),
}
"""The last four are measured for each block, the others for each layer that has parameters."""

FLOWS = {"gradient norm": "gradient_norm", "update ratio": "update_ratio", "weight norm": "weight_norm"}


def diagnostics_section(run: RunFolder) -> Context:
    """Return the heat map of gradients, weights, updates and activations, and the tables of the last diagnosis."""
    if not run.diagnoses:
        return {"note": "No diagnostics were recorded: training.diagnostics_interval sets how often they are."}
    last_step, last = run.diagnoses[-1]
    layers = list(flow_by_layer(last))
    blocks = list(dict.fromkeys(map(layer_of, last.activations)))
    columns = max(2, min(SHOWN_STEPS, CELLS_OF_A_PAGE // max(1, 3 * len(layers) + 4 * len(blocks))))
    diagnoses = thin_diagnoses(run.diagnoses, columns)
    flows = [by_layer(one) for _, one in diagnoses]
    activations = [by_block(one) for _, one in diagnoses]
    measures = []
    for name, measure in MEASURES.items():
        rows, values = (layers, flows) if name in FLOWS else (blocks, activations)
        grid = [[column.get(row, {}).get(name, math.nan) for column in values] for row in rows]
        if any(not math.isnan(value) for row in grid for value in row):
            shown = [[None if math.isnan(value) else shorten(value, 4) for value in row] for row in grid]
            words = f"{measure.meaning} Healthy: {measure.healthy}."
            measures.append({"name": name, "words": words, "rows": rows, "values": shown})
    if not measures:
        return {"note": "The recorded diagnostics have no numbers."}
    summary = summarize_diagnosis(run, len(diagnoses))
    data = {"steps": [step for step, _ in diagnoses], "measures": measures}
    return {
        "figure": {"kind": "heat", "title": "Layer by layer", "summary": summary, "data": data},
        "choices": [one["name"] for one in measures],
        "table": measure_table(last_step, measures),
        "parameters": parameter_table(last_step, last),
    }


def thin_diagnoses(diagnoses: Sequence[tuple[int, Diagnosis]], columns: int) -> Sequence[tuple[int, Diagnosis]]:
    """Return at most `columns` diagnoses: the one with the largest gradient of each column, and always the last."""
    if len(diagnoses) <= columns:
        return diagnoses
    *inner, last = diagnoses

    def size(entry: tuple[int, Diagnosis]) -> float:
        return sum(norm for norm in entry[1].gradient_norms.values() if not math.isnan(norm))

    return [*(max(bucket, key=size) for bucket in split_evenly(inner, columns - 1)), last]


def by_layer(diagnosis: Diagnosis) -> dict[str, dict[str, float]]:
    """Return the gradient norm, update ratio and weight norm of each layer, named as in MEASURES."""
    flows = flow_by_layer(diagnosis)
    return {layer: {name: getattr(flow, key) for name, key in FLOWS.items()} for layer, flow in flows.items()}


def by_block(diagnosis: Diagnosis) -> dict[str, dict[str, float]]:
    """Return the activation statistics of each block."""
    return {layer_of(block): dict(values) for block, values in diagnosis.activations.items()}


def summarize_diagnosis(run: RunFolder, shown: int) -> str:
    """Return a summary: the ranges of gradient norms and update ratios at the last step, the fraction of clipped steps,
    and how many of the diagnoses are drawn."""
    step, last = run.diagnoses[-1]
    flows, parts = by_layer(last), []
    for name in ("gradient norm", "update ratio"):
        found = {layer: values[name] for layer, values in flows.items() if values[name] > 0}
        if found:
            low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            parts.append(f"the {name} ranges from {found[low]:.3g} ({low}) to {found[high]:.3g} ({high})")
    summary = f"At step {step:,} {' and '.join(parts)}." if parts else f"Last recorded at step {step:,}."
    if not math.isnan(last.clipped):
        summary += f" The gradient was clipped in {last.clipped:.0%} of the steps before."
    if shown < len(run.diagnoses):
        summary += f" {shown} of {len(run.diagnoses):,} are drawn, those with the largest gradients."
    return summary


def measure_table(step: int, measures: Sequence[Context]) -> Context:
    """Return a table of each diagnostic's meaning, its healthy range and its range at the last step."""
    rows = []
    for one in measures:
        measure = MEASURES[one["name"]]
        values = [row[-1] for row in one["values"] if row[-1] is not None]
        found = f"{min(values):.3g} to {max(values):.3g}" if values else "–"
        is_high = bool(values) and max(values) > measure.highest
        rows.append({"name": one["name"].replace("_", " "), "found": found, "is_high": is_high, **measure._asdict()})
    return {"step": step, "rows": rows}


def parameter_table(step: int, diagnosis: Diagnosis) -> Context:
    """Return a table of each parameter's gradient norm, weight norm and update ratio at the last step."""
    names = list(diagnosis.gradient_norms)
    more = len(names) - SHOWN_PARAMETERS
    kinds = (diagnosis.gradient_norms, diagnosis.weight_norms, diagnosis.update_ratios)
    return {
        "step": step,
        "caption": f"Parameters; {more:,} more are in diagnostics.jsonl" if more > 0 else "Parameters",
        "rows": [
            (name, *(format_number(norms.get(name, math.nan), "{:.4g}") for norms in kinds))
            for name in names[:SHOWN_PARAMETERS]
        ],
    }
