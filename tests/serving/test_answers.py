"""What comes back from a server, and answers that cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from helpers.errors import raises
from helpers.mock_vllm import MODEL, ROW, TABLE, VARIABLES, Change, Mock, V, body_of, expected_true
from snugfit.serving.answers import read_answer
from snugfit.serving.client import Server, connect, find_top


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    """A running mock server, without a proxy or a key of the machine's own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with Mock() as running:
        yield running


@pytest.fixture
def server(mock: Mock) -> Iterator[Server]:
    """A client of the mock."""
    with connect(mock.url) as connected:
        yield connected


# What comes back.


def test_the_top_and_the_own_tokens_come_back_exactly(server: Server) -> None:
    """Own values, ids and top values are those of the distribution, best first, in the promised types."""
    result = server.score(ROW, top=5)
    order = np.argsort(-TABLE[ROW[:-1]], axis=1, kind="stable")[:, :5]
    assert result.true_logprob.tolist() == expected_true(ROW)
    assert result.top_ids.tolist() == order.tolist()
    assert np.array_equal(result.top_logprob, np.take_along_axis(TABLE[ROW[:-1]], order, 1).astype(np.float32))
    dtypes = [array.dtype for array in (result.true_logprob, result.top_ids, result.top_logprob)]
    assert dtypes == [np.float64, np.int32, np.float32]
    assert (result.dense, result.fingerprint) == (None, "vllm-0.32.0-mock")


def test_an_own_token_beyond_the_top_is_kept_separately(server: Server) -> None:
    """With the least likely token next, its value is given, and the top arrays only hold the k best."""
    row = [0, int(TABLE[0].argmin())]
    result = server.score(row, top=3)
    assert result.true_logprob.tolist() == expected_true(row)
    assert row[1] not in result.top_ids
    assert result.top_ids.shape == (1, 3)


def test_the_request_says_all_that_matters(mock: Mock, server: Server) -> None:
    """Ids go as they are, with no special tokens, no sampling and one generated token."""
    server.score(ROW, top=4)
    wanted = {"model": MODEL, "prompt": ROW, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 4}
    assert mock.bodies == [wanted | {"add_special_tokens": False, "return_token_ids": True}]


def test_no_top_at_all_gives_the_own_tokens(server: Server) -> None:
    """top=0 asks for nothing but the row's own tokens."""
    result = server.score(ROW, top=0)
    assert result.true_logprob.tolist() == expected_true(ROW)
    assert result.top_ids.shape == (len(ROW) - 1, 0)


def test_minus_infinity_comes_back(mock: Mock, server: Server) -> None:
    """vLLM's -9999.0 is minus infinity again, of an own token and in the full vocabulary."""
    mock.max_logprobs = -1
    mock.table[3, 1] = -np.inf
    mock.table[3] -= np.log(np.exp(mock.table[3]).sum())
    assert server.score(ROW, top=2).true_logprob[0] == -np.inf
    assert server.score(ROW, top=-1).top_logprob[0, -1] == -np.inf
    assert server.score(ROW, top=-1).top_ids[0, -1] == 1


def test_a_missing_number_is_nan(mock: Mock, server: Server) -> None:
    """A null value of an own token becomes NaN at its place and nowhere else."""
    mock.table[4, 1] = np.nan
    true = server.score(ROW, top=2).true_logprob
    assert np.isnan(true).tolist() == [place == 2 for place in range(len(ROW) - 1)]


def test_ties_are_in_the_order_of_ids(mock: Mock, server: Server) -> None:
    """Tokens of equal probability come by id, whichever the server names first."""
    mock.table[7] = -np.log(V)
    assert server.score([7, 20], top=3).top_ids.tolist() == [[0, 1, 2]]
    mock.max_logprobs = -1
    assert server.score([7, 20], top=-1).top_ids.tolist() == [list(range(V))]


def test_fewer_than_asked_are_padded(mock: Mock, server: Server) -> None:
    """Where the server names fewer tokens, ids are -1 and values minus infinity."""

    def shorten(answer: dict[str, Any]) -> dict[str, Any]:
        for place in answer["choices"][0]["prompt_logprobs"][1:]:
            for token in list(place)[2:]:
                del place[token]
        return answer

    mock.change = shorten
    result = server.score(ROW, top=4)
    assert (result.top_ids[:, 2:] == -1).all()
    assert np.isneginf(result.top_logprob[:, 2:]).all()
    assert (result.top_ids[:, 0] >= 0).all()


def test_the_full_vocabulary_comes_back(mock: Mock, server: Server) -> None:
    """top=-1 gives all V values, sorted, or by token id where a dense table is asked for."""
    mock.max_logprobs = -1
    rows = TABLE[ROW[:-1]].astype(np.float32)
    dense = server.score(ROW, top=-1, dense=True)
    assert dense.dense is not None
    assert np.array_equal(dense.dense, rows)
    assert dense.dense.dtype == np.float32
    assert dense.top_ids.shape == (len(ROW) - 1, 0)
    assert dense.true_logprob.tolist() == expected_true(ROW)
    whole = server.score(ROW, top=-1)
    assert np.array_equal(np.take_along_axis(rows, whole.top_ids, 1), whole.top_logprob)
    assert (np.diff(whole.top_logprob, axis=1) <= 0).all()
    assert whole.dense is None


