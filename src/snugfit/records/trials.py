"""Ways to quantize that a run tried on held-out samples, and which of them it kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt

MIN_GAIN = 2.0  # standard errors of the paired difference by which a later way has to be better


@dataclass(frozen=True)
class Trial:
    """One way to quantize a model: KL to the original on held-out samples.

    `name` says what was done; `kl` is the mean in nats a token over `tokens` tokens, `error` its standard error over
    samples. `gain` is how much lower it is than the KL of the way that was kept before it, sample by sample, with
    `gain_error`; both None for the first. `kept`: it took that one's place. `seconds` is what it cost.
    """

    name: str
    kl: float
    error: float
    tokens: int
    gain: float | None
    gain_error: float | None
    kept: bool
    seconds: float


@dataclass(frozen=True)
class Measured:
    """KL in nats a token of each held-out sample, under the name of what was done."""

    name: str
    kl: tuple[float, ...]
    seconds: float


def judge(found: Sequence[Measured], tokens: Sequence[int]) -> list[Trial]:
    """What each way is worth, in the order in which they were tried, simplest first.

    `tokens` are those of each sample, by which their means are weighted. A way is kept if its KL is finite and lower
    than that of the last one kept by more than MIN_GAIN standard errors of their difference, over samples: ties go to
    the simpler. The last one kept is the one to write.
    """
    trials: list[Trial] = []
    champion: Measured | None = None
    for one in found:
        kl, error = _mean(one.kl, tokens)
        gain: tuple[float, float] | None = None
        if champion is not None:
            gain = _mean([a - b for a, b in zip(champion.kl, one.kl, strict=True)], tokens)
        kept = champion is None or (gain is not None and _is_gain(*gain))
        if champion is not None and not all(map(isfinite, champion.kl)):
            kept = all(map(isfinite, one.kl))
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


def _is_gain(gain: float, error: float) -> bool:
    return isfinite(gain) and gain > 0 and gain > MIN_GAIN * error


def _mean(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """The weighted mean, and its standard error as that of a ratio of sums over independent samples."""
    if not all(map(isfinite, values)):
        return float("nan"), float("nan")
    total, count = sum(weights), len(values)
    mean = fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    if count < 2:
        return mean, float("inf")
    spread = fsum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return mean, sqrt(spread * count / (count - 1)) / total
