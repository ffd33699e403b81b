"""Hidden states that overflow or become NaN: the first layer is named, in float16 with the dtype that has the range."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.tiny_families import all_tensors, load, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.cli.app import app
from snugfit.errors import Unfinished
from snugfit.evaluation.evaluate import evaluate
from snugfit.progress import Progress
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import quantize
from snugfit.storage.staging import units_done


class Messages(Progress):
    """A progress that keeps its messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        """Keep a message."""
        self.texts.append(text)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of 32 token ids."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([32, 32], stop=64))


@pytest.fixture(scope="module")
def overflowing(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model whose second layer multiplies to more than 65504, and whose weights are all finite."""
    path = tmp_path_factory.mktemp("fp16") / "model"
    shutil.copytree(make_tiny("llama", dtype=torch.float16), path)
    tensors = all_tensors(path)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1000
    rewrite(path, tensors)
    return path


@pytest.mark.parametrize(
    "recipe", ["nvfp4-four-over-six", "nvfp4-fp8-hybrid-four-over-six", "nvfp4-fp8-hybrid-fp8kv-four-over-six"]
)
def test_float16_overflow_is_named_at_its_layer(recipe: str, overflowing: Path, text: Path, tmp_path: Path) -> None:
    """The layer is named with the dtype to use; what was finished stays, and with that dtype the run succeeds."""
    with raises("activations-not-finite", where="model.layers.1") as caught:
        quantize(overflowing, recipe, output_dir=tmp_path / "out", dataset=[text])
    assert "float16 overflowed" in caught.value.what
    assert '`dtype="bfloat16"`' in caught.value.remedy
    assert isinstance(caught.value, Unfinished)
    assert units_done(tmp_path / "out.partial") == 2
    quantize(overflowing, recipe, output_dir=tmp_path / "out", dataset=[text], dtype="bfloat16", restart=True)
    stays = {name for name, tensor in all_tensors(tmp_path / "out").items() if tensor.dtype == torch.bfloat16}
    assert not stays  # what is not quantized keeps the file's dtype


def test_statistics_are_those_of_the_dtype(overflowing: Path, text: Path, tmp_path: Path) -> None:
    """collect_statistics refuses the same; with `dtype` its ranges are those of transformers' forward in that dtype."""
    with raises("activations-not-finite", where="model.layers.1"):
        collect_statistics(overflowing, output_dir=tmp_path / "refused", dataset=[text])
    found = collect_statistics(overflowing, output_dir=tmp_path / "out", dataset=[text], dtype="bfloat16")
    model = load(overflowing).to(torch.bfloat16)
    seen: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(args[0].abs().max()))

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(note(f"model.layers.{number}.mlp.down_proj"))
    with torch.no_grad():
        model(input_ids=torch.tensor(random_rows([32, 32], stop=64)), use_cache=False)
    assert seen["model.layers.1.mlp.down_proj"] > 65504
    amax = {name: one.amax for layer in found.layers.values() for name, one in layer.inputs.items() if name in seen}
    assert amax == pytest.approx(seen, rel=0.02)  # bf16 sums in another order for other shapes


def test_the_dtype_belongs_to_the_run(overflowing: Path, text: Path, tmp_path: Path) -> None:
    """An unfinished run resumes in its own dtype alone; the command line names both options."""
    arguments = ["quantize", overflowing, "-r", "nvfp4-four-over-six", "-o", tmp_path / "out", "--dataset", text]
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert failed_with(result, "activations-not-finite", "model.layers.1: ", "`--dtype bfloat16`", "`--restart`")
    result = CliRunner().invoke(app, [str(one) for one in (*arguments, "--dtype", "bfloat16")])
    assert failed_with(result, "run-differs", tmp_path / "out.partial", "dtype", "`--restart`")
    result = CliRunner().invoke(app, [str(one) for one in (*arguments, "--dtype", "bfloat16", "--restart")])
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("run", [quantize, collect_statistics])
def test_an_unknown_dtype_is_refused(run: Any, overflowing: Path, text: Path, tmp_path: Path) -> None:
    """A dtype that is none of three is refused before any work."""
    recipe = ("nvfp4-four-over-six",) if run is quantize else ()
    with raises("option-invalid", where="dtype"):
        run(overflowing, *recipe, output_dir=tmp_path / "out", dataset=[text], dtype="float64")
    with raises("option-invalid", where="dtype"):
        evaluate([overflowing], dataset=[text], dtype="int8")


