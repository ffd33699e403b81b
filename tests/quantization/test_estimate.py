"""What a run will need of memory, held against what work of one kind takes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.killed import in_child
from helpers.ranks import in_ranks
from helpers.tiny_families import random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit import distributed
from snugfit.calibration.moments import ExpertMoments
from snugfit.formats.spec import EFFORT, TensorFormat
from snugfit.machine import _status_bytes
from snugfit.methods.calibrated import Calibrated, Observed
from snugfit.methods.folds import Scaling
from snugfit.methods.method import Purpose, Target, WeightGroup
from snugfit.methods.rounding import SLICE
from snugfit.model.forward_pass import make_batches, number_of_batches
from snugfit.quantization import estimate
from snugfit.quantization.quantize import plan_quantization

ROWS, COLUMNS = 2048, 8192
_M_MMAP_THRESHOLD = -3  # of malloc.h: larger memory is mapped, and unmapped when it is freed
CPU = torch.device("cpu")


FORMATS = (
    TensorFormat("nvfp4"),
    TensorFormat("fp8-dynamic"),
    TensorFormat("int4", 32, symmetric=False),
)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_choice_takes_no_more_than_is_estimated(fmt: TensorFormat, tmp_path: Path) -> None:
    """Choosing codes of a group by inputs holds as many copies of it as the estimate counts, and slices beside."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("only Linux tells a process's peak of memory anew")
    target = Target(format=fmt, scale_rule=EFFORT, objective="mse")
    peak = tmp_path / "peak"

    def choose(rows: int) -> None:
        weights = {"a.weight": torch.randn(rows, COLUMNS).bfloat16()}
        observed = Observed({}, {"a": torch.rand(COLUMNS) + 0.1}, Scaling(), {}, {}, {})
        group = WeightGroup(weights=weights, target=target)
        for choice in Calibrated("marlin").choose([group], Purpose(runs=True, observed=observed)):
            assert choice.scale_rule == "weighted"

    def measured() -> None:
        # what is freed goes back at once: how much of it the C library keeps depends on what ran before in this process
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        choose(128)  # kernels are compiled
        before = _status_bytes("VmRSS")
        reset.write_text("5")
        choose(ROWS)
        peak.write_text(str(_status_bytes("VmHWM") - before))

    assert in_child(measured) == 0
    values = ROWS * COLUMNS
    held = 2 * values + 3 * values  # the 16-bit weights, and what is chosen: codes, and values in 16 bits
    slices = estimate._COPIES * 4 * SLICE["cpu"]
    assert 2 * values < int(peak.read_text()) <= held + 4 * values * estimate._CHOSEN + slices


def test_sums_of_experts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that adds up experts' inputs needs room for that: with several processes for each batch of one."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([64] * 8, stop=64))
    model = make_mixture("qwen3_moe", tmp_path / "model", hidden_size=512, inner=1024)
    monkeypatch.setattr(estimate, "rss_bytes", lambda: 0)

    def planned(processes: int, tokens_per_batch: int, effort: str = "fast") -> int:
        monkeypatch.setattr(distributed, "asked_for", lambda: processes)
        options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "tokens_per_batch": tokens_per_batch}
        return plan_quantization(model, "nvfp4-moe", effort=effort, **options).estimate.ram

    sums = 4 * 8 * (512 + 1024)  # of its 8 experts
    one, two, eight = planned(1, 64), planned(2, 64), planned(8, 64)
    samples = 8 * 128 * 1024 * 2
    assert two - one == 4 * sums + samples  # of 8 batches each process has four
    assert eight - one == sums + 7 * samples


def test_batches_are_counted() -> None:
    """The number of batches is that of those that are made."""
    lengths = [3, 70, 64, 30, 100, 90, 64, 5]
    rows = [list(range(length)) for length in lengths]
    for size in (1, 64, 130, 1000):
        for pads in (True, False):
            batches = make_batches(rows, size, CPU, pads=pads)
            assert number_of_batches(lengths, size, pads=pads) == len(batches)
            assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))


def _terms(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(50, generator=generator) * 10.0**place for place in range(count)]


@pytest.mark.parametrize("processes", [1, 3])
def test_sums_of_processes_are_those_of_one(processes: int, tmp_path: Path) -> None:
    """Terms are added in the order of the processes, to the bits of one; a process may have none."""
    terms = _terms(7)
    expected = terms[0]
    for term in terms[1:]:
        expected = expected + term

    def work(rank: int) -> None:
        with distributed.joined("cpu"):
            mine = terms if processes == 1 else {0: terms[:3], 1: [], 2: terms[3:]}[rank]
            found = distributed.added_in_order(mine)
            assert found is not None
            assert torch.equal(found, expected)
            assert all(torch.equal(term, kept) for term, kept in zip(terms, _terms(7), strict=True))
            assert distributed.added_in_order([]) is None

    if processes == 1:
        work(0)
    else:
        assert in_ranks(processes, work) == [0] * processes


def test_the_first_process_keeps_no_batch_of_its_own(tmp_path: Path) -> None:
    """Of several processes the first adds up experts' inputs as they come, the others batch by batch."""

    def work(rank: int) -> None:
        with distributed.joined("cpu"):
            assert (ExpertMoments()._apart is None) == (rank == 0)

    assert in_ranks(2, work) == [0, 0]
