"""The longest context that a model was made for: the one rule of `fit`, `evaluate`, `quantize` and statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from snugfit.model.language_config import with_defaults

# scalings whose config states the length that they reach, not the one they start from (vLLM: _get_and_verify_max_len)
_REACHED = frozenset({"default", "su", "longrope", "llama3", "mrope"})
# families whose length is scaled already, whatever the kind of scaling
_SCALED_FAMILIES = ("gemma3",)
_LOCAL_BASE_FAMILIES = ("gemma3",)


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest context that the model was made for; None where its config does not say.

    With YaRN these are the original positions times the factor, where both are stated; with linear and dynamic scaling
    max_position_embeddings times the factor, as in vLLM; with every other kind max_position_embeddings.
    """
    text = with_defaults(config)
    given = text.get("max_position_embeddings") or text.get("model_max_length")
    stated = given if isinstance(given, int) and not isinstance(given, bool) and given > 0 else None
    found = [_scaled(scaling, stated) for scaling in _scalings(text)]
    if str(text.get("model_type")).startswith(_SCALED_FAMILIES):
        return stated
    return max((positions for positions in found if positions is not None), default=stated)


def rotary_tables(config: Mapping[str, Any]) -> int:
    """Tables of rotary embeddings that an engine keeps: one for each setting that types of layers differ in.

    vLLM (get_rope) shares a table among layers with the same settings. Gemma 3 has another base in its windowed layers,
    which its older configs state under a key of its own or omit.
    """
    text = with_defaults(config)
    types = text.get("layer_types")
    given = text.get("rope_parameters")
    if isinstance(given, dict) and any(isinstance(value, dict) for value in given.values()):
        used = [value for name, value in given.items() if not isinstance(types, list) or name in types]
        return max(1, len({repr(sorted(value.items())) for value in used if isinstance(value, dict)}))
    local = text.get("rope_local_base_freq") is not None or str(text.get("model_type")).startswith(_LOCAL_BASE_FAMILIES)
    return 2 if local else 1


def _scaled(scaling: Mapping[str, Any], stated: int | None) -> int | None:
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if kind in _REACHED or not factor:
        return stated
    if "yarn" in kind:
        return int(original * factor) if original else stated
    return None if stated is None else int(stated * factor)


def _scalings(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The scalings of rotary embeddings that a config states: one, or one for each type of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        given = text.get(key)
        if isinstance(given, dict) and given:
            nested = [value for value in given.values() if isinstance(value, dict)]
            yield from nested or [given]
            return
