"""Questions to a server that has just started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from snugfit.records.serve import ServeAnswer
from snugfit.serving.client import Server
from snugfit.serving.text_quality import verdict

ANSWER_TOKENS = 96


def ask(server: Server, questions: Sequence[str]) -> tuple[tuple[ServeAnswer, ...], list[str]]:
    """Greedy answers, as a chat where the model has a chat template, else as continuations; and remarks."""
    answers, notes = [], []
    chat = True
    for question in questions:
        found = _post(server, question, chat=chat)
        if found is None and chat:
            chat = False
            notes.append("the server does not chat with this model (no chat template?): the questions are continued")
            found = _post(server, question, chat=False)
        if found is None:
            notes.append(f"the server did not answer {question!r}")
            continue
        answers.append(found)
    return tuple(answers), notes


def _post(server: Server, question: str, *, chat: bool) -> ServeAnswer | None:
    """One answer; None where the server refuses."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": question}
    body = {"model": server.model, "max_tokens": ANSWER_TOKENS, "temperature": 0, **asked}
    try:
        response = server.client.post("/v1/chat/completions" if chat else "/v1/completions", json=body, timeout=300.0)
        document: Any = response.json() if response.status_code == httpx.codes.OK else None
        choice = document["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        if chat and not text:  # a model that reasons, cut off before its answer
            text = choice["message"].get("reasoning_content") or choice["message"].get("reasoning")
        tokens = document["usage"]["completion_tokens"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
        return None
    shown = text if isinstance(text, str) else ""
    return ServeAnswer(
        question=question,
        text=shown,
        tokens=tokens if isinstance(tokens, int) else 0,
        finished=choice.get("finish_reason") == "stop",
        verdict=verdict(shown),
    )
