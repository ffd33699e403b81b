"""ModelOpt's AutoQuantize scores of a model's linears in NVFP4 and FP8, for `benchmarks/plan_scores.py --rival`.

    python autoquantize_worker.py MODEL ROWS.json OUT.json gradient kl_div:8

ROWS.json are rows of token ids; METHOD:N takes the first N. Runs in an environment with nvidia-modelopt. It writes for
each method its seconds and tokens, and each decision's modules, formats and scores.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    model_dir, rows_file, out, *methods = sys.argv[1:]
    rows = json.loads(Path(rows_file).read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {}
    for asked in methods:
        method, _, limit = asked.partition(":")
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device)
        batches = [torch.tensor([row], device=device) for row in rows[: int(limit or len(rows))]]
        started = time.perf_counter()
        options: dict[str, Any] = {}
        if method == "gradient":

            def loss(output: Any, batch: torch.Tensor) -> torch.Tensor:
                logits = output.logits[:, :-1].float()
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

            options = {"loss_func": loss, "forward_step": lambda one, batch: one(input_ids=batch)}
        else:
            options = {"forward_step": lambda one, batch: one(input_ids=batch).logits}
        try:
            _, state = mtq.auto_quantize(
                model,
                constraints={"effective_bits": 9.0},
                quantization_formats=[
                    copy.deepcopy(mtq.NVFP4_DEFAULT_CFG),
                    copy.deepcopy(mtq.FP8_DEFAULT_CFG),
                ],
                data_loader=batches,
                num_calib_steps=len(batches),
                num_score_steps=len(batches),
                disabled_layers=["*lm_head*"],
                method=method,
                **options,
            )
        except Exception as error:
            print(f"{method}: {error!r}", flush=True)
            continue
        stats = [
            {
                "modules": list(one["module_names"]),
                "formats": [str(fmt) for fmt in one["formats"]],
                "scores": [float(score) for score in one["scores"]],
            }
            for one in state["candidate_stats"].values()
        ]
        tokens = sum(batch.numel() for batch in batches)
        found[method] = {"seconds": time.perf_counter() - started, "tokens": tokens, "stats": stats}
        print(f"{method}: {found[method]['seconds']:.1f} s, {len(stats)} decisions", flush=True)
        Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
