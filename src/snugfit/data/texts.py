"""The rows of an evaluation: plain texts in chunks of each context length, and JSONL rows of their own lengths.

A text is tokenized once without special tokens and cut into chunks of n tokens. Each begins with the tokens that the
tokenizer puts before a text (BOS where the model wants it); the incomplete chunk at the end is dropped. A file of rows
(JSONL, Parquet) gives a row a line: of conversations only the assistant's tokens are scored, of `prompt` and
`completion` the completion's, of `text` and `input_ids` all. A set gives its samples, scored in the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snugfit.data import python_docs
from snugfit.data.conversations import settle
from snugfit.data.dataset import samples_digest, the_set
from snugfit.data.files import (
    ROW_ENDINGS,
    check_ending,
    ending_of,
    holds_rows,
    parquet_lines,
    read_text,
    readable,
)
from snugfit.data.reader import check_ids
from snugfit.data.rows import Completion, Conversation, Row, read_row
from snugfit.data.set_samples import DrawRequest, draw_set, notes_on_sources
from snugfit.data.sets import LoadedSet, is_set, load_set
from snugfit.data.tokenizer import Tokenizer, common_prefix
from snugfit.errors import UserError
from snugfit.records.evaluation import TextRecord

DEFAULT_CONTEXTS = (2048,)
CHAT = 0  # the context of JSONL rows, each of its own length
SAMPLE_CHARACTERS = 20_000  # on which two tokenizers must agree

ScoredRow = tuple[str, list[int], tuple[int, ...] | None]  # source, token ids, scored positions


@dataclass(frozen=True)
class Chunks:
    """The rows of one context length (CHAT: all JSONL rows), the scored positions of each, and the source of each.

    `scored[r]` are positions in row r, None for all but the first. `digest` is SHA-256 over tokens and positions.
    `notes` say what a set left out.
    """

    context: int
    rows: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[int, ...] | None, ...]
    sources: tuple[str, ...]
    digest: str
    notes: tuple[str, ...] = ()


def read_chunks(
    tokenizer: Tokenizer,
    files: Sequence[Path],
    contexts: Sequence[int],
    *,
    max_chunks: int | None = None,
    max_tokens: int | None = None,
    vocabulary: int | None = None,
    positions: int | None = None,
) -> tuple[list[Chunks], list[TextRecord]]:
    """Chunks of every context length over all plain `files`, rows of the JSONL files, and a record of each file.

    One set in place of the files: its samples, at most `max_chunks`, cut at its own length and at `positions`;
    UserError for other `contexts` than the default, and for `max_tokens`.

    At most `max_chunks` chunks of each length, an equal share of each text, from its beginning; `max_tokens` instead
    takes as many tokens of the texts at every length. No files: the half of Python's documentation topics that
    calibration leaves out. `vocabulary` bounds the ids of JSONL rows.
    UserError for a text shorter than one chunk, and for limits that leave a text out.
    """
    _check_options(contexts, max_chunks, max_tokens)
    if (one := the_set(files)) is not None:
        loaded = load_set(one)
        _check_no_limits(loaded, contexts, max_tokens)
        request = DrawRequest(num_samples=max_chunks, vocabulary=vocabulary, positions=positions, pack=False)
        return _chunks_of_set(tokenizer, loaded, request)
    plain, logs, records = _read_files(files)
    groups = []
    if plain:
        if not contexts:
            raise _wrong_contexts("no context length.")
        _check_limits(tokenizer, len(plain), max(contexts), max_chunks, max_tokens)
        encoded = _encode_all(tokenizer, plain, contexts, max_chunks, max_tokens)
        groups += [_cut_all(tokenizer, encoded, context, max_chunks, max_tokens) for context in sorted(contexts)]
    if logs:
        rows = [row for name, text in logs for row in _log_rows(tokenizer, name, text, vocabulary)]
        groups.append(_chunks(CHAT, rows))
    return groups, records


def _chunks_of_set(
    tokenizer: Tokenizer, loaded: LoadedSet, request: DrawRequest
) -> tuple[list[Chunks], list[TextRecord]]:
    samples, uses = draw_set(loaded, tokenizer, request, lambda row, where: _scored(tokenizer, row, where))
    rows = [(sample.where, sample.ids, sample.scored) for sample in samples]
    notes = notes_on_sources(uses)
    if any(loaded.set.packing if source.packing is None else source.packing for source in loaded.set.datasets):
        notes.append(f"{loaded.name}: `packing` has no effect, each row is evaluated by itself")
    return [replace(_chunks(CHAT, rows), notes=tuple(notes))], [TextRecord(loaded.name, loaded.digest, "set")]


def _check_no_limits(loaded: LoadedSet, contexts: Sequence[int], max_tokens: int | None) -> None:
    """UserError for a limit that a caller gives beside a set, which says itself how long its samples are."""
    given = {"contexts": tuple(contexts) not in ((), DEFAULT_CONTEXTS), "max_tokens": max_tokens is not None}
    for name, is_given in given.items():
        if is_given:
            what = f"has no effect on {loaded.name}: the samples of a set have their own lengths."
            remedy = "Set `max_seq_length` or `max_tokens` in the set, or give `max_chunks`."
            raise UserError(what, code="option-conflict", where=name, remedy=remedy)


def _check_options(contexts: Sequence[int], max_chunks: int | None, max_tokens: int | None) -> None:
    for name, value in (("max_chunks", max_chunks), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            remedy = f"Set `{name}` to 1 or more, or leave it out."
            raise UserError(f"must be >= 1, got {value}.", code="option-invalid", where=name, remedy=remedy)
    if any(context < 2 for context in contexts):
        raise _wrong_contexts(f"each must be >= 2, got {list(contexts)}.")
    if len(set(contexts)) < len(contexts):
        raise _wrong_contexts(f"each may be given once, got {list(contexts)}.")


def _wrong_contexts(what: str) -> UserError:
    remedy = "Set `contexts` to lengths in tokens, such as 2048."
    return UserError(what, code="option-invalid", where="contexts", remedy=remedy)


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`; a folder gives the texts and JSONL files in it, in order of their names."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir() or is_set(path):
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if ending_of(file) in (".txt", ".md", *ROW_ENDINGS))
        if not found:
            what = "no .txt, .md, .jsonl or .parquet file in this folder."
            raise UserError(what, code="dataset-unreadable", where=str(path), remedy="Name the files.")
        files += found
    return files


def check_tokenizer(reference: Tokenizer, candidate: Path, text: str) -> None:
    """UserError where the candidate has a tokenizer that splits `text` into other tokens."""
    if not any((candidate / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return
    files = [path / "tokenizer.json" for path in (reference.path, candidate)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    sample = text[:SAMPLE_CHARACTERS]
    expected, found = reference.encode(sample), Tokenizer(candidate).encode(sample)
    if expected != found:
        differing = (n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
        place = next(differing, min(len(expected), len(found)))
        raise UserError(
            f"its tokenizer is not the reference's: they differ at token {place} of the text.",
            code="models-mismatch",
            where=str(candidate),
            remedy="KL compares tokens: evaluate checkpoints of one model, or copy the reference's tokenizer here.",
        )


def sample_text(tokenizer: Tokenizer, files: Sequence[Path], chunks: Sequence[Chunks]) -> str:
    """The beginning of the first text, or of a set's samples, to compare tokenizers on."""
    if the_set(files) is not None:
        ids = [token for group in chunks for row in group.rows[:50] for token in row]
        return tokenizer.decode(ids)[:SAMPLE_CHARACTERS]
    plain, logs, _ = _read_files(files[:1])
    return (plain or logs)[0][1][:SAMPLE_CHARACTERS]


