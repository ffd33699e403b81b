"""`inspect`: what is in a checkpoint, from headers of true size without weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from typer.testing import CliRunner

from helpers.errors import failed_with
from helpers.fp8_sources import KINDS, Kind, as_fp8
from helpers.hub_server import COMMIT, files_of, serve
from helpers.sparse_models import FP8, Storage, Tensor, deepseek_v3, minimax_m2, write_sparse_model
from helpers.tiny_mixtures import make_mixture
from snugfit.cli.app import app
from snugfit.dialects.packed import bits_of
from snugfit.inspection.inspect import formats_for, inspect
from snugfit.model.layout import NOT_CHECKED
from snugfit.model.names import parse_name
from snugfit.records.inspection import INSPECT_SCHEMA, Inspection, Part
from snugfit.records.statistics import ExpertStatistics, InputStatistics, LayerStatistics
from snugfit.records.statistics_file import STATISTICS_FILE, DatasetUsed, Statistics
from snugfit.report.inspection import ranges

MakeTiny = Callable[..., Path]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}
WEIGHTS = sum(out_features * in_features for out_features, in_features in LINEARS.values())
ENDS = 2 * 1000 * 256 + 256 + 3 * 2 * 256  # embeddings, head and norms
Pack = Callable[[str, int, int], Iterator[Tensor]]


def llama(pack: Pack, linears: Mapping[str, tuple[int, int]] = LINEARS, layers: int = 3) -> Iterator[Tensor]:
    """A llama of 3 layers whose linears are stored as `pack` says."""
    yield "model.embed_tokens.weight", "BF16", (1000, 256)
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", "BF16", (256,)
        for leaf, (out_features, in_features) in linears.items():
            yield from pack(f"model.layers.{layer}.{leaf}", out_features, in_features)
    yield "model.norm.weight", "BF16", (256,)
    yield "lm_head.weight", "BF16", (1000, 256)


def bf16(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "BF16", (out_features, in_features)


def inspect_files(directory: Path, config: dict[str, Any], tensors: Iterator[Tensor]) -> Inspection:
    return inspect(write_sparse_model(directory, config, tensors))


def parts_of(found: Inspection) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for part in found.parts:
        parts.setdefault(part.part, []).append(part)
    return parts


# --- models of true size

MEASURED = """
import sys
sys.path.append(sys.argv.pop())
from helpers.work import count_calls
from snugfit.cli.app import app
calls = count_calls(lambda: app(standalone_mode=False))[1]
heavy = sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, calls, *heavy, file=sys.stderr)
"""
# weights, those of a token, those of multi-token prediction, tensors in FP8
SIZES = {
    "minimax": (228_689_764_864, 10_415_956_480, 0, 96_103),
    "deepseek": (671_026_419_200, 36_625_618_432, 13_463_426_304, 91_991),
}


def inspect_with_bounds(directory: Path, name: str, storage: Storage) -> Inspection:
    """What `inspect --json` prints of a giant in millions of calls (seconds), under 1 GB and without torch."""
    write = minimax_m2 if name == "minimax" else deepseek_v3
    model = write(directory, storage)
    command = [sys.executable, "-c", MEASURED, "inspect", str(model), "--json", str(Path(__file__).parents[1])]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, calls, *heavy = run.stderr.split()
    assert heavy == []
    assert int(peak) < 1_000_000  # kB
    assert int(calls) < 25_000_000  # 21 million; quadratic in 96 thousand tensors it would be billions
    record = json.loads(run.stdout)
    assert record["schema"] == INSPECT_SCHEMA
    parameters, active, predicted, tensors = SIZES[name]
    assert record["parameters"] == parameters
    assert record["active_parameters"] == active
    assert record["prediction_parameters"] == predicted
    assert storage == "bf16" or record["tensors"] == tensors
    assert record["problems"] == []
    found: Inspection = TypeAdapter(Inspection).validate_json(run.stdout)
    return found


def test_minimax(tmp_path: Path) -> None:
    """Of MiniMax-M2.1 the table separates what quantizers give different formats: attention, experts, the rest."""
    found = inspect_with_bounds(tmp_path, "minimax", "fp8")
    parts = parts_of(found)
    assert [(p.names, p.shape, p.weights) for p in parts["attention"]] == [
        (("q_proj",), (6144, 3072), 62),
        (("k_proj", "v_proj"), (1024, 3072), 124),
        (("o_proj",), (3072, 6144), 62),
    ]
    assert [(p.names, p.shape, p.weights) for p in parts["experts"]] == [
        (("w1", "w3"), (1536, 3072), 31744),
        (("w2",), (3072, 1536), 15872),
    ]
    assert {p.stored for p in (*parts["attention"], *parts["experts"])} == {("fp8-block",)}
    assert all("nvfp4" in p.can_be and not p.stays for p in (*parts["attention"], *parts["experts"]))
    assert parts["router"][0].stays
    a = found.architecture
    assert (a.layers, a.heads, a.kv_heads, a.head_dim, a.experts, a.active_experts) == (62, 48, 8, 128, 256, 8)
    assert (a.context, a.vocabulary, a.tied_embeddings) == (196608, 200064, False)
    assert [(run.layers, run.what) for run in found.layers] == [(tuple(range(62)), "attention + 256 experts")]
    assert {group.members: group.complete for group in found.fused} == {
        ("q_proj", "k_proj", "v_proj"): 62,
        ("w1", "w3"): 62 * 256,
    }
    assert found.bytes == sum(part.bytes for part in found.parts)
    assert found.quantization is not None
    assert found.quantization.method == "fp8"
    assert found.quantization.settings["weight_block_size"] == [128, 128]


def test_deepseek(tmp_path: Path) -> None:
    """Of DeepSeek-V3 dense layers, experts, shared experts and the layer of multi-token prediction are separate."""
    found = inspect_with_bounds(tmp_path, "deepseek", "fp8")
    assert [(run.layers, run.what) for run in found.layers] == [
        ((0, 1, 2), "latent attention (MLA) + dense MLP"),
        (tuple(range(3, 61)), "latent attention (MLA) + 256 experts + shared experts"),
    ]
    parts = parts_of(found)
    assert sum(p.parameters for p in parts["multi-token prediction"]) == 13_463_426_304
    assert sum(p.weights for p in parts["shared experts"]) == 58 * 3
    assert [p.names for p in parts["attention"]] == [
        ("q_a_proj",),
        ("q_b_proj",),
        ("kv_a_proj_with_mqa",),
        ("kv_b_proj",),
        ("o_proj",),
    ]
    assert (found.architecture.latent, found.architecture.kv_heads, found.architecture.shared_experts) == (576, None, 1)
    groups = {group.members: group for group in found.fused}
    assert groups["q_a_proj", "kv_a_proj_with_mqa"].complete == 61
    # 576 rows are no blocks of 128, and what one member cannot be the other must not
    assert groups["q_a_proj", "kv_a_proj_with_mqa"].cannot_be == tuple(formats_for((576, 7168))[1])
    assert groups["gate_proj", "up_proj"].cannot_be == ()
    assert not any(group.incomplete or group.mixed for group in found.fused)


# --- how weights are stored


def gptq(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.qweight", "I32", (in_features // 8, out_features)
    yield f"{module}.qzeros", "I32", (in_features // 128, out_features // 8)
    yield f"{module}.scales", "F16", (in_features // 128, out_features)
    yield f"{module}.g_idx", "I32", (in_features,)


def gptq_without_order(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield from list(gptq(module, out_features, in_features))[:-1]


def awq(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.qweight", "I32", (in_features, out_features // 8)
    yield f"{module}.qzeros", "I32", (in_features // 128, out_features // 8)
    yield f"{module}.scales", "F16", (in_features // 128, out_features)


def bnb4(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "U8", (out_features * in_features // 2, 1)
    yield f"{module}.weight.absmax", "U8", (out_features * in_features // 64,)
    yield f"{module}.weight.quant_map", "F32", (16,)
    yield f"{module}.weight.nested_absmax", "F32", (out_features * in_features // 64 // 256,)
    yield f"{module}.weight.nested_quant_map", "F32", (256,)
    yield f"{module}.weight.quant_state.bitsandbytes__nf4", "U8", (90,)


def bnb8(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "I8", (out_features, in_features)
    yield f"{module}.SCB", "F32", (out_features,)
    yield f"{module}.weight_format", "U8", ()


def fp8(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "F8_E4M3", (out_features, in_features)
    yield f"{module}.weight_scale_inv", "F32", (-(-out_features // 128), -(-in_features // 128))


def nvfp4(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight_packed", "U8", (out_features, in_features // 2)
    yield f"{module}.weight_scale", "F8_E4M3", (out_features, in_features // 16)
    yield f"{module}.weight_global_scale", "F32", (1,)
    yield f"{module}.input_global_scale", "F32", (1,)


def int4(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight_packed", "I32", (out_features, in_features // 8)
    yield f"{module}.weight_scale", "BF16", (out_features, in_features // 128)
    yield f"{module}.weight_shape", "I64", (2,)


def int8_packed(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight_packed", "I32", (out_features, in_features // 4)
    yield f"{module}.weight_scale", "BF16", (out_features, 1)
    yield f"{module}.weight_shape", "I64", (2,)


def modelopt(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "U8", (out_features, in_features // 2)
    yield f"{module}.weight_scale", "F8_E4M3", (out_features, in_features // 16)
    yield f"{module}.weight_scale_2", "F32", ()
    yield f"{module}.input_scale", "F32", ()
    if module.endswith(("k_proj", "v_proj")):
        yield f"{module}.{module[-6]}_scale", "F32", ()


def mlx(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "U32", (out_features, in_features // 8)
    yield f"{module}.scales", "BF16", (out_features, in_features // 64)
    yield f"{module}.biases", "BF16", (out_features, in_features // 64)


def hqq(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.W_q", "U8", (out_features * in_features // 2,)
    yield f"{module}.scale", "BF16", (out_features * in_features // 64, 1)
    yield f"{module}.zero", "BF16", (1,)


def quanto(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
    yield f"{module}.weight._data", "I8", (out_features, in_features)
    yield f"{module}.weight._scale", "BF16", (out_features, 1)
    yield f"{module}.input_scale", "BF16", ()


def group(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
# name -> how linears are stored, the config's part on it, the label, KV cache, whether we read it
STORED: dict[str, tuple[Pack, dict[str, Any], str, str | None, bool]] = {
    "16-bit": (bf16, {}, "bf16", None, True),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq-int4-g128", None, False),
    "gptq, no order": (gptq_without_order, {"quant_method": "gptq", "bits": 4}, "gptq-int4-g128", None, False),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 128}, "awq-int4-g128", None, False),
    "bnb 4-bit": (bnb4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb-nf4", None, False),
    "bnb 8-bit": (bnb8, {"load_in_8bit": True}, "bnb-int8", None, False),
    "fp8": (fp8, dict(FP8), "fp8-block", None, True),
    "nvfp4": (
        nvfp4,
        COMPRESSED | {"config_groups": {"g": group(**FLOAT4) | {"input_activations": FLOAT4 | {"dynamic": "local"}}}},
        "nvfp4",
        None,
        True,
    ),
    "int4": (int4, COMPRESSED | {"config_groups": {"g": group(**INT4)}}, "int4-g128", None, True),
    "int8": (int8_packed, COMPRESSED | {"config_groups": {"g": group(**INT8)}}, "int8-channel", None, True),
    "modelopt": (
        modelopt,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "ignore": ["lm_head"]},
        "nvfp4",
        "fp8",
        True,
    ),
    "mlx": (mlx, {"bits": 4, "group_size": 64}, "mlx-int4", None, False),
    "hqq": (hqq, {"quant_method": "hqq", "weight_bits": 4}, "hqq-4bit", None, False),
    "quanto": (quanto, {"quant_method": "quanto", "weights": "int8"}, "quanto-8bit", None, False),
}


@pytest.mark.parametrize("name", STORED)
def test_weights_are_counted_unpacked_whoever_packed_them(name: str, tmp_path: Path) -> None:
    """Of every known way to store a llama, weights, format, KV cache and method are found; scales are not weights."""
    pack, quantization, label, cache, read = STORED[name]
    key = "quantization" if name == "mlx" else "quantization_config"
    found = inspect_files(tmp_path, LLAMA | ({key: quantization} if quantization else {}), llama(pack))
    extra = 3 * 7 if name == "hqq" else 0  # its zero points are one number each here, and no name tells
    assert found.parameters - extra == 3 * WEIGHTS + ENDS
    parts = parts_of(found)
    assert sum(p.parameters for p in (*parts["attention"], *parts["mlp"])) == 3 * WEIGHTS
    assert sum(p.weights for p in (*parts["attention"], *parts["mlp"])) == 3 * 7
    assert {p.stored[0].partition("+")[0] for p in (*parts["attention"], *parts["mlp"])} == {label}
    assert found.bytes == sum(part.bytes for part in found.parts)
    assert found.layers[0].what == "attention + dense MLP"
    assert found.problems == ()
    q = found.quantization
    if not quantization:
        assert q is None
        return
    assert q is not None
    assert q.method == quantization.get("quant_method", "bitsandbytes" if "8" in name else "mlx")
    assert q.kv_cache == cache
    assert ((q.refused == ""), q.has_reader) == (read, read)
    could = bool(parts["mlp"][0].can_be)
    assert could is read
    assert could or parts["mlp"][0].stays == f"{parts['mlp'][0].stored[0]} already"
    assert {group.members: group.complete for group in found.fused} == {
        ("q_proj", "k_proj", "v_proj"): 3,
        ("gate_proj", "up_proj"): 3,
    }


def test_a_mix_of_formats(tmp_path: Path) -> None:
    """Groups of a mixed checkpoint are separate parts, and weights in 16 bits are not called quantized."""

    def mixed(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        yield from (int4 if ".mlp." in module else bf16)(module, out_features, in_features)

    groups = {"g": group(**INT4) | {"targets": ["re:.*mlp.*"]}}
    found = inspect_files(
        tmp_path, LLAMA | {"quantization_config": COMPRESSED | {"config_groups": groups}}, llama(mixed)
    )
    parts = parts_of(found)
    assert {p.stored for p in parts["mlp"]} == {("int4-g128",)}
    assert {p.stored for p in parts["attention"]} == {("bf16",)}
    assert {p.stays for p in (*parts["attention"], *parts["mlp"])} == {""}
    assert found.quantization is not None
    assert found.quantization.weights == {"int4-g128": 9, "bf16": 14}


def test_gpt_oss(tmp_path: Path) -> None:
    """Experts in 3-D blocks of MXFP4 are counted unpacked, with the remark that no engine loads them otherwise."""

    def tensors() -> Iterator[Tensor]:
        yield from llama(bf16, {leaf: shape for leaf, shape in LINEARS.items() if "attn" in leaf})
        for layer in range(3):
            mlp = f"model.layers.{layer}.mlp"
            yield f"{mlp}.router.weight", "BF16", (8, 256)
            yield f"{mlp}.router.bias", "BF16", (8,)
            for leaf, out_features in (("gate_up_proj", 512), ("down_proj", 256)):
                yield f"{mlp}.experts.{leaf}_blocks", "U8", (8, out_features, 8, 16)
                yield f"{mlp}.experts.{leaf}_scales", "U8", (8, out_features, 8)
                yield f"{mlp}.experts.{leaf}_bias", "BF16", (8, out_features)

    config = LLAMA | {"num_experts_per_tok": 2, "quantization_config": {"quant_method": "mxfp4"}}
    found = inspect_files(tmp_path, config | {"model_type": "gpt_oss"}, tensors())
    experts = parts_of(found)["experts"]
    assert [(p.names, p.shape, p.single, p.stored, p.stays) for p in experts] == [
        (("gate_up_proj",), (8, 512, 256), (256, 256), ("mxfp4",), "no tested engine loads them quantized"),
        (("down_proj",), (8, 256, 256), (256, 256), ("mxfp4",), "no tested engine loads them quantized"),
    ]
    assert "nvfp4" in parts_of(found)["attention"][0].can_be
    assert ["gpt_oss" in remark for remark in found.remarks] == [True, False]
    assert (found.architecture.experts, found.architecture.active_experts) == (8, 2)
    inside = 3 * 8 * 768 * 256
    assert sum(p.parameters for p in experts) == inside
    assert found.active_parameters == found.parameters - inside * 6 // 8 - 1000 * 256
    assert found.layers[0].what == "attention + 8 experts"


def test_linear_attention_and_shared_experts(tmp_path: Path) -> None:
    """Layers of linear attention and of full attention are separate runs, named as in config.json."""

    def tensors() -> Iterator[Tensor]:
        yield "model.embed_tokens.weight", "BF16", (1000, 256)
        for layer in range(8):
            prefix = f"model.layers.{layer}"
            if layer % 4 == 3:
                yield from bf16(f"{prefix}.self_attn.q_proj", 256, 256)
            else:
                yield from bf16(f"{prefix}.linear_attn.in_proj_qkvz", 512, 256)
                yield f"{prefix}.linear_attn.conv1d.weight", "BF16", (512, 1, 4)
                yield f"{prefix}.linear_attn.A_log", "BF16", (16,)
            yield from bf16(f"{prefix}.mlp.shared_expert.up_proj", 128, 256)
            yield from bf16(f"{prefix}.mlp.shared_expert_gate", 1, 256)
            yield from bf16(f"{prefix}.mlp.gate", 4, 256)
            for expert in range(4):
                yield from bf16(f"{prefix}.mlp.experts.{expert}.up_proj", 128, 256)
        yield from bf16("mtp.layers.0.mlp.up_proj", 128, 256)
        yield from bf16("model.visual.blocks.0.attn.qkv", 768, 256)

    config = LLAMA | {"num_hidden_layers": 8, "layer_types": [*(["linear_attention"] * 3), "full_attention"] * 2}
    found = inspect_files(tmp_path, config, tensors())
    more = "+ 4 experts + shared experts"
    assert [(run.layers, run.what) for run in found.layers] == [
        ((0, 1, 2, 4, 5, 6), f"linear attention {more}"),
        ((3, 7), f"full attention {more}"),
    ]
    parts = parts_of(found)
    assert [p.names for p in parts["linear attention"]] == [("in_proj_qkvz",), ("conv1d",)]
    assert {p.names[0] for p in parts["router"]} == {"gate", "shared_expert_gate"}
    assert sum(p.parameters for p in parts["towers"]) == 768 * 256
    assert found.prediction_parameters == 128 * 256


# --- what it could become


def test_formats_that_fit_a_shape() -> None:
    """A shape takes the formats whose blocks divide it; each other format has a reason."""
    assert formats_for((256, 256))[1] == {}
    can, cannot = formats_for((256, 96))
    assert "int4-g32" in can
    assert "nvfp4" in can
    can, cannot = formats_for((256, 72))
    assert "fp8-dynamic" in can
    assert {"nvfp4", "nvfp4a16", "int4"} <= set(cannot)
    assert "16" in cannot["nvfp4"]
    assert "72" in cannot["nvfp4"]


def test_weights_that_stay_have_a_reason(tmp_path: Path) -> None:
    """Embeddings, a tied head, norms and routers stay as they are, each for its own reason; an own head can be FP8."""
    found = parts_of(inspect_files(tmp_path / "a", LLAMA, llama(bf16)))
    assert (found["lm_head"][0].stays, found["lm_head"][0].can_be) == ("", ("fp8-dynamic",))
    assert found["embed"][0].stays == "embeddings"
    assert found["norms"][0].stays == "no matrix"
    tied = parts_of(inspect_files(tmp_path / "b", LLAMA | {"tie_word_embeddings": True}, llama(bf16)))
    assert tied["lm_head"][0].stays == "tied to the embeddings"


def test_a_fused_group_without_a_member(tmp_path: Path) -> None:
    """A layer with k_proj but no v_proj, where others have both, is named."""
    tensors = [t for t in llama(bf16) if t[0] != "model.layers.1.self_attn.v_proj.weight"]
    found = inspect_files(tmp_path, LLAMA, iter(tensors))
    groups = {group.members: group for group in found.fused}
    assert groups["q_proj", "k_proj", "v_proj"].incomplete == ("model.layers.1.self_attn",)
    assert groups["q_proj", "k_proj", "v_proj"].complete == 2


def test_an_mlp_without_a_gate_is_no_incomplete_group(tmp_path: Path) -> None:
    """Families whose MLPs have no gate have no fused group there, and no incomplete one."""
    linears = {leaf: shape for leaf, shape in LINEARS.items() if leaf != "mlp.gate_proj"}
    found = inspect_files(tmp_path, LLAMA, llama(bf16, linears))
    assert [group.members for group in found.fused] == [("q_proj", "k_proj", "v_proj")]


def test_experts_that_can_be_split(tmp_path: Path) -> None:
    """Granite's 3-D tensors are experts, and one expert's matrix decides what they could be."""
    linears = {leaf: shape for leaf, shape in LINEARS.items() if "attn" in leaf}
    mixture = "model.layers.{}.block_sparse_moe"
    experts = [(f"{mixture.format(n)}.input_linear.weight", "BF16", (8, 2 * 96, 256)) for n in range(3)]
    experts += [(f"{mixture.format(n)}.output_linear.weight", "BF16", (8, 256, 96)) for n in range(3)]
    directory = write_sparse_model(tmp_path, LLAMA | {"model_type": "granitemoe"}, [*llama(bf16, linears), *experts])
    found = inspect(directory)
    gate_up, down = sorted(parts_of(found)["experts"], key=lambda part: part.names)
    assert (gate_up.shape, gate_up.single, gate_up.stays) == ((8, 192, 256), (96, 256), "")
    assert (down.shape, down.single, "int4-g32" in down.can_be) == ((8, 256, 96), (256, 96), True)
    assert (set(gate_up.cannot_be or {}), set(down.cannot_be or {})) == ({"fp8-block"}, {"fp8-block"})
    assert found.architecture.experts == 8
    assert (found.layers[0].what, found.remarks) == ("attention + 8 experts", (NOT_CHECKED,))
    assert "any, expert by expert but fp8-block" in CliRunner().invoke(app, ["inspect", str(directory)]).stdout


def test_families_that_are_refused(tmp_path: Path) -> None:
    """Of a family whose experts run in their own way nothing can be quantized, and a remark says why."""
    found = inspect(make_mixture("llama4_text", tmp_path / "model"))
    assert {part.stays for part in found.parts if part.part in ("attention", "experts", "mlp")} == {
        "quantize refuses this model"
    }
    assert ["llama4_text" in remark for remark in found.remarks] == [True]
    assert found.problems == ()


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_sources_could_be_anything(kind: Kind, tmp_path: Path) -> None:
    """FP8 of either dialect is a source: its weights, those of experts too, can have any format."""
    source = make_mixture("qwen3_moe", tmp_path / "source", wide=True)
    found = inspect(as_fp8(source, tmp_path / "model", kind))
    parts = [part for part in found.parts if part.part in ("attention", "experts")]
    assert {part.stored[0][:3] for part in parts} == {"fp8"}
    assert all("nvfp4" in part.can_be and not part.stays for part in parts)
    assert (found.problems, found.remarks) == ((), (NOT_CHECKED,))


def test_what_is_no_source(tmp_path: Path) -> None:
    """Codes from which no recipe can start, such as groups in an order of their own, are a remark."""

    def ordered(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        yield from int4(module, out_features, in_features)
        yield f"{module}.weight_g_idx", "I32", (in_features,)

    found = inspect_files(tmp_path, LLAMA | {"quantization_config": STORED["int4"][1]}, llama(ordered))
    assert ["already quantized" in remark for remark in found.remarks] == [True]


# --- what it was calibrated on


def measured() -> Statistics:
    """Statistics of two layers of four experts."""
    experts = ExpertStatistics(
        routed=(0, 40, 90, 900),
        forced=(64, 32, 32, 0),
        gate_up_routed=(0.0, *[2.0] * 3),
        gate_up_forced=(3.0,) * 4,
        down_routed=(5.0,) * 4,
        down_forced=(4.0,) * 4,
    )
    prefix = "model.layers.{}.mlp"
    layers = {
        n: LayerStatistics(
            {
                f"{prefix.format(n)}.experts.down": InputStatistics(
                    1000, 64.0 * (n + 1), {(120 << 4): 9990, (133 << 4): 10}
                )
            },
            {f"{prefix.format(n)}.experts": experts},
        )
        for n in range(2)
    }
    datasets = (DatasetUsed("rows.jsonl", 2, 515, "ab" * 32),)
    return Statistics(
        snugfit="1.0",
        model="model",
        header_digest="cd" * 32,
        fingerprint="ef" * 32,
        datasets=datasets,
        all_experts=True,
        max_forced_tokens=64,
        recipe=None,
        recipe_digest=None,
        layers=layers,
    )


def test_calibration(tmp_path: Path) -> None:
    """Statistics beside a checkpoint are shown: coverage in a line and a table, outliers, all figures in JSON."""
    directory = write_sparse_model(tmp_path, LLAMA, llama(bf16))
    (directory / STATISTICS_FILE).write_text(measured().to_json(), encoding="utf-8")
    text = CliRunner().invoke(app, ["inspect", str(directory)]).stdout
    words = "all 4 experts of 2 layers saw >= 64 tokens (routed 0 to 900, rest forced)"
    assert f"calibrated: {words}; 2 samples of 515 tokens (rows.jsonl)\n" in text
    assert "What experts saw" in text
    assert "0 / 65 / 900" in text
    assert "mlp.experts.down" in text
    record = json.loads(CliRunner().invoke(app, ["inspect", str(directory), "--json"]).stdout)
    assert record["calibration"]["coverage"][1]["routed"] == {"least": 0, "median": 65.0, "most": 900}
    assert [outlier["amax"] for outlier in record["calibration"]["outliers"]] == [64.0, 128.0]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"schema": "x"}',
        measured().to_json().replace('"1920": 9990', '"-1": 9990'),
        measured().to_json().replace("128.0", "NaN"),
        measured().to_json().replace('"amax"', '"max"'),
    ],
    ids=["no JSON", "schema", "bins", "NaN", "keys"],
)
def test_broken_statistics_hide_nothing(text: str, tmp_path: Path) -> None:
    """Statistics that cannot be read are a remark; everything else is found."""
    directory = write_sparse_model(tmp_path, LLAMA, llama(bf16))
    (directory / STATISTICS_FILE).write_text(text, encoding="utf-8")
    found = inspect(directory)
    assert found.calibration is None
    assert [STATISTICS_FILE in remark for remark in found.remarks] == [False, True]
    assert found.parameters == 3 * WEIGHTS + ENDS
    assert STATISTICS_FILE in CliRunner().invoke(app, ["inspect", str(directory)]).stdout


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """Experts in one 3-D tensor of an unknown layout cannot be quantized as they are, and count as many experts."""
    linears = {leaf: shape for leaf, shape in LINEARS.items() if "attn" in leaf}
    experts = [(f"model.layers.{n}.mlp.experts.gate_up_proj", "BF16", (8, 512, 256)) for n in range(3)]
    found = inspect_files(tmp_path, LLAMA, iter([*llama(bf16, linears), *experts]))
    assert [(p.shape, p.stays) for p in parts_of(found)["experts"]] == [((8, 512, 256), "quantize refuses this model")]
    assert any("experts.gate_up_proj" in remark for remark in found.remarks)
    assert found.architecture.experts == 8
    assert found.active_parameters is None  # the config does not say how many a token visits


# --- contradictions


def test_fused_members_stored_differently(tmp_path: Path) -> None:
    """Query, key and value in different formats, which engines cannot load together, are a problem."""

    def mixed(module: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        yield from (fp8 if module.endswith("q_proj") else bf16)(module, out_features, in_features)

    found = inspect_files(tmp_path, LLAMA | {"quantization_config": FP8}, llama(mixed))
    assert any("self_attn and 2 more are stored differently" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("config", "pack", "named"),
    [
        ({}, nvfp4, ("q_proj", "quantization_config")),
        (
            {"quantization_config": COMPRESSED | {"config_groups": {"g": group(**INT4)}}},
            bf16,
            ("compressed-tensors", "every weight is plain"),
        ),
        ({"num_hidden_layers": 5}, bf16, ("5 layers", "model.layers.3")),
        ({"vocab_size": 2000}, bf16, ("1000", "2000")),
        (
            {"quantization_config": FP8 | {"modules_to_not_convert": ["lm_head", "gate", "model.nowhere"]}},
            fp8,
            ("model.nowhere",),
        ),
    ],
    ids=["no config", "not quantized", "layers", "vocabulary", "names"],
)
def test_config_and_tensors_that_disagree(
    config: dict[str, Any], pack: Pack, named: tuple[str, ...], tmp_path: Path
) -> None:
    """A contradiction between config.json and the tensors is a problem; everything else is found."""
    found = inspect_files(tmp_path, LLAMA | config, llama(pack))
    assert any(all(word in problem for word in named) for problem in found.problems), found.problems
    assert found.parameters == 3 * WEIGHTS + ENDS


def test_scales_of_a_cache_that_the_config_does_not_ask_for(tmp_path: Path) -> None:
    """KV cache scales in the files are found, and not counted as weights, though the config does not mention them."""
    scales = [(f"model.layers.{n}.self_attn.{x}_scale", "BF16", (1,)) for n in range(3) for x in "kv"]
    found = inspect_files(tmp_path, LLAMA | {"quantization_config": FP8}, iter([*llama(fp8), *scales]))
    assert found.quantization is not None
    assert found.quantization.kv_cache == "scales in the files, nothing in the config"
    assert found.parameters == 3 * WEIGHTS + ENDS
    assert parts_of(found)["KV cache scales"][0].weights == 6


def test_weird_checkpoints(tmp_path: Path) -> None:
    """An empty config and tensors without layers still give a table, on the screen too."""
    odd: list[Tensor] = [("a", "BF16", ()), ("b.weight", "U8", (0, 4)), ("c.qweight", "I32", (3,)), ("", "I64", (2,))]
    odd += [("d.weight_packed", "U8", ()), ("e.weight", "U8", ()), ("e.weight_scale", "F32", ())]
    directory = write_sparse_model(tmp_path, {}, odd)
    found = inspect(directory)
    assert found.tensors == 7
    assert found.layers == ()
    assert CliRunner().invoke(app, ["inspect", str(directory)]).exit_code == 0


COMPRESSED_NONSENSE: list[dict[str, Any]] = [
    {"config_groups": 3},
    {"config_groups": {"g": group(**INT4)}, "ignore": 3},
    {"sparsity_config": "x"},
]


@pytest.mark.parametrize(
    "quantization",
    [
        *([], "fp8", 7, {"quant_method": 3}, {"ignore": 3}, {"config_groups": []}, {"quant_method": "nonsense"}),
        *({"bits": "x"}, *(COMPRESSED | nonsense for nonsense in COMPRESSED_NONSENSE)),
    ],
    ids=repr,
)
def test_nonsense_in_the_quantization_config(quantization: object, tmp_path: Path) -> None:
    """With anything in place of a quantization config, inspect finds the rest."""
    directory = write_sparse_model(tmp_path, LLAMA | {"quantization_config": quantization}, llama(bf16))
    result = CliRunner().invoke(app, ["inspect", str(directory)])
    assert result.exit_code == 0, (result.stderr, repr(result.exception))
    assert "attention" in result.stdout


@pytest.mark.parametrize("value", [None, -1, 10**30, "x", [], {}, True, 1.5], ids=repr)
def test_nonsense_in_the_config(value: object, tmp_path: Path) -> None:
    """A config with absurd numbers costs no time and hides nothing of what is in the tensors."""
    found = inspect_files(tmp_path, dict.fromkeys(LLAMA, value), llama(bf16))
    assert found.parameters == 3 * WEIGHTS + ENDS
    assert found.architecture.layers == 3
    assert json.loads(found.to_json())["layers"]


# --- the command


def test_on_the_screen(tmp_path: Path) -> None:
    """The table fits a screen and names parts, formats, what they could become, and other containers of weights."""
    directory = write_sparse_model(tmp_path, LLAMA, llama(bf16))
    (directory / "consolidated.safetensors").touch()
    (directory / "model.gguf").touch()
    lines = CliRunner().invoke(app, ["inspect", str(directory)]).stdout.splitlines()
    assert len(lines) < 30
    assert all(len(line.rstrip()) <= 160 for line in lines)
    text = "\n".join(lines)
    assert "2.3M parameters" in text
    assert "3 layers; hidden 256; 4 heads, 2 KV heads of 64; vocabulary 1,000; context 4,096; bfloat16" in text
    assert "k_proj, v_proj" in text
    assert "any of: nvfp4" in text
    assert "0-2     attention + dense MLP" in text
    assert "q_proj + k_proj + v_proj x 3; gate_proj + up_proj x 3" in text
    assert "weights in other containers: consolidated.safetensors, model.gguf" in text


def test_as_json(make_tiny: MakeTiny) -> None:
    """--json prints the whole record and nothing else; counts are those of the model itself."""
    directory = make_tiny("qwen3")
    result = CliRunner().invoke(app, ["inspect", str(directory), "--json"])
    record = json.loads(result.stdout)
    assert record == json.loads(inspect(directory).to_json())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["bytes"] == sum(p.nbytes for p in model.parameters())


def test_what_we_made_says_so(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A result of `snugfit quantize` names its recipe; parameters are the source's."""
    source, out = make_tiny("llama"), tmp_path / "out"
    run = CliRunner().invoke(app, ["quantize", str(source), "-r", "fp8-dynamic", "-o", str(out), "--device", "cpu"])
    assert run.exit_code == 0, run.stderr
    found = inspect(out)
    assert found.made_by is not None
    assert found.made_by.endswith("recipe fp8-dynamic")
    assert found.parameters == inspect(source).parameters
    assert found.problems == ()
    assert "made by snugfit" in CliRunner().invoke(app, ["inspect", str(out)]).stdout


