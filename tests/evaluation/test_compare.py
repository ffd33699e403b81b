"""`compare`: what is paired with what, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from helpers.errors import raises
from helpers.results import (
    COUNTS,
    SHARED,
    TEXT,
    base,
    context,
    evals,
    fixed_scores,
    model,
    shifted,
    task,
    two_tasks,
    write_eval,
    write_tasks,
)
from snugfit.evaluation.compare import compare, write_comparison
from snugfit.evaluation.significance import holm, mcnemar, paired_bootstrap, tokens_to_settle, unpaired_z
from snugfit.records.base import DIGEST, content_digest
from snugfit.records.comparison import CompareRecord
from snugfit.report.comparison import comparison_csv, comparison_markdown


def test_an_accuracy_is_tested_by_mcnemar_with_the_bootstraps_interval(tmp_path: Path) -> None:
    """The row has both values, the items only one has right, McNemar's p, the paired interval and the unpaired z."""
    a, b = fixed_scores()
    record = compare(*two_tasks(tmp_path))
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
    """A gain of 10 items in 200 that only B has right is significant, though the unpaired |z| is near 1."""
    a, b = [1.0] * 100 + [0.0] * 100, [1.0] * 110 + [0.0] * 90
    left, right = write_tasks(tmp_path / "a.json", task("t", a)), write_tasks(tmp_path / "b.json", task("t", b))
    row = compare(left, right).tasks[0]
    assert row.z is not None
    assert abs(row.z) < 1.1
    assert row.p_holm is not None
    assert row.p_holm < 0.01


def test_a_mean_is_tested_by_the_bootstrap_over_items(tmp_path: Path) -> None:
    """Scores other than 0 and 1 have the paired bootstrap's p, and no items that only one has right."""
    record = compare(*two_tasks(tmp_path))
    row = record.tasks[1]
    stored = [json.loads(Path(side.path).read_text())["tasks"][1]["items"] for side in (record.a, record.b)]
    keys = sorted(stored[0])
    found = paired_bootstrap([stored[0][k] for k in keys], [stored[1][k] for k in keys], [1] * 40)
    assert (row.difference, row.low, row.high, row.p) == (found.difference, found.low, found.high, found.p)
    assert (row.kind, row.only_a, row.only_b) == ("mean", None, None)


def test_scores_that_are_0_or_1_by_chance_are_tested_as_means(tmp_path: Path) -> None:
    """A metric that is an accuracy in one file and a mean in the other is a mean."""
    left = write_tasks(tmp_path / "a.json", task("t", [0.0, 1.0] * 4, metric="f1"))
    right = write_tasks(tmp_path / "b.json", task("t", [0.0, 0.5, 1.0, 1.0] * 2, metric="f1"))
    row = compare(left, right).tasks[0]
    assert (row.kind, row.only_a) == ("mean", None)
    assert row.p == paired_bootstrap([0.0, 1.0] * 4, [0.0, 0.5, 1.0, 1.0] * 2, [1] * 8).p


def test_all_task_rows_are_one_family(tmp_path: Path) -> None:
    """Holm's correction counts every metric of every task."""
    record = compare(*two_tasks(tmp_path))
    assert [row.p_holm for row in record.tasks] == holm([row.p for row in record.tasks])
    assert record.tasks[0].p_holm == pytest.approx(2 * (record.tasks[0].p or 0))


def test_items_are_paired_by_key_not_by_place(tmp_path: Path) -> None:
    """The same items in another order are the same items."""
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    entry = task("t", scores)
    turned = entry | {"items": dict(reversed(entry["items"].items()))}
    record = compare(write_tasks(tmp_path / "a.json", entry), write_tasks(tmp_path / "b.json", turned))
    assert (record.tasks[0].only_a, record.tasks[0].only_b, record.tasks[0].p) == (0, 0, 1.0)


def test_exchanging_the_files_mirrors_every_row(tmp_path: Path) -> None:
    """B against A has the negative differences, the mirrored intervals and the same p."""
    left, right = two_tasks(tmp_path)
    for one, other in zip(compare(left, right).tasks, compare(right, left).tasks, strict=True):
        assert None not in {one.difference, one.low, one.high}
        assert [-(v or 0) for v in (one.difference, one.low, one.high)] == [other.difference, other.high, other.low]
        assert (one.p, one.p_holm) == (other.p, other.p_holm)


