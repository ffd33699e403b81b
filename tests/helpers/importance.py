"""Importance matrices as llama-imatrix writes them, in both formats, of sums measured while transformers runs."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

CHUNK = 512

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


@dataclass
class Sums:
    """Of one weight: sums of squares of its inputs [matrices, K], and tokens of each matrix."""

    squares: Tensor
    counts: Tensor


@dataclass
class _Adding:
    """Adds up squares of inputs, by GGUF names."""

    found: dict[str, Sums] = field(default_factory=dict)

    def add(self, name: str, inputs: Tensor, matrix: int = 0, of: int = 1) -> None:
        """Take in the inputs [..., K] of one of the matrices of a weight."""
        inputs = inputs.reshape(-1, inputs.shape[-1]).double()
        one = self.found.setdefault(name, Sums(torch.zeros(of, inputs.shape[1]).double(), torch.zeros(of)))
        one.squares[matrix] += inputs.square().sum(0)
        one.counts[matrix] += len(inputs)

    def watch(self, number: int, layer: nn.Module) -> None:
        """Watch the linears of a layer."""
        modules = dict(layer.named_modules())
        for name, leaf in GGUF_NAMES.items():
            if name in modules:
                place = f"blk.{number}.{leaf}.weight"
                modules[name].register_forward_pre_hook(lambda _, args, place=place: self.add(place, args[0]))
        if "mlp.experts" in modules:
            modules["mlp.experts"].register_forward_pre_hook(
                lambda module, args: self._add_experts(number, module, args[0], args[1])
            )

    def _add_experts(self, number: int, module: Any, hidden: Tensor, chosen: Tensor) -> None:
        count = len(module.down_proj)
        for expert in range(count):
            mine = hidden[(chosen == expert).any(1)]
            middle = module._apply_gate(nn.functional.linear(mine, module.gate_up_proj[expert]))
            for leaf, inputs in (("gate", mine), ("up", mine), ("down", middle)):
                self.add(f"blk.{number}.ffn_{leaf}_exps.weight", inputs, expert, count)


def measure(model: Path, rows: Sequence[Sequence[int]]) -> dict[str, Sums]:
    """What llama-imatrix adds up, by GGUF names: of every linear, and of experts what the router sends to each."""
    network, adding = AutoModelForCausalLM.from_pretrained(model).eval(), _Adding()
    for number, layer in enumerate(network.model.layers):
        adding.watch(number, layer)
    with torch.no_grad():
        for row in rows:
            network(torch.tensor([row]))
    return adding.found


def write_gguf(file: Path, sums: Mapping[str, Sums]) -> Path:
    """The format of today, by the gguf package."""
    writer = GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["texts/calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name, one in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", one.squares.float().numpy())
        writer.add_tensor(f"{name}.counts", one.counts.float().numpy().reshape(-1, 1))
        writer.add_tensor(f"{name}.in_sum", np.zeros_like(one.squares.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_legacy(file: Path, sums: Mapping[str, Sums]) -> Path:
    """The format before it: mean squares times the number of chunks; experts without data have ones for means."""
    parts = [struct.pack("<i", len(sums))]
    for name, one in sorted(sums.items()):
        calls = int(-(-one.counts.max() // CHUNK))
        counts = one.counts[:, None]
        means = torch.where(counts == 0, 1.0, one.squares / counts.clamp(min=1)).float() * calls
        parts += [struct.pack("<i", len(name.encode())), name.encode(), struct.pack("<ii", calls, means.numel())]
        parts.append(means.numpy().astype("<f4").tobytes())
    text = b"texts/calibration.txt"
    parts += [struct.pack("<i", 3), struct.pack("<i", len(text)), text]
    file.write_bytes(b"".join(parts))
    return file
