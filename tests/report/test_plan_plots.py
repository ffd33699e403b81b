"""Pictures of plans: their names can be read."""

from __future__ import annotations

from itertools import combinations

from matplotlib.figure import Figure

from snugfit.report.plan import set_apart


def test_names_of_near_points_do_not_cover_each_other() -> None:
    """Names of points at one place, which lie on each other, are moved apart; the highest stays where it is."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    notes = [
        axes.annotate(f"nvfp4-fp8-{n}", (0.5, 0.5 + n / 200), (5, 3), textcoords="offset points") for n in range(3)
    ]
    set_apart(figure, axes.texts)
    figure.draw_without_rendering()
    assert not any(a.get_window_extent().overlaps(b.get_window_extent()) for a, b in combinations(notes, 2))
    assert notes[-1].xyann == (5, 3)
