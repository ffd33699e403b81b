"""What a person should know of a plan before the run: caches, heads, codes of the source, headroom. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from snugfit.engines.kernels import HEAD_ENGINES
from snugfit.engines.mixtures import NVFP4_EXPERTS_IN_TRANSFORMERS, SPLIT_EXPERTS_IN_TRANSFORMERS
from snugfit.formats.spec import NVFP4_FORMATS
from snugfit.model.layout import ModelLayout
from snugfit.model.loose import taken_note
from snugfit.quantization.cache_scales import kept_cache
from snugfit.quantization.decide import Decisions
from snugfit.recipes.assignment import Assignment, runs_in_engines
from snugfit.recipes.recipe import LoadedRecipe

_FOUR_BITS = NVFP4_FORMATS | {"mxfp4", "int4"}


def plan_notes(
    layout: ModelLayout, recipe: LoadedRecipe, decisions: Decisions, assignments: Iterable[Assignment]
) -> tuple[str, ...]:
    """All notes, one line each; `assignments` are those of `decisions` with the headroom that the run gives them."""
    return (
        *layout.contradictions,
        *([taken_note(layout.taken_in)] if layout.taken_in else []),
        *_cache_notes(layout, recipe),
        *_format_notes(decisions),
        *_headroom_notes(assignments),
    )


def _cache_notes(layout: ModelLayout, recipe: LoadedRecipe) -> list[str]:
    """What becomes of an FP8 cache that the source declares without scales."""
    if not layout.cache_without_scales or recipe.recipe.kv_cache is not None:
        return []
    kept = "stays declared" if kept_cache(layout) else "is not declared in the result"
    return [f"the source's FP8 KV cache {kept}: {layout.cache_without_scales}"]


def _format_notes(decisions: Decisions) -> list[str]:
    """Which engines load a quantized head and NVFP4 experts, and what becomes of the source's codes.

    Of these, those of 4 bits that are quantized again, and those that are not written.
    """
    assigned = decisions.assignments
    again = [
        name
        for name, fmt in decisions.weights.formats.items()
        if fmt.name in _FOUR_BITS and (a := assigned.get(name)) and a.format is not None and not a.keeps_codes
    ]
    head = any(a.format is not None and decisions.names[name].role == "lm_head" for name, a in assigned.items())
    notes = [HEAD_ENGINES] if head else []
    notes += _expert_notes(decisions)
    notes += [f"{len(again)} weights of 4 bits are quantized again: both losses add up"] if again else []
    return notes + _not_written(decisions)


def _expert_notes(decisions: Decisions) -> list[str]:
    """What transformers makes of routed experts that are written quantized: vLLM reads them."""
    formats = {
        name: a.format.name
        for name, a in decisions.assignments.items()
        if a.format is not None and decisions.names[name].routed
    }
    origins = decisions.weights.origins
    if any(name in origins and origins[name].part is not None for name in formats):
        return [SPLIT_EXPERTS_IN_TRANSFORMERS]
    return [NVFP4_EXPERTS_IN_TRANSFORMERS] if NVFP4_FORMATS & {*formats.values()} else []


def _headroom_notes(assignments: Iterable[Assignment]) -> list[str]:
    """How far the ranges of calibrated input scales go beyond what calibration sees, if any does."""
    counts = Counter(a.input_headroom for a in assignments if a.calibrated and a.input_headroom is not None)
    if not any(factor > 1 for factor in counts):
        return []
    parts = [f"{factor:g} times for {count} weights" for factor, count in sorted(counts.items(), reverse=True)]
    return [f"the range of input scales is the largest calibrated input {', '.join(parts)}"]


def _not_written(decisions: Decisions) -> list[str]:
    """What becomes of codes of the source in formats that are not written."""
    formats = {name: fmt for name, fmt in decisions.weights.formats.items() if not runs_in_engines(fmt)}
    if not formats:
        return []
    assigned = [decisions.assignments[name].format for name in formats if name in decisions.assignments]
    again = sum(fmt is not None for fmt in assigned)
    labels = ", ".join(dict.fromkeys(fmt.label() for fmt in formats.values()))
    what = f"{again} are quantized again as the recipe says, {len(formats) - again} are dequantized to 16 bits"
    return [f"codes in {labels} are not written: of {len(formats)} such weights of the source {what}"]
