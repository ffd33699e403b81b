"""Requests with a clock: streamed completions, some at a time, each with the moments of its tokens.

A token is an event of the stream that has choices. Events are counted as bytes arrive; only the first, and those with a
count of tokens or an error, are parsed as JSON, so that one process keeps up with a fast server. Moments are those of
the event loop's clock, which tests replace.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from snugfit.serving.client import error_in

LONGEST_MESSAGE = 160
_NO_ANSWER = (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One request: moments in seconds of the loop's clock, tokens as the server counted them (else as it sent them).

    `cached_tokens` of the prompt came from a cache, None where the server does not say. With an `error` the rest is
    what came before it; `lost` says that the connection failed.
    """

    begun: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None
    lost: bool = False

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.first - self.begun

    @property
    def latency(self) -> float:
        """Seconds to the last token."""
        return self.last - self.begun

    @property
    def between_tokens(self) -> float | None:
        """Seconds a token after the first; None for fewer than two tokens, or where all came at once."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 and self.last > self.first else None


async def complete(client: httpx.AsyncClient, body: Mapping[str, Any], limit_seconds: float) -> Timing:
    """Send one streamed completion and time its tokens; failures are a Timing with `error`, never an exception."""
    clock = asyncio.get_running_loop().time
    events = _Events(clock())
    try:
        async with (
            asyncio.timeout(limit_seconds),
            client.stream("POST", "/v1/completions", json=dict(body)) as response,
        ):
            if response.status_code != httpx.codes.OK:
                await response.aread()
                return events.timing(f"status {response.status_code}: {_said(response.text)}")
            async for piece in response.aiter_bytes():
                events.add(piece, clock())
    except (TimeoutError, httpx.TimeoutException):
        return events.timing(f"no answer within {limit_seconds:g} s")
    except _NO_ANSWER as error:
        return events.timing(f"the connection failed ({type(error).__name__})", lost=True)
    except (httpx.HTTPError, httpx.StreamError, ValueError) as error:
        return events.timing(f"the answer cannot be read ({type(error).__name__})")
    return events.timing(events.fault())


async def run_users(
    client: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], users: int, limit_seconds: float
) -> list[Timing]:
    """Send all `bodies`, at most `users` at a time; each user sends its next request when the last one is answered."""
    waiting = iter(bodies)
    found: list[Timing] = []

    async def user() -> None:
        for body in waiting:
            timing = await complete(client, body, limit_seconds)
            found.append(timing)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(users, len(bodies))):
            group.create_task(user())
    return found


class _Events:
    """The server-sent events of one answer."""

    def __init__(self, begun: float) -> None:
        self._begun = begun
        self._rest = b""
        self._first = self._last = 0.0
        self._seen = 0
        self._done = False
        self._usage: dict[str, Any] = {}
        self._cached: int | None = None
        self._error: str | None = None

    def add(self, piece: bytes, now: float) -> None:
        """Read what came at the moment `now`; ValueError for what is not JSON."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                self._done = True
            elif not self._seen or self._worth_reading(line):
                self._read(json.loads(line[5:]), now)
            else:
                self._token(now)

    @staticmethod
    def _worth_reading(line: bytes) -> bool:
        usage = b'"usage"' in line and b'"usage":null' not in line and b'"usage": null' not in line
        return usage or b'"error"' in line or b'"timings"' in line or b'"choices":[]' in line

    def _read(self, document: Any, now: float) -> None:
        if not isinstance(document, dict):
            raise ValueError("not an object")  # noqa: TRY004  # as all that is wrong with an answer
        if "error" in document:
            self._error = _said(json.dumps(document))
            return
        usage, timings = document.get("usage"), document.get("timings")
        if isinstance(usage, dict):
            self._usage = usage
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                self._cached = _count(details.get("cached_tokens"))
        if isinstance(timings, dict):  # llama.cpp
            self._cached = _count(timings.get("cache_n"))
        choices = document.get("choices")
        if not isinstance(choices, list):
            raise ValueError("no choices")  # noqa: TRY004
        if choices:
            ends_empty = isinstance(choices[0], dict) and choices[0].get("finish_reason") and not choices[0].get("text")
            if not (self._seen and ends_empty and isinstance(timings, dict)):  # llama.cpp's last event has no token
                self._token(now)

    def _token(self, now: float) -> None:
        self._first = self._first or now
        self._last = now
        self._seen += 1

    def fault(self) -> str | None:
        """What is wrong with an answer that ended; None if nothing is."""
        if self._error is not None:
            return self._error
        if not self._seen:
            return "an answer without a token"
        return None if self._done else "the answer was cut off"

    def timing(self, error: str | None, *, lost: bool = False) -> Timing:
        """What was seen."""
        return Timing(
            begun=self._begun,
            first=self._first,
            last=self._last,
            tokens=_count(self._usage.get("completion_tokens")) or self._seen,
            prompt_tokens=_count(self._usage.get("prompt_tokens")),
            cached_tokens=self._cached,
            error=error,
            lost=lost,
        )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _said(text: str) -> str:
    """A server's message in one short line."""
    try:
        found = error_in(json.loads(text))
        text = found if isinstance(found, str) else json.dumps(found)
    except ValueError:
        pass
    return " ".join(text.split())[:LONGEST_MESSAGE]
