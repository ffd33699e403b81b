"""A decoder layer whose linears and experts are watched for ranges, with inputs rounded as an engine rounds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from snugfit.calibration.moments import ExpertMoments, MomentsObserver
from snugfit.calibration.observers import ExpertObserver, InputObserver
from snugfit.engines.fused import group_modules
from snugfit.formats.spec import TensorFormat
from snugfit.model import emulate, experts, forward_pass
from snugfit.quantization.layer.layer_pass import LayerPass
from snugfit.records.squares import encode_squares
from snugfit.records.statistics import LayerStatistics


def linears_of(run: LayerPass, layer: nn.Module) -> dict[str, str]:
    """The layer's linears, names relative to it: the file's -> the model's."""
    return {
        file_name: module_name
        for file_name, module_name in run.skeleton.names_of_layer(run.index).modules.items()
        if isinstance(layer.get_submodule(module_name), nn.Linear)
    }


class WatchedLayer:
    """A resident layer whose linears are watched, and whose inputs are rounded where an engine would round them."""

    def __init__(
        self,
        run: LayerPass,
        layer: nn.Module,
        scales: Mapping[str, Tensor | None],
        roundings: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        self._prefix = run.prefix
        module = self._relative_module
        formats = {
            module(name): assignment.format
            for name in scales
            if (assignment := run.plan.assignments.get(name)) and assignment.format is not None
        }
        input_scales = {module(name): scale for name, scale in scales.items()}
        self._linears = linears_of(run, layer)
        self._groups = group_modules(self._linears)
        self._inputs = InputObserver(layer, [self._linears[group[0]] for group in self._groups])
        quantizers = {
            module_name: emulate.input_quantizer(formats[file_name], "marlin", input_scales.get(file_name))
            for file_name, module_name in self._linears.items()
            if file_name in formats
        }
        chosen = {name: q for name, q in quantizers.items() if q is not None}
        for name, module_name in self._linears.items():
            if (rounding := roundings.get(run.prefix + name)) is not None:
                chosen.setdefault(module_name, rounding)
        emulate.quantize_inputs(layer, chosen)
        self._mixture = run.skeleton.experts.get(run.index)
        # of a model as it is, E[x^2] is measured too, for runs that take statistics in place of samples
        self._moments: MomentsObserver | None = None
        self._expert_moments: ExpertMoments | None = None
        if run.plan.recipe is None:
            self._moments = MomentsObserver(layer, {self._linears[group[0]]: False for group in self._groups})
            self._expert_moments = None if self._mixture is None else ExpertMoments()
        self._experts = self._watch_experts(run, layer, formats, input_scales)

    def _relative_module(self, name: str) -> str:
        return name.removeprefix(self._prefix).removesuffix(".weight")

    def _watch_experts(
        self,
        run: LayerPass,
        layer: nn.Module,
        formats: Mapping[str, TensorFormat],
        scales: Mapping[str, Tensor | None],
    ) -> ExpertObserver | None:
        if self._mixture is None:
            return None
        up = self._expert_quantizer((experts.GATE, experts.UP), formats, scales)
        down = self._expert_quantizer((experts.DOWN,), formats, scales)
        # without a range to measure, experts that the router did not choose would run for nothing
        measured = run.plan.recipe is None or run.plan.needs_activations
        cap = run.experts.max_forced_tokens if run.experts.all_experts and measured else None
        tokens = sum(sum(batch.lengths) for batch in run.all_batches or run.batches)
        observer = ExpertObserver(emulate.ExpertInputs(up, down), cap=cap, tokens=tokens)
        moments = self._expert_moments
        hooks = observer if moments is None else experts.Watching(observer, moments)
        experts.hook(layer.get_submodule(self._mixture.module), hooks)
        return observer

    def _expert_quantizer(
        self, roles: Sequence[str], formats: Mapping[str, TensorFormat], scales: Mapping[str, Tensor | None]
    ) -> Callable[[Tensor], Tensor] | None:
        """What rounds the inputs of all experts' projections of these roles."""
        assert self._mixture is not None
        names = [n for (_, role, what), n in self._mixture.names.items() if what == "weight" and role in roles]
        modules = [module for name in names if (module := name.removesuffix(".weight")) in formats]
        given = [scale for module in modules if (scale := scales.get(module)) is not None]
        fmt = formats[modules[0]] if modules else None
        return emulate.experts_quantizer(fmt, emulate.largest_scale(given), "marlin")

    def before(self, batch: forward_pass.Batch) -> None:
        """A batch is about to pass."""
        self._inputs.before(batch)
        for moments in (self._moments, self._expert_moments):
            if moments is not None:
                moments.before(batch)
        if self._experts is not None:
            self._experts.before(batch)

    def stated(self) -> list[Any]:
        """What this process has seen of the inputs of linears, for all others."""
        return self._inputs.stated()

    def take(self, said: Sequence[list[Any]]) -> None:
        """Take in what all processes have `stated`."""
        self._inputs.take(said)

    def share(self) -> None:
        """Take in what all processes have measured of experts."""
        if self._experts is not None:
            self._experts.share()
        if self._expert_moments is not None:
            self._expert_moments.share()

    def result(self, cache: tuple[float, float] | None) -> LayerStatistics:
        """What was measured, under the file's names; `cache` is the largest cached key and value."""
        seen = {self._prefix + group[0]: self._inputs.result(self._linears[group[0]]) for group in self._groups}
        inputs = {name: one for name, one in seen.items() if one is not None}
        if self._moments is not None:
            moments = {name: one.squares for name, one in self._moments.shared_result().items()}
            for group in self._groups:
                if (name := self._prefix + group[0]) in inputs and (module := self._linears[group[0]]) in moments:
                    inputs[name] = replace(inputs[name], squares=encode_squares(moments[module].cpu()))
        if self._mixture is None or self._experts is None:
            return LayerStatistics(inputs, {}, cache)
        module = self._prefix + self._mixture.file_module
        found, gate_up, down = self._experts.result()
        means = None if self._expert_moments is None else self._expert_moments.means()
        if means is not None:
            of_gate_up, of_down = (encode_squares(one.cpu()) for one in means)
            found = replace(found, gate_up_squares=of_gate_up, down_squares=of_down)
        inputs |= {f"{module}.gate_up": gate_up, f"{module}.down": down}
        return LayerStatistics(inputs, {module: found}, cache)
