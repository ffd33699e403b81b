"""A whole report: its files, links, tables and metadata, and that nothing in it was not measured."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.report_runs import (
    bench_record,
    eval_record,
    quantize_record,
    serve_record,
    tasks_record,
    write_real_runs,
    write_runs,
)
from snugfit.cli.app import app
from snugfit.publishing.report import make_report
from snugfit.records.quantize import RECORD_FILE
from snugfit.records.reading import parse_record, read_document
from snugfit.records.report import REPORT_FILE
from snugfit.report.plots import Plot


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: drawing takes most of a report's time."""
    monkeypatch.setattr("snugfit.publishing.report.draw", empty_plots)


def empty_plots(plot: Plot, directory: Path) -> list[str]:
    names = [f"{plot.name}.png", f"{plot.name}.svg"]
    for name in names:
        (directory / name).write_bytes(b"")
    return names


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, make_tiny: MakeTiny) -> Path:
    """The report of a checkpoint whose files are there."""
    folder = tmp_path_factory.mktemp("real")
    source = make_tiny("llama", max_position_embeddings=32768)
    card = "license: other\nlicense_name: mine\nlicense_link: https://example.org/l\nlanguage: [en, de]\n"
    (source / "README.md").write_text(f"---\n{card}---\n# Base\n")
    runs = write_real_runs(folder, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("snugfit.publishing.report.draw", empty_plots)
        make_report(runs, output_dir=folder / "report", base_model="org/made-up", repo="me/made-up-hybrid")
    return folder / "report"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of every kind of record."""
    folder = tmp_path_factory.mktemp("made")
    make_report(write_runs(folder), output_dir=folder / "report", base_model="org/made-up", license="apache-2.0")
    return folder / "report"


class _Page(HTMLParser):
    """What a page refers to, its ids, and whether its elements are nested soundly."""

    VOID = frozenset({"meta", "link", "br", "input", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for key, value in attrs if key in ("src", "href") and value is not None]
        self.ids += [name for name in (found.get("id"),) if name]
        for key in ("aria-labelledby", "aria-describedby"):
            self.links += [f"#{name}" for name in (found.get(key) or "").split()]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def both(real: Path, made: Path) -> list[Path]:
    return [real, made]


def test_the_files_are_those_of_its_record(real: Path) -> None:
    """The record lists every other file, with the sources' digests; it reads as a record."""
    document = read_document(real / REPORT_FILE)
    assert document is not None
    record = parse_record(document, "")
    names = {str(file.relative_to(real)) for file in real.rglob("*") if file.is_file()}
    assert set(record.files) == names - {REPORT_FILE}
    assert {
        "README.md",
        "index.html",
        ".eval_results/gsm8k.yaml",
        "plots/kl-by-context.svg",
        "tables/context.csv",
    } <= names
    assert len(record.sources) == 6
    assert record.unknown == ()


def test_no_torch_is_imported(real: Path, tmp_path: Path) -> None:
    """A report reads records and headers alone."""
    script = (
        "import sys\nfrom snugfit.publishing import report\nreport.draw = lambda plot, folder: []\n"
        f"report.make_report({str(real.parent / 'made-up-hybrid')!r}, output_dir={str(tmp_path / 'out')!r})\n"
        "print(sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_links_lead_to_files(real: Path, made: Path) -> None:
    """Every relative link and picture of the card is a file, every reference within the page an id, unique."""
    for folder in both(real, made):
        card = ModelCard.load(folder / "README.md").text
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", card) if "://" not in target]
        assert len(targets) > 30
        assert [target for target in targets if not (folder / target).is_file()] == []
        page = _Page((folder / "index.html").read_text())
        assert len(page.ids) == len(set(page.ids))
        assert [link for link in page.links if link[1:] not in page.ids and not link.startswith("data:")] == []


def test_the_page_asks_nobody(real: Path) -> None:
    """No address outside the page but in the text of commands; its policy forbids all."""
    text = (real / "index.html").read_text()
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_tables_agree_in_every_form(real: Path, made: Path) -> None:
    """CSV and JSON have the same numbers in full, Markdown one row for each, of as many cells as its head."""
    for folder in both(real, made):
        for file in sorted((folder / "tables").glob("*.csv")):
            rows = list(csv.DictReader(file.open(newline="")))
            document = json.loads(file.with_suffix(".json").read_text())
            assert len(rows) == len(document["rows"]) > 0
            for row, entry in zip(rows, document["rows"], strict=True):
                assert row == {key: "" if value is None else str(value) for key, value in entry.items()}
            tokens = MarkdownIt().enable("table").parse(file.with_suffix(".md").read_text())
            assert [t.type for t in tokens].count("tr_open") == len(rows) + 1


def test_tables_of_the_card_are_whole(real: Path, made: Path) -> None:
    """Every line of a table has as many cells as its head, and a renderer takes each for a table."""
    for folder in both(real, made):
        text = ModelCard.load(folder / "README.md").text
        blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
        for block in blocks:
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(counts) == 1, block
        tokens = MarkdownIt().enable("table").parse(text)
        assert [token.type for token in tokens].count("table_open") == len(blocks) > 5


def test_the_metadata(real: Path, made: Path) -> None:
    """What the Hub reads: from options, records and the original's card; nothing is made up."""
    data = ModelCard.load(real / "README.md").data.to_dict()
    assert data == {
        "base_model": "org/made-up",
        "base_model_relation": "quantized",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "mine",
        "license_link": "https://example.org/l",
        "pipeline_tag": "text-generation",
        "quantized_by": "me",
        "tags": ["quantized", "compressed-tensors", "snugfit", "fp8"],
    }
    data = ModelCard.load(made / "README.md").data.to_dict()
    assert data["datasets"] == ["org/chats"]  # the one with a commit of the Hub; notes.txt is a file
    assert data["license"] == "apache-2.0"
    assert "quantized_by" not in data
    assert "pipeline_tag" not in data  # its config is not there


@pytest.mark.usefixtures("no_plots")
def test_scores_of_registered_benchmarks(real: Path, tmp_path: Path) -> None:
    """A file that huggingface_hub reads, in percent; none for a run with a limit, or of the original."""
    (entry,) = parse_eval_result_entries(yaml.safe_load((real / ".eval_results/gsm8k.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 75.0)
    assert "200 items" in (entry.notes or "")
    (tmp_path / RECORD_FILE).write_text(quantize_record().to_json())
    records = (
        tasks_record("made-up-hybrid", 150, limit=200, tasks=("gsm8k",)),
        tasks_record("made-up", 150, tasks=("gsm8k",)),
    )
    for n, record in enumerate(records):
        (tmp_path / f"tasks-{n}.json").write_text(record.to_json())
    make_report(tmp_path, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / ".eval_results").exists()
    assert "limit of items are not comparable" in (tmp_path / "out" / "README.md").read_text()


def test_the_figures_are_the_records(made: Path) -> None:
    """Numbers of the records stand in card and page as they are."""
    card, page = (made / "README.md").read_text(), (made / "index.html").read_text()
    bench, evaluated = bench_record(), eval_record()
    kl = evaluated.contexts[3].models[1].kl
    assert kl is not None
    prefill = bench.runs[1].cells[0].prefill
    assert prefill is not None
    for text in (card, page):
        assert f"{kl.mean:.4f} ± {kl.standard_error:.4f}" in text
        assert f"{prefill.median:,.1f}" in text
        assert "0.24.0 on NVIDIA H100" in text  # tried with this file: benchmark and start
        assert "c" * 64 in text  # the calibration set's digest
        assert "0.0940 ± 0.0030" in text  # the way that was kept
        assert "The plan beats nvfp4." in text
        assert "outliers of its inputs" in text or text is card
        assert "400,000" in text  # tokens in the KV cache
    refused = bench.runs[0].cells[-1]
    assert refused.status == "refused"
    assert f"refused: {refused.reason}" in card


@pytest.mark.usefixtures("no_plots")
def test_what_was_not_measured_is_absent(tmp_path: Path) -> None:
    """A record of quantize alone: no loss, no speed, no memory, and the card says that nothing was measured."""
    (tmp_path / RECORD_FILE).write_text(quantize_record(trials=(), held_out=None, input_saturation=()).to_json())
    record = make_report(tmp_path, output_dir=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    page = _Page((tmp_path / "out" / "index.html").read_text())
    for word in ("What was lost", "How fast", "Does it fit", "perplexity", "Ways that were tried"):
        assert word not in card
        assert word not in [text.strip() for text in page.texts]
    assert "Nothing was measured of what this checkpoint lost" in card
    assert record.unknown == ("base_model", "license", "quantized_by")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert set(data) == {"library_name", "tags", "datasets"}


@pytest.mark.usefixtures("no_plots")
def test_without_a_checkpoint_there_is_no_card(tmp_path: Path) -> None:
    """Results alone give tables, plots and a page."""
    (tmp_path / "eval.json").write_text(eval_record().to_json())
    record = make_report(tmp_path, output_dir=tmp_path / "out")
    assert "README.md" not in record.files
    assert {"index.html", "tables/evaluation.csv", "plots/kl-by-context.png"} <= set(record.files)
    assert record.checkpoint_digest is None


HOSTILE = '<script>alert(1)</script> | **x** ](javascript:alert(1)) `y` </script> "&amp; \\ {{ 7*7 }} [z]'


@pytest.mark.usefixtures("no_plots")
def test_hostile_names(tmp_path: Path) -> None:
    """Names and messages out of records are text, in Markdown, HTML and the page's data alike."""
    record = quantize_record(HOSTILE, recipe=HOSTILE, source=HOSTILE, dataset={"source": HOSTILE, "digest": HOSTILE})
    names = (HOSTILE, "b")
    bench = bench_record()
    server = replace(bench.runs[0].server, name=HOSTILE, model=HOSTILE, root=None, engine=HOSTILE)
    records: list[Any] = [
        record,
        eval_record(names),
        replace(bench, runs=(replace(bench.runs[0], server=server),), ratios=()),
        replace(serve_record(HOSTILE), engine=HOSTILE),
    ]
    for n, one in enumerate(records):
        (tmp_path / f"{n}.json").write_text(one.to_json())
    make_report(tmp_path, output_dir=tmp_path / "out")
    page = _Page((tmp_path / "out" / "index.html").read_text())
    assert "alert(1)" not in "".join(
        re.findall(r"<script[^>]*>(.*?)</script>", (tmp_path / "out" / "index.html").read_text(), re.DOTALL)[1]
    )
    assert not [link for link in page.links if "javascript" in link]
    assert any(HOSTILE in text for text in page.texts)
    text = (tmp_path / "out" / "README.md").read_text()
    html = MarkdownIt().enable("table").render(ModelCard(text).text)
    assert "<script" not in html
    assert 'href="javascript' not in html
    assert "49" not in re.findall(r"\{\{.*?\}\}", html)


@pytest.mark.usefixtures("no_plots")
def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    """Nothing in a report depends on the time or the machine."""
    runs = write_runs(tmp_path)[:3]
    first, second = (make_report(runs, output_dir=tmp_path / name) for name in ("a", "b"))
    assert first.files == second.files


@pytest.mark.parametrize(
    ("option", "value"),
    [("base_model", "made-up"), ("license", "My License"), ("quantized_by", "a b"), ("repo", "a/b/c")],
)
def test_options_that_the_hub_would_refuse(tmp_path: Path, option: str, value: str) -> None:
    """They are refused before anything is written."""
    (tmp_path / RECORD_FILE).write_text(quantize_record().to_json())
    with raises("option-invalid", where=option):
        given: dict[str, Any] = {option: value}
        make_report(tmp_path, output_dir=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_plots")
def test_the_command_line(tmp_path: Path) -> None:
    """It names what it wrote and which options the card lacks; a second time the output exists."""
    runs = [str(run) for run in write_runs(tmp_path)[:1]]
    result = CliRunner().invoke(app, ["report", *runs, "-o", str(tmp_path / "out"), "--license", "mit"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(tmp_path / "out" / name) for name in ("README.md", "index.html")]
    assert "`--base-model`, `--quantized-by`" in result.stderr
    again = CliRunner().invoke(app, ["report", *runs, "-o", str(tmp_path / "out")])
    assert failed_with(again, "output-exists", str(tmp_path / "out"))
    assert failed_with(CliRunner().invoke(app, ["report", *runs]), "option-missing", "--output-dir")
