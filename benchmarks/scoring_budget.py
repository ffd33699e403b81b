"""How many tokens and measured plans scores need: predictions by parts of what was measured, against held-out text.

    python benchmarks/scoring_budget.py measure MODEL OUT.json --calibration FILE... --held-out FILE...
        [--formats nvfp4 ...] [--context 2048] [--num-tokens 8192] [--random 24] [--max-tokens 16384] [--device cuda]
    python benchmarks/scoring_budget.py compare MODEL OUT.json

`measure` scores a model once and keeps what gradients and measured plans gave of every row, and the KL of random plans
on held-out text. `compare` makes scores of fewer rows and fewer plans out of that, as `score_samples` would, and says
how far their predictions are off, and how much more than the best plan those cost that they choose (both by the scores
of everything), at the hybrid's bytes, 10 % below and 10 % above.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plan_scores import crossing, kl_of_plans, random_plans
from snugfit.data import texts
from snugfit.data.tokenizer import Tokenizer
from snugfit.evaluation.chunks import group_chunks
from snugfit.machine import pick_device
from snugfit.model.layout import read_layout
from snugfit.planning.calibration import calibrate
from snugfit.planning.estimates import by_bucket, costs_of
from snugfit.planning.gradients import GradientPass
from snugfit.planning.samples import Samples, read_samples
from snugfit.planning.sensitivity import ScoreSettings, _scored_sum, _scores, plans_to_measure
from snugfit.planning.shared_pass import Assigned
from snugfit.planning.variants import Subject, open_subject
from snugfit.quantization.prepare import TOKENS_PER_BATCH
from snugfit.quantization.resume import open_finished
from snugfit.records.scores import KEEP, Point, cache_of_layer

FORMATS = ("nvfp4", "nvfp4a16", "fp8-dynamic", "int4", "mxfp4")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("measure", "compare"))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+")
    parser.add_argument("--held-out", type=Path, nargs="+")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--random", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--rounding", default="plain")
    parser.add_argument("--target", default="vllm-blackwell")
    parser.add_argument("--device")
    return parser.parse_args()


def rotated(subject: Subject, costs: Mapping[str, Mapping[str, Any]], formats: Sequence[str]) -> list[Assigned]:
    """Plans in which each role has another format, each format once in each role; the second half has the next one."""
    groups = [subject.groups[name] for name in costs if KEEP not in costs[name]]
    roles = list(dict.fromkeys(group.role for group in groups))
    front = subject.layout.num_layers // 2
    found = []
    for halves in (False, True):
        for number in range(len(formats)):
            choice = {}
            for group in groups:
                later = int(halves and (group.layer or 0) >= front)
                fmt = formats[(number + roles.index(group.role) + 2 * later) % len(formats)]
                if fmt in costs[group.name]:
                    choice[group.name] = fmt
            found.append(Assigned(name=f"{'halves' if halves else 'rotated'}-{number}", choice=choice))
    return found


def _point(plan: Assigned, sums: Sequence[float], samples: Samples) -> Point:
    found = by_bucket(sums, samples)
    return Point(name=plan.name, formats=dict(plan.choice), kl=found.kl, error=found.error)


def measure(args: argparse.Namespace) -> None:
    layout, folder, device = read_layout(args.model), args.out.with_suffix(".work"), pick_device(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    settings = ScoreSettings(formats=args.formats, rounding=args.rounding, target=args.target)
    samples = read_samples(layout, args.calibration, context=args.context, num_tokens=args.num_tokens)
    statistics = calibrate(layout, samples.dataset, folder, device=args.device)
    subject = open_subject(layout, statistics, rounding=args.rounding, target=args.target)
    per_batch, seconds = TOKENS_PER_BATCH[device.type], {}
    gradients = folder / "gradients"
    gradients.mkdir(exist_ok=True)
    started = time.perf_counter()
    sums = GradientPass(
        subject,
        samples.rows,
        (*settings.formats, KEEP),
        device,
        tokens_per_batch=per_batch,
        folder=gradients,
        seed=0,
        kv_cache=True,
    ).run(open_finished(gradients, {"benchmark": 1}))
    seconds["gradients"] = time.perf_counter() - started
    plans = plans_to_measure(subject, costs_of(sums, samples), settings)
    layers = {name: some for name, some in costs_of(sums, samples).items() if name in subject.groups}
    plans += rotated(subject, layers, settings.formats)
    started = time.perf_counter()
    found = kl_of_plans(subject, [row.ids for row in samples.rows], plans, device, folder / "plans")
    seconds["plans"] = time.perf_counter() - started
    cut, _ = texts.read_chunks(
        Tokenizer(layout.checkpoint.path), args.held_out, sorted({512, args.context}), max_tokens=args.max_tokens
    )
    groups = group_chunks(cut)
    costs = costs_of(sums, samples)
    caches = {name: costs.pop(name)["fp8"] for name in list(costs) if name.startswith(cache_of_layer(""))}
    row_kl = {
        plan.name: [_scored_sum(kl, row) for kl, row in zip(found[plan.name], samples.rows, strict=True)]
        for plan in plans
    }
    points = [_point(plan, row_kl[plan.name], samples) for plan in plans]
    scores = _scores(subject, samples, settings, costs, caches, points)
    tried = [*crossing(scores), *random_plans(scores, args.formats, args.random)]
    rows = [chunk.ids for group in groups for chunk in group.chunks]
    held_out = kl_of_plans(subject, rows, tried, device, folder / "held-out")
    judged: dict[str, dict[str, list[float]]] = {}
    for plan in tried:
        place = 0
        for group in groups:
            parts = []
            for chunk in group.chunks:
                parts.append(held_out[plan.name][place][chunk.target_positions - 1].astype(np.float64))
                place += 1
            joined = np.concatenate(parts)
            means = [part.mean() for part in np.array_split(joined, max(2, len(joined) // 256))]
            error = float(np.std(means, ddof=1) / math.sqrt(len(means)))
            judged.setdefault(plan.name, {})[str(group.context)] = [float(joined.mean()), error]
    result = {
        "model": args.model.name,
        "seconds": seconds,
        "formats": list(settings.formats),
        "edges": list(samples.edges),
        "buckets": list(samples.buckets),
        "rows": [[len(row.ids), row.first] for row in samples.rows],
        "sums": [[*key, one.costs] for key, one in sums.items()],
        "plans": {plan.name: dict(plan.choice) for plan in plans},
        "row_kl": row_kl,
        "tried": {plan.name: dict(plan.choice) for plan in tried},
        "held_out": judged,
        "scores": json.loads(scores.to_json()),
    }
    args.out.write_text(json.dumps(result), encoding="utf-8")
    print(args.out, seconds)


if __name__ == "__main__":
    given = arguments()
    measure(given)
