"""`serve` with a stand-in for an engine: flags, questions, measures, refusals, and what is left behind."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers import fake_engine
from helpers.errors import raises
from helpers.tiny_families import random_rows, write_rows
from snugfit.benchmarking.plan import BenchOptions
from snugfit.cli.app import app
from snugfit.engines.launch import LAUNCHES, asks_for_fp8_cache, given, layers_in_16_bits
from snugfit.engines.refusals import REFUSALS, explain
from snugfit.errors import UserError
from snugfit.hosting import guard
from snugfit.hosting.engine import make_start
from snugfit.hosting.request import Measures, ServeOptions
from snugfit.hosting.serve import serve
from snugfit.records.serve import ServeRecord
from snugfit.serving.questions import QUESTIONS, language_of


@pytest.fixture(scope="module")
def source(make_tiny: MakeTiny) -> Path:
    return make_tiny("llama")


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    """A tiny model in a directory of its own."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def fake(kind: str) -> str:
    return shlex.join([sys.executable, fake_engine.__file__, kind])


def options(kind: str = "serves", **more: object) -> ServeOptions:
    return ServeOptions(**{"command": fake(kind), "gpu": "16GiB", "start_seconds": 60.0, **more})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def path_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in imports the helpers."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def left(model: Path) -> list[int]:
    """The processes of the stand-in that still live."""
    pids = [int(pid) for pid in (model / "pids").read_text(encoding="utf-8").split()]
    return [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):  # a killed orphan stays a zombie until init reads its end
        if not status.exists() or status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.05)
    return True


def test_serve_asks_measures_and_stops(model: Path, tmp_path: Path) -> None:
    """The record has answers, prediction beside what the log says, and the results; no process is left."""
    out = tmp_path / "out"
    measures = Measures(bench=BenchOptions(prefill=(64,), depths=(), concurrency=(2,), prompt_tokens=32, repeats=2))
    record = serve(model, output_dir=out, options=options(), measures=measures)
    assert record.started
    assert [answer.verdict for answer in record.answers] == ["answers"] * 3
    assert record.taken.weight_bytes == int(1.5 * 2**30)
    assert record.taken.cache_tokens == 123_456
    assert record.taken.graph_bytes == 2**28
    assert record.predicted is not None
    assert record.predicted.cache_tokens is not None
    assert record.predicted.weight_bytes < record.predicted.cache_bytes
    assert record.engine_version == "0.24.0"
    assert record.results == {"bench": "bench/bench.json"}
    bench = json.loads((out / "bench" / "bench.json").read_text(encoding="utf-8"))
    assert [cell["status"] for cell in bench["runs"][0]["cells"]] == ["measured", "measured"]
    assert bench["runs"][0]["server"]["memory"]["kv_cache_tokens"] == 123_456
    stored = json.loads((out / "serve.json").read_text(encoding="utf-8"))
    assert stored["schema"] == "snugfit.serve/1"
    assert "KV cache size" in (out / record.log).read_text(encoding="utf-8")
    assert left(model) == []


def test_bad_answers_are_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A looping model loops in the record."""
    monkeypatch.setenv("FAKE_CHAT", "Well. " + "It is what it is. " * 9)
    record = serve(model, output_dir=tmp_path / "out", options=options())
    assert {answer.verdict for answer in record.answers} == {"loops"}


@pytest.mark.parametrize(
    ("kind", "known", "words"), [("refuses", True, "other processes"), ("unknown", False, "not known")]
)
def test_a_refusal_is_explained(model: Path, tmp_path: Path, kind: str, known: bool, words: str) -> None:
    """The record says why the engine did not start, in plain words, and the log is kept."""
    out = tmp_path / "out"
    record = serve(model, output_dir=out, options=options(kind))
    assert not record.started
    assert record.refusal is not None
    assert record.refusal.known == known
    assert words in record.refusal.reason
    assert "Error" in record.refusal.line
    assert (out / "engine.log").read_text(encoding="utf-8")
    assert "REFUSED" in (out / "serve.md").read_text(encoding="utf-8")
    assert left(model) == []


def test_a_silent_engine_is_stopped(model: Path, tmp_path: Path) -> None:
    """An engine that does not answer in time is a refusal, and is ended with its children."""
    record = serve(model, output_dir=tmp_path / "out", options=options("silent", start_seconds=3.0))
    assert record.refusal is not None
    assert "in time" in record.refusal.reason
    assert left(model) == []


def test_an_interrupt_keeps_the_record(model: Path, tmp_path: Path) -> None:
    """Ctrl-C while the server runs: record and log are there, marked, and the server is stopped."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    record = serve(model, output_dir=tmp_path / "out", options=options(), hold=interrupt)
    assert record.started
    assert record.stopped == "interrupted"
    assert (tmp_path / "out" / "serve.json").is_file()
    assert left(model) == []


