"""What happened inside the model: norms of gradients, weights and updates by layer, activations by block, as a heat map."""

import math
import re
from collections.abc import Mapping, Sequence

from smollm2.formatting import format_number
from smollm2.report.curves import shorten, split_evenly
from smollm2.report.markup import choices, figure, folded, note, table
from smollm2.report.reading import RunFolder
from smollm2.tracking.base import Diagnosis

SHOWN_PARAMETERS = 400
SHOWN_LOOKS = 240
CELLS_OF_A_PAGE = 60_000
LAYER = re.compile(r"\.layers\.([0-9]+)(?:\.|$)")

LOOKS = {
    "gradient norm": "of the gradient, before clipping",
    "update ratio": "how far an update moves the weights, over their norm",
    "weight norm": "of the weights",
    "rms": "root mean square of what a block passes on",
    "max_abs": "largest activation",
    "max_attention_logit": "largest attention logit",
    "dead_units": "share of feed-forward units that never act",
}
"""What the heat map can show; the last four by block, the others by everything that has parameters."""


def inside_section(run: RunFolder) -> str:
    """Gradients, weights, updates and activations, layer by layer."""
    if not run.diagnoses:
        return note("Nothing was looked at inside this run: the config says how often diagnostics are taken.")
    layers = list(dict.fromkeys(layer_of(name) for _, one in run.diagnoses[-1:] for name in one.gradient_norms))
    blocks = list(dict.fromkeys(map(layer_of, run.diagnoses[-1][1].activations)))
    columns = max(2, min(SHOWN_LOOKS, CELLS_OF_A_PAGE // max(1, 3 * len(layers) + 4 * len(blocks))))
    looks = thin_looks(run.diagnoses, columns)
    measures = [
        {"name": name, "words": words, "rows": rows, "values": values}
        for name, words in LOOKS.items()
        if (rows := layers if name in ("gradient norm", "update ratio", "weight norm") else blocks)
        and (values := measure(looks, name, rows))
    ]
    if not measures:
        return note("The looks inside this run hold no numbers.")
    thinned = f" {len(looks)} of {len(run.diagnoses):,} looks are drawn, of each bucket that with the largest gradient."
    clipped = run.diagnoses[-1][1].clipped
    share = f" At the last look {clipped:.0%} of the updates had been clipped." if not math.isnan(clipped) else ""
    summary = summarize_look(looks[-1]) + share + thinned * (len(looks) < len(run.diagnoses))
    data = {"steps": [step for step, _ in looks], "measures": measures}
    switch = choices("measure", "Show", [str(one["name"]) for one in measures])
    form = f'<form class="toolbar" aria-label="What the heat map shows">{switch}</form>'
    return figure("heat", "Layer by layer", summary, data, form) + folded(
        f"Every parameter at update {looks[-1][0]:,}", list_parameters(looks[-1][1])
    )


def layer_of(name: str) -> str:
    """The row of the heat map in which a parameter or a block counts."""
    found = LAYER.search(name)
    return f"layer {found[1]}" if found else name.removeprefix("model.").removesuffix(".weight")[:60]


def thin_looks(looks: Sequence[tuple[int, Diagnosis]], columns: int) -> Sequence[tuple[int, Diagnosis]]:
    """At most so many looks; of several that share a column the one whose gradient is largest, the last always."""
    if len(looks) <= columns:
        return looks
    *inner, last = looks

    def size(look: tuple[int, Diagnosis]) -> float:
        return sum(norm for norm in look[1].gradient_norms.values() if not math.isnan(norm))

    return [*(max(bucket, key=size) for bucket in split_evenly(inner, columns - 1)), last]


def measure(looks: Sequence[tuple[int, Diagnosis]], name: str, rows: Sequence[str]) -> list[list[float | None]]:
    """One list a row, one number a look; empty where no look has a number."""
    columns = [by_layer(one, name) if name in list(LOOKS)[:3] else by_block(one, name) for _, one in looks]
    values = [[column.get(row, math.nan) for column in columns] for row in rows]
    if all(math.isnan(value) for row in values for value in row):
        return []
    return [[None if math.isnan(value) else shorten(value, 4) for value in row] for row in values]


def by_layer(one: Diagnosis, name: str) -> dict[str, float]:
    """A norm over all parameters of each layer; a ratio is that of the norms over the layer."""
    weights = sum_squares(one.weight_norms)
    if name == "weight norm":
        return {layer: math.sqrt(value) for layer, value in weights.items()}
    if name == "gradient norm":
        return {layer: math.sqrt(value) for layer, value in sum_squares(one.gradient_norms).items()}
    moved = {key: ratio * one.weight_norms.get(key, math.nan) for key, ratio in one.update_ratios.items()}
    return {
        layer: math.sqrt(value / weights[layer]) if weights.get(layer) else math.nan
        for layer, value in sum_squares(moved).items()
    }


def sum_squares(norms: Mapping[str, float]) -> dict[str, float]:
    """Of the norms of each layer."""
    sums: dict[str, float] = {}
    for name, norm in norms.items():
        layer = layer_of(name)
        sums[layer] = sums.get(layer, 0.0) + norm * norm
    return sums


def by_block(one: Diagnosis, name: str) -> dict[str, float]:
    """One number of each block's activations."""
    return {layer_of(block): values.get(name, math.nan) for block, values in one.activations.items()}


def summarize_look(look: tuple[int, Diagnosis]) -> str:
    """Where gradient and updates are largest and smallest."""
    said = []
    for name in ("gradient norm", "update ratio"):
        found = {layer: value for layer, value in by_layer(look[1], name).items() if value > 0}
        if found:
            low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            said.append(f"the {name} goes from {found[low]:.3g} ({low}) to {found[high]:.3g} ({high})")
    return f"At update {look[0]:,} {' and '.join(said)}." if said else f"The last look was at update {look[0]:,}."


def list_parameters(one: Diagnosis) -> str:
    """The norms of each parameter."""
    names = list(one.gradient_norms)
    left = f"; {len(names) - SHOWN_PARAMETERS:,} more are in diagnostics.jsonl" * (len(names) > SHOWN_PARAMETERS)
    rows = [
        (
            name,
            *(
                format_number(norms.get(name, math.nan), "{:.4g}")
                for norms in (one.gradient_norms, one.weight_norms, one.update_ratios)
            ),
        )
        for name in names[:SHOWN_PARAMETERS]
    ]
    header = ("Parameter", "Gradient norm", "Weight norm", "Update ratio")
    return table(header, rows, f"Parameters{left}", numeric=True)
