"""Statistics as a file: written, used instead of a run, refused where they do not belong, merged, collected alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import MakeTiny
from helpers.errors import raises
from helpers.fp8_sources import as_fp8
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.calibration.observers import InputObserver
from snugfit.errors import UserError
from snugfit.model import forward_pass
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import quantize
from snugfit.records.base import as_json
from snugfit.records.squares import decode_squares
from snugfit.records.statistics import (
    SAMPLED,
    ExpertStatistics,
    InputStatistics,
    LayerStatistics,
    lower_end,
    merge_inputs,
)
from snugfit.records.statistics_file import (
    STATISTICS_FILE,
    DatasetUsed,
    Statistics,
    load_statistics,
    merge_statistics,
    save_statistics,
)

ROWS, LENGTH = 4, 48
# what a bin's upper end is above its lower one at most
BIN = 1 / 16
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """JSONL files of rows: all of them, the first and the second half, and others."""
    folder, given = tmp_path_factory.mktemp("rows"), random_rows([LENGTH] * ROWS, seed=2)
    parts = {"all": given, "first": given[:2], "second": given[2:], "other": random_rows([LENGTH] * ROWS, seed=3)}
    return {name: write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()}


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A dense model of two layers."""
    return make_tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two layers."""
    return make_mixture("mixtral", tmp_path_factory.mktemp("mixtral") / "model", wide=True)


@pytest.fixture(scope="module")
def fp8(mixtral: Path) -> Path:
    """The same in FP8."""
    return as_fp8(mixtral, mixtral.with_name("fp8"), "hf-block")


@pytest.fixture(scope="module")
def sources(llama: Path, mixtral: Path, fp8: Path) -> dict[str, tuple[Path, str]]:
    """Models by name, each with a recipe that needs statistics."""
    return {
        "dense": (llama, "nvfp4-fp8-hybrid-fp8kv-four-over-six"),
        "mixture": (mixtral, "nvfp4-moe-four-over-six"),
        "fp8": (fp8, "nvfp4-moe-four-over-six"),
    }


@pytest.fixture(scope="module")
def quantized(
    sources: dict[str, tuple[Path, str]], rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """What quantizing each of them over all rows gives, once for all tests."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = quantize_into(*sources[name], tmp_path_factory.mktemp("out") / "out", dataset=[rows["all"]])
        return made[name]

    return get


