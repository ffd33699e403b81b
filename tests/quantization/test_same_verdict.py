"""A dry run, `fit` and `quantize` accept and refuse the same models and recipes, for the same reasons.

`fit` imports no transformers, so it may accept what only transformers' model of the checkpoint shows to be impossible:
then it says in its notes that this was not checked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fp8_sources import KINDS, as_fp8, as_mxfp4
from helpers.plans import plan_of
from helpers.refusals import add_codes
from helpers.sweeps import thinned
from helpers.tiny_families import FAMILIES, VISION_LANGUAGE, all_tensors, make_vision_language, random_rows, write_rows
from helpers.tiny_mixtures import MIXTURES, make_mixture, rewrite
from snugfit.errors import UserError
from snugfit.model.layout import NOT_CHECKED
from snugfit.planning.fit import fit
from snugfit.quantization.plan_checks import check_with_transformers
from snugfit.quantization.quantize import plan_quantization, quantize

MakeTiny = Callable[..., Path]
Models = Callable[[str], Path]
# families whose config says n_layer, n_head and n_embd
_OLD_NAMES: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "num_hidden_layers": 2}
_OLD_NAMES |= {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
_OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": _OLD_NAMES,  # its layers have Conv1D modules, which are not linears
    "gptj": _OLD_NAMES | {"rotary_dim": 16},
    "gpt_bigcode": _OLD_NAMES,
    "codegen": _OLD_NAMES | {"rotary_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4, "num_hidden_layers": 2},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0},
    "gemma3n_text": {  # its layers pass four hidden states a token
        "head_dim": 16,
        "sliding_window": 16,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": None,
        "pad_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}
_WIDE: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 2}
_FP8 = [f"llama {kind}" for kind in KINDS]
# damage of a copy -> what it changes in config.json
_DAMAGES: dict[str, dict[str, Any]] = {
    "layer missing": {"num_hidden_layers": 5},
    "expert missing": {},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "other config": {"intermediate_size": 96},
    "unknown family": {"model_type": "house_model"},
}
_MIXTURES = [f"mixture {family}" for family in MIXTURES]
_TEXT: dict[str, dict[str, Any]] = {**FAMILIES, **_OTHERS}
RECIPES = ("fp8-dynamic", "nvfp4-four-over-six", "nvfp4-moe-four-over-six")
EVERY_MODEL = [*_TEXT, *VISION_LANGUAGE, *_MIXTURES, *_FP8, "gpt_oss mxfp4", "odd width", *_DAMAGES]
# models that the files alone do not show to be impossible -> the code by which transformers' model shows it
ONLY_TRANSFORMERS_REFUSES = {
    ("gpt2", "fp8-dynamic"): "recipe-not-quantizable",
    ("gpt2", "nvfp4-four-over-six"): "recipe-not-quantizable",
    ("gemma3n_text", "fp8-dynamic"): "architecture-unsupported",
    ("unknown family", "fp8-dynamic"): "architecture-unknown",
    ("unknown family", "nvfp4-four-over-six"): "architecture-unknown",
    ("other config", "fp8-dynamic"): "config-mismatch",
    ("other config", "nvfp4-four-over-six"): "config-mismatch",
}
REFUSED = {
    ("odd width", "nvfp4-four-over-six"): "recipe-shape",
    ("layer missing", "fp8-dynamic"): "config-mismatch",
    ("expert missing", "nvfp4-four-over-six"): "weights-missing",
    ("gptq", "fp8-dynamic"): "quantization-unknown",
    ("mixture deepseek_v3", "nvfp4-four-over-six"): "recipe-not-quantizable",
    ("mixture gpt_oss", "nvfp4-four-over-six"): "format-unverified",
    ("mixture jetmoe", "fp8-dynamic"): "experts-unsupported",
    ("llama hf-block", "fp8-dynamic"): "already-quantized",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of 24 token ids."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([24, 24]))


def damaged(source: Path, folder: Path, damage: str) -> Path:
    """A copy of a model with one of _DAMAGES."""
    shutil.copytree(source, folder)
    if damage == "expert missing":
        tensors = all_tensors(folder)
        del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
        rewrite(folder, tensors)
    if damage == "gptq":
        add_codes(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | _DAMAGES[damage]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make(name: str, folder: Path, make_tiny: MakeTiny, models: Models) -> Path:
    """The model of this name, in a new directory; `models` gives those that it is made of."""
    family, _, kind = name.partition(" ")
    makers: dict[str, Callable[[], Path]] = {
        "wide": lambda: make_tiny("llama", **_WIDE),
        "odd width": lambda: make_tiny("llama", intermediate_size=72),  # NVFP4 needs a multiple of 16
        "gpt_oss mxfp4": lambda: as_mxfp4(models("mixture gpt_oss"), folder),
        **dict.fromkeys(_FP8, lambda: as_fp8(models("wide"), folder, next(one for one in KINDS if one == kind))),
        **dict.fromkeys(_DAMAGES, lambda: damaged(models("llama"), folder, name)),
        "expert missing": lambda: damaged(models("mixture qwen3_moe"), folder, name),
        **dict.fromkeys(VISION_LANGUAGE, lambda: make_vision_language(folder, name, dtype=torch.bfloat16)),
        **dict.fromkeys(_MIXTURES, lambda: make_mixture(kind, folder)),
        **dict.fromkeys(_TEXT, lambda: make_tiny(family, **_TEXT[family])),
    }
    return makers[name]()


@pytest.fixture(scope="module")
def models(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Gives one of EVERY_MODEL, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("model") / "model", make_tiny, get)
        return made[name]

    return get


def refusal(run: Callable[[], object]) -> UserError | None:
    """The error of `run`, None if it succeeds."""
    try:
        run()
    except UserError as error:
        return error
    return None


def reason(error: UserError | None) -> tuple[str, str, str] | None:
    """What two refusals for the same reason have in common."""
    return None if error is None else (error.code, error.what, error.where)


def fit_refusal(model: Path, recipe: str) -> tuple[str | None, str | None, tuple[str, ...]]:
    """The code with which `fit` fails, if it does; the problem of this recipe's row, if any; and fit's notes."""
    try:
        record = fit(model, "16GiB", recipes=[recipe])
    except UserError as error:
        return error.code, error.what, ()
    (row,) = (row for row in record.rows if recipe in row.recipes)
    return None, row.problem, record.notes


def is_kept(name: str, recipe: str) -> bool:
    """Whether `make test` runs this case: of every model one recipe in turn, and every case with a known refusal."""
    in_turn = (EVERY_MODEL.index(name) + RECIPES.index(recipe)) % len(RECIPES) == 0
    return in_turn or (name, recipe) in {**REFUSED, **ONLY_TRANSFORMERS_REFUSES}


@pytest.mark.parametrize(("name", "recipe"), thinned(is_kept, EVERY_MODEL, RECIPES))
def test_all_verbs_reach_the_same_verdict(name: str, recipe: str, models: Models, rows: Path, tmp_path: Path) -> None:
    """The dry run refuses what `quantize` refuses; `fit` too, unless only transformers' model of the files refuses.

    `make slow` has every model with every recipe.
    """
    model = models(name)
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu"}
    dry = refusal(lambda: plan_quantization(model, recipe, **options))
    real = refusal(lambda: quantize(model, recipe, output_dir=tmp_path / "out", **options))
    assert reason(dry) == reason(real)
    assert (tmp_path / "out").exists() == (real is None)
    code, problem, notes = fit_refusal(model, recipe)
    if dry is None:
        assert problem is None
        assert NOT_CHECKED in notes
    elif problem is None:
        # the files and the recipe show nothing wrong: it is transformers that refuses, and fit says so
        plan = plan_of(model, recipe)
        assert not plan.unverified
        assert reason(refusal(lambda: check_with_transformers(plan))) == reason(dry)
        assert ONLY_TRANSFORMERS_REFUSES[name, recipe] == dry.code
        assert NOT_CHECKED in notes
    elif code is None:
        assert problem == dry.what.rstrip(".")
    else:  # no recipe works: fit fails as a whole, at first for a KV cache of unknown size
        assert code in (dry.code, "cache-unknown")
    expected = REFUSED.get((name, recipe), ONLY_TRANSFORMERS_REFUSES.get((name, recipe)))
    assert expected is None or (dry is not None and dry.code == expected)


def test_the_cases_are_accepted_and_refused(models: Models) -> None:
    """Every case in which only transformers refuses is one that the files alone accept."""
    for name, recipe in ONLY_TRANSFORMERS_REFUSES:
        assert plan_of(models(name), recipe).assignments
    assert {name for name, _ in (*ONLY_TRANSFORMERS_REFUSES, *REFUSED)} <= set(EVERY_MODEL)


def test_recipes_that_need_allow_unverified(models: Models, rows: Path, tmp_path: Path) -> None:
    """With `allow_unverified` the dry run and `quantize` both accept a format that no tested engine loads."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "allow_unverified": True}
    model = models("mixture gpt_oss")
    planned = plan_quantization(model, "nvfp4-moe-four-over-six", **options)
    record = quantize(model, "nvfp4-moe-four-over-six", output_dir=tmp_path / "out", **options)
    assert planned.bytes == record.bytes
    assert {tensor.name for tensor in planned.records()} == {tensor.name for tensor in record.tensors}
