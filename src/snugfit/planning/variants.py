"""One decoder layer with its exact weights, and with those that its groups have in the formats of a plan.

Weights are rounded by the methods of a run, under E[x^2] of statistics if they are to be weighted by it; inputs are
rounded as the engine profile says, four-bit ones under the range that statistics give. Nothing is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.evaluation.evaluated_model import EvaluatedModel, open_model, resident_layer
from snugfit.formats.grids import E4M3_MAX
from snugfit.formats.inputs import STATIC_KINDS
from snugfit.formats.nvfp4 import input_global_scale
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.expert_folds import Product
from snugfit.methods.method import Method, Purpose, Target, WeightGroup
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.model import emulate, experts
from snugfit.model.layer_stubs import put
from snugfit.model.layout import ModelLayout
from snugfit.planning.groups import EXPERTS, Group, as_written, assignment_of, find_groups
from snugfit.quantization.layer.measured import input_amax
from snugfit.quantization.layer.recalled import products_of, recalled_squares
from snugfit.quantization.plan import Plan, measure_only
from snugfit.quantization.units import units_of
from snugfit.recipes.assignment import NO_RULE, Assignment
from snugfit.records.scores import cache_of_layer
from snugfit.records.statistics_file import Statistics
from snugfit.storage.tensor_reader import ReadTensor

PLAIN, WEIGHTED = ROUNDINGS = ("plain", "weighted")
VARIANTS_SHARE = 4  # variants of a layer's groups take at most this part of free memory


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under study: the original, its groups by name, what calibration found in it, and how it is rounded.

    `rounding` is PLAIN or WEIGHTED, `target` the engine profile of inputs. `folds`: where a plan quantizes both, up is
    folded into down, as `quantize` does it by the same statistics; groups by themselves have none.
    """

    model: EvaluatedModel
    layout: ModelLayout
    groups: Mapping[str, Group]
    statistics: Statistics
    rounding: str
    target: str
    folds: bool = False

    @cached_property
    def plan(self) -> Plan:
        """A plan that names the weights of each layer, and gives none a format."""
        nothing = Assignment(None, "", "", NO_RULE)
        return replace(
            measure_only(self.layout),
            weights=self.layout.weights,
            units=units_of(self.layout, self.layout.names),
            assignments={name: nothing for group in self.groups.values() for name in group.weights},
        )

    @cached_property
    def by_layer(self) -> Mapping[int | None, tuple[str, ...]]:
        """The names of the groups of each layer, None for those outside the layers."""
        found: dict[int | None, list[str]] = {}
        for name, group in self.groups.items():
            found.setdefault(group.layer, []).append(name)
        return {layer: tuple(names) for layer, names in found.items()}

    def places(self, index: int) -> tuple[str, ...]:
        """The names of all that a plan may decide in a layer: its groups, and its keys and values."""
        return *self.by_layer.get(index, ()), cache_of_layer(index)

    def method(self) -> Method:
        """What chooses codes."""
        return ROUND_TO_NEAREST if self.rounding == PLAIN else Calibrated(self.target)

    def as_written(self, choice: Mapping[str, str]) -> Mapping[str, str]:
        """Formats of a plan as they are rounded: FP8 beside 4-bit weights their way, which plain rounding has not."""
        return choice if self.rounding == PLAIN else as_written(self.layout, self.groups, choice)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a group has in a format: parameters by the module's names, roundings of inputs by the module's linears.

    `experts` rounds the inputs of routed experts, None where the group has none.
    """

    parameters: Mapping[str, Tensor]
    quantizers: Mapping[str, emulate.Quantizer]
    experts: emulate.ExpertInputs | None = None


# a group, its format, and the products that folds change, of which it has one of the two weights
Key = tuple[str, str, tuple[Product, ...]]


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A variant whose rounded weights have yet to be made.

    `together` are the names of weights that are rounded as one, out of what is in `exact`; `places` is the memory of
    the variant into which each goes; into `buffers` the method itself writes.
    """

    variant: Variant
    target: Target | None = None
    together: Sequence[tuple[str, ...]] = ()
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    places: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    products: tuple[Product, ...] = ()


