"""What a calibrated input scale loses at long context, and what headroom costs: one Markdown table.

    python input_headroom.py MODEL WORK --text A.txt [B.txt ...] [--calibration C.txt ...] [--device cuda]
        [--context 8192] [--headrooms 1 2 4] [--max-tokens N] [--profile vllm-blackwell]

The hybrid (NVFP4 MLP, FP8 attention) under one fixed scale rule, calibrated on short samples, once for each
`--headrooms`: the files differ in the scales of NVFP4 inputs alone, which is checked. KL to the original comes from
`evaluate` on other text at the long context; differences are paired over chunks, with one standard error. "Saturated"
are the input scales that some token of that text exceeds, "worst" is the largest held-out input over the largest
calibrated one. `--text` is cut into chunks of `--context` tokens; `--calibration` names other files (default: Python's
documentation). WORK keeps the checkpoints, and input_headroom.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from snugfit.evaluation.chunks import ChunkGroup
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import TOKENS_PER_BATCH, last_states, open_model
from snugfit.evaluation.plan import make_plan
from snugfit.evaluation.saturation import InputWatch, SeenInputs
from snugfit.evaluation.significance import ratio_mean
from snugfit.machine import pick_device
from snugfit.progress import TerminalProgress
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe
from snugfit.records.evaluation import ModelFigures
from snugfit.storage.checkpoint import read_tensor
from snugfit.storage.open import open_checkpoint


@dataclass(frozen=True)
class Row:
    """One headroom: KL and error over chunks, the paired difference to the first, and what its scales cut off."""

    headroom: float
    kl: float
    kl_error: float | None
    difference: float | None
    difference_error: float | None
    sites: int
    saturated: int
    tokens: int
    saturated_tokens: int
    saturated_values: int
    worst: str
    worst_ratio: float


def main() -> None:
    options = _options()
    device = pick_device(options.device)
    recipes = {headroom: _recipe(options, headroom) for headroom in options.headrooms}
    outputs = {headroom: _quantized(options, recipe, headroom) for headroom, recipe in recipes.items()}
    _check_alike(list(outputs.values()))
    started = time.perf_counter()
    record = evaluate(
        list(outputs.values()),
        reference=options.model,
        dataset=options.text,
        contexts=[options.context],
        max_tokens=options.max_tokens,
        activations=options.profile,
        noise_floor="none",
        continuations=0,
        device=options.device,
        allow_long_context=options.allow_long_context,
        progress=TerminalProgress(),
    )
    (context,) = record.contexts
    print(f"evaluated in {time.perf_counter() - started:.0f} s", flush=True)
    group = _chunks(options, list(outputs.values()))
    figures = dict(zip(outputs, context.models[1:], strict=True))
    first = next(iter(figures.values()))
    rows = [
        _row(headroom, figures[headroom], first, context.chunk_tokens, _seen(options, outputs[headroom], group, device))
        for headroom in outputs
    ]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(_table(options, rows, context.chunks, context.tokens, where))
    document = {
        "model": str(options.model),
        "context": options.context,
        "device": where,
        "rows": list(map(asdict, rows)),
    }
    (options.work / "input_headroom.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def _recipe(options: argparse.Namespace, headroom: float) -> LoadedRecipe:
    nvfp4 = {"format": "nvfp4", "scale_rule": options.scale_rule, "input_headroom": headroom}
    rules: list[dict[str, Any]] = [{"role": "mlp", **nvfp4}, {"role": "linear", "format": "fp8-dynamic"}]
    return parse_recipe(json.dumps({"name": f"headroom-{headroom:g}", "rules": rules}), where="recipe")  # JSON is YAML


def _quantized(options: argparse.Namespace, recipe: LoadedRecipe, headroom: float) -> Path:
    target: Path = options.work / f"headroom-{headroom:g}"
    if not target.exists():
        started = time.perf_counter()
        quantize(
            options.model,
            recipe,
            output_dir=target,
            dataset=options.calibration,
            num_samples=options.num_samples,
            max_seq_length=options.max_seq_length,
            device=options.device,
            progress=TerminalProgress(),
        )
        print(f"headroom {headroom:g}: quantized in {time.perf_counter() - started:.0f} s", flush=True)
    return target


def _check_alike(outputs: list[Path]) -> None:
    """Stop unless the checkpoints differ in the scales of inputs, and in nothing else."""
    opened = [open_checkpoint(path) for path in outputs]
    for name in opened[0].tensors:
        tensors = [read_tensor(one, name) for one in opened]
        same = all(torch.equal(tensors[0].view(torch.uint8), other.view(torch.uint8)) for other in tensors[1:])
        if not same and not name.endswith(".input_global_scale"):
            raise SystemExit(f"{name} differs between the checkpoints in {outputs[0].parent}: remove them")


def _chunks(options: argparse.Namespace, models: list[Path]) -> ChunkGroup:
    """The chunks that `evaluate` runs."""
    plan = make_plan(
        models,
        None,
        options.text,
        [options.context],
        max_chunks=None,
        max_tokens=options.max_tokens,
        activations=options.profile,
        arithmetic=None,
        allow_long_context=options.allow_long_context,
    )
    (group,) = plan.groups
    return group


@torch.no_grad()
def _seen(options: argparse.Namespace, path: Path, group: ChunkGroup, device: torch.device) -> list[SeenInputs]:
    """What comes to each static input scale of a checkpoint on the chunks, a few of them at a time."""
    model, watch = open_model(path, activations=options.profile), InputWatch()
    rows = [chunk.ids for chunk in group.chunks]
    positions = [torch.tensor([len(row) - 1]) for row in rows]
    last_states(model, rows, positions, device, tokens_per_batch=max(TOKENS_PER_BATCH, options.context), watch=watch)
    return watch.result()


def _row(
    headroom: float, figures: ModelFigures, first: ModelFigures, counts: tuple[int, ...], seen: list[SeenInputs]
) -> Row:
    assert figures.kl is not None
    assert first.kl is not None
    difference: tuple[float, float | None] | tuple[None, None] = (None, None)
    if figures is not first:
        difference = ratio_mean([b - a for a, b in zip(first.kl.by_chunk, figures.kl.by_chunk, strict=True)], counts)
    most = max(seen, key=lambda one: one.amax / one.range)
    return Row(
        headroom=headroom,
        kl=figures.kl.mean,
        kl_error=figures.kl.standard_error,
        difference=difference[0],
        difference_error=difference[1],
        sites=len(seen),
        saturated=sum(one.saturated_tokens > 0 for one in seen),
        tokens=sum(one.tokens for one in seen),
        saturated_tokens=sum(one.saturated_tokens for one in seen),
        saturated_values=sum(one.saturated_values for one in seen),
        worst=most.module,
        worst_ratio=headroom * most.amax / most.range,
    )


def _table(options: argparse.Namespace, rows: list[Row], chunks: int, tokens: int, where: str) -> str:
    text = f"{options.profile}: {tokens:,} tokens in {chunks} chunks of {options.context}"
    calibration = f"{options.num_samples} x {options.max_seq_length} tokens"
    lines = [
        f"\n{options.model.name}, {where}, {text}; scales from {calibration}; {options.scale_rule}\n",
        "| headroom | KL, nats a token | gained over the first | saturated scales | tokens beyond | worst scale |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = ""
        if row.difference is not None:
            gain = f"{-row.difference:+.6f} +- {_number(row.difference_error)}"
        beyond = f"{row.saturated_tokens:,} of {row.tokens:,} ({row.saturated_values:,} values)"
        worst = f"{row.worst}, {row.worst_ratio:.2f}x of the calibrated"
        kl = f"{row.kl:.6f} +- {_number(row.kl_error)}"
        lines.append(f"| {row.headroom:g} | {kl} | {gain} | {row.saturated} of {row.sites} | {beyond} | {worst} |")
    return "\n".join(lines)


def _number(error: float | None) -> str:
    return "?" if error is None else f"{error:.6f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="what is evaluated on")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=131072, help="of the evaluation, in all")
    parser.add_argument("--allow-long-context", action="store_true", help="contexts beyond the model's positions")
    parser.add_argument("--headrooms", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--scale-rule", default="sweep")
    parser.add_argument("--profile", default="vllm-blackwell")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--max-seq-length", type=int, default=512)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
