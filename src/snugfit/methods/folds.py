"""Smoothing: input features of a linear are scaled down and its weights up, and what comes before makes up for it.

A fold divides what a producer puts out by s, one number a feature, and multiplies the input features of the consumers'
weights by s. The layer computes the same; but inputs with a few large features become even, and round better, while
weights become less so (Xiao et al. 2022, arXiv 2211.10438). For inputs with mean squares x^2 and weights with w^2,

    s = x^a / w^b, normalised to a geometric mean of 1

(SmoothQuant has b = 1 - a, AWQ b = 0). Folds are: a norm into q, k, v or into gate and up; up into down (a gated MLP is
linear in up); v into o, head by head. Which tensors take part is found by running the layer: a norm whose output *is*
the input of the consumers. Whether the layer stays the same function is tried with powers of two for s, which commute
with rounding: a norm that something else reads, or an activation that is not linear in up, shows at once. A layer with
routed experts keeps its norms: smoothing through them was seen to cost mixtures accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from snugfit.engines.fused import group_modules
from snugfit.formats.spec import TensorFormat
from snugfit.methods.method import ObservedLayer
from snugfit.model.names import ROLES

_SAME = 0.05  # error of what a layer adds to a token, part of its size, below which it is the same function
_CHECKED_TOKENS = 1  # one batch
_COMPARED_TOKENS = 256  # of the outputs of linears
_LARGEST = 6.0  # of log s


@dataclass(frozen=True)
class Fold:
    """A producer and its consumers, by their names in the module.

    `producer` is a norm (`is_norm`) or a linear. `heads` is how often a feature of the producer is repeated in the
    consumers' inputs in blocks of `width` (v's heads that several queries share), 1 for none.
    """

    producer: str
    consumers: tuple[str, ...]
    is_norm: bool
    heads: int = 1
    width: int = 0

    def to_consumer(self, scale: Tensor) -> Tensor:
        """`scale` of the producer's features [P], for each of the consumers' input features [K]."""
        if self.heads == 1:
            return scale
        return scale.view(-1, 1, self.width).expand(-1, self.heads, -1).reshape(-1)

    def to_producer(self, squares: Tensor) -> Tensor:
        """Means of `squares` of the consumers' input features [K] for each of the producer's features [P]."""
        if self.heads == 1:
            return squares
        return squares.view(-1, self.heads, self.width).mean(1).reshape(-1)


@dataclass(frozen=True)
class Scaling:
    """What folds do to a layer: by the module's names of linears, factors of input features [K], divisors of outputs.

    `tensors` are new values of what stays in 16 bits (norms, biases), by the module's names of parameters.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, linear: str, weight: Tensor) -> Tensor:
        """fp32 [N, K]: the weight of a linear under this scaling."""
        found = weight.float()
        if linear in self.inputs:
            found = found * self.inputs[linear]
        if linear in self.outputs:
            found = found / self.outputs[linear].unsqueeze(1)
        return found

    def beside(self, other: Scaling) -> Scaling:
        """This one and another, of other weights."""
        return Scaling(self.inputs | other.inputs, self.outputs | other.outputs, self.tensors | other.tensors)


def can_help(fmt: TensorFormat) -> bool:
    """Whether sizes of features matter to a format: FP8's values are as near to each other at nearly every size."""
    return fmt.name != "fp8-dynamic"


def find_folds(
    layer: ObservedLayer, foldable: Callable[[str], bool], known: dict[object, dict[str, str]] | None = None
) -> list[Fold]:
    """The folds of a layer whose consumers and producing linears are all `foldable` (the file's names of linears).

    The layer runs on one batch; UserError only for what the layer itself raises. What is `known` of a layer that is
    built alike is taken from there, without a run, and what is found is added.
    """
    modules = {name: module for name, module in layer.linears.items() if foldable(name)}
    by_role: dict[tuple[str, str], str] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        if leaf in ROLES:
            by_role[parent, ROLES[leaf]] = name
    found = []
    norms = {} if layer.experts is not None else _norms_before(layer, modules, {} if known is None else known)
    for group in group_modules(modules):
        consumers = tuple(modules[name] for name in group)
        if consumers[0] in norms and all(norms.get(one) == norms[consumers[0]] for one in consumers):
            found.append(Fold(norms[consumers[0]], consumers, is_norm=True))
    for (parent, role), name in by_role.items():
        before = {"down": "up", "o": "v"}.get(role)
        producer = by_role.get((parent, before)) if before else None
        if producer is not None:
            fold = _between(layer.module, modules[producer], modules[name])
            found += [fold] if fold is not None else []
    return found


