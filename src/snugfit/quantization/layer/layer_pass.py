"""What running a decoder layer takes: its samples, files of hidden states, its experts' memory, the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from snugfit.model import experts, forward_pass, layers
from snugfit.model.layers import ExpertBuffers
from snugfit.model.pieces import ExpertsInPieces
from snugfit.model.skeleton import Skeleton
from snugfit.quantization.plan import Plan
from snugfit.records.norm_folds import NormFold
from snugfit.records.statistics_file import ExpertCalibration


@dataclass(frozen=True, kw_only=True)
class LayerPieces:
    """Routed experts of a layer in pieces of `size`: with the source's weights (`exact`), and as they are chosen.

    `read` gives an exact weight, `input_scales` the multipliers of inputs that come with codes that stay, by weight.
    """

    size: int
    exact: ExpertsInPieces
    chosen: ExpertsInPieces
    read: experts.ReadExpert
    input_scales: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LayerPass:
    """What running a decoder layer takes: its samples, the files of hidden states before and behind it, the device.

    `some` are batches of a few samples, spread over all, for what needs no more.
    Of a run on several processes, `batches` are those of this one out of `all_batches`, and `owners` says which process
    reads, chooses and writes each tensor of the layer, of which `names` are in memory all the time. `norm_folds` takes
    what the method notes.
    """

    plan: Plan
    skeleton: Skeleton
    index: int
    buffers: ExpertBuffers
    batches: Sequence[forward_pass.Batch]
    states: tuple[forward_pass.States, forward_pass.States]
    device: torch.device
    experts: ExpertCalibration
    pieces: LayerPieces | None = None
    some: Sequence[forward_pass.Batch] = ()
    all_batches: Sequence[forward_pass.Batch] = ()
    names: Sequence[str] = ()
    owners: Mapping[str, int] = field(default_factory=dict)
    norm_folds: list[NormFold] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """What the layer's tensors begin with in the file."""
        return f"{self.plan.decoder}.{self.index}."

    @property
    def is_skipped(self) -> bool:
        """Whether text does not run this layer."""
        return self.index in self.skeleton.skipped

    def resident(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The layer on the device with `weights` (by the file's full names) and what its expert buffers hold."""
        names = self.skeleton.names_of_layer(self.index)
        given: dict[str, Tensor] = dict(self.buffers.stacked)
        for name, weight in weights.items():
            relative = name.removeprefix(names.file_prefix)
            if relative in names.used and not self.buffers.has(name):
                given[relative] = weight
        size, read = (None, None) if self.pieces is None else (self.pieces.size, self.pieces.read)
        return layers.resident_layer(self.skeleton, self.index, given, self.device, size=size, read=read)
