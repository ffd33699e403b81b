"""Method by method on captured inputs of real layers: errors of weights and of outputs, and time; one Markdown table.

    python methods_by_layer.py MODEL --text A.txt [B.txt ...] [--device cpu] [--layers 4] [--num-samples 16]
        [--max-seq-length 256]

Every method quantizes the linears of `--layers` decoder layers, spread over the depth, to NVFP4. Inputs are those that
the exact layers before give. Methods see `--num-samples` samples; outputs are compared on as many others. Errors are
parts of the whole: |V - W|^2 / |W|^2 of weights, |x V^T - y|^2 / |y|^2 of outputs y = x W^T, with x exact (W4A16) and
with x rounded under an input scale made of the largest input that the methods saw (W4A4). What folds do to the outputs
of a linear is undone before they are compared. Means over layers and linears of a kind. Seconds are those of a layer:
to read and observe it on the samples, and to choose its codes; a first layer, which compiles, is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from snugfit.data.dataset import load_dataset
from snugfit.engines.fused import group_modules
from snugfit.evaluation.evaluated_model import EvaluatedModel, embedding_weights, open_model, resident_layer
from snugfit.formats import nvfp4
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import EFFORT, NVFP4_BLOCK, TensorFormat
from snugfit.machine import pick_device
from snugfit.methods.calibrated import Calibrated, Observed
from snugfit.methods.method import Method, ObservedLayer, Purpose, Target, WeightGroup
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.methods.scales import block_scales, global_scale, largest_magnitude
from snugfit.model import forward_pass
from snugfit.model.forward_pass import Batch
from snugfit.model.names import ROLES

NVFP4 = TensorFormat("nvfp4")
QKV, GATE_UP = "q, k, v", "gate, up"
KINDS = {
    **dict.fromkeys(("q", "k", "v", "qkv"), QKV),
    "o": "o",
    **dict.fromkeys(("gate", "up", "gate_up"), GATE_UP),
    "down": "down",
}
PROFILE = "vllm-blackwell"
Group = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tried:
    """A way to choose the values of a fused group [N, K] by name; `observer` runs the layer first, if it has one."""

    name: str
    choose: Callable[[Group, Observed | None], dict[str, Tensor]]
    observer: Calibrated | None = None


@dataclass
class Errors:
    """Relative errors of one linear in one layer, under one method."""

    weight: float
    w4a16: float
    w4a4: float


@dataclass
class Found:
    """What a method gave: errors by kind of linear, seconds to observe and to choose by layer."""

    errors: dict[str, list[Errors]] = field(default_factory=dict)
    observing: list[float] = field(default_factory=list)
    choosing: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Captured:
    """A layer's linears by the file's names: weights, and inputs [tokens, K] of the samples seen and of the others."""

    weights: Mapping[str, Tensor]
    seen: Mapping[str, Tensor]
    others: Mapping[str, Tensor]


def plain(rule: str) -> Tried:
    """Round-to-nearest under the scales of a rule."""
    return Tried(rule, lambda group, _: _rounded(ROUND_TO_NEAREST, group, rule, None))


def calibrated(name: str, method: Calibrated) -> Tried:
    """One of the calibrated methods, as a run has it."""
    return Tried(name, lambda group, observed: _rounded(method, group, EFFORT, observed), method)


def weighted(name: str, rule: str, importance: Callable[[Observed, str], Tensor], method: Calibrated) -> Tried:
    """Round-to-nearest under scales of the least weighted error."""

    def choose(group: Group, observed: Observed | None) -> dict[str, Tensor]:
        assert observed is not None
        shared = global_scale(torch.stack([largest_magnitude(weight) for weight in group.values()]).amax(), rule)
        factors = importance(observed, next(iter(group)).removesuffix(".weight"))
        return {
            one: nvfp4.dequantize(nvfp4.quantize(w, block_scales(w, shared, rule, "mse", factors), shared))
            for one, w in group.items()
        }

    return Tried(name, choose, method)


def _rounded(method: Method, group: Group, rule: str, observed: Observed | None) -> dict[str, Tensor]:
    target = Target(format=NVFP4, scale_rule=rule, objective="mse")
    weights = {name: weight.clone() for name, weight in group.items()}
    purpose = Purpose(runs=False, observed=observed)
    found = {}
    for choice in method.choose([WeightGroup(weights=weights, target=target)], purpose):
        assert choice.codes is not None
        found[choice.name] = dequantize(choice.codes)
    return found


def _blocks(observed: Observed, linear: str) -> Tensor:
    """E[x x^T] of each block's inputs [K/16, 16, 16]."""
    gram = observed.moments[linear].gram
    assert gram is not None
    count = len(gram) // NVFP4_BLOCK
    return gram.view(count, NVFP4_BLOCK, count, NVFP4_BLOCK).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def methods() -> list[Tried]:
    """All methods, the simplest first."""
    return [
        plain("absmax"),
        plain("four-over-six"),
        Tried("sweep, mse", plain("sweep").choose),
        calibrated("weighted, 18 codes", Calibrated(PROFILE)),
        weighted("weighted, all 126", "exhaustive", lambda o, name: o.moments[name].squares, Calibrated(PROFILE)),
        weighted("local Hessian", "weighted", _blocks, _WithGram(PROFILE)),
        calibrated("gptq", Calibrated(PROFILE, gptq=True)),
        calibrated("gptq+folds", Calibrated(PROFILE, gptq=True, folds=True)),
        calibrated("gptq+folds+descent", Calibrated(PROFILE, gptq=True, folds=True, sweeps=2)),
    ]


