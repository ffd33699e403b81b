"""Learns the block scales of a quantized model at its output: the last way of effort `best`.

It starts from the files of the way that was kept before it. Codes stay; the scales of 4-bit weights in decoder layers
follow the gradient of KL(original || quantized), mean over the tokens of calibration samples, with inputs rounded as
the target engine rounds them. All layers are on the device, as codes where they learn; each is computed a second time
in the backward pass, so that of a batch one hidden state a layer and the insides of one layer are held.

The samples come in an order from a fixed seed, and what was learned is stored as it goes: a run that was killed
anywhere ends in the same bytes. The original runs once, layer by layer, for its last hidden states.

Of several processes each has some samples of every batch; gradients are added in the order of the processes.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from snugfit import distributed
from snugfit.errors import Unfinished
from snugfit.evaluation.evaluated_model import (
    EvaluatedModel,
    embedding_weights,
    last_states,
    open_head,
    open_model,
    outer_weights,
    resident_layer,
)
from snugfit.evaluation.gpu_memory import gpu_memory_errors
from snugfit.formats.int4 import INT4Weight
from snugfit.formats.nvfp4 import NVFP4Weight
from snugfit.machine import deterministic
from snugfit.methods.learned_scales import LearnedScales, ScaledCodes, Schedule
from snugfit.model import emulate, forward_pass
from snugfit.model.forward_pass import Batch, Head
from snugfit.quantization.estimate import LEARNED_LOGITS, LEARNED_TOKENS
from snugfit.quantization.run import Outcome, Run
from snugfit.quantization.ways import learned_weights
from snugfit.storage.files import copy_changes, write_fully
from snugfit.storage.shards import Shard, file_digests

STEPS = 200
PASSES = 16  # over the samples at most
TRAVEL, MAX_RATE = 0.3, 1e-2  # how far a scale's logarithm may get in all steps, and at most in one
SEED = 0
SAVE_SECONDS = 30.0  # between two states on the disk
STATE_NAME = "learned-scales.safetensors"


def learn(run: Run, champion: Run) -> Outcome:
    """Write the champion's files with learned scales into the run's directory; their entries and digests."""
    device = run.prepared.device
    remedy = 'Run the same command where more is free, or set `effort="good"` and `restart`.'
    with run.clock("learning"), gpu_memory_errors(device, remedy, Unfinished):
        try:
            with deterministic(device, strictly=True):
                scales = _train(run, champion.directory)
        except RuntimeError as error:
            if device.type == "cpu" or isinstance(error, torch.OutOfMemoryError):
                raise
            run.progress.message(f"learned scales will differ from run to run: {str(error).partition(chr(10))[0]}")
            with deterministic(device, strictly=False):
                scales = _train(run, champion.directory)
    if distributed.is_main():
        _write(run, champion, scales)
    distributed.barrier()
    run.finished.go_back(0)
    for entry in champion.finished.entries:
        run.finished.commit(entry | {"tensors": [_learned_record(tensor, scales) for tensor in entry["tensors"]]})
    names = [shard.name for shard in run.prepared.plan.shards] if distributed.is_main() else []
    files = distributed.from_main(file_digests(run.directory, names))
    return Outcome(files=files, resumed=0, expected_seconds=None)


def _train(run: Run, directory: Path) -> dict[str, Tensor]:
    """The scales by the weight's name, as files store them."""
    model = _open(run, directory)
    learned = model.learned
    steps = learned.schedule.steps
    saved = run.work / STATE_NAME
    if _recall(saved, learned):
        run.progress.message(f"resuming after {learned.step} of {steps} steps of learning")
    losses, last_saved = [], time.monotonic()
    order = _order(steps, len(model.batches))
    with run.progress.bar(steps, "learning") as advance:
        for step in range(steps):
            if step >= learned.step:
                started = time.monotonic()
                loss = model.gradients(order[step])
                if loss is None:
                    run.progress.message(f"learning stopped after {step} steps: a gradient is not finite")
                    break
                losses.append(loss)
                learned.update()
                if len(losses) == 2:  # the first one warms up
                    run.progress.time_left((time.monotonic() - started) * (steps - step - 1))
                if distributed.is_main() and time.monotonic() - last_saved > SAVE_SECONDS:
                    _save(saved, learned)
                    last_saved = time.monotonic()
            advance()
    if losses:
        passed = losses[: len(model.batches)], losses[-len(model.batches) :]
        first, last = (sum(part) / len(part) for part in passed)
        text = f"KL on calibration samples {first:.4f} in the first of {len(losses)} steps, {last:.4f} in the last"
        run.progress.message(f"learned {learned.size:,} block scales: {text}")
    if distributed.is_main():
        _save(saved, learned)
    return learned.result()


