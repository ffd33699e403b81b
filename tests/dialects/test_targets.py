"""Targets against names: mixtures of experts, vision-language models as files, transformers and vLLM spell them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers.errors import raises
from helpers.work import count_calls
from snugfit.dialects.compressed_tensors import formats_of, quantization_config
from snugfit.dialects.targets import write_targets
from snugfit.formats.spec import TensorFormat

NV, FP8, INT4 = TensorFormat("nvfp4"), TensorFormat("fp8-dynamic"), TensorFormat("int4", 128)
ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLP = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
SIGLIP = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["mlp.fc1", "mlp.fc2"]
PIXTRAL = [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
PIXTRAL += [f"feed_forward.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
LAYERS = (0, 1, 10)


def below(prefix: str, names: Sequence[str]) -> list[str]:
    """Names below numbered members of a list, e.g. model.layers."""
    return [f"{prefix}.{number}.{name}" for number in LAYERS for name in names]


# model_type -> (text model, linears left alone) in files as published, and in vLLM
ON_DISK = {
    "gemma3": ("language_model.model.layers", below("vision_tower.vision_model.encoder.layers", SIGLIP)),
    "mistral3": (
        "language_model.model.layers",
        [
            *below("vision_tower.transformer.layers", PIXTRAL),
            "multi_modal_projector.linear_1",
            "multi_modal_projector.patch_merger.merging_layer",
            "language_model.lm_head",
        ],
    ),
    "qwen2_5_vl": (
        "model.layers",
        [*below("visual.blocks", ["attn.qkv", "attn.proj", *MLP]), "visual.merger.mlp.0", "lm_head"],
    ),
    "qwen3_vl": (
        "model.language_model.layers",
        [
            *below("model.visual.blocks", ["attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"]),
            "model.visual.deepstack_merger_list.0.linear_fc1",
            "model.visual.merger.linear_fc1",
            "lm_head",
        ],
    ),
    "llava": (
        "language_model.model.layers",
        [
            *below("vision_tower.vision_model.encoder.layers", SIGLIP),
            "multi_modal_projector.linear_1",
            "language_model.lm_head",
        ],
    ),
}
IN_VLLM = {
    "gemma3": ("language_model.model.layers", below("vision_tower.vision_model.encoder.layers", SIGLIP)),
    "mistral3": (
        "language_model.model.layers",
        [*below("vision_tower.transformer.layers", [*PIXTRAL, *ATTENTION]), "multi_modal_projector.linear_1"],
    ),
    "qwen2_5_vl": ("language_model.model.layers", below("visual.blocks", ["attn.qkv", "attn.proj", *MLP, *ATTENTION])),
    "qwen3_vl": ("language_model.model.layers", below("visual.blocks", ["attn.qkv", "mlp.linear_fc1"])),
    "llava": ("language_model.model.layers", below("vision_tower.vision_model.encoder.layers", SIGLIP)),
}


def groups_of(config: Mapping[str, Any], module: str) -> list[str]:
    """Names of the groups with a target that matches, as engines match: re.match, or the whole name."""
    return [
        name
        for name, group in config["config_groups"].items()
        if any(re.match(t[3:], module) if t.startswith("re:") else t == module for t in group["targets"])
    ]


def in_transformers(kind: str) -> list[str]:
    """Every nn.Linear of a small model of that family."""
    config = AutoConfig.for_model(kind)
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    few = {"num_hidden_layers": 2, "depth": 2, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]}
    for name, value in few.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def vision_language(kind: str, mlp: TensorFormat, attention: TensorFormat) -> dict[str, Any]:
    """The config of a file of that family whose text model is quantized in two formats."""
    decoder, kept = ON_DISK[kind]
    formats = dict.fromkeys(below(decoder, MLP), mlp) | dict.fromkeys(below(decoder, ATTENTION), attention)
    return quantization_config(formats, kept)


@pytest.mark.parametrize("kind", ON_DISK)
def test_the_text_model_is_found_under_every_name(kind: str) -> None:
    """Patterns match the decoder's linears as the file, transformers and vLLM call them, one group each."""
    config = vision_language(kind, NV, FP8)
    roots = [ON_DISK[kind][0], IN_VLLM[kind][0], "model.language_model.layers"]
    for root in roots:
        assert [groups_of(config, name) for name in below(root, MLP)] == [["group_0"]] * 9
        assert [groups_of(config, name) for name in below(root, ATTENTION)] == [["group_1"]] * 12
    patterns = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert all(target.startswith("re:") for target in patterns)
    assert len(patterns) == 2


