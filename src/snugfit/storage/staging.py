"""An output directory while it is written: OUT.partial, its lock, an unfinished run in it, and the final rename."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snugfit import distributed
from snugfit.errors import Unfinished, UserError
from snugfit.storage.files import with_parents

LOCK_NAME = ".snugfit-lock"
FLUSHED_AT_ONCE = 8  # files
WORK_NAME = ".snugfit-work"  # files that a run needs to resume; removed when it ends


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory TARGET.partial to write into, renamed to TARGET at the end; removed where anything goes wrong.

    Remains of a killed run are removed first. UserError where TARGET exists or another run is writing it.
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
    """TARGET.partial and a folder in it for what a run needs to resume; as `staged`, but both stay where a run stops.

    They are removed by bad input (a UserError that is not Unfinished), by whatever stops a run before its first unit
    is finished, and by `restart`, which removes an earlier run first. UserError where TARGET exists, where another run
    is writing it, and where an earlier run's files hold a link.
    """
    if not distributed.is_main():
        with _beside_main(target) as found:
            yield found
        return
    with contextlib.ExitStack() as stack:
        partial, work = distributed.in_all(lambda: _prepare(stack.enter_context(_locked(target)), restart=restart))
        try:
            yield partial, work
            distributed.barrier()
            _finish(partial, target)
            distributed.barrier()
        except BaseException as error:
            bad_input = isinstance(error, UserError) and not isinstance(error, Unfinished)
            if bad_input or not units_done(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _prepare(partial: Path, *, restart: bool) -> tuple[Path, Path]:
    """TARGET.partial and the folder of an unfinished run in it, which stays unless `restart`."""
    work = partial / WORK_NAME
    if restart or not work.is_dir() or not any(work.iterdir()):
        _clear(partial)
    else:
        _check_no_links(partial)
    work.mkdir(exist_ok=True)
    return partial, work


@contextlib.contextmanager
def _beside_main(target: Path) -> Iterator[tuple[Path, Path]]:
    """What `resumable` gives in processes that are not the main one, which makes it and removes it."""
    distributed.in_all(lambda: None)  # the folder exists
    partial = target.with_name(target.name + ".partial")
    yield partial, partial / WORK_NAME
    distributed.barrier()
    distributed.barrier()  # the result is in its place


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """TARGET.partial, created where it is missing, locked for this process alone."""
    partial = _partial_of(target)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(with_parents(partial))
            partial.mkdir(exist_ok=True)
            lock = os.open(partial / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _not_writable(partial, f"cannot be written ({error.strerror}).") from None
        stack.callback(os.close, lock)
        _lock(lock, partial)
        yield partial


def _lock(file: int, partial: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = "another run is writing this."
        raise UserError(what, code="output-busy", where=str(partial), remedy="Wait for it to end.") from None
    except OSError as error:
        raise _not_writable(partial, f"cannot be locked ({error.strerror}).") from None


def _not_writable(folder: Path, what: str, remedy: str = "Choose another `output_dir`.") -> UserError:
    return UserError(what, code="output-not-writable", where=str(folder), remedy=remedy)


def units_done(partial: Path) -> int:
    """Units that the unfinished run in this directory has finished; 0 where there is no run."""
    return len(list((partial / WORK_NAME).rglob(unit_name("*"))))


def unit_name(number: int | str) -> str:
    """The file in a run's work folder that marks a unit as finished."""
    return f"unit-{number:05d}.json" if isinstance(number, int) else f"unit-{number}.json"


def _finish(partial: Path, target: Path) -> None:
    _flush(partial)
    partial.rename(target)
    _sync(target.absolute().parent)
    _tidy(target)


def _tidy(target: Path) -> None:
    """Remove files that a finished run no longer needs; the lock last, which marks that there are some."""
    shutil.rmtree(target / WORK_NAME, ignore_errors=True)
    (target / LOCK_NAME).unlink(missing_ok=True)


