"""What a user asks for, from words: a GPU by size or name, a number of tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches

from snugfit.engines.gpus import CARDS, Generation, find_card, names
from snugfit.engines.memory import GIB, MIB
from snugfit.errors import UserError
from snugfit.vram.budget import Device

# on a GPU's box GB means GiB
_UNITS = {"m": MIB, "mb": MIB, "mib": MIB, "g": GIB, "gb": GIB, "gib": GIB, "t": 1024 * GIB, "tb": 1024 * GIB}
_THOUSANDS = {"": 1, "k": 1024, "m": 1024 * 1024}
LEAST_GIB, MOST_GIB = 1, 4096


@dataclass(frozen=True)
class Gpu:
    """The GPU that was asked for: its memory, and its name and generation where it was named."""

    device: Device
    generation: Generation | None = None
    note: str | None = None

    @property
    def title(self) -> str:
        """A name, or the size."""
        return self.device.card or f"a GPU of {self.device.reported / GIB:g} GiB"


def parse_gpu(text: str) -> Gpu:
    """A size as CUDA reports it (16GiB, 24G, 15.48 GiB) or a card's name (RTX 5090); UserError for neither."""
    card = find_card(text)
    if card is not None:
        return Gpu(Device(card.reported_mib * MIB, card.name, card.multiprocessors), card.generation)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        near = get_close_matches(text.lower(), [name.lower() for name in names()], n=1)
        known = next((name for name in names() if near and name.lower() == near[0]), None)
        remedy = f"Did you mean {known}?" if known else f"Write a size such as 16GiB, or a name: {', '.join(names())}."
        raise UserError(f"{text!r} is no GPU.", where="--gpu", remedy=remedy)
    size = float(match[1]) * _UNITS[match[2]]
    if not LEAST_GIB * GIB <= size <= MOST_GIB * GIB or not math.isfinite(size):
        raise UserError(
            f"no GPU has {text}.", where="--gpu", remedy=f"Give a size from {LEAST_GIB}GiB to {MOST_GIB}GiB."
        )
    return Gpu(Device(int(size)), note=_nominal(int(size)))


def _nominal(size: int) -> str | None:
    """A word on cards that are sold by this size but report less."""
    sold = [card for card in CARDS if 0.9 * size < card.reported_mib * MIB < size and size % GIB == 0]
    if not sold:
        return None
    card = next(card for card in sold if card.generation == sold[-1].generation)
    return (
        f"cards sold as {size // GIB} GB report less, {card.name} {card.reported_mib / 1024:.2f} GiB: "
        f"--gpu '{card.name}' reckons with that"
    )


def parse_tokens(text: str, *, where: str = "--context") -> int:
    """32k -> 32768, 1m -> 1048576, 4096; UserError for anything else, and for 0."""
    match = re.fullmatch(r"\s*(\d+(?:[.,]\d+)*)\s*([km]?)\s*", text.lower())
    digits = match[1].replace(",", "") if match else ""
    number = float(digits) * _THOUSANDS[match[2]] if match and re.fullmatch(r"\d+(\.\d+)?", digits) else 0.0
    if not 1 <= number <= 2**40 or number != int(number):
        raise UserError(f"{text!r} is no number of tokens.", where=where, remedy="Write 32768 or 32k.")
    return int(number)