class LayerVariants:
    """A decoder layer on the device; variants of its groups are made when they are first asked for, and kept."""

    def __init__(self, subject: Subject, index: int, device: torch.device, read: ReadTensor | None = None) -> None:
        self.index = index
        self.exact, self.cache = resident_layer(subject.model, index, device, read)
        self._subject, self._device = subject, device
        skeleton = subject.model.skeleton
        self._names, self._mixture = skeleton.names_of_layer(index), skeleton.experts.get(index)
        self._known: dict[Key, Variant] = {}
        self._observed: dict[tuple[Product, ...], Any] = {}

    def module_of(self, weight: str) -> str:
        """The module's name of a logical weight that is no routed expert's."""
        return self._names.parameters[weight.removeprefix(self._names.file_prefix)].removesuffix(".weight")

    @property
    def experts_module(self) -> str:
        """The name of the module that holds the routed experts."""
        assert self._mixture is not None
        return self._mixture.module

    def variant(self, group: str, fmt: str) -> Variant:
        """What a group of this layer has in a format; several processes ask for the same."""
        key = self.keys({group: fmt})[group]
        self.make([key])
        return self._known[key]

    def keys(self, choice: Mapping[str, str]) -> dict[str, Key]:
        """What tells the variants of this layer's groups apart, of those that have a format in `choice`."""
        mine = {name: choice[name] for name in self._subject.by_layer.get(self.index, ()) if name in choice}
        products = self._products(mine)

        def touched(group: str) -> tuple[Product, ...]:
            weights = frozenset(self._subject.groups[group].weights) if products else frozenset()
            return tuple(one for one in products if not weights.isdisjoint((f"{one.up}.weight", f"{one.down}.weight")))

        return {name: (name, fmt, touched(name)) for name, fmt in mine.items()}

    def _products(self, choice: Mapping[str, str]) -> list[Product]:
        """The gated MLPs and experts whose up is folded into down where groups have the formats of `choice`."""
        if not self._subject.folds:
            return []
        plan, found = self._subject.plan, dict[str, Assignment]()
        for name, fmt in choice.items():
            found |= assignment_of(self._subject.layout, self._subject.groups[name], fmt)
        return products_of(replace(plan, assignments=found), self._subject.model.skeleton, self.index)

    def make(self, wanted: Iterable[Key]) -> None:
        """Make the variants of these keys, unless they are known.

        Several processes, which all want the same, share the work: each rounds some of the weights, and gives them to
        the others.
        """
        drafts = {key: self._draft(*key) for key in dict.fromkeys(wanted) if key not in self._known}
        jobs = [(draft, names) for draft in drafts.values() for names in draft.together]
        owners = distributed.share([sum(draft.places[name].numel() for name in names) for draft, names in jobs])
        mine: dict[int, list[tuple[str, ...]]] = {}
        for (draft, names), owner in zip(jobs, owners, strict=True):
            if owner == distributed.rank():
                mine.setdefault(id(draft), []).append(names)
        for draft in drafts.values():
            self._round(draft, mine.get(id(draft), ()))
        rounded = zip(jobs, owners, strict=True)
        distributed.send_many((draft.places[name], owner) for (draft, names), owner in rounded for name in names)
        self._known |= {key: draft.variant for key, draft in drafts.items()}

    def _draft(self, group: str, fmt: str, products: tuple[Product, ...]) -> _Draft:
        one = self._subject.groups[group]
        found = assignment_of(self._subject.layout, one, fmt)
        return replace((self._experts if one.role == EXPERTS else self._linears)(one, found), products=products)

    def _round(self, draft: _Draft, together: Iterable[tuple[str, ...]]) -> None:
        """Round some of a draft's weights; one group of them after another is in memory."""
        target = draft.target
        groups = (WeightGroup(weights={n: draft.exact[n].clone() for n in names}, target=target) for names in together)
        purpose = Purpose(runs=True, buffers=draft.buffers, observed=self._observe(draft.products))
        for choice in self._subject.method().choose(groups, purpose):
            if choice.weight_16bit is not None:
                draft.places[choice.name].copy_(choice.weight_16bit)

    def forget(self, *, above: int = 0) -> None:
        """Free all variants if they hold more than `above` bytes."""
        tensors = [tensor for variant in self._known.values() for tensor in variant.parameters.values()]
        if sum(tensor.nbytes for tensor in tensors) > above:
            self._known.clear()

    def layer(self, choice: Mapping[str, str]) -> nn.Module:
        """The layer in which groups have the formats of `choice` (those of other layers are ignored)."""
        keys = self.keys(choice)
        if not keys:
            return self.exact
        memo: dict[int, Any] = {id(parameter): parameter for parameter in self.exact.parameters()}
        layer = copy.deepcopy(self.exact, memo)
        quantizers: dict[str, emulate.Quantizer] = {}
        self.make(keys.values())
        for variant in map(self._known.__getitem__, keys.values()):
            for parameter, tensor in variant.parameters.items():
                put(layer, parameter, tensor)
            quantizers |= variant.quantizers
            if variant.experts is not None:
                experts.hook(layer.get_submodule(self.experts_module), variant.experts)
        emulate.quantize_inputs(layer, quantizers)
        return layer

    def kv_cache(self) -> emulate.FP8Cache | None:
        """An FP8 cache under the calibrated scales of this layer; None for a layer whose cache is of another kind."""
        found = self._subject.statistics.layers[self.index].cache
        if found is None or not all(found):
            return None
        scales = [torch.tensor(largest / E4M3_MAX, device=self._device) for largest in found]
        return emulate.fp8_cache(*scales)

    def _observe(self, products: tuple[Product, ...]) -> Any:
        """What the method knows of the layer's inputs: E[x^2] of statistics, under the folds of these products."""
        if self._subject.rounding == PLAIN:
            return None
        if products not in self._observed:
            plan, skeleton = self._subject.plan, self._subject.model.skeleton
            found = recalled_squares(plan, skeleton, self.index, self._subject.statistics)
            squares = {name: one.to(self._device) for name, one in found.items()}
            method = Calibrated(self._subject.target, folds=bool(products), expert_folds=bool(products))
            self._observed[products] = method.recall(squares, products, self._exact)
        return self._observed[products]

    def _exact(self, linear: str) -> Tensor:
        """The exact weight [N, K] of a linear by the file's name."""
        name = f"{linear}.weight".removeprefix(self._names.file_prefix)
        experts_of = {} if self._mixture is None else {file: key for key, file in self._mixture.names.items()}
        if name not in experts_of:
            return self.exact.get_parameter(f"{self.module_of(f'{linear}.weight')}.weight").data
        number, role, _ = experts_of[name]
        return experts.weight_of(self.exact.get_submodule(self.experts_module), number, role)

    def _amax(self, found: Mapping[str, Assignment]) -> Mapping[str, float]:
        plan = replace(self._subject.plan, assignments=found)
        return input_amax(plan, self.index, self._subject.statistics.layers[self.index], self._mixture)

    def _linears(self, group: Group, found: Mapping[str, Assignment]) -> _Draft:
        """Linears that are modules of the layer."""
        modules = {name: self.module_of(name) for name in group.weights}
        rounded = tuple(name for name in group.weights if _is_rounded(found[name]))
        exact = {name: self.exact.get_parameter(f"{modules[name]}.weight").data for name in rounded}
        places = {name: torch.empty_like(weight) for name, weight in exact.items()}
        amax = self._amax(found)
        quantizers: dict[str, emulate.Quantizer] = {}
        for name, module in modules.items():
            scale = self._input_scale(name, found[name], amax.get(name))
            fmt = found[name].format
            quantizer = None if fmt is None else emulate.input_quantizer(fmt, self._subject.target, scale)
            if quantizer is not None:
                quantizers[module] = quantizer
        parameters = {f"{modules[name]}.weight": weight for name, weight in places.items()}
        variant = Variant(parameters=parameters, quantizers=quantizers)
        if not rounded:
            return _Draft(variant=variant)
        return _Draft(
            variant=variant,
            target=_target(found[rounded[0]]),
            together=(rounded,),
            exact=exact,
            places=places,
        )

    def _input_scale(self, name: str, assignment: Assignment, amax: float | None) -> Tensor | None:
        """The static multiplier of a linear's inputs: by the calibrated range, or what came with the source's codes."""
        if amax is not None:
            return input_global_scale(DEFAULT_INPUT_HEADROOM * amax).to(self._device)
        fmt = assignment.format
        if fmt is None or not assignment.keeps_codes or fmt.input_kind not in STATIC_KINDS:
            return None
        module, model = name.removesuffix(".weight"), self._subject.model
        shape = self._subject.layout.weights.tensors[name].shape
        _, scale = emulate.read_module(model.checkpoint, model.dialect, module, model.formats[module], shape)
        return None if scale is None else scale.to(self._device)

    def _experts(self, group: Group, found: Mapping[str, Assignment]) -> _Draft:
        """Routed experts, which are 3-D parameters of one module."""
        assert self._mixture is not None
        names = {f"{self._names.file_prefix}{name}": key for key, name in self._mixture.names.items()}
        roles = {name: key[1] for name, key in names.items()}
        inputs = emulate.ExpertInputs(*self._expert_quantizers(group, found, roles))
        rounded = [name for name in group.weights if _is_rounded(found[name])]
        if not rounded:
            return _Draft(variant=Variant(parameters={}, quantizers={}, experts=inputs))
        module = self.exact.get_submodule(self.experts_module)
        whole, parts = experts.buffers(module, self._device)
        for parameter, tensor in whole.items():
            tensor.copy_(module.get_parameter(parameter).data)
        views = {name: parts[key] for name, key in names.items()}
        groups = group_modules(name.removesuffix(".weight") for name in rounded)
        parameters = {f"{self.experts_module}.{name}": tensor for name, tensor in whole.items()}
        return _Draft(
            variant=Variant(parameters=parameters, quantizers={}, experts=inputs),
            target=_target(found[rounded[0]]),
            together=tuple(tuple(f"{one}.weight" for one in together) for together in groups),
            exact=views,
            places=views,
            buffers=views,
        )

    def _expert_quantizers(
        self, group: Group, found: Mapping[str, Assignment], roles: Mapping[str, str]
    ) -> tuple[emulate.Quantizer | None, emulate.Quantizer | None]:
        amax = self._amax(found)
        quantizers = []
        for is_down in (False, True):
            names = [name for name in group.weights if (roles[name] == experts.DOWN) == is_down]
            fmt = found[names[0]].format
            scales = [s for n in names if (s := self._input_scale(n, found[n], amax.get(n))) is not None]
            quantizers.append(emulate.experts_quantizer(fmt, emulate.largest_scale(scales), self._subject.target))
        return quantizers[0], quantizers[1]


