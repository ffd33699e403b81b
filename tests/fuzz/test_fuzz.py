"""Ten thousand damaged models, recipes, rows, results and unfinished runs: no traceback, no half output, no hang."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fuzz.cases import TARGETS

pytestmark = pytest.mark.fuzz
TESTS = Path(__file__).parent.parent
BATCH = {False: 600, True: 125}  # cases a process, which needs seconds to begin
Found = tuple[list[dict[str, Any]], Counter[str]]


def run_batch(target: str, first: int, count: int) -> Found:
    """Problems and exit codes of some cases, run in a process of their own; the case that ends it is a problem."""
    command = [sys.executable, "-m", "fuzz.worker", target, str(first), str(count)]
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    problems = [line for line in lines if "problem" in line]
    if run.returncode == 0:
        return problems, Counter(lines[-1]["codes"])
    last = max((line["begin"] for line in lines if "begin" in line), default=first)
    ended = {
        "case": f"{target} {last}",
        "problem": f"the process ended with {run.returncode}",
        "trace": run.stderr[-2000:],
    }
    rest = (
        run_batch(target, last + 1, first + count - last - 1) if last + 1 < first + count and lines else ([], Counter())
    )
    return [*problems, ended, *rest[0]], rest[1]


@pytest.fixture(scope="module")
def found() -> dict[str, Found]:
    """What came of all cases, by target, as many processes at once as there are cores."""
    batches = [
        (name, first, min(BATCH[target.heavy], target.cases - first))
        for name, target in sorted(TARGETS.items(), key=lambda item: not item[1].heavy)
        for first in range(0, target.cases, BATCH[target.heavy])
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda batch: run_batch(*batch), batches))
    together: dict[str, Found] = {name: ([], Counter()) for name in TARGETS}
    for (name, *_), (problems, codes) in zip(batches, results, strict=True):
        together[name][0].extend(problems)
        together[name][1].update(codes)
    return together


def digest(problems: list[dict[str, Any]]) -> str:
    """Each kind of problem once, with how to run the first case of it again."""
    kinds: dict[object, list[dict[str, Any]]] = {}
    for problem in problems:
        places = re.findall(r'/snugfit/([^"]+)", line (\d+)', problem.get("trace", ""))
        kinds.setdefault((re.sub(r"\d+", "#", problem["problem"])[:60], *places[-1:]), []).append(problem)
    lines = []
    for alike in kinds.values():
        first = alike[0]
        again = f"cd tests && python -m fuzz.worker {first['case']} --keep"
        lines += [
            f"{len(alike)} x {first['problem'][:500]}",
            *first.get("trace", "").splitlines()[-6:],
            f"    {again}",
            "",
        ]
    return "\n".join(lines)


@pytest.mark.parametrize("target", TARGETS)
def test_no_traceback_no_half_output_no_hang(target: str, found: dict[str, Found]) -> None:
    """Whatever is damaged, each verb answers soundly or refuses in one message with a place, and leaves nothing."""
    problems, codes = found[target]
    print(target, dict(sorted(codes.items())))  # noqa: T201  # shown by -rP
    assert not problems, digest(problems)


@pytest.mark.parametrize("target", TARGETS)
def test_cases_reach_what_is_behind_the_door(target: str, found: dict[str, Found]) -> None:
    """Of each kind of damage some cases are refused and others are not, so that neither way goes untried."""
    codes = found[target][1]
    refused = sum(count for name, count in codes.items() if name.endswith(" 2"))
    assert refused > 0
    assert codes.total() - refused > codes.total() // 20


def test_ten_thousand() -> None:
    """There are ten thousand cases."""
    assert sum(target.cases for target in TARGETS.values()) >= 10_000
