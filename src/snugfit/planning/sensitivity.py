"""What each group of weights costs in each format: the KL that its rounding causes, with its activations' rounding.

Gradients at the original (planning/gradients.py) give half of E[(g . dY)^2] of each group, which is the KL of this
group alone, to second order. Plans in which whole classes of groups are rounded are then measured, and with them the
factors and the ceiling of planning/damage.py are fitted. Costs of the output head and of an FP8 cache are measured.

Everything is streamed: one layer's weights are in memory, hidden states are in files. What is finished stays in
`work_dir`, so that a run that was stopped resumes, to the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snugfit import distributed
from snugfit.arguments import as_sequence
from snugfit.engines.profiles import DEFAULT_PROFILE, PROFILES
from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS
from snugfit.machine import deterministic, pick_device, versions
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.calibration import calibrate
from snugfit.planning.damage import class_of, fit_damage
from snugfit.planning.gradients import GradientPass, Sums
from snugfit.planning.groups import FOLLOWING, HEAD, Group, find_groups, follows_beside
from snugfit.planning.measured_plans import measure_plans
from snugfit.planning.samples import Samples, ScoredRow, by_bucket, read_samples
from snugfit.planning.shared_pass import Array, Assigned
from snugfit.planning.variants import PLAIN, Subject, check_rounding, open_subject, scored_formats
from snugfit.progress import SILENT, Progress
from snugfit.quantization.options import TOKENS_PER_BATCH
from snugfit.quantization.resume import FinishedUnits, open_finished, origin
from snugfit.recipes.assignment import ALONG
from snugfit.records.scores import KEEP, KV_CACHE, Cost, Point, ScoredGroup, Scores, cache_of_layer
from snugfit.records.statistics_file import DatasetUsed
from snugfit.storage.checkpoint import fingerprint, header_digest
from snugfit.version import __version__

MIXED_PLANS = 2  # plans of random formats that are measured beside those of one format
SCORES, GRADIENTS = "scores", "gradients"  # folders in a plan's work folder, one in the other


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How a model is to be scored; nothing here is checked yet.

    `formats` as recipes write them; `rounding` is plain or weighted (planning/variants.py); `target` names the engine
    profile of inputs. `kv_cache`: an FP8 cache is scored, too.
    """

    formats: Sequence[str]
    rounding: str = PLAIN
    target: str = DEFAULT_PROFILE
    kv_cache: bool = True
    seed: int = 0


