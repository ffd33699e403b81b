"""The model card: README.md with the Hub's metadata, made of records alone; what was not measured is absent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from snugfit.byte_counts import size
from snugfit.engines.gpus import CARDS
from snugfit.records.evaluation import EvalRecord, EvaluatedCheckpoint, EvaluatedServer, ModelFigures
from snugfit.records.saturation import worst
from snugfit.report.collection import Collection, QuantizedCheckpoint, counted, last_part, stated
from snugfit.report.figures import uses_four_over_six
from snugfit.report.markdown import escape
from snugfit.report.plots import Plot
from snugfit.report.serving_words import formats_of, how_to_serve
from snugfit.report.table import Column, Table, number, show
from snugfit.report.templating import render
from snugfit.report.words import SCALE_RULE_WORDS, describe_format, own_words

MAX_ROWS = 40  # of a table in the card; longer ones are in their files
LIBRARY = "transformers"  # the library that loads the file by itself
TAGS = ("quantized", "compressed-tensors", "snugfit")
PAGE = "index.html"


def card(collection: Collection, tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    """The text of README.md for the published checkpoint."""
    one = collection.checkpoint
    assert one is not None
    named = {table.name: table for table in tables}
    body = render(
        "card.md.j2",
        title=escape(one.name),
        one=one,
        record=one.record,
        summary=summary(collection),
        facts=facts(collection),
        tables={name: _shown(table) for name, table in named.items()},
        groups=groups_of(tables),
        plots=[plot.name for plot in plots],
        alt={plot.name: escape(alt_text(plot)) for plot in plots},
        howto=how_to_serve(collection),
        formats=[(label, describe_format(label)) for label in formats_of(collection)],
        scale_rules=_scale_rules(one),
        four_over_six=uses_four_over_six(one),
        recipe_words=escape(own_words(one.recipe_description)),
        limits=limits(collection),
        made=_made(collection),
        page=PAGE,
    )
    return f"---\n{metadata_yaml(collection)}---\n\n{_squeezed(body)}"


def _shown(table: Table) -> dict[str, Any]:
    """A table for the template: whole, or its first rows and where the others are."""
    rows = table.rows[:MAX_ROWS]
    part = Table(name=table.name, title=table.title, columns=table.columns, rows=rows)
    return {
        "name": table.name,
        "title": escape(table.title),
        "text": part.to_markdown(),
        "note": escape(table.note),
        "left": len(table.rows) - len(rows),
    }


def groups_of(tables: Sequence[Table]) -> dict[str, list[str]]:
    """Kind of table -> names of its tables: evaluation, evaluation-2, ..."""
    groups: dict[str, list[str]] = {}
    for table in tables:
        kind = table.name.rstrip("0123456789").rstrip("-") if table.name[-1].isdigit() else table.name
        groups.setdefault(kind, []).append(table.name)
    return groups


def _squeezed(text: str) -> str:
    """The text with at most one empty line in a row."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"


def alt_text(plot: Plot) -> str:
    """What a picture shows, in words: its axes, its lines and their ranges."""
    lines = []
    for line in plot.lines:
        values = [y for _, y, _ in line.points]
        first, last = number_text(values[0]), number_text(values[-1])
        lines.append(f"{line.label.strip()} {first}" + (f" to {last}" if len(values) > 1 else ""))
    return f"{plot.y_label} by {plot.x_label}: {'; '.join(lines)}."


