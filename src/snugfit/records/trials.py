"""Ways to quantize that a run tried on held-out samples, and which of them it kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt

from snugfit.records.base import Number

MIN_GAIN = 2.0  # standard errors of the paired difference by which a later way has to be better


@dataclass(frozen=True)
class Trial:
    """One way to quantize a model: KL to the original on held-out samples.

    `name` says what was done; `kl` is the mean in nats a token over `tokens` tokens, `error` its standard error over
    segments (plain codes may have been tried with the ranges of inputs that a few samples gave). `gain` is how much
    lower it is than the KL of the way that was kept before it, segment by segment, with `gain_error`; both None for the
    first. `kept`: it took that one's place. `seconds` is what it cost.
    """

    name: str
    kl: Number
    error: Number
    tokens: int
    gain: Number | None
    gain_error: Number | None
    kept: bool
    seconds: float


@dataclass(frozen=True)
class Measured:
    """KL in nats a token of each segment of the held-out samples, under the name of what was done."""

    name: str
    kl: tuple[float, ...]
    seconds: float


def judge(found: Sequence[Measured], tokens: Sequence[int], files: Sequence[int]) -> list[Trial]:
    """What each way is worth, in the order in which they were tried, simplest first.

    `tokens` and `files` are those of each segment. A way is kept if its KL is finite and lower than that of the last
    one kept by more than MIN_GAIN standard errors of their difference, segment by segment: ties go to the simpler. The
    last one kept is the one to write.
    """
    trials: list[Trial] = []
    champion: Measured | None = None
    for one in found:
        kl, error = _mean(one.kl, tokens, files)
        gain: tuple[float, float] | None = None
        kept = champion is None
        if champion is not None:
            gain = _mean([a - b for a, b in zip(champion.kl, one.kl, strict=True)], tokens, files)
            broken = not all(map(isfinite, champion.kl))
            kept = all(map(isfinite, one.kl)) and (broken or gain[0] > max(0.0, MIN_GAIN * gain[1]))
        if kept:
            champion = one
        trials.append(
            Trial(
                name=one.name,
                kl=kl,
                error=error,
                tokens=sum(tokens),
                gain=None if gain is None else gain[0],
                gain_error=None if gain is None else gain[1],
                kept=kept,
                seconds=one.seconds,
            )
        )
    return trials


def _mean(values: Sequence[float], weights: Sequence[int], files: Sequence[int]) -> tuple[float, float]:
    """The weighted mean, and its standard error: of independent segments, in strata that are the files.

    NaN if a value is. A file with one segment counts with its distance from the whole mean; the error of a single
    segment is its value, since nothing says how far others would be from it.
    """
    if not all(map(isfinite, values)):
        return float("nan"), float("nan")
    total = sum(weights)
    mean = fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    if len(values) == 1:
        return mean, abs(mean)
    variance = 0.0
    for file in set(files):
        own = [(v, w) for v, w, f in zip(values, weights, files, strict=True) if f == file]
        center = fsum(v * w for v, w in own) / sum(w for _, w in own) if len(own) > 1 else mean
        spread = fsum((w * (v - center)) ** 2 for v, w in own)
        variance += spread * len(own) / max(1, len(own) - 1)
    return mean, sqrt(variance) / total
