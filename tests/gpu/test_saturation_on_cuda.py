"""Inputs of static scales are counted on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snugfit.evaluation.saturation import InputWatch, SeenInputs
from snugfit.model.forward_pass import Batch

pytestmark = pytest.mark.gpu

WIDTH = 64


def seen(device: torch.device, dtype: torch.dtype) -> list[SeenInputs]:
    """What is counted of the same two batches, one of them padded."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.ModuleDict({"o": nn.Linear(WIDTH, 16, bias=False, dtype=dtype, device=device)})
    watch = InputWatch()
    watch.linears(layer, "m.", {"self_attn.o_proj": "o"}, {"self_attn.o_proj": torch.tensor(2.8, device=device)})
    for lengths in ((40, 40), (40, 17)):
        inputs = torch.randn(2, 40, WIDTH, generator=generator).to(dtype).to(device)
        watch.before(Batch((0, 1), torch.zeros(2, 40, dtype=torch.int64, device=device), lengths))
        layer["o"](inputs)
    return watch.result()


def test_counts_are_those_of_the_cpu(cuda: torch.device) -> None:
    """Tokens, values and the largest magnitude are the same on both devices, in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        on_cpu, on_gpu = (seen(device, dtype) for device in (torch.device("cpu"), cuda))
        assert on_cpu == on_gpu
        assert 0 < on_cpu[0].saturated_tokens < on_cpu[0].tokens == 137