def test_other_items_are_refused(tmp_path: Path) -> None:
    """The message names the task and counts what is missing on each side."""
    left = write_tasks(tmp_path / "a.json", task("hellaswag", [1.0] * 10))
    entry = task("hellaswag", [1.0] * 7)
    entry["items"]["99-cd"] = 0.0
    with raises("results-mismatch", where="hellaswag, acc") as caught:
        compare(left, write_tasks(tmp_path / "b.json", entry))
    assert "3 of A's 10 are not in B, 1 of B's 8 not in A." in caught.value.what
    assert "`limit`" in caught.value.remedy


def test_tasks_of_one_side_are_listed(tmp_path: Path) -> None:
    """A task of only one file has no row, but all three outputs list it."""
    shared = task("both", [1.0, 0.0] * 3)
    left = write_tasks(tmp_path / "a.json", shared, task("left", [1.0]))
    right = write_tasks(tmp_path / "b.json", task("right", [0.5], metric="f1"), shared)
    record = compare(left, right)
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
    with raises("results-mismatch", where="t, acc"):
        compare(left, right)


@pytest.mark.parametrize(("higher", "bold"), [(True, "| 0.1000 | **0.9000** |"), (False, "| **0.1000** | 0.9000 |")])
def test_bold_is_the_better_side(tmp_path: Path, higher: bool, bold: str) -> None:
    """Which value is better depends on the metric."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.05, 30)
    pair = []
    for name, level in (("a", 0.1), ("b", 0.9)):
        scores = (noise - noise.mean()) * (1 if name == "a" else -1) + level
        pair.append(write_tasks(tmp_path / f"{name}.json", task("t", scores.tolist(), higher_is_better=higher)))
    assert bold in comparison_markdown(compare(*pair))


def test_a_value_that_is_not_a_mean_is_remarked(tmp_path: Path) -> None:
    """Where lm_eval's figure is another function of the items, the row's note states what was compared."""
    scores = [0.5, 0.25, 0.75, 0.5, 0.5, 1.0]
    left = write_tasks(tmp_path / "a.json", task("t", scores, value=1.8))
    right = write_tasks(tmp_path / "b.json", task("t", list(reversed(scores)), value=1.7))
    assert "not the mean of its items" in compare(left, right).tasks[0].note


def test_few_items_say_why_there_is_no_interval(tmp_path: Path) -> None:
    """Four items have McNemar's p, no interval, and a remark."""
    left = write_tasks(tmp_path / "a.json", task("t", [1.0, 1.0, 1.0, 0.0]))
    right = write_tasks(tmp_path / "b.json", task("t", [0.0, 0.0, 1.0, 0.0]))
    row = compare(left, right).tasks[0]
    assert (row.difference, row.low, row.high, row.p) == (0.5, None, None, 0.5)
    assert row.note == "no interval from fewer than 5."


def test_missing_scores_are_not_paired(tmp_path: Path) -> None:
    """A null among the items (lm_eval's NaN) leaves the row without a test, and with a note."""
    entry = task("t", [1.0] * 6)
    hole = entry | {"items": entry["items"] | {"0-ab": None}, "value": None}
    row = compare(write_tasks(tmp_path / "a.json", entry), write_tasks(tmp_path / "b.json", hole)).tasks[0]
    assert (row.a, row.b, row.p, row.p_holm, row.z) == (1.0, None, None, None, None)
    assert "missing" in row.note


def test_losses_and_kl_are_paired_over_chunks(tmp_path: Path) -> None:
    """Each context has a row of loss and one of KL with both means, the paired test and the tokens still wanted."""
    a, b = shifted(0.5, 0.25, 0.4), shifted(0.5, 0.125, 0.45, 0.3)
    kl_a, kl_b = [0.5, 0.4, 0.6, 0.5, 0.5, 0.2], [0.4, 0.4, 0.5, 0.5, 0.4, 0.1]
    record = compare(*evals(tmp_path, [model("x", a, kl=kl_a)], [model("y", b, kl=kl_b)]))
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
    record = compare(write_eval(tmp_path / "a.json", *a), write_eval(tmp_path / "b.json", *b))
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
        tmp_path / "b.json",
        context(512, base(), model("y", SHARED), digest="other"),
        texts=[TEXT | {"name": "play.txt"}],
    )
    with raises("results-mismatch", where=f"{left}, {right}") as caught:
        compare(left, right)
    assert all(part in caught.value.what for part in ("512", "novel.txt", "play.txt"))


