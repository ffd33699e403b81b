"""Plans of other tools beside ours at equal bytes (benchmarks/rival_plans.py)."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MakeTiny
from helpers.plan_scores import made_up_scores
from snugfit.evaluation.chunks import Chunk, ChunkGroup
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.limits import Budget, read_place
from snugfit.planning.menu import GroupMenu
from snugfit.planning.shared_pass import Assigned
from snugfit.planning.space import Choices, read_choices
from snugfit.quantization.plan import lay_out
from snugfit.recipes.recipe import load_recipe

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import autoscheme_worker
import rival_plans

LABELS = ("NVFP4", "FP8", "BF16")


@pytest.fixture(scope="module")
def layout(make_tiny: MakeTiny) -> ModelLayout:
    """A model of three layers whose linears all formats fit."""
    return read_layout(make_tiny(hidden_size=128, intermediate_size=256, num_hidden_layers=3))


def choices_of(layout: ModelLayout, formats: Sequence[str]) -> Choices:
    """What may be chosen of these formats without a limit that binds."""
    return read_choices(layout, read_place(layout, Budget(bytes=1 << 40)), formats)


def inside(layout: ModelLayout) -> tuple[GroupMenu, ...]:
    """The menus of the groups in the layers."""
    menus = choices_of(layout, rival_plans.TWO).everything
    return tuple(menu for menu in menus if menu.group.layer is not None)


def of_linears(menus: Sequence[GroupMenu], label: Mapping[str, str]) -> dict[str, str]:
    """A tool's format of each linear, by what it says of each group."""
    return {w.removesuffix(".weight"): label[menu.group.name] for menu in menus for w in menu.group.weights}


def test_the_least_sum_within_a_limit_is_that_of_brute_force() -> None:
    """The places are those that trying all of them finds, and a limit that nothing keeps is an error."""
    generator = random.Random(3)  # noqa: S311
    scores = [[generator.random() for _ in range(3)] for _ in range(5)]
    sizes = [[generator.randrange(1000, 9000) for _ in range(3)] for _ in range(5)]

    def total(of: Sequence[Sequence[float]], places: Sequence[int]) -> float:
        return sum(one[place] for one, place in zip(of, places, strict=True))

    for limit in (18000, 25000, 40000):
        every = [places for places in itertools.product(range(3), repeat=5) if total(sizes, places) <= limit]
        best = min(every, key=lambda places: total(scores, places))
        assert tuple(rival_plans.least_sum(scores, sizes, limit)) == best
    with pytest.raises(ValueError, match="nothing fits"):
        rival_plans.least_sum(scores, sizes, 100)


def test_own_plans_are_read_in_the_order_of_the_budgets(layout: ModelLayout, tmp_path: Path) -> None:
    """A tool's own plans become choices of our groups, the one with the fewest bits at the smallest budget."""
    menus = inside(layout)
    heavy, light = (dict.fromkeys((menu.group.name for menu in menus), label) for label in ("FP8", "NVFP4"))
    light[menus[0].group.name] = "BF16"
    plans = [{"bits": 8.0, "formats": of_linears(menus, heavy)}, {"bits": 5.0, "formats": of_linears(menus, light)}]
    file = tmp_path / "rival.json"
    file.write_text(json.dumps({"delta-loss": {"seconds": 3.0, "tokens": 64, "stats": [], "plans": plans}}))
    small, large = rival_plans.read_rivals(file, menus, {1.1: 2000, 0.9: 1000}, 0)
    assert (small.share, large.share) == (0.9, 1.1)
    assert set(large.choice.values()) == {"fp8-dynamic"}
    assert len(large.choice) == len(menus)
    assert set(small.choice.values()) == {"nvfp4"}
    assert menus[0].group.name not in small.choice
    fused = next(menu.group for menu in menus if len(menu.group.weights) > 1)
    plans[1]["formats"] = of_linears(menus, light) | {fused.weights[0].removesuffix(".weight"): "FP8"}
    file.write_text(json.dumps({"delta-loss": {"seconds": 3.0, "tokens": 64, "stats": [], "plans": plans}}))
    with pytest.raises(ValueError, match=fused.name):
        list(rival_plans.read_rivals(file, menus, {0.9: 1000, 1.1: 2000}, 0))


