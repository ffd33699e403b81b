"""Targets of config groups: patterns that match exactly the intended modules, and what a module's name matches.

Readers look a pattern up under other names than the file's. transformers and vLLM call the text model of a
vision-language model `model.language_model.layers`, `language_model.model.layers` or `model.layers`; its towers have
layers with the same endings. vLLM fuses q, k and v, and looks a layer's experts up on expert 0. So patterns begin at
`layers.N`, refuse the towers by name, and end in projections.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snugfit.engines.fused import BARE_ATTENTION_BESIDE, LOOKED_UP_AS
from snugfit.engines.mixtures import EXPERTS_LOOKED_UP_AS
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.patterns import Pattern

_PLACE = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.(?P<layer>\d+)\.(?P<ending>.+)")
_EXPERT = re.compile(r"(^|\.)experts\.\d+(?=\.|$)")
_ANY_LAYER = r"\d+"
_ATTENTION, _STATE_SPACE = "self_attn", "mamba"
# vLLM 0.24 looks up experts of every family under these names, and takes what it does not find for unquantized
_EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj")
# parts of a name that do not identify a stack of layers
_NEUTRAL = frozenset({"model", "language_model", "text_model", "base_model"})
# towers have several names that begin alike: vision_tower, vision_model, vision_encoder
_TOWERS = ("vision", "visual", "audio", "speech", "image", "video")

# last parts of the names of token embeddings, which the class Linear does not target
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")

_OUTPUT_HEADS = ("lm_head", "embed_out")

# parts of a module's name that files of vision-language models have or leave out
_NEUTRAL_NAMES = _NEUTRAL | {"vision_model"}

_Ending = tuple[str, str]  # (parent, leaf) of a module inside a layer


@dataclass(frozen=True, slots=True)
class _Place:
    """A module in a stack of layers. `parent` follows the layer's number, any expert's number in it written as #."""

    prefix: str
    layer: str
    parent: str
    leaf: str

    @property
    def ending(self) -> _Ending:
        return self.parent, self.leaf


@dataclass(frozen=True)
class _Survey:
    """Where all modules of a checkpoint are.

    `layers` are the layers that have an ending in a format (None: unquantized), `leaves` all leaves below a parent,
    both without the towers, which the pattern `towers` refuses. With `side_by_side` a layer has both attention and a
    state space; with `bare_attention` vLLM looks up attention without its name.
    """

    places: Mapping[str, _Place]
    layers: Mapping[_Ending, Mapping[TensorFormat | None, set[str]]]
    leaves: Mapping[str, Sequence[str]]
    towers: str
    side_by_side: bool
    bare_attention: bool


def write_targets(formats: Mapping[str, TensorFormat], ignore: Sequence[str]) -> dict[TensorFormat, list[str]]:
    """The targets of each format of `formats` (module -> format): disjoint, and none matches a name of `ignore`.

    One pattern for all layers where no module of another format has the same ending, else one that names layers; where
    that would still match another module, the modules' own names. UserError where vLLM could match neither.
    """
    survey = _survey(formats, ignore)
    modules_of: dict[TensorFormat, list[str]] = {}
    for module, fmt in formats.items():
        modules_of.setdefault(fmt, []).append(module)
    return {fmt: _targets(fmt, modules, survey) for fmt, modules in modules_of.items()}


def alike_in_all_layers(modules: Iterable[str]) -> frozenset[str]:
    """Of these linears those that need one format in all layers, as no target can give it to them in some alone."""
    survey = _survey({}, list(modules))
    if not survey.side_by_side:
        return frozenset()
    return frozenset(module for module, place in survey.places.items() if place.parent == _STATE_SPACE)


def _survey(formats: Mapping[str, TensorFormat], ignore: Sequence[str]) -> _Survey:
    places = {module: place for module in (*formats, *ignore) if (place := _place(module))}
    towers = _towers(formats, ignore, places)
    is_outside_towers = re.compile(towers).match
    layers: dict[_Ending, dict[TensorFormat | None, set[str]]] = {}
    leaves: dict[str, dict[str, None]] = {}
    holders: dict[str, set[str]] = {}  # parent -> layers that have it
    for module, place in places.items():
        if is_outside_towers(module):
            layers.setdefault(place.ending, {}).setdefault(formats.get(module), set()).add(place.layer)
            leaves.setdefault(place.parent, {})[place.leaf] = None
            holders.setdefault(place.parent, set()).add(place.prefix + place.layer)
    side_by_side = not holders.get(_ATTENTION, set()).isdisjoint(holders.get(_STATE_SPACE, ()))
    return _Survey(
        places=places,
        layers=layers,
        leaves={parent: list(found) for parent, found in leaves.items()},
        towers=towers,
        side_by_side=side_by_side,
        bare_attention=side_by_side or BARE_ATTENTION_BESIDE in layers,
    )


def _targets(fmt: TensorFormat, modules: Sequence[str], survey: _Survey) -> list[str]:
    targets = list(dict.fromkeys(_target_outside(module) for module in modules if module not in survey.places))
    members: dict[_Ending, list[str]] = {}
    for module in modules:
        if module in survey.places:
            members.setdefault(survey.places[module].ending, []).append(module)
    patterns: dict[tuple[str, str], list[str]] = {}  # (layers, parent) -> leaves
    for ending, inside in members.items():
        layers = list(dict.fromkeys(survey.places[module].layer for module in inside))
        numbers = _choice(layers) if len(survey.layers[ending]) > 1 else _ANY_LAYER
        patterns.setdefault((numbers, ending[0]), []).append(ending[1])
    for (numbers, parent), leaves in patterns.items():
        inside_all = {module for leaf in leaves for module in members[parent, leaf]}
        clash = any(_clashes(fmt, members[parent, leaf], survey.layers[parent, leaf], survey) for leaf in leaves)
        if survey.side_by_side and parent == _STATE_SPACE and (clash or numbers != _ANY_LAYER):
            raise _no_target(members[parent, leaves[0]][0])
        if clash:
            targets += [module for module in modules if module in inside_all]
        else:
            targets.append(_pattern(numbers, parent, leaves, survey))
    return targets


