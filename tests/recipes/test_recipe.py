"""Recipes: what they may say, what they give every weight of a model, and how they are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers.errors import raises
from snugfit.errors import UserError
from snugfit.formats.spec import EFFORT, FORMATS, PLAIN_RULES, TensorFormat
from snugfit.model.names import parse_name
from snugfit.quantization.quantize import quantize
from snugfit.recipes.assignment import Assignment
from snugfit.recipes.recipe import LoadedRecipe, builtin_names, list_recipes, load_recipe, parse_recipe
from snugfit.recipes.resolve import layer_numbers, resolve
from snugfit.records.quantize import RECIPE_FILE
from snugfit.storage.open import open_checkpoint
from snugfit.storage.safetensors_header import TensorInfo

MakeTiny = Callable[..., Path]
WHERE = "mine.yaml"
LAYERS = 3

FOS, ABSMAX = "four-over-six", "absmax"
FP8 = ("fp8-dynamic", ABSMAX)
FP8_ALONG = "fp8-dynamic", EFFORT  # beside rules that follow the effort
NV, NV_FOS, NV_PLAIN = ("nvfp4", EFFORT), ("nvfp4", FOS), ("nvfp4", ABSMAX)
# 64 is the largest group that divides the tiny model's 64 and 128 in_features
INT4, INT4_PLAIN = ("int4-g64", EFFORT), ("int4-g64", ABSMAX)
ROLES_OF = {"attention": {"q", "k", "v", "o"}, "gate_up": {"gate", "up"}, "down": {"down"}}

# built-in recipe -> (label, scale rule) of attention, of gate and up, of down
BUILT_IN = {
    "fp8-block": (("fp8-block", ABSMAX),) * 3,
    "fp8-dynamic": (FP8, FP8, FP8),
    "fp8-dynamic-fp8kv": (FP8, FP8, FP8),
    "fp8-int4": (FP8_ALONG, INT4, INT4),
    "fp8-int4-absmax": (FP8, INT4_PLAIN, INT4_PLAIN),
    "fp8-int4-awq": (FP8_ALONG, INT4, INT4),
    "int4-w4a16": (INT4, INT4, INT4),
    "int4-w4a16-absmax": (INT4_PLAIN, INT4_PLAIN, INT4_PLAIN),
    "mxfp4": (("mxfp4", EFFORT),) * 3,
    "mxfp4-absmax": (("mxfp4", ABSMAX),) * 3,
    "nvfp4": (NV, NV, NV),
    "nvfp4-absmax": (NV_PLAIN, NV_PLAIN, NV_PLAIN),
    "nvfp4-four-over-six": (NV_FOS, NV_FOS, NV_FOS),
    "nvfp4-fp8-attention": (FP8_ALONG, NV, NV),
    "nvfp4-fp8-attention-absmax": (FP8, NV_PLAIN, NV_PLAIN),
    "nvfp4-fp8-attention-four-over-six": (FP8, NV_FOS, NV_FOS),
    "nvfp4-fp8-down": (NV, NV, FP8_ALONG),
    "nvfp4-fp8-down-absmax": (NV_PLAIN, NV_PLAIN, FP8),
    "nvfp4-fp8-down-four-over-six": (NV_FOS, NV_FOS, FP8),
    "nvfp4-fp8-hybrid": (FP8_ALONG, NV, NV),
    "nvfp4-fp8-hybrid-absmax": (FP8, NV_PLAIN, NV_PLAIN),
    "nvfp4-fp8-hybrid-four-over-six": (FP8, NV_FOS, NV_FOS),
    "nvfp4-fp8-hybrid-fp8kv": (FP8_ALONG, NV, NV),
    "nvfp4-fp8-hybrid-fp8kv-four-over-six": (FP8, NV_FOS, NV_FOS),
    "nvfp4a16": (("nvfp4a16", EFFORT),) * 3,
    "nvfp4a16-four-over-six": (("nvfp4a16", FOS),) * 3,
}


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A tiny llama with three layers."""
    return make_tiny("llama")


@pytest.fixture(scope="module")
def tensors(llama: Path) -> list[TensorInfo]:
    """Its tensors' headers."""
    return list(open_checkpoint(llama).tensors.values())


def recipe_of(*rules: str) -> LoadedRecipe:
    """A recipe of rules in YAML's flow style, e.g. "role: mlp, format: keep"."""
    return parse_recipe("name: mine\nrules:\n" + "".join(f"  - {{{rule}}}\n" for rule in rules), where=WHERE)


def settle(rules: Sequence[str], tensors: Sequence[TensorInfo]) -> dict[str, Assignment]:
    return resolve(recipe_of(*rules), tensors, num_layers=LAYERS)


def rule_by_place(rules: Sequence[str], tensors: Sequence[TensorInfo]) -> dict[tuple[int | None, str], int]:
    """(layer, role) -> number of the rule that took it."""
    names = {t.name: parse_name(t.name, t.shape) for t in tensors}
    return {(names[n].layer, names[n].role): a.rule for n, a in settle(rules, tensors).items()}


def refusal(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, where=WHERE)
    return caught.value


def refusal_for(rules: Sequence[str], tensors: Sequence[TensorInfo]) -> UserError:
    with pytest.raises(UserError) as caught:
        settle(rules, tensors)
    return caught.value


# --- built in


# built-in recipe for mixtures -> (label, scale rule) of routed experts; all else is FP8
FOR_MIXTURES = {
    "nvfp4-moe": NV,
    "nvfp4-moe-four-over-six": NV_FOS,
    "fp8-int4-moe": INT4,
    "fp8-int4-moe-absmax": INT4_PLAIN,
}


def test_built_in_recipes_are_the_promised_ones() -> None:
    """The package has exactly the recipes that are listed above, each under its own name."""
    assert builtin_names() == sorted({*BUILT_IN, *FOR_MIXTURES})
    assert [loaded.recipe.name for loaded in list_recipes()] == builtin_names()


