"""A layer of DeepSeek-V3's shape, but for the number of its experts, under a limit of memory that it exceeds.

With 256 experts and 8 GB (`EXPERTS`, `LIMIT`) it is the whole layer, 23 GB in 16 bits; the result takes 7 GB of disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.sparse_models import deepseek_v3_layers

pytestmark = pytest.mark.slow

# a layer of 6 GB in 16 bits
EXPERTS, LIMIT = int(os.environ.get("EXPERTS", "64")), int(os.environ.get("LIMIT", "4500000000"))
ROWS, LENGTH, VOCABULARY = 2, 64, 4096

RUN = """
import json, resource, sys
import snugfit
from snugfit.machine import peak_rss_bytes, rss_bytes
from snugfit.quantization import estimate, prepare
limit, model, out, rows, recipe = int(sys.argv[1]), *sys.argv[2:]
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
estimate.free_bytes = lambda _: limit - rss_bytes()
record = snugfit.quantize(model, recipe, output_dir=out, dataset=[rows], device="cpu", min_tokens_per_expert=0)
print(json.dumps({"peak": peak_rss_bytes(), "estimates": record.estimates, "bytes": record.bytes,
                  "experts_per_group": record.arguments["experts_per_group"], "seconds": record.seconds}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of DeepSeek-V3's shape in FP8, and rows for them."""
    directory = deepseek_v3_layers(
        tmp_path_factory.mktemp("deepseek") / "model", experts=EXPERTS, vocabulary=VOCABULARY
    )
    rows = [[(7 * row + 11 * place) % (VOCABULARY - 3) + 3 for place in range(LENGTH)] for row in range(ROWS)]
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines, encoding="utf-8")
    return directory


def test_a_layer_larger_than_memory(model: Path, tmp_path: Path) -> None:
    """A run chooses by itself how many experts are in memory at once, and its peak stays below limit and estimate."""
    arguments = [str(LIMIT), str(model), str(tmp_path / "out"), str(model / "rows.jsonl"), "nvfp4-moe-four-over-six"]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)  # noqa: T201  # shown by -rP
    estimated = found["estimates"]["peak_rss_bytes"]["estimated"]
    assert 1 <= found["experts_per_group"] < EXPERTS
    assert found["peak"] <= LIMIT
    assert found["peak"] <= estimated <= LIMIT
