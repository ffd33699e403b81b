"""How good scores are: predicted against measured KL of random plans, of plans by budget, and of each group alone.

    python benchmarks/plan_scores.py MODEL OUT.json --calibration FILE... --held-out FILE... [--context 8192]
        [--formats nvfp4 ...] [--random 100] [--alone nvfp4] [--num-tokens 16384] [--max-tokens 32768]
        [--held-out-contexts 512 2048 8192] [--alternatives 2] [--controls 100] [--no-measure]
        [--scores SCORES.json] [--rows ROWS.json] [--rival FILE...] [--hand] [--only-rivals] [--recipes FOLDER]

Scores the model, chooses plans at the hybrid's bytes, 10 % below and 10 % above, for 2k and the longest context, with
the byte-matched controls, and measures all of them and random plans on held-out text, in one pass. Bytes of everything
outside the decoder layers stay. --alternatives says how many more plans of a budget are measured, --controls how many
mixes of built-in recipes, those of which least is expected first; every built-in recipe and uniform format is. Hidden
states of all that is measured take disk: plans x tokens x hidden size x 4 bytes. Results in one JSON;
`benchmarks/plot_plan_scores.py` draws them.

With --rows it only writes the rows that are scored, for `autoquantize_worker.py` and `autoscheme_worker.py`, and says
how many bits a weight each budget is; what these find is given as --rival. --hand adds the shapes of llm-compressor's
examples. Each rival's plan is measured with the others, and beside it ours, solved for exactly its bytes; a table with
paired errors comes last. --only-rivals leaves out all other plans. --recipes writes each as a recipe for `quantize`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rival_plans
from snugfit.data import texts
from snugfit.data.tokenizer import Tokenizer
from snugfit.evaluation.chunks import group_chunks
from snugfit.machine import pick_device
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.calibration import calibrate
from snugfit.planning.constraints import LoadedConstraints, load_constraints
from snugfit.planning.controls import MATCHED, find_controls
from snugfit.planning.groups import HEAD
from snugfit.planning.limits import Budget, read_place
from snugfit.planning.measured_plans import measure_plans, open_comparison
from snugfit.planning.menu import GroupMenu, Server, read_options
from snugfit.planning.proof import judge_plans
from snugfit.planning.samples import read_samples
from snugfit.planning.scoring_cost import estimate_scoring
from snugfit.planning.search import Space, least_kl
from snugfit.planning.sensitivity import ScoreSettings, score_samples
from snugfit.planning.shared_pass import Array, Assigned
from snugfit.planning.space import read_choices
from snugfit.planning.variants import Subject, open_subject
from snugfit.quantization.options import TOKENS_PER_BATCH
from snugfit.records.scores import Scores, load_scores
from snugfit.records.statistics_file import Statistics

SHARES = (0.9, 1.0, 1.1)
HYBRIDS = ("nvfp4-fp8-hybrid", "nvfp4-moe")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "fp8-dynamic", "int4", "mxfp4"])
    parser.add_argument("--rounding", default="weighted")
    parser.add_argument("--target", default="vllm-blackwell")
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--alone", default="")
    parser.add_argument("--num-tokens", type=int, default=16384)
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--held-out-contexts", type=int, nargs="+", help="default: 512, 2048 and --context")
    parser.add_argument("--alternatives", type=int, default=2)
    parser.add_argument("--controls", type=int, default=100)
    parser.add_argument("--no-measure", action="store_true", help="score alone")
    parser.add_argument("--device")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--rival", type=Path, nargs="+", default=[])
    parser.add_argument("--hand", action="store_true")
    parser.add_argument("--only-rivals", action="store_true")
    parser.add_argument("--recipes", type=Path)
    return parser.parse_args()


def random_plans(scores: Scores, formats: Sequence[str], count: int) -> Iterator[Assigned]:
    """Plans of random formats: alike by layer and role, by role alone, or each group for itself, heavy and light."""
    generator = random.Random(1)  # noqa: S311
    groups = [group for group in scores.groups if group.layer is not None]
    for number in range(count):
        pool = [*formats, "keep"] if number % 2 else [*formats]
        weights = [generator.random() for _ in pool]

        def draw(pool: Sequence[str] = pool, weights: Sequence[float] = weights) -> str:
            return generator.choices(pool, weights)[0]

        by_key: dict[Any, str] = {}
        choice = {}
        for group in groups:
            assert group.layer is not None
            key = {0: group.name, 1: group.role, 2: (group.role, group.layer // 4)}[number % 3]
            choice[group.name] = by_key.setdefault(key, draw())
        choice = {name: fmt for name, fmt in choice.items() if fmt != "keep" and scores.has(name, fmt)}
        yield Assigned(name=f"random-{number}", choice=choice)


def crossing(scores: Scores) -> Iterator[Assigned]:
    """The seed's two mixes: NVFP4 with FP8 attention, and NVFP4 with FP8 down projections."""
    for name, roles in (("fp8-attention", {"qkv", "o"}), ("fp8-down", {"down"}), ("nvfp4-all", set())):
        choice = {
            group.name: "fp8-dynamic" if group.role in roles else "nvfp4"
            for group in scores.groups
            if group.layer is not None
        }
        yield Assigned(name=name, choice=choice)


