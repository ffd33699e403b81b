"""Whole checkpoints as others write them, evaluated: FP8 KV cache, quantized head, Hugging Face's FP8, ModelOpt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from conftest import MakeTiny
from evaluation.test_evaluate import agree, by_hand, models, rows_file
from helpers.errors import raises
from helpers.evaluations import checkpoints
from snugfit.evaluation import continuations
from snugfit.evaluation.continuations import continue_greedily
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import EvaluatedModel, last_states, open_head, open_model
from snugfit.inspection.inspect import inspect
from snugfit.model import emulate
from snugfit.progress import Progress
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe
from snugfit.records.evaluation import EvalRecord, ModelFigures

CPU = torch.device("cpu")
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
# keys saturate in the first layer, and under one scale a head half of the heads do
TENSOR_SCALES = [(torch.tensor([0.001]), torch.tensor([0.02])), *[(torch.tensor([0.03]), torch.tensor([0.005]))] * 2]
HEAD_SCALES = [(k.expand(2) * torch.tensor([1, 3.7]), v.expand(2) * torch.tensor([1.9, 1])) for k, v in TENSOR_SCALES]
HEAD_SCALES = [(k.reshape(2, 1, 1), v.reshape(2, 1, 1)) for k, v in HEAD_SCALES]
Scales = list[tuple[Tensor, Tensor]]
Rewrite = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewritten(source: Path, target: Path, rewrite: Rewrite, **config: Any) -> Path:
    """A copy of a one-file checkpoint with other tensors, and with `config` in its config.json."""
    shutil.copytree(source, target)
    tensors = rewrite(load_file(source / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    given = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(given | config))
    return target


def quantization_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def with_kv(source: Path, target: Path, scales: Scales, strategy: str = "tensor") -> Path:
    """A compressed-tensors checkpoint that asks for an FP8 KV cache under the `scales` of each layer."""
    more = {
        f"model.layers.{layer}.self_attn.{which}_scale": scale.clone()
        for layer, pair in enumerate(scales)
        for which, scale in zip("kv", pair, strict=True)
    }
    scheme = {"kv_cache_scheme": KV_SCHEME | {"strategy": strategy}}
    return rewritten(source, target, lambda t: t | more, quantization_config=quantization_of(source) | scheme)


# What transformers makes of it, with every rounding done by hand.


def e4m3(values: Tensor) -> Tensor:
    """`values` rounded to E4M3 by ml_dtypes, beyond 448 saturating."""
    codes = values.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype("float32"))


def token_rounding(activations: Tensor) -> Tensor:
    """FP8 under one scale a token."""
    scale = activations.abs().amax(-1, keepdim=True) / 448
    return e4m3(activations / scale) * scale


def group_rounding(activations: Tensor) -> Tensor:
    """FP8 under one scale for every 128 values of a token, the last ones fewer."""
    return torch.cat([token_rounding(part) for part in activations.split(128, -1)], -1)


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, which gets keys and values rounded under the scales of their layer."""

    def __init__(self, config: Any, scales: Scales) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' own, of rounded states."""
        k, v = (e4m3(x / scale) * scale for x, scale in zip((keys, values), self.scales[layer_idx], strict=True))
        kept: tuple[Tensor, Tensor] = super().update(k, v, layer_idx, *args, **kwargs)
        return kept


