"""Plans of other tools for `plan_scores.py`: what their files chose, recipes written by hand, and each beside ours.

A rival is one choice of formats, whoever made it. Beside it our plan is solved for exactly its bytes, once of the
rival's own formats and once of all that were scored; all run in the same pass, under the same rounding, and are
compared token for token.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snugfit.evaluation.chunks import ChunkGroup
from snugfit.model.layout import ModelLayout
from snugfit.planning.menu import GroupMenu, Server, read_options
from snugfit.planning.proof import judge_plans
from snugfit.planning.search import Limit, Mix, Space, least_kl
from snugfit.planning.shared_pass import Array, Assigned
from snugfit.planning.space import recipe_of_mix
from snugfit.records.scores import KEEP, Scores

TWO = ("nvfp4", "fp8-dynamic")
ATTENTION = frozenset({"qkv", "o", "attention"})
DOWN = frozenset({"down"})
# the shapes of llm-compressor 0.14's examples: the format of all linears, and which of them have another one. Its INT8
# is FP8 here, its FP8 in blocks FP8 in channels: as many bits a weight
HAND: Mapping[str, tuple[str, frozenset[str], str]] = {
    "NVFP4": ("nvfp4", frozenset(), ""),  # quantization_w4a4_fp4
    "NVFP4, 16-bit attention": ("nvfp4", ATTENTION, KEEP),  # quantization_w4a4_fp4/trinity_large_nvfp4
    "NVFP4, FP8 attention": ("nvfp4", ATTENTION, "fp8-dynamic"),  # quantization_w4a4_fp4/hy3_example
    "NVFP4, FP8 down_proj": ("nvfp4", DOWN, "fp8-dynamic"),  # quantization_non_uniform/quantization_nvfp4_fp8
    "W4A16": ("int4", frozenset(), ""),  # quantization_w4a16
    "W4A16, FP8 attention": ("int4", ATTENTION, "fp8-dynamic"),  # quantization_non_uniform/..._multiple_modifiers
    "W4A16, FP8 down_proj": ("int4", DOWN, "fp8-dynamic"),  # quantization_non_uniform/quantization_int4_int8
    "MXFP4": ("mxfp4", frozenset(), ""),  # quantization_w4a4_mxfp4
}


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A tool's plan: the format of each group that is not kept, and the formats among which the tool chose.

    `share` is the budget that it was made for, as a share of the hybrid's bytes; None where it has no budget. `seconds`
    are what its scores took, for so many `tokens`.
    """

    name: str
    choice: Mapping[str, str]
    formats: tuple[str, ...]
    share: float | None = None
    seconds: float | None = None
    tokens: int | None = None


def read_rivals(file: Path, menus: Sequence[GroupMenu], budgets: Mapping[float, int], outside: int) -> Iterator[Rival]:
    """The plans of a file of `autoscheme_worker.py` or `autoquantize_worker.py`, of each of its methods.

    The tool's own plans, in the order of the budgets, where the file has them; else those with the least sum of its
    scores within each budget, exactly. ValueError for plans that give one group two formats.
    """
    for method, found in json.loads(file.read_text(encoding="utf-8")).items():
        known = {"formats": TWO, "seconds": found["seconds"], "tokens": found["tokens"]}
        if plans := found.get("plans"):
            for share, plan in zip(sorted(budgets), sorted(plans, key=lambda one: one["bits"]), strict=True):
                if plan["formats"] is not None:
                    yield Rival(name=method, share=share, choice=_by_group(plan["formats"], menus), **known)
            continue
        for share, size in budgets.items():
            yield Rival(name=method, share=share, choice=_least(found["stats"], menus, size - outside), **known)


