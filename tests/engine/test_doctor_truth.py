"""What `doctor` says of vLLM 0.32 is what its CPU build does: it refuses a file, or loads other numbers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.zoo import CASES, Case, make_sound, spoil
from snugfit.inspection.doctor import doctor

pytestmark = pytest.mark.engine

TITLE = "vLLM 0.32"
# sound files that vLLM's CPU build has no kernel for, or no attention
NOT_ON_A_CPU = frozenset({"mixtral", "deepseek_v32"})
MIXTURES = frozenset({"mixtral_int4", "qwen3_moe", "minimax_m2", "deepseek_v3", "jamba"})
# faults of files that a loader of weights does not look at
_OF_TEXTS = frozenset({"tokenizer-missing", "token-out-of-range", "eos-never-emitted"})
LOADING = [
    case
    for case in CASES
    if not case.asked and not case.against and case.fault not in _OF_TEXTS and case.base not in NOT_ON_A_CPU
]


def key(case: Case) -> str:
    """The name of a case and its sound file."""
    return f"{case.name}-{case.base}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What vLLM made of each spoiled file and of the sound ones, and what doctor says of it."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    work = tmp_path_factory.mktemp("truth")
    sound = make_sound(work)
    paths = {case: spoil(case, sound[case.base][0], work / key(case)) for case in LOADING}
    bases = {case.base: sound[case.base][0] for case in LOADING}
    loaded: dict[str, Any] = {}
    script = Path(__file__).with_name("load_in_vllm.py")
    # a process of vLLM knows whether it serves mixtures
    for mixtures in (False, True):
        chosen = [paths[case] for case in LOADING if (case.base in MIXTURES) is mixtures]
        chosen += [path for base, path in bases.items() if (base in MIXTURES) is mixtures]
        out = work / f"out-{mixtures}.json"
        subprocess.run([python, str(script), str(out), *map(str, dict.fromkeys(chosen))], check=False)
        loaded |= json.loads(out.read_text(encoding="utf-8"))
    return {key(case): (loaded[str(paths[case])], loaded[str(bases[case.base])], paths[case]) for case in LOADING}


@pytest.mark.parametrize("case", LOADING, ids=key)
def test_the_verdict_is_the_engines(case: Case, found: Mapping[str, Any]) -> None:
    """Will not load: an error. Will lie: an error, or other bytes in its parameters. Else those of the sound file."""
    entry, sound, path = found[key(case)]
    assert "error" not in sound, sound.get("error")
    changed = [n for n in sound["parameters"] if entry.get("parameters", {}).get(n) != sound["parameters"][n]]
    changed += [name for name in entry.get("parameters", {}) if name not in sound["parameters"]]
    print(f"{key(case)}: {entry.get('error', changed[:3])!s:.200}")  # noqa: T201  # shown by -rP
    severities = {f.severity for f in doctor(path).findings if TITLE in f.affected}
    if "will not load" in severities:
        assert "error" in entry
    elif "will lie" in severities:
        assert "error" in entry or changed
    else:
        assert "error" not in entry, entry["error"]
        assert not changed
