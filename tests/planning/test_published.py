"""Plans of published checkpoints: read as recipes, applied to other models, and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from helpers.errors import raises
from helpers.fp8_sources import Kind, as_fp8
from helpers.plans import write_headers
from helpers.tiny_mixtures import make_mixture
from snugfit.cli.app import app
from snugfit.model.layout import read_layout
from snugfit.planning.published import apply_recipe, diff_plans, read_recipe
from snugfit.quantization.decide import assignments_of
from snugfit.quantization.plan import lay_out
from snugfit.recipes.recipe import load_recipe, parse_recipe

MakeTiny = Callable[..., Path]
# of 3 layers: mixed roles, runs of layers, formats with options
RECIPES = {
    "hybrid": None,
    "runs": """
name: runs
rules:
  - role: [q, k, v]
    layers: "1"
    format: keep
  - role: down
    layers: "0, 2"
    format: int4
    group_size: 64
    symmetric: false
  - role: attention
    format: fp8-dynamic
  - role: linear
    format: nvfp4a16
""",
    "head": """
name: head
rules:
  - role: lm_head
    format: fp8-dynamic
  - role: mlp
    layers: "0..1"
    format: mxfp4
  - role: linear
    format: nvfp4
""",
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_checkpoint_is_read_as_the_recipe_that_made_it(case: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """The recipe that is read gives every weight of the original the format that the first recipe gave it."""
    model = make_tiny(hidden_size=128, intermediate_size=128)
    made = write_headers(model, RECIPES[case] or "nvfp4-fp8-hybrid", tmp_path / "made")
    layout = read_layout(model)
    again = lay_out(layout, read_recipe(made))
    before = lay_out(layout, parse_recipe(RECIPES[case] or load_recipe("nvfp4-fp8-hybrid").text, where="x"))
    assert again.outputs == before.outputs
    assert {n: a.format for n, a in again.assignments.items()} == {n: a.format for n, a in before.assignments.items()}


def test_the_hybrid_is_read_as_two_rules(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Runs of layers and roles are joined: the built-in hybrid comes back as its two rules."""
    made = write_headers(make_tiny(), "nvfp4-fp8-hybrid", tmp_path / "made")
    rules = read_recipe(made).recipe.rules
    assert [(rule.role, rule.layers, rule.format) for rule in rules] == [
        (("mlp",), None, "nvfp4"),
        (("linear",), None, "fp8-dynamic"),
    ]


