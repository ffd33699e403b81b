"""Which modules keep keys and values, where engines look for the scales of an FP8 cache.

vLLM reads `ATTENTION.k_scale` and `ATTENTION.v_scale` of a compressed-tensors file, one multiplier a layer each, or the
same under the names of other tools, and silently takes 1.0 where one is missing or under a name that it does not know.
Facts are vLLM 0.32's (model_executor/layers/quantization/base_config.py, model_loader/weight_utils.py:
maybe_remap_kv_scale_name, layers/attention).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from snugfit.errors import UserError

ATTENTION = "self_attn"  # the only parent's name for which vLLM's loader and this package read scales
_KEYS = frozenset({"k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"})
# DeepSeek's attention caches a latent: vLLM reads one scale under another name (mla_attn.mla_attn.k_scale), and keeps
# the cache in 16 bits unless the command line asks for FP8
_LATENT = frozenset({"kv_a_proj_with_mqa", "kv_b_proj"})
# siblings of k_proj or qkv_proj in a linear attention, which keeps a state of fixed size instead of keys and values
_RECURRENT = frozenset({"A_log", "conv1d", "q_conv1d", "k_conv1d", "output_gate", "dt_bias"})


# scales inside an attention that concern no keys and values: of queries, of probabilities; and zero points
_OTHER_SCALES = re.compile(
    r"(.*\.)?(q_scale|prob_scale|prob_output_scale|[qkv]_zero_point|q\.scale|q_proj\.output_scale)"
)
_OF_WEIGHTS = ("weight", "input_", "activation_", "pre_quant_")
_OF_KEYS_AND_VALUES = re.compile(r"(^|[._])(k|v|kv|qkv|qkqkv|key|value|cache)([._]|$)")
_PARENTS = frozenset({ATTENTION, "attn", "attention", "self_attention", "mixer"})


def scale_names(layer: str, which: str) -> tuple[str, ...]:
    """Names under which vLLM reads the scale of a layer's keys (`which` "k") or values ("v")."""
    below = (
        *(f"{which}_scale", f"attn.{which}_scale", f"{which}_proj.{which}_scale", f"qkv_proj.{which}_scale"),
        *(
            f"qkqkv_proj.{which}_scale",
            f"{which}_proj.output_scale",
            f"{which}_cache.scale",
            "kv_scale",
            "attn.kv_scale",
        ),
    )
    in_mixer = f"{which}_scale", f"attn.{which}_scale", f"{which}_proj.{which}_scale"  # NemotronH
    return (*(f"{layer}.{ATTENTION}.{name}" for name in below), *(f"{layer}.mixer.{name}" for name in in_mixer))


def has_scales(names: Container[str], layer: str) -> bool:
    """Whether a file has scales of both the keys and the values of a layer."""
    return all(any(name in names for name in scale_names(layer, which)) for which in "kv")


def unknown_scales(names: Iterable[str], decoder: str) -> list[str]:
    """Tensors inside the attention of decoder layers that seem to scale keys or values, under no name that is read."""
    found = []
    for name in names:
        if "scale" not in name:
            continue
        layer, _, rest = name.removeprefix(f"{decoder}.").partition(".")
        parent, _, below = rest.partition(".")
        if not name.startswith(f"{decoder}.") or not layer.isdecimal() or parent not in _PARENTS or "norm" in below:
            continue
        leaf = below.rpartition(".")[2]
        if not re.search(r"(^|_)scales?(_inv|_\d)?$", leaf) or leaf.startswith(_OF_WEIGHTS) or leaf == "scales":
            continue
        if not _OF_KEYS_AND_VALUES.search(below) or _OTHER_SCALES.fullmatch(below):
            continue
        if not any(name in scale_names(f"{decoder}.{layer}", which) for which in "kv"):
            found.append(name)
    return found


def attention_modules(layers: Iterable[Iterable[str]], config: Mapping[str, Any], *, where: str) -> list[str | None]:
    """For each decoder layer the module that keeps keys and values, None for one without, by its tensors' names.

    `layers` are the full names of each layer's tensors, `config` is the language model's config, `where` the place of
    errors. UserError where vLLM would not find a layer's scales.
    """
    if config.get("num_kv_shared_layers"):
        raise _refused("layers share keys and values, and vLLM reads them under each layer's own scale", where)
    return [_attention(names, where) for names in layers]


def _attention(names: Iterable[str], where: str) -> str | None:
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            children.setdefault(".".join(parts[:end]), set()).add(parts[end])
    found = [parent for parent, inside in children.items() if inside & (_KEYS | _LATENT) and not inside & _RECURRENT]
    found = [parent for parent in found if not parent.endswith("linear_attn")]
    for parent in found:
        if children[parent] & _LATENT:
            raise _refused(f"{parent} caches a latent (MLA), whose scale vLLM looks for elsewhere", where)
        if parent.rpartition(".")[2] != ATTENTION:
            raise _refused(f"{parent} is not named {ATTENTION}, where vLLM looks for scales", where)
    if len(found) > 1:
        raise _refused(f"{found[0]} and {found[1]} are in one layer", where)
    return found[0] if found else None


def _refused(what: str, where: str) -> UserError:
    return UserError(
        f"no FP8 KV cache for this model: {what}.",
        code="format-unverified",
        where=where,
        remedy="Remove `kv_cache` from the recipe.",
    )
