"""FP8 and MXFP4 checkpoints as released, made of tiny 16-bit ones with plain torch, and their dequantized values.

Nothing here uses snugfit: it is the oracle for what snugfit reads.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from helpers.tiny_families import all_tensors
from helpers.tiny_mixtures import rewrite

Kind = Literal[
    "hf-block",  # DeepSeek-V3, MiniMax-M2: weight_scale_inv F32 for each block of 128 x 128
    "hf-block-bf16",  # Qwen3-FP8: the same in BF16
    "hf-tensor",  # AutoFP8: weight_scale for the whole weight
    "hf-tensor-static",  # AutoFP8: and input_scale
    "hf-tensor-inv",  # Mistral: weight_scale_inv and activation_scale, BF16 without an axis
    "ct-channel",  # llm-compressor's FP8_DYNAMIC
    "ct-tensor-static",  # llm-compressor's FP8
    "ct-block",  # llm-compressor's FP8_BLOCK
]
KINDS: tuple[Kind, ...] = (
    "hf-block",
    "hf-block-bf16",
    "hf-tensor",
    "hf-tensor-static",
    "hf-tensor-inv",
    "ct-channel",
    "ct-tensor-static",
    "ct-block",
)

_LARGEST = 448.0
_BLOCK = 128
_LAYER = re.compile(r"(^|\.)(layers|blocks|h)\.\d+\.")
_TOWER = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\.")
# of the decoder layers, what releases leave in 16 bits
_KEPT_MODULES = (
    "gate",
    "router",
    "router.layer",
    "router.classifier",
    "shared_expert_gate",
    "eh_proj",
    "embed_tokens",
    "shared_head.head",
    "conv1d",
)
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up", "w1": "up", "w3": "up"}
_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "activation_scale")
_GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def as_fp8(
    source: Path,
    target: Path,
    kind: Kind,
    keep: Callable[[str], bool] | None = None,
    *,
    max_shard_size: str = "5GB",
    block: int = _BLOCK,
) -> Path:
    """Write the 16-bit checkpoint of `source` to `target` with its linears in FP8, and give `target`.

    All 2-D weights of decoder layers are quantized, experts and layers of multi-token prediction included, except for
    routers, convolutions, embeddings, and tensors for whose name `keep` is true. Experts in 3-D tensors stay in 16
    bits, as no dialect here has codes for them.
    """
    tensors = all_tensors(source)
    chosen = [name for name, tensor in tensors.items() if _is_linear(name, tensor) and not (keep and keep(name))]
    assert chosen, "nothing to quantize"
    made = {name: tensor for name, tensor in tensors.items() if name not in set(chosen)}
    for name in chosen:
        made |= _quantize(name, tensors[name], kind, block)
    kept = [name for name, tensor in made.items() if name.endswith(".weight") and tensor.dim() == 2]
    modules = sorted(name.removesuffix(".weight") for name in kept if name not in chosen and "embed" not in name)
    return _write(source, target, made, _config(kind, modules, block), max_shard_size)


def dequantized(target: Path, block: int = _BLOCK) -> dict[str, Tensor]:
    """The dequantized weights of an FP8, MXFP4 or 16-bit checkpoint, fp32, by the names of its 16-bit source."""
    tensors = all_tensors(target)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors.get(f"{module}.weight_scale", tensors.get(f"{module}.weight_scale_inv"))
            assert scale is not None, name
            found[name] = tensor.float() * _spread(scale.float(), tensor.shape, block)
        elif leaf.endswith("_blocks"):
            scales = tensors[name.removesuffix("_blocks") + "_scales"]
            found[name.removesuffix("_blocks")] = _from_mxfp4(tensor, scales)
        elif leaf not in _SCALES and not leaf.endswith("_scales"):
            found[name] = tensor.float()
    return found


def as_mxfp4(source: Path, target: Path, *, max_shard_size: str = "5GB") -> Path:
    """Write a gpt-oss checkpoint in BF16 as the release of openai/gpt-oss-20b is written, and give `target`.

    A stack of weights [E, in, out] becomes `_blocks` [E, out, in / 32, 16], two codes in a byte, the first in the low
    bits, and `_scales` [E, out, in / 32], exponents with a bias of 127.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in all_tensors(source).items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            made[f"{name}_blocks"], made[f"{name}_scales"] = _to_mxfp4(tensor.float().transpose(1, 2))
        else:
            made[name] = tensor
    modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"modules_to_not_convert": modules, "quant_method": "mxfp4"}
    return _write(source, target, made, quantization, max_shard_size)


def _write(
    source: Path, target: Path, tensors: Mapping[str, Tensor], quantization: dict[str, Any], max_shard_size: str
) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    rewrite(target, tensors, max_shard_size)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


def _is_linear(name: str, tensor: Tensor) -> bool:
    module = name.removesuffix(".weight")
    if tensor.dim() != 2 or module == name or not _LAYER.search(name) or _TOWER.search(name):
        return False
    return not module.endswith(tuple("." + kept for kept in _KEPT_MODULES))


