"""Faults that only values show: scales that nothing calibrated, global scales upside down, magnitudes of no weight."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snugfit.dialects.dialect import GLOBAL_SCALES, INPUT_GLOBALS, WEIGHT_GLOBALS
from snugfit.dialects.packed import is_cache_scale
from snugfit.dialects.rename import COMPRESSED
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.inspection.checks.agreement import is_whole, needed_suffixes
from snugfit.inspection.evidence import Evidence, Module, finding
from snugfit.model.names import may_be_infinite
from snugfit.progress import SILENT, Progress
from snugfit.records.doctor import Finding
from snugfit.storage.safetensors_header import StoredTensor

if TYPE_CHECKING:
    from snugfit.model.weight_values import Magnitudes, ScaleValues

_SCALES = ("weight_scale", "weight_scale_inv")
NVFP4_RANGE = 6.0 * 448.0  # the largest code times the largest block scale
# of a sound weight: its largest magnitude, and that which a global scale implies, where blocks use all of their range
AMAX = 1e-4, 300.0
IMPLIED_AMAX = 1e-5, 1e4
# of the median over all linears: the largest calibrated input
INPUT_AMAX = 1e-2, 1e5
_PER_FORM = 3  # weights of a sample that differ in numbers alone


@dataclass
class Survey:
    """What was read: the number at each global scale, counts of the other scales, magnitudes of weights."""

    globals: dict[str, float] = field(default_factory=dict)
    scales: dict[str, ScaleValues] = field(default_factory=dict)
    weights: dict[str, Magnitudes] = field(default_factory=dict)
    plain: dict[str, Magnitudes] = field(default_factory=dict)


def sample_of(names: Iterable[str]) -> list[str]:
    """Some of these names: of those that differ in numbers alone the first, the last and one between."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    chosen: list[str] = []
    for alike in forms.values():
        last = len(alike) - 1
        chosen += dict.fromkeys(alike[last * step // (_PER_FORM - 1)] for step in range(_PER_FORM))
    return list(dict.fromkeys(chosen))


def survey(evidence: Evidence, values: str, progress: Progress = SILENT) -> Survey:
    """Read the values that the checks need: of a sample of the weights, or of all; global scales always all.

    With `values` "globals" nothing else is read. Of a model on the Hub a sample has the global scales of its own
    weights alone.
    """
    from snugfit.model import weight_values as reader

    found = Survey()
    checkpoint, sampled = evidence.checkpoint, values == "sample"
    sound = {n: m for n, m in evidence.quantized.items() if m.asked is not None and is_whole(evidence, m, m.asked)}
    chosen = sample_of(sound) if sampled else list(sound)
    counted = chosen if sampled and checkpoint.remote is not None else list(sound)
    numbers = [tensor for name in counted for tensor in _globals_of(sound[name])]
    numbers += [t for t in _cache_tensors(evidence) if t.elements == 1]
    # in the order of the files, so that neighbours are read together
    numbers.sort(key=lambda tensor: (tensor.file, tensor.offset))
    found.globals.update(reader.scalars(checkpoint, (tensor.name for tensor in numbers)))
    if values == "globals":
        return found
    plain = [name for name, tensor in checkpoint.tensors.items() if _is_plain(name, tensor, evidence)]
    plain = sample_of(plain) if sampled else plain
    with progress.bar(len(chosen) + len(plain), "values") as advance:
        for name in chosen:
            module = sound[name]
            assert module.asked is not None
            for suffix in _SCALES:
                if suffix in module.parts:
                    found.scales[f"{name}.{suffix}"] = reader.read_scales(checkpoint, f"{name}.{suffix}")
            suffixes = needed_suffixes(evidence.layout.dialect, module, module.asked)
            try:
                slices = reader.stored_slices(checkpoint, evidence.layout.dialect, name, module.asked, suffixes)
                found.weights[name] = reader.magnitudes(slices)
            except (ValueError, RuntimeError, IndexError):  # parts that do not fit: reported from the headers
                found.weights.pop(name, None)
            advance()
        for name in plain:
            found.plain[name] = reader.magnitudes(reader.plain_slices(checkpoint, name))
            advance()
    return found


def _globals_of(module: Module) -> Iterator[StoredTensor]:
    for suffix in GLOBAL_SCALES:
        tensor = module.parts.get(suffix)
        if tensor is not None and tensor.elements == 1 and tensor.dtype in ("F32", "F16", "BF16"):
            yield tensor


def _cache_tensors(evidence: Evidence) -> Iterator[StoredTensor]:
    for module, parts in evidence.layout.modules.items():
        for suffix, tensor in parts.items():
            if is_cache_scale(module, suffix) and tensor.dtype in ("F32", "F16", "BF16"):
                yield tensor


def _is_plain(name: str, tensor: StoredTensor, evidence: Evidence) -> bool:
    module = evidence.modules.get(name.rpartition(".")[0])
    served = module is not None and module.stored
    return tensor.dtype in ("BF16", "F16", "F32") and tensor.elements > 0 and not served


def broken_scales(evidence: Evidence, found: Survey) -> Iterator[Finding]:
    """Scales that are NaN, infinite, zero or negative."""
    kinds: dict[str, dict[str, str]] = {"scale-not-finite": {}, "scale-zero": {}, "scale-negative": {}}
    for name, value in found.globals.items():
        if not math.isfinite(value):
            kinds["scale-not-finite"][name] = f"{name} is {value}."
        elif value == 0:
            kinds["scale-zero"][name] = f"{name} is 0."
        elif value < 0:
            kinds["scale-negative"][name] = f"{name} is {value:g}."
    for name, scale in found.scales.items():
        fmt = evidence.modules[name.rpartition(".")[0]].asked
        of = f"of {scale.elements} values of {name} are"
        if scale.not_finite:
            kinds["scale-not-finite"][name] = f"{scale.not_finite} {of} not finite."
        elif scale.elements and scale.zeros == scale.elements:
            kinds["scale-zero"][name] = f"all values of {name} are 0."
        elif scale.negative and fmt is not None and fmt.name.startswith("nvfp4"):
            kinds["scale-negative"][name] = f"{scale.negative} {of} negative."
    for fault, places in kinds.items():
        yield from finding(fault, list(places), next(iter(places.values()), ""), evidence.affected())
    yield from _broken_weights(evidence, found, [name.rpartition(".")[0] for name in kinds["scale-not-finite"]])


def _broken_weights(evidence: Evidence, found: Survey, known: Sequence[str]) -> Iterator[Finding]:
    """Plain weights and codes that are NaN or infinite; those of `known` modules have a scale that is."""
    plain = [n for n, magnitude in found.plain.items() if not magnitude.finite and not may_be_infinite(n)]
    what = f"{plain[0] if plain else ''} holds NaN or infinity."
    yield from finding("weight-not-finite", plain, what, evidence.affected())
    codes = [name for name, magnitude in found.weights.items() if not magnitude.finite and name not in known]
    what = f"codes of {codes[0] if codes else ''} are NaN."
    yield from finding("weight-not-finite", codes, what, evidence.affected())


def global_scales(evidence: Evidence, found: Survey) -> Iterator[Finding]:
    """Global scales of weights and inputs that are defaults, or the reciprocal of what the dialect means."""
    divisors = evidence.dialect == COMPRESSED
    inverted: dict[str, str] = {}
    default: dict[str, str] = {}
    for name, value in found.globals.items():
        module, suffix = _split(name)
        if not (math.isfinite(value) and value > 0) or is_cache_scale(module, suffix):
            continue
        if suffix in INPUT_GLOBALS and value == 1.0:
            default[name] = f"{name} is exactly 1.0, which no calibration gives."
        if suffix not in WEIGHT_GLOBALS:
            continue
        implied = NVFP4_RANGE / value if divisors else NVFP4_RANGE * value
        other = NVFP4_RANGE * value if divisors else NVFP4_RANGE / value
        real = found.weights.get(module)
        if real is not None and _within(real.amax, AMAX):
            continue
        if not _within(implied, IMPLIED_AMAX) and _within(other, AMAX):
            meant, stored = ("divisors", "multiplier") if divisors else ("multipliers", "divisor")
            inverted[name] = (
                f"{name} is {value:g}: this dialect has {meant}, which makes weights up to {implied:.3g}; as "
                f"a {stored} it makes {other:.3g}."
            )
    inverted |= _inverted_inputs(found, divisors)
    for fault, places in (("global-scale-inverted", inverted), ("scale-default", default)):
        what = next(iter(places.values()), "")
        yield from finding(fault, list(places), what, evidence.affected())
    yield from _magnitudes(evidence, found, [_split(name)[0] for name in inverted])


def _inverted_inputs(found: Survey, divisors: bool) -> dict[str, str]:
    """Global scales of NVFP4 inputs, all taken together: one input's range says little."""
    values = {n: v for n, v in found.globals.items() if n.endswith(".input_global_scale") and 0 < v < math.inf}
    if not values or not divisors or len(values) < 2:
        return {}
    middle = statistics.median(values.values())
    implied, other = NVFP4_RANGE / middle, NVFP4_RANGE * middle
    if _within(implied, INPUT_AMAX) or not _within(other, INPUT_AMAX) or middle == 1.0:
        return {}
    what = (
        f"input_global_scale is {middle:g} in the median: as the divisor that this dialect means, inputs reach "
        f"{implied:.3g}; as a multiplier {other:.3g}."
    )
    return dict.fromkeys(values, what)


def _magnitudes(evidence: Evidence, found: Survey, known: Sequence[str]) -> Iterator[Finding]:
    """Weights whose largest magnitude is none of a weight, without those of `known` faults."""
    far: dict[str, str] = {}
    default: dict[str, str] = {}
    for name, m in found.weights.items():
        scales = [s for suffix in _SCALES if (s := found.scales.get(f"{name}.{suffix}")) is not None]
        zero = any(s.zeros == s.elements for s in scales)
        wrong = [v for s in WEIGHT_GLOBALS if not _positive(v := found.globals.get(f"{name}.{s}", 1.0))]
        if not m.finite or name in known or zero or wrong or m.amax == 0 or _within(m.amax, AMAX):
            continue
        ones = any(s.ones == s.elements for s in scales)
        ones = ones or any(found.globals.get(f"{name}.{suffix}") == 1.0 for suffix in WEIGHT_GLOBALS)
        if ones:
            default[name] = f"its scales are all 1.0, which makes weights up to {m.amax:.3g}."
        else:
            far[name] = f"its weights reach {m.amax:.3g}; weights of models reach {AMAX[0]:g} to {AMAX[1]:g}."
    for fault, places in (("scale-default", default), ("magnitude-implausible", far)):
        what = next(iter(places.values()), "")
        yield from finding(fault, list(places), what, evidence.affected())


def shared_scales(evidence: Evidence, found: Survey) -> Iterator[Finding]:
    """Members of a fused group with unlike global scales; experts of a layer with unlike scales of inputs."""
    nvfp4 = [
        name
        for name, module in evidence.quantized.items()
        if module.asked is not None and module.asked.name.startswith("nvfp4") and evidence.is_in_layers(module)
    ]
    differing, what = [], ""
    for group in group_modules(nvfp4):
        for suffix in (*WEIGHT_GLOBALS, "input_global_scale", "input_scale"):
            known = {name: v for name in group if (v := found.globals.get(f"{name}.{suffix}")) is not None}
            if len(set(known.values())) > 1 and all(map(_positive, known.values())):
                differing.append(f"{group[0]}.{suffix}")
                shown = ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in known.items())
                what = what or f"{suffix} is {shown}: vLLM takes the largest for all of them."
    servers = evidence.affected(release for release in evidence.engines if release.kernels)
    yield from finding("fused-scales-differ", differing, what, servers)
    layers: dict[tuple[str, str], set[float]] = {}
    for name, value in found.globals.items():
        module, suffix = _split(name)
        if ".experts." in module and suffix == "input_global_scale":
            above = module.partition(".experts.")[0]
            kind = "down" if evidence.modules[module].parsed.role == "down" else "gate and up"
            layers.setdefault((above, kind), set()).add(value)
    places = [f"{above}.experts" for (above, _), values in layers.items() if len(values) > 1]
    what = "experts of a layer have different scales of inputs: some back ends of vLLM take one for all."
    yield from finding("experts-scales-differ", list(dict.fromkeys(places)), what, servers)


def cache_values(evidence: Evidence, found: Survey) -> Iterator[Finding]:
    """An FP8 cache whose scales are all 1.0."""
    if evidence.layout.unreadable is not None:
        return
    try:
        declared = evidence.layout.dialect.kv_cache_format()
    except UserError:
        return
    names = [n for n in found.globals if is_cache_scale(*_split(n)) and not n.endswith((".q_scale", ".prob_scale"))]
    if declared and names and all(found.globals[name] == 1.0 for name in names):
        what = f"all {len(names)} scales of keys and values are exactly 1.0: nothing was calibrated."
        yield from finding("kv-scale-default", names, what, evidence.affected())


def _split(name: str) -> tuple[str, str]:
    module, _, suffix = name.rpartition(".")
    return module, suffix


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
