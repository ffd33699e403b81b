"""Recipes: ordered YAML rules that give every weight a format. The first rule that matches decides.

    name: nvfp4-fp8-hybrid
    description: NVFP4 MLP, FP8 for every other linear
    rules:
      - role: mlp
        format: nvfp4
      - role: linear
        format: fp8-dynamic

A rule matches by `role` (one or a list), by `name` (a glob on the module's name, or `re:` and a regular expression),
and by `layers` ("0..3, 26, -2..-1"; negative numbers count from the end); all given conditions must hold. `format:
keep` leaves a tensor unquantized. lm_head, embeddings, norms and routers stay unless a rule names them by role or name;
an lm_head can be fp8-dynamic, embeddings stay.

An nvfp4 rule may say how far the range of its input scales goes beyond the largest calibrated input, `input_headroom:
2`, or `amax` for not at all. A rule that names its scale rule has `amax` by default, others have that of the run.

A rule may name its `scale_rule`, and then gets exactly that. One that names none follows the `effort` of the run, if
its format has several ways to choose scales (nvfp4, nvfp4a16, mxfp4, int4); `effort` is no name of a scale rule.
fp8-dynamic follows it beside such a rule for linears that are no routed experts; by itself it has plain scales.

FP8 weights of the source keep their codes, bit for bit, if the rule says `keep` or an FP8 format (and not `requantize:
true`); weights in NVFP4, MXFP4 or INT4 do if it says `keep` or that format.

`kv_cache: fp8` beside the rules asks engines for an FP8 KV cache, whose scales are calibrated; `keep` is the default.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError, field_validator

from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, INT4_GROUPS, KEEP, READ_ONLY, TensorFormat, headroom_problem
from snugfit.model.names import EXPERTS, LINEAR, ROLE_SETS, ROLES, SHARED_EXPERTS
from snugfit.patterns import Pattern
from snugfit.strict_yaml import YamlDocument, load_yaml, read_yaml_text

ROLE_NAMES = sorted({*ROLES.values(), *ROLE_SETS, EXPERTS, SHARED_EXPERTS, LINEAR, "router"})
ScaleRule = Literal["absmax", "four-over-six", "sweep"]
Objective = Literal["mse", "mae", "absmax"]
_LAYERS = re.compile(r"\s*-?\d{1,9}(\.\.-?\d{1,9})?\s*")
AMAX = "amax"  # `input_headroom` 1
_SEE_EXAMPLES = "`list_recipes` shows examples."


def one_or_many(value: Any) -> Any:
    """A value of a list may be written without the list."""
    return value if value is None or isinstance(value, (list, tuple)) else (value,)


class Selector(BaseModel):
    """Which weights a rule is about, as written. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: tuple[str, ...] = ()
    name: str | None = None
    layers: str | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _one_or_many_roles(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_text(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)


class Rule(Selector):
    """One rule as written. Unknown keys are errors."""

    format: str
    scale_rule: ScaleRule | None = None
    objective: Objective | None = None
    group_size: tuple[StrictInt, ...] | None = Field(default=None, min_length=1)
    symmetric: StrictBool | None = None
    requantize: StrictBool | None = None
    input_headroom: StrictFloat | None = None

    @field_validator("input_headroom", mode="before")
    @classmethod
    def _largest_alone(cls, value: Any) -> Any:
        return 1.0 if value == AMAX else value

    @field_validator("group_size", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)


class Recipe(BaseModel):
    """A whole recipe as written. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    kv_cache: Literal["fp8"] | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _without_keep(cls, value: Any) -> Any:
        return None if value == KEEP else value


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, its text, the name of its file (`where`), and the line of each rule."""

    recipe: Recipe
    text: str
    where: str
    rule_lines: tuple[int, ...] = field(compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def place_of(self, rule: int) -> str:
        """The place of a rule for errors, such as mine.yaml:4: rules[0]."""
        return f"{self.where}:{self.rule_lines[rule]}: rules[{rule}]"


def builtin_names() -> list[str]:
    """Names of the recipes in this package."""
    files = resources.files("snugfit.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def list_recipes() -> list[LoadedRecipe]:
    """The recipes in this package, by name."""
    return [load_recipe(name) for name in builtin_names()]


def load_recipe(name_or_path: str | Path) -> LoadedRecipe:
    """A recipe of this package by name, or one from a YAML file; UserError for a file that is not a valid recipe."""
    name = str(name_or_path)
    names = builtin_names()
    if name in names:
        text = (resources.files("snugfit.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        return parse_recipe(text, where=f"recipe {name}")
    path = Path(name_or_path)
    if path.is_file():
        return parse_recipe(read_yaml_text(path), where=name)
    near = get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError(
        f"no recipe {name!r}: neither a built-in recipe nor a file.",
        code="recipe-not-found",
        where="recipe",
        remedy=f"{hint}`list_recipes` shows the built-in recipes.",
    )


def parse_recipe(text: str, *, where: str) -> LoadedRecipe:
    """A recipe from YAML text; UserError, with the line and the key's path, for a text that is not a valid recipe."""
    document = load_yaml(text, where=where)
    if not isinstance(document.value, dict):
        what = "a recipe must be a mapping with `name` and `rules`."
        raise UserError(what, code="recipe-invalid", where=where, remedy=_SEE_EXAMPLES)
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        raise explain(error, document, Recipe.model_fields, Rule.model_fields, _SEE_EXAMPLES) from None
    for number, rule in enumerate(recipe.rules):
        for problem in _problems(rule):
            key = (problem.where,) if problem.where else ()
            raise problem.at(document.place_of("rules", number, *key))
    lines = tuple(document.line_of("rules", number) for number in range(len(recipe.rules)))
    return LoadedRecipe(recipe, text, where, lines)


def _problems(rule: Rule) -> Iterator[UserError]:
    """What is wrong with a rule by itself, each at its key; "" for the rule as a whole."""
    yield from selector_problems(rule)
    yield from format_problems("format", [rule.format])
    yield from _option_problems(rule)


def format_problems(key: str, formats: Sequence[str]) -> Iterator[UserError]:
    """What is wrong with names of formats that are to be written, under `key`."""
    for name in formats:
        if name in READ_ONLY:
            written = ", ".join((*FORMATS, KEEP))
            yield invalid_recipe(f"{name} can be read but not written.", key, f"Formats that can be: {written}.")
        else:
            yield from _unknown("format", [name], [*FORMATS, KEEP], where=key)


def selector_problems(rule: Selector) -> Iterator[UserError]:
    """What is wrong with the conditions of a rule, each at its key; "" for the rule as a whole."""
    yield from _unknown("role", rule.role, ROLE_NAMES)
    if not rule.role and rule.name is None and rule.layers is None:
        yield invalid_recipe("a rule needs `role`, `name` or `layers`.", "", "`role: linear` matches every linear.")
    if rule.name is not None and rule.name.startswith("re:"):
        try:
            Pattern(rule.name.removeprefix("re:"))
        except ValueError as error:
            what = f"not a valid regular expression ({error})."
            yield UserError(what, code="pattern-invalid", where="name", remedy="Correct it.")
    if rule.layers is not None and not all(map(_LAYERS.fullmatch, rule.layers.split(","))):
        what = f"layers must be numbers and ranges, got {rule.layers!r}."
        yield invalid_recipe(what, "layers", 'Write them as in "0..3, 26, -1".')


def _option_problems(rule: Rule) -> Iterator[UserError]:
    known = FORMATS[rule.format].scale_rules if rule.format in FORMATS else ()
    if rule.scale_rule is not None and rule.scale_rule not in known:
        remedy = f"Known: {', '.join(known)}." if known else "Remove it."
        yield invalid_recipe(f"{rule.format} has no scale rule {rule.scale_rule}.", "scale_rule", remedy)
    objective = rule.objective
    if (
        objective is not None
        and rule.scale_rule != "four-over-six"
        and (rule.scale_rule, objective) != ("sweep", "mse")
    ):
        what = f"objective {objective} needs `scale_rule: four-over-six`."
        remedy = "Add the scale rule, or remove it: sweep minimises mse, absmax compares nothing, `effort` has its own."
        yield invalid_recipe(what, "objective", remedy)
    for key in ("group_size", "symmetric"):
        if getattr(rule, key) is not None and rule.format != "int4":
            yield invalid_recipe(f"{rule.format} has no option {key}.", key, "Remove it.")
    if rule.input_headroom is not None:
        yield from _headroom_problems(rule)
    for size in rule.group_size or ():
        if size not in INT4_GROUPS:
            sizes = ", ".join(map(str, sorted(INT4_GROUPS)))
            yield invalid_recipe(f"engines do not run group_size {size}.", "group_size", f"Use one of {sizes}.")


def _headroom_problems(rule: Rule) -> Iterator[UserError]:
    key = "input_headroom"
    if rule.format not in FORMATS or not TensorFormat(rule.format).has_input_headroom:
        what = f"{rule.format} has no option {key}: it has no calibrated scale of its inputs."
        yield invalid_recipe(what, key, "Remove it.")
    elif problem := headroom_problem(rule.input_headroom):
        yield invalid_recipe(problem, key, f"2 doubles the range, {AMAX} is the calibrated one.")


def _unknown(key: str, values: Sequence[str], valid: Sequence[str], *, where: str = "") -> Iterator[UserError]:
    for value in values:
        if value not in valid:
            near = get_close_matches(value, valid, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(valid)}."
            yield invalid_recipe(f"unknown {key} {value!r}.", where or key, remedy)


def invalid_recipe(what: str, where: str, remedy: str) -> UserError:
    """The error of a recipe with a wrong key or value."""
    return UserError(what, code="recipe-invalid", where=where, remedy=remedy)


def explain(
    error: ValidationError, document: YamlDocument, keys: Collection[str], rule_keys: Collection[str], see: str
) -> UserError:
    """The most helpful of pydantic's errors, at its line, for a document with `keys` whose rules have `rule_keys`."""
    errors = error.errors()
    # a misspelt required key gives two errors, the missing key and the unknown one; the unknown one helps more
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place = document.place_of(*first["loc"])
    if first["loc"] == ("kv_cache",):
        given = repr(first["input"]) if isinstance(first["input"], str) else "of this type"
        return invalid_recipe(f"unknown kv_cache {given}.", place, f"Known: fp8, {KEEP}.")
    if first["type"] == "extra_forbidden":
        known = rule_keys if len(first["loc"]) > 1 else keys
        near = get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
        return invalid_recipe("unknown key.", place, remedy)
    return invalid_recipe(f"{first['msg']}.", place, see)
