"""A model directory's tokenizer and its chat template: texts and conversations become token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from snugfit.errors import UserError

CHARACTERS_PER_TOKEN = 8  # tokens are rarely longer


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a model directory; UserError where there is no usable one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # a model's files can make transformers raise any error
        line = (str(error).strip().splitlines() or [""])[0]
        if "trust_remote_code" in str(error):
            line = "it is code of the model's own, which is never run"
        raise UserError(
            f"no usable tokenizer ({line}).",
            code="tokenizer-unusable",
            where=str(path),
            remedy="Copy the tokenizer's files here, or give rows of `input_ids` in a JSONL file.",
        ) from None


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
        """transformers' own object; UserError where there is no usable one."""
        if self._loaded is None:
            self._loaded = load_tokenizer(self.path)
            self._loaded.model_max_length = int(1e30)  # no warning about texts that are cut later
        return self._loaded

    @cached_property
    def usable(self) -> bool:
        """Whether there is a usable tokenizer; rows of token ids need none."""
        try:
            return self.raw is not None
        except UserError:
            return False

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.raw.decode(list(ids)))

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template, all of them where there are several; None for a tokenizer without."""
        found = getattr(self.raw, "chat_template", None)
        if isinstance(found, dict):
            return "\n".join(str(template) for template in found.values()) or None
        return str(found) if found else None

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a document; None for a tokenizer without."""
        found = getattr(self.raw, "eos_token_id", None)
        return found if isinstance(found, int) else None

    def encode(self, text: str, *, where: str = "", special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer adds to it unless `special_tokens` is False.

        A text that begins with the tokenizer's own start tokens, such as BOS, gets no other.
        """
        ids = self._encode(text, where=where, special_tokens=special_tokens)
        if not special_tokens:
            return ids
        start = self.start_tokens
        return start + self.without_start(ids[len(start) :]) if start and ids[: len(start)] == start else ids

    def _encode(self, text: str, *, where: str = "", special_tokens: bool = True) -> list[int]:
        raw = self.raw
        try:
            return list(raw(text, add_special_tokens=special_tokens).input_ids)
        except Exception as error:  # noqa: BLE001  # tokenizers raise that very class
            raise UserError(
                f"this text cannot be tokenized ({error}).",
                code="dataset-invalid",
                where=where,
                remedy="Correct the text: is it valid Unicode?",
            ) from None

    def render(self, messages: Sequence[Any], *, where: str, **options: Any) -> str:
        """A conversation in the model's chat template, as text; UserError at `where` if the template fails."""
        raw = self.raw
        try:
            return str(raw.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # noqa: BLE001  # templates are programs
            raise _template_failed(error, where) from None

    def chat(self, messages: Sequence[Any], *, where: str, **options: Any) -> list[int]:
        """Token ids of a conversation in the model's chat template; UserError at `where` if the template fails.

        A template is a program of the model. transformers runs it in jinja's sandbox, without access to files or
        Python; neither its time nor its memory is bounded.
        """
        raw = self.raw
        try:
            found = raw.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
            return list(found["input_ids"])
        except Exception as error:  # noqa: BLE001  # templates are programs
            raise _template_failed(error, where) from None

    @cached_property
    def start_tokens(self) -> list[int]:
        """The tokens that the tokenizer puts before a text, such as BOS."""
        plain = self._encode("a", special_tokens=False)
        full = self._encode("a")
        place = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
        return full[:place]

    def without_start(self, ids: list[int]) -> list[int]:
        """Token ids of a text without the start tokens that the text itself begins with."""
        return ids[common_prefix(self.start_tokens, ids) :]

    def first_tokens(self, text: str, count: int, *, where: str = "") -> list[int]:
        """The text's tokens without start tokens: at least the first `count`, or all of a shorter text."""
        ids: list[int] = []
        characters = CHARACTERS_PER_TOKEN * count  # doubled until they hold enough tokens
        while len(ids) < count:
            ids = self.without_start(self.encode(text[:characters], where=where, special_tokens=False))
            if characters >= len(text):
                break
            characters *= 2
        return ids


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows share from their beginning."""
    differing = (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def _template_failed(error: Exception, where: str) -> UserError:
    return UserError(
        f"the chat template refuses these messages ({error}).",
        code="chat-template-failed",
        where=where,
        remedy="Give `text` instead of `messages`.",
    )
