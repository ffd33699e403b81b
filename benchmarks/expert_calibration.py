"""What few samples cost a mixture of experts: calibration of routed tokens alone against every expert, in KL.

    python benchmarks/expert_calibration.py WORK [--model tests/fixtures/tiny-mixture] [--recipe NAME]

A mixture is quantized (experts W4A4 in NVFP4) on samples of one kind of text and of all kinds, few and many, once with
experts measured on the tokens that the router sends them, once on all. KL to the original is measured on other text of
every kind. Ways to deal with what experts see:

    routed          one scale a layer, of what the router sent; bare experts take it (snugfit, if told to go on)
    all             one scale a layer, of all tokens through all experts (snugfit)
    own, as one     every expert has the scale of what was routed to it and a bare one 1.0, as other tools write; an
                    engine that takes one for all of a layer (FlashInfer's, vLLM's emulation) runs all under the largest
    own, apart      the same file in an engine that keeps each expert's own (vLLM's CUTLASS back end)
    all, apart      every expert has its own scale, of all tokens

Prints a Markdown table and, last, one JSON line. The model's directory must have held-out/KIND.txt, text that it was
not trained on: the first part is for calibration, the rest for evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from snugfit.evaluation.evaluate import evaluate
from snugfit.formats.nvfp4 import input_global_scale, quantize_dequantize_input
from snugfit.model import emulate, experts
from snugfit.model.experts import NoHooks
from snugfit.quantization.quantize import quantize
from snugfit.records.evaluation import ModelFigures
from snugfit.records.statistics_file import load_statistics
from snugfit.storage.checkpoint import read_tensor

LENGTH = 512
FOR_CALIBRATION = 6144  # bytes of each kind
# name -> (kinds, rows of each)
SAMPLES = {
    "turkish, 16 bytes": (("turkish",), 16 / LENGTH),
    "turkish, 64 bytes": (("turkish",), 64 / LENGTH),
    "novels, 1 row": (("novels",), 1),
    "turkish, 1 row": (("turkish",), 1),
    "turkish, 4 rows": (("turkish",), 4),
    "tables, 4 rows": (("tables",), 4),
    "8 kinds, 1 row each": (None, 1),
    "8 kinds, 8 rows each": (None, 8),
}
ROUTED, ALL, OWN, APART, ALL_APART = "routed", "all", "own, as one", "own, apart", "all, apart"
APART_SUFFIX = "-apart"


def main() -> None:
    """Quantize every way, evaluate all at once, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, default=Path("tests/fixtures/tiny-mixture"))
    parser.add_argument("--recipe", default="nvfp4-moe-four-over-six")
    parser.add_argument("--activations", default="vllm-blackwell")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    work: Path = options.work
    shutil.rmtree(work, ignore_errors=True)
    (work / "evaluation").mkdir(parents=True)
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted((options.model / "held-out").glob("*.txt"))}
    for kind, text in texts.items():
        (work / "evaluation" / f"{kind}.txt").write_text(text[FOR_CALIBRATION:], encoding="utf-8")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for sample, (kinds, rows) in SAMPLES.items():
        chosen = {kind: texts[kind][: int(rows * LENGTH)] for kind in kinds or texts}
        files = []
        for kind, text in chosen.items():
            files.append(work / f"{sample.replace(' ', '-').replace(',', '')}-{kind}.txt")
            files[-1].write_text(text, encoding="utf-8")
        for mode in (ROUTED, ALL):
            target = work / f"{sample}-{mode}".replace(" ", "-").replace(",", "")
            quantize(
                options.model,
                options.recipe,
                output_dir=target,
                dataset=files,
                num_samples=math.ceil(rows) * len(chosen),
                max_seq_length=LENGTH,
                device=options.device,
                moe_calibrate_all_experts=mode == ALL,
                min_tokens_per_expert=0,
            )
            found[sample, mode] = {"path": target} | bare(target)
        for mode, source, suffix in ((OWN, ROUTED, ""), (APART, ROUTED, APART_SUFFIX), (ALL_APART, ALL, APART_SUFFIX)):
            own = own_scales(found[sample, source]["path"], suffix)
            found[sample, mode] = found[sample, source] | {"path": own}
    emulate.read_experts = read_experts  # type: ignore[assignment]
    experts._middle = middle  # type: ignore[assignment]
    record = evaluate(
        [entry["path"] for entry in found.values()],
        reference=options.model,
        dataset=[work / "evaluation"],
        contexts=(LENGTH,),
        activations=options.activations,
        continuations=0,
        device=options.device,
    )
    models = {model.name: model for model in record.contexts[0].models}
    rows_out = []
    for (sample, mode), entry in found.items():
        model = models[entry["path"].name]
        assert model.kl is not None
        rows_out.append(
            {
                "sample": sample,
                "experts": mode,
                "bare": entry["bare"],
                "of": entry["experts"],
                "kl": model.kl.mean,
                "error": model.kl.standard_error,
                "p99": model.kl.p99,
                "perplexity": model.perplexity,
                "against_all": apart(model, models[found[sample, ALL]["path"].name], record.contexts[0].chunk_tokens),
            }
        )
    print_table(rows_out, models[next(iter(models))].perplexity, record.contexts[0].tokens)
    print(json.dumps(rows_out))


