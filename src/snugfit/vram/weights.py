"""A model's weights on one of several GPUs, from headers: what tensor parallelism splits, and what it cannot split.

What vLLM's layers do (model_executor/layers/linear.py, vocab_parallel_embedding.py): most linears are split along
out_features (column-parallel), those that end a block along in_features (row-parallel); embeddings and the head along
the vocabulary, padded to 64. Norms, routers and the small projections of latent attention are on every GPU. Of fewer KV
heads than GPUs, keys and values are copied. Experts are split inside, or distributed whole (expert parallelism): the
bytes are the same. `tp` is the number of GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from snugfit.engines.fused import FUSED_GROUPS
from snugfit.formats.spec import FP8_BLOCK, TensorFormat
from snugfit.model.anatomy import is_prediction_head, is_tower
from snugfit.model.names import layer_of
from snugfit.storage.safetensors_header import TensorInfo

_ROW_PARALLEL = frozenset(
    {"o_proj", "down_proj", "w2", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "wo", "output_linear"}
)
_REPLICATED = frozenset(
    {
        *("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj", "gate", "router", "shared_expert_gate"),
        *("weights_proj", "wk", "wq_b", "conv1d_bias"),
    }
)
_VOCABULARY = frozenset({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"})
_VOCABULARY_MULTIPLE = 64
# linears that engines join with one that follows: blocks of the next one begin where these end
_JOINED = frozenset(leaf for group in FUSED_GROUPS for leaf in group[:-1])
_GATE_UP = frozenset({"gate_proj", "up_proj", "w1", "w3"})


def is_served(name: str, decoder: str, layers: int) -> bool:
    """Whether an engine loads this tensor; it does not load heads of multi-token prediction."""
    layer = layer_of(name, decoder)
    return not is_prediction_head(name) and (layer is None or layer < layers)


def bytes_on_gpu(name: str, infos: Sequence[TensorInfo], tp: int, kv_heads: int | None) -> int:
    """Bytes on each of `tp` GPUs of a tensor that is stored as `infos`; `kv_heads` are the model's, None if unknown."""
    if tp == 1:
        return sum(info.bytes for info in infos)
    return sum(_split_bytes(info, name, tp, kv_heads) for info in infos)


def _split_bytes(info: TensorInfo, name: str, tp: int, kv_heads: int | None) -> int:
    axis = _split_axis(name, len(info.shape))
    if axis is None or axis >= len(info.shape) or info.shape[axis] <= 1:
        return info.bytes
    side = info.shape[axis]
    return info.bytes // side * _part(side, _leaf(name), tp, kv_heads)


def _part(side: int, leaf: str, tp: int, kv_heads: int | None) -> int:
    """What each GPU has of the axis that is split."""
    if leaf in _VOCABULARY:
        return math.ceil(math.ceil(side / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE / tp)
    if leaf in ("k_proj", "v_proj") and kv_heads:
        return side * max(1, kv_heads // tp) // kv_heads
    return math.ceil(side / tp)


def shape_on_gpu(name: str, shape: Sequence[int], tp: int, kv_heads: int | None) -> tuple[int, ...]:
    """The part of a weight [N, K] on each of `tp` GPUs; `kv_heads` are the model's, None if unknown."""
    axis = _split_axis(name, len(shape)) if tp > 1 else None
    return tuple(_part(n, _leaf(name), tp, kv_heads) if place == axis else n for place, n in enumerate(shape))


def _split_axis(name: str, dimensions: int) -> int | None:
    """The axis that is split over GPUs, in a stack that of each expert; None where every GPU has the whole tensor."""
    leaf = _leaf(name)
    if is_tower(name) or "norm" in leaf or leaf in _REPLICATED or ".router." in name:
        return None
    if dimensions == 3:
        return 2 if leaf in _ROW_PARALLEL else 1
    if leaf in _ROW_PARALLEL:
        return 1 if dimensions == 2 else None
    return 0


def _leaf(name: str) -> str:
    module = name.rpartition(".")[0] or name
    return module.rpartition(".")[2]


def split_error(
    name: str, shape: Sequence[int], fmt: TensorFormat | None, tp: int, kv_heads: int | None = None
) -> str | None:
    """Why a 2-D weight, or the blocks of its format, cannot be split over `tp` GPUs; None where they can.

    Each GPU has whole ones of the model's `kv_heads` (None if unknown), copies where they are too few. On one GPU, too,
    whole blocks must hold linears that are joined with others (vLLM: fp8_utils.py, validate_fp8_block_shape and
    validate_fp8_block_shape_moe).
    """
    axis = _split_axis(name, len(shape))
    leaf = _leaf(name)
    uneven = _block_error(name, shape, fmt)
    if uneven is not None:
        return uneven
    if tp == 1 or axis is None or len(shape) != 2 or leaf in _VOCABULARY:
        return None
    side = shape[axis]
    features = "in_features" if axis else "out_features"
    if leaf in ("k_proj", "v_proj"):
        if not kv_heads:
            return None
        side = side // kv_heads * max(kv_heads, tp)  # as if copies were heads
    if side % tp:
        return f"{side} {features} of {leaf} cannot be split over {tp} GPUs"
    multiple = _block_side(fmt, axis)
    if side // tp % multiple:
        return f"{side // tp} {features} of {leaf} on each GPU are not divisible by {multiple}"
    return None


def _block_error(name: str, shape: Sequence[int], fmt: TensorFormat | None) -> str | None:
    """Why blocks of a weight cannot be joined with those of its partners; None where they can."""
    leaf = _leaf(name)
    joined = leaf in _GATE_UP if is_expert(name) else leaf in _JOINED
    if fmt is None or fmt.weight_block is None or not joined or len(shape) != 2 or is_tower(name):
        return None
    if shape[0] % fmt.weight_block[0] == 0:
        return None
    return f"{shape[0]} out_features of {leaf} are not divisible by blocks of {fmt.weight_block[0]}, which engines join"


def _block_side(fmt: TensorFormat | None, axis: int) -> int:
    """Weights under one scale along an axis: groups lie along in_features, FP8 blocks along both."""
    if fmt is None:
        return 1
    if fmt.weight_block is not None:
        return fmt.weight_block[axis]
    if axis == 0:
        return 1
    return max(1, fmt.group_size) if fmt.name in ("int4", "int8") else fmt.spec.in_features_multiple


def kernel_format(fmt: TensorFormat | None) -> str:
    """The format's name in the table of kernels (engines/kernels.py)."""
    if fmt is None:
        return "bf16"
    if fmt.name.startswith("fp8"):
        return "fp8-block" if fmt.weight_block == (FP8_BLOCK, FP8_BLOCK) else "fp8-channel"
    return fmt.name


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    return ".experts." in name
