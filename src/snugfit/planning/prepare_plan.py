"""Everything of a plan that is decided and checked before the long work: request, choices, scores, texts. No torch.

`plan` and its dry run both call `prepare_plan`, so what a dry run accepts the run accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit.arguments import as_sequence
from snugfit.data.dataset import the_set
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.errors import UserError
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.constraints import LoadedConstraints, load_constraints
from snugfit.planning.damage import merge_scores
from snugfit.planning.groups import find_groups, follows_beside
from snugfit.planning.limits import Budget, read_place
from snugfit.planning.search import any_mix, make_mix, scored, within
from snugfit.planning.space import Choices, read_choices
from snugfit.recipes.assignment import ALONG
from snugfit.records.scores import KEEP, Scores, check_model, load_scores
from snugfit.records.statistics_file import STATISTICS_FILE, Statistics, load_statistics
from snugfit.storage.checkpoint import fingerprint, header_digest

if TYPE_CHECKING:
    from snugfit.planning.samples import Samples
    from snugfit.planning.sensitivity import ScoreSettings

ALTERNATIVES = 2
# places in errors of the held-out text -> parameters of `plan`
_PLACES = {"contexts": "held_out_contexts", "context": "held_out_contexts", "dataset": "held_out"}
_PROFILE_OF = {"ampere": "marlin", "ada": "marlin", "hopper": "marlin"}


@dataclass(frozen=True, kw_only=True)
class ProofSettings:
    """On which texts mixes are measured: files, contexts (none: chosen by scores), and tokens at each context."""

    held_out: Sequence[str | Path] = ()
    contexts: tuple[int, ...] = ()
    max_tokens: int | None = None
    device: str | None = None
    tokens_per_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What `plan` was asked for, beyond model and output; nothing here is checked yet. See `plan`."""

    budget: Budget
    menu: tuple[str, ...] = ()
    constraints: str | Path | None = None
    scores: Sequence[str | Path] = ()
    dataset: Sequence[str | Path] = ()
    max_seq_length: int | None = None
    num_tokens: int | None = None
    rounding: str | None = None
    target: str | None = None
    proof: ProofSettings = field(default_factory=ProofSettings)
    alternatives: int = ALTERNATIVES
    prove: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that is decided and checked: everything but scores, search and proof.

    `samples` are those to score or to calibrate on, None where nothing is run on any; `held_out_lengths` are the
    tokens of each row that the proof is measured on.
    """

    request: PlanRequest
    layout: ModelLayout
    choices: Choices
    target: str
    scores: Scores | None
    statistics: Statistics | None
    samples: Samples | None
    held_out_lengths: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def held_out_tokens(self) -> int:
        """The number of tokens that the proof is measured on."""
        return sum(self.held_out_lengths)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to score: those of the menu that any group can have, and no constraint excludes."""
        found = (one.format for menu in self.choices.space.menus for one in menu.options if one.format != KEEP)
        return tuple(dict.fromkeys(found))

    def score_settings(self) -> ScoreSettings:
        """How the model is to be scored; UserError for what cannot be."""
        from snugfit.planning.sensitivity import ScoreSettings, check_settings
        from snugfit.planning.variants import WEIGHTED

        settings = ScoreSettings(
            formats=self.formats,
            rounding=self.request.rounding or WEIGHTED,
            target=self.target,
            kv_cache=not self.choices.fp8_kept,  # also where this budget needs none: scores are for others, too
            seed=self.request.seed,
        )
        check_settings(settings)
        return settings


def request_of(**given: Any) -> PlanRequest:
    """The request that arguments of `plan` make."""
    budget = {name: given.pop(name) for name in [f.name for f in fields(Budget)] if name in given}
    contexts = given.pop("held_out_contexts", ())
    proof = ProofSettings(
        held_out=tuple(as_sequence(given.pop("held_out", ()))),
        contexts=(contexts,) if isinstance(contexts, int) else tuple(contexts),
        max_tokens=given.pop("max_tokens", None),
        device=given.pop("device", None),
        tokens_per_batch=given.pop("tokens_per_batch", None),
    )
    menu, dataset, scores = (tuple(as_sequence(given.pop(name, ()) or ())) for name in ("menu", "dataset", "scores"))
    given |= {"menu": tuple(map(str, menu)), "dataset": dataset, "scores": scores}
    return PlanRequest(budget=Budget(**budget), proof=proof, **given)


