"""The contract between the loop over layers and a method that chooses codes.

The loop loads the weights of a decoder layer in fused groups. A method may ask for an observation: the layer then runs
once or several times with its exact weights, on the hidden states that the quantized layers before it give, while the
method measures what it needs. The method turns the groups into choices: codes to write, and 16-bit weights to run. The
loop runs the layer with these (`propagate`), which gives the hidden states of the next layer and the ranges of inputs.

A method sees the tensors that stay as they are, too (norms, routers, biases): it may give them other values, as
smoothing does. It knows no files, no recipes and no families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snugfit.formats.quantized_weight import QuantizedWeight
from snugfit.formats.spec import TensorFormat
from snugfit.model.experts import ExpertNames
from snugfit.model.forward_pass import Batch
from snugfit.records.norm_folds import NormFold

# what passes a layer where some tokens are enough: so many, of so many samples at least
SOME_TOKENS, SOME_SAMPLES = 2048, 4


@dataclass(frozen=True, kw_only=True)
class Target:
    """How weights are to be quantized: their format, and the rule and objective by which scales are chosen.

    The rule is EFFORT where the recipe leaves it to the method.
    """

    format: TensorFormat
    scale_rule: str
    objective: str


@dataclass(frozen=True, kw_only=True)
class WeightGroup:
    """Weights of one layer that engines run as one product, [N, K] in 16 bits by tensor name; `target` None: they stay.

    A method takes each weight out of `weights` when it has used it, so that one weight is in memory at a time.
    """

    weights: dict[str, Tensor]
    target: Target | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is written and run for one tensor.

    `codes` are written, None for a tensor that stays in 16 bits: then `weight_16bit` is written. `weight_16bit` is what
    the layer runs with, None if no forward pass is needed or if it was written into the caller's buffer. `changed` says
    that a tensor that stays is not the source's any more; large ones are otherwise copied from file to file.
    `relative_error` is sum((w_hat - w)^2) / sum(w^2), a scalar on the device. `scale_rule` says how the scales of the
    codes were chosen: the target's rule, or what took its place where the target is EFFORT; "" without codes.
    """

    name: str
    codes: QuantizedWeight | None
    weight_16bit: Tensor | None
    relative_error: Tensor | None = None
    scale_rule: str = ""
    changed: bool = False


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What the choices of a layer are for.

    `runs`: the layer runs afterwards, so 16-bit weights are needed. `buffers`: memory of the layer (experts' stacked
    parameters) into which the 16-bit weights of these names go. `observed`: what the method's `observe` returned.
    """

    runs: bool
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    observed: Any = None


class RunLayer(Protocol):
    """Passes samples through an observed layer; what comes out of it is dropped."""

    def __call__(
        self, before: Callable[[Batch], None], *, max_tokens: int | None = None, with_experts: bool = True
    ) -> None:
        """Call `before` ahead of each batch (`batch.valid` says which tokens are real), then run the layer on it.

        With `max_tokens` it ends behind the first batches that hold so many tokens, out of samples that are spread over
        all and hold SOME_TOKENS, if there are as many. Of several processes each runs its block of the batches, with
        `max_tokens` all run the same. Without `with_experts` the caller has something else in the place of routed
        experts, whose weights are not needed.
        """


@dataclass(frozen=True, kw_only=True)
class ObservedLayer:
    """A layer with its exact weights, for a method to set hooks in and run; a method may change it.

    `linears` maps the file's full names of its linears to their names in `module`, `parameters` the file's full names
    of all its tensors but experts' to the module's, and `dtypes` the latter to dtypes in the file. `targets` says of
    each weight that is to be quantized how, by the file's full name. `experts` describes its routed experts, which are
    no linears: `snugfit.model.experts.hook` shows their inputs; None if it has none; `prefix` is what the file's names
    begin with. `copied` are the weights whose codes in the file stay. `note` takes what the record is to say of a fold.
    Of several processes `owners` says which chooses the codes of each weight, by the file's full name.
    """

    module: nn.Module
    prefix: str
    linears: Mapping[str, str]
    parameters: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    targets: Mapping[str, Target]
    experts: ExpertNames | None
    run: RunLayer
    copied: frozenset[str] = frozenset()
    note: Callable[[NormFold], None] = lambda _: None
    owners: Mapping[str, int] = field(default_factory=dict)


class Method(Protocol):
    """Chooses the codes of a layer's weights."""

    @property
    def observe(self) -> Callable[[ObservedLayer], Any] | None:
        """Measures the exact layer before codes are chosen; None if the method needs no such passes.

        What it returns is `Purpose.observed`. A run with such a method needs samples, whatever the recipe's formats
        are.
        """

    @property
    def correlates(self) -> bool:
        """Whether it holds E[x x^T], fp32 [K, K], of the inputs of a layer's linears."""

    def input_roundings(self, observed: Any) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What rounds the inputs of linears, by the file's names, while the layer runs with its chosen weights.

        Inputs that an engine rounds under scales made at run time are rounded anyway.
        """

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """A choice for every tensor of every group. Groups are read while they are iterated over."""
