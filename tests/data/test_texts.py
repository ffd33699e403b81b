"""The rows of an evaluation: chunks of plain texts, conversations, and which of their tokens are scored."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from helpers.errors import raises
from snugfit.data.python_docs import python_topics
from snugfit.data.texts import CHAT, check_tokenizer, find_files, read_chunks
from snugfit.data.tokenizer import Tokenizer

PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 200
TALK = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Loire."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "The Rhine, or the Danube."},
]


@pytest.fixture
def tokenizer(smollm2: Path) -> Tokenizer:
    """The packaged model's tokenizer, which puts nothing before a text."""
    return Tokenizer(smollm2)


def with_bos(smollm2: Path, directory: Path) -> Path:
    """A copy of the packaged tokenizer that starts every text with token 1."""
    directory.mkdir()
    for file in [*smollm2.glob("tokenizer*"), smollm2 / "chat_template.jinja", smollm2 / "config.json"]:
        shutil.copy(file, directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    bos = next(entry["content"] for entry in content["added_tokens"] if entry["id"] == 1)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def write(directory: Path, name: str, content: str) -> Path:
    file = directory / name
    file.write_text(content, encoding="utf-8")
    return file


def test_chunks_are_the_text_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At every length the chunks, one after the other, are the text's tokens; the rest of the text is dropped."""
    file = write(tmp_path, "a.txt", PROSE)
    groups, records = read_chunks(tokenizer, [file], [300, 128])
    ids = tokenizer.encode(PROSE, special_tokens=False)
    assert [group.context for group in groups] == [128, 300]
    for group in groups:
        assert all(len(row) == group.context for row in group.rows)
        assert len(group.rows) == len(ids) // group.context
        flat = [token for row in group.rows for token in row]
        assert flat == ids[: len(flat)]
        assert group.scored == (None,) * len(group.rows)
    assert records[0].sha256 == hashlib.sha256(PROSE.encode()).hexdigest()


def test_bos_starts_every_chunk(smollm2: Path, tmp_path: Path) -> None:
    """Where the tokenizer starts texts with BOS, so does every chunk, whose length it counts towards."""
    tokenizer = Tokenizer(with_bos(smollm2, tmp_path / "bos"))
    groups, _ = read_chunks(tokenizer, [write(tmp_path, "a.txt", PROSE)], [100])
    assert all(row[0] == 1 and len(row) == 100 for row in groups[0].rows)
    assert groups[0].rows[1][1:] == tuple(tokenizer.encode(PROSE, special_tokens=False)[99:198])


def test_limits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """`max_chunks` takes an equal share of each text, `max_tokens` the same tokens at every length."""
    files = [write(tmp_path, name, PROSE + name) for name in ("a.txt", "b.txt")]
    few, _ = read_chunks(tokenizer, files, [100, 200], max_chunks=3)
    assert [len(group.rows) for group in few] == [3, 3]
    assert [Path(source).name for source in few[0].sources] == ["a.txt", "a.txt", "b.txt"]
    same, _ = read_chunks(tokenizer, files, [100, 200], max_tokens=1600)
    flat = [[token for row in group.rows for token in row] for group in same]
    assert flat[0] == flat[1]
    assert len(flat[0]) == 1600


def test_nothing_given_is_python(tokenizer: Tokenizer) -> None:
    """Without files the text is the half of Python's documentation that calibration leaves out."""
    groups, records = read_chunks(tokenizer, [], [64], max_chunks=2)
    expected = tokenizer.encode(python_topics("evaluation")[:2000], special_tokens=False)[:128]
    assert [token for row in groups[0].rows for token in row] == expected
    assert "Python" in records[0].name


def test_only_the_assistant_is_scored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of a conversation the answers' tokens are scored, with what ends them, and no other."""
    file = write(tmp_path, "log.jsonl", json.dumps({"messages": TALK}) + "\n\n" + json.dumps({"text": PROSE}) + "\n")
    groups, records = read_chunks(tokenizer, [file], [64])
    assert [group.context for group in groups] == [CHAT]
    row, places = groups[0].rows[0], groups[0].scored[0]
    assert places is not None
    scored = tokenizer.raw.decode([row[place] for place in places])
    assert scored == "The Loire.<|im_end|>\nThe Rhine, or the Danube.<|im_end|>\n"
    assert groups[0].scored[1] is None
    assert groups[0].sources == (f"{file}:1", f"{file}:3")
    assert records[0].kind == "rows"


def test_template_that_rewrites_earlier_turns(smollm2: Path, tmp_path: Path) -> None:
    """Where a template shortens earlier answers, the last answer is still scored, the others are not."""
    directory = with_bos(smollm2, tmp_path / "t")
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[cut]{% else %}<{{ m.role }}>"
        "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer(directory)
    groups, _ = read_chunks(tokenizer, [write(tmp_path, "l.jsonl", json.dumps({"messages": TALK}))], [])
    places = groups[0].scored[0]
    assert places is not None
    assert tokenizer.raw.decode([groups[0].rows[0][p] for p in places]) == "The Rhine, or the Danube."


def test_digest_knows_what_is_scored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same tokens, scored at other places, have another digest."""
    log = write(tmp_path, "a.jsonl", json.dumps({"messages": TALK}))
    groups, _ = read_chunks(tokenizer, [log], [])
    ids = write(tmp_path, "b.jsonl", json.dumps({"input_ids": list(groups[0].rows[0])}))
    others, _ = read_chunks(tokenizer, [ids], [])
    assert others[0].rows == groups[0].rows
    assert others[0].digest != groups[0].digest
    assert read_chunks(tokenizer, [log], [])[0][0].digest == groups[0].digest


@pytest.mark.parametrize(
    ("content", "contexts", "code", "where"),
    [
        ("short", [64], "dataset-too-small", "a.txt"),
        (PROSE, [], "option-invalid", "contexts"),
        (PROSE, [1], "option-invalid", "contexts"),
        (PROSE, [64, 64], "option-invalid", "contexts"),
    ],
)
def test_bad_texts(
    tokenizer: Tokenizer, tmp_path: Path, content: str, contexts: list[int], code: str, where: str
) -> None:
    """A text shorter than a chunk, and missing, repeated or too short lengths are refused."""
    with raises(code, where):
        read_chunks(tokenizer, [write(tmp_path, "a.txt", content)], contexts)


@pytest.mark.parametrize(
    ("line", "code", "where"),
    [
        ("{", "dataset-invalid", "log.jsonl:1"),
        ('{"prompt": "x"}', "dataset-invalid", "log.jsonl:1"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "dataset-too-small", "log.jsonl"),
        ('{"messages": [{"content": "hi"}]}', "chat-template-failed", "log.jsonl:1"),
        ("", "dataset-too-small", "log.jsonl"),
    ],
)
def test_bad_logs(tokenizer: Tokenizer, tmp_path: Path, line: str, code: str, where: str) -> None:
    """A line that cannot be scored is refused by its number, a log without answers by its name."""
    with raises(code, where):
        read_chunks(tokenizer, [write(tmp_path, "log.jsonl", line)], [64])


@pytest.mark.parametrize("limit", [{"max_chunks": 0}, {"max_tokens": -1}])
def test_empty_limits(tokenizer: Tokenizer, limit: dict[str, int]) -> None:
    """A limit below 1 is refused."""
    with raises("option-invalid", next(iter(limit))):
        read_chunks(tokenizer, [], [64], **limit)


def test_other_tokenizers_are_refused(smollm2: Path, tmp_path: Path) -> None:
    """A candidate whose tokenizer makes other tokens is refused; an equal one, or none, is not."""
    reference = Tokenizer(smollm2)
    check_tokenizer(reference, smollm2, PROSE)
    check_tokenizer(reference, tmp_path, PROSE)
    other = with_bos(smollm2, tmp_path / "other")
    with raises("models-mismatch", other) as caught:
        check_tokenizer(reference, other, PROSE)
    assert "token 0" in caught.value.what


def test_folders_stand_for_their_texts(tmp_path: Path) -> None:
    """A folder gives its text and JSONL files in order; a folder without such files is refused."""
    for name in ("b.txt", "a.jsonl", "c.pdf"):
        write(tmp_path, name, "x")
    assert [file.name for file in find_files([tmp_path])] == ["a.jsonl", "b.txt"]
    (tmp_path / "empty").mkdir()
    with raises("dataset-unreadable", tmp_path / "empty"):
        find_files([tmp_path / "empty"])
