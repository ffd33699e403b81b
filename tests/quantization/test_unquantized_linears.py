"""Linears that engines only load in 16 bits get no codes, linears that they look up under other names have targets."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.errors import raises
from helpers.fp8_sources import as_fp8
from helpers.fp8_sources import dequantized as source_values
from helpers.plans import plan_of
from helpers.tiny_families import all_tensors, random_rows, same, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.engines.unquantized import unquantized
from snugfit.evaluation.evaluate import evaluate
from snugfit.inspection.inspect import inspect
from snugfit.model.layout import read_layout
from snugfit.model.names import parse_name
from snugfit.planning.fit import fit
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe

# family -> linears of layer 0 that vLLM builds without a quantization config, and one of layer 0 that it does not
WIDE = {
    "deepseek_v32": (("self_attn.indexer.wk", "self_attn.indexer.weights_proj"), "self_attn.indexer.wq_b"),
    "glm_moe_dsa": (("self_attn.indexer.wk", "self_attn.indexer.weights_proj"), "self_attn.indexer.wq_b"),
    "jamba": (tuple(f"mamba.{leaf}_proj" for leaf in ("in", "x", "dt", "out")), "feed_forward.gate_proj"),
    "hunyuan_v1_moe": (("mlp.gate.wg",), "mlp.shared_mlp.gate_proj"),
}
# family -> a linear in the file, and the name under which vLLM looks its format up
LOOKED_UP = {
    "lfm2_moe": ("model.layers.0.conv.in_proj", "model.layers.0.short_conv.in_proj"),
    "jamba": ("model.layers.1.self_attn.q_proj", "model.layers.1.q_proj"),
}
LAYER = "model.layers.0"
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Gives a tiny mixture of a family, made once; "FAMILY fp8" in FP8 blocks, as DeepSeek-V3.2 is released."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            family, _, fp8 = kind.partition(" ")
            folder = tmp_path_factory.mktemp(family)
            wide: dict[str, Any] = {"index_head_dim": 128, "index_n_heads": 4} if fp8 else {}
            made[kind] = make_mixture(family, folder / "model", wide=bool(fp8), **wide)
            if fp8:
                made[kind] = as_fp8(made[kind], folder / "fp8", "hf-block", keep=lambda name: "weights_proj" in name)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of token ids."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([64] * 4, stop=59))


def recipe(*rules: str) -> LoadedRecipe:
    """A recipe of these rules."""
    text = "\n".join(["name: own", "rules:", *(f"  - {{{rule}}}" for rule in rules)])
    return parse_recipe(text, where="own.yaml")


def quantization_config(path: Path) -> dict[str, Any]:
    """What the written config says."""
    found: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return found


@pytest.mark.parametrize("family", WIDE)
def test_they_are_copied(family: str, models: Models, rows: Path, tmp_path: Path) -> None:
    """A run copies them, ignores them by name, and quantizes the others of the layer; a dry run plans the same."""
    quantize(models(family), "fp8-dynamic", output_dir=tmp_path / "out", dataset=[rows])
    before, after = all_tensors(models(family)), all_tensors(tmp_path / "out")
    kept, other = WIDE[family]
    for leaf in kept:
        assert same(after[f"{LAYER}.{leaf}.weight"], before[f"{LAYER}.{leaf}.weight"])
        assert f"{LAYER}.{leaf}.weight_scale" not in after
        assert f"{LAYER}.{leaf}" in quantization_config(tmp_path / "out")["ignore"]
    assert f"{LAYER}.{other}.weight_scale" in after
    assert after.keys() == {i.name for infos in plan_of(models(family), "fp8-dynamic").outputs.values() for i in infos}


def test_fp8_codes_of_a_source_are_dequantized(models: Models, rows: Path, tmp_path: Path) -> None:
    """DeepSeek-V3.2's wk is FP8: it is written in 16 bits with the source's values, since vLLM 0.24 has no scales."""
    model = models("deepseek_v32 fp8")
    name = f"{LAYER}.self_attn.indexer.wk.weight"
    assert all_tensors(model)[name].dtype == torch.float8_e4m3fn
    own = recipe(
        "role: experts, format: nvfp4, scale_rule: four-over-six, requantize: true", "role: linear, format: keep"
    )
    quantize(model, own, output_dir=tmp_path / "out", dataset=[rows])
    after = all_tensors(tmp_path / "out")
    assert same(after[name], source_values(model)[name].bfloat16())
    assert f"{name}_scale" not in after


@pytest.mark.parametrize("family", LOOKED_UP)
def test_targets_match_both_names(family: str, models: Models) -> None:
    """A target matches a linear under the file's name, for transformers, and under vLLM's."""
    config = plan_of(models(family), "fp8-dynamic").config["quantization_config"]
    (group,) = config["config_groups"].values()
    for name in LOOKED_UP[family]:
        assert any(re.match(target.removeprefix("re:"), name) for target in group["targets"]), name
    assert not any(re.match(target.removeprefix("re:"), "model.layers.0.mamba.in_proj") for target in group["targets"])


def test_a_rule_may_keep_them_and_no_other(models: Models) -> None:
    """A rule that keeps them is accepted, one that gives them a format alone is refused with vLLM's reason."""
    keep = 'name: "*.mamba.*", format: keep'
    plan_quantization(models("jamba"), recipe(keep, "role: linear, format: fp8-dynamic"))
    with raises("recipe-not-quantizable", "rules[0]") as caught:
        plan_quantization(
            models("jamba"), recipe('name: "*.mamba.*", format: fp8-dynamic', "role: linear, format: keep")
        )
    assert "Mamba 1" in caught.value.what


