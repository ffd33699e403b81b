"""Peak memory of evaluating a pair of models as large as Llama 3 70B, a few of whose layers stand for all of them.

    python eval_memory.py WORK [--layers 3] [--context 4096] [--chunks 2] [--gpu-gb 16] [--device cuda]

Writes a random model of that shape (hidden 8192, MLP 28672, 64 heads, 8 of them for keys, vocabulary 128,256: 1.7 GB a
layer in BF16), quantizes it (hybrid), and evaluates the pair in a process of its own that may take `--gpu-gb` of the
GPU. Only one layer of one model is in memory at a time, so the number of layers changes the time and not the peaks.
Prints one JSON line: sizes, peaks, seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, MLP, HEADS, KEY_HEADS, VOCABULARY = 8192, 28672, 64, 8, 128256
CHILD = """
import json, sys, torch
from snugfit.evaluation.evaluate import evaluate
from snugfit.progress import TerminalProgress
model, candidate, rows, device, share = sys.argv[1:]
if device == "cuda":
    torch.cuda.set_per_process_memory_fraction(float(share))
record = evaluate([candidate], reference=model, dataset=[rows], device=device, progress=TerminalProgress())
context = record.contexts[0]
print(json.dumps({"peak_rss_bytes": record.peak_rss_bytes, "peak_gpu_bytes": record.peak_gpu_bytes,
    "seconds": record.seconds, "tokens": context.tokens, "kl": context.models[1].kl.mean,
    "tokens_per_batch": record.arguments["tokens_per_batch"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of evaluating two 70B models.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--gpu-gb", type=float, default=16)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    model, candidate, rows = options.work / "large", options.work / "large-hybrid", options.work / "rows.jsonl"
    if not model.exists():
        write_model(model, options.layers, options.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (options.chunks, options.context), generator=generator).tolist()
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    if not candidate.exists():
        from snugfit.quantization.quantize import quantize

        quantize(
            model,
            "nvfp4-fp8-hybrid-four-over-six",
            output_dir=candidate,
            dataset=[rows],
            num_samples=1,
            max_seq_length=512,
            device=options.device,
        )
        if options.device == "cuda":
            torch.cuda.empty_cache()
    share = 1.0
    if options.device == "cuda":
        share = options.gpu_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory
    command = [sys.executable, "-c", CHILD, str(model), str(candidate), str(rows), options.device, str(share)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    sizes = {path.name: sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (model, candidate)}
    print(json.dumps({"bytes": sizes, "layers": options.layers, **json.loads(result.stdout.splitlines()[-1])}))


def write_model(target: Path, layers: int, device: str) -> None:
    """A random Llama, a file for each layer."""
    target.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    keys = HIDDEN // HEADS * KEY_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    files: dict[str, dict[str, tuple[int, ...]]] = {"outer": {"model.norm": (HIDDEN,)}}
    files["outer"] |= {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        norms: dict[str, tuple[int, ...]] = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        files[f"layer{layer}"] = {prefix + name: shape for name, shape in (norms | shapes).items()}
    weight_map: dict[str, str] = {}
    for name, tensors in files.items():
        file = f"model-{name}.safetensors"
        filled = {f"{module}.weight": fill(shape, device) for module, shape in tensors.items()}
        save_file(filled, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(filled, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def fill(shape: tuple[int, ...], device: str) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02).cpu()


if __name__ == "__main__":
    main()
