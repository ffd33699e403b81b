"""Bytes of large files over HTTP, by range: in parallel pieces, patiently, and never more than was asked for.

A piece that breaks off goes on where it broke off. Hubs answer with a redirect to a signed address that expires after
some hours; it is kept, and asked for anew when it is refused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from snugfit.errors import Unfinished, UserError

PIECE = 32 << 20
WORKERS = 8
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)  # seconds before each further try
LONGEST_WAIT = 300.0
PROGRESS = 1 << 20  # bytes after which a failure is a new one
TIMEOUT = (15.0, 30.0, 30.0, 60.0)  # seconds to connect, to read, to write, for a place in the pool
GO_ON = "Run the same command to go on."

# httpx's or httpx2's, whichever huggingface_hub is built on
NetworkError = cast("type[Exception]", HfHubHTTPError.__bases__[0])


@dataclass(frozen=True)
class WebFile:
    """A file at an address of the Hub; `size` in bytes, None where it is not known yet.

    `places` remembers, for all files of a model, where addresses were redirected to.
    """

    url: str
    name: str
    size: int | None
    places: MutableMapping[str, str]


class _Passing(Exception):  # noqa: N818  # nothing went wrong yet
    """A failure that may pass; `seconds` is how long the server asks to wait."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


def read_web(file: WebFile, offset: int, view: memoryview) -> None:
    """Fill `view` from byte `offset` of a file; safe in several threads.

    UserError where access is denied, where the file is not what the Hub says it is, where the server ignores ranges,
    and where the network stays away.
    """
    stop = threading.Event()
    if len(view) <= PIECE:
        _read_piece(file, offset, view, stop)
        return
    starts = range(0, len(view), PIECE)
    with ThreadPoolExecutor(min(WORKERS, len(starts))) as pool:
        try:
            parts = [pool.submit(_read_piece, file, offset + n, view[n : n + PIECE], stop) for n in starts]
            wait(parts, return_when="FIRST_EXCEPTION")
            for part in (p for p in parts if p.done()):
                part.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _read_piece(file: WebFile, offset: int, view: memoryview, stop: threading.Event) -> None:
    done = since = failures = 0
    while done < len(view) and not stop.is_set():
        try:
            for count in _stream(file, offset + done, view[done:]):
                done += count
                since += count
                if stop.is_set():
                    return
        except (_Passing, NetworkError, OSError) as error:
            failures = 1 if since >= PROGRESS else failures + 1
            since = 0
            if failures > len(WAITS):
                raise Unfinished(
                    f"lost the network after {failures} tries ({str(error) or type(error).__name__}).",
                    where=file.name,
                    remedy=GO_ON,
                ) from None
            asked = error.seconds if isinstance(error, _Passing) else None
            stop.wait(WAITS[failures - 1] if asked is None else min(asked, LONGEST_WAIT))


def _stream(file: WebFile, offset: int, view: memoryview) -> Iterator[int]:
    """Bytes that were written to the front of `view`, one count a chunk."""
    known = file.places.get(file.url)
    asked = {"Range": f"bytes={offset}-{offset + len(view) - 1}", "Accept-Encoding": "identity"}
    # a signed address needs no token, and must not get one
    headers = asked if known else {**build_hf_headers(), **asked}
    session: Any = get_session()
    with session.stream("GET", known or file.url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
        _check_status(file, response, offset, len(view), is_kept=known is not None)
        if _origin(str(response.url)) != _origin(file.url):
            file.places[file.url] = str(response.url)
        done = 0
        for chunk in response.iter_raw():
            if done + len(chunk) > len(view):
                raise _Passing(f"more than the {len(view)} bytes that were asked for")
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
            yield len(chunk)
    if done < len(view):
        raise _Passing(f"the answer ended after {done} of {len(view)} bytes")


def _check_status(file: WebFile, response: Any, offset: int, length: int, *, is_kept: bool) -> None:
    """Whether an answer is the range that was asked for."""
    status = int(response.status_code)
    elsewhere = is_kept or _origin(str(response.url)) != _origin(file.url)
    if status in (400, 401, 403, 404, 410) and elsewhere:
        file.places.pop(file.url, None)
        raise _Passing(f"HTTP {status} from a signed address", 0.0 if is_kept else None)
    if status in (408, 425, 429) or status >= 500:
        raise _Passing(f"HTTP {status}", retry_after(response.headers))
    if status in (401, 403, 404):
        response.read()
        raise denied(status, str(response.headers.get("x-error-code", "")), file.name)
    if status == 416:
        raise _other_size(file, "smaller")
    if status not in (200, 206) or response.headers.get("content-encoding", "identity") != "identity":
        raise Unfinished(f"HTTP {status} in answer to a range request.", where=file.name, remedy=_DOWNLOAD)
    whole = offset == 0 and file.size == length and response.headers.get("content-length") == str(length)
    if status == 200 and not whole:
        raise Unfinished("the server ignores ranges and sends the whole file.", where=file.name, remedy=_DOWNLOAD)
    if status == 206:
        _check_range(file, str(response.headers.get("content-range", "")), offset, length)


_DOWNLOAD = "Is a proxy in between? Else download the model with `hf download` and give its directory."


def _check_range(file: WebFile, given: str, offset: int, length: int) -> None:
    match = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", given)
    if match is None:
        raise _Passing(f"Content-Range is {given[:100]!r}")
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if total is not None and file.size is not None and total != file.size:
        raise _other_size(file, f"{total:,} bytes")
    if first != offset or last != offset + length - 1:
        raise _Passing(f"Content-Range is {given!r}, asked for were bytes {offset}-{offset + length - 1}")


def _other_size(file: WebFile, found: str) -> UserError:
    return Unfinished(
        f"the Hub says {file.size or 0:,} bytes, its server has {found}.",
        where=file.name,
        remedy="Try again later, or set HF_ENDPOINT to a sound mirror.",
    )


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: Retry-After, or t= of RateLimit; None where it says nothing."""
    given = re.fullmatch(r"\s*(\d{1,6})\s*", str(headers.get("retry-after", "")))
    given = given or re.search(r"r=0\s*;\s*t=(\d{1,6})", str(headers.get("ratelimit", "")))
    return float(given[1]) if given else None


def denied(status: int, code: str, where: str) -> UserError:
    """What an answer of 401, 403 or 404 of the Hub itself means."""
    if code == "GatedRepo":
        return Unfinished(
            "a gated model: its owner asks for your consent.",
            where=where,
            remedy="Accept its terms on the model's page, then `hf auth login` (or set HF_TOKEN).",
        )
    if status == 404:
        what, remedy = "not on the Hub (HTTP 404).", "Check the name; a private model needs `hf auth login`."
    else:
        what, remedy = f"access denied (HTTP {status}).", "Check the token: `hf auth login`, or HF_TOKEN."
    return Unfinished(what, where=where, remedy=remedy)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
