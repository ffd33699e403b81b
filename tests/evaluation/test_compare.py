"""`compare`: what is paired with what, what is refused, and the three ways the result is written."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snugfit.errors import UserError
from snugfit.evaluation.compare import compare_results, write_comparison
from snugfit.evaluation.results import load_result
from snugfit.evaluation.significance import holm, mcnemar, paired_bootstrap, tokens_to_settle, unpaired_z
from snugfit.records.comparison import CompareRecord
from snugfit.records.evaluation import ContextFigures, EvalRecord, ModelFigures, Spread, TaskResult, TasksRecord
from snugfit.report.comparison import comparison_csv, comparison_markdown

COUNTS = [4, 4, 4, 4, 4, 2]
SHARED = [8.0, 9.0, 7.0, 10.0, 8.0, 5.0]  # losses that every model has
NO_KL = object()


def task(name: str, scores: list[float], *, metric: str = "acc", **changes: Any) -> dict[str, Any]:
    """One metric as it is stored, with lm_eval's standard error."""
    items = {f"{number}-ab": score for number, score in enumerate(scores)}
    entry = {
        "task": name,
        "metric": metric,
        "kind": "accuracy" if set(scores) <= {0.0, 1.0} else "mean",
        "higher_is_better": True,
        "value": float(np.mean(scores)),
        "standard_error": float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None,
        "items": items,
    }
    return entry | changes


def write_tasks(path: Path, *tasks: Mapping[str, Any], model: str = "m") -> Path:
    path.write_text(json.dumps({"schema": "snugfit.tasks/1", "model": model, "tasks": tasks}), encoding="utf-8")
    return path


def model(name: str, sums: list[float], *, kl: Any = NO_KL, **changes: Any) -> dict[str, Any]:
    """One model at one context as it is stored; `kl` are its chunks' sums."""
    loss = sum(sums) / sum(COUNTS)
    entry = {
        "name": name,
        "perplexity": math.exp(loss),
        "nll_by_chunk": sums,
        "tokens_by_chunk": COUNTS,
        "nonfinite": 0,
        "kl": None if kl is NO_KL else {"by_chunk": kl},
    }
    return entry | changes


def context(length: int, *models: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {"context": length, "digest": f"d{length}", "chunk_tokens": COUNTS, "models": models} | changes


def write_eval(path: Path, *contexts: Mapping[str, Any], **changes: Any) -> Path:
    document = {
        "schema": "snugfit.eval/1",
        "metrics_version": 1,
        "reference": {"name": "base"},
        "texts": [{"name": "novel.txt", "sha256": "0", "kind": "text"}],
        "contexts": contexts,
    }
    path.write_text(json.dumps(document | changes), encoding="utf-8")
    return path


def shifted(*by: float) -> list[float]:
    """SHARED plus a repeating shift a chunk."""
    return [loss + by[place % len(by)] for place, loss in enumerate(SHARED)]


def base() -> dict[str, Any]:
    return model("base", SHARED)


def evals(tmp_path: Path, a: list[Mapping[str, Any]], b: list[Mapping[str, Any]]) -> tuple[Path, Path]:
    """Two files of one context of 512 tokens; the models of each come after the reference."""
    pair = tmp_path / "a.json", tmp_path / "b.json"
    return write_eval(pair[0], context(512, base(), *a)), write_eval(pair[1], context(512, base(), *b))


def fixed_scores() -> tuple[list[float], list[float]]:
    """200 items: 30 that only B has right, 5 that only A has right."""
    a = [1.0] * 100 + [0.0] * 65 + [0.0] * 30 + [1.0] * 5
    b = [1.0] * 100 + [0.0] * 65 + [1.0] * 30 + [0.0] * 5
    return a, b


def two_tasks(tmp_path: Path) -> tuple[Path, Path]:
    """An accuracy that differs much, and a loss of which nothing can be said."""
    a, b = fixed_scores()
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, 1.0, 40)
    others = losses + rng.normal(0.0, 0.5, 40)
    lower: dict[str, Any] = {"metric": "loss", "higher_is_better": False}
    left = write_tasks(
        tmp_path / "a.json", task("hellaswag", a), task("lambada", losses.tolist(), **lower), model="nvfp4"
    )
    right = write_tasks(
        tmp_path / "b.json", task("hellaswag", b), task("lambada", others.tolist(), **lower), model="hybrid|v_2_"
    )
    return left, right


