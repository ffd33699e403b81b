"""The plan of a checkpoint that is quantized already, whoever made it: read as a recipe, compared, and applied.

compressed-tensors, ModelOpt and FP8 of transformers are read (dialects/), from config and headers alone. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, FP8_BLOCK, INT4_GROUPS, KEEP, TensorFormat
from snugfit.model.language_config import nested_language_keys
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.model.names import KEPT_ROLES, TensorName, parse_name
from snugfit.planning.recipe_text import WeightFormat, kind_of, recipe_text
from snugfit.quantization.decide import assignments_of, decide
from snugfit.quantization.written_config import config_to_write
from snugfit.recipes.assignment import ALONG
from snugfit.recipes.recipe import LoadedRecipe, builtin_names, load_recipe, parse_recipe
from snugfit.recipes.resolve import Matcher
from snugfit.records.plan import RECIPE_FILE, PlanDifference, PlanDifferences, layer_runs
from snugfit.storage.staging import staged

_FP8_BLOCKS = (FP8_BLOCK, FP8_BLOCK)
# what helps where a recipe that is in no file yet does not suit a model
_WRITE_FIRST = (
    "Leave MODEL out, so that `output_dir` takes the recipe as it is; correct it there, and quantize with it."
)


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """What a checkpoint stores each linear in: `formats` by the weight's name, None for 16 bits.

    `names` parses those names; `fp8_cache` says whether an FP8 KV cache is declared. `source` is the checkpoint or the
    recipe.
    """

    source: str
    layout: ModelLayout
    formats: Mapping[str, TensorFormat | None]
    names: Mapping[str, TensorName]
    fp8_cache: bool


def read_recipe(checkpoint: str | Path) -> LoadedRecipe:
    """The plan of a quantized checkpoint, a directory or a Hub id, as a recipe for models of its architecture.

    Comments in its text name formats that are not written, with what stands for them. UserError for a checkpoint that
    is not quantized, and for one whose quantization has no reader.
    """
    return recipe_of(read_plan(checkpoint))


def read_plan(checkpoint: str | Path) -> ReadPlan:
    """The formats of a checkpoint's linears; UserError for a quantization without a reader."""
    layout = read_layout(checkpoint)
    if layout.format_error is not None:
        raise layout.format_error
    if not layout.decoder:
        layout.check_quantizable()
    found: dict[str, TensorFormat | None] = {f"{module}.weight": fmt for module, fmt in layout.formats.items()}
    found |= layout.weights.formats
    names: dict[str, TensorName] = {}
    for name in (*layout.names, *found):
        parsed = layout.names.get(name) or parse_name(name, (1, 1), layout.decoder)
        if _is_linear(layout, parsed):
            names[name] = parsed
            found.setdefault(name, None)
    formats = {name: found[name] for name in names}
    return ReadPlan(
        source=layout.checkpoint.name,
        layout=layout,
        formats=formats,
        names=names,
        fp8_cache=layout.dialect.kv_cache_format() is not None,
    )


def recipe_of(plan: ReadPlan) -> LoadedRecipe:
    """A read plan as a recipe; UserError for a checkpoint that is not quantized."""
    if not any(plan.formats.values()):
        what = "not quantized: every linear is in 16 bits."
        remedy = "Give a checkpoint in a format of compressed-tensors, ModelOpt or FP8."
        raise UserError(what, code="recipe-changes-nothing", where=plan.source, remedy=remedy)
    partial = _partial_blocks(plan)
    written = {n: WeightFormat(ALONG) if n in partial else _as_written(fmt) for n, fmt in plan.formats.items()}
    comments = dict.fromkeys(
        f"{fmt.label()} is not written: {written[name].format} stands for it"
        for name, fmt in plan.formats.items()
        if fmt is not None and name not in partial and not _same(fmt, written[name])
    )
    places = dict.fromkeys(_place(plan, name)[0] for name in plan.formats if name in partial)
    if places:
        beside = f"in {', '.join(places)}, which have parts of blocks, or run with weights that do"
        comments[f"fp8-block is not written {beside}: {ALONG} stands for it"] = None
    text = recipe_text(
        written,
        plan.names,
        num_layers=plan.layout.num_layers,
        name="read-plan",
        description=f"The plan of {plan.source}, {plan.layout.num_layers} layers.",
        comments=comments,
        fp8_cache=plan.fp8_cache,
    )
    return parse_recipe(text, where=plan.source)


