"""What a run has finished, on the disk: a killed run resumes where it was, or is refused if its end would differ.

The entry of each unit appears at once, by a rename, when its tensors and its layer's hidden states are in their files.
The entry holds their CRC-32s, its file its own SHA-256: a run that resumes trusts nothing that it has not read again,
so that a power cut loses no more than a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snugfit import distributed
from snugfit.errors import Unfinished
from snugfit.machine import hardware, versions
from snugfit.storage.checkpoint import Checkpoint, header_digest
from snugfit.storage.staging import WORK_NAME, unit_name
from snugfit.version import __version__

if TYPE_CHECKING:
    import torch

IDENTITY = "run.json"
# what may differ only if the caller forces it: the result would differ in last bits
MACHINE = ("versions", "hardware", "device", "tokens_per_batch")


class FinishedUnits:
    """Entries of finished units, in order, in a run's work folder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, force: bool = False) -> None:
        """Open or start; `identity` is everything that decides the bytes to be written.

        Raises Unfinished if the folder is of a run with another identity, or if its identity is damaged; `force`
        accepts another machine, library version and batch.
        """
        self._folder = folder
        self.entries: list[dict[str, Any]] = []
        self.differences: list[str] = []
        file = folder / IDENTITY
        if not file.exists():
            self._check_no_entries(file)
            replace_json(file, identity)
            return
        before = read_json(file)
        if not isinstance(before, dict):
            raise Unfinished(
                "the identity of this unfinished run is damaged, so it cannot resume.",
                code="run-damaged",
                where=str(file),
                remedy="Set `restart` to start again, or choose another `output_dir`.",
            )
        self.differences = [key for key in identity if before.get(key) != json.loads(json.dumps(identity[key]))]
        self._check(before, identity, force)
        while (entry := _read_entry(folder / unit_name(len(self.entries)))) is not None:
            self.entries.append(entry)

    def _check_no_entries(self, file: Path) -> None:
        """Unfinished if units are finished and the file that says of which run is gone."""
        if any(self._folder.glob(unit_name("*"))):
            raise Unfinished(
                "the identity of this unfinished run is missing, so it cannot resume.",
                code="run-damaged",
                where=str(file),
                remedy="Set `restart` to start again, or choose another `output_dir`.",
            )

    def _check(self, before: Mapping[str, Any], identity: Mapping[str, Any], force: bool) -> None:
        place = str(self._folder.parent)
        inputs = [key for key in self.differences if key not in MACHINE]
        if inputs:
            raise Unfinished(
                f"holds an unfinished run with another {inputs[0].replace('_', ' ')} "
                f"({_brief(before.get(inputs[0]))}, now {_brief(identity[inputs[0]])}).",
                code="run-differs",
                where=place,
                remedy="Set `restart` to start again, or choose another `output_dir`.",
            )
        if self.differences and not force:
            key = self.differences[0]
            raise Unfinished(
                f"holds an unfinished run that started with {key.replace('_', ' ')} {_brief(before.get(key))}, now it "
                f"is {_brief(identity[key])}: the result would not be byte for byte what it would have been.",
                code="machine-differs",
                where=place,
                remedy="Resume as it started, or set `force_resume`, or `restart` to start again.",
            )

    @property
    def done(self) -> int:
        """Number of finished units."""
        return len(self.entries)

    def commit(self, entry: Mapping[str, Any]) -> None:
        """Record that the next unit is finished; what `entry` describes must be in its files.

        Of several processes, which all call it, the main one writes it down.
        """
        if distributed.is_main():
            replace_json(self._folder / unit_name(len(self.entries)), {"entry": entry, "digest": _digest(entry)})
        self.entries.append(dict(entry))

    def go_back(self, done: int) -> None:
        """Forget all units but the first `done`."""
        for number in reversed(range(done, len(self.entries))):  # a kill leaves no gap
            if distributed.is_main():
                (self._folder / unit_name(number)).unlink()
        del self.entries[done:]


def omitted(finished: FinishedUnits) -> list[str]:
    """The tensors of finished units that were left out of files that do not last: they are the source's."""
    return [name for entry in finished.entries for name, crcs in entry["written"].items() if crcs is None]


def open_finished(folder: Path, identity: Mapping[str, Any], *, force: bool = False) -> FinishedUnits:
    """The finished units of a run's work folder, in each of its processes: the main one opens it first."""
    if distributed.is_main():
        found = distributed.in_all(lambda: FinishedUnits(folder, identity, force=force))
    else:
        distributed.in_all(lambda: None)
        found = FinishedUnits(folder, identity, force=True)
    distributed.barrier()
    return found


def work_folder(output_dir: Path) -> Path:
    """Where an unfinished run of `output_dir` keeps what it needs to resume; it need not exist."""
    return output_dir.with_name(output_dir.name + ".partial") / WORK_NAME


def check_resumable(folder: Path, identity: Mapping[str, Any], *, force: bool = False) -> None:
    """Raise what FinishedUnits would raise for the unfinished run in a work folder, if there is one; write nothing."""
    if (folder / IDENTITY).exists() or any(folder.glob(unit_name("*"))):
        FinishedUnits(folder, identity, force=force)


def origin(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """The part of an identity that all kinds of runs have: the source's files, the machine, and versions."""
    return {
        "source": header_digest(checkpoint),
        "source_files": stamps(checkpoint),
        "device": device.type,
        "hardware": hardware(device),
        "versions": versions() | {"snugfit": __version__},
    }


def stamps(checkpoint: Checkpoint) -> dict[str, Any]:
    """What shows whether the weights are still those of before: size and time of each file, or the commit."""
    if checkpoint.remote is not None:
        return {"revision": checkpoint.remote.revision}
    found = {name: (checkpoint.path / name).stat() for name in checkpoint.shards}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def replace_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(file)


def read_json(file: Path) -> Any:
    """What a file holds, None if it is missing or no JSON (as after a power cut)."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _read_entry(file: Path) -> dict[str, Any] | None:
    """A unit's entry as it was written, None if it is missing or damaged: the run then resumes from there."""
    found = read_json(file)
    if not isinstance(found, dict) or found.get("digest") != _digest(found.get("entry")):
        return None
    entry: dict[str, Any] = found["entry"]
    return entry


def _digest(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
