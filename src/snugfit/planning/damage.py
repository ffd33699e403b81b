"""How costs of groups add up to the KL of a plan: fitted to a few plans that were measured.

A group's cost comes from gradients at the original, one group at a time. Errors of several groups also meet, later
layers spread those of earlier ones, and a model that is damaged has other gradients; so each format gets a factor in
each class of groups (attention, what leads into the products of an MLP, what leads out of them), which rises or falls
with depth, and all together one ceiling c: KL = c (1 - exp(-b / c)) for the sum b of all costs. The factors are the
ones under which the measured plans are met best, drawn towards their format's mean where plans do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from snugfit.errors import UserError
from snugfit.records.scores import Cost, Damage, Point, ScoredGroup, Scores, depths, saturate

Array = NDArray[np.float64]

SPREAD = 0.35  # of the logarithms of a format's factors around their mean, before anything is measured
MEAN_SPREAD = 1.0  # of that mean around 0
SLOPE_SPREAD = 0.7  # of what a slope changes from the first layer to the last
MODEL_ERROR = 0.04  # relative error of the model itself, which no measured plan is taken to be better than
CEILINGS = np.geomspace(0.25, 64.0, 33)  # c, in nats; the largest of them is as good as none
SWEEPS, HALVINGS = 30, 8


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


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """The costs that measured plans consist of, one entry a group: its plan, cost, class, format and depth.

    `fixed` is what groups without a factor add to each plan. `sigma` are relative errors of `kl`, which was measured.
    """

    plan: NDArray[np.int64]
    cost: Array
    kind: NDArray[np.int64]
    fmt: NDArray[np.int64]
    depth: Array
    fixed: Array
    kl: Array
    sigma: Array
    kinds: tuple[tuple[str, str], ...]
    formats: tuple[str, ...]

    def total(self, x: Array) -> tuple[Array, Array]:
        """b of each plan, and its derivative by the parameters (logarithms of factors, their means, slopes)."""
        shift = len(self.kinds) + len(self.formats)
        exponent = x[self.kind] + x[shift + self.fmt] * self.depth
        weighted = self.cost * np.exp(np.clip(exponent, -20.0, 20.0))
        slopes = np.zeros((len(self.kl), len(x)))
        np.add.at(slopes, (self.plan, self.kind), weighted)
        np.add.at(slopes, (self.plan, shift + self.fmt), weighted * self.depth)
        return np.bincount(self.plan, weighted, len(self.kl)) + self.fixed, slopes


def _fit_bucket(
    groups: Sequence[ScoredGroup], costs: Mapping[str, Mapping[str, Cost]], points: Sequence[Point], bucket: int
) -> Damage:
    used = [point for point in points if point.kl[bucket] > 0 and point.formats]
    if not used:
        return Damage(ceiling=0.0, factors={}, slopes={}, error=0.0)
    terms = _terms(groups, costs, used, bucket)
    fits = [(*_fit(terms, float(ceiling)), float(ceiling)) for ceiling in CEILINGS]
    x, _, ceiling = min(fits, key=lambda fit: fit[1])
    total, _ = terms.total(x)
    residual = float(np.sqrt(np.mean(np.log(_predict(total, ceiling) / terms.kl) ** 2)))
    factors = {fmt: math.exp(x[len(terms.kinds) + n]) for n, fmt in enumerate(terms.formats)}
    of_kind = {kind: math.exp(x[n]) for n, kind in enumerate(terms.kinds)}
    roles = dict.fromkeys(group.role for group in groups if not group.measured)
    for fmt, role in ((fmt, role) for fmt in terms.formats for role in roles):
        if (fmt, class_of(role)) in of_kind:
            factors[f"{fmt}/{role}"] = of_kind[fmt, class_of(role)]
    slopes = {fmt: float(x[len(terms.kinds) + len(terms.formats) + n]) for n, fmt in enumerate(terms.formats)}
    return Damage(ceiling=ceiling, factors=factors, slopes=slopes, error=residual)


def _terms(
    groups: Sequence[ScoredGroup], costs: Mapping[str, Mapping[str, Cost]], points: Sequence[Point], bucket: int
) -> _Terms:
    by_name, where = {group.name: group for group in groups}, depths(tuple(groups))
    entries: list[tuple[int, float, tuple[str, str], str, float]] = []
    fixed = np.zeros(len(points))
    for number, point in enumerate(points):
        for name, fmt in point.formats.items():
            cost, group = max(0.0, costs[name][fmt].kl[bucket]), by_name[name]
            if group.measured:
                fixed[number] += cost
            else:
                entries.append((number, cost, (fmt, class_of(group.role)), fmt, where[name]))
    kinds = tuple(sorted({kind for _, _, kind, _, _ in entries}))
    formats = tuple(dict.fromkeys(fmt for fmt, _ in kinds))
    kl = np.array([point.kl[bucket] for point in points])
    errors = np.array([point.error[bucket] for point in points])
    return _Terms(
        plan=np.array([entry[0] for entry in entries], np.int64),
        cost=np.array([entry[1] for entry in entries]),
        kind=np.array([kinds.index(entry[2]) for entry in entries], np.int64),
        fmt=np.array([formats.index(entry[3]) for entry in entries], np.int64),
        depth=np.array([entry[4] for entry in entries]),
        fixed=fixed,
        kl=kl,
        sigma=np.hypot(np.minimum(errors / kl, 1.0), MODEL_ERROR),
        kinds=kinds,
        formats=formats,
    )


def _predict(total: Array, ceiling: float) -> Array:
    return np.array([max(saturate(float(one), ceiling)[0], 1e-12) for one in total])


def _prior(terms: _Terms) -> Array:
    """Rows whose products with the parameters are distances from what is expected, in standard deviations."""
    count, formats = len(terms.kinds), len(terms.formats)
    member = np.zeros((count, formats))
    member[np.arange(count), [terms.formats.index(fmt) for fmt, _ in terms.kinds]] = 1.0
    around = np.hstack([np.eye(count) / SPREAD, -member / SPREAD, np.zeros((count, formats))])
    means = np.hstack([np.zeros((formats, count)), np.eye(formats) / MEAN_SPREAD, np.zeros((formats, formats))])
    slopes = np.hstack([np.zeros((formats, count + formats)), np.eye(formats) / SLOPE_SPREAD])
    return np.vstack([around, means, slopes])


def _fit(terms: _Terms, ceiling: float) -> tuple[Array, float]:
    """The parameters under a ceiling, and the loss: squares of logarithmic errors and of distances from expectation.

    Gauss-Newton steps on the logarithms, halved where they do not help.
    """
    prior = _prior(terms)

    def residuals(at: Array) -> tuple[Array, Array]:
        total, slopes = terms.total(at)
        value = _predict(total, ceiling)
        outer = np.exp(-total / ceiling) / value / terms.sigma
        return np.concatenate([np.log(value / terms.kl) / terms.sigma, prior @ at]), np.vstack(
            [slopes * outer[:, None], prior]
        )

    x = np.zeros(prior.shape[1])
    found, jacobian = residuals(x)
    for _ in range(SWEEPS):
        step = np.linalg.lstsq(jacobian, -found, rcond=None)[0]
        for _ in range(HALVINGS):
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
    return x, float(found @ found)


def merge_scores(parts: Sequence[tuple[str, Scores]]) -> Scores:
    """Scores of one model as one, each part with a name for messages.

    Parts of the same samples have different formats; parts of different samples have the same formats, and their costs
    are averaged by tokens. The damage is fitted anew to all plans that were measured; a single part stays as it is.
    UserError for other parts.
    """
    name, merged = parts[0]
    if len(parts) == 1:
        return merged
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
            if key == "effort":
                what = f"these scores were made with {part.effort} rounding, those of {first_name} with {first.effort}."
                raise _mismatch(what, name, "Merge scores of one `rounding`: score one of them again.")
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
    return replace(
        first,
        formats=(*first.formats, *part.formats),
        fp8_follows=first.fp8_follows or part.fp8_follows,
        costs=costs,
        points=(*first.points, *more),
    )


def _join_samples(first: Scores, name: str, part: Scores) -> Scores:
    """The same formats on other samples."""
    if set(first.formats) != set(part.formats):
        what = "has other formats, on other samples."
        raise _mismatch(what, name, "Score the same formats on all samples, or all formats on the same.")
    if first.fp8_follows != part.fp8_follows:
        raise _mismatch("has FP8 rounded in another way.", name, "Score again with this version.")
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
