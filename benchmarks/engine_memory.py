"""How a stock vLLM uses a GPU's memory, compared with what `snugfit fit` predicts: real shapes, dummy weights.

    python benchmarks/engine_memory.py OUT.json [--only NAME...] [--seconds 500] [--vllm-python PYTHON] [--fork]
    python benchmarks/engine_memory.py OUT.json --compare

The first command starts vLLM once for each case, in a process of its own, and reads vLLM's figures: weights, peak
activation, memory outside torch, CUDA graphs (estimated and taken), the KV cache's bytes, blocks and tokens, and the
used memory of the whole card. Weights are dummies of real shapes (fewer layers where that changes nothing), so it needs
no model and no network. It writes OUT.json after each case, and starts no case after `--seconds`. `--fork` imports vLLM
once, in its own process, and forks each case, which saves their imports. It needs engine_shapes.json but nothing of
snugfit, and runs in vLLM's environment. The second command prints a Markdown table of measured and predicted figures;
it needs snugfit and no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

MIB = 1024**2
GIB = 1024**3
ERROR_LINES = 30
Config = dict[str, Any]
SHAPES: dict[str, Config] = json.loads(Path(__file__).with_name("engine_shapes.json").read_text(encoding="utf-8"))
# the batches of `vllm serve` on cards below 70 GiB, and from there on
SMALL, LARGE = (2048, 256), (8192, 1024)


def _case(shape: str, batch: tuple[int, int], length: int, share: float, **more: Any) -> Config:
    tokens, sequences = batch
    return {"shape": shape, "tokens": tokens, "sequences": sequences, "length": length, "share": share, **more}


# the most instructive first; vLLM starts once for each
CASES: dict[str, Config] = {
    "nemo-hybrid": _case("nemo-hybrid", SMALL, 16384, 0.3),
    "nemo": _case("nemo", SMALL, 32768, 0.5),
    "llama-8b": _case("llama-8b", LARGE, 32768, 0.9),
    "gemma3-4b": _case("gemma3-4b", SMALL, 65536, 0.4),
    "qwen3-moe": _case("qwen3-moe-12-layers", LARGE, 32768, 0.6),
    "deepseek-lite": _case("deepseek-v2-lite-9-layers", SMALL, 32768, 0.4),
    # Triton's kernel: what vLLM takes on an H100 by itself needs the package flashinfer
    "qwen3-next": _case("qwen3-next-8-layers", SMALL, 65536, 0.4, additional={"gdn_prefill_backend": "triton"}),
    "qwen3-0.6b-fp8-kv": _case("qwen3-0.6b", LARGE, 32768, 0.3, kv="fp8", eager=True),
    "gemma3-4b-fp8-kv": _case("gemma3-4b", LARGE, 131072, 0.5, kv="fp8", eager=True),
    "nemo-eager": _case("nemo", LARGE, 32768, 0.5, eager=True),
}
DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: its worker can be asked
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "HF_HUB_OFFLINE": "1",
}
# attributes of vLLM's worker; each version has some of them
WORKER = (
    *("requested_memory", "available_kv_cache_memory_bytes", "peak_activation_memory", "non_torch_memory"),
    *("cudagraph_memory_estimate", "total_consumed"),
)
WORDINGS = {
    "weights_gib": r"Model loading took ([\d.]+) GiB",
    "graph_estimate_gib": r"Estimated CUDA graph memory: ([\d.]+) GiB",
    "graph_taken_gib": r"Graph capturing finished in .*took ([\d.]+) GiB",
    "cache_gib": r"Available KV cache memory: (-?[\d.]+) GiB",
    "cache_tokens": r"KV cache size: ([\d,]+) tokens",
    "graphs": r"Profiling CUDA graph memory: (.*)",
    "attention": r"Using (\S+) attention backend",
    "block": r"Setting attention block size to (\d+) tokens",
    "usage": r"Actual usage is (.*?CUDAGraph memory)",
}


# one case, in a process of its own


def measure(case: Config, folder: Path) -> Config:
    """Start vLLM on dummy weights and read its worker."""
    (folder / "config.json").write_text(json.dumps(SHAPES[case["shape"]]), encoding="utf-8")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    torch: Any = importlib.import_module("torch")
    vllm: Any = importlib.import_module("vllm")
    began = time.perf_counter()
    memory = torch.cuda.mem_get_info if torch.cuda.is_available() else lambda: (0, 0)
    free_before, _ = memory()
    llm = vllm.LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=case["length"],
        max_num_batched_tokens=case["tokens"],
        max_num_seqs=case["sequences"],
        gpu_memory_utilization=case["share"],
        kv_cache_dtype=case.get("kv", "auto"),
        enforce_eager=bool(case.get("eager")),
        additional_config=case.get("additional", {}),
        disable_log_stats=True,
    )
    started = time.perf_counter() - began
    params = vllm.SamplingParams(max_tokens=2, temperature=0, detokenize=False)
    prompt = [7] * min(case["length"] - 8, 4 * case["tokens"])
    llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    free, total = memory()
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        **(device(torch) if torch.cuda.is_available() else {}),
        "total_bytes": total,
        "used_before_bytes": total - free_before,
        "used_bytes": total - free,
        "blocks": cache.num_gpu_blocks,
        "block_tokens": cache.block_size,
        "seconds": round(started, 1),
        **llm.collective_rpc(read_worker)[0],
    }


def device(torch: Any) -> Config:
    """The GPU, and what torch holds of it."""
    return {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "reserved_bytes": torch.cuda.memory_reserved(),
    }


def read_worker(worker: Any) -> Config:
    """What the worker noted of its memory, in bytes, and the bytes of its parameters and caches."""
    found = {name: getattr(worker, name) for name in WORKER if hasattr(worker, name)}
    runner = worker.model_runner
    model = runner.get_model()
    snapshot = getattr(worker, "init_snapshot", None)
    parameters = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    tables = {b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    return {
        **found,
        "weights_bytes": int(getattr(runner, "model_memory_usage", 0)),
        "parameter_bytes": sum(parameters.values()),
        "buffer_bytes": sum(tables.values()),
        "free_at_start_bytes": getattr(snapshot, "free_memory", 0),
        "non_torch_at_start_bytes": getattr(snapshot, "non_torch_memory", 0),
    }


def from_log(log: str) -> Config:
    """The figures in vLLM's log, the last of each."""
    found: Config = {}
    for name, wording in WORDINGS.items():
        matches = re.findall(wording, log)
        if matches:
            number = matches[-1].replace(",", "")
            found[name] = float(number) if re.fullmatch(r"-?\d+(\.\d+)?", number) else matches[-1].strip()
    return found


