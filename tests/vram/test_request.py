"""GPUs as people name them, and the tables of cards and kernels."""

from __future__ import annotations

from functools import partial

import pytest

from helpers.errors import raises
from snugfit.engines.gpus import CARDS, COMMON, GENERATIONS, find_card
from snugfit.engines.kernels import EXPERTS, LINEAR, Linear, attention_kernel, linear_kernel
from snugfit.engines.memory import ENGINE_NAMES, ENGINES, GIB, MIB
from snugfit.engines.profiles import PROFILES
from snugfit.formats.spec import FORMATS, READ_ONLY, TensorFormat
from snugfit.vram.fit import PlannedTensor, ServeSettings, kernel_labels
from snugfit.vram.request import parse_gpu
from snugfit.vram.weights import kernel_format


@pytest.mark.parametrize("text", ["16GiB", "16 GiB", "16gb", "16G", "16384MiB", "16.0g"])
def test_sizes(text: str) -> None:
    """A size is what CUDA reports, in GiB and MiB; on a GPU's box GB means GiB."""
    assert parse_gpu(text).reported_bytes == 16 * GIB
    assert parse_gpu(text).generation is None


def test_sold_sizes_have_a_note() -> None:
    """A size that cards are sold by has a note on the memory that one of them reports; another size has none."""
    note = parse_gpu("16GiB").note
    assert note is not None
    assert "RTX 5060 Ti 16GB 15.48 GiB" in note
    assert parse_gpu("15.48GiB").note is None


@pytest.mark.parametrize("text", [card.name for card in CARDS])
def test_every_card_is_found(text: str) -> None:
    """Every card is found by its name, in small letters, without spaces, and with its maker's words."""
    for spelt in (text, text.lower(), text.replace(" ", ""), f"NVIDIA GeForce {text}"):
        found = parse_gpu(spelt)
        assert found.name == text
        assert found.reported_bytes == next(card.reported_mib for card in CARDS if card.name == text) * MIB


@pytest.mark.parametrize(
    ("text", "name"), [("5060 ti", "RTX 5060 Ti 16GB"), ("4090", "RTX 4090"), ("a100 80gb", "A100 80GB")]
)
def test_short_names(text: str, name: str) -> None:
    """RTX and the memory may be left out."""
    assert parse_gpu(text).name == name


def test_cards_report_less_than_they_are_sold_with() -> None:
    """No card's reported memory is a whole number of GiB, and none is named twice."""
    assert all(card.reported_mib % 1024 or card.name == "B300" for card in CARDS)
    assert len({card.name for card in CARDS}) == len(CARDS)
    assert find_card("") is None


@pytest.mark.parametrize(
    "text", ["0", "16", "16 bananas", "-16GiB", "0GiB", "nanGiB", "1e3GiB", "", "9999999TB", "H1000"]
)
def test_no_gpu(text: str) -> None:
    """What is neither a size nor a card is an error that quotes it and suggests a size or a card."""
    with raises("option-invalid", where="gpu") as caught:
        parse_gpu(text)
    assert text in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "name"),
    [("RTX 5091", "RTX 5090"), ("5070", "RTX 5070 Ti"), ("h-2000", "H200"), ("geforce 4070", "RTX 4070 Ti")],
)
def test_near_names_are_suggested(text: str, name: str) -> None:
    """A name that is nearly right brings the nearest cards, three at most."""
    with raises("option-invalid", where="gpu") as caught:
        parse_gpu(text)
    assert name in caught.value.remedy
    assert sum(card.name in caught.value.remedy for card in CARDS) <= 3


# kernels


def test_every_format_has_a_kernel_in_vllm() -> None:
    """vLLM runs whatever snugfit writes or reads on every generation."""
    for name in (*FORMATS, *READ_ONLY):
        for generation in GENERATIONS:
            assert linear_kernel("vllm", kernel_format(TensorFormat(name)), generation) is not None


@pytest.mark.parametrize("generation", ["ada", "hopper", "blackwell", "blackwell-consumer"])
def test_kernels_agree_with_activation_profiles(generation: str) -> None:
    """A kernel quantizes activations where the activation profile of its GPUs does, and only there."""
    profile = PROFILES["vllm-blackwell" if generation.startswith("blackwell") else "marlin"]
    for spec in FORMATS.values():
        name = kernel_format(TensorFormat(spec.name))
        kernel = linear_kernel("vllm", name, generation)  # type: ignore[arg-type]
        assert kernel is not None
        narrow = profile.get(spec.inputs, "none") != "none"
        assert kernel.arithmetic.endswith("A16") != narrow, (spec.name, generation)