def _is_rounded(assignment: Assignment) -> bool:
    return assignment.format is not None and not assignment.keeps_codes


def _target(assignment: Assignment) -> Target:
    assert assignment.format is not None
    return Target(format=assignment.format, scale_rule=assignment.scale_rule, objective=assignment.objective)


def check_rounding(rounding: str) -> None:
    """UserError for a way to round that planning does not have."""
    if rounding not in ROUNDINGS:
        remedy = f"Choose one of {', '.join(ROUNDINGS)}."
        raise UserError(f"no rounding {rounding!r}.", code="option-invalid", where="rounding", remedy=remedy)


def scored_formats(layout: ModelLayout, group: Group, formats: Sequence[str]) -> tuple[str, ...]:
    """Those of `formats` that a group can have and that change anything in it."""
    found = []
    for fmt in formats:
        try:
            assignments = assignment_of(layout, group, fmt)
        except UserError:
            continue
        if any(one.format is not None for one in assignments.values()):
            found.append(fmt)
    return tuple(found)


def open_subject(
    layout: ModelLayout, statistics: Statistics, *, rounding: str, target: str, folds: bool = False
) -> Subject:
    """The original, opened to be run as it is, with `folds` if weights are weighted; UserError if it cannot be run."""
    check_rounding(rounding)
    return Subject(
        model=open_model(layout.checkpoint.path, activations="none"),
        layout=layout,
        groups={group.name: group for group in find_groups(layout)},
        statistics=statistics,
        rounding=rounding,
        target=target,
        folds=folds and rounding != PLAIN,
    )
