"""Everything that is decided and checked before the long work of a run. A dry run is this and no more.

`quantize` and `plan_quantization` both call `prepare`, so what a dry run accepts the run accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from snugfit import distributed
from snugfit.data.dataset import Dataset, check_files, hold_out, load_dataset, make_dataset
from snugfit.data.python_docs import no_dataset_message
from snugfit.data.set_samples import notes_on_sources
from snugfit.engines.profiles import DEFAULT_PROFILE, PROFILES
from snugfit.errors import UserError
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM, headroom_problem
from snugfit.machine import pick_device, pick_dtype
from snugfit.methods.method import SOME_SAMPLES, SOME_TOKENS, Method
from snugfit.model.forward_pass import spread_places
from snugfit.model.positions import max_positions
from snugfit.model.skeleton import Skeleton, open_skeleton
from snugfit.progress import Progress
from snugfit.quantization.division import Division, divide, groups_of, groups_of_units
from snugfit.quantization.estimate import (
    Estimate,
    ahead_of,
    check_disk,
    check_memory,
    estimate_learning,
    estimate_run,
    largest_group,
)
from snugfit.quantization.measured import Measured, recall
from snugfit.quantization.other_recipe import can_adopt
from snugfit.quantization.plan import Plan
from snugfit.quantization.recalled import recalled_squares
from snugfit.quantization.resume import check_resumable, origin, work_folder
from snugfit.quantization.ways import (
    BEST,
    EFFORTS,
    FAST,
    GOOD,
    HELD_OUT_EVERY,
    LEARNED,
    Way,
    few_tokens_note,
    learned_weights,
    may_fold_norms,
    ways_of,
    why_no_expert_folds,
    why_no_trials,
    why_not_learned,
)
from snugfit.recipes.assignment import NO_RULE, Assignment
from snugfit.recipes.recipe import AMAX
from snugfit.records.quantize import TensorRecord
from snugfit.records.statistics_file import ExpertCalibration, Statistics, load_statistics, text_digest
from snugfit.storage.checkpoint import Checkpoint, fingerprint, header_digest, read_tensor
from snugfit.storage.other_files import notes_on_loss
from snugfit.storage.staging import check_no_links, check_stageable

# of NVFP4, one for a whole weight and one for its inputs, in any dialect
_WEIGHT_SCALES = ("weight_global_scale", "weight_scale_2")
_INPUT_SCALES = ("input_global_scale", "input_scale")
GIVEN = "given"  # the way of a method that a caller brings
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 8192}
# a GPU takes more tokens of narrow layers, whose kernels it would wait for otherwise: inputs of a linear, and tokens
VALUES_PER_BATCH, MOST_TOKENS_PER_BATCH = 1 << 26, 1 << 15


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a caller asks of the calibration: which samples, on which device, how experts see them.

    `dataset` names files of text or rows, or one set; none for Python's documentation. `num_samples` and
    `max_seq_length` are None for the defaults, or for what a set says. `effort` is one of EFFORTS, None for the
    default; `target` names the engine profile that its choices are made for. `input_headroom` is a number or AMAX, None
    for the default. Nothing here is checked yet.
    """

    dataset: Sequence[str | Path] = ()
    num_samples: int | None
    max_seq_length: int | None
    shuffle_seed: int | None = None
    device: str | None = None
    tokens_per_batch: int | None = None
    dtype: str | None = None
    experts: ExpertCalibration
    statistics: str | Path | None = None
    effort: str | None = None
    target: str = DEFAULT_PROFILE
    input_headroom: float | str | None = None
    experts_per_group: int | None = None


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
                _check_copied_scales(self.plan, every_expert=True)
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


def check_options(calibration: Calibration) -> None:
    """UserError for an option that has a value it cannot have, whether or not the run will use it."""
    for name, value, least in (
        ("num_samples", calibration.num_samples, 1),
        ("max_seq_length", calibration.max_seq_length, 2),
        ("tokens_per_batch", calibration.tokens_per_batch, 1),
        ("experts_per_group", calibration.experts_per_group, 1),
        ("max_forced_tokens", calibration.experts.max_forced_tokens, 0),
        ("min_tokens_per_expert", calibration.experts.min_tokens_per_expert, 0),
    ):
        if value is not None and value < least:
            what = f"must be >= {least}, got {value}."
            raise UserError(what, code="option-invalid", where=name, remedy=f"Give {least} or more.")
    _check_effort(calibration)
    headroom_of(calibration.input_headroom)
    pick_device(calibration.device)
    check_files(calibration.dataset)
    if calibration.statistics is not None and not Path(calibration.statistics).exists():
        raise UserError(
            "no such file or directory.",
            code="file-missing",
            where=str(calibration.statistics),
            remedy="Name a file of statistics, or the directory of a quantized model.",
        )


