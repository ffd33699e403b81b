"""Several models on the same rows of tokens: loss, KL and agreement for every scored token.

Each model's rows pass its layers, one decoder layer in memory; then all heads run side by side over a few tokens at a
time, and whatever is as wide as the vocabulary is reduced at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snugfit.evaluation.divergence import Prediction, diverge, softmax
from snugfit.evaluation.subject import Subject, last_states, open_head, outer_weights
from snugfit.model import forward_pass

STATE_BYTES = 2 << 30  # hidden states in memory at once
PIECE = 1 << 24  # logits of one model in memory at once
SLICE = {"cpu": 1 << 20, "cuda": 1 << 24}  # of them in fp32 at once: what a CPU's caches hold

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """A model to measure: on which of the rows (None: all), and against which entry its divergence is taken.

    Either a `subject` is walked, or `known` gives each row's predictions at its scored places.
    """

    subject: Subject | None
    against: int | None = None
    rows: frozenset[int] | None = None
    known: Callable[[int, int, int], Prediction] | None = None

    def has(self, row: int) -> bool:
        """Whether this row is measured."""
        return self.rows is None or row in self.rows


@dataclass(frozen=True)
class TokenFigures:
    """Figures of every scored token of all rows, in order; NaN where a row was not measured.

    `change`: of the true token's probability. Where KL is an estimate, `variance` is that of its sampling and `bound` a
    lower bound without any. `finite` is false where logits of this model, or of the one it is compared with, or their
    divergence, were NaN or infinite.
    """

    loss: Array
    confidence: Array
    finite: NDArray[np.bool_]
    kl: Array
    reverse: Array
    same_top: Array
    change: Array
    variance: Array
    bound: Array


def scored_places(rows: Sequence[Sequence[int]], scored: Sequence[Sequence[int] | None]) -> list[NDArray[np.int64]]:
    """Positions of the scored tokens of each row; None: all but the first, which nothing predicts."""
    return [
        np.arange(1, len(row)) if places is None else np.asarray(places, dtype=np.int64)
        for row, places in zip(rows, scored, strict=True)
    ]


@torch.no_grad()
def measure(
    entries: Sequence[Entry],
    rows: Sequence[Sequence[int]],
    places: Sequence[NDArray[np.int64]],
    device: torch.device,
    *,
    tokens_per_batch: int,
    tick: Callable[[], None] = lambda: None,
    keep: Callable[[int, int, Prediction], None] | None = None,
) -> list[TokenFigures]:
    """Figures of every entry at the scored `places` of every row; entries come after those they are compared with.

    `keep(row, first place, prediction)` sees the first entry's predictions as they pass. `tick` is called after every
    layer and every row.
    """
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in places])])
    figures = [_blank(int(offsets[-1])) for _ in entries]
    for wave in _waves(entries, rows, places):
        states = [_states(entry, wave, rows, places, device, tokens_per_batch, tick) for entry in entries]
        heads = _heads(entries, device)
        for row in wave:
            for start, stop in _pieces(len(places[row]), entries):
                targets = torch.tensor(np.asarray(rows[row])[places[row][start:stop]], device=device)
                logits = {
                    index: heads[index](states[index][row][start:stop].to(device).unsqueeze(0))[0]
                    for index, entry in enumerate(entries)
                    if entry.subject is not None and entry.has(row)
                }
                for low, high in _slices(stop - start, logits, device):
                    piece = _Piece(row, start + low, start + high, int(offsets[row]) + start + low, targets[low:high])
                    part = {index: values[low:high] for index, values in logits.items()}
                    _visit(entries, None, None, part, piece, figures, keep)
            tick()
    return figures


def steps(entries: Sequence[Entry], rows: Sequence[Sequence[int]], places: Sequence[NDArray[np.int64]]) -> int:
    """How often `measure` will tick."""
    waves = list(_waves(entries, rows, places))
    walked = [entry for entry in entries if entry.subject is not None]
    layers = sum(
        len(entry.subject.skeleton.layers)
        for wave in waves
        for entry in walked
        if entry.subject is not None and any(entry.has(row) for row in wave)
    )
    return layers + len(rows)


@dataclass(frozen=True)
class _Piece:
    """Places start..stop of a row, where their figures go, and the true tokens there."""

    row: int
    start: int
    stop: int
    offset: int
    targets: Tensor


def _visit(
    entries: Sequence[Entry],
    parent: int | None,
    base: Prediction | None,
    logits: Mapping[int, Tensor],
    piece: _Piece,
    figures: Sequence[TokenFigures],
    keep: Callable[[int, int, Prediction], None] | None,
) -> None:
    """Every entry compared with `parent`, then those compared with it in turn: few predictions are held at once."""
    for index, entry in enumerate(entries):
        if entry.against != parent or not entry.has(piece.row):
            continue
        prediction = softmax(logits[index]) if entry.known is None else entry.known(piece.row, piece.start, piece.stop)
        if index == 0 and keep is not None:
            keep(piece.row, piece.start, prediction)
        _note(figures[index], prediction, base, piece)
        _visit(entries, index, prediction, logits, piece, figures, keep)


def _note(figures: TokenFigures, prediction: Prediction, base: Prediction | None, piece: _Piece) -> None:
    where = slice(piece.offset, piece.offset + piece.stop - piece.start)
    loss, finite = prediction.loss(piece.targets), prediction.finite
    figures.loss[where] = _numpy(loss)
    figures.confidence[where] = _numpy(prediction.confidence)
    if base is not None:
        found = diverge(base, prediction)
        finite = finite & base.finite & found.kl.isfinite() & found.reverse.isfinite()
        figures.kl[where] = _numpy(found.kl)
        figures.reverse[where] = _numpy(found.reverse)
        figures.same_top[where] = _numpy(found.same_top)
        figures.change[where] = _numpy((-loss).exp() - (-base.loss(piece.targets)).exp())
        if found.variance is not None and found.bound is not None:
            figures.variance[where] = _numpy(found.variance)
            figures.bound[where] = _numpy(found.bound)
    figures.finite[where] = _numpy(finite & loss.isfinite()).astype(bool)


def _numpy(values: Tensor) -> Array:
    return values.float().cpu().numpy()


def _blank(tokens: int) -> TokenFigures:
    def nothing() -> Array:
        return np.full(tokens, np.nan, dtype=np.float32)

    finite = np.zeros(tokens, dtype=bool)
    return TokenFigures(nothing(), nothing(), finite, *(nothing() for _ in range(6)))


def _states(
    entry: Entry,
    wave: Sequence[int],
    rows: Sequence[Sequence[int]],
    places: Sequence[NDArray[np.int64]],
    device: torch.device,
    tokens_per_batch: int,
    tick: Callable[[], None],
) -> dict[int, Tensor]:
    """Hidden states that predict the scored tokens, by row."""
    chosen = [row for row in wave if entry.has(row)]
    if entry.subject is None or not chosen:
        return {}
    before = [torch.from_numpy(places[row] - 1) for row in chosen]
    states = last_states(
        entry.subject,
        [rows[row] for row in chosen],
        before,
        device,
        tokens_per_batch=tokens_per_batch,
        tick=tick,
    )
    return dict(zip(chosen, states, strict=True))


def _heads(entries: Sequence[Entry], device: torch.device) -> dict[int, forward_pass.Head]:
    """Every model's output head; weights that are equal are held once."""
    pool: dict[str, list[Tensor]] = {}
    heads = {}
    for index, entry in enumerate(entries):
        if entry.subject is not None:
            heads[index] = open_head(entry.subject, device, outer_weights(entry.subject, device, pool))
    return heads


