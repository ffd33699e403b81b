"""`snugfit eval --server`: a server's answers give the figures of its checkpoint, and outlive the server."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from conftest import MakeTiny
from evaluation.test_evaluate import change, models, noisy, rows_file
from helpers.errors import failed_with, raises
from helpers.mock_vllm import DROP, MODEL, VARIABLES, Handler, Mock
from snugfit.cli.app import app
from snugfit.evaluation import served
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.served import ServerOptions
from snugfit.records.evaluation import EvalRecord, EvaluatedServer, KernelReport, ModelFigures
from snugfit.serving.answers import FULL
from snugfit.serving.client import connect

SERVED = "model (served)"
PROBE = [0, 0]
NAN = "Out of range float values are not JSON compliant: nan"
LOG = """\
(APIServer pid=7) INFO 11-22 05:10:19 [api_utils.py:299] vLLM API server version 0.32.0
(EngineCore pid=9) INFO 11-22 05:10:20 [core.py:109] Initializing a V1 LLM engine (v0.32.0) with config: model='m', \
quantization=compressed-tensors, kv_cache_dtype=fp8
(EngineCore pid=9) INFO 11-22 05:10:21 [__init__.py:683] Using FlashInferCutlassNvFp4LinearKernel for NVFP4 GEMM
(EngineCore pid=9) INFO 11-22 05:10:22 [cuda.py:368] Using FLASHINFER attention backend out of potential backends: \
['FLASHINFER', 'TRITON_ATTN'].
"""


@functools.cache
def predictions(path: Path, rows: tuple[tuple[int, ...], ...]) -> dict[tuple[int, ...], NDArray[np.float64]]:
    """transformers' log probabilities [n, V] of each row, computed in fp32 as vLLM does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    with torch.no_grad():
        logits = {row: model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows}
    return {row: values.float().log_softmax(-1).double().numpy() for row, values in logits.items()}


class Serving(Mock):
    """A stand-in for `vllm serve PATH` that knows the rows it will be asked for, and NaN for those in `broken`."""

    def __init__(self, path: Path, rows: Sequence[Sequence[int]]) -> None:
        self.tables = predictions(path, (tuple(PROBE), *map(tuple, rows)))
        self.broken: list[list[int]] = []
        super().__init__()
        self.max_model_len = 512
        self.max_logprobs = -1

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """What vLLM would answer with this model."""
        row, wanted = body["prompt"], body["prompt_logprobs"]
        self.table = self.tables[tuple(row)]
        vocabulary = self.table.shape[1]
        allowed, asked = (vocabulary if n == -1 else n for n in (self.max_logprobs, wanted))
        if asked > allowed:
            message = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {allowed}"
            return 400, {"error": {"message": message, "code": 400}}
        if row in self.broken:
            return 400, {"error": {"message": NAN, "code": 400}}
        places = [None, *(self.place(n, token, asked) for n, token in enumerate(row[1:]))]
        choice = {"index": 0, "text": "", "prompt_logprobs": places, "prompt_token_ids": row}
        return 200, self.change({"choices": [choice], "system_fingerprint": "vllm-0.32.0-mock"})

    def _handler(self) -> type[Handler]:
        handler = super()._handler()
        handler.disable_nagle_algorithm = True  # header and content are sent separately: 40 ms an answer otherwise
        return handler

    @property
    def scored(self) -> list[list[int]]:
        """The rows that it was asked to score, without the client's first request."""
        return [row for row in self.asked if row != PROBE]


Serve = Callable[..., Serving]


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A tiny llama in fp32."""
    return make_tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def other(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disturbed copy of it."""
    return noisy(llama, tmp_path_factory.mktemp("other") / "noisy", 0.03)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    """6 rows of 48 random ids below 64."""
    generator = torch.Generator().manual_seed(9)
    made: list[list[int]] = torch.randint(3, 64, (6, 48), generator=generator).tolist()
    return made


