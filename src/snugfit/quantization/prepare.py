"""Everything that is decided and checked before the long work of a run. A dry run is this and no more.

`quantize` and `plan_quantization` both call `prepare`, so what a dry run accepts the run accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from snugfit.data.dataset import Dataset, hold_out, load_dataset
from snugfit.data.python_docs import no_dataset_message
from snugfit.data.set_samples import notes_on_sources
from snugfit.errors import UserError
from snugfit.machine import pick_device, pick_dtype
from snugfit.methods.method import Method
from snugfit.model.positions import max_positions
from snugfit.model.skeleton import Skeleton, check_runs
from snugfit.quantization.estimate import Estimate, estimate_learning, estimate_run, largest_group
from snugfit.quantization.layer.division import groups_of_units
from snugfit.quantization.layer.measured import Measured, recall
from snugfit.quantization.layer.recalled import recalled_squares
from snugfit.quantization.options import Calibration, check_options, default_tokens_per_batch
from snugfit.quantization.plan import Plan
from snugfit.quantization.plan_checks import check_copied_scales, check_statistics, check_with_transformers
from snugfit.quantization.prepared_run import PreparedRun
from snugfit.quantization.ways import (
    BEST,
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
from snugfit.records.statistics_file import Statistics, load_statistics
from snugfit.storage.other_files import notes_on_loss

GIVEN = "given"  # the way of a method that a caller brings


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
    check_copied_scales(plan, every_expert=plan.checkpoint.remote is None)
    recalled, said = (None, []) if known is None else _recall(plan, skeleton, known, calibration)
    tokens_per_batch = calibration.tokens_per_batch or default_tokens_per_batch(plan, device)
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
        some = f"{len(held_out.samples)} held-out sample{'s' if len(held_out.samples) > 1 else ''}"
        notes.append(f"to be tried on {some} as under {calibration.target}: {names}")
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
    """The ways to be tried, and what learning scales needs, None without; UserError if samples cannot run."""
    if dataset is not None:
        check_runs(skeleton, str(plan.checkpoint.path))
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
