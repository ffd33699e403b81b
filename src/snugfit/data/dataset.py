"""Samples (rows of token ids) to calibrate or evaluate on, with a digest that identifies them.

Sources: text files, cut into samples of equal length; JSONL files, where each line has one of `text`, `messages` or
`input_ids` and is a sample, cut at the maximum length; or nothing at all, then Python's own documentation topics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snugfit.data import python_docs
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError

DEFAULT_NUM_SAMPLES = 32
DEFAULT_MAX_SEQ_LENGTH = 1024
MIN_TOKENS = 2  # of a sample
JSONL_ENDINGS = (".jsonl", ".ndjson")
_MAX_CHARACTERS_PER_TOKEN = 64  # hardly any token is longer


@dataclass(frozen=True)
class Dataset:
    """Samples, the name of their source, and their digest (see `samples_digest`)."""

    samples: tuple[tuple[int, ...], ...]
    source: str
    digest: str

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return sum(len(sample) for sample in self.samples)


@dataclass(frozen=True)
class Messages:
    """A conversation of a JSONL file, not yet put into a model's chat template."""

    messages: list[Any]


def make_dataset(samples: Sequence[Sequence[int]], source: str) -> Dataset:
    """Samples with their digest."""
    return Dataset(tuple(tuple(sample) for sample in samples), source, samples_digest(samples))


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
) -> Dataset:
    """At most `num_samples` samples of at most `max_seq_length` tokens for the model in directory `model_dir`.

    Every file gives an equal share; no files: Python's documentation topics. `vocabulary` (None: unknown) bounds token
    ids. UserError where a file holds no text, or too little for one sample.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("max_seq_length", max_seq_length, MIN_TOKENS)):
        if value < least:
            raise UserError(
                f"must be >= {least}, got {value}.",
                code="option-invalid",
                where=name,
                remedy=f"Set `{name}` to {least} or more.",
            )
    reader = _Reader(Tokenizer(model_dir), max_seq_length, vocabulary)
    if not files:
        text = python_docs.python_topics("calibration")
        source = python_docs.SOURCES["calibration"]
        return make_dataset(list(reader.cut(text, num_samples, source)), source)
    samples: list[list[int]] = []
    for place, file in enumerate(files):
        # an equal share of the samples that are still wanted; odd ones go to the first files
        share = -(-(num_samples - len(samples)) // (len(files) - place))
        samples += list(reader.read_file(file, share)) if share else []
    return make_dataset(samples, ", ".join(file.name for file in files))


@dataclass(frozen=True)
class _Reader:
    """Reads samples of at most `max_seq_length` tokens with ids below `vocabulary` (None: unknown)."""

    tokenizer: Tokenizer
    max_seq_length: int
    vocabulary: int | None

    def read_file(self, file: Path, count: int) -> Iterator[list[int]]:
        """At most `count` samples of a file of text or JSONL."""
        ending = file.suffix.lower()
        check_ending(file)
        try:
            with file.open(encoding="utf-8-sig", newline="\n") as stream:
                if ending in JSONL_ENDINGS:
                    yield from self.read_jsonl(stream, count, str(file))
                else:
                    text = stream.read(_MAX_CHARACTERS_PER_TOKEN * count * self.max_seq_length)
                    yield from self.cut(text, count, str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise not_text(file, error) from None

    def read_jsonl(self, lines: Iterable[str], count: int, where: str) -> Iterator[list[int]]:
        """At most `count` samples of two tokens or more, one a line."""
        found = 0
        for number, line in enumerate(lines, 1):
            if found == count:
                return
            if not line.strip():
                continue
            place = f"{where}:{number}"
            read = read_line(line, place, self.tokenizer)
            ids = self.tokenizer.chat(read.messages, where=place) if isinstance(read, Messages) else read
            sample = ids[: self.max_seq_length]
            if len(sample) >= MIN_TOKENS:
                found += 1
                yield self._checked(sample, place)
        if not found:
            what = f"no row of {MIN_TOKENS} tokens or more."
            raise UserError(what, code="dataset-too-small", where=where, remedy="Give longer texts.")

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
        ids = self.tokenizer.first_tokens(text, max(MIN_TOKENS, count * body), where=where)
        if len(ids) < MIN_TOKENS:
            what = f"empty or too short: fewer than {MIN_TOKENS} tokens."
            raise UserError(what, code="dataset-too-small", where=where, remedy="Give longer texts.")
        if len(ids) < body:
            yield self._checked([*start, *ids], where)
            return
        for n in range(min(count, len(ids) // body)):
            yield self._checked([*start, *ids[n * body : (n + 1) * body]], where)

    def _checked(self, sample: list[int], where: str) -> list[int]:
        check_ids(sample, where, self.vocabulary)
        return sample


def read_line(line: str, where: str, tokenizer: Tokenizer) -> list[int] | Messages:
    """Token ids of a JSONL line with `input_ids` or `text`, or its messages; UserError at `where` for another."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"not JSON ({error})."
        remedy = "JSONL has one JSON object a line."
        raise UserError(what, code="dataset-invalid", where=where, remedy=remedy) from None
    if isinstance(entry, dict):
        ids = entry.get("input_ids")
        if isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids):
            return ids
        if isinstance(entry.get("text"), str):
            return tokenizer.encode(entry["text"], where=where)
        if isinstance(entry.get("messages"), list):
            return Messages(entry["messages"])
    what = "no `text`, `messages` or `input_ids`."
    raise UserError(what, code="dataset-invalid", where=where, remedy="Each line needs one of them.")


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


def check_ending(file: Path) -> None:
    """UserError for a .json file, which would be read as raw text."""
    if file.suffix.lower() == ".json":
        raise UserError(
            "a .json file is neither text nor rows.",
            code="dataset-unreadable",
            where=str(file),
            remedy="Give text, or JSONL with a row a line.",
        )


def not_text(file: Path, error: Exception) -> UserError:
    """The error for a file that cannot be read as UTF-8 text."""
    return UserError(
        f"cannot be read as text ({error}).",
        code="dataset-unreadable",
        where=str(file),
        remedy="Give UTF-8 text or JSONL.",
    )
