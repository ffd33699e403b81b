"""snugfit and its rivals on the same calibration rows, into files of the same bytes and layout, and each file's KL.

    python versus_rivals.py MODEL WORK --calibration A.txt B.txt --evaluation C.txt D.txt --device cuda
           --llmcompressor-path SITE --autoround-path SITE --modelopt-path SITE [--only NAME ...] [--budget SECONDS]

The layout is nvfp4-fp8-hybrid: NVFP4 in the MLP, FP8 in attention, inputs rounded as they arrive. Every tool runs in a
process of its own, one after the other on the same device, under --timeout; its PYTHONPATH is the folder given for it
(a tool without one is left out), what it says goes to WORK/logs/NAME.log. Seconds count from after the imports and
after the GPU's context exists, to the written file. auto-round and ModelOpt write no such mix: the MLP of their file is
put into the file of snugfit's exact recipe, after a look that they left the norms alone; attention costs them no
seconds. snugfit's `good` and `best` hold out an eighth of the same rows for their gate.

Then every file runs on every text of --evaluation, under the arithmetic of inputs of every target (snugfit's efforts
are made for each target, all others once). Prints the table of bytes and seconds, and the one of KL with paired ratios
to --base. What is finished is kept in WORK: the same call goes on where --budget seconds ended the last one; what
failed or ran over its time is tried again only with --retry.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kl_table import evaluated, figures_of, print_table, with_ratio

HERE = Path(__file__).parent
LAYOUT, EXACT = "nvfp4-fp8-hybrid", "snugfit-four-over-six"
EFFORTS = ("good", "best")
LLMCOMPRESSOR = {
    "gptq": "hybrid-gptq",
    "awq": "hybrid-awq",
    "expanded-mse": "hybrid-expanded",
    "absmax": "hybrid-absmax",
}
MODELOPT_SCALES = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
MLP_ONLY = ("auto-round", "auto-round-rtn", "modelopt-local-hessian")
LEAST_SECONDS = 30  # nothing is started with less left


@dataclass(frozen=True)
class Entrant:
    """One file: how it is made, and under which target it is measured (None: all)."""

    name: str
    command: list[str]
    path: str | None  # PYTHONPATH; None: this process's own
    target: str | None = None
    only_mlp: bool = False


def main() -> None:
    """Make the files that are missing, measure them, print."""
    options = parse_arguments()
    if options.worker:
        print(json.dumps(run_snugfit(options)))
        return
    begin = time.monotonic()
    work: Path = options.work
    (work / "logs").mkdir(parents=True, exist_ok=True)
    write_rows(options)
    state = load_state(options)
    for entrant in entrants(options):
        left = options.budget - (time.monotonic() - begin)
        if left < LEAST_SECONDS:
            break
        make(entrant, options, state, left)
        save_state(options, state)
    for target in options.targets:
        for text in options.evaluation:
            if options.budget - (time.monotonic() - begin) >= LEAST_SECONDS:
                measure(options, state, target, text)
                save_state(options, state)
    print_made(state)
    print_table(ratios(options, state))
    missing = [one.name for one in entrants(options) if one.name not in state["made"]]
    unmeasured = [key for key in wanted_figures(options, state) if key not in state["figures"]]
    print(f"\nnot made yet: {missing or 'none'}; not measured yet: {unmeasured or 'none'}")


def entrants(options: argparse.Namespace) -> list[Entrant]:
    """All that was asked for, in the order in which it runs: what costs most, last."""
    rows = str(options.work / "rows.json")
    threads = ["--threads", str(options.threads)]
    found = [snugfit_entrant(options, EXACT, None, None)]
    found += [snugfit_entrant(options, f"snugfit-good-{t}", "good", t) for t in options.targets]
    if options.llmcompressor_path is not None:
        for name in LLMCOMPRESSOR:
            out = str(options.work / f"llm-compressor-{name}")
            script = [sys.executable, str(HERE / "llmcompressor_worker.py"), str(options.model), rows, out]
            more = ["--recipe", f"hybrid-{name}", "--batch-size", str(options.batch_size), *threads]
            found.append(Entrant(f"llm-compressor-{name}", [*script, *more], options.llmcompressor_path))
    for method in MLP_ONLY:
        path = options.modelopt_path if method.startswith("modelopt") else options.autoround_path
        if path is None:
            continue
        script = [sys.executable, str(HERE / "nvfp4_mlp_worker.py"), str(options.model), rows]
        script += [str(options.work / f"{method}.own"), "--method", method, "--device", options.device, *threads]
        if options.steps is not None:
            script += ["--steps", str(options.steps)]
        found.append(Entrant(method, script, path, only_mlp=True))
    found += [snugfit_entrant(options, f"snugfit-best-{t}", "best", t) for t in options.targets]
    return [one for one in found if not options.only or one.name in (*options.only, EXACT)]


def snugfit_entrant(options: argparse.Namespace, name: str, effort: str | None, target: str | None) -> Entrant:
    """One of ours, which calls this script again."""
    command = [sys.executable, __file__, str(options.model), str(options.work), "--worker", name]
    command += ["--device", options.device, "--threads", str(options.threads)]
    command += ["--num-samples", str(options.num_samples), "--max-seq-length", str(options.max_seq_length)]
    if effort is not None and target is not None:
        command += ["--effort", effort, "--targets", target]
    command += ["--calibration", *map(str, options.calibration), "--evaluation", *map(str, options.evaluation)]
    return Entrant(name, command, None, target)


# the parts of a run


def write_rows(options: argparse.Namespace) -> None:
    """The calibration rows, once: for the rivals as one JSON file, for snugfit as one file of rows for each text."""
    from snugfit.data.dataset import load_dataset

    if (options.work / "rows.json").exists():
        return
    dataset = load_dataset(
        options.model,
        options.calibration,
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
        shuffle_seed=0,
    )
    start = 0
    for file, count in zip(rows_files(options), dataset.shares, strict=True):
        rows = dataset.samples[start : start + count]
        file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
        start += count
    (options.work / "rows.json").write_text(json.dumps({"rows": dataset.samples}), encoding="utf-8")


def rows_files(options: argparse.Namespace) -> list[Path]:
    return [options.work / f"rows-{number}-{file.stem}.jsonl" for number, file in enumerate(options.calibration)]


def run_snugfit(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize once with everything imported and the GPU's context made beforehand."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  # the rivals' import of it is left out too

    import snugfit.evaluation.evaluate
    import snugfit.methods.rounding
    import snugfit.model.emulate  # noqa: F401
    from snugfit.progress import TerminalProgress
    from snugfit.quantization.quantize import quantize

    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    begin = time.perf_counter()
    exact = {} if options.effort is None else {"effort": options.effort, "target": options.targets[0]}
    record = quantize(
        options.model,
        f"{LAYOUT}-four-over-six" if options.effort is None else LAYOUT,
        output_dir=options.work / options.worker,
        dataset=rows_files(options),
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
        device=options.device,
        progress=TerminalProgress(),
        **exact,
    )
    seconds = time.perf_counter() - begin
    kept = [trial.name for trial in record.trials if trial.kept]
    return {"seconds": {"total": seconds}, "peak_gpu_bytes": record.peak_gpu_bytes, "kept": kept}


def make(entrant: Entrant, options: argparse.Namespace, state: dict[str, Any], left: float) -> None:
    """Run one tool unless its file is there; the outcome goes into `state`, errors too."""
    before = state["made"].get(entrant.name)
    if before is not None and not (options.retry and "error" in before):
        return
    out: Path = options.work / entrant.name
    own = options.work / f"{entrant.name}.own" if entrant.only_mlp else out
    for leftover in {own, out, out.with_name(out.name + ".partial")}:
        shutil.rmtree(leftover, ignore_errors=True)
    seconds = min(options.timeout, left)
    print(f"{entrant.name}: at most {seconds:.0f} s", flush=True)
    log: Path = options.work / "logs" / f"{entrant.name}.log"
    try:
        made = run_tool(entrant, log, seconds)
        if entrant.only_mlp:
            put_mlp(own, options.work / EXACT, out)
        made["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    except subprocess.TimeoutExpired:
        if seconds < options.timeout:
            print(f"{entrant.name}: the budget ended it; the next call starts it again", flush=True)
            return
        made = {"error": f"more than {seconds:.0f} s"}
    except Exception as error:  # whatever happens to one, the others run
        made = {"error": f"{type(error).__name__}: {error}"}
    if "error" in made:
        shutil.rmtree(out, ignore_errors=True)
        tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        print(f"{entrant.name} FAILED: {made['error']}\n{tail}", flush=True)
    else:
        print(f"{entrant.name}: {made['seconds']}, {made['bytes']} bytes", flush=True)
    state["made"][entrant.name] = made


def run_tool(entrant: Entrant, log: Path, seconds: float) -> dict[str, Any]:
    """The JSON line of one tool, and how long its process took. RuntimeError or TimeoutExpired if it came to none."""
    environment = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if entrant.path is not None:
        environment["PYTHONPATH"] = entrant.path
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        ended = subprocess.run(
            entrant.command,
            check=False,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=seconds,
        )
    if ended.returncode:
        raise RuntimeError(f"ended with {ended.returncode}")
    made: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return made | {"process_seconds": time.monotonic() - begin}


def put_mlp(own: Path, base: Path, out: Path) -> None:
    """The file at `base` with the NVFP4 MLP of the file at `own`; all tensors of one shard.

    Refuses a file whose other weights are not the original's, for then its MLP belongs to other norms.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    theirs: dict[str, Any] = {}
    for file in own.rglob("*.safetensors"):  # auto-round makes a folder in it
        theirs |= load_file(file)
    shutil.copytree(base, out)
    (shard,) = out.glob("*.safetensors")
    tensors = load_file(shard)
    with safe_open(shard, "pt") as handle:
        notes = handle.metadata()
    for name, tensor in tensors.items():
        if ".mlp." in name:
            new = _as_compressed_tensors(name, theirs).reshape(tensor.shape)
            if new.dtype != tensor.dtype:
                raise TypeError(f"{name}: {new.dtype}, not {tensor.dtype}")
            tensors[name] = new.contiguous()
        elif name.endswith("norm.weight") and not torch.equal(tensor.float(), theirs[name].float()):
            raise ValueError(f"{name} was changed")
    save_file(tensors, shard, metadata=notes)


