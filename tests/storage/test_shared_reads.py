"""What several processes read together: each a part, all get all, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.ranks import in_ranks
from snugfit import distributed
from snugfit.storage import shared_reads, transfer
from snugfit.storage.checkpoint import Checkpoint, open_directory
from snugfit.storage.shared_reads import SharedReads
from snugfit.storage.tensor_reader import TensorReader
from snugfit.storage.transfer import Transfer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Of two prefixes: large, small, empty and single values, of several dtypes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (300, 70), "v": (33, 11), "s": (), "e": (0, 4), "b": (900,)}
    dtypes = {"w": torch.bfloat16, "v": torch.uint8, "s": torch.float32, "e": torch.float32, "b": torch.float8_e4m3fn}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {f"{prefix}.{name}": made[name].to(dtypes[name], copy=True) for prefix in ("a", "b") for name in made}


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """They as a model."""
    folder = tmp_path_factory.mktemp("model")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return open_directory(folder)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and bytes(found.reshape(-1).view(torch.uint8).numpy()) == bytes(
        expected.reshape(-1).view(torch.uint8).numpy()
    )


def small_pieces() -> None:
    """Have large tensors read in many pieces, and a few tensors share one."""
    for module in (shared_reads, transfer):
        module.PIECE_BYTES = 4096  # type: ignore[attr-defined]
    transfer.PACK_BYTES = 4096


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_each_process_reads_a_part(
    processes: int, checkpoint: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """All get all tensors; what they read together is what the file has, and none reads much more than its part."""

    def work(rank: int) -> None:
        small_pieces()
        read, real = 0, os.preadv

        def counted(handle: int, buffers: Any, offset: int) -> int:
            nonlocal read
            count = real(handle, buffers, offset)
            read += count
            return count

        os.preadv = counted  # type: ignore[assignment]
        with distributed.joined("cpu"), Transfer(CPU) as threads:
            found = SharedReads(threads, checkpoint, tensors).result()
            assert all(same(found[name], tensor) for name, tensor in tensors.items())
            assert found.keys() == tensors.keys()
            assert SharedReads(threads, checkpoint, ()).result() == {}
        (tmp_path / str(rank)).write_text(str(read))

    assert in_ranks(processes, work) == [0] * processes
    parts = [int((tmp_path / str(rank)).read_text()) for rank in range(processes)]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(parts) == total
    assert max(parts) <= total / processes + 4096 + 8192  # of a job at either end


def test_a_reader_of_several_processes(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """A shared reader gives what one alone gives: what it was told to expect, and what it was not."""

    def work(_: int) -> None:
        with distributed.joined("cpu"), TensorReader(checkpoint, CPU, shared=True) as read:
            read._transfer, read._shared, read._room = Transfer(CPU), True, 1 << 30  # as on a GPU
            read._unused = lambda: 1 << 30  # type: ignore[method-assign]
            read.expect("a")
            assert read._together is not None
            assert same(read("a.w"), tensors["a.w"])
            assert same(read("a.b"), tensors["a.b"])
            assert same(read("b.w"), tensors["b.w"])
            assert same(read("b.v", 3), tensors["b.v"][3])
            read.expect("b")
            for name, tensor in tensors.items():
                assert same(read(name), tensor)
            read._room = 0
            read.expect("a")
            assert read._together is None
            assert same(read("a.w"), tensors["a.w"])

    assert in_ranks(2, work) == [0, 0]
