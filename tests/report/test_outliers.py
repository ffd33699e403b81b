"""Tables, CSV and plots of what calibration saw, of statistics whose figures are known."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from snugfit.records.statistics import ExpertStatistics, InputStatistics, LayerStatistics
from snugfit.records.statistics_file import DatasetUsed, Statistics
from snugfit.report.outliers import (
    coverage_of,
    coverage_sheet,
    coverage_words,
    outlier_sheet,
    outliers_of,
    write_outliers,
)

USUAL, LARGE = 127 << 4, 137 << 4  # bins from 1 and from 1024


def inputs(amax: float) -> InputStatistics:
    """Of 10,000 values all but one lie in [1, 1 + 1/16)."""
    return InputStatistics(80, amax, {USUAL: 9999, LARGE: 1})


PROJECTIONS = {"self_attn.q_proj": 2.0, "mlp.down_proj": 2000.0}


def statistics(
    layers: int = 3, *, forced: bool = True, mixture: bool = True, names: Mapping[str, float] = PROJECTIONS
) -> Statistics:
    """Layers whose largest inputs grow with their number; `names`: projection -> that of layer 0."""
    experts = ExpertStatistics(
        routed=(0, 3, 9, 700),
        forced=(20, 17, 11, 0) if forced else (0,) * 4,
        gate_up_routed=(0.0, 2.0, 2.0, 4.0),
        gate_up_forced=(5.0, 3.0, 1.0, 0.0) if forced else (0.0,) * 4,
        down_routed=(0.0, 8.0, 8.0, 8.0),
        down_forced=(1.0, 0.0, 0.0, 0.0),
    )
    found = {
        n: LayerStatistics(
            {f"model.layers.{n}.{name}": inputs(largest * (n + 1)) for name, largest in names.items()},
            {f"model.layers.{n}.mlp.experts": experts} if mixture else {},
        )
        for n in range(layers)
    }
    return Statistics(
        snugfit="1.0",
        model="some/model",
        header_digest="cd" * 32,
        fingerprint="ef" * 32,
        datasets=(DatasetUsed("a.jsonl", 4, 712, "ab" * 32),),
        all_experts=True,
        max_forced_tokens=20,
        recipe=None,
        recipe_digest=None,
        layers=found,
    )


def test_every_layer_and_projection_has_a_row() -> None:
    """Largest magnitude, 99.9th percentile and the first over the second, by layer and projection in their order."""
    sheet = outlier_sheet(statistics())
    assert [row[:3] for row in sheet.rows[:3]] == [
        ("0", "self_attn.q_proj", "2"),
        ("0", "mlp.down_proj", "2000"),
        ("1", "self_attn.q_proj", "4"),
    ]
    outlier = outliers_of(statistics())[1]
    assert 1 < outlier.p999 <= 1 + 1 / 16
    assert outlier.ratio == pytest.approx(outlier.amax / outlier.p999)
    assert sheet.rows[1][4] == f"{outlier.ratio:,.1f}"


def test_a_terminal_sees_the_worst_dozen() -> None:
    """Narrow, the table begins with what stands out farthest and ends after a dozen rows, saying of how many."""
    sheet = outlier_sheet(statistics(20), narrow=True)
    assert [row[:2] for row in sheet.rows] == [(str(n), "mlp.down_proj") for n in range(19, 7, -1)]
    assert "The 12 largest ratios of 40." in sheet.note


def test_nothing_measured_has_no_ratio() -> None:
    """A projection without values has a row without a ratio, and is drawn nowhere."""
    empty = replace(statistics(), layers={0: LayerStatistics({"h.0.a": InputStatistics(0, 0.0, {})}, {})})
    assert outlier_sheet(empty).rows == (("0", "a", "0", "0", "-"),)


def test_coverage_of_experts() -> None:
    """Tokens routed and forced, experts without routed tokens, and what forced tokens made larger, a row a layer."""
    sheet = coverage_sheet(statistics(2))
    row = ("0", "4", "0 / 6 / 700", "0 / 14 / 20", "1", "2", "1", "1.250", "1.000")
    assert sheet.rows == (row, ("1", *row[1:]))
    assert coverage_words(coverage_of(statistics(2))) == (
        "all 4 experts of 2 layers saw >= 20 tokens (routed 0 to 700, rest forced)"
    )
    routed = coverage_of(statistics(1, forced=False))
    assert coverage_words(routed) == "4 experts of 1 layer saw 0 to 700 tokens, all routed"
    assert coverage_of(statistics(mixture=False)) == ()


def test_a_terminal_sees_the_layers_with_the_fewest_tokens() -> None:
    """Narrow, a deep model's table has a dozen layers in their order, and says which."""
    deep = statistics(30)
    (experts,) = deep.layers[3].experts.values()
    full = LayerStatistics(deep.layers[3].inputs, {"model.layers.3.mlp.experts": replace(experts, routed=(9,) * 4)})
    sheet = coverage_sheet(replace(deep, layers={**deep.layers, 3: full}), narrow=True)
    assert [row[0] for row in sheet.rows] == [str(n) for n in range(13) if n != 3]
    assert "12 of 30 layers" in sheet.note


def test_files(tmp_path: Path) -> None:
    """A Markdown report, full numbers as CSV, and plots that name every projection and come out the same twice."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    names = ["outliers.md", "outliers.csv"]
    names += [f"{name}.{ending}" for name in ("outliers-by-layer", "tokens-by-layer") for ending in ("png", "svg")]
    for folder in (once, twice):
        folder.mkdir()
        assert write_outliers(statistics(), folder) == names
    assert {file.name for file in once.iterdir()} == set(names)
    assert all((once / name).read_bytes() == (twice / name).read_bytes() for name in names)
    text = (once / "outliers.md").read_text(encoding="utf-8")
    assert "## What experts saw" in text
    assert "- a.jsonl: 4 samples, 712 tokens" in text
    rows = list(csv.DictReader((once / "outliers.csv").open(encoding="utf-8")))
    assert [(row["layer"], row["projection"], row["amax"]) for row in rows[:2]] == [
        ("0", "self_attn.q_proj", "2.0"),
        ("0", "mlp.down_proj", "2000.0"),
    ]
    drawn = (once / "outliers-by-layer.svg").read_text(encoding="utf-8")
    assert "<!-- mlp.down_proj -->" in drawn
    assert "bands" not in drawn
    drawn = (once / "tokens-by-layer.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {word} -->" in drawn for word in ("least", "median", "most", "0", "100"))  # lines, ticks


def test_a_dense_model_has_no_plot_of_experts(tmp_path: Path) -> None:
    """Without experts there is neither their table nor their plot; one layer and odd names are drawn all the same."""
    names = {f"_part{n}": float(n + 1) for n in range(20)}
    files = write_outliers(statistics(1, mixture=False, names=names), tmp_path)
    assert files == ["outliers.md", "outliers.csv", "outliers-by-layer.png", "outliers-by-layer.svg"]
    assert "experts saw" not in (tmp_path / "outliers.md").read_text(encoding="utf-8")
