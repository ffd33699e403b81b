"""Importance matrices of llama.cpp as statistics: they agree with our own, give the same codes, or are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.importance import Sums, measure, write_gguf, write_legacy
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.cli.app import app
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.import_statistics import import_statistics
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.records.squares import decode_squares
from snugfit.records.statistics_file import (
    SQUARES_SCHEMA,
    STATISTICS_FILE,
    Statistics,
    load_statistics,
    merge_statistics,
)

ROWS = random_rows((64,) * 8, stop=60)
WRITERS: dict[str, Callable[[Path, dict[str, Sums]], Path]] = {"gguf": write_gguf, "dat": write_legacy}
MODELS = ("llama", "qwen3_moe", "qwen2_moe")


@pytest.fixture(scope="module")
def models(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and two mixtures, in fp32: sums of ours and of transformers' own run are of the same numbers."""
    folder = tmp_path_factory.mktemp("models")
    found = {"llama": make_tiny("llama", num_hidden_layers=2, dtype=torch.float32)}
    return found | {name: make_mixture(name, folder / name, dtype=torch.float32) for name in MODELS[1:]}


@pytest.fixture(scope="module")
def sums(models: dict[str, Path]) -> dict[str, dict[str, Sums]]:
    """What llama-imatrix would add up of each model."""
    return {name: measure(model, ROWS) for name, model in models.items()}