def test_tokens_left_out_are_not_paired(tmp_path: Path) -> None:
    """A model with NaN logits keeps its own means and has no test; the row's note has the reason."""
    broken = model("y", SHARED, nonfinite=2, tokens_by_chunk=[4, 4, 4, 4, 2, 2], kl=[0.1] * 6)
    record = compare(*evals(tmp_path, [model("x", shifted(0.1, 0.3), kl=[0.2] * 6)], [broken]))
    for row in record.losses:
        assert (row.difference, row.low, row.p, row.p_holm, row.more_tokens) == (None,) * 5
        assert row.note == "tokens with NaN or infinite logits left out, 0 in A, 2 in B; not paired."
    assert record.losses[0].b == sum(SHARED) / 20


def test_infinite_losses_are_not_paired(tmp_path: Path) -> None:
    """A null among the chunks' sums leaves the row without figures instead of a wrong one."""
    hole = model("y", SHARED) | {"nll_by_chunk": [None, *SHARED[1:]], "perplexity": None}
    row = compare(*evals(tmp_path, [model("x", SHARED)], [hole])).losses[0]
    assert (row.b, row.perplexity_b, row.perplexity_ratio, row.p) == (None, None, None, None)
    assert "not finite" in row.note


def test_kl_to_another_reference_is_not_paired(tmp_path: Path) -> None:
    """Losses can be compared whatever the reference was; KL only where the references' losses are the same."""
    x, y = model("x", shifted(0.1, 0.3), kl=[0.2] * 6), model("y", shifted(0.2), kl=[0.1] * 6)
    other = write_eval(tmp_path / "b.json", context(512, model("base", shifted(1.0)), y))
    loss, kl = compare(write_eval(tmp_path / "a.json", context(512, base(), x)), other).losses
    assert loss.p is not None
    assert (kl.p, kl.note) == (None, "the references differ; not paired.")
    near = write_eval(tmp_path / "b.json", context(512, model("base", shifted(0.004)), y))
    assert compare(tmp_path / "a.json", near).losses[1].note != kl.note


def test_a_lower_bound_is_not_paired_with_an_exact_kl(tmp_path: Path) -> None:
    """Two lower bounds are compared with a remark; a bound and an exact KL, or an estimate, are not."""
    kls = [0.5, 0.4, 0.6, 0.5, 0.5, 0.2], [0.4, 0.5, 0.5, 0.5, 0.3, 0.1]
    bound = model("x", SHARED, kl=kls[0], kl_kind="lower bound")
    rows = {}
    for kind in ("exact", "estimate", "lower bound"):
        other = model("y", shifted(0.1, 0.2), kl=kls[1], kl_kind=kind)
        rows[kind] = compare(*evals(tmp_path, [bound], [other])).losses[1]
    assert rows["exact"].p is None
    assert rows["estimate"].p is None
    assert "lower bound in one" in rows["exact"].note
    assert rows["lower bound"].p is not None
    assert rows["lower bound"].note == "both are lower bounds."


def test_kl_of_one_side_is_listed(tmp_path: Path) -> None:
    """Where one evaluation had no reference, its losses are compared and the other's KL is listed."""
    left = write_eval(tmp_path / "a.json", context(512, model("x", SHARED)), reference=None)
    right = write_eval(tmp_path / "b.json", context(512, base(), model("y", shifted(0.1, 0.2), kl=[0.1] * 6)))
    record = compare(left, right)
    assert [row.figure for row in record.losses] == ["loss"]
    assert [(lone.name, lone.metric, lone.side) for lone in record.unpaired] == [("512", "KL", "B")]


def test_several_models_need_a_choice(tmp_path: Path) -> None:
    """Without one the error names the models and the option; the reference may be chosen too."""
    left, right = evals(tmp_path, [model("x", shifted(0.1)), model("w", shifted(0.2))], [model("y", SHARED)])
    with raises("option-invalid", where=left) as caught:
        compare(left, right)
    assert "base, x, w" in caught.value.what
    assert "`model_a`" in caught.value.remedy
    with raises("option-invalid", where=right) as caught:
        compare(left, right, model_a="x", model_b="z")
    assert "'z'" in caught.value.what
    assert "base, y" in caught.value.remedy
    assert compare(left, right, model_a="w").a.eval_model == "w"
    assert compare(left, right, model_a="base").losses[0].a == sum(SHARED) / 22