def test_eval_names_the_first_layer(overflowing: Path, text: Path) -> None:
    """eval counts the tokens that are not finite, names the layer and the dtype; in that dtype all are finite."""
    messages = Messages()
    found = evaluate([overflowing], dataset=[text], progress=messages).contexts[0]
    assert found.models[0].nonfinite == found.tokens
    (warning,) = [one for one in messages.texts if "NaN or infinite" in one]
    assert "from model.layers.1 on" in warning
    assert '`dtype="bfloat16"`' in warning
    record = evaluate([overflowing], dataset=[text], dtype="bfloat16")
    assert record.contexts[0].models[0].nonfinite == 0
    assert record.arguments["dtype"] == "bfloat16"
    assert record.candidates[0].arithmetic == "bfloat16"  # type: ignore[union-attr]


MIXTURES_OF_ALL_KINDS = ["qwen3_moe", "mixtral", "deepseek_v3"]


@pytest.mark.parametrize("kind", MIXTURES_OF_ALL_KINDS)
def test_overflow_in_a_mixture_is_no_missing_adapter(kind: str, text: Path, tmp_path: Path) -> None:
    """Attention that overflows before a mixture is named as such by quantize, and by eval, which counts its tokens."""
    model = make_mixture(kind, tmp_path / "model")
    tensors = all_tensors(model)
    values = [name for name in tensors if ".layers.0." in name and name.endswith(("v_proj.weight", "kv_b_proj.weight"))]
    for name in (*values, "model.layers.0.self_attn.o_proj.weight"):
        tensors[name] = tensors[name] * 1e30
    rewrite(model, tensors)
    with raises("activations-not-finite", where="model.layers.0"):
        quantize(model, "nvfp4-fp8-hybrid-four-over-six", output_dir=tmp_path / "out", dataset=[text])
    assert not (tmp_path / "out.partial").exists()  # no layer was finished
    messages = Messages()
    found = evaluate([model], dataset=[text], progress=messages).contexts[0]
    assert found.models[0].nonfinite == found.tokens
    assert len([one for one in messages.texts if "from model.layers.0 on" in one]) == 1


@pytest.mark.parametrize("kind", MIXTURES_OF_ALL_KINDS)
def test_a_nan_in_a_router_is_no_missing_adapter(kind: str, text: Path, tmp_path: Path) -> None:
    """A NaN in a mixture's router becomes a count of tokens in eval, with the layer's name."""
    model = make_mixture(kind, tmp_path / "model")
    tensors = all_tensors(model)
    name = next(name for name in tensors if ".layers.1." in name and name.endswith(("mlp.gate.weight", "gate.weight")))
    tensors[name][0, 0] = float("nan")
    rewrite(model, tensors)
    messages = Messages()
    found = evaluate([model], dataset=[text], progress=messages).contexts[0]
    assert found.models[0].nonfinite == found.tokens
    assert len([one for one in messages.texts if "from model.layers.1 on" in one]) == 1


def test_a_mixture_runs_in_another_dtype(text: Path, tmp_path: Path) -> None:
    """A float16 mixture is calibrated in bfloat16: experts' buffers have that dtype, codes are the weights' own."""
    source = make_mixture("qwen3_moe", tmp_path / "model")
    rewrite(source, {name: tensor.half() for name, tensor in all_tensors(source).items()})
    for dtype in ("float16", "bfloat16"):
        quantize(source, "nvfp4-moe-four-over-six", output_dir=tmp_path / dtype, dataset=[text], dtype=dtype)
    half, brain = all_tensors(tmp_path / "float16"), all_tensors(tmp_path / "bfloat16")
    different = {name.rpartition(".")[2] for name in half if not torch.equal(half[name], brain[name])}
    assert different == {"input_global_scale"}
