"""Recipes: ordered YAML rules that give every weight a format. The first rule that matches decides.

    name: nvfp4-fp8-hybrid
    description: NVFP4 (Four Over Six) MLP, FP8 for every other linear
    rules:
      - role: mlp
        format: nvfp4
        scale_rule: four-over-six
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

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, field_validator

from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, INT4_GROUPS, KEEP, READ_ONLY
from snugfit.model.names import (
    EXPERTS,
    LINEAR,
    ROLE_SETS,
    ROLES,
    SHARED_EXPERTS,
)
from snugfit.patterns import Pattern
from snugfit.strict_yaml import MAX_BYTES, _UniqueKeys

_LAYERS = re.compile(r"\s*-?\d{1,9}(\.\.-?\d{1,9})?\s*")
ROLE_NAMES = sorted({*ROLES.values(), *ROLE_SETS, EXPERTS, SHARED_EXPERTS, LINEAR, "router"})
ScaleRule = Literal["absmax", "four-over-six", "sweep"]
Objective = Literal["mse", "mae", "absmax"]


class Rule(BaseModel):
    """One rule as written. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: tuple[str, ...] = ()
    name: str | None = None
    layers: str | None = None
    format: str
    scale_rule: ScaleRule | None = None
    objective: Objective | None = None
    group_size: tuple[StrictInt, ...] | None = Field(default=None, min_length=1)
    symmetric: StrictBool | None = None
    requantize: StrictBool | None = None

    @field_validator("role", "group_size", mode="before")
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
            Pattern(rule.name.removeprefix("re:"))
        except ValueError as error:
            raise UserError(f"not a pattern ({error}).", where=f"{place}.name", remedy="Mend it.") from None
    if rule.layers is not None and not all(map(_LAYERS.fullmatch, rule.layers.split(","))):
        raise UserError(f"{rule.layers!r} names no layers.", where=f"{place}.layers", remedy='Write "0..3, 26, -1".')
    _check_options(rule, place)


def _check_options(rule: Rule, place: str) -> None:
    rules = FORMATS[rule.format].scale_rules if rule.format != KEEP else ()
    if rule.scale_rule is not None and rule.scale_rule not in rules:
        allowed = f"It knows {', '.join(rules)}." if rules else "Remove it."
        raise UserError(f"{rule.format} has no scale rule {rule.scale_rule}.", where=f"{place}.scale_rule", remedy=allowed)
    scale = rule.scale_rule or (rules or ("",))[0]
    if rule.objective is not None and scale != "four-over-six" and (scale, rule.objective) != ("sweep", "mse"):
        raise UserError(
            f"objective {rule.objective} goes with `scale_rule: four-over-six`.",
            where=f"{place}.objective",
            remedy="Remove it: sweep minimises mse, absmax chooses nothing.",
        )
    for key in ("group_size", "symmetric"):
        if getattr(rule, key) is not None and rule.format != "int4":
            raise UserError(f"{rule.format} has no option {key}.", where=f"{place}.{key}", remedy="Remove it.")
    for size in rule.group_size or ():
        if size not in INT4_GROUPS:
            raise UserError(f"group_size {size} is not run by engines.", where=f"{place}.group_size", remedy="Use 32, 64 or 128.")


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
