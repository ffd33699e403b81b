"""Tables of an evaluation whose numbers are known: terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import math

import pytest

from helpers.evaluations import candidate, model, pair, record_of, two_contexts
from snugfit.records.evaluation import Continuation, EvalRecord, EvaluatedServer, KernelReport
from snugfit.report.tables import Sheet, all_sheets, context_name, evaluation_sheets, to_csv, to_markdown


@pytest.fixture
def record() -> EvalRecord:
    """Two contexts of a reference and two candidates, and pairs of them at the first."""
    return two_contexts()


def test_names_of_context_lengths() -> None:
    """A bare number for keys and files, with unit and separators for readers; 0 is JSONL."""
    assert [context_name(4096), context_name(4096, tokens=True)] == ["4096", "4,096 tokens"]
    assert {context_name(0), context_name(0, tokens=True)} == {"chat and rows"}


def rows_of(sheet: Sheet) -> list[dict[str, str]]:
    return [dict(zip(sheet.headings, row, strict=True)) for row in sheet.rows]


def test_the_table_of_figures(record: EvalRecord) -> None:
    """Estimates have a ~, bounds a >=, floors are the reference's and the candidate's own, NaN is a dash."""
    sheet = all_sheets(record)[0]
    base, plain, small, again, served, bad = rows_of(sheet)
    assert base == dict.fromkeys(sheet.headings, "") | {
        "context": "1,024 tokens",
        "model": "base (reference)",
        "tokens": "1,234",
        "perplexity": "7.250 +- 0.500",
    }
    assert plain == base | {
        "model": "plain",
        "KL": "0.1250 +- 0.0625",
        "floor": "0.0012",
        "loss - reference": "+0.0312 +- 0.0025",
        "median": "0.0300",
        "p99": "0.3000",
        "p99.9": "0.4000",
        "max": "0.5000",
        "reverse KL": "0.2500",
        "same top": "87.50%",
        "RMS dp": "0.0123",
    }
    marked = {name: f">= {plain[name]}" for name in ("median", "p99", "p99.9", "max", "reverse KL")}
    assert small == plain | marked | {"model": "small", "KL": "~0.1250 +- 0.0625", "floor": "0.0012 / 0.0034"}
    assert again == base | {"context": "4,096 tokens"}
    assert (served["model"], served["KL"], served["perplexity"]) == ("m|n (served)", ">= 0.1250 +- 0.0625", "7.250")
    assert (bad["perplexity"], bad["KL"], bad["floor"], bad["not finite"]) == ("-", "", "", "17")


def test_a_terminal_shows_the_main_figures(record: EvalRecord) -> None:
    """Few columns, with the cells of the report; no column that is empty throughout."""
    sheet, pairs = evaluation_sheets(record)
    assert sheet.headings == ("context", "model", "perplexity", "KL", "floor", "same top", "not finite")
    wide = rows_of(all_sheets(record)[0])
    for narrow, full in zip(rows_of(sheet), wide, strict=True):
        assert narrow == {name: full[name] for name in sheet.headings} | {"context": full["context"].split()[0]}
    assert pairs.headings == ("context", "A", "B", "figure", "A - B", "p (Holm)")
    assert [row["p (Holm)"] for row in rows_of(pairs)] == ["< 0.001", "0.080", "too few chunks"]
    (bare,) = evaluation_sheets(record_of((0, [model("base"), candidate("plain")], ())))
    assert bare.headings == ("context", "model", "perplexity", "KL", "same top")
    assert bare.rows[0][0] == "chat and rows"
    assert "RMS dp" not in bare.note


def test_without_a_reference_there_is_perplexity() -> None:
    """No empty columns, no model is marked, and the note says what is missing."""
    alone = record_of((1024, [model("a"), model("b")], ()), reference=None)
    for sheet in (evaluation_sheets(alone)[0], all_sheets(alone)[0]):
        assert sheet.title == "Perplexity"
        assert set(sheet.headings) <= {"context", "model", "tokens", "perplexity", "not finite"}
        assert [row["model"] for row in rows_of(sheet)] == ["a", "b"]
        assert "KL needs a reference" in sheet.note
        assert "RMS dp" not in sheet.note


def test_one_in_a_thousand_wants_a_thousand() -> None:
    """Of fewer tokens p99.9 is drawn towards the largest: no table shows it."""
    small = record_of((64, [model("base"), candidate("few", tokens_by_chunk=(600, 399)), candidate("many")], ()))
    _, few, many = rows_of(all_sheets(small)[0])
    assert (few["p99.9"], few["p99"], many["p99.9"]) == ("", "0.3000", "0.4000")
    _, in_csv, _ = csv.DictReader(io.StringIO(to_csv(small)))
    assert (in_csv["kl_p999"], in_csv["kl_p99"]) == ("", "0.3")


@pytest.mark.parametrize(
    ("limit", "lengths", "noted"), [(6, (64, 128), True), (6, (64, 0), False), (None, (64, 128), False)]
)
def test_lengths_of_other_text_say_so(limit: int | None, lengths: tuple[int, ...], *, noted: bool) -> None:
    """A limit of chunks gives each length its own text, which matters from two lengths on."""
    cut = record_of(
        *((length, [model("base"), candidate("a")], ()) for length in lengths),
        arguments={"activations": "none", "max_chunks": limit},
    )
    for sheets in (evaluation_sheets(cut), all_sheets(cut)):
        assert ("Each length has other text" in sheets[0].note) == noted


def test_notes_explain_what_is_there_and_nothing_else(record: EvalRecord) -> None:
    """Floors, ~, >= and tokens left out are each explained where they occur, and only there."""
    marks = ("Floor:", "~:", ">=:", "NaN or infinite")
    note = all_sheets(record)[0].note
    assert "root mean square change of the true token's probability" in note
    assert all(mark in note for mark in marks)
    assert "4.5e-04" in note
    plainly = evaluation_sheets(record_of((1024, [model("base"), candidate("plain")], ())))[0].note
    assert not any(mark in plainly for mark in marks)
    assert "one standard error over chunks" in plainly


def test_the_table_of_pairs(record: EvalRecord) -> None:
    """Bold is what is significant after Holm, what is settled says so, and too few chunks have no interval and p."""
    figures, _, pairs, *_ = all_sheets(record)
    assert figures.title == "Loss against the reference"
    loss, kl, few = rows_of(pairs)
    assert loss == {
        "context": "1,024 tokens",
        "A": "plain",
        "B": "small",
        "figure": "loss",
        "A - B": "**-0.2500**",
        "95 % interval": "-0.5000 .. -0.1250",
        "p": "< 0.001",
        "p (Holm)": "< 0.001",
        "chunks": "12",
        "more tokens to settle": "settled",
    }
    assert (kl["A - B"], kl["p"], kl["p (Holm)"], kl["more tokens to settle"]) == (
        "+0.0312",
        "0.040",
        "0.080",
        "123,456",
    )
    assert kl["figure"] == "KL"
    assert (few["95 % interval"], few["p"], few["p (Holm)"], few["more tokens to settle"]) == (
        "",
        "too few chunks",
        "",
        "",
    )
    assert len(evaluation_sheets(record_of((1024, [model("base"), candidate("plain")], ())))) == 1


def test_pairs_that_do_not_differ() -> None:
    """Without a p no tokens are asked for; where nothing differs that is said instead of an interval of no width."""
    pairs = (
        pair("a", "b", "loss", 0.0, (0.0, 0.0), 1.0, 12, None, 1.0),
        pair("a", "b", "kl", 0.5, None, None, 4, 777),
        pair("a", "c", "kl", 0.5, None, None, 12, None),
    )
    found = record_of((64, [model("base"), candidate("a"), candidate("b")], pairs))
    same, few, equal = rows_of(all_sheets(found)[1])
    assert (same["A - B"], same["95 % interval"], same["more tokens to settle"]) == ("+0.0000", "no difference", "")
    assert (few["p"], few["more tokens to settle"]) == ("too few chunks", "")
    assert equal["p"] == "no spread"


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """Tables by title, a list of cells a line, the headings first."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| ---"):
            cells = line.replace("\\|", "\0").strip("| ").split(" | ")
            found.setdefault(title, []).append([cell.strip("| ").replace("\0", "|") for cell in cells])
    return found


