"""A running server as a candidate: its answers for every chunk, kept in a journal, as predictions to compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from snugfit.errors import UserError
from snugfit.evaluation.chunks import Chunk, ChunkGroup
from snugfit.evaluation.divergence import ServedTop
from snugfit.evaluation.measure import Predictions
from snugfit.progress import SILENT, Progress
from snugfit.records.evaluation import EvaluatedServer
from snugfit.serving.answers import FULL, PromptLogprobs
from snugfit.serving.client import NotFiniteError, Server, connect, find_top
from snugfit.serving.engine_log import kernels_from_log, read_log
from snugfit.serving.journal import Journal
from snugfit.storage.files import with_parents

DEFAULT_TOP_LOGPROBS = 256


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A server to evaluate, and the `journal`, a file that keeps its answers so that an interrupted run can resume.

    `model` is one of its models, by default its only one; `top_logprobs` the number of most likely tokens to ask for at
    every position (-1: all); `log` the server's log, which names the kernels it chose.
    """

    url: str
    journal: Path
    model: str | None = None
    top_logprobs: int = DEFAULT_TOP_LOGPROBS
    log: Path | None = None


@dataclass(frozen=True)
class ServedModel:
    """A server's answers by the chunk's number, with `top` tokens at each position (FULL: all), and its description."""

    answers: tuple[PromptLogprobs, ...]
    top: int
    description: EvaluatedServer

    def predictions(self, device: torch.device) -> Predictions:
        """What was answered for a chunk's scored tokens, on `device`."""

        def answered(chunk: Chunk, start: int, stop: int) -> ServedTop:
            answer, where = self.answers[chunk.number], chunk.target_positions[start:stop] - 1
            arrays = (answer.top_ids[where].astype(np.int64), answer.top_logprob[where], -answer.true_logprob[where])
            ids, logprobs, losses = (torch.from_numpy(array).to(device) for array in arrays)
            return ServedTop(ids, logprobs.float(), losses.float())

        return answered


def ask_server(
    options: ServerOptions, groups: Sequence[ChunkGroup], vocabulary: int, progress: Progress = SILENT
) -> ServedModel:
    """Have every chunk scored, except those that the journal has already.

    UserError where the server cannot do it, ServerLostError where it stops answering: the journal keeps its answers.
    """
    log = None if options.log is None else read_log(options.log)
    chunks = [chunk for group in groups for chunk in group.chunks]
    with connect(options.url, model=options.model) as server:
        server.check_length(max(len(chunk.ids) for chunk in chunks))
        top = _agree_on_top(server, options.top_logprobs)
        rows = " ".join(group.digest for group in groups)
        key = {"model": server.model, "root": server.root, "engine": server.version, "rows": rows, "top": top}
        answers = []
        with (
            with_parents(options.journal),
            Journal.open(options.journal, key) as journal,
            progress.bar(len(chunks), "asking the server") as advance,
        ):
            for chunk in chunks:
                answer = journal.get(chunk.number)
                if answer is None:
                    answer = _score(server, chunk.ids, top)
                    _check_vocabulary(server, answer, vocabulary)
                    journal.put(chunk.number, answer)
                answers.append(answer)
                advance()
        description = EvaluatedServer(
            name=f"{Path(server.model).name} (served)",
            **server.describe(),
            top_logprobs="all" if top == FULL else top,
            kernels=kernels_from_log(log or server.config_text() or ""),
        )
    return ServedModel(tuple(answers), top, description)


def _agree_on_top(server: Server, wanted: int) -> int:
    """How many tokens the server will be asked for at each position."""
    if wanted != FULL:
        found = find_top(server, wanted)
        top = wanted if found == FULL else found
    elif (top := find_top(server, DEFAULT_TOP_LOGPROBS)) != FULL:
        raise UserError(
            f"the server does not give its full vocabulary, only {top} tokens at a position.",
            code="server-unsupported",
            where=server.url,
            remedy="Start it with --max-logprobs -1, or lower `top_logprobs`.",
        )
    if top == 0:
        raise UserError(
            "the server only gives the chunk's own tokens, from which no divergence can be computed.",
            code="server-unsupported",
            where=server.url,
            remedy="Start it with --max-logprobs 256 or more.",
        )
    return top


def _score(server: Server, ids: Sequence[int], top: int) -> PromptLogprobs:
    try:
        return server.score(ids, top=top)
    except NotFiniteError:  # at which position is unknown: all tokens of the chunk count as not finite
        size = len(ids) - 1
        blank = np.full((size, 1), math.nan, np.float32)
        return PromptLogprobs(np.full(size, math.nan), np.zeros((size, 1), np.int32), blank)


def _check_vocabulary(server: Server, answer: PromptLogprobs, vocabulary: int) -> None:
    highest = int(answer.top_ids.max(initial=0))
    if highest >= vocabulary:
        raise UserError(
            f"the server names token {highest}, beyond the reference's vocabulary of {vocabulary}.",
            code="models-mismatch",
            where=server.url,
            remedy="Give the original of the served model as `reference`.",
        )
