"""One process beside several under torchrun: seconds, whether the files are the same, and runs that are killed.

    python ranks.py WORK [--processes 1 2] [--layers 16] [--efforts fast good] [--kills 3]
    python ranks.py WORK --device cpu          # a smoke test on tiny shapes

Writes a dense model of Mistral-Nemo's shape and a mixture of Qwen3-30B-A3B's (128 experts a layer), random weights, and
rows of 2,048 random tokens. Each effort runs under each number of processes, imports left out of the seconds, after
runs of one layer of each that compile kernels. Files are compared with those of the first number: equal, or the share
of tensors and bytes that differ. What `fast` made of the dense model is evaluated under each number of processes.
WORK/NAME.RANK.txt says where the main thread of each process was, sampled 50 times a second.
Then runs on several processes are killed, a random process while a random unit is worked on, and resumed, some by
another number of processes; their files must be those of an undisturbed run. They are of models with smaller layers:
of the exact recipe, or of an effort (--kill-efforts). WORK/ranks.json has it all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_speed import NEMO, TINY, Shape, write_weights

HERE = Path(__file__).parent
RECIPES = {"dense": "nvfp4-fp8-hybrid", "mixture": "nvfp4-moe"}
EXACT = {kind: f"{layout}-four-over-six" for kind, layout in RECIPES.items()}
KILLED = Shape(3072, 8192, 24, 8, 128, 4096, rows=0, length=0)  # Llama-3.2-3B's layers


def main() -> None:
    """Make the models, run everything, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=16, help="of the dense model")
    parser.add_argument("--mixture-layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=36, help="of 2,048 tokens")
    parser.add_argument("--models", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--no-eval", action="store_true")
    parser.add_argument("--efforts", nargs="*", default=["fast", "good"])
    parser.add_argument("--kills", type=int, default=3, help="of each model and effort")
    parser.add_argument("--kill-models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--kill-efforts", nargs="+", choices=["exact", "fast", "good"], default=["exact"])
    parser.add_argument("--kill-layers", type=int, default=8)
    parser.add_argument("--kill-jobs", type=int, default=1, help="killed runs at once")
    parser.add_argument("--threads", type=int, help="of a process (default: all cores, shared out)")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further run starts")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        run(json.loads(options.step))
        return
    options.deadline = time.monotonic() + options.budget
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"runs": [], "evaluations": []}
    rows = make_rows(options)
    made = {"dense": make_dense, "mixture": make_mixture}
    models = {kind: made[kind](options) for kind in options.models}
    found["warm_up"] = [] if options.no_warm_up else warm_up(options, rows)
    for kind, model in models.items():
        for effort in options.efforts:
            side_by_side(options, model, kind, effort, rows, found)
    if options.kills:
        found["kills"] = kills(options, rows)
    write(options, found)
    say(json.dumps(found.get("kills")))


def side_by_side(
    options: argparse.Namespace, model: Path, kind: str, effort: str, rows: Path, found: dict[str, Any]
) -> None:
    """One effort under each number of processes; what is found is added and written."""
    first: dict[str, Any] | None = None
    for count in options.processes:
        if time.monotonic() > options.deadline:
            break
        name = f"{kind}-{effort}-{count}"
        one = start(options, count, model, RECIPES[kind], effort, rows, name)
        one |= {"model": kind, "effort": effort, "processes": count}
        if first is None:
            first = one
        elif "seconds" in one and "seconds" in first:
            one["ratio"] = first["seconds"]["total"] / one["seconds"]["total"]
            one["differs"] = differences(Path(first["output_dir"]), Path(one["output_dir"]))
        found["runs"].append(one)
        say(f"{kind}, {effort}, {count} processes: {brief(one)}")
        write(options, found)
    made = options.work / f"{kind}-{effort}-{options.processes[0]}"
    if kind == "dense" and effort == "fast" and made.exists() and not options.no_eval:
        for count in options.processes:
            found["evaluations"].append(start_eval(options, count, model, made, rows))
            say(f"eval, {count} processes: {json.dumps(found['evaluations'][-1])[:300]}")
        write(options, found)
    for count in options.processes:
        shutil.rmtree(options.work / f"{kind}-{effort}-{count}", ignore_errors=True)


def warm_up(options: argparse.Namespace, rows: Path) -> list[dict[str, Any]]:
    """One layer of each model, at the same time, one on each GPU; kernels stay compiled."""
    shape = replace(shape_of(options), vocabulary=1024)
    config, tensors = shape.config(1), shape.tensors(1)
    models = [
        (write_model(options, "dense-1", config, tensors), RECIPES["dense"]),
        (make_mixture(options, "mixture-1", 1), RECIPES["mixture"]),
    ]

    def one(place: int) -> dict[str, Any]:
        model, recipe = models[place]
        return start(options, 1, model, recipe, "good", rows, f"warm-up-{place}", gpu=place % max(options.processes))

    begin = time.monotonic()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(one, range(len(models))))
    for place, result in enumerate(found):
        say(f"warm-up: {brief(result)}")
        shutil.rmtree(options.work / f"warm-up-{place}", ignore_errors=True)
    say(f"warm-ups took {time.monotonic() - begin:.1f} s with everything")
    return found


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    (options.work / "ranks.json").write_text(json.dumps(found, indent=2))


