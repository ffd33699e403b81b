"""A stand-in for an inference engine with set speeds, spread, failures and a prefix cache: simulated, or over HTTP.

`MockEngine.answer` is asynchronous and waits by `asyncio.sleep`, so that its speeds are exact under `SimulatedLoop`,
whose clock jumps to the next event instead of waiting. `served` runs the same engine on the loopback in real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import selectors
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

BLOCK = 16
MODEL = "mock/engine"


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps ahead wherever it would wait: hours pass in no time, and exactly."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """The simulated moment in seconds."""
        return self.now


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found and timeout is None:
            raise RuntimeError("nothing will ever happen in this loop")
        if not found and timeout:
            self._loop.now += timeout
        return found


@dataclass
class MockEngine:
    """`prefill_rate` prompt tokens a second, one prompt after another; `decode_rate` tokens a second of each user.

    A request's token times are multiplied by a factor of log-normal `spread`. A share `failures` of the requests fails.
    `cache` turns a prefix cache of blocks on, `ids` the server's /tokenize and prompts of ids, `counts` usage,
    `metrics` the hit counters. After `dies_after` completions the connection breaks.
    """

    prefill_rate: float = 10_000.0
    decode_rate: float = 100.0
    spread: float = 0.0
    failures: float = 0.0
    cache: bool = True
    ids: bool = True
    counts: bool = True
    metrics: bool = True
    strict: bool = False
    max_model_len: int = 40_000
    overhead: float = 0.0
    dies_after: int | None = None
    seed: int = 0
    chat: str | None = "The capital is Paris."
    hits: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    _blocks: set[int] = field(default_factory=set)
    _lock: asyncio.Lock | None = None
    _waiting: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311

    @property
    def dead(self) -> bool:
        """Whether it answers no more."""
        return self.dies_after is not None and len(self.asked) > self.dies_after

    def page(self, method: str, path: str, body: Any) -> tuple[int, Any]:  # noqa: PLR0911
        """What is not a completion: status, and JSON or text."""
        if path == "/v1/models":
            card = {"id": MODEL, "owned_by": "vllm", "root": "/models/mock", "max_model_len": self.max_model_len}
            return 200, {"object": "list", "data": [card]}
        if path == "/health":
            return 200, ""
        if path == "/version":
            return 200, {"version": "0.0-mock"}
        if path == "/v1/chat/completions" and method == "POST" and self.chat is not None:
            message = {"role": "assistant", "content": self.chat}
            usage = {"prompt_tokens": 9, "completion_tokens": len(self.chat.split())}
            return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        if path == "/tokenize" and method == "POST" and self.ids:
            return 200, {"tokens": [100 + n for n, _ in enumerate(body["prompt"].split())]}
        if path == "/metrics" and self.metrics:
            lines = [
                "# TYPE vllm:prefix_cache_hits counter",
                f'vllm:prefix_cache_hits_total{{engine="0",model_name="{MODEL}"}} {float(self.hits)}',
                'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="2048"} 1.0',
            ]
            return 200, "\n".join(lines) + "\n"
        return 404, {"detail": "Not Found"}

    async def answer(self, body: dict[str, Any]) -> tuple[int, AsyncIterator[bytes]]:
        """Status and events of a completion."""
        self.asked.append(body)
        if self.dead:
            raise httpx.RemoteProtocolError("the engine died")
        if self.strict and "ignore_eos" in body:
            return 400, _once({"error": {"message": "unknown field ignore_eos", "code": 400}})
        if body.get("model") != MODEL:
            return 404, _once({"error": {"message": f"The model {body.get('model')} does not exist."}})
        tokens = self.split(body["prompt"])
        if tokens is None:
            return 400, _once({"error": {"message": "prompt must be a string"}})
        if len(tokens) + body["max_tokens"] > self.max_model_len:
            return 400, _once({"error": {"message": "this is beyond the maximum model length"}})
        if self.random.random() < self.failures:
            return 500, _once({"error": {"message": "EngineCore encountered an issue."}})
        return 200, self._events(tokens, body)

    def split(self, prompt: Any) -> list[Any] | None:
        """The tokens of a prompt; None for ids where it takes none."""
        if isinstance(prompt, list):
            return prompt if self.ids else None
        return [
            "<bos>",
            *(part for word in prompt.split() for part in ([word[:4], word[4:]] if len(word) > 4 else [word])),
        ]

    async def _events(self, tokens: list[Any], body: dict[str, Any]) -> AsyncIterator[bytes]:
        factor = self.random.lognormvariate(0.0, self.spread)
        cached = self._cached(tokens)
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            await asyncio.sleep(self.overhead + (len(tokens) - cached) / self.prefill_rate)
        self.hits += cached
        for number in range(body["max_tokens"]):
            if number:
                await asyncio.sleep(factor / self.decode_rate)
            choice = {"index": 0, "text": " word", "finish_reason": None}
            yield _event({"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": None})
        if self.counts and body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": len(tokens), "completion_tokens": body["max_tokens"]}
            yield _event({"id": "cmpl-1", "object": "text_completion", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _cached(self, tokens: list[Any]) -> int:
        """Tokens of the prompt's first blocks that were seen before; all of its blocks are from now on."""
        if not self.cache:
            return 0
        keys, key = [], 0
        for end in range(1, (len(tokens) - 1) // BLOCK + 1):
            key = hash((key, *tokens[(end - 1) * BLOCK : end * BLOCK]))
            keys.append(key)
        found = next((n for n, key in enumerate(keys) if key not in self._blocks), len(keys))
        self._blocks.update(keys)
        return found * BLOCK


class Transport(httpx.AsyncBaseTransport):
    """The engine as the other end of an httpx client, without a network."""

    def __init__(self, engine: MockEngine) -> None:
        self.engine = engine

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """What the engine answers."""
        raw = await request.aread()
        body: Any = json.loads(raw) if raw else None
        path = request.url.path
        if self.engine.dead:
            raise httpx.ConnectError("refused")
        if path == "/v1/completions":
            status, events = await self.engine.answer(body)
            return httpx.Response(status, stream=_Stream(events))
        status, content = self.engine.page(request.method, path, body)
        return httpx.Response(status, text=content if isinstance(content, str) else json.dumps(content))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for event in self._events:
            yield event


@contextlib.contextmanager
def served(engine: MockEngine, port: int = 0) -> Iterator[str]:
    """The engine over HTTP on the loopback, in a thread of its own, in real time; its URL."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    address: list[Any] = []

    async def run() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await _one_request(engine, reader, writer):
                    pass
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", port)
        address.append(server.sockets[0].getsockname()[1])
        started.set()
        async with server:
            await server.serve_forever()

    def work() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    task = loop.create_task(run())
    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)
    try:
        yield f"http://127.0.0.1:{address[0]}"
    finally:
        loop.call_soon_threadsafe(lambda: [one.cancel() for one in asyncio.all_tasks(loop)])
        thread.join(10)
        loop.close()


async def _one_request(engine: MockEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answer one request; False where the connection has to end."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, path, *_ = head.split(" ")
    lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
    raw = await reader.readexactly(int(lengths[0])) if lengths else b""
    body: Any = json.loads(raw) if raw else None
    if engine.dead:
        return False
    if path.startswith("/v1/completions"):
        try:
            status, events = await engine.answer(body)
        except httpx.RemoteProtocolError:
            return False
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        async for event in events:
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
    else:
        status, content = engine.page(method, path, body)
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return True


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


async def _once(document: dict[str, Any]) -> AsyncIterator[bytes]:
    yield json.dumps(document).encode()
