"""Statistics of calibration as a file: what was measured on which model and rows, so that a later run need not again.

Files of the same model and settings can be merged, as if their rows had been walked in one run. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.records.base import as_json
from snugfit.records.statistics import MOST, LayerStatistics, layer_from_json, layer_to_json, merge_layers

STATISTICS_SCHEMA = "snugfit.statistics/1"
STATISTICS_FILE = "snugfit-statistics.json"
MAX_BYTES, MAX_LAYERS = 1_000_000_000, 10_000


# what an expert is sent beside what its router sends, a layer; the least that it must have seen
FORCED_TOKENS, LEAST_TOKENS = 32_768, 32


@dataclass(frozen=True)
class Calibration:
    """How rows are sent through the layers: which `experts` see them ("all" or "routed"), and how many must.

    At most `forced_tokens` are sent through an expert, in a layer, beside those that its router sends there; an expert
    that saw fewer than `least_tokens` is an error.
    """

    experts: str = "all"
    forced_tokens: int = FORCED_TOKENS
    least_tokens: int = LEAST_TOKENS


DEFAULT_CALIBRATION = Calibration()


@dataclass(frozen=True)
class RowsUsed:
    """Rows that were walked: where they come from, how many rows and tokens, and their digest."""

    source: str
    rows: int
    tokens: int
    digest: str


@dataclass(frozen=True)
class Statistics:
    """What calibration measured of each decoder layer (by number), and on what.

    `header_digest` and `fingerprint` (of some of its weights) tell the model. `experts` are "all" or "routed", with at
    most `forced_tokens` forced through each in a layer. `recipe` names the recipe whose quantized weights the rows
    walked through, None for the model's own, and `recipe_digest` is its digest.
    """

    snugfit: str
    model: str
    header_digest: str
    fingerprint: str
    rows: tuple[RowsUsed, ...]
    experts: str
    forced_tokens: int
    recipe: str | None
    recipe_digest: str | None
    layers: Mapping[int, LayerStatistics]
    schema: str = STATISTICS_SCHEMA

    def to_json(self) -> str:
        """The file's text."""
        plain = {key: value for key, value in vars(self).items() if key not in ("layers", "rows", "schema")}
        rows = [vars(one) for one in self.rows]
        layers = {str(number): layer_to_json(layer) for number, layer in self.layers.items()}
        return as_json({"schema": self.schema, **plain, "rows": rows, "layers": layers})

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(one.tokens for one in self.rows)


def text_digest(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load_statistics(path: Path) -> Statistics:
    """Statistics from a file, or from a directory that has one; UserError for anything else."""
    file = path / STATISTICS_FILE if path.is_dir() else path
    remedy = "Give a file that `snugfit statistics` or `snugfit quantize` wrote."
    try:
        if not file.is_file():
            raise FileNotFoundError(2, "no such file")
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes")  # noqa: TRY301
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error}).", where=str(file), remedy=remedy) from None
    except (ValueError, RecursionError, MemoryError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"no statistics ({line}).", where=str(file), remedy=remedy) from None
    if not isinstance(document, dict) or document.get("schema") != STATISTICS_SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise UserError(f"schema {found!r} is not {STATISTICS_SCHEMA}.", where=str(file), remedy=remedy)
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        line = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"broken statistics ({line}).", where=str(file), remedy=remedy) from None


def save_statistics(found: Statistics, file: Path) -> None:
    """Write a new file, whole or not at all; UserError where it exists or cannot be written."""
    if os.path.lexists(file):
        raise UserError("the output exists already.", where=str(file), remedy="Remove it or choose another -o.")
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(found.to_json(), encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        what = f"cannot be written ({error.strerror or error})."
        raise UserError(what, where=str(file), remedy="Choose another -o.") from None


def _parse(document: Mapping[str, Any]) -> Statistics:
    recipe, digest = document["recipe"], document["recipe_digest"]
    found = Statistics(
        snugfit=str(document["snugfit"]),
        model=str(document["model"]),
        header_digest=str(document["header_digest"]),
        fingerprint=str(document["fingerprint"]),
        rows=tuple(
            RowsUsed(str(r["source"]), int(r["rows"]), int(r["tokens"]), str(r["digest"])) for r in document["rows"]
        ),
        experts=str(document["experts"]),
        forced_tokens=int(document["forced_tokens"]),
        recipe=None if recipe is None else str(recipe),
        recipe_digest=None if digest is None else str(digest),
        layers={int(number): layer_from_json(layer) for number, layer in document["layers"].items()},
    )
    if not found.rows or not all(0 <= n < MOST for one in found.rows for n in (one.rows, one.tokens)):
        raise ValueError("of no rows, or of numbers of them that cannot be")
    if not all(0 <= number < MAX_LAYERS for number in found.layers):
        raise ValueError("a layer's number that cannot be")
    return found


def merge_statistics(parts: Sequence[tuple[str, Statistics]]) -> Statistics:
    """All of them (with names for messages) as one; UserError where they do not go together."""
    name, first = parts[0]
    seen: dict[str, str] = {}
    for other, part in parts:
        for key in ("header_digest", "fingerprint", "experts", "forced_tokens", "recipe_digest"):
            if getattr(part, key) != getattr(first, key):
                what = (
                    "another model" if key in ("header_digest", "fingerprint") else f"another {key.replace('_', ' ')}"
                )
                told = f"{getattr(part, key)!r}, in {name} {getattr(first, key)!r}"
                raise UserError(f"of {what} ({told}).", where=other, remedy="Merge statistics of one model and kind.")
        for one in part.rows:
            if one.digest in seen:
                what = f"has the same rows as {seen[one.digest]} ({one.source})."
                raise UserError(what, where=other, remedy="Merge statistics of different rows.")
            seen[one.digest] = other
        if part.layers.keys() != first.layers.keys():
            raise UserError(f"has other layers than {name}.", where=other, remedy="Merge statistics of one model.")
    layers: dict[int, LayerStatistics] = {}
    for number in first.layers:
        try:
            layers[number] = merge_layers([part.layers[number] for _, part in parts])
        except ValueError as error:
            remedy = "Merge statistics that were made with the same recipe."
            raise UserError(f"layer {number}: {error}.", where=parts[-1][0], remedy=remedy) from None
    rows = tuple(one for _, part in parts for one in part.rows)
    return replace(first, rows=rows, layers=layers)
