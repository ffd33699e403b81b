"""What `eval` costs on a GPU, as a multiple of the plain BF16 forward of the same tokens with the head, in one run.

    python eval_gpu.py WORK --tokenizer DIR --text FILE [--kind dense|mixture] [--tokens 32768] [--context 512]

Writes a model with random weights (1.5B of Qwen2's shape, or a mixture of 370M), quantizes it, and measures in turns:
the forward of the original in transformers, whole on the GPU; `evaluate` of the original alone; and with the candidate,
for each engine profile. Seconds of `evaluate` are those of its walk, heads and reduction; CPU seconds are the
process's. With `--profile`, prints the functions that cost most. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import shutil
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import snugfit

PROFILES = ("vllm-blackwell", "marlin", "none")
RECIPES = {"dense": "nvfp4-fp8-hybrid-four-over-six", "mixture": "nvfp4-moe-four-over-six"}


def write_model(kind: str, target: Path, tokenizer: Path) -> None:
    """A model directory with random weights and the tokenizer of `tokenizer`."""
    torch, transformers = import_module("torch"), import_module("transformers")
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    shared: dict[str, Any] = {"vocab_size": vocabulary, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    if kind == "dense":
        config = transformers.Qwen2Config(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            **shared,
        )
    else:
        config = transformers.Qwen3MoeConfig(
            hidden_size=576,
            intermediate_size=1536,
            moe_intermediate_size=768,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            num_experts=8,
            num_experts_per_tok=2,
            **shared,
        )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, target / name)


def plain_forward(model: Any, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds and CPU seconds of one forward over the tokens, head included, four rows a batch."""
    torch = import_module("torch")
    rows = torch.randint(0, model.config.vocab_size, (options.tokens // options.context, options.context))
    torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for batch in rows.to("cuda").split(4):
            model(input_ids=batch, use_cache=False)
    torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def timed(call: Callable[[], snugfit.EvalRecord]) -> tuple[float, float, float]:
    """Seconds of the measuring, seconds and CPU seconds of the whole call."""
    start, cpu = time.perf_counter(), time.process_time()
    record = call()
    return record.seconds["measure"], time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """Make the files, measure in turns, print."""
    parser = argparse.ArgumentParser(description="What `eval` costs on a GPU.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kind", choices=sorted(RECIPES), default="dense")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch, transformers = import_module("torch"), import_module("transformers")
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.work / options.kind
    candidate = options.work / f"{options.kind}-{RECIPES[options.kind]}"
    if not source.exists():
        write_model(options.kind, source, options.tokenizer)
    if not candidate.exists():
        start = time.perf_counter()
        snugfit.quantize(
            source, RECIPES[options.kind], output_dir=candidate, dataset=[options.text], max_seq_length=512
        )
        print(f"quantized in {time.perf_counter() - start:.1f} s", flush=True)

    def run(models: list[Path], profile: str) -> snugfit.EvalRecord:
        return snugfit.evaluate(
            models,
            reference=source,
            dataset=[options.text],
            contexts=[options.context],
            max_tokens=options.tokens,
            noise_floor="none",
            activations=profile,
            device="cuda",
        )

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to("cuda").eval()
    cases: dict[str, Callable[[], tuple[float, ...]]] = {"plain forward": lambda: plain_forward(model, options)}
    cases["reference alone"] = lambda: timed(lambda: run([], PROFILES[0]))
    for profile in PROFILES:
        cases[profile] = lambda profile=profile: timed(lambda: run([candidate], profile))  # type: ignore[misc]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    for name, case in cases.items():
        print(f"warm-up of {name}: {case()[0]:.2f} s", flush=True)
    for _ in range(options.repeats):
        for name, case in cases.items():
            found[name].append(case())
    plain = statistics.median(times[0] for times in found["plain forward"])
    print("| run | seconds | x plain forward | CPU seconds / seconds of the call |\n|---|---|---|---|")
    for name, times in found.items():
        seconds = statistics.median(run[0] for run in times)
        load = statistics.median(run[-1] / run[-2] for run in times)
        print(f"| {name} | {seconds:.2f} | {seconds / plain:.2f} | {load:.2f} |")
    if options.profile:
        profiler = cProfile.Profile()
        profiler.runcall(run, [candidate], PROFILES[0])
        pstats.Stats(profiler).sort_stats("tottime").print_stats(22)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "kind": options.kind, "runs": found}))


if __name__ == "__main__":
    main()
