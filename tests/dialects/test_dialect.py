"""Which format each linear of a checkpoint has: what wins, what is refused, and what the KV cache is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

from helpers.errors import raises
from snugfit.dialects.dialect import open_dialect
from snugfit.formats.spec import WHOLE_ROW, TensorFormat

Found = dict[str, tuple[str, tuple[int, ...]]]
# headers of a weight [16, 128] by what follows the module's name
STORED: dict[str, Found] = {
    "W8A16": {
        "weight_packed": ("I32", (16, 32)),
        "weight_scale": ("BF16", (16, 1)),
        "weight_shape": ("I64", (2,)),
    },
    "W4A16": {
        "weight_packed": ("I32", (16, 16)),
        "weight_scale": ("BF16", (16, 1)),
        "weight_shape": ("I64", (2,)),
    },
    "FP8_DYNAMIC": {"weight": ("F8_E4M3", (16, 128)), "weight_scale": ("BF16", (16, 1))},
    "W8A8 static": {"weight": ("I8", (16, 128)), "weight_scale": ("F32", (16, 1)), "input_scale": ("F32", (1,))},
}


def args(kind: str, bits: int, strategy: str, **more: Any) -> QuantizationArgs:
    return QuantizationArgs(type=kind, num_bits=bits, strategy=strategy, **more)


def scheme(**given: QuantizationArgs | None) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], **given)


TOKEN_FP8 = args("float", 8, "token", dynamic=True)
CHANNEL = args("float", 8, "channel")
FP4 = args("float", 4, "tensor_group", group_size=16)


def config_of(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    numbered = {f"group_{number}": group for number, group in enumerate(groups)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": numbered} | more}


def group_of(name: str, *targets: str) -> dict[str, Any]:
    """A config group of a preset as the library dumps it, null keys and all."""
    dumped: dict[str, Any] = json.loads(preset_name_to_scheme(name, list(targets)).model_dump_json())
    null = {"actorder": None, "block_structure": None, "observer": None, "zp_dtype": None, "scale_dtype": None}
    dumped["weights"] = null | dumped["weights"]
    return dumped | {"output_activations": None}


def stored_as(name: str, *modules: str) -> Found:
    return {f"{module}.{suffix}": header for module in modules for suffix, header in STORED[name].items()}


UP, DOWN, Q, HEAD = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.q_proj", "lm_head"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_name_wins_over_a_pattern_and_a_pattern_over_a_class(*, reverse: bool) -> None:
    """Where several groups target a module the most specific one decides, in whatever order they stand."""
    groups = [
        group_of("W8A16", "Linear"),
        group_of("W4A16", "re:.*mlp.*"),
        group_of("FP8_DYNAMIC", UP),
    ]
    config = config_of(*(groups[::-1] if reverse else groups), ignore=["lm_head"], format="mixed-precision")
    tensors = stored_as("W8A16", Q) | stored_as("W4A16", DOWN) | stored_as("FP8_DYNAMIC", UP)
    tensors["lm_head.weight"] = ("BF16", (32, 128))
    assert open_dialect(config).read_formats([UP, DOWN, Q, HEAD], tensors) == {
        UP: TensorFormat("fp8-dynamic"),
        DOWN: TensorFormat("int4", 128),
        Q: TensorFormat("int8", 128),
    }


def test_patterns_are_anchored_at_the_start_alone() -> None:
    """`re:` targets match from the start of a name and may end before it does; ignore has patterns too."""
    config = config_of(group_of("W8A16", r"re:model\.layers"), ignore=[r"re:.*layers\.1\."])
    tensors = stored_as("W8A16", UP, Q) | {f"{DOWN}.weight": ("BF16", (16, 128))}
    assert set(open_dialect(config).read_formats([UP, DOWN, Q], tensors)) == {UP, Q}


def test_a_quantized_head_is_read() -> None:
    """A module outside the decoder layers is returned like any other; one tied to the embeddings is not in the file."""
    config = config_of(group_of("W8A16", "Linear"), ignore=[])
    assert open_dialect(config).read_formats([UP, HEAD], stored_as("W8A16", UP, HEAD)) == {
        UP: TensorFormat("int8", 128),
        HEAD: TensorFormat("int8", 128),
    }
    assert open_dialect(config).read_formats([UP, HEAD], stored_as("W8A16", UP)) == {UP: TensorFormat("int8", 128)}


def test_groups_that_target_attention_are_not_looked_at() -> None:
    """A group of attention modules, which goes with the KV cache, is no hindrance: no linear is in it."""
    attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8, "type": "float"}}
    config = config_of(attention, group_of("W8A16", "Linear"))
    assert open_dialect(config).read_formats([UP], stored_as("W8A16", UP)) == {UP: TensorFormat("int8", 128)}


def test_what_is_left_out_of_arguments_is_what_the_library_assumes() -> None:
    """Integers of 8 bits, symmetric and static, with the strategy that the group size implies."""
    bare = {"targets": ["Linear"], "weights": {"group_size": 128}}
    assert open_dialect(config_of(bare)).read_formats([UP], stored_as("W8A16", UP)) == {UP: TensorFormat("int8", 128)}
    channel = {"targets": ["Linear"], "weights": {"group_size": -1}, "input_activations": {"group_size": None}}
    expected = TensorFormat("int8", WHOLE_ROW, inputs="int8-tensor")
    tensors = stored_as("W8A8 static", UP)
    assert open_dialect(config_of(channel)).read_formats([UP], tensors) == {UP: expected}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}}, "sparse-24-bitmask"),
        ({"format": "marlin-24"}, "marlin-24"),
        (
            {
                "transform_config": {
                    "config_groups": {"R3": {"apply": [{"location": "q_attn"}, {"location": "k_cache"}]}}
                }
            },
            "R3",
        ),
        ({"config_groups": {"W8A8": ["Linear"]}}, "presets"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
    ],
)
def test_whole_files_without_a_reader_are_refused(change: dict[str, Any], named: str) -> None:
    """Sparse layouts, rotations at run time and other methods end in an error with the name, the place and a remedy."""
    config = config_of(group_of("W8A16", "Linear"))
    config["quantization_config"] |= change
    with raises("quantization-unknown") as caught:
        open_dialect(config, where="here/config.json").read_formats([UP], stored_as("W8A16", UP))
    assert named in caught.value.what
    assert caught.value.where == "here/config.json: quantization_config"
    assert caught.value.remedy


def test_a_target_that_is_no_pattern_is_refused() -> None:
    """A broken regular expression among the targets ends in an error with its text."""
    config = config_of(group_of("W8A16", "Linear"), ignore=["re:("])
    with raises("pattern-invalid", "config.json: quantization_config") as caught:
        open_dialect(config).read_formats([UP], stored_as("W8A16", UP))
    assert "re:(" in caught.value.what


def test_rotations_that_are_in_the_weights_are_no_hindrance() -> None:
    """A transform whose every place is a weight has been carried out already; empty configs say nothing."""
    offline = {"config_groups": {"R1": {"apply": [{"location": "weight_input"}, {"location": "weight_output"}]}}}
    cases: list[dict[str, Any]] = [{"transform_config": offline}, {"transform_config": {}, "sparsity_config": {}}]
    for more in cases:
        config = config_of(group_of("W8A16", "Linear"), **more)
        assert open_dialect(config).read_formats([UP], stored_as("W8A16", UP))


@pytest.mark.parametrize(
    "made",
    [
        preset_name_to_scheme("MXFP8", ["Linear"]),
        preset_name_to_scheme("MXFP6A16", ["Linear"]),
        preset_name_to_scheme("W3A16", ["Linear"]),
        preset_name_to_scheme("W4A4", ["Linear"]),
        scheme(weights=FP4, input_activations=TOKEN_FP8),
        scheme(weights=CHANNEL, input_activations=args("float", 8, "group", group_size=64, dynamic=True)),
        scheme(weights=args("float", 4, "tensor_group", group_size=32)),
        scheme(weights=CHANNEL, output_activations=args("int", 8, "tensor")),
        scheme(input_activations=TOKEN_FP8),
    ],
)
def test_schemes_without_a_reader_are_refused(made: QuantizationScheme) -> None:
    """A scheme that is not emulated ends in an error that says so, where a module has it."""
    config = config_of(json.loads(made.model_dump_json()))
    with raises("quantization-unknown", "config.json: quantization_config"):
        open_dialect(config).read_formats([UP], stored_as("W8A16", UP))
    assert open_dialect(config).read_formats([], {}) == {}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({f"{UP}.weight": ("BF16", (16, 128))}, f"{UP}.weight is BF16"),
        ({f"{UP}.weight_packed": ("U8", (16, 64)), f"{UP}.weight_scale": ("F8_E4M3", (16, 8))}, f"{UP}.weight_shape"),
        (stored_as("W8A16", UP) | {f"{UP}.weight_packed": ("U8", (16, 32))}, f"{UP}.weight_packed is U8"),
        (stored_as("W8A16", UP) | stored_as("W8A16", DOWN), DOWN),
        (stored_as("W8A16", UP) | stored_as("FP8_DYNAMIC", DOWN), DOWN),
    ],
)
def test_config_and_headers_that_disagree_are_refused(tensors: Found, named: str) -> None:
    """A module quantized in the config alone, in the file alone, or otherwise than the config says, is an error."""
    config = config_of(group_of("W8A16", UP))
    with raises("quantization-invalid", "config.json: quantization_config") as caught:
        open_dialect(config).read_formats([UP, DOWN], tensors)
    assert named in caught.value.what


def test_a_quantized_file_without_a_config_is_refused() -> None:
    """Packed weights beside a config.json that says nothing are an error, 16-bit ones are no quantization."""
    with raises("quantization-invalid", "config.json"):
        open_dialect({}).read_formats([UP], stored_as("W8A16", UP))
    assert open_dialect({}).read_formats([UP], {f"{UP}.weight": ("BF16", (16, 128))}) == {}
    assert open_dialect({"quantization_config": None}).read_formats([], {}) == {}
    assert open_dialect({}).decode_all({}) == {}  # a GPU decodes all modules of a layer at once


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_the_config_is_found_in_its_three_places(place: str) -> None:
    """quantization_config stands at the top of config.json or with the text model; old files name it otherwise."""
    config = config_of(group_of("W8A16", UP))
    if place == "compression_config":
        config = {place: config["quantization_config"]}
    elif place == "text_config":
        config = {place: config}
    assert open_dialect(config).read_formats([UP], stored_as("W8A16", UP)) == {UP: TensorFormat("int8", 128)}


@pytest.mark.parametrize(
    ("scheme_of_cache", "expected"),
    [
        (None, None),
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}, "fp8"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "observer": None}, "fp8"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}, "error"),
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "error"),
        ({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}, "error"),
    ],
)
def test_the_kv_cache_is_fp8_or_none(scheme_of_cache: dict[str, Any] | None, expected: str | None) -> None:
    """kv_cache_scheme gives "fp8", one scale a layer or a head; what has no reader is refused."""
    config = config_of(group_of("W8A16", UP), kv_cache_scheme=scheme_of_cache)
    if expected == "error":
        with raises("quantization-unknown", "config.json"):
            open_dialect(config).kv_cache_format()
    else:
        assert open_dialect(config).kv_cache_format() == expected
    assert open_dialect({}).kv_cache_format() is None
