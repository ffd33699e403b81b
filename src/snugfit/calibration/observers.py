"""What is measured while rows pass through a layer: the inputs of its linears, the keys and values it would cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.model.cache import NoCache
from snugfit.model.experts import NoHooks
from snugfit.model.forward_pass import Batch, real_tokens
from snugfit.records.statistics import BINS, SAMPLED, SHIFT, ExpertStatistics, InputStatistics


class InputObserver:
    """Magnitudes of the inputs of watched linears over all real tokens. Fused partners share their inputs."""

    def __init__(self, layer: nn.Module, modules: Iterable[str]) -> None:
        """Watch `modules` (names relative to `layer`) from now on."""
        self._found: dict[str, _Magnitudes] = {}
        self._modules = tuple(modules)
        self._valid: Tensor | None = None
        self._first = 0
        for name in self._modules:
            self._watch(layer.get_submodule(name), name)

    def before(self, batch: Batch) -> None:
        """Tell which tokens of the coming batch are real."""
        self._valid, self._first = batch.valid, batch.first
        if distributed.world_size() > 1:  # other processes have the batches before it
            for found in self._found.values():
                found.go_to(batch.first)

    def stated(self) -> list[Any]:
        """What this process has seen, for all others."""
        return [self._found.setdefault(name, _Magnitudes()).stated() for name in self._modules]

    def take(self, said: Sequence[list[Any]]) -> None:
        """Take in what all processes, more than one, have `stated`."""
        for place, name in enumerate(self._modules):
            self._found[name].take([one[place] for one in said])

    def _watch(self, module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in self._found:
                self._found[name] = _Magnitudes()
                if distributed.world_size() > 1:
                    self._found[name].go_to(self._first)
            self._found[name].add(real_tokens(args[0], self._valid))

        module.register_forward_pre_hook(hook)

    def result(self, name: str) -> InputStatistics | None:
        """What was seen of a module; None where nothing came."""
        return self._found[name].result() if name in self._found and self._found[name].tokens else None


class _Magnitudes:
    """Adds up what `InputStatistics` holds; its numbers stay on the device until they are asked for."""

    def __init__(self, *, by_batch: bool = False) -> None:
        """With `by_batch` inputs come in no order but that of `go_to_batch`, in all processes: also without batches."""
        self.tokens = 0
        self._next = 0  # the number of the next input among all
        self._amax: Tensor | None = None
        self._histogram: Tensor | None = None
        # by batch: how many came, and their histograms [SAMPLED, BINS] by place modulo SAMPLED
        self._batch = 0
        self._counts: dict[int, int] = {}
        self._apart: dict[int, Tensor] | None = {} if by_batch else None

    def go_to(self, number: int) -> None:
        """The next input has this number among all."""
        self._next = number

    def go_to_batch(self, number: int) -> None:
        """The next inputs are the first ones of a batch; how many come before is known when all processes share."""
        self._batch, self._next = number, self._counts.get(number, 0)

    def share(self) -> None:
        """Take in what all processes have taken in, which all call it."""
        if distributed.world_size() == 1:
            return
        if self._apart is not None:
            self._histogram = self._in_order(self._apart)
        self.take(distributed.gather(self.stated()))

    def stated(self) -> tuple[int, Tensor | None, Tensor | None]:
        """What this process has taken in, for all others."""
        return self.tokens, self._amax, self._histogram

    def take(self, said: Sequence[tuple[int, Tensor | None, Tensor | None]]) -> None:
        """Take in what all processes have `stated`."""
        self.tokens, self._amax, self._histogram = distributed.tallied(said)

    def add(self, inputs: Tensor, first: int | None = None) -> None:
        """Take in inputs [n, K]; `first` is the number of the first among all that come, if not in their order."""
        if not len(inputs):
            return
        first = self._next if first is None else first
        low, high = inputs.aminmax()
        seen = torch.maximum(high, -low).float().abs()
        self._amax = seen if self._amax is None else torch.maximum(self._amax, seen)
        self.tokens += len(inputs)
        self._next += len(inputs)
        if self._apart is not None:
            self._add_apart(self._apart, inputs, first)
            return
        bins = inputs[-first % SAMPLED :: SAMPLED].float().abs().reshape(-1).view(torch.int32) >> SHIFT
        if bins.is_cuda:  # bincount would wait for the GPU
            counts = torch.histc(bins.float(), BINS, min=0, max=BINS).to(torch.int64)
        else:
            counts = torch.bincount(bins, minlength=BINS)
        self._histogram = counts if self._histogram is None else self._histogram + counts

    def _add_apart(self, apart: dict[int, Tensor], inputs: Tensor, first: int) -> None:
        bins = inputs.float().abs().view(torch.int32) >> SHIFT
        places = (torch.arange(len(inputs), device=inputs.device) + first) % SAMPLED
        flat = (bins + BINS * places[:, None]).reshape(-1)
        counts = torch.bincount(flat, minlength=SAMPLED * BINS).view(SAMPLED, BINS)
        apart[self._batch] = counts if self._batch not in apart else apart[self._batch] + counts
        self._counts[self._batch] = self._counts.get(self._batch, 0) + len(inputs)

    def _in_order(self, apart: dict[int, Tensor]) -> Tensor | None:
        """The histogram of one in SAMPLED inputs of all, of those that came here."""
        mine, found, first = distributed.rank(), None, 0
        counts = [
            (number, rank) for rank, some in enumerate(distributed.gather(self._counts)) for number in some.items()
        ]
        for (number, count), rank in sorted(counts):
            if rank == mine:
                part = apart[number][-first % SAMPLED]
                found = part if found is None else found + part
            first += count
        return found

    def result(self) -> InputStatistics:
        """All that was taken in."""
        if self._amax is None or self._histogram is None:
            return InputStatistics(0, 0.0, {})
        counts = self._histogram.tolist()
        return InputStatistics(self.tokens, float(self._amax), {n: count for n, count in enumerate(counts) if count})


class ExpertObserver(NoHooks):
    """Sees what comes to a layer's routed experts, and has each also run tokens that the router did not send it.

    Of every token at most `cap` an expert and layer are forced so, evenly spread over all `tokens`; None forces none.
    `inputs` rounds what goes in, as an engine would.
    """

    def __init__(self, inputs: NoHooks, *, cap: int | None, tokens: int) -> None:
        self._inputs = inputs
        self._stride = 0 if not cap else max(1, -(-tokens // cap))
        self._valid: Tensor | None = None
        self._rows: tuple[int, ...] = ()
        self._seen = 0
        # of experts that run some at a time, by the rows of a batch: its first number, and its tokens' largest inputs;
        # where among all inputs of down each expert's begin
        self._begun: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        self._firsts: dict[tuple[int, ...], list[int]] = {}
        self._expected = 0
        # of the pass that is under way: each token's largest input, whether it is real, its number among real ones
        self._sizes = self._real = self._numbers = torch.empty(0)
        self._counts: Tensor | None = None
        self._amax: Tensor | None = None
        self._gate_up, self._down = _Magnitudes(), _Magnitudes(by_batch=distributed.world_size() > 1)

    def before(self, batch: Batch) -> None:
        """Tell which tokens of the coming batch are real."""
        self._valid, self._rows = batch.valid, batch.rows
        if distributed.world_size() > 1:  # other processes have the batches before it
            self._seen, self._expected = batch.first, 0
            self._gate_up.go_to(batch.first)
            self._down.go_to_batch(batch.number)

    def share(self) -> None:
        """Take in what all processes have seen, which all call it."""
        if distributed.world_size() == 1:
            return
        found = distributed.gather((self._counts, self._amax))
        self._counts = distributed.added(counts for counts, _ in found)
        self._amax = distributed.largest(amax for _, amax in found)
        self._gate_up.share()
        self._down.share()

    def begin(self, hidden: Tensor, count: int) -> None:
        """A pass of hidden states [tokens, K] through `count` experts begins."""
        whole = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        self._real = whole if self._valid is None else self._valid.reshape(-1)
        self._sizes = hidden.abs().amax(1).float()  # [tokens]
        self._numbers = self._real.cumsum(0) - 1 + self._seen
        self._seen += int(self._real.sum())
        self._gate_up.add(hidden if self._valid is None else hidden[self._real])
        if self._counts is None:
            self._counts = torch.zeros(2, count, dtype=torch.int64, device=hidden.device)
            self._amax = torch.zeros(2, 2, count, device=hidden.device)  # forced, down

    def expect(self, index: Tensor) -> None:
        """Experts of each token [tokens, k] of the pass that has begun, where they will run some at a time."""
        assert self._counts is not None
        real = int(self._real.sum())
        self._begun[self._rows] = self._seen - real, self._sizes
        count = self._counts.shape[1]
        routed = torch.bincount(index[self._real].reshape(-1), minlength=count)[:count]
        ends = (routed.cumsum(0) + self._expected).tolist()
        self._firsts[self._rows] = [self._expected, *ends[:-1]]
        self._expected = ends[-1]

    def again(self, inputs: Tensor, count: int) -> None:  # noqa: ARG002
        """The batch comes to the next of its experts."""
        whole = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        self._real = whole if self._valid is None else self._valid.reshape(-1)
        first, self._sizes = self._begun[self._rows]
        self._numbers = self._real.cumsum(0) - 1 + first

    def first(self, hidden: Tensor) -> Tensor:
        """Inputs of all gate and up projections [tokens, K]."""
        return self._inputs.first(hidden)

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:
        """Inputs of an expert's down projection [n, K]."""
        assert self._counts is not None
        assert self._amax is not None
        mine, whose = hidden, tokens
        if self._valid is not None:
            real = self._real[tokens]
            mine, whose = hidden[real], tokens[real]
        if len(whose):
            low, high = mine.aminmax()
            found = torch.stack((self._sizes[whose].amax(), torch.maximum(high, -low).float()))
            kind = int(forced)
            self._counts[kind, expert] += len(mine)
            self._amax[kind, :, expert] = torch.maximum(self._amax[kind, :, expert], found)
            if not forced:
                firsts = self._firsts.get(self._rows)
                self._down.add(mine, None if firsts is None else firsts[expert])
        return self._inputs.second(expert, hidden, tokens, forced=forced)

    def forced(self, expert: int, routed: Tensor) -> Tensor | None:
        """Tokens [n] to send through an expert in addition to those `routed` to it."""
        if not self._stride:
            return None
        wanted = self._real & ((self._numbers + expert) % self._stride == 0)
        wanted[routed] = False
        return wanted.nonzero().squeeze(1)

    def result(self) -> tuple[ExpertStatistics, InputStatistics, InputStatistics]:
        """Each expert's part; all inputs of gate and up; inputs of down of routed tokens."""
        assert self._counts is not None
        assert self._amax is not None
        routed, forced = (tuple(row) for row in self._counts.tolist())
        amax = [[tuple(row) for row in kind] for kind in self._amax.tolist()]
        experts = ExpertStatistics(
            routed=routed,
            forced=forced,
            gate_up_routed=amax[0][0],
            gate_up_forced=amax[1][0],
            down_routed=amax[0][1],
            down_forced=amax[1][1],
        )
        return experts, self._gate_up.result(), self._down.result()


