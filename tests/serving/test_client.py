"""Finding a server and what it allows, rows that it cannot score, and a server that fails."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.errors import raises
from helpers.mock_vllm import CUT, DROP, HANG, MODEL, ROW, VARIABLES, Mock, V, expected_true
from snugfit.serving.answers import PromptLogprobs
from snugfit.serving.client import NotFiniteError, Server, ServerLostError, connect, find_top
from snugfit.serving.engine_log import kernels_from_log
from snugfit.serving.journal import Journal


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    """A running mock server, without a proxy or a key of the machine's own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with Mock() as running:
        yield running


@pytest.fixture
def pauses() -> list[float]:
    """The pauses that the client made, in seconds; it does not really sleep."""
    return []


@pytest.fixture
def server(mock: Mock, pauses: list[float]) -> Iterator[Server]:
    """A client of the mock."""
    with connect(mock.url, sleep=pauses.append) as connected:
        yield connected


# How many tokens a server gives.


@pytest.mark.parametrize(("limit", "wanted", "found"), [(-1, 5, -1), (20, 64, 20), (20, 5, 5), (0, 5, 0)])
def test_the_most_that_a_server_allows_is_found(
    mock: Mock, server: Server, limit: int, wanted: int, found: int
) -> None:
    """The full vocabulary where it is allowed, else what is wanted, else what the server's message allows."""
    mock.max_logprobs = limit
    assert find_top(server, wanted) == found
    assert len(mock.asked) <= 2
    assert all(len(row) == 2 for row in mock.asked)