def test_two_models_of_one_file(tmp_path: Path) -> None:
    """The same path twice compares two of its models, if both are named and differ."""
    one, other = evals(tmp_path, [model("x", shifted(0.1, 0.3)), model("w", shifted(0.2))], [model("y", SHARED)])
    record = compare(one, one, model_a="x", model_b="w")
    assert record.losses[0].difference == pytest.approx(0.0, abs=0.02)
    with raises("option-invalid", where=one) as caught:
        compare(one, one, model_a="x")
    assert "`model_b`" in caught.value.remedy
    with raises("option-invalid", where=one):
        compare(one, one, model_a="x", model_b="x")
    with raises("option-invalid", where=other):
        compare(other, other)


def test_a_directory_brings_both_kinds(tmp_path: Path) -> None:
    """A directory's eval.json and tasks.json are compared together, each with its own correction."""
    folders = []
    for name, shift in (("a", [0.1, 0.3]), ("b", [0.2])):
        folder = tmp_path / name
        folder.mkdir()
        write_eval(folder / "eval.json", context(512, base(), model(name, shifted(*shift))))
        write_tasks(folder / "tasks.json", task("t", [1.0, 0.0] * 4), model=f"{name} served")
        folders.append(folder)
    record = compare(*folders)
    assert (len(record.tasks), len(record.losses)) == (1, 1)
    assert (record.a.tasks_model, record.a.eval_model) == ("a served", "a")
    (folders[1] / "eval.json").unlink()
    record = compare(*folders)
    assert record.losses == ()
    assert [(lone.family, lone.name, lone.side) for lone in record.unpaired] == [("losses", "512", "A")]
    assert "\n- 512: only in A, not compared.\n" in comparison_markdown(record)


def test_what_has_nothing_in_common_is_refused(tmp_path: Path) -> None:
    """An evaluation against tasks, other tasks, one file of tasks twice: each is an error, not an empty table."""
    tasks = write_tasks(tmp_path / "t.json", task("t", [1.0] * 5))
    others = write_tasks(tmp_path / "u.json", task("u", [1.0] * 5))
    evaluation = write_eval(tmp_path / "e.json", context(512, base(), model("x", SHARED)))
    for a, b in ((tasks, evaluation), (tasks, others)):
        with raises("results-mismatch", where=f"{a}, {b}"):
            compare(a, b)
    with raises("results-mismatch", where=tasks):
        compare(tasks, tasks)
    with raises("option-conflict", where="model_a"):
        compare(tasks, others, model_a="x")


def test_figures_of_other_versions_are_refused(tmp_path: Path) -> None:
    """Metrics that were defined otherwise are not compared."""
    left = write_eval(tmp_path / "a.json", context(512, base(), model("x", SHARED)))
    right = write_eval(tmp_path / "b.json", context(512, base(), model("y", SHARED)), metrics_version=2)
    with raises("results-mismatch", where=left) as caught:
        compare(left, right)
    assert "1 and 2" in caught.value.what


def test_json_is_one_document_that_makes_the_record_again(tmp_path: Path) -> None:
    """to_json holds the schema, the arguments and every field; nothing is lost."""
    record = compare(*two_tasks(tmp_path))
    document = json.loads(record.to_json())
    assert document["schema"] == "snugfit.compare/1"
    assert document["arguments"]["seed"] == 0
    assert document.pop(DIGEST) == content_digest(document)
    assert document == json.loads(json.dumps(asdict(record)))
    assert set(document) == set(CompareRecord.__dataclass_fields__)


def test_a_comparison_is_written_whole_into_a_new_directory(tmp_path: Path) -> None:
    """The three files hold what the three methods give; a directory that exists is left alone."""
    record = compare(*two_tasks(tmp_path))
    folder = tmp_path / "out"
    write_comparison(record, folder)
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    wanted = {
        "compare.json": record.to_json(),
        "compare.csv": comparison_csv(record),
        "compare.md": comparison_markdown(record),
    }
    assert texts == wanted
    with raises("output-exists", where=folder):
        write_comparison(record, folder)


def test_no_torch_is_loaded() -> None:
    """Comparing files must not wait for torch."""
    code = "import snugfit.evaluation.compare, sys; assert not {'torch', 'scipy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
