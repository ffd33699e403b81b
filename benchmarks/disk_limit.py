"""Wall time of `quantize` beside the disk's own: reading the source alone, and writing the result's bytes alone.

    python disk_limit.py MODEL WORK [--recipes fp8-dynamic nvfp4-fp8-hybrid] [--device cuda] [--rows rows.jsonl]
    python disk_limit.py --gigabytes 40 WORK [--tokenizer DIR --llmcompressor-path SITE]

With `--gigabytes` the model is made: layers of Mistral-Nemo's shape, random values of which each tensor has other ones,
and rows of random tokens. Pages of the files leave the cache before each step, and everything written is flushed inside
its time. Kernels are compiled before, on one layer. A recipe that follows the effort runs under `fast`. Prints the
ratio of a run to the larger of both; once also reading and writing at the same time, and with `--direct` both with
O_DIRECT. With `--llmcompressor-path` llm-compressor makes the same of the same files in a process of its own, loaded to
main memory and a layer at a time on the GPU, as its users get it; what it writes is flushed outside its time, and told.
With `--modelopt-path` so does ModelOpt, its layers left on the disk (modelopt_layerwise_worker.py).
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_speed import NEMO, TINY, Shape, header, write_weights

HERE = Path(__file__).parent
PIECE, THREADS = 16 << 20, 8
SHARD_BYTES, POOL_BYTES = 4_000_000_000, 1 << 28
RIVAL_RECIPES = {"fp8-dynamic": "fp8-dynamic"}  # data-free in both tools


def main() -> None:
    """Measure all steps, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("work", type=Path)
    parser.add_argument("--gigabytes", type=float, help="of a model that is made, in place of MODEL")
    parser.add_argument("--recipes", nargs="+", default=["fp8-dynamic", "nvfp4-fp8-hybrid"])
    parser.add_argument("--device")
    parser.add_argument("--rows", type=Path, help="samples, for recipes that need some")
    parser.add_argument("--direct", action="store_true", help="also read and write past the page cache")
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer, which llm-compressor asks for")
    parser.add_argument("--llmcompressor-python", default=sys.executable)
    parser.add_argument("--llmcompressor-path", help="PYTHONPATH of llm-compressor")
    parser.add_argument("--modelopt-path", help="PYTHONPATH of ModelOpt, run by the same Python")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.gigabytes is not None:
        options.model, options.rows = make_model(options)
    files = sorted(options.model.glob("*.safetensors"))
    drop_pages(files)
    say({"source_bytes": sum(file.stat().st_size for file in files), "reading": (reading := read_alone(files))})
    if options.direct:
        drop_pages(files)
        say({"reading_direct": read_alone(files, direct=True)})
    for number, recipe in enumerate(options.recipes):
        measure(options, recipe, files, reading, with_all=number == 0)
    out, threads = options.work / "rival", str(os.cpu_count() or 1)
    for recipe in options.recipes:
        if recipe in RIVAL_RECIPES and options.llmcompressor_path:
            script = [options.llmcompressor_python, "llmcompressor_worker.py", str(options.model), "-", str(out)]
            given = [*script, "--recipe", RIVAL_RECIPES[recipe], "--threads", threads]
            say(rival("llm-compressor", given, options.llmcompressor_path, out, files))
        if recipe in RIVAL_RECIPES and options.modelopt_path:
            script = [options.llmcompressor_python, "modelopt_layerwise_worker.py", str(options.model), str(out)]
            given = [*script, "--recipe", RIVAL_RECIPES[recipe], "--threads", threads]
            say(rival("ModelOpt", given, options.modelopt_path, out, files))


def measure(options: argparse.Namespace, recipe: str, files: list[Path], reading: float, *, with_all: bool) -> None:
    """One recipe beside the writing of its bytes."""
    if options.gigabytes is not None:
        warm_up(options, recipe)
    drop_pages(files)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    line, out = run(options, options.model, recipe), options.work / "out"
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    os.sync()
    target = options.work / "bytes"
    writing = write_alone(target, written)
    line |= {"bytes": written, "reading": reading, "writing": writing, "ratio": line["wall"] / max(reading, writing)}
    if with_all:
        drop_pages(files)
        begin = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(write_alone, target, written)
            read_alone(files)
            writer.result()
        line["reading_and_writing_at_once"] = time.perf_counter() - begin
        if options.direct:
            line["writing_direct"] = write_alone(target, written, direct=True)
    say(line)


def run(options: argparse.Namespace, model: Path, recipe: str) -> dict[str, Any]:
    """Quantize; seconds and peaks."""
    from snugfit.machine import peak_rss_bytes
    from snugfit.quantization.quantize import quantize

    out = options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    record = quantize(
        model,
        recipe,
        output_dir=out,
        dataset=[options.rows] if options.rows else (),
        device=options.device,
        effort=None if "absmax" in recipe or recipe.startswith("fp8-d") else "fast",
    )
    seconds = {"tool": "snugfit", "recipe": recipe, "wall": time.perf_counter() - begin}
    peaks = {"peak_rss": peak_rss_bytes(), "peak_gpu": record.peak_gpu_bytes}
    return seconds | peaks | {"estimates": dict(record.estimates), "stages": dict(record.seconds)}


