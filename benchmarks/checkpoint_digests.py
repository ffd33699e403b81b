"""Digests of thirteen quantized checkpoints, for showing that a refactor changes no byte.

    PYTHONPATH=tests python benchmarks/checkpoint_digests.py WORK [--smollm2 build/smollm2]

Recipes x dense (SmolLM2), mixtures, an FP8 source and vision-language models; all but SmolLM2 and the trained mixture
of tests/fixtures are tiny random models with fixed seeds. Each line: case, recipe, SHA-256 over the weight files,
config.json and the index. Run it on both sides of a change with the same versions and threads, and compare the lines.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import torch

import snugfit
from helpers.fp8_sources import as_fp8
from helpers.tiny_families import make_vision_language, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture

TRAINED_MIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-mixture"


def main() -> None:
    """Make the inputs, quantize them, print a digest of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--smollm2", type=Path, default=Path("build/smollm2"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    torch.set_num_threads(2)
    inputs = make_inputs(work / "inputs")
    cases = [
        *(
            ("dense", arguments.smollm2, recipe)
            for recipe in ("nvfp4-fp8-hybrid-four-over-six", "nvfp4-four-over-six", "fp8-int4-absmax", "mxfp4-absmax")
        ),
        ("trained mixture", TRAINED_MIXTURE, "nvfp4-moe-four-over-six"),
        ("mixture", inputs / "moe", "fp8-int4-moe-absmax"),
        ("mixture", inputs / "mixtral", "nvfp4-four-over-six"),
        ("mixture", inputs / "moe", "nvfp4-fp8-hybrid-fp8kv-four-over-six"),
        ("FP8 mixture", inputs / "fp8-moe", "nvfp4-moe-four-over-six"),
        ("FP8 mixture", inputs / "fp8-moe", "fp8-int4-absmax"),
        ("vision-language", inputs / "gemma3", "nvfp4-fp8-hybrid-four-over-six"),
        ("vision-language", inputs / "qwen2-vl", "nvfp4-fp8-hybrid-fp8kv-four-over-six"),
        ("vision-language", inputs / "qwen2-vl", "int4-w4a16-absmax"),
    ]
    for number, (name, model, recipe) in enumerate(cases):
        has_tokenizer = (model / "tokenizer.json").is_file()
        output_dir = work / f"out-{number}"
        shutil.rmtree(output_dir, ignore_errors=True)
        snugfit.quantize(
            model,
            recipe,
            output_dir=output_dir,
            dataset=[] if has_tokenizer else [inputs / "rows.jsonl"],
            num_samples=8,
            max_seq_length=256,
            device="cpu",
        )
        print(f"{name}, {recipe}: {digest(output_dir)[:24]}", flush=True)


def make_inputs(folder: Path) -> Path:
    """Write the tiny random models and their samples."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_mixture("qwen3_moe", folder / "moe", wide=True)
    make_mixture("mixtral", folder / "mixtral", wide=True, max_shard_size="300KB")
    as_fp8(folder / "moe", folder / "fp8-moe", "hf-block")
    make_vision_language(folder / "gemma3", "gemma3", dtype=torch.bfloat16)
    make_vision_language(folder / "qwen2-vl", "qwen2_vl", dtype=torch.bfloat16)
    write_rows(folder / "rows.jsonl", random_rows([48] * 8))
    return folder


def digest(directory: Path) -> str:
    """SHA-256 over names and bytes of weight files, config.json and index."""
    total = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        if file.suffix == ".safetensors" or file.name in ("config.json", "model.safetensors.index.json"):
            total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


if __name__ == "__main__":
    main()
