"""From figures of every token to those of a record: means with errors, quantiles, by position, by confidence.

numpy alone. Errors are one standard error over chunks: tokens of one chunk are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from snugfit.evaluation.chunks import ChunkGroup
from snugfit.evaluation.significance import holm, paired_bootstrap, ratio_mean, tokens_to_settle
from snugfit.evaluation.token_figures import Array, TokenFigures
from snugfit.records.evaluation import Bin, ContextFigures, Floor, KLKind, ModelFigures, PairFigures, Spread

CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
Mask = NDArray[np.bool_]


class GroupTokens:
    """The scored tokens of a group: to which chunk each belongs, and its position there."""

    def __init__(self, chunk_tokens: Sequence[int], positions: NDArray[np.int64]) -> None:
        """`chunk_tokens`: the number of scored tokens of each chunk."""
        self.chunk_tokens = tuple(int(count) for count in chunk_tokens)
        self.positions = positions
        self.chunk = np.repeat(np.arange(len(self.chunk_tokens)), self.chunk_tokens)

    @classmethod
    def of(cls, group: ChunkGroup) -> GroupTokens:
        """Those of a group's chunks."""
        return cls(group.target_counts, group.target_positions)

    def sums(self, values: NDArray[np.float64], chosen: Mask) -> tuple[list[float], list[int]]:
        """Sum over the chosen tokens of each chunk, and the number of chosen tokens."""
        size = len(self.chunk_tokens)
        sums = np.bincount(self.chunk[chosen], weights=values[chosen], minlength=size)
        return sums.tolist(), np.bincount(self.chunk[chosen], minlength=size).tolist()

    def mean(self, values: NDArray[np.float64], chosen: Mask) -> tuple[float, float | None]:
        """Mean over the chosen tokens and its error over chunks; NaN where none is chosen."""
        sums, counts = self.sums(values, chosen)
        return ratio_mean(sums, counts) if any(counts) else (math.nan, None)


def model_figures(
    name: str,
    found: TokenFigures,
    group: GroupTokens,
    *,
    reference: TokenFigures | None,
    kl_kind: KLKind = "exact",
    floor: Floor | None = None,
) -> ModelFigures:
    """One model's figures on a group; `reference`: those it was compared with, None for the reference itself."""
    part = _in_fp64(found)
    finite = part["finite"].astype(bool)
    loss = part["loss"]
    sums, counts = group.sums(loss, finite)
    mean, error = group.mean(loss, finite)
    confidence = part["confidence"] if reference is None else reference.confidence.astype(np.float64)
    compared = reference is not None
    value = _exp(mean)
    settled: dict[str, float | None] = {}
    if reference is not None:
        settled["loss_change"], settled["loss_change_error"] = _loss_change(group, part, reference)
        settled["same_top"], settled["same_top_error"] = group.mean(part["same_top"], finite)
        settled["acceptance"], settled["acceptance_error"] = group.mean(part["overlap"], finite)
        settled["rms_change"] = math.sqrt(group.mean(part["change"] ** 2, finite)[0])
    return ModelFigures(
        name=name,
        perplexity=value,
        perplexity_error=None if error is None else value * error,
        nll_by_chunk=tuple(sums),
        tokens_by_chunk=tuple(counts),
        nonfinite=int((~finite).sum()),
        by_position=_bins(group, part, finite, group.positions, position_edges(group.positions), compared),
        by_confidence=_bins(group, part, finite, confidence, CONFIDENCE_EDGES, compared),
        kl=_spread(group, part["kl"], finite, part["bound"] if kl_kind == "estimate" else part["kl"])
        if compared
        else None,
        reverse_kl=_spread(group, part["reverse"], finite, part["reverse"]) if compared else None,
        floor=floor,
        kl_kind=kl_kind,
        kl_sampling_error=_sampling_error(part["variance"], finite) if kl_kind == "estimate" else None,
        **settled,
    )


def floor_figures(found: TokenFigures, group: GroupTokens, chunks: Sequence[int], arithmetic: str) -> Floor | None:
    """KL of a model against itself on these chunks of the group; None where nothing finite was measured."""
    part = _in_fp64(found)
    chosen = part["finite"].astype(bool) & np.isin(group.chunk, chunks)
    if not chosen.any():
        return None
    kl, error = group.mean(part["kl"], chosen)
    same, _ = group.mean(part["same_top"], chosen)
    return Floor(
        kl=kl,
        standard_error=error,
        same_top=same,
        chunks=len(chunks),
        tokens=int(chosen.sum()),
        arithmetic=arithmetic,
    )


def context_figures(
    context: int, digest: str, group: GroupTokens, models: Sequence[ModelFigures], *, seed: int = 0
) -> ContextFigures:
    """A group's record; every two candidates are paired on the same chunks, by loss and by KL."""
    compared = [model for model in models if model.kl is not None]
    candidates = compared or list(models)  # without a reference, losses can still be paired
    pairs = [pair for a, b in combinations(candidates, 2) for pair in _pairs(a, b, seed)]
    return ContextFigures(
        context=context,
        chunks=len(group.chunk_tokens),
        tokens=sum(group.chunk_tokens),
        digest=digest,
        chunk_tokens=group.chunk_tokens,
        models=tuple(models),
        pairs=tuple(pairs),
    )


