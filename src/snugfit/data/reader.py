"""Reads samples out of files: texts in pieces of equal length, rows one by one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from snugfit.data import conversations
from snugfit.data.files import holds_rows, open_text, row_lines
from snugfit.data.rows import Completion, Conversation, Row, read_row
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError

MIN_TOKENS = 2  # of a sample
MAX_CHARACTERS_PER_TOKEN = 64  # hardly any token is longer


@dataclass(frozen=True)
class SampleReader:
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
            text = stream.read(-1 if whole else MAX_CHARACTERS_PER_TOKEN * count * self.max_seq_length)
        yield from self.cut(text, count, str(file))

    def read_rows(self, lines: Iterable[tuple[int, str]], count: int, where: str) -> Iterator[list[int]]:
        """At most `count` samples of two tokens or more, one a numbered line."""
        found = 0
        for number, line in lines:
            place = f"{where}:{number}"
            sample = self.tokens_of(read_row(line, place), place)[: self.max_seq_length]
            if len(sample) >= MIN_TOKENS:
                found += 1
                yield self._checked(sample, place)
            if found == count:
                return
        if not found:
            what = f"no row of {MIN_TOKENS} tokens or more."
            raise UserError(what, code="dataset-too-small", where=where, remedy="Give longer texts.")

    def tokens_of(self, row: Row, where: str) -> list[int]:
        """All token ids of a row."""
        if isinstance(row, Conversation):
            return conversations.chat(self.tokenizer, row, where)
        if isinstance(row, Completion):
            row = row.prompt + row.completion
        return self.tokenizer.encode(row, where=where) if isinstance(row, str) else row

    def _in_random_order(self, file: Path, count: int) -> Iterator[tuple[int, str]]:
        """All rows in random order; the file is read again for every `count` rows, which are in memory at once."""
        numbers = shuffled([number for number, _ in _numbered(file)], self.shuffle_seed)
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
        for n in (shuffled(places, self.shuffle_seed) if whole else places)[:count]:
            yield self._checked([*start, *ids[n * body : (n + 1) * body]], where)

    def _checked(self, sample: list[int], where: str) -> list[int]:
        check_ids(sample, where, self.vocabulary)
        return sample


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    """The rows of a file that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(row_lines(file), 1) if line.strip())


def shuffled(places: Sequence[int], seed: int | None) -> list[int]:
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