@pytest.fixture(scope="module")
def text(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of them."""
    return rows_file(tmp_path_factory.mktemp("text"), rows)


@pytest.fixture(scope="module")
def exact(llama: Path, other: Path, text: Path) -> EvalRecord:
    """The disturbed copy evaluated as a checkpoint."""
    return evaluate([other], reference=llama, dataset=[text], noise_floor="none")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, other: Path, rows: list[list[int]]) -> Iterator[Serve]:
    """Starts servers, by default of the disturbed copy, which a client that never waits finds without a proxy."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(served, "connect", functools.partial(connect, sleep=lambda _: None))
    running: list[Serving] = []

    def start(path: Path = other, known: Sequence[Sequence[int]] = rows) -> Serving:
        running.append(Serving(path, known))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def server(serve: Serve) -> Serving:
    """A server of the disturbed copy, which gives its full vocabulary."""
    return serve()


def ask(server: Serving, journal: Path, llama: Path, text: Path, **more: Any) -> EvalRecord:
    """A server alone against the reference."""
    names = ("top_logprobs", "model", "log")
    options = {"top_logprobs": FULL} | {name: more.pop(name) for name in names if name in more}
    settings: dict[str, Any] = {"reference": llama, "dataset": [text], "noise_floor": "none"} | more
    candidates = settings.pop("candidates", [])
    return evaluate(candidates, server=ServerOptions(url=server.url, journal=journal, **options), **settings)


def snugfit(*arguments: object) -> Result:
    """The command line."""
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def kl(found: ModelFigures) -> float:
    assert found.kl is not None
    return found.kl.mean


def same(found: ModelFigures, expected: ModelFigures) -> None:
    """Every figure of a server's full vocabulary, to 1e-4."""
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert found.nll_by_chunk == pytest.approx(expected.nll_by_chunk, rel=1e-4)
    assert found.kl is not None
    assert expected.kl is not None
    assert found.kl.mean == pytest.approx(expected.kl.mean, rel=1e-4)
    assert found.kl.by_chunk == pytest.approx(expected.kl.by_chunk, rel=1e-4)
    assert found.kl.p99 == pytest.approx(expected.kl.p99, rel=1e-3)
    assert found.reverse_kl is not None
    assert expected.reverse_kl is not None
    assert found.reverse_kl.mean == pytest.approx(expected.reverse_kl.mean, rel=1e-4)
    assert found.same_top == expected.same_top
    assert found.rms_change == pytest.approx(expected.rms_change, rel=1e-4)
    assert found.nonfinite == 0


# What a server answers.


def test_a_full_vocabulary_is_the_checkpoint(
    server: Serving, exact: EvalRecord, llama: Path, text: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    """A server that gives every token has the figures of its checkpoint; each row is asked for once."""
    record = ask(server, tmp_path / "journal", llama, text)
    found = models(record)[SERVED]
    assert found.kl_kind == "exact"
    same(found, models(exact)["noisy"])
    assert models(record)[llama.name] == models(exact)[llama.name]
    assert server.scored == rows
    assert record.candidates == (
        EvaluatedServer(
            name=SERVED,
            url=server.url,
            engine="vllm",
            version="0.32.0",
            model=MODEL,
            root="/models/mock",
            max_model_len=512,
            top_logprobs="all",
            kernels=KernelReport(),
        ),
    )


def test_a_few_tokens_are_a_lower_bound(
    server: Serving, exact: EvalRecord, llama: Path, text: Path, tmp_path: Path
) -> None:
    """KL from the top k grows with k towards the exact one, chunk by chunk, and stays below; losses are exact."""
    expected = models(exact)["noisy"]
    before = None
    for top in (2, 20, 60):
        found = models(ask(server, tmp_path / str(top), llama, text, top_logprobs=top))[SERVED]
        assert found.kl_kind == "lower bound"
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert found.rms_change == pytest.approx(expected.rms_change, rel=1e-4)
        assert found.same_top == expected.same_top
        for spread, whole, less in (
            (found.kl, expected.kl, before and before.kl),
            (found.reverse_kl, expected.reverse_kl, before and before.reverse_kl),
        ):
            assert spread is not None
            assert whole is not None
            assert all(0 < a < b for a, b in zip(spread.by_chunk, whole.by_chunk, strict=True))
            if less is not None:
                assert all(a < b for a, b in zip(less.by_chunk, spread.by_chunk, strict=True))
        before = found
    assert before is not None
    assert kl(before) > 0.98 * kl(expected)


@pytest.mark.parametrize(("allowed", "wanted", "given"), [(20, 256, 20), (20, 5, 5), (-1, 7, 7)])
def test_a_server_is_asked_for_what_it_allows(
    server: Serving, llama: Path, text: Path, tmp_path: Path, allowed: int, wanted: int, given: int
) -> None:
    """Fewer tokens than wanted are asked for where it allows no more, and the record says how many."""
    server.max_logprobs = allowed
    record = ask(server, tmp_path / "journal", llama, text, top_logprobs=wanted)
    (description,) = record.candidates
    assert isinstance(description, EvaluatedServer)
    assert description.top_logprobs == given
    assert models(record)[SERVED].kl_kind == "lower bound"
    assert {body["prompt_logprobs"] for body in server.bodies if body["prompt"] != PROBE} == {given}


def test_a_checkpoint_and_its_server_side_by_side(
    server: Serving, exact: EvalRecord, llama: Path, other: Path, text: Path, tmp_path: Path
) -> None:
    """One command gives both the same figures, pairs them, notes the kernels of the log, and removes its journal."""
    out, log = tmp_path / "out", tmp_path / "vllm.log"
    log.write_text(LOG, encoding="utf-8")
    result = snugfit(
        *(other, "--server", server.url, "--top-logprobs", "all", "--server-log", log),
        *("--reference", llama, "--dataset", text, "--noise-floor", "none", "-o", out),
    )
    assert result.exit_code == 0, result.stderr
    assert {"noisy", SERVED} <= {cell.strip() for line in result.stdout.splitlines() for cell in line.split("  ")}
    record = json.loads((out / "eval.json").read_text())
    _, checkpoint, server_side = record["contexts"][0]["models"]
    assert (checkpoint["name"], server_side["name"]) == ("noisy", SERVED)
    assert checkpoint == json.loads(exact.to_json())["contexts"][0]["models"][1]
    assert server_side["perplexity"] == pytest.approx(checkpoint["perplexity"], rel=1e-4)
    assert server_side["kl"]["by_chunk"] == pytest.approx(checkpoint["kl"]["by_chunk"], rel=1e-4)
    pairs = record["contexts"][0]["pairs"]
    assert [(pair["a"], pair["b"], pair["figure"]) for pair in pairs] == [
        ("noisy", SERVED, "loss"),
        ("noisy", SERVED, "kl"),
    ]
    assert all(abs(pair["difference"]) < 1e-5 for pair in pairs)
    assert [entry["name"] for entry in record["candidates"]] == ["noisy", SERVED]
    assert record["candidates"][1]["kernels"] == {
        "engine_version": "0.32.0",
        "quantization": "compressed-tensors",
        "kv_cache_dtype": "fp8",
        "attention": ["FLASHINFER"],
        "linear": ["FlashInferCutlassNvFp4LinearKernel for NVFP4 GEMM"],
        "moe": [],
    }
    assert not (tmp_path / "out.journal").exists()
    assert SERVED in (out / "eval.md").read_text()


def test_a_lower_bound_is_not_paired_with_an_exact_figure(
    server: Serving, llama: Path, other: Path, text: Path, tmp_path: Path
) -> None:
    """A checkpoint and its server's few tokens are paired by loss alone: a bound is smaller whoever is better."""
    record = ask(server, tmp_path / "journal", llama, text, top_logprobs=5, candidates=[other])
    assert [pair.figure for pair in record.contexts[0].pairs] == ["loss"]


def test_a_cache_of_the_reference_changes_nothing(
    server: Serving, exact: EvalRecord, llama: Path, text: Path, tmp_path: Path
) -> None:
    """With a cache a server is compared with the whole reference, also where that is stored already."""
    for journal in ("first", "second"):
        record = ask(server, tmp_path / journal, llama, text, reference_cache=tmp_path / "cache")
        assert models(record)[SERVED].kl_kind == "exact"
        same(models(record)[SERVED], models(exact)["noisy"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_rows_on_which_the_server_computes_nan(
    server: Serving, llama: Path, other: Path, text: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    """Only such a row's tokens are counted as not finite, and it is not asked for again."""
    server.broken = [rows[2]]
    record = ask(server, tmp_path / "journal", llama, text)
    found = models(record)[SERVED]
    assert found.nonfinite == 47
    assert found.tokens_by_chunk == (47, 47, 0, 47, 47, 47)
    assert models(record)[llama.name].nonfinite == 0
    rest = rows_file(tmp_path, rows[:2] + rows[3:])
    expected = models(evaluate([other], reference=llama, dataset=[rest], noise_floor="none"))["noisy"]
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert kl(found) == pytest.approx(kl(expected), rel=1e-4)
    server.asked.clear()
    again = ask(server, tmp_path / "journal", llama, text)
    assert server.scored == []
    assert models(again)[SERVED] == found


# A server that stops answering.


def test_a_run_resumes_where_the_server_died(
    server: Serving, llama: Path, text: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    """A dying server: exit code 2, no output, a journal; the same command asks for the rest and ends as in one go."""
    out, journal = tmp_path / "out", tmp_path / "out.journal"
    command = ("--server", server.url, "--top-logprobs", "all", "--reference", llama, "--dataset", text, "-o", out)
    server.faults = [*[None] * 4, *[DROP] * 99]  # the first request, and three rows
    result = snugfit(*command, "--noise-floor", "none")
    assert failed_with(result, "server-unreachable", server.url)
    assert not out.exists()
    assert journal.exists()
    assert [row for row in server.scored if row in rows[:3]] == rows[:3]
    server.faults.clear()
    server.asked.clear()
    result = snugfit(*command, "--noise-floor", "none")
    assert result.exit_code == 0, result.stderr
    assert server.scored == rows[3:]
    assert not journal.exists()
    whole = json.loads(ask(server, tmp_path / "in-one-go", llama, text).to_json())
    record = json.loads((out / "eval.json").read_text())
    assert record["contexts"] == whole["contexts"]
    assert record["candidates"] == whole["candidates"]
    assert snugfit(*command).exit_code == 2  # the result exists: nothing is asked again
    assert len(server.scored) == 3 + 6


def test_a_journal_resumes_with_the_server_at_another_address(
    serve: Serve, llama: Path, text: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    """The journal belongs to model and version, not to the port: a server started elsewhere answers for the rest."""
    first = serve()
    first.faults = [*[None] * 3, *[DROP] * 99]
    with raises("server-unreachable", where=first.url):
        ask(first, tmp_path / "journal", llama, text)
    second = serve()
    record = ask(second, tmp_path / "journal", llama, text)
    assert second.scored == rows[2:]
    assert math.isfinite(models(record)[SERVED].perplexity)


@pytest.mark.parametrize("differs", ["model", "root", "version", "rows", "top"])
def test_the_journal_of_another_run_is_refused(
    server: Serving, llama: Path, text: Path, rows: list[list[int]], tmp_path: Path, differs: str
) -> None:
    """A journal of another model, version, rows or number of tokens is not taken for this run's, nor written to."""
    journal = tmp_path / "journal"
    ask(server, journal, llama, text)
    before = journal.read_bytes()
    options: dict[str, Any] = {}
    card = {"id": MODEL, "owned_by": "vllm", "root": "/models/mock", "max_model_len": 512}
    if differs == "model":
        server.models = [card | {"id": "mock/another"}]
    elif differs == "root":
        server.models = [card | {"root": "/models/another"}]
    elif differs == "version":
        server.pages["/version"] = 200, {"version": "0.33.0"}
    elif differs == "rows":
        text = rows_file(tmp_path, rows[:5])
    else:
        options["top_logprobs"] = 5
    server.asked.clear()
    key = "engine" if differs == "version" else differs
    with raises("run-differs", where=journal) as caught:
        ask(server, journal, llama, text, **options)
    assert f" {key} " in caught.value.what
    assert server.scored == []
    assert journal.read_bytes() == before


# What is refused.


def without_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    for choice in answer["choices"]:
        del choice["prompt_logprobs"]
    return answer


def test_servers_without_prompt_logprobs_are_refused(server: Serving, llama: Path, text: Path, tmp_path: Path) -> None:
    """A server without prompt_logprobs: exit code 2 at the first request, and nothing is left behind."""
    server.change = without_logprobs
    out = tmp_path / "out"
    result = snugfit("--server", server.url, "--reference", llama, "--dataset", text, "-o", out)
    assert failed_with(result, "server-unsupported", server.url, "prompt_logprobs")
    assert server.asked == [PROBE]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("allowed", "options", "code", "place"),
    [
        (0, (), "server-unsupported", "http://"),
        (20, ("--top-logprobs", "all"), "server-unsupported", " 20 tokens"),
        (-1, ("--top-logprobs", "none"), "option-invalid", "--top-logprobs: "),
        (-1, ("--top-logprobs", "0"), "option-invalid", "--top-logprobs: "),
        (-1, ("--server-model", "mock/another"), "option-invalid", "'mock/another'"),
        (-1, ("--server-log", "missing.log"), "file-unreadable", "missing.log: "),
    ],
)
def test_what_the_server_cannot_give_is_refused(
    server: Serving,
    llama: Path,
    text: Path,
    tmp_path: Path,
    allowed: int,
    options: tuple[str, ...],
    code: str,
    place: str,
) -> None:
    """Too few tokens, a missing model or log: exit code 2 before a row is asked for."""
    server.max_logprobs = allowed
    out = tmp_path / "out"
    result = snugfit("--server", server.url, "--reference", llama, "--dataset", text, "-o", out, *options)
    assert failed_with(result, code, place)
    assert server.scored == []
    assert list(tmp_path.iterdir()) == []


def test_a_server_needs_an_output_and_the_original(
    server: Serving, llama: Path, other: Path, text: Path, tmp_path: Path
) -> None:
    """Without an output, and without the original model, a server is refused before it is asked anything."""
    evaluate([other], reference=llama, dataset=[text], noise_floor="none", reference_cache=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    out = ("-o", tmp_path / "out")
    for options, place in (
        (("--reference", llama), "--output-dir: "),
        (out, "--server: "),
        ((other, *out), "--server: "),
        (("--reference", stored, *out), "--server: "),
        (("--reference", tmp_path / "nowhere", *out), "--server: "),
    ):
        result = snugfit("--server", server.url, "--dataset", text, *options)
        assert failed_with(result, "option-missing", place)
    assert server.asked == []
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_a_server_of_a_larger_vocabulary_is_refused(
    serve: Serve, make_tiny: MakeTiny, llama: Path, text: Path, tmp_path: Path
) -> None:
    """A server that names tokens which the reference does not have serves another model, and is refused."""
    server = serve(make_tiny("llama", vocab_size=80, dtype=torch.float32))
    for top in (FULL, 20):
        with raises("models-mismatch", where=server.url):
            ask(server, tmp_path / "new" / str(top), llama, text, top_logprobs=top)
        assert not (tmp_path / "new").exists()  # no journal without an answer: another reference may follow


def test_rows_beyond_the_servers_length_are_refused_first(
    serve: Serve, llama: Path, other: Path, tmp_path: Path
) -> None:
    """A row that is too long for the server is an error before the other rows are asked for, which may take hours."""
    rows = [[3] * 16, [4] * 100]
    server = serve(other, rows)
    server.max_model_len = 64
    with raises("sequence-too-long", where=server.url):
        ask(server, tmp_path / "journal", llama, rows_file(tmp_path, rows))
    assert server.scored == []


def test_an_output_below_folders_that_do_not_exist_yet(
    server: Serving, llama: Path, text: Path, tmp_path: Path
) -> None:
    """Folders above the output are made, as they are without a server."""
    out = tmp_path / "new" / "out"
    command = ("--server", server.url, "--top-logprobs", "all", "--reference", llama, "--dataset", text, "-o", out)
    result = snugfit(*command, "--noise-floor", "none")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# Conversations.

WORDS = ("<unk>", "<user>", "<assistant>", "what", "is", "the", "capital", "of", "france", "paris", "on", "river")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TALK = [
    {"role": "user", "content": "what is the capital"},
    {"role": "assistant", "content": "paris is the capital"},
    {"role": "user", "content": "on the river"},
    {"role": "assistant", "content": "on the river the capital of france"},
]


def add_chat(directory: Path) -> None:
    """A tokenizer of whole words with a chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=WORDS[0])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


@pytest.fixture
def chat(llama: Path, other: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """The models with a tokenizer, and a chat log of two conversations."""
    reference, candidate = (
        change(path, tmp_path / name, lambda _, tensor: tensor) for path, name in ((llama, "original"), (other, "copy"))
    )
    add_chat(reference)
    log = tmp_path / "chat.jsonl"
    log.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (TALK, TALK[:2])), encoding="utf-8")
    return reference, candidate, log


def chat_rows() -> list[list[int]]:
    said = " ".join(f"<{entry['role']}> {entry['content']}" for entry in TALK)
    ids = [WORDS.index(word) for word in said.split()]
    return [ids, ids[:10]]


def test_of_conversations_answers_alone_are_scored(serve: Serve, chat: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The server sees whole conversations; figures are of the assistant's words and those of the checkpoint."""
    reference, candidate, log = chat
    server = serve(candidate, chat_rows())
    record = ask(server, tmp_path / "journal", reference, log, continuations=0)
    assert server.scored == chat_rows()
    assert record.contexts[0].chunk_tokens == (4 + 7, 4)
    plainly = evaluate([candidate], reference=reference, dataset=[log], noise_floor="none", continuations=0)
    same(models(record)[SERVED], models(plainly)["copy"])


def test_conversations_are_continued_beside_a_server(
    serve: Serve, chat: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A checkpoint's divergences are continued as without a server, for which nothing is continued."""
    reference, candidate, log = chat
    server = serve(candidate, chat_rows())
    settings: dict[str, Any] = {"reference": reference, "dataset": [log], "noise_floor": "none", "continuations": 1}
    expected = evaluate([candidate], **settings)
    assert len(expected.continuations) == 1
    both = ask(server, tmp_path / "both", reference, log, candidates=[candidate], continuations=1)
    assert both.continuations == expected.continuations
    alone = ask(server, tmp_path / "alone", reference, log, continuations=1)
    assert alone.continuations == ()
