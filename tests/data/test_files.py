"""Files of a dataset: what their names say, gzip, Parquet, samples in random order, and texts that begin with BOS."""

from __future__ import annotations

import builtins
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from helpers.tiny_tokenizer import PROSE, add_tokenizer
from snugfit.data.dataset import load_dataset
from snugfit.data.texts import find_files, read_chunks
from snugfit.data.tokenizer import Tokenizer

ROWS = [{"input_ids": [n, n + 1, n + 2]} for n in range(3, 40)]
TALK = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Loire."}]


def lines(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def with_bos(directory: Path, template: str | None = None) -> Path:
    """A tokenizer of single characters that starts texts with token 1, <s>."""
    directory.mkdir()
    file = add_tokenizer(directory, template=template) / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    return directory


# --- gzip


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.txt", "a.md", "a"])
def test_gzip_is_read_as_what_it_holds(name: str, tmp_path: Path) -> None:
    """A gzipped file of text or JSONL gives the samples and chunks of the file itself."""
    model = add_tokenizer(tmp_path)
    content = lines(ROWS) if "json" in name else PROSE.encode()
    files = [write(tmp_path / name, content), write(tmp_path / f"{name}.gz", gzip.compress(content))]
    samples = [load_dataset(model, [file], num_samples=5, max_seq_length=20).samples for file in files]
    assert samples[0] == samples[1]
    assert samples[0]
    chunks = [read_chunks(Tokenizer(model), [file], [32])[0][0] for file in files]
    assert chunks[0].digest == chunks[1].digest


@pytest.mark.parametrize("name", ["a.json.gz", "a.tar.gz", "a.tgz", "a.zip", "a.parquet.gz", "a.jsonl.gz", "b.txt.gz"])
@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"word " * 999)[:-20]], ids=["text", "cut off"])
def test_what_is_no_gzipped_text(name: str, content: bytes, tmp_path: Path) -> None:
    """Archives, .json, and gzip that is damaged or cut off are refused by the file's name, by every verb."""
    model, file = add_tokenizer(tmp_path), write(tmp_path / name, content)
    with raises("dataset-unreadable", file):
        load_dataset(model, [file], num_samples=500)
    with raises("dataset-unreadable", file):
        read_chunks(Tokenizer(model), [file], [32])


def test_folders_stand_for_all_kinds(tmp_path: Path) -> None:
    """A folder gives gzipped and Parquet files too."""
    for name in ("a.jsonl.gz", "b.parquet", "c.txt.gz", "d.json.gz", "e.gz"):
        write(tmp_path / name, b"")
    assert [file.name for file in find_files([tmp_path])] == ["a.jsonl.gz", "b.parquet", "c.txt.gz"]


# --- Parquet


def parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as format_

    format_.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize(
    "rows",
    [
        ROWS * 4,
        [{"text": "One, two.\nThree."}, {"text": "Four, five."}],
        [{"messages": TALK}, {"messages": [TALK[0], {**TALK[1], "name": "b"}]}],
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "id": 3}],
    ],
    ids=["input_ids", "text", "messages", "conversations"],
)
def test_parquet_is_read_as_jsonl(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A Parquet file gives what JSONL of the same rows gives, in calibration and evaluation; nulls are left out."""
    model = add_tokenizer(tmp_path)
    files = [parquet(tmp_path / "a.parquet", rows), write(tmp_path / "a.jsonl", lines(rows))]
    first, second = (load_dataset(model, [file], num_samples=200) for file in files)
    assert first.samples == second.samples
    assert len(first.samples) == len(rows)
    chunks = [read_chunks(Tokenizer(model), [file], [])[0][0] for file in files]
    assert chunks[0].digest == chunks[1].digest
    assert chunks[0].sources[0] == f"{files[0]}:1"


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    """A file that is no Parquet, or is cut off, is refused by its name."""
    pytest.importorskip("pyarrow")
    whole = parquet(tmp_path / "whole.parquet", ROWS).read_bytes()
    for content in (b"", b"not Parquet at all", whole[:-30], b"PAR1" + bytes(50) + b"PAR1"):
        file = write(tmp_path / "a.parquet", content)
        with raises("dataset-unreadable", file):
            load_dataset(tmp_path, [file])
        with raises("dataset-unreadable", file):
            read_chunks(Tokenizer(tmp_path), [file], [])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow a Parquet file is refused as a missing dependency."""
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **others: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with raises("dependency-missing", "a.parquet"):
        load_dataset(tmp_path, [write(tmp_path / "a.parquet", b"PAR1")])


# --- random order


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_a_seed_draws_from_the_whole_file(name: str, tmp_path: Path) -> None:
    """With a seed, samples are other ones than the first, each once; the same for the same seed, others for another."""
    model, file = add_tokenizer(tmp_path), tmp_path / name
    if name == "a.parquet":
        parquet(file, ROWS)
    else:
        content = lines(ROWS) if "json" in name else PROSE.encode()
        write(file, gzip.compress(content) if name.endswith(".gz") else content)

    def samples(seed: int | None, count: int = 6) -> tuple[tuple[int, ...], ...]:
        return load_dataset(model, [file], num_samples=count, max_seq_length=20, shuffle_seed=seed).samples

    everything = samples(None, 500)
    assert samples(None) == everything[:6]
    assert samples(7) == samples(7)
    assert len({samples(None), samples(7), samples(8)}) == 3
    assert len(set(samples(7))) == 6
    assert samples(7, 500)[:6] == samples(7)
    assert sorted(samples(7, 500)) == sorted(everything)


def test_a_seed_passes_over_short_rows(tmp_path: Path) -> None:
    """Rows of less than two tokens and blank lines are passed over in random order too."""
    rows = b"\n".join(b'{"input_ids": [%d]}\n' % n for n in range(50)) + lines([{"input_ids": [5, 6]}])
    found = load_dataset(tmp_path, [write(tmp_path / "a.jsonl", rows)], num_samples=2, shuffle_seed=1)
    assert found.samples == ((5, 6),)


# --- no second BOS


def test_a_text_that_begins_with_bos_gets_no_other(tmp_path: Path) -> None:
    """A row or a file whose text begins with BOS has one BOS in calibration and evaluation, like one that has none."""
    model = with_bos(tmp_path / "model")
    files = {
        name: [
            write(tmp_path / f"{name}.txt", (begin + PROSE).encode()),
            write(tmp_path / f"{name}.jsonl", lines([{"text": begin + "One two"}])),
            write(tmp_path / f"{name}-pair.jsonl", lines([{"prompt": begin + "One", "completion": " two"}])),
        ]
        for name, begin in (("with", "<s>"), ("without", ""))
    }
    first, second = (
        [load_dataset(model, [file], num_samples=3, max_seq_length=20).samples for file in files[name]]
        for name in ("with", "without")
    )
    assert first == second
    assert all(row[0] == 1 and 1 not in row[1:] for samples in first for row in samples)
    one, two = (read_chunks(Tokenizer(model), files[name], [20])[0] for name in ("with", "without"))
    assert [group.digest for group in one] == [group.digest for group in two]


def test_a_template_that_begins_with_bos_gets_no_other(tmp_path: Path) -> None:
    """A conversation has the BOS of its template and none of the tokenizer."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    model = with_bos(tmp_path / "model", template)
    (row,) = load_dataset(model, [write(tmp_path / "a.jsonl", lines([{"messages": TALK}]))]).samples
    assert row[0] == 1
    assert 1 not in row[1:]
