"""Make a mixture of experts (Mixtral, 4 experts, 2 run per token) from a dense Llama, with the same function.

    python demo/upcycle_smollm2.py MODEL OUT

No package carries a small mixture. Each expert is the layer's dense MLP with its neurons in another order, and the
router is random: Mixtral's weights of the chosen experts sum to 1, so every choice of the router computes the same
function. Names are those of Mixtral's releases. This tests the code paths only: experts that compute different
functions have to be trained.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remade import check, read_model, write_model  # scripts import each other by name
from unpack_smollm2 import whole_directory

SEED = 0
EXPERTS = 4
CHOSEN = 2
ROUTER_STD = 0.02
TOLERANCE = 1e-3  # of perplexity: in fp32 only the order of the sums differs

# the dense name, Mixtral's name, and the dimension of the neurons
PARTS = (("mlp.gate_proj", "w1", 0), ("mlp.down_proj", "w2", 1), ("mlp.up_proj", "w3", 0))
LLAMA_ONLY = ("_model_name_or_path", "attention_bias", "mlp_bias", "pretraining_tp")


def main(source: Path, target: Path) -> None:
    """Write the mixture made of directory `source` to `target`, complete and checked, or not at all."""
    with whole_directory(target) as partial:
        write_mixture(source, partial)
        check(source, partial, TOLERANCE, "the mixture computes another function")


def write_mixture(source: Path, target: Path) -> None:
    """Fill the directory `target` with the mixture, in the dtype of `source`, and all other files of `source`."""
    config, weights = read_model(source)
    write_model(source, target, mixture_config(config), dict(upcycle(weights)))


def mixture_config(dense: Mapping[str, Any]) -> dict[str, Any]:
    """Mixtral's config.json for a Llama's: the same attention, position encoding, sizes and dtype."""
    if dense.get("model_type") != "llama":
        sys.exit("only a Llama can be made a Mixtral here")
    kept = {key: value for key, value in dense.items() if key not in LLAMA_ONLY}
    return kept | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": CHOSEN,
        "num_local_experts": EXPERTS,
        "output_router_logits": False,
        "sliding_window": None,
    }


def upcycle(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All weights, with experts and routers in place of the MLPs, the same on every run.

    SystemExit for a bias, which Mixtral does not have.
    """
    generator = torch.Generator().manual_seed(SEED)
    dense = {name for name, _, _ in PARTS}
    for name, weight in weights.items():
        if name.endswith(".bias"):
            sys.exit(f"{name}: only a plain Llama without biases can be made a Mixtral here")
        if _split(name)[1] not in dense:
            yield name, weight
    layers = {_split(name)[0] for name in weights if _split(name)[1] in dense}
    for layer in sorted(layers, key=lambda found: int(found.split(".")[-2])):
        block = f"{layer}block_sparse_moe."
        inner, hidden = weights[f"{layer}mlp.gate_proj.weight"].shape
        router = ROUTER_STD * torch.randn(EXPERTS, hidden, generator=generator)
        yield f"{block}gate.weight", router.to(weights[f"{layer}mlp.gate_proj.weight"].dtype)
        for expert in range(EXPERTS):
            order = torch.randperm(inner, generator=generator)
            for part, leaf, dimension in PARTS:
                ordered = weights[f"{layer}{part}.weight"].index_select(dimension, order)
                yield f"{block}experts.{expert}.{leaf}.weight", ordered


def _split(name: str) -> tuple[str, str]:
    """The layer of a tensor ("model.layers.7.", "" outside the layers), and its module in the layer."""
    layer = (re.match(r"model\.layers\.\d+\.", name) or [""])[0]
    return layer, name.removeprefix(layer).removesuffix(".weight")


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order
    main(Path(sys.argv[1]), Path(sys.argv[2]))
