"""A directory in the making: OUT.partial, its lock, what is left to resume, and the rename that ends it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from snugfit.errors import Unfinished, UserError

LOCK_NAME = ".snugfit-lock"
WORK_NAME = ".snugfit-work"  # what a run needs to go on, gone when it ends


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory TARGET.partial to write into, renamed to TARGET at the end; removed where anything goes wrong.

    What a killed run left there is removed first. UserError where TARGET exists or another run is writing it.
    """
    with _locked(target) as partial:
        try:
            _clear(partial)
            yield partial
            _finish(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def resumable(target: Path, *, restart: bool = False) -> Iterator[tuple[Path, Path]]:
    """TARGET.partial and a folder in it for what a run needs to go on; as `staged`, but it stays where a run stops.

    Bad input, a UserError that is no Unfinished, removes it, and so does whatever stops a run that has finished no
    unit. `restart` removes first what an earlier run left. UserError where TARGET exists or another run is writing it.
    """
    with _locked(target) as partial:
        work = partial / WORK_NAME
        if restart or not work.is_dir() or not any(work.iterdir()) or _has_links(partial):
            _clear(partial)
        work.mkdir(exist_ok=True)
        try:
            yield partial, work
            _finish(partial, target)
        except BaseException as error:
            bad_input = isinstance(error, UserError) and not isinstance(error, Unfinished)
            if bad_input or not units_done(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """TARGET.partial, made if need be, for this process alone."""
    partial = _partial_of(target)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror}).", where=str(partial), remedy="Choose another."
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another run is writing this.", where=str(partial), remedy="Wait for it.") from None
        yield partial
    finally:
        os.close(lock)


def units_done(partial: Path) -> int:
    """Units that the run whose directory this is has finished; 0 where there is none."""
    return len(list((partial / WORK_NAME).glob(unit_name("*"))))


def unit_name(number: int | str) -> str:
    """The file in a run's work folder that says a unit is finished."""
    return f"unit-{number:05d}.json" if isinstance(number, int) else f"unit-{number}.json"


def _finish(partial: Path, target: Path) -> None:
    _flush(partial)
    partial.rename(target)
    _sync(target.absolute().parent)
    _tidy(target)


def _tidy(target: Path) -> None:
    """Take away what a finished run needs no more; the lock last, which tells that there is something to take."""
    shutil.rmtree(target / WORK_NAME, ignore_errors=True)
    (target / LOCK_NAME).unlink(missing_ok=True)


def check_stageable(target: Path) -> None:
    """UserError where `staged` would refuse TARGET or could not write it; nothing is made."""
    partial = _partial_of(target)
    check_folder(partial, remedy="Choose another.")
    if not (partial / LOCK_NAME).is_file():
        return
    lock = os.open(partial / LOCK_NAME, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError("another run is writing this.", where=str(partial), remedy="Wait for it.") from None
    finally:
        os.close(lock)


def check_folder(folder: Path, *, remedy: str) -> None:
    """UserError where files could not be made in `folder`, or the folder itself; nothing is left behind."""
    place = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        what = f"cannot be written ({place}: {error.strerror})."
        raise UserError(what, where=str(folder), remedy=remedy) from None


def _partial_of(target: Path) -> Path:
    """TARGET.partial; UserError where TARGET exists, or something that no run of ours made is in the way."""
    check_target(target)
    partial = target.with_name(target.name + ".partial")
    ours = not partial.is_symlink() and (partial / LOCK_NAME).is_file()
    if not ours and (partial.is_symlink() or partial.exists()) and not _is_empty(partial):
        raise UserError("is in the way, and no run of ours made it.", where=str(partial), remedy="Move it away.")
    return partial


def check_target(target: Path) -> None:
    """UserError where the output exists already; what a run that was killed at its very end left in it goes."""
    if (target / LOCK_NAME).is_file():
        _tidy(target)
    if target.exists() or target.is_symlink():
        raise UserError("the output exists already.", where=str(target), remedy="Remove it or choose another -o.")


def occupied_bytes(directory: Path) -> int:
    """What the files below a directory take of the disk; 0 where there is none."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())


def _flush(directory: Path) -> None:
    """Have the disk hold every file and name below `directory`, so that a power cut after the rename loses nothing."""
    for path in (directory, *directory.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _has_links(directory: Path) -> bool:
    """Whether anything in it is a link, which no run of ours makes, and which would be written through."""
    return any(path.is_symlink() for path in directory.rglob("*"))


def _is_empty(directory: Path) -> bool:
    return not directory.is_symlink() and directory.is_dir() and not any(directory.iterdir())


def _clear(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.name == LOCK_NAME:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