@dataclass(frozen=True, eq=False, kw_only=True)
class _Model:
    """The champion with scales that learn, and what the original says of the samples.

    `names` are the learned weights of each layer: the module's name of the weight -> the file's. `batches` are what
    this process has of the batches, of which `tokens` says how long they are. `targets` are the original's last hidden
    states, by row.
    """

    device: torch.device
    layers: Sequence[tuple[int, nn.Module, emulate.FP8Cache | None]]
    names: Mapping[int, Mapping[str, str]]
    learned: LearnedScales
    batches: Sequence[Batch | None]
    tokens: Sequence[int]
    states: Mapping[tuple[int, ...], Tensor]
    targets: Mapping[int, Tensor]
    heads: tuple[Head, Head]
    piece: int

    def gradients(self, number: int) -> float | None:
        """Add the gradient of a batch's mean KL to that of the scales; the KL, None if anything is not finite."""
        batch, tokens = self.batches[number], self.tokens[number]
        total, problem = torch.zeros((), dtype=torch.float64, device=self.device), None
        try:
            if batch is not None:
                total = self._of_batch(batch)
        except RuntimeError as error:  # of one process all have to know
            if distributed.world_size() == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            problem = str(error)
        found = distributed.gather((float(total), problem))
        for text in (text for _, text in found if text is not None):
            raise RuntimeError(text)
        distributed.add_up(self.learned.gradient)
        self.learned.gradient.div_(tokens)  # after the backward pass: float16 would lose small numbers
        loss = sum(part for part, _ in found)
        return loss / tokens if math.isfinite(loss) and bool(self.learned.gradient.isfinite().all()) else None

    def _of_batch(self, batch: Batch) -> Tensor:
        """The sum of the KL of this process's part of a batch, whose gradient is added to that of the scales."""
        hidden = self.states[batch.rows].to(self.device)
        with set_checkpoint_early_stop(enable=False):  # hooks count their calls
            for index, layer, cache in self.layers:
                run = partial(self._run, index, layer, cache, batch)
                hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
            total, gradient = self._of_output(batch, hidden.detach())
            hidden.backward(gradient)
        return total

    def _run(
        self, index: int, layer: nn.Module, cache: emulate.FP8Cache | None, batch: Batch, hidden: Tensor
    ) -> Tensor:
        learned = self.learned
        weights = {
            module: learned.codes[name].weight(learned.shifts[name]) for module, name in self.names[index].items()
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(layer, weights, args, kwargs)

        return forward_pass.call_layer(call, index, batch, hidden, cache)

    def _of_output(self, batch: Batch, last: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the KL of all tokens, and its gradient at the last hidden states [B, T, H]; a few tokens at a time."""
        gradient, total = torch.zeros_like(last), torch.zeros((), dtype=torch.float64, device=self.device)
        for place, (row, length) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            for start in range(0, length, self.piece):
                stop = min(length, start + self.piece)
                part = last[place, start:stop].clone().requires_grad_()
                exact = self.targets[row][start:stop].to(self.device)
                loss = kl_sum(self.heads[0](exact.unsqueeze(0))[0], self.heads[1](part.unsqueeze(0))[0])
                (gradient[place, start:stop],) = torch.autograd.grad(loss, part)
                total += loss.detach()
        return total, gradient


def kl_sum(exact: Tensor, logits: Tensor) -> Tensor:
    """Sum over tokens of KL(softmax(exact) || softmax(logits)), logits [n, V], in fp32."""
    target = exact.detach().float().log_softmax(-1)
    return nn.functional.kl_div(logits.float().log_softmax(-1), target, log_target=True, reduction="sum")


def _open(run: Run, directory: Path) -> _Model:
    prepared = run.prepared
    assert prepared.dataset is not None
    device = prepared.device
    samples = _shuffled(prepared.dataset.samples)
    whole = forward_pass.make_batches(samples, LEARNED_TOKENS, device)
    batches = [_mine(batch) for batch in whole]
    own = [batch for batch in batches if batch is not None]
    rows = sorted(row for batch in own for row in batch.rows)
    original = open_model(prepared.plan.checkpoint.path, activations="none")
    some = [samples[row] for row in rows]
    positions = [torch.arange(len(sample)) for sample in some]
    last = last_states(original, some, positions, device, tokens_per_batch=prepared.tokens_per_batch) if some else []
    model = open_model(directory, activations=prepared.target)
    learns = learned_weights(prepared.plan)
    layers, names, codes = [], {}, {}
    for index in range(len(model.skeleton.layers)):
        if index in model.skeleton.skipped:
            continue
        layer, cache = resident_layer(model, index, device)
        names[index] = _learned_of_layer(model, index, learns)
        for module, name in names[index].items():
            codes[name] = _codes(model, name, layer.get_parameter(module).dtype, device)
            _drop(layer, module)
        layers.append((index, layer, cache))
    states: dict[tuple[int, ...], Tensor] = {}

    def keep(batch: Batch, hidden: Tensor) -> None:
        states[batch.rows] = hidden.cpu()

    forward_pass.embed(model.skeleton, embedding_weights(model), own, device, keep)
    return _Model(
        device=device,
        layers=layers,
        names=names,
        learned=LearnedScales(codes, _schedule(len(batches))),
        batches=batches,
        tokens=[sum(batch.lengths) for batch in whole],
        states=states,
        targets=dict(zip(rows, last, strict=True)),
        heads=_heads(original, model, device),
        piece=max(1, LEARNED_LOGITS[device.type] // model.vocabulary),
    )


def _mine(batch: Batch) -> Batch | None:
    """This process's samples of a batch; None if there are more processes than samples."""
    own = distributed.block(len(batch.rows))
    if not own:
        return None
    part = slice(own.start, own.stop)
    return replace(batch, rows=batch.rows[part], tokens=batch.tokens[part], lengths=batch.lengths[part])


def steps_of(batches: int) -> int:
    """How many steps learning has with so many batches."""
    return min(STEPS, PASSES * batches)


def _schedule(batches: int) -> Schedule:
    steps = steps_of(batches)
    return Schedule(steps, min(MAX_RATE, 2 * TRAVEL / steps))


def _heads(original: EvaluatedModel, model: EvaluatedModel, device: torch.device) -> tuple[Head, Head]:
    """The output heads, which share equal weights."""
    pool: dict[str, list[Tensor]] = {}
    outer = [outer_weights(one, device, pool) for one in (original, model)]
    return open_head(original, device, outer[0]), open_head(model, device, outer[1], gradients=True)


def _learned_of_layer(model: EvaluatedModel, index: int, learns: frozenset[str]) -> dict[str, str]:
    """The learned weights of a layer: the module's name of the weight -> the file's."""
    names = model.skeleton.names_of_layer(index)
    found = {name: names.file_prefix + file_name for file_name, name in names.parameters.items()}
    return {name: full for name, full in found.items() if full in learns}


def _codes(model: EvaluatedModel, name: str, dtype: torch.dtype, device: torch.device) -> ScaledCodes:
    module = name.removesuffix(".weight")
    found = emulate.read_codes(model.checkpoint, model.dialect, module, model.formats[module], device)
    assert isinstance(found, NVFP4Weight | INT4Weight)
    return ScaledCodes(found, dtype)


def _drop(layer: nn.Module, name: str) -> None:
    """Free a parameter, in whose place another one runs."""
    module, _, leaf = name.rpartition(".")
    old = layer.get_parameter(name)
    setattr(layer.get_submodule(module), leaf, nn.Parameter(old.new_empty(0), requires_grad=False))


def _shuffled(samples: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The samples in an order in which those of one file are not together."""
    return [
        samples[row] for row in torch.randperm(len(samples), generator=torch.Generator().manual_seed(SEED)).tolist()
    ]


def _order(steps: int, batches: int) -> list[int]:
    """The batch of each step: all of them in an order of its own in each pass."""
    generator, found = torch.Generator().manual_seed(SEED + 1), list[int]()
    while len(found) < steps:
        found += torch.randperm(batches, generator=generator).tolist()
    return found[:steps]


def _save(file: Path, learned: LearnedScales) -> None:
    """Store what was learned, whole or not at all."""
    state = {name: tensor.cpu() for name, tensor in learned.state().items()}
    beside = file.with_suffix(".new")
    save_file(state, beside, {"step": str(learned.step), "digest": _digest(state)})
    beside.replace(file)


def _recall(file: Path, learned: LearnedScales) -> bool:
    """Continue from what an earlier run stored; False if there is nothing, or if it is damaged."""
    try:
        with safe_open(file, "pt") as stored:
            state = {name: stored.get_tensor(name) for name in learned.state()}
            metadata = stored.metadata() or {}
        step, good = int(metadata["step"]), metadata["digest"] == _digest(state)
    except (OSError, SafetensorError, KeyError, ValueError):
        return False
    good = good and all(tensor.shape == (learned.size,) for tensor in state.values())
    if good:
        learned.restore(step, state)
    return good


def _digest(state: Mapping[str, Tensor]) -> str:
    return " ".join(str(zlib.crc32(state[name].numpy().data)) for name in sorted(state))


def _write(run: Run, champion: Run, scales: Mapping[str, Tensor]) -> None:
    """The champion's files with these scales; every other byte stays. Files that are there get what differs."""
    plan = run.prepared.plan
    shards = {tensor.name: shard for shard in plan.shards for tensor in shard.tensors}
    for shard in plan.shards:
        copy_changes(champion.directory / shard.name, run.directory / shard.name)
    handles = {shard.name: os.open(run.directory / shard.name, os.O_RDWR) for shard in plan.shards}
    try:
        for name, scale in scales.items():
            (stored,) = (info.name for info in plan.outputs[name] if info.name.endswith(".weight_scale"))
            _overwrite(handles[shards[stored].name], shards[stored], stored, scale)
    finally:
        for handle in handles.values():
            os.close(handle)


def _overwrite(handle: int, shard: Shard, name: str, tensor: Tensor) -> None:
    planned = next(info for info in shard.tensors if info.name == name)
    data = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    assert len(data) == planned.bytes, name
    write_fully(handle, shard.offsets[name], data)


def _learned_record(tensor: Mapping[str, Any], scales: Mapping[str, Tensor]) -> dict[str, Any]:
    """A weight's record; its relative error stays that of the scales from which learning started."""
    if tensor["name"] not in scales:
        return dict(tensor)
    return {**tensor, "scale_rule": f"{tensor['scale_rule']}+learned"}
