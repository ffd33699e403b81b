"""Quantize the MLP of a checkpoint to NVFP4 with auto-round or ModelOpt on given token rows, and measure it.

The side of the rivals that write no mix of NVFP4 and FP8: attention stays as it is, and `versus_rivals.py` puts the
codes and scales of the MLP into a file that has the attention in FP8. It runs in the tool's own environment and never
imports snugfit:

    pip install auto-round==0.16.1        (or nvidia-modelopt==0.47.0, in another environment)
    python nvfp4_mlp_worker.py MODEL ROWS.json OUT --method auto-round --device cuda

ROWS.json is that of llmcompressor_worker.py, whose clock, figures and JSON line this script shares. Methods:

    auto-round               its defaults: 200 signed gradient steps a layer, batches of 8 rows
    auto-round-rtn           the same with no step: its "optimized RTN"
    modelopt-local-hessian   its preset NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG, attention left out; it needs a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from llmcompressor_worker import Stopwatch, gpu_figures, peak_rss_bytes, prepare, read_rows, synchronize

PACKAGES = {
    "auto-round": ("auto_round", "auto-round"),
    "auto-round-rtn": ("auto_round", "auto-round"),
    "modelopt-local-hessian": ("modelopt.torch.quantization", "nvidia-modelopt"),
}


def run_auto_round(arguments: argparse.Namespace, rows: list[list[int]], watch: Stopwatch) -> None:
    """Tune (or only search scales) and save in the form of compressed-tensors."""
    torch, auto_round = import_module("torch"), import_module("auto_round")
    samples = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=int)} for row in rows]
    options: dict[str, Any] = {"iters": 0} if arguments.method == "auto-round-rtn" else {}
    if arguments.steps is not None and not options:
        options["iters"] = arguments.steps
    with watch.stage("quantize and save"):
        compressor = auto_round.AutoRound(
            str(arguments.model),
            scheme="NVFP4",
            ignore_layers="self_attn",
            dataset=samples,
            nsamples=len(rows),
            seqlen=min(map(len, rows)),  # it leaves out shorter rows
            device_map=0 if arguments.device == "cuda" else "cpu",
            **options,
        )
        compressor.quantize_and_save(str(arguments.out), format="llm_compressor")
        synchronize()


def run_modelopt(arguments: argparse.Namespace, rows: list[list[int]], watch: Stopwatch) -> None:
    """Search scales under the local Hessian and save in ModelOpt's own form."""
    torch, transformers = import_module("torch"), import_module("transformers")
    quantization, export = import_module("modelopt.torch.quantization"), import_module("modelopt.torch.export")
    config = copy.deepcopy(quantization.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG)
    config["quant_cfg"].append({"quantizer_name": "*self_attn*", "enable": False})
    with watch.stage("load"):
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        model = model.to(arguments.device).eval()

    def forward(model: Any) -> None:
        with torch.no_grad():
            for start in range(0, len(rows), arguments.batch_size):
                model(torch.tensor(rows[start : start + arguments.batch_size], device=arguments.device))

    with watch.stage("quantize"):
        quantization.quantize(model, config, forward)
        synchronize()
    with watch.stage("save"), torch.inference_mode():
        export.export_hf_checkpoint(model, export_dir=arguments.out)


def main() -> None:
    """Quantize, then print the measurements as the last line of stdout."""
    parser = argparse.ArgumentParser(description="Quantize the MLP of MODEL to NVFP4 and measure it.")
    parser.add_argument("model", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("rows", help='{"rows": [[ids], ...]} as JSON, all rows of one length')
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--method", choices=sorted(PACKAGES), required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a forward of modelopt-local-hessian")
    parser.add_argument("--steps", type=int, help="of auto-round, a layer (default: its own 200)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    module, package = PACKAGES[arguments.method]
    watch = Stopwatch()
    with contextlib.redirect_stdout(sys.stderr):
        with watch.stage("import"):
            for name in ("torch", "transformers", module):
                import_module(name)
            import_module("torch").set_num_threads(arguments.threads)
            prepare(arguments.model)
        rows = read_rows(arguments.rows)
        run = run_modelopt if arguments.method == "modelopt-local-hessian" else run_auto_round
        with watch.stage("total"):
            run(arguments, rows, watch)
    report = {
        "tool": package,
        "method": arguments.method,
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "seconds": watch.wall,
        "cpu_seconds": watch.cpu,
        "peak_rss_bytes": peak_rss_bytes(),
        **gpu_figures(),
        "versions": {name: metadata.version(name) for name in (package, "torch", "transformers")},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
