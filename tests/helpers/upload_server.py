"""A Hub on this machine that takes uploads: repositories, large files by digest, commits; it can break off."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)


@dataclass
class UploadHub:
    """Repositories by name: private or not, and their files' bytes. `stored` are large contents by SHA-256.

    `breaks` large files are cut off before the Hub has them; `refused` is the status of every request that writes.
    `sent` are the digests of large files that were sent, in order; `validated` the cards whose metadata was checked.
    """

    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    breaks: int = 0
    refused: int = 0
    sent: list[str] = field(default_factory=list)
    commits: int = 0
    validated: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, *, private: bool, files: dict[str, bytes] | None = None) -> None:
        """Make a repository."""
        self.repos[repo] = {"private": private, "files": dict(files or {})}

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of a repository."""
        found: dict[str, bytes] = self.repos[repo]["files"]
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[UploadHub]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, document: Any = None, **headers: str) -> None:
        content = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        repo = path.removeprefix("/api/models/").partition("/revision")[0]
        if repo not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        found = self.hub.repos[repo]
        siblings = [{"rfilename": name} for name in found["files"]]
        self.answer(200, {"id": repo, "modelId": repo, "private": found["private"], "siblings": siblings, "tags": []})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        if self.hub.refused:
            self.answer(self.hub.refused, {"error": "no"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.hub.validated.append(json.loads(body)["content"])
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self.answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self.batch(entry) for entry in json.loads(body)["objects"]]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self.answer(404, {"error": path})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add(name, private=bool(private))
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def batch(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["oid"] in self.hub.stored:
            return {**entry, "authenticated": True}
        href = f"{self.hub.url}/store/{entry['oid']}"
        return {**entry, "authenticated": True, "actions": {"upload": {"href": href, "header": {}}}}

    def do_PUT(self) -> None:
        content, digest = self.body(), self.path.rpartition("/")[2]
        self.hub.sent.append(digest)
        if self.hub.breaks:
            self.hub.breaks -= 1
            self.answer(400, {"error": "broken off"})
            return
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.stored[digest] = content
        self.answer(200)

    def commit(self, repo: str, body: bytes) -> None:
        files = self.hub.files(repo)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.stored[entry["value"]["oid"]]
        self.hub.commits += 1
        url = f"{self.hub.url}/{repo}/commit/{'1' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None, "success": True})


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """A running Hub without repositories."""
    hub = UploadHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