@pytest.mark.parametrize("name", sorted(FOR_MIXTURES))
def test_built_in_recipe_for_mixtures(name: str, tensors: list[TensorInfo]) -> None:
    """Routed experts get the format that the recipe is called by; attention, shared experts, dense layers get FP8."""
    prefix = "model.layers.2.mlp"
    names = [f"{prefix}.experts.{e}.{leaf}.weight" for e in range(4) for leaf in ("gate_proj", "up_proj", "down_proj")]
    shared = [f"{prefix}.shared_experts.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")]
    dense = [tensor for tensor in tensors if not tensor.name.startswith(prefix)]
    mixture = [TensorInfo(tensor, "BF16", (64, 64)) for tensor in (*names, *shared, f"{prefix}.gate.weight")]
    found = resolve(load_recipe(name), [*dense, *mixture], num_layers=LAYERS)
    got = {n: (a.format.label() if a.format else "", a.scale_rule) for n, a in found.items()}
    linears = {t.name for t in dense if parse_name(t.name, t.shape).role in set().union(*ROLES_OF.values())}
    assert got == dict.fromkeys(names, FOR_MIXTURES[name]) | dict.fromkeys({*linears, *shared}, FP8)


def of_mixture(*leaves: str, width: int = 64) -> list[TensorInfo]:
    """Weights of one layer's modules `leaves`, three projections each, and of what every layer has."""
    names = [f"{leaf}.{role}_proj" for leaf in leaves for role in ("gate", "up", "down")]
    attention = [f"self_attn.{role}_proj" for role in "qkvo"]
    return [TensorInfo(f"model.layers.0.{name}.weight", "BF16", (width, width)) for name in (*attention, *names)]


@pytest.mark.parametrize("shared", ["mlp.shared_expert", "mlp.shared_experts", "shared_mlp", None])
def test_fp8_int4_awq_on_mixtures(shared: str | None) -> None:
    """Routed experts and dense layers get INT4, experts that every token passes FP8, routers and all else nothing."""
    leaves = ["mlp.experts.0", "mlp.experts.10", *([shared] if shared else [])]
    dense = [TensorInfo(t.name.replace(".0.", ".1.", 1), t.dtype, t.shape) for t in of_mixture("mlp")]
    fixed = [
        TensorInfo("model.layers.0.mlp.gate.weight", "BF16", (2, 64)),
        TensorInfo("model.layers.0.mlp.shared_expert_gate.weight", "BF16", (1, 64)),
        TensorInfo("model.layers.0.input_layernorm.weight", "BF16", (64,)),
        TensorInfo("model.embed_tokens.weight", "BF16", (8, 64)),
        TensorInfo("lm_head.weight", "BF16", (8, 64)),
    ]
    found = resolve(load_recipe("fp8-int4-awq"), [*of_mixture(*leaves), *dense, *fixed], num_layers=2)
    got = {name: (a.format.label() if a.format else "", a.scale_rule) for name, a in found.items()}
    mlp = {t.name for t in (*of_mixture(*leaves), *dense) if "attn" not in t.name and not (shared and shared in t.name)}
    others = {t.name for t in (*of_mixture(*leaves), *dense)} - mlp
    assert got == dict.fromkeys(mlp, INT4) | dict.fromkeys(others, FP8_ALONG)
    assert all(a.format is None or a.format.name != "int4" or a.format.symmetric for a in found.values())


def test_fp8_follows_the_effort_beside_others_alone(tensors: list[TensorInfo]) -> None:
    """FP8 rules follow it where a rule for other weights does; a named scale rule stays, and so does FP8 by itself."""

    def rules_of(attention: str, mlp: str) -> dict[str, str]:
        found = settle([f"role: attention, {attention}", f"role: mlp, {mlp}"], tensors)
        return {a.format.name: a.scale_rule for a in found.values() if a.format is not None}

    fp8, exact = "format: fp8-dynamic", "format: fp8-dynamic, scale_rule: absmax"
    assert rules_of(fp8, "format: nvfp4") == {"fp8-dynamic": EFFORT, "nvfp4": EFFORT}
    assert rules_of(exact, "format: nvfp4") == {"fp8-dynamic": ABSMAX, "nvfp4": EFFORT}
    assert rules_of(fp8, "format: nvfp4, scale_rule: absmax") == {"fp8-dynamic": ABSMAX, "nvfp4": ABSMAX}
    assert rules_of(fp8, "format: keep") == rules_of(fp8, fp8) == {"fp8-dynamic": ABSMAX}


def test_fp8_that_does_not_follow_the_effort(tensors: list[TensorInfo]) -> None:
    """Heads, routed experts, and what is fused with a weight of a named scale rule have plain scales in any case."""
    routed = of_mixture("mlp.experts.0", "mlp.experts.1")
    head = TensorInfo("lm_head.weight", "BF16", (8, 64))
    dense = [t for t in tensors if t.name != "lm_head.weight"]
    rules = [
        "role: q, format: fp8-dynamic, scale_rule: absmax",
        "role: [k, v, o, lm_head, experts], format: fp8-dynamic",
        "role: mlp, format: nvfp4",
    ]
    third = [t for t in _third(routed) if "mlp" in t.name]
    found = settle(rules, [*(t for t in dense if ".layers.2.mlp" not in t.name), *third, head])
    roles = {name.split(".")[-2]: a.scale_rule for name, a in found.items() if ".experts." not in name and a.format}
    assert {role: rule for role, rule in roles.items() if role not in ("gate_proj", "up_proj", "down_proj")} == {
        "q_proj": ABSMAX,
        "k_proj": ABSMAX,
        "v_proj": ABSMAX,
        "o_proj": EFFORT,
        "lm_head": ABSMAX,
    }
    assert {a.scale_rule for name, a in found.items() if ".experts." in name} == {ABSMAX}


UPGRADED = """
  - role: down
    layers: "0, -1"
    format: fp8-dynamic
"""


def test_fp8_int4_awq_with_upgraded_layers(tensors: list[TensorInfo]) -> None:
    """The documented rule before those of fp8-int4-awq gives chosen layers' down FP8, and changes nothing else."""
    base = load_recipe("fp8-int4-awq")
    upgraded = parse_recipe(base.text.replace("rules:", f"rules:{UPGRADED}"), where=WHERE)
    before, after = (resolve(recipe, tensors, num_layers=LAYERS) for recipe in (base, upgraded))
    label = {name: (a.format.label() if a.format else "") for name, a in after.items()}
    changed = {name for name in after if after[name].format != before[name].format}
    assert changed == {f"model.layers.{number}.mlp.down_proj.weight" for number in (0, LAYERS - 1)}
    assert {label[name] for name in changed} == {"fp8-dynamic"}


