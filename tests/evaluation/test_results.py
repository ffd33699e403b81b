"""Result files: read into their own records, or refused with file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from helpers.results import SHARED, base, context, model, task, write_eval, write_tasks
from snugfit.evaluation.results import load_result
from snugfit.records.base import DIGEST, as_json
from snugfit.records.evaluation import (
    Bin,
    ContextFigures,
    Continuation,
    EvalRecord,
    EvaluatedCheckpoint,
    EvaluatedServer,
    Floor,
    KernelReport,
    ModelFigures,
    PairFigures,
    Spread,
    TaskResult,
    TasksRecord,
    TextRecord,
)


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("{", "json-invalid", ""),
        ("[1]", "result-invalid", "snugfit.eval/1, snugfit.tasks/1"),
        ('{"schema": "snugfit.quantize/1"}', "result-invalid", "'snugfit.quantize/1'"),
        ('{"schema": 3}', "result-invalid", " 3"),
        ('{"schema": "snugfit.tasks/2"}', "result-invalid", "'snugfit.tasks/1'"),
        ('{"schema": "snugfit.tasks/1", "snugfit": "0", "arguments": {}}', "result-invalid", "model: "),
        ('{"schema": "snugfit.tasks/1", "snugfit": "0", "model": "m", "arguments": 3}', "result-invalid", "arguments"),
        ('{"schema": "snugfit.eval/1"}', "result-invalid", "snugfit: "),
        ("[" * 100_000, "json-invalid", ""),
        ('{"schema": "\\ud800"}', "result-invalid", "schema"),
    ],
)
def test_files_that_are_not_results_are_refused(tmp_path: Path, text: str, code: str, names: str) -> None:
    """Broken JSON, another or newer schema, missing keys and wrong types: an error with the place and a remedy."""
    path = tmp_path / "x.json"
    with suppress(ValueError, RecursionError):
        text = as_json(json.loads(text))  # a record with the digest of what it holds
    path.write_text(text, encoding="utf-8")
    with raises(code, where=path) as caught:
        load_result(path)
    assert names in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"value": "0.5"}, "tasks.0.value"),
        ({"value": True}, "tasks.0.value"),
        ({"kind": "median"}, "tasks.0.kind"),
        ({"items": {"0": "right"}}, "tasks.0.items.0"),
        ({"items": {}}, "t, acc"),
        ({"items": {"0": 0.5}, "kind": "accuracy"}, "t, acc"),
    ],
)
def test_tasks_of_wrong_types_are_refused(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    """A wrong value is refused by naming the key."""
    with raises("result-invalid", where=tmp_path / "x.json") as caught:
        load_result(write_tasks(tmp_path / "x.json", task("t", [1.0, 0.0]) | change))
    assert key in caught.value.what


def test_a_task_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """Two rows of one name could not be distinguished."""
    with raises("result-invalid", where=tmp_path / "x.json") as caught:
        load_result(write_tasks(tmp_path / "x.json", task("t", [1.0]), task("t", [0.0])))
    assert "task t, acc" in caught.value.what


@pytest.mark.parametrize(
    ("contexts", "names"),
    [
        ([], "context"),
        ([context(512)], "context 512"),
        ([context(512, base(), chunk_tokens=[0] * 6)], "context 512"),
        ([context(512, base(), chunk_tokens=[1])], "base at context 512"),
        ([context(512, base(), base())], "model base"),
        ([context(512, base()), context(512, base())], "context 512"),
        ([context(512, model("x", SHARED, kl=[0.1]))], "x at context 512"),
        ([context(512, model("x", SHARED, nonfinite=None))], "contexts.0.models.0.nonfinite"),
    ],
)
def test_evaluations_that_do_not_hold_together_are_refused(
    tmp_path: Path, contexts: list[Mapping[str, Any]], names: str
) -> None:
    """Lists of other lengths, names that repeat, contexts without tokens: refused when the file is read."""
    with raises("result-invalid", where=tmp_path / "x.json") as caught:
        load_result(write_eval(tmp_path / "x.json", *contexts))
    assert names in caught.value.what


@pytest.mark.parametrize("change", [{"value": 0.75}, {"items": {}}, {DIGEST: None}])
def test_a_result_that_was_edited_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Another number, also an impossible one, under the old digest; and a result without one."""
    path = write_tasks(tmp_path / "x.json", task("t", [1.0, 0.0]))
    document = json.loads(path.read_text(encoding="utf-8"))
    if DIGEST in change:
        del document[DIGEST]
    document["tasks"][0] |= change
    path.write_text(json.dumps(document), encoding="utf-8")
    with raises("record-changed", where=path):
        load_result(path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    """A missing file, and a directory without results, are refused by their paths."""
    for path in (tmp_path, tmp_path / "none.json"):
        with raises("file-missing", where=path):
            load_result(path)


def test_a_directory_of_two_results_of_one_kind_is_refused(tmp_path: Path) -> None:
    """Tasks under the name eval.json beside tasks.json leave it open which is meant."""
    for name in ("eval.json", "tasks.json"):
        write_tasks(tmp_path / name, task("t", [1.0]))
    with raises("result-invalid", where=tmp_path):
        load_result(tmp_path)


def test_what_snugfit_writes_can_be_read(tmp_path: Path) -> None:
    """Both records' own JSON gives equal records; NaN and infinities, null in the file, are NaN."""
    result = TaskResult(
        task="t",
        metric="f1",
        kind="mean",
        higher_is_better=True,
        value=math.nan,
        standard_error=None,
        items={"0-ab": 0.5},
    )
    tasks = TasksRecord(snugfit="0", model="m", arguments={"limit": 3}, tasks=(result,), seconds={}, versions={})
    (tmp_path / "tasks.json").write_text(tasks.to_json(), encoding="utf-8")
    quantiles = {"median": 0.1, "p90": 0.1, "p95": 0.1, "p99": 0.1, "p999": 0.1, "max": math.inf}
    figures = ModelFigures(
        name="m",
        perplexity=math.inf,
        perplexity_error=None,
        nll_by_chunk=(math.inf,),
        tokens_by_chunk=(2,),
        nonfinite=0,
        by_position=(Bin(low=1.0, high=2.0, tokens=2, perplexity=3.5, perplexity_error=None),),
        kl=Spread(mean=0.1, standard_error=None, by_chunk=(0.2,), **quantiles),
        floor=Floor(kl=0.1, standard_error=None, same_top=1.0, chunks=1, tokens=2, arithmetic="float32"),
    )
    pair = PairFigures(
        a="m", b="n", figure="kl", difference=0.1, low=None, high=None, p=None, chunks=1, more_tokens=None
    )
    checkpoint = EvaluatedCheckpoint(
        name="m", header_digest="0", bytes=2, arithmetic="bfloat16", formats={"nvfp4": 3}, kv_cache=None
    )
    server = EvaluatedServer(
        name="m (served)",
        url="http://localhost",
        engine="vllm",
        version=None,
        model="m",
        root=None,
        max_model_len=64,
        top_logprobs="all",
        kernels=KernelReport(linear=("A for B",)),
    )
    record = EvalRecord(
        snugfit="0",
        arguments={},
        metrics_version=1,
        reference=checkpoint,
        candidates=(checkpoint, server),
        texts=(TextRecord("a.txt", "0", "text"),),
        contexts=(
            ContextFigures(
                context=0, chunks=1, tokens=2, digest="d", chunk_tokens=(2,), models=(figures,), pairs=(pair,)
            ),
        ),
        continuations=(
            Continuation(
                model="m",
                source="a.jsonl:1",
                position=3,
                kl=0.5,
                before="a",
                text="b",
                reference_continuation="b",
                model_continuation="c",
                same_tokens=0,
            ),
        ),
        seconds={"total": 1.5},
        peak_rss_bytes=1,
        peak_gpu_bytes=None,
        hardware={},
        versions={},
    )
    (tmp_path / "eval.json").write_text(record.to_json(), encoding="utf-8")
    loaded = load_result(tmp_path)
    assert loaded.tasks is not None
    assert math.isnan(loaded.tasks.tasks[0].value)
    assert loaded.tasks == replace(tasks, tasks=(replace(result, value=loaded.tasks.tasks[0].value),))
    assert loaded.eval is not None
    assert loaded.eval.to_json() == record.to_json()
    assert (loaded.eval.candidates, loaded.eval.continuations) == (record.candidates, record.continuations)
    model = loaded.eval.contexts[0].models[0]
    assert math.isnan(model.perplexity)
    assert model.kl is not None
    assert math.isnan(model.kl.max)
    assert (model.kl.by_chunk, model.floor, model.by_position) == ((0.2,), figures.floor, figures.by_position)


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    """A record of the same schema with further keys is read."""
    path = write_eval(tmp_path / "x.json", context(512, base() | {"later": 1}, also=2), and_this=[3])
    loaded = load_result(path)
    assert loaded.eval is not None
    assert loaded.eval.contexts[0].models[0].name == "base"
