"""Benchmark tasks: a checkpoint answers lm_eval as its own HFLM does, and items keep their keys."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.errors import raises
from snugfit.evaluation import task_loading, task_models, tasks
from snugfit.evaluation.evaluated_model import open_model
from snugfit.evaluation.tasks import TasksRun, run_tasks, write_tasks
from snugfit.progress import SILENT, TerminalProgress
from snugfit.quantization.quantize import quantize

MakeTiny = Callable[..., Path]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "its", "red", "hat", "by", "old", "sea"]
VOCABULARY = 300


def add_tokenizer(directory: Path, *, bos: bool = False) -> Path:
    """A byte-level BPE with a few merges; with `bos` it begins every text with <s>, as Llama's and Gemma's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(make_tiny: MakeTiny) -> Path:
    """A tiny fp32 model of 64 positions with a tokenizer that adds BOS."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return add_tokenizer(make_tiny(dtype=torch.float32, **sizes), bos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small tasks: choices, last words, running text and one that has to write."""
    where = tmp_path_factory.mktemp("tasks")
    pick = functools.partial(_pick, WORDS)
    choices = [
        {"question": pick(n, 5), "options": [pick(n + k, 1 + (n + k) % 3) for k in range(3)], "gold": n % 3}
        for n in range(20)
    ]
    pairs = [{"text": pick(n, 3 + 2 * n), "next": " " + pick(3 * n + 1, 1 + n % 2)} for n in range(12)]
    mean, better = {"aggregation": "mean"}, {"higher_is_better": True}
    write_task(
        where,
        "tiny_choice",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{question}} ",  # the trailing space belongs to the answer
        doc_to_choice="options",
        doc_to_target="gold",
        metric_list=[
            {"metric": "acc"} | mean | better,
            {"metric": "acc_norm"} | mean | better,
            {"metric": "mcc", "aggregation": "matthews_corrcoef"} | better,
        ],
    )
    write_task(
        where,
        "tiny_word",
        pairs,
        output_type="loglikelihood",
        doc_to_text="text",
        doc_to_target="next",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc"} | mean | better,
        ],
    )
    write_task(
        where,
        "tiny_text",
        [{"text": pick(n, 40)} for n in range(4)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    write_task(
        where,
        "tiny_writing",
        pairs,
        output_type="generate_until",
        doc_to_text="text",
        doc_to_target="next",
        generation_kwargs={"until": ["."], "max_gen_toks": 4},
        filter_list=[{"name": "first", "filter": [{"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match"} | mean | better],
    )
    group = {
        "group": "tiny_group",
        "task": ["tiny_choice", "tiny_word"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (where / "tiny_group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return where


def _pick(words: list[str], start: int, count: int) -> str:
    return " ".join(words[(start * 7 + k * (start + 3)) % len(words)] for k in range(count))


def write_task(where: Path, name: str, documents: list[dict[str, Any]], **config: Any) -> None:
    data = where / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(where / "arrow")}
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
    (where / f"{name}.yaml").write_text(yaml.safe_dump(common | config), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tiny: Path, folder: Path) -> TasksRun:
    """The three tasks that a checkpoint can answer, two of them through their group."""
    return run_tasks(tiny, ["tiny_group", "tiny_text"], task_folder=folder, device="cpu")


def hflm(model: Path, dtype: str = "float32") -> Any:
    """lm_eval's own, with transformers' whole model in memory.

    Its logits cache (0.4.13) reads a continuation at the wrong place where a longer one ends in the same row.
    """
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(model), device="cpu", dtype=dtype, softmax_dtype="float32", batch_size=4, logits_cache=False)


def peer(monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, names: list[str], dtype: str = "float32") -> Any:
    """lm_eval's own results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(hflm(model, dtype), tasks=names, task_manager=manager, bootstrap_iters=2)


def responses(run: TasksRun, name: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in run.samples if sample["task"] == name]


def flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("bos", [False, True])
def test_a_checkpoint_answers_as_lm_eval_does(
    monkeypatch: pytest.MonkeyPatch, make_tiny: MakeTiny, folder: Path, bos: bool
) -> None:
    """Log-likelihoods, greediness and figures are those of lm_eval's HFLM, truncated and rolling requests included."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
    model = add_tokenizer(make_tiny("gemma2" if bos else "llama", head_dim=16, dtype=torch.float32, **sizes), bos=bos)
    names = ["tiny_choice", "tiny_word", "tiny_text"]
    found, expected_run = (
        run_tasks(model, names, task_folder=folder, device="cpu"),
        peer(monkeypatch, model, folder, names),
    )
    for name in names:
        expected = [line["filtered_resps"] for line in expected_run["samples"][name]]
        got = responses(found, name)
        assert len(got) == len(expected) > 0
        for mine, other in zip(flat(got), flat(expected), strict=True):
            assert mine == (pytest.approx(other, abs=1e-4) if isinstance(other, float) else other)
    for row in found.record.tasks:
        if row.metric != "loss":
            assert row.value == pytest.approx(expected_run["results"][row.task][f"{row.metric},none"])
            assert row.standard_error == pytest.approx(expected_run["results"][row.task][f"{row.metric}_stderr,none"])
    for name, figures in found.reported.items():
        for metric, value in figures.items():
            assert value == pytest.approx(expected_run["results"][name][metric], rel=1e-4)


def test_sixteen_bits_score_alike(monkeypatch: pytest.MonkeyPatch, make_tiny: MakeTiny, folder: Path) -> None:
    """In bf16 the items come out as lm_eval's HFLM has them, log-likelihoods within bf16's rounding."""
    model = add_tokenizer(make_tiny(vocab_size=VOCABULARY))
    found = run_tasks(model, ["tiny_choice"], task_folder=folder, device="cpu")
    expected_run = peer(monkeypatch, model, folder, ["tiny_choice"], "bfloat16")["samples"]["tiny_choice"]
    assert [sample["metrics"]["acc"] for sample in found.samples] == [line["acc"] for line in expected_run]
    for mine, line in zip(responses(found, "tiny_choice"), expected_run, strict=True):
        assert [a for a, _ in mine] == pytest.approx([b for b, _ in line["filtered_resps"]], abs=0.05)


def test_an_empty_context_begins_with_bos(tiny: Path) -> None:
    """A request without context is conditioned on BOS, as in lm_eval's HFLM; a text with BOS gets no second one."""
    from lm_eval.api.instance import Instance

    found = task_models.local_model(open_model(tiny), torch.device("cpu"), 4096, SILENT)
    expected_run = hflm(tiny)
    pairs = [("", "the cat"), ("<s>the", " cat"), ("the cat  ", "sat"), ("the", " cat sat on"), ("the", " cat")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for mine, other in zip(found.loglikelihood(requests), expected_run.loglikelihood(requests), strict=True):
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])


def test_rows_are_shared(monkeypatch: pytest.MonkeyPatch, tiny: Path, folder: Path, run: TasksRun) -> None:
    """A row that is the beginning of another is not run, and passes of one row each give the same answers."""
    question = functools.partial(task_models._question, length=64)
    asked = [question([1, 5], [6]), question([1, 5], [7]), question([1, 5], [6, 7, 8]), question([1], [9])]
    rows, answered_by = task_models._share_rows(asked)
    assert rows == [(1, 5, 6, 7)]
    assert answered_by == [0, 0, 0, 0]
    monkeypatch.setattr(task_models, "PASS_BYTES", 1)
    monkeypatch.setattr(task_models, "POSITIONS_AT_ONCE", 3)
    again = run_tasks(tiny, ["tiny_choice"], task_folder=folder, device="cpu")
    for mine, other in zip(responses(again, "tiny_choice"), responses(run, "tiny_choice"), strict=False):
        assert [a for a, _ in mine] == pytest.approx([b for b, _ in other], abs=1e-4)


def test_results_by_item(run: TasksRun) -> None:
    """Accuracies have 0 and 1 by item; perplexities become each item's loss; other metrics are named."""
    rows = {(row.task, row.metric): row for row in run.record.tasks}
    assert set(rows) == {
        ("tiny_choice", "acc"),
        ("tiny_choice", "acc_norm"),
        ("tiny_word", "loss"),
        ("tiny_word", "acc"),
        ("tiny_text", "loss"),
    }
    assert run.left_out == ("tiny_choice: mcc",)
    choice, word, text = rows["tiny_choice", "acc"], rows["tiny_word", "loss"], rows["tiny_text", "loss"]
    assert (choice.kind, choice.higher_is_better, len(choice.items)) == ("accuracy", True, 20)
    assert choice.value == sum(choice.items.values()) / 20 == run.reported["tiny_choice"]["acc,none"]
    assert (word.kind, word.higher_is_better) == ("mean", False)
    assert math.exp(word.value) == pytest.approx(run.reported["tiny_word"]["perplexity,none"])
    words = 4 * 40
    assert math.exp(4 * text.value / words) == pytest.approx(run.reported["tiny_text"]["word_perplexity,none"])
    accuracies = [rows[name, "acc"] for name in ("tiny_choice", "tiny_word")]
    right = sum(sum(row.items.values()) for row in accuracies)
    assert run.reported["tiny_group"]["acc,none"] == pytest.approx(right / 32)


def test_what_is_written(run: TasksRun, tmp_path: Path) -> None:
    """Every item has a line of JSON with its key, target, answers and scores, which are those of the record beside."""
    write_tasks(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tasks.json").read_text())["schema"] == "snugfit.tasks/1"
    assert json.loads((tmp_path / "out" / "lm_eval.json").read_text())["left_out"] == ["tiny_choice: mcc"]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").open(encoding="utf-8")]
    assert set(samples[0]) == {"task", "filter", "key", "doc_id", "target", "filtered_resps", "metrics"}
    rows = {(row.task, row.metric): row.items for row in run.record.tasks}
    for sample in samples:
        if sample["task"] == "tiny_choice":
            assert rows["tiny_choice", "acc"][sample["key"]] == sample["metrics"]["acc"]
    assert [sample["doc_id"] for sample in samples[:20]] == list(range(20))


def test_keys_are_stable_and_a_limit_takes_the_first(tiny: Path, folder: Path, run: TasksRun) -> None:
    """Two runs name items alike, so that they can be paired; a limit keeps the first items with their scores."""
    short = run_tasks(tiny, ["tiny_choice"], task_folder=folder, device="cpu", limit=5)
    few, all_ = short.record.tasks[0].items, run.record.tasks[0].items
    assert list(few.items()) == list(all_.items())[:5]
    assert re.fullmatch("0:[0-9a-f]{12}", next(iter(few)))
    with raises("option-invalid", where="limit"):
        run_tasks(tiny, ["tiny_choice"], task_folder=folder, limit=0)


def test_nothing_is_printed(tiny: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """lm_eval's prints and bars reach neither stdout nor stderr; with progress they go to stderr alone."""
    run_tasks(tiny, ["tiny_word"], task_folder=folder, device="cpu", limit=2)
    assert capfd.readouterr() == ("", "")
    run_tasks(tiny, ["tiny_word"], task_folder=folder, device="cpu", limit=2, progress=TerminalProgress())
    out, err = capfd.readouterr()
    assert out == ""
    assert "layers" in err


def test_warnings_are_kept(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Warnings of lm_eval, in logs or by Python's `warnings`, are in the result, once each, and are reported."""
    load = task_loading.load_tasks

    def warn(*arguments: Any, **options: Any) -> Any:
        for _ in range(2):
            logging.getLogger("lm_eval.tasks").warning("a %s group", "strange")
        warnings.warn("an old data set", stacklevel=1)
        return load(*arguments, **options)

    monkeypatch.setattr(tasks, "load_tasks", warn)
    found = run_tasks(tiny, ["tiny_word"], task_folder=folder, device="cpu", limit=2)
    assert capfd.readouterr() == ("", "")
    assert found.warnings[0] == "a strange group"
    assert "an old data set" in found.warnings[1]
    write_tasks(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lm_eval.json").read_text())["warnings"] == list(found.warnings)
    run_tasks(tiny, ["tiny_word"], task_folder=folder, device="cpu", limit=2, progress=TerminalProgress())
    assert "warning: a strange group\n" in capfd.readouterr().err


def test_activations_of_the_profile(make_tiny: MakeTiny, folder: Path, tmp_path: Path) -> None:
    """A quantized checkpoint is tested with the activations of the named engine profile."""
    source = add_tokenizer(make_tiny(vocab_size=VOCABULARY))
    quantize(source, "fp8-dynamic", output_dir=tmp_path / "out")
    runs = [
        run_tasks(tmp_path / "out", ["tiny_word"], task_folder=folder, device="cpu", activations=profile)
        for profile in ("vllm-blackwell", "none")
    ]
    a, b = (found.record.tasks[0] for found in runs)
    assert a.items != b.items
    assert a.value == pytest.approx(b.value, rel=0.05)
    assert runs[0].record.arguments["activations"] == "vllm-blackwell"


def test_broken_logits_are_counted(make_tiny: MakeTiny, folder: Path) -> None:
    """NaN logits give minus infinity, a wrong answer and a count, and the record stays JSON."""
    model = add_tokenizer(make_tiny(vocab_size=VOCABULARY, seed=3))
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    broken = run_tasks(model, ["tiny_word"], task_folder=folder, device="cpu")
    assert broken.nonfinite == 12
    loss, acc = broken.record.tasks
    assert loss.value == math.inf
    assert acc.value == 0
    assert json.loads(broken.record.to_json())["tasks"][0]["value"] is None
    assert broken.samples[0]["filtered_resps"] == [[None, False]]


def test_writing_needs_a_server(tiny: Path, folder: Path) -> None:
    """A task that generates text is refused on a checkpoint before the model is run."""
    with raises("task-unusable", where="tiny_writing") as caught:
        run_tasks(tiny, ["tiny_word", "tiny_writing"], task_folder=folder)
    assert "`server`" in caught.value.remedy


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """Without lm_eval the remedy is the command that installs it."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with raises("dependency-missing", where="lm_eval") as caught:
        run_tasks(tiny, ["tiny_word"])
    assert "pip install 'snugfit[eval]'" in caught.value.remedy


def test_unknown_tasks(monkeypatch: pytest.MonkeyPatch, tiny: Path, folder: Path) -> None:
    """A name that lm_eval does not know is refused with similar ones; so are no name and no folder."""
    import lm_eval.tasks

    small = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the whole index takes seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    with raises("task-unknown", where="tasks") as caught:
        run_tasks(tiny, ["tiny_choise"], task_folder=folder)
    assert "'tiny_choise'" in caught.value.what
    assert "tiny_choice" in caught.value.remedy
    with raises("option-invalid", where="tasks"):
        run_tasks(tiny, [])
    with raises("file-missing", where=folder / "none"):
        run_tasks(tiny, ["x"], task_folder=folder / "none")


def test_data_out_of_reach(tiny: Path, tmp_path: Path) -> None:
    """A task whose data set is neither cached nor within reach is refused by its name."""
    config = {"task": "far", "dataset_path": "nobody/no-such-set", "output_type": "loglikelihood", "test_split": "test"}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with raises("task-unusable", where="task far"):
        run_tasks(tiny, ["far"], task_folder=tmp_path)


# --- a server ---


@pytest.fixture
def server(tiny: Path) -> Iterator[str]:
    """A small server that answers /v1/completions from transformers' own forward, as vLLM words it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)

    def complete(body: Mapping[str, Any]) -> dict[str, Any]:
        (ids,) = body["prompt"]
        if not body.get("echo"):
            return {"choices": [{"index": 0, "text": " cat"}]}
        assert len(ids) < 64
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [float(logs[k, token]) for k, token in enumerate(ids[1:])]
        top = [{"own": value, "best": float(logs[k].max())} for k, value in enumerate(own)]
        logprobs = {"token_logprobs": [None, *own, -1.0], "top_logprobs": [None, *top, {"own": -1.0}]}
        return {"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"object": "list", "data": [{"id": "tiny", "max_model_len": 64}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(complete(body))

        def answer(self, value: Any) -> None:
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_address[1]}"
        listener.shutdown()


def test_a_server_scores_as_its_checkpoint(tiny: Path, folder: Path, run: TasksRun, server: str) -> None:
    """The same items score alike on a server and on the checkpoint it serves; a server also generates text."""
    served = run_tasks(tiny, ["tiny_choice", "tiny_writing"], task_folder=folder, server=server)
    local = {row.metric: row for row in run.record.tasks if row.task == "tiny_choice"}
    rows = {(row.task, row.metric): row for row in served.record.tasks}
    assert rows["tiny_choice", "acc"].items == local["acc"].items
    for mine, other in zip(responses(served, "tiny_choice"), responses(run, "tiny_choice"), strict=True):
        assert [a for a, _ in mine] == pytest.approx([b for b, _ in other], abs=1e-4)
        assert [a for _, a in mine] == [b for _, b in other]
    assert rows["tiny_writing", "exact_match,first"].kind == "accuracy"
    assert served.record.arguments["server"] == server
    with raises("option-invalid", where=server) as caught:
        run_tasks(tiny, ["tiny_choice"], task_folder=folder, server=server, server_model="other")
    assert "'other'" in caught.value.what


def test_no_server_answers(tiny: Path, folder: Path) -> None:
    """A server that does not answer is named before anything is asked."""
    with raises("server-unreachable", where="http://127.0.0.1:9"):
        run_tasks(tiny, ["tiny_choice"], task_folder=folder, server="http://127.0.0.1:9")
