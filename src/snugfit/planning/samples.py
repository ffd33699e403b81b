"""The samples that a model is scored on: rows whose scored tokens lie in one bucket of positions each.

A row of n tokens is scored where nothing shorter is: from a quarter of its length on, and of the shortest rows all. So
costs at long contexts are those of tokens that have a long context, and no row is run twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import fsum, sqrt
from pathlib import Path

from snugfit.data.dataset import Dataset, load_dataset, make_dataset, the_set
from snugfit.errors import UserError
from snugfit.model.forward_pass import spread_places
from snugfit.model.layout import ModelLayout
from snugfit.model.positions import max_positions

RATIO = 4  # between the ends of neighbouring buckets
SHORTEST = 256  # tokens of the first bucket
DEFAULT_TOKENS = 4000  # scored in each bucket
DEFAULT_CONTEXT = 2048
FEWEST_ROWS = 2  # of a bucket: errors come from their differences
MEASURED_TOKENS, MEASURED_SHARE = 2000, 4  # plans are measured on so many in each bucket, and on a part of the others
DOCUMENTS = 16  # samples that rows are cut from


@dataclass(frozen=True)
class ScoredRow:
    """A sample's token ids; its tokens from position `first` on are scored (at least 1: nothing predicts the first)."""

    ids: tuple[int, ...]
    first: int = 1

    @property
    def count(self) -> int:
        """The number of scored tokens."""
        return len(self.ids) - self.first


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows in order, the bucket of each, the ends of the buckets, and the dataset that the rows make."""

    rows: tuple[ScoredRow, ...]
    buckets: tuple[int, ...]
    edges: tuple[int, ...]
    dataset: Dataset

    @property
    def tokens(self) -> tuple[int, ...]:
        """Scored tokens of each bucket."""
        found = [0] * len(self.edges)
        for row, bucket in zip(self.rows, self.buckets, strict=True):
            found[bucket] += row.count
        return tuple(found)

    @cached_property
    def measured(self) -> tuple[int, ...]:
        """The places of the rows on which plans are measured, evenly spread over those of each bucket."""
        found: list[int] = []
        for bucket, tokens in enumerate(self.tokens):
            mine = [place for place, number in enumerate(self.buckets) if number == bucket]
            counts = [self.rows[place].count for place in mine]
            wanted = max(MEASURED_TOKENS, tokens // MEASURED_SHARE)
            found += [mine[place] for place in spread_places(counts, wanted, FEWEST_ROWS)]
        return tuple(found)

    @property
    def measured_total(self) -> int:
        """Tokens of these rows."""
        return sum(len(self.rows[place].ids) for place in self.measured)

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)


def edges_of(context: int) -> tuple[int, ...]:
    """The ends of the buckets of positions up to `context`."""
    ends = [context]
    while ends[0] // RATIO >= SHORTEST:
        ends.insert(0, ends[0] // RATIO)
    return tuple(ends)


def read_samples(
    layout: ModelLayout, files: Sequence[str | Path], *, context: int | None = None, num_tokens: int | None = None
) -> Samples:
    """Rows of a dataset's texts for contexts of up to `context` tokens, `num_tokens` scored ones in each bucket.

    A set says itself how many samples rows are cut from, and how long they are, unless there is a `context`. UserError
    for texts that are too short, and for a context beyond the model's positions.
    """
    for name, value, least in (("context", context, 16), ("num_tokens", num_tokens, 1)):
        if value is not None and value < least:
            what = f"must be >= {least}, got {value}."
            raise UserError(what, code="option-invalid", where=name, remedy=f"Give {least} or more.")
    positions = max_positions(layout.checkpoint.config)
    if context is not None and positions is not None and context > positions:
        what = f"{context:,} tokens are more than the {positions:,} that the model was made for."
        raise UserError(what, code="sequence-too-long", where="context", remedy=f"Ask for {positions} at most.")
    longest = context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    wanted = num_tokens or DEFAULT_TOKENS
    of_set = the_set(files) is not None
    dataset = load_dataset(
        layout.checkpoint.path,
        [Path(file) for file in files],
        num_samples=None if of_set else max(DOCUMENTS, FEWEST_ROWS, -(-wanted // (longest - longest // RATIO))),
        max_seq_length=context if of_set else longest,
        vocabulary=layout.config.get("vocab_size"),
        positions=positions,
    )
    if context is None:
        longest = min(longest, _enough(dataset, wanted))
    return cut_rows(dataset, longest, wanted)


def _enough(dataset: Dataset, wanted: int) -> int:
    """The greatest length of a sample of which rows give `wanted` tokens that are scored, of FEWEST_ROWS at least.

    Where none does, the greatest one with FEWEST_ROWS; samples of conversations have as many lengths as there are.
    """
    found = 0
    for length in sorted({len(sample) for sample in dataset.samples}, reverse=True):
        count = sum(len(sample) // length for sample in dataset.samples)
        first = (1, *edges_of(length))[-2]
        if count >= FEWEST_ROWS and count * (length - first) >= wanted:
            return length
        if count >= FEWEST_ROWS and not found:
            found = length
    return found or max(map(len, dataset.samples))


def cut_rows(dataset: Dataset, context: int, num_tokens: int) -> Samples:
    """Rows for the buckets up to `context`, cut from samples in turn; UserError where there are too few."""
    edges = edges_of(context)
    rows: list[ScoredRow] = []
    buckets: list[int] = []
    for bucket, end in enumerate(edges):
        first = 1 if bucket == 0 else edges[bucket - 1]
        needed = max(FEWEST_ROWS, -(-num_tokens // (end - first)))
        found = _pieces(dataset.samples, end, needed)
        if len(found) < FEWEST_ROWS:
            raise UserError(
                f"the texts give {len(found)} rows of {end:,} tokens, and {FEWEST_ROWS} are needed.",
                code="dataset-too-small",
                where="dataset",
                remedy="Give longer texts, or a smaller `context`.",
            )
        rows += [ScoredRow(piece, first) for piece in found]
        buckets += [bucket] * len(found)
    cut = make_dataset([row.ids for row in rows], dataset.source)
    return Samples(rows=tuple(rows), buckets=tuple(buckets), edges=edges, dataset=cut)


def _pieces(samples: Sequence[Sequence[int]], length: int, needed: int) -> list[tuple[int, ...]]:
    """Pieces of `length` tokens: the first of samples spread over all of them, then the second of each, and so on.

    A token that all samples begin with is put in the place of each piece's first: models that were trained so are lost
    without it.
    """
    found: list[tuple[int, ...]] = []
    starts = {sample[0] for sample in samples}
    begin = starts if len(starts) == 1 and len(samples) > 1 else ()
    for number in count():
        start = number * length
        having = [sample for sample in samples if len(sample) >= start + length]
        left = needed - len(found)
        if not having or left <= 0:
            return found
        chosen = having if len(having) <= left else [having[n * len(having) // left] for n in range(left)]
        found += [(*begin, *sample[start + len(begin) : start + length]) for sample in chosen]
    raise AssertionError


def by_bucket(values: Mapping[int, float], samples: Samples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means over the scored tokens of rows, of sums by the row's place, in each bucket.

    Their standard errors are by the rows' differences.
    """
    means, errors = [], []
    for bucket in range(len(samples.edges)):
        counts = {place: samples.rows[place].count for place in values if samples.buckets[place] == bucket}
        total = sum(counts.values())
        mean = fsum(values[place] for place in counts) / total
        spread = fsum((values[place] - mean * count) ** 2 for place, count in counts.items())
        means.append(mean)
        errors.append(sqrt(spread * len(counts) / max(1, len(counts) - 1)) / total)
    return tuple(means), tuple(errors)
