"""Resolves the rules of a recipe for a model: every weight gets the format of the first rule that matches it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from snugfit.engines.kernels import HEAD_FORMAT
from snugfit.errors import UserError
from snugfit.formats.spec import EFFORT, FORMATS, INT4_GROUPS, KEEP, PLAIN_RULES, TensorFormat, check_shape
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
from snugfit.recipes.assignment import (
    NO_RULE,
    Assignment,
    check_expert_headroom,
    check_experts,
    check_groups,
    check_inputs,
    followers,
    keep_codes,
    kept_format,
    without_rule,
)
from snugfit.recipes.recipe import LoadedRecipe, Rule, Selector
from snugfit.storage.safetensors_header import TensorInfo

_HEADS = ("lm_head", "embed_out")
# engines share one matrix between a tied head and the embeddings, which they read in 16 bits
_UNTIE = (
    "To quantize the head alone, store the embeddings a second time as lm_head.weight and set tie_word_embeddings to "
    "false in config.json."
)


def resolve(
    loaded: LoadedRecipe,
    tensors: Sequence[TensorInfo],
    *,
    num_layers: int,
    decoder: str = DECODER,
    not_quantizable: Mapping[str, str] | None = None,
    unquantized: Mapping[str, str] | None = None,
    source_formats: Mapping[str, TensorFormat] | None = None,
) -> dict[str, Assignment]:
    """Tensor name -> assignment, for each weight that a rule matches, and each that the source stores quantized.

    `num_layers` is the model's number of decoder layers, `decoder` the name of their list. `not_quantizable` maps
    tensors that no rule may quantize to the reason; `unquantized` those that engines only load in 16 bits: they get an
    assignment without a format where the source stores them quantized. `source_formats` maps tensors that the source
    stores quantized to their format.

    UserError for a layer's weight without a rule, a rule that matches nothing, a fused group or a layer's
    experts in several formats, a shape that the format does not allow, a format for a tensor outside the layers other
    than the output head.
    """
    wide = unquantized or {}
    fixed = {**wide, **(not_quantizable or {})}
    infos = {tensor.name: tensor for tensor in tensors}
    names = [parse_name(tensor.name, tensor.shape, decoder) for tensor in tensors]
    # engines build routers and embeddings in 16 bits, whatever the source stores
    in_16_bits = {name.full for name in names if name.role in ("router", "embed")}
    stored = {name: fmt for name, fmt in (source_formats or {}).items() if name not in in_16_bits}
    matcher = Matcher(loaded.recipe.rules, num_layers, loaded.place_of)
    matched: dict[int, list[TensorName]] = {number: [] for number in range(len(loaded.recipe.rules))}
    kept: set[int | None] = set()  # rules that ask for what happens anyway
    for name in names:
        if name.parameter == "weight" and name.full in wide:
            kept.add(matcher.first(name))
        if name.parameter != "weight" or name.full in fixed:
            continue
        number = matcher.first(name)
        if number is not None:
            matched[number].append(name)
        elif name.role not in KEPT_ROLES:
            raise _no_rule(name, infos[name.full], loaded.where)
    found: dict[str, Assignment] = {}
    for number, members in matched.items():
        if not members and not (number in kept and loaded.recipe.rules[number].format == KEEP):
            raise _unmatched(loaded, number, matcher, [name for name in names if name.full in fixed], fixed)
        found |= _assign(loaded, number, members, infos, stored)
    found |= {name: Assignment(None, "", "", NO_RULE) for name in stored if name in wide}
    unnamed = {name: fmt for name, fmt in stored.items() if name not in found}
    if unnamed:
        found |= without_rule(
            [name for name in names if name.parameter == "weight" and name.full not in found], unnamed
        )
    check_groups(found, loaded.where)
    check_experts(found, names, loaded.where)
    check_expert_headroom(found, names, loaded.where)
    layers = {name.full for name in names if name.layer is not None and name.expert is None}
    return found | followers(found, layers, lambda one: loaded.recipe.rules[one.rule].scale_rule is None)


def _assign(
    loaded: LoadedRecipe,
    number: int,
    members: Sequence[TensorName],
    infos: Mapping[str, TensorInfo],
    stored: Mapping[str, TensorFormat],
) -> dict[str, Assignment]:
    """The assignments of the tensors that rule `number` matches."""
    rule, place = loaded.recipe.rules[number], loaded.place_of(number)
    kept = {name.full: fmt for name in members if (fmt := kept_format(rule, stored.get(name.full)))}
    found = {name: keep_codes(fmt, number) for name, fmt in kept.items()}
    others = [name for name in members if name.full not in kept]
    outside = [name for name in others if name.layer is None and (name.role != "lm_head" or rule.format != HEAD_FORMAT)]
    if outside and rule.format != KEEP:
        head = next((name.module for name in outside if name.role == "lm_head"), "")
        what = f"{outside[0].module} is outside the decoder layers, where only an lm_head can be quantized."
        if head:
            what = f"{head} is the output head, which can only be {HEAD_FORMAT}."
        remedy = "Remove it from the rule, or give it `format: keep`."
        raise UserError(what, code="recipe-not-quantizable", where=place, remedy=remedy)
    if others:
        assignment = _settle(rule, number, [infos[name.full] for name in others], place)
        check_inputs(assignment, [name.full for name in others], place)
        found |= dict.fromkeys((name.full for name in others), assignment)
    return found


def _settle(rule: Rule, number: int, tensors: Sequence[TensorInfo], place: str) -> Assignment:
    """The one assignment of all tensors that a rule quantizes; its options settled by their shapes."""
    if rule.format == KEEP:
        return Assignment(None, "", "", number)
    fmt = TensorFormat(rule.format)
    if rule.format == "int4":
        sizes = rule.group_size or INT4_GROUPS
        fitting = (size for size in sizes if all(t.shape and t.shape[-1] % size == 0 for t in tensors))
        fmt = TensorFormat("int4", group_size=next(fitting, sizes[-1]), symmetric=rule.symmetric is not False)
    for tensor in tensors:
        check_shape(fmt, tensor.shape, where=f"{place}: {tensor.name}")
    default = EFFORT if rule.format in PLAIN_RULES else FORMATS[rule.format].scale_rules[0]
    headroom = rule.input_headroom
    if headroom is None and rule.scale_rule is not None and fmt.has_input_headroom:
        headroom = 1.0  # an exact rule takes the calibrated range as it is
    return Assignment(fmt, rule.scale_rule or default, rule.objective or "mse", number, input_headroom=headroom)


class Matcher:
    """Matches the conditions of rules against names; each regular expression has one time budget for all names."""

    def __init__(self, rules: Sequence[Selector], num_layers: int, place_of: Callable[[int], str]) -> None:
        self._rules = rules
        self._num_layers = num_layers
        self._place_of = place_of
        texts = {rule.name for rule in rules if rule.name is not None and rule.name.startswith("re:")}
        self._patterns = {text: Pattern(text.removeprefix("re:")) for text in texts}

    def first(self, name: TensorName) -> int | None:
        """The first rule that matches a tensor."""
        return next((number for number in range(len(self._rules)) if self.matches(number, name)), None)

    def matches(self, number: int, name: TensorName) -> bool:
        """Whether all conditions of rule `number` hold for a tensor; UserError for a pattern that takes too long."""
        rule = self._rules[number]
        if rule.role and not any(_role_matches(role, name) for role in rule.role):
            return False
        if rule.name is not None and not self._name_matches(rule.name, name.module, number):
            return False
        if not rule.role and name.role in KEPT_ROLES and rule.name != name.module:
            return False  # a broad pattern must not match an lm_head
        return rule.layers is None or name.layer in layer_numbers(rule.layers, self._num_layers)

    def _name_matches(self, pattern: str, module: str, number: int) -> bool:
        if pattern not in self._patterns:
            return fnmatch.fnmatchcase(module, pattern)
        try:
            return self._patterns[pattern].is_all_of(module)
        except UserError as error:
            raise error.at(f"{self._place_of(number)}.name") from None


def _role_matches(wanted: str, name: TensorName) -> bool:
    if wanted in (LINEAR, EXPERTS, SHARED_EXPERTS):
        return name.role not in KEPT_ROLES and (wanted == LINEAR or (name.routed if wanted == EXPERTS else name.shared))
    return name.role == wanted or name.role in ROLE_SETS.get(wanted, ())


@lru_cache(maxsize=1024)
def layer_numbers(text: str, num_layers: int) -> frozenset[int]:
    """The layers that `layers:` names, e.g. "0..3, 26, -2..-1", of a model with `num_layers` layers."""
    numbers: set[int] = set()
    for part in text.split(","):
        ends = [int(end) for end in part.split("..")]
        first, last = (end + num_layers if end < 0 else end for end in (ends[0], ends[-1]))
        numbers.update(range(max(first, 0), min(last, num_layers - 1) + 1))
    return frozenset(numbers)


def _no_rule(name: TensorName, info: TensorInfo, where: str) -> UserError:
    return UserError(
        f"no rule matches {name.full} (role {name.role}, {list(info.shape)}).",
        code="recipe-rule-missing",
        where=where,
        remedy=f"Add a rule for it, `format: {KEEP}` to leave it unquantized.",
    )


def _unmatched(
    loaded: LoadedRecipe,
    number: int,
    matcher: Matcher,
    fixed_names: Sequence[TensorName],
    fixed: Mapping[str, str],
) -> UserError:
    """Why rule `number` matches no tensor."""
    place = loaded.place_of(number)
    name = next((name for name in fixed_names if matcher.matches(number, name)), None)
    if name is not None:
        what, remedy = f"{name.full} cannot be quantized: {fixed[name.full]}.", "Remove this rule."
        if name.role == "lm_head":
            remedy = f"{remedy} {_UNTIE}"
        return UserError(what, code="recipe-not-quantizable", where=place, remedy=remedy)
    rule = loaded.recipe.rules[number]
    if rule.name in _HEADS or rule.role == ("lm_head",):
        what = "the file has no output head: the embeddings take its place, or the model predicts no tokens."
        remedy = f"Remove this rule. {_UNTIE}"
        return UserError(what, code="recipe-not-quantizable", where=place, remedy=remedy)
    return UserError(
        "this rule matches no tensor of the model that an earlier rule leaves.",
        code="recipe-rule-unmatched",
        where=place,
        remedy="Remove it, or move it before the rule that matches its tensors. Routers, embeddings and an lm_head are "
        "matched by `role` or by their whole name alone.",
    )
