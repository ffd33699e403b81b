"""A model much larger than what the run may hold of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

LAYERS, HIDDEN, MLP, VOCABULARY = 12, 2560, 14080, 8192
TOKENS = 1024  # four rows of 256, in one batch


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 GB of random weights in 12 layers, a file each."""
    directory = tmp_path_factory.mktemp("large")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    attention = {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (640, HIDDEN),
        "v_proj": (640, HIDDEN),
        "o_proj": (HIDDEN, HIDDEN),
    }
    mlp = {"gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP)}
    generator = torch.Generator().manual_seed(0)
    weight_map = {}

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        name = f"model-{number:05d}-of-{LAYERS + 1:05d}.safetensors"
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for key, shape in shapes.items()
        }
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    write(1, {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for layer in range(LAYERS):
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        write(layer + 2, {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    rows = torch.randint(3, VOCABULARY, (4, 256), generator=generator).tolist()
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines, encoding="utf-8")
    return directory


RUN = """
import json, sys
import snugfit
from snugfit.machine import peak_rss_bytes, rss_bytes
from snugfit.quantization import prepare
estimate, found = prepare.estimate_run, {}
def observed(*arguments, **options):
    found["baseline"] = rss_bytes()
    return estimate(*arguments, **options)
prepare.estimate_run = observed
model, out, recipe = sys.argv[1:]
record = snugfit.quantize(model, recipe, output_dir=out, dataset=[model + "/rows.jsonl"], device="cpu")
print(json.dumps(found | {"peak": peak_rss_bytes(), "estimates": record.estimates}))
"""


@pytest.mark.parametrize("recipe", ["nvfp4-fp8-hybrid-four-over-six", "fp8-dynamic", "fp8-int4-absmax"])
def test_peak_memory_follows_the_largest_layer(recipe: str, large: Path, tmp_path: Path) -> None:
    """Peak memory stays below what there was before, three times the largest layer and its activations."""
    command = [sys.executable, "-c", RUN, str(large), str(tmp_path / "out"), recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(recipe, found)  # noqa: T201  # shown by -rP
    layer = 2 * (2 * HIDDEN * HIDDEN + 2 * 640 * HIDDEN + 3 * MLP * HIDDEN)
    activations = 0 if recipe == "fp8-int4-absmax" else 2 * TOKENS * (3 * MLP + 6 * HIDDEN)
    assert found["peak"] < found["baseline"] + 3 * layer + activations
    assert found["peak"] < sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2
    estimated = found["estimates"]["peak_rss_bytes"]["estimated"]
    assert 0.9 * found["peak"] < estimated < 1.5 * found["peak"]
