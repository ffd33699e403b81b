"""Expected errors, matched by their stable code and their place: prose is free to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from snugfit.errors import CODES, UserError


@contextmanager
def raises(code: str, where: object = "") -> Iterator[pytest.ExceptionInfo[UserError]]:
    """As pytest.raises, for a UserError of this code whose place contains `where`."""
    assert code in CODES, f"{code} is not a code of snugfit.errors.CODES"
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    assert str(where) in caught.value.where, f"{where} is not in the place {caught.value.where!r}"


def failed_with(result: object, code: str, *words: object) -> bool:
    """Whether a run of the command line (typer's Result) ended with exit code 2, this code, and these places named."""
    assert code in CODES, f"{code} is not a code of snugfit.errors.CODES"
    output = f"{getattr(result, 'stderr', '')}"
    assert getattr(result, "exit_code", None) == 2, f"exit code {getattr(result, 'exit_code', None)}: {output}"
    assert f"[{code}]" in output, output
    missing = [str(word) for word in words if str(word) not in output]
    assert not missing, f"{missing} not in {output}"
    return True