def test_of_the_hub(tmp_path: Path) -> None:
    """A Hub id is inspected for some kilobytes, with its commit, by the command as users call it."""
    directory = write_sparse_model(tmp_path / "model", LLAMA, llama(bf16), 500_000)
    with serve(files_of(directory)) as hub:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "snugfit.cli.app", "inspect", "org/name", "--json"]
        command[1:3] = ["-c", "from snugfit.cli.app import app; app()"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        read = sum(int(end) - int(begin) + 1 for begin, end in (r[6:].split("-") for r in hub.ranges()))
    record = json.loads(run.stdout)
    assert (record["model"], record["revision"]) == ("org/name", COMMIT)
    local = json.loads(inspect(directory).to_json())
    own = {"model": "", "revision": None, "record_digest": ""}  # the digest is also of these
    assert record | own == local | own
    assert read < local["bytes"] / 50


def test_bad_models_are_refused(tmp_path: Path) -> None:
    """No directory, or no config: exit code 2 and one line that says so."""
    (tmp_path / "empty").mkdir()
    for name, code in (("missing", "model-not-found"), ("empty", "config-missing")):
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
        assert failed_with(result, code, tmp_path / name)
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1


# --- small things


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0, 1, 2), "0-2"),
        ((3,), "3"),
        ((0, 1, 5), "0-1, 5"),
        (tuple(range(3, 48, 4)), "3, 7, … 47"),
        ((0, 2, 4, 6, 8, 10, 20, 21), "0, 2, … 20-21 (8 in all)"),
    ],
    ids=str,
)
def test_layer_numbers_in_short(numbers: tuple[int, ...], text: str) -> None:
    """Layers are given as ranges, and evenly spaced ones by their beginning and end."""
    assert ranges(numbers) == text


