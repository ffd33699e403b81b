"""What a running inference server says about given tokens, read from its answer.

vLLM's completion of a row of token ids has, for every place but the first (which is null),

    "prompt_logprobs": [null, {"3575": {"logprob": -11.7, "rank": 3121, "decoded_token": " capital"},
                               "29": {"logprob": -0.83, "rank": 1, "decoded_token": "-"}, ...}, ...]

the row's own token first, then the k most likely ones. An entry is some 78 bytes, so 512 places of a vocabulary of
49,152 are 2 GB: the text is taken place by place as it arrives. JSON has no minus infinity, and vLLM writes -9999.0.
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
    """What a server says of one row of n tokens, natural logarithms; place i is the prediction of token i + 1.

    `true_logprob` float64 [n-1] is the row's own token. `top_ids` int32 and `top_logprob` float32 [n-1, k] are the k
    most likely tokens, best first, ties by id, padded with -1 and minus infinity. `dense` float32 [n-1, V] holds the
    full vocabulary where that was asked for. NaN is what the server said, or left out. `fingerprint` is the server's
    word for its build and configuration.
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

    UserError, with `where` as its place, for other text, for an answer without log probabilities, and for one that
    does not belong to this row.
    """
    answer = _Answer(pieces)
    tables = _Tables(row, top, dense, where)
    places = 0
    try:
        for entry in answer.entries():
            tables.put(places, entry)
            places += 1
        rest = answer.rest()
        given = rest["choices"][0].get("prompt_token_ids")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"its answer is not what vLLM answers ({reason}).", where=where) from None
    if not places:
        remedy = "It takes vLLM; OpenAI, llama.cpp, SGLang and others have no such field."
        raise UserError("this server does not return prompt_logprobs.", where=where, remedy=remedy)
    if places != len(row):
        raise UserError(f"its answer has {places} places for a row of {len(row)} tokens.", where=where)
    if given is not None and given != list(row):
        raise UserError("it scored other tokens than those of the row.", where=where)
    fingerprint = rest.get("system_fingerprint")
    return tables.result(fingerprint if isinstance(fingerprint, str) else None)


class _Answer:
    """A completion's JSON text, taken from the network as it is read: first `entries`, then `rest`."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._place = 0
        self._head = ""

    def entries(self) -> Iterator[Any]:
        """The members of the list `prompt_logprobs`, none where there is no such list; ValueError on other text."""
        while (found := LIST.search(self._text)) is None:
            if not self._more():
                return
        self._head, self._place = self._text[: found.end() - 1] + "null", found.end()
        while not self._at_end():
            yield self._value()

    def rest(self) -> Any:
        """The document with null in the place of the list; ValueError where it is not JSON."""
        return json.loads(self._head + self._text[self._place :] + "".join(self._pieces))

    def _at_end(self) -> bool:
        """Go to the next member; whether there is none."""
        while True:
            found = SPACE.match(self._text, self._place)
            self._place = found.end() if found else self._place
            if self._place < len(self._text):
                break
            if not self._more():
                raise ValueError("the list of log probabilities has no end")
        if self._text[self._place] != "]":
            return False
        self._place += 1
        return True

    def _value(self) -> Any:
        while True:
            try:
                value, self._place = DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if not self._more():
                    raise
            else:
                return value

    def _more(self) -> bool:
        """Take at least as much text again as is at hand, so that trying once more costs little; False at the end."""
        taken = [self._text[self._place :]]
        wanted = size = len(taken[0])
        for piece in self._pieces:
            taken.append(piece)
            size += len(piece)
            if size >= 2 * wanted and size > wanted:
                break
        self._text, self._place = "".join(taken), 0
        return size > wanted


class _Tables:
    """The arrays of one row, filled place by place."""

    def __init__(self, row: Sequence[int], top: int, dense: bool, where: str) -> None:
        self._row, self._whole, self._dense, self._where = row, top == FULL, dense, where
        self._true = np.full(len(row) - 1, np.nan)
        self._columns = -1
        if not self._whole:
            self._begin(top)

    def _begin(self, columns: int) -> None:
        """Make arrays for `columns` tokens a place: those asked for, or as many as the first place has."""
        places = len(self._row) - 1
        self._columns = columns
        self._table = np.empty((places, columns), np.float32) if self._dense else None
        sorted_columns = 0 if self._dense else columns
        self._ids = np.full((places, sorted_columns), -1, np.int32)
        self._values = np.full((places, sorted_columns), -np.inf, np.float32)

    def put(self, place: int, entry: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Take in what is told of the row's token `place`: {"token id": {"logprob": value or null}}."""
        if place == 0 and entry is None:
            return
        if not 0 < place < len(self._row) or entry is None:
            raise ValueError(f"{'an' if entry else 'no'} entry at place {place} of {len(self._row)}")
        token = self._row[place]
        if str(token) not in entry:
            raise self._wrong(f"token {token} of the row is not among those at its place {place}")
        ids = np.fromiter(map(int, entry), np.int32, len(entry))
        told = (value["logprob"] for value in entry.values())
        values = np.fromiter((np.nan if value is None else value for value in told), np.float64, len(entry))
        values[values == MINUS_INFINITY] = -np.inf
        if self._columns < 0:
            self._begin(len(ids))
        if self._whole and not np.array_equal(np.sort(ids), np.arange(self._columns)):
            raise self._wrong(f"place {place} has {len(ids)} tokens, which are not a full vocabulary")
        if not _may_be_logarithms(values, whole=self._whole):
            raise self._wrong("its values are not log probabilities (is --logprobs-mode raw_logits?)")
        self._true[place - 1] = values[ids == token][0]
        if self._table is not None:
            self._table[place - 1, ids] = values
            return
        order = np.lexsort((ids, -values))[: self._columns]
        self._ids[place - 1, : len(order)] = ids[order]
        self._values[place - 1, : len(order)] = values[order]

    def _wrong(self, what: str) -> UserError:
        return UserError(f"its answer cannot be used: {what}.", where=self._where)

    def result(self, fingerprint: str | None) -> PromptLogprobs:
        """The filled arrays."""
        return PromptLogprobs(self._true, self._ids, self._values, self._table, fingerprint)


def _may_be_logarithms(values: NDArray[np.float64], *, whole: bool) -> bool:
    """False for values above 0 or of probabilities that sum to more than 1, or to less where they are all there are."""
    if np.isnan(values).any():
        return True
    total = float(np.exp(np.minimum(values, 1.0)).sum())
    return bool(values.max() < 1e-3 and total < 1.01 and not (whole and total < 0.99))
