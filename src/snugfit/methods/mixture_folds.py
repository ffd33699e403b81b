"""Smoothing in front of a mixture: a norm is divided by s, and all that reads it multiplied, its router included.

Gate and up of every routed expert, shared experts and the router read one norm. With s = x^a / w^b (methods/folds.py),
x^2 over all tokens and w^2 over all experts, few large features of their inputs become even. A router that gives other
experts than before would cost more than that gains. So factors are powers of two: they commute with rounding, logits of
the router keep their very bits, and so does its choice. Where a norm cannot be divided exactly (one that is stored as
an offset from 1 often cannot), the feature keeps the factor 1.

What reads the norm is found by running the layer: whatever gets the very numbers that the norm puts out. Then one batch
shows that the layer puts out the same bits with and without the fold, and all calibration tokens that they get the same
experts. If anything differs, if a reader keeps the source's codes, or if it holds no plain weight, the layer has no
fold, and the reason is noted. The strength is searched on some tokens' outputs of gate and up under the real rounding:
the mixture runs on one batch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.calibration.moments import drawn_together
from snugfit.calibration.routes import Routes, routes_of, without_experts
from snugfit.formats.grids import powers_of_two
from snugfit.formats.spec import EFFORT, TensorFormat
from snugfit.methods import folds as folding
from snugfit.methods.expert_folds import FEWEST_ROWS
from snugfit.methods.folds import Scaling
from snugfit.methods.method import ObservedLayer
from snugfit.model import experts
from snugfit.model.experts import DOWN
from snugfit.records.norm_folds import NormFold

SEARCHED_ROWS = 1024  # output features of all experts together that strengths are tried on
FEWEST_SEARCHED_ROWS = 32  # of one expert
TOKENS_OF_SHARED = 512  # of the sampled ones that shared experts are tried on
EXPONENT_BIAS = 127  # of E8M0
LARGEST_POWER = 8  # factors are 2^-8 ... 2^8
# exponents (a, b) of s = x^a / w^b that are tried
STRENGTHS = ((0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3))

# what rounded weights [N, K] put out on rounded inputs [n, K], both fp32; scales are chosen under E[x^2] [K]
RoundedOutputs = Callable[[Tensor, Tensor, TensorFormat, Tensor], Tensor]


@dataclass(frozen=True)
class Readers:
    """A norm, and the modules beside the experts that read it and hold one weight [N, K]; names in the layer."""

    norm: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class _Reader:
    """Some outputs of a weight, fp32 [n, K], its format, which of the sampled tokens it gets, and their E[x^2] [K]."""

    weight: Tensor
    format: TensorFormat
    tokens: Tensor | slice
    squares: Tensor


def fold_norm(layer: ObservedLayer, outputs: RoundedOutputs) -> Scaling:
    """Fold the norm before the layer's experts, if that helps and changes nothing else; the layer has the fold then.

    The scaling speaks of the module's names, of experts' linears by the file's. The layer's `note` gets a `NormFold`.
    """
    assert layer.experts is not None
    targets = expert_targets(layer)
    if any(target is None for target in targets.values()):
        return Scaling()
    readers = find_readers(layer)
    if isinstance(readers, str):
        layer.note(NormFold(layer=layer.prefix[:-1], reason=readers))
        return Scaling()
    note = NormFold(
        layer=layer.prefix[:-1],
        norm=_file_name(layer, f"{readers.norm}.weight"),
        readers=tuple(_file_name(layer, f"{name}.weight") for name in readers.modules),
    )
    module = layer.module.get_submodule(layer.experts.module)
    routes = _routes(layer, module)
    factors = None
    if routes is not None:
        factors = _best_factors(layer, readers, routes, outputs)
    if routes is None or factors is None:
        layer.note(replace(note, reason="no strength makes outputs of the experts better"))
        return Scaling()
    scaling = _scaling(layer, readers, factors)
    found = _apply_and_compare(layer, scaling, factors, routes, note)
    layer.note(found)
    if found.reason:
        return Scaling()
    expert_inputs = dict.fromkeys(targets, factors)
    return scaling.beside(Scaling(inputs=expert_inputs))


def _routes(layer: ObservedLayer, module: nn.Module) -> Routes | None:
    return routes_of(module, partial(layer.run, with_experts=False))


def expert_targets(layer: ObservedLayer) -> dict[str, TensorFormat | None]:
    """Formats of what reads the inputs of the layer's experts, by the file's names of linears; None: not the effort."""
    assert layer.experts is not None
    found = {}
    for (_, role, parameter), name in layer.experts.names.items():
        if parameter == "weight" and role != DOWN:
            target = layer.targets.get(f"{layer.prefix}{name}")
            linear = f"{layer.prefix}{name}".removesuffix(".weight")
            found[linear] = target.format if target is not None and target.scale_rule == EFFORT else None
    return found


def find_readers(layer: ObservedLayer) -> Readers | str:
    """The norm that the experts read, and what else reads it; or why these cannot be folded. One batch passes."""
    assert layer.experts is not None
    watch = _Watch()
    handles = []
    for name, module in layer.module.named_modules():
        own = {parameter for parameter, _ in module.named_parameters(recurse=False)}
        if folding.is_norm(module):
            handles.append(module.register_forward_hook(watch.makes(name)))
        elif own:
            handles.append(module.register_forward_pre_hook(watch.reads(name), with_kwargs=True))
    with without_experts(layer.module.get_submodule(layer.experts.module)):
        layer.run(lambda _: None, max_tokens=1, with_experts=False)
    for handle in handles:
        handle.remove()
    norms = watch.norms_of(layer.experts.module)
    if not norms:
        return "its experts do not read what a norm puts out"
    if len(norms) > 1 or watch.runs[norms[0]] != 1:
        return "it is not one norm, run once, that its experts read"
    modules = watch.readers_of(norms[0]) - {layer.experts.module}
    for name in sorted(modules):
        if (reason := _why_not(layer, name)) is not None:
            return reason
    return Readers(norms[0], tuple(sorted(modules)))


def _why_not(layer: ObservedLayer, name: str) -> str | None:
    """Why the input features of a module that reads the norm cannot be multiplied; None if they can."""
    weight = getattr(layer.module.get_submodule(name), "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return f"{name} reads the norm, too, and holds no weight whose input features could be multiplied"
    stored = _file_name(layer, f"{name}.weight")
    if not stored:
        return f"{name} reads the norm, too, and the file has no weight of this name"
    return f"{stored} reads the norm, too, and keeps the source's codes" if stored in layer.copied else None


def _file_name(layer: ObservedLayer, parameter: str) -> str:
    """The file's name of a parameter of the layer, "" if it has none."""
    return next((name for name, own in layer.parameters.items() if own == parameter), "")