def test_an_accuracy_is_tested_by_mcnemar_with_the_bootstraps_interval(tmp_path: Path) -> None:
    """The row holds both values, the items only one has right, McNemar's p, the paired interval and the seed's z."""
    a, b = fixed_scores()
    record = compare_results(*two_tasks(tmp_path))
    row = record.tasks[0]
    counted, paired = mcnemar(a, b), paired_bootstrap(a, b, [1] * 200)
    assert (row.task, row.metric, row.kind) == ("hellaswag", "acc", "accuracy")
    assert (row.items, row.only_a, row.only_b) == (200, 5, 30)
    assert (row.a, row.b) == (0.525, 0.65)
    assert (row.difference, row.low, row.high) == (paired.difference, paired.low, paired.high)
    assert row.difference == pytest.approx(-0.125)
    assert row.p == counted.p
    errors = [task("", scores)["standard_error"] for scores in (a, b)]
    assert row.z == unpaired_z(0.525, errors[0], 0.65, errors[1])[0]


def test_what_the_unpaired_z_misses_is_found(tmp_path: Path) -> None:
    """A gain of 10 items in 200 that B alone has right is significant, though the first seed's |z| is near 1."""
    a, b = [1.0] * 100 + [0.0] * 100, [1.0] * 110 + [0.0] * 90
    left, right = write_tasks(tmp_path / "a.json", task("t", a)), write_tasks(tmp_path / "b.json", task("t", b))
    row = compare_results(left, right).tasks[0]
    assert row.z is not None
    assert abs(row.z) < 1.1
    assert row.p_holm is not None
    assert row.p_holm < 0.01


def test_a_mean_is_tested_by_the_bootstrap_over_items(tmp_path: Path) -> None:
    """Scores other than 0 and 1 have the paired bootstrap's p, and no items that only one has right."""
    record = compare_results(*two_tasks(tmp_path), seed=3)
    row = record.tasks[1]
    stored = [json.loads(Path(side.path).read_text())["tasks"][1]["items"] for side in (record.a, record.b)]
    keys = sorted(stored[0])
    found = paired_bootstrap([stored[0][k] for k in keys], [stored[1][k] for k in keys], [1] * 40, seed=3)
    assert (row.difference, row.low, row.high, row.p) == (found.difference, found.low, found.high, found.p)
    assert (row.kind, row.only_a, row.only_b) == ("mean", None, None)


def test_scores_that_are_0_or_1_by_chance_are_tested_as_means(tmp_path: Path) -> None:
    """A metric that is an accuracy in one file and a mean in the other is a mean."""
    left = write_tasks(tmp_path / "a.json", task("t", [0.0, 1.0] * 4, metric="f1"))
    right = write_tasks(tmp_path / "b.json", task("t", [0.0, 0.5, 1.0, 1.0] * 2, metric="f1"))
    row = compare_results(left, right).tasks[0]
    assert (row.kind, row.only_a) == ("mean", None)
    assert row.p == paired_bootstrap([0.0, 1.0] * 4, [0.0, 0.5, 1.0, 1.0] * 2, [1] * 8).p


def test_all_task_rows_are_one_family(tmp_path: Path) -> None:
    """Holm's correction counts every metric of every task."""
    record = compare_results(*two_tasks(tmp_path))
    assert [row.p_holm for row in record.tasks] == holm([row.p for row in record.tasks])
    assert record.tasks[0].p_holm == pytest.approx(2 * (record.tasks[0].p or 0))


def test_items_are_paired_by_key_not_by_place(tmp_path: Path) -> None:
    """The same items in another order are the same items."""
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    entry = task("t", scores)
    turned = entry | {"items": dict(reversed(entry["items"].items()))}
    record = compare_results(write_tasks(tmp_path / "a.json", entry), write_tasks(tmp_path / "b.json", turned))
    assert (record.tasks[0].only_a, record.tasks[0].only_b, record.tasks[0].p) == (0, 0, 1.0)


def test_exchanging_the_files_mirrors_every_row(tmp_path: Path) -> None:
    """B against A has the negative differences, the mirrored intervals and the same p."""
    left, right = two_tasks(tmp_path)
    for one, other in zip(compare_results(left, right).tasks, compare_results(right, left).tasks, strict=True):
        assert None not in {one.difference, one.low, one.high}
        assert [-(v or 0) for v in (one.difference, one.low, one.high)] == [other.difference, other.high, other.low]
        assert (one.p, one.p_holm) == (other.p, other.p_holm)