def prepare_plan(model: str | Path, request: PlanRequest) -> Prepared:
    """Everything that can be checked before the long work; UserError as in `plan`."""
    if request.alternatives < 0:
        what = f"must be >= 0, got {request.alternatives}."
        raise UserError(what, code="option-invalid", where="alternatives", remedy="0 lists none.")
    if (batch := request.proof.tokens_per_batch) is not None and batch < 1:
        raise UserError(f"must be >= 1, got {batch}.", code="option-invalid", where="tokens_per_batch")
    loaded = LoadedConstraints() if request.constraints is None else load_constraints(request.constraints)
    layout = read_layout(model)
    layout.check_quantizable()
    if layout.checkpoint.remote:
        what, remedy = "a plan runs the model.", "Download it, and give its directory."
        raise UserError(what, code="model-not-found", where=str(model), remedy=remedy)
    place = read_place(layout, request.budget)
    choices = read_choices(layout, place, request.menu, loaded)
    _check_possible(choices)
    _check_needed(choices)
    generation = place.server.settings.gpu.generation if place.server.settings else None
    fitting = _PROFILE_OF.get(generation or "", DEFAULT_PROFILE)
    found, statistics, notes = None, None, list(place.notes)
    if request.scores:
        found = merge_scores([(str(given), load_scores(Path(given))) for given in request.scores])
        check_model(found, header_digest(layout.checkpoint), fingerprint(layout.checkpoint), where="scores")
        beside = (_statistics_beside(Path(given), found) for given in request.scores)
        statistics = next((one for one in beside if one is not None), None)
        if request.target not in (None, found.target):
            what = f"these scores were made for {found.target}, not {request.target}."
            raise UserError(what, code="scores-mismatch", where="scores", remedy="Score again, or leave `target` out.")
        if generation is not None and found.target != fitting:
            notes.append(f"the scores were made for {found.target}, but inputs are rounded as in {fitting} on this GPU")
        if request.rounding not in (None, found.effort):
            what = f"these scores were made with {found.effort} rounding, not {request.rounding}."
            raise UserError(
                what, code="scores-mismatch", where="scores", remedy="Score again, or leave `rounding` out."
            )
        _check_rounded(found, layout)
        choices = replace(choices, space=scored(choices.space, found))
        _check_possible(choices)
    _check_used(request, statistics)
    target = found.target if found else request.target or fitting
    samples, held_out_lengths = _read_texts(layout, request, found, statistics)
    if generation is None and request.target is None and found is None:
        notes.append(f"inputs are rounded as {target} does it: no GPU is named")
    return Prepared(
        request=request,
        layout=layout,
        choices=choices,
        target=target,
        scores=found,
        statistics=statistics,
        samples=samples,
        held_out_lengths=held_out_lengths,
        notes=tuple(notes),
    )


def _read_texts(
    layout: ModelLayout, request: PlanRequest, scores: Scores | None, statistics: Statistics | None
) -> tuple[Samples | None, tuple[int, ...]]:
    """The samples that a run needs, and the tokens of the proof's rows; UserError for texts that do not suit it."""
    samples, lengths = None, tuple[int, ...]()
    if scores is None or (request.prove and statistics is None):
        samples = samples_of(layout, request)
    if request.prove:
        from snugfit.planning.proof import read_held_out

        edges = scores.edges if scores else samples.edges if samples else ()
        try:
            contexts = contexts_of(request.proof, edges)
            groups, _ = read_held_out(layout, request.proof.held_out, contexts, request.proof.max_tokens)
        except UserError as error:
            where, remedy = _PLACES.get(error.where, error.where), error.remedy.replace(", or give `max_chunks`", "")
            remedy = remedy.replace("`contexts`", "`held_out_contexts`").replace("`context`", "`held_out_contexts`")
            raise type(error)(error.what, code=error.code, where=where, remedy=remedy) from None
        lengths = tuple(len(chunk.ids) for group in groups for chunk in group.chunks)
    return samples, lengths


