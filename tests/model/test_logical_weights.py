"""Single experts of files that stack them: names, values, biases and bytes, and stacks that stay whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.errors import raises
from helpers.fp8_sources import as_mxfp4, dequantized
from helpers.plans import plan_of
from helpers.tiny_families import all_tensors, load, random_rows, same, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.evaluation.evaluated_model import open_model, pass_layers
from snugfit.model.assemble import pieces_of, read_single
from snugfit.model.layout import read_layout
from snugfit.model.logical_weights import stacked_weights
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import parse_recipe

STACKED = ["granitemoe", "granitemoehybrid", "gpt_oss", "gpt_oss mxfp4", "qwen3_vl_moe"]
ONE_BY_ONE = ["mixtral", "qwen3_moe", "minimax_m2", "deepseek_v3", "nemotron_h"]
every_stacked = pytest.mark.parametrize("kind", STACKED)
CPU = torch.device("cpu")
Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Gives a tiny mixture of a kind, made once; "gpt_oss mxfp4" as it is released."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            family, _, packed = kind.partition(" ")
            folder = tmp_path_factory.mktemp(family)
            made[kind] = make_mixture(family, folder / "model", seed=3)
            if packed:
                made[kind] = as_mxfp4(made[kind], folder / "packed")
        return made[kind]

    return make


def singles_of(kind: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name of a single expert's tensor, its values), as the family's code in transformers uses its stacks."""
    for name, whole in tensors.items():
        if ".shared_mlp." in name:
            continue
        if name.endswith(".input_linear.weight"):  # [E, 2 I, H]: linear(x, w[e]).chunk(2)
            parent = name.removesuffix(".input_linear.weight")
            for expert, both in enumerate(whole):
                half = len(both) // 2
                yield f"{parent}.experts.{expert}.gate_proj.weight", both[:half]
                yield f"{parent}.experts.{expert}.up_proj.weight", both[half:]
        elif name.endswith(".output_linear.weight"):
            for expert, weight in enumerate(whole):
                yield f"{name.removesuffix('.output_linear.weight')}.experts.{expert}.down_proj.weight", weight
        elif ".experts." in name:
            parent, _, leaf = name.rpartition(".")
            suffix = "bias" if leaf.endswith("_bias") else "weight"
            leaf = leaf.removesuffix("_bias")
            for expert, one in enumerate(whole):
                turned = one.t() if one.dim() == 2 else one  # [E, in, out]: x @ w[e]
                if leaf == "down_proj":
                    yield f"{parent}.{expert}.down_proj.{suffix}", turned
                    continue
                half = len(turned) // 2
                alternate = kind.startswith("gpt_oss")
                gate, up = (turned[0::2], turned[1::2]) if alternate else (turned[:half], turned[half:])
                yield f"{parent}.{expert}.gate_proj.{suffix}", gate
                yield f"{parent}.{expert}.up_proj.{suffix}", up


@every_stacked
def test_single_experts_are_slices_of_the_stacks(kind: str, sources: Sources) -> None:
    """Every expert's weights and biases have the names that engines ask for, and the values that the stack has."""
    path = sources(kind)
    layout = read_layout(path)
    found, given = layout.weights, all_tensors(path)
    expected = dict(singles_of(kind, dequantized(path) if "mxfp4" in kind else given))
    assert len(expected) >= 2 * 4 * 3
    assert expected.keys() == found.origins.keys()
    assert any(name.endswith(".bias") for name in expected) == kind.startswith("gpt_oss")
    alone = stacked_weights(layout.checkpoint, layout.dialect)
    assert alone.tensors.keys() == expected.keys()
    for name, meant in expected.items():
        assert found.tensors[name].shape == tuple(meant.shape)
        assert found.tensors[name].dtype == "BF16"
        for weights in (found, alone):
            read = read_single(weights, name)
            assert read.dtype == torch.bfloat16
            assert torch.equal(read.float(), meant.float()), name
    assert sorted(stack for stack, names in found.stacked.items() for _ in names) == sorted(
        pieces_of(found, name)[0][0] for name in expected
    )