def test_other_items_are_refused(tmp_path: Path) -> None:
    """The message names the task and counts what is missing on each side."""
    left = write_tasks(tmp_path / "a.json", task("hellaswag", [1.0] * 10))
    entry = task("hellaswag", [1.0] * 7)
    entry["items"]["99-cd"] = 0.0
    with pytest.raises(UserError) as caught:
        compare_results(left, write_tasks(tmp_path / "b.json", entry))
    assert caught.value.where == "hellaswag, acc"
    assert caught.value.what == "other items: 3 of A's 10 are not in B, 1 of B's 8 not in A."
    assert "--limit" in caught.value.remedy


def test_tasks_of_one_side_are_listed(tmp_path: Path) -> None:
    """A task in one file alone is no row, but stands in all three outputs."""
    shared = task("both", [1.0, 0.0] * 3)
    left = write_tasks(tmp_path / "a.json", shared, task("left", [1.0]))
    right = write_tasks(tmp_path / "b.json", task("right", [0.5], metric="f1"), shared)
    record = compare_results(left, right)
    assert [row.task for row in record.tasks] == ["both"]
    assert [(lone.name, lone.metric, lone.side) for lone in record.unpaired] == [
        ("left", "acc", "A"),
        ("right", "f1", "B"),
    ]
    assert "- left, acc: only in A, not compared.\n- right, f1: only in B, not compared.\n" in comparison_markdown(
        record
    )
    assert "tasks,right,f1" in comparison_csv(record)
    assert json.loads(record.to_json())["unpaired"][0]["name"] == "left"


def test_contrary_directions_are_refused(tmp_path: Path) -> None:
    """A metric that is better high in one file and low in the other is not compared."""
    left = write_tasks(tmp_path / "a.json", task("t", [1.0] * 5))
    right = write_tasks(tmp_path / "b.json", task("t", [1.0] * 5, higher_is_better=False))
    with pytest.raises(UserError, match="t, acc: higher is better in one"):
        compare_results(left, right)


@pytest.mark.parametrize(("higher", "bold"), [(True, "| 0.1000 | **0.9000** |"), (False, "| **0.1000** | 0.9000 |")])
def test_bold_is_the_better_side(tmp_path: Path, higher: bool, bold: str) -> None:
    """The better value honours what the metric says is better."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.05, 30)
    pair = []
    for name, level in (("a", 0.1), ("b", 0.9)):
        scores = (noise - noise.mean()) * (1 if name == "a" else -1) + level
        pair.append(write_tasks(tmp_path / f"{name}.json", task("t", scores.tolist(), higher_is_better=higher)))
    assert bold in comparison_markdown(compare_results(*pair))


def test_a_value_that_is_no_mean_is_remarked(tmp_path: Path) -> None:
    """Where lm_eval's figure is another function of the items, the row says of what the difference is."""
    scores = [0.5, 0.25, 0.75, 0.5, 0.5, 1.0]
    left = write_tasks(tmp_path / "a.json", task("t", scores, value=1.8))
    right = write_tasks(tmp_path / "b.json", task("t", list(reversed(scores)), value=1.7))
    assert "not the mean of its items" in compare_results(left, right).tasks[0].note


def test_few_items_say_why_there_is_no_interval(tmp_path: Path) -> None:
    """Four items have McNemar's p, no interval, and a remark."""
    left = write_tasks(tmp_path / "a.json", task("t", [1.0, 1.0, 1.0, 0.0]))
    right = write_tasks(tmp_path / "b.json", task("t", [0.0, 0.0, 1.0, 0.0]))
    row = compare_results(left, right).tasks[0]
    assert (row.difference, row.low, row.high, row.p) == (0.5, None, None, 0.5)
    assert row.note == "no interval from fewer than 5."


def test_missing_scores_are_not_paired(tmp_path: Path) -> None:
    """A null among the items (lm_eval's NaN) leaves the row without a test, and says so."""
    entry = task("t", [1.0] * 6)
    hole = entry | {"items": entry["items"] | {"0-ab": None}, "value": None}
    row = compare_results(write_tasks(tmp_path / "a.json", entry), write_tasks(tmp_path / "b.json", hole)).tasks[0]
    assert (row.a, row.b, row.p, row.p_holm, row.z) == (1.0, None, None, None, None)
    assert "missing" in row.note


