"""A run on several processes: the files and figures of one process, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import MakeTiny
from helpers.killed import KILLED, contents
from helpers.ranks import in_ranks
from helpers.refusals import run
from helpers.tiny_families import FAMILIES, random_rows, write_rows
from helpers.tiny_mixtures import Source
from snugfit import distributed
from snugfit.calibration.moments import BatchSums
from snugfit.errors import UserError
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.held_out import HeldOut, segments
from snugfit.methods.calibrated import Calibrated
from snugfit.model import forward_pass
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.layer.division import Division
from snugfit.quantization.layer.exchange import owners_of
from snugfit.quantization.quantize import quantize
from snugfit.quantization.ways import PLAIN, Way
from snugfit.records.quantize import RECORD_FILE
from snugfit.records.statistics_file import STATISTICS_FILE
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.storage.tensor_reader import TensorReader
from snugfit.storage.transfer import Transfer

ROWS = random_rows([64] * 12 + [40, 33] * 4)  # of several lengths: batches are padded
TYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64)
OPTIONS: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 130, "min_tokens_per_expert": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples as a file."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.mark.parametrize(
    ("family", "recipe", "effort", "processes", "size"),
    [
        ("qwen3_moe", "nvfp4-moe-four-over-six", None, 4, None),
        ("deepseek_v3", "nvfp4-moe", "fast", 2, 3),  # weighted by E[x^2], experts in pieces
        ("mixtral", "fp8-int4-awq", "good", 2, 3),  # folds in and before experts, gated on held-out samples
        ("llama", "nvfp4-fp8-hybrid", "fast", 2, None),
        ("llama", "fp8-int4-absmax", None, 2, None),  # no samples
    ],
)
def test_the_same_files(
    family: str,
    recipe: str,
    effort: str | None,
    processes: int,
    size: int | None,
    source: Source,
    rows: Path,
    tmp_path: Path,
) -> None:
    """All but E[x x^T] is what one process finds: the same bytes, statistics, records of tensors, and verdicts."""
    options = OPTIONS | {"dataset": [rows], "effort": effort}
    quantize(source(family), recipe, output_dir=tmp_path / "one", **options)

    def work(_: int) -> None:
        quantize(source(family), recipe, output_dir=tmp_path / "many", experts_per_group=size, **options)

    assert in_ranks(processes, work) == [0] * processes
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    records = [json.loads((tmp_path / name / RECORD_FILE).read_text()) for name in ("one", "many")]
    assert records[0]["tensors"] == records[1]["tensors"]
    assert [record["arguments"]["processes"] for record in records] == [1, processes]
    verdicts = [[(one["name"], one["kl"], one["kept"]) for one in record["trials"]] for record in records]
    assert verdicts[0] == verdicts[1]


def test_more_processes_than_batches(source: Source, tmp_path: Path) -> None:
    """A process that has no samples of a mixture takes part in all that is shared: the bytes are those of one."""
    few = write_rows(tmp_path / "few.jsonl", random_rows([64, 64]))
    options = OPTIONS | {"dataset": [few], "tokens_per_batch": 64}
    model, recipe = source("qwen3_moe"), "nvfp4-moe-four-over-six"
    quantize(model, recipe, output_dir=tmp_path / "one", **options)
    assert in_ranks(3, lambda _: quantize(model, recipe, output_dir=tmp_path / "many", **options)) == [0] * 3
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def _quantize(model: Path, options: dict[str, Any], _: int) -> None:
    quantize(model, "nvfp4-fp8-hybrid", **options)


def test_gptq_on_several_processes(source: Source, rows: Path, tmp_path: Path) -> None:
    """Under effort `good` E[x x^T] is added in another order: few codes differ, and the gate decides the same."""
    options = OPTIONS | {"dataset": [rows], "effort": "good", "output_dir": tmp_path / "one"}
    one = quantize(source("llama"), "nvfp4-fp8-hybrid", **options)
    work = partial(_quantize, source("llama"), options | {"output_dir": tmp_path / "many"})
    assert in_ranks(2, work) == [0, 0]
    record = json.loads((tmp_path / "many" / RECORD_FILE).read_text())
    assert [trial["name"] for trial in record["trials"]] == [trial.name for trial in one.trials]
    for mine, theirs in zip(one.trials, record["trials"], strict=True):
        assert theirs["kl"] == pytest.approx(mine.kl, rel=0.05)
        assert theirs["kept"] == mine.kept
    pairs = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "many")]
    assert pairs[0].keys() == pairs[1].keys()
    raw = [torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in pair.values()]) for pair in pairs]
    assert float((raw[0] != raw[1]).float().mean()) < 0.02


@pytest.mark.slow
def test_layers_that_share_keys_and_values(make_tiny: MakeTiny, rows: Path, tmp_path: Path) -> None:
    """What a kept layer passes on is there where a process observes a later one on batches of another process."""
    model = make_tiny("gemma4_text", **FAMILIES["gemma4_text"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\nrules: [{layers: '1', format: keep}, {role: linear, format: nvfp4}]\n")
    options = OPTIONS | {"dataset": [rows], "effort": "good"}
    one = quantize(model, recipe, output_dir=tmp_path / "one", **options)
    assert in_ranks(2, lambda _: quantize(model, recipe, output_dir=tmp_path / "many", **options)) == [0, 0]
    trials = json.loads((tmp_path / "many" / RECORD_FILE).read_text())["trials"]
    assert [trial["kl"] for trial in trials] == [pytest.approx(trial.kl, rel=0.05) for trial in one.trials]


def test_the_same_statistics(source: Source, rows: Path, tmp_path: Path) -> None:
    """Ranges, tokens and E[x^2] that three processes measure are those of one, to the bit."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "tokens_per_batch": 130}
    collect_statistics(source("qwen3_moe"), output_dir=tmp_path / "one", **options)
    model = source("qwen3_moe")
    assert in_ranks(3, lambda _: collect_statistics(model, output_dir=tmp_path / "many", **options)) == [0] * 3
    assert (tmp_path / "one" / STATISTICS_FILE).read_bytes() == (tmp_path / "many" / STATISTICS_FILE).read_bytes()


