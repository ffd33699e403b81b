"""Results that `compare` cannot use: exit code 2, a message with code and place, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.refusals import put_file, refuse_verb, run
from helpers.results import context, evals, model, task, write_eval, write_tasks
from snugfit.records.base import as_json


def compare(out: Path, code: str, a: Path, b: Path, *options: object) -> str:
    """The message of a comparison that must be refused and leave everything around `out` as it was."""
    return refuse_verb(out, code, "compare", a, b, *options)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two results that can be compared, of a model each beside the reference."""
    losses = [8.5, 9.25, 7.5, 10.25, 8.5, 5.25]
    return evals(tmp_path, [model("x", losses, kl=[0.5] * 6)], [model("y", losses, kl=[0.25] * 6)])


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "file-missing"),
        (b"", "json-invalid"),
        (b'{"schema": "snugfit.eval/1", "conte', "json-invalid"),
        (b"\xff\xfe\x00", "json-invalid"),
        (b"[" * 100_000, "json-invalid"),
        (b"[]", "result-invalid"),
        (b"{}", "result-invalid"),
        (b'{"schema": "snugfit.quantize/1"}', "result-invalid"),
        (b'{"schema": "snugfit.compare/1"}', "result-invalid"),
    ],
    ids=["missing", "empty", "cut", "bytes", "deep", "list", "no schema", "quantize", "compare"],
)
def test_files_that_are_not_results(content: bytes | None, code: str, pair: tuple[Path, Path], out: Path) -> None:
    """A file that is missing, is broken or holds something else is refused by its path, on either side."""
    file = out.parent / "c.json"
    if content is not None:
        file.write_bytes(content)
    for sides in ((pair[0], file), (file, pair[0])):
        assert f"{file}: " in compare(out, code, *sides)


@pytest.mark.parametrize("schema", ["snugfit.eval/2", "snugfit.tasks/0"])
def test_results_of_another_version(schema: str, pair: tuple[Path, Path], out: Path) -> None:
    """A result of another version is refused with its schema."""
    file = put_file(out.parent / "c.json", json.dumps({"schema": schema}))
    message = compare(out, "result-invalid", pair[0], file)
    assert f"{file}: " in message
    assert repr(schema) in message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_results_that_lack_something(mark: bytes, pair: tuple[Path, Path], out: Path) -> None:
    """A result without its parts, or as an editor saved it, is refused with the first that is wrong."""
    file = put_file(out.parent / "c.json", mark + as_json({"schema": "snugfit.eval/1"}).encode())
    message = compare(out, "result-invalid", file, pair[1])
    assert f"{file}: " in message
    assert ": :" not in message


def test_results_that_were_edited(pair: tuple[Path, Path], out: Path) -> None:
    """A result whose figures were edited is refused by its path, on either side."""
    file = put_file(out.parent / "c.json", pair[0].read_text(encoding="utf-8").replace("8.5", "8.25"))
    for sides in ((pair[1], file), (file, pair[1])):
        assert f"{file}: " in compare(out, "record-changed", *sides)


def test_directories_without_a_result(good: Path, pair: tuple[Path, Path], out: Path) -> None:
    """An empty directory, a model's, and a missing one are refused by their paths."""
    (out.parent / "empty").mkdir()
    for folder in (out.parent / "empty", good, out.parent / "nowhere"):
        assert f"{folder}: " in compare(out, "file-missing", pair[0], folder)


def test_results_on_other_texts(pair: tuple[Path, Path], out: Path) -> None:
    """Results on other texts are refused with both paths and both texts."""
    other = write_eval(
        out.parent / "c.json",
        context(512, model("base", [1.0] * 6), model("y", [1.0] * 6), digest="other"),
        texts=[{"name": "poem.txt", "sha256": "0", "kind": "text"}],
    )
    message = compare(out, "results-mismatch", pair[0], other)
    assert f"{pair[0]}, {other}: " in message
    assert " 512" in message
    assert "novel.txt" in message
    assert "poem.txt" in message


def test_results_of_other_contexts(pair: tuple[Path, Path], out: Path) -> None:
    """Results that share no context are refused."""
    other = write_eval(out.parent / "c.json", context(64, model("base", [1.0] * 6), model("y", [1.0] * 6)))
    assert f"{pair[0]}, {other}: " in compare(out, "results-mismatch", pair[0], other)