def test_losses_and_kl_are_paired_over_chunks(tmp_path: Path) -> None:
    """Each context has a row of loss and one of KL with both means, the paired test and the tokens still wanted."""
    a, b = shifted(0.5, 0.25, 0.4), shifted(0.5, 0.125, 0.45, 0.3)
    kl_a, kl_b = [0.5, 0.4, 0.6, 0.5, 0.5, 0.2], [0.4, 0.4, 0.5, 0.5, 0.4, 0.1]
    record = compare_results(*evals(tmp_path, [model("x", a, kl=kl_a)], [model("y", b, kl=kl_b)]))
    assert (record.a.eval_model, record.b.eval_model) == ("x", "y")
    assert [(row.context, row.figure) for row in record.losses] == [(512, "loss"), (512, "KL")]
    for row, left, right in zip(record.losses, (a, kl_a), (b, kl_b), strict=True):
        found = paired_bootstrap(left, right, COUNTS)
        assert (row.a, row.b) == (sum(left) / 22, sum(right) / 22)
        assert (row.difference, row.low, row.high, row.p) == (found.difference, found.low, found.high, found.p)
        assert row.more_tokens == tokens_to_settle(left, right, COUNTS)
        assert (row.chunks, row.tokens, row.note) == (6, 22, "")
    loss, kl = record.losses
    assert loss.perplexity_ratio == pytest.approx(math.exp(loss.difference or 0))
    assert kl.perplexity_a is None
    assert [row.p_holm for row in record.losses] == holm([row.p for row in record.losses])


def test_every_context_is_a_row_and_others_are_listed(tmp_path: Path) -> None:
    """Contexts of both files are compared, chat rows under their name; those of one side alone are listed."""
    a = [context(length, base(), model("x", shifted(0.1, 0.3))) for length in (512, 0, 2048)]
    b = [context(length, base(), model("y", shifted(0.2))) for length in (512, 0, 4096)]
    record = compare_results(write_eval(tmp_path / "a.json", *a), write_eval(tmp_path / "b.json", *b))
    assert [row.context for row in record.losses] == [512, 0]
    assert "\n| chat and rows | loss |" in comparison_markdown(record)
    assert [(lone.name, lone.metric, lone.side) for lone in record.unpaired] == [
        ("2048", "loss", "A"),
        ("4096", "loss", "B"),
    ]


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    """One context length with another digest is refused by naming it and both files' texts."""
    left = write_eval(tmp_path / "a.json", context(512, base(), model("x", SHARED)))
    right = write_eval(
        tmp_path / "b.json", context(512, base(), model("y", SHARED), digest="other"), texts=[{"name": "play.txt"}]
    )
    with pytest.raises(UserError, match=r"context 512: other tokens were scored, A on novel.txt, B on play.txt"):
        compare_results(left, right)


def test_tokens_left_out_are_not_paired(tmp_path: Path) -> None:
    """A model with NaN logits keeps its own means, has no test, and the row says why; Holm does not count it."""
    broken = model("y", SHARED, nonfinite=2, tokens_by_chunk=[4, 4, 4, 4, 2, 2], kl=[0.1] * 6)
    record = compare_results(*evals(tmp_path, [model("x", shifted(0.1, 0.3), kl=[0.2] * 6)], [broken]))
    for row in record.losses:
        assert (row.difference, row.low, row.p, row.p_holm, row.more_tokens) == (None,) * 5
        assert row.note == "tokens with NaN or infinite logits left out, 0 in A, 2 in B; not paired."
    assert record.losses[0].b == sum(SHARED) / 20


def test_infinite_losses_are_not_paired(tmp_path: Path) -> None:
    """A null among the chunks' sums leaves the row without figures instead of a wrong one."""
    hole = model("y", SHARED) | {"nll_by_chunk": [None, *SHARED[1:]], "perplexity": None}
    row = compare_results(*evals(tmp_path, [model("x", SHARED)], [hole])).losses[0]
    assert (row.b, row.perplexity_b, row.perplexity_ratio, row.p) == (None, None, None, None)
    assert "not finite" in row.note


