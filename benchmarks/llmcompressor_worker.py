"""Quantize a checkpoint with llm-compressor on given token rows, and measure it.

The rival's side of the benchmarks. It runs in llm-compressor's own virtual environment and never imports snugfit:

    python -m venv llmc && llmc/bin/pip install llmcompressor==0.14.0
    llmc/bin/python llmcompressor_worker.py MODEL ROWS.json OUT --recipe nvfp4-fp8-hybrid-four-over-six --threads 2

ROWS.json holds {"rows": [[token ids], ...]}: exactly these rows are the calibration set. The data-free recipes
(fp8-dynamic, and those with INT4 and absmax in their names) take "-" in its place. The compressed checkpoint goes to
OUT; progress goes to stderr; the last line of stdout is one JSON document. Its seconds and cpu_seconds count from after
the imports and from after the GPU's context exists, so nothing is charged to llm-compressor that a long-lived process
would pay once.
--pipeline independent is llm-compressor's default (two passes over each layer, its memory bounded by a layer on an
accelerator); "basic" makes one pass over the whole model, is its fastest where the model fits, and writes the same
bytes for these recipes. On a machine with a GPU the model is loaded to main memory and llm-compressor brings a layer
at a time to the GPU, unless --device-map cuda loads all of it there.

Recipes ("four over six": the memoryless_mse observer told to try each block's scale at 6 and at 4, lower MSE wins):

    nvfp4-fp8-hybrid-four-over-six  FP8_DYNAMIC attention, NVFP4 MLP with four over six
    nvfp4-fp8-attention-absmax      FP8_DYNAMIC attention, NVFP4 MLP with plain absmax scales
    nvfp4-four-over-six             NVFP4 in every linear layer, with four over six
    nvfp4-absmax                    the same with absmax scales
    nvfp4-expanded                  the same with llm-compressor's own 112-step search (alias "fouroversix" there); slow
    hybrid-absmax                   the first with absmax scales
    hybrid-expanded                 the first with the 112-step search
    hybrid-gptq                     absmax scales, codes and FP8 attention by GPTQModifier with its defaults
    hybrid-awq                      AWQModifier with its defaults (folds into norms, up_proj), then absmax
    fp8-dynamic                     FP8_DYNAMIC in every linear layer
    int4-w4a16-absmax               symmetric INT4 weights in groups of --group-size
    fp8-int4-experts-awq            mixtures: FP8_DYNAMIC attention, such INT4 experts, AWQModifier from the norm into
                                    router and experts and from up_proj into down_proj, its own choice for Qwen3-MoE
    fp8-int4-experts-awq-up-down    the same with the fold from up_proj into down_proj alone
    fp8-int4-experts-absmax         the same without AWQModifier

The output head stays as it is in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTENTION = [r"re:.*self_attn\..*_proj$"]
MLP = [r"re:.*mlp\..*(gate|up|down)_proj$"]
LINEAR = ["Linear"]
ROUTERS = [r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*\.router$", r"re:.*shared_expert_gate$"]
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

# Two steps, i = 0 and 1, of p = 1 - i / grid: p = 1 maps the largest value of a block to 6, p = 1.5 maps it to 4.
FOUR_OVER_SIX: dict[str, Any] = {
    "observer": "memoryless_mse",
    "observer_kwargs": {"maxshrink": -1, "grid": -2, "norm": 2},
}
EXPANDED: dict[str, Any] = {"observer": "nvfp4_expanded_mse"}

Group = tuple[str, list[str], dict[str, Any]]  # preset scheme, targets, changes to its weight arguments
HYBRID_ABSMAX: list[Group] = [("FP8_DYNAMIC", ATTENTION, {}), ("NVFP4", MLP, {})]
FP8_INT4: list[Group] = [("FP8_DYNAMIC", ATTENTION, {}), ("W4A16", MLP, {})]
RECIPES: dict[str, list[Group]] = {
    "nvfp4-fp8-hybrid-four-over-six": [("FP8_DYNAMIC", ATTENTION, {}), ("NVFP4", MLP, FOUR_OVER_SIX)],
    "nvfp4-fp8-attention-absmax": HYBRID_ABSMAX,
    "nvfp4-four-over-six": [("NVFP4", LINEAR, FOUR_OVER_SIX)],
    "nvfp4-absmax": [("NVFP4", LINEAR, {})],
    "nvfp4-expanded": [("NVFP4", LINEAR, EXPANDED)],
    "hybrid-absmax": HYBRID_ABSMAX,
    "hybrid-expanded": [("FP8_DYNAMIC", ATTENTION, {}), ("NVFP4", MLP, EXPANDED)],
    "hybrid-gptq": HYBRID_ABSMAX,
    "hybrid-awq": HYBRID_ABSMAX,
    "fp8-dynamic": [("FP8_DYNAMIC", LINEAR, {})],
    "int4-w4a16-absmax": [("W4A16", LINEAR, {})],
    "fp8-int4-experts-awq": FP8_INT4,
    "fp8-int4-experts-awq-up-down": FP8_INT4,
    "fp8-int4-experts-absmax": FP8_INT4,
}
DATA_FREE = {"fp8-dynamic", "int4-w4a16-absmax", "fp8-int4-experts-absmax"}

# smooth layer, and the layers that make up for it
INTO_EXPERTS = (
    r"re:.*post_attention_layernorm$",
    [r"re:.*mlp.gate$", *(rf"re:.*mlp.experts.*.{p}_proj$" for p in ("gate", "up"))],
)
UP_DOWN = (r"re:.*up_proj$", [r"re:.*down_proj$"])
FOLDS: dict[str, list[tuple[str, list[str]]] | None] = {
    "hybrid-awq": None,  # AWQModifier's defaults
    "fp8-int4-experts-awq": [INTO_EXPERTS, UP_DOWN],
    "fp8-int4-experts-awq-up-down": [UP_DOWN],
}


@dataclass(slots=True)
class Stopwatch:
    """Wall and processor seconds (user + system, all threads) of named stages, in order."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body under `name`."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        try:
            yield
        finally:
            self.wall[name] = round(time.perf_counter() - wall, 3)
            self.cpu[name] = round(cpu_seconds() - cpu, 3)


