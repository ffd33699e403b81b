"""From the figures of every token to a record's: one entry for each context length, its models in order."""

from __future__ import annotations

from collections.abc import Sequence

from snugfit.evaluation import figures
from snugfit.evaluation.chunks import ChunkGroup
from snugfit.evaluation.measure import Found, Measurement
from snugfit.evaluation.plan import EvaluationPlan, floor_chunks
from snugfit.evaluation.reference import StoredReference
from snugfit.records.evaluation import ContextFigures, Floor


def summarize(plan: EvaluationPlan, measurements: Sequence[Measurement], found: Found) -> tuple[ContextFigures, ...]:
    """Figures of every group, the reference first, each pair's p adjusted by Holm for all pairs."""
    contexts = []
    for place, group in enumerate(plan.groups):
        tokens = figures.GroupTokens.of(group)
        floors = _floors(plan, group, place, tokens, measurements, found)
        models = [
            figures.model_figures(
                one.name,
                found[one][place],
                tokens,
                reference=None if one.compared_with is None else found[one.compared_with][place],
                kl_kind=one.kl_kind,
                floor=floors.get(one),
            )
            for one in measurements
            if one.kind != "noise floor"
        ]
        contexts.append(figures.context_figures(group.context, group.digest, tokens, models))
    return figures.with_holm(contexts)


def _floors(
    plan: EvaluationPlan,
    group: ChunkGroup,
    place: int,
    tokens: figures.GroupTokens,
    measurements: Sequence[Measurement],
    found: Found,
) -> dict[Measurement, Floor]:
    """Noise floors by the measurement that they belong to."""
    floors: dict[Measurement, Floor] = {}
    for one in measurements:
        floor = None
        if one.kind == "reference" and isinstance(plan.reference, StoredReference):
            floor = plan.reference.floors.get(group.context)
        elif one.floor_of is not None and one.model is not None:
            floor = figures.floor_figures(found[one][place], tokens, floor_chunks(group), one.model.arithmetic_name)
        if floor is not None:
            floors[one.floor_of or one] = floor
    return floors
