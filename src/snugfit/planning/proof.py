"""Plans compared by KL on held-out text of several texts and lengths, before one of them is called a plan.

All of them, and the original, share one pass over the layers (planning/shared_pass.py); no checkpoint is written. They
are compared with a control, of as many bytes, token for token: a plan that is not better beyond the error is refused,
however good its prediction was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snugfit import distributed
from snugfit.arguments import as_sequence
from snugfit.data import texts
from snugfit.data.dataset import the_set
from snugfit.data.tokenizer import Tokenizer
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.evaluation.chunks import Chunk, ChunkGroup, group_chunks
from snugfit.evaluation.held_out import SEGMENT_TOKENS
from snugfit.machine import deterministic, pick_device
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.model.positions import max_positions
from snugfit.planning.measured_plans import measure_plans, open_comparison
from snugfit.planning.shared_pass import Array, Assigned
from snugfit.planning.variants import PLAIN, Subject, open_subject
from snugfit.progress import SILENT, Progress
from snugfit.quantization.options import TOKENS_PER_BATCH
from snugfit.quantization.resume import origin
from snugfit.records.evaluation import TextRecord
from snugfit.records.proof import ALL_TEXTS, Measured, Proof, Proved
from snugfit.records.scores import Predicted, Scores
from snugfit.records.statistics_file import Statistics, text_digest
from snugfit.records.trials import MIN_GAIN, judge
from snugfit.records.trials import Measured as Tried

# of all texts at each context, where no other number is asked for, and chunks of each text at least
MAX_TOKENS, FEWEST_CHUNKS = 6144, 2


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Up to SEGMENT_TOKENS scored tokens of a chunk, whose KL is averaged: errors come from segments."""

    chunk: int
    part: slice
    context: int
    text: str
    tokens: int


@distributed.together
def prove(
    model: str | Path,
    plans: Sequence[Assigned],
    *,
    control: str | Sequence[str],
    statistics: Statistics,
    work_dir: str | Path,
    dataset: str | Path | Sequence[str | Path] = (),
    contexts: Sequence[int] = texts.DEFAULT_CONTEXTS,
    max_tokens: int | None = None,
    rounding: str = PLAIN,
    target: str = DEFAULT_PROFILE,
    scores: Scores | None = None,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    force_resume: bool = False,
    progress: Progress = SILENT,
) -> Proof:
    """Measure `plans`, and say which of them is better than the one named `control`; of several names the best one.

    `statistics` are what calibration found in the model, on other text than `dataset`'s (default: the half of Python's
    documentation topics that calibration leaves out). At most `max_tokens` tokens are taken at each of `contexts`.
    With `scores` each plan's predicted KL is in the result. Hidden states are in files in `work_dir`, which keeps what
    is measured: a run that was stopped resumes behind its last layer, to the same figures; `force_resume` also takes
    what another machine, library version or batch finished, which is measured again without it. UserError for bad
    input, and where the control's predictions are not finite.
    """
    controls = (control,) if isinstance(control, str) else tuple(control)
    for one in controls:
        check_plans(plans, one)

    def open_here() -> tuple[Subject, tuple[ChunkGroup, ...], tuple[TextRecord, ...]]:
        layout = read_layout(model)
        chunks, described = read_held_out(layout, as_sequence(dataset), contexts, max_tokens)
        return open_subject(layout, statistics, rounding=rounding, target=target, folds=True), chunks, described

    subject, groups, records = distributed.in_all(open_here)
    where = pick_device(device)
    per_batch = tokens_per_batch or TOKENS_PER_BATCH[where.type]
    rows = [chunk.ids for group in groups for chunk in group.chunks]
    written = [replace(plan, choice=subject.as_written(plan.choice)) for plan in plans]
    folder, identity = Path(work_dir), {"tokens_per_batch": per_batch} | _identity(subject, rows, written, where)
    finished = open_comparison(folder, identity, force=force_resume)
    with deterministic(where):
        found = measure_plans(
            subject,
            rows,
            written,
            where,
            tokens_per_batch=per_batch,
            folder=folder,
            finished=finished,
            title="proof",
            progress=progress,
        )

    def judge_here() -> Proof:
        best = controls[0] if len(controls) == 1 else _strongest(controls, groups, found)
        return judge_plans(plans, best, groups, found, records, rounding=rounding, target=target, scores=scores)

    return distributed.by_main(judge_here)


