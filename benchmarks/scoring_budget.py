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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from plan_scores import crossing, kl_of_plans, random_plans
from snugfit.data import texts
from snugfit.data.dataset import make_dataset
from snugfit.data.tokenizer import Tokenizer
from snugfit.evaluation.chunks import group_chunks
from snugfit.machine import pick_device
from snugfit.model.forward_pass import spread_places
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.calibration import calibrate
from snugfit.planning.damage import fit_damage
from snugfit.planning.gradients import Sums
from snugfit.planning.limits import Budget, read_place
from snugfit.planning.samples import FEWEST_ROWS, Samples, ScoredRow, by_bucket, read_samples
from snugfit.planning.search import least_kl
from snugfit.planning.sensitivity import ScoreSettings, _scored_sum, _scores, costs_of, open_gradients, plans_to_measure
from snugfit.planning.shared_pass import Assigned
from snugfit.planning.space import read_choices
from snugfit.planning.variants import Subject, open_subject
from snugfit.quantization.options import TOKENS_PER_BATCH
from snugfit.quantization.resume import open_finished
from snugfit.records.json_file import validated
from snugfit.records.scores import KEEP, KV_CACHE, Cost, Point, Scores, cache_of_layer

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
    kl, error = by_bucket(dict(enumerate(sums)), samples)
    return Point(name=plan.name, formats=dict(plan.choice), kl=kl, error=error)


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
    opened = open_gradients(subject, samples, settings, device, gradients, tokens_per_batch=per_batch)
    sums = opened.run(open_finished(gradients, {"benchmark": 1}))
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


@dataclass(frozen=True)
class Part:
    """What scores are made of: tokens scored in each bucket, those on which plans are measured, which plans."""

    scored: int
    measured: int
    plans: str


def kept(name: str, kind: str) -> bool:
    """Whether a measured plan is one of a kind of set."""
    single, _, rest = name.partition("/")
    uniform = not rest and not single.startswith(("mixed", "rotated", "halves"))
    sets = {
        "all": not name.startswith(("rotated", "halves")),
        "uniform": uniform or name.startswith("mixed"),
        "uniform, front": uniform or rest == "front" or name.startswith("mixed"),
        "uniform, classes": uniform or rest in ("attention", "in") or name.startswith("mixed"),
        "uniform, rotated": uniform or name.startswith("rotated"),
        "uniform, halves": uniform or name.startswith("halves"),
        "uniform, rotated, halves": uniform or name.startswith(("rotated", "halves")),
        "rotated, halves": name == KV_CACHE or name.startswith(("rotated", "halves")),
    }
    return sets[kind] or name == KV_CACHE


SETS = (
    "all",
    "uniform",
    "uniform, front",
    "uniform, classes",
    "uniform, rotated",
    "uniform, halves",
    "uniform, rotated, halves",
    "rotated, halves",
)


def places_of(samples: Samples, tokens: int) -> list[int]:
    """Rows of each bucket, evenly spread, that hold so many scored tokens."""
    found = []
    for bucket in range(len(samples.edges)):
        mine = [place for place, number in enumerate(samples.buckets) if number == bucket]
        counts = [samples.rows[place].count for place in mine]
        found += [mine[place] for place in spread_places(counts, tokens, FEWEST_ROWS)]
    return found


def made_of(data: Mapping[str, Any], whole: Scores, samples: Samples, part: Part) -> Scores:
    """The scores that a part of what was measured gives."""
    places = places_of(samples, part.scored)
    some = replace(
        samples,
        rows=tuple(samples.rows[place] for place in places),
        buckets=tuple(samples.buckets[place] for place in places),
    )
    sums = {(name, fmt): Sums((), tuple(costs[place] for place in places)) for name, fmt, costs in data["sums"]}
    costs = costs_of(sums, some)
    for name in [name for name in costs if name.startswith(cache_of_layer(""))]:
        del costs[name]
    points = []
    few = places_of(some, part.measured)
    for name, choice in data["plans"].items():
        if kept(name, part.plans):
            measured = {place: data["row_kl"][name][places[place]] for place in few}
            kl, error = by_bucket(measured, some)
            points.append(Point(name=name, formats=choice, kl=kl, error=error))
            if name == KV_CACHE:
                costs[KV_CACHE] = {"fp8": Cost(kl, error)}
    for group in whole.groups:  # what is measured alone, but the cache, stays as it is
        if group.measured and group.name not in costs:
            costs[group.name] = dict(whole.costs[group.name])
    damage = fit_damage(whole.groups, costs, points, len(some.edges))
    return replace(whole, costs=costs, points=tuple(points), damage=damage, tokens=some.tokens)


