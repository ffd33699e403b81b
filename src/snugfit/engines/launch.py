"""How each engine's server is started: its module, its options by purpose, its settings in the environment, as data.

vLLM's options are those of `vllm serve` (0.24 and 0.32), Aphrodite's of its `endpoints/openai/api_server.py` (April
2026), SGLang's of its server_args.py (0.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One engine: `python -m MODULE`, or a `command` of its own, then options.

    `model`, `context` and the others are the option's names; behind `command` the model's is `model_behind`, () for a
    bare argument. `skip_layers` names the layers that keep 16 bits beside an FP8 cache, "" where an engine was not seen
    to have that. `ready` is the page that answers when the engine does. `environment` are settings that are given
    unless the user has others.
    """

    name: str
    module: str
    command: tuple[str, ...]
    model: tuple[str, ...]
    model_behind: tuple[str, ...] = ()
    served_name: str
    context: str
    sequences: str
    share: str
    cache_dtype: str
    fp8_cache: str
    parallel: str
    skip_layers: str = ""
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)


_VLLM = Launch(
    name="vllm",
    module="vllm.entrypoints.openai.api_server",
    command=("vllm", "serve"),
    model=("--model",),
    served_name="--served-model-name",
    context="--max-model-len",
    sequences="--max-num-seqs",
    share="--gpu-memory-utilization",
    cache_dtype="--kv-cache-dtype",
    fp8_cache="fp8",
    parallel="--tensor-parallel-size",
    skip_layers="--kv-cache-dtype-skip-layers",  # vLLM 0.32: config/cache.py, layers/attention/attention.py
    environment={"VLLM_NO_USAGE_STATS": "1"},
)
_APHRODITE = replace(  # its options are vLLM's
    _VLLM,
    name="aphrodite",
    module="aphrodite.endpoints.openai.api_server",
    command=("aphrodite", "run"),
    skip_layers="",
    environment={},
)
_SGLANG = Launch(
    name="sglang",
    module="sglang.launch_server",
    command=("python3", "-m", "sglang.launch_server"),
    model=("--model-path",),
    model_behind=("--model-path",),
    served_name="--served-model-name",
    context="--context-length",
    sequences="--max-running-requests",
    share="--mem-fraction-static",
    cache_dtype="--kv-cache-dtype",
    fp8_cache="fp8_e4m3",
    parallel="--tp-size",
)
LAUNCHES: Mapping[str, Launch] = {
    "vllm": _VLLM,
    "vllm-0.24": replace(_VLLM, skip_layers=""),
    "vllm-0.19": replace(_VLLM, skip_layers=""),
    "aphrodite": _APHRODITE,
    "sglang": _SGLANG,
}


def given(option: str, extra: Sequence[str]) -> bool:
    """Whether `extra` has this option: `--name value`, `--name=value`, or with underscores."""
    names = {option, option.replace("-", "_").replace("__", "--", 1)}
    return any(part.split("=", 1)[0] in names for part in extra)


def values_of(option: str, extra: Sequence[str]) -> list[str]:
    """The values that `extra` gives to an option: behind `=`, or up to the next option; the last time it is there."""
    found: list[str] = []
    takes = False
    for part in extra:
        name, equals, value = part.partition("=")
        if given(option, [name]):
            found, takes = [value] if equals else [], not equals
        elif part.startswith("--"):
            takes = False
        elif takes:
            found.append(part)
    return found


def asks_for_fp8_cache(launch: Launch, extra: Sequence[str]) -> bool:
    """Whether `extra` asks the engine for a KV cache in FP8."""
    return any(value.startswith("fp8") for value in values_of(launch.cache_dtype, extra)[:1])


def layers_in_16_bits(launch: Launch, extra: Sequence[str]) -> tuple[int, ...] | None:
    """The layers that `extra` has keep 16 bits beside an FP8 cache; None where it names kinds of layers."""
    values = values_of(launch.skip_layers, extra) if launch.skip_layers else []
    return tuple(map(int, values)) if all(value.isdecimal() for value in values) else None
