"""A `FitRecord` in words: the table's cells, the lines below it, and the commands that carry out the answer."""

from __future__ import annotations

from snugfit.engines.memory import GIB, MIB
from snugfit.records.fit import FitCache, FitRecord, FitRow


def fit_title(record: FitRecord) -> str:
    """The model, the GPUs, the engine, and the context."""
    arguments = record.arguments
    gpus = _gpus(record)
    wanted = "the longest context" if record.context is None else f"{record.context:,} tokens"
    wanted += f" in each of {arguments.max_num_seqs} sequences" if arguments.max_num_seqs > 1 else ""
    return f"{record.model} on {gpus}, {record.engine.title}: {wanted}"


def _gpus(record: FitRecord) -> str:
    count = record.arguments.tensor_parallel_size
    return record.gpu.name if count == 1 else f"{count} x {record.gpu.name}"


def fit_headings(record: FitRecord) -> tuple[str, ...]:
    """The table's headings, the first of a column that is aligned to the left."""
    weights = "weights, GiB a GPU" if record.arguments.tensor_parallel_size > 1 else "weights, GiB"
    return "recipe", weights, "bits", "16-bit KV cache", "FP8 KV cache"


def fit_rows(record: FitRecord) -> list[tuple[str, ...]]:
    """The table's rows in the order of the record. The reasons of rows with a problem are in `fit_notes`."""
    return [_cells(record, row) for row in record.rows]


def _cells(record: FitRecord, row: FitRow) -> tuple[str, ...]:
    if row.problem is not None:
        return row.name, "-", "-", "impossible", "impossible"
    caches = [_cache_cell(cache, record.context, record.max_positions) for cache in row.caches]
    return row.name, f"{(row.bytes_per_gpu or 0) / GIB:.2f}", f"{row.bits_per_weight:.2f}", *caches


def _cache_cell(cache: FitCache, context: int | None, max_positions: int) -> str:
    """The longest context, or whether the wanted one fits and what remains or is missing."""
    if not cache.fits:
        more = f", fits {cache.gpus_needed} GPUs" if cache.gpus_needed else ""
        return f"{-cache.headroom_bytes / GIB:,.2f} GiB short{more}"
    if context is not None:
        return f"fits, {cache.headroom_bytes / GIB:,.2f} GiB left"
    return f"{cache.max_context:,} tokens" + (" (all)" if cache.max_context >= max_positions else "")


def fit_notes(record: FitRecord) -> list[str]:
    """The lines below the table: cache, assumptions, kernels, problems, remarks, and the next commands."""
    lines = [*_cache_line(record), _assumptions(record)]
    for generation, attention in record.attention.items():
        labels = dict.fromkeys(label for row in record.rows for label in row.kernels.get(generation, ()))
        kernels = (*labels, f"16-bit cache: {attention.auto}", f"FP8 cache: {attention.fp8}")
        lines.append(f"{generation}: {'; '.join(kernels)}")
        seen = [row.name for row in record.rows if row.loads.get(generation) == "seen"]
        if seen:
            lines.append(f"seen running there: {', '.join(seen)}; the rest is read from the engine's source")
    problems: dict[str, list[str]] = {}
    for row in record.rows:
        if row.problem is not None:
            problems.setdefault(row.problem, []).append(row.name)
    lines += [f"impossible: {', '.join(names)}: {problem}" for problem, names in problems.items()]
    lines += [f"note: {note}" for note in record.notes]
    return lines + _commands(record)


def _cache_line(record: FitRecord) -> list[str]:
    row = next((row for row in record.rows if row.caches), None)
    if row is None:
        return []
    sizes = [f"{cache.bytes_per_token / 1024:,.1f} KiB" for cache in row.caches]
    parts = [f"{sizes[0]} a token in 16 bits, {sizes[1]} in FP8"]
    if record.state_bytes:
        parts.append(f"{record.state_bytes / MIB:,.1f} MiB of states a sequence")
    if record.windows:
        windows = ", ".join(f"{window:,}" for window in record.windows)
        parts.append(f"in addition layers with a window of {windows} tokens")
    return [f"cache: {'; '.join(parts)}; made for {record.max_positions:,} tokens"]


def _assumptions(record: FitRecord) -> str:
    memory = record.memory
    parts = {
        "activations": memory.activation_bytes,
        "graphs and kernels": memory.other_bytes,
        "positions": memory.position_table_bytes,
    }
    sizes = {what: f"{size / GIB:.2f}" for what, size in parts.items()}
    inside = ", ".join(f"{size} for {what}" for what, size in sizes.items() if size != "0.00")
    return (
        f"assumed, GiB: {record.engine.title} may use {memory.share_bytes / GIB:.2f} of the"
        f" {record.gpu.reported_bytes / GIB:.2f} that CUDA reports, less {inside};"
        f" {memory.outside_budget_bytes / GIB:.2f} in addition to its share"
    )


def _commands(record: FitRecord) -> list[str]:
    """How to get what the first row promises; empty where nothing fits, and for engines other than vLLM."""
    row = record.rows[0] if record.rows else None
    cache = None if row is None else next((cache for cache in row.caches if cache.fits), None)
    if cache is None or not record.engine.name.startswith("vllm"):
        return []
    arguments = record.arguments
    target = arguments.model if cache.recipe is None else "OUT"
    options = [f"--max-model-len {record.context or cache.max_context}"]
    if cache.kv_cache == "fp8":
        options.append("--kv-cache-dtype fp8")
    if arguments.tensor_parallel_size > 1:
        options.append(f"--tensor-parallel-size {arguments.tensor_parallel_size}")
    if arguments.gpu_memory_utilization is not None:
        options.append(f"--gpu-memory-utilization {arguments.gpu_memory_utilization:g}")
    make = [f"snugfit quantize {arguments.model} --recipe {cache.recipe} --output-dir OUT"] if cache.recipe else []
    return [f"next: {'; '.join((*make, ' '.join(('vllm serve', target, *options))))}"]
