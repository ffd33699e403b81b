"""The main path of `snugfit eval`: checkpoints and texts in, a record of what was lost at every context length out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snugfit import __version__
from snugfit.data import texts
from snugfit.engines.profiles import DEFAULT_PROFILE
from snugfit.evaluation import figures, reference
from snugfit.evaluation.continuations import continue_greedily, worst_places
from snugfit.evaluation.measure import Entry, TokenFigures, measure, steps
from snugfit.evaluation.plan import (
    METRICS_VERSION,
    Job,
    Model,
    apart,
    arithmetic,
    check_options,
    check_server,
    floor_chunks,
    prepare,
    walked,
    with_stored,
)
from snugfit.evaluation.served import Served, ServerOptions, ask_server
from snugfit.evaluation.subject import open_subject
from snugfit.machine import (
    Clock,
    free_bytes,
    hardware,
    peak_gpu_bytes,
    peak_rss_bytes,
    pick_device,
    progress_bar,
    versions,
)
from snugfit.records.evaluation import ContextFigures, EvalRecord, Floor, ModelFigures
from snugfit.report import plots, tables
from snugfit.serving.answers import FULL
from snugfit.storage.checkpoint import header_digest
from snugfit.storage.staging import staged

DEFAULT_CONTEXTS = (2048,)
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}
BYTES_A_VALUE = 24  # of a layer's widest activations in flight: several of them in 16 bits, slices of them in fp32
DEFAULT_CONTINUATIONS = 5
BEFORE = 24  # tokens shown before a continuation
# the next wider arithmetic: as valid, rounded elsewhere
OTHER_ARITHMETIC = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def evaluate(
    candidates: Sequence[str | Path],
    *,
    reference_model: str | Path | None = None,
    text: Sequence[str | Path] = (),
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    max_chunks: int | None = None,
    max_tokens: int | None = None,
    activations: str = DEFAULT_PROFILE,
    floors: str = "reference",
    reference_cache: str | Path | None = None,
    continuations: int = DEFAULT_CONTINUATIONS,
    server: ServerOptions | None = None,
    device: str | None = None,
    tokens_per_batch: int | None = None,
    force: bool = False,
    progress: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> EvalRecord:
    """Perplexity of every candidate at every context length and, with a reference, KL and agreement against it.

    `candidates` and `reference_model` are model directories (the reference may be a stored one, a .safetensors file
    made through `reference_cache`, a folder). `text`: plain texts, JSONL files, or folders of them; `activations`: an
    engine profile for all models; `floors`: "reference", "all" or "none", who is run a second time in wider arithmetic,
    on one chunk in eight. In chat logs both models continue from the `continuations` places where a candidate is
    farthest from its reference. A `server` is one more candidate, after the others. `force` lets contexts exceed the
    model's positions. `tell` hears in words what becomes of a stored reference. Raises UserError for bad input.
    """
    clock = Clock()
    place = pick_device(device)
    check_options(floors, tokens_per_batch, continuations, reference_cache, reference_model)
    check_server(server, reference_model)
    with clock("prepare"):
        cut = {"max_chunks": max_chunks, "max_tokens": max_tokens}
        job = prepare(candidates, reference_model, text, contexts, cut, activations, force=force)
        job, store = with_stored(job, reference_cache, floors, served=server is not None, tell=tell)
    batch = tokens_per_batch or _tokens_that_fit(job, place)
    if server is not None:
        with clock("ask"), progress_bar(progress, len(job.rows), "asking the server") as tick:
            digest = " ".join(group.digest for group in job.groups)
            vocabulary = next(walked(job)).subject.vocabulary
            job = replace(job, served=ask_server(server, job.rows, digest, vocabulary, tick))
    entries, owners = _entries(job, floors, place)
    collector = None
    if store is not None and isinstance(job.base, Model):
        collector = reference.Collector(job.rows, job.places, job.base.subject.vocabulary)
    with clock("measure"):
        found = _measure(job, entries, place, batch, collector, progress=progress)
    with clock("summarize"):
        results = figures.with_holm(list(_results(job, entries, owners, found)))
        if collector is not None and store is not None and isinstance(job.base, Model) and not store[0].exists():
            kept = {c.context: c.models[0].floor for c in results if c.models[0].floor is not None}
            tell(reference.try_to_save(*store, _describe(job.base), collector, kept))
    with clock("continue"):
        chat = _chat(job, entries, found, continuations, place)
    return EvalRecord(
        snugfit=__version__,
        arguments={
            "candidates": [str(path) for path in candidates],
            "reference": None if reference_model is None else str(reference_model),
            "text": [str(file) for file in text],
            "contexts": sorted(contexts),
            "max_chunks": max_chunks,
            "max_tokens": max_tokens,
            "activations": activations,
            "floors": floors,
            "continuations": continuations,
            "server": None if job.served is None else job.served.description["url"],
            "force": force,
            "device": str(place),
            "tokens_per_batch": batch,
        },
        metrics_version=METRICS_VERSION,
        reference=None if job.base is None else _describe(job.base),
        candidates=(*map(_describe, job.candidates), *([_describe(job.served)] if job.served else [])),
        texts=job.files,
        contexts=results,
        chat=chat,
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(place),
        hardware=hardware(place),
        versions=versions(),
    )


def _measure(
    job: Job,
    entries: Sequence[Entry],
    device: torch.device,
    batch: int,
    collector: reference.Collector | None,
    *,
    progress: bool,
) -> list[TokenFigures]:
    """Figures of all entries under a progress bar; a `collector` keeps the reference's predictions."""
    rows, places = job.rows, job.places
    keep = None if collector is None else collector.keep
    with progress_bar(progress, steps(entries, rows, places), "evaluating") as tick:
        return measure(entries, rows, places, device, tokens_per_batch=batch, tick=tick, keep=keep)