def by_transformers(source: Path, weights: dict[str, Tensor], rounding: Callable[[Tensor], Tensor] | None) -> Any:
    """The fp32 model `source` with other weights, its linears named there seeing rounded inputs."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=False)
    for name, module in model.named_modules():
        if rounding is not None and f"{name}.weight" in weights and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (rounding(args[0]),))
    return model


def dequantized(path: Path) -> dict[str, Tensor]:
    """The weights that a compressed-tensors file has in E4M3, one scale a channel."""
    tensors = load_file(path / "model.safetensors")
    return {
        name: tensor.float() * tensors[f"{name}_scale"].float()
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float8_e4m3fn
    }


@torch.no_grad()
def logits_of(model: Any, rows: list[list[int]], scales: Scales | None = None) -> Tensor:
    cache = None if scales is None else RoundedCache(model.config, scales)
    result: Tensor = model(input_ids=torch.tensor(rows), past_key_values=cache, use_cache=cache is not None).logits
    return result


def generated(model: Any, prompt: list[int], scales: Scales | None, tokens: int) -> list[int]:
    cache = None if scales is None else RoundedCache(model.config, scales)
    ids = torch.tensor([prompt])
    more = {} if cache is None else {"past_key_values": cache}
    generated_ids = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids), **more
    )
    return [int(token) for token in generated_ids[0, len(prompt) :]]


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    """8 rows of 40 random ids below 64."""
    made: list[list[int]] = torch.randint(3, 64, (8, 40), generator=torch.Generator().manual_seed(2)).tolist()
    return made


@pytest.fixture(scope="module")
def text(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of them."""
    return rows_file(tmp_path_factory.mktemp("text"), rows)


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A tiny llama in fp32."""
    return make_tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def fp8(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its FP8 as we write it."""
    target = tmp_path_factory.mktemp("fp8") / "fp8"
    quantize(llama, "fp8-dynamic", output_dir=target)
    return target


def against(reference: Path, candidates: list[Path], text: Path, **more: Any) -> EvalRecord:
    return evaluate(candidates, reference=reference, dataset=[text], noise_floor="none", **more)


def anonymous(found: ModelFigures) -> dict[str, Any]:
    return vars(found) | {"name": ""}


def mean_kl(found: ModelFigures) -> float:
    assert found.kl is not None
    return found.kl.mean


# An FP8 KV cache.


@pytest.mark.parametrize(("strategy", "scales"), [("tensor", TENSOR_SCALES), ("attn_head", HEAD_SCALES)])
def test_a_declared_kv_cache_is_emulated(
    llama: Path, fp8: Path, text: Path, rows: list[list[int]], tmp_path: Path, strategy: str, scales: Scales
) -> None:
    """Figures are those of transformers with keys and values rounded by hand, and not those of the file without."""
    asks = with_kv(fp8, tmp_path / "asks", scales, strategy)
    record = against(llama, [asks, fp8], text)
    assert [entry.kv_cache for entry in checkpoints(record)] == ["fp8", None]
    assert [entry.formats for entry in checkpoints(record)] == [{"fp8-dynamic": 21}] * 2
    model = by_transformers(llama, dequantized(fp8), token_rounding)
    base = logits_of(AutoModelForCausalLM.from_pretrained(llama).eval(), rows).double()
    found = models(record)
    agree(found["asks"], by_hand(base, logits_of(model, rows, scales).double(), rows), 1e-4)
    agree(found["fp8"], by_hand(base, logits_of(model, rows).double(), rows), 1e-4)
    assert mean_kl(found["asks"]) > 1.5 * mean_kl(found["fp8"])


def test_a_cache_without_scales_has_scale_1(llama: Path, fp8: Path, text: Path, tmp_path: Path) -> None:
    """Where the file holds no scales, keys and values are rounded as they are, as vLLM does."""
    ones = [(torch.ones(1), torch.ones(1))] * 3
    bare, given = with_kv(fp8, tmp_path / "bare", []), with_kv(fp8, tmp_path / "given", ones)
    found = models(against(llama, [bare, given, fp8], text))
    assert anonymous(found["bare"]) == anonymous(found["given"])
    assert mean_kl(found["bare"]) > mean_kl(found["fp8"])


class Told(Progress):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Keep the line."""
        self.messages.append(text)


def keeping(cache: str = "keep") -> LoadedRecipe:
    """A recipe that keeps the source's FP8 in attention."""
    rules = "rules:\n  - {role: mlp, format: int4, scale_rule: absmax}\n  - {role: linear, format: keep}\n"
    return parse_recipe(f"name: mine\nkv_cache: {cache}\n{rules}", where="mine.yaml")


