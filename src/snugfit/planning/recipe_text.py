"""A recipe's YAML for formats that were decided weight by weight: few rules, runs of layers joined. No torch.

The rules resolve to exactly the formats that were decided. Weights of one kind (the same place in every layer) share
rules, by role where roles can say it, else by a glob on their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from snugfit.formats.spec import KEEP
from snugfit.model.names import EXPERTS, KEPT_ROLES, LINEAR, ROLE_SETS, SHARED_EXPERTS, TensorName
from snugfit.recipes.recipe import Rule
from snugfit.recipes.resolve import Matcher
from snugfit.records.plan import layer_runs

# names of which YAML makes nothing but text
_PLAIN = re.compile(r"[a-z]+(-[\w.]+)+", re.ASCII)
_EXPERT = re.compile(r"\.experts\.\d+\.")
_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
_PURE_ROLES = frozenset(role for roles in ROLE_SETS.values() for role in roles)
# sets of roles that have a name, the larger first
_NAMED_SETS = (("attention", frozenset({"q", "k", "v", "o"})), ("mlp", frozenset({"gate", "up", "down"})))


@dataclass(frozen=True)
class WeightFormat:
    """What a rule says of a weight: a format as recipes name it, and INT4's options."""

    format: str
    group_size: int | None = None
    symmetric: bool = True

    def lines(self) -> list[str]:
        """The keys of a rule."""
        found = [f"format: {self.format}"]
        found += [] if self.group_size is None else [f"group_size: {self.group_size}"]
        return found if self.symmetric else [*found, "symmetric: false"]


@dataclass(frozen=True)
class _Draft:
    """A rule: by roles or by one glob, in some layers (None: all)."""

    roles: tuple[str, ...]
    glob: str
    layers: tuple[int, ...] | None
    format: WeightFormat

    def selector(self) -> Rule:
        """The rule as recipes parse it, without the format's options."""
        layers = None if self.layers is None else layer_runs(self.layers)
        return Rule(role=self.roles, name=self.glob or None, layers=layers, format=self.format.format)

    def lines(self) -> list[str]:
        """The rule's YAML."""
        roles = self.roles[0] if len(self.roles) == 1 else f"[{', '.join(self.roles)}]"
        found = [f"role: {roles}"] if self.roles else [f'name: "{self.glob}"']
        found += [] if self.layers is None else [f'layers: "{layer_runs(self.layers)}"']
        found += self.format.lines()
        return [f"  - {found[0]}", *(f"    {line}" for line in found[1:])]


def recipe_text(
    formats: Mapping[str, WeightFormat],
    names: Mapping[str, TensorName],
    *,
    num_layers: int,
    name: str,
    description: str,
    comments: Iterable[str] = (),
    fp8_cache: bool = False,
) -> str:
    """The YAML of a recipe that gives each weight of `formats` its format, of a model with so many layers.

    `names` parses the names of the weights; `comments` are lines above the YAML.
    """
    inside = {n: fmt for n, fmt in formats.items() if names[n].layer is not None and names[n].role not in KEPT_ROLES}
    kinds = _kinds(inside, names)
    drafts = _simplified(_drafts(kinds, Counter(inside.values())), kinds, num_layers)
    if not _exact(drafts, kinds, num_layers):
        drafts = _by_name(kinds)
    heads = [(n, fmt) for n, fmt in formats.items() if n not in inside and fmt.format != KEEP]
    lines = [f"# {line}".rstrip() for line in comments]
    lines += [f"name: {name if re.fullmatch(_PLAIN, name) else _quoted(name)}", f"description: {_quoted(description)}"]
    lines += ["kv_cache: fp8"] if fp8_cache else []
    lines += ["rules:", *(line for draft in drafts for line in draft.lines())]
    for head, fmt in heads:
        role = names[head].role
        lines += _Draft((role,), "", None, fmt).lines()
    return "\n".join(lines) + "\n"


