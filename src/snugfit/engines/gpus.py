"""GPUs by name: their generation, and the memory that CUDA reports, of which engines take a share.

`reported_mib` is the smallest total that torch.cuda.mem_get_info was seen to return on Linux (torch prints it in its
out-of-memory message, "GPU 0 has a total capacity of 15.48 GiB"). nvidia-smi shows more on the same card, and so does
WSL 2: a 16 GB RTX 5060 Ti has 16,311 MiB in nvidia-smi, 15.93 GiB under Windows and 15.48 GiB on Linux.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

# compute capability 8.0/8.6, 8.9, 9.0, 10.x and 12.x
Generation = Literal["ampere", "ada", "hopper", "blackwell", "blackwell-consumer"]
GENERATIONS: Mapping[Generation, str] = {
    "ampere": "Ampere (sm80, sm86)",
    "ada": "Ada (sm89)",
    "hopper": "Hopper (sm90)",
    "blackwell": "Blackwell (sm100)",
    "blackwell-consumer": "Blackwell (sm120)",
}
# shown where the GPU was given by its memory alone
COMMON: tuple[Generation, ...] = ("ada", "hopper", "blackwell", "blackwell-consumer")


@dataclass(frozen=True)
class Card:
    """One GPU model: its memory in MiB as CUDA reports it, and its number of multiprocessors (SMs)."""

    name: str
    generation: Generation
    reported_mib: int
    multiprocessors: int


def _card(name: str, generation: Generation, gib: float, multiprocessors: int) -> Card:
    return Card(name, generation, int(gib * 1024), multiprocessors)


# Totals in GiB: from public logs with that message, July 2024 to September 2026, the smallest that appeared more than
# once; a total marked (*) is nvidia-smi's figure less 2 %, the usual difference
CARDS: tuple[Card, ...] = (
    _card("RTX 3060", "ampere", 11.62, 28),
    _card("RTX 3090", "ampere", 23.56, 82),
    _card("A10", "ampere", 22.05, 72),
    _card("A40", "ampere", 44.34, 84),
    _card("RTX A6000", "ampere", 47.40, 84),
    _card("A100 40GB", "ampere", 39.38, 108),
    _card("A100 80GB", "ampere", 79.14, 108),
    _card("RTX 4060 Ti 16GB", "ada", 15.56, 34),
    _card("RTX 4070 Ti SUPER", "ada", 15.56, 66),
    _card("RTX 4080", "ada", 15.56, 76),
    _card("RTX 4090", "ada", 23.52, 128),
    _card("RTX 6000 Ada", "ada", 47.40, 142),
    _card("L4", "ada", 22.03, 58),
    _card("L40S", "ada", 44.39, 142),
    _card("H100", "hopper", 79.18, 132),
    _card("H200", "hopper", 139.80, 132),
    _card("RTX 5060 Ti 16GB", "blackwell-consumer", 15.48, 36),
    _card("RTX 5070 Ti", "blackwell-consumer", 15.47, 70),
    _card("RTX 5080", "blackwell-consumer", 15.47, 84),
    _card("RTX 5090", "blackwell-consumer", 31.36, 170),
    _card("RTX PRO 6000", "blackwell-consumer", 94.97, 188),
    _card("B200", "blackwell", 178.35, 148),
    _card("B300", "blackwell", 264.0, 148),  # (*) 275,040 MiB in nvidia-smi
)
_MAKERS_WORDS = frozenset({"nvidia", "geforce", "tesla", "graphics", "gpu", "sxm", "sxm5", "pcie", "blackwell"})


def find_card(text: str) -> Card | None:
    """The card of that name, in any spelling ("5060 ti", "RTX5090", "nvidia l40s"); None for an unknown name.

    Of cards that differ in their memory alone, a name without the memory stands for the first.
    """
    return _spellings().get(_normalized(text))


def similar_cards(text: str, limit: int = 3) -> list[str]:
    """Names of the cards that begin with `text`, then of those with a similar spelling; empty where there is none."""
    spellings, wanted = _spellings(), _normalized(text)
    longer = [spelling for spelling in spellings if wanted and spelling.startswith(wanted)]
    similar = get_close_matches(wanted, spellings, n=4 * limit, cutoff=0.7)
    return list(dict.fromkeys(spellings[spelling].name for spelling in (*longer, *similar)))[:limit]


def _spellings() -> dict[str, Card]:
    """Normalized name -> card: each with and without its memory, with and without RTX."""
    found: dict[str, Card] = {}
    for card in CARDS:
        without_memory = " ".join(word for word in card.name.split() if not word.endswith("GB"))
        for name in (card.name, without_memory):
            found.setdefault(_normalized(name), card)
            found.setdefault(_normalized(name).removeprefix("rtx"), card)
    return found


def _normalized(text: str) -> str:
    """Lower-case letters and digits alone, without the makers' words."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return "".join(word for word in words if word not in _MAKERS_WORDS)