def test_results_of_other_metrics(pair: tuple[Path, Path], out: Path) -> None:
    """Results of snugfits that compute figures differently are refused with both versions."""
    contexts = context(512, model("base", [1.0] * 6), model("y", [1.0] * 6))
    other = write_eval(out.parent / "c.json", contexts, metrics_version=2)
    message = compare(out, "results-mismatch", pair[0], other)
    assert f"{pair[0]}, {other}: " in message
    assert "1 and 2" in message


def test_tasks_that_differ(out: Path) -> None:
    """Results of other tasks, and of a task with another limit, are refused; the second with the counts."""
    a = write_tasks(out.parent / "a.json", task("piqa", [1.0, 0.0, 1.0]))
    b = write_tasks(out.parent / "b.json", task("boolq", [1.0, 0.0, 1.0]))
    c = write_tasks(out.parent / "c.json", task("piqa", [1.0, 0.0]))
    assert f"{a}, {b}: " in compare(out, "results-mismatch", a, b)
    message = compare(out, "results-mismatch", a, c)
    assert "piqa, acc: " in message
    assert "1 of A's 3 are not in B, 0 of B's 2 not in A." in message


def test_tasks_and_texts(pair: tuple[Path, Path], out: Path) -> None:
    """Tasks on one side and texts on the other are refused."""
    tasks = write_tasks(out.parent / "c.json", task("piqa", [1.0, 0.0, 1.0]))
    assert f"{pair[0]}, {tasks}: " in compare(out, "results-mismatch", pair[0], tasks)


def test_models_to_choose_from(pair: tuple[Path, Path], out: Path) -> None:
    """Several models need a choice; each refusal names the file, the option and the models."""
    models = [model(name, [1.0] * 6) for name in ("base", "y", "z")]
    many = write_eval(out.parent / "c.json", context(512, *models))
    for sides, options, names in (
        ((pair[0], many), (), ("base, y, z", "`--model-b`")),
        ((pair[0], many), ("--model-b", "Y"), ("base, y, z", "`--model-b`", "'Y'")),
        ((many, pair[1]), ("--model-a", ""), ("base, y, z", "`--model-a`", "''")),
    ):
        message = compare(out, "option-invalid", *sides, *options)
        assert f"{many}: " in message
        assert all(name in message for name in names)


def test_a_result_with_itself(pair: tuple[Path, Path], out: Path) -> None:
    """One result on both sides needs two different models."""
    message = compare(out, "option-invalid", pair[0], pair[0])
    assert f"{pair[0]}: " in message
    assert "base, x" in message
    assert "`--model-a`" in message
    compare(out, "option-invalid", pair[0], pair[0], "--model-a", "x", "--model-b", "x")


def test_tasks_with_themselves(out: Path) -> None:
    """One result of tasks on both sides is refused by its path."""
    file = write_tasks(out.parent / "a.json", task("piqa", [1.0, 0.0, 1.0]))
    assert str(file) in compare(out, "results-mismatch", file, file)


def test_a_choice_of_models_for_tasks(out: Path) -> None:
    """Results of tasks hold one model each: a choice is refused."""
    sides = [write_tasks(out.parent / f"{name}.json", task("piqa", [1.0, 0.0, 1.0])) for name in "ab"]
    assert "--model-a: " in compare(out, "option-conflict", sides[0], sides[1], "--model-a", "m")


def test_a_result_without_kl(pair: tuple[Path, Path], out: Path) -> None:
    """A result without KL is not bad input: losses are compared, and KL is listed as of one side only."""
    bare = write_eval(out.parent / "c.json", context(512, model("y", [1.0] * 6)), reference=None)
    result = run("compare", pair[0], bare)
    assert result.exit_code == 0, result.stderr
    assert "512, KL: only in A, not compared." in result.stdout


def test_comparison_below_a_file(pair: tuple[Path, Path], out: Path) -> None:
    """A comparison that cannot be written is refused by its path."""
    out.write_text("mine", encoding="utf-8")
    assert str(out) in compare(out / "below", "output-not-writable", *pair)
    assert out.read_text(encoding="utf-8") == "mine"
