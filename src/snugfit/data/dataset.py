"""Samples (rows of token ids) to calibrate or evaluate on, with a digest that identifies them.

Sources: text files, cut into samples of equal length; files of rows (JSONL, Parquet), where each row is a sample, cut
at the maximum length (`data/rows.py` says in which forms); or nothing at all, then Python's own documentation topics.
They are taken from the beginning of each file, or with a seed at random from all of it. A set, one YAML file or the
name of one in this package, names its sources itself (`data/sets.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from snugfit.data import python_docs
from snugfit.data.reader import MIN_TOKENS, SampleReader
from snugfit.data.set_samples import DrawRequest, draw_set
from snugfit.data.sets import LoadedSet, builtin_sets, is_set, load_set
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError
from snugfit.records.dataset import SourceUse

DEFAULT_NUM_SAMPLES = 32
DEFAULT_MAX_SEQ_LENGTH = 1024


@dataclass(frozen=True)
class Dataset:
    """Samples, the name of their source, and their digest (see `samples_digest`).

    `shares` are the numbers of samples of each file or source, in order; empty: all are of one. `uses` says what each
    source of a set gave, and `set_digest` is SHA-256 of the set's text; without a set they are empty and None.
    `max_seq_length` are the tokens that a sample may have; 0 where samples came by themselves.
    """

    samples: tuple[tuple[int, ...], ...]
    source: str
    digest: str
    shares: tuple[int, ...] = field(default=(), compare=False)
    uses: tuple[SourceUse, ...] = field(default=(), compare=False)
    set_digest: str | None = field(default=None, compare=False)
    max_seq_length: int = field(default=0, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return sum(len(sample) for sample in self.samples)


def make_dataset(samples: Sequence[Sequence[int]], source: str, shares: Sequence[int] = ()) -> Dataset:
    """Samples with their digest."""
    return Dataset(tuple(tuple(sample) for sample in samples), source, samples_digest(samples), tuple(shares))


def hold_out(dataset: Dataset, every: float) -> tuple[Dataset, Dataset]:
    """The samples in two parts: those to work with, and one of `every` of each file, evenly spread, held out.

    Of a file with two samples or more at least one is held out. Files with one sample count as one file together; a
    sample that is alone in this stays.
    """
    held: set[int] = set()
    shares = dataset.shares or (len(dataset.samples),)
    file_of = [file for file, count in enumerate(shares) for _ in range(count)]
    members: dict[int, list[int]] = {}
    for number, file in enumerate(file_of):
        members.setdefault(file if shares[file] > 1 else -1, []).append(number)
    for numbers in members.values():
        count = len(numbers)
        out_of_these = max(1, int(count // every)) if count > 1 else 0
        held |= {numbers[(2 * place + 1) * count // (2 * out_of_these)] for place in range(out_of_these)}
    parts = []
    for out in (False, True):
        files: list[list[tuple[int, ...]]] = [[] for _ in shares]
        for number, (sample, file) in enumerate(zip(dataset.samples, file_of, strict=True)):
            if (number in held) == out:
                files[file].append(sample)
        part = make_dataset([s for file in files for s in file], dataset.source, [len(file) for file in files])
        parts.append(replace(part, uses=dataset.uses, set_digest=dataset.set_digest))
    return parts[0], parts[1]


def samples_digest(samples: Iterable[Sequence[int]]) -> str:
    """SHA-256 over token ids as little-endian int32, each sample behind its length; hexadecimal."""
    import numpy as np

    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.asarray([len(sample), *sample], dtype="<i4").tobytes())
    return digest.hexdigest()


def load_dataset(
    model_dir: Path,
    files: Sequence[Path],
    *,
    num_samples: int | None = None,
    max_seq_length: int | None = None,
    vocabulary: int | None = None,
    positions: int | None = None,
    shuffle_seed: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """At most `num_samples` samples of at most `max_seq_length` tokens for the model in directory `model_dir`.

    Every file gives an equal share, from its beginning, or with `shuffle_seed` drawn from all of it, in random order;
    no files: Python's documentation topics. One set in their place says by itself how many samples of what length it
    has, cut at the model's `positions`; what is given here goes before what it says. `vocabulary` (None: unknown)
    bounds token ids. `tokenizer` is the model's, if it was opened before. UserError where a file holds no text, or too
    little for one sample.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("max_seq_length", max_seq_length, MIN_TOKENS)):
        if value is not None and value < least:
            raise UserError(
                f"must be >= {least}, got {value}.",
                code="option-invalid",
                where=name,
                remedy=f"Set `{name}` to {least} or more.",
            )
    tokenizer = tokenizer or Tokenizer(model_dir)
    if (one := the_set(files)) is not None:
        request = DrawRequest(
            num_samples=num_samples,
            max_seq_length=max_seq_length,
            shuffle_seed=shuffle_seed,
            vocabulary=vocabulary,
            positions=positions,
        )
        return _of_set(load_set(one), tokenizer, request)
    num_samples = DEFAULT_NUM_SAMPLES if num_samples is None else num_samples
    length = DEFAULT_MAX_SEQ_LENGTH if max_seq_length is None else max_seq_length
    reader = SampleReader(tokenizer, length, vocabulary, shuffle_seed)
    if not files:
        text = python_docs.python_topics("calibration")
        source = python_docs.SOURCES["calibration"]
        return replace(make_dataset(list(reader.cut(text, num_samples, source)), source), max_seq_length=length)
    samples: list[list[int]] = []
    shares: list[int] = []
    for place, file in enumerate(files):
        # an equal share of the samples that are still wanted; odd ones go to the first files
        share = -(-(num_samples - len(samples)) // (len(files) - place))
        found = list(reader.read_file(file, share)) if share else []
        shares.append(len(found))
        samples += found
    of_all = make_dataset(samples, ", ".join(file.name for file in files), shares)
    return replace(of_all, max_seq_length=length)


def the_set(files: Sequence[str | Path]) -> str | Path | None:
    """The set that a dataset consists of, None for plain files; UserError for a set with something beside it."""
    sets = [file for file in files if is_set(file)]
    if not sets:
        return None
    if len(files) > 1:
        raise UserError(
            "a set names all of its sources, so nothing can be given beside it.",
            code="option-conflict",
            where=str(sets[0]),
            remedy="Add the other files to the set, as entries of `datasets`.",
        )
    return sets[0]


def with_defaults(
    files: Sequence[str | Path], num_samples: int | None, max_seq_length: int | None
) -> tuple[int | None, int | None]:
    """Number and length of samples that `load_dataset` takes; None for what a set decides."""
    if the_set(files) is not None:
        return num_samples, max_seq_length
    return num_samples or DEFAULT_NUM_SAMPLES, max_seq_length or DEFAULT_MAX_SEQ_LENGTH


def check_files(files: Sequence[str | Path]) -> None:
    """UserError for a file that does not exist, a directory, and a set that is not valid; of files nothing is read."""
    if (one := the_set(files)) is not None:
        load_set(one)
        return
    for file in files:
        if not Path(file).exists():
            near = get_close_matches(str(file), builtin_sets(), n=1)
            remedy = f"Did you mean {near[0]}?" if near else "Name a file of text, JSONL or Parquet, or a set."
            raise UserError("no such file.", code="file-missing", where=str(file), remedy=remedy)
        if Path(file).is_dir():
            what = "a directory, not a file."
            raise UserError(what, code="dataset-unreadable", where=str(file), remedy="Name the files in it.")


def _of_set(loaded: LoadedSet, tokenizer: Tokenizer, request: DrawRequest) -> Dataset:
    drawn, uses = draw_set(loaded, tokenizer, request)
    found = make_dataset([sample.ids for sample in drawn], loaded.name, [use.samples for use in uses])
    return replace(found, uses=tuple(uses), set_digest=loaded.digest, max_seq_length=request.length(loaded))
