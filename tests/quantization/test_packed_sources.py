"""ModelOpt's FP8 and NVFP4, and compressed-tensors' NVFP4, INT4 and INT8, as sources of `quantize`.

The sources are packed by compressed-tensors' own compressors or by ModelOpt's formulas, and so are their values
(`packed_sources.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from conftest import MakeTiny
from helpers.errors import raises
from helpers.packed_sources import KINDS, Kind, as_packed, dequantized, scheme_of
from helpers.plans import plan_of
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.evaluation.evaluated_model import open_model
from snugfit.inspection.inspect import inspect
from snugfit.planning.fit import fit
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import plan_quantization, quantize

COPIED = ("modelopt-fp8", "modelopt-nvfp4", "ct-nvfp4", "ct-int4", "ct-int4-asym", "ct-int4-channel")
Q_PROJ, O_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
# Kimi K2's own list
KIMI = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of three rows of 16 token ids."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([16] * 3))


@pytest.fixture(scope="module")
def wide(make_tiny: MakeTiny) -> Path:
    """A 16-bit model of two layers."""
    return make_tiny("llama", hidden_size=128, head_dim=64, intermediate_size=256, num_hidden_layers=2)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, wide: Path) -> Callable[[Kind], Path]:
    """The same in a kind."""
    made: dict[Kind, Path] = {}

    def get(kind: Kind) -> Path:
        if kind not in made:
            made[kind] = as_packed(wide, tmp_path_factory.mktemp(kind) / "source", kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of DeepSeek-V3's architecture with its routed experts in INT4, all else in 16 bits, as Kimi K2."""
    folder = tmp_path_factory.mktemp("kimi")
    source = make_mixture("deepseek_v3", folder / "wide", wide=True)
    return as_packed(source, folder / "source", "ct-int4", keep=lambda name: ".mlp.experts." not in name, ignore=KIMI)


def recipe_file(folder: Path, *rules: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text("name: mine\nrules:\n" + "".join(f"- {{{rule}}}\n" for rule in rules), encoding="utf-8")
    return str(file)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def group_of(out: Path, module: str) -> Any:
    """The only config group that names a module, as compressed-tensors' own class."""
    given = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    found = []
    for group in QuantizationConfig.model_validate(given).config_groups.values():
        targets = [t.removeprefix("re:") if t.startswith("re:") else f"{re.escape(t)}$" for t in group.targets]
        found += [group for target in targets if re.match(target, module)]
    assert len(found) == 1, module
    return found[0]


def is_wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_quantizes_the_sources_values(
    kind: Kind, packed: Callable[[Kind], Path], wide: Path, tmp_path: Path
) -> None:
    """Codes are those of a 16-bit checkpoint with the dequantized values, and 16 bits on request are these."""
    source = packed(kind)
    plain = tmp_path / "plain"
    shutil.copytree(wide, plain)
    meant = {name: tensor.bfloat16() for name, tensor in dequantized(source, kind).items()}
    rewrite(plain, meant)
    fresh = "role: mlp, format: fp8-block, requantize: true", "role: linear, format: keep, requantize: true"
    recipe = recipe_file(tmp_path, *fresh)
    for path, name in ((source, "out"), (plain, "expected")):
        quantize(path, recipe, output_dir=tmp_path / name, device="cpu")
    written, expected = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "expected")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bytes(written[name], tensor), name
    assert same_bytes(written[f"{Q_PROJ}.weight"], meant[f"{Q_PROJ}.weight"])


