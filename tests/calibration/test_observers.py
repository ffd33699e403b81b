"""Measurements while samples pass a layer: keys and values of real tokens as they would be cached."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from conftest import MakeTiny
from snugfit.calibration.observers import KVAmax
from snugfit.evaluation.evaluated_model import open_model, resident_layer
from snugfit.model import forward_pass, layers

CPU = torch.device("cpu")
# rows of different lengths: batches are padded
ROWS = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 41, 3, 64)]


def batch_of(lengths: tuple[int, ...], width: int) -> forward_pass.Batch:
    return forward_pass.Batch(tuple(range(len(lengths))), torch.zeros(len(lengths), width, dtype=torch.int64), lengths)


def test_pads_are_left_out() -> None:
    """The largest key and value of all real tokens, heads and calls count, and those of pads do not."""
    found = KVAmax()
    keys, values = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    keys[0, 2, 1, 4], values[1, 0, 0, 0] = -7.0, 2.0
    keys[1, :, 2:], values[0, :, 3:] = 100.0, float("nan")
    found.before(batch_of((3, 2), 4))
    assert found.update(keys, values, 0) == (keys, values)
    assert found.amax == (7.0, 2.0)
    found.before(batch_of((4, 4), 4))
    found.update(torch.full((2, 3, 4, 5), 3.0), torch.full((2, 3, 4, 5), -3.0), 0)
    assert found.amax == (7.0, 3.0)


def test_nan_is_not_lost() -> None:
    """A NaN among real keys or values stays in the result, so that no scale is made of it."""
    found = KVAmax()
    found.before(batch_of((4,), 4))
    values = torch.ones(1, 2, 4, 5)
    values[0, 1, 2, 3] = float("nan")
    found.update(torch.ones(1, 2, 4, 5), values, 0)
    found.update(torch.ones(1, 2, 4, 5), torch.ones(1, 2, 4, 5), 0)
    assert found.amax is not None
    assert found.amax[0] == 1.0
    assert found.amax[1] != found.amax[1]


def test_a_layer_without_a_cache_has_no_result() -> None:
    """States of convolutions and of linear attention are not measured."""
    found = KVAmax()
    states = torch.randn(2, 3)
    assert found.update_conv_state(states, 0) is states
    assert found.update_recurrent_state(states, 0) is states
    before: list[Any] = [getattr(found, f"get_{kind}_state")(0) for kind in ("conv", "recurrent")]
    assert before == [None, None]
    assert (found.get_seq_length(), found.has_previous_state(0), found.amax) == (0, False, None)


class NotingCache(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, which records the keys and values that it gets."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.given: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' own."""
        self.given.append((keys, values))
        kept: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return kept


def run_layers(source: Path, *, watched: bool) -> tuple[list[tuple[float, float] | None], list[forward_pass.Batch]]:
    """Each layer's largest key and value, and the batches behind the last layer, with a KVAmax or without."""
    evaluated = open_model(source, activations="none")
    batches = forward_pass.make_batches(ROWS, 4096, CPU)
    forward_pass.embed(
        evaluated.skeleton, layers.outer_weights(evaluated.skeleton, evaluated.checkpoint, head=False), batches, CPU
    )
    found = []
    for index in range(len(evaluated.skeleton.layers)):
        layer, _ = resident_layer(evaluated, index, CPU)
        kv = KVAmax()
        forward_pass.run_layer(layer, index, batches, kv.before if watched else None, cache=kv if watched else None)
        found.append(kv.amax)
    return found, batches


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_largest_keys_and_values_of_transformers_cache(make_tiny: MakeTiny, kind: str) -> None:
    """On padded batches the results are the largest keys and values that transformers caches sample by sample."""
    more = {"head_dim": 16} if kind in ("qwen3", "gemma3_text") else {}
    source = make_tiny(kind, dtype=torch.float32, pad_token_id=0, **more)
    found, _ = run_layers(source, watched=True)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    expected = torch.zeros(len(found), 2)
    for row in ROWS:
        cache = NotingCache(model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([row]), past_key_values=cache, use_cache=True)
        largest = torch.tensor([[float(x.abs().max()) for x in pair] for pair in cache.given])
        expected = torch.maximum(expected, largest)
    assert torch.allclose(torch.tensor(found), expected, rtol=1e-5)


def test_keys_and_values_pass_unchanged(make_tiny: MakeTiny) -> None:
    """Measuring keys and values changes no hidden state, bit for bit."""
    source = make_tiny("llama")
    (_, watched), (_, plain) = run_layers(source, watched=True), run_layers(source, watched=False)
    for one, other in zip(watched, plain, strict=True):
        valid = torch.ones(one.tokens.shape, dtype=torch.bool) if one.valid is None else copy.copy(one.valid)
        assert torch.equal(one.hidden[valid], other.hidden[valid])
