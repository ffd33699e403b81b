"""What is evaluated on: plain texts in chunks of each context length, and chat logs as they are.

A text is tokenized once without special tokens and cut into chunks of n tokens, each starting as the tokenizer starts
a text (BOS where the model wants it); what is left at the end is dropped. A JSONL file gives a row a line: of
`messages` only the assistant's tokens are scored, of `text` and `input_ids` all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snugfit.data.rows import Messages, make_rows, python_topics, read_line
from snugfit.data.tokenizer import (
    Tokenizer,
    first_tokens,
    leading_tokens,
    template_errors,
)
from snugfit.errors import UserError
from snugfit.records.evaluation import TextRecord

CHAT = 0  # the context of rows that are as long as they are
SAMPLE = 20_000  # characters on which two tokenizers must agree


@dataclass(frozen=True)
class Chunks:
    """The rows of one context length (CHAT: of all chat logs), the scored places of each, where each comes from.

    `scored[r]` are positions in row r, None for all but the first. `digest` is SHA-256 over tokens and places.
    """

    context: int
    rows: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[int, ...] | None, ...]
    sources: tuple[str, ...]
    digest: str


def read_chunks(
    tokenizer: Tokenizer,
    files: Sequence[Path],
    contexts: Sequence[int],
    *,
    max_chunks: int | None = None,
    max_tokens: int | None = None,
    vocabulary: int | None = None,
) -> tuple[list[Chunks], list[TextRecord]]:
    """Chunks of every context length over all plain `files`, rows of the JSONL ones, and which files those are.

    At most `max_chunks` chunks of each length, an equal share of each text, from its beginning; `max_tokens` instead
    takes as many tokens of the texts at every length. No files: the half of Python's documentation topics that
    calibration leaves out. `vocabulary` bounds the ids of JSONL rows.
    UserError for a text shorter than one chunk, and for limits that leave one out.
    """
    for name, value in (("--max-chunks", max_chunks), ("--max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} leaves nothing to evaluate.", remedy="Give a positive number, or none.")
    if any(context < 2 for context in contexts) or len(set(contexts)) < len(contexts):
        raise UserError(f"contexts {list(contexts)}: each must be 2 at least, and there once.", where="--context")
    plain, logs, records = _read_files(files)
    groups = []
    if plain:
        if not contexts:
            raise UserError("no context length.", where="--context", remedy="Give one, such as --context 4096.")
        _check_limits(tokenizer, len(plain), max(contexts), max_chunks, max_tokens)
        encoded = _encode_all(tokenizer, plain, contexts, max_chunks, max_tokens)
        groups += [_cut_all(tokenizer, encoded, context, max_chunks, max_tokens) for context in sorted(contexts)]
    if logs:
        rows = [row for name, text in logs for row in _log_rows(tokenizer, name, text, vocabulary)]
        groups.append(_chunks(CHAT, rows))
    return groups, records


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Files as given; a folder stands for the texts and JSONL files in it, in order of their names."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in (".txt", ".md", ".jsonl", ".ndjson"))
        if not found:
            raise UserError("no .txt, .md or .jsonl file in it.", where=str(path), remedy="Name the files.")
        files += found
    return files


def check_tokenizer(reference: Tokenizer, candidate: Path, text: str) -> None:
    """UserError where the candidate has a tokenizer that makes other tokens of `text`."""
    if not any((candidate / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return
    files = [path / "tokenizer.json" for path in (reference.path, candidate)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = reference.encode(text[:SAMPLE]), Tokenizer(candidate).encode(text[:SAMPLE])
    if ours != theirs:
        place = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise UserError(
            f"its tokenizer is not the reference's: they part at token {place} of the text.",
            where=str(candidate),
            remedy="KL compares tokens: evaluate checkpoints of one model, or copy the reference's tokenizer here.",
        )


def sample_text(files: Sequence[Path]) -> str:
    """The beginning of what is evaluated on, for comparing tokenizers."""
    if not files:
        return python_topics("evaluation")[:SAMPLE]
    plain, logs, _ = _read_files(files[:1])
    return (plain or logs)[0][1][:SAMPLE]


def _read_files(files: Sequence[Path]) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[TextRecord]]:
    """(name, text) of plain texts, (path, text) of logs, and records of all."""
    if not files:
        text = python_topics("evaluation")
        name = "Python's documentation topics (evaluation half)"
        return [(name, text)], [], [TextRecord(name, hashlib.sha256(text.encode()).hexdigest(), "text")]
    plain: list[tuple[str, str]] = []
    logs: list[tuple[str, str]] = []
    records = []
    for file in files:
        rows = file.suffix.lower() in (".jsonl", ".ndjson")
        if file.suffix.lower() == ".json":
            raise UserError("a .json file is neither text nor rows.", where=str(file), remedy="Give text or JSONL.")
        try:
            data = file.read_bytes()
            text = data.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read as text ({error}).", where=str(file), remedy="Give UTF-8 text.") from None
        (logs if rows else plain).append((str(file), text))
        records.append(TextRecord(file.name, hashlib.sha256(data).hexdigest(), "rows" if rows else "text"))
    return plain, logs, records


def _check_limits(
    tokenizer: Tokenizer, texts: int, longest: int, max_chunks: int | None, max_tokens: int | None
) -> None:
    """UserError where a limit leaves a text without a chunk of the longest context."""
    each = f" of each of {texts} texts" if texts > 1 else ""
    if max_chunks is not None and max_chunks < texts:
        raise UserError(f"--max-chunks {max_chunks} is less than one chunk{each}.", remedy="Raise it, or leave it out.")
    if max_tokens is not None and max_tokens // texts < longest - len(leading_tokens(tokenizer.encode)):
        raise UserError(
            f"--max-tokens {max_tokens} is less than one chunk of {longest}{each}.",
            remedy="Raise it, or give shorter contexts.",
        )


def _encode_all(
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, str]],
    contexts: Sequence[int],
    max_chunks: int | None,
    max_tokens: int | None,
) -> list[tuple[str, list[int]]]:
    """(name, token ids) of each text, as far as chunks of any length will need them."""
    share = None
    if max_chunks is not None:
        share = -(-max_chunks // len(texts)) * max(contexts)
    if max_tokens is not None:
        share = min(share or max_tokens, max(-(-max_tokens // len(texts)), *contexts, 0))
    encoded = []
    for name, text in texts:
        ids = first_tokens(tokenizer.encode, text, len(text) if share is None else share)
        if len(ids) + len(leading_tokens(tokenizer.encode)) < max(contexts):
            raise UserError(
                f"{len(ids)} tokens are less than one chunk of {max(contexts)}.",
                where=name,
                remedy="Give longer texts, or shorter contexts.",
            )
        encoded.append((name, ids))
    return encoded


def _cut_all(
    tokenizer: Tokenizer,
    encoded: Sequence[tuple[str, list[int]]],
    context: int,
    max_chunks: int | None,
    max_tokens: int | None,
) -> Chunks:
    start = leading_tokens(tokenizer.encode)
    body = context - len(start)
    if body < 1:
        raise UserError(f"{context} tokens leave no room behind BOS.", where="--context", remedy="Give longer ones.")
    rows: list[tuple[str, list[int], tuple[int, ...] | None]] = []
    for place, (name, ids) in enumerate(encoded):
        count = len(ids) // body
        if max_tokens is not None:
            count = min(count, max_tokens // len(encoded) // body)
        if max_chunks is not None:
            count = min(count, -(-(max_chunks - len(rows)) // (len(encoded) - place)))
        rows += [(name, [*start, *ids[n * body : (n + 1) * body]], None) for n in range(count)]
    return _chunks(context, rows)


def _chunks(context: int, rows: Sequence[tuple[str, list[int], tuple[int, ...] | None]]) -> Chunks:
    scored = tuple(places for _, _, places in rows)
    tokens = make_rows([ids for _, ids, _ in rows], "")
    digest = hashlib.sha256(json.dumps([tokens.digest, scored]).encode()).hexdigest()
    return Chunks(context, tokens.rows, scored, tuple(name for name, _, _ in rows), digest)


def _log_rows(
    tokenizer: Tokenizer, name: str, text: str, vocabulary: int | None
) -> Iterator[tuple[str, list[int], tuple[int, ...] | None]]:
    found = False
    for number, line in enumerate(text.split("\n"), 1):  # other separators of Unicode may stand in strings
        if not line.strip():
            continue
        where = f"{name}:{number}"
        ids, places = _log_row(tokenizer, line, where, vocabulary)
        if len(ids) > 1 and (places is None or places):
            found = True
            yield where, ids, places
    if not found:
        raise UserError(
            "no row with a token to score.", where=name, remedy="Give `messages` with an assistant's answer."
        )


def _log_row(
    tokenizer: Tokenizer, line: str, where: str, vocabulary: int | None
) -> tuple[list[int], tuple[int, ...] | None]:
    found = read_line(line, where, tokenizer.encode)
    if isinstance(found, Messages):
        return _conversation(tokenizer, found.messages, where)
    check_ids(found, where, vocabulary)
    return found, None


def check_ids(ids: Sequence[int], where: str, vocabulary: int | None) -> None:
    """UserError for an id beyond the vocabulary (None: beyond int32, which no vocabulary is)."""
    highest, limit = max(ids, default=0), vocabulary or 2**31
    if highest >= limit:
        raise UserError(
            f"token id {highest} is beyond the model's vocabulary of {limit}.",
            where=where,
            remedy="Tokenize with this model's tokenizer.",
        )


def _conversation(tokenizer: Tokenizer, messages: list[Any], where: str) -> tuple[list[int], tuple[int, ...]]:
    """A conversation's tokens, and the places of those that the assistant wrote.

    The template is applied up to each answer, with and without it; what stands between is the answer. Templates that
    rewrite earlier turns (leaving out reasoning) keep this only for the last ones, whose answers are then scored.
    """
    answers = [
        n for n, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "assistant"
    ]
    with template_errors(where):
        whole = tokenizer.chat(messages)
        places: list[int] = []
        for n in answers:
            before = tokenizer.chat(messages[:n], add_generation_prompt=True) if n else []
            upto = tokenizer.chat(messages[: n + 1]) if n + 1 < len(messages) else whole
            if whole[: len(upto)] == upto and upto[: len(before)] == before:
                places += range(max(1, len(before)), len(upto))
    if answers and not places:
        raise UserError(
            "the chat template rewrites every turn, so that the assistant's tokens cannot be told.",
            where=where,
            remedy="End the conversation with the answer to be scored, or give `text`.",
        )
    return whole, tuple(places)