@pytest.fixture(scope="module")
def collected(
    sources: dict[str, tuple[Path, str]], rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Statistics of each of them over some rows, once for all tests."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, part: str = "all") -> Path:
        if (name, part) not in made:
            out = tmp_path_factory.mktemp("statistics") / "out"
            # one sample a batch: the results of a sample then do not depend on the others
            collect_statistics(
                sources[name][0], output_dir=out, dataset=[rows[part]], device="cpu", tokens_per_batch=LENGTH
            )
            made[name, part] = out
        return made[name, part]

    return get


def quantize_into(source: Path, recipe: str, out: Path, **more: Any) -> Path:
    quantize(source, recipe, output_dir=out, device="cpu", **{"min_tokens_per_expert": 0} | more)
    return out


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, any forward fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("ran a model")

    def forbid() -> None:
        monkeypatch.setattr(forward_pass, "embed", refuse)
        monkeypatch.setattr(forward_pass, "run_layer", refuse)

    return forbid


def refused(source: Path, recipe: str, statistics: Path, tmp_path: Path, **more: Any) -> UserError:
    """The error of a run that must be refused and leave nothing behind."""
    out = tmp_path / "refused"
    with pytest.raises(UserError) as caught:
        quantize_into(source, recipe, out, statistics=statistics, **more)
    assert not out.exists()
    assert not out.with_name("refused.partial").exists()
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


def edited(file: Path, folder: Path, edit: Edit) -> Path:
    """A copy of statistics, its document changed."""
    document = json.loads((file / STATISTICS_FILE).read_text(encoding="utf-8"))
    edit(document)
    target = folder / "edited.json"
    target.write_text(as_json(document), encoding="utf-8")
    return target


# --- written by quantize, and used instead of a run


@pytest.mark.parametrize("name", ["dense", "mixture", "fp8"])
@pytest.mark.parametrize("as_directory", [False, True], ids=["file", "directory"])
def test_statistics_take_the_place_of_rows(
    name: str,
    as_directory: bool,
    sources: dict[str, tuple[Path, str]],
    quantized: Callable[[str], Path],
    no_forward: Callable[[], None],
    tmp_path: Path,
) -> None:
    """With what the first run wrote beside the weights, a second one runs no layer and writes the same bytes."""
    first = quantized(name)
    no_forward()
    given = first if as_directory else first / STATISTICS_FILE
    second = quantize_into(*sources[name], tmp_path / "again", statistics=given)
    files = sorted(file.name for file in first.glob("*.safetensors"))
    assert files == sorted(file.name for file in second.glob("*.safetensors"))
    for file in [*files, "config.json"]:
        assert (first / file).read_bytes() == (second / file).read_bytes()
    entries = [json.loads((path / "snugfit-record.json").read_text())["tensors"] for path in (first, second)]
    assert entries[0] == entries[1]


def test_a_row_given_beside_its_statistics_is_no_contradiction(
    llama: Path, rows: dict[str, Path], quantized: Callable[[str], Path], no_forward: Callable[[], None], tmp_path: Path
) -> None:
    """Rows that are those of the statistics may be named again; no layer runs."""
    given = quantized("dense")
    no_forward()
    again = quantize_into(
        llama, "nvfp4-fp8-hybrid-fp8kv-four-over-six", tmp_path / "out", statistics=given, dataset=[rows["all"]]
    )
    assert (again / "model.safetensors").read_bytes() == (given / "model.safetensors").read_bytes()


def test_the_file_says_what_was_measured(
    quantized: Callable[[str], Path], sources: dict[str, tuple[Path, str]], rows: dict[str, Path]
) -> None:
    """The file has model, rows and recipe, each layer's inputs and experts, and figures that agree with the record."""
    out = quantized("mixture")
    found = load_statistics(out)
    record = json.loads((out / "snugfit-record.json").read_text())
    assert (found.model, found.recipe, found.all_experts) == (
        sources["mixture"][0].name,
        "nvfp4-moe-four-over-six",
        True,
    )
    assert found.header_digest == record["source_header_digest"]
    assert found.recipe_digest == record["recipe_digest"]
    (used,) = found.datasets
    assert (used.num_samples, used.tokens, used.digest) == (ROWS, ROWS * LENGTH, record["dataset"]["digest"])
    assert list(found.layers) == [0, 1]
    amax = {entry["name"]: entry["input_amax"] for entry in record["tensors"]}
    for number, layer in found.layers.items():
        experts = f"model.layers.{number}.block_sparse_moe.experts"
        (seen,) = layer.experts.values()
        assert list(layer.experts) == [experts]
        assert seen.tokens == (ROWS * LENGTH,) * 4
        assert sum(seen.routed) == 2 * ROWS * LENGTH
        assert amax[f"{experts}.0.w1.weight"] == amax[f"{experts}.3.w3.weight"] == seen.gate_up
        assert amax[f"{experts}.0.w2.weight"] == amax[f"{experts}.3.w2.weight"] == seen.down
        assert layer.inputs[f"{experts}.gate_up"].amax == seen.gate_up
        assert layer.inputs[f"{experts}.down"].amax == max(seen.down_routed)
        assert layer.cache is None
        assert {one.tokens for name, one in layer.inputs.items() if "experts.down" not in name} == {ROWS * LENGTH}
        assert layer.inputs[f"{experts}.down"].tokens == 2 * ROWS * LENGTH


def test_a_file_is_read_as_it_was_written(quantized: Callable[[str], Path]) -> None:
    """What is loaded and stored again is the same text."""
    for name in ("dense", "mixture"):
        text = (quantized(name) / STATISTICS_FILE).read_text(encoding="utf-8")
        assert load_statistics(quantized(name)).to_json() == text


def test_a_recipe_without_data_asks_for_no_statistics(llama: Path, tmp_path: Path) -> None:
    """Where no scale is measured no statistics are written; a file that is named must be one all the same."""
    assert not (quantize_into(llama, "fp8-int4-absmax", tmp_path / "out") / STATISTICS_FILE).exists()
    with raises("file-missing", tmp_path / "nothing.json"):
        quantize_into(llama, "fp8-int4-absmax", tmp_path / "other", statistics=tmp_path / "nothing.json")


def test_statistics_of_the_source_do_not_become_the_results(llama: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    """A source that has statistics beside its weights leaves none of them in a result that measured nothing."""
    quantize_into(llama, "fp8-dynamic-fp8kv", tmp_path / "fp8", dataset=[rows["all"]])
    assert (tmp_path / "fp8" / STATISTICS_FILE).exists()
    out = quantize_into(tmp_path / "fp8", "fp8-int4-absmax", tmp_path / "out")
    assert not (out / STATISTICS_FILE).exists()


# --- refused


def test_another_model_is_refused(
    make_tiny: MakeTiny, quantized: Callable[[str], Path], fp8: Path, tmp_path: Path
) -> None:
    """Statistics of a model of the same shapes with other weights, and of the same model in BF16, are not taken."""
    twin = make_tiny("llama", num_hidden_layers=2, seed=1)
    for statistics, source, recipe in (
        ("dense", twin, "nvfp4-four-over-six"),
        ("mixture", fp8, "nvfp4-moe-four-over-six"),
    ):
        error = refused(source, recipe, quantized(statistics), tmp_path)
        assert (error.code, error.where) == ("statistics-mismatch", str(quantized(statistics)))


def test_other_rows_are_refused(
    llama: Path, rows: dict[str, Path], quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rows that are named beside statistics of other rows are a contradiction."""
    error = refused(llama, "nvfp4-four-over-six", quantized("dense"), tmp_path, dataset=[rows["other"]])
    assert error.code == "statistics-mismatch"
    assert rows["all"].name in error.what


def test_experts_fed_otherwise_are_refused(mixtral: Path, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Statistics of experts that saw all tokens are not those of experts that saw what was routed to them."""
    error = refused(mixtral, "nvfp4-moe-four-over-six", quantized("mixture"), tmp_path, moe_calibrate_all_experts=False)
    assert error.code == "statistics-mismatch"
    assert "`moe_calibrate_all_experts`" in error.remedy


def test_a_dense_model_has_no_experts_to_differ(llama: Path, quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """The setting for experts does not concern a model without experts."""
    quantize_into(
        llama,
        "nvfp4-four-over-six",
        tmp_path / "out",
        statistics=quantized("dense"),
        moe_calibrate_all_experts=False,
    )


def test_experts_that_saw_little_are_refused(
    mixtral: Path, rows: dict[str, Path], collected: Callable[..., Path], tmp_path: Path
) -> None:
    """Statistics must cover the experts as a run must."""
    few = ROWS * LENGTH + 1
    error = refused(mixtral, "nvfp4-moe-four-over-six", collected("mixture"), tmp_path, min_tokens_per_expert=few)
    assert error.code == "experts-uncovered"
    assert str(ROWS * LENGTH + 1) in error.what


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{'schema': 1}",
    "another kind": b'{"schema": "snugfit.quantize/1", "layers": {}}',
    "a list": b"[]",
    "a number": b"7",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a long number": b"1" * 100_000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_statistics_is_refused(kind: str, llama: Path, tmp_path: Path) -> None:
    """Anything else in the file's place is refused with the file's name."""
    file = tmp_path / "file.json"
    file.write_bytes(BROKEN[kind])
    error = refused(llama, "nvfp4-four-over-six", file, tmp_path)
    assert (error.code, error.where) == ("statistics-invalid", str(file))


def test_a_missing_file_is_refused(llama: Path, tmp_path: Path) -> None:
    """Neither a name that leads nowhere nor a directory without statistics is taken."""
    for given in (tmp_path / "none.json", llama):
        error = refused(llama, "nvfp4-four-over-six", given, tmp_path)
        assert error.code == "file-missing"
        assert error.where.startswith(str(given))


def test_a_cut_file_is_refused_wherever_it_is_cut(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """No beginning of a file passes for the whole."""
    content = (quantized("dense") / STATISTICS_FILE).read_bytes()
    file = tmp_path / "cut.json"
    for end in range(0, len(content) - 2, max(1, len(content) // 40)):
        file.write_bytes(content[:end])
        with raises("statistics-invalid", "cut.json"):
            load_statistics(file)


INPUT, EXPERTS = "model.layers.1.self_attn.q_proj", "model.layers.1.block_sparse_moe.experts"
# kind -> code of the refusal, what it names, and the damage
EDITS: dict[str, tuple[str, str, Edit]] = {
    "no layers": ("statistics-invalid", "", lambda d: d.pop("layers")),
    "no datasets": ("statistics-invalid", "datasets", lambda d: d["datasets"].clear()),
    "datasets of words": ("statistics-invalid", "datasets.0", lambda d: d["datasets"].__setitem__(0, "rows")),
    "no fingerprint": ("statistics-invalid", "", lambda d: d.pop("fingerprint")),
    "layers in a list": ("statistics-invalid", "", lambda d: d.__setitem__("layers", [])),
    "layers by name": ("statistics-invalid", "", lambda d: d["layers"].__setitem__("first", d["layers"]["0"])),
    "a layer of nothing": ("statistics-invalid", "", lambda d: d["layers"].__setitem__("1", {})),
    "no amax": ("statistics-invalid", "", lambda d: d["layers"]["1"]["inputs"][INPUT].pop("amax")),
    "amax of words": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["inputs"][INPUT].__setitem__("amax", "much"),
    ),
    "histogram of words": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["inputs"][INPUT].__setitem__("histogram", {"a": 1}),
    ),
    "tokens without end": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["inputs"][INPUT].__setitem__("tokens", 1e999),
    ),
    "experts of different numbers": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["experts"][EXPERTS]["routed"].pop(),
    ),
    "half a cache": ("statistics-invalid", "", lambda d: d["layers"]["1"].__setitem__("cache", [1.0])),
    "another fingerprint": ("statistics-mismatch", "", lambda d: d.__setitem__("fingerprint", "0" * 64)),
    "another header": ("statistics-mismatch", "", lambda d: d.__setitem__("header_digest", "0" * 64)),
    "a layer less": ("statistics-invalid", "layer 1", lambda d: d["layers"].pop("1")),
    "no experts": ("statistics-invalid", EXPERTS, lambda d: d["layers"]["1"]["experts"].clear()),
    "amax of nothing": (
        "amax-invalid",
        EXPERTS,
        lambda d: d["layers"]["1"]["experts"][EXPERTS].update(down_routed=[0.0] * 4, down_forced=[0.0] * 4),
    ),
    "amax without end": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["experts"][EXPERTS].__setitem__("gate_up_forced", [float("inf")] * 4),
    ),
    "amax of NaN": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["experts"][EXPERTS].__setitem__("down_routed", [float("nan")] * 4),
    ),
    "negative amax": ("statistics-invalid", "", lambda d: d["layers"]["1"]["inputs"][INPUT].__setitem__("amax", -1.0)),
    "a bin beyond the last": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["inputs"][INPUT].__setitem__("histogram", {"4096": 1}),
    ),
    "a negative count": (
        "statistics-invalid",
        "",
        lambda d: d["layers"]["1"]["inputs"][INPUT].__setitem__("histogram", {"1000": -1}),
    ),
}


