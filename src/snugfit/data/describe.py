"""What a dataset gives a model: counts, tokens, categories, languages, lengths and positions of its samples."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from snugfit.arguments import as_sequence
from snugfit.data.dataset import Dataset, check_files, hold_out, load_dataset
from snugfit.data.sets import load_set
from snugfit.data.tokenizer import Tokenizer
from snugfit.errors import UserError
from snugfit.model.language_config import with_defaults as full_config
from snugfit.model.positions import max_positions
from snugfit.records.dataset import DatasetRecord, HeldOutPart, PositionRange, Share, SourceUse
from snugfit.storage.checkpoint import CONFIG_NAME, read_config
from snugfit.storage.open import is_hub_id, open_checkpoint
from snugfit.storage.staging import check_stageable, staged
from snugfit.version import __version__

RECORD_FILE = "snugfit-dataset.json"
KEPT_FILE, HELD_OUT_FILE = "samples.jsonl", "held-out.jsonl"
NOT_SAID = "not said"
_FIRST_RANGE = 512  # positions; each later range is as long as all before it
_SHOWN_TOKENS = 160  # of an example
_SCANNED_TOKENS = 4096  # of a sample, for its scripts


def describe_dataset(
    dataset: str | Path | Sequence[str | Path],
    model: str | Path,
    *,
    num_samples: int | None = None,
    max_seq_length: int | None = None,
    shuffle_seed: int | None = None,
    held_out: str | float | None = None,
    output_dir: str | Path | None = None,
) -> DatasetRecord:
    """What a run of `model` (a directory with a tokenizer, or a Hugging Face id) would read of `dataset`.

    The first arguments are those of `quantize`. `held_out`, a number of percent such as "10%", splits the samples:
    some of every source are held out. The new directory `output_dir` gets the samples as rows of token ids, in one
    file or two, which every verb reads as a dataset. Raises UserError for bad input.
    """
    files = as_sequence(dataset)
    check_files(files)
    every = None if held_out is None else 100 / parse_percent(held_out)
    if output_dir is not None:
        check_stageable(Path(output_dir), models=[model])
    folder, vocabulary, positions = _model_facts(model)
    tokenizer = Tokenizer(folder)
    found = load_dataset(
        folder,
        [Path(file) for file in files],
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        shuffle_seed=shuffle_seed,
        vocabulary=vocabulary,
        positions=positions,
        tokenizer=tokenizer,
    )
    record = _record(found, tokenizer, name=_name(model), files=files)
    parts = [found]
    if every is not None:
        kept, out = hold_out(found, every)
        parts = [kept, out]
        record = replace(
            record,
            held_out=HeldOutPart(
                percent=100 / every,
                num_samples=len(out.samples),
                tokens=out.tokens,
                digest=out.digest,
                kept_digest=kept.digest,
            ),
        )
    if output_dir is not None:
        with staged(Path(output_dir)) as directory:
            (directory / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
            for part, file in zip(parts, (KEPT_FILE, HELD_OUT_FILE), strict=False):
                lines = (json.dumps({"input_ids": list(sample)}) + "\n" for sample in part.samples)
                (directory / file).write_text("".join(lines), encoding="utf-8")
    return record


def parse_percent(given: str | float) -> float:
    """A number of percent, with or without its sign, > 0 and <= 50; UserError for another."""
    try:
        percent = float(str(given).strip().removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 50:
        what = f"must be > 0 % and <= 50 %, got {given}."
        raise UserError(what, code="option-invalid", where="held_out", remedy='Write it as "10%".')
    return percent


def _model_facts(model: str | Path) -> tuple[Path, int | None, int | None]:
    """The folder of a model's tokenizer; size of its vocabulary, and positions, None where no config says so."""
    if is_hub_id(model):
        checkpoint = open_checkpoint(model)
        folder, config = checkpoint.path, dict(checkpoint.config)
    else:
        folder = Path(model)
        if not folder.is_dir():
            what = "no such directory."
            remedy = "Name a directory with a tokenizer, or a Hugging Face id (org/name)."
            raise UserError(what, code="model-not-found", where=str(model), remedy=remedy)
        config = dict(read_config(folder)) if (folder / CONFIG_NAME).is_file() else {}
    vocabulary = full_config(config).get("vocab_size")
    return folder, vocabulary if isinstance(vocabulary, int) else None, max_positions(config)