def _waves(
    entries: Sequence[Entry], rows: Sequence[Sequence[int]], places: Sequence[NDArray[np.int64]]
) -> Iterator[list[int]]:
    """Rows in order, as many at once as hidden states fit: those on their way through one model, and the last ones."""
    walked = [entry.subject for entry in entries if entry.subject is not None]
    bytes_each = [_state_bytes(subject) for subject in walked]
    wave: list[int] = []
    held = 0
    for row, tokens in enumerate(rows):
        needed = max(bytes_each, default=0) * len(tokens) + sum(bytes_each) * len(places[row])
        if wave and held + needed > STATE_BYTES:
            yield wave
            wave, held = [], 0
        wave.append(row)
        held += needed
    if wave:
        yield wave


def _state_bytes(subject: Subject) -> int:
    weight = subject.skeleton.model.get_input_embeddings().weight  # type: ignore[operator]
    return int(weight.shape[1] * weight.element_size())


def _pieces(tokens: int, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    widest = max((entry.subject.vocabulary for entry in entries if entry.subject is not None), default=1)
    step = max(1, PIECE // widest)
    for start in range(0, tokens, step):
        yield start, min(start + step, tokens)


def _slices(tokens: int, logits: Mapping[int, Tensor], device: torch.device) -> Iterator[tuple[int, int]]:
    widest = max((values.shape[-1] for values in logits.values()), default=1)
    step = max(1, SLICE[device.type] // widest)
    for low in range(0, tokens, step):
        yield low, min(low + step, tokens)
