"""Targets of config groups: patterns that name exactly the intended modules, and what a module's name matches.

A pattern is looked up under other names than the file's. transformers and vLLM spell the text model of a
vision-language model `model.language_model.layers`, `language_model.model.layers` or `model.layers`, and their towers
have layers with the same endings; vLLM fuses q, k and v, and looks a layer's experts up on expert 0. So patterns begin
at `layers.N`, refuse the towers by name, and end in projections.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snugfit.engines.fused import LOOKED_UP_AS
from snugfit.engines.mixtures import EXPERTS_LOOKED_UP_AS
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.patterns import Pattern

_PLACE = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.(?P<layer>\d+)\.(?P<ending>.+)")
_EXPERT = re.compile(r"(^|\.)experts\.\d+(?=\.|$)")
# vLLM 0.24 looks up experts of every family under these names, and takes what it does not find for unquantized
_EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj")
# parts of a name that say nothing of what a stack of layers is for
_NEUTRAL = frozenset({"model", "language_model", "text_model", "base_model"})
# towers go by several names that begin alike: vision_tower, vision_model, vision_encoder
_TOWERS = ("vision", "visual", "audio", "speech", "image", "video")


@dataclass(frozen=True, slots=True)
class _Place:
    """A module in a stack of layers. `parent` stands behind the layer's number, any expert's number written as #."""

    prefix: str
    layer: str
    parent: str
    leaf: str


def write_targets(formats: Mapping[str, TensorFormat], ignore: Sequence[str]) -> dict[TensorFormat, list[str]]:
    """The targets of each format of `formats` (module -> format): disjoint, and none catches a name of `ignore`.

    One pattern for all layers where no module of another format has the same ending, else one naming layers; where
    that would still catch another, the modules' own names stand in its place.
    """
    places = {module: place for module in (*formats, *ignore) if (place := _place(module))}
    towers = _towers(formats, ignore, places)
    barred = re.compile(towers).match if towers else None
    held: dict[tuple[str, str], dict[TensorFormat | None, set[str]]] = {}  # ending -> format -> layers
    leaves: dict[str, list[str]] = {}
    for module, place in places.items():
        if barred is None or barred(module):
            by_format = held.setdefault((place.parent, place.leaf), {})
            by_format.setdefault(formats.get(module), set()).add(place.layer)
            leaves.setdefault(place.parent, []).append(place.leaf)
    every_leaf = {parent: list(dict.fromkeys(found)) for parent, found in leaves.items()}
    modules_of: dict[TensorFormat, list[str]] = {}
    for module, fmt in formats.items():
        modules_of.setdefault(fmt, []).append(module)
    return {fmt: _targets(fmt, modules, places, held, every_leaf, towers) for fmt, modules in modules_of.items()}


def _targets(
    fmt: TensorFormat,
    modules: Sequence[str],
    places: Mapping[str, _Place],
    held: Mapping[tuple[str, str], Mapping[TensorFormat | None, set[str]]],
    every_leaf: Mapping[str, Sequence[str]],
    towers: str,
) -> list[str]:
    layers_of: dict[tuple[str, str], dict[str, None]] = {}
    members: dict[tuple[str, str], list[str]] = {}
    targets: list[str] = []
    for module in modules:
        place = places.get(module)
        if place is None:
            targets.append(module)
            continue
        ending = place.parent, place.leaf
        layers_of.setdefault(ending, {})[place.layer] = None
        members.setdefault(ending, []).append(module)
    # attention and a state space in one layer: vLLM looks both up under names of their own (engines.fused)
    side_by_side = "self_attn" in every_leaf and any(parent in every_leaf for parent in LOOKED_UP_AS)
    side_by_side = side_by_side and not _apart(places)
    patterns: dict[tuple[str, str], list[str]] = {}  # (layers, parent) -> leaves
    for (parent, leaf), layers in layers_of.items():
        numbers = _choice(list(layers)) if len(held[parent, leaf]) > 1 else r"\d+"
        patterns.setdefault((numbers, parent), []).append(leaf)
    for (numbers, parent), leaves in patterns.items():
        endings = [(parent, leaf) for leaf in leaves]
        if any(_clash(fmt, layers_of[ending], held[ending]) for ending in endings):
            inside = {module for ending in endings for module in members[ending]}
            targets += [module for module in modules if module in inside]
            continue
        named = leaves
        if "#" in parent and set(leaves) == set(every_leaf[parent]):
            named = list(dict.fromkeys([*leaves, *_EXPERT_LEAVES]))
        where = rf"layers\.{numbers}\.{_escape(parent)}"
        if side_by_side and parent == "self_attn":
            where = rf"layers\.{numbers}\.(self_attn\.)?"
        elif side_by_side and numbers == r"\d+" and parent in LOOKED_UP_AS:
            where = rf"\d+\.{_escape(parent)}"
        targets.append(rf"re:{towers}(.*\.)?{where}{_choice(named)}$")
    return targets