def test_what_is_not_written_is_named(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """FP8 under one static scale is read as fp8-dynamic, which a comment of the recipe says."""
    as_fp8(make_tiny(), tmp_path / "fp8", "ct-tensor-static")
    recipe = read_recipe(tmp_path / "fp8")
    assert {rule.format for rule in recipe.recipe.rules} == {"fp8-dynamic"}
    assert "fp8-tensor+fp8-tensor is not written: fp8-dynamic stands for it" in recipe.text.splitlines()[0]


def test_blocks_of_transformers_are_read(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """FP8 in blocks of 128 x 128 as DeepSeek stores it is fp8-block."""
    as_fp8(make_tiny(hidden_size=128, intermediate_size=128), tmp_path / "fp8", "hf-block")
    assert "fp8-block" in {rule.format for rule in read_recipe(tmp_path / "fp8").recipe.rules}


@pytest.mark.parametrize("kind", ["hf-block", "ct-block"])
def test_parts_of_blocks_become_fp8_dynamic(kind: Kind, tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj_with_mqa ends in a part of a block: it and its partner are fp8-dynamic in the recipe.

    The model in 16 bits takes that; one that has the codes keeps them.
    """
    model = make_mixture("deepseek_v3", tmp_path / "model", wide=True)
    made = as_fp8(model, tmp_path / "fp8", kind)
    recipe = read_recipe(made)
    assert [(rule.name, rule.format) for rule in recipe.recipe.rules] == [
        ("*.self_attn.kv_a_proj_with_mqa", "fp8-dynamic"),
        ("*.self_attn.q_a_proj", "fp8-dynamic"),
        (None, "fp8-block"),
    ]
    comment = recipe.text.splitlines()[0]
    assert "self_attn.kv_a_proj_with_mqa, self_attn.q_a_proj, which have parts of blocks" in comment
    assert apply_recipe(recipe, model, made_for=read_layout(made)) == ()
    layout = read_layout(made)
    assert all(one.keeps_codes for one in assignments_of(layout, recipe, layout.weights.formats).values())


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_refusal_names_the_model_not_a_recipe_that_is_in_no_file(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A rule that a weight of the model refuses is given in words, at the weight; the remedy works as written."""
    made = as_fp8(make_tiny(hidden_size=128, intermediate_size=128), tmp_path / "fp8", "hf-block")
    model = make_tiny(hidden_size=64, intermediate_size=128)
    result = _run("plan", model, "--from", made)
    assert result.exit_code == 2
    assert f"snugfit: {model.name}: model.layers.0." in result.stderr
    assert "format: fp8-block" in result.stderr
    assert f"{made.name}:" not in result.stderr
    assert "Leave MODEL out, so that `--output-dir` takes the recipe" in result.stderr
    assert _run("plan", "--from", made, "-o", tmp_path / "plan").exit_code == 0
    file = tmp_path / "plan" / "recipe.yaml"
    file.write_text(file.read_text().replace("fp8-block", "fp8-dynamic"))
    assert _run("quantize", model, "-r", file, "--dry-run").exit_code == 0


def test_an_fp8_cache_is_part_of_the_plan(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A checkpoint that declares an FP8 KV cache gives a recipe that asks for one."""
    loaded = load_recipe("fp8-dynamic-fp8kv").text
    assert read_recipe(write_headers(make_tiny(), loaded, tmp_path / "made")).recipe.kv_cache == "fp8"


def test_a_model_in_16_bits_has_no_plan(make_tiny: MakeTiny) -> None:
    """A checkpoint that is not quantized is refused."""
    with raises("recipe-changes-nothing"):
        read_recipe(make_tiny())


def test_a_recipe_is_applied_where_every_rule_matches(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A plan suits a model with the same places; rules without a match are all named."""
    made = write_headers(make_tiny(), RECIPES["head"] or "", tmp_path / "made")
    recipe = read_recipe(made)
    assert apply_recipe(recipe, make_tiny(), made_for=read_layout(made)) == ()
    notes = apply_recipe(recipe, make_tiny(num_hidden_layers=2), made_for=read_layout(made))
    assert len(notes) == 1
    assert "3 layers there, 2 here" in notes[0]
    with raises("recipe-rule-unmatched") as error:
        apply_recipe(recipe, make_tiny(tie_word_embeddings=True))
    assert "role: lm_head" in error.value.what
    strange = parse_recipe(
        "name: x\nrules:\n- {role: experts, format: nvfp4}\n- {name: '*.q_norm', format: keep}\n"
        "- {role: linear, format: nvfp4}\n",
        where="x",
    )
    with raises("recipe-rule-unmatched") as error:
        apply_recipe(strange, make_tiny())
    assert "rules[0]" in error.value.what
    assert "rules[1]" in error.value.what


def test_two_plans_are_compared(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Differences are listed by place, layers and formats; a recipe is resolved on the other's model."""
    model = make_tiny()
    hybrid = write_headers(model, "nvfp4-fp8-hybrid", tmp_path / "hybrid")
    head = write_headers(model, RECIPES["head"] or "", tmp_path / "head")
    found = diff_plans(hybrid, head)
    rows = {(row.place, row.layers, row.a, row.b) for row in found.rows}
    assert rows == {
        ("lm_head", "", "keep", "fp8-dynamic"),
        *((f"self_attn.{name}_proj", "0..2", "fp8-dynamic", "nvfp4") for name in "qkvo"),
        *((f"mlp.{name}_proj", "0..1", "nvfp4", "mxfp4") for name in ("gate", "up", "down")),
    }
    assert (found.weights, found.different) == (22, 19)
    assert diff_plans(hybrid, "nvfp4-fp8-hybrid").rows == ()
    assert diff_plans("nvfp4-fp8-hybrid", hybrid).different == 0
    with raises("option-invalid", where="diff"):
        diff_plans("nvfp4", "nvfp4-fp8-hybrid")
