"""The GPU that a user names: a size or a card's name."""

from __future__ import annotations

import re

from snugfit.engines.gpus import CARDS, Card, find_card, similar_cards
from snugfit.engines.memory import GIB, MIB
from snugfit.errors import UserError
from snugfit.vram.budget import Gpu

# on a GPU's box GB means GiB
_UNITS = {"m": MIB, "mb": MIB, "mib": MIB, "g": GIB, "gb": GIB, "gib": GIB, "t": 1024 * GIB, "tb": 1024 * GIB}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.ASCII)
MIN_GIB, MAX_GIB = 1, 4096


def parse_gpu(text: str) -> Gpu:
    """A size as CUDA reports it (16GiB, 24G, 15.48 GiB) or a card's name (RTX 5090); UserError for neither."""
    card = find_card(text)
    if card is not None:
        return gpu_of(card)
    match = _SIZE.fullmatch(text.lower())
    if match is None or match[2] not in _UNITS:
        near = similar_cards(text)
        other = "Give a size such as 16GiB, or a name such as RTX 4090."
        remedy = f"Did you mean {', '.join(near)}?" if near else other
        raise UserError(f"unknown GPU {text!r}.", code="option-invalid", where="gpu", remedy=remedy)
    size = float(match[1]) * _UNITS[match[2]]
    if not MIN_GIB * GIB <= size <= MAX_GIB * GIB:
        remedy = f"Give a size from {MIN_GIB}GiB to {MAX_GIB}GiB."
        raise UserError(f"no GPU has {text}.", code="option-invalid", where="gpu", remedy=remedy)
    return Gpu(int(size), note=_sold_size_note(int(size)))


def gpu_of(card: Card) -> Gpu:
    """The GPU that a card of the table is, with the memory that it reports."""
    return Gpu(card.reported_mib * MIB, card.name, card.multiprocessors, card.generation)


def _sold_size_note(size: int) -> str | None:
    """What a card that is sold by this size reports; None where none is."""
    sold = [card for card in CARDS if 0.9 * size < card.reported_mib * MIB < size and size % GIB == 0]
    if not sold:
        return None
    card = next(card for card in sold if card.generation == sold[-1].generation)
    return (
        f"cards sold as {size // GIB} GB report less, {card.name} {card.reported_mib / 1024:.2f} GiB: "
        f"name the card ('{card.name}') to use its figure"
    )
