"""What calibration measures of a decoder layer, and how measurements of several datasets are merged. No torch.

Merged magnitudes and token counts equal those of one run over all samples, up to the rounding of another batch.

A histogram counts magnitudes by the leading bits of their fp32 form, the exponent and four bits of the mantissa, so a
bin's upper end is at most 1/16 above its lower end. It counts every SAMPLED-th token; largest magnitudes are of all
tokens.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from snugfit.records.squares import count_squares, decode_squares, mean_squares

SHIFT = 19  # low bits of the mantissa, which a bin ignores
SAMPLED = 8
COUNT_LIMIT = 1 << 63
BINS = 1 << (31 - SHIFT)


@dataclass(frozen=True)
class InputStatistics:
    """Magnitudes of a projection's inputs: the largest over `tokens`, and a histogram (bin -> values).

    `squares` is E[x^2] of each input feature [K] (records/squares.py), None where it was not measured.
    """

    tokens: int
    amax: float
    histogram: Mapping[int, int]
    squares: str | None = None

    def quantile(self, share: float) -> float:
        """The magnitude below which `share` of all values lie, within a bin's width; 0 for an empty histogram."""
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
        """The largest magnitude over the 99.9th percentile; 0 where that is 0."""
        p999 = self.quantile(0.999)
        return self.amax / p999 if p999 else 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertStatistics:
    """What a layer's routed experts were calibrated on, one entry per expert.

    `routed` counts tokens that the router sent to the expert, `forced` tokens that calibration sent in addition. The
    other fields are the largest magnitudes of the inputs of gate and up, and of down, over the routed and over the
    forced tokens; 0 for an expert without such tokens. The squares are E[x^2] of the inputs of gate and up, and of
    down, over the routed tokens of each expert [experts, K]; None where they were not measured.
    """

    routed: tuple[int, ...]
    forced: tuple[int, ...]
    gate_up_routed: tuple[float, ...]
    gate_up_forced: tuple[float, ...]
    down_routed: tuple[float, ...]
    down_forced: tuple[float, ...]
    gate_up_squares: str | None = None
    down_squares: str | None = None

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
        """Numbers of the experts that saw fewer than `threshold` tokens."""
        return tuple(number for number, tokens in enumerate(self.tokens) if tokens < threshold)


@dataclass(frozen=True)
class LayerStatistics:
    """A decoder layer. `inputs` has the inputs of each group of linears that share theirs, by the first one's name.

    Inputs of all routed experts together are MODULE.gate_up and, of routed tokens alone, MODULE.down; `experts` has
    them expert by expert. `cache` is the largest key and value magnitude, None where they were not measured.
    """

    inputs: Mapping[str, InputStatistics]
    experts: Mapping[str, ExpertStatistics]
    cache: tuple[float, float] | None = None


def lower_end(number: int) -> float:
    """The smallest magnitude of a bin; infinity from the last one on."""
    return float(struct.unpack("<f", struct.pack("<I", min(number << SHIFT, 0x7F800000)))[0])


def merge_inputs(parts: Sequence[InputStatistics]) -> InputStatistics:
    """The statistics over the tokens of all parts."""
    histogram: dict[int, int] = {}
    for part in parts:
        for number, count in part.histogram.items():
            histogram[number] = histogram.get(number, 0) + count
    tokens, amax = sum(p.tokens for p in parts), max(p.amax for p in parts)
    squares = _merge_squares([(p.squares, p.tokens) for p in parts])
    return InputStatistics(tokens, amax, dict(sorted(histogram.items())), squares)


def _merge_squares(parts: Sequence[tuple[str | None, Any]]) -> str | None:
    found = [(text, tokens) for text, tokens in parts if text is not None]
    if found and len(found) < len(parts):
        raise ValueError("not all of them measured E[x^2]")
    return mean_squares(found) if found else None


def merge_experts(parts: Sequence[ExpertStatistics]) -> ExpertStatistics:
    """The statistics over the tokens of all parts."""
    columns: dict[str, Any] = {key: _each(sum, (getattr(part, key) for part in parts)) for key in ("routed", "forced")}
    for key in ("gate_up_routed", "gate_up_forced", "down_routed", "down_forced"):
        columns[key] = _each(max, (getattr(part, key) for part in parts))
    for key in ("gate_up_squares", "down_squares"):
        columns[key] = _merge_squares([(getattr(part, key), part.routed) for part in parts])
    return ExpertStatistics(**columns)


