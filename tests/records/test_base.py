"""The digest that every record carries."""

from __future__ import annotations

import json
import math

import pytest

from helpers.evaluations import two_contexts
from helpers.report_runs import quantize_record
from snugfit.records.base import DIGEST, as_json, content_digest
from snugfit.records.reading import parse_record


def test_a_record_states_the_digest_of_its_content() -> None:
    """As written, and as any program writes it again: numbers, NaN, odd characters, keys that were numbers."""
    record = {"schema": "snugfit.test/1", "a": [1, 1e-9, 0.1, math.nan], "b": {"é\udce9": None}, "c": {3: 1}}
    document = json.loads(as_json(record))
    assert document[DIGEST] == content_digest(document)
    again = json.loads(json.dumps(document, indent=7, ensure_ascii=False))
    assert content_digest(again) == document[DIGEST]


@pytest.mark.parametrize("change", [{"a": 2}, {"a": 1.0}, {"b": 1}, {"schema": "snugfit.test/2"}])
def test_another_content_has_another_digest(change: dict[str, object]) -> None:
    """A value, its type, a key, the schema."""
    record = {"schema": "snugfit.test/1", "a": 1}
    assert content_digest(record | change) != content_digest(record)


def test_other_documents_have_none() -> None:
    """A config or an index stays as it is."""
    for document in ({"a": 1}, {"schema": "other"}, {"schema": 3}, [1]):
        assert json.loads(as_json(document)) == document


def test_records_read_as_they_were_written() -> None:
    """Every field comes back, infinities as NaN."""
    record = quantize_record()
    assert parse_record(json.loads(record.to_json()), "") == record
    evaluated = two_contexts()
    found = parse_record(json.loads(evaluated.to_json()), "")
    assert math.isnan(found.contexts[1].models[2].perplexity)
    assert found.contexts[0] == evaluated.contexts[0]
