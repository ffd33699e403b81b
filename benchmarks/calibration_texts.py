"""Which text to calibrate on: `good` with each kind of text alone, with all of them, with short and long samples.

    python calibration_texts.py MODEL WORK --domain NAME CALIBRATION EVALUATION [--domain ...] [--device cuda]
                                [--tokens 65536] [--layout nvfp4-fp8-hybrid] [--target vllm-blackwell]
                                [--way gptq+folds] [--samples 1024 256 4096] [--context 4096]

Every run has the same number of calibration tokens; `--samples` are the usual, short and long samples' tokens. With
`--way` only that way of `good` is made, and no gate decides. Prints a Markdown table: KL to the original on the
evaluation text of each domain at `--context`, by whether a token stands in the first quarter of it, one standard error
over chunks; the smallest of each column is bold. WORK keeps the files, and calibration_texts.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kl_table import evaluated
from one_way import take_only
from snugfit.progress import TerminalProgress
from snugfit.quantization.quantize import quantize


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    usual, short, long = options.samples
    if options.way:
        take_only(options.way)
    texts = {name: Path(calibration) for name, calibration, _ in options.domain}
    every = list(texts.values())
    runs: dict[str, tuple[Sequence[Path], int]] = {f"{name} alone": ([text], usual) for name, text in texts.items()}
    runs |= {"all": (every, usual), "all, short samples": (every, short), "all, long samples": (every, long)}
    files = {name: _make(options, name, *given) for name, given in runs.items()}
    files = {"none (Four Over Six)": _make(options, "exact", every, usual), **files}
    result: dict[str, dict[str, Any]] = {name: {} for name in files}
    for domain, _, evaluation in options.domain:
        record = evaluated(
            list(files.values()),
            options.model,
            [evaluation],
            (options.context,),
            target=options.target,
            max_tokens=options.max_tokens,
            device=options.device,
        )
        for name, model in zip(files, record.contexts[0].models[1:], strict=True):
            assert model.kl is not None
            parts = [
                [b for b in model.by_position if (b.high <= options.context // 4) == early] for early in (True, False)
            ]
            means = [sum(float(b.kl or 0) * b.tokens for b in part) / sum(b.tokens for b in part) for part in parts]
            result[name][domain] = {
                "kl": model.kl.mean,
                "error": model.kl.standard_error,
                "early": means[0],
                "late": means[1],
            }
            print(domain, name, result[name][domain], flush=True)
    (options.work / "calibration_texts.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    _print(result, [domain for domain, *_ in options.domain], options.context // 4)


def _make(options: argparse.Namespace, name: str, texts: Sequence[Path], length: int) -> Path:
    out: Path = options.work / name.replace(" ", "-").replace(",", "")
    if not out.exists():
        exact = name == "exact"
        record = quantize(
            options.model,
            f"{options.layout}-four-over-six" if exact else options.layout,
            output_dir=out,
            dataset=texts,
            num_samples=options.tokens // length,
            max_seq_length=length,
            shuffle_seed=0,
            device=options.device,
            effort=None if exact else "good",
            target=options.target,
            progress=TerminalProgress(),
        )
        print(name, [(trial.name, round(trial.kl, 4), trial.kept) for trial in record.trials], flush=True)
    return out


def _print(result: dict[str, dict[str, Any]], domains: Sequence[str], first: int) -> None:
    print(f"\n| calibrated on | {' | '.join(f'{d} | before {first} | behind it' for d in domains)} |")
    print("|---|" + "---|" * (3 * len(domains)))
    best = {(d, key): min(row[d][key] for row in result.values()) for d in domains for key in ("kl", "early", "late")}
    for name, row in result.items():
        cells = []
        for domain in domains:
            for key in ("kl", "early", "late"):
                value = row[domain][key]
                text = f"{value:.4f}" + (f" +- {row[domain]['error']:.4f}" if key == "kl" else "")
                cells.append(f"**{text}**" if value == best[domain, key] else text)
        print(f"| {name} | " + " | ".join(cells) + " |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--domain", nargs=3, action="append", required=True, metavar=("NAME", "CALIBRATION", "EVALUATION")
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--samples", type=int, nargs=3, default=[1024, 256, 4096], help="tokens: usual, short, long")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--way", help="of `good`, to be made alone")
    parser.add_argument("--layout", default="nvfp4-fp8-hybrid")
    parser.add_argument("--target", default="vllm-blackwell")
    parser.add_argument("--max-tokens", type=int, default=49152)
    return parser.parse_args()


if __name__ == "__main__":
    main()
