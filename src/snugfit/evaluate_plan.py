"""What an evaluation will do, decided and checked before the long work: on headers, tokenizers and texts alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from snugfit.errors import UserError
from snugfit.evaluation import reference, texts
from snugfit.evaluation.measure import scored_places
from snugfit.evaluation.served import Served
from snugfit.evaluation.subject import Subject, open_subject
from snugfit.records import TextRecord


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
    tokenizer: texts.Tokenizer
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
    tokenizer = texts.Tokenizer(home)
    groups, records = texts.read_chunks(tokenizer, files, contexts, **cut)
    job = Job(known, models, tokenizer, tuple(groups), tuple(records))
    sample = texts.sample_text(files)
    for path in candidates:
        texts.check_tokenizer(tokenizer, Path(path), sample)
    _check_vocabulary(job)
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


def _check_vocabulary(job: Job) -> None:
    sizes = {model.name: model.subject.vocabulary for model in walked(job)}
    if len(set(sizes.values())) > 1:
        pairs = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"vocabularies differ: {pairs}.", remedy="KL compares tokens: evaluate checkpoints of one model."
        )
    limit = next(iter(sizes.values()))
    highest = max((max(row) for row in job.rows), default=0)
    if highest >= limit:
        raise UserError(
            f"token id {highest} is beyond the model's vocabulary of {limit}.",
            remedy="Tokenize with this model's tokenizer.",
        )


def _check_positions(job: Job, *, force: bool) -> None:
    longest = max(len(row) for row in job.rows)
    for model in walked(job):
        config = model.subject.skeleton.model.config
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and longest > positions and not force:
            raise UserError(
                f"{longest} tokens are beyond the model's {positions} positions.",
                where=str(model.subject.checkpoint.path / "config.json"),
                remedy="Give shorter contexts, or --force to see what happens there.",
            )


def _check_stored(known: reference.Reference, job: Job, where: Path) -> None:
    digests = [group.digest for group in job.groups]
    vocabulary = next((model.subject.vocabulary for model in job.candidates), None)
    if vocabulary is not None and known.key.get("vocabulary") != vocabulary:
        raise UserError(
            f"it was stored over a vocabulary of {known.key.get('vocabulary')}, the candidates have {vocabulary}.",
            where=str(where),
            remedy="KL compares tokens: evaluate checkpoints of one model.",
        )
    if known.key.get("texts") != digests:
        raise UserError(
            "this reference was stored for other texts, contexts or a tokenizer that cuts them otherwise.",
            where=str(where),
            remedy="Give the same --text, --context and --max-chunks, or a model directory as --reference.",
        )


def walked(job: Job) -> Iterator[Model]:
    """Every model whose layers are run."""
    if isinstance(job.base, Model):
        yield job.base
    yield from job.candidates
