"""What an evaluation will do, decided and checked before the long work: from headers, tokenizers and texts alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snugfit.data import texts
from snugfit.data.reader import check_ids
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError
from snugfit.evaluation.chunks import ChunkGroup, group_chunks
from snugfit.evaluation.evaluated_model import EvaluatedModel, open_model, refuse_hub_id
from snugfit.evaluation.measure import Measurement
from snugfit.evaluation.reference import StoredReference, load_reference, reference_key, stored_path
from snugfit.evaluation.served import ServedModel, ServerOptions
from snugfit.model.positions import max_positions
from snugfit.progress import Progress
from snugfit.records.evaluation import EvaluatedCheckpoint, EvaluatedServer, TextRecord
from snugfit.serving.answers import FULL
from snugfit.storage.staging import check_folder

METRICS_VERSION = 1
NOISE_FLOORS = ("reference", "all", "none")
FLOOR_SHARE = 8  # one chunk in this many is run again under other arithmetic
# the next wider arithmetic: as valid, rounded elsewhere
OTHER_ARITHMETIC = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
OTHER_CACHE = "Choose another folder as `reference_cache`."


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Everything that is decided and checked before the long work.

    `reference` is a model or stored predictions, None without either. `groups` are the chunks by context length.
    `notes` say what the dataset left out.
    """

    reference: EvaluatedModel | StoredReference | None
    candidates: tuple[EvaluatedModel, ...]
    tokenizer: Tokenizer
    groups: tuple[ChunkGroup, ...]
    texts: tuple[TextRecord, ...]
    notes: tuple[str, ...] = ()
    served: ServedModel | None = None

    @property
    def models(self) -> tuple[EvaluatedModel, ...]:
        """Every model whose layers are run."""
        return (*((self.reference,) if isinstance(self.reference, EvaluatedModel) else ()), *self.candidates)

    @property
    def descriptions(self) -> tuple[EvaluatedCheckpoint | EvaluatedServer, ...]:
        """What a record says of the candidates, the server last."""
        checkpoints = tuple(model.description for model in self.candidates)
        return checkpoints if self.served is None else (*checkpoints, self.served.description)


@dataclass(frozen=True)
class ReferenceFile:
    """A file that the reference's predictions are to be stored in, and what they depend on."""

    path: Path
    key: Mapping[str, Any]