def make_rows(options: argparse.Namespace) -> Path:
    """Rows of random tokens."""
    generator, shape = random.Random(1), shape_of(options)  # noqa: S311
    count = options.rows if options.device == "cuda" else 16
    rows = [[generator.randrange(3, 1000) for _ in range(shape.length)] for _ in range(count)]
    file: Path = options.work / "rows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def shape_of(options: argparse.Namespace) -> Shape:
    return NEMO if options.device == "cuda" else TINY


def make_dense(options: argparse.Namespace, name: str = "dense", layers: int | None = None) -> Path:
    """A dense model of Mistral-Nemo's shape."""
    shape, layers = shape_of(options), (layers or options.layers) if options.device == "cuda" else 2
    return write_model(options, name, shape.config(layers), shape.tensors(layers))


def make_mixture(
    options: argparse.Namespace, name: str = "mixture", layers: int | None = None, experts: int = 128
) -> Path:
    """A mixture of Qwen3-30B-A3B's layer shape."""
    large = options.device == "cuda"
    hidden, inner, experts, some = (2048, 768, experts, options.mixture_layers) if large else (128, 64, 16, 2)
    layers = layers or some
    config = shape_of(options).config(layers) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 4 * inner,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32 if large else 4,
        "num_key_value_heads": 4 if large else 2,
        "head_dim": 128 if large else 32,
        "vocab_size": 32768 if large else 1024,
    }
    width, queries, keys = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        sizes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_norm": (width,),
            "self_attn.k_norm": (width,),
            "self_attn.q_proj": (queries * width, hidden),
            "self_attn.k_proj": (keys * width, hidden),
            "self_attn.v_proj": (keys * width, hidden),
            "self_attn.o_proj": (hidden, queries * width),
            "mlp.gate": (experts, hidden),
        }
        for expert in range(experts):
            sizes |= {f"mlp.experts.{expert}.{name}_proj": (inner, hidden) for name in ("gate", "up")}
            sizes[f"mlp.experts.{expert}.down_proj"] = hidden, inner
        tensors |= {f"{prefix}{name}.weight": size for name, size in sizes.items()}
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    return write_model(options, name, config, tensors)


def write_model(
    options: argparse.Namespace, name: str, config: dict[str, Any], tensors: dict[str, tuple[int, ...]]
) -> Path:
    import torch

    model: Path = options.work / name
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        write_weights(model, tensors, torch.device(options.device))
        (model / "config.json").write_text(json.dumps(config, indent=2))
    return model