def _name(model: str | Path) -> str:
    return str(model) if is_hub_id(model) else Path(model).resolve().name


def _record(found: Dataset, tokenizer: Tokenizer, *, name: str, files: Sequence[str | Path]) -> DatasetRecord:
    uses = found.uses or _plain_uses(found, files)
    rows = [len(sample) for sample in found.samples]
    return DatasetRecord(
        snugfit=__version__,
        model=name,
        source=found.source,
        set_digest=found.set_digest,
        digest=found.digest,
        num_samples=len(rows),
        tokens=found.tokens,
        max_seq_length=found.max_seq_length,
        sources=uses,
        categories=_shares(uses, [use.category or NOT_SAID for use in uses]),
        languages=_shares(uses, [use.language or NOT_SAID for use in uses]),
        scripts=_scripts(found, tokenizer),
        lengths=_quartiles(rows),
        positions=_positions(rows),
        repeated=len(rows) - len(set(found.samples)),
        examples=_examples(found, tokenizer),
    )


def _plain_uses(found: Dataset, files: Sequence[str | Path]) -> tuple[SourceUse, ...]:
    """What each plain file gave."""
    names = [Path(file).name for file in files] or [found.source]
    shares = found.shares or (len(found.samples),)
    uses, start = [], 0
    for name, count in zip(names, shares, strict=True):
        tokens = sum(len(sample) for sample in found.samples[start : start + count])
        uses.append(SourceUse(dataset=name, samples=count, tokens=tokens, rows=count))
        start += count
    return tuple(uses)


def _shares(uses: Sequence[SourceUse], names: Sequence[str]) -> tuple[Share, ...]:
    """Sources of one name together, in the order in which they come."""
    samples, tokens = Counter[str](), Counter[str]()
    for use, name in zip(uses, names, strict=True):
        samples[name] += use.samples
        tokens[name] += use.tokens
    total = max(1, sum(samples.values()))
    return tuple(
        Share(name=name, samples=samples[name], tokens=tokens[name], share=samples[name] / total) for name in samples
    )


def _quartiles(lengths: Sequence[int]) -> tuple[int, int, int, int, int]:
    order = sorted(lengths)
    first, *rest = (order[round(part * (len(order) - 1) / 4)] for part in range(5))
    return (first, rest[0], rest[1], rest[2], rest[3])


def _positions(lengths: Sequence[int]) -> tuple[PositionRange, ...]:
    """Ranges of positions up to the longest sample, each twice as far as the one before."""
    ranges, first, end = [], 0, _FIRST_RANGE
    while first < max(lengths):
        inside = [min(length, end) - first for length in lengths if length > first]
        ranges.append(PositionRange(first=first, last=end - 1, samples=len(inside), tokens=sum(inside)))
        first, end = end, 2 * end
    return tuple(ranges)


def _scripts(found: Dataset, tokenizer: Tokenizer) -> dict[str, float]:
    """Shares of letters by script, the most frequent first; empty where nothing was tokenized."""
    if not tokenizer.usable:
        return {}
    counts: Counter[str] = Counter()
    for sample in found.samples:
        letters = Counter(c for c in tokenizer.decode(sample[:_SCANNED_TOKENS]) if c.isalpha())
        for letter, count in letters.items():
            counts[_script(letter)] += count
    total = max(1, sum(counts.values()))
    return {name: round(count / total, 6) for name, count in counts.most_common()}


@lru_cache(maxsize=100_000)
def _script(letter: str) -> str:
    """The first word of a letter's name in Unicode, such as LATIN, CYRILLIC or CJK."""
    return unicodedata.name(letter, "other").split()[0].split("-")[0].capitalize()


def _examples(found: Dataset, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The beginnings of two samples, of different sources if there are several."""
    if not tokenizer.usable:
        return ()
    shares = [share for share in found.shares if share] or [len(found.samples)]
    places: Iterable[int] = {0, sum(shares[: len(shares) // 2])} if len(shares) > 1 else {0, len(found.samples) // 2}
    return tuple(tokenizer.decode(found.samples[place][:_SHOWN_TOKENS]) for place in sorted(places))


def describe_sets() -> list[tuple[str, str, dict[str, Any]]]:
    """Name, description and content of each set of this package."""
    from snugfit.data.sets import builtin_sets

    loaded = [load_set(name) for name in builtin_sets()]
    return [(one.name, one.set.description, one.set.model_dump(mode="json", exclude_none=True)) for one in loaded]
