"""Statistics of calibration as they are kept: mergeable. No torch.

Largest magnitudes and counts of tokens of several parts are those of all rows (up to the rounding of another batch);
histograms are samples, taken anew in each part.

A histogram counts magnitudes by the leading bits of their fp32 form: the exponent and four bits of the mantissa, so
that a bin is at most 1/16 wider than its lower end. It counts every SAMPLED-th token; largest magnitudes are of all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHIFT = 19  # bits of the mantissa that a bin leaves out
SAMPLED = 8
MOST = 1 << 63
BINS = 1 << (31 - SHIFT)


@dataclass(frozen=True)
class InputStatistics:
    """Magnitudes of a projection's inputs: the largest over `tokens`, and a histogram (bin -> values)."""

    tokens: int
    amax: float
    histogram: Mapping[int, int]

    def quantile(self, share: float) -> float:
        """The magnitude below which `share` of all values are, within a bin's width; 0 where nothing was counted."""
        total = sum(self.histogram.values())
        wanted, seen = share * total, 0
        for number, count in sorted(self.histogram.items()):
            if seen + count >= wanted and count:
                low, high = lower_end(number), lower_end(number + 1)
                return min(self.amax, low + (high - low) * (wanted - seen) / count)
            seen += count
        return 0.0

    @property
    def outlier_ratio(self) -> float:
        """How far the largest magnitude stands out: amax over the 99.9th percentile (0 where that is 0)."""
        usual = self.quantile(0.999)
        return self.amax / usual if usual else 0.0


