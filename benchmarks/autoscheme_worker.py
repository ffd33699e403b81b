"""auto-round's AutoScheme on a model's linears in NVFP4, FP8 and 16 bits, for `benchmarks/plan_scores.py --rival`.

    python autoscheme_worker.py MODEL ROWS.json OUT.json delta-loss delta-loss-resident:8 --bits 4.84 5.38 5.92

ROWS.json are rows of token ids; METHOD:N takes the first N. Runs in an environment with auto-round 0.16, and never
imports snugfit. Methods:

    delta-loss           AutoScheme's defaults: one block at a time on the GPU, batches of 8 rows, on a GPU a process
                         for each format
    delta-loss-resident  low_gpu_mem_usage=False: the whole model on the GPU, row by row

Both take the same scores, |gradient x error of rounding|, from one forward and backward pass of the rows a format.
AutoScheme only reads texts by the name of a dataset, so its loader is replaced by one that gives these rows, in batches
of one length. What vLLM runs as one (query, key and value; gate and up) has one format: its `shared_layers`. FP8 has a
scale a channel of the weights and a token of the inputs, as `fp8-dynamic`: no preset of auto-round, but its API takes
it. The output head stays.

It writes for each method its seconds and processor seconds (of this process, after loading the model), its tokens and
the score of each linear in each format, and for each of --bits (a weight of the linears, by AutoScheme's own count,
scales included) the plan of its own solver: the format of each linear, and the bits that it counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROWS, BATCH = "AUTOSCHEME_ROWS", "AUTOSCHEME_BATCH"  # for AutoScheme's own processes
SHARED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
FORMATS = ("NVFP4", "FP8", "BF16")
FP8 = {
    "bits": 8,
    "group_size": -1,
    "data_type": "fp",
    "sym": True,
    "act_bits": 8,
    "act_group_size": -1,
    "act_data_type": "fp",
    "act_dynamic": True,
    "act_sym": True,
}


def batched(rows: list[list[int]], most: int) -> list[dict[str, torch.Tensor]]:
    """Batches of at most so many rows of one length."""
    found = []
    for _, same in itertools.groupby(sorted(rows, key=len), key=len):
        alike = torch.tensor(list(same))
        found += [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in alike.split(most)]
    return found


def read_given_rows() -> None:
    """Let AutoScheme read the rows of the environment's file, in this process."""
    from auto_round.auto_scheme import delta_loss

    rows = json.loads(Path(os.environ[ROWS]).read_text(encoding="utf-8"))
    batches = batched(rows, int(os.environ[BATCH]))
    delta_loss.get_dataloader = lambda *_args, **_options: batches


def score(
    model: str, rows: list[list[int]], bits: float, *, resident: bool
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """AutoScheme's times, its candidates of each decision (format, bits, score, linears), and the bits it may use."""
    import auto_round
    from auto_round.auto_scheme import delta_loss
    from auto_round.schemes import QuantizationScheme

    batch_size = 1 if resident else 8
    os.environ[BATCH] = str(batch_size)
    read_given_rows()
    seen: list[tuple[dict[str, Any], float]] = []
    choose = delta_loss.choose_bits_per_layer_with_path

    def watched(layers: dict[str, Any], limit: float, **options: Any) -> Any:
        seen.append((layers, limit))
        return choose(layers, limit, **options)

    delta_loss.choose_bits_per_layer_with_path = watched
    scheme = auto_round.AutoScheme(
        avg_bits=bits,
        options=["NVFP4", QuantizationScheme.from_dict(dict(FP8)), "BF16"],
        shared_layers=SHARED,
        nsamples=len(rows),
        seqlen=max(map(len, rows)),
        batch_size=batch_size,
        low_gpu_mem_usage=not resident,
    )
    device = 0 if torch.cuda.is_available() else "cpu"
    try:
        compressor = auto_round.AutoRound(model, scheme=scheme, iters=0, device_map=device, enable_torch_compile=False)
        started, busy = time.perf_counter(), time.process_time()
        compressor.post_init()
        seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    finally:
        delta_loss.choose_bits_per_layer_with_path = choose
    layers, limit = seen[-1]
    return seconds, layers, limit


def solve(layers: dict[str, Any], limit: float, bits: float) -> dict[str, Any]:
    """The plan of AutoScheme's solver: the format of each linear, and the bits a weight that it counts."""
    from auto_round.auto_scheme.delta_loss import choose_bits_per_layer_with_path

    started = time.perf_counter()
    _, path = choose_bits_per_layer_with_path(layers, int(limit))
    seconds = time.perf_counter() - started
    if path is None:
        return {"bits": bits, "seconds": seconds, "formats": None}
    chosen = {names[0]: place for names, place in path}
    used = sum(option[1] for options in layers.values() for option in options if chosen[option[3][0]] == option[0])
    formats = {name: FORMATS[place] for names, place in path for name in names}
    return {"bits": bits, "own_bits": bits * used / limit, "seconds": seconds, "formats": formats}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="+", help="delta-loss, delta-loss-resident; :N takes the first N rows")
    parser.add_argument("--bits", type=float, nargs="+", required=True)
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for asked in args.methods:
        method, _, count = asked.partition(":")
        taken = rows[: int(count or len(rows))]
        # AutoScheme keeps scores by the model's name: those of an earlier run would be taken for these
        with tempfile.TemporaryDirectory() as cache:
            os.environ["AR_AUTO_SCHEME_CACHE"] = cache
            os.environ[ROWS] = str(Path(cache) / "rows")
            Path(os.environ[ROWS]).write_text(json.dumps(taken), encoding="utf-8")
            try:
                seconds, layers, limit = score(args.model, taken, args.bits[0], resident=method.endswith("resident"))
            except Exception as error:
                print(f"{method}: {error!r}", flush=True)
                continue
        stats = [
            {
                "modules": list(options[0][3]),
                "formats": [FORMATS[option[0]] for option in options],
                "scores": [float(option[2]) for option in options],
            }
            for options in layers.values()
        ]
        plans = [solve(layers, limit * bits / args.bits[0], bits) for bits in args.bits]
        tokens = sum(map(len, taken))
        found[method] = {**seconds, "tokens": tokens, "stats": stats, "plans": plans, "version": version("auto-round")}
        print(f"{method}: {seconds['seconds']:.1f} s, {len(stats)} decisions", flush=True)
        args.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # one of AutoScheme's processes
    read_given_rows()