@pytest.mark.parametrize("kind", ON_DISK)
def test_towers_are_found_under_no_name(kind: str) -> None:
    """No pattern matches a linear of a tower, a projector or a head, as the file, transformers and vLLM call them."""
    config = vision_language(kind, NV, FP8)
    linears = in_transformers(kind)
    text = [name for name in linears if name.startswith("model.language_model.layers.")]
    others = [name for name in linears if name not in text]
    assert len(text) == 14
    assert len(others) > 5
    assert all(groups_of(config, name) for name in text)
    for name in [*ON_DISK[kind][1], *IN_VLLM[kind][1], *others]:
        assert groups_of(config, name) == [], name


def test_one_format_for_all_spares_towers_too() -> None:
    """With one format in the whole text model, SigLIP's q_proj, whose ending is the text model's, stays out."""
    config = vision_language("gemma3", NV, NV)
    (group,) = config["config_groups"].values()
    assert group["targets"] == [
        r"re:(?!(.*\.)?vision\w*\.)(.*\.)?layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)$",
        r"re:(?!(.*\.)?vision\w*\.)(.*\.)?layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)$",
    ]


def test_layers_of_towers_do_not_count() -> None:
    """Formats by layer count the layers of the text model alone, not those of a tower."""
    decoder, kept = ON_DISK["gemma3"]
    formats = {f"{decoder}.{layer}.{name}": (NV, FP8)[layer > 0] for layer in LAYERS for name in ATTENTION}
    config = quantization_config(formats, kept)
    for layer in LAYERS:
        assert groups_of(config, f"model.language_model.layers.{layer}.self_attn.q_proj") == [f"group_{int(layer > 0)}"]
    assert groups_of(config, "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj") == []


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ("mtp.layers.0", "mtp"),
        ("model.mtp.layers.0", "mtp"),
        ("audio_tower.layers.0", r"audio\w*"),
        ("model.audio_encoder.layers.0", r"audio\w*"),
        ("talker.model.layers.0", "talker"),
        ("model.visual.encoder.layers.0", r"visual\w*"),
    ],
)
def test_other_stacks_of_layers_are_refused_by_name(other: str, word: str) -> None:
    """Draft heads, audio towers and second decoders, which are left alone, are named in what patterns refuse."""
    formats = dict.fromkeys(below("model.layers", MLP), NV)
    found = write_targets(formats, [f"{other}.{name}" for name in MLP] + ["lm_head"])
    assert found == {NV: [rf"re:(?!(.*\.)?{word}\.)(.*\.)?layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)$"]}


def test_a_plain_decoder_refuses_nothing() -> None:
    """Without towers patterns are as short as they can be, also where layers beyond the last are left alone."""
    formats = dict.fromkeys(below("model.layers", MLP), NV)
    plain = r"re:(.*\.)?layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)$"
    assert write_targets(formats, ["lm_head"]) == {NV: [plain]}
    assert write_targets(formats, ["lm_head", "model.layers.61.mlp.gate", "model.altup.0.proj"]) == {NV: [plain]}
    beyond = write_targets(formats, [f"model.layers.61.{name}" for name in MLP])
    assert beyond == {NV: [r"re:(.*\.)?layers\.(0|1|10)\.mlp\.(gate_proj|up_proj|down_proj)$"]}


def test_a_text_model_with_a_towers_word_in_its_name_is_matched() -> None:
    """What is refused is never a part of a quantized module's own name."""
    formats = dict.fromkeys(below("vision_text.layers", MLP), NV)
    kept = below("vision_tower.layers", MLP)
    config = quantization_config(formats, kept)
    assert all(groups_of(config, name) == ["group_0"] for name in formats)
    assert not any(groups_of(config, name) for name in kept)


# Mixtures of experts.


def mixture(layers: int, experts: int, leaves: Sequence[str], parent: str = "mlp") -> dict[str, list[str]]:
    """Names of attention, routers, shared and routed experts of a mixture."""
    found: dict[str, list[str]] = {"attention": [], "router": [], "experts": []}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found["attention"] += [f"{prefix}.{name}" for name in ATTENTION]
        found["router"].append(f"{prefix}.{parent}.gate")
        found["experts"] += [f"{prefix}.{parent}.experts.{n}.{leaf}" for n in range(experts) for leaf in leaves]
    return found


def test_experts_take_one_pattern() -> None:
    """All experts of all layers are one pattern that ends in projections: it spares what stands beside them."""
    names = mixture(3, 5, ("gate_proj", "up_proj", "down_proj"))
    formats = dict.fromkeys(names["experts"], NV) | dict.fromkeys(names["attention"], FP8)
    config = quantization_config(formats, names["router"])
    experts = config["config_groups"]["group_0"]["targets"]
    assert experts == [r"re:(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"]
    for beside in ("experts.act_fn", "experts", "experts.0", "gate", "shared_expert.up_proj", "experts.0.up_proj.lora"):
        assert groups_of(config, f"model.layers.1.mlp.{beside}") == []
    assert groups_of(config, "model.layers.1.mlp.experts.255.down_proj") == ["group_0"]


