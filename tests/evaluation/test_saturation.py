"""What comes to linears with static input scales is compared with the range of these scales, on made-up inputs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.evaluation.evaluated_model import last_states, open_model
from snugfit.evaluation.saturation import InputWatch, SeenInputs
from snugfit.formats.inputs import InputRounding
from snugfit.formats.nvfp4 import input_global_scale
from snugfit.formats.spec import TensorFormat
from snugfit.model import emulate
from snugfit.model.emulate import ExpertInputs, input_range
from snugfit.model.experts import ExpertNames
from snugfit.model.forward_pass import Batch
from snugfit.quantization.quantize import quantize

WIDTH = 32
BF16_STEP = 2.0**-7  # between 1 and 2
CPU = torch.device("cpu")


class Layer(nn.Module):
    """Two fused linears and one by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 16, bias=False, dtype=torch.bfloat16)
        self.k = nn.Linear(WIDTH, 16, bias=False, dtype=torch.bfloat16)
        self.o = nn.Linear(WIDTH, 16, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Something of all three."""
        found: Tensor = self.q(x) + self.k(x) + self.o(x)
        return found


MODULES = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.o_proj": "o"}


def batch(lengths: tuple[int, ...], width: int) -> Batch:
    """A batch of samples of these lengths, padded to a width."""
    return Batch(tuple(range(len(lengths))), torch.zeros(len(lengths), width, dtype=torch.int64), lengths)


def watched(ranges: dict[str, float]) -> tuple[Layer, InputWatch]:
    """A layer under watch: ranges by the file's names."""
    layer, watch = Layer(), InputWatch()
    watch.linears(layer, "m.layers.3.", MODULES, {name: torch.tensor(value) for name, value in ranges.items()})
    return layer, watch


def test_tokens_and_values_beyond_the_range_are_counted() -> None:
    """By hand: what lies within the range or at its end is not saturated, what lies beyond is; pads do not count."""
    layer, watch = watched({"self_attn.q_proj": 1.0, "self_attn.k_proj": 1.0, "self_attn.o_proj": 8.0})
    inputs = torch.full((2, 4, WIDTH), 0.5, dtype=torch.bfloat16)
    inputs[0, 0, 3] = 1.0
    inputs[0, 1, :3] = torch.tensor([1 + BF16_STEP, -2.0, 1.0])
    inputs[1, 1, 7] = -5.0
    inputs[1, 2:] = 100.0  # padding
    watch.before(batch((4, 2), 4))
    layer(inputs)
    watch.before(batch((4, 4), 4))
    layer(torch.full((2, 4, WIDTH), -1.5, dtype=torch.bfloat16)[:, :, :])
    prefix = "m.layers.3.self_attn"
    assert watch.result() == [
        SeenInputs(f"{prefix}.q_proj", f"{prefix}.q_proj.weight", 14, 2 + 8, 3 + 8 * WIDTH, 5.0, 1.0),
        SeenInputs(f"{prefix}.o_proj", f"{prefix}.o_proj.weight", 14, 0, 0, 5.0, 8.0),
    ]


def test_the_range_is_not_rounded_to_16_bits() -> None:
    """A value beyond a range by less than a step of bfloat16 counts; one at the range's end in fp32 does not."""
    for limit, saturated in ((1 + 0.6 * BF16_STEP, 1), (1 + BF16_STEP, 0), (1 + 1.4 * BF16_STEP, 0)):
        layer, watch = watched({"self_attn.o_proj": limit})
        inputs = torch.zeros(1, 1, WIDTH, dtype=torch.bfloat16)
        inputs[0, 0, 0] = 1 + BF16_STEP
        watch.before(batch((1,), 1))
        layer(inputs)
        (seen,) = watch.result()
        assert (seen.saturated_tokens, seen.saturated_values) == (saturated, saturated)


@pytest.mark.parametrize("amax", [0.37, 1.0, 5.4375, 700.0])
def test_the_largest_calibrated_input_is_in_its_range(amax: float) -> None:
    """What two reciprocals in fp32 take of a range is no saturation; the next value of bfloat16 is."""
    exact = torch.tensor(amax, dtype=torch.bfloat16)
    limit = input_range(TensorFormat("nvfp4"), input_global_scale(float(exact)))
    assert limit is not None
    layer, watch = watched({"self_attn.o_proj": float(limit)})
    inputs = torch.zeros(1, 2, WIDTH, dtype=torch.bfloat16)
    inputs[0, 0, 0], inputs[0, 1, 0] = exact, torch.nextafter(exact, torch.tensor(math.inf, dtype=torch.bfloat16))
    watch.before(batch((2,), 2))
    layer(inputs)
    (seen,) = watch.result()
    assert (seen.saturated_tokens, seen.saturated_values) == (1, 1)


def test_the_range_is_where_rounding_cuts_off() -> None:
    """Up to `input_range` emulated rounding keeps the largest value of a block, beyond it that stays where it is."""
    scales: dict[str, tuple[TensorFormat, Tensor]] = {
        "nvfp4": (TensorFormat("nvfp4"), input_global_scale(3.0)),
        "fp8-tensor": (TensorFormat("fp8", inputs="fp8-tensor"), torch.tensor(3.0 / 448)),
    }
    for kind, (fmt, scale) in scales.items():
        limit = input_range(fmt, scale)
        assert limit is not None
        assert float(limit) == pytest.approx(3.0, rel=1e-6)
        rounding = emulate.input_quantizer(fmt, "vllm-blackwell", scale)
        assert isinstance(rounding, InputRounding)
        assert rounding.kind == kind
        for factor in (1.0, 1.5, 3.0):
            inputs = torch.zeros(1, 16)
            inputs[0, 0] = 3.0 * factor
            assert float(rounding(inputs).amax()) == pytest.approx(3.0, rel=1e-6)
        assert float(rounding(torch.full((1, 16), 1.5)).amax()) == pytest.approx(1.5, rel=1e-6)
    for fmt in (TensorFormat("fp8-dynamic"), TensorFormat("mxfp4"), TensorFormat("nvfp4a16")):
        assert input_range(fmt, None) is None


def test_inputs_that_are_not_finite(recwarn: pytest.WarningsRecorder) -> None:
    """NaN among the inputs shows in the largest magnitude; a scale that nothing came to is left out."""
    layer, watch = watched({"self_attn.o_proj": 1.0, "self_attn.q_proj": 1.0})
    assert watch.result() == []
    inputs = torch.full((1, 2, WIDTH), math.nan, dtype=torch.bfloat16)
    watch.before(batch((2,), 2))
    layer(inputs)
    assert all(math.isnan(seen.amax) for seen in watch.result())
    assert len(recwarn) == 0


def test_experts_are_watched_together() -> None:
    """Gate and up of all experts have one scale, down another; each is compared with its own inputs, pads left out."""
    watch = InputWatch()
    names = {
        (expert, role, "weight"): f"mlp.experts.{expert}.{role}_proj.weight"
        for expert in range(2)
        for role in ("gate", "up", "down")
    }
    rounded: list[Tensor] = []

    def rounding(inputs: Tensor) -> Tensor:
        rounded.append(inputs)
        return inputs * 0

    inputs = ExpertInputs(rounding, None, (torch.tensor(1.0), torch.tensor(2.0)))
    hooks = watch.experts("m.layers.0.", ExpertNames("mlp.experts", names), inputs)
    watch.before(batch((2, 1), 2))  # tokens 0, 1 and 2 are real
    hidden = torch.full((4, WIDTH), 0.5)
    hidden[1, 0], hidden[3, 0] = 1.5, 9.0
    assert hooks.first(hidden).abs().max() == 0
    assert torch.equal(rounded[0], hidden)
    middle = torch.ones(3, WIDTH)
    middle[0, :2], middle[2, 0] = 3.0, 7.0
    assert torch.equal(hooks.second(1, middle, torch.tensor([2, 0, 3]), forced=False), middle)
    gate_up, down = watch.result()
    where = "m.layers.0.mlp.experts"
    assert gate_up == SeenInputs(f"{where}.gate_up", f"{where}.0.gate_proj.weight", 3, 1, 1, 1.5, 1.0)
    assert down == SeenInputs(f"{where}.down", f"{where}.0.down_proj.weight", 2, 1, 2, 3.0, 2.0)


@pytest.mark.parametrize("profile", ["vllm-blackwell", "marlin"])
def test_a_whole_mixture(profile: str, tmp_path: Path) -> None:
    """All static scales of a checkpoint are listed, with what they were made of, also where a profile rounds no inputs.

    On the samples of its calibration the first layer sees exactly its range: inputs before they are rounded.
    """
    model = make_mixture("qwen3_moe", tmp_path / "moe", wide=True)
    rows = write_rows(tmp_path / "rows.jsonl", random_rows((40, 40, 25, 40), stop=60))
    out = tmp_path / "out"
    record = quantize(model, "nvfp4-four-over-six", output_dir=out, dataset=[rows], device="cpu")
    watch = InputWatch()
    positions = [torch.tensor([0])] * 4
    samples = random_rows((40, 40, 25, 40), stop=60)
    last_states(open_model(out, activations=profile), samples, positions, CPU, watch=watch)
    found = watch.result()
    amax = {tensor.name: tensor.input_amax for tensor in record.tensors}
    tensors = all_tensors(out)
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    kinds = [one.module.split(".", 3)[3] for one in found]
    assert kinds == ["self_attn.q_proj", "self_attn.o_proj", "mlp.experts.gate_up", "mlp.experts.down"] * layers
    for one in found:
        made_of = amax[one.weight]
        assert made_of is not None
        assert one.range == pytest.approx(made_of, rel=1e-6)
        assert one.tokens == 145 or one.module.endswith("down")
    # weights as they run here give other inputs than those of calibration, which 4-bit inputs of layers before moved
    first = found[0]
    assert (first.saturated_tokens, first.saturated_values) == (0, 0)
    assert first.amax == pytest.approx(first.range, rel=1e-6)