def _as_compressed_tensors(name: str, theirs: dict[str, Any]) -> Any:
    """The tensor under its compressed-tensors name; ModelOpt has other names and global scales that multiply."""
    if name in theirs:
        return theirs[name]
    module, _, part = name.rpartition(".")
    if part == "weight_packed":
        return theirs[f"{module}.weight"]
    return (
        1 / theirs[f"{module}.{ {'weight_global_scale': 'weight_scale_2', 'input_global_scale': 'input_scale'}[part] }"]
    )


def measure(options: argparse.Namespace, state: dict[str, Any], target: str, text: Path) -> None:
    """The figures of all files of this target on this text that have none yet."""
    names = [
        key.split("|")[2]
        for key in wanted_figures(options, state)
        if key.startswith(f"{target}|{text.name}|") and key not in state["figures"]
    ]
    if not names:
        return
    record = evaluated(
        [options.work / name for name in names],
        options.model,
        [text],
        [options.max_seq_length],
        target=target,
        max_tokens=options.max_tokens,
        device=options.device,
    )
    for name, model in zip(names, record.contexts[0].models[1:], strict=True):
        state["figures"][f"{target}|{text.name}|{name}"] = figures_of(model)
        print(f"{target} {text.name} {name}: KL {model.kl and model.kl.mean:.4f}", flush=True)