@every_stacked
def test_other_tensors_are_those_of_the_file(kind: str, sources: Sources) -> None:
    """Tensors that are not stacks of experts keep names and headers; none is lost or twice."""
    layout = read_layout(sources(kind))
    checkpoint, found = layout.checkpoint, layout.weights
    others = {name: info for name, info in found.tensors.items() if name not in found.origins}
    behind = {part for name in found.origins for part in found.parts(name)}
    assert behind.isdisjoint(others)
    assert behind | others.keys() == checkpoint.tensors.keys()
    for name, info in others.items():
        assert (info.dtype, info.shape) == (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
        assert found.parts(name) == (name,)


@pytest.mark.parametrize("kind", [*STACKED, *ONE_BY_ONE])
def test_bytes_add_up(kind: str, sources: Sources) -> None:
    """The bytes of all logical weights, stacked or not, add up to those of the file, codes and scales included."""
    layout = read_layout(sources(kind))
    checkpoint, found = layout.checkpoint, layout.weights
    file = sum(tensor.bytes for tensor in checkpoint.tensors.values())
    assert sum(found.file_bytes(name) for name in found.tensors) == file
    restacked = found.restack_unquantized(lambda _: False)
    # MXFP4 codes that stay stacked are copied together with their scales, under both names
    packed = sum(checkpoint.tensors[name].bytes for name in checkpoint.tensors if name.endswith("_scales"))
    assert sum(restacked.file_bytes(name) for name in restacked.tensors) in (file, file - packed)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_single_experts_of_the_file(kind: str, sources: Sources) -> None:
    """The logical weights of a file with single experts are the tensors of the file."""
    layout = read_layout(sources(kind))
    checkpoint, found = layout.checkpoint, layout.weights
    assert not found.origins
    assert not found.stacked
    assert list(found.tensors) == list(checkpoint.tensors)
    assert not stacked_weights(checkpoint, layout.dialect).tensors


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss", "qwen3_vl_moe"])
def test_layers_without_quantized_experts_stay_stacked(kind: str, sources: Sources) -> None:
    """If one expert's weight of a layer is quantized, all stacks of this layer are split; those of others stay."""
    layout = read_layout(sources(kind))
    checkpoint, found = layout.checkpoint, layout.weights
    kept = found.restack_unquantized(lambda _: False)
    assert set(kept.tensors) == set(checkpoint.tensors)
    assert not kept.origins
    some = found.restack_unquantized(lambda name: ".layers.1." in name and name.endswith("experts.2.down_proj.weight"))
    assert any(".layers.1." in name for name in some.stacked)
    assert not [name for name in some.stacked if ".layers.0." in name]
    for name, info in some.tensors.items():
        if ".layers.1." in name:
            assert found.tensors[name] == info
            assert some.origins.get(name) == found.origins.get(name)
        else:
            assert name in checkpoint.tensors
            assert info.shape == checkpoint.tensors[name].shape
    assert {name for name in found.tensors if ".layers.1." in name} == {n for n in some.tensors if ".layers.1." in n}
    assert found.restack_unquantized(lambda _: True) is found


def recipe(*rules: str) -> Any:
    return parse_recipe("name: a\nrules:\n" + "".join(f"- {{{rule}}}\n" for rule in rules), where="a.yaml")


EVERY_16_BIT = ["granitemoe", "granitemoehybrid", "gpt_oss", "qwen3_vl_moe"]
KEPT = recipe("role: experts, format: keep", "role: linear, format: fp8-dynamic")


@pytest.mark.parametrize("kind", EVERY_16_BIT)
def test_kept_stacks_are_copied(kind: str, sources: Sources, tmp_path: Path) -> None:
    """If experts are kept, the output has the stacks byte for byte, and no single expert."""
    path, out = sources(kind), tmp_path / "out"
    quantize(path, KEPT, output_dir=out, device="cpu")
    given, written = all_tensors(path), all_tensors(out)
    found = read_layout(path).weights
    stacks = {part for name in found.origins for part in found.parts(name)}
    assert len(stacks) >= 4
    for name in stacks:
        assert same(written[name], given[name])
    assert {name.removesuffix("_scale") if name.endswith("weight_scale") else name for name in written} == set(given)


def test_kept_mxfp4_is_written_one_by_one(sources: Sources, tmp_path: Path) -> None:
    """Kept codes, scales and biases of gpt-oss are written for each expert, unchanged."""
    path, out = sources("gpt_oss mxfp4"), tmp_path / "out"
    quantize(path, KEPT, output_dir=out, device="cpu", allow_unverified=True)
    given, written = all_tensors(path), all_tensors(out)
    biases = {name: tensor for name, tensor in given.items() if name.endswith("_bias")}
    for layer in (0, 1):
        parent = f"model.layers.{layer}.mlp.experts"
        for stack, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            blocks, scales = given[f"{parent}.{stack}_blocks"], given[f"{parent}.{stack}_scales"]
            for expert in range(4):
                for number, leaf in enumerate(leaves):
                    rows, name = slice(number, None, len(leaves)), f"{parent}.{expert}.{leaf}"
                    assert same(written[f"{name}.weight_packed"], blocks[expert, rows].flatten(1))
                    assert same(written[f"{name}.weight_scale"], scales[expert, rows])
    for name, meant in singles_of("gpt_oss", biases):
        assert same(written[name], meant)
    assert not [name for name in written if name.endswith(("_blocks", "_scales", "_bias"))]


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss", "qwen3_vl_moe"])
def test_kept_stacks_run_in_calibration(kind: str, sources: Sources, tmp_path: Path) -> None:
    """Kept experts run behind calibrated attention, and are copied."""
    path, out = sources(kind), tmp_path / "out"
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([40] * 6))
    asked = recipe("role: experts, format: keep", "role: attention, format: nvfp4, scale_rule: four-over-six")
    quantize(path, asked, output_dir=out, dataset=[rows], device="cpu", allow_unverified=True)
    given, written = all_tensors(path), all_tensors(out)
    kept = [name for name in given if name in written]
    assert all(same(written[name], given[name]) for name in kept)
    assert {name for name in given if "self_attn" not in name} <= set(kept)


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss"])
@torch.no_grad()
def test_transformers_loads_kept_stacks(kind: str, sources: Sources, tmp_path: Path) -> None:
    """transformers loads the same stacks from a file whose other linears are FP8 as from the source."""
    path, out = sources(kind), tmp_path / "out"
    quantize(path, KEPT, output_dir=out, device="cpu")
    model, source = load(out), load(path)
    written, given = dict(model.named_parameters()), dict(source.named_parameters())
    stacks = [name for name, tensor in given.items() if ".experts." in name and tensor.dim() == 3]
    assert len(stacks) == 4
    assert all(same(written[name], given[name]) for name in stacks)
    ids = torch.tensor(random_rows([24, 24]))
    assert torch.isfinite(model(input_ids=ids, use_cache=False).logits).all()


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss", "qwen3_vl_moe"])
@torch.no_grad()
def test_layers_may_differ(kind: str, sources: Sources, tmp_path: Path) -> None:
    """A file with single experts in FP8 in one layer, and a stack in the other, is read as one model."""
    path, out = sources(kind), tmp_path / "out"
    asked = recipe("role: experts, layers: 1, format: fp8-dynamic", "role: linear, format: keep")
    quantize(path, asked, output_dir=out, device="cpu", allow_unverified=True)
    given, written = all_tensors(path), all_tensors(out)
    rebuilt = dict(given)
    for name, whole in given.items():
        if ".layers.1." not in name:
            assert same(written[name], whole)
            continue
        expected = dict(singles_of(kind, {name: whole}))
        for single, meant in expected.items():
            if single.endswith(".bias"):
                assert same(written[single], meant.contiguous())
                continue
            scale = written[f"{single}_scale"]
            values = written[single].float() * scale.float()
            step = torch.maximum(meant.float().abs() * 2.0**-4, scale.float() * 2.0**-10)
            clipped = scale.float() * 448 * 2.0**-8  # what a scale rounded to bf16 clips
            assert ((values - meant.float()).abs() <= torch.maximum(step, clipped)).all()
            written[single] = values.bfloat16()
            meant.copy_(values.bfloat16())  # a view of the stack
        assert name not in written if expected else same(written[name], whole)
    reference = tmp_path / "reference"
    rewrite(make_copy(path, reference), {name: tensor.float() for name, tensor in rebuilt.items()})
    # both compute in fp32 on the same bf16 values
    rows = random_rows([24, 24], seed=5)
    both = []
    for model in (out, reference):
        evaluated = open_model(model, activations="none", arithmetic=torch.float32)
        both.append([batch.hidden for batch in pass_layers(evaluated, rows, CPU, tokens_per_batch=4096)])
    close = [torch.allclose(a, b, atol=2e-2, rtol=2e-2) for a, b in zip(*both, strict=True)]
    assert all(close)


