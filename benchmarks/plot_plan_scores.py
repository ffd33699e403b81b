"""Tables and a plot of what `benchmarks/plan_scores.py` found.

python benchmarks/plot_plan_scores.py PLOT.png RESULT.json...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TEXT = ""


def at(result: Mapping[str, Any], plan: str, context: int, text: str = TEXT) -> tuple[float, float]:
    """Measured KL of a plan on held-out text at a context, and its error."""
    figures = result["measured"]["figures"][plan]
    return next((kl, error) for c, t, _, kl, error in figures if (c, t) == (context, text))


def contexts(result: Mapping[str, Any]) -> list[int]:
    """Contexts that are predicted and measured."""
    measured = {context for context, *_ in next(iter(result["measured"]["figures"].values()))}
    return sorted(measured & {int(context) for context in next(iter(result["predicted"].values()))})


def errors(result: Mapping[str, Any], prefix: str) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.float64]]]]:
    """Relative errors of the predictions of the plans of one kind, by context."""
    names = [name for name in result["predicted"] if name.startswith(prefix)]
    for context in contexts(result):
        pairs = [(result["predicted"][name][str(context)], at(result, name, context)[0]) for name in names]
        yield context, np.array([predicted / kl - 1 for predicted, kl in pairs])


def print_tables(result: Mapping[str, Any]) -> None:
    print(
        f"\n## {result['model']}: {result['tokens']:,} tokens in {result['score_seconds']:.1f} s, {result['estimate']}"
    )
    for prefix in ("random", "plan", "control", "fp8", "nvfp4", "rival", "ours"):
        for context, found in errors(result, prefix):
            if len(found):
                figures = f"median {np.median(found):+.2f}, mean |.| {np.abs(found).mean():.2f}"
                within = f"within 20 %: {(np.abs(found) < 0.2).mean():.0%}"
                print(f"{prefix:8} at {context:5}: {len(found):3} plans, predicted/measured - 1: {figures}, {within}")
    for row in result["table"]:
        print_budget(result, row)
    print("crossing, KL by position:")
    crossing = ("nvfp4-all", "fp8-attention", "fp8-down")
    for name in (one for one in crossing if one in result["predicted"]):
        bins = " ".join(f"{value:.4f}" for value in result["measured"]["bins"][name])
        pairs = [(at(result, name, c)[0], result["predicted"][name][str(c)]) for c in contexts(result)]
        print(f"    {name:14} {bins}; measured and predicted by context {np.round(pairs, 4).tolist()}")
    for bucket, damage in enumerate(result["scores"]["damage"]):
        factors = {key: round(value, 2) for key, value in damage["factors"].items()}
        slopes = {key: round(value, 2) for key, value in damage["slopes"].items()}
        print(f"damage {bucket}: c {damage['ceiling']:.2f}, error {damage['error']:.3f}, {slopes} {factors}")
    if result.get("alone"):
        print_alone(result)


def print_budget(result: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Plans at a budget beside the controls that fit, or a rival's plans."""
    if "rival" in row:
        names = {"theirs": row["plan"]} | {f"ours, {label}": name for label, (name, _) in row["ours"].items()}
        for label, name in names.items():
            found = [round(at(result, name, context)[0], 4) for context in contexts(result)]
            print(f"{row['rival']:30} {row['bytes'] / 1e6:7.1f} MB, {label}: {found}")
        return
    context = row["context"]
    plans = [(at(result, name, context), name, size) for name, size in row["plans"]]
    controls = [(at(result, name, context), title, size) for name, title, size in row["controls"]]
    best = min(controls)
    expected = min(row["controls"], key=lambda one: result["predicted"][one[0]][str(context)])
    print(f"{row['share']:.1f} x hybrid, {context:5} tokens, {row['bytes']:,} bytes:")
    for (kl, error), name, size in plans:
        predicted = result["predicted"][name][str(context)]
        ratio = f"x{kl / best[0][0]:.2f} of best"
        print(f"    {name:10} {kl:.4f} +- {error:.4f}, predicted {predicted:.4f}, {size:,} bytes, {ratio}")
    print(f"    best control {best[0][0]:.4f} {best[1]} ({best[2]:,}); predicted best: {expected[1]}")
    for (kl, _), title, size in sorted(controls):
        if "layers" not in title:
            print(f"        {title}: {kl:.4f} ({size:,})")


def print_alone(result: Mapping[str, Any]) -> None:
    """Costs of single groups beside their measured KL, by role and depth."""
    fmt = result["arguments"]["alone"]
    groups = {group["name"]: group for group in result["scores"]["groups"]}
    layers = 1 + max(group["layer"] or 0 for group in groups.values())
    ratios: dict[tuple[str, int], list[float]] = {}
    logs = []
    for name, measured in result["alone"].items():
        cost = result["scores"]["costs"][name][fmt]["kl"]
        for one, kl in zip(cost[1:2] or cost, measured[1:2] or measured, strict=True):
            if kl > 0:
                third = 3 * groups[name]["layer"] // layers
                ratios.setdefault((groups[name]["role"], third), []).append(one / kl)
                logs.append((np.log(one), np.log(kl)))
    print("cost / measured KL alone, second bucket, by role and third of the layers (geometric mean):")
    for key, some in sorted(ratios.items()):
        print(f"    {key}: {np.exp(np.mean(np.log(some))):.2f}")
    print(f"    correlation of logarithms {np.corrcoef(np.array(logs).T)[0, 1]:.3f}")


def plot(results: list[Mapping[str, Any]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 4), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        ends = []
        for context in contexts(result):
            names = [name for name in result["predicted"] if name.startswith(("random", "plan", "ours"))]
            x = [at(result, name, context)[0] for name in names]
            y = [result["predicted"][name][str(context)] for name in names]
            ends += [*x, *y]
            axis.loglog(x, y, ".", markersize=4, alpha=0.7, label=f"{context} tokens")
        low, high = min(ends), max(ends)
        span = np.array([low, high])
        axis.loglog(span, span, "k-", linewidth=0.8)
        axis.fill_between(span, span / 1.2, span * 1.2, color="0.85", zorder=0)
        axis.set_title(result["model"])
        axis.set_xlabel("measured KL on held-out text")
        axis.tick_params(axis="both", which="both", labelsize=6)
        axis.tick_params(axis="x", which="both", labelrotation=60)
        axis.set_ylabel("predicted KL")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    results = [json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[2:]]
    for result in results:
        print_tables(result)
    plot(results, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