_STARTER = """\
import sys
from pathlib import Path
from snugfit.hosting.engine import Start, running
start = Start(command=tuple(sys.argv[2:]), environment={}, port=int(sys.argv[-1]), ready="/health")
with running(start, Path(sys.argv[1]), start_seconds=600):
    pass
"""


def test_a_killed_starter_leaves_no_engine(tmp_path: Path) -> None:
    """Where this process is killed (SIGKILL), a guard ends the engine and its children."""
    engine = [sys.executable, fake_engine.__file__, "silent", str(tmp_path), "--port", "9"]
    starter = subprocess.Popen([sys.executable, "-c", _STARTER, str(tmp_path / "log"), *engine])
    pids = tmp_path / "pids"
    for _ in range(600):
        if pids.exists() and len(pids.read_text(encoding="utf-8").split()) == 2:
            break
        time.sleep(0.05)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids.read_text(encoding="utf-8").split())
    starter.kill()
    starter.wait()
    assert left(tmp_path) == []


def test_the_guard_keeps_out_of_an_orderly_end() -> None:
    """After a word from its starter, and without a process id, the guard ends nothing."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        for words in (f"{other.pid}\nstopped\n", "stopped\n", ""):
            subprocess.run([sys.executable, "-I", guard.__file__], input=words.encode(), check=True, timeout=20)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_failed_measurement_keeps_the_others(model: Path, tmp_path: Path) -> None:
    """Where `eval` cannot be done, the benchmark before it is kept, and the record says what failed."""
    bench = BenchOptions(prefill=(32,), depths=(), concurrency=(), repeats=1)
    rows = write_rows(tmp_path / "rows.jsonl", random_rows((40, 40), stop=60))
    measures = Measures(bench=bench, reference=model, dataset=[rows], contexts=(32,))
    record = serve(model, output_dir=tmp_path / "out", options=options(), measures=measures)
    assert record.results == {"bench": "bench/bench.json"}
    assert record.stopped is not None
    assert "not what vLLM answers" in record.stopped


def test_flags_are_those_that_are_needed(model: Path, tmp_path: Path) -> None:
    """A context is passed on, the user's own options replace ours, and nothing that is not needed is given."""
    serve(model, options=options(context=32, max_num_seqs=4, extra=("--max-num-seqs=9", "--enforce-eager")))
    given_options = (model / "options").read_text(encoding="utf-8").splitlines()
    assert given_options[given_options.index("--max-model-len") + 1] == "32"
    assert "--max-num-seqs=9" in given_options
    assert "4" not in given_options
    assert "--kv-cache-dtype" not in given_options
    serve(model, options=options())
    assert "--max-model-len" not in (model / "options").read_text(encoding="utf-8")


def test_bad_input_starts_nothing(model: Path, tmp_path: Path) -> None:
    """Unknown engines, languages and models, and commands that do not exist, are errors before anything is written."""
    out = tmp_path / "out"
    with raises("option-invalid", where="engine"):
        serve(model, output_dir=out, options=options(engine="vllm-9"))
    with raises("option-invalid", where="language"):
        serve(model, output_dir=out, options=options(language="xx"))
    with raises("model-not-found"):
        serve(tmp_path / "nothing", output_dir=out, options=options())
    with raises("model-not-found", where=str(tmp_path / "nothing")):
        serve(model, output_dir=out, options=options(), measures=Measures(reference=tmp_path / "nothing"))
    with raises("option-missing", where="output_dir"):
        serve(model, options=options(), measures=Measures(tasks=("piqa",)))
    with raises("option-conflict", where="command"):
        serve(model, output_dir=out, options=options(python=sys.executable))
    with raises("option-invalid", where=str(tmp_path / "no-such-engine")):
        serve(model, output_dir=out, options=options(command=str(tmp_path / "no-such-engine")))
    with raises("option-invalid", where="gpu"):
        serve(model, output_dir=out, options=options(gpu="RTX 9999"))
    for name, value in (
        ("start_seconds", math.nan),
        *(("gpu_index", -1), ("context", 0), ("tensor_parallel_size", 0), ("max_num_seqs", 0)),
        *(("port", 0), ("port", 65536)),
    ):
        with raises("option-invalid", where=name):
            serve(model, output_dir=out, options=options("serves", **{name: value}))
    for share in (0.0, 1.5, math.nan):
        with raises("option-invalid", where="gpu_memory_utilization"):
            serve(model, output_dir=out, options=options("serves", gpu=None, gpu_memory_utilization=share))
    for asked, code, where in (
        ({"bench": BenchOptions(output_tokens=1)}, "option-invalid", "output_tokens"),
        ({"bench": BenchOptions(prefill=(), depths=(), concurrency=())}, "option-missing", "prefill"),
        ({"bench": BenchOptions(prompt_tokens=0)}, "option-invalid", "prompt_tokens"),
        ({"dataset": ["book.txt"]}, "option-conflict", "dataset"),
        ({"contexts": (64,)}, "option-conflict", "contexts"),
        ({"max_chunks": 3}, "option-conflict", "max_chunks"),
        ({"max_chunks": 0}, "option-conflict", "max_chunks"),
        ({"reference": model, "dataset": [tmp_path / "nowhere"]}, None, str(tmp_path / "nowhere")),
        ({"reference": model, "contexts": (10**6,)}, None, None),
    ):
        with pytest.raises(UserError) as caught:
            serve(model, output_dir=out, options=options(), measures=Measures(**asked))
        assert code in (None, caught.value.code)
        assert where in (None, caught.value.where)
    assert not out.exists()
    assert not (model / "pids").exists()


