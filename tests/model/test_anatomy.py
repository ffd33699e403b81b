"""The list of decoder layers, found by names alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.errors import raises
from snugfit.model.anatomy import find_decoder, is_prediction_head, is_tower
from snugfit.model.language_config import language_config, layer_count


def listed(prefix: str, count: int, *leaves: str) -> Iterator[str]:
    for number in range(count):
        for leaf in leaves or ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
            yield f"{prefix}.{number}.{leaf}"


def experts(prefix: str, count: int) -> Iterator[str]:
    for number in range(count):
        yield from (f"{prefix}.{number}.mlp.experts.{e}.up_proj.weight" for e in range(8))


# family -> (decoder, layers, {list of other things: its length})
FAMILIES: dict[str, tuple[str, int, dict[str, int]]] = {
    "llama": ("model.layers", 4, {}),
    "deepseek-v3 with its head behind": ("model.layers", 4, {"model.layers": 5}),
    "qwen3-next": ("model.layers", 4, {"mtp.layers": 1}),
    "one layer and one head": ("model.layers", 1, {"mtp.layers": 1}),
    "mimo": ("model.layers", 4, {"model.mtp_layers": 4}),
    "gemma3": ("language_model.model.layers", 4, {"vision_tower.vision_model.encoder.layers": 4}),
    "gemma3 by transformers 5": (
        "model.language_model.layers",
        4,
        {"model.vision_tower.vision_model.encoder.layers": 9},
    ),
    "gemma3n": (
        "model.language_model.layers",
        4,
        {"model.audio_tower.conformer": 4, "model.vision_tower.timm_model.blocks": 9},
    ),
    "qwen2-vl": ("model.layers", 4, {"visual.blocks": 4}),
    "qwen3-vl": ("model.language_model.layers", 4, {"model.visual.blocks": 9, "model.visual.deepstack_merger_list": 4}),
    "qwen-omni": (
        "thinker.model.layers",
        4,
        {"thinker.audio_tower.layers": 4, "talker.model.layers": 4, "code2wav.decoder": 4},
    ),
    "mllama": (
        "language_model.model.layers",
        4,
        {"vision_model.transformer.layers": 4, "vision_model.global_transformer.layers": 8},
    ),
    "llama4": ("language_model.model.layers", 4, {"vision_model.model.layers": 34}),
    "idefics3": ("model.text_model.layers", 4, {"model.vision_model.encoder.layers": 4, "model.connector.layers": 4}),
    "internvl": ("language_model.model.layers", 4, {"vision_model.encoder.layers": 24}),
    "minicpm-v": ("llm.model.layers", 4, {"vpm.encoder.layers": 4, "apm.layers": 4, "resampler.layers": 4}),
    "molmo": ("model.transformer.blocks", 4, {"model.vision_backbone.image_vit.transformer.resblocks": 23}),
    "phi-4-multimodal": ("model.layers", 4, {"model.embed_tokens_extend.image_embed.img_processor.encoder.layers": 4}),
    "granite-speech": ("language_model.model.layers", 4, {"encoder.layers": 4, "projector.qformer.encoder.layer": 4}),
    "gpt2": ("transformer.h", 4, {}),
    "gpt2 without its head": ("h", 4, {}),
    "gpt-neox": ("gpt_neox.layers", 4, {}),
    "nemotron-h": ("backbone.layers", 4, {}),
    "mpt": ("transformer.blocks", 4, {}),
    "chatglm": ("transformer.encoder.layers", 4, {}),
    "opt": ("model.decoder.layers", 4, {}),
    "whisper": ("model.decoder.layers", 4, {"model.encoder.layers": 4}),
    "t5": ("decoder.block", 4, {"encoder.block": 4}),
    "a tower alone": ("vision_tower.layers", 4, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found_by_names(family: str) -> None:
    """In every family the list of decoder layers is found, in the presence of towers and prediction heads."""
    decoder, layers, others = FAMILIES[family]
    names = [name for prefix, count in others.items() for name in listed(prefix, count)]
    names = ["embed.weight", "lm_head.weight", *names, *listed(decoder, layers)]
    assert find_decoder(names, layers) == decoder
    assert find_decoder(reversed(names), layers) == decoder


def test_experts_are_not_layers() -> None:
    """Numbers of experts within a layer are not taken for layers, even if there are more experts."""
    assert find_decoder([*experts("model.layers", 4), *experts("vision.layers", 8)], 4) == "model.layers"


def test_decoder_of_a_broken_file() -> None:
    """A file that lacks layers still has a decoder: the longest list outside towers."""
    assert find_decoder([*listed("model.layers", 3), *listed("visual.blocks", 5)], 5) == "model.layers"


def test_layers_that_cannot_be_counted() -> None:
    """An absurd number of layers costs no time."""
    assert find_decoder([*listed("model.layers", 3), *listed("visual.blocks", 5)], 10**30) == "model.layers"


def test_no_layers_at_all() -> None:
    """Names without numbers are refused."""
    with raises("config-mismatch"):
        find_decoder(["a.weight", "b.weight"], 4)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 3}, 3),
        ({"n_layer": 3}, 3),
        ({"text_config": {"num_hidden_layers": 3}, "num_hidden_layers": 9}, 3),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 3}, "audio_config": {"num_layers": 9}}}, 3),
        ({"llm_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 9}}, 3),
        ({"text_config": {}, "num_hidden_layers": 3}, 3),
        ({"text_config": None, "num_hidden_layers": "3"}, None),
        ({"num_hidden_layers": 0}, None),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": 10**30}, None),
        ({}, None),
    ],
    ids=str,
)
def test_number_of_layers_of_a_config(config: dict[str, Any], layers: int | None) -> None:
    """The number of layers is the language model's, at whatever place the config has it."""
    assert layer_count(language_config(config)) == layers


@pytest.mark.parametrize(
    ("name", "tower", "head"),
    [
        ("model.visual.blocks.0.attn.qkv", True, False),
        ("multi_modal_projector.linear_1", True, False),
        ("mtp.layers.0.mlp.up_proj", False, True),
        ("model.embed_tokens", False, False),
        ("lm_head", False, False),
        ("model.norm", False, False),
    ],
)
def test_tensors_outside_the_layers(name: str, tower: bool, head: bool) -> None:
    """Towers with their projectors, and heads of multi-token prediction, are recognised by name."""
    assert (is_tower(name), is_prediction_head(name)) == (tower, head)
