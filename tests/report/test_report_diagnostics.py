"""The diagnostics section."""

import json
import math
from pathlib import Path

import pytest
from report_pages import page_of


def test_the_heat_map_has_a_layers_norm_over_its_parameters(run: Path) -> None:
    heat = next(data for data in page_of(run).data if isinstance(data, dict) and "measures" in data)
    measures = {one["name"]: one for one in heat["measures"]}
    assert list(measures) == [
        "gradient norm",
        "update ratio",
        "weight norm",
        "rms",
        "max_abs",
        "max_attention_logit",
        "dead_units",
    ]
    row = json.loads((run / "diagnostics.jsonl").read_text().splitlines()[-1])
    norms = [norm for name, norm in row["gradient_norms"].items() if ".layers.2." in name]
    index = measures["gradient norm"]["rows"].index("layers.2")
    assert measures["gradient norm"]["values"][index][-1] == pytest.approx(math.hypot(*norms), rel=1e-3)
    assert measures["max_abs"]["values"][3][-1] == pytest.approx(
        row["activations"]["model.layers.3"]["max_abs"], rel=1e-3
    )


def test_a_diagnostic_outside_its_healthy_range_is_marked(copy: Path) -> None:
    path = copy / "diagnostics.jsonl"
    *rows, last = path.read_text().splitlines()
    row = json.loads(last)
    row["activations"]["model.layers.3"]["max_attention_logit"] = 120
    path.write_text("\n".join([*rows, json.dumps(row)]) + "\n")
    texts = [text.strip() for text in page_of(copy).texts if text.strip()]
    assert texts[texts.index("high") - 1] == "15 to 120" and texts.count("high") == 1
