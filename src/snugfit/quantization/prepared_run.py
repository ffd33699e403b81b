"""A run that is decided and checked, before its long work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from snugfit import distributed
from snugfit.data.dataset import Dataset, make_dataset
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM
from snugfit.methods.method import SOME_SAMPLES, SOME_TOKENS, Method
from snugfit.model.forward_pass import spread_places
from snugfit.model.skeleton import Skeleton
from snugfit.progress import Progress
from snugfit.quantization.estimate import Estimate, ahead_of, check_disk, check_memory
from snugfit.quantization.layer.division import Division, divide, groups_of_units
from snugfit.quantization.layer.measured import Measured
from snugfit.quantization.other_recipe import can_adopt
from snugfit.quantization.plan import Plan
from snugfit.quantization.plan_checks import check_copied_scales
from snugfit.quantization.resume import check_resumable, origin, work_folder
from snugfit.quantization.ways import Way
from snugfit.records.quantize import TensorRecord
from snugfit.records.statistics_file import ExpertCalibration, Statistics, text_digest
from snugfit.storage.staging import check_no_links, check_stageable


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is decided and checked: what becomes of each tensor, on which samples and device, at what cost.

    `dataset` is None if no samples are needed; `known` are statistics that take their place, `recalled` what they say
    of each layer. `effort` is None if no rule of the recipe follows it. `ways` are to be tried, if there are several,
    on the samples `held_out`, under the engine profile `target`; the run that this describes takes `way`. `learning` is
    what the way that learns scales needs by itself, None without it. `experts_per_group` are the routed experts of a
    layer that are in memory at once, None for all. A run that does not last (`lasts`) makes files to be judged by, not
    to be kept: without what is the source's. One that `holds_states` has hidden states in the GPU's memory.
    """

    plan: Plan
    way: Way
    ways: tuple[Way, ...]
    held_out: Dataset | None
    effort: str | None
    target: str
    skeleton: Skeleton
    device: torch.device
    tokens_per_batch: int
    experts: ExpertCalibration
    dataset: Dataset | None
    known: Statistics | None
    recalled: Sequence[Measured] | None
    estimate: Estimate
    learning: Estimate | None
    notes: tuple[str, ...]
    experts_per_group: int | None = None
    lasts: bool = True
    holds_states: bool = False

    @property
    def method(self) -> Method:
        """What chooses codes."""
        return self.way.method

    def taking(self, way: Way) -> PreparedRun:
        """The run that takes one of `ways`."""
        return replace(self, way=way, ways=(way,))

    @property
    def few_are_enough(self) -> bool:
        """Whether a few samples tell what the held-out KL of this run's way is.

        So they do where nothing but ranges of inputs comes from samples, and these have headroom; experts need all.
        """
        plan = self.plan
        known = self.way.learns or self.method.observe is not None or bool(self.skeleton.experts)
        rooms = (plan.headroom_of(name) for name in plan.assignments)
        tight = bool(plan.observed_caches) or any(room and room < DEFAULT_INPUT_HEADROOM for room in rooms)
        return not known and not tight and self.dataset is not None and self.dataset.tokens >= 2 * SOME_TOKENS

    def on_few(self) -> PreparedRun:
        """This run with a few of its samples, spread over all."""
        assert self.dataset is not None
        samples = self.dataset.samples
        places = spread_places([len(sample) for sample in samples], SOME_TOKENS, SOME_SAMPLES)
        some = make_dataset([samples[place] for place in places], self.dataset.source)
        return replace(self, dataset=some, lasts=False)

    def agreed(self) -> PreparedRun:
        """The same with what all processes of the run can hold."""
        found = distributed.gather((self.experts_per_group, self.holds_states))
        size = min((size for size, _ in found if size is not None), default=None)
        return replace(self, experts_per_group=size, holds_states=all(holds for _, holds in found))

    def divisions(self) -> list[Division]:
        """What is in memory together of each unit."""
        groups = groups_of_units(self.plan, runs=self.dataset is not None)
        size = self.experts_per_group
        return [divide(self.plan, self.skeleton, number, some, size) for number, some in enumerate(groups)]

    def read_ahead_bytes(self, divisions: Sequence[Division]) -> int:
        """Bytes of weights that are read while others are worked on; 0 for one group at a time."""
        return ahead_of(self.plan, divisions, self.device)

    def records(self) -> tuple[TensorRecord, ...]:
        """A record of each tensor, without what only the run can measure; its bytes are what will be written."""
        return self.plan.records()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return self.plan.bytes

    def check_resources(
        self, output_dir: str | Path | None = None, *, restart: bool = False, force_resume: bool = False
    ) -> None:
        """UserError if memory or GPU memory would not be enough, or the run could not write to `output_dir`.

        That is so if its disk has too little space, or if it holds an unfinished run that this one cannot resume.
        """
        if self.learning is not None:
            check_memory(self.learning, self.device, remedy='All layers learn together: set `effort="good"`.')
        check_memory(self.estimate, self.device)
        if output_dir is not None:
            check_stageable(Path(output_dir), models=[self.plan.checkpoint.path])
            check_disk(self.estimate, Path(output_dir))
            if self.plan.checkpoint.remote is not None:
                check_copied_scales(self.plan, every_expert=True)
            if not restart and (work := work_folder(Path(output_dir))).is_dir():
                check_no_links(Path(output_dir))
                identity = self.identity()
                if not can_adopt(work, identity):
                    check_resumable(work, identity, force=force_resume)

    def report(self, progress: Progress) -> None:
        """Say what the run will need, and what a person should know of it."""
        progress.message(self.estimate.line())
        for note in self.notes:
            progress.message(note)

    def statistics_digest(self) -> str | None:
        """SHA-256 of the statistics that take the place of samples, None without."""
        return None if self.known is None else text_digest(self.known.to_json())

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the weight files: a run resumes only if all of it is the same."""
        plan = self.plan
        return origin(plan.checkpoint, self.device) | {
            "recipe": None if plan.recipe is None else plan.recipe.digest,
            "effort": self.effort,
            "target": None if self.effort is None else self.target,
            "way": self.way.name if len(self.ways) == 1 else [way.name for way in self.ways],
            "held_out": None if self.held_out is None else self.held_out.digest,
            "input_headroom": plan.input_headroom,
            "samples": None if self.dataset is None else self.dataset.digest,
            "statistics": self.statistics_digest(),
            "weight_files": {shard.name: shard.bytes for shard in plan.shards},
            "units": [plan.unit_digest(number) for number in range(len(plan.units))],
            "experts": [self.experts.all_experts, self.experts.max_forced_tokens],
            "tokens_per_batch": self.tokens_per_batch,
            "dtype": str(self.skeleton.dtype).removeprefix("torch."),
        }
