"""`plan` on one process and on several under torchrun: seconds of scoring and proof, and whether the plan is the same.

    python plan_ranks.py WORK [--processes 1 2] [--layers 8] [--mixture-layers 2] [--kills 2]
    python plan_ranks.py WORK --device cpu          # a smoke test on tiny shapes

The models are those of ranks.py with random weights; random tokens are scored in NVFP4, FP8 and INT4, and proven on
others. After a plan of a small model, which compiles kernels, each number of processes plans each model, imports left
out of the seconds, beside what a dry run expects. Scores, statistics, the recipe and every measured figure are compared
with those of the first number: equal bytes, or the largest relative difference of a score and of a measured KL. Then
runs on all processes are killed, a random process at a random time, and resumed. WORK/plan-ranks.json has it all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import ranks
from gpu_speed import TINY
from ranks import environment, killed_and_resumed, make_dense, make_mixture, printed, say, shape_of, write_model

HERE = Path(__file__).parent
FILES = ("snugfit-scores.json", "snugfit-statistics.json", "recipe.yaml")
FORMATS = ("nvfp4", "fp8-dynamic", "int4")


def main() -> None:
    """Make the models, plan with each number of processes, compare, kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="a number may come again")
    parser.add_argument("--models", nargs="+", choices=["dense", "mixture"], default=["dense", "mixture"])
    parser.add_argument("--layers", type=int, default=8, help="of the dense model")
    parser.add_argument("--mixture-layers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of a process (default: all cores, shared out)")
    parser.add_argument("--no-estimates", dest="estimates", action="store_false", help="no dry runs")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further run starts")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        run(json.loads(options.step))
        return
    deadline = time.monotonic() + options.budget
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"runs": [], "kills": []}
    small = write_model(options, "small", TINY.config(2), TINY.tensors(2))
    say(f"warm-up: {start(options, max(options.processes), small, 'warm-up')}")
    make = {"dense": make_dense, "mixture": make_mixture}
    for kind, model in {kind: make[kind](options) for kind in options.models}.items():
        runs = side_by_side(options, kind, model, found, deadline)
        if kind == "dense" and runs and "seconds" in runs[0] and options.kills:
            found["kills"] = kills(options, model, runs[0], deadline)
    write(options, found)


def side_by_side(
    options: argparse.Namespace, kind: str, model: Path, found: dict[str, Any], deadline: float
) -> list[dict[str, Any]]:
    """A plan under each number of processes, compared with the first; what is found is added and written."""
    runs: list[dict[str, Any]] = []
    for place, count in enumerate(options.processes):
        if time.monotonic() > deadline:
            break
        name = f"{kind}-{count}-{place}"
        one = start(options, count, model, name) | {"model": kind, "processes": count, "name": name}
        if options.estimates:
            one["estimated"] = estimate(options, count, model, f"{kind}-estimated")
        if runs and "seconds" in one and "seconds" in runs[0]:
            before = runs[0]["seconds"]
            one["ratio"] = {stage: before[stage] / max(1e-9, one["seconds"][stage]) for stage in STAGES}
            one["differs"] = differences(options.work / runs[0]["name"], options.work / name)
        runs.append(one)
        found["runs"].append(one)
        say(f"{kind}, {count} processes: {one}")
        write(options, found)
    return runs


STAGES = ("scoring", "search", "proof", "total")


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    (options.work / "plan-ranks.json").write_text(json.dumps(found, indent=2))


def rows(options: argparse.Namespace, name: str, seed: int) -> str:
    """A file of random token rows, 24 of a long context."""
    file: Path = options.work / name
    generator, length = random.Random(seed), shape_of(options).length  # noqa: S311
    lines = [json.dumps({"input_ids": [generator.randrange(3, 1000) for _ in range(length)]}) for _ in range(24)]
    file.write_text("\n".join(lines))
    return str(file)


