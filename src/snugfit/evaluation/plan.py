"""What an evaluation will do, decided and checked before the long work: on headers, tokenizers and texts alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snugfit.data import texts
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError
from snugfit.evaluation import reference
from snugfit.evaluation.measure import scored_places
from snugfit.evaluation.served import Served, ServerOptions
from snugfit.evaluation.subject import Subject, open_subject
from snugfit.records.evaluation import TextRecord
from snugfit.storage.staging import check_folder

METRICS_VERSION = 1
FLOORS = ("reference", "all", "none")
FLOOR_SHARE = 8  # one chunk in so many is run again under other arithmetic
OTHER_CACHE = "Choose another folder as --reference-cache."


@dataclass(frozen=True)
class Model:
    """A model of the evaluation: its name in tables, and where it is."""

    name: str
    subject: Subject


@dataclass(frozen=True)
class Job:
    """Everything decided and checked before the long work.

    `base` is the reference's model or stored predictions, None without either. `groups` are the chunks by context.
    """

    base: Model | reference.Reference | None
    candidates: tuple[Model, ...]
    tokenizer: Tokenizer
    groups: tuple[texts.Chunks, ...]
    files: tuple[TextRecord, ...]
    served: Served | None = None

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """Token rows of all groups, one after the other."""
        return [row for group in self.groups for row in group.rows]

    @property
    def places(self) -> list[NDArray[np.int64]]:
        """Scored positions of each row."""
        return scored_places(self.rows, [scored for group in self.groups for scored in group.scored])


def prepare(
    candidates: Sequence[str | Path],
    base: str | Path | None,
    text: Sequence[str | Path],
    contexts: Sequence[int],
    cut: Mapping[str, int | None],
    activations: str,
    *,
    force: bool,
) -> Job:
    """Open every model, cut the texts, and check that they belong together; reads headers and tokenizers alone."""
    if not candidates and (base is None or not Path(base).is_dir()):
        raise UserError("no checkpoint to evaluate.", remedy="Name one or more model directories.")
    names = _names([Path(path) for path in candidates])
    models = tuple(
        Model(name, open_subject(path, activations=activations)) for name, path in zip(names, candidates, strict=True)
    )
    files = texts.find_files([Path(file) for file in text])
    known: Model | reference.Reference | None = None
    home = Path(candidates[0] if candidates else str(base))
    if base is not None and Path(base).is_file():
        known = reference.load_reference(Path(base))
    elif base is not None:
        known = Model(apart(Path(base).resolve().name, names), open_subject(base, activations=activations))
        home = Path(base)
    tokenizer = Tokenizer(home)
    vocabulary = _one_vocabulary(known, models)
    groups, records = texts.read_chunks(tokenizer, files, contexts, **cut, vocabulary=vocabulary)
    job = Job(known, models, tokenizer, tuple(groups), tuple(records))
    sample = texts.sample_text(files) if tokenizer.used else ""  # rows of token ids need no tokenizer
    for path in candidates if tokenizer.used else ():
        texts.check_tokenizer(tokenizer, Path(path), sample)
    for group in groups:
        for row, source in zip(group.rows, group.sources, strict=True):
            texts.check_ids(row, source, vocabulary)
    _check_positions(job, force=force)
    if isinstance(known, reference.Reference):
        _check_stored(known, job, Path(str(base)))
    return job


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its last part, or as many as tell them apart."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise UserError("one checkpoint is named twice.", where=", ".join(map(str, paths)), remedy="Name each once.")
    for parts in range(1, max((len(path.parts) for path in resolved), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")


def apart(name: str, others: Sequence[str]) -> str:
    """The reference's name, told from the candidates'."""
    return f"{name} (reference)" if name in others else name


def _one_vocabulary(known: Model | reference.Reference | None, candidates: Sequence[Model]) -> int:
    """The size of all models' vocabularies; UserError where they differ."""
    sizes = [(model.name, model.subject.vocabulary) for model in candidates]
    if isinstance(known, Model):
        sizes.insert(0, (known.name, known.subject.vocabulary))
    elif known is not None:
        sizes.insert(0, ("the stored reference", int(known.key["vocabulary"])))
    if len({size for _, size in sizes}) > 1:
        pairs = ", ".join(f"{name} {size}" for name, size in sizes)
        raise UserError(
            f"vocabularies differ: {pairs}.", remedy="KL compares tokens: evaluate checkpoints of one model."
        )
    return sizes[0][1]


