"""The quantization_config: compressed-tensors accepts it, and its targets name exactly the intended modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from compressed_tensors.utils.match import match_name
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from snugfit.dialects.compressed_tensors import FLOAT, MIXED, MXFP4, NVFP4, PACKED, formats_of, quantization_config
from snugfit.formats.spec import FORMATS, INT4_GROUPS, TensorFormat

W4A4 = TensorFormat("nvfp4")
W4A16 = TensorFormat("nvfp4a16")
W8A8 = TensorFormat("fp8-dynamic")
INT4 = tuple(
    TensorFormat("int4", group_size=group, symmetric=symmetric) for group in INT4_GROUPS for symmetric in (True, False)
)
BLOCKS = TensorFormat("fp8-block")
MX = TensorFormat("mxfp4")
EVERY_FORMAT = (W4A4, W4A16, W8A8, BLOCKS, MX, *INT4)
# what engines fuse: fused name -> members
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "w13": ("w1", "w3")}
Formats = Mapping[str, TensorFormat]

ATTENTION = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj")
MLP = ("gate_proj", "up_proj"), ("down_proj",)


def llama(layers: int) -> list[tuple[str, ...]]:
    """Groups of modules that share a format in a dense model of `layers` layers, lm_head last."""
    groups: list[tuple[str, ...]] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        groups += [tuple(prefix + name for name in names.split()) for names in ATTENTION]
        groups += [tuple(f"{prefix}mlp.{name}" for name in names) for names in MLP]
    return [*groups, ("lm_head",)]


def qwen_moe(layers: int) -> list[tuple[str, ...]]:
    """The same for a mixture of experts with a shared expert and routers, below a language_model prefix."""
    groups: list[tuple[str, ...]] = []
    for layer in range(layers):
        prefix = f"model.language_model.layers.{layer}."
        groups += [tuple(prefix + name for name in names.split()) for names in ATTENTION]
        experts = (f"{prefix}mlp.experts.{number}." for number in (0, 1, 11))
        groups.append(tuple(expert + name for expert in experts for names in MLP for name in names))
        groups += [tuple(f"{prefix}mlp.shared_expert.{name}" for name in names) for names in MLP]
        groups += [(f"{prefix}mlp.gate",), (f"{prefix}mlp.shared_expert_gate",)]
    return [*groups, ("lm_head",)]


def mixtral(layers: int) -> list[tuple[str, ...]]:
    """The same for Mixtral's own names."""
    groups: list[tuple[str, ...]] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        groups += [tuple(prefix + name for name in names.split()) for names in ATTENTION]
        experts = (f"{prefix}block_sparse_moe.experts.{number}." for number in range(3))
        groups += [tuple(expert + name for expert in experts for name in ("w1", "w2", "w3"))]
        groups += [(f"{prefix}block_sparse_moe.gate",)]
    return [*groups, ("lm_head",)]


FAMILIES = {"llama": llama, "qwen_moe": qwen_moe, "mixtral": mixtral}


@st.composite
def mixes(draw: st.DrawFn) -> tuple[dict[str, TensorFormat], list[str]]:
    """A random format (or none) for every group of a random family: (formats, names of those left alone)."""
    groups = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))](draw(st.integers(1, 13)))
    palette = draw(st.lists(st.sampled_from((None, *EVERY_FORMAT)), min_size=1, max_size=4, unique=True))
    # a choice for each of some hundred groups is more than hypothesis likes to draw
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = [palette[index] for index in generator.integers(len(palette), size=len(groups))]
    formats = {module: fmt for group, fmt in zip(groups, chosen, strict=True) if fmt for module in group}
    return formats, [module for group in groups for module in group if module not in formats]


def matched(config: Mapping[str, Any], module: str) -> list[str]:
    """Names of the groups with a target that compressed-tensors matches to a module's name."""
    groups = config["config_groups"].items()
    return [name for name, group in groups if any(match_name(module, target) for target in group["targets"])]


def intended(config: Mapping[str, Any], formats: Formats) -> dict[str, str]:
    """Module -> the group that stands for its format, by the order of first appearance."""
    order = list(dict.fromkeys(formats.values()))
    assert len(config["config_groups"]) == len(order)
    names = dict(zip(order, config["config_groups"], strict=True))
    return {module: names[fmt] for module, fmt in formats.items()}


def build(modules: Sequence[str]) -> nn.Module:
    """A model that has a linear of 128 columns under each name."""
    root = nn.Module()
    for module in modules:
        parent = root
        *path, leaf = module.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(128, 128, bias=False, device="meta"))
    return root


