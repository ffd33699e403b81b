"""A Hub on this machine: repository info, files, large ones behind a redirect to another server, faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One model, org/name, at one commit.

    `faults` are taken by requests for large files, one each: "drop" (half the body, then the line is cut), "none" (cut
    before any answer), "503", "429", "403" (an expired address), "whole" (ranges ignored), "gzip", "total" (another
    size than the Hub's), "shifted" (another range), "416". `denied` is the (status, X-Error-Code) of all requests.
    `requests` are (server, path, range, has a token).
    """

    files: Mapping[str, bytes]
    faults: deque[str] = field(default_factory=deque)
    denied: tuple[int, str] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str, bool]] = field(default_factory=list)
    url: str = ""
    large_url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def ranges(self, file: str = "") -> list[str]:
        """Ranges that the server of large files was asked for."""
        return [asked for server, path, asked, _ in self.requests if server == "large" and path.endswith(file)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]
    name: ClassVar[str]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        with self.hub.lock:
            self.hub.requests.append((self.name, path, asked, "Authorization" in self.headers))
        return path

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Small(_Handler):
    def do_HEAD(self) -> None:
        """Answers HEAD."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answers GET."""
        path = self.note()
        if self.hub.denied is not None:
            status, code = self.hub.denied
            self.answer(status, b"", X_Error_Code=code)
        elif path.startswith("/api/models/"):
            self.info(path.removeprefix("/api/models/"))
        elif (match := re.fullmatch(r"/org/name/resolve/([^/]+)/(.+)", path)) and match[1] == COMMIT:
            self.file(match[2])
        else:
            self.answer(404, b"", X_Error_Code="EntryNotFound")

    def info(self, repo: str) -> None:
        if repo not in ("org/name", "org/name/revision/main", f"org/name/revision/{COMMIT}"):
            code = "RevisionNotFound" if repo.startswith("org/name/") else "RepoNotFound"
            self.answer(404, b"", X_Error_Code=code)
            return
        files = [
            {"rfilename": name, "size": self.hub.sizes.get(name, len(content)), "blobId": "0"}
            for name, content in self.hub.files.items()
        ]
        body = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode()
        self.answer(200, body, Content_Type="application/json")

    def file(self, name: str) -> None:
        content = self.hub.files.get(name)
        if content is None:
            self.answer(404, b"", X_Error_Code="EntryNotFound")
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if name.endswith(".safetensors"):
            place = f"{self.hub.large_url}/signed/{len(self.hub.requests)}/{name}"
            self.answer(302, b"", Location=place, ETag=tag, X_Repo_Commit=COMMIT, X_Linked_Size=len(content))
        else:
            self.answer(200, content, ETag=tag, X_Repo_Commit=COMMIT)


class _Large(_Handler):
    def do_GET(self) -> None:
        """Answers GET, or does what the next fault says."""
        path = self.note()
        content = self.hub.files[path.split("/", 3)[3]]
        with self.hub.lock:
            fault = self.hub.faults.popleft() if self.hub.faults else ""
        if fault in ("403", "416", "429", "503"):
            self.answer(int(fault), b"", **({"Retry_After": 0} if fault == "429" else {}))
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert match is not None, "a large file was asked for as a whole"
        first, last = int(match[1]), min(int(match[2]), len(content) - 1)
        if fault == "none":
            self.close_connection = True
        elif fault == "whole":
            self.answer(200, content)
        elif fault.startswith("drop"):  # "drop 17": after 17 bytes, else half of what was asked for
            half = content[first : first + int(fault[4:] or (last + 1 - first) // 2)]
            span = f"bytes {first}-{last}/{len(content)}"
            self.send_response(206)
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Content-Range", span)
            self.end_headers()
            self.wfile.write(half)
            self.wfile.flush()
            self.close_connection = True
        else:
            total = len(content) + 8 * (fault == "total")
            shift = fault == "shifted"
            span = f"bytes {first + shift}-{last}/{total}"
            extra = {"Content_Encoding": "gzip"} if fault == "gzip" else {}
            self.answer(206, content[first + shift : last + 1], Content_Range=span, **extra)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients hang up on faults."""


@contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A running Hub with these files of org/name."""
    hub = Hub(files)
    servers = []
    for name, kind in (("small", _Small), ("large", _Large)):
        handler = type(name, (kind,), {"hub": hub, "name": name})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    hub.url, hub.large_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def files_of(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
