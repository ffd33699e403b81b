"""Smoothing inside gated MLPs: what up puts out is divided by s, and the input features of down multiplied by it.

A gated MLP, and so each routed expert, is linear in what its up projection puts out. It computes the same as before,
whatever the router does and whatever else the layer has: no norm, no router and no other expert is touched, and the
engine has nothing to do. The factors s = x^a / w^b (methods/folds.py) come from E[x^2] of the inputs of the very down
projection; their strength is searched on rows that the router sent to it, or where there are none, under E[x^2] alone.
The mixture itself does not run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.calibration.moments import Moments
from snugfit.calibration.routes import routes_of
from snugfit.formats.spec import EFFORT, TensorFormat
from snugfit.methods.folds import Fold, Scaling
from snugfit.methods.method import ObservedLayer
from snugfit.model import experts
from snugfit.model.experts import DOWN, UP

FEWEST_ROWS = 16  # of an expert's inputs, below which E[x^2] alone decides
Search = Callable[[Fold, Tensor, TensorFormat, Moments], Tensor | None]


@dataclass(frozen=True)
class Product:
    """A gated MLP or an expert: the file's names of its up and down, the format of down.

    `rows` are some of the inputs of down [n, K], None if there are none.
    """

    up: str
    down: str
    format: TensorFormat
    rows: Tensor | None = None


@dataclass(frozen=True)
class ProductFolds:
    """Factors by which weights are scaled, by the file's names of linears: see `Scaling`."""

    scaling: Scaling = field(default_factory=Scaling)

    def moments(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """E[x^2] [K] of the inputs of linears under the folds."""
        factors = self.scaling.inputs
        return {name: one / factors[name].square() if name in factors else one for name, one in squares.items()}


def fold_products(
    products: Iterable[Product], weight: Callable[[str], Tensor], squares: Mapping[str, Tensor], search: Search
) -> ProductFolds:
    """The folds that help, each found by itself.

    `weight` gives the weight of a linear [N, K], `squares` are E[x^2] [K] of inputs, both by the file's names. `search`
    gives the best factors [K] for the weight of down, None for no fold. Several processes, which all call it, get what
    all of them find; each may have some of the products.
    """
    factors_of: dict[str, tuple[str, Tensor]] = {}
    for one in products:
        if one.down in squares:
            sample = one.rows if one.rows is not None and len(one.rows) >= FEWEST_ROWS else None
            moments = Moments(squares[one.down], None, 0, sample, 0.0)
            fold = Fold(one.up, (one.down,), is_norm=False)
            factors = search(fold, weight(one.down).float(), one.format, moments)
            if factors is not None:
                factors_of[one.down] = one.up, factors
    found = ProductFolds()
    for down, (up, factors) in distributed.merged(factors_of).items():
        found.scaling.inputs[down] = found.scaling.outputs[up] = factors
    return found


def fold_experts(
    layer: ObservedLayer, squares: Mapping[str, Tensor], samples: Mapping[int, Tensor], search: Search
) -> ProductFolds:
    """The folds that help the experts of a layer, those alone whose up and down both follow the effort.

    `samples` are inputs of down [n, K] by expert; the other parameters are those of `fold_products`.
    """
    if layer.experts is None:
        return ProductFolds()
    module = layer.module.get_submodule(layer.experts.module)
    if experts.why_not_linear_in_up(module):
        return ProductFolds()
    places = {
        f"{layer.prefix}{layer.experts.names[expert, DOWN, 'weight']}".removesuffix(".weight"): expert
        for expert in range(layer.experts.count)  # not all may be in memory
    }
    products = list(_of_experts(layer, places, samples))
    return fold_products(
        products[distributed.rank() :: distributed.world_size()],
        lambda name: experts.weight_of(module, places[name], DOWN),
        squares,
        search,
    )


def sent_before(layer: ObservedLayer) -> list[int]:
    """How many tokens of the processes in front of this one are sent to each expert; nothing in a world of one."""
    if distributed.world_size() == 1 or layer.experts is None:
        return []
    module = layer.module.get_submodule(layer.experts.module)
    routes = routes_of(module, partial(layer.run, with_experts=False))
    return [] if routes is None else routes.sent_before(layer.experts.count)


def _of_experts(layer: ObservedLayer, places: Mapping[str, int], samples: Mapping[int, Tensor]) -> Iterator[Product]:
    assert layer.experts is not None
    for down, expert in places.items():
        up = f"{layer.prefix}{layer.experts.names[expert, UP, 'weight']}".removesuffix(".weight")
        targets = [layer.targets.get(f"{name}.weight") for name in (up, down)]
        if all(target is not None and target.scale_rule == EFFORT for target in targets) and targets[1] is not None:
            yield Product(up, down, targets[1].format, samples.get(expert))


class _Gives(nn.Module):
    """Puts out the same, whatever comes."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.seen: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The output; the inputs are kept."""
        self.seen = inputs
        return self.output


_TOKENS = 16


def is_linear_in_up(module: nn.Module, up: str, down: str) -> bool:
    """Whether the inputs of the linear `down` of an MLP grow with the outputs of its linear `up`, and nothing else.

    Only the arithmetic between the linears runs, with numbers in place of what they would put out, powers of two apart:
    a model on the meta device is enough. An MLP that cannot run so is not.
    """
    names = {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    if not {up, down} <= names or module.get_submodule(up).bias is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    outputs = {name: _numbers(module.get_submodule(name), generator) for name in sorted(names)}
    outputs[up] *= torch.linspace(-10, 20, _TOKENS).exp2().unsqueeze(1)
    powers = torch.randint(-3, 4, outputs[up].shape[-1:], generator=generator).float().exp2()
    found = []
    for scaled in (outputs[up], outputs[up] / powers):
        probe = copy.deepcopy(module)
        stubs = {name: _Gives(scaled if name == up else outputs[name]) for name in names}
        for name, stub in stubs.items():
            probe.set_submodule(name, stub)
        inputs = torch.zeros(1, _TOKENS, int(module.get_submodule(up).in_features))  # type: ignore[arg-type]
        try:
            whole = probe(inputs)
        except (TypeError, RuntimeError, NotImplementedError):  # more arguments, or parameters without data
            return False
        seen = stubs[down].seen
        if not isinstance(whole, Tensor) or seen is None or seen.is_meta or whole.is_meta:
            return False
        found.append((seen, whole))
    (seen, whole), (folded, other) = found
    return torch.equal(whole, other) and torch.allclose(seen, folded * powers, rtol=1e-3, atol=0)


def _numbers(linear: nn.Module, generator: torch.Generator) -> Tensor:
    return torch.randn(1, _TOKENS, int(linear.out_features), generator=generator)  # type: ignore[arg-type]