class _WithGram(Calibrated):
    """Observes E[x x^T] of exact inputs, as scales that are weighted by E[x^2] see them."""

    def __init__(self, profile: str) -> None:
        super().__init__(profile, gptq=True)

    def _rounds_inputs(self, fmt: TensorFormat) -> bool:
        del fmt
        return False


class _Memory:
    """Hidden states in front of a layer; what comes out of it is dropped."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._held = {batch.rows: batch.hidden for batch in batches}

    def read(self, batch: Batch) -> Tensor:
        """The states of a batch."""
        return self._held[batch.rows]

    def write(self, batch: Batch, hidden: Tensor) -> None:
        """Nothing is written."""


def main() -> None:
    options = _options()
    device = pick_device(options.device)
    dataset = load_dataset(
        options.model, options.text, num_samples=2 * options.num_samples, max_seq_length=options.max_seq_length
    )
    samples = dataset.samples
    model = open_model(options.model, activations="none")
    batches = [
        forward_pass.make_batches(samples[part::2], options.tokens_per_batch, device, pads=model.skeleton.is_causal)
        for part in range(2)
    ]
    count = len(model.skeleton.layers)
    chosen = sorted({round((place + 0.5) * count / options.layers - 0.5) for place in range(options.layers)})
    found = {method.name: Found() for method in methods()}
    for part in batches:
        forward_pass.embed(model.skeleton, embedding_weights(model), part, device)
    for index in range(chosen[-1] + 1):
        if index == chosen[0]:
            _measure(model, index, batches, device, {method.name: Found() for method in methods()})  # compiles
        if index in chosen:
            _measure(model, index, batches, device, found)
            print(f"layer {index} of {count} done", flush=True)
        layer, cache = resident_layer(model, index, device)
        for part in batches:
            forward_pass.run_layer(layer, index, part, cache=cache)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{options.model.name}, layers {', '.join(map(str, chosen))}, {sum(map(len, samples[::2])):,} tokens seen, "
        f"{sum(map(len, samples[1::2])):,} others; {where}\n"
    )
    print(_table(found))


def _measure(
    model: EvaluatedModel,
    index: int,
    batches: Sequence[Sequence[Batch]],
    device: torch.device,
    found: Mapping[str, Found],
) -> None:
    """Run all methods on one layer."""
    captured = _capture(model, index, batches, device)
    for method in methods():
        _synchronize(device)
        started = time.perf_counter()
        layer = _observed(model, index, batches[0], device)
        observed = method.observer.observe(layer) if method.observer is not None else None
        _synchronize(device)
        result = found[method.name]
        result.observing.append(time.perf_counter() - started if method.observer is not None else 0.0)
        seconds = 0.0
        for group in group_modules(captured.weights):
            weights = {f"{name}.weight": captured.weights[name] for name in group}
            started = time.perf_counter()
            values = method.choose(weights, observed)
            _synchronize(device)
            seconds += time.perf_counter() - started
            for name in group:
                kind = KINDS[ROLES[name.rpartition(".")[2]]]
                error = _errors(captured, name, values[f"{name}.weight"].float(), observed)
                result.errors.setdefault(kind, []).append(error)
        result.choosing.append(seconds)


def _errors(captured: Captured, name: str, values: Tensor, observed: Observed | None) -> Errors:
    weight = captured.weights[name]
    exact = weight.float() if observed is None else observed.scaled(f"{name}.weight", weight)
    module = "" if observed is None else observed.modules[name]
    inputs, seen = captured.others[name].float(), captured.seen[name].float()
    if observed is not None and module in observed.scaling.inputs:
        inputs, seen = inputs / observed.scaling.inputs[module], seen / observed.scaling.inputs[module]
    outputs = captured.others[name].float() @ weight.float().t()
    undo = 1.0 if observed is None or module not in observed.scaling.outputs else observed.scaling.outputs[module]
    rounded = nvfp4.quantize_dequantize_input(inputs, nvfp4.input_global_scale(float(seen.abs().amax())))
    return Errors(
        weight=_part(values - exact, exact),
        w4a16=_part((inputs @ values.t()) * undo - outputs, outputs),
        w4a4=_part((rounded @ values.t()) * undo - outputs, outputs),
    )


def _part(error: Tensor, whole: Tensor) -> float:
    return float(error.double().square().sum() / whole.double().square().sum())


def _linears(model: EvaluatedModel, index: int, layer: nn.Module) -> dict[str, str]:
    """The file's full names of a layer's linears of known roles -> the module's."""
    prefix = f"{model.skeleton.stored_layers_name}.{index}."
    names = model.skeleton.names_of_layer(index).modules.items()
    return {
        prefix + file_name: module_name
        for file_name, module_name in names
        if isinstance(layer.get_submodule(module_name), nn.Linear) and ROLES.get(file_name.rpartition(".")[2]) in KINDS
    }


