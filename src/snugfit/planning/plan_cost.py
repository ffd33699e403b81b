"""What a plan will cost in time, memory and disk, before it begins: `plan` with `dry_run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snugfit import distributed
from snugfit.errors import UserError
from snugfit.machine import pick_device
from snugfit.planning.budgeted import scored_choices, search
from snugfit.planning.controls import find_controls
from snugfit.planning.prepare_plan import Prepared, prepare_plan, request_of, samples_of
from snugfit.planning.proving import to_measure
from snugfit.planning.scoring_cost import ScoringEstimate, estimate_scoring
from snugfit.planning.search_cost import seconds_of_search
from snugfit.planning.sensitivity import GRADIENTS, SCORES, ScoreSettings, identity_of
from snugfit.progress import duration
from snugfit.quantization.estimate import Estimate, check_disk, check_memory
from snugfit.quantization.resume import check_resumable, work_folder
from snugfit.quantization.run_time import ROUGH_OPERATIONS

ROUGH_SECONDS = 0.5  # below which nothing is timed before a run


@dataclass(frozen=True, kw_only=True)
class PlanEstimate:
    """What planning will take: bytes at most, seconds by what takes them (None: nothing was timed), and remarks.

    `gpu_bytes` is None without a GPU. `mixes` are measured in the proof, on `held_out_tokens`, in `proof_passes` over
    the layers; `scored_tokens` and `forwards` (passes of all of them) are those of scoring, 0 where scores are reused.
    Of several `processes`, which share the work, each takes so much memory.
    """

    memory_bytes: int
    gpu_bytes: int | None
    disk_bytes: int
    scored_tokens: int
    forwards: float
    mixes: int
    proof_passes: int
    held_out_tokens: int
    scoring_seconds: float | None
    search_seconds: float | None
    proof_seconds: float | None
    processes: int
    notes: tuple[str, ...]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part, by the names of a plan's record; empty where nothing was timed."""
        parts = {"scoring": self.scoring_seconds, "search": self.search_seconds, "proof": self.proof_seconds}
        return {} if None in parts.values() else {name: taken or 0.0 for name, taken in parts.items()}

    def line(self) -> str:
        """One line for a person who decides whether to wait."""
        parts = [duration(sum(self.seconds.values()) if self.seconds else None)]
        parts += [f"{self.memory_bytes / 1e9:.1f} GB of memory"] if self.memory_bytes else []
        parts += [] if self.gpu_bytes is None else [f"{self.gpu_bytes / 1e9:.1f} GB of GPU memory"]
        if self.processes > 1:
            parts[-1] += f" in each of {self.processes} processes"
        parts += [f"{self.disk_bytes / 1e9:.2f} GB of disk"] if self.disk_bytes else []
        steps = []
        if self.scored_tokens:
            passes = f"{self.forwards:.0f} passes of {self.scored_tokens:,} tokens"
            steps.append(f"scoring {duration(self.scoring_seconds)}, {passes}")
        steps.append(f"search {duration(self.search_seconds)}")
        if self.mixes:
            passes = f"{self.mixes} mixes on {self.held_out_tokens:,} tokens"
            passes += f" in {self.proof_passes} passes" if self.proof_passes > 1 else ""
            steps.append(f"proof {duration(self.proof_seconds)}, {passes}")
        about = "about " if self.seconds else ""
        return f"planning takes {about}{', '.join(parts)}{' (' + '; '.join(steps) + ')' if steps else ''}"


def estimate_plan(
    model: str | Path,
    *,
    timed: bool = True,
    output_dir: str | Path | None = None,
    restart: bool = False,
    force_resume: bool = False,
    **options: Any,
) -> PlanEstimate:
    """What `plan` with these arguments would take; everything that it checks is checked.

    With `timed` one layer of the model is read and run on a few tokens, where memory is enough for planning, and where
    the machine can; else the times are not known. UserError as in `plan`.
    """
    folder = None if output_dir is None else Path(output_dir)
    prepared = prepare_plan(model, request_of(**options))
    if prepared.scores is not None:  # what the run finds out first
        search(scored_choices(prepared.choices, prepared.scores), prepared.scores, 1)
    if folder is not None and not restart:
        _check_resumable(prepared, work_folder(folder) / SCORES / GRADIENTS, force=force_resume)
    untimed = estimate_prepared(prepared, timed=False, folder=folder)
    if not timed or not _fits(untimed, prepared.request.proof.device):
        return untimed
    try:
        return estimate_prepared(prepared, timed=True, folder=folder)
    except (OSError, RuntimeError):  # RuntimeError: also of too little memory; what is refused is a UserError
        return untimed