def constraints_of(layout: ModelLayout, folder: Path) -> LoadedConstraints:
    """What every plan keeps: the KV cache, and an output head of its own."""
    menus = read_options(layout, Server())
    kept = "\nrules:\n  - {role: lm_head, format: keep}" if any(menu.group.role == HEAD for menu in menus) else ""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "constraints.yaml"
    file.write_text(f"kv_cache: keep{kept}\n", encoding="utf-8")
    return load_constraints(file)


def budgets_of(
    layout: ModelLayout, formats: Sequence[str], loaded: LoadedConstraints
) -> tuple[tuple[GroupMenu, ...], dict[float, int], int]:
    """The menus inside the layers, bytes of all weights at each share of the hybrid's, and those outside the layers."""
    choices = read_choices(layout, read_place(layout, Budget(bytes=1 << 50)), formats, loaded)
    inside = tuple(menu for menu in choices.everything if menu.group.layer is not None)
    found = find_controls(layout, choices.everything, choices.space, None, 1)
    hybrid = next(c for name in reversed(HYBRIDS) for c in found if c.recipe == name)
    layers = sum(hybrid.mix.options[menu.group.name].bytes.file for menu in inside)
    outside = hybrid.mix.bytes.file - layers
    return inside, {share: outside + int(share * layers) for share in SHARES}, outside


def budget_plans(
    layout: ModelLayout,
    scores: Scores,
    formats: Sequence[str],
    contexts: Sequence[int],
    folder: Path,
    args: argparse.Namespace,
) -> tuple[list[Assigned], list[dict[str, Any]]]:
    """Plans and controls at each budget and context, and a table of which is which."""
    plans: list[Assigned] = []
    table: list[dict[str, Any]] = []

    def named(prefix: str, choice: Mapping[str, str]) -> str:
        for plan in plans:
            if plan.choice == choice:
                return plan.name
        plans.append(Assigned(name=f"{prefix}-{len(plans)}", choice=dict(choice)))
        return plans[-1].name

    head = {group.name for group in scores.groups if group.role == HEAD}
    loaded = constraints_of(layout, folder)
    inside, budgets, outside = budgets_of(layout, formats, loaded)
    rivals = [one for file in args.rival for one in rival_plans.read_rivals(file, inside, budgets, outside)]
    if args.hand:
        rivals += rival_plans.hand_recipes(inside, formats)

    def space_of(menu: Sequence[str]) -> Space:
        return read_choices(layout, read_place(layout, Budget(bytes=1 << 50)), menu, loaded).space

    table += rival_plans.beside(rivals, inside, space_of, scores, contexts[0], outside, named)
    if args.only_rivals:
        return plans, table
    for share, size in budgets.items():
        choices = read_choices(layout, read_place(layout, Budget(bytes=size)), formats, loaded)
        for context in contexts:
            best = least_kl(choices.space, scores, context, count=1 + args.alternatives, distance=2)
            controls = [
                c
                for c in find_controls(layout, choices.everything, choices.space, scores, context)
                if c.fits and not (head & set(c.mix.formats)) and "kv_cache" not in c.mix.formats
            ]
            mixes = [c for c in controls if c.kind == MATCHED]
            least = sorted(mixes, key=lambda c: c.mix.predicted.kl)[: args.controls]
            controls = [c for c in controls if c.kind != MATCHED or c in least]
            table.append(
                {
                    "share": share,
                    "context": context,
                    "bytes": size,
                    "plans": [(named("plan", mix.formats), mix.bytes.file) for mix in best],
                    "controls": [(named("control", c.mix.formats), c.name, c.mix.bytes.file) for c in controls],
                }
            )
    return plans, table


