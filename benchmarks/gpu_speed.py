"""snugfit and llm-compressor on one GPU, in one run: layers of Mistral Nemo's shape, random weights, random tokens.

    python gpu_speed.py WORK --tokenizer DIR [--layers 8] [--repeats 3] [--llmcompressor-path SITE]
    python gpu_speed.py WORK --tokenizer DIR --layers 40 --only snugfit          # the whole model's size
    python gpu_speed.py WORK --tokenizer DIR --device cpu                        # a smoke test on tiny shapes

Writes the model (random weights cost a tool what real ones cost) and 20 rows of 2,048 tokens; DIR gives the tokenizer
that llm-compressor asks for. Each round then runs every tool in a process of its own, in turns of order: the output of
the last run is removed, what waits for the disk is flushed, and the model is read once, so that every tool finds it in
the page cache. Seconds count from after the imports, the model's own code among them, and from after the CUDA context
exists. The first round is a warm-up: it is kept in the JSON and left out of the table. `--also batched` gives
llm-compressor as many rows a batch as snugfit takes, `--also basic` the whole model on the GPU and one pass over it.

GPU memory is told twice: what torch had allocated at most, and how far the driver's figure for the whole GPU rose over
what it was before the process began, sampled, context and cached blocks included. Main memory is told twice: VmHWM,
which counts mapped pages of the weight files, and without pages of files, sampled. Prints a table; WORK/gpu_speed.json
has it all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
RECIPE = "nvfp4-fp8-hybrid-four-over-six"
LAYOUT = "nvfp4-fp8-hybrid"
SHARD_BYTES = 5_000_000_000
SNUGFIT_TOKENS = 8192  # of a batch, on a GPU
INTERVAL = 0.05


@dataclass(frozen=True)
class Shape:
    """A model's sizes and those of its calibration rows."""

    hidden: int
    mlp: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    rows: int
    length: int

    def tensors(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Every weight of the model, in the order of its files."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocabulary, self.hidden)}
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "input_layernorm": (self.hidden,),
                prefix + "self_attn.q_proj": (queries, self.hidden),
                prefix + "self_attn.k_proj": (keys, self.hidden),
                prefix + "self_attn.v_proj": (keys, self.hidden),
                prefix + "self_attn.o_proj": (self.hidden, queries),
                prefix + "post_attention_layernorm": (self.hidden,),
                prefix + "mlp.gate_proj": (self.mlp, self.hidden),
                prefix + "mlp.up_proj": (self.mlp, self.hidden),
                prefix + "mlp.down_proj": (self.hidden, self.mlp),
            }
        shapes |= {"model.norm": (self.hidden,), "lm_head": (self.vocabulary, self.hidden)}
        return {f"{name}.weight": shape for name, shape in shapes.items()}

    def config(self, layers: int) -> dict[str, Any]:
        """The config of a Mistral of this shape."""
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "sliding_window": None,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


NEMO = Shape(5120, 14336, 32, 8, 128, 131072, rows=20, length=2048)
TINY = Shape(256, 512, 4, 2, 64, 1024, rows=4, length=64)