@distributed.together
def score_model(
    model: str | Path,
    *,
    formats: str | Sequence[str],
    work_dir: str | Path,
    dataset: str | Path | Sequence[str | Path] = (),
    context: int | None = None,
    num_tokens: int | None = None,
    rounding: str = PLAIN,
    target: str = DEFAULT_PROFILE,
    kv_cache: bool = True,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Scores:
    """Score the groups of a model in each of `formats`, by position up to `context` (default: 2048 or less).

    `num_tokens` are scored in each bucket of positions (default: 4000). `work_dir` keeps what is finished; another
    model, dataset or setting needs another one. UserError for bad input.
    """
    settings = ScoreSettings(
        formats=tuple(dict.fromkeys(map(str, as_sequence(formats)))),
        rounding=rounding,
        target=target,
        kv_cache=kv_cache,
        seed=seed,
    )

    def read_here() -> tuple[ModelLayout, Samples]:
        check_settings(settings)
        layout = read_layout(model)
        layout.check_quantizable()
        return layout, read_samples(layout, as_sequence(dataset), context=context, num_tokens=num_tokens)

    layout, samples = distributed.in_all(read_here)
    return score_samples(
        layout,
        samples,
        settings,
        Path(work_dir),
        device=device,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )


def check_settings(settings: ScoreSettings) -> None:
    """UserError for formats, a rounding or a profile that do not exist."""
    for fmt in settings.formats:
        if fmt not in FORMATS:
            known = f"Formats that can be written: {', '.join(FORMATS)}."
            raise UserError(f"no format {fmt!r}.", code="option-invalid", where="formats", remedy=known)
    if not settings.formats:
        raise UserError("no format to score.", code="option-missing", where="formats", remedy="Name one or more.")
    check_rounding(settings.rounding)
    if settings.target not in PROFILES:
        what, remedy = f"unknown profile {settings.target!r}.", f"Known: {', '.join(PROFILES)}."
        raise UserError(what, code="option-invalid", where="target", remedy=remedy)


def rounded_formats(layout: ModelLayout, settings: ScoreSettings) -> dict[str, str]:
    """How each format is rounded where it is scored, by its name: FP8 as in plans that have 4-bit weights as well.

    Without a format that brings it along, and under plain rounding, it is that of plans without.
    """
    found = {fmt: fmt for fmt in settings.formats}
    if ALONG in found and settings.rounding != PLAIN and follows_beside(layout, find_groups(layout), settings.formats):
        found[ALONG] = FOLLOWING
    return found


def score_samples(
    layout: ModelLayout,
    samples: Samples,
    settings: ScoreSettings,
    work_dir: Path,
    *,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    force_resume: bool = False,
    progress: Progress = SILENT,
) -> Scores:
    """`score_model` on rows that are read already; `force_resume` takes what another machine or version finished."""
    where = pick_device(device)
    per_batch = tokens_per_batch or TOKENS_PER_BATCH[where.type]
    work_dir.mkdir(parents=True, exist_ok=True)
    identity = identity_of(layout, samples, settings, device, tokens_per_batch)
    folder = work_dir / GRADIENTS
    folder.mkdir(exist_ok=True)
    finished = open_finished(folder, identity, force=force_resume)
    statistics = calibrate(
        layout, samples.dataset, work_dir, device=device, tokens_per_batch=per_batch, progress=progress
    )

    def open_here() -> tuple[Subject, GradientPass]:
        subject = open_subject(layout, statistics, rounding=settings.rounding, target=settings.target)
        found = open_gradients(subject, samples, settings, where, folder, tokens_per_batch=per_batch, progress=progress)
        return subject, found

    subject, gradients = distributed.in_all(open_here)
    with deterministic(where):
        costs = costs_of(gradients.run(finished), samples)
        caches = {name: costs.pop(name)["fp8"] for name in list(costs) if name.startswith(cache_of_layer(""))}
        plans = plans_to_measure(subject, costs, settings)
        compared = work_dir / "plans"
        compared.mkdir(exist_ok=True)
        compares = identity | {"plans": [dict(plan.choice) for plan in plans]}
        units = open_finished(compared, compares, force=force_resume)
        points = _measure(subject, samples, plans, settings, where, per_batch, compared, units, progress)
    return distributed.by_main(lambda: _scores(subject, samples, settings, costs, caches, points))


def open_gradients(
    subject: Subject,
    samples: Samples,
    settings: ScoreSettings,
    device: torch.device,
    folder: Path,
    *,
    tokens_per_batch: int,
    progress: Progress = SILENT,
) -> GradientPass:
    """The pass that scores these formats, and what is kept."""
    return GradientPass(
        subject,
        samples.rows,
        {**rounded_formats(subject.layout, settings), KEEP: KEEP},
        device,
        tokens_per_batch=tokens_per_batch,
        folder=folder,
        seed=settings.seed,
        kv_cache=settings.kv_cache,
        progress=progress,
    )


def _scores(
    subject: Subject,
    samples: Samples,
    settings: ScoreSettings,
    costs: dict[str, dict[str, Cost]],
    caches: Mapping[str, Cost],
    points: Sequence[Point],
) -> Scores:
    """The record of what was measured, with the model of damage that is fitted to it."""
    layout, source = subject.layout, samples.dataset
    groups = _with_measured(subject, costs, caches, points, settings)
    return Scores(
        snugfit=__version__,
        model=layout.checkpoint.name,
        header_digest=header_digest(layout.checkpoint),
        fingerprint=fingerprint(layout.checkpoint),
        datasets=(DatasetUsed(source.source, len(source.samples), source.tokens, source.digest),),
        effort=settings.rounding,
        target=settings.target,
        seed=settings.seed,
        formats=tuple(settings.formats),
        fp8_follows=FOLLOWING in rounded_formats(layout, settings).values(),
        groups=tuple(groups),
        edges=samples.edges,
        tokens=samples.tokens,
        costs=costs,
        damage=fit_damage(groups, costs, points, len(samples.edges)),
        points=tuple(points),
        versions=versions(),
    )


def _with_measured(
    subject: Subject,
    costs: dict[str, dict[str, Cost]],
    caches: Mapping[str, Cost],
    points: Sequence[Point],
    settings: ScoreSettings,
) -> list[ScoredGroup]:
    """All groups for the record; what was measured alone is added to `costs`.

    Of an FP8 cache each layer costs a part of what was measured, in proportion to what gradients say (`caches`).
    """
    groups = []
    for group in subject.groups.values():
        measured = group.name not in costs
        if measured:
            costs[group.name] = _measured_cost(group.name, points)
        groups.append(_scored(group, measured=measured))
    if settings.kv_cache and (cache := _measured_cost(KV_CACHE, points)):
        costs[KV_CACHE] = cache
        costs |= {name: {"fp8": cost} for name, cost in _parts_of(cache["fp8"], caches).items()}
        groups += [
            ScoredGroup(name=name, layer=None, role=KV_CACHE, elements=0, measured=True) for name in (KV_CACHE, *caches)
        ]
    return groups


def _parts_of(whole: Cost, parts: Mapping[str, Cost]) -> dict[str, Cost]:
    """A cost divided in the proportions of others; evenly where these are all 0."""
    sums = [
        fsum(max(0.0, value) for value in column) for column in zip(*(one.kl for one in parts.values()), strict=True)
    ]

    def share(one: Cost, bucket: int) -> float:
        return max(0.0, one.kl[bucket]) / sums[bucket] if sums[bucket] > 0 else 1 / len(parts)

    shares = {name: [share(one, bucket) for bucket in range(len(sums))] for name, one in parts.items()}
    return {
        name: Cost(*(tuple(s * v for s, v in zip(mine, values, strict=True)) for values in (whole.kl, whole.error)))
        for name, mine in shares.items()
    }


def identity_of(
    layout: ModelLayout, samples: Samples, settings: ScoreSettings, device: str | None, tokens_per_batch: int | None
) -> dict[str, Any]:
    """Everything that decides the scores, as JSON."""
    where = pick_device(device)
    return origin(layout.checkpoint, where) | {
        "samples": samples.dataset.digest,
        "edges": list(samples.edges),
        "formats": list(rounded_formats(layout, settings).values()),
        "rounding": settings.rounding,
        "target": settings.target,
        "kv_cache": settings.kv_cache,
        "seed": settings.seed,
        "tokens_per_batch": tokens_per_batch or TOKENS_PER_BATCH[where.type],
    }


def _scored(group: Group, *, measured: bool) -> ScoredGroup:
    return ScoredGroup(name=group.name, layer=group.layer, role=group.role, elements=group.elements, measured=measured)


def costs_of(sums: Mapping[tuple[str, str], Sums], samples: Samples) -> dict[str, dict[str, Cost]]:
    """Costs by group and format: the mean over the scored tokens of each bucket, and its error."""
    found: dict[str, dict[str, Cost]] = {}
    for (name, fmt), one in sums.items():
        found.setdefault(name, {})[fmt] = Cost(*by_bucket(dict(enumerate(one.costs)), samples))
    return found


def plans_to_measure(
    subject: Subject, costs: Mapping[str, Mapping[str, Cost]], settings: ScoreSettings
) -> list[Assigned]:
    """The plans that the model of damage is fitted to, and those whose cost is measured itself.

    Of each format: all groups that can have it, those of each class, and those of the first half of the layers; then
    some of random formats.
    """
    kept = {name: KEEP for name, by_format in costs.items() if KEEP in by_format}
    plans: list[Assigned] = []

    def add(name: str, choice: Mapping[str, str]) -> None:
        full = {**kept, **choice}
        if choice and all(full != plan.choice for plan in plans):
            plans.append(Assigned(name=name, choice=full))

    for fmt in settings.formats:
        having = [name for name, by_format in costs.items() if fmt in by_format]
        add(fmt, dict.fromkeys(having, fmt))
        kinds = {name: class_of(subject.groups[name].role) for name in having}
        for kind in sorted(set(kinds.values()))[:-1]:  # the last one is the rest of the first plan
            add(f"{fmt}/{kind}", {name: fmt for name in having if kinds[name] == kind})
        front = subject.layout.num_layers // 2
        add(f"{fmt}/front", {name: fmt for name in having if (subject.groups[name].layer or 0) < front})
    for number, choice in enumerate(_mixed(costs, settings)):
        add(f"mixed-{number}", choice)
    return [*plans, *_alone(subject, settings)]


def _mixed(costs: Mapping[str, Mapping[str, Cost]], settings: ScoreSettings) -> Iterator[dict[str, str]]:
    """Plans of random formats."""
    generator = random.Random(settings.seed)  # noqa: S311  # not for secrets
    for _ in range(MIXED_PLANS if len(settings.formats) > 1 else 0):
        can = {name: [fmt for fmt in settings.formats if fmt in by_format] for name, by_format in costs.items()}
        yield {name: generator.choice(some) for name, some in can.items() if some}


def _alone(subject: Subject, settings: ScoreSettings) -> Iterator[Assigned]:
    """Plans of one group whose cost is measured itself: the output head, and an FP8 cache."""
    for group in subject.groups.values():
        if group.role == HEAD:
            for fmt in scored_formats(subject.layout, group, (*settings.formats, KEEP)):
                yield Assigned(name=f"{group.name}/{fmt}", choice={group.name: fmt})
    if settings.kv_cache and any(layer.cache is not None for layer in subject.statistics.layers.values()):
        yield Assigned(name=KV_CACHE, choice={KV_CACHE: "fp8"})


def _measure(
    subject: Subject,
    samples: Samples,
    plans: Sequence[Assigned],
    settings: ScoreSettings,
    device: torch.device,
    tokens_per_batch: int,
    folder: Path,
    finished: FinishedUnits,
    progress: Progress,
) -> list[Point]:
    """KL of each plan by bucket, measured on some rows, rounded as its groups were scored."""
    rounded = rounded_formats(subject.layout, settings)
    rows = {place: samples.rows[place] for place in samples.measured}
    found = measure_plans(
        subject,
        [row.ids for row in rows.values()],
        [replace(plan, choice={name: rounded.get(fmt, fmt) for name, fmt in plan.choice.items()}) for plan in plans],
        device,
        tokens_per_batch=tokens_per_batch,
        folder=folder,
        finished=finished,
        first=[row.first for row in rows.values()],
        title="measuring sample plans",
        progress=progress,
    )
    points = []
    for plan in plans:
        measured = dict(zip(rows, map(_scored_sum, found[plan.name], rows.values()), strict=True))
        kl, error = by_bucket(measured, samples)
        if np.isfinite(kl).all():
            points.append(Point(name=plan.name, formats=dict(plan.choice), kl=kl, error=error))
    return points


def _scored_sum(kl: Array, row: ScoredRow) -> float:
    """The sum over a row's scored tokens, of which the first is predicted by the token before it."""
    return float(kl[row.first - 1 :].astype(np.float64).sum())


def _measured_cost(group: str, points: Sequence[Point]) -> dict[str, Cost]:
    """The costs of a group that was measured alone, by format."""
    alone = [point for point in points if set(point.formats) == {group}]
    return {point.formats[group]: Cost(point.kl, point.error) for point in alone}