def test_mamba_2_and_names_alone() -> None:
    """Mamba 2 has no x_proj and is quantized; streams and residuals of other families are known by their names."""
    second = ["model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj"]
    assert not unquantized(second)
    assert unquantized([*second, "model.layers.1.mamba.x_proj", "model.layers.1.mamba.in_proj"]).keys() == {
        "model.layers.1.mamba.x_proj",
        "model.layers.1.mamba.in_proj",
    }
    named = ["model.layers.0.hc_attn_layer.hc_fn", "model.layers.0.self_attn_res_proj", "model.layers.0.mlp_res_proj"]
    assert list(unquantized([*named, "model.layers.0.self_attn.o_proj"])) == named


def test_inspect_and_fit_agree(models: Models) -> None:
    """`inspect` says why they stay, and `fit` counts the bytes that a run writes."""
    parts = {part.stays for part in inspect(models("jamba")).parts}
    assert any("Mamba 1" in stays for stays in parts)
    row = next(row for row in fit(models("jamba"), "24GiB", recipes=["fp8-dynamic"]).rows if row.recipes)
    assert row.bytes == plan_of(models("jamba"), "fp8-dynamic").bytes


def test_keys_and_values_of_other_layers(models: Models, rows: Path, tmp_path: Path) -> None:
    """Verbs that run a model refuse Hunyuan's use_cla, as transformers' model would give each layer its own keys.

    `fit` counts the cache of every second layer, and says that no recipe can be used.
    """
    shutil.copytree(models("hunyuan_v1_moe"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    shared = {"use_cla": True, "cla_share_factor": 2}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | shared), encoding="utf-8")
    with raises("architecture-unsupported", "config.json"):
        quantize(tmp_path / "model", "fp8-dynamic", output_dir=tmp_path / "out", dataset=[rows])
    with raises("architecture-unsupported", "config.json"):
        evaluate([tmp_path / "model"], dataset=[rows], contexts=(32,))
    whole, half = (fit(path, "24GiB", context=64) for path in (models("hunyuan_v1_moe"), tmp_path / "model"))
    per_token = [record.rows[0].caches[0].bytes_per_token for record in (whole, half)]
    assert per_token[0] == 2 * per_token[1]
    assert [row.recipes for row in half.rows] == [()]
    assert any("use_cla" in note for note in half.notes)
    assert any("use_cla" in remark for remark in inspect(tmp_path / "model").remarks)


# --- routers


def router_names(model: nn.Module, experts: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, name of the layers' list) of each matrix with as many outputs as the model has experts."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    decoder = next(name for name in lists if name.endswith("layers"))
    for name, parameter in model.named_parameters():
        stacked_bias = ".experts." in name and name.endswith("_bias")
        if name.startswith(f"{decoder}.") and parameter.dim() == 2 and len(parameter) == experts and not stacked_bias:
            yield name, tuple(parameter.shape), decoder


def mixtures_of_transformers(experts: int) -> Iterator[tuple[str, nn.Module]]:
    """Every causal language model of transformers with `experts` experts a layer that its small config builds."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    small = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 260}
    small |= {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    small |= {"num_experts_per_tok": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1}
    small |= {"pad_token_id": 0, "enable_moe_block": True, "first_k_dense_replace": 0} | dict.fromkeys(counts, experts)
    for kind, config_class in CONFIG_MAPPING.items():
        if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        try:
            known = config_class().to_dict()
            if not known.keys() & set(counts):
                continue
            config = config_class(**{key: value for key, value in small.items() if key in known})
            with torch.device("meta"):
                yield kind, AutoModelForCausalLM.from_config(config)
        except Exception:  # noqa: BLE001, S112  # a family that needs more than these keys
            continue


def test_the_router_of_every_family_has_the_role() -> None:
    """In every mixture that transformers builds, what scores the experts has the role router, so rules leave it."""
    seen = set()
    for kind, model in mixtures_of_transformers(7):
        for name, shape, decoder in router_names(model, 7):
            seen.add(kind)
            assert parse_name(name, shape, decoder).role == "router", f"{kind}: {name}"
    assert len(seen) > 30
    assert "hunyuan_v1_moe" in seen


@pytest.mark.parametrize("name", ["mlp.gate.wg", "altup.modality_router", "mlp.router.router_mlp.0", "moe.gate.proj"])
def test_names_of_routers(name: str) -> None:
    """A linear called a router, or inside a module called gate or router, is one."""
    path = f"model.layers.0.{name}.weight"
    assert parse_name(path, (8, 64)).role == "router"


@pytest.mark.parametrize("recipe_name", ["nvfp4-four-over-six", "nvfp4-moe-four-over-six", "fp8-dynamic"])
def test_no_recipe_touches_hunyuans_router(recipe_name: str, models: Models) -> None:
    """Hunyuan's mlp.gate.wg stays as it is under every recipe."""
    layout, plan = read_layout(models("hunyuan_v1_moe")), plan_of(models("hunyuan_v1_moe"), recipe_name)
    routers = [name for name in layout.names if name.endswith("gate.wg.weight")]
    assert routers
    assert all(plan.outputs[name] == (layout.weights.tensors[name],) for name in routers)
