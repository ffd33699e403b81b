"""Which kernels an engine chose, read from its own log.

vLLM logs each choice once, in a line such as

    (EngineCore pid=207) INFO 04-19 10:19:23 [__init__.py:683] Using FlashInferCutlassNvFp4LinearKernel for NVFP4 GEMM

The patterns below are made from its log calls, 0.19 to 0.32; other lines are skipped. A choice that vLLM does not log,
such as attention on a CPU or linear layers that are not quantized, is not reported here either.
"""

from __future__ import annotations

import re
from pathlib import Path

from snugfit.errors import UserError
from snugfit.records.evaluation import KernelReport
from snugfit.records.serve import ServeTaken

ENGINE = re.compile(r"LLM engine \(v([^)\s]+)\) with config: (.*)")
VERSION = re.compile(r"(?:\[api_(?:server|utils)\.py:\d+\]|vLLM API server).*\bversion (\d[\w.+]*)")
SETTING = re.compile(r"\b(quantization|kv_cache_dtype)=([^,\s]+)")
KV_CACHE = re.compile(r"Using (\S+) data type to store kv cache")
PATTERNS = {  # a line belongs to the first kind with a pattern that matches it
    "moe": (
        re.compile(r"Using ([\w' ]+?) M[oO]E(?: LoRA)? backend\b"),
        re.compile(r"Using ((?:[\w-]+ ){1,3}for \w+) MoE\b"),
        re.compile(r"Using (\w*Experts\w*|\w+MoEMethod)(?:\s|$)"),
    ),
    "linear": (
        re.compile(r"Selected (\w+ for \w+)"),
        re.compile(r"Using (?:NvFp4LinearBackend\.)?([\w-]+ for [A-Z]+\d+ GEMM)"),
        re.compile(r"Using (\w+Kernel for (?:mixed-precision linear|\w+))"),
    ),
    "attention": (
        re.compile(r"Using (\w+) attention backend out of potential backends"),
        re.compile(r"Using AttentionBackendEnum\.(\w+) backend\."),
        re.compile(
            r"Using (?!Transformers|\w+ ReplaySSM)(\w+(?: (?!attention)\w+)?(?: MLA prefill)?)(?: attention)? backend\."
        ),
        re.compile(r"Using (FlashAttention version \d+)"),
        re.compile(r"Using (TRTLLM (?:\w+ )?attention) \("),
        re.compile(r"Using (\S+ GDN prefill kernel)"),
    ),
}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
GENERIC = " for mixed-precision linear"


def read_log(path: Path) -> str:
    """The text of a server's log; UserError for a file that cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}).",
            code="file-unreadable",
            where=str(path),
            remedy="Give the server's log as `server_log`, or leave it out.",
        ) from None


def kernels_from_log(text: str) -> KernelReport:
    """The choices in the log of one start of vLLM, or in `Server.config_text`; an empty, false report without any."""
    settings: dict[str, str] = {}
    chosen: dict[str, dict[str, None]] = {kind: {} for kind in PATTERNS}
    for line in COLOUR.sub("", text).splitlines():
        if engine := ENGINE.search(line):
            for name, value in [("version", engine[1]), *SETTING.findall(engine[2])]:
                settings.setdefault(name, value)
        elif version := VERSION.search(line):
            settings.setdefault("version", version[1])
        elif dtype := KV_CACHE.search(line):
            settings["kv_cache_dtype"] = dtype[1]
        elif choice := _choice(line):
            chosen[choice[0]][choice[1]] = None
    linear = tuple(chosen["linear"])
    named = {entry.split(" for ")[0] for entry in linear if not entry.endswith(GENERIC)}
    return KernelReport(
        engine_version=settings.get("version"),
        quantization=_value(settings, "quantization"),
        kv_cache_dtype=_value(settings, "kv_cache_dtype"),
        attention=tuple(chosen["attention"]),
        linear=tuple(entry for entry in linear if not entry.endswith(GENERIC) or entry.split(" for ")[0] not in named),
        moe=tuple(chosen["moe"]),
    )


def _choice(line: str) -> tuple[str, str] | None:
    """The kind of kernel that a line reports, and its name; None for other lines."""
    for kind, patterns in PATTERNS.items():
        for pattern in patterns:
            if found := pattern.search(line):
                return kind, found[1].replace("'", "")
    return None


def _value(settings: dict[str, str], name: str) -> str | None:
    value = settings.get(name, "None").strip("'\"")
    return None if value == "None" else value


# figures of memory in the logs of vLLM (0.19 to 0.32; Aphrodite's are the same) and of SGLang 0.5; the last line counts
_GIB_FIGURES = {
    "weight_bytes": (
        re.compile(r"Model loading took ([\d.]+) Gi?B"),
        re.compile(r"Load weight end\..*mem usage=([\d.]+) GB"),
    ),
    "cache_bytes": (re.compile(r"Available KV cache memory: ([\d.]+) GiB"),),
    "graph_bytes": (
        re.compile(r"Graph capturing finished in .*took (-?[\d.]+) GiB"),
        re.compile(r"Capture cuda graph end\..*mem usage=([\d.]+) GB"),
    ),
}
_TOKENS = (re.compile(r"KV cache size: ([\d,]+) tokens"), re.compile(r"\bmax_total_num_tokens=(\d+)"))


def memory_from_log(text: str) -> ServeTaken:
    """The memory that an engine says it took; None for what its log does not say."""
    lines = COLOUR.sub("", text)
    sizes = {name: _last(patterns, lines) for name, patterns in _GIB_FIGURES.items()}
    tokens = _last(_TOKENS, lines)
    return ServeTaken(
        **{name: None if value is None else int(float(value) * 1024**3) for name, value in sizes.items()},
        cache_tokens=None if tokens is None else int(tokens.replace(",", "")),
    )


def _last(patterns: tuple[re.Pattern[str], ...], text: str) -> str | None:
    """What the first pattern with a match finds last."""
    for pattern in patterns:
        if found := pattern.findall(text):
            return str(found[-1])
    return None
