"""The metadata block of a model card (README.md): YAML between two lines of dashes, read without trust."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
MAX_CARD_BYTES = 4_000_000
_BLOCK = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)?|multilingual|code")


def read_card(model: Path) -> Mapping[str, Any]:
    """The metadata in the card of a model's directory; nothing without a card, and where it is unreadable."""
    file = model / CARD
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_CARD_BYTES:
            return {}
        block = _BLOCK.match(file.read_text(encoding="utf-8", errors="replace"))
        data: Any = yaml.safe_load(block[1]) if block else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, Mapping) else {}


def card_languages(card: Mapping[str, Any]) -> tuple[str, ...]:
    """The languages that a card states, in its order: codes such as en and zh-Hant, multilingual, code."""
    value = card.get("language")
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(one for one in values if isinstance(one, str) and _LANGUAGE.fullmatch(one)))