def headroom_of(asked: float | str | None) -> float:
    """The number that an `input_headroom` stands for; UserError if it stands for none."""
    if asked is None:
        return DEFAULT_INPUT_HEADROOM
    if asked == AMAX:
        return 1.0
    if problem := headroom_problem(asked):
        remedy = f"2 doubles the range, {AMAX} is the calibrated one."
        raise UserError(problem, code="option-invalid", where="input_headroom", remedy=remedy)
    return float(asked)


def _check_effort(calibration: Calibration) -> None:
    if calibration.target not in PROFILES:
        what, remedy = f"unknown profile {calibration.target!r}.", f"Known: {', '.join(PROFILES)}."
        raise UserError(what, code="option-invalid", where="target", remedy=remedy)
    effort = calibration.effort
    if effort is None:
        return
    if effort not in EFFORTS:
        remedy = f"Choose one of {', '.join(EFFORTS)}."
        raise UserError(f"no effort {effort!r}.", code="option-invalid", where="effort", remedy=remedy)
    if effort != FAST and calibration.statistics is not None:
        raise UserError(
            f"effort {effort} needs samples, and `statistics` take their place.",
            code="option-conflict",
            where="effort",
            remedy=f"Leave `statistics` out, or set `effort` to {FAST}.",
        )


def _effort_of(plan: Plan, calibration: Calibration) -> str | None:
    """The effort of a run: `good` if nothing is asked for, `fast` without samples; None if nothing follows it."""
    if not plan.follows_effort:
        return None
    return calibration.effort or (GOOD if calibration.statistics is None else FAST)


def prepare(
    plan: Plan, calibration: Calibration, method: Method | None = None, *, samples: Dataset | None = None
) -> PreparedRun:
    """Check a plan against transformers, read the samples or statistics that it needs, and estimate the run.

    With a `method` the run takes that one; without, those that its effort names. `samples` take the place of the
    dataset's.
    """
    check_options(calibration)
    dtype = pick_dtype(calibration.dtype)
    device = pick_device(calibration.device)
    plan = with_other_files(plan)
    known = None if calibration.statistics is None else load_statistics(Path(calibration.statistics))
    if method is not None and method.observe is not None and known is not None:
        what = "this method measures the layers itself, so statistics cannot take the place of samples."
        raise UserError(what, code="option-conflict", where="statistics", remedy="Leave `statistics` out.")
    effort = _effort_of(plan, calibration) if method is None else None
    needed = plan.recipe is None or plan.needs_activations or (method is not None and method.observe is not None)
    dataset, missing = (samples, None) if samples else _load(plan, calibration, effort, needed=needed)
    if known is not None:
        where = str(calibration.statistics)
        check_statistics(known, plan.checkpoint, dataset, calibration.experts, where=where)
        dataset = None
    skeleton = check_with_transformers(plan, dtype)
    # each scale is a request to the Hub, too many for a dry run
    _check_copied_scales(plan, every_expert=plan.checkpoint.remote is None)
    recalled, said = (None, []) if known is None else _recall(plan, skeleton, known, calibration)
    tokens_per_batch = calibration.tokens_per_batch or _tokens_per_batch(plan, device)
    notes, held_out = [*_notes(plan, calibration, dataset, known), *said], None
    if effort in (GOOD, BEST):
        problem = missing or why_no_trials(plan, skeleton, dataset)
        if problem is None and dataset is not None:
            dataset, held_out = hold_out(dataset, HELD_OUT_EVERY)
        elif problem is not None:
            notes.append(_without_trials(problem, calibration))
            effort, dataset = FAST, dataset if plan.needs_activations else None
    recalls = known is not None and known.has_squares
    ways, learning = _ways(plan, skeleton, calibration, method, effort, dataset, device, recalls=recalls)
    if held_out is not None:
        names = ", ".join(
            f"{way.name} (unless {' or '.join(way.unless)} is kept)" if way.unless else way.name for way in ways
        )
        notes.append(f"to be tried on {len(held_out.samples)} held-out samples as under {calibration.target}: {names}")
        if why := why_no_expert_folds(plan, skeleton):
            notes.append(f"up and down of routed experts are not folded: {why}")
    if dataset is not None and any(way.method.correlates for way in ways):
        notes += few_tokens_note(plan, dataset.tokens)
    if effort == BEST and learning is None:
        notes.append(f"scales do not learn: {why_not_learned(plan, skeleton, dataset.tokens if dataset else 0)}")
    estimate, size, said = _estimate(
        partial(estimate_run, plan, skeleton, dataset, device, tokens_per_batch),
        ways,
        skeleton,
        device,
        calibration,
        groups_of_units(plan, runs=dataset is not None),
    )
    notes += said
    with_states = estimate.with_states(skeleton, dataset, device)
    return PreparedRun(
        plan=plan,
        way=ways[0],
        ways=ways,
        held_out=held_out,
        effort=effort,
        target=calibration.target,
        skeleton=skeleton,
        device=device,
        tokens_per_batch=tokens_per_batch,
        experts=calibration.experts,
        dataset=dataset,
        known=known,
        recalled=recalled,
        estimate=(with_states or estimate).beside(learning),
        learning=learning,
        notes=tuple(notes),
        experts_per_group=size,
        holds_states=with_states is not None,
    )


