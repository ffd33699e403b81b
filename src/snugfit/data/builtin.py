"""Sources that need no network and no files: what comes with Python, and a few rows that come with this package.

Python's own texts are those of the running version, so another version of Python gives another digest.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from importlib import resources, util
from pathlib import Path
from typing import Any

from snugfit.data.python_docs import calibration_topics

_LIBRARY = """
    argparse ast asyncio.base_events bisect calendar cmd collections concurrent.futures.thread configparser
    contextlib copy csv dataclasses datetime decimal difflib email.message enum fnmatch fractions functools gettext
    glob graphlib gzip heapq html.parser http.client http.server inspect ipaddress json.decoder json.encoder logging
    mailbox numbers optparse pathlib pickle plistlib pprint queue random sched selectors shelve shlex shutil smtplib
    socket socketserver statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace
    traceback types typing unittest.mock urllib.parse urllib.request uuid weakref xml.dom.minidom zipfile
"""
_TYPES = (str, bytes, list, dict, set, frozenset, tuple, int, float, complex, memoryview)


def topics() -> list[dict[str, Any]]:
    """Prose: Python's documentation topics for calibration, every other one; `name` and `text`."""
    return [{"name": name, "text": text} for name, text in calibration_topics().items()]


def library() -> list[dict[str, Any]]:
    """Code: modules of Python's standard library; `name` and `text`."""
    rows = []
    for name in _LIBRARY.split():
        spec = util.find_spec(name)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            rows.append({"name": name, "text": Path(spec.origin).read_text(encoding="utf-8")})
    return rows


def questions() -> list[dict[str, Any]]:
    """Questions about Python's built-in types and functions, answered by their documentation; `question`, `answer`."""
    import builtins

    named: list[tuple[str, Any]] = [
        (f"{kind.__name__}.{name}", value) for kind in _TYPES for name, value in vars(kind).items()
    ]
    named += [(name, getattr(builtins, name)) for name in sorted(dir(builtins))]
    rows = []
    for name, value in named:
        answer = inspect.getdoc(value) if callable(value) and "_" not in name[:1] and "._" not in name else None
        if answer and len(answer) > 40:
            rows.append({"question": f"What does `{name}` do in Python?", "answer": answer})
    return sorted(rows, key=lambda row: row["question"])


def examples() -> list[dict[str, Any]]:
    """Short conversations of this package, with tools, reasoning, mathematics and many languages; `messages`."""
    text = (resources.files("snugfit.data") / "examples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


SOURCES: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
    "examples": examples,
    "python-library": library,
    "python-questions": questions,
    "python-topics": topics,
}