def check_stageable(target: Path, *, models: Iterable[str | Path | None] = ()) -> None:
    """UserError where `staged` would refuse TARGET or could not write it, and inside a model; nothing is created."""
    partial = _partial_of(target)
    check_outside(target, models)
    check_folder(partial)
    if not (partial / LOCK_NAME).is_file():
        return
    try:
        lock = os.open(partial / LOCK_NAME, os.O_RDWR)
    except OSError as error:
        raise _not_writable(partial, f"cannot be written ({error.strerror}).") from None
    try:
        _lock(lock, partial)
    finally:
        os.close(lock)


def check_outside(target: Path, models: Iterable[str | Path | None]) -> None:
    """UserError for an output inside a model, whose files are all that lies there: the next run would copy it.

    Of `models` those without config.json do not count: results, and ids of the Hub.
    """
    for model in models:
        if model and (Path(model) / "config.json").is_file() and target.resolve().is_relative_to(Path(model).resolve()):
            what, remedy = f"inside the model's own directory, {model}.", "Choose another output, outside of it."
            raise UserError(what, code="output-not-writable", where=str(target), remedy=remedy)


def check_folder(folder: Path, *, remedy: str = "Choose another `output_dir`.") -> None:
    """UserError where files could not be created in `folder`, or the folder itself; nothing is left behind."""
    place = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _not_writable(folder, f"cannot be written ({place}: {error.strerror}).", remedy) from None


def _partial_of(target: Path) -> Path:
    """TARGET.partial; UserError where TARGET exists, or where TARGET.partial exists and snugfit did not create it."""
    check_target(target)
    partial = target.with_name(target.name + ".partial")
    is_run = not partial.is_symlink() and (partial / LOCK_NAME).is_file()
    if not is_run and (partial.is_symlink() or partial.exists()) and not _is_empty(partial):
        what = "exists and was not created by snugfit."
        raise UserError(what, code="output-exists", where=str(partial), remedy="Move or delete it.")
    return partial


def check_target(target: Path) -> None:
    """UserError where the output exists already; the lock of a run that was killed at its very end is removed."""
    if (target / LOCK_NAME).is_file():
        _tidy(target)
    if target.exists() or target.is_symlink():
        remedy = "Remove it or choose another `output_dir`."
        raise UserError("the output exists already.", code="output-exists", where=str(target), remedy=remedy)


def occupied_bytes(directory: Path, *, without: str | None = None) -> int:
    """Bytes of the disk that the files below a directory occupy; 0 where it does not exist.

    Folders named `without` do not count, so that their files may be removed meanwhile.
    """
    found = 0
    for folder, below, files in os.walk(directory):
        below[:] = [name for name in below if name != without]
        found += sum((Path(folder) / name).lstat().st_blocks * 512 for name in files)
    return found


def _flush(directory: Path) -> None:
    """Write every file and name below `directory` to the disk: a power cut after the rename then loses nothing.

    What only an unfinished run needs is left out. Several at once, of which the disk makes one change.
    """
    found = [path for path in directory.rglob("*") if WORK_NAME not in path.relative_to(directory).parts]
    with ThreadPoolExecutor(FLUSHED_AT_ONCE) as pool:
        list(pool.map(_sync, [directory, *found]))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_no_links(target: Path) -> None:
    """UserError where the unfinished run of TARGET, if there is one, holds a link, as `resumable` raises it."""
    work = _partial_of(target) / WORK_NAME
    if work.is_dir() and any(work.iterdir()):
        _check_no_links(_partial_of(target))


def _check_no_links(partial: Path) -> None:
    """UserError where an unfinished run holds a link: no run creates one, and it would be written through."""
    for path in partial.rglob("*"):
        if path.is_symlink():
            what = "a link in an unfinished run, which snugfit does not create."
            remedy = "Remove the link, or pass `restart` to remove the whole run."
            raise UserError(what, code="run-damaged", where=str(path), remedy=remedy)


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