def test_routed_experts_are_upgraded_as_a_whole_layer_alone() -> None:
    """Of a mixture's layer, down of all experts cannot have another format than gate and up; all of them can."""
    base = load_recipe("fp8-int4-awq")
    tensors = of_mixture("mlp.experts.0", "mlp.experts.1")
    tensors += [TensorInfo(t.name.replace(".0.", ".1.", 1), t.dtype, t.shape) for t in tensors]
    split = parse_recipe(base.text.replace("rules:", f"rules:{UPGRADED}"), where=WHERE)
    with raises("recipe-splits-group", where=WHERE):
        resolve(split, tensors, num_layers=2)
    whole = parse_recipe(base.text.replace("rules:", f"rules:{UPGRADED.replace('down', 'experts')}"), where=WHERE)
    found = resolve(whole, [*tensors, *_third(tensors)], num_layers=3)
    experts = {name: a.format.name for name, a in found.items() if ".experts." in name and a.format is not None}
    assert {fmt for name, fmt in experts.items() if ".layers.1." in name} == {"int4"}
    assert {fmt for name, fmt in experts.items() if ".layers.1." not in name} == {"fp8-dynamic"}


def _third(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The same tensors of a layer behind."""
    first = [t for t in tensors if ".layers.0." in t.name]
    return [TensorInfo(t.name.replace(".layers.0.", ".layers.2."), t.dtype, t.shape) for t in first]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_recipe_gives_every_role_its_format(name: str, tensors: list[TensorInfo], make_tiny: MakeTiny) -> None:
    """A built-in recipe gives each decoder linear the intended format and scale rule, and touches nothing else."""
    loaded = load_recipe(name)
    if name == "fp8-block":  # sides of 128 and more
        source = make_tiny("llama", hidden_size=256, intermediate_size=384)
        tensors = list(open_checkpoint(source).tensors.values())
    found = resolve(loaded, tensors, num_layers=LAYERS)
    wanted = dict(zip(ROLES_OF, BUILT_IN[name], strict=True))
    roles = {role: wanted[group] for group, members in ROLES_OF.items() for role in members}
    got = {
        parse_name(n, (1, 1)).full: (a.format.label() if a.format else "", a.scale_rule, a.objective)
        for n, a in found.items()
    }
    named = {t.name: parse_name(t.name, t.shape).role for t in tensors}
    assert got == {n: (*roles[role], "mse") for n, role in named.items() if role in roles}
    assert len(got) == 7 * LAYERS
    assert loaded.recipe.name == name
    assert loaded.recipe.description
    assert loaded.recipe.kv_cache == ("fp8" if "-fp8kv" in name else None)


def test_built_in_int4_takes_the_largest_group_that_divides_all(make_tiny: MakeTiny) -> None:
    """The INT4 recipe settles on 128 where every weight's columns allow it."""
    source = make_tiny("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    found = resolve(load_recipe("int4-w4a16"), list(open_checkpoint(source).tensors.values()), num_layers=1)
    assert {a.format for a in found.values()} == {TensorFormat("int4", group_size=128)}


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_rule_without_a_scale_rule_follows_the_effort(fmt: str, make_tiny: MakeTiny) -> None:
    """4-bit formats leave the choice to the effort of the run, FP8 has one way; a named rule is kept as it is."""
    source = make_tiny("llama", hidden_size=256, intermediate_size=384)
    infos = list(open_checkpoint(source).tensors.values())
    free = settle([f"role: linear, format: {fmt}"], infos).values()
    assert {(a.scale_rule, a.objective) for a in free} == {(EFFORT if fmt in PLAIN_RULES else ABSMAX, "mse")}
    assert {a.follows_effort for a in free} == {not fmt.startswith("fp8")}
    named = settle([f"role: linear, format: {fmt}, scale_rule: {ABSMAX}"], infos).values()
    assert {(a.scale_rule, a.objective, a.follows_effort) for a in named} == {(ABSMAX, "mse", False)}


def test_blocks_are_strict_about_shapes(tensors: list[TensorInfo]) -> None:
    """fp8-block on a weight with a side that 128 does not divide names the weight, its shape and another format."""
    with raises("recipe-shape", "rules[0]: model.layers.0") as caught:
        resolve(load_recipe("fp8-block"), tensors, num_layers=LAYERS)
    assert caught.value.where.startswith("recipe fp8-block:")
    assert "divisible by 128" in caught.value.what
    assert "`format: fp8-dynamic` or `format: keep`" in caught.value.remedy


@pytest.mark.parametrize("fmt", ["fp8-block", "mxfp4"])
def test_fused_groups_are_not_split_by_new_formats(fmt: str, make_tiny: MakeTiny) -> None:
    """Query in one format and key in another is refused, whichever formats they are."""
    source = make_tiny("llama", hidden_size=256, intermediate_size=384)
    infos = list(open_checkpoint(source).tensors.values())
    error = refusal_for([f"role: q, format: {fmt}", "role: linear, format: fp8-dynamic"], infos)
    assert (error.code, error.where) == ("recipe-splits-group", WHERE)


def test_mxfp4_chooses_exponents_by_a_rule(tensors: list[TensorInfo]) -> None:
    """Either rule may be asked for, a rule of another format is refused."""
    for rule in ("absmax", "sweep"):
        found = settle([f"role: linear, format: mxfp4, scale_rule: {rule}"], tensors)
        assert {a.scale_rule for a in found.values()} == {rule}
    error = refusal("name: a\nrules: [{role: linear, format: mxfp4, scale_rule: four-over-six}]")
    assert (error.code, error.where) == ("recipe-invalid", f"{WHERE}:2: rules[0].scale_rule")
    assert "absmax, sweep" in error.remedy


# --- the KV cache


@pytest.mark.parametrize(("written", "expected"), [("fp8", "fp8"), ("keep", None), ("null", None)])
def test_a_recipe_may_ask_for_an_fp8_cache(written: str, expected: str | None) -> None:
    """`kv_cache` is fp8 or keep, by default keep."""
    text = f"name: mine\nkv_cache: {written}\nrules: [{{role: linear, format: fp8-dynamic}}]"
    assert parse_recipe(text, where=WHERE).recipe.kv_cache == expected
    assert recipe_of("role: linear, format: fp8-dynamic").recipe.kv_cache is None


@pytest.mark.parametrize("written", ["int8", "FP8", "true", "[fp8]", "8", "''"])
def test_other_caches_are_refused(written: str) -> None:
    """Anything else for `kv_cache` is an error that names the key and what is known."""
    error = refusal(f"name: mine\nkv_cache: {written}\nrules: [{{role: linear, format: fp8-dynamic}}]")
    assert (error.code, error.where) == ("recipe-invalid", f"{WHERE}:2: kv_cache")
    assert "fp8, keep" in error.remedy


# --- which rule takes which tensor


def test_first_rule_that_matches_decides(tensors: list[TensorInfo]) -> None:
    """A tensor that two rules match goes by the earlier one, whatever the later says."""
    got = rule_by_place(["role: mlp, format: nvfp4", "role: linear, format: fp8-dynamic"], tensors)
    assert {role: got[0, role] for role in ("gate", "up", "down", "q", "o")} == {
        "gate": 0,
        "up": 0,
        "down": 0,
        "q": 1,
        "o": 1,
    }


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0", {0}),
        ("0..2", {0, 1, 2}),
        ("-1", {3}),
        ("-2..-1", {2, 3}),
        ("1..-2", {1, 2}),
        ("0, 2..3", {0, 2, 3}),
        (" 0 , -1 ", {0, 3}),
        ("0..3, 1, -1", {0, 1, 2, 3}),
        ("3..1", set()),
    ],
)
def test_layers_count_from_both_ends(text: str, numbers: set[int]) -> None:
    """`layers` names single numbers and closed ranges; negative ones count from the end."""
    assert layer_numbers(text, 4) == numbers


