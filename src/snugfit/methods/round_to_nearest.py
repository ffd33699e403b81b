"""Round-to-nearest: every value becomes the code that is nearest to it, under scales that its own rule chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from snugfit.formats.spec import EFFORT, PLAIN_RULES
from snugfit.methods.method import Choice, Purpose, WeightGroup
from snugfit.methods.rounding import round_and_compare


class RoundToNearest:
    """Chooses codes from the weights alone, one fused group at a time; it needs no observation."""

    observe: None = None  # the codes do not depend on the layer's inputs
    correlates = False

    def input_roundings(self, observed: Any) -> Mapping[str, Callable[[Tensor], Tensor]]:  # noqa: ARG002
        """None: ranges of inputs are not known before the layer runs."""
        return {}

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """The nearest codes of each group with a target; every other tensor as it is."""
        for group in groups:
            if group.target is None:
                for name in list(group.weights):
                    yield Choice(name=name, codes=None, weight_16bit=group.weights.pop(name))
                continue
            fmt, rule = group.target.format, group.target.scale_rule
            rule = PLAIN_RULES.get(fmt.name, fmt.spec.scale_rules[0]) if rule == EFFORT else rule
            settings = fmt, rule, group.target.objective
            for one in round_and_compare(group.weights, *settings, values=purpose.runs, into=purpose.buffers):
                yield Choice(
                    name=one.name,
                    codes=one.weight,
                    weight_16bit=None if one.name in purpose.buffers else one.values,
                    relative_error=one.relative_error,
                    scale_rule=rule,
                )


ROUND_TO_NEAREST = RoundToNearest()