def apply_recipe(recipe: LoadedRecipe, model: str | Path, *, made_for: ModelLayout | None = None) -> tuple[str, ...]:
    """Check that a recipe suits another model; notes for the person who applies it.

    UserError where rules match nothing in it, all of which it names, and as `quantize` would raise it. `made_for` is
    the model that the recipe was read from.
    """
    layout = read_layout(model)
    layout.check_quantizable()
    matcher = Matcher(recipe.recipe.rules, layout.num_layers, recipe.place_of)
    weights = [name for name in layout.names.values() if name.parameter == "weight"]
    first = {matcher.first(name) for name in weights}
    unmatched = [number for number in range(len(recipe.recipe.rules)) if number not in first]
    if unmatched:
        listed = "; ".join(_rule_words(recipe, number) for number in unmatched)
        what = f"{len(unmatched)} of {len(recipe.recipe.rules)} rules match nothing in this model: {listed}."
        raise UserError(what, code="recipe-rule-unmatched", where=layout.checkpoint.name, remedy=_WRITE_FIRST)
    try:
        config_to_write(layout, recipe, decide(layout, recipe))  # raises what `quantize` would
    except UserError as error:
        raise _at_the_model(error, recipe, layout) from None
    notes = []
    if made_for is not None:
        kinds = [sorted(_model_types(one)) for one in (made_for, layout)]
        if kinds[0] != kinds[1]:
            notes.append(f"another architecture: {', '.join(kinds[0])} there, {', '.join(kinds[1])} here")
        if made_for.num_layers != layout.num_layers and any(rule.layers for rule in recipe.recipe.rules):
            notes.append(
                f"{made_for.num_layers} layers there, {layout.num_layers} here: numbers of layers name other layers"
            )
    return tuple(notes)


def diff_plans(a: str | Path, b: str | Path) -> PlanDifferences:
    """Where the plans of two checkpoints differ, or of a checkpoint and a recipe (a built-in name or a file).

    UserError where both are recipes, for a checkpoint without a reader, and for two models without a common linear.
    """
    recipes = [_is_recipe(one) for one in (a, b)]
    if all(recipes):
        what = "both are recipes, whose formats depend on a model."
        raise UserError(what, code="option-invalid", where="diff", remedy="Give a checkpoint as one of them.")
    model = read_plan(b if recipes[0] else a)
    first = _resolved(a, model) if recipes[0] else model
    second = _resolved(b, model) if recipes[1] else model if recipes[0] else read_plan(b)
    shared = [name for name in first.formats if name in second.formats]
    if not shared:
        what = "the two have no linear of the same name."
        raise UserError(what, code="models-mismatch", where="diff", remedy="Give two models of one architecture.")
    alone = tuple(
        tuple(dict.fromkeys(_place(x, name)[0] for name in x.formats if name not in y.formats))
        for x, y in ((first, second), (second, first))
    )
    return PlanDifferences(
        a=first.source,
        b=second.source,
        weights=len(shared),
        different=sum(_label(first, name) != _label(second, name) for name in shared),
        rows=_rows(first, second, shared),
        kv_cache=tuple("fp8" if one.fp8_cache else KEEP for one in (first, second)),
        only_a=alone[0],
        only_b=alone[1],
    )


def _is_linear(layout: ModelLayout, name: TensorName) -> bool:
    """Whether a plan decides about this weight."""
    if name.parameter != "weight":
        return False
    if name.layer is None:
        return name.role == "lm_head" and name.full not in layout.tied.copies
    return name.layer < layout.num_layers and name.role not in KEPT_ROLES and name.full not in layout.unquantized


def _as_written(fmt: TensorFormat | None) -> WeightFormat:
    """The format that recipes have for what a file stores, or the nearest."""
    if fmt is None:
        return WeightFormat(KEEP)
    if fmt.name == "int4":
        size = fmt.group_size if fmt.group_size in INT4_GROUPS else INT4_GROUPS[0]
        return WeightFormat("int4", group_size=size, symmetric=fmt.symmetric)
    if fmt.name == "nvfp4" and fmt.input_kind == "none":
        return WeightFormat("nvfp4a16")
    if fmt.name == "fp8" and fmt.block == _FP8_BLOCKS:
        return WeightFormat("fp8-block")
    return WeightFormat(fmt.name if fmt.name in FORMATS else "fp8-dynamic")