def test_kl_to_another_reference_is_not_paired(tmp_path: Path) -> None:
    """Losses can be compared whatever the reference was; KL only where the references' losses are the same."""
    x, y = model("x", shifted(0.1, 0.3), kl=[0.2] * 6), model("y", shifted(0.2), kl=[0.1] * 6)
    other = write_eval(tmp_path / "b.json", context(512, model("base", shifted(1.0)), y))
    loss, kl = compare_results(write_eval(tmp_path / "a.json", context(512, base(), x)), other).losses
    assert loss.p is not None
    assert (kl.p, kl.note) == (None, "the references differ; not paired.")
    near = write_eval(tmp_path / "b.json", context(512, model("base", shifted(0.004)), y))
    assert compare_results(tmp_path / "a.json", near).losses[1].note != kl.note


def test_a_lower_bound_is_not_paired_with_an_exact_kl(tmp_path: Path) -> None:
    """Two lower bounds are compared with a remark; a bound and an exact KL, or an estimate, are not."""
    kls = [0.5, 0.4, 0.6, 0.5, 0.5, 0.2], [0.4, 0.5, 0.5, 0.5, 0.3, 0.1]
    bound = model("x", SHARED, kl=kls[0], kl_kind="lower bound")
    rows = {}
    for kind in ("exact", "estimate", "lower bound"):
        other = model("y", shifted(0.1, 0.2), kl=kls[1], kl_kind=kind)
        rows[kind] = compare_results(*evals(tmp_path, [bound], [other])).losses[1]
    assert rows["exact"].p is None
    assert rows["estimate"].p is None
    assert "lower bound in one" in rows["exact"].note
    assert rows["lower bound"].p is not None
    assert rows["lower bound"].note == "both are lower bounds."


def test_kl_of_one_side_is_listed(tmp_path: Path) -> None:
    """Where one evaluation had no reference, its losses are compared and the other's KL is listed."""
    left = write_eval(tmp_path / "a.json", context(512, model("x", SHARED)), reference=None)
    right = write_eval(tmp_path / "b.json", context(512, base(), model("y", shifted(0.1, 0.2), kl=[0.1] * 6)))
    record = compare_results(left, right)
    assert [row.figure for row in record.losses] == ["loss"]
    assert [(lone.name, lone.metric, lone.side) for lone in record.unpaired] == [("512", "KL", "B")]


def test_several_models_want_a_choice(tmp_path: Path) -> None:
    """Without one the error names the models and the option; the reference may be chosen too."""
    left, right = evals(tmp_path, [model("x", shifted(0.1)), model("w", shifted(0.2))], [model("y", SHARED)])
    with pytest.raises(UserError) as caught:
        compare_results(left, right)
    assert caught.value.where == str(left)
    assert caught.value.what == "which of base, x, w is to be compared?"
    assert "--model-a" in caught.value.remedy
    with pytest.raises(UserError, match=r"no model 'z'. --model-b: base, y"):
        compare_results(left, right, model_a="x", model_b="z")
    assert compare_results(left, right, model_a="w").a.eval_model == "w"
    assert compare_results(left, right, model_a="base").losses[0].a == sum(SHARED) / 22


def test_two_models_of_one_file(tmp_path: Path) -> None:
    """The same path twice compares two of its models, if both are named and differ."""
    one, other = evals(tmp_path, [model("x", shifted(0.1, 0.3)), model("w", shifted(0.2))], [model("y", SHARED)])
    record = compare_results(one, one, model_a="x", model_b="w")
    assert record.losses[0].difference == pytest.approx(0.0, abs=0.02)
    with pytest.raises(UserError, match="--model-b"):
        compare_results(one, one, model_a="x")
    with pytest.raises(UserError, match="compared with itself"):
        compare_results(one, one, model_a="x", model_b="x")
    with pytest.raises(UserError, match="which of base, y is to be compared"):
        compare_results(other, other)


def test_a_directory_brings_both_kinds(tmp_path: Path) -> None:
    """A directory's eval.json and tasks.json are compared together, each with its own correction."""
    folders = []
    for name, shift in (("a", [0.1, 0.3]), ("b", [0.2])):
        folder = tmp_path / name
        folder.mkdir()
        write_eval(folder / "eval.json", context(512, base(), model(name, shifted(*shift))))
        write_tasks(folder / "tasks.json", task("t", [1.0, 0.0] * 4), model=f"{name} served")
        folders.append(folder)
    record = compare_results(*folders)
    assert (len(record.tasks), len(record.losses)) == (1, 1)
    assert (record.a.tasks_model, record.a.eval_model) == ("a served", "a")
    (folders[1] / "eval.json").unlink()
    record = compare_results(*folders)
    assert record.losses == ()
    assert [(lone.family, lone.name, lone.side) for lone in record.unpaired] == [("losses", "512", "A")]
    assert "\n- 512: only in A, not compared.\n" in comparison_markdown(record)