VLLM_NAMES = (
    *("attn.{w}_scale", "{w}_proj.{w}_scale", "qkv_proj.{w}_scale", "qkqkv_proj.{w}_scale", "{w}_proj.output_scale"),
    "{w}_cache.scale",
)


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_scales_under_all_names_that_vllm_reads(name: str, llama: Path, fp8: Path, text: Path, tmp_path: Path) -> None:
    """The figures are those of the scales under self_attn.k_scale; `inspect` and a run that keeps them agree."""
    asks = with_kv(fp8, tmp_path / "asks", TENSOR_SCALES)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, tensor in tensors.items():
            parent, _, leaf = key.rpartition(".")
            found[f"{parent}.{name.format(w=leaf[0])}" if leaf in ("k_scale", "v_scale") else key] = tensor
        return found

    renamed = rewritten(asks, tmp_path / "renamed", rename)
    found = models(against(llama, [asks, renamed], text))
    assert anonymous(found["renamed"]) == anonymous(found["asks"])
    seen = inspect(renamed)
    assert seen.quantization is not None
    assert seen.quantization.kv_cache == "fp8"
    assert sum(part.weights for part in seen.parts if part.part == "KV cache scales") == 6
    assert not seen.problems
    quantize(renamed, keeping(), output_dir=tmp_path / "out")
    assert quantization_of(tmp_path / "out")["kv_cache_scheme"]["num_bits"] == 8
    with raises("already-quantized"):
        plan_quantization(renamed, keeping("fp8"))


@pytest.mark.parametrize("name", ["k_quant.scale", "key_scale", "cache.k_scale_inv", "attn.impl.v_scale"])
def test_an_unknown_scale_inside_attention_is_refused(name: str, fp8: Path, text: Path, tmp_path: Path) -> None:
    """A scale of keys or values under an unknown name is refused by all verbs, and not taken for 1.0."""
    full = f"model.layers.1.self_attn.{name}"
    asks = rewritten(with_kv(fp8, tmp_path / "asks", []), tmp_path / "odd", lambda t: t | {full: torch.ones(1)})
    for verb in (lambda: evaluate([asks], dataset=[text]), lambda: plan_quantization(asks, "int4-w4a16-absmax")):
        with raises("quantization-unknown", where=asks) as caught:
            verb()
        assert full in caught.value.what
    assert any(full in remark for remark in inspect(asks).remarks)


def test_two_scales_that_differ_are_refused(fp8: Path, tmp_path: Path) -> None:
    """Two names for the scale of one cache may both be there if they hold one value."""
    asks = with_kv(fp8, tmp_path / "asks", TENSOR_SCALES)

    def opened(factor: int) -> EvaluatedModel:
        more = {"model.layers.0.self_attn.attn.k_scale": TENSOR_SCALES[0][0] * factor}
        return open_model(rewritten(asks, tmp_path / f"{factor}", lambda tensors: tensors | more))

    found = emulate.read_kv_scales(opened(1).checkpoint, "model.layers.0")
    assert [float(scale) for scale in found] == pytest.approx([0.001, 0.02])
    with raises("scale-invalid"):
        emulate.read_kv_scales(opened(2).checkpoint, "model.layers.0")


def test_a_cache_without_scales_is_reported(fp8: Path, text: Path, tmp_path: Path) -> None:
    """Where a declared FP8 cache has no scales, `eval`, `inspect` and `quantize` say in how many layers."""
    for name, scales, count in (("bare", [], "3 of 3"), ("partly", TENSOR_SCALES[:1], "2 of 3")):
        asks = with_kv(fp8, tmp_path / name, scales)
        seen = inspect(asks).quantization
        assert seen is not None
        assert count in str(seen.kv_cache)
        assert any(count in note for note in open_model(asks).notes)
        assert any(count in note for note in plan_quantization(asks, keeping()).notes)
        told = Told()
        evaluate([asks], dataset=[text], noise_floor="none", progress=told)
        assert any(count in message for message in told.messages)


def test_profile_none_leaves_the_cache_alone(llama: Path, fp8: Path, text: Path, tmp_path: Path) -> None:
    """Without an engine no cache is rounded: the figures are exactly those of the file without a cache scheme."""
    asks = with_kv(fp8, tmp_path / "asks", TENSOR_SCALES)
    found = models(against(llama, [asks, fp8], text, activations="none"))
    assert anonymous(found["asks"]) == anonymous(found["fp8"])


