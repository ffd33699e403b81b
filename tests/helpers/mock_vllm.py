"""A mock of vLLM on the loopback that answers from a known small distribution, and fails in the ways that servers do.

Its next token depends on the one before it only, so every value that must come back is a row of one table.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

V = 24
MODEL = "mock/model"
# what tokenizers contain, and what a careless reader would trip over
TOKENS = ['"', "\\", "}},{", '"}},{"3":', "]", "\n", "é", "\ud83d\ude00", '"prompt_logprobs":[', " the"]
DROP, CUT, HANG = "drop", "cut", "hang"  # close without an answer, in the middle of one, say nothing
Change = Callable[[dict[str, Any]], Any]


def make_table() -> NDArray[np.float64]:
    """Log probabilities [previous token, next token], fp32 values."""
    logits = np.random.default_rng(0).normal(size=(V, V)) * 3
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return np.asarray(logits, np.float32).astype(np.float64)


TABLE = make_table()
ROW = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


UNAUTHORIZED = {"error": "Unauthorized"}


VARIABLES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "SNUGFIT_API_KEY", "VLLM_API_KEY")


class Mock:
    """A stand-in for `vllm serve`: its faults are attributes, `asked` the rows that it was asked to score."""

    def __init__(self) -> None:
        self.table = TABLE.copy()
        self.max_logprobs = 20
        self.max_model_len: int | None = 64
        self.api_key: str | None = None
        self.models: list[dict[str, Any]] | None = None
        self.faults: list[Any] = []  # one for each of the next requests to score: a status, DROP, CUT, HANG or None
        self.change: Change = lambda answer: answer
        self.refusal: tuple[int, Any] | None = None
        self.pages: dict[str, tuple[int, Any]] = {"/version": (200, {"version": "0.32.0"})}
        self.asked: list[list[int]] = []
        self.bodies: list[dict[str, Any]] = []
        self.stopped = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop."""
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def page(self, path: str) -> tuple[int, Any]:
        """Status and content of what is not /v1/completions."""
        if path == "/v1/models" and path not in self.pages:
            card = {"id": MODEL, "owned_by": "vllm", "root": "/models/mock", "max_model_len": self.max_model_len}
            return 200, {"object": "list", "data": self.models if self.models is not None else [card]}
        return self.pages.get(path, (404, {"detail": "Not Found"}))

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """vLLM's answer, or its refusal in its own words."""
        if self.refusal:
            return self.refusal
        row, wanted = body["prompt"], body["prompt_logprobs"]
        limit = V if self.max_logprobs == -1 else self.max_logprobs
        asked = V if wanted == -1 else wanted
        if asked > limit:
            message = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {limit}"
            return 400, {"error": {"message": f"{message} (parameter=prompt_logprobs, value={asked})", "code": 400}}
        places = [None, *(self.place(a, b, asked) for a, b in pairwise(row))]
        choice = {"index": 0, "text": '"', "prompt_logprobs": places, "prompt_token_ids": row}
        return 200, self.change({"choices": [choice], "system_fingerprint": "vllm-0.32.0-mock"})

    def place(self, previous: int, token: int, count: int) -> dict[str, Any]:
        """The entries of one place: the own token, then the most likely ones."""
        values = self.table[previous]
        best = np.argsort(-values, kind="stable")[:count]
        ranks = {token: int((values >= values[token]).sum())} | {int(t): rank + 1 for rank, t in enumerate(best)}
        return {
            str(t): {
                "logprob": None if np.isnan(values[t]) else max(float(values[t]), -9999.0),
                "rank": rank,
                "decoded_token": TOKENS[t % len(TOKENS)],
            }
            for t, rank in ranks.items()
        }

    def _handler(self) -> type[Handler]:
        return type("BoundHandler", (Handler,), {"mock": self})


class Handler(BaseHTTPRequestHandler):
    """HTTP for one `mock`."""

    protocol_version = "HTTP/1.1"
    mock: Mock

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Everything but scoring."""
        self.reply(*(self.mock.page(self.path.split("?")[0]) if self.allowed() else (401, UNAUTHORIZED)))

    def do_POST(self) -> None:
        """A row to score."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            self.reply(401, UNAUTHORIZED)
            return
        self.mock.bodies.append(body)
        self.mock.asked.append(body["prompt"])
        fault = self.mock.faults.pop(0) if self.mock.faults else None
        if isinstance(fault, int):
            self.reply(fault, {"error": {"message": "EngineCore encountered an issue."}})
        elif fault in (DROP, HANG):
            if fault == HANG:
                self.mock.stopped.wait(60.0)  # until the mock is closed
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.reply(*self.mock.complete(body), cut=fault == CUT)

    def allowed(self) -> bool:
        """vLLM guards /v1 only."""
        guarded = self.mock.api_key is not None and self.path.startswith("/v1")
        return not guarded or self.headers["Authorization"] == f"Bearer {self.mock.api_key}"

    def reply(self, status: int, content: Any, *, cut: bool = False) -> None:
        """Send bytes as they are and other content as JSON; only half of it if `cut`."""
        raw = content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        if 300 <= status < 400:
            self.send_header("Location", "https://elsewhere/v1/models")
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if cut else raw)
        self.close_connection = cut


def expected_true(row: Sequence[int]) -> list[float]:
    return [float(TABLE[a, b]) for a, b in pairwise(row)]


def body_of(mock: Mock, row: list[int], top: int) -> str:
    """The text of the mock's answer."""
    return json.dumps(mock.complete({"prompt": row, "prompt_logprobs": top})[1], separators=(",", ":"))
