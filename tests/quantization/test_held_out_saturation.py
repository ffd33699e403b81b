"""What a run records of inputs of held-out samples that exceed the range of the input scales it writes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.killed import KILLED, contents, in_child
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.cli.app import app
from snugfit.data.dataset import hold_out, make_dataset
from snugfit.quantization.quantize import quantize
from snugfit.quantization.ways import HELD_OUT_EVERY
from snugfit.records.quantize import RECORD_FILE, QuantizeRecord
from snugfit.records.saturation import InputSaturation, worst
from snugfit.report.terminal import print_saturation

LOUD = 63
LENGTH = 48
OPTIONS: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 512}
SITES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a token whose inputs are larger than those of all others."""
    path = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(make_tiny("llama", num_hidden_layers=2), path)
    tensors = all_tensors(path)
    tensors["model.embed_tokens.weight"][LOUD] = 0
    tensors["model.embed_tokens.weight"][LOUD, 5] = 4
    rewrite(path, tensors)
    return path


def samples(folder: Path, *, loud: int) -> Path:
    """Eight samples, the one that will be held out with this many loud tokens."""
    found = random_rows((LENGTH,) * 8, stop=60)
    _, out = hold_out(make_dataset([tuple(row) for row in found], "", [8]), HELD_OUT_EVERY)
    (number,) = (place for place, row in enumerate(found) if tuple(row) in out.samples)
    found[number][10 : 10 + loud] = [LOUD] * loud
    return write_rows(folder / f"rows-{loud}.jsonl", found)


def run(model: Path, out: Path, rows: Path, recipe: str = "nvfp4", **options: Any) -> QuantizeRecord:
    """A run of effort good."""
    return quantize(model, recipe, output_dir=out, dataset=[rows], **OPTIONS | {"effort": "good"} | options)


