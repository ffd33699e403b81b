"""Runs of the real model killed at random, as a machine that is taken away would."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snugfit.records.quantize import RECORD_FILE
from snugfit.storage.staging import units_done

pytestmark = pytest.mark.slow

KILLS = 20
COMMAND = "import sys; from snugfit.cli.app import app; app(sys.argv[1:])"


def start(model: Path, out: Path) -> subprocess.Popen[bytes]:
    options = ["--num-samples", "8", "--max-seq-length", "256", "--device", "cpu", "--tokens-per-batch", "512"]
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "quantize",
        str(model),
        "-r",
        "nvfp4-fp8-hybrid-fp8kv-four-over-six",
        "-o",
        str(out),
    ]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digests(out: Path) -> dict[str, str]:
    record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    return dict(record["files"])


def test_twenty_random_kills(smollm2: Path, tmp_path: Path) -> None:
    """Killed at twenty random moments, each time gone on with, the run ends in the bytes of a run in one piece."""
    whole, out, partial = tmp_path / "whole", tmp_path / "out", tmp_path / "out.partial"
    begun = time.monotonic()
    assert start(smollm2, whole).wait() == 0
    length = time.monotonic() - begun
    generator = random.Random(4)  # noqa: S311  # moments, no secrets
    kills, gone_on = 0, 0
    while kills < KILLS:
        run = start(smollm2, out)
        while not partial.exists() and run.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.expovariate(6 / length))
        gone_on += units_done(partial) > 1
        run.send_signal(signal.SIGKILL)
        if run.wait() == 0:  # it was done before
            check(out, whole)
            shutil.rmtree(out)
        else:
            kills += 1
    if not out.exists():
        assert start(smollm2, out).wait() == 0
    assert gone_on > 3
    check(out, whole)


def check(out: Path, whole: Path) -> None:
    """The same files, but for the record, which tells of times."""
    assert digests(out) == digests(whole)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {RECORD_FILE}:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