def add_tokenizer(model: Path) -> None:
    """A tokenizer, which texts of token ids do not need but a plan reads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if not (model / "tokenizer.json").exists():
        raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(model)  # noqa: S106


def command(options: argparse.Namespace, count: int, model: Path, name: str) -> list[str]:
    length = shape_of(options).length
    given = {
        "model": str(model),
        "output_dir": str(options.work / name),
        "bits_per_weight": 9.0,
        "menu": FORMATS,
        "dataset": rows(options, "rows.jsonl", 1),
        "held_out": rows(options, "held-out.jsonl", 2),
        "max_seq_length": length,
        "num_tokens": (16 if options.device == "cuda" else 8) * length,
        "device": options.device,
    } | ({} if options.device == "cuda" else {"tokens_per_batch": 2 * length})
    return ranks.command(options, count, given, HERE / "plan_ranks.py")


def start(options: argparse.Namespace, count: int, model: Path, name: str) -> dict[str, Any]:
    """Plan once; what the main process found."""
    shutil.rmtree(options.work / name, ignore_errors=True)
    add_tokenizer(model)
    return printed(command(options, count, model, name), environment(options))


def estimate(options: argparse.Namespace, count: int, model: Path, name: str) -> dict[str, Any]:
    """The seconds that a dry run of so many processes expects; it runs in one of them."""
    given = json.loads(command(options, 1, model, name)[-1]) | {"estimated": True}
    step = ranks.command(options, 1, given, HERE / "plan_ranks.py")
    several = {} if count == 1 else {"RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return printed(step, environment(options) | several)


def run(given: dict[str, Any]) -> None:
    """In one process: plan with everything imported beforehand; the main one prints what it took."""
    import torch
    import transformers.models.mistral.modeling_mistral
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from snugfit import distributed
    from snugfit.machine import peak_rss_bytes
    from snugfit.planning.make_plan import plan

    if given.pop("estimated", False):
        from snugfit.planning.plan_cost import estimate_plan

        found = estimate_plan(**given)
        print(json.dumps({"scoring": found.scoring_seconds, "proof": found.proof_seconds}))
        return
    with distributed.joined(given["device"]):
        where = distributed.local_rank() if given["device"] == "cuda" else None
        if where is not None:
            torch.zeros(1, device=f"cuda:{where}")
        distributed.barrier()
        begin = time.perf_counter()
        record = plan(**given)
        seconds = dict(record.seconds) | {"total": time.perf_counter() - begin}
        gpu = None if where is None else torch.cuda.max_memory_allocated(where)
        peaks = distributed.gather((peak_rss_bytes(), gpu))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"seconds": seconds, "peaks": peaks, "written": record.written}))


def differences(a: Path, b: Path) -> dict[str, Any]:
    """Which files differ, and by how much scores and measured KL do, relatively, at most."""
    found: dict[str, Any] = {name: (a / name).read_bytes() == (b / name).read_bytes() for name in FILES}
    scores = [json.loads((folder / FILES[0]).read_text())["costs"] for folder in (a, b)]
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (a, b)]
    costs = [
        relative(one, other)
        for group, by_format in scores[0].items()
        for fmt, cost in by_format.items()
        for one, other in zip(cost["kl"], scores[1][group][fmt]["kl"], strict=True)
    ]
    measured = [
        {(point["name"], n): kl["kl"] for point in plan["points"] for n, kl in enumerate(point["measured"])}
        for plan in plans
    ]
    kl = [relative(value, measured[1].get(key)) for key, value in measured[0].items()]
    found |= {"scores_at_most": max(costs), "scores_that_differ": f"{sum(c > 0 for c in costs)} of {len(costs)}"}
    found |= {"measured_at_most": max(kl, default=0.0)}
    return found | {"points": plans[0]["points"] == plans[1]["points"]}


def relative(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return 0.0 if one == other else 1.0
    return abs(one - other) / max(abs(one), abs(other), 1e-30)


def kills(options: argparse.Namespace, model: Path, first: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
    """Runs on all processes, of which a random one is killed at a random time, then resumed."""
    count, found, generator = max(options.processes), [], random.Random(0)  # noqa: S311
    seconds = start(options, count, model, "undisturbed").get("seconds", first["seconds"])["total"]
    undisturbed = options.work / first["name"]
    for number in range(options.kills):
        if time.monotonic() > deadline:
            break
        out = options.work / f"killed-{number}"
        given = command(options, count, model, out.name)
        share = generator.uniform(0.1, 0.9)

        def wait(process: subprocess.Popen[bytes], out: Path = out, share: float = share) -> None:
            while not out.with_name(f"{out.name}.partial").exists() and process.poll() is None:
                time.sleep(0.05)
            time.sleep(share * seconds)

        one = killed_and_resumed(options, (given, given), out, wait, generator.random()) | {"share": share}
        one |= {"differs": differences(undisturbed, out)} if one["second_exit"] == 0 else {}
        found.append(one)
        say(f"kill {number}: {one}")
    return found


if __name__ == "__main__":
    main()