@pytest.mark.parametrize("free", [None, 0])
def test_continuations_read_the_rounded_cache(
    llama: Path,
    fp8: Path,
    rows: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
) -> None:
    """Greedy continuations are those of transformers with a rounded cache, also if layers are read for each token."""
    if free is not None:
        monkeypatch.setattr(continuations, "free_bytes", lambda _: free)
    asks = with_kv(fp8, tmp_path / "asks", TENSOR_SCALES)
    prompts = [row[: 20 + n] for n, row in enumerate(rows[:3])]
    found = continue_greedily(open_model(asks), prompts, CPU, tokens=10)
    model = by_transformers(llama, dequantized(fp8), token_rounding)
    assert found == [generated(model, prompt, TENSOR_SCALES, 10) for prompt in prompts]
    plainly = continue_greedily(open_model(fp8), prompts, CPU, tokens=10)
    assert plainly == [generated(model, prompt, None, 10) for prompt in prompts]
    assert found != plainly
    assert continue_greedily(open_model(asks, activations="none"), prompts, CPU, tokens=10) == [
        generated(by_transformers(llama, dequantized(fp8), None), prompt, None, 10) for prompt in prompts
    ]


def test_a_stored_reference_knows_its_cache(llama: Path, text: Path, tmp_path: Path) -> None:
    """A 16-bit reference with an FP8 cache is stored once for every profile that makes another model of it."""
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": None}
    whole = rewritten(llama, tmp_path / "whole", lambda t: t, quantization_config=config)
    asks = with_kv(whole, tmp_path / "asks", TENSOR_SCALES)
    for profile in ("none", "vllm-blackwell"):
        plainly = against(asks, [llama], text, activations=profile)
        stored = against(asks, [llama], text, activations=profile, reference_cache=tmp_path / "cache")
        assert plainly.reference is not None
        assert (plainly.reference.kv_cache, plainly.reference.formats) == ("fp8", {})
        assert stored.contexts[0].models[0].perplexity == plainly.contexts[0].models[0].perplexity


# A quantized head.


def with_fp8_head(source: Path, target: Path) -> Path:
    """A copy whose output head is in E4M3, one scale a channel."""

    def rewrite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["lm_head.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        codes = e4m3(weight / scale).to(torch.float8_e4m3fn)
        return tensors | {"lm_head.weight": codes, "lm_head.weight_scale": scale}

    arguments = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["re:.*lm_head"],
        "weights": arguments | {"strategy": "channel", "dynamic": False},
        "input_activations": arguments | {"strategy": "token", "dynamic": True},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "format": "float-quantized"}
    return rewritten(source, target, rewrite, quantization_config=config)


@pytest.mark.parametrize("profile", ["vllm-blackwell", "none"])
def test_a_quantized_head_is_read(llama: Path, text: Path, rows: list[list[int]], tmp_path: Path, profile: str) -> None:
    """Logits of an FP8 head are those of its dequantized weights, with rounded inputs under an engine's profile."""
    head = with_fp8_head(llama, tmp_path / "head")
    model = by_transformers(llama, dequantized(head), None if profile == "none" else token_rounding)
    expected = logits_of(model, rows)
    subject = open_model(head, activations=profile)
    states = last_states(subject, rows, [torch.arange(40)] * len(rows), CPU)
    assert torch.allclose(open_head(subject, CPU)(torch.stack(states)), expected, rtol=1e-5, atol=1e-5)
    record = against(llama, [head], text, activations=profile)
    assert checkpoints(record)[0].formats == {"fp8-dynamic": 1}
    base = logits_of(AutoModelForCausalLM.from_pretrained(llama).eval(), rows).double()
    agree(models(record)["head"], by_hand(base, expected.double(), rows), 1e-4)


def test_continuations_round_what_a_quantized_head_sees(llama: Path, rows: list[list[int]], tmp_path: Path) -> None:
    """Of 80 greedy tokens under an engine's profile all are transformers' with rounded inputs of the head."""
    head = with_fp8_head(llama, tmp_path / "head")
    model, without = (by_transformers(llama, dequantized(head), rounding) for rounding in (token_rounding, None))
    found = continue_greedily(open_model(head), rows, CPU, tokens=10)
    assert found == [generated(model, row, None, 10) for row in rows]
    assert found != [generated(without, row, None, 10) for row in rows]


# Checkpoints of other tools.


