"""Models in lm_eval's interface: a checkpoint that is run layer by layer, or a server.

On a checkpoint all requests become token rows that pass the model one decoder layer at a time, under a named activation
profile: a model larger than the memory is tested with the activations of an engine. Logits exist only at the positions
that are asked for, a few at a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snugfit.data.tokenizer import load_tokenizer
from snugfit.errors import UserError
from snugfit.evaluation.evaluated_model import EvaluatedModel, last_states, open_head
from snugfit.evaluation.gpu_memory import gpu_memory_errors
from snugfit.evaluation.task_loading import needs_server
from snugfit.model import forward_pass
from snugfit.progress import Progress

PASS_BYTES = 4 << 30  # hidden states in memory; requests with more of them pass through the model in parts
POSITIONS_AT_ONCE = 256  # logits in memory: this many times the vocabulary, in fp32
CONCURRENT = 8  # requests at a server at the same time


def local_model(model: EvaluatedModel, device: torch.device, tokens_per_batch: int, progress: Progress) -> Any:
    """An lm_eval model that runs a checkpoint; it tokenizes and truncates as lm_eval's HFLM does."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import resolve_max_length
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = load_tokenizer(model.checkpoint.path)
    length = resolve_max_length(model.skeleton.config, tokenizer)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    class LocalModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
        nonfinite = 0

        @property
        def eot_token_id(self) -> Any:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            if prefix is None:
                what = "the tokenizer has neither a BOS nor an EOS token, with which a text could begin."
                raise UserError(what, code="tokenizer-unusable", where=str(model.checkpoint.path))
            return int(prefix)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None and prefix is not None and string.startswith(tokenizer.decode(prefix)):
                add_special_tokens = False  # the text begins with BOS itself
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer.encode(string, **special))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            questions = [_question(context, continuation, length) for _, context, continuation in requests]
            answers = _answer(model, questions, device, tokens_per_batch, progress)
            self.nonfinite += sum(math.isinf(value) for value, _ in answers)
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            windows: list[tuple[None, list[int], list[int]]] = []
            ends = [0]
            for (string,) in (request.args for request in requests):
                pairs = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, length, 1)
                windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
                ends.append(len(windows))
            values = [value for value, _ in self._loglikelihood_tokens(windows)]
            return [sum(values[low:high]) for low, high in pairwise(ends)]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            raise needs_server(sorted({str(request.task_name) for request in requests}))

    return LocalModel()


@dataclass(frozen=True)
class _Question:
    """Token ids to run, and the ids whose probabilities are asked for, from position `first` of the row on."""

    row: tuple[int, ...]
    first: int
    wanted: tuple[int, ...]


def _question(context: Sequence[int], continuation: Sequence[int], length: int) -> _Question:
    """The row that scores `continuation`: without its last token, and cut at the left end where it is too long."""
    if not context or not 0 < len(continuation) <= length:
        raise UserError(
            f"a continuation of {len(continuation)} tokens after a context of {len(context)} cannot be scored: both "
            f"need a token, and the model takes {length}.",
            code="task-unusable",
            where="tasks",
        )
    row = (*context, *continuation)[-(length + 1) : -1]
    return _Question(row, len(row) - len(continuation), tuple(continuation))