class KVAmax(NoCache):
    """Largest key and value magnitudes that one layer would cache, over all real tokens; given as `past_key_values`.

    Keys come as engines keep them: normalized and rotated. They pass unchanged, because the scale that an FP8 cache
    would round them under is what this pass measures; the layers behind see exact keys and values too.
    """

    def __init__(self) -> None:
        self._largest: tuple[Tensor, Tensor] | None = None
        self._valid: Tensor | None = None

    def before(self, batch: Batch) -> None:
        """Tell which tokens of the coming batch are real."""
        self._valid = batch.valid

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as they are, their magnitudes noted."""
        keys, values = self._magnitude(key_states), self._magnitude(value_states)
        if self._largest is not None:
            keys, values = torch.maximum(self._largest[0], keys), torch.maximum(self._largest[1], values)
        self._largest = keys, values
        return key_states, value_states

    @property
    def largest(self) -> tuple[Tensor, Tensor] | None:
        """What this process has seen, for all others."""
        return self._largest

    def take(self, said: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Take in what was the `largest` of all processes."""
        found = [one for one in said if one is not None]
        keys, values = (distributed.largest(one[kind] for one in found) for kind in (0, 1))
        self._largest = None if keys is None or values is None else (keys, values)

    @property
    def amax(self) -> tuple[float, float] | None:
        """Largest magnitudes of keys and of values; None where the layer has cached nothing, as linear attention."""
        return None if self._largest is None else (float(self._largest[0]), float(self._largest[1]))

    def _magnitude(self, states: Tensor) -> Tensor:
        of_tokens = torch.maximum(states.amax((1, 3)), -states.amin((1, 3)))  # [B, T]; NaN carries through
        real = of_tokens if self._valid is None else of_tokens[self._valid]
        return real.amax().float()
