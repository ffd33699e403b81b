"""FP8 and MXFP4 checkpoints as sources: kept codes are copied bit for bit, new codes are made of dequantized values.

The sources and their dequantized values are made with plain torch (`fp8_sources.py`); the results are read with
safetensors, and config groups with compressed-tensors' own classes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from torch import Tensor

from conftest import MakeTiny
from helpers.errors import raises
from helpers.fp8_sources import KINDS, Kind, as_fp8, as_mxfp4, dequantized
from helpers.plans import plan_of
from helpers.sweeps import thinned
from helpers.tiny_families import all_tensors, random_rows, same, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.evaluation.evaluated_model import open_head, open_model, resident_layer
from snugfit.model import forward_pass, layers
from snugfit.quantization.quantize import quantize
from snugfit.records.quantize import QuantizeRecord

CPU = torch.device("cpu")
FAMILIES = ("llama", "mixtral", "deepseek_v3")
# every way to store FP8 in the family with the most kinds of weights, both dialects in the others; `make slow` has all
PAIRS = thinned(lambda family, kind: family == "deepseek_v3" or kind in ("hf-block", "ct-channel"), FAMILIES, KINDS)
# family -> a recipe that makes its MLP or its experts NVFP4, and leaves all else in FP8
RECIPES = {
    "llama": "nvfp4-fp8-hybrid-four-over-six",
    "mixtral": "nvfp4-moe-four-over-six",
    "deepseek_v3": "nvfp4-moe-four-over-six",
}
SOURCE_SUFFIXES = ("weight_scale_inv", "activation_scale", "_blocks", "_scales")
LAYER0 = "model.layers.0.self_attn"
EXPERT = "model.layers.1.mlp.experts.3.down_proj"
PREDICTED = "model.layers.2.self_attn"  # of the multi-token prediction layer
Change = Callable[[dict[str, Tensor]], object]


@dataclass(frozen=True)
class Made:
    """An FP8 source and what a recipe made of it."""

    source: Path
    out: Path
    record: QuantizeRecord

    @property
    def given(self) -> dict[str, Tensor]:
        """Tensors of the source."""
        return all_tensors(self.source)

    @property
    def written(self) -> dict[str, Tensor]:
        """Tensors of the result."""
        return all_tensors(self.out)

    @property
    def quantization(self) -> dict[str, Any]:
        """The result's quantization_config."""
        return quantization_of(self.out)


def quantization_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of three rows of 16 token ids."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([16] * 3))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, make_tiny: MakeTiny) -> Callable[[str], Path]:
    """The 16-bit model of a family, its dimensions multiples of 128."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made and family == "llama":
            sizes = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 2}
            made[family] = make_tiny("llama", **sizes)
        elif family not in made:
            made[family] = make_mixture(family, tmp_path_factory.mktemp(family), wide=True)
        return made[family]

    return get


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory, wide: Callable[[str], Path]) -> Callable[[str, Kind], Path]:
    """The same in FP8 of a kind."""
    made: dict[tuple[str, Kind], Path] = {}

    def get(family: str, kind: Kind) -> Path:
        if (family, kind) not in made:
            made[family, kind] = as_fp8(wide(family), tmp_path_factory.mktemp(f"{family}-{kind}") / "fp8", kind)
        return made[family, kind]

    return get


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, fp8: Callable[[str, Kind], Path], rows: Path
) -> Callable[[str, Kind], Made]:
    """The family's quantized model, made once for all tests."""
    made: dict[tuple[str, Kind], Made] = {}

    def get(family: str, kind: Kind) -> Made:
        if (family, kind) not in made:
            out = tmp_path_factory.mktemp("out") / "out"
            source = fp8(family, kind)
            made[family, kind] = Made(source, out, run(source, out, RECIPES[family], rows))
        return made[family, kind]

    return get


def run(source: Path, out: Path, recipe: str | Path, rows: Path, **more: Any) -> QuantizeRecord:
    """Quantize with experts that may see few of the samples."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "min_tokens_per_expert": 0}
    return quantize(source, str(recipe), output_dir=out, **options, **more)


def recipe_file(folder: Path, *rules: str) -> Path:
    """A recipe with these rules."""
    file = folder / "recipe.yaml"
    file.write_text("name: mine\nrules:\n" + "".join(f"- {{{rule}}}\n" for rule in rules), encoding="utf-8")
    return file


def is_requantized(family: str, name: str) -> bool:
    """Whether the family's recipe makes this weight of the source NVFP4."""
    if name.startswith("model.layers.2."):  # transformers does not run it
        return False
    return ".mlp." in name if family == "llama" else ".experts." in name


