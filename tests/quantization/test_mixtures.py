"""Mixtures of experts through a whole run: the tensors and the config that are written, and their readers."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import snugfit.quantization.unit_work
from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.killed import KILLED, contents, in_child
from helpers.plans import plan_of
from helpers.tiny_families import all_tensors, load, random_rows, same, write_rows
from helpers.tiny_mixtures import MIXTURES, Source, make_mixture, rewrite
from snugfit.calibration.observers import ExpertObserver
from snugfit.cli.app import app
from snugfit.dialects.schemes import parse_scheme
from snugfit.dialects.targets import Targets
from snugfit.engines.mixtures import UNSUPPORTED_FAMILIES
from snugfit.evaluation.evaluated_model import open_head, open_model, pass_layers
from snugfit.model import forward_pass
from snugfit.quantization.layer.layer_pass import LayerPass
from snugfit.quantization.layer.propagate import propagate
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe
from snugfit.records.statistics_file import STATISTICS_FILE
from snugfit.storage.staging import units_done

CPU = torch.device("cpu")
INSIDE = [family for family in MIXTURES if family not in UNSUPPORTED_FAMILIES]
RECIPES = ["nvfp4-moe-four-over-six", "fp8-int4-moe-absmax"]
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_family = pytest.mark.parametrize("family", INSIDE)
E4M3 = torch.float8_e4m3fn
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# the module of one expert's projection, as it is written
EXPERT = re.compile(r"(?P<layer>.+\.layers\.\d+)\.(?P<parent>.+)\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)")
# what engines call gate, up and down of every family
LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# families that no tested engine loads in one of the recipes
UNVERIFIED = ("gpt_oss", "granitemoehybrid")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of token ids, enough for every expert of a tiny mixture to see some."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([64] * 3 + [40, 33]))


Quantized = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Gives a tiny mixture of a family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_mixture(family, tmp_path_factory.mktemp(family) / "model")
            if family == "nemotron_h":  # as in its releases; transformers writes only layers_block_type
                edit_config(made[family], num_hidden_layers=4)
        return made[family]

    return make


@pytest.fixture(scope="module")
def quantized(source: Source, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Gives what a built-in recipe makes of a family's mixture, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, recipe: str) -> Path:
        if (family, recipe) not in made:
            out = tmp_path_factory.mktemp(family) / recipe
            quantize(
                source(family),
                recipe,
                output_dir=out,
                dataset=[rows],
                device="cpu",
                allow_unverified=family in UNVERIFIED,
            )
            made[family, recipe] = out
        return made[family, recipe]

    return make


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return found


def edit_config(path: Path, **values: Any) -> None:
    (path / "config.json").write_text(json.dumps(config_of(path) | values), encoding="utf-8")


def in_pieces(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's tensors, with stacked experts split into views of single ones (MTP layers are not changed)."""
    found: dict[str, Tensor] = {}
    for name, whole in tensors.items():
        split = dict(split_stack(family, name, whole))
        found |= split or {name: whole}
    return found