@pytest.mark.parametrize(
    ("bad", "code"), [({"command": "no-such-engine"}, "option-invalid"), ({"gpu": "RTX 9999"}, "option-invalid")]
)
def test_bad_input_leaves_no_temporary_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: dict[str, str], code: str
) -> None:
    """Without an output directory bad input leaves no folder for the log, and a run that starts names its log there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with raises(code):
        serve(model, options=options(**bad))
    assert list(folder.iterdir()) == []
    assert Path(serve(model, options=options("refuses")).log).is_relative_to(folder)


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    """`snugfit serve` prints the reason of a refusal and ends with 2; options of bench alone have no effect."""
    arguments = ["serve", str(model), "--gpu", "16GiB", "--command", fake("refuses"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--", "--enforce-eager"])
    assert result.exit_code == 2
    assert "other processes hold memory" in result.output
    assert "--enforce-eager" in (model / "options").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, ["serve", str(model), "--repeats", "3"])
    assert result.exit_code == 2
    assert "[option-conflict]" in result.output


def test_commands_of_each_engine() -> None:
    """Every engine's command names the model, the port and the flags by its own options."""
    for name, launch in LAUNCHES.items():
        start = make_start(
            launch, "M", python="/env/python", command=None, port=7, options=[launch.context, "64"], extra=[]
        )
        assert start.command[:3] == ("/env/python", "-m", launch.module), name
        assert "M" in start.command
        assert start.command[-2:] == (launch.context, "64")
        assert start.url == "http://127.0.0.1:7"
    assert given("--max-model-len", ["--max_model_len=8"])
    vllm = LAUNCHES["vllm"]
    assert asks_for_fp8_cache(vllm, ["--kv-cache-dtype", "fp8"])
    assert asks_for_fp8_cache(vllm, ["--x", "--kv-cache-dtype=fp8_e4m3"])
    assert not asks_for_fp8_cache(vllm, ["--kv-cache-dtype", "auto", "fp8"])
    assert not given("--max-model-len", ["--max-model-lens"])


@pytest.mark.parametrize(
    ("extra", "layers"),
    [
        ([], ()),
        (["--kv-cache-dtype-skip-layers", "0", "5", "--enforce-eager", "7"], (0, 5)),
        (["--kv_cache_dtype_skip_layers=3"], (3,)),
        (["--kv-cache-dtype-skip-layers", "0", "--kv-cache-dtype-skip-layers", "1"], (1,)),
        (["--kv-cache-dtype-skip-layers", "sliding_window"], None),
    ],
)
def test_layers_that_keep_16_bits_are_read(extra: list[str], layers: tuple[int, ...] | None) -> None:
    """The engine's own option says which layers keep 16 bits; kinds of layers are not known."""
    assert layers_in_16_bits(LAUNCHES["vllm"], extra) == layers
    assert layers_in_16_bits(LAUNCHES["sglang"], extra) == ()