@dataclass(frozen=True)
class ExpertStatistics:
    """What a layer's routed experts were calibrated on, an entry an expert.

    `routed` are tokens that the router sent, `forced` those it did not send that were run through besides. The largest
    magnitudes of inputs, of gate and up and of down, are kept apart by where they came from; 0 where no token came.
    """

    routed: tuple[int, ...]
    forced: tuple[int, ...]
    gate_up_routed: tuple[float, ...]
    gate_up_forced: tuple[float, ...]
    down_routed: tuple[float, ...]
    down_forced: tuple[float, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that each expert saw."""
        return tuple(a + b for a, b in zip(self.routed, self.forced, strict=True))

    @property
    def gate_up(self) -> float:
        """The largest input of gate and up over all experts."""
        return max((*self.gate_up_routed, *self.gate_up_forced))

    @property
    def down(self) -> float:
        """The largest input of down over all experts."""
        return max((*self.down_routed, *self.down_forced))

    def experts_below(self, threshold: int) -> tuple[int, ...]:
        """Experts that saw fewer tokens."""
        return tuple(number for number, tokens in enumerate(self.tokens) if tokens < threshold)


@dataclass(frozen=True)
class LayerStatistics:
    """A decoder layer: `inputs` of each group of linears that share theirs (by the first one's name in the file).

    Those of routed experts stand under MODULE.gate_up and MODULE.down, of all experts together and of routed tokens
    alone; `experts` tells them apart. `cache`: largest key and value, None where they were not looked at.
    """

    inputs: Mapping[str, InputStatistics]
    experts: Mapping[str, ExpertStatistics]
    cache: tuple[float, float] | None = None


def lower_end(number: int) -> float:
    """The smallest magnitude of a bin; infinity from the last one on."""
    return float(struct.unpack("<f", struct.pack("<I", min(number << SHIFT, 0x7F800000)))[0])


def merge_inputs(parts: Sequence[InputStatistics]) -> InputStatistics:
    """What all together have measured."""
    histogram: dict[int, int] = {}
    for part in parts:
        for number, count in part.histogram.items():
            histogram[number] = histogram.get(number, 0) + count
    return InputStatistics(sum(p.tokens for p in parts), max(p.amax for p in parts), dict(sorted(histogram.items())))


def merge_experts(parts: Sequence[ExpertStatistics]) -> ExpertStatistics:
    """What all together have measured."""
    added = {key: _each(sum, (getattr(part, key) for part in parts)) for key in ("routed", "forced")}
    places = ("gate_up_routed", "gate_up_forced", "down_routed", "down_forced")
    return ExpertStatistics(**added, **{key: _each(max, (getattr(part, key) for part in parts)) for key in places})


def _each(join: Any, columns: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(join(column) for column in zip(*columns, strict=True))


def merge_layers(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """What all together have measured of one layer; ValueError where they did not look at the same."""
    first = parts[0]
    if any(p.inputs.keys() != first.inputs.keys() or p.experts.keys() != first.experts.keys() for p in parts):
        raise ValueError("they did not measure the same projections")
    if any((p.cache is None) != (first.cache is None) for p in parts):
        raise ValueError("not all of them looked at keys and values")
    caches = [part.cache for part in parts if part.cache is not None]
    return LayerStatistics(
        {name: merge_inputs([part.inputs[name] for part in parts]) for name in first.inputs},
        {name: merge_experts([part.experts[name] for part in parts]) for name in first.experts},
        (max(c[0] for c in caches), max(c[1] for c in caches)) if caches else None,
    )


def layer_to_json(layer: LayerStatistics) -> dict[str, Any]:
    """A layer for JSON, keys of histograms as text."""
    found = asdict(layer)
    for entry in found["inputs"].values():
        entry["histogram"] = {str(number): count for number, count in entry["histogram"].items()}
    return found


def _name(given: object) -> str:
    """A module's name; UnicodeEncodeError, a ValueError, where it could not be written anywhere."""
    str(given).encode("utf-8")
    return str(given)


def layer_from_json(document: Mapping[str, Any]) -> LayerStatistics:
    """A layer out of JSON; KeyError, TypeError or ValueError for anything else."""
    inputs = {
        _name(name): InputStatistics(
            int(e["tokens"]), float(e["amax"]), {int(number): int(count) for number, count in e["histogram"].items()}
        )
        for name, e in document["inputs"].items()
    }
    experts = {
        _name(name): ExpertStatistics(
            *(tuple(map(int, e[key])) for key in ("routed", "forced")),
            *(tuple(map(float, e[key])) for key in ("gate_up_routed", "gate_up_forced", "down_routed", "down_forced")),
        )
        for name, e in document["experts"].items()
    }
    for found in experts.values():
        if len({len(value) for value in asdict(found).values()}) != 1 or not found.routed:
            raise ValueError("lists of experts of different lengths, or of none")
    given = document["cache"]
    cache = None if given is None else (float(given[0]), float(given[1]))
    for one in inputs.values():
        bins = one.histogram.items()
        counts = [one.tokens, *one.histogram.values()]
        if not all(0 <= number < BINS for number, _ in bins) or not all(0 <= count < MOST for count in counts):
            raise ValueError("a histogram of other bins, or of counts that cannot be")
    if not all(0 <= count < MOST for found in experts.values() for count in (*found.routed, *found.forced)):
        raise ValueError("counts of tokens that cannot be")
    lists = [value for found in experts.values() for value in asdict(found).values()]
    numbers = [number for value in lists for number in value] + [one.amax for one in inputs.values()]
    if not all(math.isfinite(number) and number >= 0 for number in (*numbers, *(cache or ()))):
        raise ValueError("a magnitude that is negative or not finite")
    return LayerStatistics(inputs, experts, cache)


@dataclass(frozen=True)
class Outlier:
    """Inputs of one projection of one layer: their largest magnitude, the 99.9th percentile, and the first over it.

    `ratio` is 0 where there is no percentile. `projection` is the name inside the layer of the first linear of those
    that share these inputs.
    """

    layer: int
    projection: str
    tokens: int
    amax: float
    p999: float
    ratio: float


@dataclass(frozen=True)
class Range:
    """The least, the median and the most of some counts."""

    least: int
    median: float
    most: int


@dataclass(frozen=True)
class Coverage:
    """What one layer's routed experts saw: tokens an expert, in all, and of them those routed to it and forced on it.

    `unrouted` counts experts without a routed token, `forced_gate_up` and `forced_down` those whose largest input came
    from a forced token. `times_gate_up` and `times_down` are the layer's largest input over that of routed tokens
    alone, None where there was none.
    """

    layer: int
    module: str
    experts: int
    tokens: Range
    routed: Range
    forced: Range
    unrouted: int
    forced_gate_up: int
    forced_down: int
    times_gate_up: float | None
    times_down: float | None