def number_text(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def metadata_yaml(collection: Collection) -> str:
    """The metadata block of the card, as huggingface_hub writes it."""
    from huggingface_hub import ModelCardData

    hub, one = collection.hub, collection.checkpoint
    assert one is not None
    given: dict[str, Any] = {
        "base_model": hub.base_model,
        "base_model_relation": "quantized" if hub.base_model else None,
        "quantized_by": hub.quantized_by,
        "license": hub.license,
        "license_name": hub.license_name,
        "license_link": hub.license_link,
        "language": list(hub.languages) or None,
        "datasets": list(hub_datasets(one)) or None,
        "tags": [*TAGS, *dict.fromkeys(label.split("-")[0] for label in formats_of(collection))],
        "library_name": LIBRARY,
        "pipeline_tag": hub.pipeline_tag,
    }
    text: str = ModelCardData(**{key: value for key, value in given.items() if value is not None}).to_yaml()
    return text.strip() + "\n"


def hub_datasets(one: QuantizedCheckpoint) -> tuple[str, ...]:
    """Datasets of the Hub that calibrated it: those with a commit."""
    found: dict[str, None] = {}
    for data in (one.record.dataset, one.record.held_out):
        sources = (data or {}).get("sources")
        for source in sources if isinstance(sources, list | tuple) else ():
            name = stated(source, "dataset") if isinstance(source, Mapping) else ""
            if name.count("/") == 1 and isinstance(source, Mapping) and stated(source, "revision"):
                found[name] = None
    return tuple(found)


def summary(collection: Collection, *, links: bool = True) -> str:
    """One sentence in Markdown: what it is made of, how large it is."""
    one = collection.checkpoint
    assert one is not None
    record = one.record
    base = collection.hub.base_model
    source = escape(record.source)
    if base:
        source = f"[{base}](https://huggingface.co/{base})" if links else escape(base)
    formats = " and ".join(f"`{label}`" for label in formats_of(collection))
    share = record.bytes / record.source_bytes
    return (
        f"{source} in {formats}: {size(record.bytes)} instead of {size(record.source_bytes)} ({100 * share:.0f} %),"
        f" quantized by snugfit {escape(record.snugfit)}."
    )


def facts(collection: Collection) -> list[tuple[str, str]]:
    """The figures that readers look for first: what was lost, what fits a common card."""
    found: list[tuple[str, str]] = []
    one = collection.checkpoint
    assert one is not None
    for record in collection.evals:
        found += _loss_facts(record, one)
        if found:
            break
    fits = [
        fit
        for fit in collection.served
        if fit.engine == "vllm" and (fit.tensor_parallel_size, fit.max_num_seqs) == (1, 1)
    ]
    order = {card.name: card.reported_mib for card in CARDS}
    fits = sorted((fit for fit in fits if fit.auto and not fit.problem), key=lambda fit: order.get(fit.card, 0))
    if fits:
        small = fits[0]
        found.append(
            ("Smallest GPU that fits it", f"{small.card}: {small.auto:,} tokens ({small.engine_title}, predicted)")
        )
    return found


def _loss_facts(record: EvalRecord, one: QuantizedCheckpoint) -> list[tuple[str, str]]:
    """Perplexity, KL and top token beside the original at the longest context of an evaluation with this checkpoint."""
    texts = [context for context in record.contexts if context.context] or list(record.contexts)
    context = max(texts, key=lambda entry: entry.context)
    served = {
        c.name for c in record.candidates if isinstance(c, EvaluatedServer) and last_part(c.root or c.model) == one.name
    }
    mine = next((model for model in context.models if model.name == one.name or model.name in served), None)
    if mine is None or record.reference is None:
        return []
    original = context.models[0]
    at = f" at {context.context:,} tokens" if context.context else ""
    profile = stated(record.arguments, "activations") if mine.name not in served else "served"
    at += f" ({profile})" if profile else ""
    lines = [(f"Perplexity{at}", f"{_with_error(mine)} (original {_with_error(original)})")]
    if mine.kl is not None and math.isfinite(mine.kl.mean):
        bound = {"exact": "", "estimate": "about ", "lower bound": "at least "}[mine.kl_kind]
        error = f" ± {mine.kl.standard_error:.4f}" if mine.kl.standard_error is not None else ""
        floor = f", {original.floor.kl:.4f} by rounding alone" if original.floor is not None else ""
        lines.append(("KL to the original", f"{bound}{mine.kl.mean:.4f}{error} nats a token{floor}"))
    if mine.same_top is not None and math.isfinite(mine.same_top):
        lines.append(("Same most likely token", number(mine.same_top, "percent")))
    return lines


def _with_error(model: ModelFigures) -> str:
    column = Column(key="p", heading="", form=3, error="e")
    return show(column, {"p": model.perplexity, "e": model.perplexity_error})


def _scale_rules(one: QuantizedCheckpoint) -> list[tuple[str, str]]:
    rules = dict.fromkeys(part for t in one.record.tensors for part in t.scale_rule.split("+") if part)
    return [(rule, SCALE_RULE_WORDS[rule]) for rule in rules if rule in SCALE_RULE_WORDS]


def limits(collection: Collection) -> list[str]:
    """What a reader must not conclude, from what the records have and lack."""
    one = collection.checkpoint
    assert one is not None
    found = []
    if not collection.evals and not collection.tasks:
        found.append("Nothing was measured of what this checkpoint lost: there is no evaluation in this card.")
    measured = [c for record in collection.evals for c in record.candidates if isinstance(c, EvaluatedCheckpoint)]
    profiles = dict.fromkeys(stated(record.arguments, "activations") for record in collection.evals)
    if measured:
        under = ", ".join(f"`{name}`" for name in profiles if name)
        found.append(
            "Losses were computed by snugfit's emulation of the engine's arithmetic"
            + (f" (profile {under})" if under else "")
            + ", not by the engine itself, where no server is named."
        )
    if any("nvfp4" in label and "a16" not in label for label in formats_of(collection)):
        found.append(
            "On GPUs before Blackwell, NVFP4 runs weight-only: 16-bit inputs, which lose less, and no 4-bit arithmetic."
        )
    sites = one.record.input_saturation
    if sites:
        most = worst(sites)
        beyond = sum(site.saturated_tokens > 0 for site in sites)
        found.append(
            f"On held-out samples {beyond} of {len(sites)} input scales were exceeded; the furthest is"
            f" `{most.module}`, with {most.ratio:.2f} times the largest input of calibration."
        )
    limited = [record for record in collection.tasks if counted(record.arguments, "limit")]
    if limited:
        found.append("Tasks with a limit of items are not comparable with published scores of whole tasks.")
    if collection.served:
        found.append(
            "Contexts that fit are predictions of `snugfit fit`, within a few percent where they were checked."
        )
    return found


def _made(collection: Collection) -> list[tuple[str, str]]:
    """How it was made: recipe, digests, machine, time."""
    one = collection.checkpoint
    assert one is not None
    record = one.record
    effort = stated(record.arguments, "effort")
    pairs = [
        ("recipe", f"`{record.recipe}`, SHA-256 `{record.recipe_digest}`"),
        ("effort", escape(effort)),
        ("original", f"{escape(record.source)}, SHA-256 of its headers `{record.source_header_digest}`"),
        ("machine", escape(stated(record.hardware, "gpu") or stated(record.hardware, "processor"))),
        ("time", f"{record.seconds['total']:,.0f} s" if "total" in record.seconds else ""),
        ("memory", size(record.peak_rss_bytes)),
        ("versions", escape(", ".join(f"{name} {version}" for name, version in record.versions.items()))),
    ]
    return [(name, value) for name, value in pairs if value]