def command(
    options: argparse.Namespace, count: int, given: dict[str, Any], script: Path = HERE / "ranks.py"
) -> list[str]:
    """What runs a step of a script in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    launcher = launcher if count > 1 else [sys.executable]
    return [*launcher, str(script), str(options.work), "--step", json.dumps(given)]


def arguments(
    options: argparse.Namespace, model: Path, recipe: str, effort: str | None, rows: Path, name: str
) -> dict[str, Any]:
    given = {"model": str(model), "recipe": recipe, "effort": effort, "dataset": [str(rows)]}
    limits = {
        "num_samples": max(64, options.rows),
        "max_seq_length": shape_of(options).length,
        "min_tokens_per_expert": 0,
    }
    batch = {} if options.device == "cuda" else {"tokens_per_batch": 2 * shape_of(options).length}
    return given | limits | batch | {"device": options.device, "output_dir": str(options.work / name)}


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The same threads for every number of processes."""
    threads = options.threads or max(1, (os.cpu_count() or 1) // max(options.processes))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def start(
    options: argparse.Namespace,
    count: int,
    model: Path,
    recipe: str,
    effort: str | None,
    rows: Path,
    name: str,
    *,
    gpu: int | None = None,
) -> dict[str, Any]:
    """Quantize once; what the main process found. `gpu`: the only one that is seen."""
    shutil.rmtree(options.work / name, ignore_errors=True)
    given = arguments(options, model, recipe, effort, rows, name)
    found = ask(options, count, {"samples": str(options.work / name), **given}, gpu)
    return found | {"output_dir": given["output_dir"]}


def ask(options: argparse.Namespace, count: int, given: dict[str, Any], gpu: int | None = None) -> dict[str, Any]:
    """What the main of `count` processes prints, and the seconds with everything; or the end of what they complain."""
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    return printed(command(options, count, given), environment(options) | seen)


