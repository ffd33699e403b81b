"""Read any record strictly: its schema and version are known, its digest fits, its fields have their types.

Keys that this version does not know are ignored; null stands for NaN and infinities. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.records.base import DIGEST, OURS, SCHEMA, content_digest, is_record
from snugfit.records.bench import BENCH_SCHEMA, BenchRecord
from snugfit.records.comparison import COMPARE_SCHEMA, CompareRecord
from snugfit.records.evaluation import EVAL_SCHEMA, TASKS_SCHEMA, EvalRecord, TasksRecord
from snugfit.records.fit import FIT_SCHEMA, FitRecord
from snugfit.records.plan import PLAN_SCHEMA, PlanRecord
from snugfit.records.quantize import QUANTIZE_SCHEMA, QuantizeRecord
from snugfit.records.report import REPORT_SCHEMA, ReportRecord
from snugfit.records.serve import SERVE_SCHEMA, ServeRecord
from snugfit.version import __version__

# schema -> the dataclass of its records
RECORDS: Mapping[str, type] = {
    QUANTIZE_SCHEMA: QuantizeRecord,
    PLAN_SCHEMA: PlanRecord,
    EVAL_SCHEMA: EvalRecord,
    TASKS_SCHEMA: TasksRecord,
    COMPARE_SCHEMA: CompareRecord,
    FIT_SCHEMA: FitRecord,
    BENCH_SCHEMA: BenchRecord,
    SERVE_SCHEMA: ServeRecord,
    REPORT_SCHEMA: ReportRecord,
}
OURS_QUOTED = f'"{OURS}'
MAX_BYTES = 1_000_000_000
MAKE_AGAIN = "Make the record again."


def read_document(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file if it is a record of this package with the digest that it states; else None.

    UserError for a file that cannot be read, and for a record that was changed after it was written.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            return None
        raw = file.read_bytes().decode("utf-8-sig")  # an editor may have put a byte order mark in front
    except UnicodeDecodeError:
        return None
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})."
        raise UserError(what, code="file-unreadable", where=str(file), remedy="Check its permissions.") from None
    if OURS_QUOTED not in raw:
        return None  # a config, an index, a tokenizer
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}.", code="json-invalid", where=str(file), remedy=MAKE_AGAIN) from None
    if not is_record(document):
        return None
    check_digest(document, str(file))
    return dict(document)


def check_digest(document: Mapping[str, Any], where: str) -> None:
    """UserError for a record without a digest, and for one whose digest is that of other content."""
    stated = document.get(DIGEST)
    try:
        found = content_digest(document)
    except (ValueError, RecursionError):
        found = ""
    if stated != found:
        what = "it has no digest." if stated is None else "it was changed after it was written: its digest differs."
        raise UserError(what, code="record-changed", where=where, remedy=MAKE_AGAIN)


def parse_record(document: Mapping[str, Any], where: str) -> Any:
    """The record of a document; UserError for another version of its schema, and for fields of another type."""
    from pydantic import ValidationError

    schema = str(document.get(SCHEMA))
    if schema not in RECORDS:
        known = {name.partition("/")[0]: name for name in RECORDS}
        wanted = known.get(schema.partition("/")[0])
        what = f"its schema is {schema!r}, " + (
            f"but snugfit {__version__} reads {wanted!r}." if wanted else f"not one of {', '.join(RECORDS)}."
        )
        remedy = "Use the snugfit that wrote it, or make the record again."
        raise UserError(what, code="result-invalid", where=where, remedy=remedy)
    try:
        return _reader(schema).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{key or 'the document'}: {first['msg']}."
        raise UserError(what, code="result-invalid", where=where, remedy=MAKE_AGAIN) from None
    except RecursionError:
        what = "it is nested too deeply."
        raise UserError(what, code="result-invalid", where=where, remedy=MAKE_AGAIN) from None


@lru_cache(maxsize=16)
def _reader(schema: str) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(RECORDS[schema])