# kind -> layer -> (a weight of this kind in this layer, its format)
_Kinds = Mapping[str, Mapping[int, tuple[TensorName, WeightFormat]]]


def kind_of(name: TensorName) -> str:
    """The place of a weight in its layer, the same for every expert: self_attn.q_proj, mlp.experts.*.up_proj."""
    _, _, rest = name.module.partition(f".{name.layer}.")
    return _EXPERT.sub(".experts.*.", f".{rest}")[1:]


def _kinds(formats: Mapping[str, WeightFormat], names: Mapping[str, TensorName]) -> _Kinds:
    kinds: dict[str, dict[int, tuple[TensorName, WeightFormat]]] = {}
    for name, fmt in formats.items():
        parsed = names[name]
        if parsed.layer is not None:
            kinds.setdefault(kind_of(parsed), {}).setdefault(parsed.layer, (parsed, fmt))
    return kinds


def _drafts(kinds: _Kinds, counts: Counter[WeightFormat]) -> list[_Draft]:
    """Rules for every kind, first those by name, then of experts, of shared experts, of roles, and of all the rest."""
    by_selector: dict[tuple[int, tuple[str, ...], str], dict[int, WeightFormat]] = {}
    for (order, role, glob), members in _selectors(kinds).items():
        merged: dict[int, WeightFormat] = {}
        for kind in members:
            merged |= {layer: fmt for layer, (_, fmt) in kinds[kind].items()}
        by_selector[order, (role,) if role else (), glob] = merged
    by_selector = _joined(by_selector)
    default = max(counts, key=lambda fmt: counts[fmt])
    limited: list[tuple[int, _Draft]] = []
    whole: list[tuple[int, _Draft]] = []
    for (order, roles, glob), layers in sorted(by_selector.items(), key=lambda item: _first_role(item[0][1])):
        by_format: dict[WeightFormat, list[int]] = {}
        for layer, fmt in sorted(layers.items()):
            by_format.setdefault(fmt, []).append(layer)
        # what the last rule says anyway comes last, so that it needs no rule
        ordered = sorted(by_format.items(), key=lambda item: (item[0] == default, len(item[1]), item[1]))
        limited += [(order, _Draft(roles, glob, tuple(numbers), fmt)) for fmt, numbers in ordered[:-1]]
        whole.append((order, _Draft(roles, glob, None, ordered[-1][0])))
    rules = [*_with_roles_joined(limited), *_with_roles_joined(whole)]
    ordered_rules = [draft for _, draft in sorted(rules, key=lambda pair: pair[0])]
    return [*ordered_rules, _Draft((LINEAR,), "", None, default)]


def _selectors(kinds: _Kinds) -> dict[tuple[int, str, str], list[str]]:
    """(order, role or "", glob or "") -> the kinds that it selects."""
    found: dict[tuple[int, str, str], list[str]] = {}
    by_role: dict[str, list[str]] = {}
    for kind, layers in kinds.items():
        first = next(iter(layers.values()))[0]
        role = EXPERTS if first.routed else SHARED_EXPERTS if first.shared else first.role
        if role in (*_PURE_ROLES, EXPERTS, SHARED_EXPERTS):
            by_role.setdefault(role, []).append(kind)
        else:
            found[0, "", f"*.{kind}"] = [kind]
    order = {EXPERTS: 1, SHARED_EXPERTS: 2}
    for role, members in by_role.items():
        if _agree([{n: fmt for n, (_, fmt) in kinds[kind].items()} for kind in members]):
            found[order.get(role, 3), role, ""] = members
        else:
            found |= {(0, "", f"*.{kind}"): [kind] for kind in members}
    return found


def _agree(maps: Sequence[Mapping[int, WeightFormat]]) -> bool:
    """Whether no layer has two formats."""
    merged: dict[int, WeightFormat] = {}
    return all(merged.setdefault(layer, fmt) == fmt for one in maps for layer, fmt in one.items())