def _between(module: nn.Module, producer: str, consumer: str) -> Fold | None:
    outputs = module.get_submodule(producer).out_features
    inputs = module.get_submodule(consumer).in_features
    assert isinstance(outputs, int)
    assert isinstance(inputs, int)
    if outputs == inputs:
        return Fold(producer, (consumer,), is_norm=False)
    parent = module.get_submodule(producer.rpartition(".")[0]) if "." in producer else module
    width = getattr(parent, "head_dim", None)
    if inputs % outputs or not isinstance(width, int) or outputs % width:
        return None
    return Fold(producer, (consumer,), is_norm=False, heads=inputs // outputs, width=width)


def _norms_before(
    layer: ObservedLayer, linears: Mapping[str, str], known: dict[object, dict[str, str]]
) -> dict[str, str]:
    """The norm whose output each linear's input is, by the module's names, if `linears` are all that reads it."""
    built = tuple((name, type(module)) for name, module in layer.module.named_modules())
    key = built, tuple(sorted(linears.values()))
    if key not in known:
        known[key] = _found_norms(layer, linears)
    return known[key]


def _found_norms(layer: ObservedLayer, linears: Mapping[str, str]) -> dict[str, str]:
    """`_norms_before` by a run of the layer."""
    watch = _Watch()
    handles = []
    for name, module in layer.module.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(watch.reads(name)))
        elif is_norm(module):
            handles.append(module.register_forward_hook(watch.makes(name)))
    layer.run(lambda _: None, max_tokens=_CHECKED_TOKENS)
    for handle in handles:
        handle.remove()
    given = set(linears.values())
    return {one: norm for norm, found in watch.readers.items() if found <= given for one in found}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight, and nothing more than a bias beside it."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return "norm" in type(module).__name__.lower() and "weight" in own and own <= {"weight", "bias"}


class _Watch:
    """Which linears read the very tensors that norms put out."""

    def __init__(self) -> None:
        self.readers: dict[str, set[str]] = {}
        self._made: dict[int, tuple[str, Tensor]] = {}  # the tensors live, so that ids stay theirs

    def makes(self, name: str) -> Callable[[nn.Module, object, object], None]:
        """A forward hook for the norm `name`."""

        def hook(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor):
                self._made[id(output)] = name, output

        return hook

    def reads(self, name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        """A forward pre-hook for the linear `name`."""

        def hook(_module: nn.Module, args: tuple[object, ...]) -> None:
            for one in args:
                if id(one) in self._made:
                    self.readers.setdefault(self._made[id(one)][0], set()).add(name)

        return hook


def is_same_function(layer: ObservedLayer, fold: Fold) -> bool:
    """Whether the layer computes the same with powers of two folded in; it is left as it was.

    That is so if most tokens get the same from the layer, and from each of its linears but the producer. What the layer
    adds to a token counts, not the token, which may be many times as large.
    """
    generator = torch.Generator().manual_seed(0)
    features = _features(layer.module, fold)
    device = next(layer.module.parameters()).device
    powers = torch.randint(-1, 2, (features,), generator=generator).float().exp2().to(device)
    before = {name: parameter.data for name, parameter in layer.module.named_parameters()}
    exact = _outputs(layer, fold)
    apply(layer.module, scale(layer.module, [(fold, powers)]))
    folded = _outputs(layer, fold)
    for name, data in before.items():
        layer.module.get_parameter(name).data = data
    return all(
        _is_alike(one, other, size) for (one, size), (other, _) in zip(exact.values(), folded.values(), strict=True)
    )


def _outputs(layer: ObservedLayer, fold: Fold) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs [tokens, N] of the layer, under "", and of its linears but the fold's producer, on one batch.

    With each the size of what counts [tokens]: of linears the outputs, of the layer what it adds to its inputs.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            made = output[0] if isinstance(output, tuple) else output
            assert isinstance(made, Tensor)
            tokens = made.flatten(0, -2)
            if name:
                tokens = tokens[:_COMPARED_TOKENS].float()
                found[name] = tokens, tokens.norm(dim=-1)
                return
            added = (tokens - args[0].flatten(0, -2)).float().norm(dim=-1)
            rounding = torch.finfo(made.dtype).eps / 4 * tokens.float().norm(dim=-1)
            found[name] = tokens.clone(), added + rounding / _SAME

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in layer.module.named_modules()
        if not name or (isinstance(module, nn.Linear) and name != fold.producer)
    ]
    layer.run(lambda _: None, max_tokens=_CHECKED_TOKENS)
    for handle in handles:
        handle.remove()
    return found


