"""Recipes: ordered YAML rules that give every weight a format. The first rule that matches decides.

    name: nvfp4-fp8-hybrid
    description: NVFP4 (Four Over Six) MLP, FP8 for every other linear
    rules:
      - role: mlp
        format: nvfp4
        scale: four-over-six
      - role: linear
        format: fp8-dynamic

A rule matches by `role` (one or a list), by `name` (a glob on the tensor's module, or `re:` and a pattern), by `layers`
("0..3, 26, -2..-1"; negative numbers count from the end); all that are given must hold. `format: keep` leaves a tensor
as it is. lm_head, embeddings, norms and routers stay unless a rule names them by role or name.

Weights that the source has in FP8 stay as they are, bit for bit, wherever a rule says `keep` or asks for an FP8 format
(unless it adds `requantize: true`); so do MXFP4 ones where it asks for MXFP4.

`kv_cache: fp8` beside the rules asks engines for an FP8 KV cache, and has its scales calibrated; `keep` is the default.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, field_validator

from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, INT4_GROUPS, KEEP, READ_ONLY, TensorFormat, check_shape
from snugfit.model.names import (
    DECODER,
    EXPERTS,
    KEPT_ROLES,
    LINEAR,
    ROLE_SETS,
    ROLES,
    SHARED_EXPERTS,
    TensorName,
    parse_name,
)
from snugfit.patterns import compiled
from snugfit.recipes.assignment import Assignment, check_experts, check_groups, check_inputs, copied, staying
from snugfit.storage.checkpoint import TensorInfo

_LAYERS = re.compile(r"\s*-?\d{1,9}(\.\.-?\d{1,9})?\s*")
ROLE_NAMES = sorted({*ROLES.values(), *ROLE_SETS, EXPERTS, SHARED_EXPERTS, LINEAR, "router"})
Scale = Literal["absmax", "four-over-six", "sweep"]
Objective = Literal["mse", "mae", "absmax"]
MAX_BYTES = 256_000  # PyYAML reads some 100 kB a second
MAX_NODES = 100_000


class Rule(BaseModel):
    """One rule as written. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: tuple[str, ...] = ()
    name: str | None = None
    layers: str | None = None
    format: str
    scale: Scale | None = None
    objective: Objective | None = None
    group: tuple[StrictInt, ...] | None = Field(default=None, min_length=1)
    symmetric: StrictBool | None = None
    requantize: StrictBool | None = None

    @field_validator("role", "group", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, (list, tuple)) else (value,)

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_text(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)


class Recipe(BaseModel):
    """A whole recipe as written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    kv_cache: Literal["fp8"] | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _kept_cache(cls, value: Any) -> Any:
        return None if value == KEEP else value


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice: the second would replace the first without a word.

    It also refuses aliases that lead to themselves, or write out to more than anyone means.
    """

    def compose_document(self) -> yaml.Node | None:
        """The document's nodes, no more of them than MAX_NODES with all aliases written out."""
        root = super().compose_document()
        sizes: dict[int, int] = {}

        def size(node: yaml.Node) -> int:
            if id(node) not in sizes:
                sizes[id(node)] = MAX_NODES + 1  # until it is known: a node inside itself
                inside = node.value if isinstance(node, yaml.CollectionNode) else []
                members = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
                sizes[id(node)] = 1 + sum(map(size, members))
            return sizes[id(node)]

        if root is not None and size(root) > MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, "aliases of aliases without end", root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, its keys all different."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with the text it was read from, where that was, and the text's SHA-256."""

    recipe: Recipe
    text: str
    where: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def builtin_names() -> list[str]:
    """Names of the recipes that come with snugfit."""
    files = resources.files("snugfit.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str) -> LoadedRecipe:
    """A built-in recipe by name, or one from a YAML file."""
    if name_or_path in builtin_names():
        text = (resources.files("snugfit.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return parse_recipe(text, where=f"recipe {name_or_path}")
    path = Path(name_or_path)
    if path.is_file():
        if path.stat().st_size > MAX_BYTES:
            what = f"{path.stat().st_size:,} bytes, which no recipe has."
            raise UserError(what, where=str(path), remedy="Name roles instead of tensors.")
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), where=str(path))
        except UnicodeDecodeError:
            raise UserError("not a text file.", where=str(path), remedy="A recipe is YAML in UTF-8.") from None
    near = get_close_matches(name_or_path, builtin_names(), n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError(
        f"no recipe {name_or_path!r}: neither built in nor a file.", remedy=f"{hint}`snugfit recipes` lists them."
    )


def parse_recipe(text: str, *, where: str) -> LoadedRecipe:
    """A recipe from YAML text; UserError with the key's path for anything that is not one."""
    try:
        document = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  # a SafeLoader
    except Exception as error:  # noqa: BLE001 (PyYAML's constructors let through whatever they stumble on)
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"not valid YAML ({problem}).", where=place, remedy="Mend this line.") from None
    if not isinstance(document, dict):
        raise UserError("a recipe is a mapping with `name` and `rules`.", where=where, remedy="See `snugfit recipes`.")
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise _explain(error, where) from None
    for number, rule in enumerate(recipe.rules):
        _check_rule(rule, f"{where}: rules[{number}]")
    return LoadedRecipe(recipe, text, where)


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
    for name in names:
        if name.parameter != "weight" or name.full in frozen:
            continue
        try:
            number = _first_match(loaded.recipe.rules, name, layers)
        except UserError as error:  # a pattern that takes too long
            raise UserError(error.what, where=f"{loaded.where}: {error.where}", remedy=error.remedy) from None
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
            raise _matches_nothing(rule, [name for name in names if name.full in frozen], layers, frozen, place)
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
    rule: Rule, frozen_names: Sequence[TensorName], layers: int, frozen: Mapping[str, str], place: str
) -> UserError:
    barred = next((name.full for name in frozen_names if _rule_matches(rule, name, layers)), None)
    if barred is not None:
        return UserError(f"{barred} must stay: {frozen[barred]}.", where=place, remedy="Remove this rule.")
    return UserError(
        "this rule matches no tensor of the model that an earlier rule left.",
        where=place,
        remedy="Remove it, or move it before the rule that takes its tensors.",
    )