def scale_of(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """The scale of an FP8 weight of a source."""
    return next(tensors[name] for name in (f"{module}.weight_scale", f"{module}.weight_scale_inv") if name in tensors)


def fp8_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Modules whose weight is in FP8."""
    return [name.removesuffix(".weight") for name, t in tensors.items() if name.endswith(".weight") and t.itemsize == 1]


def groups_of(quantization: Mapping[str, Any], module: str) -> list[Any]:
    """Config groups whose targets name a module, as compressed-tensors' own classes."""
    config = QuantizationConfig.model_validate(quantization)
    found = []
    for group in config.config_groups.values():
        for target in group.targets:
            pattern = target.removeprefix("re:")
            if re.match(pattern, module) if target.startswith("re:") else target == module:
                found.append(group)
    return found


def dequantized_copy(wide: Path, source: Path, target: Path) -> Path:
    """A 16-bit checkpoint with the dequantized values of an FP8 or MXFP4 one."""
    shutil.copytree(wide, target)
    meant, own = dequantized(source), all_tensors(wide)
    rewrite(target, {name: tensor.to(own[name].dtype) for name, tensor in meant.items()})
    return target


# --- codes that are kept


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_kept_fp8_is_the_sources_bit_for_bit(family: str, kind: Kind, quantized: Callable[[str, Kind], Made]) -> None:
    """Codes and scales of FP8 weights that the recipe keeps, and all 16-bit tensors, are the source's."""
    made = quantized(family, kind)
    given, written = made.given, made.written
    kept = [module for module in fp8_modules(given) if not is_requantized(family, module)]
    assert any(module.endswith(("o_proj",)) for module in kept)
    assert any(module.startswith("model.layers.2.mlp.experts.") for module in kept) == (family == "deepseek_v3")
    for module in kept:
        assert same_bytes(written[f"{module}.weight"], given[f"{module}.weight"]), module
        stored, scale = written[f"{module}.weight_scale"], scale_of(given, module)
        if kind == "hf-tensor":  # written as equal scales of all out_features: engines' experts need these
            scale = scale.expand(len(stored), 1).contiguous()
        assert same_bytes(stored.reshape(scale.shape), scale), module
        given_input = given.get(f"{module}.input_scale", given.get(f"{module}.activation_scale"))
        if given_input is None:
            assert f"{module}.input_scale" not in written
        else:
            assert written[f"{module}.input_scale"].tolist() == given_input.float().reshape(1).tolist()
    others = [name for name, tensor in given.items() if tensor.itemsize > 1 and "_scale" not in name]
    assert others
    assert all(same(written[name], given[name]) for name in others)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes, also in dtypes that torch cannot compare."""
    return same_shape(a, b) and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_config_groups_describe_what_is_written(
    family: str, kind: Kind, quantized: Callable[[str, Kind], Made]
) -> None:
    """compressed-tensors accepts the config, and each module's only group describes its scales and inputs."""
    made = quantized(family, kind)
    written, quantization = made.written, made.quantization
    config = QuantizationConfig.model_validate(quantization)
    modules = fp8_modules(written)
    for module in modules:
        (group,) = groups_of(quantization, module)
        assert group.format == "float-quantized"
        weights, inputs = group.weights, group.input_activations
        kind_of_number = weights.num_bits, str(weights.type), weights.symmetric, weights.dynamic
        assert kind_of_number == (8, "float", True, False)
        out_features, in_features = written[f"{module}.weight"].shape
        shapes: dict[object, tuple[int, ...]] = {
            QuantizationStrategy.BLOCK: (-(-out_features // 128), -(-in_features // 128)),
            QuantizationStrategy.CHANNEL: (out_features, 1),
            QuantizationStrategy.TENSOR: (1,),
        }
        assert written[f"{module}.weight_scale"].shape == shapes[weights.strategy]
        assert weights.strategy != QuantizationStrategy.BLOCK or list(weights.block_structure) == [128, 128]
        assert inputs is not None
        assert (f"{module}.input_scale" in written) == (not inputs.dynamic)
    packed = [name.removesuffix(".weight_packed") for name in written if name.endswith(".weight_packed")]
    for module in packed:
        (group,) = groups_of(quantization, module)
        assert group.format == "nvfp4-pack-quantized"
    plain = [n.removesuffix(".weight") for n, t in written.items() if t.dim() == 2 and t.dtype == torch.bfloat16]
    linears = {module for module in plain if "embed_tokens" not in module and not module.endswith("weight_scale")}
    assert set(config.ignore) == linears
    assert not [module for module in linears if groups_of(quantization, module)]
    strategies = {"tensor"} if kind.endswith(("static", "inv")) else {"block"} if "block" in kind else {"channel"}
    assert {str(groups_of(quantization, m)[0].weights.strategy) for m in modules} == strategies


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_nothing_of_the_sources_dialect_remains(
    family: str, kind: Kind, quantized: Callable[[str, Kind], Made]
) -> None:
    """No tensor has a name of the source's dialect; names, shapes and bytes agree with the plan and the record."""
    made = quantized(family, kind)
    written = made.written
    assert not [name for name in written if name.endswith(SOURCE_SUFFIXES)]
    assert made.quantization["quant_method"] == "compressed-tensors"
    plan = plan_of(made.source, RECIPES[family])
    planned = {info.name: tuple(info.shape) for infos in plan.outputs.values() for info in infos}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == planned
    total = sum(tensor.nbytes for tensor in written.values())
    assert total == plan.bytes == made.record.bytes == sum(entry.bytes for entry in made.record.tensors)
    assert made.record.source_bytes == sum(tensor.nbytes for tensor in made.given.values())
    assert sum(entry.source_bytes for entry in made.record.tensors) == made.record.source_bytes
    copied = {e.name: e for e in made.record.tensors if e.name.endswith(f"{LAYER0}.o_proj.weight")}
    assert [entry.relative_error for entry in copied.values()] == [0.0]


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_experts_are_quantized_from_dequantized_weights(
    family: str, kind: Kind, quantized: Callable[[str, Kind], Made], wide: Callable[[str], Path], tmp_path: Path
) -> None:
    """NVFP4 and INT4 weights are byte for byte those of a BF16 checkpoint with the dequantized values."""
    made = quantized(family, kind)
    plain = dequantized_copy(wide(family), made.source, tmp_path / "plain")
    role = "mlp" if family == "llama" else "experts"
    # weights alone: inputs depend on the format of attention, which differs
    nvfp4 = recipe_file(
        tmp_path, f"role: {role}, format: nvfp4a16, scale_rule: four-over-six", "role: linear, format: keep"
    )
    quantize(plain, str(nvfp4), output_dir=tmp_path / "nvfp4", device="cpu")
    written, expected = made.written, all_tensors(tmp_path / "nvfp4")
    parts = [n for n in expected if n.endswith((".weight_packed", ".weight_scale", ".weight_global_scale"))]
    assert len(parts) == 3 * len([n for n in written if n.endswith(".weight_packed")]) >= 3 * 6
    assert all(same_bytes(written[name], expected[name]) for name in parts)
    int4 = "fp8-int4-absmax" if family == "llama" else "fp8-int4-moe-absmax"
    for path in (made.source, plain):
        quantize(path, int4, output_dir=tmp_path / f"int4-{path.name}", device="cpu")
    from_fp8, from_bf16 = (all_tensors(tmp_path / f"int4-{path.name}") for path in (made.source, plain))
    modules = [name.removesuffix("_packed") for name in from_bf16 if name.endswith(".weight_packed")]
    assert modules
    for name in (f"{module}{part}" for module in modules for part in ("_packed", "_scale", "_shape")):
        assert same_bytes(from_fp8[name], from_bf16[name]), name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_whole_recipe_on_a_dequantized_copy(
    family: str, quantized: Callable[[str, Kind], Made], wide: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    """The same recipe on the dequantized checkpoint gives the same experts, with nearly the same input scales."""
    made = quantized(family, "hf-block")
    run(dequantized_copy(wide(family), made.source, tmp_path / "plain"), tmp_path / "out", RECIPES[family], rows)
    written, expected = made.written, all_tensors(tmp_path / "out")
    names = [n for n in expected if ".experts." in n and not n.startswith("model.layers.2.")]
    assert {n for n in written if ".experts." in n and not n.startswith("model.layers.2.")} == set(names)
    for name in names:
        if name.endswith("input_global_scale"):  # attention is in other formats, and its outputs differ
            assert float(written[name]) == pytest.approx(float(expected[name]), rel=0.15)
        else:
            assert same_bytes(written[name], expected[name]), name


@pytest.mark.parametrize(("family", "kind"), PAIRS)
@torch.no_grad()
def test_kept_layers_compute_the_same(
    family: str, kind: Kind, fp8: Callable[[str, Kind], Path], tmp_path: Path
) -> None:
    """Hidden states behind a kept layer are those of the source bit for bit, as evaluation reads both."""
    source = fp8(family, kind)
    recipe = recipe_file(
        tmp_path, "role: mlp, layers: -1, format: nvfp4a16, scale_rule: four-over-six", "role: linear, format: keep"
    )
    quantize(source, str(recipe), output_dir=tmp_path / "out", device="cpu")
    given, written = all_tensors(source), all_tensors(tmp_path / "out")
    for module in fp8_modules(given):
        if module.startswith("model.layers.0."):
            assert same_bytes(written[f"{module}.weight"], given[f"{module}.weight"])
    logits = [logits_after(path, 0) for path in (source, tmp_path / "out")]
    spread = float(logits[0].float().std())
    assert spread > 0.01
    if kind == "hf-tensor":  # engines give fused members of the source one scale, and round their codes once more
        assert 0 < float((logits[0] - logits[1]).float().square().mean().sqrt()) < 0.2 * spread
    else:
        assert torch.equal(*logits)


def logits_after(path: Path, last: int) -> Tensor:
    """Logits [2, 24, V] of two samples, as if layer `last` were the model's last one."""
    evaluated = open_model(path)
    batches = forward_pass.make_batches(random_rows([24, 24], seed=5), 4096, CPU)
    forward_pass.embed(
        evaluated.skeleton, layers.outer_weights(evaluated.skeleton, evaluated.checkpoint, head=False), batches, CPU
    )
    for index in range(last + 1):
        layer, cache = resident_layer(evaluated, index, CPU)
        forward_pass.run_layer(layer, index, batches, cache=cache)
    return open_head(evaluated, CPU)(torch.cat([batch.hidden for batch in batches]))


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_compressed_tensors_reads_kept_weights(family: str, kind: Kind, quantized: Callable[[str, Kind], Made]) -> None:
    """With the config's scheme the library's compressor gives each kept weight the values of the source."""
    made = quantized(family, kind)
    written, meant, quantization = made.written, dequantized(made.source), made.quantization
    for module in fp8_modules(written):
        (group,) = groups_of(quantization, module)
        parts = {part: written[f"{module}.{part}"] for part in ("weight", "weight_scale")}
        read = BaseCompressor.get_value_from_registry(group.format).decompress(parts, group)["weight"]
        assert torch.equal(read, meant[f"{module}.weight"].to(read.dtype)), module


@pytest.mark.parametrize("plain", [False, True], ids=["e8m0", "bytes"])
def test_e8m0_scales_become_floats_of_the_same_value(
    plain: bool, fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """Scales that are powers of two in one byte are written in F32, as compressed-tensors has them, unchanged."""
    source = copied(fp8("deepseek_v3", "hf-block"), tmp_path, to_e8m0(plain=plain))
    run(source, tmp_path / "out", "nvfp4-moe-four-over-six", rows)
    given, written = all_tensors(source), all_tensors(tmp_path / "out")
    for module in (f"{LAYER0}.o_proj", f"{PREDICTED}.kv_b_proj", "model.layers.2.mlp.experts.5.up_proj"):
        exponents = given[f"{module}.weight_scale_inv"].view(torch.uint8).int() - 127
        scale = written[f"{module}.weight_scale"]
        assert scale.dtype == torch.float32
        assert torch.equal(scale, torch.ldexp(torch.ones(exponents.shape), exponents))
        assert same_bytes(written[f"{module}.weight"], given[f"{module}.weight"])
    assert QuantizationConfig.model_validate(quantization_of(tmp_path / "out"))
    assert sum(t.nbytes for t in written.values()) == plan_of(source, "nvfp4-moe-four-over-six").bytes


def to_e8m0(*, plain: bool = False) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("weight_scale_inv"):
                exponent = tensor.float().log2().round().add(127).to(torch.uint8)
                tensors[name] = exponent if plain else exponent.view(torch.float8_e8m0fnu)

    return change


def copied(source: Path, folder: Path, change: Change | None = None, **quantization: Any) -> Path:
    """A copy of a source, its tensors and its quantization_config changed."""
    target = folder / "source"
    shutil.copytree(source, target)
    if change is not None:
        tensors = all_tensors(target)
        change(tensors)
        rewrite(target, tensors)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_fp8_of_snugfit_is_a_source(wide: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    """FP8 that snugfit wrote can be quantized like any other: its codes and scales stay."""
    quantize(wide("mixtral"), "fp8-dynamic", output_dir=tmp_path / "fp8", device="cpu")
    run(tmp_path / "fp8", tmp_path / "out", "nvfp4-moe-four-over-six", rows)
    given, written = all_tensors(tmp_path / "fp8"), all_tensors(tmp_path / "out")
    for part in ("weight", "weight_scale"):
        assert same_bytes(written[f"{LAYER0}.q_proj.{part}"], given[f"{LAYER0}.q_proj.{part}"])
    assert any(name.endswith("experts.3.w2.weight_packed") for name in written)


# --- requantize, keep


@pytest.mark.parametrize("kind", ["hf-block", "hf-tensor-static", "ct-tensor-static"])
def test_requantize_makes_new_codes(
    kind: Kind, fp8: Callable[[str, Kind], Path], wide: Callable[[str], Path], tmp_path: Path
) -> None:
    """`requantize: true` gives the same as the dequantized weights, without the source's input scales."""
    rules = "role: mlp, format: int4, scale_rule: absmax", "role: linear, format: fp8-dynamic, requantize: true"
    recipe, source = recipe_file(tmp_path, *rules), fp8("llama", kind)
    plain = dequantized_copy(wide("llama"), source, tmp_path / "plain")
    for name, path in (("from_fp8", source), ("from_bf16", plain)):
        quantize(path, str(recipe), output_dir=tmp_path / name, device="cpu")
    from_fp8, from_bf16 = all_tensors(tmp_path / "from_fp8"), all_tensors(tmp_path / "from_bf16")
    assert from_fp8.keys() == from_bf16.keys()
    assert all(same_bytes(from_fp8[name], from_bf16[name]) for name in from_fp8)
    assert not same_bytes(from_fp8[f"{LAYER0}.q_proj.weight"], all_tensors(source)[f"{LAYER0}.q_proj.weight"])
    assert quantization_of(tmp_path / "from_fp8") == quantization_of(tmp_path / "from_bf16")


def test_keep_copies_fp8(fp8: Callable[[str, Kind], Path], tmp_path: Path) -> None:
    """`format: keep` keeps FP8 weights in FP8, with a config group; with `requantize` they become BF16."""
    source = fp8("llama", "hf-tensor-static")
    for name, more in (("kept", ""), ("wide", ", requantize: true")):
        recipe = recipe_file(
            tmp_path, "role: mlp, format: int4, scale_rule: absmax", f"role: linear, format: keep{more}"
        )
        quantize(source, str(recipe), output_dir=tmp_path / name, device="cpu")
    given, kept, wide = (all_tensors(path) for path in (source, tmp_path / "kept", tmp_path / "wide"))
    module = f"{LAYER0}.v_proj"
    assert same_bytes(kept[f"{module}.weight"], given[f"{module}.weight"])
    (group,) = groups_of(quantization_of(tmp_path / "kept"), module)
    assert group.input_activations.strategy == group.weights.strategy == QuantizationStrategy.TENSOR
    assert same(wide[f"{module}.weight"], dequantized(source)[f"{module}.weight"].bfloat16())
    assert not [name for name in wide if name.startswith(module) and "scale" in name]
    assert module in quantization_of(tmp_path / "wide")["ignore"]


# --- refusals


def refuse(code: str, *named: object, source: Path, recipe: str | Path, tmp_path: Path, rows: Path, **more: Any) -> str:
    """The message of a run that must be refused with this code, name all of `named`, and leave nothing behind."""
    before = sorted(tmp_path.iterdir())
    with raises(code) as caught:
        run(source, tmp_path / "refused", recipe, rows, **more)
    assert sorted(tmp_path.iterdir()) == before
    assert caught.value.where
    assert caught.value.remedy
    message = str(caught.value)
    assert not [word for word in named if str(word) not in message], message
    return message


def drop(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({name: value})


def spoil(name: str, value: float) -> Change:
    """One element of a tensor has another value; of FP8 codes the bits of one."""

    def change(tensors: dict[str, Tensor]) -> None:
        found = tensors[name].clone()
        if found.itemsize == 1:
            found.view(torch.uint8).view(-1)[-1] = int(value)
        else:
            found.view(-1)[-1] = value
        tensors[name] = found

    return change


def wide_partner(tensors: dict[str, Tensor]) -> None:
    """k of layer 0 in BF16."""
    tensors[f"{LAYER0}.k_proj.weight"] = tensors[f"{LAYER0}.k_proj.weight"].bfloat16()
    for suffix in ("weight_scale", "weight_scale_inv"):
        tensors.pop(f"{LAYER0}.k_proj.{suffix}", None)


def test_partners_of_different_fp8_are_refused(fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path) -> None:
    """Blocks of q beside one scale of k cannot run as one product: the message names both formats."""
    change = put(f"{LAYER0}.k_proj.weight_scale_inv", torch.full((1,), 0.001))
    # k has two blocks, else one scale would be one block
    sizes = put(f"{LAYER0}.k_proj.weight", torch.ones(128, 128).to(torch.float8_e4m3fn))

    def both(tensors: dict[str, Tensor]) -> None:
        change(tensors)
        sizes(tensors)

    source = copied(fp8("llama", "hf-block"), tmp_path, both)
    named = f"{LAYER0}.k_proj", "q_proj", "fp8-block", "fp8-dynamic", "requantize: true"
    recipe = "nvfp4-fp8-hybrid-four-over-six"
    refuse("recipe-splits-group", *named, source=source, recipe=recipe, tmp_path=tmp_path, rows=rows)


@pytest.mark.parametrize("recipe", ["nvfp4-fp8-hybrid-four-over-six", "keep"])
@pytest.mark.parametrize("kind", ["hf-block", "ct-tensor-static"])
def test_a_partner_in_16_bits_is_refused(
    kind: Kind, recipe: str, fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """q and v in FP8 beside k in BF16 need one format: the message names both, and `requantize` gives them one."""

    def change(tensors: dict[str, Tensor]) -> None:
        wide_partner(tensors)
        tensors.pop(f"{LAYER0}.k_proj.input_scale", None)

    ignore = [*quantization_of(fp8("llama", kind)).get("ignore", []), f"{LAYER0}.k_proj"]
    more = {"ignore": ignore} if kind.startswith("ct") else {}
    source = copied(fp8("llama", kind), tmp_path, change, **more)
    keep = "role: mlp, format: nvfp4, scale_rule: four-over-six", "role: linear, format: keep"
    asked = recipe_file(tmp_path, *keep) if recipe == "keep" else recipe
    named = f"{LAYER0}.", "q_proj", "k_proj", "fp8", "requantize: true"
    refuse("recipe-splits-group", *named, source=source, recipe=asked, tmp_path=tmp_path, rows=rows)
    remedy = recipe_file(
        tmp_path,
        "role: mlp, format: nvfp4, scale_rule: four-over-six",
        "role: linear, format: fp8-dynamic, requantize: true",
    )
    run(source, tmp_path / "remedied", remedy, rows)


@pytest.mark.parametrize("block", [[64, 64], [1, 128]])
def test_other_blocks_are_quantized_again(
    block: list[int], fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """Blocks that no engine runs cannot stay: an FP8 rule makes FP8 with a scale an output channel, `keep` 16 bits."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            shape = tensors[name.removesuffix("_scale_inv")].shape
            tensors[name] = torch.full([-(-side // size) for side, size in zip(shape, block, strict=True)], 0.002)

    source = copied(fp8("llama", "hf-block"), tmp_path, change, weight_block_size=block)
    codes = all_tensors(source)[f"{LAYER0}.q_proj.weight"].float()
    values = (codes * torch.tensor(0.002)).bfloat16().float()  # as a 16-bit model would have them
    run(source, tmp_path / "hybrid", "nvfp4-fp8-hybrid-four-over-six", rows)
    made = all_tensors(tmp_path / "hybrid")
    scale = made[f"{LAYER0}.q_proj.weight_scale"]
    assert scale.shape == (codes.shape[0], 1)
    assert same_bytes(scale, (values.abs().amax(dim=1, keepdim=True) / 448).bfloat16())
    kept = recipe_file(tmp_path, "role: mlp, format: nvfp4", "role: linear, format: keep")
    run(source, tmp_path / "kept", kept, rows)
    assert same_bytes(all_tensors(tmp_path / "kept")[f"{LAYER0}.q_proj.weight"], values.bfloat16())
    assert f"{LAYER0}.q_proj" in quantization_of(tmp_path / "kept")["ignore"]


@pytest.mark.parametrize("kind", ["hf-block", "hf-block-bf16", "ct-block"])
@pytest.mark.parametrize("rule", ["nvfp4-moe-four-over-six", "fp8-dynamic", "requantize"])
def test_prediction_layers_in_other_blocks_become_16_bits(
    rule: str, kind: Kind, wide: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    """Of a source in blocks of 32 x 32, a prediction layer, experts included, holds its dequantized values."""
    source = as_fp8(wide("deepseek_v3"), tmp_path / "fp8", kind, block=32)
    again = recipe_file(tmp_path, "role: linear, format: fp8-dynamic, requantize: true")
    record = run(source, tmp_path / "out", again if rule == "requantize" else rule, rows)
    values, written = dequantized(source, 32), all_tensors(tmp_path / "out")
    quantization = quantization_of(tmp_path / "out")
    labels = {tensor.name: tensor.format for tensor in record.tensors}
    predicted = [n for n, t in all_tensors(source).items() if t.dtype == torch.float8_e4m3fn and ".layers.2." in n]
    assert any(".experts." in name for name in predicted)
    for name in predicted:
        assert same_bytes(written[name], values[name].bfloat16()), name
        assert labels[name] == "dequantized"
        assert name.removesuffix(".weight") in quantization["ignore"]
    narrow = {name for name, tensor in written.items() if tensor.itemsize == 1}
    assert all(".layers.2." not in name for name in narrow)
    assert f"{LAYER0}.o_proj.weight" in narrow
    assert not any(name.endswith("weight_scale_inv") for name in written)


def test_remedies_for_other_blocks_can_be_followed(wide: Callable[[str], Path], tmp_path: Path) -> None:
    """Each refusal of a recipe for blocks of 32 x 32 beside a prediction layer goes away with what it offers."""
    source = as_fp8(wide("deepseek_v3"), tmp_path / "fp8", "hf-block", block=32)
    named, linear = 'name: "model.layers.2.*"', "role: linear, format: fp8-dynamic"
    for rule in (f"{named}, format: fp8-dynamic, requantize: true", f"{named}, format: keep"):
        with raises("recipe-not-quantizable", "rules[0]") as caught:
            plan_of(source, str(recipe_file(tmp_path, rule, linear)))
        assert caught.value.remedy == "Remove this rule."
    plan_of(source, str(recipe_file(tmp_path, linear)))
    with raises("recipe-rule-missing") as caught:
        plan_of(source, str(recipe_file(tmp_path, "role: experts, format: nvfp4")))
    assert "`format: keep`" in caught.value.remedy
    plan = plan_of(source, str(recipe_file(tmp_path, "role: experts, format: nvfp4", "role: linear, format: keep")))
    assert {a.format.name for a in plan.assignments.values() if a.format} == {"nvfp4"}
    assert any("32x32" in note for note in plan.notes)
    with raises("recipe-changes-nothing"):
        plan_of(source, str(recipe_file(tmp_path, "role: linear, format: keep")))


def test_static_inputs_under_blocks_do_not_stay(fp8: Callable[[str, Kind], Path], tmp_path: Path) -> None:
    """vLLM runs blocks under inputs that are rounded at run time alone: with static scales they are dequantized."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name.replace("weight_scale_inv", "input_scale")] = torch.full((1,), 0.01)

    source = copied(fp8("llama", "hf-block"), tmp_path, change, activation_scheme="static")
    plan = plan_of(source, str(recipe_file(tmp_path, "role: mlp, format: nvfp4", "role: linear, format: keep")))
    assert plan.assignments[f"{LAYER0}.q_proj.weight"].format is None
    assert plan.outputs[f"{LAYER0}.q_proj.weight"][0].dtype == "BF16"


@pytest.mark.parametrize("module", ["self_attn.kv_a_proj_with_mqa", "mlp.experts.3.down_proj"])
def test_prediction_layers_of_several_formats_become_16_bits(
    module: str, fp8: Callable[[str, Kind], Path], tmp_path: Path
) -> None:
    """Where a fused group or experts of a prediction layer are FP8 in part, no rule could mend it: all are 16 bits."""
    wide_one = f"model.layers.2.{module}"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{wide_one}.weight"] = tensors[f"{wide_one}.weight"].bfloat16()
        del tensors[f"{wide_one}.weight_scale_inv"]

    source = copied(fp8("deepseek_v3", "hf-block"), tmp_path, change)
    plan = plan_of(source, "nvfp4-moe-four-over-six")
    formats = {name: a.format for name, a in plan.assignments.items() if name.startswith("model.layers.2.")}
    alike = ".experts." if "experts" in module else "self_attn.q_a_proj"
    assert all((fmt is None) == (alike in name) for name, fmt in formats.items())
    assert any(alike in name for name in formats)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", [f"{LAYER0}.o_proj", EXPERT], ids=["kept", "requantized"])
def test_codes_and_scales_need_each_other(
    module: str, kind: Kind, fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """A weight without its scale, a scale without its weight, and a scale of another shape are refused by name."""
    source = fp8("deepseek_v3", kind)
    tensors = all_tensors(source)
    scale = next(n for n in (f"{module}.weight_scale", f"{module}.weight_scale_inv") if n in tensors)
    other_shape = "quantization-invalid" if kind.startswith("hf") else "scale-invalid"
    cases: list[tuple[str, str, Change]] = [
        ("weights-missing", f"{module}.weight", drop(f"{module}.weight")),
        ("quantization-invalid", scale, drop(scale)),
        (other_shape, f"{module}.", put(scale, torch.full((3, 5), 0.01))),
        (other_shape, f"{module}", put(scale, torch.full((7,), 0.01))),
    ]
    for number, (code, named, change) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged = copied(source, folder, change)
        refuse(code, named, source=damaged, recipe="nvfp4-moe-four-over-six", tmp_path=folder, rows=rows)


# name of the module -> what becomes of its weight
PLACES = {f"{LAYER0}.o_proj": "kept", f"{PREDICTED}.o_proj": "kept, not run", EXPERT: "requantized"}


@pytest.mark.parametrize("module", PLACES, ids=list(PLACES.values()))
@pytest.mark.parametrize("kind", ["hf-block", "hf-tensor-inv", "ct-channel"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scales_that_are_not_finite_are_refused(
    value: float, kind: Kind, module: str, fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """NaN or infinity among the scales of an FP8 weight is refused with the name, whatever becomes of the weight."""
    tensors = all_tensors(fp8("deepseek_v3", kind))
    scale = next(n for n in (f"{module}.weight_scale", f"{module}.weight_scale_inv") if n in tensors)
    source = copied(fp8("deepseek_v3", kind), tmp_path, spoil(scale, value))
    refuse("tensor-not-finite", scale, source=source, recipe="nvfp4-moe-four-over-six", tmp_path=tmp_path, rows=rows)


def test_e8m0_nan_is_refused(fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path) -> None:
    """The E8M0 code for NaN is refused with the tensor's name."""
    name = f"{PREDICTED}.o_proj.weight_scale_inv"

    def change(tensors: dict[str, Tensor]) -> None:
        to_e8m0()(tensors)
        spoil(name, 0xFF)(tensors)

    source = copied(fp8("deepseek_v3", "hf-block"), tmp_path, change)
    refuse("scale-invalid", name, source=source, recipe="nvfp4-moe-four-over-six", tmp_path=tmp_path, rows=rows)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_fp8_int4_awq_keeps_attention_as_it_is(
    family: str, fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """Attention and shared experts keep the source's FP8 bytes; dense MLPs and routed experts become INT4."""
    source = fp8(family, "hf-block")
    run(source, tmp_path / "out", "fp8-int4-awq", rows, effort="fast")
    given, written = all_tensors(source), all_tensors(tmp_path / "out")
    codes = {name for name, tensor in given.items() if tensor.dtype == torch.float8_e4m3fn and "layers.2" not in name}
    kept = {name for name in codes if ".self_attn." in name or ".shared_experts." in name}
    assert kept
    assert all(same_bytes(written[name], given[name]) for name in kept)
    assert {f"{name}_packed" for name in codes - kept} <= set(written)
    assert not (codes - kept) & set(written)


@pytest.mark.parametrize("module", PLACES, ids=list(PLACES.values()))
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("recipe", ["nvfp4-moe-four-over-six", "fp8-int4-moe-absmax"])
def test_codes_that_are_nan_are_refused(
    recipe: str, code: int, module: str, fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """An E4M3 code for NaN is refused with the tensor's name, in kept and requantized weights, run or not."""
    source = copied(fp8("deepseek_v3", "ct-channel"), tmp_path, spoil(f"{module}.weight", code))
    refuse("tensor-not-finite", f"{module}.weight", source=source, recipe=recipe, tmp_path=tmp_path, rows=rows)


@pytest.mark.parametrize("method", ["gptq", "fbgemm_fp8", "quark", "mxfp4", None, 7])
def test_unknown_methods_are_refused(
    method: object, fp8: Callable[[str, Kind], Path], rows: Path, tmp_path: Path
) -> None:
    """Codes of a quant_method from which no recipe can start are refused with the model and the evidence."""
    source = copied(fp8("llama", "hf-block"), tmp_path, quant_method=method)
    named = [source, repr(method) if method else "quantization_config"]
    code = "already-quantized" if method == "mxfp4" else "quantization-unknown"
    refuse(code, *named, source=source, recipe="nvfp4-fp8-hybrid-four-over-six", tmp_path=tmp_path, rows=rows)


@pytest.mark.parametrize(
    "made_by", ["nvfp4-four-over-six", "nvfp4-fp8-hybrid-four-over-six", "int4-w4a16-absmax", "mxfp4-absmax"]
)
def test_four_bits_as_their_recipe_asks_are_refused(
    made_by: str, wide: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    """A checkpoint is refused for the recipe that made it; what quantizes 4 bits again says that losses add up."""
    run(wide("llama"), tmp_path / "source", made_by, rows)
    named = tmp_path / "source", "compressed-tensors"
    message = refuse("already-quantized", *named, source=named[0], recipe=made_by, tmp_path=tmp_path, rows=rows)
    assert re.search("nvfp4|int4|mxfp4", message)
    plan = plan_of(tmp_path / "source", str(recipe_file(tmp_path, "role: linear, format: fp8-dynamic")))
    assert any("4 bits" in note for note in plan.notes)


# --- MXFP4


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny gpt-oss in BF16, and in MXFP4 as it is released."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    plain = make_mixture("gpt_oss", folder / "plain")
    return plain, as_mxfp4(plain, folder / "mxfp4")


def outputs_of_expert(tensor: Tensor, expert: int, leaf: str) -> Tensor:
    """One expert's projection out of a tensor of all experts: gate and up alternate."""
    mine = tensor[expert]
    return mine if leaf == "down_proj" else mine[{"gate_proj": 0, "up_proj": 1}[leaf] :: 2]


@pytest.mark.parametrize("rule", ["mxfp4", "keep"])
def test_mxfp4_experts_stay_bit_for_bit(rule: str, gpt_oss: tuple[Path, Path], rows: Path, tmp_path: Path) -> None:
    """Codes, exponents and biases of single experts are the source's, with gate and up separated."""
    rules = f"role: experts, format: {rule}", "role: linear, format: fp8-dynamic"
    recipe = "mxfp4-absmax" if rule == "mxfp4" else recipe_file(tmp_path, *rules)
    run(gpt_oss[1], tmp_path / "out", recipe, rows, allow_unverified=True)
    given, written = all_tensors(gpt_oss[1]), all_tensors(tmp_path / "out")
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for expert in range(4):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                stack = f"{experts}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
                module = f"{experts}.{expert}.{leaf}"
                codes = outputs_of_expert(given[f"{stack}_blocks"], expert, leaf).flatten(1)
                assert same(written[f"{module}.weight_packed"], codes)
                assert same(
                    written[f"{module}.weight_scale"], outputs_of_expert(given[f"{stack}_scales"], expert, leaf)
                )
                assert same(written[f"{module}.bias"], outputs_of_expert(given[f"{stack}_bias"], expert, leaf))
    assert not [name for name in written if name.endswith((*SOURCE_SUFFIXES, "_proj_bias"))]
    quantization = quantization_of(tmp_path / "out")
    (group,) = groups_of(quantization, "model.layers.1.mlp.experts.3.up_proj")
    assert group.format == "mxfp4-pack-quantized"
    (group,) = groups_of(quantization, f"{LAYER0}.q_proj")
    assert group.format == ("mxfp4-pack-quantized" if rule == "mxfp4" else "float-quantized")
    suffix = "weight_packed" if rule == "mxfp4" else "weight"
    assert written[f"{LAYER0}.q_proj.{suffix}"].itemsize == 1
    planned = plan_of(gpt_oss[1], str(recipe))
    assert planned.bytes == sum(tensor.nbytes for tensor in written.values())


def test_requantized_mxfp4_experts(gpt_oss: tuple[Path, Path], rows: Path, tmp_path: Path) -> None:
    """NVFP4 from MXFP4 experts is byte for byte that from their dequantized BF16 values; so is attention in FP8."""
    plain = dequantized_copy(*gpt_oss, tmp_path / "plain")
    for name, path in (("from_mxfp4", gpt_oss[1]), ("from_bf16", plain)):
        run(path, tmp_path / name, "nvfp4-moe-four-over-six", rows, allow_unverified=True)
    from_mxfp4, from_bf16 = all_tensors(tmp_path / "from_mxfp4"), all_tensors(tmp_path / "from_bf16")
    assert from_mxfp4.keys() == from_bf16.keys()
    assert len([name for name in from_mxfp4 if name.endswith(".weight_packed")]) == 2 * 4 * 3
    assert all(same_bytes(from_mxfp4[name], from_bf16[name]) for name in from_mxfp4)
    assert from_mxfp4[f"{LAYER0}.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert quantization_of(tmp_path / "from_mxfp4") == quantization_of(tmp_path / "from_bf16")


@pytest.mark.parametrize("recipe", ["mxfp4-absmax", "nvfp4-moe-four-over-six"])
def test_mxfp4_experts_need_allow_unverified(
    recipe: str, gpt_oss: tuple[Path, Path], rows: Path, tmp_path: Path
) -> None:
    """Single experts of gpt-oss, which no tested engine loads, are written only with `allow_unverified`."""
    named = "gpt_oss", "`allow_unverified`"
    refuse("format-unverified", *named, source=gpt_oss[1], recipe=recipe, tmp_path=tmp_path, rows=rows)
    assert [error.code for error in plan_of(gpt_oss[1], recipe).unverified] == ["format-unverified"]


def test_mxfp4_scales_of_another_shape_are_refused(gpt_oss: tuple[Path, Path], rows: Path, tmp_path: Path) -> None:
    """Blocks whose scales are missing or have another shape are refused with the name."""
    name = "model.layers.1.mlp.experts.down_proj"
    for number, change in enumerate(
        (drop(f"{name}_scales"), put(f"{name}_scales", torch.zeros(4, 64, 3, dtype=torch.uint8)))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged, recipe = copied(gpt_oss[1], folder, change), "nvfp4-moe-four-over-six"
        refuse("weights-missing", f"{name}_blocks", source=damaged, recipe=recipe, tmp_path=folder, rows=rows)