def test_loud_tokens_saturate(model: Path, tmp_path: Path) -> None:
    """Tokens that calibration has not seen exceed the scales of the first layer; with headroom none does.

    Every site is listed once with the calibrated range of its weights; the sums are those of the held-out sample.
    """
    rows = samples(tmp_path, loud=3)
    record = run(model, tmp_path / "out", rows, input_headroom=1)
    assert [site.module for site in record.input_saturation] == [
        f"model.layers.{layer}.{name}" for layer in range(2) for name in SITES
    ]
    amax = {tensor.name.removesuffix(".weight"): tensor.input_amax for tensor in record.tensors}
    for site in record.input_saturation:
        assert site.tokens == LENGTH
        assert site.calibrated_amax == amax[site.module]
        assert site.calibrated_amax is not None
        assert site.ratio == site.amax / site.calibrated_amax
        assert site.range == pytest.approx(site.calibrated_amax, rel=1e-6)
        assert (site.saturated_tokens > 0) == (site.amax > site.calibrated_amax)
        assert site.saturated_tokens <= site.saturated_values
    first = record.input_saturation[0]
    assert first.saturated_tokens == first.saturated_values == 3  # one feature of each
    assert first.ratio > 1.5
    wide = run(model, tmp_path / "wide", rows, input_headroom=8)
    assert all(site.saturated_tokens == site.saturated_values == 0 for site in wide.input_saturation)
    assert wide.input_saturation[0].ratio > 1.5
    assert all(site.range == pytest.approx(8 * (site.calibrated_amax or 0), rel=1e-6) for site in wide.input_saturation)
    quiet = run(model, tmp_path / "quiet", samples(tmp_path, loud=0), input_headroom=1)
    assert quiet.input_saturation[0].ratio < 1.5


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("nvfp4", {"effort": "fast"}), ("nvfp4-absmax", {"effort": None}), ("nvfp4a16", {}), ("mxfp4", {})],
)
def test_nothing_to_compare(recipe: str, options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Without held-out samples, or without static input scales, the record has no sites and no table is printed."""
    record = run(model, tmp_path / "out", samples(tmp_path, loud=3), recipe, **options)
    assert record.input_saturation == ()
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["input_saturation"] == []


def test_weight_only_users_see_it_too(model: Path, tmp_path: Path) -> None:
    """The file's scales are compared under a target that rounds no inputs: other engines will read them."""
    record = run(model, tmp_path / "out", samples(tmp_path, loud=2), target="marlin", input_headroom="amax")
    assert len(record.input_saturation) == 8
    assert record.input_saturation[0].saturated_tokens == 2


def test_experts_in_the_record(tmp_path: Path) -> None:
    """A mixture's experts are two sites a layer, with the ranges of their weights."""
    model = make_mixture("qwen3_moe", tmp_path / "moe", wide=True)
    record = run(model, tmp_path / "out", samples(tmp_path, loud=0))
    names = [site.module.split(".", 3)[3] for site in record.input_saturation]
    assert names[:4] == ["self_attn.q_proj", "self_attn.o_proj", "mlp.experts.gate_up", "mlp.experts.down"]
    amax = {tensor.name: tensor.input_amax for tensor in record.tensors}
    for site in record.input_saturation:
        kind = {"gate_up": "0.gate_proj", "down": "0.down_proj"}.get(site.module.rpartition(".")[2])
        name = site.module if kind is None else f"{site.module.rpartition('.')[0]}.{kind}"
        assert site.calibrated_amax == amax[f"{name}.weight"]


def test_a_killed_run_records_the_same(model: Path, tmp_path: Path) -> None:
    """What was seen of the winner is kept with its trial: a run killed behind all trials records what others do."""
    rows = samples(tmp_path, loud=3)
    whole = run(model, tmp_path / "whole", rows)

    def work() -> None:
        real = Path.replace

        def replace_file(self: Path, target: Any) -> Path:
            if self.suffix == ".safetensors":  # the winner's files move to their place
                import os

                os._exit(KILLED)
            return real(self, target)

        Path.replace = replace_file  # type: ignore[method-assign,assignment]
        run(model, tmp_path / "out", rows)

    assert in_child(work) == KILLED
    again = run(model, tmp_path / "out", rows)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert again.input_saturation == whole.input_saturation


def test_the_printed_table(model: Path, tmp_path: Path) -> None:
    """A run prints how many scales are exceeded, by how many tokens, and the worst with its factor."""
    rows = samples(tmp_path, loud=3)
    given = ["quantize", str(model), "-r", "nvfp4", "--device", "cpu", "--dataset", str(rows), "--effort", "good"]
    result = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "out"), "--input-headroom", "amax"])
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    sites = [InputSaturation(**site) for site in record["input_saturation"]]
    most = worst(sites)
    line = next(line for line in result.stdout.splitlines() if most.module in line)
    beyond = [site for site in sites if site.saturated_tokens]
    assert 0 < len(beyond) < 8
    tokens = sum(site.saturated_tokens for site in sites)
    assert line.split()[:5] == ["8", str(len(beyond)), str(tokens), "of", str(8 * LENGTH)]
    assert line.split()[-1] == f"{most.ratio:.2f}x"


def test_the_worst_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    """The worst scale is the one that is exceeded most, or that comes closest, whatever its calibrated range was."""
    common: dict[str, Any] = {"tokens": 10, "saturated_tokens": 0, "saturated_values": 0}
    close = InputSaturation(module="close", amax=3.9, ratio=1.95, range=4.0, calibrated_amax=2.0, **common)
    far = InputSaturation(module="far", amax=30.0, ratio=3.0, range=40.0, calibrated_amax=10.0, **common)
    copied = InputSaturation(module="copied", amax=5.0, ratio=1.25, range=4.0, calibrated_amax=None, **common)
    broken = InputSaturation(module="broken", amax=math.nan, ratio=math.nan, range=4.0, calibrated_amax=4.0, **common)
    assert worst([close, far]) is close
    assert worst([far, close, copied]) is copied
    assert worst([close, broken, copied]) is broken
    assert worst([broken, close, copied]) is broken
    print_saturation((far, close))
    assert "1.95x" in capsys.readouterr().out
    print_saturation(())
    assert capsys.readouterr().out == ""
