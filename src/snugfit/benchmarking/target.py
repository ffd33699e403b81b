"""One server under measurement: its connection, its prompts, its counters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from snugfit.benchmarking.figures import Repeat
from snugfit.benchmarking.plan import WARM_UP_TOKENS, Setting
from snugfit.engines.metrics import prefix_hits
from snugfit.errors import UserError
from snugfit.serving.load import Timing, complete, run_users
from snugfit.serving.prompts import MIN_POOL, WORDS, PromptMaker

# what makes an answer as long as it was asked for, counts it, and keeps llama.cpp from reusing a prompt; a server that
# refuses unknown keys gets fewer of them
_KEYS: tuple[Mapping[str, Any], ...] = (
    {"ignore_eos": True, "cache_prompt": False, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True}},
    {},
)
_PROBE_TOKENS = 24


@dataclass
class Target:
    """A server that answers requests: the `model` it is asked for, how prompts are made, which keys it accepts."""

    url: str
    model: str
    client: httpx.AsyncClient
    prompts: PromptMaker
    keys: Mapping[str, Any]
    limit_seconds: float

    def body(self, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
        """A request with a prompt of its own."""
        return {
            "model": self.model,
            "prompt": self.prompts.make(prompt_tokens),
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            **self.keys,
        }

    async def repeat(self, setting: Setting) -> Repeat:
        """Measure one repeat of a cell."""
        bodies = [self.body(setting.prompt_tokens, setting.output_tokens) for _ in range(setting.requests)]
        clock = asyncio.get_running_loop().time
        begun = clock()
        timings = await run_users(self.client, bodies, setting.users, self.limit_seconds)
        return Repeat(timings, max(clock() - begun, 1e-9))

    async def warm_up(self, setting: Setting) -> list[Timing]:
        """The requests of one round, with short answers, which are not measured."""
        tokens = min(setting.output_tokens, WARM_UP_TOKENS)
        bodies = [self.body(setting.prompt_tokens, tokens) for _ in range(setting.users)]
        return await run_users(self.client, bodies, setting.users, self.limit_seconds)

    async def metrics(self) -> str:
        """The text of /metrics; empty where the server has none."""
        try:
            response = await self.client.get("/metrics", timeout=min(self.limit_seconds, 30.0))
        except (httpx.HTTPError, httpx.StreamError):
            return ""
        return response.text if response.status_code == httpx.codes.OK else ""

    async def hits(self) -> float | None:
        """Prompt tokens out of the prefix cache since the server started; None where it does not report them."""
        return prefix_hits(await self.metrics())

    async def alive(self) -> bool:
        """Whether the server still answers."""
        try:
            response = await self.client.get("/v1/models", timeout=10.0)
        except (httpx.HTTPError, httpx.StreamError):
            return False
        return response.status_code < httpx.codes.INTERNAL_SERVER_ERROR


async def open_target(
    client: httpx.AsyncClient, *, url: str, model: str, seed: int, limit_seconds: float
) -> tuple[Target, list[str]]:
    """The server, tried with short requests, and remarks; UserError where it answers none of them."""
    ids = await _token_ids(client, model)
    pools: list[list[int] | list[str]] = [*([ids] if len(ids) >= MIN_POOL else []), list(WORDS)]
    failure: Timing | None = None
    for pool in pools:
        for keys in _KEYS:
            maker = PromptMaker(pool, seed)
            target = Target(url, model, client, maker, keys, limit_seconds)
            timing = await complete(client, target.body(_PROBE_TOKENS, 2), limit_seconds)
            if timing.error is None:
                return target, await _adjust(target, timing)
            failure = timing
            if timing.lost:
                break
    raise _refused(failure, url)


def _refused(failure: Timing | None, url: str) -> UserError:
    said = failure.error if failure is not None else "no answer"
    if failure is not None and failure.lost:
        return UserError(f"{said}.", code="server-unreachable", where=url, remedy="Look at the server's log.")
    return UserError(
        f"the server does not complete a prompt ({said}).",
        code="server-unsupported",
        where=url,
        remedy="It must serve a text generation model at /v1/completions, streamed.",
    )


async def _token_ids(client: httpx.AsyncClient, model: str) -> list[int]:
    """The ids of common words; empty where the server has no /tokenize."""
    text = " ".join(WORDS)
    body = {"model": model, "prompt": text, "content": text, "add_special_tokens": False}
    try:
        response = await client.post("/tokenize", json=body, timeout=30.0)
        found: Any = response.json() if response.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, httpx.StreamError, ValueError):
        return []
    tokens = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        return []
    return list(dict.fromkeys(tokens))


async def _adjust(target: Target, timing: Timing) -> list[str]:
    """Measure how many tokens a word has, where prompts are words; remarks on what the server does not say."""
    notes = []
    if "ignore_eos" not in target.keys:
        notes.append(f"{target.url} refuses `ignore_eos`: an answer may be shorter than what was asked for")
    if timing.prompt_tokens is None:
        notes.append(f"{target.url} does not count tokens: events of its stream and words of the prompts are counted")
    elif not target.prompts.of_ids:
        longer = await complete(target.client, target.body(9 * _PROBE_TOKENS, 2), target.limit_seconds)
        if longer.error is None and longer.prompt_tokens is not None:
            slope = (longer.prompt_tokens - timing.prompt_tokens) / (8 * _PROBE_TOKENS)
            target.prompts.tokens_per_word = max(slope, 0.25)
            target.prompts.added_tokens = timing.prompt_tokens - _PROBE_TOKENS * target.prompts.tokens_per_word
    return notes