# all cases


def run_case(name: str, python: str | None, timeout: float) -> Config:
    """Measure one case in a fresh process, forked without `python`; a failure is a result with "error"."""
    with tempfile.TemporaryDirectory() as folder:
        result, log_file = Path(folder) / "result.json", Path(folder) / "log"
        with log_file.open("wb") as log:
            if python is None:
                code = run_forked(name, result, log.fileno(), timeout)
            else:
                code = run_fresh([python, str(Path(__file__).resolve()), str(result), "--child", name], log, timeout)
        failure = f"no result within {timeout:g} seconds" if code is None else f"exit code {code}"
        text = log_file.read_text(encoding="utf-8", errors="replace")
        entry = {"case": CASES[name], "log": from_log(text)}
        if result.is_file():
            return entry | {"found": json.loads(result.read_text(encoding="utf-8"))}
        lines = [line.rstrip() for line in text.splitlines() if line.strip() and "DEBUG" not in line]
        return entry | {"error": "\n".join([*lines[-ERROR_LINES:], failure])}


def run_fresh(command: list[str], log: IO[bytes], timeout: float) -> int | None:
    """The exit code; None where the time was over."""
    try:
        return subprocess.run(command, stdout=log, stderr=log, timeout=timeout, check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def run_forked(name: str, result: Path, log: int, timeout: float) -> int | None:
    """The same in a fork of this process, which has vLLM imported and has not touched the GPU."""
    child = multiprocessing.get_context("fork").Process(target=be_case, args=(name, result, log))
    child.start()
    child.join(timeout)
    if child.is_alive():
        child.kill()
        child.join()
        return None
    return child.exitcode


def be_case(name: str, result: Path, log: int) -> None:
    """Measure one case in this process, whose output goes to the file `log`."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(CASES[name], Path(folder))
    result.write_text(json.dumps(found), encoding="utf-8")


def run_all(out: Path, names: list[str], python: str | None, seconds: float, case_seconds: float) -> int:
    """Measure the cases, in their order, as long as there is time."""
    if python is None:
        os.environ.update(DEFAULTS | os.environ)
        importlib.import_module("vllm").LLM  # noqa: B018 (imported when it is first named)
    began = time.monotonic()
    report: Config = {}
    for name in names:
        left = seconds - (time.monotonic() - began)
        if left < 20:
            print(f"{name}: no time left", file=sys.stderr, flush=True)
            continue
        report[name] = run_case(name, python, min(left, case_seconds))
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        entry = report[name]
        failure = " / ".join(entry.get("error", "").splitlines()[-2:])
        outcome = f"failed: {failure}" if failure else json.dumps(entry["log"])
        print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    return 1 if any("error" in entry for entry in report.values()) else 0


# measured and predicted


def compare(report: Config) -> None:
    """Print measured and predicted figures in MiB, and the predictions' error in tokens of KV cache."""
    print("| case | weights | table | activations | outside torch | graphs (estimate) | cache | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    errors = []
    for name, entry in report.items():
        if "found" not in entry:
            continue
        pairs = predict(entry)
        cells = [f"{a / MIB:,.0f} / {b / MIB:,.0f}" for a, b in pairs[:-1]]
        measured, predicted = pairs[-1]
        error = predicted / measured - 1
        errors.append(abs(error))
        print(f"| {name} | {' | '.join(cells)} | {measured:,.0f} / {predicted:,.0f} ({error:+.1%}) |")
    mean = sum(errors) / max(1, len(errors))
    print(f"\nmeasured / predicted, MiB; tokens are off by {max(errors, default=0):.1%} at most, {mean:.1%} on average")


def predict(entry: Config) -> list[tuple[float, float]]:
    """Pairs of measured and predicted: weights, positions, activations, outside torch, graphs, cache, tokens."""
    from snugfit.engines import memory as facts
    from snugfit.vram.blocks import make_pool
    from snugfit.vram.budget import activation_bytes, read_widths, rotary_bytes
    from snugfit.vram.kv_cache_config import read_cache

    case, found, log = entry["case"], entry["found"], entry["log"]
    config = SHAPES[case["shape"]]
    cache = read_cache(config)
    widths = read_widths(config, cache)
    engine = facts.ENGINES["vllm-0.24" if found["vllm"] < "0.26" else "vllm"]
    batch = case["tokens"], case["sequences"]
    activations = activation_bytes(widths, engine, batch, found["multiprocessors"])
    graphs = 0 if case.get("eager") else facts.graph_count(case["sequences"], case["tokens"])
    graph_bytes = graphs * engine.graph_estimate_bytes
    loaded = found["parameter_bytes"] + rotary_bytes(widths)
    predicted = case["share"] * found["total_bytes"] - loaded - activations - facts.NON_TORCH_BYTES - graph_bytes
    fp8 = case.get("kv") == "fp8"
    pool = make_pool(cache, max_num_batched_tokens=case["tokens"], fp8=fp8, state_blocks=engine.state_blocks)
    # vLLM's log: blocks for the cache, in contexts of the greatest length
    tokens = int(predicted // pool.block_bytes / pool.blocks(case["length"]) * case["length"])
    measured = found["available_kv_cache_memory_bytes"]
    estimate = found.get("cudagraph_memory_estimate", 0)
    torch_peak = found.get("peak_activation_memory", 0) - (estimate if "total_consumed" in found else 0)
    return [
        (found["weights_bytes"], loaded),
        (found["weights_bytes"] - found["parameter_bytes"], rotary_bytes(widths)),
        (torch_peak, activations),
        (found.get("non_torch_memory", 0), facts.NON_TORCH_BYTES),
        (estimate, graph_bytes),
        (measured, predicted),
        (log.get("cache_tokens", 0) or 1, tokens),
    ]


def main() -> int:
    """Run, be one case, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=500.0, help="start no case after this time")
    parser.add_argument("--case-seconds", type=float, default=200.0, help="longest wait for a case")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--fork", action="store_true", help="import vLLM once; needs no --vllm-python")
    parser.add_argument("--compare", action="store_true", help="print OUT with predictions")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(CASES[options.child], Path(folder))
        options.out.write_text(json.dumps(found), encoding="utf-8")
        return 0
    if options.compare:
        compare(json.loads(options.out.read_text(encoding="utf-8")))
        return 0
    python = None if options.fork else options.vllm_python
    return run_all(options.out, options.only, python, options.seconds, options.case_seconds)


if __name__ == "__main__":
    sys.exit(main())