def _identity(
    subject: Subject, rows: Sequence[Sequence[int]], plans: Sequence[Assigned], device: torch.device
) -> dict[str, Any]:
    """What decides the figures, beside batches."""
    folds = {"folds": True} if subject.folds else {}
    return (
        origin(subject.layout.checkpoint, device)
        | folds
        | {
            "rounding": subject.rounding,
            "target": subject.target,
            "statistics": text_digest(subject.statistics.to_json()),
            "samples": text_digest(json.dumps([list(map(int, row)) for row in rows])),
            "plans": [[plan.name, dict(plan.choice)] for plan in plans],
        }
    )


def read_held_out(
    layout: ModelLayout, dataset: Sequence[str | Path], contexts: Sequence[int], max_tokens: int | None
) -> tuple[tuple[ChunkGroup, ...], tuple[TextRecord, ...]]:
    """The chunks that `prove` measures on, and a record of each text; UserError as `evaluate` raises it.

    A set says itself how many tokens it has.
    """
    files = texts.find_files([Path(file) for file in dataset])
    if max_tokens is None and the_set(files) is None:
        max_tokens = max(MAX_TOKENS, FEWEST_CHUNKS * max(1, len(files)) * max(contexts, default=0))
    cut, records = texts.read_chunks(
        Tokenizer(layout.checkpoint.path),
        files,
        contexts,
        max_tokens=max_tokens,
        vocabulary=layout.config.get("vocab_size"),
        positions=max_positions(layout.checkpoint.config),
    )
    return group_chunks(cut), tuple(records)


def _strongest(controls: Sequence[str], groups: Sequence[ChunkGroup], found: Mapping[str, Sequence[Array]]) -> str:
    """The control whose scored tokens have the least mean KL; the first where none is finite."""
    chunks = [chunk for group in groups for chunk in group.chunks]

    def mean(name: str) -> float:
        parts = [found[name][place][chunk.target_positions - 1] for place, chunk in enumerate(chunks)]
        value = float(np.concatenate(parts).astype(np.float64).mean())
        return value if isfinite(value) else inf

    return min(controls, key=mean)


def check_plans(plans: Sequence[Assigned], control: str) -> None:
    """UserError for plans of one name, and for a control that is none of them."""
    names = [plan.name for plan in plans]
    if len(set(names)) < len(names) or "" in names:
        what = "plans need names, each its own."
        raise UserError(what, code="option-invalid", where="plans", remedy="Name each once.")
    if control not in names:
        what = f"there is no plan {control!r}."
        raise UserError(what, code="option-invalid", where="control", remedy=f"Plans: {', '.join(names)}.")


def judge_plans(
    plans: Sequence[Assigned],
    control: str,
    groups: Sequence[ChunkGroup],
    divergences: Mapping[str, Sequence[Array]],
    records: tuple[TextRecord, ...],
    *,
    rounding: str,
    target: str,
    scores: Scores | None = None,
) -> Proof:
    """The proof, out of the KL of each token of each chunk: divergences[plan][chunk][position - 1]."""
    chunks = [chunk for group in groups for chunk in group.chunks]
    contexts = {chunk.number: group.context for group in groups for chunk in group.chunks}
    segments = [segment for chunk in chunks for segment in _segments(chunk, contexts[chunk.number])]
    kl = {plan.name: _means(divergences[plan.name], chunks, segments) for plan in plans}
    if not all(map(isfinite, kl[control])):
        raise UserError(
            "predictions of the control are not finite on held-out text.",
            code="activations-not-finite",
            where=control,
            remedy="Choose another control.",
        )
    found = []
    for plan in plans:
        measured = [_measure(plan.name, control, kl, segments, *where) for where in _places(segments)]
        found.append(
            Proved(
                name=plan.name,
                measured=tuple(measured),
                predicted=_predicted(plan, scores, [group.context for group in groups]),
                beats_control=None if plan.name == control else _beats(measured),
            )
        )
    better = [plan for plan in found if plan.beats_control]
    winner = min(better, key=lambda plan: plan.overall.kl).name if better else control
    return Proof(control=control, winner=winner, rounding=rounding, target=target, texts=records, plans=tuple(found))