def _target_outside(module: str) -> str:
    """The target of a module outside the layers: an output head has more parts in its name in some models of vLLM's."""
    leaf = module.rpartition(".")[2]
    return rf"re:(.*\.)?{leaf}$" if leaf in _OUTPUT_HEADS else module


def _pattern(numbers: str, parent: str, leaves: Sequence[str], survey: _Survey) -> str:
    if "#" in parent and set(leaves) == set(survey.leaves[parent]):
        leaves = list(dict.fromkeys([*leaves, *_EXPERT_LEAVES]))
    place = rf"layers\.{numbers}\.{_escape(parent)}"
    # with attention and a state space in one layer (falcon_h1) vLLM looks up self_attn without that name, as
    # layers.0.q_proj, and mamba of layer i of n as i + n without `layers`, as 3.mixer.in_proj
    if survey.bare_attention and parent == _ATTENTION:
        place = rf"layers\.{numbers}\.({_ATTENTION}\.)?"
    elif survey.side_by_side and parent == _STATE_SPACE:
        place = rf"{_ANY_LAYER}\.{_escape(parent)}"
    return rf"re:{survey.towers}(.*\.)?{place}{_choice(leaves)}$"


def _clashes(
    fmt: TensorFormat, members: Sequence[str], layers: Mapping[TensorFormat | None, set[str]], survey: _Survey
) -> bool:
    """Whether a module of another format, or of none, has the same ending in a layer of these `members`."""
    others = [found for other, found in layers.items() if other != fmt]
    return any(survey.places[module].layer in found for found in others for module in members)


def _no_target(module: str) -> UserError:
    return UserError(
        "vLLM looks up a state space beside attention under a number that does not identify its layer, so no target "
        "can give it a format in some layers alone.",
        code="format-unverified",
        where=module,
        remedy="Give this linear one format in all layers.",
    )


def _place(module: str) -> _Place | None:
    match = _PLACE.fullmatch(module)
    if match is None:
        return None
    parent, _, leaf = _EXPERT.sub(r"\1experts.#", match["ending"]).rpartition(".")
    return _Place(match["prefix"], match["layer"], parent, leaf)


def _towers(formats: Iterable[str], ignore: Iterable[str], places: Mapping[str, _Place]) -> str:
    """A pattern that refuses names below towers and other stacks without a module of `formats`; "" without such stacks.

    A tower is known by the first part of its name that is not neutral, or by how that part begins.
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
        self._by_class = [group for target, group in pairs if target == "Linear"]
        self._ignored = frozenset(target for target in ignored if not target.startswith("re:"))
        self._ignored_common = frozenset(map(common_name, self._ignored)) - {""}
        self._ignored_patterns = [_compiled(target, where) for target in ignored if target.startswith("re:")]

    def group_of(self, module: str) -> Mapping[str, Any] | None:
        """The config group of a linear or an embedding, None where it is ignored or not targeted."""
        kind = "Embedding" if module.endswith(_EMBEDDINGS) else "Linear"
        if not self._ignored.isdisjoint((module, kind)):
            return None
        if any(pattern.begins(module) for pattern in self._ignored_patterns):
            return None
        found = (group for pattern, group in self._by_pattern if pattern.begins(module))
        return self._by_name.get(module) or next(found, None) or self._by_name.get(kind)

    def groups_of(self, module: str) -> list[Mapping[str, Any]]:
        """All groups that target a linear as closely as the one of `group_of`: by name or pattern, else by class."""
        if self.group_of(module) is None:
            return []
        named = [self._by_name[module]] if module in self._by_name else []
        named += [group for pattern, group in self._by_pattern if pattern.begins(module)]
        return named or self._by_class

    def leaves_plain(self, module: str) -> bool:
        """Whether a module with a plain weight stays so although `group_of` has a group for it.

        llm-compressor writes the names of modules into `ignore`, and transformers writes tensors under others; and its
        target Linear means a class, which a table of embeddings is not of.
        """
        return common_name(module) in self._ignored_common or (not self.names(module) and _is_table(module))

    def names(self, module: str) -> bool:
        """Whether a target matches a module by its name or a pattern, and not by its class alone."""
        return module in self._by_name or any(pattern.begins(module) for pattern, _ in self._by_pattern)


def common_name(module: str) -> str:
    """A module's name without the parts by which files, transformers and vLLM differ."""
    return ".".join(part for part in module.split(".") if part not in _NEUTRAL_NAMES)


def _is_table(module: str) -> bool:
    """Whether a module outside the layers is called as tables of positions and the like are, and not as a linear."""
    leaf = module.rpartition(".")[2]
    return ("embed" in leaf or leaf == "wpe") and "proj" not in leaf and leaf != "embed_out"


def _compiled(target: str, where: str) -> Pattern:
    try:
        return Pattern(target.removeprefix("re:"))
    except ValueError as error:
        what = f"{target!r} is not a valid regular expression ({error})."
        raise UserError(what, code="pattern-invalid", where=where, remedy="Correct the config.") from None