def test_layers_that_keep_16_bits_are_predicted(model: Path) -> None:
    """An FP8 cache beside which a layer keeps 16 bits has room for as many tokens as that leaves."""

    def predicted(*extra: str) -> ServeRecord:
        return serve(model, options=options("refuses", extra=extra))

    fp8, keep = ("--kv-cache-dtype", "fp8"), ("--kv-cache-dtype-skip-layers", "1")
    found = {
        name: predicted(*extra).predicted for name, extra in {"fp8": fp8, "mixed": (*fp8, *keep), "16": ()}.items()
    }
    tokens = {name: one.cache_tokens or 0 for name, one in found.items() if one is not None}
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    assert tokens["mixed"] == pytest.approx(2 * layers / (layers + 1) * tokens["16"], rel=1e-6)
    assert tokens["fp8"] == pytest.approx(2 * tokens["16"], rel=1e-6)
    assert tokens["16"] > 0
    unknown = predicted(*fp8, "--kv-cache-dtype-skip-layers", "sliding_window")
    assert unknown.predicted is not None
    assert unknown.predicted.cache_tokens == tokens["16"]
    assert any("not given by number" in note for note in unknown.notes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/usr/bin/python3: No module named vllm", "not installed"),
        ("python3: Error while finding module specification for 'vllm.entrypoints.openai.api_server'", "not installed"),
        ("api_server.py: error: unrecognized arguments: --frobnicate", "does not have one of the options"),
        ("ValueError: No available memory for the cache blocks. Try increasing", "nothing is left for a KV cache"),
        ("ValueError: 5.0 GiB KV cache is needed, which is larger than the available KV cache memory", "beside"),
        ("ValidationError: User-specified max_model_len (99999) is greater than the derived max_model_len", "longer"),
        ("ValueError: Model architectures ['FooForCausalLM'] are not supported for now.", "no code for the model"),
        ("RuntimeError: Quantization scheme is not supported for the current GPU. Min capability: 75", "too old"),
        ("ValueError: Failed to find a kernel that can implement the NVFP4 linear layer. Reasons:", "no kernel"),
        ("ValueError: Found different quantization schemes for the shards of qkv_proj", "stored in different formats"),
        ("NotImplementedError: No compressed-tensors compatible scheme was found for layer_name='x'", "does not know"),
        ("ValueError: Unsupported weight strategy=block, supported strategies are [channel, tensor]", "no kernel"),
        ("NotImplementedError: Activation-quantized float4 is only supported in the NVFP4 layout", "does not know one"),
        ("ValueError: Unknown quantization method: foo. Must be one of", "does not know this way"),
        ("ValueError: There is no module or parameter named 'model.x' in LlamaForCausalLM", "names"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "did not suffice"),
        ("RuntimeError: Failed to infer device type, please set the environment variable", "finds no GPU"),
        ("OSError: [Errno 98] Address already in use", "this port"),
    ],
)  # fmt: skip
def test_refusals_are_known(line: str, words: str) -> None:
    """What engines say when they refuse a file is explained, wherever in the log it stands."""
    found, refusal = explain(
        f"INFO starting\n(EngineCore pid=7) {line}\nRuntimeError: Engine core initialization failed."
    )
    assert refusal is not None
    assert words in refusal.reason
    assert line[-40:] in found


def test_every_refusal_has_a_remedy() -> None:
    """Reasons are sentences' parts without a full stop, remedies are sentences."""
    for refusal in REFUSALS:
        assert not refusal.reason.endswith(".")
        assert refusal.remedy.endswith(".")


def test_language_of_the_card(tmp_path: Path) -> None:
    """Questions are in the first language of the model's card that has some; else in English."""
    assert language_of(tmp_path) == "en"
    card = tmp_path / "README.md"
    for front, expected in (
        ("language: de", "de"),
        ("language:\n- fr\n- en", "fr"),
        ("language: [ja]", "ja"),
        ("tags:\n- x\nlanguage:\n  - 'zh-Hant'\n  - en", "zh"),
        ("language: [xx, es, de]", "es"),
        ("language: [", "en"),
        ("language: 7", "en"),
        ("x: 1", "en"),
    ):
        card.write_text(f"---\n{front}\n---\n# Model\nlanguage: zh\n", encoding="utf-8")
        assert language_of(tmp_path) == expected
    assert all(len(questions) == 3 for questions in QUESTIONS.values())


def test_the_record_reads_back(model: Path, tmp_path: Path) -> None:
    """serve.json is a record of its schema."""
    from pydantic import TypeAdapter

    record = serve(model, output_dir=tmp_path / "out", options=options("refuses"))
    raw = (tmp_path / "out" / "serve.json").read_text(encoding="utf-8")
    assert TypeAdapter(ServeRecord).validate_json(raw, strict=True) == record