def _apart(places: Mapping[str, _Place]) -> bool:
    """Whether no layer has both attention and a state space."""
    layers: dict[str, set[str]] = {}
    for place in places.values():
        layers.setdefault(place.parent, set()).add(place.prefix + place.layer)
    attention = layers.get("self_attn", set())
    return all(attention.isdisjoint(layers.get(parent, ())) for parent in LOOKED_UP_AS)


def _clash(fmt: TensorFormat, layers: Iterable[str], held: Mapping[TensorFormat | None, set[str]]) -> bool:
    """Whether a module of another format, or of none, has the same ending in one of these layers."""
    others = [found for other, found in held.items() if other != fmt]
    return any(layer in found for found in others for layer in layers)


def _place(module: str) -> _Place | None:
    match = _PLACE.fullmatch(module)
    if match is None:
        return None
    parent, _, leaf = _EXPERT.sub(r"\1experts.#", match["ending"]).rpartition(".")
    return _Place(match["prefix"], match["layer"], parent, leaf)


def _towers(formats: Iterable[str], ignore: Iterable[str], places: Mapping[str, _Place]) -> str:
    """A pattern that refuses names below towers and other stacks that `formats` leave alone; "" where there are none.

    A tower is known by the first part of its name that says something, or by how that begins.
    """
    own = {part for module in formats for part in module.split(".")}
    prefixes = {place.prefix for module in formats if (place := places.get(module))}
    words: dict[str, None] = {}
    for module in ignore:
        place = places.get(module)
        above = place.prefix if place else module.rpartition(".")[0]
        root = next((part for part in above.split(".") if part and part not in _NEUTRAL and part not in own), "")
        stem = next((stem for stem in _TOWERS if root.startswith(stem)), "")
        if not root or (place is None and not stem) or (place and place.prefix in prefixes):
            continue
        shared = any(part.startswith(stem) for part in own)
        words[rf"{stem}\w*" if stem and not shared else re.escape(root)] = None
    return rf"(?!(.*\.)?{_alternatives(list(words))}\.)" if words else ""


def _escape(parent: str) -> str:
    also = {**LOOKED_UP_AS, **EXPERTS_LOOKED_UP_AS} if "#" in parent else LOOKED_UP_AS
    names = [rf"({part}|{also[part]})" if part in also else re.escape(part) for part in parent.split(".")]
    return r"\.".join(names).replace(r"\#", r"\d+") + r"\." if parent else ""


def _choice(names: Sequence[str]) -> str:
    return _alternatives([re.escape(name) for name in names])


def _alternatives(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else "(" + "|".join(patterns) + ")"


class Targets:
    """Finds the group that targets a linear: by its name, else by a pattern, else by its class, as engines do."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], ignored: Sequence[str], *, where: str) -> None:
        pairs = [(str(target), group) for group in groups for target in group.get("targets") or []]
        self._by_name: dict[str, Mapping[str, Any]] = {}
        for target, group in pairs:
            self._by_name.setdefault(target, group)
        self._by_pattern = [(_compiled(target, where), group) for target, group in pairs if target.startswith("re:")]
        self._ignored = frozenset(target for target in ignored if not target.startswith("re:"))
        self._ignored_patterns = [_compiled(target, where) for target in ignored if target.startswith("re:")]

    def group_of(self, module: str) -> Mapping[str, Any] | None:
        """The config group of a linear, None where it is ignored or not targeted."""
        if not self._ignored.isdisjoint((module, "Linear")):
            return None
        if any(pattern.begins(module) for pattern in self._ignored_patterns):
            return None
        found = (group for pattern, group in self._by_pattern if pattern.begins(module))
        return self._by_name.get(module) or next(found, None) or self._by_name.get("Linear")


def _compiled(target: str, where: str) -> Pattern:
    try:
        return Pattern(target.removeprefix("re:"))
    except ValueError as error:
        what = f"{target!r} is not a valid regular expression ({error})."
        raise UserError(what, code="pattern-invalid", where=where, remedy="Correct the config.") from None