def errors_of(scores: Scores, data: Mapping[str, Any]) -> list[float]:
    """Logarithms of predicted over measured KL on held-out text, of each plan at each context."""
    return [
        math.log(scores.predict(choice, int(context)).kl / kl)
        for name, choice in data["tried"].items()
        for context, (kl, _) in data["held_out"][name].items()
    ]


def choices_at(layout: ModelLayout, scores: Scores, formats: Sequence[str]) -> list[Mapping[str, str]]:
    """The plans that scores choose at 4.75, 5.25 and 6 bits a weight."""
    found: list[Mapping[str, str]] = []
    for bits in (4.75, 5.25, 6.0):
        inside = sum(group.elements for group in scores.groups if group.layer is not None)
        choices = read_choices(layout, read_place(layout, Budget(bytes=1 << 50)), formats)
        space = choices.space
        outside = space.outside[KEEP].file + sum(
            menu.options[0].bytes.file for menu in space.menus if menu.group.layer is None
        )
        budget = Budget(bytes=int(outside + inside * bits / 8))
        space = read_choices(layout, read_place(layout, budget), formats).space
        found.append(least_kl(space, scores, scores.edges[-1])[0].formats)
    return found


def compare(args: argparse.Namespace) -> None:
    layout = read_layout(args.model)
    data = json.loads(args.out.read_text(encoding="utf-8"))
    whole = validated(Scores, data["scores"])
    rows = tuple(ScoredRow(tuple(range(length)), first) for length, first in data["rows"])
    dataset = make_dataset([row.ids for row in rows], "rows")
    samples = Samples(rows=rows, buckets=tuple(data["buckets"]), edges=tuple(data["edges"]), dataset=dataset)
    most = min(samples.tokens)
    parts = [Part(most, most, kind) for kind in SETS]
    sizes = sorted({size for size in (8192, 4000, 3000, 2000, 1000) if size <= most}, reverse=True)
    parts += [Part(n, m, "all") for n in sizes for m in sizes if m <= n and (n, m) != (most, most)]
    parts += [Part(n, 2000, kind) for n in (8192, 4000, 2000) if n <= most for kind in SETS[1:]]
    best = choices_at(layout, made_of(data, whole, samples, parts[0]), data["formats"])
    judge = made_of(data, whole, samples, parts[0])
    print(f"{data['model']}: {len(data['tried'])} plans on held-out text; seconds {data['seconds']}")
    print("scored, measured, plans: mean error, bias, rms, share within 20 %; cost of what is chosen over the best")
    for part in parts:
        scores = made_of(data, whole, samples, part)
        found = np.array(errors_of(scores, data))
        chosen = choices_at(layout, scores, data["formats"])
        context = scores.edges[-1]
        more = [judge.predict(a, context).kl / judge.predict(b, context).kl for a, b in zip(chosen, best, strict=True)]
        within = np.mean(np.abs(np.expm1(found)) < 0.2)
        figures = f"{np.abs(found).mean():.3f} {found.mean():+.3f} {np.sqrt((found**2).mean()):.3f} {within:.2f}"
        print(f"{part.scored:5} {part.measured:5} {part.plans:26} {figures}  {' '.join(f'{one:.3f}' for one in more)}")


if __name__ == "__main__":
    given = arguments()
    (measure if given.what == "measure" else compare)(given)
