"""What each group of weights costs in each format: the file that plans are made from. No torch.

A cost is a number of nats of KL(original || quantized) a token, by the position of the token in its context, so that a
plan for long contexts can differ from one for short ones. Costs of a plan's groups add up to b; what a plan costs is
c (1 - exp(-b / c)), which grows like b and ends at c: a model that is destroyed cannot be destroyed again. `Damage` has
the c, and the factors by which costs were fitted to plans that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.records.base import as_json
from snugfit.records.json_file import FileKind, load_file, save_file, validated
from snugfit.records.statistics_file import DatasetUsed

SCORES_SCHEMA = "snugfit.scores/1"
SCORES_FILE = "snugfit-scores.json"
_KIND = FileKind(
    content="scores",
    file_name=SCORES_FILE,
    schemas=(SCORES_SCHEMA,),
    max_bytes=1_000_000_000,
    code="scores-invalid",
    remedy="Give a file of scores that `plan` wrote.",
)
MAX_SLOPE = 20.0
KEEP = "keep"
KV_CACHE = "kv_cache"  # the group of all keys and values, whose one format is fp8


def cache_of_layer(layer: int | str) -> str:
    """The name of the group of one layer's keys and values; the costs of all layers' add up to that of KV_CACHE."""
    return f"{KV_CACHE}/{layer}"


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A group of weights (planning/groups.py), or KV_CACHE, whose `role` is its name.

    `measured`: its costs are KL that was measured with this group alone in the format, which no factor corrects.
    """

    name: str
    layer: int | None
    role: str
    elements: int
    measured: bool = False


