"""What servers report of their prefix cache and KV cache at /metrics (Prometheus text), as data.

vLLM's names are those of v1/metrics/loggers.py (0.24 and 0.32), counted in tokens; Aphrodite's are the same with its
own prefix. SGLang's are from its metrics_collector.py (only with --enable-metrics). llama.cpp's server reports neither:
it says how much of a prompt was cached with each answer (`timings.cache_n`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# counters of prompt tokens taken from a cache; of each engine the first that is there
HITS = (
    ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits_total"),
    ("aphrodite:prefix_cache_hits_total", "aphrodite:prefix_cache_hits", "aphrodite:gpu_prefix_cache_hits_total"),
    ("sglang:cached_tokens_total",),
)
# a gauge of the tokens that the KV cache holds
CACHE_TOKENS = ("sglang:max_total_num_tokens",)
# a constant 1 whose labels hold the number of blocks and their size
CACHE_LABELS = ("vllm:cache_config_info", "aphrodite:cache_config_info")

_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})?\s+([-+.\deE]+)(?:\s+\d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def prefix_hits(text: str) -> float | None:
    """Prompt tokens that the server took from its prefix cache since it started; None where it does not report them."""
    found: dict[str, float] = {}
    for name, _, value in _lines(text):
        found[name] = found.get(name, 0.0) + value
    for names in HITS:
        for name in names:
            if name in found:
                return found[name]
    return None


def cache_tokens(text: str) -> int | None:
    """Tokens that the KV cache holds (blocks x tokens of a block); None where the server does not report them."""
    for name, labels, value in _lines(text):
        if name in CACHE_TOKENS and value > 0:
            return int(value)
        if name in CACHE_LABELS:
            blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            if blocks.isdecimal() and size.isdecimal():
                return int(blocks) * int(size)
    return None


def _lines(text: str) -> list[tuple[str, Mapping[str, str], float]]:
    found: list[tuple[str, Mapping[str, str], float]] = []
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.match(line.strip())
        if match:
            try:
                value = float(match[3])
            except ValueError:
                continue
            found.append((match[1], dict(_LABEL.findall(match[2] or "")), value))
    return found