def _read_files(files: Sequence[Path]) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[TextRecord]]:
    """(name, text) of plain texts, (path, text) of JSONL files, and records of all."""
    if not files:
        text = python_docs.python_topics("evaluation")
        name = python_docs.SOURCES["evaluation"]
        return [(name, text)], [], [TextRecord(name, hashlib.sha256(text.encode()).hexdigest(), "text")]
    plain: list[tuple[str, str]] = []
    logs: list[tuple[str, str]] = []
    records = []
    for file in files:
        rows = holds_rows(file)
        check_ending(file)
        with readable(file):
            data = file.read_bytes()
        text = "\n".join(parquet_lines(file, data)) if ending_of(file) == ".parquet" else read_text(file, data)
        (logs if rows else plain).append((str(file), text))
        records.append(TextRecord(file.name, hashlib.sha256(data).hexdigest(), "rows" if rows else "text"))
    return plain, logs, records


def _check_limits(
    tokenizer: Tokenizer, texts: int, longest: int, max_chunks: int | None, max_tokens: int | None
) -> None:
    """UserError where a limit leaves a text without a chunk of the longest context."""
    each = f" of each of {texts} texts" if texts > 1 else ""
    if max_chunks is not None and max_chunks < texts:
        raise UserError(
            f"{max_chunks} is less than one chunk{each}.",
            code="option-invalid",
            where="max_chunks",
            remedy="Raise `max_chunks`, or leave it out.",
        )
    if max_tokens is not None and max_tokens // texts < longest - len(tokenizer.start_tokens):
        raise UserError(
            f"{max_tokens} tokens are less than one chunk of {longest}{each}.",
            code="option-invalid",
            where="max_tokens",
            remedy="Raise `max_tokens`, or give shorter `contexts`.",
        )