def printed(given: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """The JSON document that a command prints last, and the seconds with everything; or the end of what it says."""
    begin = time.monotonic()
    done = subprocess.run(given, check=False, capture_output=True, text=True, env=variables)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result | {"with_start": time.monotonic() - begin}


def start_eval(options: argparse.Namespace, count: int, model: Path, made: Path, rows: Path) -> dict[str, Any]:
    """Seconds and figures of `eval` of a result against its original."""
    length = shape_of(options).length
    given = {"models": [str(made)], "reference": str(model), "dataset": [str(rows)], "contexts": [length]}
    batch = {} if options.device == "cuda" else {"tokens_per_batch": 2 * length}
    found = ask(options, count, {"evaluate": given | batch | {"noise_floor": "none", "device": options.device}})
    return {"processes": count, **found}


def run_eval(given: dict[str, Any]) -> None:
    """In one process of `eval`."""
    from snugfit.evaluation.evaluate import evaluate

    begin = time.perf_counter()
    record = evaluate(**given)
    if int(os.environ.get("RANK", "0")) == 0:
        (figures,) = (one for one in record.contexts[0].models if one.kl is not None)
        kl, nll = figures.kl, figures.nll_by_chunk
        seconds = {"total": time.perf_counter() - begin, **record.seconds}
        print(json.dumps({"seconds": seconds, "kl": str(kl), "nll_by_chunk": nll}))


@contextmanager
def sampled(name: str | None) -> Iterator[None]:
    """Note where this thread is, 50 times a second: its innermost four places in snugfit, and in all."""
    if name is None:
        yield
        return
    counts: Counter[str] = Counter()
    ended, thread = threading.Event(), threading.get_ident()

    def watch() -> None:
        while not ended.wait(0.02):
            frame, leaf = sys._current_frames().get(thread), ""
            own: list[str] = []
            while frame is not None and len(own) < 4:
                code = frame.f_code
                place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
                leaf = leaf or place
                own += [place] if "snugfit" in code.co_filename else []
                frame = frame.f_back
            counts[" < ".join([leaf, *own])] += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        lines = [f"{count * 0.02:7.2f} s  {place}" for place, count in counts.most_common(150)]
        Path(f"{name}.{os.environ.get('RANK', '0')}.txt").write_text("\n".join(lines) + "\n")


def run(given: dict[str, Any]) -> None:
    """In one process: quantize with everything imported beforehand; the main one prints what it found."""
    if "evaluate" in given:
        run_eval(given["evaluate"])
        return
    samples = given.pop("samples", None)
    import torch
    import transformers.models.mistral.modeling_mistral
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from snugfit import distributed
    from snugfit.machine import peak_rss_bytes
    from snugfit.quantization.quantize import quantize

    with distributed.joined(given["device"]):
        if given["device"] == "cuda":
            torch.zeros(1, device=f"cuda:{distributed.local_rank()}")
        distributed.barrier()
        begin = time.perf_counter()
        with sampled(samples):
            record = quantize(**given)
        seconds = dict(record.seconds) | {"total": time.perf_counter() - begin}
        peaks, stages = distributed.gather(peak_rss_bytes()), distributed.gather(seconds)
    if int(os.environ.get("RANK", "0")) == 0:
        found = {
            "seconds": seconds,
            "seconds_of_all": stages,
            "trials": [(t.name, t.kl, t.kept) for t in record.trials],
            "peak_rss": peaks,
        }
        print(json.dumps(found | {"peak_gpu": record.peak_gpu_bytes, "estimates": dict(record.estimates)}))


def differences(a: Path, b: Path) -> dict[str, Any]:
    """How many tensors, and what share of the bytes, differ between two results."""
    import torch
    from safetensors import safe_open

    tensors = bad_tensors = total = bad = 0
    for file in sorted(a.glob("*.safetensors")):
        with safe_open(file, "pt") as first, safe_open(b / file.name, "pt") as second:
            for name in first.keys():  # noqa: SIM118
                one, other = (read.get_tensor(name).reshape(-1).view(torch.uint8) for read in (first, second))
                differ = int((one != other).sum()) if one.shape == other.shape else len(one)
                tensors, total, bad = tensors + 1, total + len(one), bad + differ
                bad_tensors += differ > 0
    return {"tensors": tensors, "tensors_that_differ": bad_tensors, "share_of_bytes": bad / max(1, total)}


def kills(options: argparse.Namespace, rows: Path) -> list[dict[str, Any]]:
    """Runs of each model and effort that are killed and resumed, beside an undisturbed one."""
    shape = shape_of(options) if options.device == "cpu" else KILLED
    layers = options.kill_layers if options.device == "cuda" else 4
    tensors = shape.config(layers), shape.tensors(layers)
    make = {
        "dense": lambda: write_model(options, "killed-dense", *tensors),
        "mixture": lambda: make_mixture(options, "killed-mixture", layers, experts=32),
    }
    models = {kind: make[kind]() for kind in options.kill_models}
    kinds = [(kind, effort) for kind in options.kill_models for effort in options.kill_efforts]
    generator = random.Random(0)  # noqa: S311
    chances = [(generator.random(), generator.random()) for _ in range(options.kills)]
    with ThreadPoolExecutor(options.kill_jobs) as pool:
        whole = pool.map(lambda one: undisturbed(options, models[one[0]], one[0], one[1], rows), kinds)
        runs = dict(zip(kinds, whole, strict=True))
        # by turns: another number of processes where the bytes are the same for any
        jobs = [
            (kind, effort, number, *counts_of(options, number, fixed=(kind, effort) == ("dense", "good")), chance)
            for number, chance in enumerate(chances)
            for kind, effort in kinds
        ]
        found = pool.map(lambda job: kill(options, models[job[0]], rows, runs[job[0], job[1]], *job), jobs)
        return [result for result in found if result is not None]


def counts_of(options: argparse.Namespace, number: int, *, fixed: bool) -> tuple[int, int]:
    """How many processes the run has that is killed, and how many the one that resumes it."""
    most, least = max(options.processes), min(options.processes)
    return (most, most) if fixed else [(most, most), (most, least), (least, most)][number % 3]


def of_kill(options: argparse.Namespace, model: Path, kind: str, effort: str, rows: Path, name: str) -> dict[str, Any]:
    exact = effort == "exact"
    return arguments(
        options, model, EXACT[kind] if exact else RECIPES[kind], None if exact else effort, rows, f"{kind}-{name}"
    )


def undisturbed(options: argparse.Namespace, model: Path, kind: str, effort: str, rows: Path) -> dict[str, Any]:
    """A run on all processes: how many units it finishes, and seconds between two of them."""
    given = of_kill(options, model, kind, effort, rows, f"{effort}-undisturbed")
    out = Path(given["output_dir"])
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command(options, max(options.processes), given), stdout=log, stderr=log, env=environment(options)
        )
        units, began = units_until(process, out, None)
        seconds = (time.monotonic() - began) / max(1, units)
        if process.wait():
            log.seek(0)
            say(f"undisturbed {kind} {effort} failed: {log.read()[-1500:]}")
    say(f"undisturbed {kind} {effort}: {units} units, {seconds:.2f} s each")
    return {"units": units, "seconds": seconds, "output_dir": str(out)}


