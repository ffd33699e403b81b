"""Bytes that `quantize --effort good` writes, of this checkout and of others, in turn.

    python benchmarks/bytes_written.py WORK [--model MODEL] [--sources SRC ...] [--rounds 2]

`--sources` are `src` folders of checkouts, by default this one's. Without `--model` a dense model is made whose
embeddings and head are larger than its layers, with random weights. Of each run: what reached weight files by
pwrite, what the system counted as written (`write_bytes` of /proc/self/io: pages that became dirty), seconds, CPU
seconds, the trials, and a digest of the weight files. `--few` are the tokens by which plain codes are measured, of
which there must be twice as many (the product's own number is 4,096); `--close` is the gain below which they are
measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HIDDEN, INNER, LAYERS, VOCABULARY = 512, 1024, 4, 65536


def main() -> None:
    """Make what is needed, then run all checkouts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipe", default="nvfp4-fp8-hybrid")
    parser.add_argument("--sources", nargs="+", type=Path, default=[Path(__file__).parents[1] / "src"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--few", type=int, default=512)
    parser.add_argument("--close", type=float)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run(json.loads(options.step))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or make_model(options.work / "model")
    rows = make_rows(options, model)
    for number in range(options.rounds):
        for source in options.sources:
            out = options.work / "out"
            given = {"model": str(model), "recipe": options.recipe, "dataset": [str(rows)], "output_dir": str(out)}
            given |= {"few": options.few, "close": options.close, "tokens_per_batch": 4 * options.length}
            command = [sys.executable, __file__, str(options.work), "--step", json.dumps(given)]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(source)}
            )
            print(json.dumps({"round": number, "source": str(source), **json.loads(done.stdout.splitlines()[-1])}))
            shutil.rmtree(out)


def make_model(folder: Path) -> Path:
    """A llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
        config = LlamaConfig(**sizes, **heads, initializer_range=0.05)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_rows(options: argparse.Namespace, model: Path) -> Path:
    """Rows of random tokens."""
    generator = random.Random(1)  # noqa: S311
    stop = min(1000, json.loads((model / "config.json").read_text())["vocab_size"])
    rows = [[generator.randrange(3, stop) for _ in range(options.length)] for _ in range(options.rows)]
    file: Path = options.work / "rows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def run(given: dict[str, Any]) -> None:
    """In a process of its own: quantize, and print what was written."""
    from snugfit.quantization import prepared_run, trials
    from snugfit.quantization.quantize import quantize

    prepared_run.SOME_TOKENS = given.pop("few")  # type: ignore[attr-defined]
    if (close := given.pop("close")) is not None:
        trials.CLOSE = close
    written, real = 0, os.pwrite

    def pwrite(handle: int, data: Any, offset: int) -> int:
        nonlocal written
        done = real(handle, data, offset)
        if ".safetensors" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            written += done
        return done

    os.pwrite = pwrite
    before, begin, cpu = dirtied(), time.perf_counter(), time.process_time()
    record = quantize(**given, device="cpu", effort="good")
    found: dict[str, Any] = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    files = sorted(Path(given["output_dir"]).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    found |= {"weight_files": sum(file.stat().st_size for file in files), "pwrite": written}
    found |= {"dirtied": dirtied() - before, "digest": digest[:24]}
    print(json.dumps(found | {"trials": [(one.name, one.kl, one.kept) for one in record.trials]}))


def dirtied() -> int:
    """Bytes of pages that this process made dirty."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


if __name__ == "__main__":
    main()