@pytest.mark.parametrize("kind", EDITS)
def test_what_lacks_something_is_refused(
    kind: str, mixtral: Path, collected: Callable[..., Path], no_forward: Callable[[], None], tmp_path: Path
) -> None:
    """Statistics that lack a layer, a projection or a sound figure are refused with its name; nothing is written."""
    code, named, edit = EDITS[kind]
    file = edited(collected("mixture"), tmp_path, edit)
    no_forward()
    error = refused(mixtral, "nvfp4-moe-four-over-six", file, tmp_path)
    assert error.code == code
    assert named in str(error)


def test_a_missing_projection_is_refused(llama: Path, collected: Callable[..., Path], tmp_path: Path) -> None:
    """A linear whose inputs are not among the statistics is refused by name; a recipe that needs them not is not."""
    down = "model.layers.1.mlp.down_proj"
    file = edited(collected("dense"), tmp_path, lambda d: d["layers"]["1"]["inputs"].pop(down))
    error = refused(llama, "nvfp4-fp8-hybrid-four-over-six", file, tmp_path)
    assert (error.code, error.where) == ("amax-invalid", down)
    rules = "- {role: down, format: fp8-dynamic}\n- {role: linear, format: nvfp4, scale_rule: four-over-six}\n"
    (tmp_path / "recipe.yaml").write_text(f"name: mine\nrules:\n{rules}", encoding="utf-8")
    quantize_into(llama, str(tmp_path / "recipe.yaml"), tmp_path / "out", statistics=file)