def _segments(chunk: Chunk, context: int) -> list[_Segment]:
    """A chunk's scored tokens in parts, in order."""
    count = len(chunk.target_positions)
    text = Path(chunk.source if context else chunk.source.rpartition(":")[0]).name  # of rows without their lines
    return [
        _Segment(
            chunk=chunk.number,
            part=slice(start, min(count, start + SEGMENT_TOKENS)),
            context=context,
            text=text,
            tokens=min(count, start + SEGMENT_TOKENS) - start,
        )
        for start in range(0, count, SEGMENT_TOKENS)
    ]


def _means(found: Sequence[Array], chunks: Sequence[Chunk], segments: Sequence[_Segment]) -> list[float]:
    """Mean KL of each segment; NaN where a number was not finite."""
    scored = {chunk.number: found[place][chunk.target_positions - 1] for place, chunk in enumerate(chunks)}
    return [float(scored[one.chunk][one.part].astype(np.float64).mean()) for one in segments]


def _places(segments: Sequence[_Segment]) -> list[tuple[int | None, str]]:
    """What figures are of: everything, then each context, then each text at each context."""
    contexts = dict.fromkeys(segment.context for segment in segments)
    pairs = dict.fromkeys((segment.context, segment.text) for segment in segments)
    return [(None, ALL_TEXTS), *((context, ALL_TEXTS) for context in contexts), *pairs]


def _measure(
    name: str,
    control: str,
    kl: Mapping[str, Sequence[float]],
    segments: Sequence[_Segment],
    context: int | None,
    text: str,
) -> Measured:
    """KL of a plan and its gain over the control on the segments of a text at a context."""
    mine = [
        place
        for place, one in enumerate(segments)
        if (context is None or one.context == context) and text in (ALL_TEXTS, one.text)
    ]
    tokens = [segments[place].tokens for place in mine]
    strata = {key: number for number, key in enumerate(dict.fromkeys((s.context, s.text) for s in segments))}
    files = [strata[segments[place].context, segments[place].text] for place in mine]
    parts = [Tried(one, tuple(kl[one][place] for place in mine), 0.0) for one in (control, name)]
    _, second = judge(parts, tokens, files)
    same = name == control
    return Measured(
        context=context,
        text=text,
        tokens=sum(tokens),
        kl=second.kl,
        error=second.error,
        gain=None if same else second.gain,
        gain_error=None if same else second.gain_error,
    )


def _beats(measured: Sequence[Measured]) -> bool:
    """Whether a plan is better than the control on all text, and at no context worse, beyond the error."""

    def margin(one: Measured) -> tuple[float, float]:
        assert one.gain is not None
        assert one.gain_error is not None
        return one.gain, MIN_GAIN * one.gain_error

    gain, error = margin(measured[0])
    if not gain > max(0.0, error):  # NaN is not better
        return False
    by_context = [margin(one) for one in measured[1:] if one.text == ALL_TEXTS]
    return all(gain >= -error for gain, error in by_context)


def _predicted(plan: Assigned, scores: Scores | None, contexts: Sequence[int]) -> dict[int, Predicted]:
    """What scores predict at each context; rows of their own lengths have no context to predict at."""
    if scores is None:
        return {}
    return {context: scores.predict(plan.choice, context) for context in contexts if context}