def make_plan(
    models: Sequence[str | Path],
    reference: str | Path | None,
    dataset: Sequence[str | Path],
    contexts: Sequence[int],
    *,
    max_chunks: int | None,
    max_tokens: int | None,
    activations: str,
    arithmetic: torch.dtype | None,
    allow_long_context: bool,
) -> EvaluationPlan:
    """Open every model, cut the texts, and check that they belong together; reads headers and tokenizers alone."""
    for path in (*models, *(() if reference is None else (reference,))):
        refuse_hub_id(path)
    if not models and (reference is None or not Path(reference).is_dir()):
        raise UserError(
            "no model to evaluate.", code="option-missing", where="models", remedy="Name one or more model directories."
        )
    names = _names([Path(path) for path in models])
    candidates = tuple(
        open_model(path, name=name, activations=activations, arithmetic=arithmetic)
        for name, path in zip(names, models, strict=True)
    )
    files = texts.find_files([Path(file) for file in dataset])
    found: EvaluatedModel | StoredReference | None = None
    home = Path(models[0] if models else str(reference))
    if reference is not None and Path(reference).is_file():
        found = load_reference(Path(reference))
    elif reference is not None:
        name = _distinct(Path(reference).resolve().name, names)
        found = open_model(reference, name=name, activations=activations, arithmetic=arithmetic)
        home = Path(reference)
    tokenizer = Tokenizer(home)
    vocabulary = _one_vocabulary(found, candidates)
    runs = [*candidates, *([found] if isinstance(found, EvaluatedModel) else [])]
    positions = None if allow_long_context else min(filter(None, map(_positions, runs)), default=None)
    cut, records = texts.read_chunks(
        tokenizer,
        files,
        contexts,
        max_chunks=max_chunks,
        max_tokens=max_tokens,
        vocabulary=vocabulary,
        positions=positions,
    )
    plan = EvaluationPlan(
        reference=found,
        candidates=candidates,
        tokenizer=tokenizer,
        groups=group_chunks(cut),
        texts=tuple(records),
        notes=tuple(note for chunks in cut for note in chunks.notes),
    )
    sample = texts.sample_text(tokenizer, files, cut) if tokenizer.used else ""  # rows of token ids need no tokenizer
    for path in models if tokenizer.used else ():
        texts.check_tokenizer(tokenizer, Path(path), sample)
    for group in plan.groups:
        for chunk in group.chunks:
            check_ids(chunk.ids, chunk.source, vocabulary)
    if not allow_long_context:
        _check_positions(plan)
    if isinstance(found, StoredReference):
        _check_texts(found, plan, Path(str(reference)))
    return plan


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its last part, or as many parts as make all names distinct."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        where = ", ".join(map(str, paths))
        raise UserError("one model is named twice.", code="option-invalid", where=where, remedy="Name each once.")
    for parts in range(1, max((len(path.parts) for path in resolved), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")


def _distinct(name: str, others: Sequence[str]) -> str:
    """The reference's name, marked where a candidate has the same."""
    return f"{name} (reference)" if name in others else name


def _one_vocabulary(reference: EvaluatedModel | StoredReference | None, candidates: Sequence[EvaluatedModel]) -> int:
    """The size of all models' vocabularies; UserError where they differ."""
    sizes = [(model.name, model.vocabulary) for model in candidates]
    if isinstance(reference, EvaluatedModel):
        sizes.insert(0, (reference.name, reference.vocabulary))
    elif reference is not None:
        sizes.insert(0, ("the stored reference", int(reference.key["vocabulary"])))
    if len({size for _, size in sizes}) > 1:
        pairs = ", ".join(f"{name} {size}" for name, size in sizes)
        raise UserError(
            f"vocabularies differ: {pairs}.",
            code="models-mismatch",
            where="models",
            remedy="KL compares tokens: evaluate checkpoints of one model.",
        )
    return sizes[0][1]


def _check_positions(plan: EvaluationPlan) -> None:
    """UserError for a chunk that is longer than the positions of a model."""
    longest, group = max(
        ((chunk, group) for group in plan.groups for chunk in group.chunks), key=lambda found: len(found[0].ids)
    )
    for model in plan.models:
        positions = _positions(model)
        if positions is None or len(longest.ids) <= positions:
            continue
        what = f"{len(longest.ids)} tokens are beyond the model's {positions} positions"
        config = str(model.checkpoint.path / "config.json")
        where, shorter = config, "Lower `contexts`"
        if group.context == texts.CHAT:
            what, where, shorter = f"{what} ({config})", longest.source, "Shorten this row"
        raise UserError(
            f"{what}.",
            code="sequence-too-long",
            where=where,
            remedy=f"{shorter}, or set `allow_long_context` to measure beyond them.",
        )


def _positions(model: EvaluatedModel) -> int | None:
    """Positions that a model has, None where they are unknown or without a limit."""
    found = max_positions(model.checkpoint.config)
    if found is None:
        found = getattr(model.skeleton.config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _check_texts(stored: StoredReference, plan: EvaluationPlan, where: Path) -> None:
    if stored.key.get("texts") != [group.digest for group in plan.groups]:
        raise UserError(
            "this reference was stored for other texts, contexts or a tokenizer that makes other tokens.",
            code="reference-mismatch",
            where=str(where),
            remedy="Give the same `dataset`, `contexts` and `max_chunks`, or a model directory as `reference`.",
        )
    _check_counts(stored, plan, where, "Give a model directory as `reference`.")


def _check_counts(stored: StoredReference, plan: EvaluationPlan, where: Path, remedy: str) -> None:
    counts = [count for group in plan.groups for count in group.target_counts]
    if np.diff(stored.offsets).tolist() != counts:
        what = "not a stored reference (its chunks have other lengths)."
        raise UserError(what, code="reference-invalid", where=str(where), remedy=remedy)


def check_options(
    noise_floor: str,
    tokens_per_batch: int | None,
    continuations: int,
    reference_cache: str | Path | None,
    reference: str | Path | None,
    experts_per_group: int | None = None,
) -> None:
    """UserError for values that options cannot have, or that exclude each other; nothing is read."""
    if noise_floor not in NOISE_FLOORS:
        known = f"Known: {', '.join(NOISE_FLOORS)}."
        raise UserError(f"unknown: {noise_floor!r}.", code="option-invalid", where="noise_floor", remedy=known)
    limits = (
        ("tokens_per_batch", tokens_per_batch, 1),
        ("continuations", continuations, 0),
        ("experts_per_group", experts_per_group, 1),
    )
    for name, value, least in limits:
        if value is not None and value < least:
            raise UserError(f"must be >= {least}, got {value}.", code="option-invalid", where=name)
    if reference_cache is None:
        return
    where = "reference_cache"
    if reference is None:
        what, remedy = "there is no reference to store.", "Give the original model as `reference`."
        raise UserError(what, code="option-missing", where=where, remedy=remedy)
    if Path(reference).is_file():
        remedy = "Leave `reference_cache` out, or give the original model's directory as `reference`."
        raise UserError(f"{reference} is stored already.", code="option-conflict", where=where, remedy=remedy)
    if not Path(reference_cache).is_dir():
        check_folder(Path(reference_cache), remedy=OTHER_CACHE)


def check_server(server: ServerOptions | None, reference: str | Path | None) -> None:
    """UserError for a server without a model to compare it with."""
    if server is not None and (reference is None or not Path(reference).is_dir()):
        raise UserError(
            "a server is compared with the original model.",
            code="option-missing",
            where="server",
            remedy="Give its directory as `reference`: its tokenizer is needed, too.",
        )


def use_reference_cache(
    plan: EvaluationPlan, folder: str | Path | None, noise_floor: str, *, served: bool, progress: Progress
) -> tuple[EvaluationPlan, ReferenceFile | None]:
    """The plan with the reference's predictions from the cache; without them, the file to store them in."""
    model = plan.reference
    if folder is None or not isinstance(model, EvaluatedModel):
        return plan, None
    key = reference_key(
        model.checkpoint,
        digests=[group.digest for group in plan.groups],
        activations=model.activations if model.formats or model.kv_cache else "any",
        arithmetic=f"{model.arithmetic_name} {METRICS_VERSION}",
        floor_chunks=[0 if noise_floor == "none" else len(floor_chunks(group)) for group in plan.groups],
        vocabulary=model.vocabulary,
    )
    path = stored_path(Path(folder), key)
    if not path.exists():
        check_folder(Path(folder), remedy=OTHER_CACHE)
        return plan, ReferenceFile(path, key)
    if served:  # there is no divergence between a server's few tokens and a stored reference's
        return plan, None
    again = "Remove this file: it will be made again."
    stored = load_reference(path, remedy=again)
    _check_counts(stored, plan, path, again)
    progress.message(f"{path}: the reference's predictions are read from this file")
    return replace(plan, reference=stored), None


def floor_chunks(group: ChunkGroup) -> list[int]:
    """The chunks of a group that are measured twice: one in FLOOR_SHARE, at least two, evenly spread over the texts."""
    total = len(group.chunks)
    count = min(total, max(2, math.ceil(total / FLOOR_SHARE)))
    return [place * total // count for place in range(count)]


def plan_measurements(plan: EvaluationPlan, noise_floor: str, device: torch.device) -> list[Measurement]:
    """What to measure, in the order of the tables (reference, candidates, server), then the noise floors."""
    reference = _reference_measurement(plan, device)
    stored = isinstance(plan.reference, StoredReference)
    candidates = [
        Measurement(
            name=model.name,
            kind="candidate",
            model=model,
            compared_with=reference,
            kl_kind="estimate" if stored else "exact",
        )
        for model in plan.candidates
    ]
    rows = [*([] if reference is None else [reference]), *candidates]
    if plan.served is not None:
        server = Measurement(
            name=plan.served.description.name,
            kind="server",
            predictions=plan.served.predictions(device),
            compared_with=reference,
            kl_kind="exact" if plan.served.top == FULL else "lower bound",
        )
        rows.append(server)
    chosen = {"none": (), "reference": ("reference",), "all": ("reference", "candidate")}[noise_floor]
    return rows + [_floor_measurement(plan, one, one.model) for one in rows if one.kind in chosen and one.model]


def _reference_measurement(plan: EvaluationPlan, device: torch.device) -> Measurement | None:
    if isinstance(plan.reference, EvaluatedModel):
        return Measurement(name=plan.reference.name, kind="reference", model=plan.reference)
    if plan.reference is None:
        return None
    name = _distinct(plan.reference.description.name, [model.name for model in plan.candidates])
    return Measurement(name=name, kind="reference", predictions=plan.reference.predictions(device))


def _floor_measurement(plan: EvaluationPlan, one: Measurement, model: EvaluatedModel) -> Measurement:
    """The same model in the next wider arithmetic, on some of the chunks."""
    again = open_model(
        model.checkpoint.path,
        name=model.name,
        activations=model.activations,
        arithmetic=OTHER_ARITHMETIC[model.arithmetic],
    )
    again = replace(again, experts_per_group=model.experts_per_group)
    numbers = (group.chunks[place].number for group in plan.groups for place in floor_chunks(group))
    return Measurement(name=one.name, kind="noise floor", model=again, compared_with=one, chunks=frozenset(numbers))
