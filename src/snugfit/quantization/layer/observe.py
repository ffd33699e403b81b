"""What a method finds out of a decoder layer: the exact layer runs for it, as often as it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from snugfit import distributed
from snugfit.methods.method import Method, ObservedLayer, RunLayer
from snugfit.model import forward_pass, pieces
from snugfit.quantization.layer.exchange import send_experts, send_tensors
from snugfit.quantization.layer.layer_pass import LayerPass
from snugfit.quantization.layer.load import LoadedGroup, target_of
from snugfit.quantization.layer.watched_layer import linears_of
from snugfit.storage.safetensors_header import dtype_of


def observe(run: LayerPass | None, groups: Iterable[LoadedGroup], method: Method) -> tuple[Iterable[LoadedGroup], Any]:
    """The layer's groups, and what the method measures on the layer with its exact weights.

    The layer's output is dropped: `propagate` makes the hidden states that count. All groups are in memory then, but
    for those of experts in pieces. For a method that observes nothing (or without samples) nothing runs, and the groups
    stay unread; the same for a layer that text does not run.
    """
    if method.observe is None or run is None or run.is_skipped:
        return groups, None
    held = list(groups)
    weights: dict[str, Tensor] = {}
    for group in held:
        for name, loaded in group.tensors.items():
            weight = loaded.in_dtype(dtype_of(run.plan.weights.tensors[name]))
            if not run.buffers.copy_in(name, weight):
                weights[name] = weight
    send_experts(run.buffers, run.names, run.owners)
    outside = [name for name in run.names if not run.buffers.has(name)]
    send_tensors(run.plan, outside, run.owners, weights, run.device)
    unit = run.plan.unit_of_layer(run.index)  # with experts in pieces, and what other processes have
    copied = frozenset(name for name in unit if (one := run.plan.assignments.get(name)) and one.keeps_codes)
    targets = {name: target_of(run.plan, name) for name in unit if name not in copied}
    layer = run.resident(weights)
    names = run.skeleton.names_of_layer(run.index)
    parameters = {f"{run.prefix}{file_name}": name for file_name, name in names.parameters.items()}
    observed = ObservedLayer(
        module=layer,
        prefix=run.prefix,
        linears={f"{run.prefix}{file_name}": module for file_name, module in linears_of(run, layer).items()},
        parameters=parameters,
        dtypes={parameters[name]: weight.dtype for name, weight in weights.items() if name in parameters},
        targets={name: target for name, target in targets.items() if target is not None},
        experts=run.skeleton.experts.get(run.index),
        run=_runner(run, layer),
        copied=copied,
        note=run.norm_folds.append,
        owners=run.owners if distributed.world_size() > 1 else {},
    )
    return held, method.observe(observed)


def _runner(run: LayerPass, layer: nn.Module) -> RunLayer:
    """What passes the samples through a resident layer."""

    def pass_samples(
        before: Callable[[forward_pass.Batch], None], *, max_tokens: int | None = None, with_experts: bool = True
    ) -> None:
        batches = run.batches
        if max_tokens is not None:  # the same in all processes
            batches = forward_pass.some_batches(run.some or run.all_batches or run.batches, max_tokens)
        if run.pieces is None or not with_experts:
            forward_pass.show_layer(layer, run.index, batches, before, run.states[0])
        else:
            pieces.run_layer(layer, run.index, batches, before, run.pieces.exact, states=(run.states[0], None))

    return pass_samples