def test_a_process_that_dies(source: Source, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The others stop with an error that says so, and the run resumes with another number of processes."""
    model, recipe, options = source("qwen3_moe"), "nvfp4-moe-four-over-six", OPTIONS | {"dataset": [rows]}
    quantize(model, recipe, output_dir=tmp_path / "one", **options)

    def dies(rank: int) -> None:
        original, count = forward_pass.call_layer, 0

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if rank == 1 and count == 6:  # in the second layer
                os._exit(KILLED)
            return original(*arguments, **more)

        forward_pass.call_layer = call
        quantize(model, recipe, output_dir=tmp_path / "many", **options)

    assert in_ranks(3, dies) == [2, KILLED, 2]
    assert "rank-lost" in capfd.readouterr().err
    assert (tmp_path / "many.partial").is_dir()
    assert in_ranks(2, lambda _: quantize(model, recipe, output_dir=tmp_path / "many", **options)) == [0, 0]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_files_go_from_way_to_way(
    source: Source, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files of a way that lost, and what was left out of plain codes, come to the bytes of one process, also killed."""
    ways = PLAIN, Way("weighted", Calibrated("vllm-blackwell")), Way("gptq", Calibrated("vllm-blackwell", gptq=True))
    monkeypatch.setattr("snugfit.quantization.prepare.ways_of", lambda *_args, **_options: ways)
    monkeypatch.setattr("snugfit.quantization.prepared_run.SOME_TOKENS", 400)
    kl = {"plain-few": 1.0, "weighted": 0.95, "plain": 0.5, "gptq": 2.0}  # weighted is close, then lost

    def divergences(self: HeldOut, candidate: Path, *_: object, **_options: object) -> list[float]:
        self.open(candidate)
        return [kl[candidate.name]] * len(segments(self._samples, ())[0])

    monkeypatch.setattr(HeldOut, "divergences", divergences)
    options = OPTIONS | {"dataset": [rows], "effort": "good"}
    one = quantize(source("llama"), "nvfp4", output_dir=tmp_path / "one", **options)
    assert [trial.kept for trial in one.trials] == [True, False, False]

    def work(rank: int, number: int) -> None:
        moved, real = 0, Path.rename

        def rename(self: Path, target: Any) -> Path:
            nonlocal moved
            moved += self.suffix == ".safetensors"
            if not rank and moved == number:
                os._exit(KILLED)
            return real(self, target)

        Path.rename = rename  # type: ignore[method-assign,assignment]
        quantize(source("llama"), "nvfp4", output_dir=tmp_path / "many", **options)

    assert in_ranks(2, partial(work, number=2)) == [KILLED, 2]
    assert "rank-lost" in capfd.readouterr().err
    assert in_ranks(2, partial(work, number=0)) == [0, 0]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_error_is_reported_once(source: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What all processes refuse the main one reports; nothing is left behind."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    assert in_ranks(2, lambda _: quantize(source("llama"), "nvfp4", output_dir=tmp_path / "out", **OPTIONS)) == [2, 2]
    errors = capfd.readouterr().err
    assert "rank 0: UserError output-exists" in errors
    assert "rank 1: OtherRankError output-exists" in errors
    assert not (tmp_path / "out.partial").exists()


def test_eval_on_several_processes(source: Source, rows: Path, tmp_path: Path) -> None:
    """`eval` gives the figures of one process, for two models and their divergence."""
    model, recipe, options = source("llama"), "nvfp4-fp8-hybrid-four-over-six", OPTIONS | {"dataset": [rows]}
    quantize(model, recipe, output_dir=tmp_path / "out", **options)
    given: dict[str, Any] = {"reference": model, "dataset": [rows], "contexts": [32], "noise_floor": "none"}
    given |= {"device": "cpu", "tokens_per_batch": 130}
    one = evaluate(tmp_path / "out", **given)

    def work(rank: int) -> None:
        record = evaluate(tmp_path / "out", **given)
        (tmp_path / f"{rank}.json").write_text(record.to_json())

    assert in_ranks(2, work) == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["contexts"] == json.loads(one.to_json())["contexts"]


def share_all_reads() -> None:
    """Have processes on CPUs share what they read of models that they run, as processes on GPUs do."""
    real = TensorReader.__init__

    def begin(self: TensorReader, checkpoint: Checkpoint, device: torch.device, *, shared: bool = False) -> None:
        real(self, checkpoint, device, shared=shared)
        if shared and distributed.world_size() > 1:
            self._transfer = self._stack.enter_context(Transfer(device))
            self._shared, self._room = True, 1 << 40

    TensorReader.__init__ = begin  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("family", "recipe"), [pytest.param("llama", "nvfp4", marks=pytest.mark.slow), ("mixtral", "fp8-int4-awq")]
)
def test_processes_that_share_reads(family: str, recipe: str, source: Source, rows: Path, tmp_path: Path) -> None:
    """Files, KL of every way and figures of `eval` are those of processes that each read all."""
    options = OPTIONS | {"dataset": [rows], "effort": "good"}
    given: dict[str, Any] = {"reference": source(family), "dataset": [rows], "contexts": [32], "noise_floor": "none"}

    def work(rank: int, name: str) -> None:
        if name == "shared":
            share_all_reads()
        record = quantize(source(family), recipe, output_dir=tmp_path / name, **options)
        found = evaluate(tmp_path / name, **given, device="cpu", tokens_per_batch=130)
        if not rank:
            said = [(trial.name, trial.kl, trial.kept) for trial in record.trials]
            (tmp_path / f"{name}.json").write_text(json.dumps([said, json.loads(found.to_json())["contexts"]]))

    for name in ("alone", "shared"):
        assert in_ranks(2, partial(work, name=name)) == [0, 0]
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    one, other = (json.loads((tmp_path / f"{name}.json").read_text().replace(name, "")) for name in ("alone", "shared"))
    assert one == other


def test_work_is_shared_out() -> None:
    """Each piece of work has one process, and none has much more than the others."""
    costs = [5, 9, 1, 1, 7, 3, 3, 8, 2, 2] * 4
    owners = distributed.share(costs, 3)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= max(costs)
    assert distributed.share([1, 2, 3]) == [0, 0, 0]
    assert distributed.block(7) == range(7)


NEMO = {"q": (4096, 5120), "k": (1024, 5120), "v": (1024, 5120), "o": (5120, 4096)}
NEMO_MLP = {"gate": (14336, 5120), "up": (14336, 5120), "down": (5120, 14336)}
FUSED = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]