def _first_match(rules: Sequence[Rule], name: TensorName, layers: int) -> int | None:
    return next((number for number, rule in enumerate(rules) if _rule_matches(rule, name, layers)), None)


def _rule_matches(rule: Rule, name: TensorName, layers: int) -> bool:
    if rule.role and not any(_role_matches(role, name) for role in rule.role):
        return False
    if rule.name is not None and not _name_matches(rule.name, name.module):
        return False
    if not rule.role and name.role in KEPT_ROLES and rule.name != name.module:
        return False  # a broad pattern must not sweep up an lm_head
    return rule.layers is None or name.layer in layer_numbers(rule.layers, layers)


def _role_matches(wanted: str, name: TensorName) -> bool:
    if wanted in (LINEAR, EXPERTS, SHARED_EXPERTS):
        return name.role not in KEPT_ROLES and (wanted == LINEAR or (name.routed if wanted == EXPERTS else name.shared))
    return name.role == wanted or name.role in ROLE_SETS.get(wanted, ())


def _name_matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return compiled(pattern.removeprefix("re:")).is_all_of(module)
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
    scale = rule.scale or spec.scale_rules[0]
    fmt = TensorFormat(rule.format)
    if rule.format == "int4":
        sizes = rule.group or INT4_GROUPS
        group = next((g for g in sizes if all(t.shape and t.shape[-1] % g == 0 for t in tensors)), sizes[-1])
        fmt = TensorFormat("int4", group=group, symmetric=rule.symmetric is not False)
    for tensor in tensors:
        check_shape(fmt, tensor.shape, where=f"{place}: {tensor.name}")
    return Assignment(fmt, scale, rule.objective or "mse", number)


def _check_rule(rule: Rule, place: str) -> None:
    if rule.format in READ_ONLY:
        remedy = f"Written are: {', '.join(FORMATS)}."
        raise UserError(f"{rule.format} is read, not written.", where=f"{place}.format", remedy=remedy)
    _known("format", rule.format, [*FORMATS, KEEP], place)
    for role in rule.role:
        _known("role", role, ROLE_NAMES, place)
    if not rule.role and rule.name is None and rule.layers is None:
        raise UserError("a rule needs `role`, `name` or `layers`.", where=place, remedy="`role: linear` means all.")
    if rule.name is not None and rule.name.startswith("re:"):
        try:
            compiled(rule.name.removeprefix("re:"))
        except ValueError as error:
            raise UserError(f"not a pattern ({error}).", where=f"{place}.name", remedy="Mend it.") from None
    if rule.layers is not None and not all(map(_LAYERS.fullmatch, rule.layers.split(","))):
        raise UserError(f"{rule.layers!r} names no layers.", where=f"{place}.layers", remedy='Write "0..3, 26, -1".')
    _check_options(rule, place)


def _check_options(rule: Rule, place: str) -> None:
    rules = FORMATS[rule.format].scale_rules if rule.format != KEEP else ()
    if rule.scale is not None and rule.scale not in rules:
        allowed = f"It knows {', '.join(rules)}." if rules else "Remove it."
        raise UserError(f"{rule.format} has no scale rule {rule.scale}.", where=f"{place}.scale", remedy=allowed)
    scale = rule.scale or (rules or ("",))[0]
    if rule.objective is not None and scale != "four-over-six" and (scale, rule.objective) != ("sweep", "mse"):
        raise UserError(
            f"objective {rule.objective} goes with `scale: four-over-six`.",
            where=f"{place}.objective",
            remedy="Remove it: sweep minimises mse, absmax chooses nothing.",
        )
    for key in ("group", "symmetric"):
        if getattr(rule, key) is not None and rule.format != "int4":
            raise UserError(f"{rule.format} has no option {key}.", where=f"{place}.{key}", remedy="Remove it.")
    for size in rule.group or ():
        if size not in INT4_GROUPS:
            raise UserError(f"group {size} is not run by engines.", where=f"{place}.group", remedy="Use 32, 64 or 128.")


def _known(key: str, value: str, valid: Sequence[str], place: str) -> None:
    if value not in valid:
        near = get_close_matches(value, valid, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(valid)}."
        raise UserError(f"unknown {key} {value!r}.", where=f"{place}.{key}", remedy=remedy)


def _explain(error: ValidationError, where: str) -> UserError:
    errors = error.errors()
    # a misspelt key that is needed gives two errors: the missing one first, the unknown one is what helps
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if first["loc"] == ("kv_cache",):
        remedy = f"Known: fp8, {KEEP}."
        given = repr(first["input"]) if isinstance(first["input"], str) else "of this type"
        return UserError(f"unknown kv_cache {given}.", where=f"{where}: kv_cache", remedy=remedy)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        fields = Rule.model_fields if len(first["loc"]) > 1 else Recipe.model_fields
        near = get_close_matches(str(first["loc"][-1]), list(fields), n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(fields)}."
        return UserError("unknown key.", where=f"{where}: {path}", remedy=remedy)
    return UserError(f"{first['msg']}.", where=f"{where}: {path}", remedy="See `snugfit recipes` for examples.")
