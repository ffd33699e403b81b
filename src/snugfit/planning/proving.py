"""The best mixes and the controls, measured on held-out text before one of them is called a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snugfit.planning.caches import scored_cache
from snugfit.planning.controls import BUILT_IN, Control, or_last, strongest
from snugfit.planning.prepare_plan import ProofSettings, contexts_of
from snugfit.planning.proof import prove
from snugfit.planning.search import Mix, choice_for_scores
from snugfit.planning.shared_pass import Assigned
from snugfit.progress import Progress
from snugfit.records.plan import PlanVerdict, ProvenKl
from snugfit.records.proof import Proof
from snugfit.records.scores import KEEP, KV_CACHE, Scores
from snugfit.records.statistics_file import Statistics

MOST_BUILT_IN = 6  # built-in recipes that are measured beside the strongest control, those of the least expected KL


@dataclass(frozen=True, kw_only=True)
class Proven:
    """What was measured of each mix by name, the verdict, and the name of the candidate that is the plan."""

    measured: Mapping[str, tuple[ProvenKl, ...]]
    verdict: PlanVerdict
    plan: str


def to_measure(candidates: Sequence[tuple[str, Mix]], controls: Sequence[Control]) -> list[tuple[str, Mix]]:
    """The candidates, the strongest other control, and the built-in recipes that fit, each way of storing once."""
    fitting = [control for control in controls if control.fits and not _among(control, candidates)]
    best = strongest(fitting)
    built_in = sorted((c for c in fitting if c.kind == BUILT_IN), key=lambda c: (or_last(c.mix.predicted.kl), c.name))
    found = list(candidates)
    for control in ([best] if best else []) + built_in[:MOST_BUILT_IN]:
        if all(control.mix.formats != mix.formats for _, mix in found):
            found.append((control.name, control.mix))
    return found


def prove_mixes(
    model: str | Path,
    candidates: Sequence[tuple[str, Mix]],
    controls: Sequence[Control],
    scores: Scores,
    statistics: Statistics,
    work_dir: Path,
    settings: ProofSettings,
    progress: Progress,
    *,
    force_resume: bool = False,
) -> Proven:
    """Measure candidates and controls in one pass; the plan is the best candidate, if it beats the best control."""
    names = {name for name, _ in candidates}
    mixes = to_measure(candidates, controls)
    rivals = [name for name, _ in mixes if name not in names]
    contexts = contexts_of(settings, scores.edges)
    proof = prove(
        model,
        [Assigned(name=name, choice=choice_to_measure(scores, mix)) for name, mix in mixes],
        control=tuple(rivals) or candidates[0][0],
        statistics=statistics,
        work_dir=work_dir,
        dataset=tuple(settings.held_out),
        contexts=contexts,
        max_tokens=settings.max_tokens,
        rounding=scores.effort,
        target=scores.target,
        device=settings.device,
        tokens_per_batch=settings.tokens_per_batch,
        force_resume=force_resume,
        progress=progress,
    )
    measured = {name: _measured(proof, name, mix, scores) for name, mix in mixes}
    plan = min(names, key=lambda name: _rank(proof, name, candidates))
    chosen = [(name, mix) for name, mix in candidates if name == plan]
    same = next((control.name for control in controls if control.fits and _among(control, chosen)), None)
    return Proven(measured=measured, verdict=_verdict(proof, plan, rivals, same), plan=plan)


def _among(control: Control, mixes: Sequence[tuple[str, Mix]]) -> bool:
    """Whether one of some mixes stores what a control does."""
    return any(control.mix.formats == mix.formats for _, mix in mixes)


def not_proven(controls: Sequence[Control], reason: str) -> PlanVerdict:
    """The verdict where nothing was measured."""
    best = strongest(controls)
    return PlanVerdict(
        accepted=None,
        control=best.name if best else None,
        gain=None,
        gain_error=None,
        statement=f"not proven: {reason}; expected figures alone are no proof",
    )


def choice_to_measure(scores: Scores, mix: Mix) -> dict[str, str]:
    """The formats of a mix; what is kept is named where engines round its inputs all the same."""
    kept = [name for name, one in mix.options.items() if one.format == KEEP and KEEP in scores.costs.get(name, {})]
    found = mix.formats | dict.fromkeys(kept, KEEP)
    if mix.kept_caches:  # its layers one by one
        del found[KV_CACHE]
    return found | (scored_cache(scores, mix.kv_cache) if mix.kept_caches else {})


def _rank(proof: Proof, name: str, candidates: Sequence[tuple[str, Mix]]) -> tuple[bool, float, int]:
    """Sort key of candidates: those that beat the control first, then by measured KL, then in their order."""
    plan = proof.plan(name)
    order = [candidate for candidate, _ in candidates].index(name)
    return not plan.beats_control, or_last(plan.overall.kl), order


def _measured(proof: Proof, name: str, mix: Mix, scores: Scores) -> tuple[ProvenKl, ...]:
    found = []
    scored = not math.isnan(mix.predicted.kl)
    for one in proof.plan(name).measured:
        expected = math.nan
        if scored and one.context and not one.text:
            choice = choice_for_scores(scores, mix.options, mix.kv_cache)
            expected = scores.predict(choice, one.context).kl
        found.append(
            ProvenKl(
                kl=one.kl, error=one.error, tokens=one.tokens, context=one.context, text=one.text, expected=expected
            )
        )
    return tuple(found)


def _verdict(proof: Proof, plan: str, rivals: Sequence[str], same: str | None) -> PlanVerdict:
    """The verdict on a plan; `same` is the control that stores what it does, if one does."""
    found = proof.plan(plan)
    is_same, other = (f" is {same}, and", "other ") if same else ("", "")
    own = f"{found.overall.kl:.4f} +- {found.overall.error:.4f} nats a token on held-out text"
    if not rivals:
        words = f" (which is {same})" if same else ""
        statement = f"{plan}{words}: KL {own}; no {other}control fits, so there is nothing to beat"
        return PlanVerdict(accepted=True, control=None, gain=None, gain_error=None, statement=statement)
    control = proof.plan(proof.control)
    gain, error = found.overall.gain, found.overall.gain_error
    accepted = bool(found.beats_control)
    against = f"{control.overall.kl:.4f} of {proof.control}"
    if accepted:
        beats = f"{plan}{is_same} beats every {other}control"
        statement = f"{beats}: KL {own} against {against}, lower by {gain:.4f} +- {error:.4f}"
    else:
        statement = (
            f"refused: {plan} does not beat {proof.control} beyond the error: KL {own} against {against}, "
            f"a difference of {gain:.4f} +- {error:.4f}; the control is the recommendation"
        )
    return PlanVerdict(accepted=accepted, control=proof.control, gain=gain, gain_error=error, statement=statement)