@dataclass(frozen=True)
class Cost:
    """A cost in nats a token, and its standard error, for each bucket of positions."""

    kl: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """How costs add up in one bucket of positions.

    `ceiling` is c. `factors` multiply costs, by format or by FORMAT/ROLE, which counts first; 1 where there is none.
    `slopes`, by format, say how much the logarithm of these falls or rises from the first layer to the last; they are 0
    in the middle. `error` is the relative error of what the model predicts of the plans that were measured (root mean
    square).
    """

    ceiling: float
    factors: Mapping[str, float]
    error: float
    slopes: Mapping[str, float] = field(default_factory=dict)

    def factor(self, fmt: str, role: str, depth: float) -> float:
        """The factor of a format's costs in groups of a role at a depth from -1/2 (first layer) to 1/2 (last)."""
        base = self.factors.get(f"{fmt}/{role}", self.factors.get(fmt, 1.0))
        return base * math.exp(self.slopes.get(fmt, 0.0) * depth)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan that was measured: formats by group (KEEP is left out), and KL with its standard error by bucket."""

    name: str
    formats: Mapping[str, str]
    kl: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class Predicted:
    """A predicted KL in nats a token, and its standard error."""

    kl: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Costs of a model's groups, on which model and samples they were found, and how they add up.

    `header_digest` and `fingerprint` identify the model as in statistics. `effort` is the name of the way in which
    weights were rounded (plain, weighted), `target` the engine profile of inputs. `edges` are the first positions of
    the buckets after the first, then the end of the last: bucket n has positions edges[n - 1] to edges[n]. `tokens` are
    the scored tokens of each bucket. `costs` are by group and format, without formats that a group cannot have; what
    is kept costs nothing unless it has a cost under "keep" (codes of the source whose inputs engines round).
    `fp8_follows`: FP8 was scored as it is beside 4-bit weights, whose effort it follows there.
    """

    snugfit: str
    model: str
    header_digest: str
    fingerprint: str
    datasets: tuple[DatasetUsed, ...]
    effort: str
    target: str
    seed: int
    formats: tuple[str, ...]
    groups: tuple[ScoredGroup, ...]
    edges: tuple[int, ...]
    tokens: tuple[int, ...]
    costs: Mapping[str, Mapping[str, Cost]]
    damage: tuple[Damage, ...]
    points: tuple[Point, ...]
    versions: Mapping[str, str]
    fp8_follows: bool = False
    schema: str = SCORES_SCHEMA

    def to_json(self) -> str:
        """The file's text."""
        found = asdict(self)
        return as_json({"schema": found.pop("schema"), **found}, allow_nan=False)

    def shares(self, context: int) -> tuple[float, ...]:
        """Each bucket's share of the tokens of a context; what lies beyond the last edge counts as of the last bucket.

        UserError for a context below 1.
        """
        if context < 1:
            what = f"must be >= 1, got {context}."
            raise UserError(what, code="option-invalid", where="context", remedy="The minimum is 1.")
        starts = (0, *self.edges[:-1])
        held = [max(0, min(context, end) - start) for start, end in zip(starts, self.edges, strict=True)]
        held[-1] += max(0, context - self.edges[-1])
        return tuple(part / context for part in held)

    def cost(self, group: str, fmt: str, context: int) -> float:
        """What a group in a format adds to b, in nats a token of such a context; 0 for what is kept.

        UserError for a group or a format that was not scored.
        """
        terms = self.terms(group, fmt)
        return math.fsum(share * kl for share, kl in zip(self.shares(context), terms.kl, strict=True))

    def has(self, group: str, fmt: str) -> bool:
        """Whether a group was scored in a format; what is kept always counts as scored."""
        return group in self.costs and (fmt == KEEP or fmt in self.costs[group])

    def predict(self, choice: Mapping[str, str], context: int) -> Predicted:
        """KL of the model with these formats of its groups (all others kept), mean over the tokens of a context.

        The error has that of the costs and that of the model of damage. UserError as in `cost`.
        """
        found = [self.terms(group, fmt) for group, fmt in choice.items()]
        kl, variance, model = 0.0, 0.0, 0.0
        for bucket, share in enumerate(self.shares(context)):
            damage = self.damage[bucket]
            total = math.fsum(terms.kl[bucket] for terms in found)
            value, slope = saturate(total, damage.ceiling)
            kl += share * value
            variance += share**2 * slope**2 * math.fsum(terms.error[bucket] ** 2 for terms in found)
            model += share * damage.error * value
        return Predicted(kl, math.sqrt(variance + model**2))

    def terms(self, group: str, fmt: str) -> Cost:
        """Costs of a group in a format as they are added up, by bucket: with factors, not below 0.

        UserError for a group or a format that was not scored.
        """
        known = self._known.get((group, fmt))
        if known is None:
            known = self._known[group, fmt] = self._find_terms(group, fmt)
        return known

    def _find_terms(self, group: str, fmt: str) -> Cost:
        by_format, scored = self.costs.get(group), self._groups.get(group)
        if by_format is None or scored is None:
            raise _not_scored(f"there is no group {group}", group)
        cost = by_format.get(fmt)
        if cost is None:
            if fmt == KEEP:
                return Cost((0.0,) * len(self.edges), (0.0,) * len(self.edges))
            known = ", ".join(by_format) or "none"
            raise _not_scored(f"{group} has no score in {fmt} (scored: {known})", group)
        if scored.measured:
            return cost
        depth = depths(self.groups)[group]
        factors = [damage.factor(fmt, scored.role, depth) for damage in self.damage]
        kl = tuple(max(0.0, value) * factor for value, factor in zip(cost.kl, factors, strict=True))
        return Cost(kl, tuple(error * factor for error, factor in zip(cost.error, factors, strict=True)))

    @cached_property
    def _groups(self) -> Mapping[str, ScoredGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _known(self) -> dict[tuple[str, str], Cost]:
        """What `terms` found, by group and format."""
        return {}


@lru_cache(maxsize=8)
def depths(groups: tuple[ScoredGroup, ...]) -> Mapping[str, float]:
    """Where each group is in the model, by name: -1/2 in the first layer, 1/2 in the last, 0 outside of layers."""
    layers = [group.layer for group in groups if group.layer is not None]
    last = max(layers, default=0)
    return {g.name: g.layer / last - 0.5 if g.layer is not None and last else 0.0 for g in groups}


def saturate(total: float, ceiling: float) -> tuple[float, float]:
    """The KL that costs of `total` give, c (1 - exp(-total / c)), and its slope in `total`; the total if c is 0."""
    if ceiling <= 0:
        return total, 1.0
    left = math.exp(-total / ceiling)
    return -ceiling * math.expm1(-total / ceiling), left


def _not_scored(what: str, where: str) -> UserError:
    remedy = "Score the model again with this format, or leave it out."
    return UserError(f"{what}.", code="scores-mismatch", where=where, remedy=remedy)


def load_scores(path: Path) -> Scores:
    """Scores from a file, or from a directory that holds one; UserError for a file that is anything else."""
    return load_file(path, _KIND, _parse)


def save_scores(found: Scores, file: Path) -> None:
    """Write a new file, whole or not at all; UserError where it exists or cannot be written."""
    save_file(found.to_json(), file)


def check_model(found: Scores, header_digest: str, fingerprint: str, *, where: str) -> None:
    """UserError for scores of another model than the one with these digests."""
    if (found.header_digest, found.fingerprint) != (header_digest, fingerprint):
        what = f"these scores are of another model ({found.model})."
        raise UserError(what, code="scores-mismatch", where=where, remedy="Score this model.")


def _parse(document: Mapping[str, Any]) -> Scores:
    """ValueError, with the key, for a document of another structure or with values out of range."""
    found = validated(Scores, document)
    _check(found)
    return found


def _check(found: Scores) -> None:
    """ValueError for lists that do not belong together and for numbers out of range."""
    buckets = len(found.edges)
    if not buckets or list(found.edges) != sorted(set(found.edges)) or found.edges[0] < 1:
        raise ValueError("edges: must be positive and grow")
    if len(found.tokens) != buckets or len(found.damage) != buckets or min(found.tokens) < 1:
        raise ValueError("tokens, damage: need one entry for each bucket, with tokens >= 1")
    if not found.datasets:
        raise ValueError("datasets: needs at least one")
    names = [group.name for group in found.groups]
    if len({*names}) != len(names) or {*names} != {*found.costs}:
        raise ValueError("groups, costs: need the same groups, each once")
    _check_caches(names)
    formats = {*found.formats, KEEP, "fp8"}
    for name, by_format in found.costs.items():
        if not formats.issuperset(by_format):
            raise ValueError(f"costs.{name}: a format that `formats` does not name")
        _check_lists(f"costs.{name}", by_format.values(), buckets)
    _check_lists("points", found.points, buckets)
    for damage in found.damage:
        numbers = damage.ceiling, damage.error, *damage.factors.values()
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError("damage: numbers must be >= 0 and finite")
        if not all(abs(slope) <= MAX_SLOPE for slope in damage.slopes.values()):
            raise ValueError(f"damage.slopes: must be within -{MAX_SLOPE:g} and {MAX_SLOPE:g}")


def _check_caches(names: Sequence[str]) -> None:
    layers = [name.removeprefix(cache_of_layer("")) for name in names if name.startswith(cache_of_layer(""))]
    if not all(layer.isascii() and layer.isdecimal() and len(layer) < 9 for layer in layers):
        raise ValueError(f"groups: {cache_of_layer('')} must be followed by a layer's number")


def _check_lists(where: str, found: Sequence[Cost | Point] | Any, buckets: int) -> None:
    for one in found:
        if len(one.kl) != buckets or len(one.error) != buckets:
            raise ValueError(f"{where}: needs one number for each bucket")
        if not all(map(math.isfinite, (*one.kl, *one.error))) or min(one.error) < 0:
            raise ValueError(f"{where}: numbers must be finite, errors >= 0")
