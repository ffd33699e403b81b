"""A budget in what people have (a GPU and a context, bytes, bits a weight, a disk) as limits in bytes. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from snugfit.engines.memory import GIB
from snugfit.errors import UserError
from snugfit.formats.spec import KEEP
from snugfit.model.layout import ModelLayout
from snugfit.planning.fit import read_served_model, serve_settings
from snugfit.planning.menu import Server
from snugfit.planning.search import Limit, Space, least_amount
from snugfit.storage.other_files import is_copied
from snugfit.vram.fit import ServedModel, longest_context, most_weight_bytes
from snugfit.vram.weights import is_served


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a user has: arguments as in `fit`, sizes in bytes, bits a weight, and a KL that may be lost at most."""

    gpu: str | None = None
    context: int | None = None
    tensor_parallel_size: int = 1
    engine: str = "vllm"
    gpu_memory_utilization: float | None = None
    max_num_seqs: int = 1
    bytes: int | None = None
    bits_per_weight: float | None = None
    disk: int | None = None
    max_kl: float | None = None

    @property
    def longest(self) -> bool:
        """Whether the longest context is wanted that a GPU has under the KL."""
        return self.gpu is not None and self.context is None and self.max_kl is not None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a plan has to fit: the budget, and the served model where a GPU is given.

    `elements` are the parameters that engines load, of which bits a weight are counted.
    """

    budget: Budget
    elements: int
    server: Server
    served: ServedModel | None
    notes: tuple[str, ...] = ()


def read_place(layout: ModelLayout, budget: Budget) -> Place:
    """The budget for this model; UserError for arguments that are out of range, conflict, or limit nothing."""
    _check(budget)
    elements = served_elements(layout)
    if budget.gpu is None:
        return Place(budget=budget, elements=elements, server=Server(), served=None)
    settings = serve_settings(
        budget.gpu,
        context=budget.context,
        tensor_parallel_size=budget.tensor_parallel_size,
        engine=budget.engine,
        gpu_memory_utilization=budget.gpu_memory_utilization,
        max_num_seqs=budget.max_num_seqs,
    )
    served, notes = read_served_model(layout, settings)
    server = Server(settings=settings, kv_heads=served.cache.kv_heads)
    return Place(budget=budget, elements=elements, server=server, served=served, notes=tuple(notes))


def limits_of(
    layout: ModelLayout, place: Place, *, fp8: bool, context: int | None = None, kept_layers: Container[int] = ()
) -> tuple[Limit, ...]:
    """The limits with a KV cache in 16 bits or FP8; `context` in place of the budget's, where the longest is sought.

    Beside an FP8 cache `kept_layers` keep 16 bits.
    """
    budget, found = place.budget, []
    if place.served is not None and place.server.settings is not None:
        settings = replace(place.server.settings, context=context or budget.context)
        most = most_weight_bytes(place.served, settings, fp8=fp8, kept_layers=kept_layers)
        found.append(Limit(name="gpu", kind="gpu", bytes=most))
    if budget.bytes is not None:
        found.append(Limit(name="bytes", kind="file", bytes=budget.bytes))
    if budget.bits_per_weight is not None:
        most = int(budget.bits_per_weight * place.elements / 8)
        found.append(Limit(name="bits_per_weight", kind="served", bytes=most))
    if budget.disk is not None:
        found.append(Limit(name="disk", kind="disk", bytes=budget.disk - _other_bytes(layout)))
    return tuple(found)


def served_elements(layout: ModelLayout) -> int:
    """Parameters of all that engines load: of what bits a weight are counted."""
    return sum(
        info.elements
        for name, info in layout.weights.tensors.items()
        if is_served(name, layout.decoder, layout.num_layers) and name not in layout.tied.copies
    )


def context_beside(place: Place, weight_bytes: int, *, fp8: bool, kept_layers: Container[int] = ()) -> int | None:
    """The longest context beside so many bytes of weights on each GPU; None without a GPU."""
    if place.served is None or place.server.settings is None:
        return None
    return longest_context(place.served, weight_bytes, place.server.settings, fp8=fp8, kept_layers=kept_layers)


def impossible(space: Space, place: Place, is_fp8: Callable[[str], bool], *, constrained: bool) -> UserError:
    """Why no mix on the menu keeps the limits: what is missing of each limit, and the nearest that works.

    `is_fp8` says of a choice of the cache whether keys and values are then in FP8; `constrained` whether a user gave
    constraints beside the limits.
    """
    cache = min(space.limits, key=lambda c: max((_missing(space, limit, c) for limit in space.limits[c]), default=0))
    limits = space.limits[cache]
    if least_amount(space, Limit(name="", kind="file", bytes=0), cache) is None:
        what = "no mix of formats on the menu keeps all constraints together."
        remedy = "Raise `max_formats`, or loosen a rule."
        return UserError(what, code="plan-impossible", where="constraints", remedy=remedy)
    short = [limit for limit in limits if _missing(space, limit, cache) > 0]
    if not short:
        return _not_together(space, place, cache, fp8=is_fp8(cache), constrained=constrained)
    parts, works = [], []
    beside = [limit for limit in limits if limit not in short]
    for limit in short:
        alone = least_amount(space, limit, cache) or 0
        least = least_amount(space, limit, cache, beside) or alone
        beside.append(replace(limit, bytes=least))  # the values that are named work together
        stay = limit.amount(space.outside[cache])
        parts.append(
            f"{_words(limit, place)} {alone:,} bytes at least, {stay:,} of them beside the linears on the menu, and "
            f"{max(limit.bytes, 0):,} are allowed"
        )
        as_it_is = KEEP in space.limits and alone == _amount_as_it_is(space, limit)
        works.append("" if as_it_is else _nearest(limit, least, place, fp8=is_fp8(cache)))
    with_cache = f" (with a KV cache in {'FP8' if is_fp8(cache) else '16 bits'})" if len(space.limits) > 1 else ""
    what = f"no mix of formats fits{with_cache}: {'; '.join(parts)}."
    remedy = " ".join(works) if all(works) else "No format on the menu makes the model smaller than it is."
    return UserError(what, code="plan-impossible", where=short[0].name, remedy=remedy)


def _not_together(space: Space, place: Place, cache: str, *, fp8: bool, constrained: bool) -> UserError:
    """Why no mix keeps limits and constraints each of which some mix keeps, and which single limit could be raised."""
    limits = space.limits[cache]
    names = [limit.name for limit in limits]
    where, all_of = ("constraints", "limits and constraints") if constrained else (names[0], "limits")
    what = f"no mix of formats on the menu keeps all {all_of} together ({', '.join(names)})."
    works = []
    for limit in limits:
        least = least_amount(space, limit, cache, [other for other in limits if other is not limit])
        if least is not None and least > limit.bytes:
            works.append(_nearest(limit, least, place, fp8=fp8))
    remedy = " Or: ".join(works) or "Loosen one of them."
    return UserError(what, code="plan-impossible", where=where, remedy=remedy)


def _missing(space: Space, limit: Limit, cache: str) -> int:
    """How many bytes a limit lacks for the smallest mix within the constraints; 0 where there is none."""
    least = least_amount(space, limit, cache)
    return 0 if least is None else least - limit.bytes


def _amount_as_it_is(space: Space, limit: Limit) -> int | None:
    """What the model as it is counts against a limit; None where it may not stay."""
    kept = [one for menu in space.menus for one in menu.options if one.format == KEEP]
    if len(kept) < len(space.menus):
        return None
    return limit.amount(sum((one.bytes for one in kept), space.outside[KEEP]))


def _words(limit: Limit, place: Place) -> str:
    beside = f" beside {place.budget.context:,} tokens" if place.budget.context else ""
    return {
        "gpu": f"the weights on each GPU{beside} take",
        "served": "the weights take",
        "file": "the weights take",
        "disk": "the weight files take",
    }[limit.kind]


def _nearest(limit: Limit, least: int, place: Place, *, fp8: bool) -> str:
    """What to ask for instead so that `least` bytes fit: the value of the same parameter that just works."""
    missing = least - limit.bytes
    if limit.kind == "gpu" and place.served is not None and place.server.settings is not None:
        settings = place.server.settings
        context = longest_context(place.served, least, settings, fp8=fp8)
        if context:
            return f"The longest that works is `context={context}`."
        reported = settings.gpu.reported_bytes
        share = settings.gpu_memory_utilization or settings.engine.gpu_memory_utilization or 1.0
        needed = -(-int(reported + missing / share) // (GIB // 4)) / 4
        return f"A GPU of about {needed:g} GiB works, or a larger `tensor_parallel_size`."
    if limit.name == "bits_per_weight":
        return f"`bits_per_weight={-(-800 * least // max(1, place.elements)) / 100:g}` works."
    given = place.budget.disk if limit.name == "disk" else place.budget.bytes
    return f"`{limit.name}={(given or 0) + missing}` works."


def _check(budget: Budget) -> None:
    sizes: Mapping[str, float | None] = {
        "bytes": budget.bytes,
        "bits_per_weight": budget.bits_per_weight,
        "disk": budget.disk,
        "max_kl": budget.max_kl,
    }
    for name, value in sizes.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"must be > 0, got {value:g}.", code="option-invalid", where=name, remedy="")
    if budget.context is not None and budget.context < 1:
        what = f"must be >= 1, got {budget.context}."
        raise UserError(what, code="option-invalid", where="context", remedy="The minimum is 1.")
    if budget.gpu is None and all(value is None for value in sizes.values()):
        what = "a budget is required."
        remedy = "Give `gpu` and `context`, or `bytes`, `bits_per_weight`, `disk` or `max_kl`."
        raise UserError(what, code="option-missing", where="gpu", remedy=remedy)
    if budget.gpu is not None and budget.context is None and budget.max_kl is None:
        what = "a context is required: weights and KV cache share the GPU."
        remedy = "Give `context`, such as 32k, or `max_kl` for the longest context under that KL."
        raise UserError(what, code="option-missing", where="context", remedy=remedy)
    if budget.gpu is None:
        _check_without_gpu(budget)


def _check_without_gpu(budget: Budget) -> None:
    """UserError for an argument that has no effect without a GPU."""
    plain = Budget()
    for name in ("tensor_parallel_size", "engine", "gpu_memory_utilization", "max_num_seqs"):
        if getattr(budget, name) != getattr(plain, name):
            what = "has no effect without `gpu`."
            raise UserError(what, code="option-conflict", where=name, remedy="Give `gpu`, or leave it out.")


def _other_bytes(layout: ModelLayout) -> int:
    """Bytes of config.json and of the files that are copied with a quantized model; of a Hub model of its config."""
    checkpoint = layout.checkpoint
    config = 4 * len(json.dumps(checkpoint.config, indent=2))  # with the formats of all linears
    if checkpoint.remote:
        return config
    names = frozenset(checkpoint.other_files)
    copied = (checkpoint.path / name for name in names if is_copied(name, names))
    return config + sum(file.stat().st_size for file in copied if file.is_file())