def _joined(
    found: Mapping[tuple[int, tuple[str, ...], str], dict[int, WeightFormat]],
) -> dict[tuple[int, tuple[str, ...], str], dict[int, WeightFormat]]:
    """The same with roles that have the same formats in the same layers as one list of roles."""
    result: dict[tuple[int, tuple[str, ...], str], dict[int, WeightFormat]] = {}
    for (order, roles, glob), layers in found.items():
        same = next((key for key, other in result.items() if key[0] == order == 3 and other == layers), None)
        if same is None:
            result[order, roles, glob] = layers
        else:
            result[order, (*same[1], *roles), glob] = result.pop(same)
    return result


def _first_role(roles: Sequence[str]) -> int:
    """The place of the first of some roles in a layer."""
    return min((_ORDER.index(role) for role in roles if role in _ORDER), default=-1)


def _with_roles_joined(drafts: Sequence[tuple[int, _Draft]]) -> list[tuple[int, _Draft]]:
    """Rules by role with one format and the same layers as one rule."""
    found: dict[object, tuple[int, _Draft]] = {}
    for number, (order, draft) in enumerate(drafts):
        key = (draft.layers, draft.format) if order == 3 else number
        if key in found:
            roles = (*found[key][1].roles, *draft.roles)
            found[key] = order, _Draft(roles, "", draft.layers, draft.format)
        else:
            found[key] = order, draft
    return [(order, _named(draft)) for order, draft in found.values()]


def _named(draft: _Draft) -> _Draft:
    """The rule with the names of sets in place of all their roles, in the order of a layer."""
    roles = sorted(draft.roles, key=lambda role: (_ORDER.index(role) if role in _ORDER else -1, role))
    for name, members in _NAMED_SETS:
        if members <= set(roles):
            first = min(roles.index(role) for role in members)
            roles = [role for role in roles if role not in members]
            roles.insert(min(first, len(roles)), name)
    return _Draft(tuple(roles), draft.glob, draft.layers, draft.format)


def _simplified(drafts: list[_Draft], kinds: _Kinds, num_layers: int) -> list[_Draft]:
    """Without the rules that later ones make needless."""
    kept = list(drafts)
    for draft in drafts[:-1]:
        shorter = [other for other in kept if other is not draft]
        if _exact(shorter, kinds, num_layers):
            kept = shorter
    return kept if len(kept) < 2 or _reached(kept[:-1], kinds, num_layers) else kept[:-1]


def _reached(others: Sequence[_Draft], kinds: _Kinds, num_layers: int) -> bool:
    """Whether these rules leave any weight to a rule behind them."""
    matcher = _matcher(others, num_layers)
    return any(matcher.first(name) is None for layers in kinds.values() for name, _ in layers.values())


def _exact(drafts: Sequence[_Draft], kinds: _Kinds, num_layers: int) -> bool:
    """Whether the rules give every weight its format."""
    matcher = _matcher(drafts, num_layers)
    for layers in kinds.values():
        for name, fmt in layers.values():
            number = matcher.first(name)
            if number is None or drafts[number].format != fmt:
                return False
    return True


def _matcher(drafts: Sequence[_Draft], num_layers: int) -> Matcher:
    return Matcher([draft.selector() for draft in drafts], num_layers, str)


def _by_name(kinds: _Kinds) -> list[_Draft]:
    """Rules that name every kind, which are always exact."""
    found = []
    for kind, layers in kinds.items():
        by_format: dict[WeightFormat, list[int]] = {}
        for layer, (_, fmt) in sorted(layers.items()):
            by_format.setdefault(fmt, []).append(layer)
        alone = len(by_format) == 1
        found += [_Draft((), f"*.{kind}", None if alone else tuple(n), fmt) for fmt, n in by_format.items()]
    return found


def _quoted(text: str) -> str:
    """A YAML string in double quotes."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{"".join(c if c.isprintable() else " " for c in plain)}"'