@pytest.fixture(scope="module")
def own(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Statistics that we measure of the same rows."""
    folder = tmp_path_factory.mktemp("own")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    for name, model in models.items():
        collect_statistics(model, output_dir=folder / name, dataset=[rows], device="cpu")
    return {name: folder / name / STATISTICS_FILE for name in models}


def imported(
    kind: str, model: Path, sums: dict[str, Sums], folder: Path, name: str = "imported.json"
) -> tuple[Path, Statistics]:
    """The statistics of an importance matrix of this kind, and their file."""
    matrix = WRITERS[kind](folder / f"imatrix.{kind}", sums)
    return folder / name, import_statistics(matrix, model, output=folder / name)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_imported_is_what_we_measure(
    name: str,
    kind: str,
    models: dict[str, Path],
    sums: dict[str, dict[str, Sums]],
    own: dict[str, Path],
    tmp_path: Path,
) -> None:
    """E[x^2] of the inputs of every linear and expert, and experts' tokens, are those that our own run finds."""
    file, found = imported(kind, models[name], sums[name], tmp_path)
    assert load_statistics(file) == found
    measured = load_statistics(own[name])
    assert (found.ranges, measured.ranges) == (False, True)
    assert (found.schema, measured.schema) == (SQUARES_SCHEMA, SQUARES_SCHEMA)
    assert [one.source for one in found.datasets] == ["calibration.txt"]
    assert (found.header_digest, found.fingerprint) == (measured.header_digest, measured.fingerprint)
    assert found.layers.keys() == measured.layers.keys()
    for number, layer in found.layers.items():
        other = measured.layers[number]
        linears = {
            key: one for key, one in other.inputs.items() if ".experts." not in key and not key.endswith("mlp.gate")
        }
        assert layer.inputs.keys() == {key for key in linears if "shared_expert_gate" not in key}
        for key, one in layer.inputs.items():
            assert one.squares is not None
            theirs = other.inputs[key].squares
            assert theirs is not None
            np.testing.assert_allclose(decode_squares(one.squares), decode_squares(theirs), rtol=1e-3)
            assert kind == "dat" or one.tokens == other.inputs[key].tokens
        assert layer.experts.keys() == other.experts.keys()
        for key, seen in layer.experts.items():
            mine = other.experts[key]
            if kind == "gguf":
                assert seen.routed == mine.routed
            assert [bool(n) for n in seen.routed] == [bool(n) for n in mine.routed]
            for a, b in ((seen.gate_up_squares, mine.gate_up_squares), (seen.down_squares, mine.down_squares)):
                assert a is not None
                assert b is not None
                np.testing.assert_allclose(decode_squares(a), decode_squares(b), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "fp8-int4-awq"), ("llama", "nvfp4a16"), ("qwen3_moe", "fp8-int4-awq")]
)
def test_weighted_scales_of_either_give_the_same_codes(
    name: str,
    recipe: str,
    kind: str,
    models: dict[str, Path],
    sums: dict[str, dict[str, Sums]],
    own: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Of 1,000 bytes of codes at most one differs; no sample runs, and records say what chose scales.

    Of experts the older format does not say how many tokens each saw, by which those of few are drawn to the others:
    there one byte in fifteen may differ.
    """
    file, _ = imported(kind, models[name], sums[name], tmp_path)
    written = {}
    for label, statistics in (("own", own[name]), ("imported", file)):
        record = quantize(
            models[name], recipe, output_dir=tmp_path / label, statistics=statistics, device="cpu", **OPTIONS[label]
        )
        rules = {tensor.scale_rule for tensor in record.tensors if tensor.format.startswith(("int4", "nvfp4"))}
        assert rules == {"weighted+folds"}
        assert record.dataset is None
        assert record.trials == ()
        assert record.arguments["effort"] == "fast"
        written[label] = all_tensors(tmp_path / label)
    quantize(models[name], recipe, output_dir=tmp_path / "plain", effort="fast", device="cpu")
    written["plain"] = all_tensors(tmp_path / "plain")
    packed = [key for key in written["own"] if key.endswith("weight_packed")]
    assert packed
    different = {
        label: sum(
            int((written[label][key].view(torch.uint8) != written["own"][key].view(torch.uint8)).sum())
            for key in packed
        )
        for label in ("imported", "plain")
    }
    total = sum(written["own"][key].view(torch.uint8).numel() for key in packed)
    exact = kind == "gguf" or name == "llama"
    assert different["imported"] <= (0.001 if exact else 1 / 15) * total
    assert different["plain"] > (20 if exact else 5) * different["imported"]


OPTIONS: dict[str, dict[str, Any]] = {"own": {"min_tokens_per_expert": 0}, "imported": {}}


def test_formats_with_input_scales_are_refused(
    models: dict[str, Path], sums: dict[str, dict[str, Sums]], tmp_path: Path
) -> None:
    """An importance matrix has no ranges: a recipe that needs scales of inputs or of a cache is refused at once."""
    file, _ = imported("gguf", models["llama"], sums["llama"], tmp_path)
    for recipe in ("nvfp4", "fp8-dynamic-fp8kv"):
        with raises("statistics-mismatch", where="statistics of") as caught:
            plan_quantization(models["llama"], recipe, statistics=file, device="cpu")
        assert "no ranges" in str(caught.value)
    assert plan_quantization(models["llama"], "nvfp4a16", statistics=file, device="cpu").effort == "fast"


def test_statistics_of_imports_merge(models: dict[str, Path], sums: dict[str, dict[str, Sums]], tmp_path: Path) -> None:
    """Two importance matrices of different texts are one of both, each expert weighted by its tokens."""
    parts = [measure(models["qwen3_moe"], rows) for rows in (ROWS[:3], ROWS[3:])]
    found = []
    for number, part in enumerate(parts):
        (folder := tmp_path / str(number)).mkdir()
        found.append((str(number), imported("gguf", models["qwen3_moe"], part, folder)[1]))
    merged = merge_statistics(found)
    _, whole = imported("gguf", models["qwen3_moe"], sums["qwen3_moe"], tmp_path)
    for number, layer in whole.layers.items():
        for key, one in layer.inputs.items():
            other = merged.layers[number].inputs[key]
            np.testing.assert_allclose(
                decode_squares(other.squares or ""), decode_squares(one.squares or ""), rtol=1e-4
            )
        for key, seen in layer.experts.items():
            both = merged.layers[number].experts[key]
            assert both.routed == seen.routed
            np.testing.assert_allclose(
                decode_squares(both.down_squares or ""), decode_squares(seen.down_squares or ""), rtol=1e-4, atol=1e-9
            )


def damaged(sums: dict[str, Sums], change: str) -> dict[str, Sums]:
    """Entries that are not the model's."""
    found = dict(sums)
    if change == "narrow":
        found["blk.1.ffn_down.weight"] = Sums(torch.ones(1, 8), torch.ones(1))
    elif change == "missing":
        for leaf in ("q", "k", "v"):
            del found[f"blk.1.attn_{leaf}.weight"]
    elif change == "more layers":
        found["blk.2.attn_q.weight"] = found["blk.1.attn_q.weight"]
    elif change == "other names":
        found["blk.0.ffn_gate_exps.weight"] = found["blk.0.ffn_gate.weight"]
    elif change == "more experts":
        one = found["blk.0.ffn_down_exps.weight"]
        found["blk.0.ffn_down_exps.weight"] = Sums(one.squares.repeat(2, 1), one.counts.repeat(2))
    return found


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("change", ["narrow", "missing", "more layers", "other names", "more experts"])
def test_matrices_of_other_models_are_refused(
    change: str, kind: str, models: dict[str, Path], sums: dict[str, dict[str, Sums]], tmp_path: Path
) -> None:
    """Names or shapes that differ are refused by name, and nothing is written."""
    name = "qwen3_moe" if change == "more experts" else "llama"
    matrix = WRITERS[kind](tmp_path / "imatrix", damaged(sums[name], change))
    with raises("statistics-mismatch", where=str(matrix)):
        import_statistics(matrix, models[name], output=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_other_entries_are_left_out(models: dict[str, Path], sums: dict[str, dict[str, Sums]], tmp_path: Path) -> None:
    """Entries of the output head and of what has no place here do no harm."""
    one = sums["llama"]["blk.0.attn_q.weight"]
    more = sums["llama"] | {"output.weight": one, "blk.0.ssm_out.weight": one}
    _, found = imported("gguf", models["llama"], more, tmp_path)
    assert found.layers == imported("gguf", models["llama"], sums["llama"], tmp_path, "other.json")[1].layers


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files_are_refused(
    kind: str, models: dict[str, Path], sums: dict[str, dict[str, Sums]], tmp_path: Path
) -> None:
    """A file that ends early, holds no numbers, or is another one is refused; one that is missing too."""
    whole = WRITERS[kind](tmp_path / "whole", sums["llama"]).read_bytes()
    file, out = tmp_path / "imatrix", tmp_path / "out.json"
    spoiled = [whole[:end] for end in (0, 3, 4, 20, 100, len(whole) // 2)]
    spoiled.append(whole.replace(struct.pack("<f", sums["llama"]["blk.0.attn_q.weight"].squares[0, 0]), b"\xff" * 4))
    spoiled += [b"{}", b"GGUF" + b"\xff" * 60, struct.pack("<i", 1 << 30) + b"\0" * 60]
    for content in spoiled[: -4 if kind == "dat" else None] + spoiled[-3:]:
        file.write_bytes(content)
        with raises("statistics-invalid", where=str(file)):
            import_statistics(file, models["llama"], output=out)
    with raises("file-missing", where="nowhere"):
        import_statistics("nowhere", models["llama"], output=out)
    assert not out.exists()


def test_the_verb(models: dict[str, Path], sums: dict[str, dict[str, Sums]], tmp_path: Path) -> None:
    """`snugfit statistics import` writes the file that quantize takes; show says that it has no ranges."""
    matrix = write_gguf(tmp_path / "imatrix.gguf", sums["qwen3_moe"])
    command = ["statistics", "import", str(matrix), "--model", str(models["qwen3_moe"]), "-o", str(tmp_path / "s.json")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert load_statistics(tmp_path / "s.json").has_squares
    assert failed_with(CliRunner().invoke(app, command), "output-exists", str(tmp_path / "s.json"))
    shown = CliRunner().invoke(app, ["statistics", "show", str(tmp_path / "s.json")])
    assert shown.exit_code == 0
    assert "no ranges" in shown.output
    assert "What experts saw" in shown.output
