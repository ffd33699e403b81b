"""Finds a model's parts by tensor names: the decoder layers, towers, heads of multi-token prediction.

Families differ in prefixes (`model.layers`, `transformer.h`, `language_model.model.layers`), but in all of them the
layers are a numbered list that is at least as long as config.json states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from snugfit.errors import UserError

# words in a list's name that say it is no list of a language model's decoder layers; short ones stand alone
_TOWER = re.compile(
    r"vision|visual|image|video|audio|speech|sound|siglip|tower|whisper|conformer|encoder_model|projector|connector|"
    r"resampler|perceiver|qformer|merger|adapter|codec|code2wav|token2wav|talker|code_predictor|depth_decoder|"
    r"diffusion|mtp|nextn|eagle|medusa|draft|assistant|(^|[._])(vit|img|clip|sam|vpm|apm|vq|vqmodel|vae|dit)([._]|$)"
)
_MTP = re.compile(r"mtp|nextn|eagle|medusa")


def find_decoder(names: Iterable[str], layers: int, *, where: str = "") -> str:
    """The name of the list of decoder layers in the file, such as model.layers, from tensor names and their number.

    A list that is longer than `layers` is one with heads of multi-token prediction behind. Towers and such heads are
    passed over while there is another list; of several the one with all layers, then with the most tensors. UserError
    where no name has a number.
    """
    lists: dict[str, dict[int, int]] = {}
    for name in names:
        head, number, _ = split_at_number(name)
        if number is not None and head:
            counts = lists.setdefault(head, {})
            counts[number] = counts.get(number, 0) + 1
    if not lists:
        raise UserError(
            "no tensor's name has a layer number.",
            code="config-mismatch",
            where=where,
            remedy="Is this a language model's checkpoint, in the layout of transformers?",
        )

    def rank(head: str) -> tuple[bool, bool, bool, int, int]:
        inside = {number: count for number, count in lists[head].items() if number < layers}
        outside = _TOWER.search(head.lower()) is not None
        encodes = "encoder" in head.split(".")
        return outside, len(inside) < layers, encodes, -sum(inside.values()), len(head)

    return min(lists, key=rank)


def split_at_number(name: str) -> tuple[str, int | None, str]:
    """A name before, at and behind its first part that is a number: "model.layers", 3, "mlp.up_proj.weight"."""
    match = re.search(r"\.(\d{1,9})\.", name)
    return (name, None, "") if match is None else (name[: match.start()], int(match.group(1)), name[match.end() :])


@lru_cache(maxsize=1 << 17)  # a large model's names are asked for by every recipe
def is_tower(name: str) -> bool:
    """Whether a module outside the decoder layers belongs to a tower or to what joins it to the model."""
    return _TOWER.search(name.lower()) is not None and not is_prediction_head(name)


def is_prediction_head(name: str) -> bool:
    """Whether a module belongs to heads of multi-token prediction that stand in a list of their own."""
    return _MTP.search(name.lower()) is not None
