"""Whole runs on CUDA: the layer loop, mixtures, statistics, resumption and evaluation, beside the same on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import snugfit
from conftest import MakeTiny
from helpers.tiny_families import random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.evaluation.evaluated_model import last_states, open_model
from snugfit.quantization import unit_work
from snugfit.quantization.layer.choose import choose
from snugfit.quantization.layer.propagate import propagate
from snugfit.records.quantize import QuantizeRecord

pytestmark = pytest.mark.gpu

DATA_FREE = ("fp8-dynamic", "fp8-block", "mxfp4-absmax", "int4-w4a16-absmax")
CALIBRATED = ("nvfp4-four-over-six", "nvfp4-absmax", "nvfp4-fp8-hybrid-fp8kv-four-over-six")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_but_for_ties(here: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether at most one byte in a thousand differs: Four Over Six compares sums that round differently."""
    different = here.flatten().view(torch.uint8) != there.flatten().view(torch.uint8)
    return int(different.sum()) <= 1e-3 * len(different)


def quantize_on(device: str, model: Path, recipe: str, out: Path, rows: Path, **options: Any) -> QuantizeRecord:
    return snugfit.quantize(model, recipe, output_dir=out, dataset=[rows], device=device, **options)


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A dense model whose sizes every format divides, in several shards."""
    return make_tiny("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=3, max_shard_size="500KB")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with blocks that divide."""
    return make_mixture("qwen3_moe", tmp_path_factory.mktemp("mixture") / "model", wide=True)


@pytest.mark.parametrize("recipe", DATA_FREE)
def test_data_free_files_are_the_same(
    cuda: torch.device, llama: Path, token_rows: Path, tmp_path: Path, recipe: str
) -> None:
    """A recipe without calibration writes the same bytes on the GPU and on the CPU."""
    for device in ("cpu", cuda.type):
        quantize_on(device, llama, recipe, tmp_path / device, token_rows)
    files = {device: sorted((tmp_path / device).glob("*.safetensors")) for device in ("cpu", "cuda")}
    assert [file.name for file in files["cpu"]] == [file.name for file in files["cuda"]]
    for here, there in zip(files["cpu"], files["cuda"], strict=True):
        assert here.read_bytes() == there.read_bytes(), here.name


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_calibrated_files_differ_in_input_scales_alone(
    cuda: torch.device, llama: Path, token_rows: Path, tmp_path: Path, recipe: str
) -> None:
    """Weights are the same bytes, but for ties; scales of inputs, keys and values differ by 2 % at most."""
    for device in ("cpu", cuda.type):
        quantize_on(device, llama, recipe, tmp_path / device, token_rows)
    here, there = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "cuda")
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        if name.endswith(("input_global_scale", "k_scale", "v_scale")):
            assert torch.allclose(tensor.float(), there[name].float(), rtol=0.02), name
        else:
            assert same_but_for_ties(tensor, there[name]), name


def test_a_mixture_on_the_gpu(cuda: torch.device, mixture: Path, token_rows: Path, tmp_path: Path) -> None:
    """Experts get the same weights as on the CPU, see every token, and have ranges within 2 %."""
    found = {}
    for device in ("cpu", cuda.type):
        found[device] = snugfit.collect_statistics(
            mixture, output_dir=tmp_path / f"statistics-{device}", dataset=[token_rows], device=device
        )
        quantize_on(device, mixture, "nvfp4-moe-four-over-six", tmp_path / device, token_rows)
    here, there = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "cuda")
    for name, tensor in here.items():
        if name.endswith("input_global_scale"):
            assert torch.allclose(tensor, there[name], rtol=0.02), name
        else:
            assert same_but_for_ties(tensor, there[name]), name
    for number, layer in found["cpu"].layers.items():
        other = found["cuda"].layers[number]
        assert layer.inputs.keys() == other.inputs.keys()
        for name, inputs in layer.inputs.items():
            assert inputs.amax == pytest.approx(other.inputs[name].amax, rel=0.02)
            assert inputs.tokens == pytest.approx(other.inputs[name].tokens, rel=0.05)
        for name, experts in layer.experts.items():
            assert all(count > 0 for count in other.experts[name].tokens)
            assert sum(experts.tokens) == sum(other.experts[name].tokens)