def wanted_figures(options: argparse.Namespace, state: dict[str, Any]) -> list[str]:
    """Keys (target|text|file) of the figures that the files made so far can have."""
    made = [one for one in entrants(options) if "error" not in state["made"].get(one.name, {"error": ""})]
    return [
        f"{target}|{text.name}|{one.name}"
        for target in options.targets
        for text in options.evaluation
        for one in made
        if one.target in (None, target)
    ]


def ratios(options: argparse.Namespace, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: every figure with its ratio to that of --base (the exact recipe's where that is missing)."""
    rows = []
    for target in options.targets:
        for text in options.evaluation:
            found = {name: state["figures"].get(f"{target}|{text.name}|{name}") for name in state["made"]}
            measured = {name: figures for name, figures in found.items() if figures is not None}
            base = measured.get(options.base, measured.get(EXACT))
            head = {"target": target, "context": options.max_seq_length, "text": text.name}
            if base is not None:
                rows += [{**head, "file": name, **with_ratio(one, base)} for name, one in measured.items()]
    return rows


def print_made(state: dict[str, Any]) -> None:
    """Seconds and bytes of every file, and what failed."""
    print(f"\non {state['device']}\n\n| file | s | process s | GPU GB | bytes | |\n|---|---|---|---|---|---|")
    for name, made in state["made"].items():
        if "error" in made:
            print(f"| {name} | - | - | - | - | {made['error']} |")
            continue
        gpu = (made.get("peak_gpu_bytes") or 0) / 1e9
        times = f"{made['seconds']['total']:.1f} | {made['process_seconds']:.1f}"
        print(f"| {name} | {times} | {gpu:.2f} | {made['bytes']} | {' '.join(made.get('kept', []))} |")


def load_state(options: argparse.Namespace) -> dict[str, Any]:
    """What earlier calls left in WORK/rivals.json."""
    file: Path = options.work / "rivals.json"
    if file.exists():
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return state
    import torch

    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {"device": name, "made": {}, "figures": {}}


def save_state(options: argparse.Namespace, state: dict[str, Any]) -> None:
    (options.work / "rivals.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=32768, help="of each text, to evaluate on")
    parser.add_argument("--targets", nargs="+", default=["vllm-blackwell", "marlin"])
    parser.add_argument("--llmcompressor-path", help="PYTHONPATH with llm-compressor (colons between folders)")
    parser.add_argument("--autoround-path", help="PYTHONPATH with auto-round")
    parser.add_argument("--modelopt-path", help="PYTHONPATH with ModelOpt")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a forward of llm-compressor")
    parser.add_argument("--steps", type=int, help="of auto-round, a layer (default: its own)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, for every tool")
    parser.add_argument("--base", default="llm-compressor-gptq", help="the file whose KL is 1.00x")
    parser.add_argument("--only", nargs="*", default=[], help="names of files; the exact recipe's is always made")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one tool")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which nothing more is started")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--effort", choices=EFFORTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