def hand_recipes(menus: Sequence[GroupMenu], formats: Sequence[str]) -> Iterator[Rival]:
    """The recipes of HAND whose formats were scored and fit every group; routed experts and gates count as MLP."""
    for name, (plain, roles, other) in HAND.items():
        chosen = {menu.group.name: other if menu.group.role in roles else plain for menu in menus}
        used = set(chosen.values()) - {KEEP}
        fits = all(any(one.format == chosen[menu.group.name] for one in menu.options) for menu in menus)
        if fits and used <= set(formats):
            choice = {group: fmt for group, fmt in chosen.items() if fmt != KEEP}
            yield Rival(name=f"hand: {name}", choice=choice, formats=tuple(one for one in formats if one in used))


def _ours(label: str) -> str:
    """The format that a tool's label names."""
    return "nvfp4" if "NVFP4" in label else "fp8-dynamic" if "FP8" in label else KEEP


def _by_group(formats: Mapping[str, str], menus: Sequence[GroupMenu]) -> dict[str, str]:
    """The format of each group that is not kept, out of those of single linears; ValueError where they differ."""
    choice = {}
    for menu in menus:
        found = {_ours(formats.get(weight.removesuffix(".weight"), KEEP)) for weight in menu.group.weights}
        if len(found) > 1:
            raise ValueError(f"{menu.group.name} has {', '.join(sorted(found))}")
        choice[menu.group.name] = found.pop()
    return {name: fmt for name, fmt in choice.items() if fmt != KEEP}


def _least(stats: Sequence[Mapping[str, Any]], menus: Sequence[GroupMenu], limit: int) -> dict[str, str]:
    """The formats with the least sum of a tool's scores within so many bytes, where one group has one format."""
    owner = {weight: menu for menu in menus for weight in menu.group.weights}
    sums: dict[str, dict[str, float]] = {}
    for one in stats:
        menu = owner.get(f"{one['modules'][0]}.weight")
        if menu is None:  # what it may not quantize, such as the output head
            continue
        of_group = sums.setdefault(menu.group.name, {})
        for label, score in zip(one["formats"], one["scores"], strict=True):
            of_group[_ours(label)] = of_group.get(_ours(label), 0.0) + score
    scored = [(menu, sums[menu.group.name]) for menu in menus if menu.group.name in sums]
    kept = sum(menu.option(KEEP).bytes.file for menu in menus if menu.group.name not in sums)
    sizes = [[menu.option(fmt).bytes.file for fmt in costs] for menu, costs in scored]
    places = least_sum([list(costs.values()) for _, costs in scored], sizes, limit - kept)
    choice = {menu.group.name: list(costs)[place] for (menu, costs), place in zip(scored, places, strict=True)}
    return {name: fmt for name, fmt in choice.items() if fmt != KEEP}