def _is_alike(exact: Tensor, folded: Tensor, size: Tensor) -> bool:
    """Whether most tokens [tokens, N] differ by less than _SAME of their size [tokens]."""
    return float(((exact - folded).float().norm(dim=-1) <= _SAME * size).float().mean()) > 0.5


def _features(module: nn.Module, fold: Fold) -> int:
    return len(module.get_parameter(f"{fold.producer}.weight"))


def scale(
    module: nn.Module, folds: Sequence[tuple[Fold, Tensor]], dtypes: Mapping[str, torch.dtype] | None = None
) -> Scaling:
    """What folds by their factors s, fp32 [P], do to the layer `module`, whose tensors stay as they are.

    The factors that consumers get are those that the rounded norms really divide by. `dtypes` are those in which the
    file stores parameters, by the module's names, where they are not the module's.
    """
    found, dtypes = Scaling(), dtypes or {}
    for fold, factors in folds:
        producer = module.get_submodule(fold.producer)
        actual = factors
        if fold.is_norm:
            weight = producer.weight
            assert isinstance(weight, Tensor)
            offset = offset_of(producer)
            whole = weight.float() + offset
            name = f"{fold.producer}.weight"
            new = (whole / factors - offset).to(dtypes.get(name, weight.dtype))
            actual = torch.where(new.float() + offset == 0, 1.0, whole / (new.float() + offset))
            actual = torch.where((actual > 0) & actual.isfinite(), actual, 1.0)
            found.tensors[name] = torch.where(actual == 1.0, weight.to(new.dtype), new)
        else:
            found.outputs[fold.producer] = factors
        bias = getattr(producer, "bias", None)
        if isinstance(bias, Tensor):
            name = f"{fold.producer}.bias"
            found.tensors[name] = (bias.float() / actual).to(dtypes.get(name, bias.dtype))
        for consumer in fold.consumers:
            found.inputs[consumer] = fold.to_consumer(actual)
    return found


def offset_of(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies by it: 1 for Gemma's and Qwen3-Next's, 0 for others."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    kept = weight.data
    sample = torch.linspace(-1.0, 2.0, len(kept), device=kept.device, dtype=kept.dtype).expand(1, 1, -1)
    norm.weight.data = torch.zeros_like(kept)
    at_zero = norm(sample)
    norm.weight.data = kept
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        at_zero = at_zero - bias
    return 1.0 if float(at_zero.float().abs().amax()) > 1e-3 else 0.0


def apply(module: nn.Module, scaling: Scaling) -> None:
    """Give the layer `module` its tensors under `scaling`, as new tensors in their dtypes."""
    for name in {*scaling.inputs, *scaling.outputs}:
        parameter = module.get_submodule(name).weight
        assert isinstance(parameter, nn.Parameter)
        parameter.data = scaling.weight(name, parameter.data).to(parameter.dtype)
    for name, tensor in scaling.tensors.items():
        stays = module.get_parameter(name)
        stays.data = tensor.to(stays.dtype)


def factors(squares_of_inputs: Tensor, squares_of_weights: Tensor, exponents: tuple[float, float]) -> Tensor:
    """s = x^a / w^b [P] from E[x^2] and the weights' mean squares, geometric mean 1; 1 where either is 0."""
    return factors_of_all(squares_of_inputs, squares_of_weights, [exponents])[0]


def factors_of_all(
    squares_of_inputs: Tensor, squares_of_weights: Tensor, exponents: Sequence[tuple[float, float]]
) -> Tensor:
    """The `factors` of each of several pairs of exponents, [n, P]."""
    known = (squares_of_inputs > 0) & (squares_of_weights > 0)
    x, w = (values.clamp(min=1e-30).log() / 2 for values in (squares_of_inputs, squares_of_weights))
    log = torch.where(known, torch.stack([a * x - b * w for a, b in exponents]), 0.0)
    log = torch.where(known, log - log.sum(1, keepdim=True) / known.sum().clamp(min=1), 0.0)
    return log.clamp(-_LARGEST, _LARGEST).exp()
