"""Wall time of `quantize` beside the disk's own: reading the source alone, and writing the result's bytes alone.

    python disk_limit.py MODEL WORK [--recipes fp8-dynamic nvfp4-fp8-hybrid] [--device cuda] [--rows rows.jsonl]

Pages of the files are dropped from the cache before each step where that is allowed (root), and everything written is
flushed inside its time. A recipe that follows the effort runs under `fast`. Prints the ratio of a run to the larger of
both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

PIECE, THREADS = 16 << 20, 8


def main() -> None:
    """Measure all steps, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["fp8-dynamic", "nvfp4-fp8-hybrid"])
    parser.add_argument("--device")
    parser.add_argument("--rows", type=Path, help="samples, for recipes that need some")
    options = parser.parse_args()
    from snugfit.quantization.quantize import quantize

    options.work.mkdir(parents=True, exist_ok=True)
    dropped = drop_pages()
    source = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    reading = read_alone(options.model)
    for recipe in options.recipes:
        out = options.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        drop_pages()
        begin = time.perf_counter()
        record = quantize(
            options.model,
            recipe,
            output_dir=out,
            dataset=[options.rows] if options.rows else (),
            device=options.device,
            effort=None if "absmax" in recipe or recipe.startswith("fp8-d") else "fast",
        )
        seconds = time.perf_counter() - begin
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        writing = write_alone(options.work / "bytes", written)
        floor = max(reading, writing)
        line = {"recipe": recipe, "seconds": seconds, "reading": reading, "writing": writing, "ratio": seconds / floor}
        line |= {"source_bytes": source, "bytes": written, "pages_dropped": dropped, "stages": dict(record.seconds)}
        print(json.dumps(line), flush=True)


def drop_pages() -> bool:
    """Have the system forget what it holds of files, if this process may."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    return False


def read_alone(model: Path) -> float:
    """Seconds of reading all weight files."""
    begin = time.perf_counter()
    pieces = [(f, start) for f in sorted(model.glob("*.safetensors")) for start in range(0, f.stat().st_size, PIECE)]
    handles = {file: os.open(file, os.O_RDONLY) for file, _ in pieces}
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda piece: len(os.pread(handles[piece[0]], PIECE, piece[1])), pieces))
    for handle in handles.values():
        os.close(handle)
    return time.perf_counter() - begin


def write_alone(file: Path, size: int) -> float:
    """Seconds of writing and flushing `size` bytes."""
    data = os.urandom(PIECE)
    begin = time.perf_counter()
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda start: os.pwrite(handle, data[: size - start], start), range(0, size, PIECE)))
    os.fsync(handle)
    os.close(handle)
    seconds = time.perf_counter() - begin
    file.unlink()
    return seconds


if __name__ == "__main__":
    main()
