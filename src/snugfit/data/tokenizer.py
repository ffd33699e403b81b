"""A model directory's tokenizer, and its chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snugfit.errors import UserError

TEMPLATE_SECONDS = 60.0  # for one conversation, which takes milliseconds


def load_tokenizer(path: Path) -> Any:
    """The model directory's tokenizer; UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (what its files can make transformers raise has no end)
        line = (str(error).strip().splitlines() or [""])[0]
        if "trust_remote_code" in str(error):
            line = "it is code of the model's own, which is never run"
        raise UserError(
            f"no usable tokenizer ({line}).",
            where=str(path),
            remedy="Copy the tokenizer's files here, or give rows of `input_ids` in a JSONL file.",
        ) from None


def apply_template(tokenizer: Any, messages: Sequence[Any], **options: Any) -> list[int]:
    """Token ids of a conversation in the model's chat template, which is a program; ValueError where it does not end.

    transformers runs it in jinja's sandbox, out of reach of files and Python. What it allocates is not bounded.
    """
    ids: Future[list[int]] = Future()

    def work() -> None:
        try:
            found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
            ids.set_result(list(found["input_ids"]))
        except BaseException as error:  # noqa: BLE001 (it is raised again in the caller's thread)
            ids.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        return ids.result(TEMPLATE_SECONDS)
    except TimeoutError:
        if ids.done():
            raise
        end = ctypes.pythonapi.PyThreadState_SetAsyncExc  # a loop in the template ends with its next step
        end(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise ValueError(f"it takes more than {TEMPLATE_SECONDS:g} s") from None


@contextmanager
def template_errors(where: str) -> Iterator[None]:
    """Whatever a chat template raises, as a UserError at `where`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (templates are programs)
        raise UserError(
            f"the chat template refuses these messages ({error}).", where=where, remedy="Give `text` instead."
        ) from None


def leading_tokens(encode: Any) -> list[int]:
    """What the tokenizer puts before a text, such as BOS."""
    plain = encode("a", add_special_tokens=False)
    full = encode("a")
    place = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
    return list(full[:place])


def first_tokens(encode: Any, text: str, wanted: int) -> list[int]:
    """The text's tokens without special ones: at least the first `wanted`, if it has them."""
    ids: list[int] = []
    # a token is rarely longer than eight characters; take more text until there is enough
    characters = 8 * wanted
    while len(ids) < wanted:
        ids = encode(text[:characters], add_special_tokens=False)
        if characters >= len(text):
            break
        characters *= 2
    return ids


class Tokenizer:
    """A model directory's tokenizer, loaded when first needed."""

    def __init__(self, path: Path) -> None:
        """Of the model directory `path`."""
        self.path = path
        self._loaded: Any = None

    @property
    def used(self) -> bool:
        """Whether anything was tokenized."""
        return self._loaded is not None

    @property
    def raw(self) -> Any:
        """transformers' own object; UserError where there is none."""
        if self._loaded is None:
            self._loaded = load_tokenizer(self.path)
            self._loaded.model_max_length = int(1e30)  # no warning about texts that are cut later
        return self._loaded

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text."""
        return list(self.raw(text, **options).input_ids)

    def chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        """Token ids of a conversation in the model's template."""
        return apply_template(self.raw, messages, **options)
