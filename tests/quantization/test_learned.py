"""Learned block scales, the last way of effort `best`: what changes, what is kept, what happens if it goes wrong."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import MakeTiny
from helpers.errors import raises
from helpers.killed import KILLED, contents, in_child
from helpers.memory import leave_free
from helpers.ranks import in_ranks
from helpers.tiny_families import FAMILIES, all_tensors, random_rows, same, write_rows
from helpers.tiny_mixtures import MIXTURES
from snugfit.progress import Progress
from snugfit.quantization import learned
from snugfit.quantization.quantize import plan_quantization, quantize
from snugfit.quantization.ways import LEARNED, PLAIN, learned_weights
from snugfit.records.quantize import RECORD_FILE, QuantizeRecord
from snugfit.storage import files

HYBRID = "nvfp4-fp8-hybrid"
PASSES, STEPS = 6, 24  # the rows make four batches


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Learning starts from plain codes, in few steps, and is kept if it gains anything."""
    patch.setattr("snugfit.quantization.prepare.ways_of", lambda *_, **__: (PLAIN,))
    patch.setattr(learned, "PASSES", PASSES)
    patch.setattr(learned, "LEARNED_TOKENS", 512)
    patch.setattr("snugfit.records.trials.MIN_GAIN", 0.0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests are short."""
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """Two layers in several weight files."""
    return make_tiny("llama", num_hidden_layers=2, hidden_size=128, max_shard_size="100KB")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of several lengths."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([48, 48, 33, 48, 20, 48, 48, 40] * 4))


class Messages(Progress):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        """Keep one line."""
        self.lines.append(text)


def run(model: Path, out: Path, rows: Path, recipe: str = HYBRID, **options: Any) -> QuantizeRecord:
    return quantize(
        model, recipe, output_dir=out, dataset=[rows], device="cpu", max_shard_size=60_000, effort="best", **options
    )


@pytest.fixture(scope="module")
def uninterrupted(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without an interruption writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        run(model, out, rows)
    return out


def changed(a: Path, b: Path) -> set[str]:
    """Names of tensors that differ between two directories, which hold the same ones."""
    first, second = all_tensors(a), all_tensors(b)
    assert first.keys() == second.keys()
    return {name for name in first if not same(first[name].view(torch.uint8), second[name].view(torch.uint8))}


@pytest.mark.parametrize("recipe", [HYBRID, pytest.param("nvfp4a16", marks=pytest.mark.slow), "int4-w4a16"])
def test_block_scales_alone_change(recipe: str, model: Path, rows: Path, tmp_path: Path) -> None:
    """Every other byte is that of the way from which learning started; the record names the weights that learned."""
    record = run(model, tmp_path / "learned", rows, recipe)
    assert [(trial.name, trial.kept) for trial in record.trials] == [("plain", True), ("learned", True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("snugfit.quantization.prepare.why_not_learned", lambda *_: "not now")
        plain = run(model, tmp_path / "plain", rows, recipe)
    found = changed(tmp_path / "plain", tmp_path / "learned")
    assert found
    formats = {one.name: one.format for one in plain.tensors}
    allowed = {name for name, fmt in formats.items() if "4" in fmt and ".layers." in name}
    assert found <= {name.replace(".weight", ".weight_scale") for name in allowed}
    assert len(found) > len(allowed) / 2
    rules = {one.name: one.scale_rule for one in record.tensors}
    before = {one.name: one.scale_rule for one in plain.tensors}
    assert rules == {name: f"{rule}+learned" if name in allowed else rule for name, rule in before.items()}
    assert record.bytes == plain.bytes
    assert record.files.keys() == plain.files.keys()


def losses(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int], float] = lambda _: 1.0) -> list[float]:
    """The KL of each step; each step's gradient is multiplied by `spoil(step)`."""
    found: list[float] = []
    real = learned._Model.gradients

    def gradients(self: Any, batch: Any) -> float | None:
        loss = real(self, batch)
        found.append(float("nan") if loss is None else loss)
        self.learned.gradient.mul_(spoil(len(found) - 1))
        return loss if bool(self.learned.gradient.isfinite().all()) else None

    monkeypatch.setattr(learned._Model, "gradients", gradients)
    return found


def test_the_loss_falls(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL of the calibration samples falls from the first pass over them to the last; that of others does too."""
    found = losses(monkeypatch)
    record = run(model, tmp_path / "out", rows)
    batches = STEPS // PASSES
    assert len(found) == STEPS
    assert sum(found[-batches:]) < 0.95 * sum(found[:batches])
    plain, last = record.trials
    assert last.gain is not None
    assert last.gain > 0
    assert last.kl < plain.kl


def test_the_same_run_gives_the_same_bytes(model: Path, rows: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """A second run learns the same scales."""
    run(model, tmp_path / "out", rows)
    assert contents(tmp_path / "out") == contents(uninterrupted)


@pytest.mark.parametrize("step", [0, pytest.param(3, marks=pytest.mark.slow), 10])
def test_a_kill_while_it_learns(
    step: int, model: Path, rows: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in a step resumes at what was stored last, and ends in the same bytes."""
    out = tmp_path / "out"
    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            losses(patch, lambda now: 1.0 if now < step else os._exit(KILLED))
            run(model, out, rows)

    assert in_child(killed) == KILLED
    messages, found = Messages(), losses(monkeypatch)
    run(model, out, rows, progress=messages)
    assert any("resuming after" in line for line in messages.lines) == (step > 0)
    assert len(found) == STEPS - step
    assert contents(out) == contents(uninterrupted)


def test_on_several_processes(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each batch every process has a part: a run that is killed ends in the bytes of one that is not.

    One process has the same losses but for last bits, which Adam's steps make more of.
    """
    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)

    def work(out: Path, step: int | None, rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            kills = step is not None and rank == 1
            found = losses(patch, lambda now: os._exit(KILLED) if kills and now == step else 1.0)
            run(model, out, rows)
        if not rank:
            (tmp_path / f"{out.name}.json").write_text(json.dumps(found))

    assert in_ranks(2, partial(work, tmp_path / "whole", None)) == [0, 0]
    assert in_ranks(2, partial(work, tmp_path / "killed", 10))[1] == KILLED
    assert in_ranks(2, partial(work, tmp_path / "killed", None)) == [0, 0]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    trial = json.loads((tmp_path / "whole" / RECORD_FILE).read_text())["trials"][-1]
    assert (trial["name"], trial["kept"]) == ("learned", True)
    many, one = json.loads((tmp_path / "whole.json").read_text()), losses(monkeypatch)
    run(model, tmp_path / "one", rows)
    assert many[:2] == pytest.approx(one[:2], rel=1e-4)
    assert many == pytest.approx(one, rel=0.1)


@pytest.mark.slow
def test_more_processes_than_samples_of_a_batch(model: Path, tmp_path: Path) -> None:
    """A process that has nothing of a batch takes part in the step."""
    few = write_rows(tmp_path / "rows.jsonl", random_rows([300] * 16))

    def work(_: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learned, "PASSES", 1)
            run(model, tmp_path / "out", few)

    assert in_ranks(2, work) == [0, 0]
    trials = json.loads((tmp_path / "out" / RECORD_FILE).read_text())["trials"]
    assert trials[-1]["name"] == "learned"


@pytest.mark.parametrize(
    "place", [pytest.param("write_changes", marks=pytest.mark.slow), "write_fully", "file_digests"]
)
def test_a_kill_while_it_writes(
    place: str, model: Path, rows: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed while files are copied or scales are written ends in the same bytes."""
    out = tmp_path / "out"
    owner: Any = files if place == "write_changes" else learned  # the copies

    def killed() -> None:
        calls = 0
        real = getattr(owner, place)

        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == (2 if place == "write_fully" else 1):
                os._exit(KILLED)
            return real(*arguments)

        monkeypatch.setattr(owner, place, call)
        run(model, out, rows)

    assert in_child(killed) == KILLED
    run(model, out, rows)
    assert contents(out) == contents(uninterrupted)


def test_a_damaged_state_starts_again(
    model: Path, rows: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored state whose bytes changed is not used: learning starts again and ends in the same bytes."""
    out = tmp_path / "out"
    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)

    def killed() -> None:
        losses(monkeypatch, lambda now: 1.0 if now < 4 else os._exit(KILLED))
        run(model, out, rows)

    assert in_child(killed) == KILLED
    (state,) = tmp_path.rglob(learned.STATE_NAME)
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(content)
    run(model, out, rows)
    assert contents(out) == contents(uninterrupted)


def test_a_gradient_that_is_not_finite(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN ends the learning with what was learned before it, says so, and the gate judges that."""
    found = losses(monkeypatch, lambda step: float("nan") if step == 5 else 1.0)
    messages = Messages()
    record = run(model, tmp_path / "out", rows, progress=messages)
    assert len(found) == 6
    assert any("after 5 steps" in line and "not finite" in line for line in messages.lines)
    assert all(tensor.float().isfinite().all() for tensor in all_tensors(tmp_path / "out").values())
    assert [trial.name for trial in record.trials] == ["plain", "learned"]
    assert record.trials[-1].kl == record.trials[-1].kl


def test_nan_at_once_is_the_way_before(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the first gradient is not finite, nothing is gained, and the files of the way before are the result."""
    losses(monkeypatch, lambda _: float("inf"))
    record = run(model, tmp_path / "out", rows)
    assert [(trial.kept, trial.gain) for trial in record.trials] == [(True, None), (False, 0.0)]
    assert not any("learned" in one.scale_rule for one in record.tensors)


def test_what_is_worse_is_refused(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that learned in the wrong direction are measured and not kept."""
    losses(monkeypatch, lambda _: -1.0)
    record = run(model, tmp_path / "out", rows)
    last = record.trials[-1]
    assert last.gain is not None
    assert last.gain < 0
    assert not last.kept
    monkeypatch.setattr("snugfit.quantization.prepare.why_not_learned", lambda *_: "not now")
    run(model, tmp_path / "plain", rows)
    assert not changed(tmp_path / "plain", tmp_path / "out")


def test_it_starts_from_the_way_kept_before(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes are those of the champion, whichever way that is."""
    started: list[Path] = []
    real = learned.learn

    def learn(run: Any, champion: Any) -> Any:
        started.append(champion.directory)
        return real(run, champion)

    monkeypatch.undo()
    monkeypatch.setattr("snugfit.quantization.trials.learn", learn)
    monkeypatch.setattr(learned, "PASSES", 2)
    record = run(model, tmp_path / "out", rows)
    kept = [trial.name for trial in record.trials if trial.kept and trial.name != LEARNED.name][-1]
    assert [folder.name for folder in started] == [kept]


def test_too_little_memory(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose layers do not fit together is refused before anything is written; the remedy is `good`."""
    leave_free(monkeypatch, 1 << 40)
    prepared = plan_quantization(model, HYBRID, dataset=[rows], device="cpu", effort="best")
    assert prepared.learning is not None
    assert prepared.estimate.ram >= prepared.learning.ram
    leave_free(monkeypatch, prepared.learning.ram // 2)
    with raises("memory-insufficient") as caught:
        run(model, tmp_path / "out", rows)
    assert 'effort="good"' in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "config", "recipe"),
    [
        ("llama", {}, "mxfp4"),
        ("qwen3_moe", MIXTURES["qwen3_moe"], "nvfp4"),
        ("gemma4_text", FAMILIES["gemma4_text"], "nvfp4"),
    ],
)
def test_where_scales_do_not_learn(
    kind: str, config: dict[str, Any], recipe: str, rows: Path, make_tiny: MakeTiny
) -> None:
    """Powers of two, routed experts and families that carry state get the other ways, and a note."""
    path = make_tiny(kind, **config)
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "allow_unverified": True}
    best = plan_quantization(path, recipe, effort="best", **options)
    good = plan_quantization(path, recipe, effort="good", **options)
    assert LEARNED not in best.ways
    assert best.learning is None
    assert any("scales do not learn" in note for note in best.notes)
    assert LEARNED not in good.ways
    assert not any("learn" in note for note in good.notes)


def test_too_few_tokens_for_so_many_scales(model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales do not learn where there are too many for the calibration tokens; a note says how many tokens it takes."""
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "effort": "best"}
    assert LEARNED in plan_quantization(model, "nvfp4", **options).ways
    monkeypatch.setattr("snugfit.quantization.ways.MOST_LEARNED_PER_TOKEN", 3)
    planned = plan_quantization(model, "nvfp4", **options)
    assert LEARNED not in planned.ways
    (note,) = (note for note in planned.notes if "scales do not learn" in note)
    weights = planned.plan.weights.tensors
    scales = sum(math.prod(weights[name].shape) // 16 for name in learned_weights(planned.plan))
    assert f"{scales:,}" in note
    assert f"{-(-scales // 3):,} or more" in note


def test_fp32_and_float16(make_tiny: MakeTiny, rows: Path, tmp_path: Path) -> None:
    """Gradients are those of any dtype that models compute in."""
    for dtype in (torch.float32, torch.float16):
        path = make_tiny("llama", num_hidden_layers=1, dtype=dtype)
        out = tmp_path / str(dtype)
        record = run(path, out, rows, "nvfp4", input_headroom="amax")
        assert record.trials[-1].gain is not None
        assert record.trials[-1].gain > 0
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_kl_of_logits() -> None:
    """The loss is the sum over tokens of sum p (log p - log q)."""
    exact, other = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    p, q = exact.softmax(-1), other.softmax(-1)
    by_hand: Tensor = (p * (p / q).log()).sum()
    torch.testing.assert_close(learned.kl_sum(exact, other), by_hand)