def _encode_all(
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, str]],
    contexts: Sequence[int],
    max_chunks: int | None,
    max_tokens: int | None,
) -> list[tuple[str, list[int]]]:
    """(name, token ids) of each text, as many as chunks of any length will need."""
    share = None
    if max_chunks is not None:
        share = -(-max_chunks // len(texts)) * max(contexts)
    if max_tokens is not None:
        share = min(share or max_tokens, max(-(-max_tokens // len(texts)), *contexts, 0))
    encoded = []
    for name, text in texts:
        ids = tokenizer.first_tokens(text, len(text) if share is None else share, where=name)
        if len(ids) + len(tokenizer.start_tokens) < max(contexts):
            raise UserError(
                f"{len(ids)} tokens are less than one chunk of {max(contexts)}.",
                code="dataset-too-small",
                where=name,
                remedy="Give longer texts, or shorter `contexts`.",
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
    start = tokenizer.start_tokens
    body = context - len(start)
    if body < 1:
        raise _wrong_contexts(f"{context} tokens hold no text behind the tokenizer's own {len(start)}.")
    rows: list[ScoredRow] = []
    for place, (name, ids) in enumerate(encoded):
        count = len(ids) // body
        if max_tokens is not None:
            count = min(count, max_tokens // len(encoded) // body)
        if max_chunks is not None:
            count = min(count, -(-(max_chunks - len(rows)) // (len(encoded) - place)))
        rows += [(name, [*start, *ids[n * body : (n + 1) * body]], None) for n in range(count)]
    return _chunks(context, rows)


def _chunks(context: int, rows: Sequence[ScoredRow]) -> Chunks:
    names, ids, scored = zip(*rows, strict=True) if rows else ((), (), ())
    digest = hashlib.sha256(json.dumps([samples_digest(ids), scored]).encode()).hexdigest()
    return Chunks(context, tuple(map(tuple, ids)), scored, names, digest)


def _log_rows(tokenizer: Tokenizer, name: str, text: str, vocabulary: int | None) -> Iterator[ScoredRow]:
    found = False
    for number, line in enumerate(text.split("\n"), 1):  # strings may hold other separators of Unicode
        if not line.strip():
            continue
        where = f"{name}:{number}"
        ids, positions = _log_row(tokenizer, line, where, vocabulary)
        if len(ids) > 1 and (positions is None or positions):
            found = True
            yield where, ids, positions
    if not found:
        what, remedy = "no row with a token to score.", "Give `messages` with an assistant's answer."
        raise UserError(what, code="dataset-too-small", where=name, remedy=remedy)


def _log_row(
    tokenizer: Tokenizer, line: str, where: str, vocabulary: int | None
) -> tuple[list[int], tuple[int, ...] | None]:
    ids, scored = _scored(tokenizer, read_row(line, where), where)
    check_ids(ids, where, vocabulary)
    return ids, scored


def _scored(tokenizer: Tokenizer, row: Row, where: str) -> tuple[list[int], tuple[int, ...] | None]:
    """A row's tokens, and the positions of those that are scored; None for all."""
    if isinstance(row, Conversation):
        return _conversation(tokenizer, settle(tokenizer, row, where), where)
    if isinstance(row, Completion):
        ids = tokenizer.encode(row.prompt + row.completion, where=where)
        first = common_prefix(tokenizer.encode(row.prompt, where=where), ids)
        return ids, tuple(range(max(1, first), len(ids)))
    return (tokenizer.encode(row, where=where) if isinstance(row, str) else row), None


def _conversation(tokenizer: Tokenizer, row: Conversation, where: str) -> tuple[list[int], tuple[int, ...]]:
    """A conversation's tokens, and the positions of those that the assistant wrote.

    The template is applied up to each answer, with and without it; the answer is the difference. Templates that
    rewrite earlier turns (leaving out reasoning) keep this only for the last ones, whose answers are then scored.
    """
    messages = row.messages
    answers = [
        n
        for n, message in enumerate(messages)
        if n >= row.first_scored and isinstance(message, dict) and message.get("role") == "assistant"
    ]
    whole = tokenizer.chat(messages, where=where, **row.options)
    positions: list[int] = []
    for n in answers:
        upto = tokenizer.chat(messages[: n + 1], where=where, **row.options) if n + 1 < len(messages) else whole
        start = _start_of_answer(tokenizer, row, n, upto, where)
        if start is not None and whole[: len(upto)] == upto:
            positions += range(max(1, start), len(upto))
    if answers and not positions:
        raise UserError(
            "the chat template rewrites every turn, so that the assistant's tokens cannot be identified.",
            code="chat-template-failed",
            where=where,
            remedy="End the conversation with the answer to be scored, or give `text`.",
        )
    return whole, tuple(positions)


def _start_of_answer(tokenizer: Tokenizer, row: Conversation, n: int, upto: list[int], where: str) -> int | None:
    """The position at which answer n begins in the conversation `upto` it; None if it cannot be identified.

    A generation prompt may open what this answer does not have, such as <think>: the answer then begins where the two
    part, if that is behind the messages before it.
    """
    if not n:
        return 0
    before = tokenizer.chat(row.messages[:n], where=where, **row.options, add_generation_prompt=True)
    start = common_prefix(before, upto)
    if start == len(before):
        return start
    earlier = tokenizer.chat(row.messages[:n], where=where, **row.options)
    return start if start >= common_prefix(earlier, before) else None
