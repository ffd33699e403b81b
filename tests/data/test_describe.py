"""What a dataset gives a model: every figure counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.errors import raises
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.data.dataset import load_dataset, samples_digest
from snugfit.data.describe import HELD_OUT_FILE, KEPT_FILE, RECORD_FILE, describe_dataset, parse_percent

SET = """\
calibration_set:
  max_seq_length: 2000
  datasets:
    - {dataset: short.jsonl, num_samples: all, category: Short, language: en}
    - {dataset: long.jsonl, num_samples: 9, category: Long, language: de}
    - {dataset: more.jsonl, num_samples: all, category: Short}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single characters, and no model."""
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"), letters="abcдж語")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A set of three files: 4 samples, 2 (of 9 that are asked for, and one bad row), and 2, of which one repeats."""
    files: dict[str, list[object]] = {
        "short": [{"text": "a" * n} for n in (10, 20, 30, 40)],
        "long": [{"text": "д" * 600}, {"txt": ""}, {"text": "語" * 3000}],
        "more": [{"text": "a" * 10}, {"text": "b" * 12}],
    }
    for name, entries in files.items():
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    file = tmp_path / "set.yaml"
    file.write_text(SET, encoding="utf-8")
    return file


def test_figures(model: Path, dataset: Path) -> None:
    """Samples, tokens, categories, languages, letters, lengths and positions are those of the samples of a run."""
    record = describe_dataset(dataset, model)
    expected = load_dataset(model, [dataset])
    assert (record.digest, record.set_digest, record.source) == (expected.digest, expected.set_digest, "set.yaml")
    assert (record.num_samples, record.tokens, record.max_seq_length) == (8, 100 + 2600 + 22, 2000)
    shares = [(one.name, one.samples, one.tokens, one.share) for one in record.categories]
    assert shares == [("Short", 6, 122, 0.75), ("Long", 2, 2600, 0.25)]
    assert [(one.name, one.samples) for one in record.languages] == [("en", 4), ("de", 2), ("not said", 2)]
    assert record.scripts == {
        "Cjk": round(2000 / 2722, 6),
        "Cyrillic": round(600 / 2722, 6),
        "Latin": round(122 / 2722, 6),
    }
    assert record.lengths == (10, 12, 30, 40, 2000)
    positions = [(one.first, one.last, one.samples, one.tokens) for one in record.positions]
    assert positions == [(0, 511, 8, 122 + 1024), (512, 1023, 2, 88 + 512), (1024, 2047, 1, 976)]
    assert record.repeated == 1
    assert record.examples == ("a" * 10, "д" * 160)
    assert [(use.asked, use.samples, sum(use.skipped.values())) for use in record.sources] == [
        (None, 4, 0),
        (9, 2, 1),
        (None, 2, 0),
    ]
    assert json.loads(record.to_json())["digest"] == record.digest


def test_held_out(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Some of every source; both parts are written as rows of ids that give the same samples again."""
    record = describe_dataset(dataset, model, held_out="25%", output_dir=tmp_path / "out")
    part = record.held_out
    assert part is not None
    assert (part.percent, part.num_samples) == (25, 3)
    for file, digest in ((KEPT_FILE, part.kept_digest), (HELD_OUT_FILE, part.digest)):
        again = load_dataset(model, [tmp_path / "out" / file], num_samples=100, max_seq_length=2000)
        assert again.digest == digest
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text(encoding="utf-8"))["held_out"]["digest"] == part.digest
    whole = describe_dataset(dataset, model, output_dir=tmp_path / "whole")
    assert not (tmp_path / "whole" / HELD_OUT_FILE).exists()
    lines = (tmp_path / "whole" / KEPT_FILE).read_text(encoding="utf-8").splitlines()
    assert samples_digest(json.loads(line)["input_ids"] for line in lines) == whole.digest
    with raises("output-exists"):
        describe_dataset(dataset, model, output_dir=tmp_path / "whole")


def test_plain_files(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Files without a set are described as well, each by its name, with the limits of a run."""
    record = describe_dataset([tmp_path / "short.jsonl", tmp_path / "more.jsonl"], model, num_samples=3)
    assert [(use.dataset, use.samples, use.tokens) for use in record.sources] == [
        ("short.jsonl", 2, 30),
        ("more.jsonl", 1, 10),
    ]
    assert (record.set_digest, record.max_seq_length) == (None, 1024)


def test_rows_of_ids_need_no_tokenizer(tmp_path: Path) -> None:
    """Without a tokenizer there are no letters and no examples; all else is counted."""
    (tmp_path / "model").mkdir()
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n', encoding="utf-8")
    record = describe_dataset(tmp_path / "ids.jsonl", tmp_path / "model")
    assert (record.tokens, record.scripts, record.examples) == (3, {}, ())


def test_bad_input(model: Path, dataset: Path, tmp_path: Path) -> None:
    """A model that does not exist, a share that cannot be held out; nothing is written."""
    with raises("model-not-found"):
        describe_dataset(dataset, tmp_path / "nowhere", output_dir=tmp_path / "out")
    for given in ("0%", "60%", "-1", "some", "", "nan%"):
        with raises("option-invalid", where="held_out"):
            describe_dataset(dataset, model, held_out=given, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (parse_percent("10%"), parse_percent(12.5), parse_percent(" 5 ")) == (10, 12.5, 5)