def measured(
    layout: ModelLayout,
    statistics: Statistics,
    plans: Sequence[Assigned],
    table: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """KL of every plan on held-out text, by context and text, and of rivals' plans beside ours."""
    device = pick_device(args.device)
    contexts = args.held_out_contexts or [one for one in (512, 2048, args.context) if one <= args.context]
    cut, records = texts.read_chunks(
        Tokenizer(layout.checkpoint.path), args.held_out, sorted(set(contexts)), max_tokens=args.max_tokens
    )
    groups = group_chunks(cut)
    subject = open_subject(layout, statistics, rounding=args.rounding, target=args.target)
    rows = [chunk.ids for group in groups for chunk in group.chunks]
    started = time.perf_counter()
    found = kl_of_plans(subject, rows, plans, device, folder / "held-out")
    seconds = time.perf_counter() - started
    control = plans[0].name
    proof = judge_plans(plans, control, groups, found, tuple(records), rounding=args.rounding, target=args.target)
    figures = {
        plan.name: [(one.context, one.text, one.tokens, one.kl, one.error) for one in plan.measured]
        for plan in proof.plans
    }
    # KL by position at the longest context, for the crossing
    bins: dict[str, list[float]] = {}
    longest = max(contexts)
    numbers = [place for place, row in enumerate(rows) if len(row) >= longest]
    for plan in plans if numbers else ():
        joined = np.stack([found[plan.name][place][: longest - 1] for place in numbers]).mean(0)
        edges = [edge for edge in (0, 512, 1024, 2048, 4096) if edge < longest] + [longest]
        parts = [(low, high) for low, high in itertools.pairwise(edges) if low < high]
        bins[plan.name] = [float(joined[low:high].mean()) for low, high in parts]
    pairs = rival_plans.paired([one for one in table if "rival" in one], groups, found)
    tokens = sum(map(len, rows))
    return {"figures": figures, "bins": bins, "paired": pairs, "seconds": seconds, "tokens": tokens}


def kl_of_plans(
    subject: Subject, rows: Sequence[Sequence[int]], plans: Sequence[Assigned], device: torch.device, folder: Path
) -> dict[str, list[Array]]:
    """KL of every token of each plan, in as many passes as the disk takes."""
    written = [replace(plan, choice=subject.as_written(plan.choice)) for plan in plans]
    finished = open_comparison(folder, {"plans": [[plan.name, dict(plan.choice)] for plan in written]})
    per_batch = TOKENS_PER_BATCH[device.type]
    return measure_plans(subject, rows, written, device, tokens_per_batch=per_batch, folder=folder, finished=finished)


def alone(
    layout: ModelLayout, statistics: Statistics, scores: Scores, args: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """Measured KL of each group alone in a format, by bucket, on the samples that were scored."""
    if not args.alone:
        return {}
    samples = read_samples(layout, args.calibration, context=args.context, num_tokens=args.num_tokens)
    device = pick_device(args.device)
    subject = open_subject(layout, statistics, rounding=args.rounding, target=args.target)
    plans = [
        Assigned(name=group.name, choice={group.name: args.alone})
        for group in scores.groups
        if group.layer is not None and scores.has(group.name, args.alone)
    ]
    rows = [row.ids for row in samples.rows]
    found = kl_of_plans(subject, rows, plans, device, folder / "alone")
    result = {}
    for plan in plans:
        sums = [0.0] * len(samples.edges)
        for kl, row, bucket in zip(found[plan.name], samples.rows, samples.buckets, strict=True):
            sums[bucket] += float(kl[row.first - 1 :].sum())
        result[plan.name] = [total / tokens for total, tokens in zip(sums, samples.tokens, strict=True)]
    return result


def main() -> None:
    args = arguments()
    folder = args.out.with_suffix(".work")
    layout = read_layout(args.model)
    samples = read_samples(layout, args.calibration, context=args.context, num_tokens=args.num_tokens)
    if args.rows is not None:
        args.rows.write_text(json.dumps([row.ids for row in samples.rows if len(row.ids) <= 2048]), encoding="utf-8")
        inside, budgets, outside = budgets_of(layout, args.formats, constraints_of(layout, folder))
        weights = sum(menu.group.elements for menu in inside)
        print("--bits", *(f"{8 * (size - outside) / weights:.4f}" for size in budgets.values()))
        return
    settings = ScoreSettings(formats=args.formats, rounding=args.rounding, target=args.target)
    timed = args.scores is None
    estimate = asdict(estimate_scoring(layout, samples, settings, device=args.device, timed=timed))
    print(estimate, flush=True)
    started = time.perf_counter()
    statistics = calibrate(layout, samples.dataset, folder, device=args.device)
    calibrated = time.perf_counter() - started
    if args.scores is None:
        scores = score_samples(layout, samples, settings, folder, device=args.device)
    else:
        scores = load_scores(args.scores)
    seconds = time.perf_counter() - started
    (folder / "scores.json").write_text(scores.to_json(), encoding="utf-8")
    print(f"{args.model.name}: {samples.total:,} tokens scored in {seconds:.1f} s ({calibrated:.1f} s calibration)")
    result: dict[str, Any] = {
        "model": args.model.name,
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "estimate": estimate,
        "tokens": samples.total,
        "calibration_seconds": calibrated,
        "score_seconds": seconds,
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "scores": json.loads(scores.to_json()),
    }
    contexts = sorted({min(2048, args.context), args.context})
    try:
        chosen, result["table"] = budget_plans(layout, scores, args.formats, contexts, folder, args)
    except Exception as error:
        if args.only_rivals:
            raise
        print(f"no plans: {error!r}")
        chosen, result["table"] = [], []
    plans = chosen
    if not args.only_rivals:
        plans = [*crossing(scores), *chosen, *random_plans(scores, args.formats, args.random)]
    if args.recipes is not None:
        rival_plans.write_recipes(args.recipes, layout, chosen)
    result["choices"] = {plan.name: dict(plan.choice) for plan in plans}
    result["predicted"] = {
        plan.name: {str(context): scores.predict(plan.choice, context).kl for context in (512, *contexts)}
        for plan in plans
    }
    args.out.write_text(json.dumps(result), encoding="utf-8")
    if args.no_measure:
        return
    result["measured"] = measured(layout, statistics, plans, result["table"], args, folder)
    args.out.write_text(json.dumps(result), encoding="utf-8")
    print(f"{args.model.name}: {len(plans)} plans measured in {result['measured']['seconds']:.1f} s")
    if result["measured"]["paired"]:
        print(rival_plans.table(result["measured"]["paired"]), flush=True)
    result["alone"] = alone(layout, statistics, scores, args, folder)
    args.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