def cpu_seconds() -> float:
    """User and system seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_rss_bytes() -> int:
    """Peak resident memory of this process.

    Linux hands ru_maxrss on from the parent through exec, so a large parent would show; VmHWM there starts afresh.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quantize MODEL with llm-compressor and measure it.")
    parser.add_argument("model", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("rows", help='{"rows": [[ids], ...]} as JSON, or - for a data-free recipe')
    parser.add_argument("out", type=Path, help="directory for the compressed checkpoint")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="nvfp4-fp8-hybrid-four-over-six")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1, help="rows of one length per forward")
    parser.add_argument("--pipeline", choices=["independent", "sequential", "basic"], default="independent")
    parser.add_argument("--device-map", help="where transformers loads the model to (default: main memory)")
    parser.add_argument("--group-size", type=int, default=64, help="of INT4 weights")
    arguments = parser.parse_args()
    if arguments.rows == "-" and arguments.recipe not in DATA_FREE:
        parser.error(f"--recipe {arguments.recipe} calibrates activations: give ROWS.json")
    return arguments


def build_recipe(name: str, *, group_size: int, has_experts: bool) -> Any:
    """llm-compressor's modifiers for the recipe `name`: the quantizing one has one config group for each format."""
    quantization = import_module("compressed_tensors.quantization")
    modifiers = import_module("llmcompressor.modifiers.quantization")
    groups: dict[str, Any] = {}
    for index, (preset, targets, changes) in enumerate(RECIPES[name]):
        scheme = quantization.preset_name_to_scheme(preset, targets)
        arguments = {**scheme.weights.model_dump(), **changes}
        if preset == "W4A16":
            arguments["group_size"] = group_size
        scheme.weights = quantization.QuantizationArgs(**arguments)
        groups[f"group_{index}"] = scheme
    ignored = ["lm_head", *(ROUTERS if has_experts else [])]
    if name == "hybrid-gptq":
        gptq = import_module("llmcompressor.modifiers.gptq")
        return gptq.GPTQModifier(config_groups=groups, ignore=ignored)
    rounding = modifiers.QuantizationModifier(config_groups=groups, ignore=ignored)
    if name not in FOLDS:
        return rounding
    unpin_without_accelerator()
    awq = import_module("llmcompressor.modifiers.transform.awq")
    folds = FOLDS[name]
    mappings = folds and [awq.AWQMapping(smooth, balanced) for smooth, balanced in folds]
    return [awq.AWQModifier(mappings=mappings), rounding]