@pytest.mark.parametrize("kind", COPIED)
def test_kept_codes_are_the_sources(kind: Kind, packed: Callable[[Kind], Path], tmp_path: Path) -> None:
    """Kept codes are the source's bit for bit under a config group that gives the same values, and eval reads them."""
    source, out = packed(kind), tmp_path / "out"
    recipe = recipe_file(tmp_path, "role: mlp, format: fp8-block, requantize: true", "role: linear, format: keep")
    quantize(source, recipe, output_dir=out, device="cpu")
    given, written, meant = all_tensors(source), all_tensors(out), dequantized(source, kind)
    codes = "weight" if kind.startswith("modelopt") else "weight_packed"
    packed_codes = "weight" if kind == "modelopt-fp8" else "weight_packed"
    for module in (Q_PROJ, O_PROJ):
        assert same_bytes(written[f"{module}.{packed_codes}"], given[f"{module}.{codes}"])
        if not kind.startswith("modelopt"):
            parts = [name for name in given if name.startswith(f"{module}.")]
            assert {name for name in written if name.startswith(f"{module}.")} == set(parts)
            assert all(same_bytes(written[name], given[name]) for name in parts)
        group = group_of(out, module)
        parts_of = {n.rpartition(".")[2]: t for n, t in written.items() if n.startswith(f"{module}.")}
        floats = {s: t.float() if t.dtype == torch.bfloat16 else t for s, t in parts_of.items()}
        read = BaseCompressor.get_value_from_registry(group.format).decompress(floats, group)["weight"]
        value = meant[f"{module}.weight"]
        assert ((read.float() - value).abs() <= value.abs() * 2.0**-7).all()  # the library computes NVFP4 in bf16
        if kind.startswith("ct"):
            assert group.weights.strategy == scheme_of(kind).weights.strategy
            assert group.weights.symmetric == scheme_of(kind).weights.symmetric
    if kind == "modelopt-nvfp4":
        assert float(written[f"{Q_PROJ}.input_global_scale"]) == pytest.approx(
            1 / float(given[f"{Q_PROJ}.input_scale"])
        )
        assert float(written[f"{Q_PROJ}.weight_global_scale"]) == pytest.approx(
            1 / float(given[f"{Q_PROJ}.weight_scale_2"])
        )
    if kind == "modelopt-fp8":
        assert written[f"{Q_PROJ}.input_scale"].tolist() == [float(given[f"{Q_PROJ}.input_scale"])]
        assert group_of(out, Q_PROJ).input_activations.dynamic is False
    before, after = open_model(source).formats, open_model(out).formats
    assert {module: after[module] for module in (Q_PROJ, O_PROJ)} == {m: before[m] for m in (Q_PROJ, O_PROJ)}


