"""Load checkpoints into a stock vLLM's own model classes, and tell which of its linears run which scheme.

Run by an environment that has vLLM (its CPU build will do)::

    python load_in_vllm.py OUT.json CHECKPOINT [CHECKPOINT...]

OUT.json is ``{path: {"linears": {name: scheme or null}, "experts": {module: {parameter: sum}}} or {"error": last
line}}``. ``experts`` are the parameters of mixtures before vLLM repacks them, each told by the sum of its bytes: vLLM
0.32 passes over tensors of experts whose names it does not know. No forward is run: tiny models have shapes that
kernels refuse.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def sums_of_experts(model: Any, torch: Any) -> dict[str, dict[str, int]]:
    """The sum of the bytes of every parameter of every mixture."""
    found: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if ".experts" in module and leaf.startswith(("w13", "w2")):
            flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
            found.setdefault(module, {})[leaf] = int(flat.sum(dtype=torch.int64))
    return found


def digests_of_parameters(model: Any, torch: Any) -> dict[str, str]:
    """A digest of the bytes of every parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
        found[name] = hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]
    return found


def load(path: str) -> dict[str, Any]:
    """Every linear of the loaded model by name and its scheme, None where it is not quantized; what experts loaded.

    `parameters` are digests of what all parameters hold before vLLM repacks them.
    """
    arguments: Any = importlib.import_module("vllm.engine.arg_utils")
    config: Any = importlib.import_module("vllm.config")
    loader: Any = importlib.import_module("vllm.model_executor.model_loader")
    linear: Any = importlib.import_module("vllm.model_executor.layers.linear")
    distributed: Any = importlib.import_module("vllm.distributed")
    given = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 256, "enforce_eager": True}
    settings = arguments.EngineArgs(model=path, **given).create_engine_config()
    with config.set_current_vllm_config(settings):
        if not distributed.model_parallel_is_initialized():
            meeting = Path(tempfile.mkdtemp()) / "meeting"
            distributed.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
            distributed.ensure_model_parallel_initialized(1, 1)
        torch: Any = importlib.import_module("torch")
        base: Any = importlib.import_module("vllm.model_executor.model_loader.base_loader")
        experts: dict[str, dict[str, int]] = {}
        parameters: dict[str, str] = {}
        repack = base.process_weights_after_loading

        def note(model: Any, *args: Any) -> None:
            experts.update(sums_of_experts(model, torch))
            parameters.update(digests_of_parameters(model, torch))
            if not experts:  # their kernels may be for other processors than this
                repack(model, *args)

        base.process_weights_after_loading = note
        try:
            model = loader.get_model(vllm_config=settings)
        finally:
            base.process_weights_after_loading = repack
    modules = dict(model.named_modules())  # an output head with a scheme is no LinearBase
    schemes = {name: getattr(module, "scheme", None) for name, module in modules.items()}
    linears = {n for n, module in modules.items() if isinstance(module, linear.LinearBase)}
    schemes = {name: found for name, found in schemes.items() if name in linears or found is not None}
    named = {name: None if scheme is None else type(scheme).__name__ for name, scheme in schemes.items()}
    return {"linears": named, "experts": experts, "parameters": parameters}


def main() -> None:
    """Load one checkpoint after the other."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    platforms: Any = importlib.import_module("vllm.platforms")
    kernels: Any = importlib.import_module("vllm.model_executor.kernels.linear")
    if platforms.current_platform.is_cpu():
        kernels.register_linear_kernel(kernels.EmulationNvFp4LinearKernel, platforms.PlatformEnum.CPU, "nvfp4")
        torch: Any = importlib.import_module("torch")
        torch.accelerator.empty_cache = lambda: None  # asks for a device that is not there
        # else there is no kernel to load INT4 experts for: it asks for AMX, and knows routing by softmax alone
        torch.cpu._is_amx_tile_supported = lambda: True
        experts: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
        experts.CPUExpertsInt4._supports_routing_method = staticmethod(lambda *_: True)
    out, paths = Path(sys.argv[1]), sys.argv[2:]
    found: dict[str, Any] = {}
    for path in paths:
        try:
            found[path] = load(path)
        except Exception as error:  # noqa: BLE001 (whatever vLLM raises is the answer)
            found[path] = {"error": f"{type(error).__name__}: {error}"}
        out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
