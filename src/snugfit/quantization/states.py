"""Hidden states between the layers of a run, and what of them is on the disk to resume from.

In files each layer's states are there for good. Those that a GPU holds are written into a file from time to time: a run
that was killed resumes behind the last layer whose states were written, and does those after it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from snugfit import distributed
from snugfit.model.forward_pass import Batch, States
from snugfit.model.hidden_states import HeldStates, StateFile
from snugfit.storage.transfer import Transfer

SAVED_EVERY = 30.0  # seconds of work that a kill may cost where a GPU holds the states

Saved = Callable[[], dict[str, Any]]  # waits until states are in a file; which, and its pieces of this process


class RunStates(Protocol):
    """The hidden states of a run."""

    def resumable(self, entries: Sequence[Mapping[str, Any]], done: int) -> int:
        """Behind how many of the first `done` units a run can resume, by the entries of finished ones."""

    def resume(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Take up the states behind the last of these entries."""

    def embedded(self, done: int) -> Sequence[Batch]:
        """The batches whose first states this process has to make if `done` units are finished."""

    @property
    def first(self) -> States:
        """Where the first layer's states go."""

    def prefetch(self, number: int) -> None:
        """Begin to read what unit `number` begins with."""

    def of(self, number: int) -> tuple[States, States]:
        """Where the layer of unit `number` reads its states, and where it writes them."""

    def before_writing(self, number: int, recorded: Callable[[], None]) -> None:
        """Make room for the states behind unit `number`; `recorded` waits until all finished units are recorded."""

    def save(self, number: int, recorded: Callable[[], None]) -> Saved | None:
        """Begin to save the states behind unit `number`; None if they are not to be saved."""

    def remove(self) -> None:
        """Remove all files."""


def open_states(
    folder: Path,
    batches: Sequence[Batch],
    shape: tuple[int, torch.dtype],
    device: torch.device,
    transfer: Transfer,
    stack: ExitStack,
    *,
    held: bool,
) -> RunStates:
    """The states of batches, of `shape` (H, dtype) a token, in files of `folder`; `held` by the device if asked for."""
    mine = distributed.mine(batches)
    files = [stack.enter_context(StateFile(folder / f"states-{n}", batches, *shape, transfer, mine)) for n in range(2)]
    return _OnDevice(files, batches, HeldStates(batches, *shape, device)) if held else _InFiles(files, mine)


class _InFiles:
    """Two files between which the states alternate."""

    def __init__(self, files: Sequence[StateFile], mine: Sequence[Batch]) -> None:
        self._files, self._mine = files, mine
        self._first = 0  # the file of the first states; another one if a device held them before

    def resumable(self, entries: Sequence[Mapping[str, Any]], done: int) -> int:
        while done and not _holds(self._files, entries[done - 1]):
            done -= 1
        return done

    def resume(self, entries: Sequence[Mapping[str, Any]]) -> None:
        if entries:
            self._first = (entries[-1]["states_file"] - (len(entries) - 1)) % 2

    def embedded(self, done: int) -> Sequence[Batch]:
        return () if done else self._mine

    @property
    def first(self) -> States:
        return self._files[self._of(0)]

    def prefetch(self, number: int) -> None:
        self._files[self._of(number - 1)].prefetch()

    def of(self, number: int) -> tuple[States, States]:
        return self._files[self._of(number - 1)], self._files[self._of(number)]

    def _of(self, number: int) -> int:
        """The file of the states behind unit `number`."""
        return (self._first + number) % 2

    def before_writing(self, number: int, recorded: Callable[[], None]) -> None:
        if number > 1:  # they overwrite those of the layer before the last
            recorded()
        if number:
            self._files[self._of(number)].start_again()

    def save(self, number: int, recorded: Callable[[], None]) -> Saved:  # noqa: ARG002
        return _saved(self._files, self._of(number))

    def remove(self) -> None:
        _remove(self._files)


class _OnDevice:
    """States that every process holds on its device; what is saved alternates between two files."""

    def __init__(self, files: Sequence[StateFile], batches: Sequence[Batch], held: HeldStates) -> None:
        self._files, self._batches, self._held = files, batches, held
        self._next, self._last = 0, time.monotonic()
        self._calls, self._ask = 0, 0  # layers since then; at how many of them the main process is asked

    def resumable(self, entries: Sequence[Mapping[str, Any]], done: int) -> int:
        while done > 1 and not _holds(self._files, entries[done - 1]):  # the first ones are made again
            done -= 1
        return done

    def resume(self, entries: Sequence[Mapping[str, Any]]) -> None:
        if len(entries) > 1:
            number = entries[-1]["states_file"]
            for batch in self._batches:
                self._held.write(batch, self._files[number].read(batch))
            self._next = 1 - number

    def embedded(self, done: int) -> Sequence[Batch]:
        return self._batches if done < 2 else ()

    @property
    def first(self) -> States:
        return self._held

    def prefetch(self, number: int) -> None:
        pass

    def of(self, number: int) -> tuple[States, States]:  # noqa: ARG002
        return self._held, self._held

    def before_writing(self, number: int, recorded: Callable[[], None]) -> None:
        pass

    def save(self, number: int, recorded: Callable[[], None]) -> Saved | None:
        if not number:
            return None
        self._held.share()
        self._calls += 1
        if self._calls < self._ask:
            return None
        due, self._ask = distributed.from_main(self._due())
        if not due:
            return None
        recorded()  # the states that were saved last may be all that there is
        target = self._next
        self._files[target].start_again()
        for batch in distributed.mine(self._batches):
            self._files[target].write(batch, self._held.read(batch))
        self._next, self._last = 1 - target, time.monotonic()
        self._calls = self._ask = 0
        return _saved(self._files, target)

    def _due(self) -> tuple[bool, int]:
        """Whether it is time to save, else at how many layers to ask again: half of those that are likely left.

        At twice as many at most, because later layers may take longer than the first ones.
        """
        passed = time.monotonic() - self._last
        left = (SAVED_EVERY - passed) * self._calls / max(passed, 1e-3)
        return passed >= SAVED_EVERY, self._calls + max(1, min(self._calls, int(left / 2)))

    def remove(self) -> None:
        _remove(self._files)


def _saved(files: Sequence[StateFile], number: int) -> Saved:
    return lambda: {"states_file": number, "states": files[number].wait()}


def _holds(files: Sequence[StateFile], entry: Mapping[str, Any]) -> bool:
    """Whether the states that an entry names are on the disk."""
    number = entry.get("states_file")
    return number is not None and files[number].holds(entry["states"])


def _remove(files: Sequence[StateFile]) -> None:
    for file in files:
        file.path.unlink(missing_ok=True)
