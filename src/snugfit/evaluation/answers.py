"""Greedy answers of all models to the same questions: how long they are, and whether they repeat themselves.

Users notice a model that loops or rambles before they notice a KL. Lengths and repetition are compared with the
reference's answers, question by question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from snugfit.errors import UserError
from snugfit.evaluation.continuations import continue_greedily, shared_beginning
from snugfit.evaluation.evaluated_model import EvaluatedModel
from snugfit.evaluation.plan import EvaluationPlan
from snugfit.evaluation.served import ServerOptions
from snugfit.progress import Progress
from snugfit.records.evaluation import Answer, AnswerFigures
from snugfit.serving.client import Server, connect
from snugfit.serving.text_quality import loops, repeated_share

ANSWER_TOKENS = 192
QUESTIONS = (
    "What is the difference between a virus and a bacterium?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List ten countries in Africa and their capitals.",
    "Write a Python function that returns the prime numbers below n.",
    "Explain how a refrigerator works to a ten-year-old.",
    "Give me a recipe for pancakes, with the amounts.",
    "A train travels 120 km in 90 minutes. What is its average speed in km/h? Show your steps.",
    "Summarize the plot of Romeo and Juliet in five sentences.",
    "What are the advantages and disadvantages of nuclear power?",
    "Write an e-mail to a landlord about a broken heater.",
    "Count from 1 to 40.",
    "Translate into French: The library opens at nine o'clock and closes at six.",
    "Write a poem of eight lines about autumn.",
    "Why do leaves change color in autumn?",
    "Write an SQL query that lists the five customers with the largest total of orders.",
    "Describe the water cycle step by step.",
)


def choose_questions(
    count: int, path: str | Path | None, answer_tokens: int, reference: str | Path | None
) -> tuple[str, ...]:
    """The first `count` questions of the file `path`, or of the built-in ones; UserError where there are too few."""
    if count < 0:
        raise UserError(f"must be >= 0, got {count}.", code="option-invalid", where="answers")
    if answer_tokens < 8:
        raise UserError(f"must be >= 8, got {answer_tokens}.", code="option-invalid", where="answer_tokens")
    if not count:
        if path is not None:
            raise UserError("has no effect without `answers`.", code="option-conflict", where="questions")
        return ()
    if reference is not None and not Path(reference).is_dir():
        what = "a stored reference cannot answer questions."
        remedy = "Give the original model's directory as `reference`, or leave `answers` out."
        raise UserError(what, code="option-conflict", where="answers", remedy=remedy)
    found = QUESTIONS if path is None else _read(Path(path))
    if len(found) < count:
        what = f"there are {len(found)} questions, not {count}."
        raise UserError(what, code="option-invalid", where="answers", remedy="Ask for fewer, or give more `questions`.")
    return found[:count]


def _read(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({error})."
        raise UserError(what, code="file-unreadable", where=str(path), remedy="Give a text file in UTF-8.") from None
    return tuple(line.strip() for line in lines if line.strip())


def answer_all(
    plan: EvaluationPlan,
    questions: Sequence[str],
    limit: int,
    server: ServerOptions | None,
    device: torch.device,
    progress: Progress,
) -> tuple[Answer, ...]:
    """Every model's answers, the reference's first, the server's last."""
    prompts = [_prompt(plan, question) for question in questions]
    reference = plan.reference if isinstance(plan.reference, EvaluatedModel) else None
    others = [model for model in plan.models if model is not reference]
    models = [*([] if reference is None else [reference]), *others]
    found: list[Answer] = []
    of_reference: list[list[int]] | None = None
    with progress.bar((len(models) + (server is not None)) * len(prompts), "answering") as advance:
        for model in models:
            ends = _ends(model.skeleton.config)
            rows = continue_greedily(model, prompts, device, tokens=limit, advance=advance)
            if model is reference:
                of_reference = rows
            finished = [bool(row) and row[-1] in ends for row in rows]
            compared = None if model is reference else of_reference
            found += _answers(model.name, questions, rows, finished, compared, plan)
        if server is not None:
            assert plan.served is not None
            name = plan.served.description.name
            with connect(server.url, model=server.model) as connected:
                pairs = []
                for prompt in prompts:
                    pairs.append(_ask(connected, prompt, limit, plan))
                    advance()
            rows, ended = [row for row, _ in pairs], [end for _, end in pairs]
            found += _answers(name, questions, rows, ended, of_reference, plan)
    return tuple(found)


