"""Text families on tiny random models: forward passes, quantize and evaluate against transformers' own forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import MakeTiny
from helpers.errors import raises
from helpers.run_model import stream_logits
from helpers.sweeps import thinned
from helpers.tiny_families import (
    FAMILIES,
    all_tensors,
    load,
    perplexity_of,
    random_rows,
    same,
    unpack_nvfp4_exactly,
    write_rows,
)
from snugfit.data.dataset import make_dataset
from snugfit.evaluation.continuations import continue_greedily
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import open_head, open_model, resident_layer
from snugfit.model import forward_pass, layer_stubs, layers
from snugfit.model.layout import read_layout
from snugfit.model.skeleton import build_skeleton
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.recipes.recipe import parse_recipe

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


def layer_outputs(model: Any, decoder_layers: Sequence[nn.Module], tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each layer of transformers' model gives for a batch, and the logits."""
    outputs: list[Tensor] = []

    def note(_layer: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in decoder_layers]
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits


# bf16, in which models come, for all; fp32 for one family of each kind of layer, and `make slow` for the others
BOTH_DTYPES = ("llama", "gemma2", "gemma4_text", "granite", "qwen3_next", "falcon_h1", "bamba")


@pytest.mark.parametrize(
    ("family", "dtype"),
    thinned(lambda family, dtype: dtype == torch.bfloat16 or family in BOTH_DTYPES, FAMILIES, DTYPES),
    ids=str,
)
@torch.no_grad()
def test_forward_pass_is_transformers_own(family: str, dtype: torch.dtype, make_tiny: MakeTiny) -> None:
    """Hidden states after every layer, and logits, are transformers' bit for bit, also for padded rows.

    Logits of a padded row are those of the row alone, except for the order in which products of its shape sum.
    """
    path = make_tiny(family, dtype=dtype, **FAMILIES[family])
    model = load(path)
    evaluated = open_model(path, activations="none")
    assert evaluated.arithmetic == dtype
    rows = random_rows([40, 40, 40, 70, 100, 100, 17, 64], stop=64)
    batches = forward_pass.make_batches(rows, 160, CPU)
    assert any(batch.valid is not None for batch in batches)
    skeleton = evaluated.skeleton
    forward_pass.embed(skeleton, layers.outer_weights(skeleton, evaluated.checkpoint, head=False), batches, CPU)
    real = dict(model.named_modules())[skeleton.layers_name]
    expected = [layer_outputs(model, list(real), batch.tokens) for batch in batches]
    for index in range(len(skeleton.layers)):
        layer, _ = resident_layer(evaluated, index, CPU)
        forward_pass.run_layer(layer, index, batches)
        for batch, (states, _) in zip(batches, expected, strict=True):
            assert torch.equal(batch.hidden, states[index])
    head = open_head(evaluated, CPU)
    for batch, (_, logits) in zip(batches, expected, strict=True):
        found = head(batch.hidden)
        assert torch.equal(found, logits)
        for place, row in enumerate(batch.rows):
            alone = model(input_ids=torch.tensor([rows[row]]), use_cache=False).logits[0]
            difference = (found[place, : len(rows[row])] - alone).abs().max() / alone.abs().max()
            assert difference < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_files_run_in_transformers(
    family: str, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers loads the hybrid of every family and gives snugfit's logits; all other tensors are the source's.

    `evaluate` finds the perplexities of transformers' forward, and a small KL.
    """
    check_quantized(family, "nvfp4-fp8-hybrid-four-over-six", make_tiny, tmp_path, monkeypatch)


UNUSUAL, RECIPES = (
    ("phi3", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "gemma4_text"),
    ("fp8-dynamic", "nvfp4-four-over-six"),
)


@pytest.mark.parametrize(
    ("family", "recipe"),
    # recipes in turn; `make slow` has all
    thinned(lambda family, recipe: UNUSUAL.index(family) % 2 == RECIPES.index(recipe), UNUSUAL, RECIPES),
)
def test_other_recipes(
    family: str, recipe: str, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One format for all linears also works for fused projections, linear attention and per-layer inputs."""
    check_quantized(family, recipe, make_tiny, tmp_path, monkeypatch)


def check_quantized(
    family: str, recipe: str, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack_nvfp4_exactly(monkeypatch)
    source, target = make_tiny(family, dtype=torch.float32, **FAMILIES[family]), tmp_path / "out"
    rows = random_rows([48] * 6, seed=1, stop=64)
    text = write_rows(tmp_path / "rows.jsonl", rows)
    record = quantize(source, recipe, output_dir=target, dataset=[text])
    kept = [tensor.name for tensor in record.tensors if tensor.format == "as it was"]
    before, after = all_tensors(source), all_tensors(target)
    assert len(kept) < len(before)
    assert all(same(before[name], after[name]) for name in kept)
    tokens = torch.tensor(rows)
    with torch.no_grad():
        expected = load(target)(input_ids=tokens, use_cache=False).logits.float()
        original = load(source)(input_ids=tokens, use_cache=False).logits.float()
    found = torch.cat([part.float() for _, _, part in stream_logits(target, make_dataset(rows, "random"))], dim=1)
    # a value halfway between two codes may become the other one; a linear in 16 bits makes 0.05
    assert float((expected - found).abs().mean() / expected.abs().mean()) < 0.01
    reference, candidate = evaluate([target], reference=source, dataset=[text]).contexts[0].models[:2]
    assert reference.perplexity == pytest.approx(perplexity_of(original, rows), rel=1e-5)
    assert candidate.perplexity == pytest.approx(perplexity_of(found, rows), rel=1e-5)
    assert candidate.kl is not None
    assert 0 < candidate.kl.mean < 0.2


@pytest.mark.parametrize(
    "family", ["falcon_h1", "gemma4_text", "qwen3_5_text", "granitemoehybrid", "bamba", "gpt_neox"]
)
def test_continuations_are_transformers_own(family: str, make_tiny: MakeTiny) -> None:
    """Greedy continuations with a cache, recurrent states and shared keys equal those of transformers' generate."""
    path = make_tiny(family, dtype=torch.float32, **FAMILIES[family])
    prompt = [5, 6, 7, 8, 9]
    found = continue_greedily(open_model(path), [prompt], CPU, tokens=8)[0]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    expected = load(path).generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    assert found == expected


def test_a_head_of_another_name_is_kept(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """GPT-NeoX's files say embed_out for transformers' lm_head: the head is copied, ignored and found again."""
    source = make_tiny("gpt_neox")
    skeleton = build_skeleton(read_layout(source))
    assert skeleton.stored["lm_head.weight"] == "embed_out.weight"
    assert skeleton.linears()["embed_out"] == "lm_head"
    text = write_rows(tmp_path / "rows.jsonl", random_rows([32] * 2))
    quantize(source, "fp8-dynamic", output_dir=tmp_path / "out", dataset=[text])
    assert same(all_tensors(tmp_path / "out")["embed_out.weight"], all_tensors(source)["embed_out.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "embed_out" in config["quantization_config"]["ignore"]


@pytest.mark.parametrize(
    ("family", "masks"), [("mistral", 1), ("gemma2", 2), ("gemma3_text", 1), ("gpt_oss", 2), ("llama", 0)]
)
def test_one_mask_of_each_kind(family: str, masks: int, make_tiny: MakeTiny) -> None:
    """Many rows of one length share one mask [T, T] of each kind, in all batches; causal attention may need none."""
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "sliding_window": 16}
    layout = read_layout(make_tiny(family, **(FAMILIES.get(family) or {} if family != "gpt_oss" else more)))
    skeleton, checkpoint = build_skeleton(layout), layout.checkpoint
    batches = forward_pass.make_batches(random_rows([40] * 10), 200, CPU)
    assert [len(batch.rows) for batch in batches] == [3, 3, 3, 1]
    forward_pass.embed(skeleton, layers.outer_weights(skeleton, checkpoint, head=False), batches, CPU)
    given = [
        value
        for batch in batches
        for args, kwargs in batch.calls
        for value in (*args, *kwargs.values())
        if isinstance(value, Tensor) and value.dim() == 4
    ]
    held = {mask.untyped_storage().data_ptr(): mask.untyped_storage().nbytes() for mask in given}
    assert min(1, masks) <= len(held) <= masks
    assert all(size <= 40 * 40 * torch.bfloat16.itemsize for size in held.values())


def test_tokens_own_inputs_are_not_shared(make_tiny: MakeTiny) -> None:
    """Inputs of layers that depend on the tokens, such as Gemma 4's per-layer embeddings, are each batch's own."""
    layout = read_layout(make_tiny("gemma4_text", **FAMILIES["gemma4_text"]))
    skeleton, checkpoint = build_skeleton(layout), layout.checkpoint
    rows = random_rows([40, 40])
    batches = forward_pass.make_batches([rows[0], rows[1], rows[0]], 40, CPU)
    forward_pass.embed(skeleton, layers.outer_weights(skeleton, checkpoint, head=False), batches, CPU)
    first, second, third = (batch.calls[1][0][0] for batch in batches)
    assert first.shape == (1, 40, 16)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    states = [batch.calls[0][1]["shared_kv_states"] for batch in batches]
    assert len({id(state) for state in states}) == len(batches)
    assert all(batch.calls[2][1]["shared_kv_states"] is batch.calls[0][1]["shared_kv_states"] for batch in batches)
    assert skeleton.carries_state
    assert not build_skeleton(read_layout(make_tiny("llama"))).carries_state


def test_names_within_a_layer(make_tiny: MakeTiny) -> None:
    """A layer's tensors and linears have the file's names; buffers that transformers computes are not listed."""
    skeleton = build_skeleton(read_layout(make_tiny("qwen3_5_text", **FAMILIES["qwen3_5_text"])))
    assert skeleton.stored_layers_name == skeleton.layers_name == "model.layers"
    assert "linear_attn.A_log" in skeleton.names_of_layer(0).used
    assert "linear_attn.conv1d.weight" in skeleton.names_of_layer(0).used
    assert "self_attn.rotary_emb.inv_freq" not in skeleton.names_of_layer(1).used
    assert skeleton.names_of_layer(0).modules["linear_attn.in_proj_qkv"] == "linear_attn.in_proj_qkv"


@pytest.mark.parametrize(
    ("family", "more", "shape"),
    [
        (
            "gemma3n_text",
            {"head_dim": 16, "sliding_window": 16, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
            | {"hidden_size_per_layer_input": 16, "laurel_rank": 8, "activation_sparsity_pattern": None}
            | {"pad_token_id": 0, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "[4, 1, 4, 64]",
        ),
    ],
    ids=["parallel-states"],
)
def test_hidden_states_of_another_kind_are_refused(
    family: str, more: dict[str, Any], shape: str, make_tiny: MakeTiny
) -> None:
    """A family whose layers pass more than one hidden state a token is refused before any weight is read."""
    with raises("architecture-unsupported", where="config.json") as caught:
        open_model(make_tiny(family, **more))
    assert shape in caught.value.what


def test_layers_that_share_weights_are_refused(make_tiny: MakeTiny) -> None:
    """Zamba 2, whose attention layers are one block, is refused: layer by layer its copies would get other codes."""
    mamba = {"mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "num_key_value_heads": 4}
    kinds = {"num_hidden_layers": 4, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"] * 2}
    with raises("architecture-unsupported", where="config.json") as caught:
        open_model(make_tiny("zamba2", pad_token_id=0, hybrid_layer_ids=[1, 3], **mamba, **kinds))
    assert "layers.3.shared_transformer from layers.1.shared_transformer" in caught.value.what


class Decoder(nn.Module):
    """Layers in a loop that scales hidden states, and takes the first part of what layers return if `first`."""

    def __init__(self, scale: float, *, first: bool, order: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.order = order
        self.embed = nn.Embedding(8, 4, device="meta")
        self.layers = nn.ModuleList(nn.Linear(4, 4, device="meta") for _ in range(3))
        self.scale, self.first = scale, first

    def get_input_embeddings(self) -> nn.Module:
        """The module that a stub replaces."""
        return self.embed

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Hidden states after the last layer."""
        hidden = self.embed(input_ids)
        for number in self.order:
            output = self.layers[number](hidden)
            hidden = output[0] if self.first else output
            hidden = hidden * self.scale if self.scale != 1 else hidden
        result: Tensor = hidden
        return result


@pytest.mark.parametrize("first", [False, True])
def test_how_a_decoder_runs_its_layers(first: bool) -> None:
    """A loop that takes the first part of what a layer returns is recognised; one that scales states is refused."""
    tokens = torch.zeros((1, 4), dtype=torch.int64)
    plain, scaled = Decoder(1.0, first=first), Decoder(0.5, first=first)
    assert layer_stubs.trace_layer_calls(plain, plain.layers, tokens, where="here").returns_tuple == first
    with raises("architecture-unsupported", where="here"):
        layer_stubs.trace_layer_calls(scaled, scaled.layers, tokens, where="here")


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((0, 1, 2, 0, 1, 2), "layer 0 more than once"),
        ((0, 1, 1, 2), "layer 1 more than once"),
        ((0, 2), "not run layer 1"),
        ((1, 2), "not run layer 0"),
        ((0, 1), "not run layer 2"),
        ((0, 2, 1), "layer 1 after layer 2"),
        ((), "not run layer 0"),
    ],
)
def test_layers_out_of_order_are_refused(order: tuple[int, ...], words: str) -> None:
    """A decoder that skips, repeats or swaps layers is refused with the reason; no layer gets another one's call."""
    decoder = Decoder(1.0, first=False, order=order)
    with raises("architecture-unsupported", where="here") as caught:
        layer_stubs.trace_layer_calls(decoder, decoder.layers, torch.zeros((1, 4), dtype=torch.int64), where="here")
    assert words in caught.value.what


def test_layers_that_config_says_text_does_not_run() -> None:
    """A decoder may skip exactly the layers that its config names; a call of one of these is refused."""
    tokens = torch.zeros((1, 4), dtype=torch.int64)
    decoder = Decoder(1.0, first=False, order=(0, 2))
    found = layer_stubs.trace_layer_calls(decoder, decoder.layers, tokens, where="here", skipped={1})
    assert list(found.calls) == [0, 2]
    every = Decoder(1.0, first=False)
    with raises("architecture-unsupported", where="here") as caught:
        layer_stubs.trace_layer_calls(every, every.layers, tokens, where="here", skipped={1})
    assert "layer 1" in caught.value.what


def test_an_order_that_depends_on_the_text_is_refused(make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over samples that calls other layers than the trace did is refused before any layer is run."""
    layout = read_layout(make_tiny("llama"))
    skeleton = build_skeleton(layout)
    weights = layers.outer_weights(skeleton, layout.checkpoint, head=False)
    decoder: Any = type(skeleton.model.model)
    forward = decoder.forward

    def without_a_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.layers = nn.ModuleList([self.layers[0], self.layers[2]])
        self.config.num_hidden_layers = 2
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(decoder, "forward", without_a_layer)
    batches = forward_pass.make_batches(random_rows([40]), 200, CPU)
    with raises("architecture-unsupported", where="model.layers"):
        forward_pass.embed(skeleton, weights, batches, CPU)


@pytest.mark.parametrize("kind", ["llama", "house_model"])
def test_code_in_a_checkpoint_never_runs(kind: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Python files that a config's auto_map names are not run: a known family works, an unknown one is refused."""
    path = tmp_path / "model"
    shutil.copytree(make_tiny("llama"), path)
    marker = tmp_path / "ran"
    (path / "house.py").write_text(f"open({str(marker)!r}, 'w').close()\nHouseConfig = HouseModel = None\n")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseModel"}
    config |= {"model_type": kind, "auto_map": names | {"AutoModel": "house.HouseModel"}}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if kind == "llama":
        text = write_rows(tmp_path / "rows.jsonl", random_rows([32] * 2))
        quantize(path, "nvfp4-four-over-six", output_dir=tmp_path / "out", dataset=[text])
        assert evaluate([tmp_path / "out"], dataset=[text]).contexts[0].models[0].perplexity > 1
    else:
        for run in (lambda: open_model(path), lambda: quantize(path, "fp8-dynamic", output_dir=tmp_path / "out")):
            with raises("architecture-unknown", where=path / "config.json") as caught:
                run()
            assert "house_model" in caught.value.what
    assert not marker.exists()


def test_layers_whose_states_change_are_refused_before_a_run(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Mamba's residual in fp32 is refused by dry run, run and `evaluate` alike; what needs no samples is written."""
    source = make_tiny("mamba2", num_heads=8, head_dim=16, state_size=16, n_groups=1)
    text = write_rows(tmp_path / "rows.jsonl", random_rows([32] * 8))
    recipe = parse_recipe("name: a\nrules:\n- {role: linear, format: nvfp4}\n", where="a.yaml")
    for run in (
        lambda: plan_quantization(source, recipe, dataset=[text]),
        lambda: quantize(source, recipe, output_dir=tmp_path / "out", dataset=[text]),
        lambda: evaluate([source], dataset=[text]),
    ):
        with raises("architecture-unsupported", where=source) as caught:
            run()
        assert "torch.float32" in caught.value.what
    assert not list(tmp_path.glob("out*"))
    quantize(source, "fp8-dynamic", output_dir=tmp_path / "out")


def test_states_wider_than_embeddings(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Hidden states may have another width than embeddings (OPT 350M): the run's logits are transformers'."""
    source = make_tiny("opt", ffn_dim=128, word_embed_proj_dim=32, do_layer_norm_before=False, dtype=torch.float32)
    rows = random_rows([24] * 8)
    text = write_rows(tmp_path / "rows.jsonl", rows)
    assert build_skeleton(read_layout(source)).hidden_size == 64
    recipe = parse_recipe("name: a\nrules:\n- {role: linear, format: nvfp4a16}\n", where="a.yaml")
    record = quantize(source, recipe, output_dir=tmp_path / "out", dataset=[text], effort="good")
    assert [trial.name for trial in record.trials][:2] == ["plain", "gptq+folds"]
    found = torch.cat([part for _, _, part in stream_logits(source, make_dataset(rows, "random"))], dim=1)
    with torch.no_grad():
        assert torch.allclose(found, load(source)(input_ids=torch.tensor(rows)).logits, atol=1e-5)
