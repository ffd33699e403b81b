"""Tensors reach the GPU and the disk whole, in pieces, from several threads and streams at once."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from snugfit.errors import UserError
from snugfit.storage.files import PIECE_BYTES
from snugfit.storage.open import open_headers
from snugfit.storage.transfer import Transfer, check_finite

pytestmark = pytest.mark.gpu


def write_model(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}", encoding="utf-8")
    return directory


def test_reads_and_writes_are_whole(cuda: torch.device, tmp_path: Path) -> None:
    """Tensors of less than a piece, of several, and of an odd size come back whole; CRC-32s are those of the file."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"small": 3, "piece": PIECE_BYTES // 2, "many": 3 * PIECE_BYTES // 2 + 77}
    tensors = {name: torch.randn(size, generator=generator).to(torch.bfloat16) for name, size in sizes.items()}
    tensors["experts"] = torch.randn(4, 33, 65, generator=generator)
    checkpoint = open_headers(write_model(tmp_path / "model", tensors))
    handle = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with Transfer(cuda) as transfer:
        pending = {name: transfer.read(checkpoint, name) for name in tensors}
        one = transfer.read(checkpoint, "experts", 2)
        found = {name: read.result() for name, read in pending.items()}
        torch.cuda.synchronize()
        for name, tensor in found.items():
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), tensors[name])
        assert torch.equal(one.result().cpu(), tensors["experts"][2])
        written = transfer.write(handle, 5, found["many"]).result()
        raw = tensors["many"].view(torch.uint8).numpy().tobytes()
        assert os.pread(handle, len(raw), 5) == raw
        pieces = [raw[start : start + PIECE_BYTES] for start in range(0, len(raw), PIECE_BYTES)]
        assert written == [zlib.crc32(piece) for piece in pieces]
        some = [found["small"], torch.arange(7), found["experts"], torch.empty(0, device=cuda), found["small"] * 2]
        starts = [4 << 20, 1 << 20, 2 << 20, 0, 3 << 20]
        places = [(handle, start, tensor) for start, tensor in zip(starts, some, strict=True)]
        for (_, start, tensor), crcs in zip(places, transfer.write_many(places), strict=True):
            raw = tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert crcs.result() == ([zlib.crc32(raw)] if raw else [])
            assert os.pread(handle, len(raw), start) == raw
    os.close(handle)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_threads_keep_to_their_gpu(tmp_path: Path) -> None:
    """Threads that move tensors of the second GPU take no memory of the first one."""
    torch.cuda.init()
    checkpoint = open_headers(write_model(tmp_path / "model", {"a": torch.ones(1 << 20)}))
    before = torch.cuda.mem_get_info(0)[0]
    with torch.cuda.device(1), Transfer(torch.device("cuda")) as transfer:
        assert transfer.read(checkpoint, "a").result().device.index == 1
    assert torch.cuda.mem_get_info(0)[0] > before - (64 << 20)


def test_small_tensors_read_at_once_are_whole(cuda: torch.device, tmp_path: Path) -> None:
    """Hundreds of small tensors, a large and an empty one read at once are on the GPU, aligned as torch aligns them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{n}": torch.randn(n * 977 % 5003, generator=generator).bfloat16() for n in range(300)}
    tensors |= {"large": torch.randn(PIECE_BYTES, generator=generator)[: PIECE_BYTES // 2], "one": torch.ones(())}
    checkpoint = open_headers(write_model(tmp_path / "model", tensors))
    with Transfer(cuda) as transfer:
        for name, pending in transfer.read_many(checkpoint, tensors).items():
            found = pending.result()
            assert found.is_cuda or not found.numel()
            assert found.data_ptr() % 512 == 0
            assert torch.equal(found.cpu(), tensors[name]), name


def test_a_write_waits_for_the_kernel_that_makes_the_tensor(cuda: torch.device, tmp_path: Path) -> None:
    """A tensor that a kernel is still filling is written as it ends up, a hundred times in a row."""
    handle = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with Transfer(cuda) as transfer:
        for number in range(100):
            big = torch.full((2048, 2048), float(number), device=cuda)
            big = big @ torch.eye(2048, device=cuda)
            transfer.write(handle, 0, big).result()
            first = torch.frombuffer(bytearray(os.pread(handle, 4 * 2048 * 2048, 0)), dtype=torch.float32)
            assert bool((first == number).all()), number
    os.close(handle)


def test_what_is_not_finite_is_refused(cuda: torch.device, tmp_path: Path) -> None:
    """A NaN is found on the GPU, and its tensor named."""
    bad = torch.zeros(300, 7)
    bad[200, 3] = float("nan")
    checkpoint = open_headers(write_model(tmp_path / "model", {"bad": bad}))
    with Transfer(cuda) as transfer:
        tensor = transfer.read(checkpoint, "bad").result()
        with pytest.raises(UserError) as caught:
            check_finite(checkpoint, "bad", tensor)
    assert caught.value.code == "tensor-not-finite"
    assert "bad" in str(caught.value)
    assert load_file(tmp_path / "model" / "model.safetensors")["bad"].isnan().sum() == 1
