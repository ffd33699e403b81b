"""Smoothing inside routed experts: what up puts out is divided by s, and the input features of down multiplied by it.

An expert is linear in what its up projection puts out, so each one computes the same as before, whatever the router
does and whatever else the layer has: no norm, no router and no other expert is touched, and the engine has nothing to
do. The factors s = x^a / w^b (methods/folds.py) come from E[x^2] of the inputs of the expert's own down projection;
their strength is searched on rows that the router sent to it. The mixture itself does not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from snugfit.calibration.moments import Moments
from snugfit.formats.spec import EFFORT, TensorFormat
from snugfit.methods.folds import Fold, Scaling
from snugfit.methods.method import ObservedLayer
from snugfit.model import experts
from snugfit.model.experts import DOWN, UP

FEWEST_ROWS = 16  # of an expert's inputs, below which E[x^2] alone decides
Search = Callable[[Fold, Tensor, TensorFormat, Moments], Tensor | None]


@dataclass(frozen=True)
class ExpertFolds:
    """Factors by which experts' weights are scaled, by the file's names of linears: see `Scaling`."""

    scaling: Scaling = field(default_factory=Scaling)

    def moments(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """E[x^2] [K] of the inputs of experts' linears under the folds."""
        factors = self.scaling.inputs
        return {name: one / factors[name].square() if name in factors else one for name, one in squares.items()}


def fold_experts(
    layer: ObservedLayer, squares: Mapping[str, Tensor], samples: Mapping[int, Tensor], search: Search
) -> ExpertFolds:
    """The folds that help the experts of a layer, those alone whose up and down both follow the effort.

    `squares` are E[x^2] [K] of the inputs of experts' linears by the file's names, `samples` inputs of down [n, K] by
    expert. `search` gives the best factors [K] for the weight of down, None for no fold.
    """
    found = ExpertFolds()
    if layer.experts is None:
        return found
    module = layer.module.get_submodule(layer.experts.module)
    if experts.why_not_linear_in_up(module):
        return found
    for expert in range(experts.count(module)):
        up, down = (f"{layer.prefix}{layer.experts.names[expert, role, 'weight']}" for role in (UP, DOWN))
        targets = [layer.targets.get(name) for name in (up, down)]
        up, down = up.removesuffix(".weight"), down.removesuffix(".weight")
        target = targets[1]
        if target is None or down not in squares or not all(t is not None and t.scale_rule == EFFORT for t in targets):
            continue
        rows = samples.get(expert)
        sample = rows if rows is not None and len(rows) >= FEWEST_ROWS else None
        moments = Moments(squares[down], None, 0, sample, 0.0)
        fold = Fold(up, (down,), is_norm=False)
        factors = search(fold, experts.weight_of(module, expert, DOWN).float(), target.format, moments)
        if factors is not None:
            found.scaling.inputs[down] = found.scaling.outputs[up] = factors
    return found
