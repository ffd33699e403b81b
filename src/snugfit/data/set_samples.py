"""Samples of a set: rows are drawn, formatted and tokenized, source by source; a bad row is skipped and counted.

A source ends at its number of samples, at its tokens, or with its rows. Long rows are cut at the maximum length, unless
samples are packed: then documents follow each other without padding, an end token behind each, in samples of equal
length. Limits on the whole set take samples in random order (`shuffle`), or evenly spread over all of them.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from snugfit.data.conversations import as_plain_text, with_reasoning_inside
from snugfit.data.files import GZIP, open_text
from snugfit.data.reader import MAX_CHARACTERS_PER_TOKEN, MIN_TOKENS, SampleReader, check_ids, shuffled
from snugfit.data.rows import Conversation, Row, read_line
from snugfit.data.sets import ALL, LoadedSet, Source
from snugfit.data.sources import RawRow, SourceRows, open_source, read_whole
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError
from snugfit.records.dataset import SourceUse

MAX_BAD_ROWS = 100  # at the beginning of a source; then none of it can be used
STREAMED_ALL = 256  # samples of a stream of which all are wanted, as in the quantizers project
_REASONS = 8  # that are counted by themselves
_ROW_CODES = ("dataset-invalid", "chat-template-failed", "token-out-of-range", "dataset-too-small")
_WHOLE_FILE = 32_000_000  # bytes of a text that is cut as a whole before pieces are drawn

Scored = tuple[list[int], tuple[int, ...] | None]  # token ids, and positions that are scored; None for all
Tokenize = Callable[[Row, str], Scored]


@dataclass(frozen=True)
class DrawnSample:
    """A sample, the place of its row, the number of its source, and the positions that are scored (None: all)."""

    ids: list[int]
    where: str
    source: int
    scored: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """What a caller wants of a set; None leaves it to the set.

    `shuffle_seed` draws rows at random. `positions` are those of the model, which no sample exceeds. `pack` False
    ignores that the set packs.
    """

    num_samples: int | None = None
    max_seq_length: int | None = None
    shuffle_seed: int | None = None
    vocabulary: int | None = None
    positions: int | None = None
    pack: bool = True

    def length(self, loaded: LoadedSet) -> int:
        """Tokens of a sample at most: as asked, or the set's, cut at the model's positions."""
        if self.max_seq_length is not None:
            return self.max_seq_length
        return min(loaded.set.max_seq_length, self.positions or loaded.set.max_seq_length)


def draw_set(
    loaded: LoadedSet, tokenizer: Tokenizer, request: DrawRequest, tokenize: Tokenize | None = None
) -> tuple[list[DrawnSample], list[SourceUse]]:
    """The samples of a set, source by source in order, and what each source gave.

    `tokenize` makes token ids and scored positions of a row; without, all of its tokens. UserError for a source that
    cannot be read, or of which no row can be used.
    """
    samples: list[DrawnSample] = []
    uses: list[SourceUse] = []
    taken: dict[str, _Taken] = {}
    for number in range(len(loaded.set.datasets)):
        drawing = _Drawing(loaded, number, tokenizer, request, tokenize)
        drawing.taken = taken.setdefault(drawing.way, _Taken())
        found, use = drawing.run()
        samples += found
        uses.append(use)
    if not samples:
        what = "no source has a row that can be used."
        reasons = Counter(reason for use in uses for reason in use.skipped)
        remedy = f"The most frequent reason: {reasons.most_common(1)[0][0]}."
        raise UserError(what, code="dataset-too-small", where=loaded.name, remedy=remedy)
    kept = _within_limits(samples, loaded, request)
    if len(kept) == len(samples):
        return samples, uses
    counts, tokens = Counter[int](), Counter[int]()
    for sample in kept:
        counts[sample.source] += 1
        tokens[sample.source] += len(sample.ids)
    return kept, [replace(use, samples=counts[n], tokens=tokens[n]) for n, use in enumerate(uses)]


def notes_on_sources(uses: Sequence[SourceUse]) -> list[str]:
    """What a person should know of a set: rows that were skipped, and sources with too few samples."""
    notes = []
    for use in uses:
        skipped = sum(use.skipped.values())
        if skipped:
            reason, count = next(iter(use.skipped.items()))
            notes.append(f"{use.dataset}: {skipped} of {use.rows} rows skipped ({count} x {reason})")
        if use.asked is not None and use.drawn is not None and use.drawn < use.asked:
            notes.append(f"{use.dataset}: {use.drawn} samples, and {use.asked} were asked for")
    return notes


def _within_limits(samples: list[DrawnSample], loaded: LoadedSet, request: DrawRequest) -> list[DrawnSample]:
    """The samples that the limits on the whole set leave, in their order."""
    count, budget = request.num_samples or len(samples), loaded.set.max_tokens
    total = sum(len(sample.ids) for sample in samples)
    if count >= len(samples) and (budget is None or total <= budget):
        return samples
    if loaded.set.shuffle or request.shuffle_seed is not None:
        order = shuffled(range(len(samples)), _seed(loaded, request))
    else:
        wanted = len(samples) if budget is None else max(1, len(samples) * budget // max(total, 1))
        wanted = max(1, min(count, wanted))
        order = [(2 * place + 1) * len(samples) // (2 * wanted) for place in range(wanted)]
    kept: set[int] = set()
    tokens = 0
    for place in order:
        length = len(samples[place].ids)
        if len(kept) < count and (budget is None or tokens + length <= budget):
            kept.add(place)
            tokens += length
    if not kept:
        what = f"no sample has {budget} tokens or fewer."
        raise UserError(what, code="dataset-too-small", where=f"{loaded.name}: max_tokens", remedy="Raise it.")
    return [sample for place, sample in enumerate(samples) if place in kept]


def _seed(loaded: LoadedSet, request: DrawRequest) -> int:
    return loaded.set.seed if request.shuffle_seed is None else request.shuffle_seed


@dataclass
class _Taken:
    """What earlier entries read of a dataset in one way: rows, samples of each text, tokens not yet in a sample."""

    rows: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    pending: list[int] = field(default_factory=list)  # of documents that are packed


class _Drawing:
    """Draws the samples of one source."""

    def __init__(
        self, loaded: LoadedSet, number: int, tokenizer: Tokenizer, request: DrawRequest, tokenize: Tokenize | None
    ) -> None:
        self._loaded, self._number = loaded, number
        self._source: Source = loaded.set.datasets[number]
        self._tokenizer, self._request = tokenizer, request
        # at random a dataset that is named twice is drawn in another order the second time
        earlier = [(one.dataset, one.subset, one.split) for one in loaded.set.datasets[:number]]
        again = earlier.count((self._source.dataset, self._source.subset, self._source.split))
        self._seed = _seed(loaded, request) + again
        draw = self._source.draw or loaded.set.draw
        self._random = draw == "random" or request.shuffle_seed is not None
        self._length = request.length(loaded)
        self._reader = SampleReader(tokenizer, self._length, request.vocabulary, self._seed if self._random else None)
        self._tokenize = tokenize or (lambda row, where: (self._reader.tokens_of(row, where), None))
        packing = self._source.packing
        self._packing = request.pack and (loaded.set.packing if packing is None else packing)
        self._samples: list[DrawnSample] = []
        self._tokens = self._rows = 0
        self._skipped: Counter[str] = Counter()
        self._first_error: UserError | None = None
        self.taken = _Taken()

    @property
    def way(self) -> str:
        """What a source reads, and how: an entry of the same way continues behind this one's rows."""
        rest = {"num_samples", "max_tokens", "category", "language", "streaming", "draw", "packing"}
        other_order = self._number if self._random else None
        return repr((self._source.model_dump(exclude=rest), other_order, self._packing))

    def run(self) -> tuple[list[DrawnSample], SourceUse]:
        """The samples, and what the source gave."""
        source = self._source
        self._check_template()
        opened = open_source(self._loaded, self._number, draw="random" if self._random else "first", seed=self._seed)
        wanted = self._wanted(opened)
        if opened.texts and not self._packing:
            if source.formatter_params:
                remedy = "Use `formatter: text` or raw_text with `columns: [text]`: each file is then one row."
                what = "parameters have no effect on a text that is cut into samples."
                place = self._loaded.place_of(self._number, "formatter_params")
                raise UserError(what, code="dataset-set-invalid", where=place, remedy=remedy)
            self._cut_texts(opened.texts, wanted)
        else:
            texts = ((str(file), {"text": read_whole(file)}) for file in opened.texts)
            self._read_rows(opened.rows if opened.rows is not None else texts, wanted)
        if not self._samples and (self._loaded.set.unusable_sources == "refuse" or self._first_error is None):
            raise self._nothing()
        return self._samples, SourceUse(
            dataset=source.dataset,
            subset=source.subset,
            split=source.split if opened.revision is not None else None,
            revision=opened.revision,
            formatter=source.formatter,
            category=source.category,
            language=source.language,
            asked=wanted,
            drawn=len(self._samples),
            samples=len(self._samples),
            tokens=self._tokens,
            rows=self._rows,
            skipped=dict(self._skipped.most_common()),
        )

    def _wanted(self, opened: SourceRows) -> int | None:
        if self._source.num_samples != ALL:
            return int(self._source.num_samples)
        streamed = self._source.streaming and opened.revision is not None
        return STREAMED_ALL if streamed and self._budget is None else None

    @property
    def _budget(self) -> int | None:
        limits = [limit for limit in (self._source.max_tokens, self._loaded.set.max_tokens) if limit is not None]
        return min(limits, default=None)

    def _check_template(self) -> None:
        """UserError for a source of conversations where the tokenizer has no chat template."""
        needs = self._loaded.formatters[self._number].conversations
        if needs and self._loaded.set.without_template == "refuse" and self._tokenizer.chat_template is None:
            raise UserError(
                f"{self._source.formatter} needs a chat template, and {self._tokenizer.path} has none.",
                code="chat-template-failed",
                where=self._loaded.place_of(self._number, "formatter"),
                remedy="Use `formatter: text`, or set `without_template: join` in the set.",
            )

    # --- rows

    def _read_rows(self, rows: Iterator[RawRow], wanted: int | None) -> None:
        with closing(rows):  # type: ignore[type-var]  # rows are generators
            if self.taken.pending and not self._pack(self._source.dataset, wanted):
                return
            deque(islice(rows, self.taken.rows), maxlen=0)
            for where, raw in rows:
                self._rows += 1
                self.taken.rows += 1
                try:
                    ids, scored = self._tokenize(self._row(raw, where), where)
                    check_ids(ids, where, self._request.vocabulary)
                    if not self._take(ids, scored, where, wanted):
                        return
                except UserError as error:
                    if error.code not in _ROW_CODES:
                        raise
                    self._skip(error)
                    if not (self._samples or self.taken.pending) and self._rows >= MAX_BAD_ROWS:
                        return
        if not self._samples and len(self.taken.pending) >= MIN_TOKENS:
            self._add(list(self.taken.pending), None, self._source.dataset)
        self.taken.pending.clear()

    def _take(self, ids: list[int], scored: tuple[int, ...] | None, where: str, wanted: int | None) -> bool:
        """Add the sample of a row, or those that its tokens complete; whether more are wanted."""
        if not self._packing:
            if len(ids[: self._length]) < MIN_TOKENS:
                raise UserError(f"fewer than {MIN_TOKENS} tokens.", code="dataset-too-small", where=where)
            cut, kept = _first_tokens(ids, scored, self._length, where)
            return self._add(cut, kept, where) and (wanted is None or len(self._samples) < wanted)
        if not ids:
            raise UserError("no tokens.", code="dataset-too-small", where=where)
        end = self._tokenizer.end_token
        self.taken.pending += ids if end is None or ids[-1] == end else [*ids, end]
        return self._pack(where, wanted)

    def _pack(self, where: str, wanted: int | None) -> bool:
        """Add the samples that are complete; whether more are wanted."""
        pending = self.taken.pending
        while len(pending) >= self._length:
            sample, pending[:] = pending[: self._length], pending[self._length :]
            if not self._add(sample, None, where) or (wanted is not None and len(self._samples) >= wanted):
                return False
        return True

    def _add(self, ids: list[int], scored: tuple[int, ...] | None, where: str) -> bool:
        """Add a sample; False where the budget has no place for it."""
        if self._budget is not None and self._tokens + len(ids) > self._budget:
            if self._samples:
                return False
            ids, scored = _first_tokens(ids, scored, self._budget, where)
        self._samples.append(DrawnSample(ids, where, self._number, scored))
        self._tokens += len(ids)
        return True

    def _row(self, raw: str | dict[str, Any], where: str) -> Row:
        entry = read_line(raw, where) if isinstance(raw, str) else raw
        row = self._loaded.formatters[self._number].read(entry, where)
        if not isinstance(row, Conversation):
            return row
        template = self._tokenizer.chat_template
        if template is None and self._loaded.set.without_template == "join":
            return as_plain_text(row)
        return row if template is not None and "reasoning_content" in template else with_reasoning_inside(row)

    def _skip(self, error: UserError) -> None:
        self._first_error = self._first_error or error
        reason = error.what.rstrip(".")
        self._skipped[reason if reason in self._skipped or len(self._skipped) < _REASONS else "other reasons"] += 1

    def _nothing(self) -> UserError:
        """The error for a source of which no row can be used, with the most frequent reason."""
        where = self._loaded.place_of(self._number)
        if self._first_error is None:
            what = f"{self._source.dataset} has no rows."
            if self.taken.rows or self.taken.samples:
                what = f"earlier entries of the set took all that {self._source.dataset} has."
            return UserError(what, code="dataset-too-small", where=where, remedy="Name another source.")
        reason, _ = self._skipped.most_common(1)[0]
        what = f"none of the first {self._rows} rows of {self._source.dataset} can be used: {reason}."
        if self._rows == 1:
            what = f"the only row of {self._source.dataset} cannot be used: {reason}."
        remedy = "Correct `columns`, `formatter` or its parameters."
        return UserError(what, code=self._first_error.code, where=where, remedy=remedy)

    # --- texts that are cut

    def _cut_texts(self, files: Sequence[Path], wanted: int | None) -> None:
        """Samples of texts, an equal share of each file."""
        for place, file in enumerate(files):
            share = None if wanted is None else -(-(wanted - len(self._samples)) // (len(files) - place))
            if share == 0:
                return
            self._rows += 1
            try:
                skip = self.taken.samples[str(file)]
                for ids in islice(self._cut(file, None if share is None else share + skip), skip, None):
                    if not self._add(ids, None, str(file)):
                        return
                    self.taken.samples[str(file)] += 1
            except UserError as error:
                if error.code not in _ROW_CODES:
                    raise
                self._skip(error)

    def _cut(self, file: Path, share: int | None) -> Iterator[list[int]]:
        where = str(file)
        if self._random and share is not None and file.suffix.lower() != GZIP and file.stat().st_size > _WHOLE_FILE:
            for text in _windows(file, share, MAX_CHARACTERS_PER_TOKEN * self._length, self._seed):
                yield from self._reader.cut(text, 1, where)
            return
        with open_text(file) as stream:
            whole = share is None or self._random
            text = stream.read(-1 if whole or share is None else MAX_CHARACTERS_PER_TOKEN * share * self._length)
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield from self._reader.cut(text, len(text) if share is None else share, where)


def _first_tokens(ids: list[int], scored: tuple[int, ...] | None, count: int, where: str) -> Scored:
    """The first `count` tokens and those of them that are scored; UserError where none is."""
    kept = None if scored is None else tuple(position for position in scored if position < count)
    if kept == ():
        raise UserError("no token to score.", code="dataset-too-small", where=where)
    return ids[:count], kept


def _windows(file: Path, count: int, size: int, seed: int) -> Iterator[str]:
    """Pieces of a large text, one at a random place of each of `count` parts, from the beginning of a line."""
    generator = random.Random(seed)  # noqa: S311  # no secret
    part = file.stat().st_size / count
    with file.open("rb") as stream:
        for number in range(count):
            stream.seek(int((number + generator.random()) * part))
            text = stream.read(size).decode("utf-8", "ignore").replace("\r\n", "\n").replace("\r", "\n")
            yield text.partition("\n")[2] or text