def scheme_of(fmt: TensorFormat) -> Any:
    """The validated scheme of a file in one format."""
    config = QuantizationConfig.model_validate(quantization_config({"model.layers.0.mlp.up_proj": fmt}, ["lm_head"]))
    return config.config_groups["group_0"]


@settings(max_examples=100, deadline=None)
@given(mixes())
@example(({"model.layers.1.mlp.up_proj": W4A4, "model.layers.11.mlp.up_proj": W8A8}, ["model.layers.111.mlp.up_proj"]))
def test_targets_match_exactly_the_intended_modules(mix: tuple[dict[str, TensorFormat], list[str]]) -> None:
    """Every quantized module matches its own group and no other, and no target needs `ignore` to spare a kept one."""
    formats, kept = mix
    config = quantization_config(formats, kept)
    groups = intended(config, formats)
    assert {module: matched(config, module) for module in formats} == {m: [g] for m, g in groups.items()}
    assert {module: matched(config, module) for module in kept} == {module: [] for module in kept}
    assert config["ignore"] == kept


def test_names_that_go_on_after_a_target_do_not_match() -> None:
    """A module whose name begins like a target's full name, as gate_proj begins like gate, is not matched by it."""
    prefix = "model.layers.0.mlp."
    formats = {f"{prefix}gate": W8A8, f"{prefix}gate_proj": W4A16}
    config = quantization_config(formats, ["lm_head"])
    assert [matched(config, module) for module in formats] == [["group_0"], ["group_1"]]
    # modules that engines make below or beside a quantized one
    assert matched(config, f"{prefix}gate_proj.lora_A") == []
    assert matched(config, f"{prefix}gate_act") == []


@settings(max_examples=60, deadline=None)
@given(mixes())
def test_reading_the_config_gives_the_formats_back(mix: tuple[dict[str, TensorFormat], list[str]]) -> None:
    """formats_of inverts quantization_config through JSON, for quantized and kept modules alike."""
    formats, kept = mix
    config = json.loads(json.dumps(quantization_config(formats, kept)))
    assert formats_of(config, [*formats, *kept], {}, where="config.json") == formats


@settings(max_examples=40, deadline=None)
@given(mixes())
def test_compressed_tensors_accepts_every_mix(mix: tuple[dict[str, TensorFormat], list[str]]) -> None:
    """The library validates the whole config, and the format names are one a group and their mixture at the top."""
    formats, kept = mix
    config = quantization_config(formats, kept)
    read = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    assert read.quant_method == "compressed-tensors"
    assert read.quantization_status.value == "compressed"
    assert read.ignore == kept
    kinds = {scheme.format for scheme in read.config_groups.values()}
    assert config["format"] == (kinds.pop() if len(kinds) == 1 else MIXED)