def write_results(record: EvalRecord, directory: str | Path) -> list[str]:
    """eval.json, eval.csv, eval.md and the plots in a new directory, whole or not at all; the names of the plots."""
    with staged(Path(directory)) as folder:
        (folder / "eval.json").write_text(record.to_json(), encoding="utf-8")
        (folder / "eval.csv").write_text(tables.to_csv(record), encoding="utf-8")
        (folder / "eval.md").write_text(tables.to_markdown(record), encoding="utf-8")
        return plots.write_plots(record, folder)


def _tokens_that_fit(job: Job, device: torch.device) -> int:
    """Tokens in one forward pass whose activations take a quarter of a GPU's free memory at most."""
    most = TOKENS_PER_BATCH[device.type]
    if device.type == "cpu":
        return most
    widths = [max(p.shape) for m in walked(job) for p in m.subject.skeleton.layers.parameters() if p.dim() == 2]
    return max(1024, min(most, free_bytes(device) // (4 * BYTES_A_VALUE * max(widths, default=1))))


def _entries(job: Job, floors: str, device: torch.device) -> tuple[list[Entry], list[int]]:
    """What to measure (reference, candidates, server, noise floors), and for each whose floor it is, -1 if none's."""
    entries: list[Entry] = []
    if isinstance(job.base, Model):
        entries.append(Entry(job.base.subject))
    elif job.base is not None:
        entries.append(Entry(None, known=job.base.predictions(device)))
    against = 0 if job.base is not None else None
    entries += [Entry(model.subject, against=against) for model in job.candidates]
    if job.served is not None:
        entries.append(Entry(None, against=against, known=job.served.predictions(job.places, device)))
    owners = [-1] * len(entries)
    doubled = []
    if floors != "none" and isinstance(job.base, Model):
        doubled.append(0)
    if floors == "all":
        first = 0 if job.base is None else 1
        doubled += range(first, first + len(job.candidates))
    for index in doubled:
        subject = entries[index].subject
        assert subject is not None
        other = OTHER_ARITHMETIC[subject.arithmetic]
        again = open_subject(subject.checkpoint.path, activations=subject.activations, arithmetic=other)
        entries.append(Entry(again, against=index, rows=frozenset(_floor_rows(job))))
        owners.append(index)
    return entries, owners


def _floor_rows(job: Job) -> Iterator[int]:
    first = 0
    for group in job.groups:
        yield from (first + chunk for chunk in floor_chunks(group))
        first += len(group.rows)


def _results(
    job: Job, entries: Sequence[Entry], owners: Sequence[int], found: Sequence[TokenFigures]
) -> Iterator[ContextFigures]:
    """One record a context length, models in order, the reference first."""
    names = [model.name for model in job.candidates]
    if job.base is not None:
        names.insert(0, apart(_describe(job.base)["name"], names))
    if job.served is not None:
        names.append(job.served.name)
    first = 0
    places = iter(job.places)
    for chunks in job.groups:
        positions = [next(places) for _ in chunks.rows]
        group = figures.Group([len(p) for p in positions], np.concatenate(positions), first)
        first = group.where.stop
        floors = _floors(job, chunks, group, entries, owners, found)
        models: list[ModelFigures] = []
        for index, name in enumerate(names):
            base = None if entries[index].against is None else found[0]
            kind = "estimate" if base is not None and isinstance(job.base, reference.Reference) else "exact"
            if job.served is not None and index == len(names) - 1 and job.served.top != FULL:
                kind = "lower bound"
            models.append(
                figures.model_figures(name, found[index], group, reference=base, kl_kind=kind, floor=floors.get(index))
            )
        yield figures.context_figures(chunks.context, chunks.digest, group, models)


def _floors(
    job: Job,
    chunks: texts.Chunks,
    group: figures.Group,
    entries: Sequence[Entry],
    owners: Sequence[int],
    found: Sequence[TokenFigures],
) -> dict[int, Floor]:
    """Noise floors by the index of the entry they belong to."""
    floors = {}
    if isinstance(job.base, reference.Reference) and chunks.context in job.base.floors:
        floors[0] = job.base.floors[chunks.context]
    for index, owner in enumerate(owners):
        subject = entries[index].subject
        if owner < 0 or subject is None:
            continue
        floor = figures.floor_figures(found[index], group, floor_chunks(chunks), arithmetic(subject))
        if floor is not None:
            floors[owner] = floor
    return floors


def _chat(
    job: Job, entries: Sequence[Entry], found: Sequence[TokenFigures], count: int, device: torch.device
) -> dict[str, Any] | None:
    """Where each candidate is farthest from its reference in chat rows, and how both go on from there."""
    if job.groups[-1].context != texts.CHAT or not isinstance(job.base, Model) or count < 1:
        return None
    chunks = job.groups[-1]
    places = job.places[-len(chunks.rows) :]
    first = sum(len(p) for p in job.places) - sum(len(p) for p in places)
    talks = np.repeat([scored is not None for scored in chunks.scored], [len(p) for p in places])
    if not talks.any():
        return None
    worst = {
        index: worst_places(np.where(talks, found[index].kl[first:], np.nan), places, count)
        for index, entry in enumerate(entries)
        if entry.against == 0 and entry.rows is None and entry.subject is not None
    }
    if not worst:
        return None
    prompts = {(row, at): chunks.rows[row][:at] for chosen in worst.values() for row, at, _ in chosen}
    told = continue_greedily(job.base.subject, list(prompts.values()), device)
    reference_says = dict(zip(prompts, told, strict=True))
    raw = job.tokenizer.raw
    result = []
    for model, (_, chosen) in zip(job.candidates, worst.items(), strict=True):
        answers = continue_greedily(model.subject, [prompts[row, at] for row, at, _ in chosen], device)
        for (row, at, kl), answer in zip(chosen, answers, strict=True):
            ids = chunks.rows[row]
            result.append(
                {
                    "model": model.name,
                    "where": chunks.sources[row],
                    "position": at,
                    "kl": kl,
                    "before": raw.decode(ids[max(0, at - BEFORE) : at]),
                    "text": raw.decode([ids[at]]),
                    "reference_says": raw.decode(reference_says[row, at]),
                    "model_says": raw.decode(answer),
                    "same_tokens": _agreeing(reference_says[row, at], answer),
                }
            )
    return {"continuations": result}


def _agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two continuations have in common from their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _describe(model: Model | Served | reference.Reference) -> dict[str, Any]:
    """A model for the record: name, digest of its headers, arithmetic, formats and how many linears have each."""
    if isinstance(model, Served):
        return dict(model.description)
    if isinstance(model, reference.Reference):
        return dict(model.description) | {"stored_bytes": model.bytes}
    subject = model.subject
    labels: dict[str, int] = {}
    for fmt in subject.formats.values():
        labels[fmt.label()] = labels.get(fmt.label(), 0) + 1
    return {
        "name": model.name,
        "header_digest": header_digest(subject.checkpoint),
        "bytes": sum(tensor.bytes for tensor in subject.checkpoint.tensors.values()),
        "arithmetic": arithmetic(subject),
        "formats": labels,
        "kv_cache": subject.kv,
    }