def with_holm(contexts: Sequence[ContextFigures]) -> tuple[ContextFigures, ...]:
    """The contexts with every pair's p also as Holm adjusts it to all pairs of the record."""
    adjusted = iter(holm([pair.p for context in contexts for pair in context.pairs]))
    return tuple(
        replace(context, pairs=tuple(replace(pair, p_holm=next(adjusted)) for pair in context.pairs))
        for context in contexts
    )


def _pairs(a: ModelFigures, b: ModelFigures, seed: int) -> list[PairFigures]:
    if a.nonfinite or b.nonfinite:
        return []  # different tokens were left out in each: the rest cannot be paired
    pairs = [_pair("loss", a, b, a.nll_by_chunk, b.nll_by_chunk, seed)]
    if a.kl is not None and b.kl is not None and a.kl_kind == b.kl_kind:
        pairs.append(_pair("kl", a, b, a.kl.by_chunk, b.kl.by_chunk, seed))
    return pairs


def _pair(
    figure: Literal["loss", "kl"],
    a: ModelFigures,
    b: ModelFigures,
    sums_a: Sequence[float],
    sums_b: Sequence[float],
    seed: int,
) -> PairFigures:
    counts = a.tokens_by_chunk
    found = paired_bootstrap(sums_a, sums_b, counts, seed=seed)
    return PairFigures(
        a=a.name,
        b=b.name,
        figure=figure,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        chunks=found.chunks,
        more_tokens=tokens_to_settle(sums_a, sums_b, counts, p=found.p),
    )


def position_edges(positions: NDArray[np.int64]) -> tuple[float, ...]:
    """Powers of two from 1 to beyond the last position."""
    last = int(positions.max(initial=1))
    return tuple(float(2**power) for power in range(last.bit_length() + 1))


def _bins(
    group: GroupTokens,
    part: Mapping[str, NDArray[np.float64]],
    finite: Mask,
    values: NDArray[np.float64] | NDArray[np.int64],
    edges: Sequence[float],
    compared: bool,
) -> tuple[Bin, ...]:
    bins = []
    for low, high in pairwise(edges):
        last = high == edges[-1]
        chosen = finite & (values >= low) & ((values <= high) if last else (values < high))
        if not chosen.any():
            continue
        mean, error = group.mean(part["loss"], chosen)
        value = _exp(mean)
        kl, kl_error = group.mean(part["kl"], chosen) if compared else (None, None)
        bins.append(
            Bin(
                low=low,
                high=high,
                tokens=int(chosen.sum()),
                perplexity=value,
                perplexity_error=None if error is None else value * error,
                kl=kl,
                kl_error=kl_error,
                same_top=group.mean(part["same_top"], chosen)[0] if compared else None,
            )
        )
    return tuple(bins)


def _spread(
    group: GroupTokens, values: NDArray[np.float64], finite: Mask, by_token: NDArray[np.float64]
) -> Spread | None:
    """Mean and error of `values`, quantiles of `by_token`: single tokens of an estimate are mostly sampling noise."""
    if not finite.any():
        return None
    mean, error = group.mean(values, finite)
    sums, _ = group.sums(values, finite)
    median, p90, p95, p99, p999 = (float(value) for value in np.quantile(by_token[finite], QUANTILES))
    return Spread(
        mean=mean,
        standard_error=error,
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        p999=p999,
        max=float(by_token[finite].max()),
        by_chunk=tuple(sums),
    )


def _loss_change(
    group: GroupTokens, part: Mapping[str, NDArray[np.float64]], reference: TokenFigures
) -> tuple[float | None, float | None]:
    """Loss minus the reference's and its error, paired over chunks; None where either has tokens left out."""
    shared = part["finite"].astype(bool) & reference.finite
    if not shared.size or not shared.all():
        return None, None
    return group.mean(part["loss"] - reference.loss.astype(np.float64), shared)


def _sampling_error(variance: NDArray[np.float64], finite: Mask) -> float | None:
    return math.sqrt(float(variance[finite].sum())) / int(finite.sum()) if finite.any() else None


def _in_fp64(found: TokenFigures) -> dict[str, NDArray[np.float64]]:
    arrays: dict[str, Array | Mask] = {
        "loss": found.loss,
        "confidence": found.confidence,
        "finite": found.finite,
        "kl": found.kl,
        "reverse": found.reverse,
        "same_top": found.same_top,
        "change": found.change,
        "overlap": found.overlap,
        "variance": found.variance,
        "bound": found.bound,
    }
    return {name: values.astype(np.float64) for name, values in arrays.items()}


def _exp(mean: float) -> float:
    """exp without an overflow: infinite where no float is large enough."""
    return math.exp(min(mean, 700.0)) if not mean > 700 else math.inf
