"""From timings to the figures of a record: distributions, cells, and ratios of two servers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from snugfit.benchmarking.plan import Setting
from snugfit.records.bench import BenchCell, BenchRatio, CellStatus, Distribution
from snugfit.serving.load import Timing
from snugfit.serving.prompts import BEGINNING

MOST_VALUES = 512
# 97.5 % quantile of Student's t by degrees of freedom, 1 to 30; beyond, within 0.1 %: 1.96 + 2.5 / degrees
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Figure = Literal["prefill", "first_token", "decode", "latency", "throughput"]
COMPARED: dict[str, tuple[Figure, ...]] = {
    "prefill": ("prefill", "first_token"),
    "decode": ("decode", "first_token"),
    "load": ("throughput", "first_token", "latency"),
}


@dataclass(frozen=True)
class Repeat:
    """The requests of one repeat of a cell, and the seconds from its first request to its last answer."""

    timings: Sequence[Timing]
    seconds: float

    @property
    def answered(self) -> list[Timing]:
        """The requests without an error."""
        return [timing for timing in self.timings if timing.error is None]


def distribution(values: Sequence[float]) -> Distribution | None:
    """Quantiles of some values, interpolated; None of none."""
    if not values:
        return None
    p25, median, p75, p90, p95, p99 = (float(v) for v in np.quantile(values, (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)))
    return Distribution(
        count=len(values),
        median=median,
        mean=float(np.mean(values)),
        p25=p25,
        p75=p75,
        p90=p90,
        p95=p95,
        p99=p99,
        min=min(values),
        max=max(values),
        values=tuple(values) if len(values) <= MOST_VALUES else (),
    )


def make_cell(
    setting: Setting, repeats: Sequence[Repeat], *, wanted: int, hits: int | None, seconds: float
) -> BenchCell:
    """The figures of a cell of which `wanted` repeats were asked for; `hits` are prompt tokens out of a cache."""
    answered = [timing for repeat in repeats for timing in repeat.answered]
    failed = [timing.error for repeat in repeats for timing in repeat.timings if timing.error is not None]
    status, reason = _status(setting, len(repeats) < wanted, answered, failed, hits)
    usable = answered if status in ("measured", "partial") else []
    rates = [timing.between_tokens for timing in usable]
    between = [seconds for seconds in rates if seconds is not None]
    load = setting.kind == "load"
    whole = [repeat for repeat in repeats if repeat.answered] if usable and load else []
    counted = [timing.prompt_tokens for timing in answered if timing.prompt_tokens is not None]
    return BenchCell(
        kind=setting.kind,
        prompt_tokens=setting.prompt_tokens,
        output_tokens=setting.output_tokens,
        concurrency=setting.users,
        status=status,
        reason=reason,
        requests=len(answered),
        errors=len(failed),
        error_messages=dict(Counter(failed).most_common(8)),
        repeats=len(repeats),
        seconds=seconds,
        prompt_tokens_counted=float(np.median(counted)) if counted else None,
        prefix_hits=hits,
        prefill=None if load else distribution([_prefill(timing, setting) for timing in usable]),
        first_token=distribution([timing.first_token for timing in usable]),
        decode=None if setting.kind == "prefill" else distribution([1 / value for value in between]),
        between_tokens=None if setting.kind == "prefill" else distribution(between),
        latency=distribution([timing.latency for timing in usable]),
        throughput=distribution([_output(repeat) / repeat.seconds for repeat in whole]),
        total_throughput=distribution(
            [(_output(repeat) + _input(repeat, setting)) / repeat.seconds for repeat in whole]
        ),
    )


def _status(
    setting: Setting, stopped: bool, answered: Sequence[Timing], failed: Sequence[str], hits: int | None
) -> tuple[CellStatus, str | None]:
    if not answered:
        most = Counter(failed).most_common(1)
        return "failed", most[0][0] if most else "stopped before the first answer"
    # two prompts may share fewer than BEGINNING tokens by chance, which an engine without blocks finds
    chance = min((BEGINNING - 1) * len(answered), 0.01 * setting.prompt_tokens * len(answered))
    if hits is not None and hits > chance:
        what = f"the server took {hits:,} prompt tokens from its prefix cache (or those of another client)"
        return "refused", f"{what}: its speed is not that of computing prompts"
    return ("partial", "stopped before the last repeat") if stopped else ("measured", None)


def _prefill(timing: Timing, setting: Setting) -> float:
    """Prompt tokens a second."""
    return (timing.prompt_tokens or setting.prompt_tokens) / max(timing.first_token, 1e-9)


def _output(repeat: Repeat) -> int:
    return sum(timing.tokens for timing in repeat.answered)


def _input(repeat: Repeat, setting: Setting) -> int:
    return sum(timing.prompt_tokens or setting.prompt_tokens for timing in repeat.answered)


def ratios(setting: Setting, first: Sequence[Repeat], second: Sequence[Repeat]) -> list[BenchRatio]:
    """The second server's figures over the first's, paired by repeat; repeats that failed on either are left out."""
    found = []
    for figure in COMPARED[setting.kind]:
        values = [
            (_of_repeat(figure, a, setting), _of_repeat(figure, b, setting))
            for a, b in zip(first, second, strict=False)
        ]
        logs = [math.log(b / a) for a, b in values if a and b]
        if logs:
            found.append(_ratio(setting, figure, logs))
    return found


def _of_repeat(figure: Figure, repeat: Repeat, setting: Setting) -> float | None:
    """One value of a repeat: its median over requests, or its throughput; None where there is none."""
    if figure == "throughput":
        return _output(repeat) / repeat.seconds if repeat.answered else None
    of_request: dict[str, Callable[[Timing], float | None]] = {
        "prefill": lambda timing: _prefill(timing, setting),
        "first_token": lambda timing: timing.first_token,
        "latency": lambda timing: timing.latency,
        "decode": lambda timing: None if timing.between_tokens is None else 1 / timing.between_tokens,
    }
    values = [value for timing in repeat.answered if (value := of_request[figure](timing)) is not None]
    return float(np.median(values)) if values else None


def _ratio(setting: Setting, figure: Figure, logs: Sequence[float]) -> BenchRatio:
    mean, low, high = float(np.mean(logs)), None, None
    if len(logs) > 1:
        degrees = len(logs) - 1
        t = _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees
        half = t * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
        low, high = math.exp(mean - half), math.exp(mean + half)
    return BenchRatio(
        kind=setting.kind,
        prompt_tokens=setting.prompt_tokens,
        output_tokens=setting.output_tokens,
        concurrency=setting.users,
        figure=figure,
        ratio=math.exp(mean),
        low=low,
        high=high,
        pairs=len(logs),
    )
