"""ModelOpt's layerwise export of a checkpoint whose layers stay on the disk or in main memory, measured.

    python modelopt_layerwise_worker.py MODEL OUT [--rows ROWS.json] [--recipe fp8-dynamic] [--offload disk|cpu]

Runs in an environment with nvidia-modelopt 0.47 and never imports snugfit. Layers are offloaded by accelerate, so that
`export_hf_checkpoint` takes its streaming path: one layer on the GPU at a time, written to shards. `disk` reads them
out of the safetensors files, `cpu` holds them in main memory. Recipes:

    fp8-dynamic   FP8_PER_CHANNEL_PER_TOKEN_CFG: weights by channel, inputs by token; no calibration
    nvfp4-mlp     NVFP4_MLP_ONLY_CFG: NVFP4 in the MLP, calibrated on the rows layer by layer (`layerwise`)

ROWS.json holds {"rows": [[token ids], ...]}. The output head stays as it is. The last line of stdout is one JSON
document: seconds count from after the imports and from after the GPU's context exists.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

CONFIGS = {"fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN_CFG", "nvfp4-mlp": "NVFP4_MLP_ONLY_CFG"}


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, pages of mapped files included."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--recipe", choices=list(CONFIGS), default="fp8-dynamic")
    parser.add_argument("--offload", choices=["disk", "cpu"], default="disk")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.recipe != "fp8-dynamic" and arguments.rows is None:
        parser.error("this recipe is calibrated: give --rows")
    return arguments


def load(arguments: argparse.Namespace, folder: str) -> Any:
    """The model with its layers offloaded and all else on the GPU."""
    torch, transformers = import_module("torch"), import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(arguments.model)
    main: Any = 0 if torch.cuda.is_available() else "cpu"
    places = {f"model.layers.{layer}": arguments.offload for layer in range(config.num_hidden_layers)}
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), main)
    return transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto", device_map=outside | places, offload_folder=folder
    )


def quantize(arguments: argparse.Namespace, folder: str) -> dict[str, float]:
    """Load, quantize and export; seconds of each."""
    torch = import_module("torch")
    quantization, export = import_module("modelopt.torch.quantization"), import_module("modelopt.torch.export")
    times = [time.perf_counter()]
    model = load(arguments, folder)
    times.append(time.perf_counter())
    settings = dict(getattr(quantization, CONFIGS[arguments.recipe]))
    loop = None
    if arguments.rows is not None and arguments.recipe != "fp8-dynamic":
        rows = json.loads(arguments.rows.read_text())["rows"]
        device = next(p.device for p in model.parameters() if p.device.type != "meta")
        settings["algorithm"] = {"method": "max", "layerwise": {"enable": True}}

        def loop(one: Any) -> None:
            for row in rows:
                one(torch.tensor([row], device=device))

    model = quantization.quantize(model, settings, forward_loop=loop)
    times.append(time.perf_counter())
    export.export_hf_checkpoint(model, export_dir=str(arguments.out))
    times.append(time.perf_counter())
    names = ("load", "quantize", "export")
    parts = {name: end - begin for name, begin, end in zip(names, times[:-1], times[1:], strict=True)}
    return parts | {"total": times[-1] - times[0]}


def main() -> None:
    """Quantize, then print the measurements."""
    arguments = parse_arguments()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder:
        torch = import_module("torch")
        for name in ("transformers", "modelopt.torch.quantization", "modelopt.torch.export"):
            import_module(name)
        import_module("transformers.models.mistral.modeling_mistral")
        torch.set_num_threads(arguments.threads)
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")
            torch.cuda.reset_peak_memory_stats()
        before = peak_rss_bytes()
        seconds = quantize(arguments, folder)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    versions = {name: metadata.version(name) for name in ("nvidia-modelopt", "torch", "transformers", "accelerate")}
    found = {
        "tool": "ModelOpt",
        "recipe": arguments.recipe,
        "offload": arguments.offload,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_after_import_bytes": before,
        "peak_gpu_bytes": gpu,
        "output_bytes": sum(file.stat().st_size for file in arguments.out.iterdir() if file.is_file()),
        "versions": versions,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