def apart(model: ModelFigures, other: ModelFigures, tokens: Sequence[int]) -> tuple[float, float]:
    """Mean KL of a model minus another's, and its standard error: paired by chunk."""
    assert model.kl is not None
    assert other.kl is not None
    pairs = zip(model.kl.by_chunk, other.kl.by_chunk, tokens, strict=True)
    differences = [(mine - its) / count for mine, its, count in pairs]
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def bare(target: Path) -> dict[str, Any]:
    """How many experts of all layers no token reached."""
    seen = [one for layer in load_statistics(target).layers.values() for one in layer.experts.values()]
    return {"bare": sum(len(one.experts_below(1)) for one in seen), "experts": sum(len(one.routed) for one in seen)}


def own_scales(source: Path, suffix: str) -> Path:
    """A copy of a checkpoint whose experts have a scale of their own inputs each, and 1.0 where no token came."""
    target = source.with_name(f"{source.name}-own{suffix}")
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for layer in load_statistics(source).layers.values():
        for module, seen in layer.experts.items():
            first = [max(pair) for pair in zip(seen.gate_up_routed, seen.gate_up_forced, strict=True)]
            second = [max(pair) for pair in zip(seen.down_routed, seen.down_forced, strict=True)]
            for expert in range(len(first)):
                for leaf in ("gate_proj", "up_proj", "down_proj"):
                    amax = second[expert] if leaf == "down_proj" else first[expert]
                    divisor = input_global_scale(amax).reciprocal() if amax else torch.ones(())
                    tensors[f"{module}.{expert}.{leaf}.input_global_scale"] = divisor.reshape(1)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


class OwnInputs(NoHooks):
    """Rounds the inputs of every expert under its own scale; those of gate and up in `middle`."""

    def __init__(self, gate_up: list[Tensor], down: list[Tensor]) -> None:
        self.gate_up, self.down = gate_up, down

    def second(self, expert: int, hidden: Tensor, tokens: Tensor, *, forced: bool) -> Tensor:  # noqa: ARG002
        """Inputs of an expert's down projection."""
        return quantize_dequantize_input(hidden, self.down[expert])


def read_experts(checkpoint: Any, dialect: Any, prefix: str, mixture: Any, *rest: Any) -> Any:
    """emulate's, with every expert's own scale where the directory's name asks for that."""
    inputs = plain_read_experts(checkpoint, dialect, prefix, mixture, *rest)
    if not checkpoint.path.name.endswith(APART_SUFFIX):
        return inputs
    scales: dict[str, list[Tensor]] = {"up": [], "down": []}
    for (_, role, _), name in mixture.names.items():
        if role in scales:
            divisor = f"{prefix}.{name.removesuffix('.weight')}.input_global_scale"
            scales[role].append(read_tensor(checkpoint, divisor).reshape(()).reciprocal())
    return OwnInputs(scales["up"], scales["down"])


def middle(module: torch.nn.Module, expert: int, inputs: Tensor) -> Tensor:
    """experts', the inputs rounded under the expert's own scale where it has one."""
    hooks = module.__dict__.get("_snugfit_hooks")
    if isinstance(hooks, OwnInputs) and "_snugfit_sum_dtype" in module.__dict__:  # not while it is checked
        inputs = quantize_dequantize_input(inputs, hooks.gate_up[expert])
    return plain_middle(module, expert, inputs)


plain_read_experts, plain_middle = emulate.read_experts, experts._middle


def print_table(rows: list[dict[str, Any]], base: float, tokens: int) -> None:
    print(f"\nperplexity a byte of the original {base:.4f}, {tokens:,} bytes scored\n")
    print("| calibrated on | experts measured on | experts without a token | KL | KL minus that of all | perplexity |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['sample']} | {row['experts']} | {row['bare']} of {row['of']} | {row['kl']:.4f} "
            f"+- {row['error']:.4f} | {row['against_all'][0]:+.4f} +- {row['against_all'][1]:.4f} "
            f"| {row['perplexity']:.4f} |"
        )


if __name__ == "__main__":
    main()
