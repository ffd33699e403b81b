"""The routed experts of a decoder layer, some at a time: each piece is read, chosen, run and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from snugfit.formats.inputs import STATIC_KINDS
from snugfit.methods.method import Method
from snugfit.model.assemble import read_single
from snugfit.model.layers import ExpertBuffers
from snugfit.model.pieces import ExpertsInPieces, Scratch
from snugfit.model.skeleton import Skeleton
from snugfit.quantization.layer import exchange
from snugfit.quantization.layer.choose import UnitTensor, choose
from snugfit.quantization.layer.division import Division, Groups, Piece
from snugfit.quantization.layer.layer_pass import LayerPieces
from snugfit.quantization.layer.load import LoadedGroup, load
from snugfit.quantization.layer.read_ahead import ReadAhead
from snugfit.quantization.layer.write import write_early
from snugfit.quantization.plan import Plan
from snugfit.storage.safetensors_header import dtype_of
from snugfit.storage.shards import ShardWriter
from snugfit.storage.transfer import Transfer


@dataclass(kw_only=True)
class PiecewiseExperts:
    """The experts of unit `number` in pieces: read exactly to be observed, or chosen, run and written.

    `buffers` are the memory of one piece, None if no samples run. What is chosen goes to `tensors`. `observed` is what
    the method found out of the layer; `observe`, if given, what it makes of each piece's groups out of statistics.
    """

    plan: Plan
    skeleton: Skeleton
    number: int
    division: Division
    transfer: Transfer
    buffers: ExpertBuffers | None
    ahead: ReadAhead
    writer: ShardWriter
    method: Method
    owners: Mapping[str, int] = field(default_factory=dict)
    observe: Callable[[Iterable[LoadedGroup]], tuple[Iterable[LoadedGroup], Any]] | None = None
    observed: Any = None
    tensors: dict[str, UnitTensor] = field(default_factory=dict)

    def exact(self) -> Iterator[range]:
        """Fill the buffers with the source's experts, piece after piece."""
        for piece in self.division.pieces:
            buffers = self._buffers_of(piece)
            mine = self._mine(piece)
            coming = ReadAhead(self.transfer, self.plan.weights, mine, 0)
            for group in load(self.plan, mine, coming):
                for name in list(group.tensors):
                    loaded = group.tensors.pop(name)
                    buffers.copy_in(name, loaded.in_dtype(dtype_of(self.plan.weights.tensors[name])))
            exchange.send_experts(buffers, piece.names, self.owners)
            yield piece.experts

    def chosen(self) -> Iterator[range]:
        """Choose codes of piece after piece, begin to write them, and leave what runs in the buffers."""
        for piece in self.division.pieces:
            buffers = None if self.buffers is None else self._buffers_of(piece)
            groups: Iterable[LoadedGroup] = load(self.plan, self._mine(piece), self.ahead)
            observed = self.observed
            if self.observe is not None:
                groups, observed = self.observe(groups)
            made = choose(self.plan, groups, self.method, buffers, observed)
            self.writer.drain()  # of the piece before
            self.tensors |= write_early(self.plan, made, self.writer)
            if buffers is not None:
                exchange.send_experts(buffers, piece.names, self.owners)
            del groups, observed, made
            yield piece.experts
        self.tensors |= {name: UnitTensor() for name in self.division.whole}

    def _mine(self, piece: Piece) -> Groups:
        """The groups of a piece that this process has."""
        return tuple(group for group in piece.groups if exchange.is_mine(self.owners, group[0]))

    def without_samples(self) -> dict[str, UnitTensor]:
        """All that is chosen, where no samples run."""
        for _ in self.chosen():
            pass
        return self.tensors

    def _buffers_of(self, piece: Piece) -> ExpertBuffers:
        assert self.buffers is not None
        buffers = self.buffers.of(self.number - 1, piece.experts)
        for name in piece.parts:
            buffers.copy_in(name, read_single(self.skeleton.stacks, name, self._read))
        return buffers

    def read(self, expert: int, role: str) -> Tensor:
        """The source's weight [N, K] of one expert's projection."""
        mixture = self.skeleton.experts[self.number - 1]
        name = f"{self.plan.decoder}.{self.number - 1}.{mixture.names[expert, role, 'weight']}"
        weights = self.plan.weights if name in self.plan.weights.tensors else self.skeleton.stacks
        return read_single(weights, name, self._read)

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        return self.transfer.read(self.plan.checkpoint, name, expert).result()

    def input_scales(self) -> dict[str, Tensor]:
        """Multipliers of inputs that come with codes of experts that stay, by the names of weights."""
        found = {}
        for name in (name for piece in self.division.pieces for group in piece.groups for name in group):
            assignment, origin = self.plan.assignments.get(name), self.plan.weights.origins.get(name)
            if assignment is None or not assignment.keeps_codes or assignment.format is None:
                continue
            if origin is None or origin.part is not None or assignment.format.input_kind not in STATIC_KINDS:
                continue
            dialect, module, tensors = self.plan.weights.dialect, name.removesuffix(".weight"), self.plan.checkpoint
            assert origin.format is not None
            names = dialect.input_part_names(module, origin.format, tensors.tensors)
            parts = {suffix: self._read(part) for suffix, part in names.items()}
            scale = dialect.input_scale(module, origin.format, parts)
            if scale is not None:
                found[name] = scale
        return found

    def of_layer(self, scratch: Scratch) -> LayerPieces:
        """What passing samples through the layer takes."""
        assert self.buffers is not None
        found = partial(
            ExpertsInPieces,
            module=self.skeleton.experts[self.number - 1].module,
            total=self.division.pieces[-1].experts.stop,
            scratch=scratch,
        )
        return LayerPieces(
            size=len(self.division.pieces[0].experts),
            exact=found(fill=self.exact),
            chosen=found(fill=self.chosen),
            read=self.read,
            input_scales=self.input_scales,
        )
