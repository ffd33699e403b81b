"""What a caller asks of a run over a model's layers, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from snugfit.data.dataset import check_files
from snugfit.engines.profiles import DEFAULT_PROFILE, PROFILES
from snugfit.errors import UserError
from snugfit.formats.spec import DEFAULT_INPUT_HEADROOM, headroom_problem
from snugfit.machine import pick_device
from snugfit.quantization.plan import Plan
from snugfit.quantization.ways import EFFORTS, FAST
from snugfit.recipes.recipe import AMAX
from snugfit.records.statistics_file import ExpertCalibration

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 8192}
# a GPU takes more tokens of narrow layers, whose kernels it would wait for otherwise: inputs of a linear, and tokens
VALUES_PER_BATCH, MOST_TOKENS_PER_BATCH = 1 << 26, 1 << 15


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a caller asks of the calibration: which samples, on which device, how experts see them.

    `dataset` names files of text or rows, or one set; none for Python's documentation. `num_samples` and
    `max_seq_length` are None for the defaults, or for what a set says. `effort` is one of EFFORTS, None for the
    default; `target` names the engine profile that its choices are made for. `input_headroom` is a number or AMAX, None
    for the default. Nothing here is checked yet.
    """

    dataset: Sequence[str | Path] = ()
    num_samples: int | None
    max_seq_length: int | None
    shuffle_seed: int | None = None
    device: str | None = None
    tokens_per_batch: int | None = None
    dtype: str | None = None
    experts: ExpertCalibration
    statistics: str | Path | None = None
    effort: str | None = None
    target: str = DEFAULT_PROFILE
    input_headroom: float | str | None = None
    experts_per_group: int | None = None


def check_options(calibration: Calibration) -> None:
    """UserError for an option that has a value it cannot have, whether or not the run will use it."""
    for name, value, least in (
        ("num_samples", calibration.num_samples, 1),
        ("max_seq_length", calibration.max_seq_length, 2),
        ("tokens_per_batch", calibration.tokens_per_batch, 1),
        ("experts_per_group", calibration.experts_per_group, 1),
        ("max_forced_tokens", calibration.experts.max_forced_tokens, 0),
        ("min_tokens_per_expert", calibration.experts.min_tokens_per_expert, 0),
    ):
        if value is not None and value < least:
            what = f"must be >= {least}, got {value}."
            raise UserError(what, code="option-invalid", where=name, remedy=f"Give {least} or more.")
    _check_effort(calibration)
    headroom_of(calibration.input_headroom)
    pick_device(calibration.device)
    check_files(calibration.dataset)
    if calibration.statistics is not None and not Path(calibration.statistics).exists():
        raise UserError(
            "no such file or directory.",
            code="file-missing",
            where=str(calibration.statistics),
            remedy="Name a file of statistics, or the directory of a quantized model.",
        )


def headroom_of(asked: float | str | None) -> float:
    """The number that an `input_headroom` stands for; UserError if it stands for none."""
    if asked is None:
        return DEFAULT_INPUT_HEADROOM
    if asked == AMAX:
        return 1.0
    if problem := headroom_problem(asked):
        remedy = f"2 doubles the range, {AMAX} is the calibrated one."
        raise UserError(problem, code="option-invalid", where="input_headroom", remedy=remedy)
    return float(asked)


def _check_effort(calibration: Calibration) -> None:
    if calibration.target not in PROFILES:
        what, remedy = f"unknown profile {calibration.target!r}.", f"Known: {', '.join(PROFILES)}."
        raise UserError(what, code="option-invalid", where="target", remedy=remedy)
    effort = calibration.effort
    if effort is None:
        return
    if effort not in EFFORTS:
        remedy = f"Choose one of {', '.join(EFFORTS)}."
        raise UserError(f"no effort {effort!r}.", code="option-invalid", where="effort", remedy=remedy)
    if effort != FAST and calibration.statistics is not None:
        raise UserError(
            f"effort {effort} needs samples, and `statistics` take their place.",
            code="option-conflict",
            where="effort",
            remedy=f"Leave `statistics` out, or set `effort` to {FAST}.",
        )


def default_tokens_per_batch(plan: Plan, device: torch.device) -> int:
    """How many tokens pass a layer at once."""
    least = TOKENS_PER_BATCH[device.type]
    if device.type == "cpu":
        return least
    tensors = plan.weights.tensors
    widest = max(
        (max(tensors[name].shape) for unit in plan.units[1:] for name in unit if tensors[name].shape), default=1
    )
    return max(least, min(MOST_TOKENS_PER_BATCH, VALUES_PER_BATCH // widest // least * least))