def test_missing_keys_and_values_are_refused(
    llama: Path, collected: Callable[..., Path], rows: dict[str, Path], tmp_path: Path
) -> None:
    """A recipe with an FP8 cache needs statistics that looked at keys and values, which one without did not."""
    quantize_into(llama, "nvfp4-four-over-six", tmp_path / "without", dataset=[rows["all"]])
    no_cache = edited(collected("dense"), tmp_path, lambda d: d["layers"]["1"].__setitem__("cache", None))
    for given, layer in ((tmp_path / "without", 0), (no_cache, 1)):
        error = refused(llama, "nvfp4-fp8-hybrid-fp8kv-four-over-six", given, tmp_path)
        assert error.code == "statistics-invalid"
        assert f"layer {layer}" in str(error)
        quantize_into(llama, "nvfp4-fp8-hybrid-four-over-six", tmp_path / f"out-{layer}", statistics=given)


def test_what_is_lacking_is_found_before_any_layer_is_made(
    llama: Path, collected: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Statistics that lack the last layer fail before the first weight is read."""
    import snugfit.quantization.quantize

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("began the long work")

    monkeypatch.setattr(snugfit.quantization.quantize, "run_layers", refuse)
    file = edited(collected("dense"), tmp_path, lambda d: d["layers"].pop("1"))
    error = refused(llama, "nvfp4-four-over-six", file, tmp_path)
    assert error.code == "statistics-invalid"
    assert "layer 1" in str(error)


# --- merged


def without_squares(layer: LayerStatistics) -> dict[str, ExpertStatistics]:
    """What a layer's experts saw, without E[x^2]: sums in another order differ in their last bits."""
    return {name: replace(one, gate_up_squares=None, down_squares=None) for name, one in layer.experts.items()}


def pairs_of_squares(a: LayerStatistics, b: LayerStatistics) -> list[tuple[Any, Any]]:
    """E[x^2] of everything that two layers measured."""
    texts = [
        [one.squares for one in layer.inputs.values()]
        + [text for one in layer.experts.values() for text in (one.gate_up_squares, one.down_squares)]
        for layer in (a, b)
    ]
    return [(decode_squares(one), decode_squares(other)) for one, other in zip(*texts, strict=True) if one and other]


@pytest.mark.parametrize("name", ["dense", "mixture", "fp8"])
def test_halves_merge_into_the_whole(name: str, collected: Callable[..., Path]) -> None:
    """Statistics over two halves of the rows are those over all: largest magnitudes and counts exactly.

    Histograms sample every eighth token of a run: of inputs that all tokens pass, and rows of whole eighths, the same
    ones; of what experts pass on, as many but for one token a part.
    """
    whole = load_statistics(collected(name))
    halves = [(part, load_statistics(collected(name, part))) for part in ("first", "second")]
    merged = merge_statistics(halves)
    assert merged.tokens == whole.tokens == ROWS * LENGTH
    assert [one.num_samples for one in merged.datasets] == [2, 2]
    assert merged.layers.keys() == whole.layers.keys()
    for number, layer in whole.layers.items():
        other = merged.layers[number]
        assert other.cache == layer.cache
        assert other.cache is not None
        assert without_squares(other) == without_squares(layer)
        assert bool(layer.experts) == (name != "dense")
        for mine, theirs in pairs_of_squares(other, layer):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)
        assert other.inputs.keys() == layer.inputs.keys()
        for module, one in layer.inputs.items():
            assert (other.inputs[module].tokens, other.inputs[module].amax) == (one.tokens, one.amax)
            if not module.endswith("experts.down"):
                assert other.inputs[module].histogram == one.histogram
                continue
            width = 256
            counted = [sum(given.histogram.values()) for given in (one, other.inputs[module])]
            assert counted[0] == -(-one.tokens // SAMPLED) * width
            assert counted[0] <= counted[1] <= counted[0] + width
            assert other.inputs[module].quantile(0.5) == pytest.approx(one.quantile(0.5), rel=0.25)


def test_merged_statistics_quantize_as_the_whole(
    mixtral: Path, collected: Callable[..., Path], no_forward: Callable[[], None], tmp_path: Path
) -> None:
    """A checkpoint made of merged halves has the bytes of one made of the whole."""
    merged = merge_statistics([(part, load_statistics(collected("mixture", part))) for part in ("first", "second")])
    save_statistics(merged, tmp_path / "merged.json")
    whole = collected("mixture")
    no_forward()
    made = [
        quantize_into(mixtral, "nvfp4-moe-four-over-six", tmp_path / str(number), statistics=given)
        for number, given in enumerate((tmp_path / "merged.json", whole))
    ]
    assert (made[0] / "model.safetensors").read_bytes() == (made[1] / "model.safetensors").read_bytes()


def test_what_does_not_go_together_is_not_merged(
    collected: Callable[..., Path], quantized: Callable[[str], Path]
) -> None:
    """Rows twice, other models, other recipes, other experts and other layers are refused with both names."""
    first, second = (load_statistics(collected("mixture", part)) for part in ("first", "second"))
    fewer = replace(second, layers={0: second.layers[0]})
    narrower = replace(second, layers=dict(second.layers) | {1: replace(second.layers[1], inputs={})})
    blind = replace(second, layers=dict(second.layers) | {1: replace(second.layers[1], cache=None)})
    cases = {
        "same samples as a.json": first,
        "header_digest": load_statistics(collected("dense", "second")),
        "recipe_digest": load_statistics(quantized("mixture")),
        "all_experts": replace(second, all_experts=False),
        "max_forced_tokens": replace(second, max_forced_tokens=7),
        "other layers than a.json": fewer,
        "layer 1": narrower,
        "layer 1: not all of them measured keys and values": blind,
    }
    for named, other in cases.items():
        with raises("statistics-mismatch", "b.json") as caught:
            merge_statistics([("a.json", first), ("b.json", other)])
        assert named in caught.value.what
    joined = merge_statistics([("a.json", first), ("b.json", second)])
    with raises("statistics-mismatch", "b.json") as caught:
        merge_statistics([("ab.json", joined), ("b.json", second)])
    assert "ab.json" in caught.value.what


def test_statistics_are_saved_whole_or_not_at_all(
    collected: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that is there stays as it is; a disk that fails leaves nothing, under no name."""
    found = load_statistics(collected("dense"))
    target = tmp_path / "a.json"
    save_statistics(found, target)
    assert load_statistics(target) == found
    with raises("output-exists", target):
        save_statistics(replace(found, model="other"), target)
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    with raises("output-exists", "link.json"):
        save_statistics(found, tmp_path / "link.json")
    with raises("output-not-writable", tmp_path / "no folder"):
        save_statistics(found, tmp_path / "no folder" / "a.json")
    before = sorted(tmp_path.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for method in ("rename", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, fail)
            with raises("output-not-writable", tmp_path / "b.json"):
                save_statistics(found, tmp_path / "b.json")
        assert sorted(tmp_path.iterdir()) == before
    assert load_statistics(target) == found


# --- collected alone


@pytest.mark.parametrize("name", ["dense", "mixture", "fp8"])
def test_collected_statistics_are_taken(
    name: str,
    sources: dict[str, tuple[Path, str]],
    collected: Callable[..., Path],
    quantized: Callable[[str], Path],
    no_forward: Callable[[], None],
    tmp_path: Path,
) -> None:
    """Statistics of the model as it is serve recipes; where rows have passed no quantized weight they are the same."""
    source, recipe = sources[name]
    folder = collected(name)
    found, own = load_statistics(folder), load_statistics(quantized(name))
    no_forward()
    assert (found.recipe, found.recipe_digest) == (None, None)
    assert (found.header_digest, found.fingerprint, found.datasets) == (
        own.header_digest,
        own.fingerprint,
        own.datasets,
    )
    assert not list(folder.glob("*.safetensors"))
    query = "model.layers.0.self_attn.q_proj"
    assert found.layers[0].inputs[query].squares is not None  # of a run that quantizes they are not stored
    assert replace(found.layers[0].inputs[query], squares=None) == own.layers[0].inputs[query]
    assert found.layers[0].inputs.keys() == own.layers[0].inputs.keys()
    for other in ("nvfp4-four-over-six", recipe):
        out = quantize_into(source, other, tmp_path / other, statistics=folder)
        written = all_tensors(out)
        scales = {n: t for n, t in written.items() if n.endswith("input_global_scale")}
        assert scales
        for module, seen in ((m, one) for layer in found.layers.values() for m, one in layer.inputs.items()):
            if f"{module}.input_global_scale" in scales:
                assert float(scales[f"{module}.input_global_scale"]) == pytest.approx(2688 / seen.amax, rel=1e-6)
        for module, experts in ((m, e) for layer in found.layers.values() for m, e in layer.experts.items()):
            assert float(scales[f"{module}.0.w2.input_global_scale"]) == pytest.approx(2688 / experts.down, rel=1e-6)


def test_scales_of_the_cache_come_from_statistics(
    llama: Path, collected: Callable[..., Path], no_forward: Callable[[], None], tmp_path: Path
) -> None:
    """An FP8 cache's scales are the collected largest keys and values over 448."""
    statistics = collected("dense")
    no_forward()
    out = quantize_into(llama, "nvfp4-fp8-hybrid-fp8kv-four-over-six", tmp_path / "out", statistics=statistics)
    written = all_tensors(out)
    for number, layer in load_statistics(collected("dense")).layers.items():
        assert layer.cache is not None
        for which, amax in zip("kv", layer.cache, strict=True):
            scale = written[f"model.layers.{number}.self_attn.{which}_scale"]
            assert torch.equal(scale, torch.tensor([amax / 448]).to(scale.dtype))


def test_a_model_without_its_own_statistics_is_measured_by_hand(
    llama: Path, rows: dict[str, Path], collected: Callable[..., Path]
) -> None:
    """Largest inputs of every linear are those that transformers' own model shows, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    amax: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, args, name=name: amax.update({name: max(amax.get(name, 0.0), float(args[0].abs().max()))})
            )
    with torch.no_grad():
        for line in rows["all"].read_text().splitlines():
            model(input_ids=torch.tensor([json.loads(line)["input_ids"]]), use_cache=False)
    found = {
        m: one.amax for layer in load_statistics(collected("dense")).layers.values() for m, one in layer.inputs.items()
    }
    assert len(found) == 2 * 4
    assert found == {name: amax[name] for name in found}


def test_experts_that_only_see_what_is_routed(mixtral: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    """With routed tokens alone nothing is forced on an expert; a cap bounds what is forced on all."""
    asked: dict[str, Any] = {"dataset": [rows["all"]], "device": "cpu"}
    routed = collect_statistics(mixtral, output_dir=tmp_path / "r", moe_calibrate_all_experts=False, **asked)
    capped = collect_statistics(mixtral, output_dir=tmp_path / "c", max_forced_tokens=20, **asked)
    for layer in routed.layers.values():
        (seen,) = layer.experts.values()
        assert seen.forced == (0,) * 4
        assert sum(seen.routed) == 2 * ROWS * LENGTH
    for number, layer in capped.layers.items():
        (seen,) = layer.experts.values()
        assert seen.routed == next(iter(routed.layers[number].experts.values())).routed
        assert 0 < max(seen.forced) <= 20


def test_collecting_is_refused_before_it_begins(
    llama: Path, rows: dict[str, Path], collected: Callable[..., Path], tmp_path: Path
) -> None:
    """An output that exists, no rows and no model are refused, and nothing is left behind."""
    cases: list[tuple[Path, Path, Path]] = [
        (llama, collected("dense"), rows["all"]),
        (llama, tmp_path / "out", tmp_path / "no-rows.jsonl"),
        (tmp_path / "no-model", tmp_path / "out", rows["all"]),
    ]
    for source, target, text in cases:
        with pytest.raises(UserError):
            collect_statistics(source, output_dir=target, dataset=[text], device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_stopped_collection_goes_on(
    llama: Path, rows: dict[str, Path], collected: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run stopped in its second layer goes on there and ends with the same statistics."""
    run_layer = forward_pass.run_layer
    seen: list[int] = []

    def stop(layer: nn.Module, index: int, *args: Any, **kwargs: Any) -> int:
        seen.append(index)
        if index == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt
        return run_layer(layer, index, *args, **kwargs)

    monkeypatch.setattr(forward_pass, "run_layer", stop)
    asked: dict[str, Any] = {"dataset": [rows["all"]], "device": "cpu", "tokens_per_batch": LENGTH}
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(llama, output_dir=tmp_path / "out", **asked)
    assert (tmp_path / "out.partial").is_dir()
    collect_statistics(llama, output_dir=tmp_path / "out", **asked)
    assert seen == [0, 1, 1]
    assert load_statistics(tmp_path / "out") == load_statistics(collected("dense"))
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / ".snugfit-work").exists()


# --- figures of a histogram


def measured(*parts: torch.Tensor) -> InputStatistics:
    """Inputs [n, K] in several calls, as a watched linear sees them."""
    layer = nn.Module()
    layer.linear = nn.Linear(parts[0].shape[1], 1, dtype=parts[0].dtype)
    statistics = InputObserver(layer, ["linear"])
    for part in parts:
        layer.linear(part)
    found = statistics.result("linear")
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["normal", "heavy", "tiny", "sparse"])
def test_quantiles_are_within_a_bin(shape: str, dtype: torch.dtype) -> None:
    """A histogram's quantiles are torch's of the sampled tokens within the width of a bin."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(801, 96, generator=generator)
    if shape == "heavy":
        values = values.exp() * values.sign()
    elif shape == "tiny":
        values = values * 1e-30
    elif shape == "sparse":
        values = values * (torch.rand(values.shape, generator=generator) < 0.3)
    values = values.to(dtype)
    found = measured(*values.split([100, 1, 300, 7, 393]))
    sampled = values[::SAMPLED].float().abs().flatten()
    assert sum(found.histogram.values()) == len(sampled)
    assert (found.tokens, found.amax) == (801, float(values.float().abs().max()))
    for share in (0.01, 0.1, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0):
        exact = float(torch.quantile(sampled.double(), share))
        assert exact / (1 + BIN) * 0.999 <= found.quantile(share) <= exact * (1 + BIN) * 1.001 + lower_end(1)
    every = [found.quantile(share / 50) for share in range(51)]
    assert every == sorted(every)
    assert found.quantile(1.0) <= found.amax


def test_parts_are_sampled_as_the_whole() -> None:
    """Which tokens a histogram takes does not depend on the batches."""
    values = torch.randn(101, 8, generator=torch.Generator().manual_seed(1))
    whole = measured(values)
    for sizes in ([101], [1] * 101, [7, 9, 85], [3, 0, 98]):
        assert measured(*values.split(sizes)) == whole


def test_an_outlier_is_seen_wherever_it_is() -> None:
    """The largest magnitude is of all tokens, sampled or not; over the 99.9th percentile it shows an outlier."""
    values = torch.randn(800, 64, generator=torch.Generator().manual_seed(3))
    calm = measured(values)
    usual = float(torch.quantile(values[::SAMPLED].abs().flatten().double(), 0.999))
    assert calm.outlier_ratio == pytest.approx(float(values.abs().max()) / usual, rel=BIN)
    assert calm.outlier_ratio < 2
    values[SAMPLED + 3, 5] = -5000.0  # a token that is not sampled
    with_outlier = measured(values)
    assert with_outlier.amax == 5000.0
    assert with_outlier.histogram == calm.histogram or with_outlier.quantile(0.999) == pytest.approx(
        calm.quantile(0.999)
    )
    assert with_outlier.outlier_ratio == pytest.approx(5000.0 / usual, rel=BIN)


def test_nothing_gives_no_figure() -> None:
    """Inputs that are all zero, or that never came, have no outlier ratio and no percentile."""
    zero = measured(torch.zeros(16, 4))
    assert (zero.amax, zero.quantile(0.999), zero.outlier_ratio) == (0.0, 0.0, 0.0)
    none = InputStatistics(0, 0.0, {})
    assert (none.quantile(0.5), none.outlier_ratio) == (0.0, 0.0)
    assert merge_inputs([none, zero]) == zero


def test_bins_are_no_wider_than_a_sixteenth() -> None:
    """Each bin of normal numbers begins where the one before ends, at most 1/16 above its lower end."""
    ends = [lower_end(number) for number in range(16, 4080)]
    assert all(low < high <= low * (1 + BIN) for low, high in pairwise(ends))
    assert lower_end(4080) == float("inf")


def test_experts_figures() -> None:
    """An expert's tokens are those routed and forced; who saw fewer is named by number."""
    seen = ExpertStatistics(
        routed=(3, 0, 40),
        forced=(1, 2, 0),
        gate_up_routed=(1.0, 0.0, 2.0),
        gate_up_forced=(4.0, 1.0, 0.0),
        down_routed=(0.5, 0.0, 9.0),
        down_forced=(3.0, 2.0, 0.0),
    )
    assert seen.tokens == (4, 2, 40)
    assert (seen.gate_up, seen.down) == (4.0, 9.0)
    assert seen.experts_below(4) == (1,)
    assert seen.experts_below(0) == ()
    assert LayerStatistics({}, {"experts": seen}).cache is None


def test_datasets_add_up() -> None:
    """Samples and tokens of statistics are those of all datasets."""
    found = Statistics(
        snugfit="0",
        model="m",
        header_digest="h",
        fingerprint="f",
        datasets=(DatasetUsed("a", 2, 10, "x"), DatasetUsed("b", 1, 5, "y")),
        all_experts=True,
        max_forced_tokens=0,
        recipe=None,
        recipe_digest=None,
        layers={},
    )
    assert (found.num_samples, found.tokens) == (3, 15)


def test_a_moved_model_keeps_its_statistics(
    llama: Path, collected: Callable[..., Path], no_forward: Callable[[], None], tmp_path: Path
) -> None:
    """A copy of the model under another name is the same model."""
    shutil.copytree(llama, tmp_path / "copy")
    statistics = collected("dense")
    no_forward()
    quantize_into(tmp_path / "copy", "nvfp4-four-over-six", tmp_path / "out", statistics=statistics)
