"""Modules and layers read from disk as an engine runs them: fused groups, damaged scales, an FP8 KV cache."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from helpers.errors import raises
from helpers.rounding import round_group
from snugfit.dialects.compressed_tensors import encode, quantization_config
from snugfit.dialects.dialect import Dialect, open_dialect
from snugfit.engines.profiles import PROFILES
from snugfit.formats import fp8, nvfp4
from snugfit.formats.quantized_weight import dequantize
from snugfit.formats.spec import WHOLE_ROW, InputKind, TensorFormat
from snugfit.model import emulate
from snugfit.storage.checkpoint import Checkpoint, read_tensor
from snugfit.storage.open import open_checkpoint

E4M3 = torch.float8_e4m3fn
PREFIX = "model.layers.0"
NAMES = ("q_proj", "k_proj", "v_proj")
ENGINES = [profile for profile in PROFILES if profile != "none"]
W4A4, W4A16 = TensorFormat("nvfp4"), TensorFormat("nvfp4a16")


class Attention(nn.Module):
    """Three linears that engines fuse, one that they do not, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        for name in (*NAMES, "o_proj"):
            self.add_module(name, nn.Linear(64, 32, bias=name == "q_proj"))
        self.norm = nn.LayerNorm(64, bias=False)


class Layer(nn.Module):
    """A decoder layer with this attention."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()


def checkpoint(
    directory: Path,
    quantized: Mapping[str, Mapping[str, Tensor]],
    config: dict[str, Any],
    more: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """A file with the given parts of some linears of Layer, its other tensors in 16 bits, and a config."""
    torch.manual_seed(0)
    tensors = {f"{PREFIX}.{name}": tensor for name, tensor in Layer().state_dict().items()}
    for name, parts in quantized.items():
        module = f"{PREFIX}.self_attn.{name}"
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{suffix}": part.clone() for suffix, part in parts.items()}
    directory.mkdir(exist_ok=True)
    save_file(tensors | dict(more or {}), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return open_checkpoint(directory)


def dialect_of(opened: Checkpoint) -> Dialect:
    return open_dialect(opened.config, where=str(opened.path / "config.json"))


def formats_of(opened: Checkpoint) -> dict[str, TensorFormat]:
    headers = {name: (tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()}
    linears = [f"{PREFIX}.self_attn.{name}" for name in (*NAMES, "o_proj")]
    return dialect_of(opened).read_formats(linears, headers)


def read(opened: Checkpoint, profile: str) -> tuple[dict[str, Tensor], dict[str, emulate.Quantizer]]:
    """Weights and quantizers by the linear's short name."""
    weights, quantizers = emulate.read_layer(opened, dialect_of(opened), PREFIX, Layer(), formats_of(opened), profile)
    short = {name.removeprefix("self_attn.").removesuffix(".weight"): weight for name, weight in weights.items()}
    return short, {name.removeprefix("self_attn."): quantizer for name, quantizer in quantizers.items()}


def alone(opened: Checkpoint, name: str) -> tuple[Tensor, Tensor | None]:
    """A linear's weight and its static scale of inputs, as in the file."""
    module = f"{PREFIX}.self_attn.{name}"
    return emulate.read_module(opened, dialect_of(opened), module, formats_of(opened)[module], (32, 64))


def weight_of(seed: int) -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) * 0.02 * (seed + 1)


def activations() -> Tensor:
    return torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(9)) * 3


