"""How long runs report: silent by default, on stderr if asked."""

from __future__ import annotations

import pytest

from snugfit.progress import SILENT, TerminalProgress


def test_silent_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The default of every function writes to neither stream, and counts steps all the same."""
    SILENT.message("words")
    with SILENT.bar(2, "layers") as advance:
        advance()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_messages_and_bars_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages are lines, a bar ends with its count; stdout stays free for the result."""
    progress = TerminalProgress()
    progress.message("words")
    with progress.bar(2, "layers") as advance:
        advance()
        advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("words\n")
    assert "layers" in err
    assert "2/2" in err