@pytest.mark.parametrize("recipe", ["nvfp4-fp8-hybrid-fp8kv-four-over-six", "fp8-dynamic"])
def test_a_stopped_run_resumes_with_the_same_bytes(
    cuda: torch.device, llama: Path, token_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """A run that stops in its third layer resumes there on the GPU and ends in the bytes of a run in one piece."""
    quantize_on(cuda.type, llama, recipe, tmp_path / "whole", token_rows)
    real = choose
    count = 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(unit_work, "choose", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_on(cuda.type, llama, recipe, tmp_path / "out", token_rows)
    assert (tmp_path / "out.partial").is_dir()
    record = quantize_on(cuda.type, llama, recipe, tmp_path / "out", token_rows)
    assert record.resumed is not None
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("*.safetensors")}
    assert whole == {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}


def test_out_of_gpu_memory_keeps_what_is_done(
    cuda: torch.device, llama: Path, token_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full GPU in the second layer is an error with a code; the same call resumes."""
    count = 0

    def full(run: Any, tensors: Any, roundings: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            torch.empty(1 << 50, dtype=torch.uint8, device=cuda)
        return propagate(run, tensors, roundings)

    with monkeypatch.context() as patch:
        patch.setattr(unit_work, "propagate", full)
        with pytest.raises(snugfit.UserError) as caught:
            quantize_on(cuda.type, llama, "nvfp4-four-over-six", tmp_path / "out", token_rows)
    assert caught.value.code == "gpu-memory-insufficient"
    record = quantize_on(cuda.type, llama, "nvfp4-four-over-six", tmp_path / "out", token_rows)
    assert record.resumed is not None
    assert record.peak_gpu_bytes is not None
    assert record.peak_gpu_bytes > 0


@pytest.mark.parametrize("activations", ["vllm-blackwell", "marlin", "none"])
def test_evaluation_agrees_with_the_cpu(
    cuda: torch.device, llama: Path, token_rows: Path, tmp_path: Path, activations: str
) -> None:
    """Perplexity and KL of a quantized model in bf16 on the GPU are those of the CPU within its noise floor."""
    quantize_on("cpu", llama, "nvfp4-fp8-hybrid-fp8kv-four-over-six", tmp_path / "out", token_rows)
    figures = {}
    for device in ("cpu", cuda.type):
        record = snugfit.evaluate(
            [tmp_path / "out"],
            reference=llama,
            dataset=[token_rows],
            activations=activations,
            noise_floor="none",
            device=device,
            continuations=0,
        )
        figures[device] = record.contexts[0].models
    for here, there in zip(figures["cpu"], figures["cuda"], strict=True):
        assert here.perplexity == pytest.approx(there.perplexity, rel=0.03)
        if here.kl is not None:
            assert there.kl is not None
            assert here.kl.mean == pytest.approx(there.kl.mean, rel=0.1)


def test_bounded_attention_gives_the_same_states(cuda: torch.device, llama: Path) -> None:
    """fp32 attention with repeated key heads, which bounds memory on a GPU, agrees with the CPU to 1e-4."""
    rows = torch.randint(3, 64, (3, 50), generator=torch.Generator().manual_seed(4)).tolist()
    places = [torch.arange(50)] * 3
    model = open_model(llama, activations="none", arithmetic=torch.float32)
    here = last_states(model, rows, places, torch.device("cpu"))
    there = last_states(model, rows, places, cuda)
    for a, b in zip(here, there, strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-4, rtol=1e-3)


def test_learned_scales_are_the_same_twice(cuda: torch.device, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Two runs of effort best write the same bytes: backward passes of attention add in one order."""
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    model = make_tiny("llama", **wide, num_attention_heads=4, num_key_value_heads=2)
    rows = write_rows(tmp_path / "rows.jsonl", random_rows((512,) * 16, stop=60))
    for name in ("once", "twice"):
        record = quantize_on("cuda", model, "nvfp4", tmp_path / name, rows, effort="best")
        assert [trial.name for trial in record.trials][-1] == "learned"
    once, twice = (tensors_of(tmp_path / name) for name in ("once", "twice"))
    assert all(torch.equal(once[name].view(torch.uint8), twice[name].view(torch.uint8)) for name in once)
