"""The skeleton and the walk against transformers' own loading and forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import MakeTiny
from snugfit.calibration.dataset import Rows, make_rows
from snugfit.errors import UserError
from snugfit.evaluation.fidelity import stream_logits
from snugfit.model import layers
from snugfit.model.checkpoint import open_checkpoint

# family -> what its tiny config needs beside the common settings
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True, "pad_token_id": 0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True, "pad_token_id": 0},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": {},
    "smollm3": {"pad_token_id": 0},
}


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def random_rows(lengths: list[int]) -> Rows:
    generator = torch.Generator().manual_seed(0)
    return make_rows([torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths], "random")


def walked_logits(path: Path, rows: Rows) -> list[Tensor]:
    parts: dict[int, list[Tensor]] = {}
    lengths: dict[int, int] = {}
    for batch, _, logits in stream_logits(path, rows, activations="none"):
        for place, row in enumerate(batch.rows):
            parts.setdefault(row, []).append(logits[place].float())
            lengths[row] = batch.lengths[place]
    return [torch.cat(parts[row])[: lengths[row]] for row in range(len(rows.rows))]


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_equal_a_full_load(family: str, make_tiny: MakeTiny) -> None:
    """Every buffer of the skeleton, persistent or not, has the value that transformers' own loading gives it."""
    path = make_tiny(family, **FAMILIES[family])
    skeleton = layers.build_skeleton(open_checkpoint(path))
    expected = dict(load(path).named_buffers())
    found = dict(skeleton.model.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], buffer), name
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_plain_forward(family: str, make_tiny: MakeTiny) -> None:
    """Layer by layer, over ragged padded rows, the logits are those of transformers' plain forward of each row."""
    path = make_tiny(family, dtype=torch.float32, **FAMILIES[family])
    rows = random_rows([40, 64, 17, 40, 100])
    model = load(path)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows.rows]
    for want, got in zip(expected, walked_logits(path, rows), strict=True):
        assert want.shape == got.shape
        # products of other batch shapes sum in another order
        assert (want - got).abs().max() <= 1e-5 * want.abs().max()


def test_walk_is_exact_for_equal_shapes(make_tiny: MakeTiny) -> None:
    """With rows of one length in one batch the walk gives the plain forward's logits bit for bit."""
    path = make_tiny("llama")
    rows = random_rows([64, 64, 64])
    with torch.no_grad():
        expected = load(path)(input_ids=torch.tensor(rows.rows), use_cache=False).logits.float()
    assert torch.equal(expected, torch.stack(walked_logits(path, rows)))


def test_missing_layer_tensor_is_named(make_tiny: MakeTiny) -> None:
    """A decoder layer that lacks a tensor is refused with that tensor's name."""
    skeleton = layers.build_skeleton(open_checkpoint(make_tiny("llama")))
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in skeleton.layers[1].state_dict().items()}
    state.pop("mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"model\.layers\.1.*missing.*mlp\.up_proj\.weight"):
        layers.resident_layer(skeleton, 1, state, torch.device("cpu"))


def test_tensor_left_without_data_is_an_error() -> None:
    """A module with a buffer still on the meta device is refused, not used with garbage in it."""
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(UserError, match="table"):
        layers.fill(module, {"weight": torch.zeros(4, 4)}, where="here")


def test_tied_head_is_found_under_either_name(make_tiny: MakeTiny) -> None:
    """A tied checkpoint stores one matrix; both the embeddings and the head get it."""
    checkpoint = open_checkpoint(make_tiny("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in checkpoint.tensors
    skeleton = layers.build_skeleton(checkpoint)
    for head in (False, True):
        weights = layers.outer_weights(skeleton, checkpoint, head=head)
        assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
