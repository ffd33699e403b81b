"""One process beside several under torchrun: seconds, whether the files are the same, and runs that are killed.

    python ranks.py WORK [--processes 1 2] [--layers 16] [--efforts fast good] [--kills 3]
    python ranks.py WORK --device cpu          # a smoke test on tiny shapes

Writes a dense model of Mistral-Nemo's shape and a mixture of Qwen3-30B-A3B's (128 experts a layer), random weights, and
36 rows of 2,048 random tokens. Each effort runs under each number of processes, imports left out of the seconds, after
runs of one layer of each that compile kernels. Files are compared with those of the first number: equal, or the share
of tensors and bytes that differ. What `fast` made of the dense model is evaluated under each number of processes.
`dirtied` are the bytes of pages that the system counted as written, of all processes.
WORK/NAME.RANK.txt says where the main thread of each process was, sampled 50 times a second.
Then runs of the exact recipe on all processes are killed, a random process at a random time, and resumed; their files
must be those of an undisturbed run. WORK/ranks.json has it all.
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
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bytes_written import dirtied
from gpu_speed import NEMO, TINY, Shape, write_weights

HERE = Path(__file__).parent
EXACT = "nvfp4-fp8-hybrid-four-over-six"
RECIPES = {"dense": "nvfp4-fp8-hybrid", "mixture": "nvfp4-moe"}


def main() -> None:
    """Make the models, run everything, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=16, help="of the dense model")
    parser.add_argument("--mixture-layers", type=int, default=4)
    parser.add_argument("--models", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--no-eval", action="store_true")
    parser.add_argument("--efforts", nargs="*", default=["fast", "good"])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--kill-layers", type=int, help="of the dense model that is killed (default: --layers)")
    parser.add_argument("--kill-jobs", type=int, default=1, help="killed runs at once")
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
        layers = options.kill_layers or options.layers
        found["kills"] = kills(options, make_dense(options, f"dense-{layers}", layers), rows)
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
    count = 36 if options.device == "cuda" else 16
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


def make_mixture(options: argparse.Namespace, name: str = "mixture", layers: int | None = None) -> Path:
    """A mixture of Qwen3-30B-A3B's layer shape."""
    large = options.device == "cuda"
    hidden, inner, experts, some = (2048, 768, 128, options.mixture_layers) if large else (128, 64, 16, 2)
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
    limits = {"num_samples": 64, "max_seq_length": shape_of(options).length, "min_tokens_per_expert": 0}
    batch = {} if options.device == "cuda" else {"tokens_per_batch": 2 * shape_of(options).length}
    return given | limits | batch | {"device": options.device, "output_dir": str(options.work / name)}


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The same threads for every number of processes."""
    threads = max(1, (os.cpu_count() or 1) // max(options.processes))
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
        begin, before = time.perf_counter(), dirtied()
        with sampled(samples):
            record = quantize(**given)
        seconds = dict(record.seconds) | {"total": time.perf_counter() - begin}
        peaks, wrote = distributed.gather(peak_rss_bytes()), sum(distributed.gather(dirtied() - before))
    if int(os.environ.get("RANK", "0")) == 0:
        found = {"seconds": seconds, "trials": [(t.name, t.kl, t.kept) for t in record.trials], "peak_rss": peaks}
        found |= {"dirtied": wrote, "peak_gpu": record.peak_gpu_bytes}
        print(json.dumps(found | {"estimates": dict(record.estimates)}))


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


def kills(options: argparse.Namespace, model: Path, rows: Path) -> list[dict[str, Any]]:
    """Runs of the exact recipe on all processes, of which a random one is killed at a random time, then resumed."""
    count, generator = max(options.processes), random.Random(0)  # noqa: S311
    begin = time.monotonic()
    undisturbed = start(options, count, model, EXACT, None, rows, "undisturbed")
    length = time.monotonic() - begin
    say(f"undisturbed: {brief(undisturbed)}")
    # the time until the work begins is mostly imports, and longer where several runs share the machine
    work = undisturbed.get("seconds", {}).get("total", length / 2)
    chosen = [(number, generator.random(), generator.random()) for number in range(options.kills)]

    def one(chance: tuple[int, float, float]) -> dict[str, Any] | None:
        number, moment, victim = chance
        if time.monotonic() > options.deadline:
            return None
        given = arguments(options, model, EXACT, None, rows, f"killed-{number}")
        return kill(options, command(options, count, given), Path(given["output_dir"]), work, (moment, victim))

    with ThreadPoolExecutor(options.kill_jobs) as pool:
        return [result for result in pool.map(one, chosen) if result is not None]


def kill(
    options: argparse.Namespace, given: list[str], out: Path, work: float, chance: tuple[float, float]
) -> dict[str, Any]:
    """One run killed and resumed; whether its files are those of the undisturbed one."""
    found = killed_and_resumed(options, given, out, work, chance)
    found["same"] = None
    if found["second_exit"] == 0:
        found["same"] = differences(options.work / "undisturbed", out)["share_of_bytes"] == 0
    say(f"{out.name}: {found}")
    shutil.rmtree(out, ignore_errors=True)
    return found


def killed_and_resumed(
    options: argparse.Namespace, given: list[str], out: Path, work: float, chance: tuple[float, float]
) -> dict[str, Any]:
    """One run of which a process is killed at a share of its `work` seconds behind its first sign of life; resumed."""
    moment, victim = chance
    partial = out.with_name(f"{out.name}.partial")
    for folder in (out, partial):
        shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(options))
    while not partial.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(moment * work)
    victims = workers(process.pid)
    if victims:
        os.kill(victims[int(victim * len(victims))], signal.SIGKILL)
    code = process.wait()
    units = len(list(partial.rglob("unit-*.json")))
    again = subprocess.run(given, check=False, capture_output=True, text=True, env=environment(options))
    found = {"first_exit": code, "units_kept": units, "second_exit": again.returncode}
    return found | ({"error": again.stderr[-500:]} if again.returncode else {})


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
