"""Mixtures of experts: how files stack them, under which names engines load them, which families are unsupported.

Read from vLLM 0.32 and 0.24 (`load_weights` of the model classes) and seen to load where docs/engines.md says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stacked:
    """A family whose files hold all experts of a layer in 3-D tensors, [experts, outputs, inputs].

    `gate_up` and `down` are the tensors' names below the mixture's module; with `transposed` they are [experts, inputs,
    outputs]; with `interleaved` gate and up alternate, else gate comes first. `expert` is the engines' name of one
    expert's module, `leaves` of its gate, up and down. With `biased` there are also tensors NAME_bias, [experts,
    outputs].
    """

    gate_up: str
    down: str
    expert: str
    leaves: tuple[str, str, str]
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    def suffixes(self) -> dict[tuple[str, str], tuple[tuple[str, ...], bool]]:
        """(tensor's name below the mixture, parameter of a single expert) -> its projections, whether it is a bias."""
        gate, up, down = self.leaves
        found: dict[tuple[str, str], tuple[tuple[str, ...], bool]] = {
            (self.gate_up, "weight"): ((gate, up), False),
            (self.down, "weight"): ((down,), False),
        }
        if self.biased:
            found[f"{self.gate_up}_bias", "bias"] = (gate, up), True
            found[f"{self.down}_bias", "bias"] = (down,), True
        return found


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# vLLM 0.32's names; 0.24 has them for granitemoehybrid alone, and needs w1, w2, w3 for the others (KeyError)
_GRANITE = Stacked("input_linear.weight", "output_linear.weight", "experts.{}", _PROJECTIONS)

# a file's name of the module that holds a layer's experts -> vLLM's name of it where it looks up their format: with the
# file's name alone in the target MiniMax-M2's experts stay unquantized (read in 0.24 and 0.32)
EXPERTS_LOOKED_UP_AS: Mapping[str, str] = {"block_sparse_moe": "mlp"}

# seen with 5.23 (DecompressExperts hands on codes and block scales alone); FP8, INT4 and MXFP4 experts are read right
SPLIT_EXPERTS_IN_TRANSFORMERS = (
    "routed experts are written one by one, where transformers may look for the source's stacks: it then makes random "
    "ones, and its load report says MISSING; vLLM and `snugfit eval` read them"
)
NVFP4_EXPERTS_IN_TRANSFORMERS = (
    "transformers leaves out the global scales of routed experts in NVFP4, without a word: what it then computes is "
    "nonsense; vLLM and `snugfit eval` read them"
)
# how files of other families stack experts: names of transformers 5's own modules, and Granite's. Only taken where the
# shapes of both tensors fit config.json in exactly one order of the axes
STACKED_BY_NAME: tuple[Stacked, ...] = (
    Stacked("experts.gate_up_proj", "experts.down_proj", "experts.{}", _PROJECTIONS),
    _GRANITE,
)
# keys of config.json for the width of one expert
EXPERT_WIDTHS: tuple[str, ...] = (
    *("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    *("intermediate_size", "ffn_hidden_size"),
)

# model_type -> how its files stack experts; the order of the axes follows the shapes where they fit config.json
STACKED: Mapping[str, Stacked] = {
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "gpt_oss": Stacked(
        *("experts.gate_up_proj", "experts.down_proj", "experts.{}", _PROJECTIONS),
        transposed=True,
        interleaved=True,
        biased=True,
    ),
    "qwen3_vl_moe": Stacked("experts.gate_up_proj", "experts.down_proj", "experts.{}", _PROJECTIONS, transposed=True),
    "qwen3_vl_moe_text": Stacked(
        "experts.gate_up_proj", "experts.down_proj", "experts.{}", _PROJECTIONS, transposed=True
    ),
}

# (family, format; "" for any) whose experts no tested engine loads from compressed-tensors -> what was seen
UNVERIFIED_FORMATS: Mapping[tuple[str, str], str] = {
    (
        "gpt_oss",
        "",
    ): "vLLM 0.24 and 0.32 load its experts in 16 bits, or in MXFP4 under quant_method mxfp4, and in no other format",
    (
        "granitemoehybrid",
        "nvfp4",
    ): "vLLM 0.32 fails on the scales of the experts' inputs (KeyError); it loads nvfp4a16 and int4",
}

# families whose experts run in a way that this package does not support -> how they run
_SCORED = "each expert's inputs are multiplied by the router's scores, and all experts run on all tokens"
UNSUPPORTED_FAMILIES: Mapping[str, str] = {
    "llama4": _SCORED,
    "llama4_text": _SCORED,
    "jetmoe": "attention is a mixture too, and experts receive sorted tokens",
    "longcat_flash": "some experts compute nothing, in a loop of its own",
    "dbrx": "all experts are in 2-D tensors whose names do not end in weight",
    "doge": "experts are rows of embeddings",
}
