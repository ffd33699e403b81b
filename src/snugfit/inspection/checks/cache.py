"""Faults of an FP8 KV cache that headers show: names that are not read, layers without scales."""

from __future__ import annotations

import re
from collections.abc import Iterator

from snugfit.engines.kv_cache import ATTENTION, has_scales, unknown_scales
from snugfit.errors import UserError
from snugfit.inspection.evidence import READ, Evidence, finding
from snugfit.records.doctor import Finding

# the end of an unknown name that says whether keys or values are scaled
_KIND = re.compile(r"(^|[._])(k|key|keys|v|value|values)([._])", re.ASCII)


def cache_scales(evidence: Evidence) -> Iterator[Finding]:
    """Scales of keys and values under names that are not read, missing, or of a cache that no config declares."""
    layout = evidence.layout
    if not layout.decoder or evidence.dialect not in READ:
        return
    unread = unknown_scales(evidence.checkpoint.tensors, layout.decoder)
    known = renamed_scales(unread, evidence)
    what = (
        f"{unread[0] if unread else ''} seems to scale keys or values, under a name that is not read: vLLM refuses it."
    )
    yield from finding("kv-scale-unread", unread, what, evidence.affected(), repairable=len(known) == len(unread))
    if layout.unreadable is not None:
        return
    try:
        declared = layout.dialect.kv_cache_format()
    except UserError as error:
        yield from finding("quantization-invalid", [evidence.config_file], error.what, evidence.affected())
        return
    missing = layout.cache_without_scales
    if missing and not unread:
        what = f"the config declares an FP8 KV cache: {missing}."
        yield from finding("kv-scale-missing", [layout.decoder], what, evidence.affected())
    prefixes = [f"{layout.decoder}.{number}" for number in range(layout.num_layers)]
    with_scales = [prefix for prefix in prefixes if has_scales(evidence.checkpoint.tensors, prefix)]
    if declared is None and with_scales and not unread:
        what = "the file has scales of keys and values, and the config declares no cache in FP8: they are not used."
        yield from finding("kv-scale-undeclared", with_scales, what, evidence.affected())


def renamed_scales(names: list[str], evidence: Evidence) -> dict[str, str]:
    """Unread scale -> the name under which engines read it, for those whose name says keys or values."""
    found: dict[str, str] = {}
    decoder = evidence.layout.decoder
    for name in names:
        layer, _, rest = name.removeprefix(f"{decoder}.").partition(".")
        below = rest.partition(".")[2]
        match = _KIND.search(below)
        if match is None or evidence.checkpoint.tensors[name].elements != 1:
            continue
        new = f"{decoder}.{layer}.{ATTENTION}.{match[2][0]}_scale"
        if new not in evidence.checkpoint.tensors and new not in found.values():
            found[name] = new
    return found