def _prompt(plan: EvaluationPlan, question: str) -> list[int]:
    """A question in the model's chat template; as it is for a model without."""
    if plan.tokenizer.chat_template is None:
        return plan.tokenizer.encode(question, where="questions")
    messages = [{"role": "user", "content": question}]
    return plan.tokenizer.chat(messages, where="questions", add_generation_prompt=True)


def _ends(config: Any) -> frozenset[int]:
    """The tokens that end a model's answer."""
    end = getattr(config, "eos_token_id", None)
    return frozenset([end] if isinstance(end, int) else end or ())


def _ask(server: Server, prompt: Sequence[int], limit: int, plan: EvaluationPlan) -> tuple[list[int], bool]:
    """A server's answer as token ids, and whether it ended it; UserError where it refuses."""
    body = {
        "model": server.model,
        "prompt": list(prompt),
        "max_tokens": limit,
        "temperature": 0,
        "return_token_ids": True,
    }
    try:
        response = server.client.post("/v1/completions", json=body)
        choice = response.json()["choices"][0]
        ids, text, reason = choice.get("token_ids"), choice["text"], choice.get("finish_reason")
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = f"the server does not answer a prompt of token ids ({type(error).__name__})."
        raise UserError(what, code="server-unsupported", where=server.url, remedy="Set `answers` to 0.") from None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        ids = plan.tokenizer.encode(str(text), where=server.url, special_tokens=False)
    return ids, reason == "stop"


def _answers(
    name: str,
    questions: Sequence[str],
    rows: Sequence[Sequence[int]],
    finished: Sequence[bool],
    of_reference: Sequence[Sequence[int]] | None,
    plan: EvaluationPlan,
) -> list[Answer]:
    return [
        Answer(
            model=name,
            question=question,
            text=plan.tokenizer.decode(row),
            tokens=len(row),
            finished=ended,
            repeated=repeated_share(row),
            loops=loops(row),
            same_tokens=None if of_reference is None else shared_beginning(of_reference[place], row),
        )
        for place, (question, row, ended) in enumerate(zip(questions, rows, finished, strict=True))
    ]


def answer_figures(answers: Sequence[Answer], limit: int, has_reference: bool) -> tuple[AnswerFigures, ...]:
    """A line for each model; the first is the reference, if there is one."""
    by_model: dict[str, list[Answer]] = {}
    for answer in answers:
        by_model.setdefault(answer.model, []).append(answer)
    reference = next(iter(by_model.values()), []) if has_reference else []
    return tuple(
        _figures(own, limit, reference if reference and own is not reference else None) for own in by_model.values()
    )


def _figures(own: Sequence[Answer], limit: int, reference: Sequence[Answer] | None) -> AnswerFigures:
    tokens, tokens_error = _mean([one.tokens for one in own])
    repeated, repeated_error = _mean([one.repeated for one in own])
    changes: dict[str, float | None] = {}
    if reference is not None:
        lengths = [one.tokens for one in reference]
        changes["length_change"], changes["length_change_error"] = _ratio([one.tokens for one in own], lengths)
        differences = [one.repeated - other.repeated for one, other in zip(own, reference, strict=True)]
        changes["repeated_change"], changes["repeated_change_error"] = _mean(differences)
        changes["same_tokens"] = float(np.mean([one.same_tokens or 0 for one in own]))
    return AnswerFigures(
        model=own[0].model,
        questions=len(own),
        limit=limit,
        tokens=tokens,
        tokens_error=tokens_error,
        repeated=repeated,
        repeated_error=repeated_error,
        loops=sum(one.loops for one in own),
        unfinished=sum(not one.finished for one in own),
        **changes,
    )


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, None of fewer than two values."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def _ratio(own: Sequence[float], other: Sequence[float]) -> tuple[float | None, float | None]:
    """Sum over sum minus 1, with the delta method's standard error over questions."""
    total = float(sum(other))
    if not total:
        return None, None
    ratio = sum(own) / total
    if len(own) < 2:
        return ratio - 1, None
    rest = [a - ratio * b for a, b in zip(own, other, strict=True)]
    return ratio - 1, math.sqrt(len(own)) * float(np.std(rest, ddof=1)) / total
