"""Sweeps over all combinations of several axes, of which `make test` runs a part and `make slow` the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def thinned(keep: Callable[..., bool], *axes: Iterable[Any]) -> Sequence[Any]:
    """Parameters of a test, one for each combination of the axes; those that `keep` is false for are marked slow."""
    return [pytest.param(*case, marks=() if keep(*case) else pytest.mark.slow) for case in product(*axes)]