def make_copy(path: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((path / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["gpt_oss", "gpt_oss mxfp4"])
def test_experts_that_no_tested_engine_loads(kind: str, sources: Sources, tmp_path: Path) -> None:
    """Experts of gpt-oss in NVFP4 need `allow_unverified`; the remedy also names `format: keep` if that helps."""
    asked = recipe("role: experts, format: nvfp4, scale_rule: four-over-six", "role: linear, format: keep")
    with raises("format-unverified", where=sources(kind) / "config.json") as caught:
        quantize(sources(kind), asked, output_dir=tmp_path / "out", device="cpu")
    assert {"gpt_oss", "nvfp4"} <= set(re.split(r"[\s:]+", caught.value.what))
    assert ("format: keep" in caught.value.remedy) == (kind == "gpt_oss")
    assert "`allow_unverified`" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    assert plan_of(sources(kind), asked).unverified
    assert bool(plan_of(sources(kind), KEPT).unverified) == (kind != "gpt_oss")


def edited(path: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = all_tensors(path)
    change(tensors)
    rewrite(make_copy(path, folder), tensors)
    return folder


def test_blocks_without_scales_are_refused(sources: Sources, tmp_path: Path) -> None:
    """MXFP4 codes whose scales are missing or have another shape are refused with the name of the scales."""
    name = "model.layers.1.mlp.experts.down_proj_scales"

    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:, :-1]

    for change in (lose, shorten):
        damaged = edited(sources("gpt_oss mxfp4"), tmp_path / change.__name__, change)
        with raises("weights-missing", where=damaged) as caught:
            read_layout(damaged).check_quantizable()
        assert name in caught.value.what


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss", "gpt_oss mxfp4", "qwen3_vl_moe"])
@pytest.mark.parametrize("count", [3, 9], ids=["more in the file", "fewer in the file"])
def test_stacks_of_another_count_are_refused(kind: str, count: int, sources: Sources, tmp_path: Path) -> None:
    """Stacks with another number of experts than the config states are refused on headers alone."""
    path = make_copy(sources(kind), tmp_path / "model")
    rewrite(path, all_tensors(sources(kind)))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    key = next(key for key in ("num_local_experts", "num_experts") if key in text)
    text[key] = count
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with raises("config-mismatch" if count == 3 else "weights-missing", where=path) as caught:
        plan_of(path, "fp8-dynamic")
    assert f"{count} experts" in caught.value.what


UP1 = "model.layers.1.block_sparse_moe.input_linear.weight"


def test_a_nan_in_one_expert_is_refused(sources: Sources, tmp_path: Path) -> None:
    """NaN in one expert of a stack is found when this expert is read alone, and no output appears."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[UP1][3, 5, 7] = float("nan")

    model = edited(sources("granitemoe"), tmp_path / "model", spoil)
    with raises("tensor-not-finite", where=model) as caught:
        quantize(model, "fp8-int4-moe-absmax", output_dir=tmp_path / "out", device="cpu")
    assert UP1 in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_odd_out_features_of_gate_and_up_are_refused(sources: Sources, tmp_path: Path) -> None:
    """A stack of gate and up with an odd number of out_features is refused, not cut."""

    def lengthen(tensors: dict[str, Tensor]) -> None:
        tensors[UP1] = torch.cat((tensors[UP1], tensors[UP1][:, :1]), 1)

    model = edited(sources("granitemoe"), tmp_path / "model", lengthen)
    with raises("config-mismatch", where=model) as caught:
        quantize(model, "fp8-int4-moe-absmax", output_dir=tmp_path / "out", device="cpu")
    assert UP1 in caught.value.what


def test_an_expert_that_is_stored_twice_is_refused(sources: Sources, tmp_path: Path) -> None:
    """A weight that is in a stack and also a tensor of its own is refused: one of them would be lost."""
    name = "model.layers.1.block_sparse_moe.experts.0.gate_proj.weight"

    def double(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(128, 64, dtype=torch.bfloat16)

    model = edited(sources("granitemoe"), tmp_path / "model", double)
    with raises("tensor-duplicate", where=model) as caught:
        quantize(model, "fp8-int4-moe-absmax", output_dir=tmp_path / "out", device="cpu")
    assert name in caught.value.what


def test_the_remedy_for_kept_mxfp4_experts(sources: Sources, tmp_path: Path) -> None:
    """If experts in MXFP4 are kept already, the remedy does not say to keep them."""
    with raises("format-unverified") as caught:
        quantize(sources("gpt_oss mxfp4"), KEPT, output_dir=tmp_path / "out", device="cpu")
    assert "format: keep" not in caught.value.remedy
