"""Second moments of the inputs of linears and of routed experts, added up while samples pass a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snugfit import distributed
from snugfit.machine import multiplies_bfloat16
from snugfit.model.experts import NoHooks
from snugfit.model.forward_pass import Batch, Enough, real_tokens

_COLUMNS = {"cpu": 192, "cuda": 512}  # of a Gram matrix made at once: it is symmetric, so half of them are enough
_ROUNDED_TOKENS = 512  # whose sum of products a CPU rounds to bfloat16 before it is added in fp32
SAMPLED_TOKENS = 512  # inputs that are kept as they are
SAMPLED_OF_EXPERT = 64  # the same of one expert: so many, up to twice as many


@dataclass(frozen=True)
class Moments:
    """Of inputs x [K] of a linear: E[x^2], fp32 [K]; E[x x^T], fp32 [K, K], None if not asked for; their number.

    `sample` are some of the inputs, [n, K], evenly spread over the first ones; `amax` is their largest magnitude.
    """

    squares: Tensor
    gram: Tensor | None
    tokens: int
    sample: Tensor | None
    amax: float


class MomentsObserver:
    """Adds up moments of the inputs of watched linears over all real tokens.

    Several processes that each see some of the batches get the same from `shared_result`: sums over a batch are added
    in the order of the batches, so that they are those of one process, to the bit; Gram matrices are added in the order
    of the processes.
    """

    def __init__(
        self,
        layer: nn.Module,
        modules: Mapping[str, bool],
        *,
        sampled: bool = False,
        ends: bool = False,
        calls: int = 0,
        owners: Mapping[str, int | None] | None = None,
    ) -> None:
        """Watch `modules` (names relative to `layer`) from now on; a Gram matrix is made where the value is True.

        If it `ends` a batch's pass, nothing behind the last call of a watched module runs: behind `calls` of them,
        which the first batch tells where they are 0.
        """
        self._valid: Tensor | None = None
        self._number = self._seen = 0
        self._ends, self.calls = ends, calls
        given = {} if owners is None else owners
        self._sums = {name: _Sums(gram=gram, sampled=sampled, owner=given.get(name)) for name, gram in modules.items()}
        self._handles = [
            layer.get_submodule(name).register_forward_pre_hook(self._hook(sums)) for name, sums in self._sums.items()
        ]

    def _hook(self, sums: _Sums):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums.add(real_tokens(args[0], self._valid), self._number)
            self._seen += 1
            if self._ends and self._seen == self.calls:
                raise Enough

        return hook

    def before(self, batch: Batch) -> None:
        """Note which tokens of the coming batch are real."""
        self._valid, self._number = batch.valid, batch.number
        self.calls, self._seen = self.calls or self._seen, 0

    def shared_result(self) -> dict[str, Moments]:
        """As `result`, of the batches of all processes, which all call it."""
        all_sums = list(self._sums.values())
        if distributed.world_size() > 1:
            said = distributed.gather([sums.stated() for sums in all_sums])
            for place, sums in enumerate(all_sums):
                sums.share([one[place] for one in said])
        return self.result()

    def result(self) -> dict[str, Moments]:
        """What was added up, by module; those that no token reached are missing. The hooks are removed."""
        for handle in self._handles:
            handle.remove()
        self.calls = self.calls or self._seen
        return {name: sums.result() for name, sums in self._sums.items() if sums.tokens and not sums.is_elsewhere}


class BatchSums:
    """A sum over batches, in their order; where several processes share them, its terms until `share` is called."""

    def __init__(self) -> None:
        self._shared = distributed.world_size() > 1
        self._terms: list[tuple[int, Tensor]] = []
        self._total: Tensor | None = None
        self.device = distributed.device()

    def add(self, term: Tensor, number: int) -> None:
        """Add what comes of batch `number`."""
        if self._shared:
            self._terms.append((number, term))
        else:
            self._total = term if self._total is None else self._total + term

    def stated(self) -> list[Any]:
        """What other processes have to know of the terms of this one."""
        return distributed.stated(self._terms)

    def share(self, said: Sequence[list[Any]]) -> None:
        """Add the terms of all processes, which all call it with what each has `stated`."""
        found = distributed.exchanged(self._terms, said)
        self._terms, self._shared = [], False
        for number, term in sorted(found, key=lambda term: term[0]):
            self.add(term, number)

    def total(self) -> Tensor | None:
        """The sum, of this process alone before `share`; None if nothing came."""
        total = self._total
        for _, term in self._terms:
            total = term if total is None else total + term
        return total


class _Sums:
    """Moments under way. Of several processes only the `owner`, if there is one, gets those with a Gram matrix."""

    def __init__(self, *, gram: bool, sampled: bool, owner: int | None = None) -> None:
        self._with_gram, self._sampled, self._owner = gram, sampled, owner
        self.is_elsewhere = False
        self._gram: Tensor | None = None
        self._squares = BatchSums()
        self._amax: Tensor | None = None
        self._samples: list[tuple[int, Tensor]] = []
        self.tokens = 0

    def add(self, inputs: Tensor, number: int = 0) -> None:
        """Take in inputs [n, K] of batch `number`."""
        if not len(inputs):
            return
        if self._sampled:
            self._samples.append((number, inputs[:: max(1, len(inputs) // SAMPLED_TOKENS)].clone()))
        low, high = inputs.aminmax()
        amax = torch.maximum(high, -low).float()
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        if self._with_gram:
            if self._gram is None:
                self._gram = torch.zeros(inputs.shape[1], inputs.shape[1], device=inputs.device)
            add_gram(self._gram, inputs)
        else:
            self._squares.add(inputs.float().square().sum(0), number)
        self.tokens += len(inputs)

    def stated(self) -> tuple[int, Tensor | None, int, list[Any], list[Any]]:
        """What other processes have to know of this one's."""
        width = 0 if self._gram is None else len(self._gram)
        return self.tokens, self._amax, width, self._squares.stated(), distributed.stated(self._samples)

    def share(self, said: Sequence[tuple[int, Tensor | None, int, list[Any], list[Any]]]) -> None:
        """Take in what all processes have taken in, which all call it with what each has `stated`."""
        self._squares.share([squares for *_, squares, _ in said])
        samples = distributed.exchanged(self._samples, [samples for *_, samples in said])
        self.tokens = sum(tokens for tokens, *_ in said)
        if not self.tokens:
            return
        self._amax = distributed.largest(amax for _, amax, *_ in said)
        self._samples = sorted(samples, key=lambda part: part[0])
        width = max(width for _, _, width, *_ in said)
        if width:
            if self._gram is None:
                self._gram = torch.zeros(width, width, device=distributed.device())
            distributed.add_up(self._gram, self._owner)
            self.is_elsewhere = self._owner not in (None, distributed.rank())
            if self.is_elsewhere:
                self._gram = None

    def result(self) -> Moments:
        """Means over all tokens."""
        assert self._amax is not None
        gram = None
        if self._gram is not None:
            gram = self._gram.tril_().div_(self.tokens)
            gram += gram.tril(-1).t()
            squares = gram.diagonal().clone()
        else:
            total = self._squares.total()
            assert total is not None
            squares = total / self.tokens
        sample = None
        if self._samples:
            sample = torch.cat([part for _, part in self._samples])
            sample = sample[:: max(1, len(sample) // SAMPLED_TOKENS)]
        return Moments(squares, gram, self.tokens, sample, float(self._amax))


def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add X^T X of inputs X [n, K] to the lower triangle of `gram`, fp32 [K, K]; in fp32.

    On CUDA values of 16 bits are multiplied as they are: their products are exact in fp32, in which they are added. On
    a CPU that multiplies bfloat16 so are those, in half the time; but torch rounds each sum over some tokens to
    bfloat16: an entry is off by some parts in 10,000, far less than by the choice of tokens.
    """
    if inputs.is_cuda and inputs.dtype in (torch.bfloat16, torch.float16):
        _add_products(gram, inputs, torch.float32)
    elif inputs.dtype == torch.bfloat16 and multiplies_bfloat16():
        for part in inputs.split(_ROUNDED_TOKENS):
            _add_products(gram, part)
    else:
        _add_products(gram, inputs.float())


def _add_products(gram: Tensor, inputs: Tensor, dtype: torch.dtype | None = None) -> None:
    """Add X^T X to the lower triangle, its products made in `dtype`, or in that of the inputs."""
    columns = _COLUMNS[inputs.device.type]
    for start in range(0, gram.shape[0], columns):
        stop = min(start + columns, gram.shape[0])
        left, right = inputs[:, start:stop].t(), inputs[:, :stop]
        if dtype is not None:
            gram[start:stop, :stop] += torch.mm(left, right, out_dtype=dtype)
        elif inputs.dtype == gram.dtype:
            gram[start:stop, :stop].addmm_(left, right)
        else:
            gram[start:stop, :stop] += left @ right


@dataclass(frozen=True)
class Kept:
    """Of the inputs number first ... end - 1 of a series the `rows` [n, K] whose number is a multiple of `stride`."""

    first: int
    end: int
    stride: int
    rows: Tensor

    def every(self, stride: int) -> Kept:
        """The multiples of a larger stride."""
        times = stride // self.stride
        place = -(-self.first // self.stride)  # of the first row, among all multiples of its stride
        return Kept(self.first, self.end, stride, self.rows[-place % times :: times].clone())


class EvenSample:
    """Some of the inputs [K] that came, evenly spread over all: where too many were kept, every second one goes.

    Kept are those whose number is a multiple of the stride, the smallest power of two that leaves few enough.
    """

    def __init__(self, count: int = SAMPLED_OF_EXPERT, first: int = 0) -> None:
        """Keep `count` or more of them, up to twice as many; `first` is the number of the first one that comes."""
        self._count = count
        self._parts: list[Tensor] = []
        self._first = self._seen = first
        self._kept = 0
        self._stride = 1

    def add(self, inputs: Tensor) -> None:
        """Take in inputs [n, K]."""
        part = inputs[-self._seen % self._stride :: self._stride].clone()
        self._seen += len(inputs)
        self._kept += len(part)
        self._parts.append(part)
        while self._kept > 2 * self._count:
            whole = self.kept().every(2 * self._stride).rows
            self._stride *= 2
            self._parts, self._kept = [whole], len(whole)

    def kept(self) -> Kept:
        """What was kept."""
        return Kept(self._first, self._seen, self._stride, torch.cat(self._parts))


def joined(parts: Sequence[Kept], count: int) -> Tensor:
    """What one sample would have kept, [n, K], of a series of which several, in its order, have kept some."""
    stride, total = 1, max(part.end for part in parts)
    while -(-total // stride) > 2 * count:
        stride *= 2
    return torch.cat([part.every(stride).rows for part in parts])


def even_samples(mine: Mapping[int, EvenSample], count: int = SAMPLED_OF_EXPERT) -> dict[int, Tensor]:
    """What is kept of each of several series of inputs, of which all processes, which all call it, have parts."""
    found: dict[int, list[Kept]] = {}
    kept = {key: sample.kept() for key, sample in mine.items()}
    stated = (((key, one.first, one.end, one.stride), one.rows) for key, one in kept.items())
    for (key, first, end, stride), rows in distributed.gather_tensors(stated):
        found.setdefault(key, []).append(Kept(first, end, stride, rows))
    return {key: joined(parts, count) for key, parts in sorted(found.items())}


class ExpertMoments(NoHooks):
    """Adds up E[x^2] of what comes to each routed expert of a layer: of gate and up, and of down.

    With `sampled` it also keeps some of the inputs of each down projection. Tokens that are forced do not count. Of
    several processes `before` says how many inputs of each expert come to those in front of this one.
    """

    def __init__(self, *, sampled: bool = False, before: Sequence[int] = ()) -> None:
        self._sampled, self._before = sampled, before
        self._watched: dict[int, EvenSample] = {}
        self._samples: dict[int, Tensor] | None = None
        self._valid: Tensor | None = None
        self._hidden = torch.empty(0)
        self._real: Tensor | None = None
        self._gate_up: Tensor | None = None
        self._down: Tensor | None = None
        self._counts: Tensor | None = None
        self._number = 0
        # of other processes than the first, which has the first batches: each batch's own sums until `share` is called
        self._apart: dict[int, tuple[Tensor, Tensor | None, Tensor]] | None = {} if distributed.rank() > 0 else None

    def before(self, batch: Batch) -> None:
        """Note which tokens of the coming batch are real."""
        self._keep()
        self._valid, self._number = batch.valid, batch.number
        if self._apart is not None:
            self._gate_up, self._down, self._counts = self._apart.get(self._number, (None, None, None))

    def _keep(self) -> None:
        """Put the sums of a batch aside, where they are kept one by one."""
        if self._apart is not None and self._gate_up is not None and self._counts is not None:
            self._apart[self._number] = self._gate_up, self._down, self._counts

    def share(self) -> None:
        """Take in what all processes have taken in, which all call it."""
        if distributed.world_size() == 1:
            return
        self._keep()
        apart = {0: (self._gate_up, self._down, self._counts)} if self._apart is None else self._apart
        self._apart = None
        by_batch = [sums for _, sums in sorted(apart.items(), key=lambda one: one[0])]
        self._gate_up, self._down, self._counts = (
            distributed.added_in_order([term for sums in by_batch if (term := sums[place]) is not None])
            for place in range(3)
        )
        if self._sampled:
            self._samples = even_samples(self._watched)

    def begin(self, hidden: Tensor, count: int) -> None:
        """A pass of hidden states [tokens, K] through `count` experts begins."""
        self._hidden = hidden
        self._real = None if self._valid is None else self._valid.reshape(-1)
        if self._gate_up is None:
            self._gate_up = torch.zeros(count, hidden.shape[1], device=hidden.device)
            self._counts = torch.zeros(count, device=hidden.device)

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:
        """Inputs of an expert's down projection [n, K], of `tokens` [n]."""
        assert self._gate_up is not None
        assert self._counts is not None
        if not forced:
            if self._down is None:
                self._down = torch.zeros(len(self._counts), hidden.shape[1], device=hidden.device)
            real = slice(None) if self._real is None else self._real[tokens]
            self._gate_up[expert] += self._hidden[tokens][real].float().square().sum(0)
            self._down[expert] += hidden[real].float().square().sum(0)
            self._counts[expert] += len(tokens) if self._real is None else self._real[tokens].sum()
            if self._sampled:
                first = self._before[expert] if self._before else 0
                self._watched.setdefault(expert, EvenSample(first=first)).add(hidden[real])
        return hidden

    def samples(self) -> dict[int, Tensor]:
        """Some of the inputs of each expert's down projection [n, K], evenly spread, by expert."""
        return even_samples(self._watched) if self._samples is None else self._samples

    def means(self) -> tuple[Tensor, Tensor] | None:
        """E[x^2] of each expert's gate and up, fp32 [E, K], and of its down, 0 without a token; None if none came."""
        if self._gate_up is None or self._down is None or self._counts is None:
            return None
        counts = self._counts.clamp(min=1)[:, None]
        return self._gate_up / counts, self._down / counts

    def result(self) -> tuple[Tensor, Tensor] | None:
        """E[x^2] of each expert's gate and up, fp32 [E, K], and of its down; None if no token came.

        Every expert's mean is drawn to that of all experts as if it had seen `PRIOR_TOKENS` more of them: one that few
        tokens reach takes theirs.
        """
        if self._gate_up is None or self._down is None or self._counts is None or not float(self._counts.sum()):
            return None
        return drawn_together(self._gate_up, self._counts), drawn_together(self._down, self._counts)


PRIOR_TOKENS = 64


def drawn_together(sums: Tensor, counts: Tensor) -> Tensor:
    """Means [E, K] of sums [E, K] over `counts` tokens [E], each drawn to that of all experts."""
    overall = sums.sum(0) / counts.sum()
    return (sums + PRIOR_TOKENS * overall) / (counts[:, None] + PRIOR_TOKENS)
