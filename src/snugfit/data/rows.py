"""Rows of tokens to calibrate or evaluate on, with a digest that says which.

Sources: text files (cut into rows of equal length), JSONL files with one of `text`, `messages` or `input_ids` a line (a
row each, cut at the length), or nothing at all: then Python's own documentation topics, which every Python carries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snugfit.data.tokenizer import apply_template, first_tokens, leading_tokens, load_tokenizer, template_errors
from snugfit.errors import UserError

DEFAULT_ROWS = 32
DEFAULT_LENGTH = 1024
MIN_TOKENS = 2


@dataclass(frozen=True)
class Rows:
    """Token rows, where they come from, and the SHA-256 of their ids (little-endian int32, rows length-prefixed)."""

    rows: tuple[tuple[int, ...], ...]
    source: str
    digest: str

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return sum(len(row) for row in self.rows)


def make_rows(rows: Sequence[Sequence[int]], source: str) -> Rows:
    """Rows with their digest."""
    import numpy as np

    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], dtype="<i4").tobytes())
    return Rows(tuple(tuple(row) for row in rows), source, digest.hexdigest())


def python_topics(part: Literal["calibration", "evaluation"] = "calibration") -> str:
    """Prose of Python's documentation topics: every other topic for calibration, the others for evaluation."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    calibration = "\n\n".join(unwrap(topics[name]) for name in names[0::2])
    if part == "calibration":
        return calibration
    # topics quote each other at length: what was calibrated on is left out
    seen = {" ".join(paragraph.split()) for paragraph in calibration.split("\n\n")}
    paragraphs = "\n\n".join(unwrap(topics[name]) for name in names[1::2]).split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if " ".join(paragraph.split()) not in seen)


def unwrap(text: str) -> str:
    """Paragraphs on one line each: hard line breaks joined where no line of the paragraph is indented."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if "\n " in p or p.startswith(" ") else p.replace("\n", " ") for p in paragraphs)


def load_rows(
    model: Path, files: Sequence[Path], *, count: int = DEFAULT_ROWS, length: int = DEFAULT_LENGTH, vocabulary: int = 0
) -> Rows:
    """At most `count` rows of at most `length` tokens for the model in directory `model`.

    `vocabulary` (0: unknown) bounds token ids. Raises UserError where a file holds no text or too little for one row.
    """
    if count < 1 or length < MIN_TOKENS:
        raise UserError(f"{count} rows of {length} tokens are no data.", remedy="Ask for one row of two at least.")
    tokenizer: list[Any] = []

    def encode(text: str, **options: Any) -> list[int]:
        if not tokenizer:
            tokenizer.append(load_tokenizer(model))
        return list(tokenizer[0](text, **options).input_ids)

    def chat(messages: Any) -> list[int]:
        encode("")
        return apply_template(tokenizer[0], messages)

    if not files:
        rows = list(_cut(encode, python_topics(), count, length, "Python's documentation topics"))
        source = "Python's documentation topics, every other one"
    else:
        rows = []
        for place, file in enumerate(files):
            # an equal share of what is still wanted, the first files taking the odd rows
            share = -(-(count - len(rows)) // (len(files) - place))
            rows += list(_file_rows(file, encode, chat, share, length)) if share else []
        source = ", ".join(file.name for file in files)
    limit = max((max(row) for row in rows), default=0)
    if limit >= (vocabulary or 2**31):
        raise UserError(
            f"token id {limit} is beyond the model's vocabulary of {vocabulary or 'unknown size'}.",
            where=source,
            remedy="Tokenize with this model's tokenizer.",
        )
    return make_rows(rows, source)


def _file_rows(file: Path, encode: Any, chat: Any, count: int, length: int) -> Iterator[list[int]]:
    ending = file.suffix.lower()
    if ending == ".json":
        raise UserError("a .json file is neither text nor rows.", where=str(file), remedy="Give JSONL, a row a line.")
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            if ending in (".jsonl", ".ndjson"):
                yield from _json_rows(stream, file, encode, chat, count, length)
            else:
                # a token is hardly ever longer than 64 characters
                yield from _cut(encode, stream.read(64 * count * length), count, length, str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read as text ({error}).", where=str(file), remedy="Give UTF-8 text or JSONL."
        ) from None


def _json_rows(
    lines: Iterable[str], file: Path, encode: Any, chat: Any, count: int, length: int
) -> Iterator[list[int]]:
    found = 0
    for number, line in enumerate(lines, 1):
        if found == count:
            return
        if line.strip():
            row = _json_row(line, f"{file}:{number}", encode, chat)[:length]
            if len(row) >= MIN_TOKENS:
                found += 1
                yield row
    if not found:
        raise UserError("no row of two tokens or more.", where=str(file), remedy="Give some text.")


def _json_row(line: str, where: str, encode: Any, chat: Any) -> list[int]:
    found = read_line(line, where, encode)
    if not isinstance(found, Messages):
        return found
    with template_errors(where):
        return list(chat(found.messages))


@dataclass(frozen=True)
class Messages:
    """A conversation of a JSONL file, yet to be put into a model's template."""

    messages: list[Any]


def read_line(line: str, where: str, encode: Any) -> list[int] | Messages:
    """Token ids of a JSONL line with `input_ids` or `text`, or its messages; UserError, with `where`, for another."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}).", where=where, remedy="JSONL has one JSON object a line.") from None
    if isinstance(entry, dict):
        ids = entry.get("input_ids")
        if isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids):
            return ids
        if isinstance(entry.get("text"), str):
            try:
                return list(encode(entry["text"]))
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (tokenizers raise that very class)
                raise UserError(f"this text cannot be tokenized ({error}).", where=where, remedy="Mend it.") from None
        if isinstance(entry.get("messages"), list):
            return Messages(entry["messages"])
    raise UserError("no `text`, `messages` or `input_ids`.", where=where, remedy="Each line needs one of them.")


def _cut(encode: Any, text: str, count: int, length: int, where: str) -> Iterator[list[int]]:
    """Rows of exactly `length` tokens, each starting as the tokenizer starts a text; a short text gives one row."""
    start = leading_tokens(encode)
    body = length - len(start)
    if body < 1:
        raise UserError(
            f"a length of {length} leaves no room behind the tokenizer's own {len(start)} tokens.", remedy="Raise it."
        )
    wanted = max(MIN_TOKENS, count * body)
    ids = first_tokens(encode, text, wanted)
    if len(ids) < MIN_TOKENS:
        raise UserError("empty or too short: no two tokens.", where=where, remedy="Give some text.")
    if len(ids) < body:
        yield [*start, *ids]
        return
    for n in range(min(count, len(ids) // body)):
        yield [*start, *ids[n * body : (n + 1) * body]]
