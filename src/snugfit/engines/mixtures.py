"""Mixtures of experts: how files stack them, under which names engines load them one by one, who cannot.

Read from vLLM 0.32 and 0.24 (`load_weights` of the model classes) and seen to load where docs/engines.md says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stacked:
    """A family whose files hold all experts of a layer in 3-D tensors, [experts, outputs, inputs].

    `gate_up` and `down` are their names below the mixture's module; with `transposed` they are [experts, inputs,
    outputs]; with `interleaved` gate and up alternate, else gate comes first. `expert` is the module of one expert as
    engines call it, `leaves` its gate, up and down. `biased`: beside them stand NAME_bias, [experts, outputs].
    """

    gate_up: str
    down: str
    expert: str
    leaves: tuple[str, str, str]
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    def suffixes(self) -> dict[tuple[str, str], tuple[tuple[str, ...], bool]]:
        """(Tensor's name below the mixture, parameter of a single expert) -> its projections, whether it is a bias."""
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
# vLLM 0.32's names; 0.24 knows them of granitemoehybrid alone, and asks for w1, w2, w3 of the others (KeyError)
_GRANITE = Stacked("input_linear.weight", "output_linear.weight", "experts.{}", _PROJECTIONS)

# what a file calls the module that holds a layer's experts -> what vLLM calls it where it looks up their format: a
# target that knows the file's name alone leaves MiniMax-M2's experts unquantized (read in 0.24 and 0.32)
EXPERTS_LOOKED_UP_AS: Mapping[str, str] = {"block_sparse_moe": "mlp"}

# model_type -> how its files stack experts; families that are not here have them one by one
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

# families whose experts no engine was seen to load from compressed-tensors, by format ("" for any), and what was seen
UNSERVED: Mapping[tuple[str, str], str] = {
    ("gpt_oss", ""): "vLLM 0.24 and 0.32 take its experts in 16 bits, or in MXFP4 under quant_method mxfp4 alone",
    (
        "granitemoehybrid",
        "nvfp4",
    ): "vLLM 0.32 stops at the scales of their inputs (KeyError); it loads nvfp4a16 and int4",
}

# families that run experts in a way of their own
_SCORED = "each expert's inputs are multiplied by the router's scores, and all experts run on all tokens"
OUTSIDE: Mapping[str, str] = {
    "llama4": _SCORED,
    "llama4_text": _SCORED,
    "jetmoe": "attention is a mixture too, and experts get their tokens sorted",
    "longcat_flash": "a loop of its own, with experts that compute nothing",
    "dbrx": "all experts stand in 2-D tensors without the name of a weight",
    "doge": "experts are rows of embeddings",
}