def test_integers_of_eight_bits_are_not_written(packed: Callable[[Kind], Path], tmp_path: Path) -> None:
    """INT8 codes under `keep` become 16 bits, and the dry run says how many."""
    plan = plan_of(packed("ct-int8"), recipe_file(tmp_path, "role: mlp, format: int4", "role: linear, format: keep"))
    assert plan.outputs[f"{Q_PROJ}.weight"][0].dtype == "BF16"
    assert any("int8" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("modelopt-fp8", "format: fp8-dynamic"),
        ("modelopt-nvfp4", "format: nvfp4"),
        ("modelopt-nvfp4", "format: nvfp4a16"),
        ("ct-nvfp4", "format: nvfp4, scale_rule: four-over-six"),
        ("ct-int4", "format: int4"),
        ("ct-int4", "format: int4, group_size: [128, 32]"),
        ("ct-int4-asym", "format: int4, symmetric: false"),
    ],
)
def test_the_same_format_is_copied(
    kind: Kind, rule: str, packed: Callable[[Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """A rule that asks for the format that the source has copies its codes, and needs no samples for them."""
    source = packed(kind)
    recipe = recipe_file(tmp_path, f"role: mlp, {rule}", "role: linear, format: fp8-block, requantize: true")
    quantize(source, recipe, output_dir=tmp_path / "out", device="cpu")
    given, written = all_tensors(source), all_tensors(tmp_path / "out")
    module = "model.layers.1.mlp.down_proj"
    ours = next(name for name in (f"{module}.weight_packed", f"{module}.weight") if name in written)
    theirs = next(name for name in (f"{module}.weight_packed", f"{module}.weight") if name in given)
    assert same_bytes(written[ours], given[theirs])
    assert (f"{module}.input_global_scale" in written) == ("nvfp4" in rule and "a16" not in rule)


@pytest.mark.parametrize("rule", ["format: int4, group_size: 64", "format: int4, symmetric: false"])
def test_another_int4_is_quantized_again(rule: str, packed: Callable[[Kind], Path], tmp_path: Path) -> None:
    """Other groups or zero points than the source's are new codes."""
    plan = plan_of(packed("ct-int4"), recipe_file(tmp_path, f"role: mlp, {rule}", "role: linear, format: keep"))
    assigned = plan.assignments["model.layers.0.mlp.up_proj.weight"]
    assert not assigned.keeps_codes
    assert plan.assignments[f"{Q_PROJ}.weight"].keeps_codes


def test_kimi_k2(kimi: Path, rows: Path, tmp_path: Path) -> None:
    """INT4 experts stay as they are while attention goes from 16 bits to FP8, with a config that states both."""
    recipe = recipe_file(tmp_path, "role: attention, format: fp8-dynamic", "role: linear, format: keep")
    quantize(kimi, recipe, output_dir=tmp_path / "out", device="cpu")
    given, written = all_tensors(kimi), all_tensors(tmp_path / "out")
    experts = [name for name in given if ".mlp.experts." in name]
    assert len(experts) > 3 * 8
    assert all(same_bytes(written[name], given[name]) for name in experts)
    assert written["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    group = group_of(tmp_path / "out", "model.layers.1.mlp.experts.3.down_proj")
    assert (group.format, group.weights.num_bits, group.weights.group_size) == ("pack-quantized", 4, 32)
    evaluated = open_model(tmp_path / "out")
    assert {fmt.label() for fmt in evaluated.formats.values()} == {"int4-g32", "fp8-dynamic"}
    collect_statistics(kimi, output_dir=tmp_path / "statistics", dataset=[rows], device="cpu")


def test_kimi_k2_with_nvfp4_experts(kimi: Path, rows: Path, tmp_path: Path) -> None:
    """INT4 experts can become NVFP4, calibrated on the values of their codes; shapes in I32 are read too."""
    source = tmp_path / "source"
    shutil.copytree(kimi, source)
    tensors = all_tensors(source)
    rewrite(source, {n: t.int() if n.endswith("weight_shape") else t for n, t in tensors.items()})
    quantize(source, "nvfp4-moe", output_dir=tmp_path / "out", dataset=[rows], device="cpu", min_tokens_per_expert=0)
    group = group_of(tmp_path / "out", "model.layers.1.mlp.experts.3.down_proj")
    assert group.format == "nvfp4-pack-quantized"
    keep = recipe_file(tmp_path, "role: attention, format: fp8-dynamic", "role: linear, format: keep")
    quantize(source, keep, output_dir=tmp_path / "kept", device="cpu")
    module = "model.layers.1.mlp.experts.3.down_proj"
    assert same_bytes(all_tensors(tmp_path / "kept")[f"{module}.weight_shape"], tensors[f"{module}.weight_shape"].int())


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_takes_it_for_a_source(kind: Kind, packed: Callable[[Kind], Path]) -> None:
    """`inspect`, `fit` and a dry run agree that these are sources."""
    source = packed(kind)
    found = inspect(source)
    parts = [part for part in found.parts if part.part in ("attention", "mlp")]
    assert all("fp8-block" in part.can_be and not part.stays for part in parts)
    assert found.problems == ()
    assert not [remark for remark in found.remarks if "refuses" in remark]
    assert [row.problem for row in fit(source, "24GiB", recipes=["fp8-int4"]).rows] == [None, None]
    assert plan_quantization(source, "fp8-int4").bytes > 0


def test_fused_linears_under_several_global_scales(packed: Callable[[Kind], Path], tmp_path: Path) -> None:
    """Copied NVFP4 whose fused linears have several global scales is refused: vLLM runs them under one."""
    source = tmp_path / "source"
    shutil.copytree(packed("modelopt-nvfp4"), source)
    tensors = all_tensors(source)
    tensors[f"{Q_PROJ}.weight_scale_2"] = tensors[f"{Q_PROJ}.weight_scale_2"] * 1.5
    rewrite(source, tensors)
    rules = "role: mlp, format: fp8-dynamic", "role: linear, format: keep"
    with raises("scale-invalid", where="rules[1]"):
        plan_quantization(source, recipe_file(tmp_path, *rules))
    again = "role: attention, format: fp8-dynamic, requantize: true"
    assert plan_quantization(source, recipe_file(tmp_path, rules[0], again)).bytes > 0


def test_scales_of_inputs_that_are_left_out_may_differ(packed: Callable[[Kind], Path], tmp_path: Path) -> None:
    """Fused linears under several scales of inputs are refused with 4-bit inputs, and copied with inputs in 16 bits."""
    source = tmp_path / "source"
    shutil.copytree(packed("modelopt-nvfp4"), source)
    tensors = all_tensors(source)
    tensors[f"{Q_PROJ}.input_scale"] = tensors[f"{Q_PROJ}.input_scale"] * 1.5
    rewrite(source, tensors)
    mlp = "role: mlp, format: fp8-dynamic"
    with raises("scale-invalid", where="rules[1]") as caught:
        plan_quantization(source, recipe_file(tmp_path, mlp, "role: linear, format: keep"))
    assert "input_scale" in caught.value.what
    for rule in ("role: linear, format: keep, requantize: true", "role: linear, format: nvfp4a16"):
        assert plan_quantization(source, recipe_file(tmp_path, mlp, rule)).bytes > 0


@pytest.mark.parametrize(
    ("kind", "suffix", "change", "code"),
    [
        ("ct-int4", "weight_scale", lambda t: t[:, :-1].contiguous(), "scale-invalid"),
        ("ct-nvfp4", "weight_scale", lambda t: t.view(torch.uint8), "scale-invalid"),
        ("modelopt-nvfp4", "weight_scale_2", None, "quantization-invalid"),
        ("modelopt-fp8", "input_scale", None, "quantization-invalid"),
        ("ct-int4", "weight_packed", None, "weights-missing"),
        ("ct-int4", "weight_shape", lambda t: t.reshape(1, 2), "scale-invalid"),
        ("ct-int4-asym", "weight_zero_point", lambda t: t.t().contiguous(), "scale-invalid"),
        ("ct-nvfp4", "weight_global_scale", lambda t: t.repeat(2), "scale-invalid"),
    ],
)
def test_damaged_sources(
    kind: Kind, suffix: str, change: Any, code: str, packed: Callable[[Kind], Path], tmp_path: Path
) -> None:
    """A part that is missing or does not fit the codes is refused with its name."""
    source = tmp_path / "source"
    shutil.copytree(packed(kind), source)
    tensors = all_tensors(source)
    name = f"{O_PROJ}.{suffix}"
    tensor = tensors.pop(name)
    rewrite(source, tensors | ({} if change is None else {name: change(tensor)}))
    with raises(code) as caught:
        plan_of(source, "fp8-int4")
    assert O_PROJ in str(caught.value)


def test_an_order_of_groups_is_refused(packed: Callable[[Kind], Path], tmp_path: Path) -> None:
    """INT4 whose groups have an order of their own (weight_g_idx) is not started from."""
    source = tmp_path / "source"
    shutil.copytree(packed("ct-int4"), source)
    tensors = all_tensors(source)
    rewrite(source, tensors | {f"{O_PROJ}.weight_g_idx": torch.arange(128, dtype=torch.int32) // 32})
    with raises("already-quantized", where=source) as caught:
        plan_of(source, "fp8-int4")
    assert "weight_g_idx" in str(caught.value)


@pytest.mark.parametrize("stated", [[256, 136], [255, 128], [128, 256]])
def test_a_stated_shape_of_other_codes(stated: list[int], packed: Callable[[Kind], Path], tmp_path: Path) -> None:
    """A `weight_shape` that is not that of the codes is refused by its module's name, not met as a traceback."""
    source = tmp_path / "source"
    shutil.copytree(packed("ct-int4"), source)
    tensors = all_tensors(source)
    rewrite(source, tensors | {f"{Q_PROJ}.weight_shape": torch.tensor(stated)})
    with raises("quantization-invalid") as caught:
        quantize(source, "fp8-dynamic", output_dir=tmp_path / "out", device="cpu")
    assert Q_PROJ in caught.value.what