def test_layers_beyond_the_model_cost_nothing() -> None:
    """A range that runs past the last layer names the model's layers and no others, however far it runs."""
    assert layer_numbers("1..1000000", 3) == {1, 2}


@pytest.mark.parametrize(("written", "numbers"), [("1", {1}), ("-1", {2}), ("[0, -1]", {0, 2}), ("0..1", {0, 1})])
def test_layers_narrow_a_rule(written: str, numbers: set[int], tensors: list[TensorInfo]) -> None:
    """`layers`, as a number, a text or a list, limits a rule to these layers; the others fall to the next rule."""
    got = rule_by_place(
        [f"role: linear, layers: {written}, format: keep", "role: linear, format: fp8-dynamic"], tensors
    )
    assert {layer for (layer, _), rule in got.items() if rule == 0} == numbers
    assert len(got) == 7 * LAYERS


def test_a_rule_may_name_layers_only(tensors: list[TensorInfo]) -> None:
    """A rule with `layers` alone takes every linear of these layers and neither norms nor embeddings."""
    got = rule_by_place(["layers: 0..-1, format: fp8-dynamic"], tensors)
    assert got == {(k, role): 0 for k in range(LAYERS) for role in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("'*.layers.1.mlp.*'", {(1, "gate"), (1, "up"), (1, "down")}),
        ("model.layers.2.mlp.down_proj", {(2, "down")}),
        ("'*.o_proj'", {(0, "o"), (1, "o"), (2, "o")}),
        (r"'re:model\.layers\.[02]\.mlp\.down_proj'", {(0, "down"), (2, "down")}),
        ("'re:.*down.*'", {(0, "down"), (1, "down"), (2, "down")}),
    ],
)
def test_names_are_globs_or_patterns(pattern: str, places: set[tuple[int, str]], tensors: list[TensorInfo]) -> None:
    """`name` is a glob on the module's name or, behind `re:`, a pattern that must match all of it."""
    got = rule_by_place([f"name: {pattern}, format: keep", "role: linear, format: fp8-dynamic"], tensors)
    assert {place for place, rule in got.items() if rule == 0} == places


@pytest.mark.parametrize("pattern", ["'re:down_proj'", "down_proj", "'re:model'", "'*.weight'"])
def test_a_part_of_a_name_matches_nothing(pattern: str, tensors: list[TensorInfo]) -> None:
    """A pattern that only fits a part of the module's name, or names the parameter, is a rule that matches nothing."""
    error = refusal_for([f"name: {pattern}, format: keep", "role: linear, format: fp8-dynamic"], tensors)
    assert (error.code, error.where) == ("recipe-rule-unmatched", f"{WHERE}:3: rules[0]")


@pytest.mark.parametrize(
    ("roles", "taken"),
    [
        ("down", {"down"}),
        ("[o, down]", {"o", "down"}),
        ("attention", {"q", "k", "v", "o"}),
        ("mlp", {"gate", "up", "down"}),
        ("[attention, down]", {"q", "k", "v", "o", "down"}),
        ("linear", {"q", "k", "v", "o", "gate", "up", "down"}),
    ],
)
def test_roles_are_one_or_a_list_or_a_set(roles: str, taken: set[str], tensors: list[TensorInfo]) -> None:
    """`role` is one role, a list, or the name of a set; `linear` is all that a decoder layer multiplies by."""
    rest = [] if roles == "linear" else ["role: linear, format: keep"]
    got = rule_by_place([f"role: {roles}, format: fp8-dynamic", *rest], tensors)
    assert {role for (_, role), rule in got.items() if rule == 0} == taken


def test_all_conditions_of_a_rule_hold_together(tensors: list[TensorInfo]) -> None:
    """Role, name and layers of one rule are joined by `and`."""
    got = rule_by_place(
        ["role: [o, down], name: '*.mlp.*', layers: '1, 2', format: keep", "role: linear, format: fp8-dynamic"], tensors
    )
    assert {place for place, rule in got.items() if rule == 0} == {(1, "down"), (2, "down")}


def test_keep_leaves_a_tensor_as_it_is(tensors: list[TensorInfo]) -> None:
    """`format: keep` assigns no format, and counts as a rule for the tensor."""
    found = settle(["role: down, format: keep", "role: linear, format: fp8-dynamic"], tensors)
    assert found["model.layers.1.mlp.down_proj.weight"].format is None
    assert found["model.layers.1.mlp.up_proj.weight"].format == TensorFormat("fp8-dynamic")


