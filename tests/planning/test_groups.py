"""Groups of weights that get one format each: what engines fuse, experts together, nothing that cannot be quantized."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import MakeTiny
from helpers.errors import raises
from helpers.tiny_mixtures import MIXTURES, make_mixture
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.model.layout import read_layout
from snugfit.planning.groups import EXPERTS, FOLLOWING, as_written, assignment_of, find_groups, follows_beside
from snugfit.quantization.decide import decide
from snugfit.recipes.recipe import parse_recipe


def test_fused_partners_are_one_group(make_tiny: MakeTiny) -> None:
    """Query, key and value are one group, gate and up another; the output head comes last, if it is not tied."""
    layout = read_layout(make_tiny("llama", num_hidden_layers=1))
    names = {group.name: (group.role, len(group.weights)) for group in find_groups(layout)}
    assert names == {
        "model.layers.0.mlp.gate_up": ("gate_up", 2),
        "model.layers.0.mlp.down_proj": ("down", 1),
        "model.layers.0.self_attn.qkv": ("qkv", 3),
        "model.layers.0.self_attn.o_proj": ("o", 1),
        "lm_head": ("lm_head", 1),
    }
    assert list(names)[-1] == "lm_head"
    tied = find_groups(read_layout(make_tiny("llama", num_hidden_layers=1, tie_word_embeddings=True)))
    assert "lm_head" not in {group.name for group in tied}


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_groups_are_what_one_recipe_can_give_formats_to(tmp_path: Path, family: str) -> None:
    """Of every family: each quantizable weight is in one group, and a recipe of a rule a group is accepted."""
    layout = read_layout(make_mixture(family, tmp_path / "model"))
    if layout.blockers:
        with raises(layout.blockers[0].error.code):
            find_groups(layout)
        return
    groups = find_groups(layout)
    names = [group.name for group in groups]
    assert len(set(names)) == len(names)
    weights = [weight for group in groups for weight in group.weights]
    assert len(set(weights)) == len(weights)
    modules = {weight.removesuffix(".weight"): group.name for group in groups for weight in group.weights}
    assert all(len({modules[member] for member in fused}) == 1 for fused in group_modules(modules))
    for group in groups:
        routed = [weight for weight in group.weights if ".experts." in weight]
        assert len(routed) in (0, len(group.weights))
    experts = [group for group in groups if group.role == "experts"]
    assert len({group.layer for group in experts}) == len(experts) > 0
    names = [weight.removesuffix(".weight") for weight in weights]
    rules = "".join(f"  - {{name: '{name}', format: fp8-dynamic}}\n" for name in names)
    # a linear that no rule names would be an error
    decisions = decide(layout, parse_recipe(f"name: all\nrules:\n{rules}", where=""))
    given = {name for name, one in decisions.assignments.items() if one.format is not None}
    assert given == set(weights)


def test_formats_that_a_group_cannot_have(make_tiny: MakeTiny) -> None:
    """Shapes and engines exclude formats, with a reason; INT4 takes the largest group size that divides."""
    layout = read_layout(make_tiny("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=128))
    groups = {group.role: group for group in find_groups(layout)}
    for role, fmt, words in (("qkv", "fp8-block", "128"), ("lm_head", "nvfp4", "fp8-dynamic")):
        with pytest.raises(UserError) as caught:
            assignment_of(layout, groups[role], fmt)
        assert words in caught.value.what
    assert assignment_of(layout, groups["lm_head"], "fp8-dynamic")
    sizes = {role: next(iter(assignment_of(layout, groups[role], "int4").values())).label() for role in ("qkv", "down")}
    assert sizes == {"qkv": "int4-g64", "down": "int4-g128"}
    kept = assignment_of(layout, groups["qkv"], "keep")
    assert all(one.format is None for one in kept.values())


@pytest.mark.parametrize(
    ("chosen", "follow"),
    [
        # FP8 beside no 4-bit weight, beside some in one place, beside those of routed experts alone
        ({"": "fp8-dynamic"}, ()),
        ({"": "fp8-dynamic", "0.self_attn.o_proj": "int4"}, ("qkv", "o_proj", "shared_expert")),
        ({"": "fp8-dynamic", EXPERTS: "nvfp4"}, ()),
        ({"self_attn": "nvfp4", EXPERTS: "fp8-dynamic", "lm_head": "fp8-dynamic"}, ()),
        ({"self_attn": "mxfp4", "1.mlp.shared_expert": "fp8-dynamic"}, ("1.mlp.shared_expert",)),
        ({"shared_expert": "int4", "self_attn": "keep"}, ()),
    ],
)
def test_fp8_follows_as_a_recipe_lets_it(chosen: dict[str, str], follow: tuple[str, ...], tmp_path: Path) -> None:
    """FP8 of a plan follows the effort in exactly those groups in which it does by a recipe of the same formats."""
    layout = read_layout(make_mixture("qwen2_moe", tmp_path / "model", hidden_size=128))
    groups = {group.name: group for group in find_groups(layout)}
    choice = dict.fromkeys(groups, "keep") | {
        name: fmt
        for part, fmt in sorted(chosen.items())
        for name, group in groups.items()
        if part in (name, group.role) or (part and part in name) or (not part and group.role != "lm_head")
    }
    rules = "".join(
        f"  - {{name: '{weight.removesuffix('.weight')}', format: {fmt}}}\n"
        for name, fmt in choice.items()
        for weight in groups[name].weights
    )
    decided = decide(layout, parse_recipe(f"name: some\nrules:\n{rules}", where="")).assignments
    written = as_written(layout, groups, choice)
    found = {name for name, fmt in written.items() if fmt == FOLLOWING}
    for name, fmt in choice.items():
        rounded = assignment_of(layout, groups[name], written[name])
        for weight in groups[name].weights:
            assert (rounded[weight].format, rounded[weight].scale_rule) == (
                decided[weight].format,
                decided[weight].scale_rule,
            )
        assert written[name] in (fmt, FOLLOWING)
    assert all(any(part in name for name in found) for part in follow)
    assert bool(found) == bool(follow)
    assert as_written(layout, groups, written) == written


def test_fp8_follows_where_a_menu_has_what_brings_it_along(tmp_path: Path) -> None:
    """Formats of 4 bits bring FP8 along, in linears that every token passes; FP8 and blocks of it do not."""
    layout = read_layout(make_mixture("qwen3_moe", tmp_path / "model"))
    groups = find_groups(layout)
    experts = [group for group in groups if group.role == EXPERTS]
    assert follows_beside(layout, groups, ("fp8-dynamic", "int4"))
    assert not follows_beside(layout, experts, ("fp8-dynamic", "int4"))
    assert not follows_beside(layout, groups, ("fp8-dynamic", "fp8-block"))
    rounded = assignment_of(layout, experts[0], FOLLOWING).values()
    assert {one.scale_rule for one in rounded} == {"absmax"}