def nvfp4_file(directory: Path, fmt: TensorFormat = W4A4, *, like: str = "compressed-tensors") -> Checkpoint:
    """q, k, v and o in NVFP4, each quantized separately: four weight scales and four input scales."""
    parts: dict[str, dict[str, Tensor]] = {}
    for number, name in enumerate((*NAMES, "o_proj")):
        stored = round_group({"w": weight_of(number)}, fmt, "absmax", "mse")["w"]
        assert isinstance(stored, nvfp4.NVFP4Weight)
        inputs = nvfp4.input_global_scale(2.0 + number) if fmt == W4A4 else None
        if like == "compressed-tensors":
            parts[name] = encode(stored, inputs)
        else:
            parts[name] = {"weight": stored.packed, "weight_scale": stored.block_scale}
            parts[name] |= {"weight_scale_2": stored.global_scale}
            parts[name] |= {} if inputs is None else {"input_scale": inputs}
    if like != "compressed-tensors":
        return checkpoint(directory, parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    formats = {f"{PREFIX}.self_attn.{name}": fmt for name in parts}
    return checkpoint(directory, parts, quantization_config(formats, []))


def test_without_an_engine_every_module_is_that_of_the_file(tmp_path: Path) -> None:
    """Under "none" weights are dequantized with their own scales; other tensors and all inputs are not changed."""
    opened = nvfp4_file(tmp_path)
    weights, quantizers = read(opened, "none")
    assert quantizers == {}
    assert set(weights) == {*NAMES, "o_proj", "q_proj.bias", "norm"}
    for number, name in enumerate((*NAMES, "o_proj")):
        assert torch.equal(weights[name], alone(opened, name)[0])
        assert float((weights[name] - weight_of(number)).abs().max()) < 0.02 * (number + 1)


@pytest.mark.parametrize("profile", ENGINES)
@pytest.mark.parametrize("fmt", [W4A4, W4A16], ids=TensorFormat.label)
@pytest.mark.parametrize("like", ["compressed-tensors", "modelopt"])
def test_fused_nvfp4_runs_under_one_global_scale(profile: str, fmt: TensorFormat, like: str, tmp_path: Path) -> None:
    """As in vLLM, q, k and v keep their codes and run under the largest stored scale, divisor or multiplier."""
    opened = nvfp4_file(tmp_path, fmt, like=like)
    weights, quantizers = read(opened, profile)
    pick = min if like == "compressed-tensors" else max
    suffix = "weight_global_scale" if like == "compressed-tensors" else "weight_scale_2"

    def scale_of(name: str, what: str) -> Tensor:
        stored = read_tensor(opened, f"{PREFIX}.self_attn.{name}.{what}").reshape(())
        return stored.reciprocal() if like == "compressed-tensors" else stored

    shared = pick(float(scale_of(name, suffix)) for name in NAMES)
    for name in NAMES:
        exact, _ = alone(opened, name)
        expected = exact.double() / float(scale_of(name, suffix)) * shared
        assert torch.allclose(weights[name].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(weights["o_proj"], alone(opened, "o_proj")[0])
    if fmt == W4A16 or profile == "marlin":
        assert quantizers == {}
        return
    inputs = {name: alone(opened, name)[1] for name in (*NAMES, "o_proj")}
    for name in NAMES:
        one = pick((scale for key, scale in inputs.items() if scale is not None and key != "o_proj"), key=float)
        seen = quantizers[name](activations())
        assert torch.equal(seen, nvfp4.quantize_dequantize_input(activations(), one))


def fp8_file(directory: Path, inputs: str | None, *, strategy: str = "tensor") -> Checkpoint:
    """q, k, v in FP8, scales of their own; `inputs` "static", "dynamic" or None."""
    parts: dict[str, dict[str, Tensor]] = {}
    for number, name in enumerate(NAMES):
        weight = weight_of(number)
        rows = weight.abs().amax(1, keepdim=True)
        scale = (rows if strategy == "channel" else rows.amax(0, keepdim=True)) / 448
        parts[name] = {"weight": (weight / scale).to(E4M3), "weight_scale": scale}
        parts[name] |= {"input_scale": torch.tensor([0.01 * (number + 1)])} if inputs == "static" else {}
    arguments = {"num_bits": 8, "type": "float"}
    asked = {"static": {"strategy": "tensor", "dynamic": False}, "dynamic": {"strategy": "token", "dynamic": True}}
    group = {
        "targets": [rf"re:.*({'|'.join(NAMES)})$"],
        "weights": arguments | {"strategy": strategy},
        "input_activations": None if inputs is None else arguments | asked[inputs],
    }
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return checkpoint(directory, parts, config)


@pytest.mark.parametrize("profile", ENGINES)
@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_fused_fp8_is_rounded_again_under_the_largest_scale(profile: str, inputs: str, tmp_path: Path) -> None:
    """The one of q, k and v with the largest scale keeps its codes; the others are rounded to E4M3 under this scale."""
    opened = fp8_file(tmp_path, inputs)
    weights, quantizers = read(opened, profile)
    exact = {name: alone(opened, name)[0] for name in NAMES}
    scale = float(read_tensor(opened, f"{PREFIX}.self_attn.v_proj.weight_scale"))
    for name in NAMES:
        codes = (exact[name] / scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype("float32")
        assert torch.equal(weights[name], torch.from_numpy(codes) * scale)
    assert torch.equal(weights["v_proj"], exact["v_proj"])
    assert not torch.equal(weights["k_proj"], exact["k_proj"])
    if inputs == "static" and profile != "vllm-cpu":
        expected = fp8.quantize_dequantize_input_static(activations(), torch.tensor(0.03))
        assert all(torch.equal(quantizers[name](activations()), expected) for name in NAMES)


@pytest.mark.parametrize(("inputs", "strategy"), [(None, "tensor"), ("dynamic", "channel"), ("static", "channel")])
def test_other_fp8_keeps_its_codes(inputs: str | None, strategy: str, tmp_path: Path) -> None:
    """Weight-only FP8, and FP8 with a scale a channel, run as stored; only a static scale of inputs is shared."""
    opened = fp8_file(tmp_path, inputs, strategy=strategy)
    weights, quantizers = read(opened, "vllm-blackwell")
    assert all(torch.equal(weights[name], alone(opened, name)[0]) for name in NAMES)
    if inputs == "static":
        expected = fp8.quantize_dequantize_input_static(activations(), torch.tensor(0.03))
        assert torch.equal(quantizers["q_proj"](activations()), expected)


def test_equal_scales_change_nothing(tmp_path: Path) -> None:
    """If the members of fused groups have one scale in the file, every profile has the file's values."""
    parts = {}
    group = round_group({name: weight_of(number) for number, name in enumerate(NAMES)}, W4A4, "sweep", "mse")
    for name, stored in group.items():
        parts[name] = encode(stored, nvfp4.input_global_scale(3.0))
    formats = {f"{PREFIX}.self_attn.{name}": W4A4 for name in NAMES}
    opened = checkpoint(tmp_path, parts, quantization_config(formats, [f"{PREFIX}.self_attn.o_proj"]))
    exact = read(opened, "none")[0]
    for profile in ENGINES:
        weights, _ = read(opened, profile)
        assert all(torch.equal(weights[name], exact[name]) for name in weights)


def test_fused_int8_inputs_take_the_scale_read_last(tmp_path: Path) -> None:
    """Static INT8 inputs of q, k and v are rounded once, under the multiplier of the last, while weights stay."""
    parts = {
        name: {
            "weight": (weight_of(number) * 100).to(torch.int8),
            "weight_scale": torch.full((32, 1), 0.01 * (number + 1)),
            "input_scale": torch.tensor([0.1 * (number + 1)]),
        }
        for number, name in enumerate(NAMES)
    }
    static = {"num_bits": 8, "type": "int", "strategy": "tensor"}
    group = {"targets": [rf"re:.*({'|'.join(NAMES)})$"], "weights": static | {"strategy": "channel"}}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group | {"input_activations": static}},
    }
    opened = checkpoint(tmp_path, parts, config)
    weights, quantizers = read(opened, "marlin")
    assert all(torch.equal(weights[name], alone(opened, name)[0]) for name in NAMES)
    step = torch.tensor(0.1 * 3)
    expected = (activations() / step).round().clamp(-128, 127) * step
    assert all(torch.equal(quantizers[name](activations()), expected) for name in NAMES)


KINDS: dict[InputKind, set[str]] = {
    "none": set(),
    "nvfp4": {"vllm-blackwell", "vllm-cpu"},
    "mxfp4": {"vllm-blackwell"},
    "fp8-token": {"vllm-blackwell", "marlin", "vllm-cpu"},
    "fp8-tensor": {"vllm-blackwell", "marlin"},
    "fp8-tensor-dynamic": {"vllm-blackwell", "marlin"},
    "fp8-group": {"vllm-blackwell", "marlin"},
    "int8-token": {"vllm-blackwell", "marlin", "vllm-cpu"},
    "int8-token-asym": {"vllm-blackwell", "marlin", "vllm-cpu"},
    "int8-tensor": {"vllm-blackwell", "marlin", "vllm-cpu"},
    "int8-tensor-asym": {"vllm-blackwell", "marlin", "vllm-cpu"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_does_what_its_engine_does(profile: str, kind: InputKind) -> None:
    """Inputs are rounded in exactly the profiles whose engine rounds them, and keep dtype and shape."""
    fmt = TensorFormat("int8", WHOLE_ROW, inputs=kind)
    scale = torch.tensor([0.05, 3.0]) if kind == "int8-tensor-asym" else torch.tensor(0.05)
    quantizer = emulate.input_quantizer(fmt, profile, scale)
    assert (quantizer is not None) == (profile in KINDS[kind])
    if quantizer is not None:
        for dtype in (torch.float32, torch.bfloat16):
            values = activations().to(dtype)
            seen = quantizer(values.clone())
            assert seen.dtype == dtype
            assert seen.shape == values.shape
            assert not torch.equal(seen, values)
            assert torch.equal(seen, quantizer(activations().to(dtype).float()).to(dtype))
            assert not quantizer(torch.zeros(3, 64, dtype=dtype)).any()


def test_the_cases_cover_every_kind() -> None:
    """Every kind of inputs in a profile is a case above."""
    listed = {kind for profile in PROFILES.values() for pair in profile.items() for kind in pair}
    assert listed | {"none"} == set(KINDS)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("suffix", ["weight_global_scale", "input_global_scale"])
def test_an_invalid_global_scale_is_refused(value: float, suffix: str, tmp_path: Path) -> None:
    """A zero, negative, infinite or NaN scale of a weight or its inputs is an error that names the tensor."""
    stored = round_group({"w": weight_of(0)}, W4A4, "absmax", "mse")["w"]
    parts = encode(stored, nvfp4.input_global_scale(2.0)) | {suffix: torch.tensor([value])}
    module = f"{PREFIX}.self_attn.o_proj"
    opened = checkpoint(tmp_path, {"o_proj": parts}, quantization_config({module: W4A4}, []))
    for reads in (lambda: read(opened, "vllm-blackwell"), lambda: alone(opened, "o_proj")):
        with raises("scale-invalid", "config.json") as caught:
            reads()
        assert f"{module}.{suffix}" in caught.value.what


@pytest.mark.parametrize("like", ["compressed-tensors", "modelopt"])
def test_a_bad_scale_is_found_among_modules_decoded_together(like: str, tmp_path: Path) -> None:
    """Modules decoded at once are those decoded alone; a NaN in one's block scales is an error that names it."""
    opened = nvfp4_file(tmp_path, like=like)
    dialect, stored = dialect_of(opened), {}
    for module, fmt in formats_of(opened).items():
        names = dialect.part_names(module, fmt, opened.tensors)
        stored[module] = fmt, {suffix: read_tensor(opened, name) for suffix, name in names.items()}
    for module, (weight, scale) in dialect.decode_all(stored).items():
        alone_weight, alone_scale = dialect.decode(module, *stored[module])
        assert torch.equal(dequantize(weight), dequantize(alone_weight))
        assert scale is not None
        assert scale == alone_scale
    bad = f"{PREFIX}.self_attn.v_proj"
    stored[bad][1]["weight_scale"].view(torch.uint8)[31, 3] = 0x7F
    with raises("scale-invalid", "config.json") as caught:
        dialect.decode_all(stored)
    assert f"{bad}.weight_scale" in caught.value.what


def test_a_full_gpu_is_no_broken_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's error that memory is full passes: only sizes that do not go together make a weight a broken one."""

    def full(_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(emulate, "dequantize_all", full)
    with pytest.raises(torch.OutOfMemoryError):
        read(nvfp4_file(tmp_path), "none")


def test_four_bit_inputs_without_their_scale_are_refused(tmp_path: Path) -> None:
    """A W4A4 module without input_global_scale, which engines run on undefined memory, is refused by name."""
    stored = round_group({"w": weight_of(0)}, W4A16, "absmax", "mse")["w"]
    module = f"{PREFIX}.self_attn.o_proj"
    opened = checkpoint(tmp_path, {"o_proj": encode(stored)}, quantization_config({module: W4A4}, []))
    dialect = dialect_of(opened)
    for reads in (lambda: formats_of(opened), lambda: emulate.read_module(opened, dialect, module, W4A4, (32, 64))):
        with raises("quantization-invalid", "config.json") as caught:
            reads()
        assert f"{module}.input_global_scale" in caught.value.what


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (16, 64)])
def test_a_weight_of_another_shape_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    """Tensors that dequantize to another shape than the model's, or contradict each other, are refused."""
    stored = round_group({"w": torch.ones(shape)}, W4A16, "absmax", "mse")["w"]
    module = f"{PREFIX}.self_attn.o_proj"
    opened = checkpoint(tmp_path, {"o_proj": encode(stored)}, quantization_config({module: W4A16}, []))
    with raises("quantization-invalid", tmp_path) as caught:
        read(opened, "none")
    assert module in caught.value.what
    assert "[32, 64]" in caught.value.what
    broken = encode(stored) | {"weight_scale": torch.ones(32, 3).to(E4M3)}
    opened = checkpoint(tmp_path / "broken", {"o_proj": broken}, quantization_config({module: W4A16}, []))
    with raises("quantization-invalid", tmp_path / "broken"):
        read(opened, "none")


# --- rounding of inputs


class CountedQuantizer:
    """Rounds to integers, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        """The rounded inputs."""
        self.calls += 1
        return inputs.round()


def test_fused_partners_share_one_rounding() -> None:
    """q, k and v round their input once, o its own; every linear sees rounded inputs."""
    attention, quantizers = Attention(), {name: CountedQuantizer() for name in (*NAMES, "o_proj")}
    emulate.quantize_inputs(attention, quantizers)
    seen: dict[str, Tensor] = {}
    for name in quantizers:
        attention.get_submodule(name).register_forward_hook(
            lambda _module, args, _output, name=name: seen.update({name: args[0]})
        )
    hidden = activations()
    for name in quantizers:
        attention.get_submodule(name)(hidden)
    assert [quantizer.calls for quantizer in quantizers.values()] == [1, 0, 0, 1]
    assert all(torch.equal(inputs, hidden.round()) for inputs in seen.values())
    assert seen["q_proj"] is seen["k_proj"] is seen["v_proj"]


def test_the_shared_rounding_is_freed_after_the_last_partner() -> None:
    """A layer holds the input and its rounding only until the last partner has run, in every batch."""
    linears = [nn.Linear(64, 32) for _ in range(3)]
    hook = emulate._SharedRounding(torch.round, partners=3)
    for _ in range(2):
        hidden = activations()
        given = weakref.ref(hidden)
        rounded = weakref.ref(hook(linears[0], (hidden,))[0])
        assert rounded() is not None
        hook(linears[1], (hidden,))
        assert rounded() is not None
        hook(linears[2], (hidden,))
        assert rounded() is None
        del hidden
        assert given() is None


def test_a_shared_rounding_belongs_to_one_input() -> None:
    """If a partner does not run, the next input is rounded anew, and not taken for the one before."""
    linears = [nn.Linear(64, 32) for _ in range(2)]
    hook = emulate._SharedRounding(torch.round, partners=3)
    first, second = activations(), activations() + 1
    hook(linears[0], (first,))
    hook(linears[1], (first,))
    assert torch.equal(hook(linears[0], (second,))[0], second.round())


# --- the KV cache


def tiny(family: str, **config: Any) -> Any:
    torch.manual_seed(0)
    common = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(common | config))).eval()


class Rounding(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, which gets keys and values rounded independently of snugfit."""

    def __init__(self, config: Any, scales: tuple[Tensor, Tensor]) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' own, with rounded states."""
        rounded = []
        for states, scale in zip((key_states, value_states), self.scales, strict=True):
            codes = (states / scale).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn).astype("float32")
            rounded.append(torch.from_numpy(codes) * scale)
        result: tuple[Tensor, Tensor] = super().update(*rounded, *args, **kwargs)
        return result


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8, "head_dim": 16}),
        ("gemma2", {"sliding_window": 8, "head_dim": 16}),
        ("qwen3", {"head_dim": 16}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}),
    ],
)
@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_attention_reads_rounded_keys_and_values(family: str, more: dict[str, Any], heads: int) -> None:
    """Logits with FP8Cache are those with independently rounded keys and values, bit for bit, in every call."""
    model = tiny(family, **more)
    k_scale, v_scale = (torch.full((heads, 1, 1), s) if heads > 1 else torch.tensor(s) for s in (0.004, 0.03))
    tokens = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    hand = Rounding(model.config, (k_scale, v_scale))
    expected = model(input_ids=tokens, past_key_values=hand, use_cache=True).logits
    cache = emulate.fp8_cache(k_scale, v_scale)
    plain = model(input_ids=tokens, use_cache=False).logits
    kept: list[dict[str, Any]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"past_key_values": cache}), with_kwargs=True
        )
    for _ in range(2):
        found = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(found, expected)
        kept.append(dict(vars(cache)))
    assert kept[0].keys() == kept[1].keys() == {"k_scale", "v_scale"}
    assert not torch.equal(found, plain)