def test_what_has_nothing_in_common_is_refused(tmp_path: Path) -> None:
    """An evaluation against tasks, other tasks, one file of tasks twice: each is an error, not an empty table."""
    tasks = write_tasks(tmp_path / "t.json", task("t", [1.0] * 5))
    others = write_tasks(tmp_path / "u.json", task("u", [1.0] * 5))
    evaluation = write_eval(tmp_path / "e.json", context(512, base(), model("x", SHARED)))
    for a, b in ((tasks, evaluation), (tasks, others)):
        with pytest.raises(UserError, match="share no task"):
            compare_results(a, b)
    with pytest.raises(UserError, match="compared with itself"):
        compare_results(tasks, tasks)
    with pytest.raises(UserError, match="no evaluations on both sides"):
        compare_results(tasks, others, model_a="x")


def test_figures_of_other_versions_are_refused(tmp_path: Path) -> None:
    """Metrics that were defined otherwise are not compared."""
    left = write_eval(tmp_path / "a.json", context(512, base(), model("x", SHARED)))
    right = write_eval(tmp_path / "b.json", context(512, base(), model("y", SHARED)), metrics_version=2)
    with pytest.raises(UserError, match="versions 1 and 2"):
        compare_results(left, right)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "schema None is none of snugfit.eval/1, snugfit.tasks/1"),
        ('{"schema": "snugfit.quantize/1"}', "is none of"),
        ('{"schema": 3}', "schema 3"),
        ('{"schema": "snugfit.tasks/2"}', "reads 'snugfit.tasks/1'"),
        ('{"schema": "snugfit.tasks/1", "model": "m"}', "tasks: Field required"),
        ('{"schema": "snugfit.tasks/1", "model": "m", "tasks": [{"task": 3}]}', "tasks.0.task"),
        ('{"schema": "snugfit.eval/1"}', "metrics_version: Field required"),
        ("[" * 100_000, "not JSON"),
        ('{"schema": "\\ud800"}', "schema"),
    ],
)
def test_files_that_are_no_result_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """Broken JSON, another or newer schema, missing keys and wrong types: an error with the place and a remedy."""
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_result(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "0.5"}, r"tasks\.0\.value"),
        ({"value": True}, r"tasks\.0\.value"),
        ({"kind": "median"}, r"tasks\.0\.kind"),
        ({"items": {"0": "right"}}, r"tasks\.0\.items\.0"),
        ({"items": {}}, "has no items"),
        ({"items": {"0": 0.5}, "kind": "accuracy"}, "scores other than 0 and 1"),
    ],
)
def test_tasks_of_wrong_types_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A wrong value is refused by naming the key."""
    with pytest.raises(UserError, match=message):
        load_result(write_tasks(tmp_path / "x.json", task("t", [1.0, 0.0]) | change))


def test_a_task_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Two rows of one name could not be told apart."""
    with pytest.raises(UserError, match="task t, acc is there more than once"):
        load_result(write_tasks(tmp_path / "x.json", task("t", [1.0]), task("t", [0.0])))


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([], "no context"),
        ([context(512)], "nothing was scored at context 512"),
        ([context(512, base(), chunk_tokens=[0] * 6)], "nothing was scored at context 512"),
        ([context(512, base(), chunk_tokens=[1])], "other chunks"),
        ([context(512, base(), base())], "model base is there more than once"),
        ([context(512, base()), context(512, base())], "context 512 is there more than once"),
        ([context(512, model("x", SHARED, kl=[0.1]))], "other chunks"),
        ([context(512, model("x", SHARED, nonfinite=None))], r"contexts\.0\.models\.0\.nonfinite"),
    ],
)
def test_evaluations_that_do_not_hold_together_are_refused(
    tmp_path: Path, contexts: list[Mapping[str, Any]], message: str
) -> None:
    """Lists of other lengths, names that repeat, contexts without tokens: refused when the file is read."""
    with pytest.raises(UserError, match=message):
        load_result(write_eval(tmp_path / "x.json", *contexts))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    """No such file, and a directory without results, are errors that say what is wanted."""
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=r"there is no result here. Name a result"):
            load_result(path)