@pytest.mark.parametrize(
    ("given", "bits"),
    [
        ({"bits": 4}, 4),
        ({"w_bit": 3}, 3),
        ({"weights": "int8"}, 8),
        ({"weights": "qint4"}, 4),
        ({"bits": True}, None),
        ({}, None),
    ],
    ids=str,
)
def test_bits_of_a_config(given: dict[str, Any], bits: int | None) -> None:
    """The number of bits is found under the names that tools give it."""
    assert bits_of(given) == bits


@pytest.mark.parametrize(
    ("name", "shape", "role", "expert"),
    [
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", (4, 4), "gate", 7),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", (4, 4), "down", 7),
        ("model.layers.0.block_sparse_moe.experts.7.w3.weight", (4, 4), "up", 7),
        ("model.layers.0.mlp.experts.11.gate_proj.weight", (4, 4), "gate", 11),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 4, 4), "gate_up", None),
        ("model.layers.0.mlp.experts.down_proj", (2, 4, 4), "down", None),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", (4, 4), "up", None),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 4), "router", None),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (4, 4), "attention", None),
        ("model.layers.0.self_attn.query_key_value.weight", (4, 4), "qkv", None),
        ("model.layers.0.linear_attn.conv1d.weight", (4, 1, 4), "other", None),
        ("model.layers.0.linear_attn.in_proj_ba.weight", (4, 4), "router", None),
        ("mtp.layers.0.mlp.experts.3.up_proj.weight", (4, 4), "other", None),
        ("model.layersx.0.mlp.up_proj.weight", (4, 4), "other", None),
        ("model.layers.x.mlp.up_proj.weight", (4, 4), "other", None),
        ("transformer.wte.weight", (4, 4), "embed", None),
        ("gpt_neox.embed_in.weight", (4, 4), "embed", None),
        ("embed_out.weight", (4, 4), "lm_head", None),
    ],
)
def test_roles_and_experts_of_names(name: str, shape: tuple[int, ...], role: str, expert: int | None) -> None:
    """Experts have their number and the role of what they are, under Mixtral's names and fused in one tensor too."""
    parsed = parse_name(name, shape)
    assert (parsed.role, parsed.expert) == (role, expert)
