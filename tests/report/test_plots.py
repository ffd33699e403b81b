"""Plots of an evaluation whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest

from helpers.evaluations import FLOOR, candidate, checkpoint, model, record_of, two_contexts
from snugfit.records.evaluation import EvalRecord, ModelFigures, PairFigures
from snugfit.report.plots import write_plots


@pytest.fixture
def record() -> EvalRecord:
    """Two contexts of a reference and two candidates, and pairs of them at the first."""
    return two_contexts()


def test_plots_are_images_and_always_the_same(record: EvalRecord, tmp_path: Path) -> None:
    """Each plot is a PNG and an SVG that readers open, with every model's name, and comes out the same twice."""
    names = ["perplexity-by-context", "kl-by-context", "kl-by-position"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
        assert write_plots(record, folder) == [f"{name}.{ending}" for name in names for ending in ("png", "svg")]
    for file in once.iterdir():
        content = file.read_bytes()
        assert content == (twice / file.name).read_bytes(), file.name
        if file.suffix == ".png":
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert content.endswith(b"IEND\xaeB`\x82")
        else:
            assert ET.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314 - our own file
    comments = (once / "kl-by-context.svg").read_text()
    assert "<!-- plain -->" in comments
    assert "<!-- noise floor of the reference -->" in comments
    assert "<!-- noise floor of small -->" in comments
    losses = (once / "perplexity-by-context.svg").read_text()
    assert "<!-- base (reference) -->" in losses
    assert "<!-- 2 chunks, 1,234 tokens a length" in losses
    assert "bands: one standard error over chunks" in losses


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [
        ([(1024, [model("a"), model("b")], ())], ["perplexity-by-position"]),
        (
            [(1024, [model("a")], ()), (2048, [model("a")], ())],
            ["perplexity-by-context", "perplexity-by-position"],
        ),
        ([(0, [model("a")], ())], ["perplexity-by-position-chat"]),
        ([(1024, [model("a", by_position=())], ())], []),
        ([(1024, [model("base"), candidate("a")], ())], ["kl-by-position"]),
        (
            [(1024, [model("base"), candidate("a")], ()), (0, [model("base"), candidate("a")], ())],
            ["kl-by-position", "kl-by-position-chat"],
        ),
    ],
)
def test_what_there_is_to_plot(
    tmp_path: Path, contexts: list[tuple[int, list[ModelFigures], tuple[PairFigures, ...]]], expected: list[str]
) -> None:
    """By context from two lengths of text on, KL only with a reference; by position the longest text, and chat."""
    written = write_plots(record_of(*contexts), tmp_path)
    assert written == [f"{name}.{ending}" for name in expected for ending in ("png", "svg")]
    assert {file.name for file in tmp_path.iterdir()} == set(written)


def test_without_a_reference_no_line_is_black(tmp_path: Path) -> None:
    """Black is the reference's colour; without one the first candidate has a candidate's."""
    models = [model("a"), model("b")]
    drawn = {}
    for name, reference in (("with", checkpoint("a")), ("without", None)):
        (tmp_path / name).mkdir()
        write_plots(record_of((1024, models, ()), (2048, models, ()), reference=reference), tmp_path / name)
        drawn[name] = (tmp_path / name / "perplexity-by-context.svg").read_text()
    assert "#0072b2" in drawn["without"]
    assert "#d55e00" in drawn["without"]
    assert "#d55e00" not in drawn["with"]
    assert "<!-- a (reference) -->" in drawn["with"]
    assert "(reference)" not in drawn["without"]


@pytest.mark.parametrize("height", [0.0005, 0.1, -0.1])
def test_floors_are_drawn_wherever_they_are(tmp_path: Path, height: float) -> None:
    """Far below the lines, among them, or (of an estimate) below zero, where there is no logarithm."""
    base = model("base", floor=replace(FLOOR, kl=height))
    write_plots(record_of((1024, [base, candidate("a")], ()), (2048, [base, candidate("a")], ())), tmp_path)
    assert "<!-- noise floor of the reference -->" in (tmp_path / "kl-by-context.svg").read_text()


def test_figures_of_any_size_are_drawn(tmp_path: Path) -> None:
    """Infinite, enormous and negative values, and names that matplotlib would read otherwise, stop no plot."""
    kl = candidate("").kl
    assert kl is not None
    estimate = candidate("$x_1$ {", kl=replace(kl, mean=-0.01), kl_kind="estimate")
    models = [model("_base"), estimate, candidate("b", perplexity=math.inf), candidate("c", perplexity=1e12)]
    written = write_plots(record_of((1024, models, ()), (2048, models, ())), tmp_path)
    assert len(written) == 6


def test_the_callers_matplotlib_is_left_alone(
    record: EvalRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back end, settings and open figures of the caller stay as they are."""
    from matplotlib import pyplot as plt

    monkeypatch.setitem(mpl.rcParams, "svg.hashsalt", "mine")
    mine = plt.figure()
    back_end, settings = mpl.get_backend(), dict(mpl.rcParams)
    write_plots(record, tmp_path)
    assert mpl.get_backend() == back_end
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)
