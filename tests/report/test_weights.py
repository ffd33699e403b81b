"""Components and layers of a checkpoint, from its record alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.report_runs import LAYERS, quantize_record
from snugfit.formats.spec import FORMATS, READ_ONLY
from snugfit.records.quantize import DEQUANTIZED, KV_CACHE, PASSTHROUGH, QuantizeRecord, TensorRecord
from snugfit.report.figures import E2M1, rounding_plot
from snugfit.report.weights import components_of, decoder_of, layers_of, spans
from snugfit.report.words import FORMAT_WORDS, describe_format, why


def mixture(decoder: str) -> QuantizeRecord:
    """Two layers with four routed experts, a shared one, a router, and scales of a KV cache."""
    tensors = []
    for layer in range(2):
        at = f"{decoder}.{layer}"
        tensors += [
            TensorRecord(f"{at}.mlp.experts.{e}.{name}.weight", (64, 32), "int4-g32", "absmax", 4096, 1152, 0.01)
            for e in range(4)
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        tensors.append(
            TensorRecord(
                f"{at}.mlp.shared_experts.up_proj.weight", (64, 32), "fp8-dynamic", "absmax", 4096, 2176, 0.001
            )
        )
        tensors.append(TensorRecord(f"{at}.mlp.gate.weight", (4, 32), PASSTHROUGH, "", 256, 256))
        query = f"{at}.self_attn.q_proj.weight"
        if layer:
            tensors.append(TensorRecord(query, (32, 32), "fp8-dynamic", "", 2048, 1088, 0.001))
        else:
            tensors.append(TensorRecord(query, (32, 32), PASSTHROUGH, "", 2048, 2048))
        tensors.append(TensorRecord(f"{at}.self_attn.k_scale", (1,), KV_CACHE, "absmax", 0, 4))
    return quantize_record(tensors=tuple(tensors), bytes=sum(t.bytes for t in tensors))


@pytest.mark.parametrize("decoder", ["model.layers", "model.language_model.layers", "transformer.h", "backbone.layers"])
def test_components_whatever_the_decoder_is_called(decoder: str) -> None:
    """Experts, shared experts, routers and a cache's scales are told from each other; sums are whole."""
    record = mixture(decoder)
    assert decoder_of(t.name for t in record.tensors) == decoder
    components = components_of(record)
    names = [(one.name, one.format) for one in components]
    assert names == [
        ("attention", "fp8-dynamic"),
        ("attention", "as it was"),
        ("routed experts", "int4-g32"),
        ("shared experts", "fp8-dynamic"),
        ("routers", "as it was"),
        ("KV cache", KV_CACHE),
    ]
    assert sum(one.bytes for one in components) == record.bytes
    assert sum(one.share or 0 for one in components) == pytest.approx(1)
    attention = components[0]
    assert (attention.layers, attention.all_layers) == ((1,), False)
    experts = components[2]
    assert experts.all_layers
    assert experts.bits == pytest.approx(4.5)
    assert experts.relative_error == pytest.approx(0.01)


def test_layers_join_their_experts() -> None:
    """One row for a projection of a layer, whatever number of experts it has."""
    rows = layers_of(mixture("model.layers"))
    assert [row.projection for row in rows if row.layer == 0] == [
        "q_proj", "experts.gate_proj", "experts.up_proj", "shared_experts.up_proj", "experts.down_proj",
    ]  # fmt: skip
    (gate,) = [row for row in rows if row.layer == 1 and row.projection == "experts.gate_proj"]
    assert gate.weights == 4 * 64 * 32
    assert len(layers_of(quantize_record())) == 7 * LAYERS


def test_why_is_arithmetic_of_the_record() -> None:
    """Shares, bytes that bits cost or save, and how much smaller an error is."""
    record = quantize_record()
    components = components_of(record)
    words = {one.name: why(one, components, record) for one in components}
    attention, mlp = components[0], components[1]
    cost = (attention.bits - mlp.bits) * attention.weights / 8
    assert words["attention"].startswith("17 % of the linear weights; 8.03 instead of 4.50 bits cost")
    assert f"{cost / 1e3:,.1f} kB" in words["attention"]
    assert "times smaller than nvfp4's" in words["attention"]
    assert f"save {(attention.bits - mlp.bits) * mlp.weights / 8e6:,.1f} MB" in words["MLP"]
    same = quantize_record(attention="nvfp4")
    assert "instead of" not in why(components_of(same)[0], components_of(same), same)


def test_every_format_has_words() -> None:
    """Of the table of formats, of formats that are only read, and of tensors that stay; labels find theirs."""
    assert set(FORMAT_WORDS) == {*FORMATS, *READ_ONLY, PASSTHROUGH, DEQUANTIZED, KV_CACHE}
    assert describe_format("int4-g128-asym") == FORMAT_WORDS["int4"]
    assert describe_format("nvfp4a16") == FORMAT_WORDS["nvfp4a16"]
    assert describe_format("fp8-block128x128") == FORMAT_WORDS["fp8"]  # of a source
    assert describe_format("unheard-of") == ""


def test_numbers_as_ranges() -> None:
    """0-2, 5, 8-9."""
    assert spans([0, 1, 2, 5, 8, 9]) == "0-2, 5, 8-9"
    assert spans([]) == ""


def test_rounding_errors_are_those_of_the_codes() -> None:
    """No error at a code of the scale, the seed's worst case at 5 of 6, none beyond 100 %."""
    from snugfit.formats.grids import E2M1_VALUES

    assert E2M1 == E2M1_VALUES
    six, four = ({round(x, 6): y for x, y, _ in line.points} for line in rounding_plot().lines)
    assert six[0.5] == six[1.0] == four[0.5] == four[1.0] == four[0.75] == 0
    assert six[round(5 / 6, 6)] == pytest.approx(20)
    assert four[round(5 / 6, 6)] == pytest.approx(10)
    assert max(*six.values(), *four.values()) <= 100


def test_a_record_of_one_tensor() -> None:
    """Without layers there are components, and no layers."""
    record = quantize_record()
    lonely = replace(record, tensors=(replace(record.tensors[0], name="weird"),))
    assert [one.name for one in components_of(lonely)] == ["other tensors"]
    assert layers_of(lonely) == []
