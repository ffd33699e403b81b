"""How a checkpoint is served: a command for each engine, and which versions were seen to run such a file."""

from __future__ import annotations

from dataclasses import dataclass

from snugfit.engines.tried import seen_with
from snugfit.records.quantize import DEQUANTIZED, KV_CACHE, PASSTHROUGH
from snugfit.report.collection import Collection, last_part

_PLAIN = (PASSTHROUGH, DEQUANTIZED, KV_CACHE)


@dataclass(frozen=True, kw_only=True)
class HowTo:
    """One engine: its command or code, and what is known: `tried` with this file, `seen` with its formats.

    `limits` are GPUs on which no kernel of the engine is known for a format of the file.
    """

    engine: str
    title: str
    language: str
    text: str
    tried: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


def formats_of(collection: Collection) -> tuple[str, ...]:
    """Labels of the published checkpoint's quantized formats."""
    one = collection.checkpoint
    if one is None:
        return ()
    return tuple(dict.fromkeys(t.format for t in one.record.tensors if t.format not in _PLAIN))


def how_to_serve(collection: Collection) -> list[HowTo]:
    """vLLM, SGLang, Aphrodite and transformers, with the name under which the model is published."""
    one = collection.checkpoint
    if one is None:
        return []
    name = collection.hub.repo or one.name
    fp8 = one.kv_cache is not None and "fp8" in one.kv_cache.lower()
    length = f" --max-model-len {collection.max_positions}" if collection.max_positions else ""
    context = f" --context-length {collection.max_positions}" if collection.max_positions else ""
    cache = " --kv-cache-dtype fp8" if fp8 else ""
    found = [
        ("vllm", "vLLM", "sh", f"vllm serve {name}{length}{cache}"),
        (
            "sglang",
            "SGLang",
            "sh",
            f"python -m sglang.launch_server --model-path {name}{context}{' --kv-cache-dtype fp8_e4m3' if fp8 else ''}",
        ),
        ("aphrodite", "Aphrodite", "sh", f"aphrodite run {name} --single-user-mode{length}{cache}"),
        ("transformers", "transformers, with the package compressed-tensors", "python", _PYTHON.format(name=name)),
    ]
    labels = frozenset(formats_of(collection))
    return [
        HowTo(
            engine=engine,
            title=title,
            language=language,
            text=text,
            tried=_tried(collection, engine),
            seen=tuple(f"{t.title} {t.version} on {t.hardware}" for t in seen_with(engine, labels)),
            limits=_limits(collection, engine),
        )
        for engine, title, language, text in found
    ]


_PYTHON = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")"""


def _tried(collection: Collection, engine: str) -> tuple[str, ...]:
    """Versions of an engine that ran this very checkpoint, by the records of evaluations, benchmarks and starts."""
    one = collection.checkpoint
    assert one is not None
    names = {one.name, collection.hub.repo}
    found: dict[str, None] = {}

    def note(model: str, name: str | None, version: str | None, gpu: str | None) -> None:
        known = {model, last_part(model)}
        if name is not None and name.lower() == engine and version and known & names:
            found[f"{version} on {gpu}" if gpu else version] = None

    for server in collection.servers():
        note(server.root or server.model, server.engine, server.version, None)
    for bench in collection.benches:
        for run in bench.runs:
            note(run.server.root or run.server.model, run.server.engine, run.server.version, run.server.memory.gpu)
    for serve in collection.serves:
        if serve.started:
            note(serve.model, serve.engine, serve.engine_version, serve.gpu)
    return tuple(found)


def _limits(collection: Collection, engine: str) -> tuple[str, ...]:
    missing: dict[str, list[str]] = {}
    for use in collection.kernels:
        if use.engine == engine and use.kernel is None:
            missing.setdefault(use.format, []).append(use.generation)
    return tuple(f"no kernel is known for {fmt} on {', '.join(names)}" for fmt, names in missing.items())