def test_what_this_project_saw() -> None:
    """The kernels that vLLM 0.24 chose on an H100 (docs/engines.md) are those of the table."""
    seen = {fmt: linear_kernel("vllm", fmt, "hopper") for fmt in ("nvfp4", "fp8-channel", "int4")}
    assert {fmt: kernel and (kernel.name, kernel.seen) for fmt, kernel in seen.items()} == {
        "nvfp4": ("Marlin", True),
        "fp8-channel": ("CUTLASS", True),
        "int4": ("Machete", True),
    }
    experts = linear_kernel("vllm", "int4", "hopper", experts=True)
    assert experts is not None
    assert experts.name == "Marlin"


@pytest.mark.parametrize(
    ("linear", "name"),
    [
        (Linear(3072, 576, 64), "Machete"),
        (Linear(1536, 1536, 128), "Machete"),
        (Linear(1536, 1536, -1), "Machete"),
        (Linear(576, 576, 64), "Marlin"),  # vLLM 0.24 on an H200: docs/planning.md
        (Linear(960, 576, 64), "Marlin"),
        (Linear(1536, 1536, 32), "Marlin"),
        (Linear(1536, 96, 32), "Marlin"),
    ],
)
def test_machete_takes_whole_blocks(linear: Linear, name: str) -> None:
    """On Hopper Machete runs INT4 of 128 out_features by 64 in_features, in groups of 64 or more, Marlin the rest."""
    found = linear_kernel("vllm", "int4", "hopper", linear=linear)
    assert found is not None
    assert (found.name, found.arithmetic) == (name, "W4A16")
    other = linear_kernel("vllm", "int4", "ampere", linear=linear)
    assert other is not None
    assert other.name == "Marlin"


def test_kernels_are_those_of_fused_linears_on_each_gpu() -> None:
    """Query, key and value count as one linear, and what tensor parallelism leaves each GPU decides."""

    def tensor(name: str, out_features: int, in_features: int) -> PlannedTensor:
        shape = out_features, in_features
        return PlannedTensor(f"model.layers.0.{name}.weight", shape, (), TensorFormat("int4", group_size=64))

    qkv = [tensor(f"self_attn.{leaf}_proj", out, 512) for leaf, out in (("q", 512), ("k", 64), ("v", 64))]
    down = tensor("mlp.down_proj", 512, 384)
    settings = partial(ServeSettings, gpu=parse_gpu("H100"), engine=ENGINES["vllm"])

    def labels(tensors: list[PlannedTensor], tp: int) -> tuple[str, ...]:
        return kernel_labels(tensors, settings(tensor_parallel_size=tp), 2)["hopper"]

    assert labels(qkv, 1) == ("int4: Machete (W4A16)",)
    assert labels(qkv[:1], 1) == ("int4: Machete (W4A16)",)
    assert labels(qkv[:2], 1) == ("int4: Marlin (W4A16)",)
    assert labels([*qkv, down], 2) == ("int4: Machete (W4A16)", "int4: Marlin (W4A16)")
    assert labels([down], 2) == ("int4: Machete (W4A16)",)


def test_fp4_arithmetic_is_blackwells() -> None:
    """No GPU before Blackwell computes in 4 bits: NVFP4 is weight-only there, in SGLang, too."""
    for tables in (LINEAR, EXPERTS):
        for formats in tables.values():
            for by_generation in formats.values():
                for generation, kernel in by_generation.items():
                    assert kernel.arithmetic != "W4A4" or generation.startswith("blackwell")
    before = linear_kernel("sglang", "nvfp4", "hopper")
    assert before is not None
    assert before.arithmetic == "W4A16"


def test_attention_over_fp8() -> None:
    """FlashAttention reads an FP8 cache in version 3 alone: on Ada and consumer Blackwell FlashInfer does."""
    for generation in COMMON:
        plain, fp8 = (attention_kernel("vllm", generation, fp8=narrow) for narrow in (False, True))
        assert "FlashAttention 2" not in fp8
        assert plain
    assert attention_kernel("vllm", "hopper", fp8=True, latent=True) == "FlashMLA"


def test_engines_are_known_to_all_tables() -> None:
    """Every engine that is offered has memory, kernels and attention."""
    for name in ENGINE_NAMES:
        engine = ENGINES[name].engine
        assert engine in LINEAR
        assert attention_kernel(engine, "ada", fp8=False)