def units_until(process: subprocess.Popen[bytes], out: Path, wanted: int | None) -> tuple[int, float]:
    """Units finished when so many are, or when the process ends; the time when the first file appeared."""
    partial, seen, began = out.with_name(f"{out.name}.partial"), set[Path](), time.monotonic()
    while process.poll() is None:
        if not partial.exists() and not seen:
            began = time.monotonic()
        elif wanted is not None and len(seen) >= wanted:
            break
        with suppress(OSError):  # folders of ways that lost go while they are read
            seen |= set(partial.rglob("unit-*.json"))
        time.sleep(0.005)
    return len(seen), began


def kill(
    options: argparse.Namespace,
    model: Path,
    rows: Path,
    whole: dict[str, Any],
    kind: str,
    effort: str,
    number: int,
    before: int,
    after: int,
    chance: tuple[float, float],
) -> dict[str, Any] | None:
    """One run killed and resumed; whether its files are those of the undisturbed one."""
    if time.monotonic() > options.deadline:
        return None
    given = of_kill(options, model, kind, effort, rows, f"{effort}-killed-{number}")
    out, moment = Path(given["output_dir"]), chance[0] * (whole["units"] - 1)
    commands = command(options, before, given), command(options, after, given)
    found: dict[str, Any] = {"model": kind, "effort": effort, "processes": [before, after], "of_units": whole["units"]}

    def wait(process: subprocess.Popen[bytes]) -> None:
        units_until(process, out, int(moment))
        time.sleep(moment % 1 * min(1.0, whole["seconds"]) / 2)

    one = killed_and_resumed(options, commands, out, wait, chance[1])
    if one.get("ended_before"):  # the rest was quicker than that of the undisturbed run
        moment /= 2
        one = killed_and_resumed(options, commands, out, wait, chance[1])
    found |= one
    found["same"] = None
    if found["second_exit"] == 0:
        found["same"] = differences(Path(whole["output_dir"]), out)["share_of_bytes"] == 0
    say(f"{out.name}: {found}")
    shutil.rmtree(out, ignore_errors=True)
    return found


def killed_and_resumed(
    options: argparse.Namespace,
    commands: tuple[list[str], list[str]],
    out: Path,
    wait: Callable[[subprocess.Popen[bytes]], None],
    victim: float,
) -> dict[str, Any]:
    """One run of which a process is killed when `wait` returns; resumed by the second command."""
    partial = out.with_name(f"{out.name}.partial")
    for folder in (out, partial):
        shutil.rmtree(folder, ignore_errors=True)
    first, second = commands
    process = subprocess.Popen(first, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(options))
    wait(process)
    victims = workers(process.pid) if "torch.distributed.run" in first else [process.pid]
    if victims and process.poll() is None:
        os.kill(victims[int(victim * len(victims))], signal.SIGKILL)
    code = process.wait()
    if out.exists():
        return {"first_exit": code, "ended_before": True, "second_exit": 0}
    units = len(list(partial.rglob("unit-*.json")))
    again = subprocess.run(second, check=False, capture_output=True, text=True, env=environment(options))
    found = {"first_exit": code, "units_kept": units, "second_exit": again.returncode}
    complaint = again.stderr.split("torch.distributed.elastic.multiprocessing.errors")[0]  # torchrun's own follows
    return found | ({"error": complaint[-1500:]} if again.returncode else {})


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def brief(one: dict[str, Any]) -> str:
    if "error" in one:
        return f"failed: {one['error'][-300:]}"
    extra = f", {one['ratio']:.2f} times as fast, {one['differs']}" if "ratio" in one else ""
    return f"{one['seconds']['total']:.2f} s{extra} " + json.dumps(one["seconds"])


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