def _check_positions(job: Job, *, force: bool) -> None:
    lengths = [(len(row), n, group) for group in job.groups for n, row in enumerate(group.rows)]
    longest, place, group = max(lengths, key=lambda found: found[0])
    for model in walked(job):
        positions = getattr(model.subject.skeleton.config, "max_position_embeddings", None)
        if force or not isinstance(positions, int) or longest <= positions:
            continue
        what, config = f"{longest} tokens are beyond the model's {positions} positions", "config.json"
        where = str(model.subject.checkpoint.path / config)
        remedy = "Give shorter contexts, or --force to see what happens there."
        if group.context == texts.CHAT:
            what, where = f"{what} ({where})", group.sources[place]
            remedy = "Shorten this row, or give --force to see what happens there."
        raise UserError(f"{what}.", where=where, remedy=remedy)


def _check_stored(known: reference.Reference, job: Job, where: Path) -> None:
    if known.key.get("texts") != [group.digest for group in job.groups]:
        raise UserError(
            "this reference was stored for other texts, contexts or a tokenizer that cuts them otherwise.",
            where=str(where),
            remedy="Give the same --text, --context and --max-chunks, or a model directory as --reference.",
        )
    _check_rows(known, job, where, "Give a model directory as --reference.")


def _check_rows(known: reference.Reference, job: Job, where: Path, remedy: str) -> None:
    if np.diff(known.offsets).tolist() != [len(places) for places in job.places]:
        raise UserError("not a stored reference (its rows have other lengths).", where=str(where), remedy=remedy)


def walked(job: Job) -> Iterator[Model]:
    """Every model whose layers are run."""
    if isinstance(job.base, Model):
        yield job.base
    yield from job.candidates


def check_options(
    floors: str,
    tokens_per_batch: int | None,
    continuations: int,
    cache: str | Path | None,
    base: str | Path | None,
) -> None:
    """UserError for settings that mean nothing, or do not go together; nothing is read."""
    if floors not in FLOORS:
        raise UserError(f"unknown noise floor {floors!r}.", where="--floors", remedy=f"Known: {', '.join(FLOORS)}.")
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise UserError(f"{tokens_per_batch} tokens a batch are none.", remedy="Give --tokens-per-batch 1 at least.")
    if continuations < 0:
        raise UserError(f"{continuations} places are none.", where="--continuations", remedy="Give 0 for none.")
    if cache is None:
        return
    if base is None:
        remedy = "Name the original with --reference."
        raise UserError("there is no reference to store.", where="--reference-cache", remedy=remedy)
    if Path(base).is_file():
        remedy = "Leave --reference-cache out, or give the original's directory as --reference."
        raise UserError(f"{base} is stored already.", where="--reference-cache", remedy=remedy)
    if not Path(cache).is_dir():
        check_folder(Path(cache), remedy=OTHER_CACHE)


def check_server(server: ServerOptions | None, base: str | Path | None) -> None:
    """UserError where the server's answers have nothing to be compared with."""
    if server is not None and (base is None or not Path(base).is_dir()):
        raise UserError(
            "a server is compared with the original model.",
            where="--server",
            remedy="Give its directory as --reference: its tokenizer cuts the texts, too.",
        )


def with_stored(
    job: Job, folder: str | Path | None, floors: str, *, served: bool, tell: Callable[[str], None]
) -> tuple[Job, tuple[Path, Mapping[str, Any]] | None]:
    """The job with its reference taken from the cache where it is there; else the path and key to store it under."""
    if folder is None or not isinstance(job.base, Model):
        return job, None
    subject = job.base.subject
    key = reference.reference_key(
        subject.checkpoint,
        digests=[group.digest for group in job.groups],
        activations=subject.activations if subject.formats or subject.kv else "any",
        arithmetic=f"{arithmetic(subject)} {METRICS_VERSION}",
        floor_chunks=[0 if floors == "none" else len(floor_chunks(group)) for group in job.groups],
        vocabulary=subject.vocabulary,
    )
    path = reference.stored_path(Path(folder), key)
    if not path.exists():
        check_folder(Path(folder), remedy=OTHER_CACHE)
        return job, (path, key)
    if served:  # a server's few tokens have no divergence from a stored reference's
        return job, None
    known = reference.load_reference(path, remedy="Remove it: it is made again.")
    _check_rows(known, job, path, "Remove it: it is made again.")
    tell(f"{path}: the reference's predictions are taken from here")
    return replace(job, base=known), None


def arithmetic(subject: Subject) -> str:
    """What a model computes in, by its short name."""
    return str(subject.arithmetic).removeprefix("torch.")


def floor_chunks(group: texts.Chunks) -> list[int]:
    """One chunk in so many, two at least, evenly spread over the texts."""
    total = len(group.rows)
    count = min(total, max(2, math.ceil(total / FLOOR_SHARE)))
    return [place * total // count for place in range(count)]