def with_routers(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    extra = [
        TensorInfo("model.layers.0.mlp.router.weight", "BF16", (8, 64)),
        TensorInfo("model.layers.1.mlp.gate.weight", "BF16", (8, 64)),
        TensorInfo("model.layers.0.self_attn.q_norm.weight", "BF16", (16,)),
    ]
    return [*tensors, *extra]


@pytest.mark.parametrize(
    "rule",
    ["name: '*', format: fp8-dynamic", "name: 're:.*', format: fp8-dynamic", "role: linear, format: fp8-dynamic"],
)
def test_broad_rules_leave_head_embeddings_norms_and_routers(rule: str, tensors: list[TensorInfo]) -> None:
    """The widest pattern takes the decoder's linears only."""
    every = with_routers(tensors)
    found = settle([rule], every)
    assert len(found) == 7 * LAYERS
    assert not [n for n in found if "norm" in n or "router" in n or n.endswith(("mlp.gate.weight", "lm_head.weight"))]
    assert "model.embed_tokens.weight" not in found


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("role: router, format: fp8-dynamic", "model.layers.1.mlp.gate.weight"),
        ("name: model.layers.1.mlp.gate, format: fp8-dynamic", "model.layers.1.mlp.gate.weight"),
    ],
)
def test_routers_are_taken_when_named(rule: str, name: str, tensors: list[TensorInfo]) -> None:
    """A router takes a format where a rule names its role or its whole name."""
    found = settle([rule, "role: linear, format: keep"], with_routers(tensors))
    assert found[name].format == TensorFormat("fp8-dynamic")


@pytest.mark.parametrize(
    "rule",
    [
        "role: lm_head, format: nvfp4a16",
        "name: lm_head, format: int4",
        "role: [linear, embed], format: fp8-dynamic",
        "role: embed, format: fp8-dynamic",
    ],
)
def test_only_a_head_outside_the_layers_is_quantized(rule: str, tensors: list[TensorInfo]) -> None:
    """A format for the embeddings, or another than fp8-dynamic for the head, is refused; `keep` is not."""
    with raises("recipe-not-quantizable", "rules[0]"):
        settle([rule, "role: linear, format: keep"], tensors)
    for named in ("role: lm_head", "name: lm_head"):
        found = settle([f"{named}, format: fp8-dynamic", "role: linear, format: keep"], tensors)
        assert found["lm_head.weight"].format == TensorFormat("fp8-dynamic")
        headless = [tensor for tensor in tensors if not tensor.name.startswith("lm_head")]
        with raises("recipe-not-quantizable", "rules[0]") as caught:
            settle([f"{named}, format: fp8-dynamic", "role: linear, format: keep"], headless)
        assert "tie_word_embeddings" in caught.value.remedy
    assert not any(
        a.format for a in settle(["role: lm_head, format: keep", "role: linear, format: keep"], tensors).values()
    )


def test_a_rule_for_a_fixed_tensor_is_refused_with_the_reason(tensors: list[TensorInfo]) -> None:
    """A rule that only matches tensors that must stay is refused with the reason."""
    rules = recipe_of("role: lm_head, format: keep", "role: linear, format: fp8-dynamic")
    with raises("recipe-not-quantizable", "rules[0]") as caught:
        resolve(rules, tensors, num_layers=LAYERS, not_quantizable={"lm_head.weight": "it is tied"})
    assert "lm_head.weight" in caught.value.what
    assert "it is tied" in caught.value.what


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("model.layers.0.self_attn.out_proj", "attention"),
        ("model.layers.0.self_attn.q_a_proj", "attention"),
        ("model.layers.0.linear_attn.in_proj_qkvz", "attention"),
        ("model.layers.0.mlp.fc1", "mlp"),
        ("model.layers.0.mixer.in_proj", "linear"),
        ("mtp.layers.0.mlp.gate_proj", "other"),
        ("model.mtp_layers.0.self_attn.q_proj", "other"),
        ("vision_tower.encoder.layers.0.self_attn.q_proj", "other"),
    ],
)
def test_roles_of_unusual_names(module: str, role: str) -> None:
    """A layer's linear whose own name says nothing takes its parent's role; other stacks have none."""
    assert parse_name(f"{module}.weight", (64, 64)).role == role


def test_fixed_tensors_need_no_rule_and_match_none(tensors: list[TensorInfo]) -> None:
    """No rule matches a tensor that cannot be quantized, and a missing rule is no error for it."""
    fixed = {t.name: "because" for t in tensors if ".layers.2." in t.name}
    found = resolve(recipe_of("layers: 0..1, format: fp8-dynamic"), tensors, num_layers=LAYERS, not_quantizable=fixed)
    assert {parse_name(n, (1, 1)).layer for n in found} == {0, 1}


# --- int4 options and shapes


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ("", "int4-g64"),
        (", group_size: 32", "int4-g32"),
        (", group_size: [128, 64, 32]", "int4-g64"),
        (", group_size: [32, 64]", "int4-g32"),
        (", group_size: 64, symmetric: false", "int4-g64-asym"),
    ],
)
def test_int4_takes_the_first_group_that_divides_all(options: str, label: str, tensors: list[TensorInfo]) -> None:
    """An INT4 rule takes the first of its group sizes that divides the columns of all its tensors."""
    found = settle([f"role: linear, format: int4{options}"], tensors)
    assert {a.format.label() for a in found.values() if a.format} == {label}


def test_int4_group_that_divides_not_all_is_refused(tensors: list[TensorInfo]) -> None:
    """A group size that does not divide a weight's columns is refused, with the weight, its shape and the rule."""
    error = refusal_for(["role: linear, format: int4, group_size: 128"], tensors)
    assert error.code == "recipe-shape"
    assert error.where.startswith(f"{WHERE}:3: rules[0]: model.layers.0.")
    assert "divisible by 128" in error.what
    assert "x 64" in error.what
    assert "`group_size`" in error.remedy


@pytest.mark.parametrize("shape", [(), (64,), (2, 64, 64)], ids=str)
@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "fp8-dynamic"])
def test_only_matrices_take_a_format(fmt: str, shape: tuple[int, ...]) -> None:
    """A weight that is no matrix is refused by every format, with its name and shape."""
    odd = TensorInfo("model.layers.0.self_attn.q_proj.weight", "BF16", shape)
    error = refusal_for([f"role: q, format: {fmt}"], [odd])
    assert (error.code, error.where) == ("recipe-shape", f"{WHERE}:3: rules[0]: {odd.name}")
    assert str(list(shape)) in error.what


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4a16"])
def test_nvfp4_needs_whole_blocks(fmt: str) -> None:
    """NVFP4 refuses columns that 16 does not divide, and says what else the tensor could take."""
    odd = TensorInfo("model.layers.0.mlp.down_proj.weight", "BF16", (64, 40))
    error = refusal_for([f"role: linear, format: {fmt}"], [odd])
    assert (error.code, error.where) == ("recipe-shape", f"{WHERE}:3: rules[0]: {odd.name}")
    assert "divisible by 16" in error.what
    assert "64 x 40" in error.what
    assert "fp8-dynamic" in error.remedy