@pytest.mark.parametrize("size", [1, 7, 1000, 10**9])
@pytest.mark.parametrize("top", [3, -1])
def test_an_answer_may_come_in_any_pieces(mock: Mock, size: int, top: int) -> None:
    """Where the network cuts the text changes nothing, though tokens look like JSON."""
    mock.max_logprobs = -1
    text = body_of(mock, ROW, top)
    result = read_answer((text[at : at + size] for at in range(0, len(text), size)), ROW, top=top)
    assert result.true_logprob.tolist() == expected_true(ROW)
    assert result.top_ids.shape == (len(ROW) - 1, V if top == -1 else top)


def test_white_space_in_an_answer_means_nothing(mock: Mock) -> None:
    """A proxy that writes JSON in its own way is understood."""
    text = json.dumps(json.loads(body_of(mock, ROW, 3)), indent=2)
    assert read_answer(iter([text]), ROW, top=3).true_logprob.tolist() == expected_true(ROW)


# Answers that cannot be used.


@pytest.mark.parametrize("change", [lambda c: c.pop("prompt_logprobs"), lambda c: c.update(prompt_logprobs=None)])
def test_a_server_without_prompt_logprobs_is_refused(mock: Mock, server: Server, change: Change) -> None:
    """OpenAI, llama.cpp and SGLang ignore the field: that is said, once looking for the most and once scoring."""

    def ignore(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer["choices"][0])
        return answer

    mock.change = ignore
    mock.max_logprobs = -1
    for attempt in (lambda: server.score(ROW, top=1), lambda: find_top(server, 5)):
        with raises("server-unsupported", where=mock.url) as caught:
            attempt()
        assert "prompt_logprobs" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"choices"', '"options"'),
        ('"logprob"', '"probability"'),
        ('{"choices"', "<html>"),
        ("]}],", "]"),
        ("[null,{", "[null,["),
        ('"logprob":-', '"logprob":"much'),
        ('{"1":', '{"one":'),
        ("[null,", "[null,null,"),
    ],
)
def test_malformed_answers_are_refused(mock: Mock, old: str, new: str) -> None:
    """Text that is not JSON, or JSON of another shape, is refused, with the place."""
    text = body_of(mock, ROW, 3)
    assert old in text
    with raises("server-answer-invalid", where="here"):
        read_answer(iter([text.replace(old, new)]), ROW, top=3, where="here")


@pytest.mark.parametrize("end", range(5, 100, 5))
def test_an_answer_cut_anywhere_is_refused(mock: Mock, end: int) -> None:
    """A text that stops is never taken for a whole answer."""
    text = body_of(mock, ROW, 3)
    with raises("server-answer-invalid"):
        read_answer(iter([text[: len(text) * end // 100]]), ROW, top=3)


def other_row(answer: dict[str, Any]) -> None:
    answer["choices"][0]["prompt_logprobs"][4] = {"0": {"logprob": -1.0, "rank": 1}}


def logits(answer: dict[str, Any]) -> None:
    for place in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in place.values():
            entry["logprob"] += 30.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda answer: answer["choices"][0]["prompt_logprobs"].pop(), r"\b10 .*\b11 tokens"),
        (lambda answer: answer["choices"][0]["prompt_logprobs"].append({"1": {"logprob": -1}}), r"\b11 of 11"),
        (lambda answer: answer["choices"][0]["prompt_token_ids"].insert(0, 1), "tokens"),
        (other_row, r"token 5 .*position 4"),
        (logits, "raw_logits"),
    ],
)
def test_answers_to_something_else_are_refused(mock: Mock, server: Server, change: Change, words: str) -> None:
    """Too few or too many positions, another token, a token added in front, and logits are not taken for an answer."""

    def apply(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer)
        return answer

    mock.change = apply
    with raises("server-answer-invalid", where=mock.url) as caught:
        server.score(ROW, top=3)
    assert re.search(words, str(caught.value))


@pytest.mark.parametrize("token", [0, V - 1, V // 2])
def test_a_full_vocabulary_with_a_hole_is_refused(mock: Mock, token: int) -> None:
    """top=-1 is met by every id from 0 on, at every place."""
    mock.max_logprobs = -1
    mock.table[:, token] = -40.0
    mock.table -= np.log(np.exp(mock.table).sum(1, keepdims=True))
    answer = json.loads(body_of(mock, ROW, -1))
    for place in answer["choices"][0]["prompt_logprobs"][5:]:
        place.pop(str(token), None)
    with raises("server-answer-invalid") as caught:
        read_answer(iter([json.dumps(answer)]), ROW, top=-1)
    assert f"{V - 1} tokens" in str(caught.value)