def test_the_report(record: EvalRecord) -> None:
    """Markdown has every sheet, each line as wide as its headings, and what was measured on what."""
    text = to_markdown(record)
    tables = markdown_tables(text)
    assert (
        list(tables)
        == [sheet.title for sheet in all_sheets(record)]
        == [
            "Loss against the reference",
            "Perplexity by context length",
            "Candidates against each other",
            "By position, 1,024 tokens",
            "By the reference's largest probability, 1,024 tokens",
            "By position, 4,096 tokens",
            "By the reference's largest probability, 4,096 tokens",
        ]
    )
    assert "m\\|n (served)" in text
    assert "m|n" not in text
    assert tables["By position, 1,024 tokens"][1:] == [
        ["1 .. 1", "3", "8.000", "8.500", "0.5000 +- 0.2500", "8.500", "0.5000 +- 0.2500"],
        ["2 .. 3", "5", "7.000", "7.500", "0.1250", "7.500", "0.1250"],
    ]
    assert tables["By the reference's largest probability, 1,024 tokens"][2][:2] == ["0.99 .. 1", "5"]
    for line in (
        "- reference: base, bfloat16",
        "- plain: 16-bit",
        "- small: nvfp4 x 14, fp8-dynamic x 7",
        f"- a.txt: SHA-256 {'f' * 64}",
        "- 1,024 tokens: 2 chunks, 1,234 tokens scored, digest 0123456789abcdef",
        "- abacus, torch 2",
    ):
        assert line in text


