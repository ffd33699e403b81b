"""What plans cost on held-out text, beside what was predicted, and which of them was better than its control."""

from __future__ import annotations

from dataclasses import dataclass

from snugfit.records.evaluation import TextRecord
from snugfit.records.scores import Predicted

ALL_TEXTS = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """KL(original || plan), nats a token, on the scored tokens of one text (ALL_TEXTS: of all) at one context.

    `context` is 0 for rows of their own lengths, None for all contexts together. `error` is the standard error over
    segments of 128 tokens. `gain` is how much lower it is than the control's, segment by segment, with its error; None
    for the control.
    """

    context: int | None
    text: str
    tokens: int
    kl: float
    error: float
    gain: float | None = None
    gain_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Proved:
    """A plan that was measured, and what was predicted of it by context (empty without scores).

    `beats_control`: its KL on all text is lower than the control's beyond the error, and at no context higher beyond
    the error; None for the control.
    """

    name: str
    measured: tuple[Measured, ...]
    predicted: dict[int, Predicted]
    beats_control: bool | None

    @property
    def overall(self) -> Measured:
        """On all texts at all contexts."""
        return self.measured[0]

    def at(self, context: int) -> Measured:
        """On all texts at a context."""
        return next(one for one in self.measured if one.context == context and one.text == ALL_TEXTS)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Plans compared on the same held-out text, in the order in which they were given.

    `winner` has the least KL of those that beat the control; it is the control if none does. `rounding` and `target`
    are those of the comparison (records/scores.py calls them effort and target).
    """

    control: str
    winner: str
    rounding: str
    target: str
    texts: tuple[TextRecord, ...]
    plans: tuple[Proved, ...]

    def plan(self, name: str) -> Proved:
        """The plan of this name."""
        return next(plan for plan in self.plans if plan.name == name)
