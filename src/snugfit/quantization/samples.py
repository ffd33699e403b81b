"""The samples of a run on their way into the first layer: in batches, embedded, and where their hidden states are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from snugfit.methods.method import SOME_SAMPLES, SOME_TOKENS
from snugfit.model import forward_pass, layers
from snugfit.model.assemble import read_single
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.run import Run
from snugfit.quantization.states import RunStates, open_states
from snugfit.storage.shared_reads import SharedReads, processes_share
from snugfit.storage.transfer import Transfer


def batches_of(prepared: PreparedRun, device: torch.device) -> list[forward_pass.Batch]:
    """All samples in batches on a device; none if no samples are needed."""
    if prepared.dataset is None:
        return []
    samples, pads = prepared.dataset.samples, prepared.skeleton.is_causal
    return forward_pass.make_batches(samples, prepared.tokens_per_batch, device, pads=pads)


def some_of(prepared: PreparedRun, batches: Sequence[forward_pass.Batch]) -> list[forward_pass.Batch]:
    """Batches of a few samples, spread over all of those in `batches`, for a method that observes."""
    if prepared.dataset is None or prepared.method.observe is None:
        return []
    if prepared.skeleton.carries_state:  # which only batches have that pass every layer
        return forward_pass.some_batches(batches, SOME_TOKENS, SOME_SAMPLES)
    return forward_pass.spread_batches(
        prepared.dataset.samples,
        SOME_TOKENS,
        SOME_SAMPLES,
        min(prepared.tokens_per_batch, SOME_TOKENS // 2),  # one of them is enough for some questions
        prepared.device,
        pads=prepared.skeleton.is_causal,
    )


def states_of(
    run: Run, batches: Sequence[forward_pass.Batch], transfer: Transfer, stack: ExitStack
) -> RunStates | None:
    """The hidden states of a run's samples; None without samples."""
    if not run.runs_layers:
        return None
    prepared = run.prepared
    shape = prepared.skeleton.hidden_size, prepared.skeleton.dtype
    return open_states(run.work, batches, shape, prepared.device, transfer, stack, held=prepared.holds_states)


def embed(
    run: Run,
    transfer: Transfer,
    batches: Sequence[forward_pass.Batch],
    some: Sequence[forward_pass.Batch],
    states: RunStates | None,
) -> None:
    """Find what every layer is called with; and the first layer's hidden states, unless an earlier run passed it."""
    prepared = run.prepared
    if states is None or run.finished.done == len(prepared.plan.units):
        return
    kept, first = {id(batch) for batch in states.embedded(run.finished.done)}, states.first
    every = [*batches, *(batch for batch in some if all(batch is not one for one in batches))]

    def keep(batch: forward_pass.Batch, hidden: torch.Tensor) -> None:
        if id(batch) in kept:
            first.write(batch, hidden)

    def read(name: str) -> torch.Tensor:
        if name in prepared.plan.weights.origins:  # FP8
            return read_single(prepared.plan.weights, name).to(prepared.device)
        if processes_share(prepared.device) and prepared.plan.checkpoint.remote is None:
            return SharedReads(transfer, prepared.plan.checkpoint, [name]).result()[name]
        return transfer.read(prepared.plan.checkpoint, name).result()

    weights = layers.outer_weights(prepared.skeleton, prepared.plan.checkpoint, head=False, read=read)
    forward_pass.embed(prepared.skeleton, weights, every, prepared.device, keep)
