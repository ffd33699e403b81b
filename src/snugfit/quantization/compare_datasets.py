"""Two datasets on one model: what each leaves uncovered, and what that costs weights that are quantized by the other.

All samples of both pass the layers once, with the model's own weights, one layer at a time in memory. Of each layer the
two groups of samples are measured apart; its linears are quantized by what either saw, with weighted scales and GPTQ,
and the error of their outputs is taken on either. Routed experts get weighted scales, as in `quantize`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from snugfit.arguments import as_sequence
from snugfit.calibration.moments import Moments
from snugfit.calibration.two_sides import TwoSidedExperts, TwoSides
from snugfit.data.dataset import Dataset, check_files, make_dataset
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.formats.spec import INT4_GROUPS, MXFP4_BLOCK, NVFP4_BLOCK, TensorFormat
from snugfit.methods.calibrated import choose_scales, squares_of_experts
from snugfit.methods.gptq import Feedback, feedback_of, round_weight
from snugfit.methods.method import Choice, ObservedLayer, Purpose, WeightGroup
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.model import experts
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT, Progress
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration, check_options
from snugfit.quantization.plan import measure_only
from snugfit.quantization.prepare import load_samples, prepare, with_other_files
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Run
from snugfit.records.dataset import (
    RAISED,
    ComparedDataset,
    DatasetComparison,
    ExpertsComparison,
    LinearComparison,
)
from snugfit.records.statistics_file import ExpertCalibration
from snugfit.storage.staging import resumable
from snugfit.version import __version__

FORMATS = ("int4", "nvfp4", "mxfp4")
_OF_EXPERT = re.compile(r"\.\d+\.(?=[^.]+$)")
_GROUPS = tuple(size for size in sorted(INT4_GROUPS, reverse=True) if size <= 128)


def compare_datasets(
    a: str | Path | Sequence[str | Path],
    b: str | Path | Sequence[str | Path],
    *,
    model: str | Path,
    num_samples: int | None = None,
    max_seq_length: int | None = None,
    shuffle_seed: int | None = None,
    format: str = "int4",  # noqa: A002  # the word of recipes
    device: str | None = None,
    tokens_per_batch: int | None = None,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> DatasetComparison:
    """What dataset `a` shows `model` that `b` does not, and the other way round.

    `a` and `b` are datasets as `quantize` takes them; its other arguments mean the same here. `format` is what weights
    are quantized to for the errors: "int4", "nvfp4" or "mxfp4". Nothing is written. Raises UserError for bad input.
    """
    if format not in FORMATS:
        what, remedy = f"unknown format {format!r}.", f"Choose one of {', '.join(FORMATS)}."
        raise UserError(what, code="option-invalid", where="format", remedy=remedy)
    calibration = Calibration(
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        shuffle_seed=shuffle_seed,
        device=device,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
        experts=ExpertCalibration(all_experts=False, min_tokens_per_expert=0),
    )
    check_options(calibration)
    sides = [replace(calibration, dataset=as_sequence(files)) for files in (a, b)]
    for side in sides:
        check_files(side.dataset)
    plan = with_other_files(measure_only(read_layout(model)))  # tokenizers are among them
    found = [load_samples(plan, side) for side in sides]
    if found[0].digest == found[1].digest:
        what = "both datasets give the same samples."
        raise UserError(what, code="option-conflict", where="b", remedy="Compare different datasets.")
    joined = make_dataset([*found[0].samples, *found[1].samples], "both", [len(one.samples) for one in found])
    method = _Comparer(first=len(found[0].samples), format=format)
    prepared = prepare(plan, sides[0], method, samples=joined)
    prepared.report(progress)
    with tempfile.TemporaryDirectory(prefix="snugfit-") as folder:
        destination = Path(folder) / "run"
        prepared.check_resources(destination)
        with resumable(destination, restart=False) as (directory, work):
            finished = FinishedUnits(work, prepared.identity(), force=False)
            run_layers(
                Run(
                    prepared=prepared,
                    directory=directory,
                    work=work,
                    finished=finished,
                    progress=progress,
                )
            )
    return DatasetComparison(
        snugfit=__version__,
        model=plan.checkpoint.name,
        a=_described(found[0]),
        b=_described(found[1]),
        format=format,
        shared_samples=len(set(found[0].samples) & set(found[1].samples)),
        linears=tuple(method.linears),
        experts=tuple(method.experts),
    )


def _described(dataset: Dataset) -> ComparedDataset:
    return ComparedDataset(
        source=dataset.source, num_samples=len(dataset.samples), tokens=dataset.tokens, digest=dataset.digest
    )


@dataclass(frozen=True)
class _Seen:
    """What one dataset showed a layer: moments by the file's names of linears, E[x^2] of experts' by theirs."""

    moments: Mapping[str, Moments]
    channels: Mapping[str, Tensor]
    experts: Mapping[str, Tensor]


@dataclass
class _Comparer:
    """A method that changes nothing: it measures both datasets in each layer, and quantizes its weights by either."""

    first: int
    format: str
    linears: list[LinearComparison] = field(default_factory=list)
    experts: list[ExpertsComparison] = field(default_factory=list)
    _factors: list[tuple[Tensor, Feedback | None]] = field(default_factory=list)  # of the last two Gram matrices

    @property
    def correlates(self) -> bool:
        """It holds E[x x^T] of the inputs of a layer's linears."""
        return True

    def observe(self, layer: ObservedLayer) -> tuple[tuple[_Seen, _Seen], list[tuple[str, ...]]]:
        """What either dataset shows the layer, and its linears in groups that share their inputs."""
        groups = group_modules(layer.linears)
        watched = TwoSides(layer.module, [layer.linears[group[0]] for group in groups], self.first)
        mixture = None
        if layer.experts is not None:
            mixture = TwoSidedExperts(self.first)
            experts.hook(layer.module.get_submodule(layer.experts.module), mixture)

        def before(batch: Any) -> None:
            watched.before(batch)
            if mixture is not None:
                mixture.before(batch)

        layer.run(before)
        per_expert: list[dict[str, Tensor]] = [{}, {}]
        if mixture is not None and layer.experts is not None:
            per_expert = [squares_of_experts(layer, one.result()) for one in mixture.moments]
            name = f"{layer.prefix}{layer.experts.module}"
            routed_a, routed_b = (tuple(routed) for routed in mixture.routed)
            self.experts.append(ExpertsComparison(name=name, routed_a=routed_a, routed_b=routed_b))
        seen = []
        for (moments, channels), of_experts in zip(watched.result(), per_expert, strict=True):
            by_file = {name: layer.linears[group[0]] for group in groups for name in group}
            seen.append(
                _Seen(
                    {name: moments[module] for name, module in by_file.items() if module in moments},
                    {name: channels[module] for name, module in by_file.items() if module in channels},
                    of_experts,
                )
            )
        return (seen[0], seen[1]), groups

    def input_roundings(self, _: Any) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """None: the layer runs as it is."""
        return {}

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """Every tensor as it is; on the way the errors of weights under either dataset are noted."""
        errors: dict[str, tuple[float | None, ...]] = {}
        seen, shared = purpose.observed if purpose.observed is not None else ((None, None), [])
        for group in groups:
            for name, weight in group.weights.items():
                module = name.removesuffix(".weight")
                if seen[0] is not None and name.endswith(".weight") and weight.dim() == 2:
                    errors[module] = self._errors(module, weight, seen)
            yield from ROUND_TO_NEAREST.choose([group], purpose)
        self._factors = []
        if seen[0] is not None:
            self._note(seen, shared, errors)

    def _errors(self, name: str, weight: Tensor, seen: tuple[_Seen, _Seen]) -> tuple[float | None, ...]:
        """Errors of weights by A on A, by B on A, by A on B, by B on B, summed over outputs, and the two outputs' sums.

        In a tuple of six: four sums of E|(W_q - W) x|^2, then E|W x|^2 on A and on B; None where nothing came.
        """
        fmt = _format_for(self.format, weight.shape[1])
        moments = [one.moments.get(name) for one in seen]
        diagonal = [one.experts.get(name) for one in seen]
        if fmt is None or not any(one is not None for one in (*moments, *diagonal)):
            return (None,) * 6
        exact = weight.float()
        changes: list[Tensor | None] = []
        for of_linear, of_expert in zip(moments, diagonal, strict=True):
            importance = of_expert if of_linear is None else of_linear.squares
            if importance is None:
                changes.append(None)
                continue
            steps = choose_scales({name: exact}, fmt, importance, weight.dtype)[name].steps
            feedback = None if of_linear is None or of_linear.gram is None else self._feedback(of_linear.gram)
            changes.append(round_weight(exact, steps, feedback) - exact)
        on = [_energy(one, other) for one, other in zip(moments, diagonal, strict=True)]
        sums = [None if change is None or energy is None else energy(change) for energy in on for change in changes]
        return (*sums, *(None if energy is None else energy(exact) for energy in on))

    def _feedback(self, gram: Tensor) -> Feedback | None:
        """GPTQ's factors of a Gram matrix, which linears with the same inputs share; None if it has none."""
        if not any(known is gram for known, _ in self._factors):
            self._factors = [*self._factors[-1:], (gram, feedback_of(gram))]
        return next(factors for known, factors in self._factors if known is gram)

    def _note(
        self,
        seen: tuple[_Seen, _Seen],
        groups: Sequence[tuple[str, ...]],
        errors: Mapping[str, tuple[float | None, ...]],
    ) -> None:
        named = {name for group in groups for name in group}
        together: dict[str, list[str]] = {}  # the experts of a layer
        for name in errors:
            if name not in named:
                together.setdefault(_OF_EXPERT.sub(".*.", name), []).append(name)
        shown = [(group[0], group) for group in groups] + [(name, tuple(of)) for name, of in together.items()]
        for name, names in shown:
            rows = [errors[name] for name in names if name in errors]
            if not rows:
                continue
            relative = [_ratio(rows, place, 4 + place // 2) for place in range(4)]
            channels = [one.channels.get(names[0]) for one in seen]
            raised = [_raised(channels[1], channels[0]), _raised(channels[0], channels[1])]
            width = next((len(one) for one in channels if one is not None), 0)
            self.linears.append(
                LinearComparison(
                    name=name,
                    channels=width,
                    raised_by_b=raised[0][0],
                    largest_raise_b=raised[0][1],
                    raised_by_a=raised[1][0],
                    largest_raise_a=raised[1][1],
                    error_a_on_a=relative[0],
                    error_b_on_a=relative[1],
                    error_a_on_b=relative[2],
                    error_b_on_b=relative[3],
                )
            )


def _format_for(name: str, inputs: int) -> TensorFormat | None:
    """The format for a weight with this number of inputs, INT4 with the largest group that fits; None if none does."""
    if name == "int4":
        size = next((size for size in _GROUPS if inputs % size == 0), None)
        return None if size is None else TensorFormat("int4", group_size=size)
    block = NVFP4_BLOCK if name == "nvfp4" else MXFP4_BLOCK
    return TensorFormat(name) if inputs % block == 0 else None


def _energy(moments: Moments | None, diagonal: Tensor | None) -> Callable[[Tensor], float] | None:
    """What gives E|D x|^2 of a matrix D [N, K]; for experts by E[x^2] alone. None where nothing came."""
    if moments is not None and moments.gram is not None:
        gram = moments.gram
        return lambda matrix: float(((matrix @ gram) * matrix).sum().double())
    if diagonal is not None:
        return lambda matrix: float((matrix.square() @ diagonal).sum().double())
    return None


def _ratio(rows: Sequence[tuple[float | None, ...]], error: int, output: int) -> float | None:
    pairs = [(row[error], row[output]) for row in rows]
    found = [(one, other) for one, other in pairs if one is not None and other is not None]
    total = sum(other for _, other in found)
    return sum(one for one, _ in found) / total if total > 0 else None


def _raised(high: Tensor | None, low: Tensor | None) -> tuple[int, float]:
    """How many channels one dataset raises above the other, and by what factor at most; channels of zeros aside."""
    if high is None or low is None:
        return 0, 1.0
    both = (high > 0) & (low > 0)
    factors = high[both] / low[both]
    count = int((factors > RAISED).sum()) + int(((high > 0) & (low == 0)).sum())
    return count, max(1.0, float(factors.max())) if len(factors) else 1.0