def split_stack(family: str, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    if family.startswith("granite") and whole.dim() == 3 and name.endswith("put_linear.weight"):
        parent = name.rpartition(".")[0].rpartition(".")[0]
        for expert, weight in enumerate(whole):
            half = len(weight) // 2
            parts = {"gate": weight[:half], "up": weight[half:]} if ".input_" in name else {"down": weight}
            yield from ((f"{parent}.experts.{expert}.{leaf}_proj.weight", part) for leaf, part in parts.items())
    elif family in {"gpt_oss", "qwen3_vl_moe"} and ".experts." in name:
        parent, _, leaf = name.rpartition(".")
        kind = "bias" if leaf.endswith("_bias") else "weight"
        for expert, one in enumerate(whole):
            weight = one.t() if kind == "weight" else one
            half = len(weight) // 2
            parts = {"down": weight}
            if leaf.startswith("gate_up") and family == "gpt_oss":
                parts = {"gate": weight[0::2], "up": weight[1::2]}
            elif leaf.startswith("gate_up"):
                parts = {"gate": weight[:half], "up": weight[half:]}
            yield from ((f"{parent}.{expert}.{role}_proj.{kind}", part) for role, part in parts.items())


def experts_of(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of routed experts by module, in layers that run."""
    found = {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        if name.endswith(".weight") and match and int(match["layer"].rpartition(".")[2]) < layers:
            found[name.removesuffix(".weight")] = tensor
    return found


def layers_of(path: Path) -> int:
    config = config_of(path)
    return int(config.get("text_config", config)["num_hidden_layers"])


def role(leaf: str) -> str:
    return LEAVES.get(leaf, leaf).removesuffix("_proj")


def four_over_six(weights: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(packed codes, block scales) of weights that share a global scale, and that as a divisor, by the definition."""
    amax = max(weight.float().abs().max() for weight in weights)
    divisor = (amax / (6 * 256)).reciprocal()
    scale = divisor.reciprocal()
    found = []
    for weight in weights:
        blocks = weight.float().reshape(-1, 16)
        plain = blocks.abs().amax(1) / (6 * scale)
        tries = []
        for factor in (1.0, 1.5):
            block_scale = (plain * factor).clamp(2.0**-9, 448).to(E4M3)
            step = (block_scale.float() * scale)[:, None]
            ratio = (blocks / step).numpy().clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
            values = torch.from_numpy(ratio.astype(np.float32)) * step
            codes = torch.from_numpy(ratio.view(np.uint8) & 15)
            tries.append((block_scale, codes, (values.abs() - blocks.abs()).square().sum(1)))
        (six, codes, error), (four, other, lower) = tries
        better = lower < error
        chosen = torch.where(better, four.float(), six.float()).to(E4M3).reshape(len(weight), -1)
        codes = torch.where(better[:, None], other, codes).reshape(len(weight), -1)
        codes = torch.where((codes == 8) & (weight == 0), 0, codes)
        found.append(((codes[:, 0::2] | codes[:, 1::2] << 4), chosen))
    return found, divisor.reshape(1)


def from_nvfp4(parts: Mapping[str, Tensor], module: str) -> Tensor:
    packed = parts[f"{module}.weight_packed"].long()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    values = torch.cat((GRID, -GRID))[codes].unflatten(1, (-1, 16))
    step = parts[f"{module}.weight_scale"].float() * (1 / parts[f"{module}.weight_global_scale"])
    weight: Tensor = (values * step[..., None]).flatten(1)
    return weight


def from_int4(parts: Mapping[str, Tensor], module: str) -> Tensor:
    packed, scale = parts[f"{module}.weight_packed"], parts[f"{module}.weight_scale"].float()
    codes = torch.stack([(packed >> shift & 15) - 8 for shift in range(0, 32, 4)], -1).flatten(1).float()
    weight: Tensor = (codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    return weight


def from_fp8(parts: Mapping[str, Tensor], module: str) -> Tensor:
    return parts[f"{module}.weight"].float() * parts[f"{module}.weight_scale"].float()


@every_family
def test_experts_are_nvfp4_by_definition(family: str, source: Source, quantized: Quantized) -> None:
    """Each expert's codes, block scales and global scale (one for gate and up) are those of the definition."""
    path = source(family)
    weights = experts_of(in_pieces(family, all_tensors(path)), layers_of(path))
    written = all_tensors(quantized(family, "nvfp4-moe-four-over-six"))
    groups: dict[tuple[str, bool], list[str]] = {}
    for module in weights:
        match = EXPERT.fullmatch(module)
        assert match is not None
        groups.setdefault((module.rpartition(".")[0], role(match["leaf"]) == "down"), []).append(module)
    assert len(groups) >= 4 * 2
    for modules in groups.values():
        expected, divisor = four_over_six([weights[module] for module in modules])
        for module, (packed, block_scale) in zip(modules, expected, strict=True):
            assert same(written[f"{module}.weight_global_scale"], divisor), module
            assert same(written[f"{module}.weight_scale"], block_scale), module
            assert same(written[f"{module}.weight_packed"], packed), module


@every_family
def test_experts_are_int4_by_definition(family: str, source: Source, quantized: Quantized) -> None:
    """Each expert's INT4 codes are the nearest under its scales, the largest magnitudes of groups divided by 7.5."""
    path = source(family)
    weights = experts_of(in_pieces(family, all_tensors(path)), layers_of(path))
    written = all_tensors(quantized(family, "fp8-int4-moe-absmax"))
    assert not [name for name in written if name.endswith("input_global_scale")]
    for module, weight in weights.items():
        scale = written[f"{module}.weight_scale"]
        groups = weight.float().unflatten(1, (scale.shape[1], -1))
        assert same(scale, (groups.abs().amax(-1) / 7.5).to(scale.dtype)), module
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        meant = (codes * scale.float()[..., None]).flatten(1)
        assert torch.equal(from_int4(written, module), meant), module
        assert written[f"{module}.weight_shape"].tolist() == list(weight.shape)


@every_family
def test_a_layer_has_two_scales_of_inputs(family: str, source: Source, quantized: Quantized) -> None:
    """All experts of a layer share one input scale for gate and up, and one for down, from the largest input."""
    out, path = quantized(family, "nvfp4-moe-four-over-six"), source(family)
    written = all_tensors(out)
    statistics = json.loads((out / STATISTICS_FILE).read_text(encoding="utf-8"))["layers"]
    found: dict[tuple[str, str, bool], set[float]] = {}
    for module in experts_of(in_pieces(family, all_tensors(path)), layers_of(path)):
        match = EXPERT.fullmatch(module)
        assert match is not None
        key = match["layer"], f"{match['layer']}.{match['parent']}.experts", role(match["leaf"]) == "down"
        found.setdefault(key, set()).add(float(written[f"{module}.input_global_scale"]))
    for (layer, mixture, down), scales in found.items():
        assert len(scales) == 1
        seen = statistics[layer.rpartition(".")[2]]["experts"][mixture]
        place = "down" if down else "gate_up"
        largest = max(seen[f"{place}_routed"] + seen[f"{place}_forced"])
        assert scales.pop() == pytest.approx(6 * 448 / largest, rel=1e-6)


@every_recipe
@every_family
def test_what_is_kept_and_what_is_fp8(family: str, recipe: str, source: Source, quantized: Quantized) -> None:
    """Routers, their corrections, norms, MTP layers and everything but linears are the source's, bit for bit."""
    path, out = source(family), quantized(family, recipe)
    given, written = in_pieces(family, all_tensors(path)), all_tensors(out)
    experts, layers = experts_of(given, layers_of(path)), layers_of(path)
    quantized_8 = {name for name in written if written[name].dtype == E4M3 and name.endswith(".weight")}
    taken = quantized_8 | {f"{module}.weight" for module in experts}
    for name, tensor in given.items():
        if name not in taken:
            assert same(written[name], tensor.contiguous()), name
    scales = {f"{name}_scale" for name in taken}
    parts = {f"{m}.{p}" for m in experts for p in ("weight_packed", "weight_shape", *SCALES)}
    assert written.keys() <= given.keys() | scales | parts
    kept = given.keys() - taken
    routers = r"\.(gate|router|shared_expert_gate|e_score_correction_bias)(\.layer|\.weight|\.bias|$)"
    assert {name for name in given if re.search(routers, name)} <= kept
    assert {name for name in given if "norm" in name or name.endswith("bias")} <= kept
    beyond = {n for n in given if re.match(rf"model\.layers\.{layers}\.", n)}
    assert beyond <= kept
    assert bool(beyond) == (family == "deepseek_v3")
    shared = {n for n in given if re.search(r"shared_(expert|experts|mlp)\..*weight$", n)} - beyond
    assert shared <= quantized_8
    assert bool(shared) == (family in SHARED)
    inside = [name for name in given if ".layers." in name and name.endswith(".weight") and given[name].dim() == 2]
    rest = {name for name in inside if "visual" not in name} - taken - beyond
    assert all(re.search(routers, name) for name in rest), rest


SHARED = {"granitemoehybrid", "qwen2_moe", "glm4_moe", "deepseek_v3", "nemotron_h"}
SCALES = ("weight_scale", "weight_global_scale", "input_global_scale")


def written_format(written: Mapping[str, Tensor], module: str) -> str | None:
    packed, weight = written.get(f"{module}.weight_packed"), written.get(f"{module}.weight")
    if packed is not None:
        return "nvfp4" if packed.dtype == torch.uint8 else "int4"
    return "fp8-dynamic" if weight is not None and weight.dtype == E4M3 else None


@every_recipe
@every_family
def test_targets_are_what_is_quantized(family: str, recipe: str, source: Source, quantized: Quantized) -> None:
    """The config states the format of every linear, also under the names that engines give experts."""
    out = quantized(family, recipe)
    quantization, written = config_of(out)["quantization_config"], all_tensors(out)
    targets = Targets(list(quantization["config_groups"].values()), quantization["ignore"], where="config.json")

    def stated(module: str) -> str | None:
        group = targets.group_of(module)
        return None if group is None else parse_scheme(group, where="config.json").name

    given = in_pieces(family, all_tensors(source(family)))
    linears = [n.removesuffix(".weight") for n, tensor in given.items() if n.endswith(".weight") and tensor.dim() == 2]
    linears = [module for module in linears if not re.search(r"embed|norm", module)]
    assert len(linears) > 20
    for module in linears:
        fmt = written_format(written, module)
        assert stated(module) == fmt, module
        names = {module.replace(".block_sparse_moe.", ".mlp.")}
        match = EXPERT.fullmatch(module)
        if match and fmt is not None:
            parent = module.rpartition(".")[0]
            names |= {f"{name}.{leaf}" for leaf in LEAVES.values() for name in (parent, parent.replace(BLOCK, ".mlp."))}
        for name in names:
            assert stated(name) == fmt, name
    of_experts = "nvfp4" if recipe.startswith("nvfp4") else "int4"
    assert {stated(module) for module in linears} == {None, "fp8-dynamic", of_experts}


BLOCK = ".block_sparse_moe."


@torch.no_grad()
def reference_logits(family: str, path: Path, out: Path, folder: Path, ids: Tensor) -> Tensor:
    """transformers' logits in fp32 for the source with every quantized weight replaced by its dequantized values."""
    written = all_tensors(out)
    whole = {name: tensor.float().clone() for name, tensor in all_tensors(path).items()}
    replaced = 0
    for name, tensor in in_pieces(family, whole).items():
        module = name.removesuffix(".weight")
        if (fmt := written_format(written, module)) is not None:
            read = {"nvfp4": from_nvfp4, "int4": from_int4, "fp8-dynamic": from_fp8}[fmt]
            tensor.copy_(read(written, module))  # a view of the stack, or the tensor itself
            replaced += 1
    assert replaced > 20
    folder.mkdir()
    config = config_of(path)
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part |= {key: "float32" for key in ("dtype", "torch_dtype") if key in part}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rewrite(folder, whole)
    model = load(folder)
    assert model.dtype == torch.float32
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@torch.no_grad()
def logits_of(out: Path, rows: list[list[int]]) -> Tensor:
    evaluated = open_model(out, activations="none", arithmetic=torch.float32)
    batches = pass_layers(evaluated, rows, CPU, tokens_per_batch=4096)
    found = [part for _, _, part in forward_pass.logits(open_head(evaluated, CPU), batches)]
    return torch.cat(found, 1)


@every_recipe
@every_family
def test_what_is_written_is_read_back(
    family: str, recipe: str, source: Source, quantized: Quantized, tmp_path: Path
) -> None:
    """Logits of the written file are those of transformers' model with the dequantized weights."""
    given = random_rows([24, 24], seed=7)
    out = quantized(family, recipe)
    expected = reference_logits(family, source(family), out, tmp_path / "reference", torch.tensor(given))
    found = logits_of(out, given)
    assert float(expected.std()) > 0.05
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4), float((found - expected).abs().max())


@pytest.mark.parametrize(("family", "step"), [("qwen3_moe", 0), ("qwen3_moe", 7), ("granitemoe", 5)])
def test_killed_inside_a_layer_of_experts(family: str, step: int, source: Source, rows: Path, tmp_path: Path) -> None:
    """A run killed while experts of its second layer are calibrated resumes there and ends in the same bytes."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "tokens_per_batch": 128, "max_shard_size": 60_000}
    quantize(source(family), "nvfp4-moe-four-over-six", output_dir=tmp_path / "one", **options)

    def die() -> None:
        calls, inside = 0, False
        second = ExpertObserver.second

        def watched(run: LayerPass, tensors: Any, roundings: Any) -> Any:
            nonlocal inside
            inside = run.index == 1
            return propagate(run, tensors, roundings)

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += inside
            if inside and calls > step:
                os._exit(KILLED)
            return second(*arguments, **named)

        ExpertObserver.second = counted  # type: ignore[method-assign]
        snugfit.quantization.unit_work.propagate = watched  # type: ignore[attr-defined]
        quantize(source(family), "nvfp4-moe-four-over-six", output_dir=tmp_path / "two", **options)

    assert in_child(die) == KILLED
    assert not (tmp_path / "two").exists()
    assert units_done(tmp_path / "two.partial") in (1, 2)  # the first layer may not have been noted yet
    record = quantize(source(family), "nvfp4-moe-four-over-six", output_dir=tmp_path / "two", **options)
    assert record.resumed is not None
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_layers_counted_by_their_kinds(source: Source, tmp_path: Path) -> None:
    """The number of layers of Nemotron-H, as transformers writes it, is the length of layers_block_type."""
    model = damaged(source("nemotron_h"), tmp_path / "model")
    config = config_of(model)
    del config["num_hidden_layers"]
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert plan_of(model, "nvfp4-moe-four-over-six").num_layers == 4


def recipe_of(*rules: str) -> LoadedRecipe:
    return parse_recipe("name: a\nrules:\n" + "".join(f"- {{{rule}}}\n" for rule in rules), where="a.yaml")


def test_roles_of_experts(source: Source) -> None:
    """`experts` matches exactly the routed experts, `shared_experts` those that every token passes."""
    path = source("deepseek_v3")
    asked = recipe_of(
        "role: experts, format: nvfp4, scale_rule: four-over-six",
        "role: shared_experts, format: mxfp4, scale_rule: absmax",
        "role: linear, format: fp8-dynamic",
    )
    plan = plan_of(path, asked)
    for name, assignment in plan.assignments.items():
        shared, routed = ".shared_experts." in name, ".experts." in name
        assert assignment.rule == (0 if routed else 1 if shared else 2), name
    assert {a.rule for a in plan.assignments.values()} == {0, 1, 2}
    assert not [name for name in plan.assignments if name.startswith("model.layers.2.") or name.endswith("gate.weight")]


@pytest.mark.parametrize(
    "family", ["granitemoe", "granitemoehybrid", "gpt_oss", "qwen3_vl_moe", "mixtral", "nemotron_h"]
)
def test_roles_of_stacked_experts(family: str, source: Source) -> None:
    """The role matches every expert, however the file stores them."""
    path = source(family)
    plan = plan_of(
        path, recipe_of("role: experts, format: nvfp4, scale_rule: four-over-six", "role: linear, format: keep")
    )
    named = {name for name, assignment in plan.assignments.items() if assignment.format is not None}
    pieces = experts_of(in_pieces(family, all_tensors(path)), layers_of(path))
    assert named == {f"{module}.weight" for module in pieces}


@pytest.mark.parametrize(
    ("family", "rules", "named"),
    [
        (
            "qwen3_moe",
            (
                "name: '*.experts.3.*', format: fp8-dynamic",
                "role: experts, format: nvfp4, scale_rule: four-over-six",
                "role: linear, format: keep",
            ),
            ("layer 0", "model.layers.0.mlp.experts.0.down_proj.weight", "nvfp4", ".experts.3.", "fp8"),
        ),
        (
            "granitemoe",
            (
                "name: '*.experts.3.*', format: keep",
                "role: experts, format: nvfp4, scale_rule: four-over-six",
                "role: linear, format: keep",
            ),
            ("experts of layer 0",),
        ),
        (
            "mixtral",
            ("name: '*.experts.*.w2', format: nvfp4, scale_rule: four-over-six", "role: linear, format: keep"),
            ("experts of layer 0",),
        ),
        (
            "glm4_moe",
            (
                "role: gate, format: keep",
                "role: up, format: keep",
                "role: down, format: nvfp4, scale_rule: four-over-six",
                "role: linear, format: keep",
            ),
            ("experts of layer 1",),
        ),
        (
            "nemotron_h",
            (
                "name: '*.experts.*.up_proj', format: keep",
                "role: experts, format: nvfp4, scale_rule: four-over-six",
                "role: linear, format: keep",
            ),
            ("experts of layer 1",),
        ),
        (
            "qwen3_moe",
            ("name: '*.experts.*.gate_proj', format: keep", "role: linear, format: nvfp4, scale_rule: four-over-six"),
            ("gate_proj", "up_proj"),
        ),
    ],
    ids=["one expert", "one of a stack", "down alone", "gate and up kept", "without a gate", "gate alone"],
)
def test_rules_that_split_experts(family: str, rules: tuple[str, ...], named: tuple[str, ...], source: Source) -> None:
    """Experts of one layer in two formats, or with one projection kept, are refused before any weight is read."""
    with raises("recipe-splits-group", where="a.yaml") as caught:
        plan_of(source(family), recipe_of(*rules))
    assert all(word in caught.value.what for word in named), caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "minimax_m2"])
def test_layers_may_differ_in_format(family: str, source: Source, tmp_path: Path) -> None:
    """Experts of different layers may have different formats, and targets distinguish them."""
    rules = (
        *(
            "role: experts, layers: 0, format: int4, scale_rule: absmax",
            "role: experts, layers: 1, format: fp8-dynamic",
        ),
        "role: linear, format: keep",
    )
    out = tmp_path / "out"
    quantize(source(family), recipe_of(*rules), output_dir=out, device="cpu")
    quantization, written = config_of(out)["quantization_config"], all_tensors(out)
    targets = Targets(list(quantization["config_groups"].values()), quantization["ignore"], where="config.json")
    modules = experts_of(in_pieces(family, all_tensors(source(family))), 2)
    for module in modules:
        fmt = "int4" if ".layers.0." in module else "fp8-dynamic"
        assert written_format(written, module) == fmt
        for name in (module, module.replace(BLOCK, ".mlp.")):
            group = targets.group_of(name)
            assert group is not None
            assert parse_scheme(group, where="config.json").name == fmt
    found = logits_of(out, random_rows([24]))
    assert torch.isfinite(found).all()


@every_recipe
def test_a_dense_model_has_no_experts(recipe: str, make_tiny: MakeTiny) -> None:
    """A recipe for mixtures is refused on a dense model with the rule that matches no tensor."""
    with raises("recipe-rule-unmatched", where=f"recipe {recipe}") as caught:
        plan_of(make_tiny("llama"), recipe)
    assert "rules[0]" in caught.value.where


Change = Callable[[dict[str, Tensor]], None]


def damaged(path: Path, folder: Path, change: Change | None = None, **config: Any) -> Path:
    """A copy with changed tensors and keys of config.json."""
    shutil.copytree(path, folder)
    if change is not None:
        tensors = all_tensors(path)
        change(tensors)
        rewrite(folder, tensors)
    edit_config(folder, **config)
    return folder


def without(pattern: str) -> Change:
    """Removes all tensors that match the pattern."""

    def change(tensors: dict[str, Tensor]) -> None:
        gone = [name for name in tensors if re.search(pattern, name)]
        assert gone
        for name in gone:
            del tensors[name]

    return change


def with_another_expert(tensors: dict[str, Tensor]) -> None:
    """Adds a ninth expert to layer 1."""
    for name in [name for name in tensors if ".layers.1.mlp.experts.7." in name]:
        tensors[name.replace(".experts.7.", ".experts.8.")] = tensors[name].clone()


# family, change of the tensors, changed keys of config.json, code, what the message names
BROKEN: dict[str, tuple[str, Change | None, dict[str, Any], str, tuple[str, ...]]] = {
    "more than the config says": (
        *("qwen3_moe", None, {"num_local_experts": 6}),
        *("config-mismatch", ("layer 0", "expert 6", "6 experts")),
    ),
    "fewer than the config says": (
        *("qwen3_moe", None, {"num_local_experts": 12}),
        *("weights-missing", ("expert 8 of layer 0", "down_proj", "12 experts", "8")),
    ),
    "one more in one layer": (
        *("qwen3_moe", with_another_expert, {}),
        *("config-mismatch", ("layer 1", "expert 8")),
    ),
    "a weight of one": (
        *("qwen3_moe", without(r"layers\.1\.mlp\.experts\.5\.up_proj"), {}),
        *("weights-missing", ("expert 5 of layer 1", "up_proj")),
    ),
    "Mixtral's names": (
        *("mixtral", without(r"layers\.0\.block_sparse_moe\.experts\.2\.w2"), {}),
        *("weights-missing", ("expert 2 of layer 0", "w2")),
    ),
    "an expert of one layer": (
        *("minimax_m2", without(r"layers\.1\..*\.experts\.7\."), {}),
        *("weights-missing", ("expert 7 of layer 1", "w1")),
    ),
    "of a prediction layer": (
        *("deepseek_v3", without(r"layers\.2\..*\.experts\.3\.gate_proj"), {}),
        *("weights-missing", ("expert 3 of multi-token prediction layer 2", "gate_proj")),
    ),
    "a projection of all": (
        *("qwen3_moe", without(r"layers\.1\.mlp\.experts\.\d\.gate_proj"), {}),
        *("weights-missing", ("layers.1.mlp.experts.0.gate_proj.weight",)),
    ),
    "experts of a layer": (
        *("qwen3_moe", without(r"layers\.1\.mlp\.experts"), {}),
        *("weights-missing", ("layers.1.mlp.experts",)),
    ),
    "a stack": (
        *("granitemoe", without(r"layers\.1\..*\.output_linear"), {}),
        *("weights-missing", ("layers.1.block_sparse_moe", "down_proj")),
    ),
    "a router": (
        *("qwen3_moe", without(r"layers\.1\.mlp\.gate\."), {}),
        *("weights-missing", ("layers.1.mlp.gate.weight",)),
    ),
    "another width": (
        *("qwen3_moe", None, {"moe_intermediate_size": 64}),
        *("config-mismatch", ("layers.0.mlp.experts.0", "64")),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_experts(case: str, source: Source, rows: Path, tmp_path: Path) -> None:
    """More or fewer experts than the config states, and missing weights, are refused by name; nothing is written."""
    family, change, config, code, named = BROKEN[case]
    model, out = damaged(source(family), tmp_path / "model", change, **config), tmp_path / "out"
    with raises(code, where=model) as caught:
        quantize(model, "nvfp4-moe-four-over-six", output_dir=out, dataset=[rows], device="cpu")
    assert all(word in caught.value.what for word in named), caught.value.what
    assert caught.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe", "longcat_flash"])
@every_recipe
def test_families_outside_the_interface(family: str, recipe: str, source: Source, rows: Path, tmp_path: Path) -> None:
    """Families that run their experts in a way of their own are refused; the error says what support would take."""
    out = tmp_path / "out"
    with raises("experts-unsupported", where=source(family) / "config.json") as caught:
        quantize(source(family), recipe, output_dir=out, dataset=[rows], device="cpu", allow_unverified=True)
    assert family in caught.value.what
    assert UNSUPPORTED_FAMILIES[family] in caught.value.what
    assert "model/experts.py" in caught.value.remedy
    assert not out.exists()


def command(model: Path, out: Path, rows: Path, *options: str) -> Any:
    given = [
        "quantize",
        model,
        "-r",
        "nvfp4-moe-four-over-six",
        "-o",
        out,
        "--dataset",
        rows,
        "--device",
        "cpu",
        *options,
    ]
    return CliRunner().invoke(app, [str(argument) for argument in given])


@pytest.mark.parametrize(
    ("family", "change", "code", "named"),
    [
        ("llama4_text", None, "experts-unsupported", "model/experts.py"),
        ("gpt_oss", None, "format-unverified", "`--allow-unverified`"),
        ("qwen3_moe", without(r"layers\.1\.mlp\.experts\.5\.up_proj"), "weights-missing", "expert 5 of layer 1"),
    ],
)
def test_the_command_refuses(
    family: str, change: Change | None, code: str, named: str, *, source: Source, rows: Path, tmp_path: Path
) -> None:
    """The command ends with exit code 2 and one message, and writes nothing."""
    model, out = damaged(source(family), tmp_path / "model", change), tmp_path / "out"
    refused = command(model, out, rows)
    assert failed_with(refused, code, model, named)
    lines = [line for line in refused.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("snugfit: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_unverified_formats_can_be_written(source: Source, rows: Path, tmp_path: Path) -> None:
    """--allow-unverified writes formats that no tested engine loads; the plan has no other objection."""
    written = command(source("gpt_oss"), tmp_path / "out", rows, "--allow-unverified")
    assert written.exit_code == 0, written.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    plan = plan_of(source("gpt_oss"), "nvfp4-moe-four-over-six")
    assert [error.code for error in plan.unverified] == ["format-unverified"]
    assert not plan.layout.blockers
