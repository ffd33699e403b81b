"""A running server as a candidate: what it says of every row, kept in a journal, as predictions to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from snugfit.errors import UserError
from snugfit.evaluation.divergence import ServedTop
from snugfit.serving.answers import FULL, PromptLogprobs
from snugfit.serving.client import NotFiniteError, Server, connect, find_top
from snugfit.serving.engine_log import kernels_from_log
from snugfit.serving.journal import Journal

DEFAULT_TOP = 256


@dataclass(frozen=True)
class ServerOptions:
    """A server to evaluate: `top` tokens asked for at every place (FULL: all), its log, the journal of its answers."""

    url: str
    journal: Path
    model: str | None = None
    top: int = DEFAULT_TOP
    log: Path | None = None


@dataclass(frozen=True)
class Served:
    """What a server said of each row, how many tokens at each place (FULL: all), and what it is."""

    name: str
    answers: tuple[PromptLogprobs, ...]
    top: int
    description: Mapping[str, Any]

    def predictions(
        self, places: Sequence[NDArray[np.int64]], device: torch.device
    ) -> Callable[[int, int, int], ServedTop]:
        """A function (row, first of its scored places, last + 1) -> predictions on `device`."""

        def at(row: int, start: int, stop: int) -> ServedTop:
            answer, where = self.answers[row], places[row][start:stop] - 1
            arrays = (answer.top_ids[where].astype(np.int64), answer.top_logprob[where], -answer.true_logprob[where])
            ids, logprobs, losses = (torch.from_numpy(array).to(device) for array in arrays)
            return ServedTop(ids, logprobs.float(), losses.float())

        return at


def ask_server(
    options: ServerOptions, rows: Sequence[Sequence[int]], digest: str, vocabulary: int, tick: Callable[[], None]
) -> Served:
    """Have every row scored; rows that the journal holds are not asked again. `digest` tells the rows from others.

    UserError where the server cannot do it, ServerLost where it goes away: the journal keeps what was answered.
    """
    log = _read_log(options.log)
    with connect(options.url, model=options.model) as server:
        server.check_length(max(map(len, rows)))
        top = _agree_on_top(server, options.top)
        key = {"model": server.model, "root": server.root, "engine": server.version, "rows": digest, "top": top}
        answers = []
        options.journal.parent.mkdir(parents=True, exist_ok=True)
        with Journal.open(options.journal, key) as journal:
            for index, row in enumerate(rows):
                answer = journal.get(index)
                if answer is None:
                    answer = _score(server, row, top)
                    _check_vocabulary(server, answer, vocabulary)
                    journal.put(index, answer)
                answers.append(answer)
                tick()
        kernels = kernels_from_log(log or server.config_text() or "")
        description = server.describe() | {"top": "all" if top == FULL else top, "kernels": asdict(kernels)}
    name = f"{Path(server.model).name} (served)"
    return Served(name, tuple(answers), top, {"name": name} | description)


def _agree_on_top(server: Server, wanted: int) -> int:
    if wanted != FULL:
        found = find_top(server, wanted)
        top = wanted if found == FULL else found
    elif (top := find_top(server, DEFAULT_TOP)) != FULL:
        raise UserError(
            f"it does not tell its full vocabulary, {top} tokens at most.",
            where=server.url,
            remedy="Start it with --max-logprobs -1, or ask for fewer with --server-top.",
        )
    if top == 0:
        raise UserError(
            "it tells the row's own tokens only, which give no divergence.",
            where=server.url,
            remedy="Start it with --max-logprobs 256 or more.",
        )
    return top


def _score(server: Server, row: Sequence[int], top: int) -> PromptLogprobs:
    try:
        return server.score(row, top=top)
    except NotFiniteError:  # it cannot say at which place: the whole row counts as such
        size = len(row) - 1
        blank = np.full((size, 1), math.nan, np.float32)
        return PromptLogprobs(np.full(size, math.nan), np.zeros((size, 1), np.int32), blank)


def _check_vocabulary(server: Server, answer: PromptLogprobs, vocabulary: int) -> None:
    highest = int(answer.top_ids.max(initial=0))
    if highest >= vocabulary:
        raise UserError(
            f"it names token {highest}, beyond the reference's vocabulary of {vocabulary}.",
            where=server.url,
            remedy="Give the original of the model that it serves as --reference.",
        )


def _read_log(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}).", where=str(path), remedy="Give the server's log, or leave it out."
        ) from None
