"""How costs of groups add up to the KL of a plan: fitted to a few plans that were measured.

A group's cost comes from gradients at the original, one group at a time. Errors of several groups also meet, and a
model that is damaged has other gradients; so each format gets a factor in each class of groups (attention, what leads
into the products of an MLP, what leads out of them), and all together one ceiling c: KL = c (1 - exp(-b / c)) for the
sum b of all costs. The factors are the ones under which the measured plans are met best, drawn towards their format's
mean by as much as plans do not tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from snugfit.errors import UserError
from snugfit.records.scores import Cost, Damage, Point, ScoredGroup, Scores, saturate

Array = NDArray[np.float64]

SPREAD = 0.35  # of the logarithms of a format's factors around their mean, before anything is measured
MEAN_SPREAD = 1.0  # of that mean around 0
MODEL_ERROR = 0.04  # relative error of the model itself, which no measured plan is taken to be better than
CEILINGS = np.geomspace(0.25, 64.0, 33)  # c, in nats; the largest of them is as good as none
SWEEPS = 30


def class_of(role: str) -> str:
    """The class of groups, of those that share factors, that a role belongs to."""
    if role in ("gate_up", "gate", "up"):
        return "in"
    if role in ("down", "experts", "shared_experts", "mlp"):
        return "out"
    return "attention"


def fit_damage(
    groups: Sequence[ScoredGroup], costs: Mapping[str, Mapping[str, Cost]], points: Sequence[Point], buckets: int
) -> tuple[Damage, ...]:
    """The damage model of each bucket; costs as they are if nothing was measured."""
    return tuple(_fit_bucket(groups, costs, points, bucket) for bucket in range(buckets))


def _fit_bucket(
    groups: Sequence[ScoredGroup], costs: Mapping[str, Mapping[str, Cost]], points: Sequence[Point], bucket: int
) -> Damage:
    used = [point for point in points if point.kl[bucket] > 0 and point.formats]
    if not used:
        return Damage(ceiling=0.0, factors={}, error=0.0)
    roles = {group.name: group.role for group in groups}
    measured = {group.name for group in groups if group.measured}
    keys = sorted({(fmt, roles[name]) for p in used for name, fmt in p.formats.items() if name not in measured})
    classes = sorted({(fmt, class_of(role)) for fmt, role in keys})
    place = {key: number for number, key in enumerate(classes)}
    # terms[p, k]: what the groups of class k add to the cost of plan p; fixed[p]: those that have no factor
    terms, fixed = np.zeros((len(used), len(classes))), np.zeros(len(used))
    for number, point in enumerate(used):
        for name, fmt in point.formats.items():
            cost = max(0.0, costs[name][fmt].kl[bucket])
            if name in measured:
                fixed[number] += cost
            else:
                terms[number, place[fmt, class_of(roles[name])]] += cost
    kl = np.array([point.kl[bucket] for point in used])
    errors = np.array([point.error[bucket] for point in used])
    sigma = np.hypot(np.minimum(errors / kl, 1.0), MODEL_ERROR)
    formats = [fmt for fmt, _ in classes]
    best: tuple[float, float, Array] | None = None
    for ceiling in CEILINGS:
        factors, loss = _fit_factors(terms, fixed, kl, sigma, formats, float(ceiling))
        if best is None or loss < best[0]:
            best = loss, float(ceiling), factors
    assert best is not None
    _, ceiling, factors = best
    predicted = _predict(terms @ factors + fixed, ceiling)
    residual = float(np.sqrt(np.mean(np.log(predicted / kl) ** 2)))
    by_key = {f"{fmt}/{role}": float(factors[place[fmt, class_of(role)]]) for fmt, role in keys}
    means = {
        fmt: _mean([factors[n] for n, key in enumerate(classes) if key[0] == fmt]) for fmt in dict.fromkeys(formats)
    }
    return Damage(ceiling=ceiling, factors={**means, **by_key}, error=residual)


def _predict(total: Array, ceiling: float) -> Array:
    return np.array([max(saturate(float(one), ceiling)[0], 1e-12) for one in total])


def _mean(factors: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, factors)) / len(factors))


def _fit_factors(
    terms: Array, fixed: Array, kl: Array, sigma: Array, formats: Sequence[str], ceiling: float
) -> tuple[Array, float]:
    """The factors under a ceiling, and the loss: squares of logarithmic errors and of distances from the means.

    Gauss-Newton steps on the logarithms, halved where they do not help.
    """
    names = list(dict.fromkeys(formats))
    count = terms.shape[1]
    member = np.zeros((count, len(names)))
    member[np.arange(count), [names.index(fmt) for fmt in formats]] = 1.0
    prior = np.block(
        [[np.eye(count) / SPREAD, -member / SPREAD], [np.zeros((len(names), count)), np.eye(len(names)) / MEAN_SPREAD]]
    )
    x = np.zeros(count + len(names))

    def residuals(at: Array) -> tuple[Array, Array]:
        weighted = terms * np.exp(np.clip(at[:count], -20.0, 20.0))
        total = weighted.sum(1) + fixed
        value = _predict(total, ceiling)
        slope = np.exp(-total / ceiling)
        jacobian = np.zeros((len(kl), len(at)))
        jacobian[:, :count] = weighted * (slope / value / sigma)[:, None]
        return np.concatenate([np.log(value / kl) / sigma, prior @ at]), np.vstack([jacobian, prior])

    found, jacobian = residuals(x)
    for _ in range(SWEEPS):
        step = np.linalg.lstsq(jacobian, -found, rcond=None)[0]
        for _ in range(8):
            tried, slopes = residuals(x + step)
            if tried @ tried < found @ found:
                break
            step = step / 2
        else:
            break
        done = found @ found - tried @ tried < 1e-9
        x, found, jacobian = x + step, tried, slopes
        if done:
            break
    return np.exp(x[:count]), float(found @ found)


def merge_scores(parts: Sequence[tuple[str, Scores]]) -> Scores:
    """Scores of one model as one, each part with a name for messages.

    Parts of the same samples have different formats; parts of different samples have the same formats, and their costs
    are averaged by tokens. The damage is fitted anew to all plans that were measured. UserError for other parts.
    """
    name, merged = parts[0]
    for other, part in parts[1:]:
        _check_alike(other, part, name, merged)
        mine, others = ({one.digest for one in found.datasets} for found in (merged, part))
        if mine == others:
            merged = _join_formats(merged, other, part)
        elif mine & others:
            what = f"some of its samples are those of {name}, and some are not."
            raise _mismatch(what, other, "Merge scores of the same samples, or of different ones.")
        else:
            merged = _join_samples(merged, other, part)
    damage = fit_damage(merged.groups, merged.costs, merged.points, len(merged.edges))
    return replace(merged, damage=damage)


def _check_alike(name: str, part: Scores, first_name: str, first: Scores) -> None:
    for key in ("header_digest", "fingerprint", "effort", "target", "edges", "groups"):
        if getattr(part, key) != getattr(first, key):
            shown = key.replace("_", " ")
            raise _mismatch(f"{shown} differs from that of {first_name}.", name, "Merge scores of one model.")


def _mismatch(what: str, where: str, remedy: str) -> UserError:
    return UserError(what, code="scores-mismatch", where=where, remedy=remedy)


def _join_formats(first: Scores, name: str, part: Scores) -> Scores:
    """Other formats on the same samples."""
    both = set(first.formats) & set(part.formats)
    if both:
        what = f"scores {', '.join(sorted(both))} again on the same samples."
        raise _mismatch(what, name, "Leave this file out.")
    costs = {group: {**part.costs[group], **by_format} for group, by_format in first.costs.items()}
    known = {tuple(sorted(point.formats.items())) for point in first.points}
    more = tuple(point for point in part.points if tuple(sorted(point.formats.items())) not in known)
    return replace(first, formats=(*first.formats, *part.formats), costs=costs, points=(*first.points, *more))


def _join_samples(first: Scores, name: str, part: Scores) -> Scores:
    """The same formats on other samples."""
    if set(first.formats) != set(part.formats):
        what = "has other formats, on other samples."
        raise _mismatch(what, name, "Score the same formats on all samples, or all formats on the same.")
    weights = first.tokens, part.tokens
    costs = {
        group: {fmt: Cost(*_weighted(cost, part.costs[group][fmt], weights)) for fmt, cost in by_format.items()}
        for group, by_format in first.costs.items()
    }
    others = {tuple(sorted(point.formats.items())): point for point in part.points}
    points = []
    for point in first.points:
        same = others.pop(tuple(sorted(point.formats.items())), None)
        if same is not None:
            kl, error = _weighted(point, same, weights)
            points.append(replace(point, kl=kl, error=error))
        else:
            points.append(point)
    tokens = tuple(a + b for a, b in zip(*weights, strict=True))
    return replace(
        first,
        datasets=(*first.datasets, *part.datasets),
        tokens=tokens,
        costs=costs,
        points=(*points, *others.values()),
    )


def _weighted(
    first: Cost | Point, second: Cost | Point, weights: tuple[Sequence[int], Sequence[int]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means by tokens of each bucket, and their errors."""
    kl, error = [], []
    for n, (a, b) in enumerate(zip(*weights, strict=True)):
        kl.append((a * first.kl[n] + b * second.kl[n]) / (a + b))
        error.append(math.hypot(a * first.error[n], b * second.error[n]) / (a + b))
    return tuple(kl), tuple(error)