def main() -> None:
    """Make the model, run all rounds, print."""
    options = parse_arguments()
    shape = TINY if options.device == "cpu" else NEMO
    if options.step == "make":
        print(json.dumps(make(options, shape)))
    elif options.step == "snugfit":
        print(json.dumps(run_snugfit(options, shape)))
    else:
        compare(options, shape)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer.json and its like")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them")
    parser.add_argument("--only", choices=["snugfit", "llm-compressor"])
    parser.add_argument("--also", nargs="*", choices=["batched", "basic"], default=[], help="more of llm-compressor")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, for every tool")
    parser.add_argument("--llmcompressor-python", default=sys.executable)
    parser.add_argument("--llmcompressor-path", help="PYTHONPATH of llm-compressor alone (default: as it is)")
    parser.add_argument(
        "--effort", choices=["fast", "good", "best"], help="snugfit: the layout under it, no exact recipe"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds in which all of it must end")
    parser.add_argument("--json", type=Path, help="default: WORK/gpu_speed.json")
    parser.add_argument("--step", choices=["make", "snugfit"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokenizer is None and options.step is None:
        parser.error("give --tokenizer DIR")
    return options


# one process: make, snugfit


def make(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Write model, rows and tokenizer unless they are there; what they are, and on what machine."""
    import torch

    begin = time.perf_counter()
    model, device = model_path(options), torch.device(options.device)
    work: Path = options.work
    tensors = shape.tensors(options.layers)
    if not (model / "config.json").exists():  # it is written last
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        write_weights(model, tensors, device)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            with suppress(FileNotFoundError):
                shutil.copyfile(options.tokenizer / name, model / name)
        (model / "config.json").write_text(json.dumps(shape.config(options.layers), indent=2), encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, shape.vocabulary, (shape.rows, shape.length), generator=generator).tolist()
    (work / "rows.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    (work / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    gpu = torch.cuda.get_device_properties(0) if device.type == "cuda" else None
    return {
        "layers": options.layers,
        "weights": sum(math.prod(size) for size in tensors.values()),
        "bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "rows": shape.rows,
        "length": shape.length,
        "seconds": time.perf_counter() - begin,
        "gpu": None if gpu is None else gpu.name,
        "gpu_bytes": None if gpu is None else gpu.total_memory,
        "gpu_id": None if gpu is None else f"GPU-{getattr(gpu, 'uuid', '')}",
        "threads": options.threads,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    }


def write_weights(model: Path, tensors: dict[str, tuple[int, ...]], device: Any) -> None:
    """Shards and their index, one tensor in memory at a time."""
    import torch

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if shards[-1] and 2 * sum(map(math.prod, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (model / file).open("wb") as out:
            out.write(header(members))
            for shape in members.values():
                if len(shape) == 1:
                    values = torch.ones(shape, dtype=torch.bfloat16)
                else:
                    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
                    values = values.normal_(0.0, 0.02, generator=generator).cpu()
                out.write(values.view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(members, file)
    total = 2 * sum(map(math.prod, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """The head of a safetensors file of these BF16 tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def run_snugfit(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Quantize once with everything imported and the GPU's context made beforehand."""
    import torch
    import transformers.models.mistral.modeling_mistral  # noqa: F401

    import snugfit.calibration.observers
    import snugfit.data.dataset
    import snugfit.methods.rounding
    import snugfit.model.emulate  # noqa: F401
    from snugfit.machine import peak_rss_bytes
    from snugfit.progress import TerminalProgress
    from snugfit.quantization.quantize import quantize

    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    after_imports = peak_rss_bytes()
    begin, cpu = time.perf_counter(), time.process_time()
    record = quantize(
        model_path(options),
        RECIPE if options.effort is None else LAYOUT,
        output_dir=options.work / "out" / "snugfit",
        dataset=[options.work / "rows.jsonl"],
        num_samples=shape.rows,
        max_seq_length=shape.length,
        device=options.device,
        effort=options.effort,
        progress=TerminalProgress(),
    )
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "seconds": {**record.seconds, "total": seconds},
        "cpu_seconds": cpu,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_after_import_bytes": after_imports,
        "peak_gpu_bytes": record.peak_gpu_bytes,
        "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "files": dict(record.files),
        "estimates": dict(record.estimates),
        "arguments": dict(record.arguments),
        "versions": dict(record.versions),
    }


# all of it: rounds of processes


def compare(options: argparse.Namespace, shape: Shape) -> None:
    """Every tool, round after round; the JSON is written again after each run."""
    work: Path = options.work
    (work / "logs").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget
    made = finish(Process(own(options, "make"), environment(options), work / "logs" / "make", deadline))
    if "error" in made:
        sys.exit(f"making the model failed: {made['error']}")
    say(f"model: {made['bytes'] / 1e9:.2f} GB, made in {made['seconds']:.0f} s")
    runs: dict[str, list[dict[str, Any]]] = {}
    result = {"model": made, "warm_up_rounds": options.warm_up, "runs": runs}
    file = options.json or work / "gpu_speed.json"
    longest = 0.0
    for number in range(options.warm_up + options.repeats):
        begin = time.monotonic()
        if begin + longest > deadline:
            say(f"the budget ends here: {number} rounds of {options.warm_up + options.repeats}")
            break
        commands = list(tools(options, shape).items())
        for name, (command, target) in commands if number % 2 == 0 else reversed(commands):
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir()
            os.sync()
            read_once(model_path(options))
            path = options.llmcompressor_path if name != "snugfit" else None
            log = work / "logs" / f"{name.replace(', ', '-').replace(' ', '-')}-{number}"
            run = finish(Process(command, environment(options, path), log, deadline, made["gpu_id"]))
            run["warm_up"] = number < options.warm_up
            begin_sync = time.perf_counter()
            os.sync()
            run["sync_seconds"] = time.perf_counter() - begin_sync
            run["weight_bytes"] = sum(weights.stat().st_size for weights in target.glob("*.safetensors"))
            if "error" not in run and "files" not in run:
                run["files"] = {weights.name: digest(weights) for weights in sorted(target.glob("*.safetensors"))}
            runs.setdefault(name, []).append(run)
            say(f"round {number}, {name}: " + run.get("error", f"{total(run):.2f} s" if "seconds" in run else ""))
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        longest = max(longest, time.monotonic() - begin)
    print_table(made, runs)
    if any("error" in run for entries in runs.values() for run in entries):
        sys.exit("some runs failed: the logs in WORK tell")


def tools(options: argparse.Namespace, shape: Shape) -> dict[str, tuple[list[str], Path]]:
    """Command and output directory of each tool, by name."""
    work: Path = options.work
    found: dict[str, tuple[list[str], Path]] = {}
    if options.only != "llm-compressor":
        found["snugfit"] = (own(options, "snugfit"), work / "out" / "snugfit")
    if options.only != "snugfit":
        target = work / "out" / "llm-compressor"
        script = [options.llmcompressor_python, str(HERE / "llmcompressor_worker.py"), str(model_path(options))]
        theirs = [*script, str(work / "rows.json"), str(target), "--recipe", RECIPE, "--threads", str(options.threads)]
        rows = ["--batch-size", str(max(1, SNUGFIT_TOKENS // shape.length))]
        place = ["--pipeline", "basic", "--device-map", options.device]
        found["llm-compressor"] = (theirs, target)
        if "batched" in options.also:
            found["llm-compressor, batched"] = ([*theirs, *rows], target)
        if "basic" in options.also:
            found["llm-compressor, basic"] = ([*theirs, *rows, *place], target)
    return found


def own(options: argparse.Namespace, step: str) -> list[str]:
    """This script's own command for a step."""
    script = [sys.executable, str(Path(__file__).resolve()), str(options.work), "--step", step]
    given = ["--layers", str(options.layers), "--device", options.device, "--threads", str(options.threads)]
    effort = [] if options.effort is None else ["--effort", options.effort]
    return [*script, *given, *effort, "--tokenizer", str(options.tokenizer)]


def environment(options: argparse.Namespace, path: str | None = None) -> dict[str, str]:
    """Environment of a process: no network, and no GPU in the smoke test."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if options.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if path is not None:
        variables["PYTHONPATH"] = path
    return variables


@dataclass
class Process:
    """A command that is watched while it runs."""

    command: list[str]
    environment: dict[str, str]
    log: Path
    deadline: float
    gpu_id: str | None = None
    peaks: dict[str, int] = field(default_factory=dict)

    def run(self) -> str:
        """Its standard output; raises where it fails or takes too long."""
        with self.log.with_suffix(".err").open("w", encoding="utf-8") as errors:
            left = self.deadline - time.monotonic()
            gpu = Gpu.open(self.gpu_id)
            with subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=errors, text=True, env=self.environment
            ) as process:
                watch = threading.Thread(target=self._watch, args=(process, gpu), daemon=True)
                watch.start()
                try:
                    out, _ = process.communicate(timeout=None if math.isinf(left) else max(1.0, left))
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
                finally:
                    watch.join(timeout=10)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, self.command)
        return out

    def _watch(self, process: subprocess.Popen[str], gpu: Gpu | None) -> None:
        while process.poll() is None:
            with suppress(OSError, ValueError, KeyError):  # it has none once it has ended
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
                held = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
                self._note("peak_rss_without_files_bytes", 1024 * (int(held["RssAnon"]) + int(held["RssShmem"])))
            if gpu is not None:
                self._note("peak_gpu_driver_bytes", gpu.used() - gpu.before)
                self._note("peak_gpu_process_bytes", gpu.of(process.pid))
            time.sleep(INTERVAL)

    def _note(self, name: str, value: int | None) -> None:
        if value is not None:
            self.peaks[name] = max(value, self.peaks.get(name, 0))


class Gpu:
    """What the driver says of one GPU's memory."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.before = self.used()

    @classmethod
    def open(cls, identity: str | None) -> Self | None:
        """The GPU of that name; None where there is none, or no NVML."""
        if identity is None:
            return None
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            try:
                return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(identity))
            except nvml.NVMLError:
                return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
        except Exception as error:
            say(f"NVML does not answer: {error}")
            return None

    def used(self) -> int:
        """Bytes in use by all processes."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def of(self, pid: int) -> int | None:
        """Bytes in use by a process, where the driver tells."""
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        return next((process.usedGpuMemory for process in running if process.pid == pid), None)


def finish(process: Process) -> dict[str, Any]:
    """Run it; the JSON document it printed last, with the peaks that were seen, or what went wrong."""
    try:
        out = process.run()
        document: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        tail = process.log.with_suffix(".err").read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        print("\n".join(tail), file=sys.stderr)
        return {"error": f"{type(error).__name__}: {' | '.join(tail[-3:])}"}
    return {**document, **process.peaks}


def read_once(model: Path) -> None:
    """Read all weights, so that they are in the page cache."""
    buffer = memoryview(bytearray(1 << 24))
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_path(options: argparse.Namespace) -> Path:
    work: Path = options.work
    return work / f"model-{options.layers}-{options.device}"


# figures


def total(run: dict[str, Any]) -> float:
    return float(run["seconds"]["total"])


def print_table(made: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of the rounds that count; ratios to snugfit, round by round."""
    good = {name: [run for run in entries if "error" not in run] for name, entries in runs.items()}
    counted = {name: [run for run in entries if not run["warm_up"]] or entries for name, entries in good.items()}
    counted = {name: entries for name, entries in counted.items() if entries}
    where = made["gpu"] or "CPU, tiny shapes"
    print(
        f"\n{made['layers']} layers, {made['bytes'] / 1e9:.2f} GB, {made['rows']} x {made['length']} tokens, {where}\n"
    )
    columns = ["s, median (all)", "x snugfit", "GPU GB, torch", "GPU GB, driver", "RSS GB", "without files", "out GB"]
    print("| | " + " | ".join([*columns, "same bytes each time"]) + " |\n|---|" + "---|" * 8)
    base = counted.get("snugfit", [])
    for name, entries in counted.items():
        walls = [total(run) for run in entries]
        spread = f"{statistics.median(walls):.2f} ({', '.join(f'{wall:.2f}' for wall in walls)})"
        ratio = "-"
        if len(base) == len(entries):
            ratios = [wall / total(other) for wall, other in zip(walls, base, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        peaks = [
            gigabytes(entries, key)
            for key in (
                "peak_gpu_bytes",
                "peak_gpu_driver_bytes",
                "peak_rss_bytes",
                "peak_rss_without_files_bytes",
                "weight_bytes",
            )
        ]
        same = "yes" if len({json.dumps(run["files"], sort_keys=True) for run in good[name]}) == 1 else "NO"
        print("| " + " | ".join([name, spread, ratio, *peaks, f"{same} ({len(good[name])})"]) + " |")
    for name, entries in counted.items():
        print(f"\n{name}: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages(entries)) + " s")


def stages(entries: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Median seconds of each stage, and those that the disk needed afterwards."""
    for stage in entries[0]["seconds"]:
        yield stage, statistics.median(run["seconds"].get(stage, 0.0) for run in entries)
    yield "(flush afterwards)", statistics.median(run["sync_seconds"] for run in entries)


def gigabytes(entries: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in entries if run.get(key)]
    return f"{max(values) / 1e9:.2f}" if values else "-"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
