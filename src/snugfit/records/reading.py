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
from snugfit.records.base import MAKE_AGAIN, OURS, SCHEMA, check_digest, is_record
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


def read_document(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file if it is a record of this package; else None. `parse_record` checks its digest.

    UserError for a file that cannot be read.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            return None
        raw = file.read_bytes().decode("utf-8-sig")  # an editor may have put a byte order mark in front
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise _unreadable(error, file) from None
    if OURS_QUOTED not in raw:
        return None  # a config, an index, a tokenizer
    document = _parse(raw, file, MAKE_AGAIN)
    return document if is_record(document) else None


def read_json(file: Path, remedy: str) -> Any:
    """The JSON document in a file that must hold one; UserError, with `remedy` for one that does not."""
    try:
        raw = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _unreadable(error, file, remedy) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not JSON: {error}.", code="json-invalid", where=str(file), remedy=remedy) from None
    return _parse(raw, file, remedy)


def _parse(text: str, file: Path, remedy: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}.", code="json-invalid", where=str(file), remedy=remedy) from None


def _unreadable(error: OSError, file: Path, remedy: str = "Check its permissions.") -> UserError:
    what = f"cannot be read ({error.strerror or error})."
    return UserError(what, code="file-unreadable", where=str(file), remedy=remedy)


def parse_record(document: Mapping[str, Any], where: str) -> Any:
    """The record of a document; UserError for another version of its schema, another digest, fields of another type."""
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
    check_digest(document, where)
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
