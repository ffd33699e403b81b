"""What each effort brings on one model: KL to the original on text that no step has seen, by context length.

    python effort.py MODEL WORK --calibration A.txt B.txt --evaluation C.txt D.txt [--device cuda] [--num-samples 128]
                     [--layout nvfp4-fp8-hybrid] [--exact nvfp4-fp8-hybrid-four-over-six] [--efforts good best]
                     [--targets vllm-blackwell marlin] [--contexts 1024] [--max-tokens 32768]
    python effort.py --plot effort.json PLOT.png         # KL by context, one panel a target, of an earlier call

Quantizes by the exact recipe, then by the layout with each effort, under each target. Every file runs under the
target's arithmetic of inputs on every text of --evaluation. Prints what the gate saw and a Markdown table: KL, and its
ratio to the exact recipe's, with an interval of two standard errors over chunks (paired, linearized). Quantized files
stay in WORK, so that a second call with other texts or contexts quantizes nothing; WORK/effort.json has all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kl_table import evaluated, figures_of, print_table, with_ratio
from snugfit.progress import TerminalProgress
from snugfit.quantization.quantize import quantize


def main() -> None:
    if sys.argv[1:2] == ["--plot"]:
        _plot(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(options).items()}, "made": {}, "figures": []}
    for target in options.targets:
        files = {"exact": _make(options, "exact", target, result)}
        files |= {effort: _make(options, effort, target, result) for effort in options.efforts}
        for text in options.evaluation:
            record = evaluated(
                list(files.values()),
                options.model,
                [text],
                options.contexts,
                target=target,
                max_tokens=options.max_tokens,
                device=options.device,
            )
            for context in record.contexts:
                models = [figures_of(model) for model in context.models[1:]]
                rows = [with_ratio(model, models[0]) for model in models]
                for name, row in zip(files, rows, strict=True):
                    entry = {"target": target, "text": text.name, "context": context.context, "file": name, **row}
                    result["figures"].append(entry)
                    print(f"{target} {text.name} {context.context} {name}: {row}", flush=True)
        (options.work / "effort.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    print_table(result["figures"])


def _make(options: argparse.Namespace, effort: str, target: str, result: dict[str, Any]) -> Path:
    """The file of one effort, made unless it is there."""
    exact = effort == "exact"
    out: Path = options.work / (options.exact if exact else f"{options.layout}-{effort}-{target}")
    if out.exists():
        return out
    started = time.perf_counter()
    record = quantize(
        options.model,
        options.exact if exact else options.layout,
        output_dir=out,
        dataset=options.calibration,
        num_samples=options.num_samples,
        max_seq_length=options.max_seq_length,
        shuffle_seed=0,
        device=options.device,
        effort=None if exact else effort,
        target=target,
        progress=TerminalProgress(),
    )
    seconds = time.perf_counter() - started
    trials = [asdict(trial) for trial in record.trials]
    gpu = record.peak_gpu_bytes
    result["made"][out.name] = {"seconds": seconds, "trials": trials, "peak_gpu_bytes": gpu, "bytes": _bytes(out)}
    print(f"{out.name}: {seconds:.1f} s, GPU {gpu and gpu / 1e9} GB, {_bytes(out)} bytes", flush=True)
    for trial in trials:
        print("   ", {k: round(v, 4) if isinstance(v, float) else v for k, v in trial.items()}, flush=True)
    return out


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _plot(source: Path, target: Path) -> None:
    """One panel a target: KL with its error by context, a line a file and text."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("agg")
    figures = json.loads(source.read_text(encoding="utf-8"))["figures"]
    targets = list(dict.fromkeys(entry["target"] for entry in figures))
    texts = list(dict.fromkeys(entry["text"] for entry in figures))
    files = list(dict.fromkeys(entry["file"] for entry in figures))
    names = {"exact": "Four Over Six"}
    _, panels = plt.subplots(1, len(targets), figsize=(5 * len(targets), 3.6), squeeze=False)
    for panel, on in zip(panels[0], targets, strict=True):
        for number, file in enumerate(files):
            for text in texts:
                rows = [e for e in figures if (e["target"], e["text"], e["file"]) == (on, text, file)]
                label = f"{names.get(file, file)}, {Path(text).stem}"
                style = "-" if text == texts[0] else "--"
                x, y, error = ([e[key] for e in rows] for key in ("context", "kl", "kl_error"))
                panel.errorbar(x, y, error, label=label, color=f"C{number}", linestyle=style, marker="o", markersize=3)
        panel.set(title=on, xlabel="context, tokens", ylabel="KL to BF16, nats a token", xscale="log", ylim=(0, None))
        panel.set_xticks([e["context"] for e in rows], [str(e["context"]) for e in rows])
        panel.minorticks_off()
    panels[0][0].legend(fontsize=7, loc="center right")
    plt.tight_layout()
    plt.savefig(target, dpi=110)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--layout", default="nvfp4-fp8-hybrid")
    parser.add_argument("--exact", default="nvfp4-fp8-hybrid-four-over-six")
    parser.add_argument("--efforts", nargs="*", default=["good", "best"])
    parser.add_argument("--targets", nargs="+", default=["vllm-blackwell", "marlin"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024])
    parser.add_argument("--max-tokens", type=int, default=32768)
    return parser.parse_args()


if __name__ == "__main__":
    main()
