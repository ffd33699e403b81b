"""Log probabilities of given tokens, read from the answer of a running inference server.

vLLM's completion of a row of token ids has an entry for every position but the first (which is null):

    "prompt_logprobs": [null, {"3575": {"logprob": -11.7, "rank": 3121, "decoded_token": " capital"},
                               "29": {"logprob": -0.83, "rank": 1, "decoded_token": "-"}, ...}, ...]

the row's own token first, then the k most likely ones. An entry takes about 78 bytes, so 512 positions of a vocabulary
of 49,152 take 2 GB: the text is parsed position by position as it arrives. JSON has no minus infinity; vLLM writes
-9999.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snugfit.errors import UserError

FULL = -1  # `prompt_logprobs` of the whole vocabulary
MINUS_INFINITY = -9999.0
LIST = re.compile(r'"prompt_logprobs"\s*:\s*\[')  # quotes within strings are escaped, so this can only be the key
SPACE = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder()


@dataclass(frozen=True, eq=False)
class PromptLogprobs:
    """A server's log probabilities for one row of n tokens, natural logarithms; index i predicts token i + 1.

    `true_logprob` float64 [n-1] is for the row's own tokens. `top_ids` int32 and `top_logprob` float32 [n-1, k] are the
    k most likely tokens, best first, ties by id, padded with -1 and minus infinity. `dense` float32 [n-1, V] holds the
    full vocabulary where that was asked for. NaN stands for a value that the server left out. `fingerprint` is the
    server's name for its build and configuration.
    """

    true_logprob: NDArray[np.float64]
    top_ids: NDArray[np.int32]
    top_logprob: NDArray[np.float32]
    dense: NDArray[np.float32] | None = None
    fingerprint: str | None = None


def read_answer(
    pieces: Iterator[str], row: Sequence[int], *, top: int, dense: bool = False, where: str = ""
) -> PromptLogprobs:
    """The arrays of one answer, given as pieces of its JSON text, to `row` and `top` (see `Server.score`).

    UserError at `where` for other text, for an answer without log probabilities, and for an answer to another row.
    """
    answer = _Answer(pieces)
    tables = _Tables(row, top, dense, where)
    positions = 0
    try:
        for entry in answer.entries():
            tables.put(positions, entry)
            positions += 1
        rest = answer.rest()
        scored = _scored_tokens(rest)
    except ValueError as error:
        raise _invalid(f"the answer is not what vLLM answers ({error}).", where) from None
    if not positions:
        raise UserError(
            "this server does not return prompt_logprobs.",
            code="server-unsupported",
            where=where,
            remedy="Use vLLM: OpenAI, llama.cpp, SGLang and others do not have this field.",
        )
    if positions != len(row):
        raise _invalid(f"the answer has {positions} positions for a row of {len(row)} tokens.", where)
    if scored is not None and scored != list(row):
        raise _invalid("the server scored other tokens than those of the row.", where)
    fingerprint = rest.get("system_fingerprint")
    return tables.result(fingerprint if isinstance(fingerprint, str) else None)


def _scored_tokens(rest: Any) -> Any:
    """The ids that the server says it scored, None where it says nothing; ValueError for other documents."""
    choices = rest.get("choices") if isinstance(rest, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("no list of choices")
    return choices[0].get("prompt_token_ids")


def _invalid(what: str, where: str) -> UserError:
    return UserError(what, code="server-answer-invalid", where=where)


class _Answer:
    """A completion's JSON text, read from the network piece by piece: first `entries`, then `rest`."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._at = 0
        self._head = ""

    def entries(self) -> Iterator[Any]:
        """The members of the list `prompt_logprobs`, nothing without such a list; ValueError for other text."""
        while (found := LIST.search(self._text)) is None:
            if not self._more():
                return
        self._head, self._at = self._text[: found.end() - 1] + "null", found.end()
        while not self._at_end():
            yield self._value()

    def rest(self) -> Any:
        """The document with null instead of the list; ValueError if it is not JSON."""
        return json.loads(self._head + self._text[self._at :] + "".join(self._pieces))

    def _at_end(self) -> bool:
        """Go to the next member; true at the end of the list."""
        while True:
            found = SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                break
            if not self._more():
                raise ValueError("the list of log probabilities has no end")
        if self._text[self._at] != "]":
            return False
        self._at += 1
        return True

    def _value(self) -> Any:
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
            else:
                return value

    def _more(self) -> bool:
        """Read at least as much text again as is held, so that a further attempt costs little; False at the end."""
        taken = [self._text[self._at :]]
        wanted = size = len(taken[0])
        for piece in self._pieces:
            taken.append(piece)
            size += len(piece)
            if size >= 2 * wanted and size > wanted:
                break
        self._text, self._at = "".join(taken), 0
        return size > wanted


