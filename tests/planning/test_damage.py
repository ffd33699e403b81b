"""How costs are fitted to measured plans: what a made-up truth gives is found again."""

from __future__ import annotations

import math
import random

import pytest

from snugfit.planning.damage import fit_damage
from snugfit.records.scores import Cost, Damage, Point, ScoredGroup, depths, saturate

LAYERS = 6
TRUE = {"nvfp4/qkv": 1.6, "nvfp4/gate_up": 1.1, "nvfp4/down": 1.3, "fp8-dynamic/qkv": 1.3, "fp8-dynamic/gate_up": 1.0}
TRUE |= {"fp8-dynamic/down": 0.9}


def made_up(ceiling: float, slope: float) -> tuple[list[ScoredGroup], dict[str, dict[str, Cost]], Damage]:
    generator = random.Random(0)  # noqa: S311
    groups, costs = [], {}
    for layer in range(LAYERS):
        for role in ("qkv", "gate_up", "down"):
            name = f"{layer}.{role}"
            groups.append(ScoredGroup(name=name, layer=layer, role=role, elements=1))
            nvfp4 = 0.03 * generator.random() + 0.005
            costs[name] = {"nvfp4": Cost((nvfp4,), (0.0,)), "fp8-dynamic": Cost((nvfp4 / 10,), (0.0,))}
    slopes = {"nvfp4": slope, "fp8-dynamic": slope}
    return groups, costs, Damage(ceiling=ceiling, factors=TRUE, slopes=slopes, error=0.0)


def kl_of(
    formats: dict[str, str], groups: list[ScoredGroup], costs: dict[str, dict[str, Cost]], damage: Damage
) -> float:
    roles, depth = {group.name: group.role for group in groups}, depths(tuple(groups))
    total = math.fsum(
        costs[name][fmt].kl[0] * damage.factor(fmt, roles[name], depth[name]) for name, fmt in formats.items()
    )
    return saturate(total, damage.ceiling)[0]


def points(groups: list[ScoredGroup], costs: dict[str, dict[str, Cost]], damage: Damage) -> list[Point]:
    names = [group.name for group in groups]
    generator = random.Random(1)  # noqa: S311
    plans = [dict.fromkeys(names, fmt) for fmt in ("nvfp4", "fp8-dynamic")]
    for fmt in ("nvfp4", "fp8-dynamic"):
        plans += [{n: fmt for n in names if n.endswith(role)} for role in ("qkv", "gate_up")]
        plans.append({n: fmt for n in names if int(n[0]) < LAYERS // 2})
    plans += [{name: generator.choice(["nvfp4", "fp8-dynamic"]) for name in names} for _ in range(2)]
    kl = [kl_of(plan, groups, costs, damage) for plan in plans]
    return [
        Point(name=str(n), formats=plan, kl=(value,), error=(value / 50,))
        for n, (plan, value) in enumerate(zip(plans, kl, strict=True))
    ]


@pytest.mark.parametrize(("ceiling", "slope"), [(64.0, 0.0), (1.0, 0.0), (4.0, -0.8)])
def test_plans_that_were_not_measured_are_predicted(ceiling: float, slope: float) -> None:
    """Of random plans the fitted model predicts what the true one gives within 6 %, also with a ceiling and a slope."""
    groups, costs, truth = made_up(ceiling, slope)
    (found,) = fit_damage(groups, costs, points(groups, costs, truth), 1)
    generator = random.Random(2)  # noqa: S311
    for _ in range(50):
        pool = generator.choice((["nvfp4"], ["nvfp4", "fp8-dynamic"], ["nvfp4", "fp8-dynamic", "keep"]))
        drawn = {group.name: generator.choice(pool) for group in groups}
        plan = {name: fmt for name, fmt in drawn.items() if fmt != "keep"}
        assert kl_of(plan, groups, costs, found) == pytest.approx(kl_of(plan, groups, costs, truth), rel=0.06)
    assert found.error < 0.03


def test_without_measured_plans_costs_count_as_they_are() -> None:
    """Nothing measured: no factor, no ceiling."""
    groups, costs, _ = made_up(64.0, 0.0)
    (found,) = fit_damage(groups, costs, [], 1)
    assert found.factor("nvfp4", "qkv", 0.5) == 1
    assert saturate(3.0, found.ceiling) == (3.0, 1.0)