def test_a_cache_rounds_as_the_library_does_and_saturates() -> None:
    """Keys and values are those of compressed-tensors' fake quantization, in their own dtype."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 5, 16, generator=generator).bfloat16() * 100 for _ in range(2))
    given = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    scales = torch.tensor(0.125), torch.tensor(2.0)
    cache = emulate.fp8_cache(*scales)
    found = cache.update(keys, values, 0, {"cache_position": None})
    for exact, seen, scale in zip((keys, values), found, scales, strict=True):
        assert seen.dtype == torch.bfloat16
        expected = fake_quantize(exact.float(), scale.reshape(1), None, given)
        assert isinstance(expected, Tensor)
        assert torch.equal(seen, expected.bfloat16())
    assert float(found[0].abs().max()) == 448 * 0.125
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "names",
    [
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)])
def test_scales_of_the_cache_are_found(names: tuple[str, str], shape: tuple[int, ...], tmp_path: Path) -> None:
    """Scales are read under the names of both dialects, one a layer or one a head, in fp32."""
    scales = {
        f"{PREFIX}.{name}": torch.full(shape, 0.25 * (n + 1), dtype=torch.bfloat16) for n, name in enumerate(names)
    }
    opened = checkpoint(tmp_path, {}, {}, scales)
    found = emulate.read_kv_scales(opened, PREFIX)
    assert [scale.tolist() for scale in found] == [
        torch.full(shape if len(shape) == 3 else (), value).tolist() for value in (0.25, 0.5)
    ]
    assert all(scale.dtype == torch.float32 for scale in found)
    assert [float(scale) for scale in emulate.read_kv_scales(opened, "model.layers.1")] == [1.0, 1.0]


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
def test_an_invalid_scale_of_the_cache_is_refused(value: float, tmp_path: Path) -> None:
    """A zero, negative or NaN k_scale is an error that names it."""
    opened = checkpoint(tmp_path, {}, {}, {f"{PREFIX}.self_attn.k_scale": torch.tensor([value])})
    with raises("scale-invalid", tmp_path) as caught:
        emulate.read_kv_scales(opened, PREFIX)
    assert f"{PREFIX}.self_attn.k_scale" in caught.value.what