def shares(shapes: dict[str, tuple[int, int]], groups: list[tuple[str, ...]], kind: str) -> dict[str, int]:
    """Owners of a layer's weights in two processes that GPTQ chooses the codes of."""
    plan: Any = SimpleNamespace(
        units=[(), tuple(shapes)],
        weights=SimpleNamespace(tensors={name: TensorInfo(name, "BF16", shape) for name, shape in shapes.items()}),
        assignments=dict.fromkeys(shapes, SimpleNamespace(follows_effort=True)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)
        return owners_of(plan, 1, Division(tuple(groups)), torch.device(kind), correlates=True)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_dense_layer_is_shared_out(kind: str) -> None:
    """Of a layer of Mistral-Nemo's shape one process has down_proj, the other all else: nearly the same work."""
    owners = shares(NEMO | NEMO_MLP, FUSED, kind)
    assert {name for name, owner in owners.items() if owner == owners["down"]} == {"down"}


def test_experts_are_shared_out_beside_attention() -> None:
    """GPTQ of attention does not outweigh a layer's experts, which are read and written: each process has some."""
    experts = {f"mlp.experts.{n}.{name}": (768, 2048) for n in range(128) for name in ("gate", "up", "down")}
    attention = {"q": (4096, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 4096)}
    owners = shares(attention | experts, [*FUSED[:2], *((name,) for name in experts)], "cuda")
    mine = [owners[name] for name in experts]
    assert 0.3 < sum(mine) / len(mine) < 0.7


def test_a_sum_for_one_process(tmp_path: Path) -> None:
    """The process that asks for a sum gets it, added in the order of the ranks; others keep what they have."""

    def work(rank: int) -> None:
        with distributed.joined("cpu"):
            terms = [torch.tensor([1e8, 1.0 + n]) * (-1) ** n for n in range(3)]
            mine, everywhere = terms[rank].clone(), terms[rank].clone()
            distributed.add_up(mine, 1)
            distributed.add_up(everywhere)
            total = torch.zeros(2) + terms[0] + terms[1] + terms[2]
            assert torch.equal(everywhere, total)
            assert torch.equal(mine, total if rank == 1 else terms[rank])
            assert distributed.side_group() is distributed.side_group()
        (tmp_path / str(rank)).write_text("")

    assert in_ranks(3, work) == [0] * 3
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("effort", "most"), [("fast", 2), ("good", 2)])
def test_processes_wait_for_each_other_a_few_times_a_layer(
    effort: str, most: int, make_tiny: MakeTiny, rows: Path, tmp_path: Path
) -> None:
    """What the main threads say of a layer: what was measured, ranges, and under `good` the folds; no more."""
    models = [make_tiny("llama", num_hidden_layers=layers) for layers in (2, 5)]

    def work(rank: int) -> None:
        calls, real = 0, torch.distributed.all_gather_object

        def counted(*arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += options.get("group") is None
            real(*arguments, **options)

        torch.distributed.all_gather_object = counted
        found = []
        for number, model in enumerate(models):
            before = calls
            out = tmp_path / f"{effort}-{number}"
            record = quantize(
                model, "nvfp4-fp8-hybrid", output_dir=out, **OPTIONS | {"dataset": [rows], "effort": effort}
            )
            found.append((calls - before, len(record.trials) or 1))
        assert found[0][1] == found[1][1]
        a_layer = (found[1][0] - found[0][0]) / 3
        assert a_layer <= most * found[0][1], (rank, found)

    assert in_ranks(2, work) == [0, 0]


def test_many_tensors_are_sent_together() -> None:
    """Small tensors of one owner, of any type and strides, go in one broadcast; one that is large goes by itself."""

    def work(rank: int) -> None:
        calls, real = 0, torch.distributed.broadcast

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*arguments, **options)

        torch.distributed.broadcast = counted
        exact = [torch.arange(n, n + 6, dtype=dtype).view(2, 3) for n, dtype in enumerate(TYPES)]
        exact += [torch.arange(6.0).view(2, 3).T, torch.zeros(0, 4), torch.tensor(7.0), torch.ones(1 << 25)]
        owners = [place % 2 for place in range(len(exact))]
        held = [
            one.clone() if owner == rank else torch.zeros_like(one) for one, owner in zip(exact, owners, strict=True)
        ]
        with distributed.joined("cpu"):
            distributed.send_many(zip(held, owners, strict=True))
        equal = [torch.equal(one, other) for one, other in zip(held, exact, strict=True)]
        assert all(equal), equal
        assert calls == 3

    assert in_ranks(2, work) == [0, 0]


