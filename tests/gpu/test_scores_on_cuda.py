"""Scores on CUDA: the same bytes from run to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeTiny
from helpers.tiny_mixtures import make_mixture
from snugfit.data.dataset import make_dataset
from snugfit.model.layout import read_layout
from snugfit.planning.samples import Samples, cut_rows
from snugfit.planning.scoring_cost import estimate_scoring
from snugfit.planning.sensitivity import ScoreSettings, score_samples
from snugfit.progress import Progress
from snugfit.records.scores import Scores

pytestmark = pytest.mark.gpu


class Said(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Keep a line."""
        self.messages.append(text)


def samples() -> Samples:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 64, (8, 512), generator=generator).tolist()
    return cut_rows(make_dataset(rows, "rows"), 512, 8 * 512)


def score(model: Path, work: Path, **options: Any) -> Scores:
    settings = ScoreSettings(formats=("nvfp4", "fp8-dynamic"))
    return score_samples(read_layout(model), samples(), settings, work, device="cuda", tokens_per_batch=2048, **options)


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_two_passes_give_the_same_bytes(cuda: torch.device, make_tiny: MakeTiny, tmp_path: Path, kind: str) -> None:
    """Attention's backward pass adds in one order: scores are the same bytes twice."""
    if kind == "llama":
        model = make_tiny("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2, dtype=torch.bfloat16)
    else:
        model = make_mixture("qwen3_moe", tmp_path / "model", wide=True)
    first, second = (score(model, tmp_path / name) for name in ("first", "second"))
    assert first.to_json() == second.to_json()


def test_an_operation_without_an_order_is_told(
    cuda: torch.device, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch knows no fixed order, the pass goes on without and says that scores will differ."""
    grad, said = torch.autograd.grad, Said()

    def refuse(*args: Any, **options: Any) -> Any:
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError("some_backward_cuda does not have a deterministic implementation")
        return grad(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    model = make_tiny("llama", num_hidden_layers=2)
    assert score(model, tmp_path / "work", progress=said).costs
    assert sum("will differ in last bits" in text for text in said.messages) == 1


@pytest.mark.parametrize("rounding", ["plain", "weighted"])
def test_the_steps_of_scoring_are_timed(cuda: torch.device, make_tiny: MakeTiny, rounding: str) -> None:
    """The estimate runs one layer forwards, backwards and in the formats of plans, and of a proof with its folds."""
    model = make_tiny("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2, dtype=torch.bfloat16)
    settings, part = ScoreSettings(formats=("nvfp4", "fp8-dynamic"), rounding=rounding), samples()
    proof = 3, [len(row.ids) for row in part.rows]
    found = estimate_scoring(read_layout(model), part, settings, device="cuda", tokens_per_batch=2048, proof=proof)
    assert (found.seconds or 0) > 0
    assert (found.proof_seconds or 0) > 0
    assert found.gpu_bytes > 0