@pytest.mark.parametrize("split", [False, True])
def test_scores_of_linears_or_of_groups_give_the_same_plan(layout: ModelLayout, tmp_path: Path, split: bool) -> None:
    """Scores without plans are added up by group, and the cheapest choice within the bytes is taken."""
    menus = inside(layout)
    generator = random.Random(5)  # noqa: S311
    stats: list[dict[str, Any]] = []
    for menu in menus:
        weights = [weight.removesuffix(".weight") for weight in menu.group.weights]
        scores = [generator.random(), generator.random() / 8, 0.0]
        if split:
            each = [one / len(weights) for one in scores]
            stats += [{"modules": [weight], "formats": LABELS, "scores": each} for weight in weights]
        else:
            stats.append({"modules": weights, "formats": LABELS, "scores": scores})
    stats.append({"modules": ["lm_head"], "formats": LABELS, "scores": [9.0, 9.0, 0.0]})
    file = tmp_path / "rival.json"
    file.write_text(json.dumps({"gradient": {"seconds": 3.0, "tokens": 64, "stats": stats}}))
    sizes = [[menu.option(fmt).bytes.file for fmt in ("nvfp4", "fp8-dynamic", "keep")] for menu in menus]
    budget = sum(one[0] for one in sizes) + (sum(one[1] for one in sizes) - sum(one[0] for one in sizes)) // 2
    (rival,) = rival_plans.read_rivals(file, menus, {1.0: budget + 77}, 77)
    spent = sum(menu.option(rival.choice.get(menu.group.name, "keep")).bytes.file for menu in menus)
    assert spent <= budget
    assert len(set(rival.choice.values())) == 2
    expected = _cheapest(menus, stats, sizes, budget)
    assert dict(rival.choice) == expected


def _cheapest(
    menus: Sequence[GroupMenu], stats: Sequence[Mapping[str, Any]], sizes: Sequence[Sequence[int]], budget: int
) -> dict[str, str]:
    """The choice with the least sum within the bytes, group by group over all sums (exact: few sizes)."""
    names = ("nvfp4", "fp8-dynamic", "keep")
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for menu, options in zip(menus, sizes, strict=True):
        mine = [one for one in stats if f"{one['modules'][0]}.weight" in menu.group.weights]
        costs = [sum(one["scores"][place] for one in mine) for place in range(3)]
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, places) in best.items():
            for place, size in enumerate(options):
                total = (cost + costs[place], (*places, place))
                if spent + size <= budget and (spent + size not in following or total < following[spent + size]):
                    following[spent + size] = total
        best = following
    places = min(best.values())[1]
    chosen = {menu.group.name: names[place] for menu, place in zip(menus, places, strict=True)}
    return {name: fmt for name, fmt in chosen.items() if fmt != "keep"}