def unpin_without_accelerator() -> None:
    """Without an accelerator AWQModifier asks for pinned memory all the same, which torch refuses: leave it out."""
    if not import_module("torch").cuda.is_available():
        cache = import_module("llmcompressor.pipelines.cache").IntermediatesCache
        cache.pin_memory = lambda _self, _batch: None


def prepare(model: Path) -> None:
    """Import the model's own code, and make the GPU's context if there is one."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    with contextlib.suppress(ImportError):
        import_module("transformers.models.{0}.modeling_{0}".format(config["model_type"]))
    torch = import_module("torch")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    torch = import_module("torch")
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpu_figures() -> dict[str, Any]:
    """Most memory that torch had allocated and reserved of the GPU; nothing without one."""
    torch = import_module("torch")
    if not torch.cuda.is_available():
        return {"gpu": None, "peak_gpu_bytes": None, "peak_gpu_reserved_bytes": None}
    return {
        "gpu": torch.cuda.get_device_name(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def load_model(path: Path, device_map: str | None) -> tuple[Any, Any, bool]:
    """Model in its own dtype, tokenizer, and whether it has experts (then loaded one linear layer each)."""
    transformers = import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(path)
    has_experts = any(getattr(config.get_text_config(), key, None) for key in EXPERT_COUNTS)
    # loading experts one linear each imports all of transformers for some families, and parts of that need torchvision
    linear_at_once = has_experts and find_spec("torchvision") is not None
    with contextlib.ExitStack() as stack:
        if linear_at_once:
            stack.enter_context(import_module("llmcompressor.modeling.moe.linearize").load_quantizable_moe())
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=device_map)
    if has_experts and not linear_at_once:
        import_module("llmcompressor.modeling.moe.linearize").linearize_moe(model)
    return model, transformers.AutoTokenizer.from_pretrained(path), has_experts


def make_batches(rows: list[list[int]], *, batch_size: int) -> list[list[list[int]]]:
    """Rows in batches of at most `batch_size`, all rows of a batch of one length: no padding, no truncation."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def read_rows(argument: str) -> list[list[int]]:
    """The rows of the JSON file, or none for "-"."""
    if argument == "-":
        return []
    rows: list[list[int]] = json.loads(Path(argument).read_text())["rows"]
    return rows


def quantize(arguments: argparse.Namespace, watch: Stopwatch) -> list[list[int]]:
    """Load, calibrate and save, each timed; the rows used."""
    torch = import_module("torch")
    with watch.stage("load"):
        model, tokenizer, has_experts = load_model(arguments.model, arguments.device_map)
        synchronize()
    rows = [] if arguments.recipe in DATA_FREE else read_rows(arguments.rows)
    options: dict[str, Any] = {}
    if rows:
        batches = [{"input_ids": torch.tensor(batch)} for batch in make_batches(rows, batch_size=arguments.batch_size)]
        options["dataset"] = torch.utils.data.DataLoader(batches, batch_size=None)
        options["pipeline"] = arguments.pipeline
    with watch.stage("calibrate"):
        recipe = build_recipe(arguments.recipe, group_size=arguments.group_size, has_experts=has_experts)
        import_module("llmcompressor").oneshot(model=model, processor=tokenizer, recipe=recipe, **options)
        synchronize()
    with watch.stage("save"):
        model.save_pretrained(str(arguments.out), save_compressed=True)
        tokenizer.save_pretrained(str(arguments.out))
    return rows


def find_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def main() -> None:
    """Quantize, then print the measurements as the last line of stdout."""
    arguments = parse_arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    watch = Stopwatch()
    with contextlib.redirect_stdout(sys.stderr):  # llm-compressor logs to stdout: it binds it while it is imported
        with watch.stage("import"):
            for name in ("torch", "transformers", "llmcompressor", "llmcompressor.modifiers.quantization"):
                import_module(name)
            import_module("torch").set_num_threads(arguments.threads)
            prepare(arguments.model)
        peak_after_import = peak_rss_bytes()
        with watch.stage("total"):
            rows = quantize(arguments, watch)
    report = {
        "tool": "llm-compressor",
        "recipe": arguments.recipe,
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "threads": arguments.threads,
        "batch_size": arguments.batch_size,
        "pipeline": arguments.pipeline if rows else "datafree",
        "seconds": watch.wall,
        "cpu_seconds": watch.cpu,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_after_import_bytes": peak_after_import,
        "device_map": arguments.device_map,
        **gpu_figures(),
        "output_bytes": sum(file.stat().st_size for file in arguments.out.iterdir() if file.is_file()),
        "versions": find_versions(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
