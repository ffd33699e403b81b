"""Fixtures: tiny random checkpoints made on the spot, and the packaged real model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from snugfit import machine

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # small tensors: threads would cost more than they bring, most of all on a busy machine

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MakeTiny = Callable[..., Path]
FREE_MEMORY = 64 << 30
USERS_OF_FREE_BYTES = (
    "snugfit.quantization.estimate",
    "snugfit.evaluation.continuations",
    "snugfit.evaluation.gpu_memory",
)


@pytest.fixture(scope="session", autouse=True)
def fixed_free_memory() -> Iterator[None]:
    """Main memory counts as free whatever else this machine runs; a test may patch a figure of its own over it."""

    def free(device: torch.device) -> int:
        return FREE_MEMORY if device.type == "cpu" else machine.free_bytes(device)

    with pytest.MonkeyPatch.context() as patch:
        for user in USERS_OF_FREE_BYTES:
            patch.setattr(f"{user}.free_bytes", free)
        yield


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """Returns a function that writes a tiny random model of a transformers family and gives its directory.

    make_tiny("llama", tie_word_embeddings=True, max_shard_size="200KB"): config keys override TINY.
    """

    def make(
        kind: str = "llama",
        *,
        max_shard_size: str = "5GB",
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        **config: Any,
    ) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        directory = tmp_path_factory.mktemp(kind)
        torch.manual_seed(seed)
        settings = AutoConfig.for_model(kind, **{**TINY, **config})
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, 0.08)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return make


@pytest.fixture(scope="session")
def token_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 6 rows of 48 random token ids below 64 (no tokenizer needed)."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 64, (6, 48), generator=generator).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The packaged real model; `make build/smollm2/config.json` unpacks it."""
    path = Path(__file__).parent.parent / "build" / "smollm2"
    if not (path / "config.json").is_file():
        pytest.fail("build/smollm2 is missing: run `make build/smollm2/config.json`")
    return path


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escape lone surrogates of captured output, which cannot be sent from one test process to another."""
    report = yield
    return _printable(report)


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_printable(key): _printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_printable, value))
    return value