class _Watch:
    """What modules get, and what norms put out, on one batch."""

    def __init__(self) -> None:
        self.runs: dict[str, int] = {}
        self._made: dict[str, Tensor] = {}
        self._read: dict[str, list[Tensor]] = {}

    def makes(self, name: str) -> Callable[[nn.Module, object, object], None]:
        """A forward hook for the norm `name`."""

        def hook(_module: nn.Module, args: tuple[object, ...], output: object) -> None:
            self._read.setdefault(name, []).extend(one for one in args if isinstance(one, Tensor))
            if isinstance(output, Tensor):
                self._made[name] = output
                self.runs[name] = self.runs.get(name, 0) + 1

        return hook  # type: ignore[return-value]

    def reads(self, name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        """A forward pre-hook, with named arguments, for the module `name`."""

        def hook(_module: nn.Module, args: tuple[object, ...], named: dict[str, object]) -> None:
            self._read.setdefault(name, []).extend(one for one in (*args, *named.values()) if isinstance(one, Tensor))

        return hook

    def norms_of(self, reader: str) -> list[str]:
        """The norms whose outputs a module got."""
        return [norm for norm in self._made if reader in self.readers_of(norm)]

    def readers_of(self, norm: str) -> set[str]:
        """The modules that got the norm's very numbers, in whatever shape or dtype."""
        made = self._made[norm].float().flatten()
        return {
            name
            for name, found in self._read.items()
            if any(one.numel() == made.numel() and torch.equal(one.float().flatten(), made) for one in found)
        }


def _best_factors(layer: ObservedLayer, readers: Readers, routes: Routes, outputs: RoundedOutputs) -> Tensor | None:
    """The powers of two [K] under which rounded weights of all readers put out the best; None: without a fold.

    Of several processes each tries some of them.
    """
    searched, weight_squares = _searched(layer, readers, routes)
    if not searched:
        return None
    squares = routes.sample.float().square().mean(0)
    exact = [routes.sample[one.tokens].float() @ one.weight.t() for one in searched]

    def error(scale: Tensor | None) -> float:
        total = 0.0
        for one, right in zip(searched, exact, strict=True):
            inputs = routes.sample[one.tokens].float()
            if scale is None:
                found = outputs(inputs, one.weight, one.format, one.squares)
            else:
                found = outputs(inputs / scale, one.weight * scale, one.format, one.squares / scale.square())
            total += float((found - right).square_().sum())
        return total

    scales: list[Tensor] = [torch.ones_like(squares)]
    for exponents in STRENGTHS:
        wanted = folding.factors(squares, weight_squares, exponents)
        scale = exact_powers(layer, readers.norm, wanted)
        if not any(torch.equal(scale, one) for one in scales):
            scales.append(scale)
    tried: list[Tensor | None] = distributed.from_main([None, *scales[1:]])
    mine = list(enumerate(tried))[distributed.rank() :: distributed.world_size()]
    errors = distributed.merged({number: error(scale) for number, scale in mine})
    best = 0
    for number in range(1, len(tried)):
        best = number if errors[number] < errors[best] else best
    return tried[best]


def _searched(layer: ObservedLayer, readers: Readers, routes: Routes) -> tuple[list[_Reader], Tensor]:
    """The readers whose outputs count, and the mean squares of all experts' weights by input feature [K]."""
    assert layer.experts is not None
    module = layer.module.get_submodule(layer.experts.module)
    number = layer.experts.count
    roles = experts.input_roles(module)
    (fmt,) = {target for target in expert_targets(layer).values() if target is not None}
    rows_of_one = max(FEWEST_SEARCHED_ROWS, SEARCHED_ROWS // number)
    tokens = [(routes.sampled_experts == one).any(1) for one in range(number)]
    sums = torch.stack([routes.sample[one].float().square().sum(0) for one in tokens])
    counts = torch.stack([one.sum() for one in tokens]).float()
    squares = drawn_together(sums, counts)
    found, weight_squares = [], torch.zeros_like(squares[0])
    for expert in range(number):
        weights = [experts.weight_of(module, expert, role) for role in roles]
        weight_squares += torch.stack([one.float().square().mean(0) for one in weights]).mean(0) / number
        if counts[expert] >= FEWEST_ROWS:
            weight = torch.cat([one[:: max(1, len(one) * len(roles) // rows_of_one)] for one in weights]).float()
            found.append(_Reader(weight, fmt, tokens[expert], squares[expert]))
    some = slice(None, None, max(1, len(routes.sample) // TOKENS_OF_SHARED))
    squares_of_all = routes.sample[some].float().square().mean(0)
    for name in readers.modules:
        target = layer.targets.get(_file_name(layer, f"{name}.weight"))
        if target is not None and target.scale_rule == EFFORT:
            whole = layer.module.get_submodule(name).get_parameter("weight").data
            weight = whole[:: max(1, len(whole) // SEARCHED_ROWS)].float()
            found.append(_Reader(weight, target.format, some, squares_of_all))
    return found, weight_squares


def exact_powers(layer: ObservedLayer, norm: str, factors: Tensor) -> Tensor:
    """The powers of two [K] nearest to `factors`; 1 where the norm, as module and file hold it, cannot be divided."""
    module = layer.module.get_submodule(norm)
    weight = module.get_parameter("weight").data
    offset = folding.offset_of(module)
    exponents = factors.log2().round().clamp(-LARGEST_POWER, LARGEST_POWER)
    powers = powers_of_two((exponents + EXPONENT_BIAS).to(torch.uint8))
    whole = weight.float() + offset
    new = whole / powers - offset
    exact = new + offset == whole / powers
    for dtype in {weight.dtype, layer.dtypes.get(f"{norm}.weight", weight.dtype)}:
        exact &= new.to(dtype).float() == new
    return torch.where(exact, powers, 1.0)


def _scaling(layer: ObservedLayer, readers: Readers, factors: Tensor) -> Scaling:
    """What the fold does to all but the experts."""
    module = layer.module.get_submodule(readers.norm)
    found = Scaling(inputs=dict.fromkeys(readers.modules, factors))
    offset = folding.offset_of(module)
    for name, parameter in module.named_parameters(recurse=False):
        full = f"{readers.norm}.{name}"
        shift = offset if name == "weight" else 0.0
        new = (parameter.data.float() + shift) / factors - shift
        found.tensors[full] = new.to(layer.dtypes.get(full, parameter.dtype))
    return found


def _apply_and_compare(
    layer: ObservedLayer, scaling: Scaling, factors: Tensor, routes: Routes, note: NormFold
) -> NormFold:
    """Fold, and compare the layer with what it was; it is left as it was if anything changed."""
    assert layer.experts is not None
    module = layer.module.get_submodule(layer.experts.module)
    if not all(distributed.gather(_can_multiply(layer, scaling, module, factors))):
        return replace(note, reason="a weight that reads the norm cannot be multiplied exactly in its dtype")
    before = {name: parameter.data for name, parameter in layer.module.named_parameters()}
    exact = _one_batch(layer)
    folding.apply(layer.module, scaling)
    experts.multiply_inputs(module, factors)
    same = all(distributed.gather(torch.equal(exact, _one_batch(layer))))
    again = _routes(layer, module)
    assert again is not None
    changed = int((again.experts != routes.experts).any(1).sum())
    note = replace(note, tokens=len(again.experts), changed_tokens=changed)
    if same and not changed:
        return note
    experts.multiply_inputs(module, 1 / factors)
    for name, data in before.items():
        layer.module.get_parameter(name).data = data
    what = (
        f"{changed} of {note.tokens} tokens would get other experts" if changed else "the layer would not be the same"
    )
    return replace(note, reason=what)


def _expert_weights(layer: ObservedLayer, module: nn.Module) -> Iterator[Tensor]:
    """The weights [N, K] of all experts that read the norm, one after another."""
    assert layer.experts is not None
    roles = experts.input_roles(module)
    return (experts.weight_of(module, expert, role) for expert in range(layer.experts.count) for role in roles)


def _can_multiply(layer: ObservedLayer, scaling: Scaling, module: nn.Module, factors: Tensor) -> bool:
    """Whether every weight that reads the norm is the same again when it was multiplied and divided.

    Of several processes each looks at some of them.
    """
    weights = (
        (one.data, layer.dtypes.get(f"{name}.weight", one.dtype))
        for name in scaling.inputs
        for one in [layer.module.get_submodule(name).get_parameter("weight")]
    )
    of_experts = ((weight, weight.dtype) for weight in _expert_weights(layer, module))
    return all(
        torch.equal((weight.float() * factors).to(weight.dtype).to(dtype).float() / factors, weight.float())
        for weight, dtype in islice(chain(weights, of_experts), distributed.rank(), None, distributed.world_size())
    )


def _one_batch(layer: ObservedLayer) -> Tensor:
    """What the layer puts out on one batch."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        made = output[0] if isinstance(output, tuple) else output
        assert isinstance(made, Tensor)
        found.append(made.clone())

    handle = layer.module.register_forward_hook(keep)
    layer.run(lambda _: None, max_tokens=1)
    handle.remove()
    return found[0]
