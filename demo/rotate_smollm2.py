"""Rotate the residual stream of a Llama such as SmolLM2: the same function, off the 4-bit grid.

    python demo/rotate_smollm2.py MODEL OUT

The packaged SmolLM2 was dequantized from 16 levels per 32 inputs, so 4-bit formats look falsely good on it. Each
RMSNorm weight is folded into the linears that read the norm and becomes 1. Then the residual stream is rotated by
Q = exp(A), A antisymmetric with entries from N(0, 0.3^2 / hidden), near the identity: a norm of weight 1 depends on
lengths only, which Q preserves. Linears that read the stream become W Q, those that write it Q^T W, the embedding E Q,
and the output head, which is no longer tied to the embedding, (E norm) Q.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from remade import check, read_model, write_model  # scripts import each other by name
from unpack_smollm2 import whole_directory

SEED = 0
STRENGTH = 0.3
TOLERANCE = 0.01  # of perplexity; bf16 rounds the rotated weights again

NORM_BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "lm_head": "model.norm",
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
EMBEDDING = "model.embed_tokens"


def main(source: Path, target: Path) -> None:
    """Write the rotated model of directory `source` to `target`, complete and checked, or not at all."""
    with whole_directory(target) as partial:
        write_rotated(source, partial)
        check(source, partial, TOLERANCE, "the rotated model computes another function")


def write_rotated(source: Path, target: Path) -> None:
    """Fill the directory `target` with the rotated model, in its own dtype, and all other files of `source`."""
    config, weights = read_model(source)
    write_model(source, target, config | {"tie_word_embeddings": False}, rotate(weights))


def rotate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights with folded norms, a rotated stream and an untied output head; the sums run in float64.

    SystemExit for a tensor that a plain Llama does not have.
    """
    embedding = weights.get(f"{EMBEDDING}.weight")
    if embedding is None:
        sys.exit(f"{EMBEDDING}.weight is missing: only a Llama can be rotated here")
    rotation = make_rotation(embedding.shape[1])
    untied = {"lm_head.weight": embedding, **weights}
    return {name: _rotated(name, untied, rotation) for name in untied}


def make_rotation(hidden: int) -> Tensor:
    """Q = exp(A) in float64, [hidden, hidden], the same on every run."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    upper = (STRENGTH / hidden**0.5) * normal.triu(1)
    rotation: Tensor = torch.linalg.matrix_exp(upper - upper.T)
    return rotation


def _rotated(name: str, weights: Mapping[str, Tensor], rotation: Tensor) -> Tensor:
    layer = (re.match(r"model\.layers\.\d+\.", name) or [""])[0]
    part = name.removeprefix(layer).removesuffix(".weight")
    weight = weights[name]
    if part in NORM_BEFORE:
        folded = weight.double() * weights[f"{layer}{NORM_BEFORE[part]}.weight"].double()
        result = folded @ rotation
    elif part in WRITERS:
        result = rotation.T @ weight.double()
    elif part == EMBEDDING:
        result = weight.double() @ rotation
    elif part in NORM_BEFORE.values():
        result = torch.ones_like(weight)
    else:
        sys.exit(f"{name}: only a plain Llama without biases can be rotated here")
    return result.to(weight.dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order
    main(Path(sys.argv[1]), Path(sys.argv[2]))
