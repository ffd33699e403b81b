"""Which way to quantize is kept, by cases computed by hand."""

from __future__ import annotations

import json
from math import inf, isnan, nan, sqrt
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeTiny
from snugfit.quantization.quantize import quantize
from snugfit.records.trials import MIN_GAIN, Measured, Trial, judge
from snugfit.report.terminal import print_trials


def trials(*kl: tuple[float, ...], tokens: tuple[int, ...] = (), files: tuple[int, ...] = ()) -> list[Trial]:
    """What ways with this KL in each segment are worth; by default segments of 10 tokens of one file."""
    count = len(kl[0])
    found = [Measured(f"way {number}", one, float(number)) for number, one in enumerate(kl)]
    return judge(found, tokens or (10,) * count, files or (0,) * count)


def kept(*kl: tuple[float, ...], **options: Any) -> list[int]:
    """The numbers of the ways that took the place of those before them."""
    return [number for number, trial in enumerate(trials(*kl, **options)) if trial.kept]


def test_the_error_by_hand() -> None:
    """Means are weighted by tokens; the error is that of independent segments."""
    (first,) = trials((1.0, 2.0, 6.0), tokens=(10, 20, 10))
    assert first.kl == (10 + 40 + 60) / 40 == 2.75
    assert first.tokens == 40
    spread = (10 * 1.75) ** 2 + (20 * 0.75) ** 2 + (10 * 3.25) ** 2
    assert first.error == pytest.approx(sqrt(spread * 3 / 2) / 40)
    assert first.kept
    assert first.gain is first.gain_error is None


def test_the_gain_is_paired() -> None:
    """A constant gain in segments of very different KL is certain, however much these vary."""
    first, second = trials((0.1, 5.0, 1.0), (0.05, 4.95, 0.95))
    assert second.gain == pytest.approx(0.05)
    assert second.gain_error == pytest.approx(0, abs=1e-9)
    assert first.error > 1
    assert second.kept


def test_a_gain_must_be_beyond_its_error() -> None:
    """Of two gains with one error, the one above MIN_GAIN errors is kept, and the one below is a tie."""
    base = (1.0, 1.0, 1.0, 1.0)
    error = sqrt(4 * 0.01**2 * 4 / 3) / 4  # of gains 0.01 off their mean
    for factor, expected in ((0.95, [0]), (1.05, [0, 1])):
        gain = MIN_GAIN * error * factor
        way = tuple(1.0 - gain + sign * 0.01 for sign in (1, -1, 1, -1))
        found = trials(base, way)
        assert found[1].gain == pytest.approx(gain)
        assert found[1].gain_error == pytest.approx(error)
        assert kept(base, way) == expected


def test_ties_go_to_the_simpler() -> None:
    """The same KL, or hardly less, leaves the way that came first; a way that is worse is never kept."""
    base = (0.5, 0.4, 0.3)
    assert kept(base, base) == [0]
    assert kept(base, (0.49, 0.41, 0.29)) == [0]
    assert kept(base, (0.6, 0.5, 0.4)) == [0]


def test_each_way_is_compared_with_the_last_one_kept() -> None:
    """A way that was not kept is no measure for those behind it."""
    base, better, worse, between = (1.0,) * 3, (0.5,) * 3, (2.0,) * 3, (0.7,) * 3
    assert kept(base, worse, between, better) == [0, 2, 3]
    assert kept(base, better, between, worse) == [0, 1]
    found = trials(base, better, between)
    assert found[2].gain == pytest.approx(-0.2)


def test_what_is_not_finite_never_wins() -> None:
    """NaN or infinity anywhere loses, but against a way that is broken, too, where anything finite wins."""
    base = (1.0, 1.0, 1.0)
    for bad in (nan, inf, -inf):
        assert kept(base, (0.1, bad, 0.1)) == [0]
        assert kept((0.1, bad, 0.1), base) == [0, 1]
        assert kept((bad,) * 3, (bad,) * 3) == [0]
        assert kept((bad,) * 3, (bad,) * 3, base, (5.0,) * 3) == [0, 2]
    found = trials(base, (0.1, nan, 0.1))
    assert isnan(found[1].kl)
    assert found[1].gain is not None
    assert isnan(found[1].gain)


def test_files_are_strata() -> None:
    """Files that differ in their gain make no error; segments that differ within a file do."""
    base, files = (1.0,) * 4, (0, 0, 1, 1)
    apart = trials(base, (0.9, 0.9, 0.5, 0.5), files=files)[1]
    assert apart.gain == pytest.approx(0.3)
    assert apart.gain_error == pytest.approx(0)
    mixed = trials(base, (0.9, 0.5, 0.9, 0.5), files=files)[1]
    assert mixed.gain_error == pytest.approx(sqrt(2 * (2 * 2 * 2.0**2)) / 40)
    assert kept(base, (0.9, 0.9, 0.5, 0.5), files=files) == [0, 1]


def test_one_segment_in_a_file() -> None:
    """A file with one segment counts with its distance from the mean of all."""
    found = trials((1.0,) * 3, (0.9, 0.7, 0.5), files=(0, 0, 1))[1]
    mean = (0.1 + 0.3 + 0.5) / 3
    spread = 2 * ((10 * 0.1) ** 2 * 2) + (10 * (0.5 - mean)) ** 2
    assert found.gain_error == pytest.approx(sqrt(spread) / 30)


def test_one_segment_alone_decides_nothing() -> None:
    """Where nothing says how far other text would be from it, the simpler way stays."""
    assert kept((1.0,), (0.2,)) == [0]
    (only,) = trials((0.4,))
    assert only.error == 0.4


def test_numbers_that_are_not_finite_in_record_and_table(
    make_tiny: MakeTiny, token_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record with such a trial is JSON all the same, with null; the table shows the way."""
    from dataclasses import replace

    record = quantize(
        make_tiny("llama"), "nvfp4a16", output_dir=tmp_path / "out", dataset=[token_rows], device="cpu", effort="fast"
    )
    broken = replace(record, trials=tuple(trials((1.0, 1.0), (nan, 0.5))))

    def refuse(number: str) -> None:
        raise AssertionError(number)

    loaded = json.loads(broken.to_json(), parse_constant=refuse)
    assert [trial["kl"] for trial in loaded["trials"]] == [1.0, None]
    print_trials(broken.trials)
    assert "way 1" in capsys.readouterr().out
