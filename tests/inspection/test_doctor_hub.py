"""A model on the Hub is judged as the same directory is: damage, small files and the base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from helpers.hub_server import COMMIT, Hub, files_of, serve
from helpers.zoo import CASES, Case, spoil
from inspection.conftest import Sound
from snugfit.errors import UserError
from snugfit.inspection.doctor import doctor
from snugfit.records.doctor import DoctorRecord
from storage.test_hub import point_at

# damage of index and shards, and faults of small files
FAULTS = frozenset(
    {
        *("shard-missing", "shard-damaged", "tensor-twice", "index-wrong", "tensor-lost", "tokenizer-missing"),
        *("token-out-of-range", "eos-never-emitted", "files-beside"),
    }
)
TOLD = [case for case in CASES if case.fault in FAULTS]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub; a test gives it its files."""
    with serve({}) as running:
        point_at(running, tmp_path / "cache", monkeypatch)
        yield running
        huggingface_hub.close_session()


def told(record: DoctorRecord) -> list[tuple[str, str, str, int]]:
    return [(finding.fault, finding.where, finding.severity, finding.count) for finding in record.findings]


@pytest.mark.parametrize("case", TOLD, ids=lambda case: f"{case.name}-{case.base}")
def test_the_hub_is_judged_as_the_directory(case: Case, sound: Sound, hub: Hub, tmp_path: Path) -> None:
    """The same findings at the same places, by ranges of the weights and downloads of small files."""
    spoiled = spoil(case, sound[case.base][0], tmp_path / "spoiled")
    hub.files = files_of(spoiled)
    local, remote = doctor(spoiled), doctor("org/name")
    assert told(remote) == told(local)
    assert remote.model == "org/name"
    assert [what for what in remote.not_checked if "Hub" in what] == []


def test_small_files_are_compared_with_the_base(sound: Sound, hub: Hub, tmp_path: Path) -> None:
    """Tokenizer files, chat template and generation config of a model on the Hub are its base's, or a finding."""
    case = next(case for case in CASES if case.fault == "base-file-differs" and case.edits_files)
    sound_file, base = sound[case.base]
    hub.files = files_of(spoil(case, sound_file, tmp_path / "spoiled"))
    record = doctor("org/name", base=base, values="sample")
    assert {finding.fault for finding in record.findings} == {"base-file-differs"}


def test_a_damaged_model_in_the_cache(sound: Sound, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline the cached directory is judged, damaged or not."""
    hub.files = files_of(sound["nvfp4"][0])
    doctor(f"org/name@{COMMIT}")
    config = next((tmp_path / "cache").rglob("config.json"))
    (config.parent / "model.safetensors").write_bytes(b"cut off")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert {finding.fault for finding in doctor(f"org/name@{COMMIT}").findings} == {"shard-damaged"}


def test_failures_of_the_hub_are_no_findings(sound: Sound, hub: Hub) -> None:
    """A shard that cannot be fetched, or that changed on the way, says nothing of the model: exit code 2."""
    hub.files = files_of(sound["nvfp4"][0])
    shard = next(name for name in hub.files if name.endswith(".safetensors"))
    hub.sizes[shard] = len(hub.files[shard]) + 1
    with pytest.raises(UserError) as caught:
        doctor("org/name")
    assert caught.value.code == "hub-changed"


def test_large_files_are_not_downloaded(sound: Sound, hub: Hub) -> None:
    """A tokenizer beyond the limit is said to be there and is not fetched."""
    hub.files = files_of(sound["nvfp4"][0])
    hub.sizes["tokenizer.json"] = 2**40
    assert doctor("org/name").findings == ()
    assert not [path for _, path, *_ in hub.requests if path.endswith("/tokenizer.json")]
    assert json.loads(hub.files["config.json"])