@settings(max_examples=40, deadline=None)
@given(mixes())
def test_fused_names_find_one_group(mix: tuple[dict[str, TensorFormat], list[str]]) -> None:
    """The name under which an engine builds a fused linear matches the one group that all its members are in."""
    formats, kept = mix
    config = quantization_config(formats, kept)
    groups = intended(config, formats)
    for fused, members in FUSED.items():
        for module in (name for name in formats if name.endswith("." + members[0])):
            name = module.removesuffix(members[0]) + fused
            found = {
                group
                for group, scheme in config["config_groups"].items()
                if any(match_name(name, target, FUSED) for target in scheme["targets"])
            }
            assert found == {groups[module]}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_side_gives_each_linear_its_scheme(family: str) -> None:
    """compressed-tensors, applied to a model of those names, gives each linear its scheme and spares the rest."""
    groups = FAMILIES[family](len(EVERY_FORMAT))
    choices = (*EVERY_FORMAT, None)
    chosen = {
        group: choices[(number * 7 + number // len(choices)) % len(choices)] for number, group in enumerate(groups)
    }
    formats = {module: fmt for group, fmt in chosen.items() if fmt for module in group}
    kept = [module for group in groups for module in group if module not in formats]
    assert set(formats.values()) == set(EVERY_FORMAT)
    assert kept
    model = build([*formats, *kept])
    config = quantization_config(formats, kept)
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    for module in kept:
        assert not hasattr(model.get_submodule(module), "quantization_scheme")
    expected = {fmt: scheme_of(fmt) for fmt in EVERY_FORMAT}
    for module, fmt in formats.items():
        scheme: Any = model.get_submodule(module).quantization_scheme
        assert (scheme.weights, scheme.input_activations) == (expected[fmt].weights, expected[fmt].input_activations)


@pytest.mark.parametrize(
    ("fmt", "preset"),
    [
        (W4A4, "NVFP4"),
        (W4A16, "NVFP4A16"),
        (W8A8, "FP8_DYNAMIC"),
        (BLOCKS, "FP8_BLOCK"),
        (MX, "MXFP4"),
        (TensorFormat("int4", group_size=128), "W4A16"),
        (TensorFormat("int4", group_size=128, symmetric=False), "W4A16_ASYM"),
    ],
)
def test_schemes_equal_the_presets_of_the_library(fmt: TensorFormat, preset: str) -> None:
    """All that engines read of a scheme is what compressed-tensors' preset of that name says."""

    def facts(scheme: Any) -> list[dict[str, Any] | None]:
        both = (scheme.weights, scheme.input_activations)
        return [args and args.model_dump(exclude={"observer", "observer_kwargs", "zp_dtype"}) for args in both]

    scheme = scheme_of(fmt)
    assert facts(scheme) == facts(preset_name_to_scheme(preset, ["Linear"]))
    assert scheme.output_activations is None


@pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=TensorFormat.label)
def test_format_names_are_those_that_the_library_infers(fmt: TensorFormat) -> None:
    """The group's `format` is the one that compressed-tensors would choose for a linear with that scheme."""
    scheme = scheme_of(fmt)
    assert scheme.format == infer_module_format(nn.Linear, scheme).value
    names = {"nvfp4": NVFP4, "nvfp4a16": NVFP4, "fp8-dynamic": FLOAT, "fp8-block": FLOAT, "mxfp4": MXFP4}
    assert scheme.format == (names | {"int4": PACKED})[fmt.name]


@pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=TensorFormat.label)
def test_unknown_keys_would_be_refused(fmt: TensorFormat) -> None:
    """The library is strict inside groups, so accepting our groups means that every key in them is known."""
    group = quantization_config({"a.layers.0.b": fmt}, [])["config_groups"]["group_0"]
    QuantizationScheme.model_validate(group)
    inner = [key for key in ("weights", "input_activations") if group[key] is not None]
    for path in ([], *([key] for key in inner)):
        broken = copy.deepcopy(group)
        place = broken
        for key in path:
            place = place[key]
        place["no_such_key"] = 1
        with pytest.raises(ValidationError, match="no_such_key"):
            QuantizationScheme.model_validate(broken)


@pytest.mark.parametrize("name", FORMATS)
def test_activations_of_the_scheme_are_those_of_the_table(name: str) -> None:
    """A format that leaves activations alone has none in its scheme; NVFP4's are local, others wholly dynamic."""
    fmt = next(fmt for fmt in EVERY_FORMAT if fmt.name == name)
    inputs = scheme_of(fmt).input_activations
    dynamic = {"none": None, "nvfp4": "local"}.get(fmt.input_kind, True)
    assert (inputs and inputs.dynamic) == dynamic
    assert fmt.spec.calibrated == (dynamic == "local")


def test_one_format_needs_no_mixture() -> None:
    """W4A4 beside W4A16 is one format on disk, FP8 beside either is a mixture with a format in every group."""
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    assert quantization_config({up: W4A4, down: W4A16}, [])["format"] == NVFP4
    mixed = quantization_config({up: W4A4, down: W8A8}, [])
    assert mixed["format"] == MIXED
    assert [group["format"] for group in mixed["config_groups"].values()] == [NVFP4, FLOAT]


def test_a_format_of_whole_layers_takes_few_patterns() -> None:
    """One rule for all layers gives one pattern a parent module, whatever the number of layers."""
    formats = {m: W4A4 for group in llama(40) for m in group if m != "lm_head"}
    (group,) = quantization_config(formats, ["lm_head"])["config_groups"].values()
    assert len(group["targets"]) == 2


@pytest.mark.parametrize(
    "modules",
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.shared_mlp.up_proj"),
        ("model.layers.0.fc1", "model.layers.0.mlp.fc1"),
        ("model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.q_proj"),
        ("model.proj", "model.layers.0.proj"),
    ],
)
def test_endings_of_other_modules_do_not_overlap(modules: tuple[str, str]) -> None:
    """Two modules in two formats match one group each, where one name's ending ends the other too."""
    formats = dict(zip(modules, (W4A16, W8A8), strict=True))
    config = quantization_config(formats, [])
    assert {module: matched(config, module) for module in modules} == {
        m: [g] for m, g in intended(config, formats).items()
    }
