"""Rules to the format of each tensor: the first rule that matches decides."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from functools import lru_cache

from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, INT4_GROUPS, KEEP, TensorFormat, check_shape
from snugfit.model.names import (
    DECODER,
    EXPERTS,
    KEPT_ROLES,
    LINEAR,
    ROLE_SETS,
    SHARED_EXPERTS,
    TensorName,
    parse_name,
)
from snugfit.patterns import Pattern
from snugfit.recipes.assignment import Assignment, check_experts, check_groups, check_inputs, copied, staying
from snugfit.recipes.recipe import LoadedRecipe, Rule
from snugfit.storage.safetensors_header import TensorInfo


def resolve(
    loaded: LoadedRecipe,
    tensors: Sequence[TensorInfo],
    *,
    layers: int,
    decoder: str = DECODER,
    frozen: Mapping[str, str] | None = None,
    stored: Mapping[str, TensorFormat] | None = None,
) -> dict[str, Assignment]:
    """Tensor name -> assignment, for each weight that a rule names, and each that the source has quantized.

    `layers` is the model's number of decoder layers, `decoder` their list's name; `frozen` maps names of tensors that
    must stay to why, `stored` those that the source has quantized to their format. Raises UserError for a layer weight
    without a rule, a rule that matches nothing, a fused group or a layer's experts that are split, a shape that does
    not fit, a format for a tensor outside the layers.
    """
    frozen, stored = frozen or {}, stored or {}
    found: dict[str, Assignment] = {}
    infos = {tensor.name: tensor for tensor in tensors}
    names = [parse_name(tensor.name, tensor.shape, decoder) for tensor in tensors]
    matched: dict[int, list[TensorName]] = {number: [] for number in range(len(loaded.recipe.rules))}
    patterns = _patterns(loaded.recipe.rules)
    for name in names:
        if name.parameter != "weight" or name.full in frozen:
            continue
        try:
            number = _first_match(loaded.recipe.rules, name, layers, patterns)
        except UserError as error:  # a pattern that takes too long
            where = f"{loaded.where}: {error.where}"
            raise UserError(error.what, code=error.code, where=where, remedy=error.remedy) from None
        if number is not None:
            matched[number].append(name)
        elif name.role not in KEPT_ROLES:
            raise UserError(
                f"no rule names {name.full} (role {name.role}, {list(infos[name.full].shape)}).",
                where=loaded.where,
                remedy=f"Add a rule for it, `format: {KEEP}` to leave it as it is.",
            )
    for number, rule in enumerate(loaded.recipe.rules):
        place = f"{loaded.where}: rules[{number}]"
        if not matched[number]:
            raise _matches_nothing(
                rule, [name for name in names if name.full in frozen], layers, frozen, place, patterns
            )
        asked = "" if rule.requantize else rule.format
        as_it_is = {n.full: fmt for n in matched[number] if (fmt := staying(asked, stored.get(n.full)))}
        found |= {name: copied(name, fmt, number, place) for name, fmt in as_it_is.items()}
        outside = [name.module for name in matched[number] if name.layer is None and name.full not in as_it_is]
        if outside and rule.format != KEEP:
            raise UserError(
                f"{outside[0]} stands outside the decoder layers, where nothing is quantized so far.",
                where=place,
                remedy="Leave it out, or give it `format: keep`.",
            )
        new = [name.full for name in matched[number] if name.full not in as_it_is]
        if new:
            assignment = _settle(rule, number, [infos[name] for name in new], place)
            check_inputs(assignment, new, place)
            found |= dict.fromkeys(new, assignment)
    found |= {name: copied(name, fmt, -1, loaded.where) for name, fmt in stored.items() if name not in found}
    check_groups(found, loaded.where)
    check_experts(found, names, loaded.where)
    return found


def _matches_nothing(
    rule: Rule,
    frozen_names: Sequence[TensorName],
    layers: int,
    frozen: Mapping[str, str],
    place: str,
    patterns: Mapping[str, Pattern],
) -> UserError:
    barred = next((name.full for name in frozen_names if _rule_matches(rule, name, layers, patterns)), None)
    if barred is not None:
        return UserError(f"{barred} must stay: {frozen[barred]}.", where=place, remedy="Remove this rule.")
    return UserError(
        "this rule matches no tensor of the model that an earlier rule left.",
        where=place,
        remedy="Remove it, or move it before the rule that takes its tensors.",
    )


def _patterns(rules: Sequence[Rule]) -> dict[str, Pattern]:
    """The regular expressions of rules by their text; each has one time budget for all names."""
    names = (rule.name for rule in rules if rule.name is not None and rule.name.startswith("re:"))
    return {name: Pattern(name.removeprefix("re:")) for name in names}


def _first_match(rules: Sequence[Rule], name: TensorName, layers: int, patterns: Mapping[str, Pattern]) -> int | None:
    return next((number for number, rule in enumerate(rules) if _rule_matches(rule, name, layers, patterns)), None)


def _rule_matches(rule: Rule, name: TensorName, layers: int, patterns: Mapping[str, Pattern]) -> bool:
    if rule.role and not any(_role_matches(role, name) for role in rule.role):
        return False
    if rule.name is not None and not _name_matches(rule.name, name.module, patterns):
        return False
    if not rule.role and name.role in KEPT_ROLES and rule.name != name.module:
        return False  # a broad pattern must not sweep up an lm_head
    return rule.layers is None or name.layer in layer_numbers(rule.layers, layers)


def _role_matches(wanted: str, name: TensorName) -> bool:
    if wanted in (LINEAR, EXPERTS, SHARED_EXPERTS):
        return name.role not in KEPT_ROLES and (wanted == LINEAR or (name.routed if wanted == EXPERTS else name.shared))
    return name.role == wanted or name.role in ROLE_SETS.get(wanted, ())


def _name_matches(pattern: str, module: str, patterns: Mapping[str, Pattern]) -> bool:
    if pattern in patterns:
        return patterns[pattern].is_all_of(module)
    return fnmatch.fnmatchcase(module, pattern)


@lru_cache(maxsize=1024)
def layer_numbers(text: str, layers: int) -> frozenset[int]:
    """The layers that `layers:` names, e.g. "0..3, 26, -2..-1" of a model with `layers` layers."""
    numbers: set[int] = set()
    for part in text.split(","):
        ends = [int(end) for end in part.split("..")]
        first, last = (end + layers if end < 0 else end for end in (ends[0], ends[-1]))
        numbers.update(range(max(first, 0), min(last, layers - 1) + 1))
    return frozenset(numbers)


def _settle(rule: Rule, number: int, tensors: Sequence[TensorInfo], place: str) -> Assignment:
    if rule.format == KEEP:
        return Assignment(None, "", "", number)
    spec = FORMATS[rule.format]
    scale = rule.scale_rule or spec.scale_rules[0]
    fmt = TensorFormat(rule.format)
    if rule.format == "int4":
        sizes = rule.group_size or INT4_GROUPS
        group_size = next((g for g in sizes if all(t.shape and t.shape[-1] % g == 0 for t in tensors)), sizes[-1])
        fmt = TensorFormat("int4", group_size=group_size, symmetric=rule.symmetric is not False)
    for tensor in tensors:
        check_shape(fmt, tensor.shape, where=f"{place}: {tensor.name}")
    return Assignment(fmt, scale, rule.objective or "mse", number)
