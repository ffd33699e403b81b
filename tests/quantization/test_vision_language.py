"""Vision-language models: their text decoders are run, quantized and evaluated, their towers copied as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.errors import raises
from helpers.run_model import figures_of, stream_logits
from helpers.sweeps import thinned
from helpers.tiny_families import (
    VISION_LANGUAGE,
    all_tensors,
    load,
    make_vision_language,
    perplexity_of,
    random_rows,
    same,
    unpack_nvfp4_exactly,
    write_rows,
)
from snugfit.data.dataset import make_dataset
from snugfit.evaluation.continuations import continue_greedily
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import open_head, open_model, pass_layers
from snugfit.inspection.inspect import inspect
from snugfit.model.layout import read_layout
from snugfit.model.skeleton import build_skeleton
from snugfit.planning.fit import fit
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.records.statistics_file import load_statistics

CPU = torch.device("cpu")
DECODERS = {
    "qwen2_vl": "model.layers",
    "qwen2_5_vl": "model.layers",
    "qwen3_vl": "model.language_model.layers",
    "qwen3_5": "model.language_model.layers",
    "gemma4": "model.language_model.layers",
    "smolvlm": "model.text_model.layers",
    "idefics3": "model.text_model.layers",
}


def decoder_of(family: str) -> str:
    """The decoder layers' name in files of a family, as transformers writes them."""
    return DECODERS.get(family, "language_model.model.layers")


def renamed(source: Path, target: Path, names: dict[str, str]) -> Path:
    """A copy of a model directory whose tensors' names have other beginnings."""
    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in all_tensors(source).items():
        old = next((old for old in names if name.startswith(old)), "")
        tensors[names.get(old, "") + name.removeprefix(old)] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