def _partial_blocks(plan: ReadPlan) -> frozenset[str]:
    """Weights in FP8 blocks of which the last ones are cut off, which no recipe writes, and those that run with them.

    A source that has such blocks keeps them under `fp8-dynamic`, too.
    """
    blocks = {
        name
        for name, fmt in plan.formats.items()
        if fmt is not None and fmt.name.startswith("fp8") and fmt.weight_block == _FP8_BLOCKS
    }
    groups: dict[object, list[str]] = {}
    for members in group_modules(name.removesuffix(".weight") for name in blocks):
        for name in members:
            parsed = plan.names[f"{name}.weight"]
            groups.setdefault(parsed.layer if parsed.routed else members, []).append(f"{name}.weight")
    shapes = {name: plan.layout.weights.tensors[name].shape for name in blocks}
    cut = {name for name, shape in shapes.items() if any(size % FP8_BLOCK for size in shape)}
    return frozenset(name for members in groups.values() if not cut.isdisjoint(members) for name in members)


def _at_the_model(error: UserError, recipe: LoadedRecipe, layout: ModelLayout) -> UserError:
    """An error of a recipe that was read and is in no file: it names the rule and the model's weight, not a line."""
    if error.code == "already-quantized":
        return UserError(error.what, code=error.code, where=error.where, remedy=f"{error.remedy} {_WRITE_FIRST}")
    if not error.where.startswith(recipe.where):
        return error
    found = re.match(r"(?::\d+: rules\[(\d+)\])?(.*)", error.where.removeprefix(recipe.where), re.DOTALL)
    assert found is not None
    rule = f"{_rule_words(recipe, int(found[1]))}: " if found[1] else ""
    where, remedy = f"{layout.checkpoint.name}{found[2]}", f"{error.remedy} {_WRITE_FIRST}".strip()
    return UserError(f"{rule}{error.what}", code=error.code, where=where, remedy=remedy)


def _same(fmt: TensorFormat, written: WeightFormat) -> bool:
    """Whether a run would write what the file stores."""
    if fmt.name == "int4":
        return fmt.input_kind == "none" and fmt.group_size == written.group_size
    if (fmt.name, written.format) == ("fp8", "fp8-block"):
        return fmt.input_kind == "fp8-group"
    plain = TensorFormat(written.format)
    return fmt.name in ("nvfp4", *FORMATS) and fmt.input_kind == plain.input_kind and fmt.block is None


def _rule_words(recipe: LoadedRecipe, number: int) -> str:
    rule = recipe.recipe.rules[number]
    given = {"role": ", ".join(rule.role), "name": rule.name, "layers": rule.layers, "format": rule.format}
    return f"rules[{number}] ({', '.join(f'{key}: {value}' for key, value in given.items() if value)})"


def _model_types(layout: ModelLayout) -> set[str]:
    config = layout.checkpoint.config
    nested = (config[key] for key in nested_language_keys(config))
    return {str(one.get("model_type")) for one in (config, *nested) if isinstance(one, dict)}


def _is_recipe(given: str | Path) -> bool:
    return str(given) in builtin_names() or Path(given).is_file()


def _resolved(recipe: str | Path, model: ReadPlan) -> ReadPlan:
    """What a recipe gives the linears of a model, whatever they are stored in."""
    loaded = load_recipe(recipe)
    found = assignments_of(model.layout, loaded)
    formats = {name: found[name].format if name in found else None for name in model.names}
    return replace(model, source=str(recipe), formats=formats, fp8_cache=loaded.recipe.kv_cache is not None)


def _label(plan: ReadPlan, name: str) -> str:
    fmt = plan.formats[name]
    return KEEP if fmt is None else fmt.label()


def _place(plan: ReadPlan, name: str) -> tuple[str, int | None]:
    parsed = plan.names[name]
    return (parsed.module if parsed.layer is None else kind_of(parsed)), parsed.layer


def _rows(first: ReadPlan, second: ReadPlan, shared: list[str]) -> tuple[PlanDifference, ...]:
    """One row for each place in the layers and each pair of formats."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for name in shared:
        labels = _label(first, name), _label(second, name)
        if labels[0] == labels[1]:
            continue
        kind, layer = _place(first, name)
        layers.setdefault((kind, *labels), []).extend([] if layer is None else [layer])
        counts[kind, *labels] = counts.get((kind, *labels), 0) + 1
    return tuple(
        PlanDifference(place=kind, layers=layer_runs(layers[kind, a, b]), a=a, b=b, weights=counts[kind, a, b])
        for kind, a, b in layers
    )


def write_recipe(recipe: LoadedRecipe, output_dir: Path) -> Path:
    """Write a recipe as recipe.yaml into a new directory, whole or not at all; the file's path."""
    with staged(output_dir) as directory:
        (directory / RECIPE_FILE).write_text(recipe.text, encoding="utf-8")
    return output_dir / RECIPE_FILE
