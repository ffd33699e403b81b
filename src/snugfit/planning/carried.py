"""What layers of some families pass on beside hidden states, such as Gemma 4's keys and values, and its gradients.

Such a layer puts tensors into a mapping that later layers are called with, too. Backwards, a layer that reads them
gives gradients at them; these are added up until the layer comes that made them, whose outputs they then are.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from snugfit.model.forward_pass import Batch

Entries = dict[Any, tuple[Tensor, ...]]  # keys of the mapping -> its tensors, such as keys and values [B, heads, T, D]


class Carried:
    """The gradients at what layers pass on, by batch; the tensors themselves are in the calls of batches."""

    def __init__(self) -> None:
        self._gradients: dict[int, dict[Any, list[Tensor]]] = {}

    def visit(self, batch: Batch, index: int) -> Visit:
        """One run of layer `index` on a batch, which leaves the batch as it is."""
        return Visit(batch, index, self._gradients.setdefault(batch.number, {}))


class Visit:
    """A layer's run on its own copy of what was passed on, whose tensors gradients can be had of."""

    def __init__(self, batch: Batch, index: int, gradients: dict[Any, list[Tensor]]) -> None:
        self._batch, self._index, self._gradients = batch, index, gradients
        self._wanted = dict(gradients)  # before `keep`
        found = _mapping(batch, index)
        self._name, self._held = ("", {}) if found is None else (found[0], dict(found[1]))
        self._given: Entries = {
            key: tuple(tensor.detach().requires_grad_() for tensor in tensors) for key, tensors in self._held.items()
        }
        self.batch, self._passed = self.copy(self._given)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that the layer was given."""
        return [tensor for tensors in self._given.values() for tensor in tensors]

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that the layer passed on and later ones read, and the gradients at them."""
        made = [key for key in self._made() if key in self._wanted]
        tensors = [tensor for key in made for tensor in self._passed[key]]
        wanted = [gradient for key in made for gradient in self._wanted[key]]
        return tensors, [gradient.to(one.dtype) for one, gradient in zip(tensors, wanted, strict=True)]

    def keep(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients at `leaves`; those at what the layer made are used up."""
        made = set(self._made())
        for key in made:
            self._gradients.pop(key, None)
        place = iter(gradients)
        for key, tensors in self._given.items():
            for number, (tensor, found) in enumerate(zip(tensors, place, strict=False)):
                if found is None or key in made:
                    continue
                sums = self._gradients.setdefault(key, [torch.zeros_like(one, dtype=torch.float32) for one in tensors])
                sums[number] += found.float().view_as(tensor)

    def copy(self, entries: Mapping[Any, tuple[Tensor, ...]] | None = None) -> tuple[Batch, MutableMapping[Any, Any]]:
        """The batch with a mapping of its own, and that mapping; without `entries` it has what was passed on."""
        if not self._name:
            return self._batch, {}
        args, given = self._batch.calls[self._index]
        mapping = type(given[self._name])()
        mapping.update(self._held if entries is None else entries)
        calls = list(self._batch.calls)
        calls[self._index] = args, {**given, self._name: mapping}
        return replace(self._batch, calls=calls), mapping

    def change(self, passed: MutableMapping[Any, Any]) -> Tensor | float:
        """Sum of gradient times change [B, T] of what another run passed on, against what this one did."""
        total: Tensor | float = 0.0
        for key in self._made():
            for new, old, gradient in zip(passed[key], self._passed[key], self._wanted.get(key, ()), strict=False):
                total = total + torch.linalg.vecdot(new.float() - old.detach().float(), gradient).sum(1)
        return total

    def _made(self) -> list[Any]:
        """The keys whose tensors are the layer's own."""
        return [key for key, tensors in self._passed.items() if tensors is not self._given.get(key)]


def _mapping(batch: Batch, index: int) -> tuple[str, MutableMapping[Any, Any]] | None:
    """The mapping that a layer is called with, and its name; None for a family without one."""
    _, given = batch.calls[index]
    return next(((name, value) for name, value in given.items() if isinstance(value, MutableMapping)), None)
