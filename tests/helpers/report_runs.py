"""Runs of a made-up model as their records state them, for reports: two checkpoints, every kind of record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.evaluations import FLOOR
from snugfit.records.bench import BenchCell, BenchMemory, BenchRatio, BenchRecord, BenchRun, BenchServer, Distribution
from snugfit.records.comparison import CompareRecord, LossRow, Side, TaskRow
from snugfit.records.evaluation import (
    AnswerFigures,
    Bin,
    ContextFigures,
    EvalRecord,
    EvaluatedCheckpoint,
    KernelReport,
    ModelFigures,
    PairFigures,
    Spread,
    TaskResult,
    TasksRecord,
    TextRecord,
)
from snugfit.records.plan import (
    Expected,
    PlanBudget,
    PlanLimit,
    PlannedGroup,
    PlanPoint,
    PlanRecord,
    PlanVerdict,
    ProvenKl,
)
from snugfit.records.quantize import RECORD_FILE, QuantizeRecord, TensorRecord
from snugfit.records.saturation import InputSaturation
from snugfit.records.serve import ServeAnswer, ServePrediction, ServeRecord, ServeTaken
from snugfit.records.trials import Trial

LAYERS, HIDDEN, INNER, VOCABULARY = 12, 256, 1024, 4096
ORIGINAL = "a" * 64
CONTEXTS = (4096, 8192, 16384, 32768)
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BITS = {"nvfp4": 4.5, "fp8-dynamic": 8.03125, "as it was": 16.0}
ERRORS = {"nvfp4": 0.0074, "fp8-dynamic": 0.0007}


def _tensor(name: str, shape: tuple[int, ...], fmt: str, layer: int = 0) -> TensorRecord:
    weights = math.prod(shape)
    error = ERRORS.get(fmt)
    return TensorRecord(
        name=name,
        shape=shape,
        format=fmt,
        scale_rule={"nvfp4": "four-over-six", "fp8-dynamic": "absmax"}.get(fmt, ""),
        source_bytes=2 * weights,
        bytes=round(BITS[fmt] * weights / 8),
        relative_error=None if error is None else error * (1 + 0.2 * math.sin(layer + len(name))),
        input_amax=3.0 + layer if fmt == "nvfp4" else None,
    )


def quantize_record(name: str = "made-up-hybrid", *, attention: str = "fp8-dynamic", **changes: Any) -> QuantizeRecord:
    """A checkpoint with NVFP4 MLPs; `attention` is the format of the rest."""
    tensors = [_tensor("model.embed_tokens.weight", (VOCABULARY, HIDDEN), "as it was")]
    for layer in range(LAYERS):
        for inside, shape in PROJECTIONS.items():
            fmt = "nvfp4" if inside.startswith("mlp") else attention
            tensors.append(_tensor(f"model.layers.{layer}.{inside}.weight", shape, fmt, layer))
        tensors.append(_tensor(f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,), "as it was"))
    tensors += [
        _tensor("model.norm.weight", (HIDDEN,), "as it was"),
        _tensor("lm_head.weight", (VOCABULARY, HIDDEN), "as it was"),
    ]
    settings: dict[str, Any] = {
        "snugfit": "0.1.0",
        "arguments": {"num_samples": 32, "max_seq_length": 512, "effort": "good"},
        "recipe": "nvfp4-fp8-hybrid",
        "recipe_digest": "b" * 64,
        "source": "made-up",
        "source_header_digest": ORIGINAL,
        "target": name,
        "dataset": {
            "source": "two sets",
            "samples": 32,
            "tokens": 16384,
            "digest": "c" * 64,
            "sources": [
                {
                    "dataset": "org/chats",
                    "revision": "d" * 40,
                    "split": "train",
                    "formatter": "chat",
                    "samples": 20,
                    "tokens": 10240,
                },
                {"dataset": "notes.txt", "samples": 12, "tokens": 6144},
            ],
        },
        "held_out": {"source": "notes.txt", "samples": 8, "tokens": 4096, "digest": "e" * 64},
        "trials": (
            Trial("weighted scales", 0.115, 0.004, 4096, None, None, True, 12.0),
            Trial("GPTQ", 0.094, 0.003, 4096, 0.021, 0.002, True, 55.0),
            Trial("smoothing", 0.095, 0.003, 4096, -0.001, 0.001, False, 31.0),
        ),
        "input_saturation": (
            InputSaturation(
                module="model.layers.1.mlp.down_proj",
                tokens=4096,
                saturated_tokens=2,
                saturated_values=3,
                amax=31.5,
                ratio=2.1,
                range=30.0,
                calibrated_amax=15.0,
            ),
        ),
        "tensors": tuple(tensors),
        "source_bytes": sum(t.source_bytes for t in tensors),
        "bytes": sum(t.bytes for t in tensors),
        "files": {"model.safetensors": "f" * 64},
        "left_out": (),
        "seconds": {"total": 61.5},
        "peak_rss_bytes": 500_000_000,
        "peak_gpu_bytes": None,
        "hardware": {"processor": "x86_64", "threads": 2, "gpu": None},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "estimates": {},
    }
    return QuantizeRecord(**(settings | changes))


def _spread(mean: float) -> Spread:
    quantiles = {
        "median": mean / 4,
        "p90": mean * 2,
        "p95": mean * 3,
        "p99": mean * 8,
        "p999": mean * 15,
        "max": mean * 40,
    }
    return Spread(mean=mean, standard_error=mean / 20, by_chunk=tuple(mean * 1000 for _ in range(8)), **quantiles)


def _model(name: str, context: int, perplexity: float, kl: float | None) -> ModelFigures:
    chunks = (1000,) * 8
    bins = tuple(
        Bin(low=2.0**n, high=2.0 ** (n + 1), tokens=2**n, perplexity=perplexity + 3 / (n + 1), perplexity_error=0.1,
            kl=None if kl is None else kl * (1 + n / 20), kl_error=None if kl is None else kl / 30)
        for n in range(3, int(math.log2(context)))
    )  # fmt: skip
    return ModelFigures(
        name=name,
        perplexity=perplexity,
        perplexity_error=0.09,
        nll_by_chunk=tuple(math.log(perplexity) * 1000 for _ in chunks),
        tokens_by_chunk=chunks,
        nonfinite=0,
        by_position=bins,
        kl=None if kl is None else _spread(kl),
        same_top=None if kl is None else 1 - kl,
        same_top_error=None if kl is None else 0.004,
        loss_change=None if kl is None else kl * 0.9,
        loss_change_error=None if kl is None else kl / 25,
        floor=FLOOR if kl is None else None,
        acceptance=None if kl is None else 1 - kl / 2,
    )


def checkpoint(name: str, size: int, digest: str) -> EvaluatedCheckpoint:
    """A checkpoint as an evaluation states it."""
    return EvaluatedCheckpoint(
        name=name, header_digest=digest, bytes=size, arithmetic="bfloat16", formats={"nvfp4": 36}, kv_cache=None
    )


def eval_record(names: Sequence[str] = ("made-up-hybrid", "made-up-nvfp4"), **changes: Any) -> EvalRecord:
    """Perplexity and KL of an original and candidates at four contexts."""
    contexts = []
    for n, context in enumerate(CONTEXTS):
        base = 3.4 + 0.08 * (n - 1) ** 2
        models = [_model("made-up", context, base, None)]
        for place, name in enumerate(names):
            kl = 0.03 * (1 + 2.2 * place) * (1 + 0.25 * n * (1 + place))
            models.append(_model(name, context, base * math.exp(kl * 0.9), kl))
        pairs = [
            PairFigures(a=names[0], b=names[1], figure="kl", difference=-0.05, low=-0.06, high=-0.04, p=0.001, chunks=8,
                        more_tokens=0, p_holm=0.004)
        ] if len(names) > 1 else []  # fmt: skip
        contexts.append(
            ContextFigures(
                context=context,
                chunks=8,
                tokens=8000,
                digest=f"d{context}",
                chunk_tokens=(1000,) * 8,
                models=tuple(models),
                pairs=tuple(pairs),
            )
        )
    answers = tuple(
        AnswerFigures(
            model=name, questions=16, limit=256, tokens=140.0 + 9 * n, tokens_error=12.0, repeated=0.03 + 0.02 * n,
            repeated_error=0.01, loops=n, unfinished=2 + n, length_change=0.06 * n or None,
            length_change_error=0.03 if n else None,
        )
        for n, name in enumerate(("made-up", *names))
    )  # fmt: skip
    settings: dict[str, Any] = {
        "snugfit": "0.1.0",
        "arguments": {"activations": "vllm-blackwell"},
        "metrics_version": 1,
        "reference": checkpoint("made-up", 25_000_000, ORIGINAL),
        "candidates": tuple(checkpoint(name, 11_000_000 - 900_000 * n, str(n) * 64) for n, name in enumerate(names)),
        "texts": (TextRecord("novel.txt", "9" * 64, "text"),),
        "contexts": tuple(contexts),
        "continuations": (),
        "seconds": {"total": 12.0},
        "peak_rss_bytes": 1,
        "peak_gpu_bytes": None,
        "hardware": {"processor": "x86_64", "threads": 2, "gpu": None},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "answer_figures": answers,
    }
    return EvalRecord(**(settings | changes))


def task_result(task: str, metric: str, right: int, items: int = 200) -> TaskResult:
    """An accuracy with `right` of `items`."""
    value = right / items
    return TaskResult(
        task=task,
        metric=metric,
        kind="accuracy",
        higher_is_better=True,
        value=value,
        standard_error=math.sqrt(value * (1 - value) / (items - 1)),
        items={f"{n}:ab": float(n < right) for n in range(items)},
    )


def tasks_record(model: str, right: int, *, limit: int | None = None, tasks: Sequence[str] = ("piqa",)) -> TasksRecord:
    """Accuracies of lm_eval; `tasks` beside piqa have the metric of registered benchmarks."""
    results = [task_result(task, "acc" if task == "piqa" else "exact_match,flexible-extract", right) for task in tasks]
    return TasksRecord(
        snugfit="0.1.0",
        model=model,
        arguments={"limit": limit},
        tasks=tuple(results),
        seconds={"total": 3.0},
        versions={"lm_eval": "0.4.13"},
    )


def compare_record(a: str = "made-up-hybrid", b: str = "made-up-nvfp4") -> CompareRecord:
    """One task and one loss, A minus B."""
    row = TaskRow(task="piqa", metric="acc", kind="accuracy", higher_is_better=True, a=0.75, b=0.7, items=200,
                  difference=0.05, low=0.01, high=0.09, only_a=14, only_b=4, p=0.031, p_holm=0.031, z=1.12)  # fmt: skip
    loss = LossRow(context=4096, figure="loss", a=1.25, b=1.29, chunks=8, tokens=8000, perplexity_a=3.49,
                   perplexity_b=3.63, perplexity_ratio=0.961, difference=-0.04, low=-0.05, high=-0.03, p=0.001,
                   p_holm=0.001)  # fmt: skip
    return CompareRecord(
        snugfit="0.1.0",
        arguments={},
        a=Side("a", a, a),
        b=Side("b", b, b),
        tasks=(row,),
        losses=(loss,),
        unpaired=(),
    )


def _distribution(median: float) -> Distribution:
    return Distribution(count=5, median=median, p25=median * 0.97, p75=median * 1.02, p95=median * 1.1, mean=median)


def _cell(kind: Any, prompt: int, output: int, users: int, **figures: Any) -> BenchCell:
    return BenchCell(
        kind=kind, prompt_tokens=prompt, output_tokens=output, concurrency=users,
        status=figures.pop("status", "measured"),
        reason=figures.pop("reason", None), requests=20, errors=0, error_messages={}, repeats=5, seconds=4.0, **figures,
    )  # fmt: skip


def _run(name: str, speed: float) -> BenchRun:
    cells = [
        _cell(
            "prefill",
            n,
            1,
            1,
            prefill=_distribution(speed * 9e6 / (n + 12000)),
            first_token=_distribution(n / 6000 / speed),
        )
        for n in (*CONTEXTS, 24576)
    ]
    cells += [
        _cell("load", 512, 128, users, throughput=_distribution(speed * 60 * users / (1 + users / 40)),
              decode=_distribution(speed * 60 / (1 + users / 40)), first_token=_distribution(0.05 + users / 200),
              latency=_distribution(2 + users / 20))
        for users in (1, 8, 40, 64)
    ]  # fmt: skip
    cells += [_cell("decode", n, 128, 1, decode=_distribution(speed * 60 / (1 + n / 60000))) for n in (0, 4096, 16384)]
    cells.append(
        _cell("prefill", 49152, 1, 1, status="refused", reason="960 tokens from the prefix cache", prefix_hits=960)
    )
    server = BenchServer(
        name=name, url="http://127.0.0.1:8000", engine="vllm", version="0.24.0", model=name, root=f"/models/{name}",
        max_model_len=32768,
        memory=BenchMemory(gpu="NVIDIA H100", gpu_total_bytes=85 << 30, gpu_used_bytes=74 << 30,
                           kv_cache_tokens=400_000, kv_cache_source="metrics"),
    )  # fmt: skip
    return BenchRun(server=server, cells=tuple(cells), prefix_cache="counted")


def bench_record(names: Sequence[str] = ("made-up", "made-up-hybrid")) -> BenchRecord:
    """Two servers in turn."""
    return BenchRecord(
        snugfit="0.1.0",
        tool="snugfit",
        tool_version=None,
        arguments={},
        runs=tuple(_run(name, 1 + 0.3 * n) for n, name in enumerate(names)),
        ratios=(
            BenchRatio(kind="prefill", prompt_tokens=4096, output_tokens=1, concurrency=1, figure="prefill", ratio=1.3,
                       low=1.27, high=1.33, pairs=5),
        ),
        complete=True,
        stopped=None,
        seconds={"total": 90.0},
        hardware={"gpu": "NVIDIA H100"},
        versions={},
    )  # fmt: skip


def serve_record(model: str = "/models/made-up-hybrid") -> ServeRecord:
    """An engine that started, with what was predicted and what it took."""
    return ServeRecord(
        snugfit="0.1.0",
        model=model,
        engine="vllm",
        engine_version="0.24.0",
        arguments={},
        command=("vllm", "serve", model),
        gpu="NVIDIA H100",
        formats=("nvfp4", "fp8-dynamic"),
        started=True,
        refusal=None,
        predicted=ServePrediction(
            gpu="H100", engine="vLLM 0.24", weight_bytes=11_000_000, cache_bytes=70 << 30, cache_tokens=410_000,
            max_context=32768, kv_cache="auto", kernels=("nvfp4: Marlin (W4A16)",),
        ),
        taken=ServeTaken(weight_bytes=11_100_000, cache_bytes=69 << 30, cache_tokens=400_000, gpu_used_bytes=74 << 30),
        kernels=KernelReport(engine_version="0.24.0"),
        answers=(ServeAnswer(question="Hello?", text="Hello.", tokens=2, finished=True, verdict="answers"),),
        results={},
        seconds={"start": 30.0},
        stopped=None,
        log="serve.log",
    )  # fmt: skip


def plan_record(model: str = "made-up") -> PlanRecord:
    """A plan that beat its control."""
    points = tuple(
        PlanPoint(
            name=name,
            kind=kind,
            recipe=name,
            kv_cache="keep",
            formats={},
            bytes=11_000_000 + 400_000 * n,
            bytes_per_gpu=11_000_000 + 400_000 * n,
            bits_per_weight=6.0 + n / 4,
            max_context=32768,
            fits=True,
            expected=Expected(0.06 - n / 100, 0.002) if kind != "built-in" else Expected(math.nan, math.nan),
            measured=()
            if kind == "frontier"
            else (ProvenKl(kl=0.058 - n / 90, error=0.002, tokens=8192, context=None),),
        )
        for n, (name, kind) in enumerate((("nvfp4", "built-in"), ("f1", "frontier"), ("the plan", "plan")))
    )
    group = PlannedGroup(
        name="model.layers.0.mlp.down_proj", layer=0, role="down", elements=262144, format="fp8-dynamic",
        label="fp8-dynamic", arithmetic="W8A8", bytes=263168, cost=math.nan, why="outliers of its inputs", refused={},
    )  # fmt: skip
    budget = PlanBudget(
        gpu="RTX 4090", context=32768, tensor_parallel_size=1, engine="vllm", gpu_memory_utilization=None,
        max_num_seqs=1,
        bytes=None, bits_per_weight=None, disk=None, max_kl=None, gpu_title="RTX 4090", engine_title="vLLM 0.32",
    )  # fmt: skip
    return PlanRecord(
        snugfit="0.1.0", model=model, budget=budget, menu=("nvfp4", "fp8-dynamic"), constraints=None, max_formats=None,
        context=4096, target="vllm-blackwell", effort="fast", scored_on=("notes.txt",), scored_tokens=4096,
        kv_cache="keep",
        kv_caches={"keep": "fits", "fp8": "fits"}, limits=(PlanLimit("gpu", 20 << 30, 12_000_000),), outside_bytes=1,
        groups=(group,), points=points,
        verdict=PlanVerdict(
            accepted=True, control="nvfp4", gain=0.01, gain_error=0.001, statement="The plan beats nvfp4."
        ),
        written="the plan", recipe="name: x", notes=(), seconds={},
    )  # fmt: skip


def write_real_runs(folder: Path, source: Path) -> list[Path]:
    """A tiny model quantized for real, whose files are there, and records of made-up measurements of it."""
    from snugfit.quantization.quantize import quantize
    from snugfit.storage.checkpoint import header_digest, open_directory

    out = folder / "made-up-hybrid"
    record = quantize(source, "fp8-dynamic", output_dir=out)
    digest = header_digest(open_directory(out))
    names = (out.name, "made-up-nvfp4")
    candidates = (checkpoint(out.name, record.bytes, digest), checkpoint(names[1], record.bytes // 2, "1" * 64))
    reference = checkpoint("made-up", record.source_bytes, record.source_header_digest)
    records: dict[str, Any] = {
        "eval.json": eval_record(names, reference=reference, candidates=candidates),
        "tasks.json": tasks_record(out.name, 150, tasks=("piqa", "gsm8k")),
        "compare.json": compare_record(),
        "bench.json": bench_record(),
        "serve.json": serve_record(),
    }
    for name, made in records.items():
        (folder / name).write_text(made.to_json(), encoding="utf-8")
    return [out, *(folder / name for name in records)]


def write_runs(folder: Path) -> list[Path]:
    """Every kind of record in files; the runs to give to `report`."""
    records: dict[str, Any] = {
        f"hybrid/{RECORD_FILE}": quantize_record(),
        f"nvfp4/{RECORD_FILE}": quantize_record("made-up-nvfp4", attention="nvfp4", recipe="nvfp4"),
        "eval/eval.json": eval_record(),
        "tasks-original/tasks.json": tasks_record("made-up", 151, tasks=("piqa", "gsm8k")),
        "tasks/tasks.json": tasks_record("made-up-hybrid", 150, tasks=("piqa", "gsm8k")),
        "compare/compare.json": compare_record(),
        "bench/bench.json": bench_record(),
        "serve/serve.json": serve_record(),
        "plan/plan.json": plan_record(),
    }
    for name, record in records.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record.to_json(), encoding="utf-8")
    return [folder / name.partition("/")[0] for name in records]
