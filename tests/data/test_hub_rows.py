"""Sets with datasets of the Hub: read by the `datasets` library, kept under all that decides their rows."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from helpers.errors import raises
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.data.dataset import Dataset, load_dataset
from snugfit.data.hub_rows import HubSource, kept_file
from snugfit.errors import UserError

datasets = pytest.importorskip("datasets")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"q": f"{'x' * n}", "a": None if n == 3 else "y", "when": dt.date(2026, 1, 1)} for n in range(1, 41)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single characters with a chat template."""
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Hub:
    """The library's functions on rows of this machine; `calls` are what the library was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[dict[str, Any]] = []
        self.looked_up = 0
        self.problem: Exception | None = None
        self._load = datasets.load_dataset  # the fixture puts another function in its place

    def load(self, name: str, subset: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        """What datasets.load_dataset gives."""
        if self.problem is not None:
            raise self.problem
        self.calls.append(
            {"name": name, "subset": subset, "split": split, "revision": revision, "streaming": streaming}
        )
        return self._load("parquet", data_files=str(self.folder / "*.parquet"), split=split, streaming=streaming)

    def info(self, name: str, *, revision: str | None = None) -> Any:
        """What HfApi.dataset_info gives."""
        assert (name, revision) == ("org/name", None)
        self.looked_up += 1
        if self.problem is not None:
            raise self.problem
        return SimpleNamespace(sha=COMMIT)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub of one dataset of two Parquet files, and an empty cache."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "hub"
    folder.mkdir()
    for number in range(2):
        parquet.write_table(
            pyarrow.Table.from_pylist(ROWS[20 * number : 20 * number + 20]), folder / f"{number}.parquet"
        )
    found = Hub(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(datasets, "load_dataset", found.load)
    monkeypatch.setattr(HfApi, "dataset_info", found.info)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return found


def load(model: Path, folder: Path, entry: str = "", **options: Any) -> Dataset:
    file = folder / "set.yaml"
    text = f"calibration_set: {{datasets: [{{dataset: org/name, columns: [q, a], formatter: prompt_answer, {entry}}}]}}"
    file.write_text(text, encoding="utf-8")
    return load_dataset(model, [file], **options)


def questions(dataset: Dataset) -> list[int]:
    """How long the question of each sample is."""
    return [list(sample).count(sample[5]) for sample in dataset.samples]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_rows_come_from_the_library(model: Path, tmp_path: Path, hub: Hub, streaming: str) -> None:
    """The first rows, at the commit that main stands for; columns with nulls are there; the record has the commit."""
    found = load(model, tmp_path, f"num_samples: 5, subset: small, streaming: {streaming}")
    assert questions(found) == [1, 2, 3, 4, 5]
    asked = {
        "name": "org/name",
        "subset": "small",
        "split": "train",
        "revision": COMMIT,
        "streaming": streaming == "true",
    }
    assert hub.calls == [asked]
    use = found.uses[0]
    assert (use.revision, use.split, use.subset, use.rows) == (COMMIT, "train", "small", 5)


def test_what_was_read_is_kept(model: Path, tmp_path: Path, hub: Hub) -> None:
    """A second run reads no row again, more rows go on behind those that are kept, all rows are known to be all."""
    first = load(model, tmp_path, "num_samples: 5")
    assert load(model, tmp_path, "num_samples: 5") == first
    assert len(hub.calls) == 1
    assert load(model, tmp_path, "num_samples: 8").samples[:5] == first.samples
    assert len(hub.calls) == 2
    for _ in range(2):
        assert len(load(model, tmp_path, "num_samples: all").samples) == 40
    assert len(hub.calls) == 3
    load(model, tmp_path, "num_samples: 5, streaming: true")
    assert len(hub.calls) == 3  # the same rows in the same order
    for more in ("subset: other", "split: 'train[:20]'", f"revision: {'f' * 40}", "draw: random"):
        before = len(hub.calls)
        load(model, tmp_path, f"num_samples: 5, {more}")
        assert len(hub.calls) == before + 1


def test_a_pinned_set_needs_no_network(model: Path, tmp_path: Path, hub: Hub) -> None:
    """With a commit as revision nothing is looked up; once its rows are kept nothing is asked for at all."""
    first = load(model, tmp_path, f"num_samples: 5, revision: {COMMIT}")
    assert hub.looked_up == 0
    hub.problem = ConnectionError("no network")
    assert load(model, tmp_path, f"num_samples: 5, revision: {COMMIT}") == first
    with raises("hub-unreachable", where="datasets[0].dataset"):
        load(model, tmp_path, "num_samples: 5")


def test_offline(model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE the commit is the one last seen; a dataset that was never read is an error."""
    first = load(model, tmp_path, "num_samples: 5")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.problem = OfflineModeIsEnabled("offline")
    assert load(model, tmp_path, "num_samples: 5") == first
    with raises("hub-unreachable", where="datasets[0].dataset"):
        load(model, tmp_path, "num_samples: 5, revision: other")
    assert len(list((tmp_path / "assets").rglob("*.*"))) == 2


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_random_rows(model: Path, tmp_path: Path, hub: Hub, streaming: str) -> None:
    """Rows of the whole dataset in an order that the seed decides; other seeds give other rows."""
    entry = f"num_samples: 10, draw: random, streaming: {streaming}"
    first = questions(load(model, tmp_path, entry))
    assert len(set(first)) == 10
    assert max(first) > 20
    assert questions(load(model, tmp_path, entry)) == first
    assert questions(load(model, tmp_path, entry, shuffle_seed=3)) != first


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (ConnectionError("no route"), "hub-unreachable"),
        (TimeoutError("slow"), "hub-unreachable"),
        (FileNotFoundError("nothing cached"), "hub-unreachable"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub"), "dataset-not-found"),
        (ValueError('Unknown split "trainn". Should be one of ["train"].'), "dataset-not-found"),
        (ValueError("BuilderConfig 'x' not found. Available: ['main']"), "dataset-not-found"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."), "hub-refused"),
        (RuntimeError("Dataset scripts are no longer supported"), "dataset-unreadable"),
    ],
)
def test_what_can_go_wrong(model: Path, tmp_path: Path, hub: Hub, problem: Exception, code: str) -> None:
    """Each error of the library is an error of this project, at the source, with the library's words."""
    hub.problem = problem
    with raises(code, where="datasets[0].dataset") as caught:
        load(model, tmp_path, f"num_samples: 5, revision: {COMMIT}")
    assert str(problem)[:20] in str(caught.value)


