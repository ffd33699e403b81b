"""Which records a report takes, and which it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from helpers.report_runs import (
    ORIGINAL,
    bench_record,
    checkpoint,
    compare_record,
    eval_record,
    plan_record,
    quantize_record,
    serve_record,
    tasks_record,
    write_runs,
)
from snugfit.publishing.collect import collect
from snugfit.records.base import DIGEST, content_digest
from snugfit.records.quantize import RECORD_FILE


def written(file: Path, record: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(record.to_json(), encoding="utf-8")
    return file


def test_every_kind_is_found(tmp_path: Path) -> None:
    """Directories and files give the same; a record that is given twice counts once; other JSON is left alone."""
    runs = write_runs(tmp_path)
    for name in ("config.json", "tokenizer.json", "broken.json"):
        (runs[0] / name).write_text('{"a": 1}' if name != "broken.json" else "{")
    (runs[0] / "config.json").unlink()
    found = collect([*runs, runs[2] / "eval.json"])
    assert [one.name for one in found.checkpoints] == ["made-up-hybrid", "made-up-nvfp4"]
    kinds = (found.evals, found.tasks, found.plans, found.comparisons, found.benches, found.serves)
    assert [len(kind) for kind in kinds] == [1, 2, 1, 1, 1, 1]
    assert len(found.sources) == 9
    assert found.title == "made-up-hybrid"
    files = [file for run in runs for file in run.glob("*.json") if file.name not in ("tokenizer.json", "broken.json")]
    assert collect(files).evals == found.evals


@pytest.mark.parametrize("runs", [[], ["none"], ["empty"], ["other"]])
def test_places_without_a_record(tmp_path: Path, runs: list[str]) -> None:
    """Nothing given, a missing place, an empty directory, a directory with other files."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with raises("file-missing" if runs else "option-missing", where=runs[0] if runs else "runs"):
        collect([tmp_path / name for name in runs])


def test_a_record_that_was_edited(tmp_path: Path) -> None:
    """A changed number, a removed digest; but spaces and line ends may differ."""
    file = written(tmp_path / "eval.json", eval_record())
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document).replace(", ", ",\r\n"))
    assert len(collect([file]).evals) == 1
    changed = json.loads(file.read_text())
    changed["contexts"][0]["models"][1]["perplexity"] -= 0.5
    file.write_text(json.dumps(changed))
    with raises("record-changed", where=str(file)):
        collect([file])
    del document[DIGEST]
    file.write_text(json.dumps(document))
    with raises("record-changed", where=str(file)):
        collect([file])


@pytest.mark.parametrize("schema", ["snugfit.eval/99", "snugfit.unheard-of/1"])
def test_another_version(tmp_path: Path, schema: str) -> None:
    """A record of another schema version is refused by name, although its digest fits."""
    document = json.loads(eval_record().to_json()) | {"schema": schema}
    document[DIGEST] = content_digest(document)
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(document))
    with raises("result-invalid", where=str(file)) as caught:
        collect([file])
    assert schema in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("bytes", "many"), ("tensors", []), ("bytes", 0), ("files", None)])
def test_a_damaged_record(tmp_path: Path, key: str, value: object) -> None:
    """A field of another type or an impossible one, under a digest that fits."""
    document = json.loads(quantize_record().to_json()) | {key: value}
    document[DIGEST] = content_digest(document)
    file = tmp_path / RECORD_FILE
    file.write_text(json.dumps(document))
    with raises("result-invalid", where=str(file)):
        collect([file])


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    """It says that it is a record, and is not JSON."""
    file = tmp_path / "eval.json"
    file.write_text('{"schema": "snugfit.eval/1", ')
    with raises("json-invalid", where=str(file)):
        collect([file])


OTHER = "0" * 64
MIXED: dict[str, Callable[[], Any]] = {
    "another original": lambda: quantize_record("other", source_header_digest=OTHER),
    "an evaluation against another": lambda: eval_record(reference=checkpoint("other", 1, OTHER)),
    "tasks of another model": lambda: tasks_record("other", 100),
    "a comparison of others": lambda: compare_record("other", "made-up"),
    "a benchmark of another": lambda: replace(
        bench_record(),
        runs=tuple(replace(r, server=replace(r.server, name="o", model="o", root="/o")) for r in bench_record().runs),
    ),
    "a plan of another": lambda: plan_record("other"),
    "a start of another": lambda: serve_record("/models/other"),
}


@pytest.mark.parametrize("what", list(MIXED))
def test_records_of_different_models(tmp_path: Path, what: str) -> None:
    """One record of another model among those of one."""
    files = [
        written(tmp_path / "a" / RECORD_FILE, quantize_record()),
        written(tmp_path / "a" / "eval.json", eval_record()),
    ]
    assert collect(files)
    files.append(written(tmp_path / "b" / "record.json", MIXED[what]()))
    with raises("models-mismatch", where="runs"):
        collect(files)


def test_results_of_a_served_model(tmp_path: Path) -> None:
    """A record of `serve` brings what it measured, from its own folder alone."""
    results = {"bench": "bench/bench.json", "eval": "eval/eval.json", "tasks": "../tasks.json"}
    written(tmp_path / "run" / "serve.json", replace(serve_record(), results=results))
    written(tmp_path / "run" / "bench" / "bench.json", bench_record())
    written(tmp_path / "tasks.json", tasks_record("made-up-hybrid", 100))
    found = collect([tmp_path / "run"])
    assert [len(kind) for kind in (found.serves, found.benches, found.evals, found.tasks)] == [1, 1, 0, 0]


def test_names_with_a_path_are_the_same_model(tmp_path: Path) -> None:
    """A server names its model by path, the Hub by org/name."""
    files = [
        written(tmp_path / RECORD_FILE, quantize_record(source="org/made-up")),
        written(tmp_path / "eval.json", eval_record(reference=checkpoint("org/made-up", 1, ORIGINAL))),
        written(tmp_path / "bench.json", bench_record()),
        written(tmp_path / "serve.json", serve_record("/somewhere/made-up-hybrid/")),
    ]
    assert len(collect(files).benches) == 1