def test_recipes_by_hand_and_ours_have_the_same_bytes_or_fewer(layout: ModelLayout) -> None:
    """Each recipe whose formats were scored is there, and our plan beside it has at most its bytes and expected KL."""
    formats = ("nvfp4", "fp8-dynamic", "int4")
    scores = made_up_scores(layout, formats=formats)
    choices = choices_of(layout, formats)
    menus = inside(layout)
    others = [menu.option("keep").bytes.file for menu in choices.everything if menu.group.layer is None]
    outside = next(iter(choices.space.outside.values())).file + sum(others)
    hand = list(rival_plans.hand_recipes(menus, formats))
    assert {one.name for one in hand} == {f"hand: {name}" for name in rival_plans.HAND} - {"hand: MXFP4"}
    kept = next(one for one in hand if "16-bit attention" in one.name)
    assert not any("self_attn" in name for name in kept.choice)
    plans: dict[str, Mapping[str, str]] = {}

    def named(prefix: str, choice: Mapping[str, str]) -> str:
        name = f"{prefix}-{len(plans)}"
        plans[name] = choice
        return name

    found = rival_plans.beside(hand, menus, lambda some: choices_of(layout, some).space, scores, 512, outside, named)
    for entry in found:
        theirs = scores.predict(plans[entry["plan"]], 512).kl
        kl = {}
        for label, (name, size) in entry["ours"].items():
            assert size <= entry["bytes"]
            kl[label] = scores.predict(plans[name], 512).kl
            assert kl[label] <= theirs * (1 + 1e-9)
            if label == "the same formats":
                assert set(plans[name].values()) <= set(entry["formats"]) | {"keep"}
        assert kl["all formats"] <= kl["the same formats"] * (1 + 1e-9)


def test_recipes_of_plans_write_the_bytes_that_were_counted(layout: ModelLayout, tmp_path: Path) -> None:
    """A recipe that is written for a rival's plan gives each weight its format, and as many bytes as the table says."""
    menus = inside(layout)
    everything = choices_of(layout, rival_plans.TWO).everything
    for rival in rival_plans.hand_recipes(menus, rival_plans.TWO):
        rival_plans.write_recipes(tmp_path, layout, [Assigned(name="a-plan", choice=rival.choice)])
        written = lay_out(layout, load_recipe(str(tmp_path / "a-plan.yaml"))).bytes
        outside = next(iter(choices_of(layout, rival_plans.TWO).space.outside.values())).file
        counted = sum(menu.option(rival.choice.get(menu.group.name, "keep")).bytes.file for menu in everything)
        assert written == outside + counted


def test_rows_are_batched_by_length() -> None:
    """Batches have rows of one length, at most so many, and every row is in one."""
    rows = [[n] * length for n, length in enumerate((5, 3, 5, 5, 3, 7))]
    batches = autoscheme_worker.batched(rows, 2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 3), (2, 5), (1, 5), (1, 7)]
    assert sorted(row for batch in batches for row in batch["input_ids"].tolist()) == sorted(rows)
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)


def test_pairs_have_the_error_of_the_difference() -> None:
    """A plan that is better by a little on every token is better beyond the error, though KL itself varies."""
    chunks = [
        Chunk(
            number=n,
            group=0,
            first=64 * n,
            ids=tuple(range(65)),
            target_positions=np.arange(1, 65),
            source=f"text-{n % 2}",
            conversation=False,
        )
        for n in range(6)
    ]
    groups = [ChunkGroup(context=64, digest="", chunks=tuple(chunks))]
    generator = np.random.default_rng(7)
    theirs = [generator.exponential(size=64).astype(np.float32) * (n + 1) for n in range(6)]
    found = {"rival-0": theirs, "ours-1": [one * 0.9 for one in theirs]}
    entry = {"rival": "hand", "bytes": 10, "plan": "rival-0", "ours": {"all formats": ("ours-1", 9)}}
    same = {"rival": "same", "bytes": 11, "plan": "rival-0", "ours": {"all formats": ("rival-0", 11)}}
    rows = rival_plans.paired([entry, same], groups, found)
    together = next(row for row in rows if row["rival"] == "hand" and row["context"] is None)
    assert together["our_kl"] == pytest.approx(0.9 * together["rival_kl"], rel=1e-6)
    assert together["gain"] == pytest.approx(0.1 * together["rival_kl"], rel=1e-5)
    assert together["gain_error"] < together["rival_error"] / 5
    equal = next(row for row in rows if row["rival"] == "same")
    assert (equal["gain"], equal["gain_error"]) == (0.0, 0.0)
    lines = rival_plans.table(rows).splitlines()
    assert len(lines) == 4
    assert "| 0.900 ± " in lines[2]
    assert "| 1.000 ± 0.000 |" in lines[3]
