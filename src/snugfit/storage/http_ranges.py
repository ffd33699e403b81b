"""Bytes of large files over HTTP, by range, with retries, and never more than was asked for.

A range that breaks off continues where it broke off. The Hub answers with a redirect to a signed address that expires
after some hours; the address is kept, and requested again when it is refused. One call reads over one connection:
callers that want several read pieces in threads of their own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from snugfit.errors import Unfinished, UserError

WAIT_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)  # before each further try
MAX_WAIT_SECONDS = 300.0  # that a server may ask for
PROGRESS_BYTES = 1 << 20  # after so much progress a failure starts a new count of tries
TIMEOUT = (15.0, 30.0, 30.0, 60.0)  # seconds to connect, to read, to write, for a connection of the pool
RUN_AGAIN = "Run it again to continue."
_DOWNLOAD = "Is a proxy in between? Else download the model with `hf download` and give its directory."

# httpx's or httpx2's, whichever huggingface_hub is built on
NetworkError = cast("type[Exception]", HfHubHTTPError.__bases__[0])


@dataclass(frozen=True)
class WebFile:
    """A file at an address of the Hub; `size` in bytes, None where it is not known yet.

    `redirects` holds, for all files of a model, the signed address behind each address.
    """

    url: str
    name: str
    size: int | None
    redirects: MutableMapping[str, str]


class _TransientError(Exception):
    """A failure that another try may not meet; `seconds` is how long the server asks to wait."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


def read_web(file: WebFile, offset: int, view: memoryview) -> None:
    """Fill `view` from byte `offset` of a file; safe in several threads.

    UserError where access is denied, where the file differs from the Hub's listing, where the server ignores ranges,
    and where the network stays away.
    """
    done = progress = failures = 0
    while done < len(view):
        try:
            for count in _stream(file, offset + done, view[done:]):
                done += count
                progress += count
        except (_TransientError, NetworkError, OSError) as error:
            failures = 1 if progress >= PROGRESS_BYTES else failures + 1
            progress = 0
            if failures > len(WAIT_SECONDS):
                raise Unfinished(
                    f"lost the network after {failures} tries ({str(error) or type(error).__name__}).",
                    code="hub-unreachable",
                    where=file.name,
                    remedy=RUN_AGAIN,
                ) from None
            asked = error.seconds if isinstance(error, _TransientError) else None
            time.sleep(WAIT_SECONDS[failures - 1] if asked is None else min(asked, MAX_WAIT_SECONDS))


def _stream(file: WebFile, offset: int, view: memoryview) -> Iterator[int]:
    """Write bytes to the front of `view`; yields the number of bytes of each chunk."""
    redirect = file.redirects.get(file.url)
    ranged = {"Range": f"bytes={offset}-{offset + len(view) - 1}", "Accept-Encoding": "identity"}
    # a signed address needs no token, and must not get one
    headers = ranged if redirect else {**build_hf_headers(), **ranged}
    url = redirect or file.url
    session: Any = get_session()
    with session.stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
        _check_status(file, response, offset, len(view), is_kept=redirect is not None)
        if _origin(str(response.url)) != _origin(file.url):
            file.redirects[file.url] = str(response.url)
        done = 0
        for chunk in response.iter_raw():
            if done + len(chunk) > len(view):
                raise _TransientError(f"more than the {len(view)} bytes that were asked for")
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
            yield len(chunk)
    if done < len(view):
        raise _TransientError(f"the answer ended after {done} of {len(view)} bytes")


def _check_status(file: WebFile, response: Any, offset: int, length: int, *, is_kept: bool) -> None:
    """Raise unless an answer is the requested range; `is_kept` where the request went to a kept address."""
    status = int(response.status_code)
    elsewhere = is_kept or _origin(str(response.url)) != _origin(file.url)
    if status in (400, 401, 403, 404, 410) and elsewhere:
        file.redirects.pop(file.url, None)
        raise _TransientError(f"HTTP {status} from a signed address", 0.0 if is_kept else None)
    if status in (408, 425, 429) or status >= 500:
        raise _TransientError(f"HTTP {status}", retry_after(response.headers))
    if status in (401, 403, 404):
        response.read()
        raise denied(status, str(response.headers.get("x-error-code", "")), file.name)
    if status == 416:
        raise _other_size(file, "fewer")
    if status not in (200, 206) or response.headers.get("content-encoding", "identity") != "identity":
        raise _unusable(f"HTTP {status} in answer to a range request.", file)
    whole = offset == 0 and file.size == length and response.headers.get("content-length") == str(length)
    if status == 200 and not whole:
        raise _unusable("the server ignores ranges and sends the whole file.", file)
    if status == 206:
        _check_range(file, str(response.headers.get("content-range", "")), offset, length)


def _check_range(file: WebFile, given: str, offset: int, length: int) -> None:
    match = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", given)
    if match is None:
        raise _TransientError(f"Content-Range is {given[:100]!r}")
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if total is not None and file.size is not None and total != file.size:
        raise _other_size(file, f"{total:,}")
    if first != offset or last != offset + length - 1:
        raise _TransientError(f"Content-Range is {given!r}, asked for were bytes {offset}-{offset + length - 1}")


def _unusable(what: str, file: WebFile) -> UserError:
    return Unfinished(what, code="hub-answer-unusable", where=file.name, remedy=_DOWNLOAD)


def _other_size(file: WebFile, found: str) -> UserError:
    return Unfinished(
        f"the Hub lists {file.size or 0:,} bytes, its server has {found}.",
        code="hub-changed",
        where=file.name,
        remedy="Try again later, or set HF_ENDPOINT to a sound mirror.",
    )


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: Retry-After, or t= of RateLimit; None where the headers have neither."""
    given = re.fullmatch(r"\s*(\d{1,6})\s*", str(headers.get("retry-after", "")))
    given = given or re.search(r"r=0\s*;\s*t=(\d{1,6})", str(headers.get("ratelimit", "")))
    return float(given[1]) if given else None


def denied(status: int, error_code: str, where: str) -> UserError:
    """The error for an answer of 401, 403 or 404 of the Hub itself; `error_code` is its X-Error-Code."""
    if error_code == "GatedRepo":
        return Unfinished(
            "a gated model: its owner asks for your consent.",
            code="hub-refused",
            where=where,
            remedy="Accept its terms on the model's page, then `hf auth login` (or set HF_TOKEN).",
        )
    if status == 404:
        return Unfinished(
            "not on the Hub (HTTP 404).",
            code="model-not-found",
            where=where,
            remedy="Check the name; a private model needs `hf auth login`.",
        )
    return Unfinished(
        f"access denied (HTTP {status}).",
        code="hub-refused",
        where=where,
        remedy="Check the token: `hf auth login`, or HF_TOKEN.",
    )


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
