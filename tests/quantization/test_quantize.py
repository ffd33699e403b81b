"""The main path on tiny models: what is written, what survives, what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MakeTiny
from helpers.errors import raises
from helpers.run_model import figures_of
from helpers.tiny_families import all_tensors, same
from snugfit.data.dataset import load_dataset
from snugfit.formats import nvfp4
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.recipes.recipe import parse_recipe
from snugfit.records.quantize import RECORD_FILE
from snugfit.storage.checkpoint import read_tensor
from snugfit.storage.open import open_checkpoint


@pytest.mark.parametrize("recipe", ["nvfp4-fp8-hybrid-four-over-six", "fp8-dynamic"])
def test_every_other_tensor_and_file_is_copied_unchanged(
    recipe: str, make_tiny: MakeTiny, token_rows: Path, tmp_path: Path
) -> None:
    """Biases, norms, embeddings, head, multi-token-prediction layers and other files are the source's, bit for bit."""
    source = tmp_path / "source"
    shutil.copytree(make_tiny("llama", attention_bias=True, mlp_bias=True), source)
    tensors = load_file(source / "model.safetensors")
    extra = {
        "model.layers.3.mlp.up_proj.weight": torch.randn(128, 64).bfloat16(),
        "mtp.fc.weight": torch.randn(64, 128).bfloat16(),
        "mtp.layers.0.mlp.gate_proj.weight": torch.randn(128, 64).bfloat16(),
        "model.mtp_layers.0.self_attn.q_proj.weight": torch.randn(64, 64).bfloat16(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(8),
    }
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    (source / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (source / ".gitattributes").write_text("*.safetensors filter=lfs", encoding="utf-8")
    (source / "assets").mkdir()
    (source / "assets" / "note.bin.txt").write_bytes(b"\x00\x01")
    quantize(source, recipe, output_dir=tmp_path / "out", dataset=[token_rows])
    written = all_tensors(tmp_path / "out")
    linears = {f"model.layers.{n}.{part}" for n in range(3) for part in LINEARS}
    kept = [name for name in tensors | extra if name.removesuffix(".weight") not in linears]
    assert len(kept) == len(tensors) + len(extra) - 21
    for name in kept:
        assert same(written[name], (tensors | extra)[name]), name
    assert (tmp_path / "out" / "assets" / "note.bin.txt").read_bytes() == b"\x00\x01"
    assert (tmp_path / "out" / ".gitattributes").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    two_d = [name for name, tensor in extra.items() if tensor.dim() == 2]
    assert sorted(ignore) == sorted(["lm_head", *(name.removesuffix(".weight") for name in two_d)])


LINEARS = (
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
)


def test_calibrated_scales_equal_an_independent_measurement(
    make_tiny: MakeTiny, token_rows: Path, tmp_path: Path
) -> None:
    """input_global_scale is 2688 / amax of the inputs of all rows, in a model with the quantized weights."""
    from transformers import AutoModelForCausalLM

    source = make_tiny("llama")
    quantize(source, "nvfp4-four-over-six", output_dir=tmp_path / "out", dataset=[token_rows])
    written = all_tensors(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    amax: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parts = [written[f"{name}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale")]
            stored = nvfp4.NVFP4Weight(parts[0], parts[1], parts[2].reciprocal().reshape(()))
            module.weight.data = nvfp4.dequantize(stored).bfloat16()
            module.register_forward_pre_hook(
                lambda _, args, name=name: amax.update({name: max(amax.get(name, 0.0), float(args[0].abs().max()))})
            )
    rows = [json.loads(line)["input_ids"] for line in token_rows.read_text().splitlines()]
    with torch.no_grad():
        model(input_ids=torch.tensor(rows), use_cache=False)
    assert len(amax) == 21
    for name, largest in amax.items():
        # the batch differs from that of calibration, and so may the last bits of a bf16 product
        assert float(written[f"{name}.input_global_scale"]) == pytest.approx(2688 / largest, rel=2.0**-6), name


def test_fused_partners_share_their_scales(make_tiny: MakeTiny, token_rows: Path, tmp_path: Path) -> None:
    """q, k, v and gate, up have one weight_global_scale and one input_global_scale each."""
    quantize(make_tiny("llama"), "nvfp4-four-over-six", output_dir=tmp_path / "out", dataset=[token_rows])
    written = all_tensors(tmp_path / "out")
    for layer in range(3):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for scale in ("weight_global_scale", "input_global_scale"):
                values = {float(written[f"model.layers.{layer}.{module}.{scale}"]) for module in group}
                assert len(values) == 1


def test_sharded_and_single_outputs_hold_the_same_tensors(
    make_tiny: MakeTiny, token_rows: Path, tmp_path: Path
) -> None:
    """`max_shard_size` changes files and index, but no tensor, also when the source itself is sharded."""
    source = make_tiny("qwen2", max_shard_size="100KB")
    assert len(open_checkpoint(source).shards) > 1
    quantize(source, "nvfp4-fp8-down-four-over-six", output_dir=tmp_path / "one", dataset=[token_rows])
    quantize(
        source,
        "nvfp4-fp8-down-four-over-six",
        output_dir=tmp_path / "many",
        dataset=[token_rows],
        max_shard_size=50_000,
    )
    one, many = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(same(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_runs_are_reproducible(make_tiny: MakeTiny, token_rows: Path, tmp_path: Path) -> None:
    """The same call gives byte-identical weight files and config."""
    for name in ("a", "b"):
        quantize(
            make_tiny("llama", seed=3),
            "nvfp4-fp8-hybrid-four-over-six",
            output_dir=tmp_path / name,
            dataset=[token_rows],
        )
    for file in ("model.safetensors", "config.json", "snugfit-recipe.yaml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_record_agrees_with_the_files(make_tiny: MakeTiny, token_rows: Path, tmp_path: Path) -> None:
    """The stored record has the bytes, errors, digests and dataset of the files."""
    import hashlib

    source = make_tiny("llama")
    record = quantize(source, "nvfp4-fp8-hybrid-four-over-six", output_dir=tmp_path / "out", dataset=[token_rows])
    stored = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert stored == json.loads(record.to_json())
    written = all_tensors(tmp_path / "out")
    planned = plan_quantization(source, record.recipe, dataset=[token_rows])
    assert record.bytes == sum(t.nbytes for t in written.values()) == planned.bytes
    assert {t.name: t.bytes for t in planned.records()} == {t.name: t.bytes for t in record.tensors}
    assert record.source_bytes == sum(t.nbytes for t in all_tensors(source).values())
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert record.files == {"model.safetensors": digest}
    assert record.dataset is not None
    assert record.dataset["tokens"] == 6 * 48
    assert record.dataset["digest"] == load_dataset(source, [token_rows]).digest
    down = next(t for t in record.tensors if t.name == "model.layers.0.mlp.down_proj.weight")
    weight = read_tensor(open_checkpoint(source), down.name).float()
    parts = {p: written[f"model.layers.0.mlp.down_proj.{p}"] for p in ("weight_packed", "weight_scale")}
    scale = written["model.layers.0.mlp.down_proj.weight_global_scale"].reciprocal().reshape(())
    seen = nvfp4.dequantize(nvfp4.NVFP4Weight(parts["weight_packed"], parts["weight_scale"], scale))
    assert down.relative_error == pytest.approx(float((seen - weight).square().sum() / weight.square().sum()))
    assert down.input_amax == pytest.approx(2688 / float(written["model.layers.0.mlp.down_proj.input_global_scale"]))


def test_data_free_recipes_run_no_model(make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe without activation scales reads no samples and runs no layer, whatever the dataset holds."""
    from snugfit.model import forward_pass

    def refuse(*_: object) -> None:
        raise AssertionError("ran a model")

    monkeypatch.setattr(forward_pass, "embed", refuse)
    monkeypatch.setattr(forward_pass, "run_layer", refuse)
    unreadable = tmp_path / "rows.jsonl"
    unreadable.write_text("not JSON", encoding="utf-8")
    for recipe in ("fp8-dynamic", "int4-w4a16-absmax", "fp8-int4-absmax", "nvfp4a16-four-over-six"):
        record = quantize(make_tiny("llama"), recipe, output_dir=tmp_path / recipe, dataset=[unreadable])
        assert record.dataset is None


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4-four-over-six"])
def test_a_dataset_that_does_not_exist_is_refused(recipe: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A missing file of samples is an error, also for a recipe that needs no samples: the caller meant another."""
    missing = tmp_path / "no-such-file.txt"
    with raises("file-missing", where=missing):
        quantize(make_tiny("llama"), recipe, output_dir=tmp_path / "out", dataset=[missing])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["quantize", "evaluate"])
def test_one_layer_is_in_memory_at_a_time(
    step: str, make_tiny: MakeTiny, token_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer is made resident, nothing of the layer before it is alive any more."""
    import gc
    import weakref

    from snugfit.model import layers

    source = make_tiny("llama")
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    build = layers.resident_layer

    def watched(*args: Any, **options: Any) -> torch.nn.Module:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        layer = build(*args, **options)
        alive[:] = [weakref.ref(layer), *(weakref.ref(parameter) for parameter in layer.parameters())]
        return layer

    monkeypatch.setattr(layers, "resident_layer", watched)
    if step == "quantize":
        quantize(source, "nvfp4-four-over-six", output_dir=tmp_path / "out", dataset=[token_rows])
    else:
        figures_of(source, load_dataset(source, [token_rows]))
    assert counts == [0, 0, 0]


def test_mixed_layers_and_asymmetric_int4(make_tiny: MakeTiny, token_rows: Path, tmp_path: Path) -> None:
    """A recipe that mixes formats by layer writes a file that reads back in these formats."""
    recipe = parse_recipe(
        """
name: mixed
rules:
  - {role: mlp, layers: "0, -1", format: nvfp4, scale_rule: sweep}
  - {role: mlp, format: int4, scale_rule: absmax, group_size: 32, symmetric: false}
  - {name: "*.1.self_attn.*", format: keep}
  - {role: linear, format: fp8-dynamic}
""",
        where="test",
    )
    source = make_tiny("llama")
    record = quantize(source, recipe, output_dir=tmp_path / "out", dataset=[token_rows])
    formats = {t.name.removeprefix("model.layers.").removesuffix(".weight"): t.format for t in record.tensors}
    assert formats["0.mlp.up_proj"] == formats["2.mlp.down_proj"] == "nvfp4"
    assert formats["1.mlp.up_proj"] == "int4-g32-asym"
    assert formats["1.self_attn.q_proj"] == "as it was"
    assert formats["2.self_attn.o_proj"] == "fp8-dynamic"
    rows = load_dataset(source, [token_rows])
    before, after = figures_of(source, rows), figures_of(tmp_path / "out", rows, activations="none")
    assert before.perplexity != after.perplexity
    assert after.perplexity == pytest.approx(before.perplexity, rel=0.2)


def test_other_layouts_and_ragged_rows(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """OPT names its layers and its attention's output differently, and flattens before fc1; rows differ in length."""
    source = make_tiny("opt", ffn_dim=128, word_embed_proj_dim=64, pad_token_id=0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [*range(3, 3 + n)]}) + "\n" for n in (40, 7, 23)))
    record = quantize(source, "nvfp4-fp8-attention-four-over-six", output_dir=tmp_path / "out", dataset=[rows])
    formats = {t.name.removeprefix("model.decoder.layers."): t.format for t in record.tensors}
    assert formats["0.self_attn.out_proj.weight"] == formats["2.self_attn.q_proj.weight"] == "fp8-dynamic"
    assert formats["1.fc1.weight"] == formats["1.fc2.weight"] == "nvfp4"
    amax = {t.name: t.input_amax for t in record.tensors if t.format == "nvfp4"}
    assert len(amax) == 6
    assert all(amax.values())


def test_a_disk_that_is_too_small_is_refused_before_the_run(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the result would not fit on the disk, the run stops before it writes anything."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with raises("disk-insufficient", where=tmp_path):
        quantize(make_tiny("llama"), "fp8-dynamic", output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_samples_longer_than_the_positions_are_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A sample longer than the model's positions is refused; the error names the longest that it has."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [5] * 600}) + "\n")
    with raises("sequence-too-long", where="config.json") as caught:
        quantize(make_tiny("llama"), "nvfp4-four-over-six", output_dir=tmp_path / "out", dataset=[rows])
    assert "600" in caught.value.what
    assert "`max_seq_length`" in caught.value.remedy
    assert "512" in caught.value.remedy


def test_unknown_activation_profile_is_refused(make_tiny: MakeTiny, token_rows: Path) -> None:
    """Perplexity under a profile that does not exist is an error, also for a model without quantized layers."""
    source = make_tiny("llama")
    with raises("option-invalid", where="activations"):
        figures_of(source, load_dataset(source, [token_rows]), activations="blackwel")