# --- refused by what is written


@pytest.mark.parametrize(
    ("rule", "key", "near"),
    [
        ("role: mlp, format: nvfp4, scale_rul: absmax", "rules[0].scale_rul", "scale_rule"),
        ("role: mlp, format: nvfp4, layer: 1", "rules[0].layer", "layers"),
        ("rolle: mlp, format: nvfp4", "rules[0].rolle", "role"),
        ("role: mlp, formt: nvfp4", "rules[0].formt", "format"),
    ],
)
def test_unknown_key_of_a_rule(rule: str, key: str, near: str) -> None:
    """A misspelt key of a rule, needed or not, is refused with file, line, key path and the nearest valid key."""
    error = refusal(f"name: mine\nrules:\n  - {{{rule}}}\n")
    assert (error.code, error.where) == ("recipe-invalid", f"{WHERE}:3: {key}")
    assert f"Did you mean {near}?" in error.remedy


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("name: mine\ndescribtion: x\nrules: [{role: mlp, format: keep}]", "describtion", "description"),
        ("name: mine\nrule: [{role: mlp, format: keep}]", "rule", "rules"),
    ],
)
def test_unknown_key_of_a_recipe(text: str, key: str, near: str) -> None:
    """A misspelt key at the top, needed or not, is refused with file, key and the nearest valid key."""
    error = refusal(text)
    assert (error.code, error.where) == ("recipe-invalid", f"{WHERE}:2: {key}")
    assert f"Did you mean {near}?" in error.remedy


def test_unknown_key_unlike_any_lists_all() -> None:
    """A key that resembles none is refused with all that are known."""
    error = refusal("name: mine\nrules:\n  - {role: mlp, format: keep, zzz: 1}\n")
    for key in ("role", "name", "layers", "format", "scale_rule", "objective", "group_size", "symmetric"):
        assert key in error.remedy


@pytest.mark.parametrize(
    ("rule", "key", "named"),
    [
        ("role: mpl, format: nvfp4", "role", "Did you mean mlp?"),
        ("role: [q, dwon], format: nvfp4", "role", "Did you mean down?"),
        ("role: norm, format: nvfp4", "role", "Known: "),
        ("role: mlp, format: nvpf4", "format", "Did you mean nvfp4?"),
        ("role: mlp, format: gguf", "format", "fp8-dynamic"),
        ("role: mlp, format: nvfp4, scale_rule: absmaxx", "scale_rule", "four-over-six"),
        ("role: mlp, format: fp8-dynamic, scale_rule: four-over-six", "scale_rule", "absmax"),
        ("role: mlp, format: keep, scale_rule: absmax", "scale_rule", "Remove it"),
        ("role: mlp, format: nvfp4, scale_rule: sweep, objective: mae", "objective", "four-over-six"),
        ("role: mlp, format: nvfp4, scale_rule: absmax, objective: mse", "objective", "four-over-six"),
        ("role: mlp, format: nvfp4, objective: best", "objective", "mae"),
        ("role: mlp, format: nvfp4, objective: mae", "objective", "four-over-six"),
        ("role: mlp, format: nvfp4, scale_rule: effort", "scale_rule", ""),
        ("role: mlp, format: nvfp4, group_size: 32", "group_size", "Remove it"),
        ("role: mlp, format: keep, symmetric: true", "symmetric", "Remove it"),
        ("role: mlp, format: int4, group_size: 48", "group_size", "32, 64, 128"),
        ("role: mlp, format: int4, group_size: [32, 0]", "group_size", "32, 64, 128"),
        ("role: mlp, format: int4, symmetric: maybe", "symmetric", ""),
        ("layers: 1-2, format: keep", "layers", "0..3, 26, -1"),
        ("layers: '0..', format: keep", "layers", "0..3, 26, -1"),
        ("layers: '', format: keep", "layers", "0..3, 26, -1"),
        ("layers: [[1]], format: keep", "layers", "0..3, 26, -1"),
        ("layers: 1.5, format: keep", "layers", "0..3, 26, -1"),
        ("role: 5, format: keep", "role", ""),
        ("role: mlp, format: [nvfp4]", "format", ""),
        ("role: mlp", "format", ""),
    ],
)
def test_wrong_values_of_a_rule(rule: str, key: str, named: str) -> None:
    """A wrong role, format, scale rule, option or type is refused with file, line, key path and remedy."""
    error = refusal(f"name: mine\nrules:\n  - {{role: q, format: keep}}\n  - {{{rule}}}\n")
    assert error.code == "recipe-invalid"
    assert error.where.startswith(f"{WHERE}:4: rules[1].{key}")
    assert named in str(error)
    assert error.remedy


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000])
def test_broken_patterns_are_refused(pattern: str) -> None:
    """A regular expression that is invalid, too large or too deep is refused with file, line and key path."""
    error = refusal(f"name: mine\nrules:\n  - {{name: 're:{pattern}', format: keep}}\n")
    assert (error.code, error.where) == ("pattern-invalid", f"{WHERE}:3: rules[0].name")


@pytest.mark.parametrize("rule", ["format: keep", "role: [], format: keep"])
def test_a_rule_without_a_condition(rule: str) -> None:
    """A rule without role, name and layers is refused; the remedy is the role of all linears."""
    error = refusal(f"name: mine\nrules:\n  - {{{rule}}}\n")
    assert (error.code, error.where) == ("recipe-invalid", f"{WHERE}:3: rules[0]")
    assert "`role: linear`" in error.remedy


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: mine\nrules:\n  - role: mlp\n   format: keep\n", 4),
        ("name: mine\nrules: [\n", 3),
        ("name: mine\n\trules: []\n", 2),
        ("name: 'mine\n", 2),
        ("name: mine\nrules: *nowhere\n", 2),
    ],
)
def test_broken_yaml_names_the_line(text: str, line: int) -> None:
    """Text that is no YAML is refused with file and line."""
    error = refusal(text)
    assert (error.code, error.where) == ("yaml-invalid", f"{WHERE}:{line}")