@pytest.mark.parametrize("leaves", [("w1", "w2", "w3"), ("up_proj", "down_proj")])
def test_engines_find_experts_under_the_names_they_ask_for(leaves: Sequence[str]) -> None:
    """vLLM 0.24 asks for gate_proj, up_proj and down_proj of expert 0, whatever a family calls them."""
    names = mixture(2, 4, leaves, "block_sparse_moe")
    config = quantization_config(dict.fromkeys(names["experts"], NV), [*names["router"], *names["attention"]])
    for asked in (*leaves, "gate_proj", "up_proj", "down_proj"):
        assert groups_of(config, f"model.layers.1.block_sparse_moe.experts.0.{asked}") == ["group_0"]
    assert formats_of(config, names["experts"], {}, where="config.json") == dict.fromkeys(names["experts"], NV)


def test_a_format_by_layer_has_patterns_by_layer() -> None:
    """Experts of some layers in another format, and of some left alone, are separated by the layers' numbers."""
    names = mixture(12, 3, ("w1", "w2", "w3"))
    of_layer = {0: NV, 1: FP8, 11: None}
    found = {name: of_layer.get(int(name.split(".")[2]), NV) for name in names["experts"]}
    formats = {name: fmt for name, fmt in found.items() if fmt}
    kept = [name for name, fmt in found.items() if not fmt]
    config = quantization_config(formats, kept)
    assert [len(group["targets"]) for group in config["config_groups"].values()] == [1, 1]
    assert {name: groups_of(config, name) for name in formats} == {
        name: [f"group_{int(fmt == FP8)}"] for name, fmt in formats.items()
    }
    assert not any(groups_of(config, name) for name in kept)
    assert groups_of(config, "model.layers.1.mlp.experts.0.gate_proj") == ["group_1"]


def test_experts_of_two_formats_in_one_layer_are_named() -> None:
    """Modules that no pattern can separate have their own names as targets, and nothing matches twice."""
    names = mixture(2, 3, ("gate_proj", "up_proj", "down_proj"))
    formats = {name: INT4 if ".experts.1." in name else NV for name in names["experts"]}
    config = quantization_config(formats, names["router"])
    assert {name: groups_of(config, name) for name in formats} == {
        name: [f"group_{int(fmt == INT4)}"] for name, fmt in formats.items()
    }


def test_a_state_space_beside_attention_has_one_format_in_all_layers() -> None:
    """vLLM looks up Falcon-H1's mamba as 3.mixer.in_proj whatever the layer, so a format by layer is refused."""
    names = [f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q_proj", "mamba.in_proj")]
    (targets,) = write_targets(dict.fromkeys(names, FP8), []).values()
    for name in (
        "layers.1.q_proj",
        "model.layers.1.self_attn.q_proj",
        "3.mixer.in_proj",
        "model.layers.1.mamba.in_proj",
    ):
        assert any(re.match(target[3:], name) for target in targets), name
    by_layer = dict.fromkeys(names, FP8) | {"model.layers.1.mamba.in_proj": NV}
    with raises("format-unverified", "model.layers.0.mamba.in_proj"):
        write_targets(by_layer, [])
    with raises("format-unverified", "model.layers.0.mamba.in_proj"):
        write_targets(dict.fromkeys(names[:3], FP8), names[3:])
    attention = dict.fromkeys(names, FP8) | {"model.layers.1.self_attn.q_proj": NV}
    assert len(write_targets(attention, [])[NV]) == 1


def write_and_read_targets(layers: int) -> None:
    """Write the targets of a mixture of 256 experts a layer, and read them again."""
    names = mixture(layers, 256, ("gate_proj", "up_proj", "down_proj"))
    formats = dict.fromkeys(names["experts"], NV) | dict.fromkeys(names["attention"], FP8)
    config = quantization_config(formats, names["router"])
    assert formats_of(config, [*formats, *names["router"]], {}, where="config.json") == formats
    assert sum(len(group["targets"]) for group in config["config_groups"].values()) == 2


def test_work_grows_with_the_number_of_experts() -> None:
    """Twice as many layers (61: 47 thousand linears, as in DeepSeek-V3) are twice the work, not four times."""
    few, many = (count_calls(partial(write_and_read_targets, layers))[1] for layers in (30, 61))
    assert many < 3 * few
