"""The part of config.json that describes the language model, with older keys renamed and missing ones filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snugfit.errors import UserError
from snugfit.model import config_defaults, family_defaults
from snugfit.model.config_values import MAX_LAYERS, WHERE, check_values

# where a config describes the language model, if not at its top
_NESTED = ("text_config", "llm_config", "language_config", "text_model", "language_model", "thinker_config")
# keys by which a nested config that leaves its layer count to defaults is one of a language model
_TELLING = (*_NESTED, "hidden_size", "num_attention_heads")
_LAYER_COUNTS = ("num_hidden_layers", *config_defaults.ALIASES["num_hidden_layers"])
# lists with one entry a layer
_LAYER_LISTS = ("layers_block_type", "layer_types", "hybrid_override_pattern")


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json on the language model: itself, or what lies under text_config and the like."""
    for key in _NESTED:
        nested = config.get(key)
        if not isinstance(nested, dict):
            continue
        stated = layer_count(nested) is not None or any(key in nested for key in _TELLING)
        # transformers' defaults fill in all of these, if the config around it has no layers of its own
        left_out = layer_count(config) is None and _text_type(config, nested) is not None
        if stated or left_out:
            return language_config(_with_type(nested, _text_type(config, nested)))
    if layer_count(config) is None and not any(isinstance(config.get(key), dict) for key in _NESTED):
        return _with_type(config, family_defaults.TEXT_TYPES.get(str(config.get("model_type"))), instead=True)
    return config


def _text_type(config: Mapping[str, Any], nested: Mapping[str, Any]) -> str | None:
    """The model_type of the language model's part `nested` of a config: its own, else the family's."""
    kind = nested.get("model_type") or family_defaults.TEXT_TYPES.get(str(config.get("model_type")))
    return kind if isinstance(kind, str) else None


def _with_type(config: Mapping[str, Any], kind: str | None, *, instead: bool = False) -> Mapping[str, Any]:
    """`config` with the model_type `kind` where it has none, or `instead` of its own."""
    if kind is None or (config.get("model_type") and not instead):
        return config
    return {**config, "model_type": kind}


def nested_language_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config under which a part of it describes the language model."""
    return [key for key in _NESTED if isinstance(config.get(key), dict)]


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers that a (language) config states; None where it states no possible number."""
    given = (config.get(key) for key in _LAYER_COUNTS)
    counts = (count for count in given if isinstance(count, int) and not isinstance(count, bool))
    return next((count for count in counts if 0 < count <= MAX_LAYERS), None)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, older keys renamed, missing ones as transformers would fill them in.

    Raises UserError for a value that no model can have.
    """
    text = dict(language_config(config))
    for key, names in config_defaults.ALIASES.items():
        older = next((text[name] for name in names if text.get(name) is not None), None)
        if text.get(key) is None and older is not None:
            text[key] = older
    check_values(text)
    if text.get("num_hidden_layers") is None:  # transformers may save a list of the layers' types alone
        listed = next((text[key] for key in _LAYER_LISTS if text.get(key)), None)
        if listed is not None:
            text["num_hidden_layers"] = len(listed)
    kind = str(text.get("model_type"))
    sizes = zip(family_defaults.SIZES, family_defaults.SIZES_OF.get(kind, ()), strict=False)
    defaults = {key: value for key, value in sizes if value is not None}
    return {**defaults, **config_defaults.DEFAULTS.get(kind, {}), **text}


def layers_without_text(text: Mapping[str, Any]) -> frozenset[int]:
    """Decoder layers that a language model passes over while it reads text alone: the cross attention of Mllama."""
    listed = text.get("cross_attention_layers")
    if text.get("model_type") != "mllama_text_model" or not isinstance(listed, list):
        return frozenset()
    return frozenset(number for number in listed if isinstance(number, int))


def shares_keys_and_values(text: Mapping[str, Any]) -> bool:
    """Whether layers use the keys and values of layers before them (Hunyuan-Large), which transformers does not run.

    Without a factor none do (vLLM: hunyuan_v1.py, _get_cla_factor).
    """
    factor = text.get("cla_share_factor")
    return bool(text.get("use_cla")) and factor is not None and not (isinstance(factor, int) and factor <= 1)


def positive(text: Mapping[str, Any], key: str) -> int:
    """The value of `key` in a config, a whole number above 0; UserError for anything else."""
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        names = ", ".join((key, *config_defaults.ALIASES.get(key, ())))
        raise UserError(
            f"{key} is {value!r}, but must be a whole number above 0 (looked for {names}).",
            code="config-invalid",
            where=WHERE,
            remedy="Correct config.json.",
        )
    return value