def warm_up(options: argparse.Namespace, recipe: str) -> None:
    """Compile what one layer needs."""
    import torch

    model, shape = options.work / "one-layer", replace(shape_of(options), vocabulary=1024)
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        write_weights(model, shape.tensors(1), torch.device("cpu"))
        (model / "config.json").write_text(json.dumps(shape.config(1)))
    run(options, model, recipe)


def rival(tool: str, given: list[str], path: str, out: Path, files: list[Path]) -> dict[str, Any]:
    """The same by another tool's script in benchmarks/: its own seconds, those of flushing, and its peaks."""
    shutil.rmtree(out, ignore_errors=True)
    drop_pages(files)
    python, script, *rest = given
    variables = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(HERE / script), *rest], check=False, capture_output=True, text=True, env=variables
    )
    begin = time.perf_counter()
    os.sync()
    flushing = time.perf_counter() - begin
    shutil.rmtree(out, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"tool": tool, "error": done.stderr[-1500:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return {**found, "wall": found["seconds"]["total"], "flushing": flushing}


def shape_of(options: argparse.Namespace) -> Shape:
    """Nemo's, or a tiny one."""
    return TINY if options.tiny else NEMO


def make_model(options: argparse.Namespace) -> tuple[Path, Path]:
    """A model of about so many gigabytes, unless it is there, and rows."""
    shape, model = shape_of(options), options.work / "model"
    outside = 2 * sum(map(math.prod, shape.tensors(0).values()))
    layer = 2 * sum(map(math.prod, shape.tensors(1).values())) - outside
    layers = max(1, round((options.gigabytes * 1e9 - outside) / layer))
    begin = time.perf_counter()
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        write_pool(model, shape.tensors(layers))
        if options.tokenizer is not None:
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                with suppress(FileNotFoundError):
                    shutil.copyfile(options.tokenizer / name, model / name)
        (model / "config.json").write_text(json.dumps(shape.config(layers)))
    generator, rows = random.Random(1), options.work / "rows.jsonl"  # noqa: S311
    lines = ([generator.randrange(3, 1000) for _ in range(shape.length)] for _ in range(shape.rows))
    rows.write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in lines))
    os.sync()
    say({"layers": layers, "made_in": time.perf_counter() - begin})
    return model, rows


def write_pool(model: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Shards and their index by several threads; values come from one pool of random ones, each tensor elsewhere."""
    import torch

    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(POOL_BYTES // 2).normal_(0.0, 0.02, generator=generator).bfloat16()
    pool, ones = numbers.view(torch.uint8).numpy().data, b"\x80\x3f"
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if shards[-1] and 2 * sum(map(math.prod, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape

    def write(number: int) -> str:
        members = shards[number]
        file = model / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        with file.open("wb") as out:
            out.write(header(members))
            for place, shape in enumerate(members.values()):
                left, start = 2 * math.prod(shape), (number * 1009 + place * 101) * 4096 % (POOL_BYTES // 2)
                if len(shape) == 1:
                    out.write(ones * math.prod(shape))
                    continue
                while left:
                    part = min(left, POOL_BYTES - start)
                    out.write(pool[start : start + part])
                    left, start = left - part, (start + 4096 * 17) % (POOL_BYTES // 2)
        return file.name

    with ThreadPoolExecutor(THREADS) as threads:
        names = list(threads.map(write, range(len(shards))))
    weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
    total = 2 * sum(map(math.prod, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_pages(files: list[Path]) -> None:
    """Have the system forget what it holds of files: of all if this process may, else of these, once flushed."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_alone(files: list[Path], *, direct: bool = False) -> float:
    """Seconds of reading all weight files."""
    begin = time.perf_counter()
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, PIECE)]
    handles = {file: os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for file in files}

    def read(mine: list[tuple[Path, int]]) -> None:
        with mmap.mmap(-1, PIECE) as buffer:  # begins at a page, as O_DIRECT wants it
            for file, start in mine:
                os.preadv(handles[file], [buffer], start)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, [pieces[number::THREADS] for number in range(THREADS)]))
    for handle in handles.values():
        os.close(handle)
    return time.perf_counter() - begin


def write_alone(file: Path, size: int, *, direct: bool = False) -> float:
    """Seconds of writing and flushing `size` bytes, with `direct` of whole pages."""
    with mmap.mmap(-1, PIECE) as data:
        data.write(os.urandom(PIECE))
        size = size // mmap.PAGESIZE * mmap.PAGESIZE if direct else size
        begin = time.perf_counter()
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0))
        whole = memoryview(data)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda start: os.pwrite(handle, whole[: size - start], start), range(0, size, PIECE)))
        os.fsync(handle)
        seconds = time.perf_counter() - begin
        os.close(handle)
        whole.release()
    file.unlink()
    return seconds


def say(line: dict[str, Any]) -> None:
    """Print one JSON line at once."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
