"""No false alarm: files of every recipe and of other tools are sound to `doctor`, values and base included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import MakeTiny
from helpers import fp8_sources, packed_sources
from helpers.sparse_models import write_sparse_model
from helpers.tiny_families import make_vision_language, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from helpers.tiny_tokenizer import add_tokenizer
from inspection.test_inspect import LLAMA, STORED, llama
from snugfit.inspection.doctor import doctor
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import builtin_names

# recipes that choose by measurement write the same layouts as those whose name states their rule
RECIPES = [name for name in builtin_names() if name.endswith(("absmax", "four-over-six", "fp8kv")) or "fp8-" in name]
# faults that say what a release lacks, or what nobody can change any more
EXPECTED_NOTES = frozenset({"prediction-lost", "kv-scale-undeclared", "expert-scales-unread", "experts-not-stacked"})
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of token ids to calibrate on."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([24] * 2, stop=59))


@pytest.fixture(scope="module")
def dense(make_tiny: MakeTiny) -> Path:
    """A tiny llama with a tokenizer."""
    return add_tokenizer(make_tiny("llama", **WIDE))


def notes(model: Path | str, **arguments: Any) -> set[str]:
    """The codes of what `doctor` finds; AssertionError for more than notes."""
    record = doctor(model, **arguments)
    assert record.verdict == "sound", [f"{f.fault}: {f.where}: {f.what}" for f in record.findings]
    assert record.exit_code == 0
    return {finding.fault for finding in record.findings}


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "moe" not in name])
def test_every_recipe_writes_a_sound_file(recipe: str, dense: Path, rows: Path, tmp_path: Path) -> None:
    """Headers, values and the comparison with the source find nothing, also once it is ready for other engines."""
    quantize(dense, recipe, output_dir=tmp_path / "out", dataset=[rows], device="cpu", effort=None)
    assert notes(tmp_path / "out", base=dense) <= {"base-folded"}


MIXTURES = [
    *((family, "nvfp4-moe-four-over-six") for family in ("mixtral", "minimax_m2", "granitemoehybrid", "qwen3_vl_moe")),
    *((family, "fp8-int4-moe-absmax") for family in ("qwen3_moe", "deepseek_v3", "glm4_moe", "olmoe")),
]


@pytest.mark.parametrize(("family", "recipe"), MIXTURES)
def test_mixtures_are_sound(family: str, recipe: str, rows: Path, tmp_path: Path) -> None:
    """Experts under each family's names, routers, shared experts, states and layers of prediction raise no alarm."""
    source = make_mixture(family, tmp_path / "source", wide=True)
    add_tokenizer(source)
    quantize(source, recipe, output_dir=tmp_path / "out", dataset=[rows], device="cpu", allow_unverified=True)
    assert notes(tmp_path / "out", base=source) <= EXPECTED_NOTES


@pytest.mark.parametrize("kind", packed_sources.KINDS)
def test_files_of_modelopt_and_compressed_tensors_are_sound(
    kind: packed_sources.Kind, dense: Path, tmp_path: Path
) -> None:
    """What the library itself packs, and ModelOpt's files by its formulas, in every format that the tests make."""
    assert notes(packed_sources.as_packed(dense, tmp_path / "out", kind), base=dense) == set()


@pytest.mark.parametrize("kind", fp8_sources.KINDS)
def test_fp8_releases_are_sound(kind: fp8_sources.Kind, dense: Path, tmp_path: Path) -> None:
    """FP8 as Hugging Face, AutoFP8, Mistral and llm-compressor release it."""
    assert notes(fp8_sources.as_fp8(dense, tmp_path / "out", kind), base=dense) == set()


@pytest.mark.parametrize("kind", ["hf-block", "ct-block"])
def test_blocks_at_the_edge_of_a_large_weight(kind: fp8_sources.Kind, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Weights of more rows than are read at once, whose last block is smaller, are compared as they are."""
    source = add_tokenizer(make_tiny("llama", **WIDE | {"intermediate_size": 1100}))
    made = fp8_sources.as_fp8(source, tmp_path / "out", kind)
    assert notes(made, base=source, engine="transformers") == set()


@pytest.mark.parametrize("kind", ["hf-block", "ct-block"])
def test_fp8_mixtures_are_sound(kind: fp8_sources.Kind, tmp_path: Path) -> None:
    """DeepSeek's FP8, layers of multi-token prediction included, and llm-compressor's of the same model."""
    source = add_tokenizer(make_mixture("deepseek_v3", tmp_path / "source", wide=True))
    assert notes(fp8_sources.as_fp8(source, tmp_path / "out", kind), base=source) == set()


def test_gpt_oss_is_sound(tmp_path: Path) -> None:
    """MXFP4 experts in 3-D blocks are a dialect of their own, which engines read."""
    source = add_tokenizer(make_mixture("gpt_oss", tmp_path / "source"))
    assert notes(fp8_sources.as_mxfp4(source, tmp_path / "out")) == set()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "mistral3"])
def test_vision_language_models_are_sound(family: str, rows: Path, tmp_path: Path) -> None:
    """Towers stay as they are, under any name, and nobody expects codes there."""
    import torch

    source = add_tokenizer(make_vision_language(tmp_path / "source", family, dtype=torch.bfloat16))
    quantize(source, "fp8-dynamic", output_dir=tmp_path / "out", dataset=[rows], device="cpu")
    assert notes(tmp_path / "out", base=source) == set()


@pytest.mark.parametrize("name", STORED)
def test_headers_of_every_tool_are_sound(name: str, tmp_path: Path) -> None:
    """GPTQ, AWQ, bitsandbytes, HQQ, quanto, MLX: what has no reader is said to be unchecked, and no fault."""
    pack, quantization, *_, read = STORED[name]
    key = "quantization" if name == "mlx" else "quantization_config"
    config = LLAMA | ({key: quantization} if quantization else {})
    model = add_tokenizer(write_sparse_model(tmp_path / "model", config, llama(pack)))
    record = doctor(model)
    assert {finding.fault for finding in record.findings} == set()
    assert any("reader" in what for what in record.not_checked) is not read


def test_a_16_bit_model_is_sound(dense: Path) -> None:
    """Also against itself."""
    assert notes(dense, base=dense, values="all") == set()