def to_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of a weight and the scales of its blocks of 128 x 128, those at the edges smaller."""
    sides = [range(0, size, 128) for size in weight.shape]
    blocks = [[weight[i : i + 128, j : j + 128].float() for j in sides[1]] for i in sides[0]]
    scales = torch.tensor([[float(block.abs().max()) / 448 for block in line] for line in blocks])
    codes = [
        [e4m3(block / s) for block, s in zip(line, row, strict=True)] for line, row in zip(blocks, scales, strict=True)
    ]
    return torch.cat([torch.cat(line, 1) for line in codes]).to(torch.float8_e4m3fn), scales


def from_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    rows, columns = codes.shape
    return codes.float() * scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def test_hugging_face_fp8_is_evaluated(make_tiny: MakeTiny, rows: list[list[int]], text: Path, tmp_path: Path) -> None:
    """Blocks of 128 x 128 with smaller ones at the edges: figures are those of transformers' forward by hand."""
    source = make_tiny("llama", dtype=torch.float32, hidden_size=192, intermediate_size=320)
    exact = load_file(source / "model.safetensors")
    made = {name: to_blocks(weight) for name, weight in exact.items() if "_proj." in name}
    parts = {name: codes for name, (codes, _) in made.items()}
    parts |= {f"{name}_scale_inv": scales for name, (_, scales) in made.items()}
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    blocks = rewritten(source, tmp_path / "blocks", lambda t: t | parts, quantization_config=config)
    base = logits_of(AutoModelForCausalLM.from_pretrained(source).eval(), rows).double()
    weights = {name: from_blocks(*pair) for name, pair in made.items()}
    for profile, rounding in (("vllm-blackwell", group_rounding), ("vllm-cpu", None)):
        record = against(source, [blocks], text, activations=profile)
        assert sum(checkpoints(record)[0].formats.values()) == 21
        assert checkpoints(record)[0].kv_cache is None
        expected = logits_of(by_transformers(source, weights, rounding), rows).double()
        agree(models(record)["blocks"], by_hand(base, expected, rows), 1e-4)


def to_modelopt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """compressed-tensors' names and divisors in ModelOpt's names, with multipliers."""
    result = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            result[f"{module}.weight"] = tensor
        elif suffix == "weight_global_scale":
            result[f"{module}.weight_scale_2"] = tensor.reciprocal().reshape(())
        elif suffix == "input_global_scale":
            result[f"{module}.input_scale"] = tensor.reciprocal().reshape(())
        elif suffix in ("k_scale", "v_scale"):
            result[f"{module}.{suffix[0]}_proj.{suffix}"] = tensor.reshape(())
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("separate", [False, True])
def test_modelopt_nvfp4_is_evaluated(make_tiny: MakeTiny, token_rows: Path, tmp_path: Path, *, separate: bool) -> None:
    """The same codes, scales and FP8 cache in ModelOpt's layout, its config in either file, give the same figures."""
    source = make_tiny("llama")
    quantize(source, "nvfp4-four-over-six", output_dir=tmp_path / "plain", dataset=[token_rows])
    snugfit = with_kv(tmp_path / "plain", tmp_path / "snugfit", TENSOR_SCALES)
    details: dict[str, Any] = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    if separate:
        modelopt = rewritten(snugfit, tmp_path / "modelopt", to_modelopt, quantization_config=None)
        whole = {"producer": {"name": "modelopt"}, "quantization": details | {"exclude_modules": ["lm_head"]}}
        (modelopt / "hf_quant_config.json").write_text(json.dumps(whole))
    else:
        given = {"quant_method": "modelopt", "ignore": ["lm_head"]} | details
        modelopt = rewritten(snugfit, tmp_path / "modelopt", to_modelopt, quantization_config=given)
    for profile in ("vllm-blackwell", "marlin", "none"):
        record = against(source, [snugfit, modelopt, tmp_path / "plain"], token_rows, activations=profile)
        assert [entry.formats for entry in checkpoints(record)] == [{"nvfp4": 21}] * 3
        assert [entry.kv_cache for entry in checkpoints(record)] == ["fp8", "fp8", None]
        found = models(record)
        assert anonymous(found["modelopt"]) == anonymous(found["snugfit"])
        assert (mean_kl(found["snugfit"]) == mean_kl(found["plain"])) == (profile == "none")
        assert mean_kl(found["snugfit"]) > 0
