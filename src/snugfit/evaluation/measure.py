"""Several models on the same chunks: loss, KL and agreement of every scored token.

The chunks pass each model's layers, one decoder layer in memory; then the output heads of all models run side by side
on a few tokens at a time, and whatever is as wide as the vocabulary is reduced at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from snugfit import distributed
from snugfit.evaluation.chunks import Chunk, ChunkGroup
from snugfit.evaluation.divergence import Prediction, diverge, softmax
from snugfit.evaluation.evaluated_model import EvaluatedModel, last_states, open_head, outer_weights
from snugfit.evaluation.token_figures import Array, TokenFigures, blank_figures
from snugfit.model import forward_pass
from snugfit.progress import SILENT, Progress
from snugfit.records.evaluation import KLKind

STATE_BYTES = 2 << 30  # hidden states in memory at once
LOGITS = 1 << 24  # logits of one model in memory at once
SLICE = {"cpu": 1 << 20, "cuda": 1 << 24}  # of them in fp32 at once: what a CPU's caches hold

Predictions = Callable[[Chunk, int, int], Prediction]  # of a chunk's scored tokens start..stop


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """A model to measure: one of the tables, or one of them a second time in other arithmetic, for its noise floor.

    Either `model` is run, or its `predictions` are known. Its divergence is from `compared_with`, which for a noise
    floor is the measurement of the same model, and `kl_kind` says how that is computed. `chunks` are the numbers of
    those that it is measured on, None for all.
    """

    name: str
    kind: Literal["reference", "candidate", "server", "noise floor"]
    model: EvaluatedModel | None = None
    predictions: Predictions | None = None
    compared_with: Measurement | None = None
    kl_kind: KLKind = "exact"
    chunks: frozenset[int] | None = None

    @property
    def floor_of(self) -> Measurement | None:
        """The measurement whose noise floor this is."""
        return self.compared_with if self.kind == "noise floor" else None

    def includes(self, chunk: Chunk) -> bool:
        """Whether this chunk is measured."""
        return self.chunks is None or chunk.number in self.chunks


Found = Mapping[Measurement, Sequence[TokenFigures]]  # figures of each group
Keep = Callable[[Chunk, int, Prediction], None]


@torch.no_grad()
def measure(
    measurements: Sequence[Measurement],
    groups: Sequence[ChunkGroup],
    device: torch.device,
    *,
    tokens_per_batch: int,
    keep: Keep | None = None,
    progress: Progress = SILENT,
) -> Found:
    """Figures of every measurement on every group, in order.

    `keep(chunk, first, prediction)` is given the reference's predictions of scored tokens first.. as they pass. Several
    processes share the chunks, unless there is a `keep`: all get all figures, those of one process but for noise
    floors, whose few chunks are in other batches.
    """
    found = {one: [blank_figures(sum(group.target_counts)) for group in groups] for one in measurements}
    chunks = [chunk for group in groups for chunk in group.chunks]
    passes = list(_passes(measurements, chunks))
    warned: set[str] = set()

    def warn(text: str) -> None:
        if text not in warned:
            warned.add(text)
            progress.message(text)

    with progress.bar(_steps(measurements, passes), "evaluating") as advance:
        for part in passes:
            mine = None if keep is not None else _my_chunks(measurements, part, tokens_per_batch)
            states = {one: _states(one, part, device, tokens_per_batch, advance, warn, mine) for one in measurements}
            heads = _heads(measurements, device)
            for chunk in part if mine is None else [chunk for chunk in part if chunk.number in mine]:
                for piece, logits in _logits(measurements, chunk, states, heads, device):
                    _record(measurements, None, None, logits, piece, found, keep)
                advance()
            del states, heads  # before the next pass needs the memory
            if mine is not None:
                _share(found, measurements, [chunk for chunk in part if chunk.number in mine])
    return found


def _my_chunks(
    measurements: Sequence[Measurement], chunks: Sequence[Chunk], tokens_per_batch: int
) -> frozenset[int] | None:
    """Numbers of the chunks that this process measures, None for all: those of a block of the batches of all."""
    model = next((one.model for one in measurements if one.model is not None and one.chunks is None), None)
    if distributed.world_size() == 1 or model is None:
        return None
    rows, pads = [chunk.ids for chunk in chunks], model.skeleton.is_causal
    batches = forward_pass.make_batches(rows, tokens_per_batch, torch.device("cpu"), pads=pads)
    return frozenset(chunks[row].number for batch in distributed.mine(batches) for row in batch.rows)


def _share(found: Found, measurements: Sequence[Measurement], chunks: Sequence[Chunk]) -> None:
    """Give all processes the figures of `chunks`, which this one has measured."""
    mine = []
    for number, one in enumerate(measurements):
        for chunk in chunks:
            where = slice(chunk.first, chunk.first + len(chunk.target_positions))
            arrays = vars(found[one][chunk.group])
            mine.append((number, chunk.group, where, {name: array[where] for name, array in arrays.items()}))
    for others in distributed.gather(mine):
        for number, group, where, arrays in others:
            for name, values in arrays.items():
                vars(found[measurements[number]][group])[name][where] = values


def _steps(measurements: Sequence[Measurement], passes: Sequence[Sequence[Chunk]]) -> int:
    """How often `measure` advances: once a layer of each pass, and once a chunk."""
    layers = sum(
        len(one.model.skeleton.layers)
        for part in passes
        for one in measurements
        if one.model is not None and any(one.includes(chunk) for chunk in part)
    )
    return layers + sum(map(len, passes))


@dataclass(frozen=True)
class _Piece:
    """The scored tokens start..stop of a chunk, and their ids on the device."""

    chunk: Chunk
    start: int
    stop: int
    targets: Tensor


def _logits(
    measurements: Sequence[Measurement],
    chunk: Chunk,
    states: Mapping[Measurement, Mapping[int, Tensor]],
    heads: Mapping[Measurement, forward_pass.Head],
    device: torch.device,
) -> Iterator[tuple[_Piece, Mapping[Measurement, Tensor]]]:
    """A chunk's scored tokens piece by piece, with the logits of each model that is run on it."""
    count = len(chunk.target_positions)
    widest = max((one.model.vocabulary for one in measurements if one.model is not None), default=1)
    for start, stop in _ranges(count, LOGITS // widest):
        targets = torch.tensor(np.asarray(chunk.ids)[chunk.target_positions[start:stop]], device=device)
        logits = {
            one: heads[one](states[one][chunk.number][start:stop].to(device).unsqueeze(0))[0]
            for one in measurements
            if one.model is not None and one.includes(chunk)
        }
        width = max((values.shape[-1] for values in logits.values()), default=1)
        for low, high in _ranges(stop - start, SLICE[device.type] // width):
            part = {one: values[low:high] for one, values in logits.items()}
            yield _Piece(chunk, start + low, start + high, targets[low:high]), part


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    """0..count in ranges of `step`, at least 1."""
    for start in range(0, count, max(1, step)):
        yield start, min(start + max(1, step), count)


def _record(
    measurements: Sequence[Measurement],
    compared_with: Measurement | None,
    reference: Prediction | None,
    logits: Mapping[Measurement, Tensor],
    piece: _Piece,
    found: Found,
    keep: Keep | None,
) -> None:
    """Every measurement compared with this one, then those compared with each: few predictions are held at once."""
    for one in measurements:
        if one.compared_with is not compared_with or not one.includes(piece.chunk):
            continue
        if one.predictions is None:
            prediction: Prediction = softmax(logits[one])
        else:
            prediction = one.predictions(piece.chunk, piece.start, piece.stop)
        if one.kind == "reference" and keep is not None:
            keep(piece.chunk, piece.start, prediction)
        _write(found[one][piece.chunk.group], prediction, reference, piece)
        _record(measurements, one, prediction, logits, piece, found, keep)


def _write(figures: TokenFigures, prediction: Prediction, reference: Prediction | None, piece: _Piece) -> None:
    where = slice(piece.chunk.first + piece.start, piece.chunk.first + piece.stop)
    loss, finite = prediction.loss(piece.targets), prediction.finite
    found = {"loss": loss, "confidence": prediction.confidence}
    if reference is not None:
        divergence = diverge(reference, prediction)
        finite = finite & reference.finite & divergence.kl.isfinite() & divergence.reverse.isfinite()
        found |= {"kl": divergence.kl, "reverse": divergence.reverse, "same_top": divergence.same_top}
        found["overlap"] = divergence.overlap
        found["change"] = (-loss).exp() - (-reference.loss(piece.targets)).exp()
        if divergence.variance is not None and divergence.bound is not None:
            found |= {"variance": divergence.variance, "bound": divergence.bound}
    found["finite"] = finite & loss.isfinite()
    # one copy: a GPU waits for the CPU behind each
    copied = torch.stack([values.float() for values in found.values()]).cpu().numpy()
    for name, values in zip(found, copied, strict=True):
        array: Array = getattr(figures, name)
        array[where] = values


def _states(
    one: Measurement,
    chunks: Sequence[Chunk],
    device: torch.device,
    tokens_per_batch: int,
    advance: Callable[[], None],
    warn: Callable[[str], None],
    mine: frozenset[int] | None,
) -> dict[int, Tensor]:
    """Hidden states that predict the scored tokens, by the chunk's number; of the chunks that are `mine`, if given."""
    chosen = [chunk for chunk in chunks if one.includes(chunk)]
    shared = mine is not None and one.chunks is None  # in the batches of one process
    if mine is not None and not shared:
        chosen = [chunk for chunk in chosen if chunk.number in mine]
    if one.model is None or not chosen:
        return {}
    states = last_states(
        one.model,
        [chunk.ids for chunk in chosen],
        [torch.from_numpy(chunk.target_positions - 1) for chunk in chosen],
        device,
        tokens_per_batch=tokens_per_batch,
        advance=advance,
        warn=warn,
        shared=shared,
    )
    return {chunk.number: values for chunk, values in zip(chosen, states, strict=True)}


def _heads(measurements: Sequence[Measurement], device: torch.device) -> dict[Measurement, forward_pass.Head]:
    """Every model's output head; weights that are equal are held once."""
    pool: dict[str, list[Tensor]] = {}
    return {
        one: open_head(one.model, device, outer_weights(one.model, device, pool))
        for one in measurements
        if one.model is not None
    }


def _passes(measurements: Sequence[Measurement], chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in order, as many at once as memory holds states of: all tokens' in one model, the scored ones' in all."""
    bytes_each = [_state_bytes(one.model) for one in measurements if one.model is not None]
    part: list[Chunk] = []
    held = 0
    for chunk in chunks:
        needed = max(bytes_each, default=0) * len(chunk.ids) + sum(bytes_each) * len(chunk.target_positions)
        if part and held + needed > STATE_BYTES:
            yield part
            part, held = [], 0
        part.append(chunk)
        held += needed
    if part:
        yield part


def _state_bytes(model: EvaluatedModel) -> int:
    weight = model.skeleton.model.get_input_embeddings().weight  # type: ignore[operator]
    return int(weight.shape[1] * weight.element_size())