@pytest.mark.parametrize(
    "text", ["a\0b", "[" * 5000, "name: !!bool x", "name: !!timestamp x", "name: !!int ''", "? [a]\n: b", "? {a: b}\n"]
)
def test_odd_yaml_is_refused_in_one_line(text: str) -> None:
    """Control characters, endless nesting, tags with impossible values and odd keys give one plain line."""
    error = refusal(text)
    assert error.code == "yaml-invalid"
    assert error.where.startswith(WHERE)
    assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "nvfp4", "7", "null"])
def test_no_mapping_is_no_recipe(text: str) -> None:
    """An empty file, a list or a bare word is refused with what a recipe is."""
    error = refusal(text)
    assert (error.code, error.where) == ("recipe-invalid", WHERE)
    assert "`name` and `rules`" in error.what


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("rules: [{role: mlp, format: keep}]", "1: name"),
        ("name: 7\nrules: [{role: mlp, format: keep}]", "1: name"),
        ("name: [a]\nrules: [{role: mlp, format: keep}]", "1: name"),
        ("name: mine", "1: rules"),
        ("name: mine\nrules: 3", "2: rules"),
        ("name: mine\nrules: []", "2: rules"),
        ("name: mine\nrules: {role: mlp, format: keep}", "2: rules"),
        ("name: mine\nrules: [mlp]", "2: rules[0]"),
    ],
)
def test_wrong_types_at_the_top(text: str, place: str) -> None:
    """A missing name, missing rules or ones of another type are refused with the line and the key's path."""
    error = refusal(text)
    assert (error.code, error.where) == ("recipe-invalid", f"{WHERE}:{place}")


# --- refused for a model


def test_a_rule_that_matches_nothing(tensors: list[TensorInfo]) -> None:
    """A rule for tensors that the model lacks is refused with its number and a remedy."""
    error = refusal_for(["role: linear, format: keep", "role: router, format: fp8-dynamic"], tensors)
    assert (error.code, error.where) == ("recipe-rule-unmatched", f"{WHERE}:4: rules[1]")
    assert error.remedy


def test_a_rule_whose_tensors_are_taken(tensors: list[TensorInfo]) -> None:
    """A rule behind one that takes all of its tensors is refused too."""
    error = refusal_for(["role: linear, format: fp8-dynamic", "role: mlp, format: nvfp4"], tensors)
    assert (error.code, error.where) == ("recipe-rule-unmatched", f"{WHERE}:4: rules[1]")


def test_a_layer_that_the_model_lacks(tensors: list[TensorInfo]) -> None:
    """A rule for layers behind the last one matches nothing and is refused."""
    error = refusal_for(["layers: 3..9, format: keep", "role: linear, format: fp8-dynamic"], tensors)
    assert (error.code, error.where) == ("recipe-rule-unmatched", f"{WHERE}:3: rules[0]")


def test_a_tensor_without_a_rule(tensors: list[TensorInfo]) -> None:
    """A decoder linear that no rule names is refused with its name, role and shape."""
    error = refusal_for(["role: attention, format: fp8-dynamic"], tensors)
    assert (error.code, error.where) == ("recipe-rule-missing", WHERE)
    assert "model.layers.0.mlp." in error.what
    assert "`format: keep`" in error.remedy


@pytest.mark.parametrize(
    "rules",
    [
        ["role: q, format: nvfp4", "role: linear, format: fp8-dynamic"],
        ["role: v, format: keep", "role: linear, format: fp8-dynamic"],
        ["role: gate, format: nvfp4, scale_rule: absmax", "role: linear, format: nvfp4, scale_rule: four-over-six"],
        ["role: gate, format: nvfp4", "role: linear, format: nvfp4, scale_rule: four-over-six"],
        [
            "role: up, format: nvfp4, scale_rule: four-over-six, objective: mae",
            "role: linear, format: nvfp4, scale_rule: four-over-six",
        ],
        ["role: gate, format: int4, group_size: 32", "role: linear, format: int4, group_size: 64"],
        ["role: up, format: int4, symmetric: false, group_size: 64", "role: linear, format: int4, group_size: 64"],
        ["role: k, layers: 1, format: nvfp4a16", "role: linear, format: nvfp4"],
    ],
)
def test_a_split_fused_group(rules: list[str], tensors: list[TensorInfo]) -> None:
    """Formats, scale rules, objectives or options that differ inside a fused group are refused, naming both rules."""
    error = refusal_for(rules, tensors)
    assert (error.code, error.where) == ("recipe-splits-group", WHERE)
    assert "rules[0]" in error.what
    assert "rules[1]" in error.what


def test_a_fused_group_may_differ_between_layers(tensors: list[TensorInfo]) -> None:
    """Only members of one group must agree; the same group may go otherwise in another layer."""
    found = settle(
        ["layers: 0, format: nvfp4", "layers: 1, format: keep", "role: linear, format: fp8-dynamic"], tensors
    )
    got = [found[f"model.layers.{k}.self_attn.q_proj.weight"].format for k in range(LAYERS)]
    assert got == [TensorFormat("nvfp4"), None, TensorFormat("fp8-dynamic")]


def test_embeddings_take_no_format(llama: Path, tmp_path: Path) -> None:
    """A rule that gives the embeddings a format is refused by every recipe: no engine multiplies by them."""
    loaded = recipe_of("role: embed, format: fp8-dynamic", "role: linear, format: fp8-dynamic")
    with raises("recipe-not-quantizable", f"{WHERE}:3: rules[0]") as caught:
        quantize(llama, loaded, output_dir=tmp_path / "out")
    assert "embed_tokens" in caught.value.what


# --- where recipes come from


def test_unknown_recipe_names_the_nearest() -> None:
    """A name that is neither built in nor a file is refused with the nearest built-in one."""
    with raises("recipe-not-found") as caught:
        load_recipe("nvfp4-fp8-hybird")
    assert "nvfp4-fp8-hybird" in caught.value.what
    assert "Did you mean nvfp4-fp8-hybrid?" in caught.value.remedy


