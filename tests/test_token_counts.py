"""Numbers of tokens as people write them."""

from __future__ import annotations

import pytest

from helpers.errors import raises
from snugfit.token_counts import parse_token_list, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *(("32k", 32768), ("32K", 32768), (" 4096 ", 4096), ("1m", 2**20), ("1.5k", 1536), ("32,768", 32768)),
        ("1,048,576", 2**20),
    ],
)
def test_tokens(text: str, tokens: int) -> None:
    """Tokens are whole numbers, or thousands of 1,024."""
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["0", "0k", "-1", "k", "", "32kb", "1.5", "many", "1e6", "4096,8192", "4k,8k", "32,76", "٣", "9" * 400]
)
def test_what_is_not_a_number_of_tokens(text: str) -> None:
    """Anything else is an error that quotes it, a list too: no comma between two numbers is dropped in silence."""
    with raises("option-invalid", where="max_seq_length") as caught:
        parse_tokens(text, where="max_seq_length")
    assert repr(text)[:100] in caught.value.what


@pytest.mark.parametrize(
    ("text", "tokens"), [("2048", (2048,)), ("4096,8k", (4096, 8192)), ("4k, 8k,1m", (4096, 8192, 2**20))]
)
def test_lists(text: str, tokens: tuple[int, ...]) -> None:
    """Commas separate the numbers of a list."""
    assert parse_token_list(text) == tokens


@pytest.mark.parametrize("text", ["", ",", "4k,", "4k;8k", "4k,-1"])
def test_what_is_not_a_list(text: str) -> None:
    """A list with a part that is missing or is not a number is an error."""
    with raises("option-invalid", where="context"):
        parse_token_list(text)
