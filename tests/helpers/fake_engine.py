"""A stand-in for an engine's command: `python fake_engine.py KIND MODEL --port N ...`, for tests of `serve`.

KIND: "serves", "refuses" (prints an error of vLLM and ends), "unknown" (another error), "silent" (never answers).
It starts a child that sleeps, as engines start workers, and writes both process ids into MODEL/pids.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from helpers.mock_engine import MockEngine, served

LOG = """\
INFO 11-22 05:10:20 [core.py:109] Initializing a V1 LLM engine (v0.24.0) with config: model='m', quantization=None
INFO 11-22 05:10:21 [gpu_model_runner.py:1] Model loading took 1.50 GiB memory and 2.1 seconds
INFO 11-22 05:10:22 [gpu_worker.py:1] Available KV cache memory: 4.25 GiB
INFO 11-22 05:10:22 [kv_cache_utils.py:1] GPU KV cache size: 123,456 tokens
INFO 11-22 05:10:23 [gpu_model_runner.py:1] Graph capturing finished in 3 secs, took 0.25 GiB
"""


def main() -> None:
    """Be that engine."""
    kind, model, *options = sys.argv[1:]
    port = int(options[options.index("--port") + 1])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(model, "pids").write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    Path(model, "options").write_text("\n".join(options), encoding="utf-8")
    if kind == "refuses":
        sys.exit(
            "ValueError: Free memory on device (3.1/79.2 GiB) on startup is less than desired GPU memory utilization"
        )
    if kind == "unknown":
        sys.exit("Traceback\nSomethingError: the flux is inverted\nsee above")
    if kind == "silent":
        time.sleep(600)
    print(LOG, flush=True)  # noqa: T201
    with served(MockEngine(prefill_rate=1e6, decode_rate=1000, chat=os.environ.get("FAKE_CHAT", "It is Paris.")), port):
        time.sleep(600)


if __name__ == "__main__":
    main()
