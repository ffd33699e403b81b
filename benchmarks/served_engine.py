"""Checkpoints served by a stock vLLM and evaluated over HTTP, beside our emulation of the same files.

    python served_engine.py MODEL OUT CHECKPOINT... [--vllm-python PYTHON] [--activations marlin] [--emulate-nvfp4]
        [--rows 64] [--length 512] [--device cuda]

For each checkpoint a server is started, `snugfit eval CHECKPOINT --reference MODEL --server URL` is run, and the server
is stopped. `--emulate-nvfp4` takes vLLM's weight-only NVFP4 kernels away, so that a GPU without FP4 arithmetic runs
W4A4 by emulation. Prints a Markdown table (perplexities; the server's loss a token minus ours, paired over rows, with
one standard error; KL exact against the server's lower bound) and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARLIN_NVFP4 = "MarlinNvFp4LinearKernel,FbgemmNvFp4LinearKernel"
START_SECONDS = 400
SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate checkpoints as a stock vLLM serves them.")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--activations", default="marlin")
    parser.add_argument("--emulate-nvfp4", action="store_true")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--top", type=int, default=256)
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    headings = ("checkpoint", "tokens", "ours", "served", "served - ours, loss", "in perplexity")
    print("| " + " | ".join((*headings, "KL, ours", "KL, served, at least", "kernels")) + " |\n" + "|---" * 9 + "|")
    results = {}
    for checkpoint in options.checkpoints:
        with serve(checkpoint, options) as url:
            record = evaluate(checkpoint, url, options)
        results[checkpoint.name] = describe(checkpoint.name, record)
    print(json.dumps(results))


def evaluate(checkpoint: Path, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `snugfit eval` writes of a checkpoint and of the server that serves it."""
    target = options.out / f"served-{checkpoint.name}"
    # the model with itself: the original is the reference, and the server is compared with it
    candidates = [] if checkpoint == options.model else [str(checkpoint)]
    command = [sys.executable, "-c", "from snugfit.cli.app import app; app()", "eval", *candidates]
    command += ["--reference", str(options.model), "--server", url, "--top-logprobs", str(options.top)]
    command += ["--server-log", str(options.out / "server.log"), "--context", str(options.length)]
    command += ["--max-chunks", str(options.rows), "--activations", options.activations, "--noise-floor", "none"]
    command += ["-o", str(target), *(["--device", options.device] if options.device else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads((target / "eval.json").read_text(encoding="utf-8"))
    return record


def describe(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Print one line of the table."""
    context = record["contexts"][0]
    ours, served = context["models"][-2:]
    counts = context["chunk_tokens"]
    gaps = [(b - a) / n for a, b, n in zip(ours["nll_by_chunk"], served["nll_by_chunk"], counts, strict=True)]
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    kl = "" if ours["kl"] is None else f"{ours['kl']['mean']:.4f} +- {ours['kl']['standard_error']:.4f}"
    kernels = record["candidates"][-1]["kernels"]
    served_kl = f"{served['kl']['mean']:.4f} +- {served['kl']['standard_error']:.4f}"
    cells = [name, f"{sum(counts):,}", f"{ours['perplexity']:.3f}", f"{served['perplexity']:.3f}"]
    cells += [f"{mean:+.5f} +- {error:.5f}", f"{math.expm1(mean):+.2%}", kl, served_kl, "; ".join(kernels["linear"])]
    print("| " + " | ".join(cells) + " |", flush=True)
    return {"gap": mean, "error": error, "served": record["candidates"][-1], "seconds": record["seconds"]}


@contextmanager
def serve(checkpoint: Path, options: argparse.Namespace) -> Iterator[str]:
    """A server of a checkpoint; its URL once it answers, its log at OUT/server.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", str(options.length + 1), "--max-logprobs", str(options.top)]
    command += ["--gpu-memory-utilization", "0.3", "--max-num-seqs", "4"]
    settings = {**SETTINGS, **os.environ}
    if options.emulate_nvfp4:
        settings["VLLM_DISABLED_KERNELS"] = MARLIN_NVFP4
    log = options.out / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=settings, start_new_session=True
        )
        try:
            wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise SystemExit(f"vLLM ended with {process.returncode}:\n" + log.read_text(errors="replace")[-3000:])
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 (our own server on this machine)
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"vLLM did not answer within {START_SECONDS} s:\n" + log.read_text(errors="replace")[-3000:])


if __name__ == "__main__":
    main()
