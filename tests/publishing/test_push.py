"""`push` on a Hub of this machine: what is uploaded, what is refused, and how an upload resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.report_runs import quantize_record
from helpers.upload_server import UploadHub, upload_hub
from snugfit.cli.app import app
from snugfit.publishing.push import push
from snugfit.publishing.report import make_report
from snugfit.records.quantize import RECORD_FILE
from snugfit.report.plots import Plot

REPO = "me/made-up-hybrid"
WEIGHTS = {"model-00001-of-00002.safetensors": b"one" * 100, "model-00002-of-00002.safetensors": b"two" * 100}
OTHERS = {"generation_config.json": b"{}", "tokenizer/vocab.txt": b"a", "README.md": b"the original's card"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run: two weight files, three others, the record that lists them, and a note that it does not list."""
    folder = tmp_path / "made-up-hybrid"
    for name, content in {**WEIGHTS, **OTHERS, "note.txt": b"mine"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    def digests(files: dict[str, bytes]) -> dict[str, str]:
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    record = quantize_record(files=digests(WEIGHTS), other_files=digests(OTHERS))
    (folder / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are small files: drawing takes time."""

    def draw(plot: Plot, directory: Path) -> list[str]:
        (directory / f"{plot.name}.png").write_bytes(b"png")
        return [f"{plot.name}.png"]

    monkeypatch.setattr("snugfit.publishing.report.draw", draw)


@pytest.fixture
def card(run: Path, tmp_path: Path) -> Path:
    """The report of that run."""
    make_report(run / RECORD_FILE, output_dir=tmp_path / "card", repo=REPO)
    return tmp_path / "card"


def test_a_run_with_its_card(hub: UploadHub, run: Path, card: Path) -> None:
    """A new private repository has, after one commit, every file of record and report, and no other."""
    plan = push(run, REPO, report=card)
    assert hub.repos[REPO]["private"]
    assert hub.commits == 1
    files = hub.files(REPO)
    assert set(files) == {file.name for file in plan.files}
    for name, content in {**WEIGHTS, "generation_config.json": b"{}", "tokenizer/vocab.txt": b"a"}.items():
        assert files[name] == content
    assert files["README.md"] == (card / "README.md").read_bytes()
    assert files["index.html"] == (card / "index.html").read_bytes()
    assert {"snugfit-record.json", "snugfit-report.json", "plots/error-by-layer.png"} <= set(files)
    assert plan.left_out[0] == "note.txt"
    assert plan.url is not None
    assert plan.url.startswith(f"{hub.url}/{REPO}/commit/")


def test_a_dry_run_writes_nothing_and_lists_the_same(hub: UploadHub, run: Path, card: Path) -> None:
    """The same files and sizes, no repository, no commit."""
    dry = push(run, REPO, report=card, dry_run=True)
    assert not hub.repos
    assert dry.url is None
    assert push(run, REPO, report=card).files == dry.files
    shown = CliRunner().invoke(app, ["push", str(run), REPO, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "300 bytes  model-00001-of-00002.safetensors" in shown.stdout
    assert "exists" in shown.stdout


def test_the_originals_card_is_left_out(hub: UploadHub, run: Path) -> None:
    """Without a report the repository gets no card: the original's would describe another model."""
    plan = push(run, REPO)
    assert "README.md" not in hub.files(REPO)
    assert any("original's card" in name for name in plan.left_out)


def test_an_interrupted_upload_resumes(hub: UploadHub, run: Path) -> None:
    """What the Hub has is not sent again; until all is there no commit is made."""
    hub.breaks = 1
    hub.stored[hashlib.sha256(WEIGHTS["model-00001-of-00002.safetensors"]).hexdigest()] = b"one" * 100
    with raises("hub-unreachable", where=REPO):
        push(run, REPO)
    assert hub.commits == 0
    assert hub.files(REPO) == {}
    push(run, REPO)
    second = hashlib.sha256(WEIGHTS["model-00002-of-00002.safetensors"]).hexdigest()
    assert hub.sent == [second, second]
    assert hub.commits == 1


def test_a_public_repository_needs_consent(hub: UploadHub, run: Path) -> None:
    """By default a repository that exists and is public is refused; asked for, it gets the files."""
    hub.add(REPO, private=False)
    with raises("option-conflict", where=REPO):
        push(run, REPO, dry_run=True)
    assert push(run, REPO, private=False).exists
    assert len(hub.files(REPO)) > 4


def test_other_weights_in_the_repository_are_refused(hub: UploadHub, run: Path) -> None:
    """Engines would load an old weight file beside the new ones."""
    hub.add(REPO, private=True, files={"model.safetensors": b"old"})
    with raises("output-exists", where=REPO):
        push(run, REPO)


def test_a_refusal_of_the_hub(hub: UploadHub, run: Path) -> None:
    """HTTP 403 is an error with a remedy, not a trace."""
    hub.refused = 403
    with raises("hub-refused", where=REPO):
        push(run, REPO)


def test_a_dead_hub(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run says that it could not ask; an upload fails and can be repeated."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert push(run, REPO, dry_run=True).bytes > 600
    with raises("hub-unreachable", where=REPO):
        push(run, REPO)


def test_changed_missing_and_foreign_files(run: Path, card: Path, tmp_path: Path) -> None:
    """Weights that differ from the record, a missing file and the report of another run: refused before any request."""
    weights = run / "model-00001-of-00002.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"ONE" * 100)
    with raises("record-changed", where=str(weights)):
        push(run, REPO, dry_run=True)
    weights.unlink()
    with raises("file-missing", where=str(weights)):
        push(run, REPO, dry_run=True)
    weights.write_bytes(content)
    other = tmp_path / "other"
    other.mkdir()
    (other / RECORD_FILE).write_text(quantize_record("other").to_json(), encoding="utf-8")
    make_report(other / RECORD_FILE, output_dir=tmp_path / "other-card")
    with raises("models-mismatch", where=str(tmp_path / "other-card")):
        push(run, REPO, report=tmp_path / "other-card", dry_run=True)
    (card / "index.html").write_text("mine")
    with raises("record-changed", where=str(card / "index.html")):
        push(run, REPO, report=card, dry_run=True)


def test_the_card_may_be_edited(hub: UploadHub, run: Path, card: Path) -> None:
    """A publisher adds words of their own to README.md."""
    (card / "README.md").write_text("mine")
    push(run, REPO, report=card)
    assert hub.files(REPO)["README.md"] == b"mine"


def test_a_report_alone(hub: UploadHub, card: Path) -> None:
    """A new card for weights that are there already."""
    hub.add(REPO, private=True, files={"model.safetensors": b"old"})
    push(card, REPO)
    assert {"README.md", "index.html", "model.safetensors"} <= set(hub.files(REPO))


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a/b--c", "/b", "a/", "../b", "a b/c"])
def test_names_that_are_no_repository(run: Path, repo: str) -> None:
    """They are refused before anything is read."""
    with raises("option-invalid", where="repo"):
        push(run, repo)


def test_directories_that_no_finished_run_wrote(tmp_path: Path, run: Path) -> None:
    """An empty directory, an unfinished run, a missing one, and a record that lists files elsewhere."""
    (tmp_path / "empty").mkdir()
    with raises("file-missing", where=str(tmp_path / "empty")):
        push(tmp_path / "empty", REPO)
    with raises("file-missing", where=str(tmp_path / "none")):
        push(tmp_path / "none", REPO)
    run.rename(tmp_path / "out.partial")
    with raises("option-invalid", where=str(tmp_path / "out.partial")):
        push(tmp_path / "out.partial", REPO)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / RECORD_FILE).write_text(quantize_record(other_files={"../x": "0"}).to_json(), encoding="utf-8")
    with raises("file-outside-model", where=str(outside / RECORD_FILE)):
        push(outside, REPO)


def test_a_record_edited_by_hand(run: Path) -> None:
    """Its digest shows it, and the command line says so."""
    file = run / RECORD_FILE
    document = json.loads(file.read_text())
    document["seconds"]["total"] = 1.0
    file.write_text(json.dumps(document))
    result = CliRunner().invoke(app, ["push", str(run), REPO])
    assert failed_with(result, "record-changed", str(file))
