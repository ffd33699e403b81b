"""What a report was made of, and the files that it has: the mark of a finished report, which `push` looks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from snugfit.records.base import as_json

REPORT_SCHEMA = "snugfit.report/1"
REPORT_FILE = "snugfit-report.json"


@dataclass(frozen=True, kw_only=True)
class ReportSource:
    """A record that went into a report: its file, schema and digest."""

    file: str
    schema: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class ReportRecord:
    """A finished report: the model's name, the record of its checkpoint (None without one), sources, files.

    `files` has the SHA-256 of each file of the report but this record. `unknown` is metadata of the card that neither
    an option nor a record states.
    """

    snugfit: str
    arguments: Mapping[str, Any]
    model: str
    checkpoint_digest: str | None
    sources: tuple[ReportSource, ...]
    files: Mapping[str, str]
    unknown: tuple[str, ...]
    schema: str = REPORT_SCHEMA

    def to_json(self) -> str:
        """The record as it is stored, one JSON document."""
        return as_json(asdict(self), allow_nan=False)