def samples_of(layout: ModelLayout, request: PlanRequest) -> Samples:
    """The samples that a request names; UserError as `read_samples` raises it, by the names of `plan`."""
    from snugfit.planning.samples import read_samples

    try:
        return read_samples(layout, request.dataset, context=request.max_seq_length, num_tokens=request.num_tokens)
    except UserError as error:
        where = "max_seq_length" if error.where == "context" else error.where
        remedy = error.remedy.replace("`context`", "`max_seq_length`")
        raise type(error)(error.what, code=error.code, where=where, remedy=remedy) from None


def _check_possible(choices: Choices) -> None:
    """UserError where no mix keeps limits and constraints."""
    space = choices.at(1) if choices.place.budget.longest else choices.space
    if not any(any_mix(space, cache) for cache in space.limits):
        raise choices.impossible(space)


def _check_needed(choices: Choices) -> None:
    """UserError where the model keeps all limits as it is."""
    budget, served, space = choices.place.budget, choices.place.served, choices.space
    if budget.longest and served is not None:
        space = choices.at(served.max_positions)
    elif budget.max_kl is not None:
        return
    if KEEP not in space.limits or any(menu.options[0].format != KEEP for menu in space.menus):
        return
    kept = {menu.group.name: menu.options[0] for menu in choices.everything}
    mix = make_mix(kept, KEEP, space.outside[KEEP], None, 1)
    if within(mix, space.limits[KEEP]):
        what = f"the model fits as it is ({mix.bytes.file:,} bytes): nothing has to be quantized."
        where = next(iter(space.limits[KEEP])).name
        raise UserError(what, code="recipe-changes-nothing", where=where, remedy="Ask for less.")


def _check_used(request: PlanRequest, statistics: Statistics | None) -> None:
    """UserError for an argument about samples beside scores that have their statistics, so that none are needed."""
    if not request.scores:
        return
    unused: dict[str, Any] = {"seed": request.seed}
    if statistics is not None:
        unused |= {name: getattr(request, name) for name in ("dataset", "max_seq_length", "num_tokens")}
    for name, value in unused.items():
        if value:
            what = "has no effect beside `scores`, which have been made on theirs."
            raise UserError(what, code="option-conflict", where=name, remedy="Leave it out, or score again.")


def _check_rounded(found: Scores, layout: ModelLayout) -> None:
    """UserError for scores of FP8 under other scales than a plan of their formats gives it."""
    if found.effort == "plain" or ALONG not in found.formats or found.fp8_follows:
        return
    if follows_beside(layout, find_groups(layout), found.formats):
        what = f"their FP8 has plain scales, and beside 4-bit weights it has {found.effort} ones."
        remedy = "Score FP8 and 4-bit formats again, in one run."
        raise UserError(what, code="scores-mismatch", where="scores", remedy=remedy)


def _statistics_beside(given: Path, scores: Scores) -> Statistics | None:
    """The statistics of the calibration that scores were made with, where they lie beside them."""
    file = (given if given.is_dir() else given.parent) / STATISTICS_FILE
    if not file.is_file():
        return None
    found = load_statistics(file)
    same = (found.header_digest, found.fingerprint) == (scores.header_digest, scores.fingerprint)
    return found if same else None


def contexts_of(proof: ProofSettings, edges: Sequence[int]) -> tuple[int, ...]:
    """The contexts of the proof: by default the scored one and a quarter of it, out of the ends of the scored buckets.

    Samples of a set have their own lengths, so none goes with it by itself. UserError for a set with files beside it.
    """
    if proof.contexts or the_set(proof.held_out) is not None:
        return proof.contexts
    return tuple(edges[-2:])
