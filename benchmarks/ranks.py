"""One process beside several under torchrun: seconds, whether the files are the same, and runs that are killed.

    python ranks.py WORK [--processes 1 2] [--layers 16] [--efforts fast good] [--kills 3]
    python ranks.py WORK --device cpu          # a smoke test on tiny shapes

Writes a dense model of Mistral-Nemo's shape and a mixture of Qwen3-30B-A3B's (128 experts a layer), random weights, and
36 rows of 2,048 random tokens. Each effort runs under each number of processes, imports left out of the seconds, after
a run of a small model that compiles kernels. Files are compared with those of the first number: equal, or the share of
tensors and bytes that differ. Then runs of the exact recipe on all processes are killed, a random process at a random
time, and resumed; their files must be those of an undisturbed run. WORK/ranks.json has it all.
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
import time
from pathlib import Path
from typing import Any

from gpu_speed import NEMO, TINY, Shape, write_weights

HERE = Path(__file__).parent
EXACT = "nvfp4-fp8-hybrid-four-over-six"


def main() -> None:
    """Make the models, run everything, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=16, help="of the dense model")
    parser.add_argument("--mixture-layers", type=int, default=4)
    parser.add_argument("--efforts", nargs="*", default=["fast", "good"])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further run starts")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        run(json.loads(options.step))
        return
    deadline = time.monotonic() + options.budget
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"runs": []}
    rows = make_rows(options)
    models = {"dense": make_dense(options), "mixture": make_mixture(options)}
    recipes = {"dense": "nvfp4-fp8-hybrid", "mixture": "nvfp4-moe"}
    small = write_model(options, "small", TINY.config(2), TINY.tensors(2))
    found["warm_up"] = start(options, max(options.processes), small, "nvfp4-fp8-hybrid", "good", rows, "warm-up")
    say(f"warm-up: {brief(found['warm_up'])}")
    for kind, model in models.items():
        for effort in options.efforts:
            first: dict[str, Any] | None = None
            for count in options.processes:
                if time.monotonic() > deadline:
                    continue
                one = start(options, count, model, recipes[kind], effort, rows, f"{kind}-{effort}-{count}")
                one |= {"model": kind, "effort": effort, "processes": count}
                if first is None:
                    first = one
                elif "seconds" in one and "seconds" in first:
                    one["ratio"] = first["seconds"]["total"] / one["seconds"]["total"]
                    one["differs"] = differences(Path(first["output_dir"]), Path(one["output_dir"]))
                found["runs"].append(one)
                say(f"{kind}, {effort}, {count} processes: {brief(one)}")
                (options.work / "ranks.json").write_text(json.dumps(found, indent=2))
            for count in options.processes:
                shutil.rmtree(options.work / f"{kind}-{effort}-{count}", ignore_errors=True)
    found["kills"] = kills(options, models["dense"], rows, deadline)
    (options.work / "ranks.json").write_text(json.dumps(found, indent=2))
    say(json.dumps(found["kills"]))


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


def make_dense(options: argparse.Namespace) -> Path:
    """A dense model of Mistral-Nemo's shape."""
    shape, layers = shape_of(options), options.layers if options.device == "cuda" else 2
    return write_model(options, "dense", shape.config(layers), shape.tensors(layers))


def make_mixture(options: argparse.Namespace) -> Path:
    """A mixture of Qwen3-30B-A3B's layer shape."""
    large = options.device == "cuda"
    hidden, inner, experts, layers = (2048, 768, 128, options.mixture_layers) if large else (128, 64, 16, 2)
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
    return write_model(options, "mixture", config, tensors)


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


def command(options: argparse.Namespace, count: int, given: dict[str, Any]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    launcher = launcher if count > 1 else [sys.executable]
    return [*launcher, str(HERE / "ranks.py"), str(options.work), "--step", json.dumps(given)]


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
    options: argparse.Namespace, count: int, model: Path, recipe: str, effort: str | None, rows: Path, name: str
) -> dict[str, Any]:
    """Quantize once; what the main process found."""
    shutil.rmtree(options.work / name, ignore_errors=True)
    given = arguments(options, model, recipe, effort, rows, name)
    done = subprocess.run(
        command(options, count, given), check=False, capture_output=True, text=True, env=environment(options)
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": done.stderr[-2000:], "output_dir": given["output_dir"]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result | {"output_dir": given["output_dir"]}


def run(given: dict[str, Any]) -> None:
    """In one process: quantize with everything imported beforehand; the main one prints what it found."""
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
        record = quantize(**given)
        seconds = dict(record.seconds) | {"total": time.perf_counter() - begin}
        peaks = distributed.gather(peak_rss_bytes())
    if int(os.environ.get("RANK", "0")) == 0:
        found = {"seconds": seconds, "trials": [(t.name, t.kl, t.kept) for t in record.trials], "peak_rss": peaks}
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


def kills(options: argparse.Namespace, model: Path, rows: Path, deadline: float) -> list[dict[str, Any]]:
    """Runs of the exact recipe on all processes, of which a random one is killed at a random time, then resumed."""
    count, found, generator = max(options.processes), [], random.Random(0)  # noqa: S311
    begin = time.monotonic()
    start(options, count, model, EXACT, None, rows, "undisturbed")
    length = time.monotonic() - begin
    for number in range(options.kills):
        if time.monotonic() > deadline:
            break
        name = f"killed-{number}"
        given = command(options, count, arguments(options, model, EXACT, None, rows, name))
        shutil.rmtree(options.work / f"{name}.partial", ignore_errors=True)
        process = subprocess.Popen(
            given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(options)
        )
        time.sleep(generator.uniform(0.4, 0.95) * length)
        victims = workers(process.pid)
        if victims:
            os.kill(generator.choice(victims), signal.SIGKILL)
        code = process.wait()
        units = len(list((options.work / f"{name}.partial").rglob("unit-*.json")))
        again = subprocess.run(given, check=False, capture_output=True, text=True, env=environment(options))
        same = None
        if again.returncode == 0:
            same = differences(options.work / "undisturbed", options.work / name)["share_of_bytes"] == 0
        found.append({"first_exit": code, "units_kept": units, "second_exit": again.returncode, "same": same})
        if again.returncode:
            found[-1]["error"] = again.stderr[-500:]
        say(f"kill {number}: {found[-1]}")
        shutil.rmtree(options.work / name, ignore_errors=True)
    return found


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
