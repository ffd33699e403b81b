"""What the tests of `make gpu` share: a CUDA device, and the rule that a machine without one fails them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The CUDA device; these tests are for a machine that has one."""
    if not torch.cuda.is_available():
        pytest.fail("`make gpu` needs a machine with a CUDA device")
    return torch.device("cuda")