# `make slow` has every family in both dtypes
@pytest.mark.parametrize(
    ("family", "dtype"),
    thinned(
        lambda family, dtype: dtype == torch.bfloat16 or family in ("gemma3", "qwen3_5"),
        VISION_LANGUAGE,
        (torch.float32, torch.bfloat16),
    ),
    ids=str,
)
@torch.no_grad()
def test_forward_pass_is_the_whole_models_on_text(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """On text, logits are the whole model's bit for bit, also in families with rotary positions of pictures."""
    path = make_vision_language(tmp_path / "model", family, dtype=dtype)
    model = load(path)
    evaluated = open_model(path, activations="none")
    assert evaluated.arithmetic == dtype
    assert evaluated.skeleton.stored_layers_name == decoder_of(family)
    for batch in pass_layers(evaluated, random_rows([40, 40, 70, 100, 64]), CPU, tokens_per_batch=256):
        expected = model(input_ids=batch.tokens, use_cache=False).logits
        assert torch.equal(open_head(evaluated, CPU)(batch.hidden), expected)


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_towers_are_copied(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors outside the decoder layers are copied, their linears are ignored; transformers' logits are snugfit's."""
    check_quantized(family, "nvfp4-fp8-hybrid-four-over-six", tmp_path, monkeypatch)


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4-four-over-six"])
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_other_recipes(family: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format for all linears does not apply to a tower whose linears have the same names."""
    check_quantized(family, recipe, tmp_path, monkeypatch)


def check_quantized(family: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack_nvfp4_exactly(monkeypatch)
    source, target = make_vision_language(tmp_path / "model", family), tmp_path / "out"
    rows = random_rows([48] * 6, seed=1)
    text = write_rows(tmp_path / "rows.jsonl", rows)
    record = quantize(source, recipe, output_dir=target, dataset=[text])
    before, after = all_tensors(source), all_tensors(target)
    outside = [name for name in before if not name.startswith(f"{decoder_of(family)}.")]
    assert all(same(before[name], after[name]) for name in outside)
    assert all(tensor.name not in outside for tensor in record.tensors if tensor.format != "as it was")
    ignored = set(json.loads((target / "config.json").read_text(encoding="utf-8"))["quantization_config"]["ignore"])
    matrices = {
        name for name in outside if name.endswith(".weight") and before[name].dim() == 2 and "embed" not in name
    }
    assert {name.removesuffix(".weight") for name in matrices} <= ignored
    with torch.no_grad():
        expected = load(target)(input_ids=torch.tensor(rows), use_cache=False).logits.float()
        original = load(source)(input_ids=torch.tensor(rows), use_cache=False).logits.float()
    found = torch.cat([part.float() for _, _, part in stream_logits(target, make_dataset(rows, "random"))], dim=1)
    # a value halfway between two codes may become the other one; a linear in 16 bits makes 0.05
    assert float((expected - found).abs().mean() / expected.abs().mean()) < 0.01
    reference, candidate = evaluate([target], reference=source, dataset=[text]).contexts[0].models[:2]
    assert reference.perplexity == pytest.approx(perplexity_of(original, rows), rel=1e-5)
    assert candidate.perplexity == pytest.approx(perplexity_of(found, rows), rel=1e-5)
    assert candidate.kl is not None
    assert 0 < candidate.kl.mean < 0.2


@pytest.mark.parametrize(
    ("names", "decoder"),
    [
        ({"vision_tower.": "vision_tower.vision_model."}, "language_model.model.layers"),
        (
            {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"}
            | {"vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."},
            "model.language_model.layers",
        ),
    ],
    ids=["first-releases", "transformers-4.52"],
)
@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_names_of_older_and_newer_files(
    family: str, names: dict[str, str], decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with the names of other releases are quantized to the same bytes."""
    unpack_nvfp4_exactly(monkeypatch)
    plain = make_vision_language(tmp_path / "plain", family)
    other = renamed(plain, tmp_path / "other", names)
    assert build_skeleton(read_layout(other)).stored_layers_name == decoder
    rows = random_rows([32, 32])
    assert figures_of(other, make_dataset(rows, "")).perplexity == figures_of(plain, make_dataset(rows, "")).perplexity
    text = write_rows(tmp_path / "rows.jsonl", rows)
    for path in (plain, other):
        quantize(path, "nvfp4-four-over-six", output_dir=path.with_suffix(".out"), dataset=[text])
    first, second = all_tensors(tmp_path / "plain.out"), all_tensors(tmp_path / "other.out")
    inside = {name.removeprefix("language_model.model.layers."): name for name in first if ".model.layers." in name}
    assert len(inside) == len([name for name in second if name.startswith(decoder)])
    assert all(same(first[name], second[f"{decoder}.{inner}"]) for inner, name in inside.items())
    outside = {name for name in second if not name.startswith(decoder)}
    assert all(same(second[name], all_tensors(other)[name]) for name in outside)
    with torch.no_grad():
        logits = load(tmp_path / "other.out")(input_ids=torch.tensor(rows), use_cache=False).logits
    assert perplexity_of(logits, rows) == pytest.approx(
        perplexity_of(logits_of(tmp_path / "other.out", rows), rows), rel=0.01
    )


def logits_of(path: Path, rows: list[list[int]]) -> Tensor:
    return torch.cat([part.float() for _, _, part in stream_logits(path, make_dataset(rows, "random"))], dim=1)


@pytest.mark.parametrize("spelling", ["file", "modules"])
def test_configs_may_name_modules_as_transformers_does(spelling: str, tmp_path: Path) -> None:
    """Explicit targets and `ignore` may use the file's names, or those of transformers' modules."""
    source, target = make_vision_language(tmp_path / "model", "gemma3"), tmp_path / "out"
    rows = random_rows([32, 32])
    quantize(source, "fp8-dynamic", output_dir=target, dataset=[write_rows(tmp_path / "rows.jsonl", rows)])
    before = figures_of(target, make_dataset(rows, "")).perplexity
    config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    group = config["quantization_config"]["config_groups"]["group_0"]
    linears = build_skeleton(read_layout(source)).linears()
    inside = {file_name: module for file_name, module in linears.items() if ".layers." in file_name}
    group["targets"] = list(inside if spelling == "file" else inside.values())
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert figures_of(target, make_dataset(rows, "")).perplexity == before
    group["targets"] = ["language_model.layers.0.elsewhere"]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with raises("quantization-invalid", where=target / "config.json"):
        open_model(target)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "smolvlm"])
def test_towers_are_never_built_in_memory(family: str, tmp_path: Path) -> None:
    """The skeleton has the text decoder and the head, and no parameter or buffer of towers."""
    skeleton = build_skeleton(read_layout(make_vision_language(tmp_path / "model", family)))
    names = [*skeleton.model.state_dict(), *dict(skeleton.model.named_buffers()), *skeleton.stored]
    assert not [name for name in names if any(word in name for word in ("vision", "visual", "projector", "connector"))]
    assert sum(buffer.nbytes for buffer in skeleton.model.buffers()) < 1000


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "smolvlm"])
def test_a_tied_head_is_found(family: str, tmp_path: Path) -> None:
    """If the head is tied to the embeddings and not in the file, it is the embeddings' matrix."""
    path = make_vision_language(tmp_path / "model", family, tied=True)
    assert not [name for name in all_tensors(path) if "lm_head" in name]
    rows = random_rows([40, 40])
    with torch.no_grad():
        expected = load(path)(input_ids=torch.tensor(rows), use_cache=False).logits
    assert torch.equal(logits_of(path, rows), expected)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_5", "mllama"])
def test_continuations_are_transformers_own(family: str, tmp_path: Path) -> None:
    """Greedy continuations of text equal those of the whole model's generate."""
    path = make_vision_language(tmp_path / "model", family)
    prompt = [5, 6, 7, 8, 9]
    found = continue_greedily(open_model(path), [prompt], CPU, tokens=8)[0]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    expected = load(path).generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    assert found == expected


def test_layers_that_text_does_not_run_stay(tmp_path: Path) -> None:
    """Mllama's cross-attention layers stay as they are, have no statistics, and inspect names them; all verbs agree."""
    source, target = make_vision_language(tmp_path / "model", "mllama"), tmp_path / "out"
    text = write_rows(tmp_path / "rows.jsonl", random_rows([32, 32]))
    record = quantize(source, "nvfp4-fp8-hybrid-fp8kv-four-over-six", output_dir=target, dataset=[text])
    crossed = [tensor for tensor in record.tensors if ".model.layers.1." in tensor.name]
    assert len(crossed) == 13
    assert all(tensor.format == "as it was" for tensor in crossed)
    before, after = all_tensors(source), all_tensors(target)
    assert all(same(before[tensor.name], after[tensor.name]) for tensor in crossed)
    assert {name.split(".")[3] for name in after if name.endswith(".k_scale")} == {"0", "2"}
    found = load_statistics(target)
    assert [bool(found.layers[number].inputs) for number in range(3)] == [True, False, True]
    quantize(source, "nvfp4-fp8-hybrid-fp8kv-four-over-six", output_dir=tmp_path / "again", statistics=target)
    assert all(same(tensor, after[name]) for name, tensor in all_tensors(tmp_path / "again").items())
    parts = {part.part: part for part in inspect(source).parts}
    assert parts["layers without text"].parameters == sum(before[tensor.name].numel() for tensor in crossed)
    rows = fit(source, "16GiB", recipes=["nvfp4-fp8-hybrid-fp8kv-four-over-six"]).rows
    assert all(row.problem is None for row in rows)
    collect_statistics(source, output_dir=tmp_path / "statistics", dataset=[text])


def test_layers_that_a_recipe_names_in_vain(tmp_path: Path) -> None:
    """A rule whose only layers are run on pictures alone is refused, with the reason."""
    source = make_vision_language(tmp_path / "model", "mllama")
    recipe = tmp_path / "recipe.yaml"
    rules = "  - {role: attention, layers: '1', format: nvfp4}\n  - {role: linear, format: fp8-dynamic}\n"
    recipe.write_text(f"name: mine\nrules:\n{rules}", encoding="utf-8")
    with raises("recipe-not-quantizable") as caught:
        plan_quantization(source, str(recipe))
    assert "text does not run" in caught.value.what


def test_contexts_beyond_the_text_models_positions_are_refused(tmp_path: Path) -> None:
    """The number of positions is the language model's, at whatever place the config has it."""
    path = make_vision_language(tmp_path / "model", "gemma3")
    text = write_rows(tmp_path / "rows.jsonl", random_rows([600]))
    with raises("sequence-too-long") as caught:
        evaluate([path], dataset=[text])
    assert {"600", "512"} <= set(caught.value.what.replace(".", "").replace(",", "").split())


def test_text_that_is_not_run_causally_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that lets tokens see later ones, as PaliGemma does, is refused: its decoder alone computes otherwise."""
    config = VISION_LANGUAGE["llava"]
    given = {
        "text_config": config["text_config"] | {"model_type": "gemma"},
        "vision_config": VISION_LANGUAGE["gemma3"]["vision_config"],
        "image_token_index": 60,
        "projection_dim": 64,
    }
    monkeypatch.setitem(VISION_LANGUAGE, "paligemma", given)
    path = make_vision_language(tmp_path / "model", "paligemma")
    with raises("architecture-unsupported", where=path / "config.json"):
        open_model(path)