def test_no_figure_is_a_dash_in_every_table(record: EvalRecord) -> None:
    """A model without a finite token has no perplexity: no table writes nan or inf."""
    for sheet in all_sheets(record):
        words = {word for row in sheet.rows for cell in row for word in cell.split()}
        assert not words & {"nan", "inf"}, sheet.title


def test_a_model_without_figures_does_not_hide_the_others() -> None:
    """Where the first candidate has no finite token, tables by the reference's confidence still show the second."""
    bad = candidate(
        "bad", perplexity=math.nan, nonfinite=1234, kl=None, reverse_kl=None, by_position=(), by_confidence=()
    )
    titles = [sheet.title for sheet in all_sheets(record_of((1024, [model("base"), bad, candidate("plain")], ())))]
    assert "By the reference's largest probability, 1,024 tokens" in titles


def test_a_served_model_is_not_called_16_bit() -> None:
    """A server's formats are not known here, so the report does not say that they are 16-bit."""
    served = EvaluatedServer(
        name="m (served)",
        url="http://localhost:8000",
        engine="vllm",
        version="0.32.0",
        model="org/m",
        root="org/m",
        max_model_len=4096,
        top_logprobs=20,
        kernels=KernelReport(),
    )
    found = [model("base"), candidate("m (served)", kl_kind="lower bound")]
    lines = to_markdown(record_of((1024, found, ()), candidates=(served,))).splitlines()
    (line,) = (line for line in lines if line.startswith("- m (served)"))
    assert "16-bit" not in line


def test_the_csv(record: EvalRecord) -> None:
    """One line for each context and model, numbers in full, nothing where there is nothing."""
    base, plain, small, _, served, bad = csv.DictReader(io.StringIO(to_csv(record)))
    assert {key for key, value in base.items() if not value} == {
        *("kl", "kl_error", "kl_kind", "kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max"),
        *("reverse_kl", "same_top", "rms_change", "loss_change", "loss_change_error", "acceptance", "acceptance_error"),
    }
    assert (base["context"], base["model"], base["tokens"], base["floor_kl"]) == ("1024", "base", "1234", "0.0012")
    assert (plain["kl"], plain["kl_error"], plain["kl_p999"], plain["kl_max"]) == ("0.125", "0.0625", "0.4", "0.5")
    assert (plain["loss_change"], plain["loss_change_error"]) == ("0.03125", "0.0025")
    assert (plain["reverse_kl"], plain["same_top"], plain["floor_kl"]) == ("0.25", "0.875", "")
    assert (small["kl_kind"], small["floor_kl"], small["floor_tokens"]) == ("estimate", "0.0034", "300")
    assert (served["model"], served["kl_kind"], served["perplexity_error"]) == ("m|n (served)", "lower bound", "")
    assert (bad["kl"], bad["kl_kind"], bad["nonfinite"]) == ("", "", "17")


def test_continuations_are_shown_side_by_side() -> None:
    """The report has both continuations of each divergence."""
    one = Continuation(
        model="small",
        source="log.jsonl:3",
        position=17,
        kl=1.25,
        before="It is",
        text=" Paris",
        reference_continuation=" Paris, on the Seine",
        model_continuation=" Lyon",
        same_tokens=2,
    )
    text = to_markdown(record_of((0, [model("base"), candidate("small")], ()), continuations=(one,)))
    for part in ("small", "log.jsonl:3", "token 17", "KL 1.250", "first 2 tokens", "' Paris, on the Seine'", "' Lyon'"):
        assert part in text