def test_a_world_of_one() -> None:
    """Without torchrun every function gives what this process has."""
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    tensor = torch.arange(3.0)
    distributed.add_up(tensor)
    distributed.send(tensor, 0)
    distributed.send_many([(tensor, 0)])
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    assert distributed.gather(1) == [1]
    assert distributed.by_main(lambda: 1) == 1
    assert distributed.in_order([1, 2]) == [1, 2]
    assert distributed.merged({"a": 1}) == {"a": 1}
    sums = BatchSums()
    for number in range(3):
        sums.add(torch.full((2,), float(number)), number)
    total = sums.total()
    assert total is not None
    assert total.tolist() == [3.0, 3.0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_same_number_of_processes(family: str, source: Source, rows: Path, tmp_path: Path) -> None:
    """Two runs of three processes give the same bytes under effort `good`."""
    options = OPTIONS | {"dataset": [rows], "effort": "good"}
    for name in ("many", "again"):
        work = partial(_quantize, source(family), options | {"output_dir": tmp_path / name})
        assert in_ranks(3, work) == [0, 0, 0]
    assert contents(tmp_path / "many") == contents(tmp_path / "again")


def test_joining_again() -> None:
    """Processes that part and join again find each other each time, though torchrun's store knows of all times."""

    def work(rank: int) -> None:
        for _ in range(20):
            with distributed.joined("cpu"):
                assert distributed.gather(rank) == [0, 1]

    assert in_ranks(2, work) == [0, 0]


@pytest.mark.parametrize("all_of_them", [False, True])
def test_joining_behind_an_error(all_of_them: bool) -> None:
    """Processes leave each other behind an error, so that those that wait hear of it at once; then they may join again.

    No connection is left that would end a process by a signal.
    """

    def refuse() -> None:
        raise UserError("bad.", code="option-invalid")

    @distributed.together
    def refused(rank: int) -> None:
        if all_of_them:
            distributed.in_all(refuse if rank else lambda: None)
        elif rank:
            refuse()
        distributed.barrier()

    def work(rank: int) -> None:
        with pytest.raises(UserError) as caught:
            refused(rank)
        assert caught.value.code == ("option-invalid" if rank or all_of_them else "rank-lost")
        assert not torch.distributed.is_initialized()
        with distributed.joined("cpu"):
            assert distributed.gather(rank) == [0, 1]

    assert in_ranks(2, work) == [0, 0]


def test_the_main_process_may_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What all processes refuse: the others end, with code 2, when the main one has shown it, and not before.

    Where one process ends torchrun ends all others, whatever they have yet to remove or to say.
    """
    shown = tmp_path / "shown"

    def work(rank: int) -> None:
        def echo(text: str, **_: Any) -> None:
            time.sleep(0.2)  # others have the time to end
            shown.write_text(text, encoding="utf-8")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("snugfit.cli.errors.typer.echo", echo)
            result = run("quantize", tmp_path / "none", "-r", "nvfp4", "-o", tmp_path / "out", "--device", "cpu")
        assert result.exit_code == 2, rank
        assert "model-not-found" in shown.read_text(encoding="utf-8")

    assert in_ranks(3, work) == [0, 0, 0], capfd.readouterr().err


@pytest.mark.slow
def test_torchrun_itself(source: Source, rows: Path, tmp_path: Path) -> None:
    """The command line under torchrun: one report, the bytes of one process, and a refusal with exit code."""
    model = str(source("qwen3_moe"))
    quantize(model, "nvfp4-moe-four-over-six", output_dir=tmp_path / "one", **OPTIONS | {"dataset": [rows]})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["snugfit", "quantize", model, "-r", "nvfp4-moe-four-over-six", "-o", str(tmp_path / "many")]
    command += ["--dataset", str(rows), "--device", "cpu", "--tokens-per-batch", "130", "--min-tokens-per-expert", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.count("peak memory") == 1
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    again = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert again.returncode != 0
    assert again.stderr.count("output-exists") == 1
