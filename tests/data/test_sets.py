"""Sets: what their YAML may say, and the samples that come of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.data.dataset import Dataset, check_files, hold_out, load_dataset
from snugfit.data.set_samples import notes_on_sources
from snugfit.data.sets import builtin_sets, load_set, parse_set
from snugfit.data.texts import read_chunks
from snugfit.data.tokenizer import Tokenizer, load_tokenizer

SET = """\
calibration_set:
  _templates:
    languages: &languages "Use {{{{ ['C', 'D', 'E'][hash(row|string) % 3] }}}}\\n***\\n"
  max_seq_length: {length}
  shuffle: true
  seed: 42
{keys}  datasets:
"""
Written = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single characters with a chat template, and no model."""
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Returns a function that writes a set of these sources (YAML of entries) and gives its path."""

    def write(*sources: str, length: int = 4096, keys: str = "", name: str = "set.yaml") -> Path:
        indented = "".join(f"    - {source.strip().replace(chr(10), chr(10) + '      ')}\n" for source in sources)
        file = tmp_path / name
        more = "".join(f"  {line}\n" for line in keys.splitlines())
        file.write_text(SET.format(length=length, keys=more) + indented, encoding="utf-8")
        return file

    return write


def rows(folder: Path, *entries: object, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return file


def texts_of(model: Path, dataset: Dataset) -> list[str]:
    tokenizer = load_tokenizer(model)
    return [tokenizer.decode(sample) for sample in dataset.samples]


def load(model: Path, file: Path, **options: Any) -> Dataset:
    return load_dataset(model, [file], **options)


def source(formatter: str, columns: str, more: str = "", name: str = "rows.jsonl", count: object = "all") -> str:
    return f"dataset: {name}\nformatter: {formatter}\ncolumns: [{columns}]\nnum_samples: {count}\n{more}"


# --- formatters


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
FORMATTED: list[tuple[str, dict[str, Any], str]] = [
    (source("chat_completion", "m"), {"m": CHAT}, "user\nHi</s>assistant\nHo</s>"),
    (source("chat_completion", "m"), {"m": json.dumps(CHAT)}, "user\nHi</s>assistant\nHo</s>"),
    (
        source("chat_completion", "m"),
        {"m": [{"role": "assistant", "content": "b", "reasoning_content": "a"}]},
        "assistant\n<unk>think<unk>a<unk><unk>think<unk>\nb</s>",
    ),
    (
        source("chat_completion", "m"),
        {"m": [{"role": "user", "content": "b", "reasoning_content": None}]},
        "user\nb</s>",
    ),
    (
        source("chat_completion_with_sysprompt", "s, c"),
        {
            "s": "Be",
            "c": [
                {"from": "user", "value": "a"},
                {"from": "dog", "value": "no"},
                {"role": "assistant", "content": "b"},
            ],
        },
        "system\nBe</s>user\na</s>assistant\nb</s>",
    ),
    (source("chat_completion_with_sysprompt", "s, c"), {"s": "", "c": CHAT}, "user\nHi</s>assistant\nHo</s>"),
    (
        source("sharegpt", "c"),
        {"c": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "system\ns</s>user\na</s>assistant\nb</s>",
    ),
    (
        source("sharegpt", "c"),
        {"c": [{"from": "tool", "value": "t"}, {"value": "no"}, {"from": "gpt", "value": "b"}]},
        "user\nt</s>assistant\nb</s>",
    ),
    (
        source("sharegpt", "c", "formatter_params: {roles: {bot: assistant}}"),
        {"c": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
        "user\na</s>assistant\nb</s>",
    ),
    (source("prompt_answer", "q, a"), {"q": "Q", "a": "A"}, "user\nQ</s>assistant\nA</s>"),
    (source("prompt_answer", "q, a"), {"q": "Q", "a": None}, "user\nQ</s>"),
    (source("prompt_answer", "q, a"), {"q": "", "a": "A"}, "assistant\nA</s>"),
    (
        source("prompt_answer", "q, a", "formatter_params: {prefix: 'P ', sys_prompt: S}"),
        {"q": "Q", "a": "A"},
        "system\nS</s>user\nP Q</s>assistant\nA</s>",
    ),
    (source("raw_text", "t"), {"t": "T"}, "assistant\nT</s>"),
    (source("raw_text", "t").replace("[t]", "t"), {"t": "T"}, "assistant\nT</s>"),
    (source("raw_text", "t", 'formatter_params: {prefix: "P\\n"}'), {"t": "T"}, "user\nP\n</s>assistant\nT</s>"),
    (
        source("raw_text", "t", "formatter_params: {prefix: '{{ row.t|upper }} {{ row.k }}'}"),
        {"t": "it", "k": "k"},
        "user\nIT k</s>assistant\nit</s>",
    ),
    (
        source("deepmind_code_contests", "name"),
        {"name": "n", "description": "D", "solutions": {"language": [3, 2], "solution": ["x", "y"]}},
        "user\nD</s>assistant\nx</s>",
    ),
    (
        source("deepmind_code_contests", "data"),
        {"data": {"description": "D", "solutions": {"solution": []}}},
        "user\nD</s>",
    ),
    (source("text", "t"), {"t": "plain"}, "plain"),
    (source("text", "t", "formatter_params: {prefix: '{% if row.t %}So {% endif %}'}"), {"t": "plain"}, "So plain"),
    (source("text", "t", "formatter_params: {prefix: 'So '}"), {"t": "plain"}, "So plain"),
    ("dataset: rows.jsonl\nnum_samples: all", {"text": "plain"}, "plain"),
    ("dataset: rows.jsonl\nnum_samples: all", {"messages": CHAT}, "user\nHi</s>assistant\nHo</s>"),
    (
        "dataset: rows.jsonl\nnum_samples: all\nformatter_params: {sys_prompt: S}",
        {"conversations": [{"from": "human", "value": "a"}]},
        "system\nS</s>user\na</s>",
    ),
]


@pytest.mark.parametrize(("entry", "row", "expected"), FORMATTED)
def test_formatters(
    entry: str, row: dict[str, Any], expected: str, model: Path, written: Written, tmp_path: Path
) -> None:
    """Each formatter makes the conversation or text that its name promises, from the columns that the set names."""
    rows(tmp_path, row)
    assert texts_of(model, load(model, written(entry))) == [expected]


def test_templates_choose_by_the_whole_row(model: Path, written: Written, tmp_path: Path) -> None:
    """An anchor's template, and the hash of the row that any order of keys has: one choice a row, all entries used."""
    entry = source("raw_text", "t", "formatter_params:\n  prefix: *languages")
    rows(tmp_path, *({"t": "x" * n, "id": n} for n in range(1, 30)))
    first = texts_of(model, load(model, written(entry)))
    rows(tmp_path, *({"id": n, "t": "x" * n, "gone": None} for n in range(1, 30)))
    assert texts_of(model, load(model, written(entry))) == first
    assert {text.partition("Use ")[2][0] for text in first} == {"C", "D", "E"}