def least_sum(scores: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> list[int]:
    """One place of each list, so that the scores' sum is least and the sizes' sum is within a limit.

    ValueError where nothing is.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = np.concatenate([np.asarray(one, float) for one in scores])
    ends = np.cumsum([0, *map(len, scores)])
    one_each = np.zeros((len(scores), len(flat)))
    for row, (start, stop) in enumerate(itertools.pairwise(ends)):
        one_each[row, start:stop] = 1
    size = np.concatenate([np.asarray(one, float) for one in sizes]) / 1024
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, limit / 1024)]
    span = max(float(np.abs(flat).max()), 1e-30)
    found = milp(flat / span, constraints=limits, integrality=np.ones(len(flat)), bounds=Bounds(0, 1))
    if found.x is None:
        raise ValueError(f"nothing fits {limit} bytes")
    return [int(found.x[start:stop].argmax()) for start, stop in itertools.pairwise(ends)]


def beside(
    rivals: Sequence[Rival],
    menus: Sequence[GroupMenu],
    space_of: Callable[[Sequence[str]], Space],
    scores: Scores,
    context: int,
    outside: int,
    named: Callable[[str, Mapping[str, str]], str],
) -> Iterator[dict[str, Any]]:
    """For each rival its bytes, the name of its plan, and ours for exactly these bytes, by the formats that it has.

    `space_of` gives the space of a menu, `named` enters a plan and returns its name.
    """
    for rival in rivals:
        size = outside + sum(menu.option(rival.choice.get(menu.group.name, KEEP)).bytes.file for menu in menus)
        ours: dict[str, tuple[str, int]] = {}
        for label, formats in (("the same formats", rival.formats), ("all formats", scores.formats)):
            mix = best_at(space_of(formats), scores, context, size)
            if mix is not None:
                ours[label] = (named("ours", mix.formats), mix.bytes.file)
        yield {
            "rival": rival.name,
            "share": rival.share,
            "bytes": size,
            "plan": named("rival", rival.choice),
            "ours": ours,
            "formats": rival.formats,
            "seconds": rival.seconds,
            "tokens": rival.tokens,
        }


def best_at(space: Space, scores: Scores, context: int, size: int) -> Mix | None:
    """The mix with the least expected KL in at most so many bytes of all weights; None where none fits."""
    limit = (Limit(name="bytes", kind="file", bytes=size),)
    found = least_kl(space.with_limits(dict.fromkeys(space.limits, limit)), scores, context)
    return found[0] if found else None


def write_recipes(folder: Path, layout: ModelLayout, plans: Sequence[Assigned]) -> None:
    """A recipe NAME.yaml of each plan, which `quantize` runs as it is."""
    menus = read_options(layout, Server())
    folder.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        options = {menu.group.name: menu.option(plan.choice.get(menu.group.name, KEEP)) for menu in menus}
        recipe = recipe_of_mix(layout, options, menus, fp8_cache=False, name=plan.name)
        (folder / f"{plan.name}.yaml").write_text(recipe.text, encoding="utf-8")


def paired(
    entries: Sequence[Mapping[str, Any]], groups: Sequence[ChunkGroup], found: Mapping[str, Sequence[Array]]
) -> list[dict[str, Any]]:
    """Each of our plans against its rival, by context: KL of both, and the rival's KL less ours with its error.

    Errors are of the differences, segment by segment; None stands for all contexts.
    """
    rows = []
    for entry in entries:
        for label, (name, size) in entry["ours"].items():
            two = [Assigned(name=entry["plan"]), Assigned(name=name)]
            if name == entry["plan"]:
                two = two[:1]
            proof = judge_plans(two, entry["plan"], groups, found, (), rounding="", target="")
            theirs, mine = proof.plans[0].measured, proof.plans[-1].measured
            rows += [
                {
                    "rival": entry["rival"],
                    "bytes": entry["bytes"],
                    "ours": label,
                    "our_bytes": size,
                    "context": one.context,
                    "tokens": one.tokens,
                    "rival_kl": one.kl,
                    "rival_error": one.error,
                    "our_kl": mine_of.kl,
                    "our_error": mine_of.error,
                    "gain": mine_of.gain or 0.0,
                    "gain_error": mine_of.gain_error or 0.0,
                }
                for one, mine_of in zip(theirs, mine, strict=True)
                if one.text == proof.plans[0].measured[0].text
            ]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All contexts together as Markdown: one line a rival, two columns for each way in which ours is made."""
    labels = list(dict.fromkeys(row["ours"] for row in rows))
    lines = ["| rival | MB | KL |" + "".join(f" ours, {label} | ratio |" for label in labels)]
    lines.append("|---|---|---|" + "---|---|" * len(labels))
    together = [row for row in rows if row["context"] is None]
    for rival, size in dict.fromkeys((row["rival"], row["bytes"]) for row in together):
        mine = {row["ours"]: row for row in together if (row["rival"], row["bytes"]) == (rival, size)}
        one = next(iter(mine.values()))
        cells = [rival, f"{size / 1e6:.1f}", f"{one['rival_kl']:.4f} ± {one['rival_error']:.4f}"]
        for label in labels:
            if (row := mine.get(label)) is None:
                cells += ["-", "-"]
                continue
            ratio, error = row["our_kl"] / row["rival_kl"], row["gain_error"] / row["rival_kl"]
            cells += [f"{row['our_kl']:.4f}", f"{ratio:.3f} ± {error:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