def test_a_directory_of_two_results_of_one_kind_is_refused(tmp_path: Path) -> None:
    """Tasks under the name eval.json beside tasks.json leave it open which is meant."""
    for name in ("eval.json", "tasks.json"):
        write_tasks(tmp_path / name, task("t", [1.0]))
    with pytest.raises(UserError, match="of one kind"):
        load_result(tmp_path)


def test_what_snugfit_writes_can_be_read(tmp_path: Path) -> None:
    """Both records' own JSON loads, more fields than are read included, NaN and infinities as null."""
    result = TaskResult("t", "f1", "mean", True, math.nan, None, {"0-ab": 0.5})
    (tmp_path / "tasks.json").write_text(TasksRecord("0", "m", {}, (result,), {}, {}).to_json(), encoding="utf-8")
    spread = Spread(0.1, None, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, (0.2,))
    figures = ModelFigures("m", math.inf, None, (math.inf,), (2,), 0, (), kl=spread)
    contexts = (ContextFigures(0, 1, 2, "d", (2,), (figures,), ()),)
    record = EvalRecord(
        snugfit="0",
        arguments={},
        metrics_version=1,
        reference=None,
        candidates=({"name": "m"},),
        texts=(),
        contexts=contexts,
        chat=None,
        seconds={},
        peak_rss_bytes=1,
        peak_gpu_bytes=None,
        hardware={},
        versions={},
    )
    (tmp_path / "eval.json").write_text(record.to_json(), encoding="utf-8")
    loaded = load_result(tmp_path)
    assert loaded.tasks is not None
    assert (loaded.tasks.tasks[0].value, loaded.tasks.tasks[0].items) == (None, {"0-ab": 0.5})
    assert loaded.eval is not None
    model = loaded.eval.contexts[0].models[0]
    assert (model.perplexity, model.nll_by_chunk, model.kl_kind) == (None, (None,), "exact")
    assert model.kl is not None
    assert model.kl.by_chunk == (0.2,)


TASKS_TABLE = r"""
| task | metric | A: nvfp4 | B: hybrid\|v_2\_ | A - B | 95 % interval | items | only A / only B right
 | p | p (Holm) | z, unpaired |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| hellaswag | acc | 52.50% | **65.00%** | -12.50 pp | [-18.08, -6.92] | 200 | 5 / 30 | < 0.001 | < 0.001 | -2.55 |
| lambada | loss | 1.9904 | 2.0178 | -0.0274 | [-0.1826, +0.1277] | 40 |  | 0.714 | 0.714 | -0.09 |

A minus B, paired on 240 items: McNemar's exact test for accuracies (pp: percentage points), a studentized bootstrap
 over items for other scores and for every interval. **Bold**: the better side, where p < 0.05 after Holm's correction
 for 2 tests. z is what the reported errors would say of unpaired scores, for reference.
"""
LOSSES_TABLE = r"""
| context | figure | A: x | B: y | A - B | 95 % interval | perplexity A | perplexity B | ratio A / B | chunks
 | p | p (Holm) | more tokens |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 512 | loss | 2.24091 | 2.22727 | +0.01364 | [-0.03863, +0.06590] | 9.4019 | 9.2745 | 1.0137 | 6
 | 0.548 | 0.548 | 425 |
|  | KL | 0.12273 | 0.10455 |  |  |  |  |  | 6 |  |  |  |

A minus B in nats a token, paired on 6 chunks: a studentized bootstrap over chunks. **Bold**: the better side, where p <
 0.05 after Holm's correction for 1 test. More tokens: how many would make p < 0.05 four times in five, were the
 difference what it seems; settled: it is below already.

- 512, KL: a lower bound in one, not in the other; not paired.
"""


def as_written(table: str) -> str:
    """A table of this file with its folded lines (they begin with a space) put together again."""
    return table.lstrip("\n").replace("\n ", " ")


def test_tasks_in_markdown(tmp_path: Path) -> None:
    """A table like the first seed's, names escaped, the significantly better value in bold, the test named below."""
    assert comparison_markdown(compare_results(*two_tasks(tmp_path))) == as_written(TASKS_TABLE)


