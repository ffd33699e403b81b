"""Recipes written for formats that were decided weight by weight."""

from __future__ import annotations

import random

import pytest

from snugfit.model.names import TensorName, parse_name
from snugfit.planning.recipe_text import WeightFormat, kind_of, recipe_text
from snugfit.recipes.recipe import parse_recipe
from snugfit.recipes.resolve import resolve
from snugfit.records.plan import layer_runs
from snugfit.storage.safetensors_header import TensorInfo

LAYERS = 7
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj", "self_attn.kv_b_proj")
EXPERTS = tuple(f"mlp.experts.{n}.{leaf}_proj" for n in range(2) for leaf in ("gate", "up", "down"))
SHARED = tuple(f"mlp.shared_experts.{leaf}_proj" for leaf in ("gate", "up", "down"))
# what engines run as one
TOGETHER: tuple[tuple[str, ...], ...]
TOGETHER = (ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:], LATENT[:2], LATENT[2:3], LATENT[3:])
TOGETHER = (*TOGETHER, EXPERTS, SHARED[:2], SHARED[2:])
FORMATS = (
    *map(WeightFormat, ("nvfp4", "fp8-dynamic", "keep", "nvfp4a16")),
    WeightFormat("int4", 64),
    WeightFormat("int4", 32, symmetric=False),
)


def modules_of(family: str) -> list[tuple[str, ...]]:
    """The places of each layer, by family."""
    dense, mixture, latent = (*ATTENTION, *MLP), (*ATTENTION, *EXPERTS, *SHARED), (*LATENT, ATTENTION[3])
    if family == "dense":
        return [dense] * LAYERS
    if family == "mixture":
        return [dense, *[mixture] * (LAYERS - 1)]
    return [(*latent, *MLP), *[(*latent, *EXPERTS, *SHARED[:2])] * (LAYERS - 1)]


def decided(family: str, rng: random.Random) -> dict[str, WeightFormat]:
    """Formats that engines allow, drawn at random, in layers that often agree."""
    found: dict[str, WeightFormat] = {}
    usual = {place: rng.choice(FORMATS[place == LATENT[3:] : 3]) for place in TOGETHER}
    allowed = {place: FORMATS[1:] if place == LATENT[3:] else FORMATS for place in TOGETHER}
    mixed = rng.choice((0.0, 0.1, 0.5))
    for layer, modules in enumerate(modules_of(family)):
        for place in TOGETHER:
            fmt = rng.choice(allowed[place]) if rng.random() < mixed else usual[place]
            found |= {f"model.layers.{layer}.{module}.weight": fmt for module in place if module in modules}
    if rng.random() < 0.5:
        found["lm_head.weight"] = WeightFormat(rng.choice(("keep", "fp8-dynamic")))
    return found


def parsed(names: dict[str, WeightFormat]) -> dict[str, TensorName]:
    return {name: parse_name(name, (128, 128)) for name in names}


@pytest.mark.parametrize("family", ["dense", "mixture", "latent"])
def test_rules_resolve_to_what_was_decided(family: str) -> None:
    """Whatever the formats, the recipe gives every weight exactly its own."""
    rng = random.Random(family)  # noqa: S311  # not for secrets
    for _ in range(30):
        formats = decided(family, rng)
        text = recipe_text(formats, parsed(formats), num_layers=LAYERS, name="p", description="d")
        tensors = [TensorInfo(name, "BF16", (128, 128)) for name in formats]
        found = resolve(parse_recipe(text, where="p"), tensors, num_layers=LAYERS)
        for name, fmt in formats.items():
            given = found[name].format if name in found else None
            expected = None if fmt.format == "keep" else (fmt.format, fmt.group_size or 0, fmt.symmetric)
            assert (given and (given.name, given.group_size, given.symmetric)) == expected, text


def test_a_uniform_plan_is_one_rule() -> None:
    """One format for all is `role: linear`, and every layer needs no list."""
    formats = {f"model.layers.{n}.{m}.weight": WeightFormat("nvfp4") for n in range(3) for m in (*ATTENTION, *MLP)}
    text = recipe_text(formats, parsed(formats), num_layers=3, name="p", description='all "4 bits"')
    assert text == 'name: "p"\ndescription: "all \\"4 bits\\""\nrules:\n  - role: linear\n    format: nvfp4\n'


def test_runs_of_layers_are_joined() -> None:
    """Fused partners share a rule, and layers in a row are a range."""
    kept = {n: "fp8-dynamic" if n in (0, 1, 2, 5) else "nvfp4" for n in range(6)}
    formats = {
        f"model.layers.{n}.{m}.weight": WeightFormat(kept[n] if m in ATTENTION[:3] else "nvfp4")
        for n in range(6)
        for m in (*ATTENTION, *MLP)
    }
    text = recipe_text(formats, parsed(formats), num_layers=6, name="a-plan", description="d", fp8_cache=True)
    rules = parse_recipe(text, where="p").recipe
    assert rules.kv_cache == "fp8"
    assert [(rule.role, rule.layers, rule.format) for rule in rules.rules] == [
        (("q", "k", "v"), "0..2, 5", "fp8-dynamic"),
        (("linear",), None, "nvfp4"),
    ]


def test_layers_in_short() -> None:
    """Two in a row are a range, too; order and repetition do not matter."""
    assert layer_runs([7, 0, 1, 3, 3]) == "0..1, 3, 7"


def test_the_place_of_an_expert() -> None:
    """Experts of a layer share a place, whose name has no number."""
    name = parse_name("model.layers.3.mlp.experts.17.up_proj.weight", (4, 4))
    assert kind_of(name) == "mlp.experts.*.up_proj"