def _fits(estimate: PlanEstimate, device: str | None) -> bool:
    """Whether this machine has the memory that planning takes."""
    try:
        check_memory(_needs(estimate), pick_device(device))
    except UserError:
        return False
    return True


def _check_resumable(prepared: Prepared, folder: Path, *, force: bool) -> None:
    """Raise what scoring would raise of an unfinished run whose gradients are in `folder`; write nothing."""
    if prepared.samples is not None and prepared.scores is None:
        proof = prepared.request.proof
        decided = prepared.layout, prepared.samples, prepared.score_settings(), proof.device, proof.tokens_per_batch
        check_resumable(folder, identity_of(*decided), force=force)


def estimate_prepared(prepared: Prepared, *, timed: bool, folder: Path | None = None) -> PlanEstimate:
    """What a prepared run will take that writes to `folder`."""
    request = prepared.request
    mixes = _mixes(prepared) if request.prove else 0
    proof = mixes, prepared.held_out_lengths
    found: ScoringEstimate | None = None
    if prepared.scores is None or mixes:
        found = estimate_scoring(
            prepared.layout,
            prepared.samples or samples_of(prepared.layout, request),  # a layer is timed on some
            _settings(prepared),
            device=request.proof.device,
            tokens_per_batch=request.proof.tokens_per_batch,
            timed=timed,
            proof=proof,
            scored=prepared.scores is not None,
            calibrated=prepared.statistics is not None,
            folder=folder,
        )
    scoring = prepared.scores is None and found is not None
    first = (found.first_seconds if found else None) or 0.0
    on_gpu = pick_device(request.proof.device).type == "cuda"
    return PlanEstimate(
        memory_bytes=found.memory_bytes if found else 0,
        gpu_bytes=found.gpu_bytes if found and on_gpu else None,
        disk_bytes=max(found.disk_bytes if scoring and found else 0, found.proof_disk_bytes if found else 0),
        scored_tokens=found.tokens if scoring and found else 0,
        forwards=found.forwards if scoring and found else 0.0,
        mixes=mixes,
        proof_passes=found.proof_passes if found else 0,
        held_out_tokens=prepared.held_out_tokens,
        scoring_seconds=_with(found.seconds, first) if scoring and found else 0.0,
        search_seconds=seconds_of_search(prepared.choices, prepared.request.alternatives) if timed else None,
        proof_seconds=_with(found.proof_seconds, 0.0 if scoring else first + (found.seconds or 0.0)) if found else 0.0,
        processes=distributed.asked_for(),
        notes=prepared.notes,
    )


def expected(prepared: Prepared, untimed: PlanEstimate, folder: Path) -> PlanEstimate | None:
    """What a run will take, for people; None where that is little, where it resumes, or where a layer cannot be tried.

    `untimed` is the estimate without times.
    """
    tokens = untimed.forwards * untimed.scored_tokens + (1 + untimed.mixes) * untimed.held_out_tokens
    weights = sum(menu.group.elements for menu in prepared.choices.everything)
    rough = 2.0 * weights * tokens / ROUGH_OPERATIONS[pick_device(prepared.request.proof.device).type]
    if rough < ROUGH_SECONDS * untimed.processes or work_folder(folder).exists():
        return None
    try:
        return estimate_prepared(prepared, timed=True, folder=folder)
    except (UserError, OSError, RuntimeError):  # the run says what is wrong; RuntimeError: also of too little memory
        return None


def _with(seconds: float | None, more: float) -> float | None:
    return None if seconds is None else seconds + more


def _settings(prepared: Prepared) -> ScoreSettings:
    """How the model is scored, or was scored."""
    scores = prepared.scores
    if scores is None:
        return prepared.score_settings()
    return ScoreSettings(formats=scores.formats, rounding=scores.effort, target=scores.target, seed=scores.seed)


def _mixes(prepared: Prepared) -> int:
    """How many mixes will be measured beside the original, at most."""
    choices = prepared.choices
    controls = find_controls(prepared.layout, choices.everything, choices.space, None, 1)
    alternatives, layers = prepared.request.alternatives, prepared.layout.num_layers
    simpler = alternatives > 0 and choices.space.run_length is None and layers > 1
    candidates = alternatives + 1 + int(simpler)
    return candidates + len(to_measure([], controls))


def check_resources(estimate: PlanEstimate, output_dir: Path, device: str | None) -> None:
    """UserError where this machine has less memory or disk than planning takes."""
    check_memory(_needs(estimate), pick_device(device))
    check_disk(_needs(estimate), output_dir)


def _needs(estimate: PlanEstimate) -> Estimate:
    return Estimate(ram=estimate.memory_bytes, gpu=estimate.gpu_bytes, disk=estimate.disk_bytes)
