"""What a user demands of a plan, as YAML in the vocabulary of recipes.

    max_formats: 2            # other than keep
    run_length: 4             # layers that have one format at each place, counted from the first layer
    kv_cache: keep            # or fp8; without the key a plan may choose
    rules:
      - role: attention
        layers: "0..3"
        format: [fp8-dynamic, keep]   # one of these
      - role: down
        not: mxfp4                    # none of these

`role`, `name` and `layers` select weights as in a recipe. Unlike there, every rule counts for every weight that it
matches. A rule that matches one weight of a fused group counts for the whole group, which has one format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from snugfit.errors import UserError
from snugfit.formats.spec import KEEP
from snugfit.model.names import TensorName
from snugfit.planning.menu import GroupMenu
from snugfit.recipes.recipe import Selector, explain, format_problems, invalid_recipe, one_or_many, selector_problems
from snugfit.recipes.resolve import Matcher
from snugfit.strict_yaml import YamlDocument, load_yaml, read_yaml_text

_EXAMPLE = "docs/planning.md has an example."


class ConstraintRule(Selector):
    """One rule as written: the formats that its weights may have, or may not have. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    format: tuple[str, ...] = ()
    without: tuple[str, ...] = Field(default=(), alias="not")

    @field_validator("format", "without", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)


class Constraints(BaseModel):
    """Everything that a user demands, as written. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_formats: StrictInt | None = Field(default=None, ge=1)
    run_length: StrictInt | None = Field(default=None, ge=1)
    kv_cache: Literal["keep", "fp8"] | None = None
    rules: tuple[ConstraintRule, ...] = ()


@dataclass(frozen=True)
class LoadedConstraints:
    """Constraints, the name of their file, and the line of each rule."""

    constraints: Constraints = field(default_factory=Constraints)
    where: str = ""
    rule_lines: tuple[int, ...] = ()

    def place_of(self, rule: int) -> str:
        """The place of a rule for errors, such as mine.yaml:4: rules[0]."""
        return f"{self.where}:{self.rule_lines[rule]}: rules[{rule}]"


def load_constraints(path: str | Path) -> LoadedConstraints:
    """Constraints from a YAML file; UserError, with the line and the key, for a file that is anything else."""
    file = Path(path)
    if not file.is_file():
        raise UserError("no such file.", code="file-missing", where=str(path), remedy=_EXAMPLE)
    document = load_yaml(read_yaml_text(file), where=str(path))
    if not isinstance(document.value, dict):
        what = f"constraints must be a mapping with {', '.join(f'`{key}`' for key in Constraints.model_fields)}."
        raise UserError(what, code="recipe-invalid", where=str(path), remedy=_EXAMPLE)
    try:
        found = Constraints.model_validate(document.value)
    except ValidationError as error:
        rule_keys = [one.alias or name for name, one in ConstraintRule.model_fields.items()]
        raise explain(error, document, Constraints.model_fields, rule_keys, _EXAMPLE) from None
    for number, rule in enumerate(found.rules):
        _check(rule, number, document)
    lines = tuple(document.line_of("rules", number) for number in range(len(found.rules)))
    return LoadedConstraints(found, str(path), lines)


def constrained(
    menus: Sequence[GroupMenu], loaded: LoadedConstraints, names: Mapping[str, TensorName], num_layers: int
) -> tuple[GroupMenu, ...]:
    """The options that the rules leave to each group.

    UserError for a rule that matches no weight which a plan decides, and for a group without any option.
    """
    rules = loaded.constraints.rules
    matcher = Matcher(rules, num_layers, loaded.place_of)
    found, used = [], set()
    for menu in menus:
        options, refused = menu.options, dict(menu.refused)
        for number, rule in enumerate(rules):
            if not any(matcher.matches(number, names[name]) for name in menu.group.weights):
                continue
            used.add(number)
            gone = [one for one in options if not _allows(rule, one.format)]
            refused |= dict.fromkeys((one.format for one in gone), f"{loaded.place_of(number)} excludes it")
            options = tuple(one for one in options if one not in gone)
            if not options:
                raise _no_option(menu, loaded.place_of(number))
        found.append(replace(menu, options=options, refused=refused))
    unused = next((number for number in range(len(rules)) if number not in used), None)
    if unused is not None:
        what = "this rule matches no weight that a plan decides."
        remedy = "Remove it. Norms, routers and embeddings stay in 16 bits."
        raise UserError(what, code="recipe-rule-unmatched", where=loaded.place_of(unused), remedy=remedy)
    return tuple(found)


def _allows(rule: ConstraintRule, fmt: str) -> bool:
    return (not rule.format or fmt in rule.format) and fmt not in rule.without


def _no_option(menu: GroupMenu, place: str) -> UserError:
    offered = ", ".join(one.format for one in menu.options)
    refused = "; ".join(f"{fmt}: {reason}" for fmt, reason in menu.refused.items())
    what = f"leaves no format to {menu.group.name}, which could have {offered}{f' ({refused})' if refused else ''}."
    return UserError(what, code="plan-impossible", where=place, remedy="Allow one of them, or add to `menu`.")


def _check(rule: ConstraintRule, number: int, document: YamlDocument) -> None:
    """UserError for the first thing that is wrong with a rule by itself."""
    problems = [
        *selector_problems(rule),
        *format_problems("format", rule.format),
        *format_problems("not", rule.without),
    ]
    if not rule.format and not rule.without:
        remedy = f"`format: {KEEP}` keeps what it matches."
        problems.append(invalid_recipe("a rule needs `format` or `not`.", "", remedy))
    for problem in problems:
        raise problem.at(document.place_of("rules", number, *((problem.where,) if problem.where else ())))
