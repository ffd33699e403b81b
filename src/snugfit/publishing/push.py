"""`push`: publish the files of a finished run on the Hugging Face Hub, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from snugfit.errors import Unfinished, UserError
from snugfit.progress import SILENT, Progress
from snugfit.publishing.metadata import check_repo
from snugfit.records.base import DIGEST
from snugfit.records.quantize import RECORD_FILE, QuantizeRecord
from snugfit.records.reading import parse_record, read_document
from snugfit.records.report import REPORT_FILE, ReportRecord
from snugfit.storage.files import check_inside
from snugfit.storage.hub_upload import RemoteState, read_remote, stale_weights, upload
from snugfit.storage.model_card import CARD
from snugfit.storage.shards import file_digest

GIVE_A_RUN = "Give the directory that `quantize` wrote, or one that `make_report` wrote."


@dataclass(frozen=True)
class PushedFile:
    """A file of a push: its name in the repository, its path here, its size in bytes, its SHA-256."""

    name: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """What a push uploads; `left_out` are files of the directories that no record lists. `url` is the commit's address.

    `url` is None for a dry run. `exists`: the repository is there already.
    """

    repo: str
    private: bool
    exists: bool
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    url: str | None = None

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> str:
        """The plan as one JSON document."""
        return (
            json.dumps(
                {**{k: v for k, v in vars(self).items() if k != "files"}, "files": [vars(file) for file in self.files]},
                indent=2,
            )
            + "\n"
        )


def push(
    directory: str | Path,
    repo: str,
    *,
    report: str | Path | None = None,
    private: bool = True,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> PushPlan:
    """Upload the files of the finished run in `directory` to the Hub's repository `repo` (org/name), in one commit.

    `directory` is what `quantize` or `make_report` wrote. Of a checkpoint these are the weights and files that its
    record lists; `report` names the directory of its report, whose card takes the place of the original's. Every file
    is read and compared with the digest in the record first; the card alone may have been edited. A new repository is
    `private`; one that is public already is refused then. `dry_run` checks the same, and uploads nothing.

    UserError for a directory that no finished run wrote, a file that is missing or was changed, a report of another
    checkpoint, a repository that holds other weights, and an upload that is refused. The same call resumes.
    """
    check_repo("repo", repo)
    wanted, left_out = _wanted(Path(directory), None if report is None else Path(report))
    files = tuple(_checked(wanted, progress))
    try:
        remote = read_remote(repo)
    except Unfinished as error:
        if not dry_run:
            raise
        progress.message(f"whether the repository takes them is not checked: {error.what}")
        remote = None
    if remote is not None:
        _check_remote(remote, repo, files, private=private)
    plan = PushPlan(repo=repo, private=private, exists=remote is not None, files=files, left_out=tuple(left_out))
    if dry_run:
        return plan
    paths = {file.name: Path(file.path) for file in files}
    url = upload(repo, paths, private=private, message="Upload by snugfit", progress=progress)
    return replace(plan, url=url)


def _check_remote(remote: RemoteState, repo: str, files: tuple[PushedFile, ...], *, private: bool) -> None:
    """UserError for a repository that is public though it should not be, or holds other weights."""
    if private and not remote.private:
        what, remedy = "it is public.", "Allow that with `private=False`, or choose another repository."
        raise UserError(what, code="option-conflict", where=repo, remedy=remedy)
    stale = stale_weights(remote, [file.name for file in files])
    if stale and any(file.name.endswith(".safetensors") for file in files):
        what = f"it holds other weights ({stale[0]}), which engines would load as well."
        remedy = "Delete them there, or choose another repository."
        raise UserError(what, code="output-exists", where=repo, remedy=remedy)


@dataclass(frozen=True)
class _Wanted:
    """A file to upload: its folder, its name, the digest that its record states; None for what may be edited."""

    folder: Path
    name: str
    digest: str | None


def _wanted(directory: Path, report: Path | None) -> tuple[dict[str, _Wanted], list[str]]:
    """Files by name in the repository, and what of the directories is left out."""
    if not directory.is_dir():
        raise UserError("no such directory.", code="file-missing", where=str(directory), remedy=GIVE_A_RUN)
    if directory.name.endswith(".partial"):
        what = "an unfinished run."
        raise UserError(what, code="option-invalid", where=str(directory), remedy="Run the same command to resume it.")
    if (directory / RECORD_FILE).is_file():
        record, digest = _record(directory, RECORD_FILE, QuantizeRecord)
        found, left = _listed(directory, record, RECORD_FILE)
        if found.pop(CARD, None) is not None and report is None:
            left.append(f"{CARD} (the original's card: make one with `make_report`)")
        if report is not None:
            made, _ = _record(report, REPORT_FILE, ReportRecord)
            if made.checkpoint_digest != digest:
                what = f"it is the report of another run than {directory}."
                raise UserError(what, code="models-mismatch", where=str(report), remedy="Make the report again.")
            of_report, not_listed = _listed(report, made, REPORT_FILE)
            found |= of_report
            left += not_listed
        return found, left
    if report is not None:
        what, remedy = "has no effect on a directory without a checkpoint.", "Leave `report` out."
        raise UserError(what, code="option-conflict", where="report", remedy=remedy)
    made, _ = _record(directory, REPORT_FILE, ReportRecord)
    return _listed(directory, made, REPORT_FILE)


def _record(folder: Path, name: str, kind: type) -> tuple[Any, str]:
    """The record that marks a finished run, and its digest."""
    file = folder / name
    document = read_document(file) if file.is_file() else None
    if document is None:
        what = "no finished run wrote this directory."
        raise UserError(what, code="file-missing", where=str(folder), remedy=GIVE_A_RUN)
    record = parse_record(document, str(file))
    if not isinstance(record, kind):
        raise UserError("it is another record.", code="result-invalid", where=str(file), remedy=GIVE_A_RUN)
    return record, str(document[DIGEST])


def _listed(folder: Path, record: QuantizeRecord | ReportRecord, own: str) -> tuple[dict[str, _Wanted], list[str]]:
    """The files of a directory that its record lists, and the names of those that it does not."""
    found = dict(_files_of(folder, record, own))
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
    return found, sorted(name for name in names if name not in found)


def _files_of(folder: Path, record: QuantizeRecord | ReportRecord, own: str) -> Iterator[tuple[str, _Wanted]]:
    """Every file that a record lists, and the record itself."""
    listed: Mapping[str, str] = record.files
    if isinstance(record, QuantizeRecord):
        listed = {**record.files, **record.other_files}
    for name, digest in listed.items():
        parts = Path(name).parts
        if not parts or ".." in parts or Path(name).is_absolute():
            what = f"it lists a file outside its directory ({name})."
            raise UserError(what, code="file-outside-model", where=str(folder / own), remedy=GIVE_A_RUN)
        yield name, _Wanted(folder, name, None if name == CARD else digest)
    yield own, _Wanted(folder, own, None)


def _checked(wanted: Mapping[str, _Wanted], progress: Progress) -> Iterator[PushedFile]:
    """The files with their sizes and digests; UserError where one is missing or not what the record states."""
    with progress.bar(len(wanted), "digests") as advance:
        for name, entry in sorted(wanted.items()):
            path = entry.folder / entry.name
            check_inside(entry.folder, entry.name)
            if not path.is_file():
                what = "a file of the run is missing."
                raise UserError(what, code="file-missing", where=str(path), remedy="Run it again.")
            digest = file_digest(path)
            if entry.digest is not None and digest != entry.digest:
                what = "it was changed after the run: its digest differs from the record's."
                raise UserError(what, code="record-changed", where=str(path), remedy="Run it again.")
            yield PushedFile(name, str(path), path.stat().st_size, digest)
            advance()
