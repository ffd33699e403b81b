"""A `FitRecord` in words: the table's cells, the lines under it, the commands that make the answer true."""

from __future__ import annotations

from snugfit.records.fit import FitCache, FitRecord, FitRow

_GIB = 1024**3


def fit_title(record: FitRecord) -> str:
    """The model, where, under what, and what was asked."""
    sequences, tp = record.arguments["sequences"], record.arguments["tp"]
    place = record.gpu["name"] if tp == 1 else f"{tp} x {record.gpu['name']}"
    asked = "the longest context" if record.context is None else f"{record.context:,} tokens"
    asked += f" in each of {sequences} sequences" if sequences > 1 else ""
    return f"{record.model} on {place}, {record.engine['title']}: {asked}"


def fit_headings(record: FitRecord) -> tuple[str, ...]:
    """The table's columns, the first to the left."""
    weights = "weights, GiB a GPU" if record.arguments["tp"] > 1 else "weights, GiB"
    return "recipe", weights, "bits", "16-bit KV cache", "FP8 KV cache"


def fit_rows(record: FitRecord) -> list[tuple[str, ...]]:
    """The table's rows in the order of the record; a recipe that does not suit says so, its reason is in the notes."""
    return [_cells(record, row) for row in record.rows]


def _cells(record: FitRecord, row: FitRow) -> tuple[str, ...]:
    if row.problem is not None:
        return row.name, "-", "-", "does not suit", "does not suit"
    caches = [say_cache(cache, record.context, record.limit) for cache in row.caches]
    return row.name, f"{(row.gpu_bytes or 0) / _GIB:.2f}", f"{row.bits_per_weight:.2f}", *caches


def say_cache(cache: FitCache, context: int | None, limit: int) -> str:
    """The longest context, or whether the asked one fits and what is left or missing."""
    if not cache.fits:
        more = f", {cache.gpus} GPUs do" if cache.gpus else ""
        return f"{-cache.spare_bytes / _GIB:,.2f} GiB short{more}"
    if context is not None:
        return f"fits, {cache.spare_bytes / _GIB:,.2f} GiB left"
    return f"{cache.longest:,} tokens" + (" (all)" if cache.longest >= limit else "")


def fit_notes(record: FitRecord) -> list[str]:
    """The lines under the table: cache, assumptions, kernels, what does not suit, and the commands of the answer."""
    lines = [*_cache_line(record), _assumptions(record)]
    for generation, (plain, fp8) in record.attention.items():
        words = dict.fromkeys(word for row in record.rows for word in row.kernels.get(generation, ()))
        lines.append(f"{generation}: {'; '.join((*words, f'16-bit cache: {plain}', f'FP8 cache: {fp8}'))}")
    reasons: dict[str, list[str]] = {}
    for row in record.rows:
        if row.problem is not None:
            reasons.setdefault(row.problem, []).append(row.name)
    lines += [f"does not suit: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    lines += [f"note: {note}" for note in record.notes]
    return lines + _commands(record)


def _cache_line(record: FitRecord) -> list[str]:
    row = next((row for row in record.rows if row.caches), None)
    if row is None:
        return []
    sizes = [f"{cache.bytes_per_token / 1024:,.1f} KiB" for cache in row.caches]
    parts = [f"{sizes[0]} a token in 16 bits, {sizes[1]} in FP8"]
    if record.state_bytes:
        parts.append(f"{record.state_bytes / 1024**2:,.1f} MiB of states a sequence")
    if record.windows:
        parts.append(f"besides layers that see {', '.join(f'{window:,}' for window in record.windows)} tokens")
    return [f"cache: {'; '.join(parts)}; made for {record.limit:,} tokens"]


def _assumptions(record: FitRecord) -> str:
    memory = {name: f"{size / _GIB:.2f}" for name, size in record.memory.items()}
    inside = [(memory["activations"], "activations"), (memory["besides"], "graphs and kernels")]
    inside.append((memory["positions"], "positions"))
    parts = ", ".join(f"{size} for {what}" for size, what in inside if size != "0.00")
    return (
        f"assumed, GiB: {record.engine['title']} has {memory['share']} of the"
        f" {record.gpu['reported_bytes'] / _GIB:.2f} that CUDA reports, {parts} go off; {memory['outside']} outside"
    )


def _commands(record: FitRecord) -> list[str]:
    """How to get what the first row promises; nothing where nothing fits, or under an engine without such a command."""
    row = record.rows[0] if record.rows else None
    cache = None if row is None else next((cache for cache in row.caches if cache.fits), None)
    if cache is None or record.engine["sharing"] != "share" or not record.engine["name"].startswith("vllm"):
        return []
    target = record.arguments["model"] if cache.recipe is None else "OUT"
    options = [f"--max-model-len {record.context or cache.longest}"]
    if cache.kv_cache == "fp8":
        options.append("--kv-cache-dtype fp8")
    if record.arguments["tp"] > 1:
        options.append(f"--tensor-parallel-size {record.arguments['tp']}")
    if record.arguments["utilization"] is not None:
        options.append(f"--gpu-memory-utilization {record.arguments['utilization']:g}")
    make = [f"snugfit quantize {record.arguments['model']} --recipe {cache.recipe} -o OUT"] if cache.recipe else []
    return [f"next: {'; '.join((*make, ' '.join(('vllm serve', target, *options))))}"]