def _quantize(name: str, weight: Tensor, kind: Kind, block: int) -> dict[str, Tensor]:
    """The codes and scales of a weight [N, K], by name."""
    rows, columns = weight.shape
    dtype = torch.float32 if kind in {"hf-block", "hf-tensor", "hf-tensor-static"} else torch.bfloat16
    values = weight.float()
    if kind in {"hf-block", "hf-block-bf16", "ct-block"}:
        grid = -(-rows // block), -(-columns // block)
        padded = torch.zeros(grid[0] * block, grid[1] * block)
        padded[:rows, :columns] = values.abs()
        largest = padded.reshape(grid[0], block, grid[1], block).amax(dim=(1, 3))
    elif kind == "ct-channel":
        largest = values.abs().amax(dim=1, keepdim=True)
    else:
        largest = values.abs().amax().reshape(() if kind == "hf-tensor-inv" else (1,))
    scale = (largest / _LARGEST).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    codes = (values / _spread(scale.float(), weight.shape, block)).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    module = name.removesuffix(".weight")
    suffix = "weight_scale_inv" if kind in {"hf-block", "hf-block-bf16", "hf-tensor-inv"} else "weight_scale"
    made = {name: codes, f"{module}.{suffix}": scale}
    given = _input_scale(module).to(dtype)
    if kind in {"hf-tensor-static", "ct-tensor-static"}:
        made[f"{module}.input_scale"] = given.reshape(1)
    elif kind == "hf-tensor-inv":
        made[f"{module}.activation_scale"] = given
    return made


def _spread(scale: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """Scales of a tensor, of out_features or of square blocks, spread so that they broadcast to `shape`."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape == (rows, 1):
        return scale
    assert scale.shape == (-(-rows // block), -(-columns // block)), (scale.shape, shape)
    spread = scale.repeat_interleave(block, dim=0)[:rows]
    return spread.repeat_interleave(block, dim=1)[:, :columns]


def _input_scale(module: str) -> Tensor:
    """A static scale of a module's inputs; modules with the same input share it."""
    parent, _, leaf = module.rpartition(".")
    chance = zlib.crc32(f"{parent}.{_FUSED.get(leaf, leaf)}".encode()) % 1000 / 1000
    return torch.tensor((6.0 + 2.0 * chance) / _LARGEST)


def _config(kind: Kind, kept: list[str], block: int) -> dict[str, Any]:
    if kind in {"hf-block", "hf-block-bf16"}:
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": kept,
            "quant_method": "fp8",
            "weight_block_size": [block, block],
        }
    if kind == "hf-tensor-inv":
        return {
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": kept,
            "quant_method": "fp8",
            "weight_block_size": None,
        }
    if kind in {"hf-tensor", "hf-tensor-static"}:
        scheme = "static" if kind == "hf-tensor-static" else "dynamic"
        return {"activation_scheme": scheme, "ignored_layers": kept, "quant_method": "fp8"}
    weights = {"ct-channel": "channel", "ct-tensor-static": "tensor", "ct-block": "block"}[kind]
    inputs = {"ct-channel": "token", "ct-tensor-static": "tensor", "ct-block": "group"}[kind]
    group = {
        "format": "float-quantized",
        "input_activations": _arguments(inputs, block, dynamic=inputs != "tensor"),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _arguments(weights, block, dynamic=False),
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": kept,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.14.0",
    }


def _arguments(strategy: str, block: int, *, dynamic: bool) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": [block, block] if strategy == "block" else None,
        "dynamic": dynamic,
        "group_size": block if strategy == "group" else None,
        "num_bits": 8,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }


def _to_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., K / 32, 16] and exponents [..., K / 32], both uint8, of fp32 values [..., K]."""
    grouped = values.unflatten(-1, (-1, 32))
    largest = grouped.abs().amax(dim=-1)
    exponent = torch.where(largest > 0, largest.log2().floor() - 2, torch.zeros(())).clamp(-127, 127)
    ratio = (grouped.abs() * (-exponent).exp2().unsqueeze(-1)).clamp(max=float(_GRID[-1])).contiguous()
    # a value halfway between two goes to that whose code is even
    middles = (_GRID[1:] + _GRID[:-1]) / 2
    below = torch.bucketize(ratio, middles)
    above = torch.bucketize(ratio, middles, right=True)
    codes = torch.where(below % 2 == 0, below, above) + 8 * grouped.signbit()
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8), (exponent + 127).to(torch.uint8)


def _from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values [E, K, N], fp32, of codes [E, N, K / 32, 16] and exponents."""
    grid = torch.cat((_GRID, -_GRID))
    values = torch.stack((grid[(blocks & 15).long()], grid[(blocks >> 4).long()]), dim=-1).flatten(-2)
    scaled = torch.ldexp(values, scales.int().unsqueeze(-1) - 127)
    return scaled.reshape(*scales.shape[:-1], math.prod(scaled.shape[-2:])).transpose(1, 2)
