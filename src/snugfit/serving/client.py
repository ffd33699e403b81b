"""Log probabilities of given tokens from a server: vLLM's OpenAI-style API and its `prompt_logprobs`.

How vLLM behaves (source of 0.32, and tried):

- A row of ids at /v1/completions is scored unchanged (no BOS is added), whole, without reading the prefix cache, and
  before temperature, logit bias or penalties, in fp32.
- A NaN anywhere makes the whole answer a 400 ("Out of range float values are not JSON compliant").
- One token must be generated, so a row may have `max_model_len` - 1 tokens; with one more, the message is
  "max_tokens must be at least 1, got 0".
- `prompt_logprobs` is at most --max-logprobs (20 by default); -1 is the full vocabulary and needs --max-logprobs -1.
- With --logprobs-mode raw_logits it answers with logits under the same name; those are refused.

OpenAI, llama.cpp, SGLang and others ignore the field; an answer without it is refused.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import httpx

from snugfit.errors import Unfinished, UserError
from snugfit.serving.answers import FULL, PromptLogprobs, read_answer

API_KEYS = ("SNUGFIT_API_KEY", "VLLM_API_KEY")
ATTEMPTS = 6
MAX_PAUSE_SECONDS = 30.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
TOO_LONG = re.compile(r"context length|maximum model length|max_tokens must be at least 1, got (?:0|-)")
MOST_ALLOWED = re.compile(r"max allowed: (\d+)")


class ServerLostError(Unfinished):
    """The server stopped answering or kept failing; the rows that it answered are complete."""


class NotFiniteError(UserError):
    """The model computes NaN on a row; the server cannot write NaN, so the positions are unknown."""


class _RefusedError(UserError):
    """The server answered, and declined the request: `status`, and `message` in the server's words."""

    def __init__(self, what: str, *, where: str, remedy: str = "", status: int, message: str) -> None:
        super().__init__(what, code="server-refused", where=where, remedy=remedy)
        self.status, self.message = status, message


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server and the model it is asked for; a context manager that closes its connections.

    `url` has no /v1 and no password. `max_model_len` is in tokens; None where the server does not report it.
    """

    url: str
    model: str
    engine: str | None
    version: str | None
    root: str | None
    max_model_len: int | None
    client: httpx.Client = field(repr=False, compare=False)
    attempts: int = field(default=ATTEMPTS, repr=False, compare=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def describe(self) -> dict[str, Any]:
        """The url, engine, version, model, root and max_model_len; None for what the server does not report."""
        names = ("url", "engine", "version", "model", "root", "max_model_len")
        return {name: getattr(self, name) for name in names}

    def config_text(self) -> str | None:
        """The engine's configuration as a line of its log, for `kernels_from_log`; None where it is not reported.

        vLLM reports it at /server_info, and only if started with VLLM_SERVER_DEV_MODE=1.
        """
        answer = _optional(self.client, "/server_info")
        text = answer.get("vllm_config")
        return f"Initializing a V1 LLM engine (v{self.version}) with config: {text}" if isinstance(text, str) else None

    def score(self, ids: Sequence[int], *, top: int, dense: bool = False) -> PromptLogprobs:
        """Log probabilities of one row: its own tokens and the `top` most likely of each position (-1: all V tokens).

        `dense` with top = -1 gives [n-1, V] instead of sorted top arrays, which then have no columns. UserError where
        the row cannot be scored (NotFiniteError where the model computes NaN), ServerLostError where the server keeps
        failing.
        """
        row = [int(token) for token in ids]
        if dense and top != FULL:
            raise ValueError("dense needs the full vocabulary: top=-1")
        if len(row) < 2:
            raise UserError(
                "a row of fewer than two tokens has nothing to predict.", code="dataset-invalid", where=self.url
            )
        self.check_length(len(row))
        body = {
            "model": self.model,
            "prompt": row,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        return self._ask(body, lambda pieces: read_answer(pieces, row, top=top, dense=dense, where=self.url))

    def check_length(self, length: int) -> None:
        """UserError where a row of `length` tokens is too long for the server."""
        if self.max_model_len is not None and length >= self.max_model_len:
            self._too_long(length)

    def _ask(self, body: Mapping[str, Any], read: Callable[[Iterator[str]], PromptLogprobs]) -> PromptLogprobs:
        """Post; post again after growing pauses where the connection or the server fails."""
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(min(MAX_PAUSE_SECONDS, 2.0 ** (attempt - 1)))
            try:
                with self.client.stream("POST", "/v1/completions", json=body) as response:
                    if response.status_code == httpx.codes.OK:
                        return read(response.iter_text())
                    said = _message(response)
                    if response.status_code not in TRANSIENT:
                        self._refuse(response, said, len(body["prompt"]))
                    reason = f"status {response.status_code}: {said}"
            except httpx.TransportError as error:
                reason = _reason(error)
            except httpx.DecodingError as error:
                raise UserError(
                    f"the answer cannot be decompressed ({error}).", code="server-answer-invalid", where=self.url
                ) from None
        raise ServerLostError(
            f"the server failed {self.attempts} times ({reason}).",
            code="server-unreachable",
            where=self.url,
            remedy="Start the server again and repeat the same call: it resumes after the rows that were answered.",
        )

    def _refuse(self, response: httpx.Response, said: str, length: int) -> NoReturn:
        status = response.status_code
        _check_access(response, self.url)
        if TOO_LONG.search(said):
            self._too_long(length, said)
        if "not JSON compliant" in said:
            remedy = "Leave the row out, or serve the model in another data type."
            what = "the model computes NaN on this row."
            raise NotFiniteError(what, code="server-not-finite", where=self.url, remedy=remedy)
        remedy = ""
        if "out of vocabulary" in said:
            remedy = "The rows were tokenized with another tokenizer than the served model's."
        elif MOST_ALLOWED.search(said):
            remedy = "Lower `top_logprobs`, or start the server with a larger --max-logprobs."
        elif "does not exist" in said:
            remedy = "The server now serves another model."
        elif status in (404, 405, 501):
            remedy = "It must serve a text generation model at /v1/completions."
        what = f"the server refuses the request (status {status}: {said.rstrip('.')})."
        raise _RefusedError(what, where=self.url, remedy=remedy, status=status, message=said)

    def _too_long(self, length: int, said: str = "") -> NoReturn:
        limit = f"max_model_len is {self.max_model_len}" if self.max_model_len is not None else said.rstrip(".")
        remedy = f"Use shorter rows, or start the server with --max-model-len {length + 1}."
        what = f"a row of {length} tokens plus one generated token is too long for the server ({limit})."
        raise UserError(what, code="sequence-too-long", where=self.url, remedy=remedy)


def connect(
    url: str,
    *,
    model: str | None = None,
    timeout: float = 600.0,
    api_key: str | None = None,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], None] = time.sleep,
) -> Server:
    """The server at `url`, with or without /v1, and its only model or the one named `model`.

    `timeout` is the longest silence in seconds; a row of full vocabulary takes minutes before its first byte. The key
    is `api_key`, else SNUGFIT_API_KEY, else VLLM_API_KEY of the environment. UserError where no server answers, the key
    or the model is wrong, or the server is of another kind.
    """
    base, shown = _base(url)
    key = (api_key or next((os.environ[name] for name in API_KEYS if os.environ.get(name)), "")).strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            "the API key has characters that an HTTP header cannot contain.",
            code="option-invalid",
            where=shown,
            remedy=f"Correct {' or '.join(API_KEYS)} in the environment.",
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
    client = httpx.Client(base_url=base, headers=headers, timeout=limits)
    try:
        cards = _models(client, shown)
        card = _choose(cards, model, shown)
        version = _optional(client, "/version").get("version")
    except BaseException:
        client.close()
        raise
    length = card.get("max_model_len")
    return Server(
        url=shown,
        model=card["id"],
        engine=_text(card.get("owned_by")),
        version=_text(version),
        root=_text(card.get("root")),
        max_model_len=length if isinstance(length, int) else None,
        client=client,
        attempts=attempts,
        sleep=sleep,
    )


def find_top(server: Server, wanted: int) -> int:
    """The best `top` for `score`: -1 where the server gives its full vocabulary, else the most allowed up to `wanted`.

    Found by requests for two tokens. 0 means that the server only gives the row's own tokens.
    """
    probe = (0, 0)
    allowed = wanted
    try:
        server.score(probe, top=FULL)
    except _RefusedError as error:
        if found := MOST_ALLOWED.search(error.message):
            allowed = min(wanted, int(found[1]))
    else:
        return FULL
    while True:
        try:
            answer = server.score(probe, top=allowed)
        except _RefusedError:
            if allowed == 0:
                raise
            allowed //= 2
        else:
            return int((answer.top_ids[0] >= 0).sum())


# What the server is.


def _base(url: str) -> tuple[str, str]:
    """The address that paths are added to, and the same without a password."""
    text = url.strip() if "://" in url else f"http://{url.strip()}"
    remedy = "Give a URL such as http://localhost:8000."
    try:
        parsed = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"not a URL ({error}).", code="option-invalid", where=url, remedy=remedy) from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise UserError("not the URL of a server.", code="option-invalid", where=url, remedy=remedy)
    path = parsed.path.rstrip("/").removesuffix("/v1").rstrip("/")
    address = parsed.copy_with(path=path or "/")
    return str(address).rstrip("/"), str(address.copy_with(userinfo=b"")).rstrip("/")


def _models(client: httpx.Client, url: str) -> list[dict[str, Any]]:
    """The cards of /v1/models that have an id."""

    def other_kind(what: str) -> UserError:
        remedy = "Give the root URL of a server started with `vllm serve`, such as http://localhost:8000."
        return UserError(f"not an OpenAI-style server: {what}.", code="server-unsupported", where=url, remedy=remedy)

    try:
        response = client.get("/v1/models")
    except httpx.TransportError as error:
        raise UserError(
            f"cannot connect ({_reason(error)}).",
            code="server-unreachable",
            where=url,
            remedy="Start the server (`vllm serve MODEL`), or correct `server`.",
        ) from None
    except httpx.DecodingError:
        raise other_kind("the answer cannot be decompressed") from None
    _check_access(response, url)
    if response.is_redirect:
        raise UserError(
            f"the server redirects to {response.headers.get('location')}.",
            code="server-refused",
            where=url,
            remedy="Give that address as `server`.",
        )
    if response.status_code != httpx.codes.OK:
        said = _message(response)
        raise other_kind(f"/v1/models answers {response.status_code} ({said})")
    data = _object(response).get("data")
    cards = [card for card in data if isinstance(card, dict) and card.get("id")] if isinstance(data, list) else None
    if not cards:
        raise other_kind("/v1/models lists no model")
    return cards


def _choose(cards: list[dict[str, Any]], model: str | None, url: str) -> dict[str, Any]:
    names = ", ".join(str(card["id"]) for card in cards)
    for card in cards:
        if card["id"] == model or (model is None and len(cards) == 1):
            return card
    if model is None:
        raise UserError(
            f"the server has several models: {names}.",
            code="option-invalid",
            where=url,
            remedy="Choose one with `server_model`.",
        )
    raise UserError(f"the server has no model {model!r}.", code="option-invalid", where=url, remedy=f"It has: {names}.")


def _optional(client: httpx.Client, path: str) -> dict[str, Any]:
    """The JSON object at a path that not every server has; empty where the server lacks it."""
    try:
        response = client.get(path)
    except (httpx.TransportError, httpx.DecodingError):
        return {}
    return _object(response) if response.status_code == httpx.codes.OK else {}


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _check_access(response: httpx.Response, url: str) -> None:
    if response.status_code not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return
    sent = "refuses the API key" if "Authorization" in response.request.headers else "needs an API key"
    remedy = f"Set {' or '.join(API_KEYS)} in the environment."
    what = f"the server {sent} (status {response.status_code})."
    raise UserError(what, code="server-refused", where=url, remedy=remedy)


def error_in(document: Any) -> Any:
    """What a JSON answer says of a failure, however deep servers put it; the document itself where it says nothing."""
    for name in ("error", "message", "detail"):
        if isinstance(document, dict) and name in document:
            document = document[name]
    return document


def _message(response: httpx.Response) -> str:
    """The server's own message about a failure, in one line of at most 500 characters."""
    response.read()
    said = error_in(_object(response))
    if not said:
        said = response.text or response.reason_phrase
    return " ".join((said if isinstance(said, str) else json.dumps(said)).split())[:500]


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