def test_the_most_is_found_without_a_message(mock: Mock, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the refusal names no number, halves are tried."""

    def refuse(body: dict[str, Any]) -> tuple[int, Any]:
        allowed = 0 <= body["prompt_logprobs"] <= 10
        return Mock.complete(mock, body) if allowed else (400, {"error": {"message": "no"}})

    monkeypatch.setattr(mock, "complete", refuse)
    assert find_top(server, 64) == 8


def test_a_server_that_refuses_everything(mock: Mock, server: Server) -> None:
    """Looking for the most ends in the server's own words."""
    mock.refusal = 400, {"error": {"message": "This model does not support generation"}}
    with raises("server-refused", where=mock.url) as caught:
        find_top(server, 8)
    assert "does not support generation" in str(caught.value)


# Connecting.


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/v1", "{}/v1/", "  {}/v1"])
def test_every_form_of_the_address_works(mock: Mock, form: str) -> None:
    """With or without /v1, slash and scheme the address is the same."""
    for url in (form.format(mock.url), form.format(mock.url.removeprefix("http://"))):
        with connect(url) as server:
            assert server.url == mock.url
            assert server.score(ROW, top=1).true_logprob.tolist() == expected_true(ROW)


def test_a_server_behind_a_path_is_found(mock: Mock) -> None:
    """A prefix of the path stays in front of /v1 and /version."""
    mock.pages = {"/llm/v1/models": (200, {"data": [{"id": "a"}]}), "/llm/version": (200, {"version": "9"})}
    with connect(f"{mock.url}/llm/v1") as server:
        assert (server.url, server.model, server.version) == (f"{mock.url}/llm", "a", "9")


@pytest.mark.parametrize("url", ["", "http://", "ftp://host", "http://host:port", "http://host/?a=1"])
def test_what_is_not_an_address_is_refused(url: str) -> None:
    """An address that cannot be one is named, with an example of one."""
    with raises("option-invalid", where=url) as caught:
        connect(url)
    assert "http://localhost:8000" in caught.value.remedy


def test_the_server_is_described(server: Server, mock: Mock) -> None:
    """A record gets engine, version, model, root and length, as the server reports them."""
    assert server.describe() == {
        "url": mock.url,
        "engine": "vllm",
        "version": "0.32.0",
        "model": MODEL,
        "root": "/models/mock",
        "max_model_len": 64,
    }


def test_a_server_that_reports_little_is_described(mock: Mock) -> None:
    """What is not reported is None, and the server is used all the same."""
    mock.pages["/version"] = 404, b"none"
    mock.models = [{"id": "a"}]
    with connect(mock.url) as server:
        assert server.describe() == dict.fromkeys(server.describe()) | {"url": mock.url, "model": "a"}
        assert server.config_text() is None


def test_the_configuration_reads_like_the_log(mock: Mock, server: Server) -> None:
    """The configuration of /server_info goes through the same reader as a log."""
    text = "model='m', quantization=compressed-tensors, quantization_config=None, kv_cache_dtype=fp8_e4m3, seed=0"
    mock.pages["/server_info"] = 200, {"vllm_config": text, "vllm_env": {}}
    report = kernels_from_log(server.config_text() or "")
    assert (report.engine_version, report.quantization) == ("0.32.0", "compressed-tensors")
    assert report.kv_cache_dtype == "fp8_e4m3"


def test_one_of_several_models_has_to_be_named(mock: Mock) -> None:
    """Several models are listed, the named one is taken, an unknown one is refused with the list."""
    mock.models = [{"id": "a"}, {"id": "b"}]
    with raises("option-invalid", where=mock.url) as caught:
        connect(mock.url)
    assert "a, b" in str(caught.value)
    assert "`server_model`" in caught.value.remedy
    with connect(mock.url, model="b") as server:
        assert server.model == "b"
    with raises("option-invalid", where=mock.url) as caught:
        connect(mock.url, model="c")
    assert "'c'" in caught.value.what
    assert "a, b" in caught.value.remedy


def test_a_closed_port_is_refused(mock: Mock) -> None:
    """A closed port is refused by its address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with raises("server-unreachable", where=url):
            connect(url)


@pytest.mark.parametrize(
    ("status", "content", "code", "words"),
    [
        (404, b"<html>no</html>", "server-unsupported", "404"),
        (200, b"<html>welcome</html>", "server-unsupported", "/v1/models"),
        (200, {"data": []}, "server-unsupported", "/v1/models"),
        (200, ["a"], "server-unsupported", "/v1/models"),
        (500, {"error": {"message": "loading"}}, "server-unsupported", "500 (loading)"),
        (307, b"", "server-refused", "https://elsewhere/v1/models"),
    ],
)
def test_other_servers_are_refused(mock: Mock, status: int, content: Any, code: str, words: str) -> None:
    """What does not list models as OpenAI does is refused as such, with its answer and a remedy."""
    mock.pages["/v1/models"] = status, content
    with raises(code, where=mock.url) as caught:
        connect(mock.url)
    assert words in caught.value.what
    assert caught.value.remedy


def test_a_key_is_asked_for_and_sent(mock: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key or with a wrong one the variables are named; VLLM_API_KEY, ours, an argument win in that order."""
    mock.api_key = "right"
    with raises("server-refused", where=mock.url) as caught:
        connect(mock.url)
    assert "401" in caught.value.what
    assert "SNUGFIT_API_KEY or VLLM_API_KEY" in caught.value.remedy
    monkeypatch.setenv("VLLM_API_KEY", "right\n")
    connect(mock.url).close()
    monkeypatch.setenv("SNUGFIT_API_KEY", "wrong-secret")
    with raises("server-refused", where=mock.url) as caught:
        connect(mock.url)
    assert "secret" not in str(caught.value)
    with connect(mock.url, api_key="right") as server:
        server.score(ROW, top=1)
        mock.api_key = "changed"
        with raises("server-refused", where=mock.url):
            server.score(ROW, top=1)


def test_secrets_are_not_shown(mock: Mock) -> None:
    """Neither a key nor a password in the address is described, and a key that cannot be sent is not quoted."""
    with connect(mock.url.replace("://", "://user:hunter2@"), api_key="sesame") as server:
        shown = f"{server!r} {server.describe()}"
        assert "hunter2" not in shown
        assert "sesame" not in shown
    with raises("option-invalid", where=mock.url) as caught:
        connect(mock.url, api_key="sesame\nopen")
    assert "sesame" not in str(caught.value)


def test_no_torch_is_needed() -> None:
    """The client, the journal and the log reader import without torch."""
    modules = ", ".join(f"snugfit.serving.{name}" for name in ("client", "journal", "engine_log"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Rows that a server cannot score.


def test_a_row_that_does_not_fit_is_not_sent(mock: Mock, server: Server) -> None:
    """A row of max_model_len tokens leaves no place for the generated one; the message names both sides."""
    mock.max_logprobs = 1
    server.score([1] * 63, top=1)
    with raises("sequence-too-long", where=mock.url) as caught:
        server.score([1] * 64, top=1)
    assert "max_model_len is 64" in caught.value.what
    assert "--max-model-len 65" in caught.value.remedy
    assert len(mock.asked) == 1


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 512 tokens. However, your prompt contains at least 513 input tokens.",
        "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
        "The decoder prompt (length 513) is longer than the maximum model length of 512.",
    ],
)
def test_a_row_that_the_server_finds_too_long_is_refused(mock: Mock, said: str) -> None:
    """Where the server does not report its length, its refusal is understood in all its wordings."""
    mock.max_model_len = None
    mock.refusal = 400, {"error": {"message": said}}
    with connect(mock.url) as server, raises("sequence-too-long", where=mock.url) as caught:
        server.score(ROW, top=1)
    assert "--max-model-len 12" in caught.value.remedy


@pytest.mark.parametrize(
    ("status", "said", "words"),
    [
        (400, "Token id 60000 is out of vocabulary", "tokenizer"),
        (400, "Requested prompt logprobs of 9, which is greater than max allowed: 5", "--max-logprobs"),
        (404, "The model `mock/model` does not exist.", "another model"),
        (404, "Not Found", "/v1/completions"),
        (422, "", "status 422"),
    ],
)
def test_refusals_are_passed_on_with_a_remedy(
    mock: Mock, server: Server, pauses: list[float], status: int, said: str, words: str
) -> None:
    """The server's own words and what to do about them; a refusal is not asked twice."""
    mock.refusal = status, {"error": {"message": said}}
    with raises("server-refused", where=mock.url) as caught:
        server.score(ROW, top=9)
    assert words in str(caught.value)
    assert said.rstrip(".") in str(caught.value)
    assert (len(mock.asked), pauses) == (1, [])


def test_nan_on_the_server_has_its_own_error(mock: Mock, server: Server) -> None:
    """vLLM cannot write NaN as JSON: the caller can tell that from other refusals, and count the row."""
    mock.refusal = 400, {"error": {"message": "Out of range float values are not JSON compliant: nan", "code": 400}}
    with raises("server-not-finite", where=mock.url) as caught:
        server.score(ROW, top=1)
    assert isinstance(caught.value, NotFiniteError)


def test_misuse_is_refused(server: Server) -> None:
    """One token predicts nothing, and a dense table needs the whole vocabulary."""
    with raises("dataset-invalid"):
        server.score([1], top=1)
    with pytest.raises(ValueError, match="dense needs"):
        server.score(ROW, top=5, dense=True)


# A server that fails.


@pytest.mark.parametrize("fault", [500, 503, 429, DROP, CUT])
def test_a_passing_failure_is_tried_again(mock: Mock, server: Server, pauses: list[float], fault: Any) -> None:
    """Twice an error, a reset or half an answer, then the right one: the result is whole, after pauses of 1 and 2 s."""
    mock.faults = [fault, fault]
    assert server.score(ROW, top=3).true_logprob.tolist() == expected_true(ROW)
    assert pauses == [1.0, 2.0]
    assert mock.asked == [ROW] * 3


def test_a_silent_server_is_given_up(mock: Mock) -> None:
    """After `timeout` seconds of silence a request counts as failed."""
    mock.faults = [HANG, HANG]
    with connect(mock.url, timeout=1.0, attempts=2, sleep=lambda _: None) as server:
        with raises("server-unreachable", where=mock.url) as caught:
            server.score(ROW, top=3)
        assert isinstance(caught.value, ServerLostError)
        assert "2 times (timed out)" in caught.value.what
        assert server.score(ROW, top=3).true_logprob.tolist() == expected_true(ROW)


def test_a_lasting_failure_ends_with_what_to_do(mock: Mock, server: Server, pauses: list[float]) -> None:
    """After six attempts the error gives the last reason."""
    mock.faults = [500] * 9
    with raises("server-unreachable", where=mock.url) as caught:
        server.score(ROW, top=3)
    assert "6 times (status 500: EngineCore" in caught.value.what
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0]


def score_all(server: Server, journal: Journal, rows: list[list[int]]) -> list[PromptLogprobs]:
    for index, row in enumerate(rows):
        if index not in journal:
            journal.put(index, server.score(row, top=3))
    results = [journal.get(index) for index in range(len(rows))]
    return [result for result in results if result is not None]


def test_a_run_resumes_where_its_server_died(tmp_path: Path, mock: Mock, pauses: list[float]) -> None:
    """A server dies half-way; with another one the run ends without a row being asked for twice, results the same."""
    rows = np.random.default_rng(1).integers(0, V, (6, 9)).tolist()
    key = {"model": MODEL, "top": 3}
    mock.faults = [None] * 3 + [DROP] * 9
    with Journal.open(tmp_path / "rows", key) as journal, connect(mock.url, sleep=pauses.append) as server:
        with pytest.raises(ServerLostError):
            score_all(server, journal, rows)
        assert len(journal) == 3
    with Mock() as other, Journal.open(tmp_path / "rows", key) as journal, connect(other.url) as server:
        results = score_all(server, journal, rows)
        assert other.asked == rows[3:]
    assert [result.true_logprob.tolist() for result in results] == [expected_true(row) for row in rows]