def test_tools_and_template_options_reach_the_template(written: Written, tmp_path: Path) -> None:
    """A column of tools and `chat_template_kwargs` are variables of the chat template, also JSON in a text."""
    template = "{{ tools[0].name }} {{ mood }} {% for m in messages %}{{ m.content }}{% endfor %}"
    model = add_tokenizer(tmp_path / "tokenizer", template=template)
    more = "formatter_params: {tools: t, chat_template_kwargs: {mood: glad}}"
    file = written(source("prompt_answer", "q, a", more))
    for tools in ([{"name": "find"}], json.dumps([{"name": "find"}])):
        rows(tmp_path, {"q": "Q", "a": "A", "t": tools})
        assert texts_of(model, load(model, file)) == ["find glad QA"]


def test_reasoning_stays_a_key_where_the_template_reads_it(written: Written, tmp_path: Path) -> None:
    """A template that reads `reasoning_content` gets it; any other finds it between tags in the content."""
    template = "{% for m in messages %}{{ m.reasoning_content }}. {{ m.content }}{% endfor %}"
    model = add_tokenizer(tmp_path / "tokenizer", template=template)
    rows(
        tmp_path,
        {"m": [{"role": "assistant", "content": "b", "reasoning_content": "a"}], "r": "why", "q": "", "a": "A"},
    )
    assert texts_of(model, load(model, written(source("chat_completion", "m")))) == ["a. b"]
    entry = source("prompt_answer", "q, a", "formatter_params: {reasoning: r}")
    assert texts_of(model, load(model, written(entry))) == ["why. A"]


