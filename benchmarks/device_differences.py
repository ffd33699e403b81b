"""How far a file from a GPU differs from one from a CPU: the same run on both, bytes counted by kind of tensor.

    python device_differences.py MODEL WORK --dataset A.txt B.txt --evaluation C.txt [--ways gptq gptq+folds]
                                 [--layout nvfp4-fp8-hybrid] [--num-samples 16] [--max-seq-length 512]

Each way is quantized alone, without the gate, on "cpu" and twice on "cuda"; the two from CUDA must be equal. Prints a
Markdown table: bytes that differ of each kind of tensor, and the KL to the original of both files (one standard error).
Sums of matrix products round differently on the two; a value near a tie then takes another code, and GPTQ passes the
difference on to the columns behind it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch

from one_way import take_only
from snugfit.evaluation.evaluate import evaluate
from snugfit.quantization.quantize import quantize
from snugfit.storage.checkpoint import read_tensor
from snugfit.storage.open import open_checkpoint

KINDS = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", "weight")


def main() -> None:
    options = _options()
    print("| way | " + " | ".join((*KINDS, "others")) + " | KL, CPU | KL, CUDA | seconds, CPU / CUDA |")
    print("|---|" + "---|" * (len(KINDS) + 4))
    for name in options.ways:
        take_only(name)
        made = {kind: _make(options, name, kind) for kind in ("cpu", "cuda", "cuda again")}
        assert not sum(_differences(made["cuda"][0], made["cuda again"][0])[0].values()), "two runs on CUDA differ"
        different, total = _differences(made["cpu"][0], made["cuda"][0])
        cells = [f"{different[kind]:,} of {total[kind]:,}" if total[kind] else "-" for kind in (*KINDS, "others")]
        record = evaluate(
            [made["cpu"][0], made["cuda"][0]],
            reference=options.model,
            dataset=options.evaluation,
            contexts=(1024,),
            max_tokens=options.max_tokens,
            noise_floor="none",
        )
        spreads = [model.kl for model in record.contexts[0].models[1:]]
        cells += [f"{kl.mean:.4f} +- {kl.standard_error:.4f}" for kl in spreads if kl is not None]
        print(f"| {name} | " + " | ".join(cells) + f" | {made['cpu'][1]:.0f} / {made['cuda'][1]:.0f} |", flush=True)


def _make(options: argparse.Namespace, way: str, kind: str) -> tuple[Path, float]:
    out: Path = options.work / f"{way}-{kind.replace(' ', '-')}"
    started = time.perf_counter()
    quantize(
        options.model,
        options.layout,
        output_dir=out,
        dataset=options.dataset,
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
        shuffle_seed=0,
        device=kind.split(maxsplit=1)[0],
        effort="good",
    )
    return out, time.perf_counter() - started


def _differences(here: Path, there: Path) -> tuple[Counter[str], Counter[str]]:
    """Bytes that differ, and all bytes, by the last part of a tensor's name."""
    different, total = Counter[str](), Counter[str]()
    a, b = open_checkpoint(here), open_checkpoint(there)
    for name in a.tensors:
        kind = name.rpartition(".")[2]
        kind = kind if kind in KINDS else "others"
        left, right = (read_tensor(one, name).contiguous().reshape(-1).view(torch.uint8) for one in (a, b))
        different[kind] += int((left != right).sum())
        total[kind] += len(left)
    return different, total


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dataset", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--ways", nargs="+", default=["plain", "weighted", "gptq", "gptq+folds"])
    parser.add_argument("--layout", default="nvfp4-fp8-hybrid")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16384)
    return parser.parse_args()


if __name__ == "__main__":
    main()
