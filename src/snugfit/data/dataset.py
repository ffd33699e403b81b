"""Samples (rows of token ids) to calibrate or evaluate on, with a digest that identifies them.

Sources: text files, cut into samples of equal length; files of rows (JSONL, Parquet), where each row is a sample, cut
at the maximum length (`data/rows.py` says in which forms); or nothing at all, then Python's own documentation topics.
They are taken from the beginning of each file, or with a seed at random from all of it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snugfit.data import conversations, python_docs
from snugfit.data.files import holds_rows, open_text, row_lines
from snugfit.data.rows import Completion, Conversation, read_row
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError

DEFAULT_NUM_SAMPLES = 32
DEFAULT_MAX_SEQ_LENGTH = 1024
MIN_TOKENS = 2  # of a sample
_MAX_CHARACTERS_PER_TOKEN = 64  # hardly any token is longer


@dataclass(frozen=True)
class Dataset:
    """Samples, the name of their source, and their digest (see `samples_digest`).

    `shares` are the numbers of samples of each file, in order; empty: all are of one.
    """

    samples: tuple[tuple[int, ...], ...]
    source: str
    digest: str
    shares: tuple[int, ...] = field(default=(), compare=False)

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return sum(len(sample) for sample in self.samples)


def make_dataset(samples: Sequence[Sequence[int]], source: str, shares: Sequence[int] = ()) -> Dataset:
    """Samples with their digest."""
    return Dataset(tuple(tuple(sample) for sample in samples), source, samples_digest(samples), tuple(shares))


def hold_out(dataset: Dataset, every: int) -> tuple[Dataset, Dataset]:
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
        out_of_these = max(1, count // every) if count > 1 else 0
        held |= {numbers[(2 * place + 1) * count // (2 * out_of_these)] for place in range(out_of_these)}
    parts = []
    for out in (False, True):
        files: list[list[tuple[int, ...]]] = [[] for _ in shares]
        for number, (sample, file) in enumerate(zip(dataset.samples, file_of, strict=True)):
            if (number in held) == out:
                files[file].append(sample)
        parts.append(make_dataset([s for file in files for s in file], dataset.source, [len(file) for file in files]))
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
    num_samples: int = DEFAULT_NUM_SAMPLES,
    max_seq_length: int = DEFAULT_MAX_SEQ_LENGTH,
    vocabulary: int | None = None,
    shuffle_seed: int | None = None,
) -> Dataset:
    """At most `num_samples` samples of at most `max_seq_length` tokens for the model in directory `model_dir`.

    Every file gives an equal share, from its beginning, or with `shuffle_seed` drawn from all of it, in random order;
    no files: Python's documentation topics. `vocabulary` (None: unknown) bounds token ids. UserError where a file holds
    no text, or too little for one sample.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("max_seq_length", max_seq_length, MIN_TOKENS)):
        if value < least:
            raise UserError(
                f"must be >= {least}, got {value}.",
                code="option-invalid",
                where=name,
                remedy=f"Set `{name}` to {least} or more.",
            )
    reader = _Reader(Tokenizer(model_dir), max_seq_length, vocabulary, shuffle_seed)
    if not files:
        text = python_docs.python_topics("calibration")
        source = python_docs.SOURCES["calibration"]
        return make_dataset(list(reader.cut(text, num_samples, source)), source)
    samples: list[list[int]] = []
    shares: list[int] = []
    for place, file in enumerate(files):
        # an equal share of the samples that are still wanted; odd ones go to the first files
        share = -(-(num_samples - len(samples)) // (len(files) - place))
        found = list(reader.read_file(file, share)) if share else []
        shares.append(len(found))
        samples += found
    return make_dataset(samples, ", ".join(file.name for file in files), shares)


@dataclass(frozen=True)
class _Reader:
    """Reads samples of at most `max_seq_length` tokens with ids below `vocabulary` (None: unknown).

    In the order of the files, or with a `shuffle_seed` in random order.
    """

    tokenizer: Tokenizer
    max_seq_length: int
    vocabulary: int | None
    shuffle_seed: int | None

    def read_file(self, file: Path, count: int) -> Iterator[list[int]]:
        """At most `count` samples of a file of text or rows."""
        if holds_rows(file):
            lines = self._in_random_order(file, count) if self.shuffle_seed is not None else _numbered(file)
            yield from self.read_rows(lines, count, str(file))
            return
        with open_text(file) as stream:
            whole = self.shuffle_seed is not None
            text = stream.read(-1 if whole else _MAX_CHARACTERS_PER_TOKEN * count * self.max_seq_length)
        yield from self.cut(text, count, str(file))

    def read_rows(self, lines: Iterable[tuple[int, str]], count: int, where: str) -> Iterator[list[int]]:
        """At most `count` samples of two tokens or more, one a numbered line."""
        found = 0
        for number, line in lines:
            place = f"{where}:{number}"
            sample = self._tokens(line, place)[: self.max_seq_length]
            if len(sample) >= MIN_TOKENS:
                found += 1
                yield self._checked(sample, place)
            if found == count:
                return
        if not found:
            what = f"no row of {MIN_TOKENS} tokens or more."
            raise UserError(what, code="dataset-too-small", where=where, remedy="Give longer texts.")

    def _tokens(self, line: str, where: str) -> list[int]:
        row = read_row(line, where)
        if isinstance(row, Conversation):
            return conversations.chat(self.tokenizer, row, where)
        if isinstance(row, Completion):
            row = row.prompt + row.completion
        return self.tokenizer.encode(row, where=where) if isinstance(row, str) else row

    def _in_random_order(self, file: Path, count: int) -> Iterator[tuple[int, str]]:
        """All rows in random order; the file is read again for every `count` rows, which are in memory at once."""
        numbers = _shuffled([number for number, _ in _numbered(file)], self.shuffle_seed)
        for first in range(0, len(numbers), count):
            asked = numbers[first : first + count]
            wanted = set(asked)
            lines = {number: line for number, line in _numbered(file) if number in wanted}
            yield from ((number, lines[number]) for number in asked if number in lines)

    def cut(self, text: str, count: int, where: str) -> Iterator[list[int]]:
        """At most `count` samples of `max_seq_length` tokens, start tokens included; a short text gives a short one."""
        start = self.tokenizer.start_tokens
        body = self.max_seq_length - len(start)
        if body < 1:
            raise UserError(
                f"{self.max_seq_length} tokens hold no text behind the tokenizer's own {len(start)}.",
                code="option-invalid",
                where="max_seq_length",
                remedy="Raise `max_seq_length`.",
            )
        whole = self.shuffle_seed is not None
        ids = self.tokenizer.first_tokens(text, max(MIN_TOKENS, len(text) if whole else count * body), where=where)
        if len(ids) < MIN_TOKENS:
            what = f"empty or too short: fewer than {MIN_TOKENS} tokens."
            raise UserError(what, code="dataset-too-small", where=where, remedy="Give longer texts.")
        if len(ids) < body:
            yield self._checked([*start, *ids], where)
            return
        places = range(len(ids) // body)
        for n in (_shuffled(places, self.shuffle_seed) if whole else places)[:count]:
            yield self._checked([*start, *ids[n * body : (n + 1) * body]], where)

    def _checked(self, sample: list[int], where: str) -> list[int]:
        check_ids(sample, where, self.vocabulary)
        return sample


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    """The rows of a file that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(row_lines(file), 1) if line.strip())


def _shuffled(places: Sequence[int], seed: int | None) -> list[int]:
    """The places in an order that the seed alone decides, on every version of Python."""
    generator = random.Random(seed)  # noqa: S311  # no secret
    return [place for _, place in sorted((generator.random(), place) for place in places)]


def check_ids(ids: Sequence[int], where: str, vocabulary: int | None) -> None:
    """UserError for a token id beyond the vocabulary (None: beyond int32, which no vocabulary exceeds)."""
    highest, limit = max(ids, default=0), vocabulary or 2**31
    if highest >= limit:
        raise UserError(
            f"token id {highest} is beyond the model's vocabulary of {limit}.",
            code="token-out-of-range",
            where=where,
            remedy="Tokenize with this model's tokenizer.",
        )
