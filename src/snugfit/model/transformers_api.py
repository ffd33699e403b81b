"""Every private or undocumented name of transformers that snugfit uses, in one place.

Seen in transformers 5.17 and 5.23; `tests/model/test_transformers_api.py` names the release it was run with and fails
if one of them changes. pyproject.toml bounds the version from above.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SEEN_IN = ("5.17", "5.23")
IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def is_known_architecture(model_type: object) -> bool:
    """Whether transformers has a config class for a model_type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES


def auto_class(config: Any) -> Any:
    """transformers' auto class for a config: of a language model, or of what has a language model among its parts."""
    import transformers

    text_alone = config.get_text_config() is config
    asked = [name for name in config.architectures or () if name.endswith("ForCausalLM")]
    names = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    several = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    known = [] if text_alone or asked else [auto for auto in several if type(config) in auto._model_mapping]  # noqa: SLF001
    return known[0] if known else transformers.AutoModelForCausalLM


def ignore_implementations(config: Any) -> None:
    """Let transformers choose how attention and experts are computed, whatever config.json asks for.

    A file may ask for kernels that are not installed, or that would be fetched; which ones run is no part of a model.
    """
    for name in IMPLEMENTATIONS:
        if getattr(config, f"{name}_internal", None) is not None:
            setattr(config, f"{name}_internal", None)
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None and part is not config:
            ignore_implementations(part)


def dtype_plan(model: Any, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """Patterns of parameters' names -> the dtype that they keep when the model is loaded in `dtype`."""
    found: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)  # noqa: SLF001
    return found


def renamer(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """A function from a file's tensor name to the model's, and whether loading changes more than the name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")

    def rename(name: str) -> tuple[str, bool]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # as in transformers: it is under the model's own name already
            target, pattern = rename_source_key(name, [], [], prefix, state)
        return str(target), pattern is not None

    return rename


def register_experts(name: str, forward: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Register `forward` under `name` in transformers' experts interface."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, forward)


def has_experts_interface(module: nn.Module) -> bool:
    """Whether a module's forward is one that transformers' experts interface can replace."""
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def use_experts(module: nn.Module, name: str) -> None:
    """Let the experts `module` run the function that is registered under `name`."""
    module.config._experts_implementation = name  # type: ignore[union-attr]  # noqa: SLF001


def eager_experts(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """What the experts module's own eager forward gives."""
    found: Tensor = type(module).forward.__wrapped__(module, *inputs)  # type: ignore[attr-defined]
    return found


@contextlib.contextmanager
def repeated_key_heads() -> Iterator[None]:
    """transformers' attention repeats shared key heads: torch's only fp32 kernel for these holds all T x T scores."""
    from transformers.integrations import sdpa_attention

    if not hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        yield
        return
    original = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_, **__: False
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = original