def test_losses_in_markdown(tmp_path: Path) -> None:
    """Losses with perplexities and their ratio, KL below them, and a remark on what was not paired."""
    a = model("x", shifted(0.5, 0.25, 0.4), kl=[0.5, 0.4, 0.6, 0.5, 0.5, 0.2], kl_kind="lower bound")
    b = model("y", shifted(0.5, 0.125, 0.45, 0.3), kl=[0.4, 0.4, 0.5, 0.5, 0.4, 0.1])
    assert comparison_markdown(compare_results(*evals(tmp_path, [a], [b]))) == as_written(LOSSES_TABLE)


def test_what_is_settled_and_what_does_not_differ(tmp_path: Path) -> None:
    """A clear difference needs no more tokens and says so; where nothing differs there is no interval of no width."""
    a = model("x", shifted(2.0, 2.25, 1.875), kl=[0.5] * 6)
    b = model("y", SHARED, kl=[0.5] * 6)
    loss, kl = comparison_markdown(compare_results(*evals(tmp_path, [a], [b]))).splitlines()[2:4]
    assert loss.endswith("| settled |")
    assert "| no difference |" in kl
    assert kl.endswith("| 1.000 | 1.000 |  |")


def test_names_are_one_line_of_markdown(tmp_path: Path) -> None:
    """Bars, stars, underscores at a word's edge and line ends in names cannot break the table."""
    name = "a|b\n*c* `d` <e> [f](g) _h_ i_j \\"
    pair = [write_tasks(tmp_path / f"{side}.json", task(name, [1.0, 0.0] * 3), model=name) for side in "ab"]
    shown = comparison_markdown(compare_results(*pair))
    escaped = r"a\|b \*c\* \`d\` \<e\> \[f\](g) \_h\_ i_j \\"
    assert f"| A: {escaped} | B: {escaped} |" in shown
    assert f"\n| {escaped} | acc |" in shown


def test_csv_has_a_row_a_comparison_in_full_precision(tmp_path: Path) -> None:
    """Every row has every column; numbers read back as they were."""
    record = compare_results(*two_tasks(tmp_path))
    rows = list(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert [row["name"] for row in rows] == ["hellaswag", "lambada"]
    for row, source in zip(rows, record.tasks, strict=True):
        assert row["family"] == "tasks"
        assert int(row["count"]) == source.items
        for column in ("a", "b", "difference", "low", "high", "p", "p_holm", "z"):
            assert float(row[column]) == getattr(source, column)
    assert (rows[0]["only_a"], rows[1]["only_a"], rows[0]["perplexity_a"]) == ("5", "", "")


def test_csv_of_losses(tmp_path: Path) -> None:
    """Rows of losses carry context, figure, chunks, tokens and perplexities in the same columns."""
    record = compare_results(*evals(tmp_path, [model("x", shifted(0.5, 0.25))], [model("y", shifted(0.5, 0.125))]))
    row = next(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert (row["family"], row["name"], row["metric"], row["count"], row["tokens"]) == (
        "losses",
        "512",
        "loss",
        "6",
        "22",
    )
    assert float(row["perplexity_ratio"]) == record.losses[0].perplexity_ratio
    assert int(row["more_tokens"]) == record.losses[0].more_tokens


def test_json_is_one_document_that_makes_the_record_again(tmp_path: Path) -> None:
    """to_json holds the schema, the arguments and every field; nothing is lost."""
    record = compare_results(*two_tasks(tmp_path), seed=2)
    document = json.loads(record.to_json())
    assert document["schema"] == "snugfit.compare/1"
    assert document["arguments"]["seed"] == 2
    assert document == json.loads(json.dumps(asdict(record)))
    assert set(document) == set(CompareRecord.__dataclass_fields__)


def test_a_comparison_is_written_whole_into_a_new_directory(tmp_path: Path) -> None:
    """The three files hold what the three methods give; a directory that exists is left alone."""
    record = compare_results(*two_tasks(tmp_path))
    folder = tmp_path / "out"
    write_comparison(record, folder)
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    wanted = {
        "compare.json": record.to_json(),
        "compare.csv": comparison_csv(record),
        "compare.md": comparison_markdown(record),
    }
    assert texts == wanted
    with pytest.raises(UserError, match="exists"):
        write_comparison(record, folder)


def test_no_torch_is_loaded() -> None:
    """Comparing files must not wait for torch."""
    code = "import snugfit.evaluation.compare, sys; assert not {'torch', 'scipy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
