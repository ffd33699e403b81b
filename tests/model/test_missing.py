"""Tensors that the index names and no shard holds: said where nothing needs them, refused by every verb otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import MakeTiny
from helpers.errors import raises
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.evaluation.evaluate import evaluate
from snugfit.inspection.inspect import inspect
from snugfit.model.layout import read_layout
from snugfit.planning.fit import fit
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.storage.checkpoint import INDEX_NAME, read_header

MISSING = {
    "ghost": "model.ghost",
    "ghost module": "model.ghost.weight",
    "buffer": "model.layers.1.self_attn.rotary_emb.inv_freq",
    "mask": "model.layers.1.self_attn.masked_bias",
    "prediction": "mtp.layers.0.self_attn.q_proj.weight",
    "prediction layer": "model.layers.3.self_attn.q_proj.weight",
}
NEEDED = {
    "bias": "model.layers.1.self_attn.q_proj.bias",
    "scale": "model.layers.1.self_attn.q_proj.weight_scale",
    "expert": "model.layers.1.mlp.gate_up_proj.weight",
    "norm": "model.final_norm.weight",
    "tower": "visual.merger.mlp.weight",
    "projector": "model.mm_projector.weight",
}


@pytest.fixture(scope="module")
def sharded(make_tiny: MakeTiny) -> Path:
    """A tiny model of three layers in several weight files; tests copy it."""
    return add_tokenizer(make_tiny("llama", max_shard_size="60KB"))


def naming(model: Path, place: Path, *names: str) -> Path:
    """A copy of the model whose index names these tensors as well."""
    shutil.copytree(model, place)
    index = json.loads((place / INDEX_NAME).read_text(encoding="utf-8"))
    index["weight_map"] |= dict.fromkeys(names, min(index["weight_map"].values()))
    (place / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return place


@pytest.mark.parametrize("case", MISSING)
def test_what_nothing_needs_is_said(case: str, sharded: Path, tmp_path: Path) -> None:
    """A missing tensor that nothing needs is named by inspection and by the dry run, and blocks nothing."""
    model = naming(sharded, tmp_path / "model", MISSING[case])
    layout = read_layout(model)
    assert not layout.blockers
    assert layout.not_needed == (MISSING[case],)
    assert any(MISSING[case] in problem for problem in inspect(model).problems)
    assert any(MISSING[case] in note for note in plan_quantization(model, "fp8-dynamic", device="cpu").notes)


@pytest.mark.parametrize("case", NEEDED)
def test_what_may_be_needed_is_refused(case: str, sharded: Path, tmp_path: Path) -> None:
    """A missing tensor of a module that is stored, of a form that other layers have, or of a tower is a blocker."""
    model = naming(sharded, tmp_path / "model", NEEDED[case])
    with raises("index-invalid", model / INDEX_NAME) as caught:
        read_layout(model).check_quantizable()
    assert NEEDED[case] in caught.value.what
    with raises("index-invalid", model / INDEX_NAME):
        read_layout(model).check_runnable()


def test_a_tied_head_is_not_needed(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A head that the index names and config.json ties is not needed; one that is not tied is."""
    tied = make_tiny("llama", max_shard_size="60KB", tie_word_embeddings=True)
    assert not read_layout(naming(tied, tmp_path / "a", "lm_head.weight")).blockers
    config = json.loads((tied / "config.json").read_text(encoding="utf-8"))
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    with raises("index-invalid", INDEX_NAME):
        read_layout(naming(tied, tmp_path / "c", "lm_head.weight")).check_quantizable()


def test_the_result_is_that_of_a_sound_index(sharded: Path, token_rows: Path, tmp_path: Path) -> None:
    """What nothing needs changes no byte of the result."""
    model = naming(sharded, tmp_path / "model", *MISSING.values())
    for source, out in ((sharded, tmp_path / "a"), (model, tmp_path / "b")):
        quantize(source, "fp8-dynamic", output_dir=out, dataset=[token_rows], device="cpu")
    names = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert read_header(tmp_path / "b" / name)


@pytest.mark.parametrize("case", ["bias", "tower"])
def test_all_verbs_refuse_alike(case: str, sharded: Path, token_rows: Path, tmp_path: Path) -> None:
    """quantize, its dry run, statistics and eval refuse what may be needed with one code; inspect and fit show it."""
    model = naming(sharded, tmp_path / "model", NEEDED[case])
    place = model / INDEX_NAME
    with raises("index-invalid", place):
        plan_quantization(model, "fp8-dynamic", dataset=[token_rows], device="cpu")
    with raises("index-invalid", place):
        quantize(model, "fp8-dynamic", output_dir=tmp_path / "out", dataset=[token_rows], device="cpu")
    with raises("index-invalid", place):
        collect_statistics(model, output_dir=tmp_path / "out", dataset=[token_rows], device="cpu")
    with raises("index-invalid", place):
        evaluate([model], dataset=[token_rows], device="cpu")
    assert any(NEEDED[case] in problem for problem in inspect(model).problems)
    record = fit(model, "h100")
    assert NEEDED[case] in " ".join([*record.notes, *(str(row.problem) for row in record.rows)])
    assert not any(row.fits for row in record.rows if row.recipes)