def _estimate(
    estimate: Callable[..., Estimate],
    ways: Sequence[Way],
    skeleton: Skeleton,
    device: torch.device,
    calibration: Calibration,
    groups: Sequence[Sequence[tuple[str, ...]]],
) -> tuple[Estimate, int | None, list[str]]:
    """What the run will need; how many routed experts of a layer are in memory at once, all if these fit; notes."""
    estimate = partial(
        estimate,
        observes=any(way.method.observe is not None for way in ways),
        correlates=any(way.method.correlates for way in ways),
        copies=min(2, len(ways)),
        groups=groups,
    )
    size = calibration.experts_per_group
    found = estimate(experts_per_group=size)
    if size is not None or any(way.name == GIVEN for way in ways) or found.fits(device):
        return found, size, []
    size = largest_group(skeleton, lambda number: estimate(experts_per_group=number).fits(device))
    if size is None:
        return found, None, []
    note = f"experts_per_group is {size}: there is no memory for all routed experts of a layer at once"
    return estimate(experts_per_group=size), size, [note]


def _recall(
    plan: Plan, skeleton: Skeleton, known: Statistics, calibration: Calibration
) -> tuple[list[Measured], list[str]]:
    """What statistics say of each layer, and a note on what they do not say of weights that follow the effort.

    UserError if the plan needs more, or if they do not fit its weights.
    """
    named: set[str] = set()
    for index in range(plan.num_layers):
        if index in known.layers:
            named |= {*recalled_squares(plan, skeleton, index, known)}
    found = [recall(plan, skeleton, index, known, calibration.experts) for index in range(plan.num_layers)]
    unknown = [n for n, a in plan.assignments.items() if a.follows_effort and n.removesuffix(".weight") not in named]
    if not named or not unknown:
        return found, []
    return found, [f"{len(unknown)} weights get plain scales: these statistics have no E[x^2] of theirs ({unknown[0]})"]