class _Tables:
    """The arrays of one row, filled position by position."""

    def __init__(self, row: Sequence[int], top: int, dense: bool, where: str) -> None:
        self._row, self._whole, self._dense, self._where = row, top == FULL, dense, where
        self._true = np.full(len(row) - 1, np.nan)
        self._columns = -1
        if not self._whole:
            self._begin(top)

    def _begin(self, columns: int) -> None:
        """Make arrays for `columns` tokens a position: as many as asked for, or as the first position has."""
        positions = len(self._row) - 1
        self._columns = columns
        self._table = np.empty((positions, columns), np.float32) if self._dense else None
        sorted_columns = 0 if self._dense else columns
        self._ids = np.full((positions, sorted_columns), -1, np.int32)
        self._values = np.full((positions, sorted_columns), -np.inf, np.float32)

    def put(self, position: int, entry: Any) -> None:
        """Store the entry of the row's token `position`; ValueError for what is not one."""
        if position == 0 and entry is None:
            return
        if not 0 < position < len(self._row) or not isinstance(entry, dict):
            raise ValueError(f"{'an' if entry else 'no'} entry at position {position} of {len(self._row)}")
        token = self._row[position]
        if str(token) not in entry:
            raise self._wrong(f"token {token} of the row is missing at its position {position}")
        ids, values = _numbers(entry)
        values[values == MINUS_INFINITY] = -np.inf
        if self._columns < 0:
            self._begin(len(ids))
        if self._whole and not np.array_equal(np.sort(ids), np.arange(self._columns)):
            raise self._wrong(f"position {position} has {len(ids)} tokens, which are not a full vocabulary")
        if not _may_be_logarithms(values, whole=self._whole):
            raise self._wrong("its values are not log probabilities (is --logprobs-mode raw_logits?)")
        self._true[position - 1] = values[ids == token][0]
        if self._table is not None:
            self._table[position - 1, ids] = values
            return
        order = np.lexsort((ids, -values))[: self._columns]
        self._ids[position - 1, : len(order)] = ids[order]
        self._values[position - 1, : len(order)] = values[order]

    def _wrong(self, what: str) -> UserError:
        return _invalid(f"the answer cannot be used: {what}.", self._where)

    def result(self, fingerprint: str | None) -> PromptLogprobs:
        """The filled arrays."""
        return PromptLogprobs(self._true, self._ids, self._values, self._table, fingerprint)


def _numbers(entry: Mapping[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Ids and values of {"token id": {"logprob": number or null}, ...}; ValueError for what is not that."""
    try:
        ids = np.fromiter(map(int, entry), np.int32, len(entry))
        given = (value["logprob"] for value in entry.values())
        values = np.fromiter((np.nan if value is None else value for value in given), np.float64, len(entry))
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    return ids, values


def _may_be_logarithms(values: NDArray[np.float64], *, whole: bool) -> bool:
    """False for values above 0 and where the probabilities' sum is above 1 or, of a `whole` vocabulary, below it."""
    if np.isnan(values).any():
        return True
    total = float(np.exp(np.minimum(values, 1.0)).sum())
    return bool(values.max() < 1e-3 and total < 1.01 and not (whole and total < 0.99))
