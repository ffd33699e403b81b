"""Scores made up from a formula, for tests of everything that follows from scores."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from snugfit.model.layout import ModelLayout
from snugfit.planning.menu import Server, on_menu, read_options
from snugfit.records.scores import KEEP, KV_CACHE, Cost, Damage, ScoredGroup, Scores, cache_of_layer
from snugfit.records.statistics_file import DatasetUsed
from snugfit.storage.checkpoint import fingerprint, header_digest

# nats a parameter, times 10^6
PRICES = {"nvfp4": 2.0, "nvfp4a16": 1.2, "fp8-dynamic": 0.1, "fp8-block": 0.1, "int4": 1.5, "mxfp4": 3.0}


def made_up_scores(
    layout: ModelLayout,
    *,
    formats: Sequence[str] = tuple(PRICES),
    edges: Sequence[int] = (128, 512),
    grows: Mapping[str, float] | None = None,
    ceiling: float = 8.0,
    cache: float | None = 0.001,
    cache_of_layers: Sequence[float] = (),
) -> Scores:
    """Scores of a model: each group has a weight of its own, decided by its name.

    `grows` multiplies a role's costs from one bucket to the next; `cache` is what an FP8 cache costs, None: not scored,
    `cache_of_layers` what that of each layer does.
    """
    menus = on_menu(read_options(layout, Server()), formats, Server())
    costs: dict[str, dict[str, Cost]] = {}
    for menu in menus:
        weight = 0.2 + zlib.crc32(menu.group.name.encode()) % 1000 / 250
        factor = (grows or {}).get(menu.group.role, 1.0)
        costs[menu.group.name] = {
            one.format: Cost(
                tuple(PRICES[one.format] * 1e-6 * menu.group.elements * weight * factor**n for n in range(len(edges))),
                (1e-6,) * len(edges),
            )
            for one in menu.options
            if one.format != KEEP
        }
    groups = [
        ScoredGroup(name=m.group.name, layer=m.group.layer, role=m.group.role, elements=m.group.elements) for m in menus
    ]
    if cache is not None:
        costs[KV_CACHE] = {"fp8": Cost((cache,) * len(edges), (1e-5,) * len(edges))}
        groups.append(ScoredGroup(name=KV_CACHE, layer=None, role=KV_CACHE, elements=0, measured=True))
    for layer, cost in enumerate(cache_of_layers):
        name = cache_of_layer(layer)
        costs[name] = {"fp8": Cost((cost,) * len(edges), (1e-5,) * len(edges))}
        groups.append(ScoredGroup(name=name, layer=None, role=KV_CACHE, elements=0, measured=True))
    damage = Damage(ceiling=ceiling, factors={}, error=0.05)
    return Scores(
        snugfit="0",
        model=layout.checkpoint.name,
        header_digest=header_digest(layout.checkpoint),
        fingerprint=fingerprint(layout.checkpoint),
        datasets=(DatasetUsed("made up", 1, 512, "0" * 64),),
        effort="plain",
        target="vllm-blackwell",
        seed=0,
        formats=tuple(formats),
        groups=tuple(groups),
        edges=tuple(edges),
        tokens=(100,) * len(edges),
        costs=costs,
        damage=(damage,) * len(edges),
        points=(),
        versions={},
    )


def saturated(total: float, ceiling: float) -> float:
    """c (1 - exp(-b / c))."""
    return -ceiling * math.expm1(-total / ceiling)


def save(scores: Scores, file: Path) -> Path:
    """The file of these scores."""
    file.write_text(scores.to_json(), encoding="utf-8")
    return file
