"""Runs a decoder layer with its chosen weights, and measures the ranges of its inputs meanwhile.

Hidden states go from one file to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace

from torch import Tensor, nn

from snugfit import distributed
from snugfit.calibration.observers import KVAmax
from snugfit.model import forward_pass, pieces
from snugfit.quantization.layer.choose import UnitTensor
from snugfit.quantization.layer.layer_pass import LayerPass
from snugfit.quantization.layer.measured import Measured, not_finite, ranges_of
from snugfit.quantization.layer.watched_layer import WatchedLayer
from snugfit.records.statistics import LayerStatistics


def propagate(
    run: LayerPass, tensors: MutableMapping[str, UnitTensor], roundings: Mapping[str, Callable[[Tensor], Tensor]]
) -> Measured:
    """Run the layer with its chosen 16-bit weights over all samples, and measure the ranges of its inputs.

    FP8 inputs are quantized as an engine does, NVFP4 inputs only by the method's `roundings`, by the file's names of
    linears: their scale is what this pass measures. The 16-bit
    weights are taken out of `tensors` if codes are written for them. A layer that text does not run only hands the
    hidden states on.
    """
    if run.is_skipped:
        return _hand_on(run)
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.weight_16bit is not None:
            weights[name] = tensor.weight_16bit
            tensors[name] = replace(tensor, weight_16bit=None) if tensor.codes is not None else tensor
    layer = run.resident(weights)
    del weights
    _carry_on(run, layer)
    scales = {name: tensor.input_scale for name, tensor in tensors.items()}
    if run.pieces is not None:
        scales = {name: scales.get(name) for name in run.plan.unit_of_layer(run.index)}
        scales.update(run.pieces.input_scales())
    watched = WatchedLayer(run, layer, scales, roundings)
    cache = KVAmax() if run.index in run.plan.observed_caches else None

    def before(batch: forward_pass.Batch) -> None:
        watched.before(batch)
        if cache is not None:
            cache.before(batch)

    if run.pieces is None:
        bad = forward_pass.run_layer(layer, run.index, run.batches, before, cache=cache, states=run.states)
    else:
        chosen = run.pieces.chosen
        bad = int(pieces.run_layer(layer, run.index, run.batches, before, chosen, cache=cache, states=run.states))
    bad = _put_together(bad, watched, cache)
    if bad:
        total = sum(sum(batch.lengths) for batch in run.all_batches or run.batches)
        raise not_finite(f"hidden states of {bad} of {total} tokens", run.skeleton.dtype, where=run.prefix[:-1])
    watched.share()
    found = watched.result(cache.amax if cache else None)
    return ranges_of(run.plan, run.skeleton, run.index, found, run.experts)


def _put_together(bad: int, watched: WatchedLayer, cache: KVAmax | None) -> int:
    """The sum of `bad` over all processes, after which `watched` and `cache` have what all have seen; said at once."""
    if distributed.world_size() == 1:
        return bad
    said = distributed.gather((bad, watched.stated(), None if cache is None else cache.largest))
    watched.take([one for _, one, _ in said])
    if cache is not None:
        cache.take([one for _, _, one in said])
    return sum(one for one, _, _ in said)


def _carry_on(run: LayerPass, layer: nn.Module) -> None:
    """Have a layer that passes more on than hidden states (Gemma 4's keys and values) do so for all that is observed.

    Of several processes this one runs some of the others' batches where it observes, in this layer and later ones.
    """
    if not run.skeleton.carries_state or run.pieces is not None:
        return
    others = [batch for batch in run.some if all(batch is not one for one in run.batches)]
    if others:
        forward_pass.show_layer(layer, run.index, others, lambda _: None, run.states[0])


def _hand_on(run: LayerPass) -> Measured:
    """Hand hidden states on through a layer that text does not run."""
    for batch in run.batches:
        run.states[1].write(batch, run.states[0].read(batch))
    nothing = LayerStatistics({}, {}, None)
    return ranges_of(run.plan, run.skeleton, run.index, nothing, run.experts)
