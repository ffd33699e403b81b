"""`snugfit eval` end to end, on models whose every figure is known by other means."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.evaluations import checkpoints
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.data.python_docs import python_topics
from snugfit.evaluation import gpu_memory
from snugfit.evaluation.evaluate import evaluate, write_results
from snugfit.evaluation.evaluated_model import open_model
from snugfit.model import forward_pass
from snugfit.quantization.quantize import quantize
from snugfit.records.evaluation import EvalRecord, ModelFigures

Altered = Callable[..., Path]


def change(source: Path, target: Path, alter: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a one-file checkpoint whose tensors went through `alter`."""
    shutil.copytree(source, target)
    with safe_open(source / "model.safetensors", framework="pt") as stream:
        tensors = {name: alter(name, stream.get_tensor(name)).contiguous() for name in stream.keys()}  # noqa: SIM118
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def noisy(source: Path, target: Path, size: float) -> Path:
    generator = torch.Generator().manual_seed(3)

    def alter(_: str, tensor: Tensor) -> Tensor:
        return tensor + (size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    return change(source, target, alter)


def constant(source: Path, target: Path, logits: list[float]) -> Path:
    """A model that answers every context with the same `logits`."""

    def alter(name: str, tensor: Tensor) -> Tensor:
        if name == "lm_head.weight":
            return torch.tensor(logits)[:, None].expand(tensor.shape) / tensor.shape[1]
        if name == "model.embed_tokens.weight" or "norm" in name:
            return torch.ones_like(tensor)
        return torch.zeros_like(tensor)

    return change(source, target, alter)


def rows_file(directory: Path, rows: list[list[int]]) -> Path:
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    return file


def plain(path: Path, rows: list[list[int]]) -> Tensor:
    """transformers' own logits of rows of one length."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor(rows), use_cache=False).logits
    return logits.double()


def models(record: EvalRecord, context: int = 0) -> dict[str, ModelFigures]:
    return {model.name: model for model in record.contexts[context].models}


@pytest.fixture(scope="module")
def llama(make_tiny: MakeTiny) -> Path:
    """A tiny llama in fp32."""
    return make_tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def talker(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer of characters and a chat template."""
    return add_tokenizer(shutil.copytree(llama, tmp_path_factory.mktemp("talker") / "talker"))


@pytest.fixture(scope="module")
def random_rows() -> list[list[int]]:
    """8 rows of 64 random ids below 64."""
    generator = torch.Generator().manual_seed(5)
    rows: list[list[int]] = torch.randint(3, 64, (8, 64), generator=generator).tolist()
    return rows


def test_a_model_with_itself(llama: Path, tmp_path: Path, random_rows: list[list[int]]) -> None:
    """A model compared with itself has KL 0, the same top token everywhere, and nothing left to settle."""
    copy = shutil.copytree(llama, tmp_path / "copy")
    record = evaluate([copy], reference=llama, dataset=[rows_file(tmp_path, random_rows)])
    found = models(record)["copy"]
    assert found.kl is not None
    assert found.reverse_kl is not None
    assert found.kl.max == 0.0
    assert found.reverse_kl.max == 0.0
    assert found.same_top == 1.0
    assert found.rms_change == 0.0
    assert found.nonfinite == 0
    assert found.perplexity == models(record)[llama.name].perplexity


def test_uniform_logits(llama: Path, tmp_path: Path, random_rows: list[list[int]]) -> None:
    """A model that knows nothing has the vocabulary's size as its perplexity, at every position."""
    blank = constant(llama, tmp_path / "blank", [0.0] * 64)
    found = models(evaluate([blank], dataset=[rows_file(tmp_path, random_rows)]))["blank"]
    assert found.perplexity == pytest.approx(64, rel=1e-6)
    assert found.perplexity_error == pytest.approx(0, abs=1e-6)
    assert [b.perplexity for b in found.by_position] == pytest.approx([64] * len(found.by_position), rel=1e-6)


def test_two_tokens_by_hand(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Two models of two tokens, 4:1 and 1:1 and 1:2: every figure is what paper and pencil say."""
    source = make_tiny("llama", dtype=torch.float32, vocab_size=2, bos_token_id=0, eos_token_id=1)
    p = constant(source, tmp_path / "p", [math.log(4), 0.0])
    q = constant(source, tmp_path / "q", [0.0, 0.0])
    r = constant(source, tmp_path / "r", [0.0, math.log(2)])
    rows = [[0, 0, 0, 1, 0], [1, 1, 0, 0, 0]]  # scored: 0 0 1 0 and 1 0 0 0: six zeros, two ones
    record = evaluate([q, r], reference=p, dataset=[rows_file(tmp_path, rows)])
    found = models(record)
    assert record.contexts[0].tokens == 8
    loss = -(6 * math.log(0.8) + 2 * math.log(0.2)) / 8
    assert found["p"].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["p"].nll_by_chunk == pytest.approx([4 * loss, 4 * loss], rel=1e-5)
    assert found["p"].perplexity_error == pytest.approx(0, abs=1e-5)  # both rows hold as many ones
    assert found["q"].perplexity == pytest.approx(2, rel=1e-6)
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    reverse = 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    spread, back = found["q"].kl, found["q"].reverse_kl
    assert spread is not None
    assert back is not None
    for value in (spread.mean, spread.median, spread.p90, spread.p95, spread.p99, spread.p999, spread.max):
        assert value == pytest.approx(kl, rel=1e-5)
    assert spread.by_chunk == pytest.approx([4 * kl, 4 * kl], rel=1e-5)
    assert back.mean == pytest.approx(reverse, rel=1e-5)
    assert found["q"].same_top == 1.0  # a tie, and numpy takes the first
    assert found["q"].rms_change == pytest.approx(0.3, rel=1e-5)  # 0.8 -> 0.5 and 0.2 -> 0.5
    assert found["r"].same_top == 0.0
    change_of = [1 / 3 - 0.8] * 6 + [2 / 3 - 0.2] * 2
    assert found["r"].rms_change == pytest.approx(math.sqrt(sum(c * c for c in change_of) / 8), rel=1e-5)
    assert [(b.low, b.high, b.tokens) for b in found["q"].by_position] == [(1, 2, 2), (2, 4, 4), (4, 8, 2)]
    assert found["p"].by_position[0].perplexity == pytest.approx(
        math.exp(-(math.log(0.8) + math.log(0.2)) / 2), rel=1e-5
    )
    assert [(b.low, b.high, b.tokens) for b in found["q"].by_confidence] == [(0.75, 0.9, 8)]
    (losses, kls) = record.contexts[0].pairs
    assert (losses.figure, kls.figure) == ("loss", "kl")
    of_r = -(6 * math.log(1 / 3) + 2 * math.log(2 / 3)) / 8
    assert losses.difference == pytest.approx(math.log(2) - of_r, rel=1e-5)
    assert losses.p is None  # two chunks settle nothing


def by_hand(reference: Tensor, candidate: Tensor, rows: list[list[int]]) -> dict[str, Any]:
    """Figures of full logits [R, T, V], the plain way."""
    targets = torch.tensor(rows)[:, 1:]
    p, q = (torch.log_softmax(logits[:, :-1], -1) for logits in (reference, candidate))
    kl = (p.exp() * (p - q)).sum(-1)
    true_p, true_q = (x.gather(-1, targets.unsqueeze(-1)).squeeze(-1) for x in (p, q))
    quantiles = np.quantile(kl.numpy(), [0.5, 0.9, 0.95, 0.99, 0.999])
    return {
        "perplexity": float((-true_q).mean().exp()),
        "kl": float(kl.mean()),
        "quantiles": quantiles.tolist(),
        "max": float(kl.max()),
        "reverse": float((q.exp() * (q - p)).sum(-1).mean()),
        # bf16 logits tie: whichever of the reference's largest the candidate takes, it is the same
        "same_top": float((p.gather(-1, q.argmax(-1, keepdim=True)) == p.amax(-1, keepdim=True)).double().mean()),
        "rms_change": float((true_q.exp() - true_p.exp()).square().mean().sqrt()),
    }


def agree(found: ModelFigures, expected: dict[str, Any], rel: float) -> None:
    assert found.perplexity == pytest.approx(expected["perplexity"], rel=rel)
    assert found.kl is not None
    assert found.reverse_kl is not None
    assert found.kl.mean == pytest.approx(expected["kl"], rel=rel)
    quantiles = [found.kl.median, found.kl.p90, found.kl.p95, found.kl.p99, found.kl.p999]
    assert quantiles == pytest.approx(expected["quantiles"], rel=20 * rel)
    assert found.kl.max == pytest.approx(expected["max"], rel=20 * rel)
    assert found.reverse_kl.mean == pytest.approx(expected["reverse"], rel=rel)
    assert found.same_top == pytest.approx(expected["same_top"], abs=1e-9)
    assert found.rms_change == pytest.approx(expected["rms_change"], rel=rel)


def test_against_full_logits(llama: Path, tmp_path: Path, random_rows: list[list[int]]) -> None:
    """Every figure is that of transformers' full logits, to 1e-4, on a random fp32 model and a disturbed copy."""
    other = noisy(llama, tmp_path / "noisy", 0.02)
    record = evaluate([other], reference=llama, dataset=[rows_file(tmp_path, random_rows)], tokens_per_batch=512)
    agree(models(record)["noisy"], by_hand(plain(llama, random_rows), plain(other, random_rows), random_rows), 1e-4)


def test_against_full_logits_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """On the real model and a disturbed copy the figures are those of transformers' full bf16 logits, to 1e-4."""
    other = noisy(smollm2, tmp_path / "noisy", 0.002)
    record = evaluate([other], reference=smollm2, contexts=[128], max_chunks=2, noise_floor="none")
    from snugfit.data.texts import read_chunks
    from snugfit.data.tokenizer import Tokenizer

    rows = [list(row) for row in read_chunks(Tokenizer(smollm2), [], [128], max_chunks=2)[0][0].rows]
    agree(models(record)["noisy"], by_hand(plain(smollm2, rows), plain(other, rows), rows), 1e-4)


def test_engine_profile_and_floor(make_tiny: MakeTiny, tmp_path: Path, token_rows: Path) -> None:
    """4-bit activations cost more than 16-bit ones, and noise floors are measured: small, on fewer chunks, in fp32."""
    source = make_tiny("llama")
    quantize(source, "nvfp4-four-over-six", output_dir=tmp_path / "q", dataset=[token_rows])
    full = evaluate([tmp_path / "q"], reference=source, dataset=[token_rows], noise_floor="all")
    weights = evaluate([tmp_path / "q"], reference=source, dataset=[token_rows], activations="none")
    a, b = models(full)["q"], models(weights)["q"]
    assert a.kl is not None
    assert b.kl is not None
    assert a.kl.mean > b.kl.mean > 0
    floor = models(full)[source.name].floor
    assert floor is not None
    assert floor.arithmetic == "float32"
    assert (floor.chunks, floor.tokens) == (2, 2 * 47)
    assert 0 < floor.kl < b.kl.mean / 10
    assert a.floor is not None
    assert b.floor is None
    assert checkpoints(full)[0].formats == {"nvfp4": 21}


def test_non_finite_logits_are_counted(llama: Path, tmp_path: Path, random_rows: list[list[int]]) -> None:
    """A candidate whose head holds a NaN is reported with every token counted, beside one that is whole."""

    def alter(name: str, tensor: Tensor) -> Tensor:
        if name == "lm_head.weight":
            tensor[5, 0] = math.nan
        return tensor

    broken = change(llama, tmp_path / "broken", alter)
    whole = noisy(llama, tmp_path / "whole", 0.01)
    record = evaluate([broken, whole], reference=llama, dataset=[rows_file(tmp_path, random_rows)])
    found = models(record)
    assert found["broken"].nonfinite == record.contexts[0].tokens == 8 * 63
    assert found["whole"].nonfinite == 0
    assert found["whole"].kl is not None
    assert record.contexts[0].pairs == ()  # nothing to pair with
    assert json.loads(record.to_json())["contexts"][0]["models"][1]["perplexity"] is None
    write_results(record, tmp_path / "out")
    assert "NaN or infinite" in (tmp_path / "out" / "eval.md").read_text()


def test_contexts_are_cut_and_compared(talker: Path, tmp_path: Path) -> None:
    """Two lengths, two candidates, one command: a record, tables and plots, with every file named by its digest."""
    small = change(talker, tmp_path / "small", lambda _, tensor: tensor)
    rough = noisy(talker, tmp_path / "rough", 0.02)
    text = tmp_path / "text.txt"
    text.write_text(python_topics("evaluation")[5000:9000], encoding="utf-8")
    command = [
        "eval",
        small,
        rough,
        "--reference",
        talker,
        "--dataset",
        text,
        "--context",
        "64,128",
        "--max-chunks",
        6,
    ]
    result = CliRunner().invoke(app, [*map(str, command), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert "rough" in result.stdout
    names = {file.name for file in (tmp_path / "out").iterdir()}
    plots = {f"{n}.{e}" for n in ("perplexity-by-context", "kl-by-context", "kl-by-position") for e in ("png", "svg")}
    assert names == {"eval.json", "eval.csv", "eval.md"} | plots
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert record["schema"] == "snugfit.eval/1"
    assert [context["context"] for context in record["contexts"]] == [64, 128]
    assert [context["chunks"] for context in record["contexts"]] == [6, 6]
    assert record["texts"][0]["name"] == "text.txt"
    pair = record["contexts"][0]["pairs"][1]
    assert (pair["a"], pair["b"], pair["figure"]) == ("small", "rough", "kl")
    assert pair["difference"] < 0
    assert pair["p"] < 0.05
    again = CliRunner().invoke(app, [*map(str, command), "-o", str(tmp_path / "out")])
    assert failed_with(again, "output-exists", tmp_path / "out")


def test_chat_logs_are_continued(talker: Path, tmp_path: Path) -> None:
    """Of a chat log only answers are scored, and both models continue from where they diverge most."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rough = noisy(talker, tmp_path / "rough", 0.02)
    talk = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris, on the river Seine. " * 4},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"messages": talk}) + "\n", encoding="utf-8")
    record = evaluate([rough], reference=talker, dataset=[log], continuations=2, noise_floor="none")
    assert record.contexts[0].context == 0
    first, second = record.continuations
    assert first.kl >= second.kl > 0
    tokenizer = AutoTokenizer.from_pretrained(talker)
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(talker, dtype="auto").eval()
    prompt = torch.tensor([ids[: first.position]])
    continued = model.generate(prompt, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert first.reference_continuation == tokenizer.decode(continued[0, prompt.shape[1] :])
    assert first.source.endswith("log.jsonl:1")


def test_stored_reference(llama: Path, tmp_path: Path, random_rows: list[list[int]]) -> None:
    """A stored reference gives the same losses exactly, KL as exactly as it holds the vocabulary, and can be shared."""
    text = [rows_file(tmp_path, random_rows)]
    other = noisy(llama, tmp_path / "noisy", 0.02)
    cache = tmp_path / "cache"
    first = evaluate([other], reference=llama, dataset=text, reference_cache=cache)
    (file,) = cache.iterdir()
    second = evaluate([other], reference=llama, dataset=text, reference_cache=cache)
    shared = evaluate([other], reference=file, dataset=text)
    a = models(first)["noisy"]
    assert a.kl is not None
    for record in (second, shared):
        b, base = models(record)["noisy"], record.contexts[0].models[0]
        assert b.kl is not None
        assert b.kl_kind == "estimate"
        assert b.kl.mean == pytest.approx(a.kl.mean, rel=1e-4)  # 64 tokens are all there are
        assert b.nll_by_chunk == a.nll_by_chunk
        assert base.perplexity == first.contexts[0].models[0].perplexity
        assert base.floor == first.contexts[0].models[0].floor
        assert record.reference is not None
        assert record.reference.stored_bytes == file.stat().st_size
    with raises("reference-mismatch", where=file):
        evaluate([other], reference=file, dataset=[rows_file(tmp_path, random_rows[:4])])


def test_stored_reference_of_another_model_is_not_taken(
    llama: Path, tmp_path: Path, random_rows: list[list[int]]
) -> None:
    """One changed weight makes another reference: the cache keeps both."""
    text = [rows_file(tmp_path, random_rows)]
    other = noisy(llama, tmp_path / "noisy", 0.02)
    cache = tmp_path / "cache"
    evaluate([other], reference=llama, dataset=text, reference_cache=cache, noise_floor="none")
    evaluate([llama], reference=other, dataset=text, reference_cache=cache, noise_floor="none")
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "code", "place"),
    [
        ({"contexts": [4096]}, "dataset-too-small", "a.txt"),
        ({"activations": "hopper"}, "option-invalid", "activations"),
        ({"noise_floor": "some"}, "option-invalid", "noise_floor"),
        ({"tokens_per_batch": 0}, "option-invalid", "tokens_per_batch"),
        ({"continuations": -1}, "option-invalid", "continuations"),
        ({"reference_cache": "here", "reference": None}, "option-missing", "reference_cache"),
        ({"device": "tpu"}, "option-invalid", "device"),
    ],
)
def test_bad_options(smollm2: Path, tmp_path: Path, options: dict[str, Any], code: str, place: str) -> None:
    """What cannot be done is refused before any model is run."""
    text = tmp_path / "a.txt"
    text.write_text("words " * 100, encoding="utf-8")
    settings: dict[str, Any] = {"reference": smollm2, "dataset": [text], "contexts": [32], **options}
    copy = change(smollm2, tmp_path / "copy", lambda _, tensor: tensor)
    with raises(code, where=place):
        evaluate([copy], **settings)


def test_models_that_do_not_belong_together(make_tiny: MakeTiny, llama: Path, tmp_path: Path, token_rows: Path) -> None:
    """Another vocabulary, rows beyond the positions and one checkpoint twice are refused."""
    wide = make_tiny("llama", vocab_size=80)
    with raises("models-mismatch"):
        evaluate([wide], reference=llama, dataset=[token_rows])
    short = make_tiny("llama", max_position_embeddings=32)
    with raises("sequence-too-long", where=f"{token_rows}:1") as caught:
        evaluate([short], dataset=[token_rows])
    assert "32 positions" in caught.value.what
    assert evaluate([short], dataset=[token_rows], allow_long_context=True).contexts[0].chunks == 6
    with raises("option-invalid", where=llama):
        evaluate([llama, llama], dataset=[token_rows])
    with raises("option-missing", where="models"):
        evaluate([], dataset=[token_rows])
    with raises("token-out-of-range", where=tmp_path / "rows.jsonl"):
        evaluate([llama], dataset=[rows_file(tmp_path, [[1, 2, 64]])])


def test_a_full_gpu_is_an_error_of_the_user(
    llama: Path, tmp_path: Path, random_rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's out-of-memory error names the device and what to lower."""

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand so on")

    monkeypatch.setattr(forward_pass, "queue_layer", fail)
    with raises("gpu-memory-insufficient", where="cpu") as caught:
        evaluate([llama], dataset=[rows_file(tmp_path, random_rows)])
    assert "2 GiB" in caught.value.what
    assert "`tokens_per_batch`" in caught.value.remedy


@pytest.mark.parametrize(("free", "expected"), [(0, 1), (24 * 4 * 128 * 100, 100), (1 << 50, 16384)])
def test_tokens_follow_the_free_memory(llama: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    """A batch takes a quarter of a GPU's free memory, however little that is, and 16,384 tokens at most."""
    monkeypatch.setattr(gpu_memory, "free_bytes", lambda _: free)
    assert gpu_memory.tokens_that_fit([open_model(llama)], torch.device("cuda")) == expected


def test_a_broken_stored_reference_is_refused(llama: Path, tmp_path: Path, token_rows: Path) -> None:
    """A file that is not a stored reference is refused by name."""
    (tmp_path / "ref.safetensors").write_bytes(b"nothing")
    with raises("reference-invalid", where=tmp_path / "ref.safetensors"):
        evaluate([llama], reference=tmp_path / "ref.safetensors", dataset=[token_rows])


def test_memory_follows_the_layer(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Two models of 0.4 GB each are compared within 0.25 GB beyond what imports take."""
    settings = {
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_hidden_layers": 28,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 512,
    }
    source = make_tiny("llama", **settings)
    size = (source / "model.safetensors").stat().st_size
    assert size > 400e6
    other = shutil.copytree(source, tmp_path / "other", copy_function=os.link)
    rows = torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0)).tolist()
    text = rows_file(tmp_path, rows)
    code = (
        "import sys, torch, transformers, scipy.stats\n"
        "torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM, GenerationConfig\n"
        "from snugfit.evaluation.evaluate import evaluate\n"
        "from snugfit.machine import peak_rss_bytes\n"
        "small, source, other, text = sys.argv[1:]\n"
        "evaluate([small], dataset=[text], noise_floor='none')\n"  # whatever is imported late
        "before = peak_rss_bytes()\n"
        "evaluate([other], reference=source, dataset=[text], noise_floor='none')\n"
        "print(peak_rss_bytes() - before)\n"
    )
    small = make_tiny("llama", vocab_size=512)
    arguments = [sys.executable, "-c", code, str(small), str(source), str(other), str(text)]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert int(result.stdout) < 0.25e9