def test_recipe_from_a_file(tmp_path: Path) -> None:
    """A path to a YAML file is a recipe; its text is kept as it is and its digest differs from that of another text."""
    text = "# größer\nname: mine\nrules:\n  - {role: linear, format: keep}\n"
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    loaded = load_recipe(str(file))
    assert (loaded.text, loaded.where, loaded.recipe.name) == (text, str(file), "mine")
    assert loaded.digest != parse_recipe(text + "# more\n", where=WHERE).digest


def test_recipe_file_that_is_no_text(tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused by its name."""
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xff\xfe\x00name")
    with raises("file-unreadable", file):
        load_recipe(str(file))


def test_recipe_file_that_is_too_large(tmp_path: Path) -> None:
    """A file larger than any recipe is refused unread."""
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"#" * 300_000)
    with raises("yaml-invalid", file):
        load_recipe(file)


def test_stored_recipe_runs_again(llama: Path, token_rows: Path, tmp_path: Path) -> None:
    """The recipe stored beside the weights is the text that was read, and gives byte-identical weight files."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# eigene Mischung: größte Fehler zuletzt\nname: mine\nrules:\n"
        "  - {role: down, layers: -1, format: int4, scale_rule: absmax, group_size: [128, 32], symmetric: false}\n"
        "  - {role: mlp, format: nvfp4, scale_rule: four-over-six, objective: mae}\n"
        "  - {role: linear, format: fp8-dynamic}\n",
        encoding="utf-8",
    )
    first, second = tmp_path / "first", tmp_path / "second"
    records = []
    for recipe, target in ((file, first), (first / RECIPE_FILE, second)):
        records.append(
            quantize(llama, str(recipe), output_dir=target, dataset=[token_rows], max_shard_size=40_000, device="cpu")
        )
    assert (first / RECIPE_FILE).read_bytes() == file.read_bytes() == (second / RECIPE_FILE).read_bytes()
    weights = sorted(path.name for path in first.glob("*.safetensors*"))
    assert len(weights) > 3
    assert weights == sorted(path.name for path in second.glob("*.safetensors*"))
    for name in [*weights, "config.json"]:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert records[0].files == records[1].files
    assert records[0].recipe_digest == records[1].recipe_digest


# --- anything at all

ROLE_WORDS = ["mlp", "linear", "attention", "q", "gate", "down", "lm_head", "router"]
FORMAT_WORDS = ["nvfp4", "nvfp4a16", "int4", "fp8-dynamic", "keep"]
SCALE_WORDS = ["absmax", "four-over-six", "sweep"]
NAME_WORDS = ["re:.*", "re:(", "*", "model.*", "lm_head"]
LAYER_WORDS = ["0", "-1", "0..1", "-2..5", "0,2"]
WORDS = [*ROLE_WORDS, *FORMAT_WORDS, *SCALE_WORDS, *NAME_WORDS, *LAYER_WORDS, "mse", "mae", "64"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.dates()
    | st.text(max_size=4)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
KEYS = st.sampled_from(["role", "name", "layers", "format", "scale_rule", "objective", "group_size", "symmetric"])
WILD_RULES = st.dictionaries(KEYS | st.text(max_size=3), VALUES, max_size=5)
TAME_RULES = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLE_WORDS), "format": st.sampled_from(FORMAT_WORDS)},
    optional={
        "layers": st.sampled_from(LAYER_WORDS),
        "name": st.sampled_from(NAME_WORDS),
        "scale_rule": st.sampled_from(SCALE_WORDS),
        "group_size": st.sampled_from([32, 64, 128]),
    },
)
DOCUMENTS = st.fixed_dictionaries(
    {"name": st.just("mine") | SCALARS, "rules": st.lists(TAME_RULES | WILD_RULES, min_size=1, max_size=4) | VALUES}
) | st.dictionaries(st.sampled_from(["name", "description", "rules"]) | SCALARS, VALUES | WILD_RULES, max_size=4)
ODD_TEXT = st.text(alphabet="ab01:-[]{}!&*?|>'\"%@`#,.~<= \n\t", max_size=40)


def read_and_resolve(text: str, tensors: list[TensorInfo]) -> None:
    """Any outcome but a recipe or a UserError with a message escapes."""
    try:
        loaded = parse_recipe(text, where=WHERE)
        assert loaded.recipe.rules
        assert all(a.rule < len(loaded.recipe.rules) for a in resolve(loaded, tensors, num_layers=LAYERS).values())
    except UserError as error:
        assert str(error).startswith(WHERE)  # noqa: PT017 (both outcomes are right)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(document=DOCUMENTS)
def test_any_document_is_a_recipe_or_a_user_error(document: object, tensors: list[TensorInfo]) -> None:
    """Whatever a YAML document holds, reading and resolving it gives a recipe or a UserError that names the file."""
    read_and_resolve(yaml.safe_dump(document, allow_unicode=True), tensors)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(before=ODD_TEXT, after=ODD_TEXT, cut=st.integers(0, 80))
@example(before="", after="!!bool x", cut=6)
@example(before="", after="!!timestamp x", cut=6)
@example(before="!!int ''", after="", cut=0)
def test_any_text_is_a_recipe_or_a_user_error(before: str, after: str, cut: int, tensors: list[TensorInfo]) -> None:
    """Whatever characters are put before, behind and amid a recipe's text, there is a recipe or a UserError."""
    text = "name: mine\nrules:\n  - {role: mlp, format: nvfp4}\n  - {role: linear, format: fp8-dynamic}\n"
    read_and_resolve(before + text[:cut] + after + text[cut:], tensors)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_latent_attention_takes_no_four_bit_inputs(fmt: str) -> None:
    """kv_b_proj, whose weight vLLM recomputes by running it, is refused 4-bit inputs, with the rule that helps."""
    names = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj")
    tensors = [TensorInfo(f"model.layers.0.self_attn.{name}.weight", "BF16", (64, 64)) for name in names]
    asked = recipe_of(f"role: linear, format: {fmt}")
    with raises("recipe-not-quantizable", "rules[0]") as caught:
        resolve(asked, tensors, num_layers=1)
    assert "kv_b_proj.weight" in caught.value.what
    assert 'name: "*.kv_b_proj"' in caught.value.remedy
    corrected = recipe_of('name: "*.kv_b_proj", format: fp8-dynamic', f"role: linear, format: {fmt}")
    assert resolve(corrected, tensors, num_layers=1)[tensors[3].name].format == TensorFormat("fp8-dynamic")