def _share_rows(questions: Sequence[_Question]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Rows to run, and for each question the row that answers it: a longer row also answers for its beginnings."""
    rows: list[tuple[int, ...]] = []
    answered_by: dict[tuple[int, ...], int] = {}
    # in descending order a row comes right after the rows that it is the beginning of
    for row in sorted({question.row for question in questions}, reverse=True):
        if not rows or rows[-1][: len(row)] != row:
            rows.append(row)
        answered_by[row] = len(rows) - 1
    return rows, [answered_by[question.row] for question in questions]


def _passes(rows: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Row numbers, longest rows first, in parts of at most `tokens` padded tokens (or one row)."""
    parts: list[list[int]] = []
    left = 0
    for row in sorted(range(len(rows)), key=lambda r: -len(rows[r])):
        width = -(-len(rows[row]) // forward_pass.ROW_MULTIPLE) * forward_pass.ROW_MULTIPLE
        if not parts or left < width:
            parts.append([])
            left = tokens
        parts[-1].append(row)
        left -= width
    return parts


def _answer(
    model: EvaluatedModel,
    questions: Sequence[_Question],
    device: torch.device,
    tokens_per_batch: int,
    progress: Progress,
) -> list[tuple[float, bool]]:
    """For each question its log probability (nats, minus infinity where logits are not finite), and is it greedy."""
    rows, answered_by = _share_rows(questions)
    asked: list[list[int]] = [[] for _ in rows]
    for number, row in enumerate(answered_by):
        asked[row].append(number)
    embedding = model.skeleton.model.get_input_embeddings().weight  # type: ignore[operator]
    parts = _passes(rows, PASS_BYTES // (embedding.shape[1] * embedding.element_size()))
    totals, hits = np.zeros(len(questions)), np.zeros(len(questions), dtype=np.int64)
    with (
        gpu_memory_errors(device, "Free memory of the GPU, or set `device` to cpu."),
        progress.bar(len(parts) * len(model.skeleton.layers), "layers") as advance,
    ):
        for part in parts:
            positions, asks = _lay_out(part, asked, questions)
            chosen = [rows[row] for row in part]
            states = last_states(
                model,
                chosen,
                positions,
                device,
                tokens_per_batch=tokens_per_batch,
                advance=advance,
                warn=progress.message,
            )
            _score(torch.cat(states), asks, open_head(model, device), device, totals, hits)
    finite = np.isfinite(totals)
    return [
        (float(total) if fine else -math.inf, bool(fine and hit == len(question.wanted)))
        for total, hit, fine, question in zip(totals, hits, finite, questions, strict=True)
    ]


def _lay_out(
    part: Sequence[int], asked: Sequence[Sequence[int]], questions: Sequence[_Question]
) -> tuple[list[torch.Tensor], np.ndarray[Any, Any]]:
    """The positions needed of each row, and [asks, 3]: index among all positions (ascending), token id, question."""
    positions: list[torch.Tensor] = []
    asks: list[tuple[int, int, int]] = []
    before = 0
    for row in part:
        needed = sorted({questions[n].first + k for n in asked[row] for k in range(len(questions[n].wanted))})
        index = {position: before + k for k, position in enumerate(needed)}
        for number in asked[row]:
            question = questions[number]
            asks += [(index[question.first + k], token, number) for k, token in enumerate(question.wanted)]
        positions.append(torch.tensor(needed))
        before += len(needed)
    return positions, np.asarray(sorted(asks), dtype=np.int64)


def _score(
    states: torch.Tensor,
    asks: np.ndarray[Any, Any],
    head: forward_pass.Head,
    device: torch.device,
    totals: np.ndarray[Any, Any],
    hits: np.ndarray[Any, Any],
) -> None:
    """Add every asked token's log probability (fp32) to its question's total, and whether it is the most likely."""
    for low in range(0, len(states), POSITIONS_AT_ONCE):
        logits = head(states[None, low : low + POSITIONS_AT_ONCE].to(device))[0].float()
        first, last = np.searchsorted(asks[:, 0], (low, low + POSITIONS_AT_ONCE))
        at = torch.from_numpy(asks[first:last, 0] - low).to(device)
        wanted = torch.from_numpy(asks[first:last, 1].copy()).to(device)
        chosen = logits[at, wanted] - logits.logsumexp(-1)[at]
        questions = asks[first:last, 2]
        np.add.at(totals, questions, chosen.double().cpu().numpy())
        np.add.at(hits, questions, (logits.argmax(-1)[at] == wanted).cpu().numpy())


def served_model(directory: Path, url: str, name: str | None, seed: int) -> Any:
    """lm_eval's local-completions on a server that has the model; `directory` has its tokenizer."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    from snugfit.serving.client import connect

    tokenizer = load_tokenizer(directory)
    config = AutoConfig.from_pretrained(directory) if (directory / "config.json").is_file() else None
    with connect(url, model=name) as server:
        key = server.client.headers.get("Authorization")
        return LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=server.model,
            tokenizer=str(directory),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            # begins a text as the tokenizer does; lm_eval's own default is no BOS for servers
            add_bos_token=tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids,
            max_length=min(server.max_model_len or sys.maxsize, resolve_max_length(config, tokenizer)),
            num_concurrent=CONCURRENT,
            seed=seed,
            # without these headers it would send OPENAI_API_KEY to any server
            header={"User-Agent": "snugfit"} | ({"Authorization": key} if key else {}),
        )