def _tokens_per_batch(plan: Plan, device: torch.device) -> int:
    """How many tokens pass a layer at once."""
    least = TOKENS_PER_BATCH[device.type]
    if device.type == "cpu":
        return least
    tensors = plan.weights.tensors
    widest = max(
        (max(tensors[name].shape) for unit in plan.units[1:] for name in unit if tensors[name].shape), default=1
    )
    return max(least, min(MOST_TOKENS_PER_BATCH, VALUES_PER_BATCH // widest // least * least))


def _load(
    plan: Plan, calibration: Calibration, effort: str | None, *, needed: bool
) -> tuple[Dataset | None, UserError | None]:
    """The samples, None if there is no use for them; and why there are none where nobody asked for their use."""
    wanted = needed or effort in (GOOD, BEST) if calibration.statistics is None else bool(calibration.dataset)
    try:
        return load_samples(plan, calibration) if wanted else None, None
    except UserError as error:
        if needed or calibration.effort or calibration.dataset:
            raise
        return None, error


def _without_trials(problem: UserError, calibration: Calibration) -> str:
    """The note that the default effort is `fast`; raises the problem where another one was asked for."""
    if calibration.effort is not None:
        raise problem
    return f"effort is {FAST}: {problem.what}"


def _ways(
    plan: Plan,
    skeleton: Skeleton,
    calibration: Calibration,
    method: Method | None,
    effort: str | None,
    dataset: Dataset | None,
    device: torch.device,
    *,
    recalls: bool,
) -> tuple[tuple[Way, ...], Estimate | None]:
    """The ways to be tried, and what the one that learns scales needs; None without it."""
    if method is not None:
        return (Way(GIVEN, method),), None
    folds = why_no_expert_folds(plan, skeleton) == ""
    ways = ways_of(
        plan,
        effort,
        calibration.target,
        samples_run=dataset is not None,
        tokens=dataset.tokens if dataset else 0,
        recalls=recalls,
        folds_experts=folds,
        folds_norms=may_fold_norms(plan, skeleton),
    )
    if effort != BEST or dataset is None or why_not_learned(plan, skeleton, dataset.tokens):
        return ways, None
    return (*ways, LEARNED), estimate_learning(plan, skeleton, learned_weights(plan), dataset, device)


def _notes(plan: Plan, calibration: Calibration, dataset: Dataset | None, known: Statistics | None) -> list[str]:
    """What a person should know before the run starts."""
    notes = list(plan.notes)
    if plan.recipe is not None:
        notes += notes_on_loss(plan.checkpoint.other_files)
    if calibration.effort is not None and not plan.follows_effort:
        notes.append("effort changes nothing: every rule of this recipe names its scale rule, or has no choice of one")
    if calibration.input_headroom is not None and plan.input_headroom is None:
        notes.append("input_headroom changes nothing: no nvfp4 rule of this recipe leaves it to the run")
    if dataset is not None and not calibration.dataset:
        notes.append(no_dataset_message("calibration"))
    if dataset is not None:
        notes += notes_on_sources(dataset.uses)
    if known is not None and plan.recipe is not None and known.recipe_digest not in (None, plan.recipe.digest):
        notes.append(f"the statistics were measured on weights quantized by recipe {known.recipe}, not by this one")
    return notes


def with_other_files(plan: Plan) -> Plan:
    """The plan with the model's files without weights on this disk: of a Hub model only config files are so far."""
    if plan.checkpoint.remote is None:
        return plan
    from snugfit.storage.hub import fetch_other_files

    return replace(
        plan,
        layout=replace(plan.layout, checkpoint=fetch_other_files(plan.checkpoint, to_copy=plan.recipe is not None)),
    )


def load_samples(plan: Plan, calibration: Calibration) -> Dataset:
    """The samples for a plan's model; UserError if they exceed the model's positions or vocabulary."""
    config = plan.layout.config
    vocabulary, positions = config.get("vocab_size"), max_positions(plan.checkpoint.config)
    dataset = load_dataset(
        plan.checkpoint.path,
        [Path(file) for file in calibration.dataset],
        num_samples=calibration.num_samples,
        max_seq_length=calibration.max_seq_length,
        shuffle_seed=calibration.shuffle_seed,
        vocabulary=vocabulary,
        positions=positions,
    )
    longest = max(map(len, dataset.samples))
    if positions and longest > positions:
        raise UserError(
            f"samples of {longest} tokens exceed the model's {positions} positions.",
            code="sequence-too-long",
            where=plan.layout.config_file,
            remedy=f"Set `max_seq_length` to {positions} or less.",
        )
    return dataset


def check_statistics(
    known: Statistics, checkpoint: Checkpoint, asked: Dataset | None, experts: ExpertCalibration, *, where: str
) -> None:
    """UserError if statistics are of another model, of other samples than `asked`, or of other expert settings."""
    again = "Measure them with `collect_statistics`, or leave `statistics` out."
    if known.header_digest != header_digest(checkpoint) or known.fingerprint != fingerprint(checkpoint):
        what = f"these statistics are of another model ({known.model})."
        raise UserError(what, code="statistics-mismatch", where=where, remedy=again)
    # of samples of which a part was held out, statistics have the others
    alike = [] if asked is None else [[part.digest] for part in (asked, hold_out(asked, HELD_OUT_EVERY)[0])]
    if asked is not None and [one.digest for one in known.datasets] not in alike:
        of = ", ".join(f"{one.source}: {one.num_samples} samples, {one.digest[:12]}" for one in known.datasets)
        what = f"these statistics are of other samples ({of}) than `dataset` gives ({len(asked.samples)}, "
        remedy = "Leave `dataset` out to use theirs, or measure these."
        raise UserError(f"{what}{asked.digest[:12]}).", code="statistics-mismatch", where=where, remedy=remedy)
    if not known.ranges or not any(layer.experts for layer in known.layers.values()):
        return
    if known.all_experts != experts.all_experts:
        what = f"these statistics were measured with moe_calibrate_all_experts={known.all_experts}."
        remedy = f"Set `moe_calibrate_all_experts` so, to use them. {again}"
        raise UserError(what, code="statistics-mismatch", where=where, remedy=remedy)
    if known.all_experts and known.max_forced_tokens != experts.max_forced_tokens:
        what = f"these statistics were measured with max_forced_tokens={known.max_forced_tokens}."
        remedy = f"Set `max_forced_tokens` so, to use them. {again}"
        raise UserError(what, code="statistics-mismatch", where=where, remedy=remedy)


def check_with_transformers(plan: Plan, dtype: torch.dtype | None = None) -> Skeleton:
    """transformers' model of a plan, on the meta device; UserError if it does not agree with the headers.

    It computes in `dtype`, by default the config's own.
    """
    skeleton = open_skeleton(plan.layout, dtype)
    _check_linears(plan, skeleton.linears())
    return skeleton


def _check_linears(plan: Plan, linears: Mapping[str, str]) -> None:
    """UserError if a format is given to what transformers does not run as a linear."""
    for name, assignment in plan.assignments.items():
        module = name.removesuffix(".weight")
        if _is_quantized(assignment) and module not in linears:
            assert plan.recipe is not None
            raise UserError(
                f"{module} is not a linear in transformers.",
                code="recipe-not-quantizable",
                where=plan.recipe.place_of(assignment.rule),
                remedy="Give it `format: keep` in a rule before this one.",
            )


def _check_copied_scales(plan: Plan, *, every_expert: bool) -> None:
    """UserError if linears whose NVFP4 codes are copied have several global scales, and engines run them as one.

    vLLM gives a fused group the largest divisor of its members (of ModelOpt's files: the largest multiplier). Of routed
    experts only the first of each layer is checked unless `every_expert`.
    """
    for group in (group for unit in plan.units for group in groups_of(plan, unit, runs=False)):
        assignment = plan.assignments.get(group[0])
        if len(group) == 1 or assignment is None or not assignment.keeps_codes or assignment.rule == NO_RULE:
            continue
        fmt = assignment.format
        if fmt is None or not fmt.name.startswith("nvfp4"):
            continue
        if not every_expert and ".experts." in group[0] and ".experts.0." not in group[0]:
            continue
        assert plan.recipe is not None
        parts = [plan.weights.origins[name].parts for name in group]
        for suffix in (*_WEIGHT_SCALES, *(_INPUT_SCALES if fmt.input_kind == "nvfp4" else ())):
            scales = {float(read_tensor(plan.checkpoint, one[suffix])) for one in parts if suffix in one}
            if len(scales) > 1:
                named = ", ".join(name.removesuffix(".weight") for name in group)
                raise UserError(
                    f"{named} have several {suffix} ({', '.join(map(str, sorted(scales)))}), and vLLM runs them as one "
                    "matrix product under one of these.",
                    code="scale-invalid",
                    where=plan.recipe.place_of(assignment.rule),
                    remedy="Add `requantize: true` to the rule that names them.",
                )


def _is_quantized(assignment: Assignment) -> bool:
    return assignment.format is not None and not assignment.keeps_codes