def _capture(model: EvaluatedModel, index: int, batches: Sequence[Sequence[Batch]], device: torch.device) -> Captured:
    layer, _ = resident_layer(model, index, device)
    linears = _linears(model, index, layer)
    weights = {name: layer.get_parameter(f"{module}.weight").data for name, module in linears.items()}
    inputs = [_inputs(layer, index, linears, part) for part in batches]
    return Captured(weights, inputs[0], inputs[1])


def _inputs(layer: nn.Module, index: int, linears: Mapping[str, str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What comes to each linear, [tokens, K]; fused partners share it."""
    kept: dict[str, list[Tensor]] = {}
    valid: list[Tensor | None] = [None]
    handles = []
    for group in group_modules(linears):

        def hook(_: nn.Module, args: tuple[Tensor, ...], group: tuple[str, ...] = tuple(group)) -> None:
            given = args[0] if valid[0] is None else args[0].reshape(*valid[0].shape, -1)[valid[0]]
            kept.setdefault(group[0], []).append(given.reshape(-1, given.shape[-1]))

        handles.append(layer.get_submodule(linears[group[0]]).register_forward_pre_hook(hook))

    def before(batch: Batch) -> None:
        valid[0] = batch.valid

    _pass(layer, index, batches, before)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(kept[group[0]]) for group in group_modules(linears) for name in group}


def _pass(layer: nn.Module, index: int, batches: Sequence[Batch], before: Callable[[Batch], None]) -> None:
    """Run a layer on batches, whose hidden states stay as they are."""
    memory = _Memory(batches)
    forward_pass.run_layer(layer, index, batches, before, states=(memory, None))
    for batch in batches:
        batch.hidden = memory.read(batch)


def _observed(model: EvaluatedModel, index: int, batches: Sequence[Batch], device: torch.device) -> ObservedLayer:
    """The layer as a run shows it to a method."""
    layer, _ = resident_layer(model, index, device)
    prefix = f"{model.skeleton.stored_layers_name}.{index}."
    linears = _linears(model, index, layer)
    names = model.skeleton.names_of_layer(index).parameters

    def run(
        before: Callable[[Batch], None], *, max_tokens: int | None = None, spread: int = 1, with_experts: bool = True
    ) -> None:
        assert with_experts
        some = batches if max_tokens is None else forward_pass.some_batches(batches, max_tokens, spread)
        _pass(layer, index, some, before)

    return ObservedLayer(
        module=layer,
        prefix=prefix,
        linears=linears,
        parameters={prefix + file_name: name for file_name, name in names.items()},
        dtypes={name: parameter.dtype for name, parameter in layer.named_parameters() if name in names.values()},
        targets={f"{name}.weight": Target(format=NVFP4, scale_rule=EFFORT, objective="mse") for name in linears},
        experts=None,
        run=run,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(found: Mapping[str, Found]) -> str:
    kinds = list(dict.fromkeys(KINDS.values()))
    lines = [
        "Errors in percent: weight / output W4A16 / output W4A4.\n",
        f"| method | {' | '.join(kinds)} | seconds a layer: observe, choose |",
        "|---|" + "---|" * (len(kinds) + 1),
    ]
    for name, result in found.items():
        cells = [_cell(result.errors.get(kind, [])) for kind in kinds]
        times = [sum(some) / max(1, len(some)) for some in (result.observing, result.choosing)]
        observing = f"{times[0]:.2f}" if times[0] else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {observing}, {times[1]:.2f} |")
    return "\n".join(lines)


def _cell(errors: Sequence[Errors]) -> str:
    if not errors:
        return ""
    columns = [[getattr(one, name) for one in errors] for name in ("weight", "w4a16", "w4a4")]
    return " / ".join(f"{100 * sum(column) / len(column):.3g}" for column in columns)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