def _each(join: Any, columns: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(join(column) for column in zip(*columns, strict=True))


def merge_layers(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """One layer's statistics over the tokens of all parts; ValueError where they measured different things."""
    first = parts[0]
    if any(p.inputs.keys() != first.inputs.keys() or p.experts.keys() != first.experts.keys() for p in parts):
        raise ValueError("they measured different projections")
    if any((p.cache is None) != (first.cache is None) for p in parts):
        raise ValueError("not all of them measured keys and values")
    caches = [part.cache for part in parts if part.cache is not None]
    return LayerStatistics(
        {name: merge_inputs([part.inputs[name] for part in parts]) for name in first.inputs},
        {name: merge_experts([part.experts[name] for part in parts]) for name in first.experts},
        (max(c[0] for c in caches), max(c[1] for c in caches)) if caches else None,
    )


def layer_to_json(layer: LayerStatistics) -> dict[str, Any]:
    """A layer for JSON, where keys of histograms become text, without the squares that were not measured."""
    found: dict[str, Any] = {}
    for kind, entries in (("inputs", layer.inputs), ("experts", layer.experts)):
        found[kind] = {name: {k: v for k, v in vars(one).items() if v is not None} for name, one in entries.items()}
    for entry in found["inputs"].values():
        entry["histogram"] = {str(number): count for number, count in entry["histogram"].items()}
    return found | {"cache": layer.cache}


def layer_from_json(document: Any) -> LayerStatistics:
    """The layer that `layer_to_json` gave; ValueError (pydantic's, or for a value out of range) for anything else."""
    layer: LayerStatistics = _reader().validate_python(document)
    check_layer(layer)
    return layer


@lru_cache(maxsize=1)
def _reader() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(LayerStatistics)


def has_squares(layer: LayerStatistics) -> bool:
    """Whether E[x^2] of any inputs was measured."""
    experts = any(one.gate_up_squares or one.down_squares for one in layer.experts.values())
    return experts or any(one.squares is not None for one in layer.inputs.values())


def check_layer(layer: LayerStatistics) -> None:
    """ValueError for bins and counts out of range, magnitudes that are negative or not finite, lists that disagree."""
    counts: list[int] = []
    magnitudes: list[float] = list(layer.cache or ())
    for one in layer.inputs.values():
        if not all(0 <= number < BINS for number in one.histogram):
            raise ValueError(f"bins of a histogram must be within 0..{BINS - 1}")
        counts += [one.tokens, *one.histogram.values()]
        magnitudes.append(one.amax)
    for experts in layer.experts.values():
        columns = (experts.gate_up_routed, experts.gate_up_forced, experts.down_routed, experts.down_forced)
        if not experts.routed or {len(column) for column in (experts.forced, *columns)} != {len(experts.routed)}:
            raise ValueError("lists of experts must have one entry for each expert")
        counts += [*experts.routed, *experts.forced]
        magnitudes += [number for column in columns for number in column]
    _check_squares(layer)
    if not all(0 <= count < COUNT_LIMIT for count in counts):
        raise ValueError(f"counts must be >= 0 and < {COUNT_LIMIT}")
    if not all(math.isfinite(number) and number >= 0 for number in magnitudes):
        raise ValueError("magnitudes must be >= 0 and finite")


def _check_squares(layer: LayerStatistics) -> None:
    for one in layer.inputs.values():
        if one.squares is not None:
            decode_squares(one.squares)
    for experts in layer.experts.values():
        for text in (experts.gate_up_squares, experts.down_squares):
            if text is None:
                continue
            decode_squares(text)
            if count_squares(text) % len(experts.routed):
                raise ValueError("squares of experts must have one row for each expert")


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """How far the inputs of one projection stand out: largest magnitude, 99.9th percentile, and their `ratio`.

    `ratio` is 0 where the percentile is 0. `projection` is the name, inside the layer, of the first of the linears that
    share these inputs.
    """

    layer: int
    projection: str
    tokens: int
    amax: float
    p999: float
    ratio: float


@dataclass(frozen=True)
class Range:
    """The smallest, the median and the largest of some counts."""

    least: int
    median: float
    most: int


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many tokens each of one layer's routed experts saw: in all, routed by the router, and forced by calibration.

    `unrouted` counts experts without a routed token; `forced_gate_up` and `forced_down` count experts whose largest
    input came from a forced token. `times_gate_up` and `times_down` are the layer's largest input over the largest
    input of routed tokens, None without routed tokens.
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