# --- files


def test_any_kind_of_file(model: Path, written: Written, tmp_path: Path) -> None:
    """JSONL, JSON (a list or lines), Parquet and gzip hold the same rows; a folder holds its files, or its split's."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    entries = [{"q": "one", "a": "A"}, {"q": "two", "a": None}]
    jsonl = rows(tmp_path, *entries)
    (tmp_path / "list.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    shutil.copy(jsonl, tmp_path / "lines.json")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(entries), tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows(folder, entries[0], name="train-0.jsonl")
    rows(folder, entries[1], name="train-1.jsonl")
    rows(folder, {"q": "no"}, name="test.jsonl")
    names = ("rows.jsonl", "list.json", "lines.json", "rows.jsonl.gz", "rows.parquet", "folder", str(jsonl))
    found = [load(model, written(source("prompt_answer", "q, a", name=name))).samples for name in names]
    assert found == [found[0]] * len(names)
    assert len(found[0]) == 2


def test_texts_are_cut_and_line_endings_do_not_count(model: Path, written: Written, tmp_path: Path) -> None:
    """A text gives samples of the maximum length; files of another system, the set among them, give the same digest."""
    text = "".join(f"line {chr(97 + n % 26)}\n" for n in range(200))
    file = written(
        "dataset: book.txt\nnum_samples: 5", source("raw_text", "t", 'formatter_params: {prefix: "a\\nb"}'), length=50
    )
    content = json.dumps({"t": "a row"}) + "\n"
    digests = []
    for ending in ("\n", "\r\n"):
        (tmp_path / "book.txt").write_bytes(text.replace("\n", ending).encode())
        (tmp_path / "rows.jsonl").write_bytes(content.replace("\n", ending).encode())
        file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", ending.encode()))
        found = load(model, file)
        digests.append((found.digest, found.set_digest))
        assert [len(sample) for sample in found.samples[:5]] == [50] * 5
    assert digests[0] == digests[1]


def test_random_rows(model: Path, written: Written, tmp_path: Path) -> None:
    """`draw: random` draws from all rows, by the seed alone; `shuffle_seed` is another seed."""
    rows(tmp_path, *({"text": "x" * n} for n in range(2, 2002)))
    entry = "dataset: rows.jsonl\nnum_samples: 20\n"
    lengths = {}
    for name, more, options in [
        ("first", "", {}),
        ("random", "draw: random", {}),
        ("again", "draw: random", {}),
        ("other", "", {"shuffle_seed": 7}),
    ]:
        lengths[name] = [len(sample) for sample in load(model, written(entry + more), **options).samples]
    assert lengths["first"] == list(range(2, 22))
    assert lengths["random"] == lengths["again"] != lengths["other"]
    assert all(max(lengths[name]) > 1000 and len(set(lengths[name])) == 20 for name in ("random", "other"))


def test_a_large_text_is_drawn_without_reading_it_whole(
    model: Path, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random pieces of a text that is too large are read at random places, one in each of equal parts."""
    monkeypatch.setattr("snugfit.data.set_samples._WHOLE_FILE", 1000)
    text = "".join(f"{'abcdefghij'[n // 1000] * 9}\n" for n in range(10_000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    file = written("dataset: book.txt\nnum_samples: 10\ndraw: random", length=8)
    found = texts_of(model, load(model, file))
    assert sorted(sample[0] for sample in found) == list("abcdefghij")
    assert texts_of(model, load(model, file)) == found


def test_rows_are_read_one_after_another(model: Path, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source without end is no problem where a number of samples is wanted: only those rows are read."""
    taken = []

    def endless(_: Path) -> Any:
        for number in range(10**12):
            taken.append(number)
            yield "endless:1", {"text": "some text"}

    monkeypatch.setattr("snugfit.data.sources._rows_of", endless)
    file = written("dataset: rows.jsonl\nnum_samples: 3")
    (file.parent / "rows.jsonl").touch()
    assert len(load(model, file).samples) == 3
    assert len(taken) == 3


# --- packing and limits


def test_packing(model: Path, written: Written, tmp_path: Path) -> None:
    """Documents follow each other with one end token behind each; all samples are full, the rest is left out."""
    rows(tmp_path, *({"text": letter * 7} for letter in "abcdefgh"))
    file = written("dataset: rows.jsonl\nnum_samples: all\npacking: true", length=20)
    found = load(model, file)
    stream = "".join(f"{letter * 7}</s>" for letter in "abcdefgh").replace("</s>", "|")
    assert [text.replace("</s>", "|") for text in texts_of(model, found)] == [stream[:20], stream[20:40], stream[40:60]]
    rows(tmp_path, {"messages": CHAT}, {"messages": CHAT})
    chat = texts_of(model, load(model, written("dataset: rows.jsonl\nnum_samples: all\npacking: true", length=40)))
    assert chat == ["user\nHi</s>assistant\nHo</s>user\nHi</s>assistant\nHo</s>"[: len(chat[0])]]
    assert "</s></s>" not in chat[0]


def test_budgets(model: Path, written: Written, tmp_path: Path) -> None:
    """`max_tokens` of a source ends it; that of the set, and `num_samples`, leave samples of all of it at random."""
    rows(tmp_path, *({"text": "a" * 10} for _ in range(20)))
    rows(tmp_path, *({"text": "b" * 10} for _ in range(20)), name="others.jsonl")
    one = "dataset: rows.jsonl\nnum_samples: all\n"
    both = (one, one.replace("rows", "others"))
    assert load(model, written(one + "max_tokens: 55")).tokens == 50
    limited = load(model, written(*both, keys="max_tokens: 205"))
    assert limited.tokens == 200
    assert len(limited.shares) == 2
    assert all(share > 3 for share in limited.shares)
    assert [use.samples for use in limited.uses] == list(limited.shares)
    even = load(model, written(*both, keys="max_tokens: 205").rename(tmp_path / "b.yaml"), num_samples=8)
    assert len(even.samples) == 8
    file = written(*both)
    file.write_text(file.read_text(encoding="utf-8").replace("shuffle: true", "shuffle: false"), encoding="utf-8")
    assert load(model, file, num_samples=4).shares == (2, 2)


def test_a_budget_cuts_what_is_scored(model: Path, written: Written, tmp_path: Path) -> None:
    """A sample that `max_tokens` cuts has no scored position beyond it; one without any is skipped with this reason."""
    rows(tmp_path, *({"prompt": "a" * count, "completion": "b" * 20} for count in (30, 4)))
    file = written("dataset: rows.jsonl\nnum_samples: all\nmax_tokens: 12")
    (chunks,), _ = read_chunks(Tokenizer(model), [file], [2048])
    assert [len(row) for row in chunks.rows] == [12]
    assert chunks.scored == (tuple(range(4, 12)),)
    assert any("1 of 2 rows skipped (1 x no token to score)" in note for note in chunks.notes)


@pytest.mark.parametrize("more", ["", "packing: true", "formatter: text\ncolumns: [text]"])
@pytest.mark.parametrize("text", [False, True])
def test_a_dataset_named_again_gives_its_next_rows(
    more: str, text: bool, model: Path, written: Written, tmp_path: Path
) -> None:
    """Entries that read a dataset in one way share its rows in order; one that reads it otherwise begins again."""
    letters = "abcdefgh"
    rows(tmp_path, *({"text": letter * 20} for letter in letters))
    for letter in letters:
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{letter}.txt").write_text(letter * 20, encoding="utf-8")
    entry = f"dataset: {'folder' if text else 'rows.jsonl'}\n{more}\nnum_samples: "
    once = load(model, written(entry + "6", length=20))
    twice = load(model, written(entry + "3", entry + "2\ncategory: Other\ndraw: first", entry + "1", length=20))
    assert twice.samples == once.samples
    assert twice.shares == (3, 2, 1)
    with raises("dataset-too-small", where="datasets[1]") as caught:
        load(model, written(entry + "all", entry + "1", length=20))
    assert "earlier entries" in str(caught.value)
    other = "dataset: rows.jsonl\nformatter: raw_text\ncolumns: [text]\nnum_samples: 1"
    shown = texts_of(model, load(model, written(entry + "3", other, length=40)))
    assert "a" in shown[-1].removeprefix("assistant")


def test_one_text_named_again_is_cut_further(model: Path, written: Written, tmp_path: Path) -> None:
    """The second entry of a text begins behind the samples of the first, and a random one draws as before."""
    (tmp_path / "text.txt").write_text("".join(letter * 20 for letter in "abcdefgh"), encoding="utf-8")
    entry = "dataset: text.txt\nnum_samples: "
    assert load(model, written(entry + "2", entry + "3", length=20)).samples == (
        load(model, written(entry + "5", length=20)).samples
    )
    packed = "dataset: text.txt\npacking: true\nnum_samples: "
    assert load(model, written(packed + "2", packed + "3", length=20)).samples == (
        load(model, written(packed + "5", length=20)).samples
    )
    few = load(model, written(entry + "6", entry + "3", length=20))
    assert few.shares == (6, 2)
    assert notes_on_sources(few.uses) == ["text.txt: 2 samples, and 3 were asked for"]
    drawn = load(model, written(entry + "8", entry + "8", keys="draw: random", length=20))
    assert drawn.shares == (8, 8)


@pytest.mark.parametrize("more", ["", "packing: true"])
def test_limits_on_the_set_are_no_lack_of_samples(more: str, model: Path, written: Written, tmp_path: Path) -> None:
    """A source that has all that its set asks for is not noted when a run asks for fewer; one that lacks some is."""
    (tmp_path / "text.txt").write_text("abcdefgh" * 100, encoding="utf-8")
    file = written(f"dataset: text.txt\n{more}\nnum_samples: 32", length=20)
    assert notes_on_sources(load(model, file, num_samples=8).uses) == []
    assert notes_on_sources(load(model, file).uses) == []
    lacking = written(f"dataset: text.txt\n{more}\nnum_samples: 64", length=20)
    (note,) = notes_on_sources(load(model, lacking, num_samples=8).uses)
    assert note.endswith("40 samples, and 64 were asked for")


@pytest.mark.parametrize("params", ["{sys_prompt: S}", "{prefix: P}", "{sys_prompt: S, prefix: P}"])
@pytest.mark.parametrize("first", [[], ["system"], ["user"], ["system", "user"]])
def test_only_the_completion_is_scored(
    params: str, first: list[str], model: Path, written: Written, tmp_path: Path
) -> None:
    """Of lists of messages only the completion's answer is scored, whatever messages the parameters add."""
    prompt = [{"role": role, "content": "x"} for role in first] + [{"role": "assistant", "content": "earlier"}]
    rows(tmp_path, {"prompt": prompt, "completion": [{"role": "assistant", "content": "later"}]})
    file = written(f"dataset: rows.jsonl\nnum_samples: all\nformatter_params: {params}")
    (chunks,), _ = read_chunks(Tokenizer(model), [file], [2048])
    assert chunks.scored[0] is not None
    text = load_tokenizer(model).decode([chunks.rows[0][place] for place in chunks.scored[0]])
    assert "later" in text
    assert "earlier" not in text


def test_lengths(model: Path, written: Written, tmp_path: Path) -> None:
    """Long rows are cut at the set's length, at the model's positions, or at what the caller asks for."""
    rows(tmp_path, {"text": "a" * 100})
    file = written("dataset: rows.jsonl\nnum_samples: all", length=60)
    asked: list[tuple[dict[str, Any], int]] = [
        ({}, 60),
        ({"positions": 40}, 40),
        ({"max_seq_length": 80}, 80),
        ({"positions": 70}, 60),
    ]
    for options, length in asked:
        assert [len(sample) for sample in load(model, file, **options).samples] == [length]


def test_samples_are_held_out_of_every_source(model: Path, written: Written, tmp_path: Path) -> None:
    """Some of each source, so that both parts have all of them; what each source gave stays known."""
    rows(tmp_path, *({"text": "a" * n} for n in range(2, 22)))
    rows(tmp_path, *({"text": "b" * n} for n in range(2, 12)), name="others.jsonl")
    found = load(model, written(*(f"dataset: {name}.jsonl\nnum_samples: all" for name in ("rows", "others"))))
    kept, out = hold_out(found, 10)
    assert (kept.shares, out.shares) == ((18, 9), (2, 1))
    assert not set(kept.samples) & set(out.samples)
    assert out.uses == found.uses


# --- rows that cannot be used


def test_bad_rows_are_skipped_and_counted(model: Path, written: Written, tmp_path: Path) -> None:
    """A row without its column, damaged, refused by the template or too short is counted with its reason."""
    file = rows(tmp_path, {"m": CHAT}, {"n": CHAT}, {"m": [{"role": "tool", "content": "x"}]}, {"m": []}, {"m": "text"})
    with file.open("a", encoding="utf-8") as stream:
        stream.write("no JSON\n[1]\n" + json.dumps({"m": CHAT}) + "\n")
    found = load(model, written(source("chat_completion", "m")))
    use = found.uses[0]
    assert (use.rows, use.samples, sum(use.skipped.values())) == (8, 2, 6)
    assert any("it has `n`" in reason for reason in use.skipped)
    assert any("no tools" in reason for reason in use.skipped)


@pytest.mark.parametrize(
    ("entry", "row", "code", "words"),
    [
        (source("raw_text", "t", "formatter_params: {prefix: '{{ row.x }}'}"), {"t": "a"}, "dataset-invalid", "x"),
        (source("prompt_answer", "question, b"), {"questions": "a", "b": "c"}, "dataset-invalid", "`questions`"),
        (source("chat_completion", "m"), {"m": [{"role": "tool", "content": "x"}]}, "chat-template-failed", "no tools"),
        ("dataset: rows.jsonl\nnum_samples: 2", {"input_ids": [10**6, 1]}, "token-out-of-range", "1000000"),
        ("dataset: rows.jsonl\nnum_samples: 2", {"unknown": 1}, "dataset-invalid", "unknown"),
        *(
            (
                f"dataset: rows.jsonl\nnum_samples: 2\nformatter_params: {{{name}: {value}}}",
                row,
                "dataset-invalid",
                f"`{name}`",
            )
            for name, value in (("sys_prompt", "S"), ("tools", "t"), ("chat_template_kwargs", "{a: 1}"))
            for row in ({"text": "a", "t": []}, {"prompt": "a", "completion": "b", "t": []}, {"input_ids": [1, 2]})
        ),
    ],
)
def test_a_source_of_bad_rows_alone(
    entry: str, row: dict[str, Any], code: str, words: str, model: Path, written: Written, tmp_path: Path
) -> None:
    """After a hundred bad rows nothing more is read: the error names the source, and the reason."""
    rows(tmp_path, *([row] * 300))
    with raises(code, where="set.yaml:8: datasets[0]") as caught:
        load(model, written(entry), vocabulary=64)
    assert words in str(caught.value)
    assert "100 rows" in str(caught.value)


def test_a_set_may_go_on_without_a_source(model: Path, written: Written, tmp_path: Path) -> None:
    """`unusable_sources: skip` leaves out a source that the chat template refuses, counted; not all of them."""
    rows(tmp_path, *([{"m": [{"role": "tool", "content": "x"}]}] * 5), name="tools.jsonl")
    rows(tmp_path, *({"m": CHAT, "n": n} for n in range(4)))
    tools, chats = source("chat_completion", "m", name="tools.jsonl"), source("chat_completion", "m")
    with raises("chat-template-failed", where="datasets[1]"):
        load(model, written(chats, tools))
    found = load(model, written(chats, tools, keys="unusable_sources: skip"))
    assert (found.shares, found.uses[1].samples, sum(found.uses[1].skipped.values())) == ((4, 0), 0, 5)
    assert any("tools.jsonl: 5 of 5 rows skipped" in note for note in notes_on_sources(found.uses))
    kept, out = hold_out(found, 4)
    assert (kept.shares, out.shares) == ((3, 0), (1, 0))
    with raises("dataset-too-small", where="set.yaml"):
        load(model, written(tools, keys="unusable_sources: skip"))
    with raises("file-missing"):
        load(model, written(chats, "dataset: gone.jsonl\nnum_samples: 1", keys="unusable_sources: skip"))


def test_an_empty_source(model: Path, written: Written, tmp_path: Path) -> None:
    """A file without rows, and texts without tokens."""
    for name in ("rows.jsonl", "text.txt"):
        (tmp_path / name).touch()
        with raises("dataset-too-small", where="datasets[0]"):
            load(model, written(f"dataset: {name}\nnum_samples: 3"))


def test_a_tokenizer_without_a_chat_template(written: Written, tmp_path: Path) -> None:
    """Conversations are refused at the formatter before anything is read, or joined where the set allows it."""
    model = add_tokenizer(tmp_path / "tokenizer", template=None)
    rows(tmp_path, {"m": CHAT, "messages": CHAT})
    with raises("chat-template-failed", where="formatter"):
        load(model, written(source("chat_completion", "m", name="missing.jsonl")))
    with raises("chat-template-failed", where="datasets[0]"):
        load(model, written("dataset: rows.jsonl\nnum_samples: 1"))
    joined = written(source("chat_completion", "m"), keys="without_template: join")
    assert texts_of(model, load(model, joined)) == ["Hi\n\nHo"]


# --- the YAML

ONE_COLUMN = (
    "calibration_set: {{datasets: [{{dataset: a, num_samples: 1, columns: [a], formatter: {}, formatter_params: {}}}]}}"
)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1", "set.yaml", "calibration_set"),
        ("calibration_sets: {datasets: []}", "set.yaml", "calibration_sets"),
        ("calibration_set: {datasets: []}", "datasets", ""),
        ("calibration_set: {datasets: [{dataset: a}]}", "num_samples", ""),
        ("calibration_set: {datasets: [{dataset: a, num_samples: 0}]}", "num_samples", "0"),
        ("calibration_set: {datasets: [{dataset: a, num_samples: some}]}", "num_samples", "some"),
        ("calibration_set: {datasets: [{dataset: a, num_samples: true}]}", "num_samples", ""),
        ("calibration_set: {datasets: [{dataset: a, num_samples: 1, colums: [b]}]}", "colums", "columns"),
        ("calibration_set: {seeds: 1, datasets: [{dataset: a, num_samples: 1}]}", "seeds", "seed"),
        ("calibration_set: {max_seq_length: 1, datasets: [{dataset: a, num_samples: 1}]}", "max_seq_length", ""),
        ("calibration_set: {max_tokens: 1, datasets: [{dataset: a, num_samples: 1}]}", "max_tokens", ""),
        ("calibration_set: {draw: last, datasets: [{dataset: a, num_samples: 1}]}", "draw", ""),
        ("calibration_set: {datasets: [{dataset: a, num_samples: 1, formatter: share_gpt}]}", "formatter", "sharegpt"),
        ("calibration_set: {datasets: [{dataset: a, num_samples: 1, formatter: xyz}]}", "formatter", "prompt_answer"),
        ("calibration_set: {datasets: [{dataset: a, num_samples: 1, formatter: raw_text}]}", "columns", "1 column"),
        (
            ONE_COLUMN.format("raw_text", "{prefx: a}"),
            "formatter_params.prefx",
            "prefix",
        ),
        (
            ONE_COLUMN.format("raw_text", "{prefix: '{{ row.__class__ }}'}"),
            "formatter_params.prefix",
            "__class__",
        ),
        (
            ONE_COLUMN.format("raw_text", "{prefix: '{% iff row.a %}b{% endif %}'}"),
            "formatter_params.prefix",
            "iff",
        ),
        (
            ONE_COLUMN.format("sharegpt", "{roles: {a: boss}}"),
            "formatter_params.roles",
            "boss",
        ),
        ("calibration_set: {datasets: [{dataset: a, num_samples: 1}]}\nother: 1", "other", ""),
    ],
)
def test_yaml_that_is_no_set(text: str, place: str, words: str) -> None:
    """Every mistake is named at its line and key, with the nearest name that there is."""
    with raises("dataset-set-invalid", where="set.yaml") as caught:
        parse_set(text, name="set", where="set.yaml")
    assert place in caught.value.where
    assert words in str(caught.value)


def test_sources_that_do_not_exist(model: Path, written: Written, tmp_path: Path) -> None:
    """A missing file names the nearest; so do a set that is missing, and a built-in source."""
    rows(tmp_path, {"text": "some"})
    for name, code, near in (
        ("row.jsonl", "file-missing", "rows.jsonl"),
        ("builtin:python", "dataset-not-found", "python-"),
    ):
        with raises(code, where="datasets[0].dataset") as caught:
            load(model, written(f"dataset: {name}\nnum_samples: 1"))
        assert near in caught.value.remedy
    with raises("file-missing", where="defaults.yaml") as caught:
        check_files(["defaults.yaml"])
    assert "default" in caught.value.remedy
    with raises("file-missing", where="defaults") as caught:
        check_files(["defaults"])
    with raises("option-conflict"):
        check_files([tmp_path / "rows.jsonl", "default"])
    for key in ("revision", "subset"):
        with raises("dataset-set-invalid", where=key):
            load(model, written(f"dataset: rows.jsonl\nnum_samples: 1\n{key}: main"))
    with raises("hub-unreachable", where="datasets[0].dataset") as caught:
        load(model, written("dataset: rowsjsonl\nnum_samples: 1"))
    assert "no such file beside the set" in caught.value.what


@pytest.mark.parametrize("name", builtin_sets())
def test_the_sets_of_this_package(name: str) -> None:
    """Each is valid, says what it is for, and gives every source a category."""
    loaded = load_set(name)
    assert loaded.set.description
    assert all(entry.category for entry in loaded.set.datasets)


# --- the same on every machine


def test_one_digest_in_every_process(model: Path, written: Written, tmp_path: Path) -> None:
    """A process with another seed of Python's hash, on files with other line endings, gives the digest of this one."""
    rows(tmp_path, *({"t": f"text {chr(97 + n)}", "id": n} for n in range(26)))
    more = "formatter_params:\n  prefix: *languages\ndraw: random"
    file = written(source("raw_text", "t", more, count=12), "dataset: book.txt\nnum_samples: 4", length=64)
    (tmp_path / "book.txt").write_text("A line of a book.\n" * 100, encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from snugfit.data.dataset import load_dataset\n"
        "print(load_dataset(Path(sys.argv[1]), [Path(sys.argv[2])]).digest)"
    )
    here = load_dataset(model, [file]).digest
    for part in (file, tmp_path / "book.txt", tmp_path / "rows.jsonl"):
        part.write_bytes(part.read_bytes().replace(b"\n", b"\r\n"))
    command = [sys.executable, "-c", script, str(model), str(file)]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here
    assert Tokenizer(model).chat_template