def test_errors_of_the_hub_itself(model: Path, tmp_path: Path, hub: Hub) -> None:
    """A repository that does not exist, and one that asks for consent."""
    answer: Any = SimpleNamespace(status_code=404, headers={}, request=None)
    for kind, code in ((RepositoryNotFoundError, "dataset-not-found"), (GatedRepoError, "hub-refused")):
        hub.problem = kind("no such repository", response=answer)
        with raises(code):
            load(model, tmp_path, "num_samples: 5")


def test_a_missing_library(model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the error says how to install it; local files need none."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises("dependency-missing", where="datasets[0].dataset") as caught:
        load(model, tmp_path, f"num_samples: 5, revision: {COMMIT}")
    assert "snugfit[datasets]" in caught.value.remedy


def test_a_damaged_cache_is_read_again(model: Path, tmp_path: Path, hub: Hub) -> None:
    """A kept file that is cut short counts as none."""
    first = load(model, tmp_path, "num_samples: 5")
    source = HubSource(name="org/name", subset=None, split="train", revision=None, streaming=False, seed=None)
    file = kept_file(source, COMMIT)
    file.write_bytes(file.read_bytes()[:-20])
    assert load(model, tmp_path, "num_samples: 5") == first
    assert len(hub.calls) == 2


def test_a_cache_that_cannot_be_written(model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names the cache."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("snugfit.data.hub_rows.gzip.open", refuse)
    with pytest.raises(UserError) as caught:
        load(model, tmp_path, f"num_samples: 5, revision: {COMMIT}")
    assert caught.value.code == "cache-not-writable"


def test_values_that_json_lacks(model: Path, tmp_path: Path, hub: Hub) -> None:
    """Dates, numbers and bytes are kept as texts that are the same on every machine."""
    from snugfit.data.hub_rows import _plain

    load(model, tmp_path, "num_samples: 2")
    assert _plain(dt.date(2026, 1, 1)) == "2026-01-01"
    assert _plain(Decimal("1.50")) == "1.50"
    assert _plain(b"abc") == "<3 bytes>"
    assert _plain(object()) == "<object>"
    assert json.dumps(ROWS[0], default=_plain)


def test_streams_without_end(model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream, `all` are 256 samples, as where these sets come from; a budget of tokens goes further."""

    def endless(*_: object, **__: object) -> Iterator[dict[str, str]]:
        while True:
            yield {"q": "x", "a": "y"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    assert len(load(model, tmp_path, "num_samples: all, streaming: true").samples) == 256
    more = load(model, tmp_path, "num_samples: all, streaming: true, max_tokens: 6000")
    assert len(more.samples) == 6000 // len(more.samples[0])
