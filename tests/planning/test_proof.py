"""Plans on held-out text: which of them is better than its control, and what is said where none is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MakeTiny
from helpers.errors import raises
from helpers.tiny_mixtures import make_mixture
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.data.dataset import make_dataset
from snugfit.evaluation.chunks import Chunk, ChunkGroup
from snugfit.evaluation.held_out import HeldOut
from snugfit.model.layout import read_layout
from snugfit.planning import proof, proving
from snugfit.planning.calibration import calibrate
from snugfit.planning.controls import Control
from snugfit.planning.groups import find_groups
from snugfit.planning.menu import Bytes, Option
from snugfit.planning.prepare_plan import ProofSettings, contexts_of
from snugfit.planning.proof import judge_plans, prove, read_held_out
from snugfit.planning.proving import to_measure
from snugfit.planning.search import Mix
from snugfit.planning.shared_pass import Assigned, SharedPass
from snugfit.quantization.decide import decide
from snugfit.quantization.quantize import quantize
from snugfit.quantization.resume import FinishedUnits
from snugfit.recipes.recipe import load_recipe
from snugfit.records.proof import Proof
from snugfit.records.scores import Predicted

SET = """
calibration_set:
  max_seq_length: 32
  datasets:
    - {dataset: rows.jsonl, num_samples: 5, category: Rows}
"""


def test_a_better_plan_wins_and_a_worse_one_is_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """FP8 everywhere beats 4 bits everywhere on every text; a plan that adds damage to the control is refused."""
    model = make_tiny("llama", num_hidden_layers=2)
    add_tokenizer(model)
    layout = read_layout(model)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 64, (12, 40), generator=generator).tolist()
    statistics = calibrate(layout, make_dataset(rows, "rows"), tmp_path / "work", device="cpu")
    held_out = torch.randint(3, 64, (12, 40), generator=generator).tolist()
    files = []
    for number in range(2):
        files.append(tmp_path / f"text-{number}.jsonl")
        lines = [json.dumps({"input_ids": row}) for row in held_out[number::2]]
        files[-1].write_text("\n".join(lines), encoding="utf-8")
    names = [group.name for group in find_groups(layout) if group.layer is not None]
    four = dict.fromkeys(names[1:], "int4")
    plans = [
        Assigned(name="control", choice=four),
        Assigned(name="finer", choice=dict.fromkeys(names, "fp8-dynamic")),
        Assigned(name="coarser", choice=dict.fromkeys(names, "int4")),
    ]
    options = {"control": "control", "statistics": statistics, "work_dir": tmp_path / "work", "device": "cpu"}
    found = prove(model, plans, dataset=files, **options)  # type: ignore[arg-type]
    assert found.winner == "finer"
    assert [plan.beats_control for plan in found.plans] == [None, True, False]
    assert {one.text for one in found.plan("finer").measured} == {"", "text-0.jsonl", "text-1.jsonl"}
    measured = found.plan("finer").overall
    assert measured.gain == pytest.approx(found.plan("control").overall.kl - measured.kl)
    assert not list((tmp_path / "work").glob("plan-states*"))
    worse = prove(model, [plans[0], plans[2]], dataset=files, **options)  # type: ignore[arg-type]
    assert worse.winner == "control"
    assert worse.plan("control").overall.kl == found.plan("control").overall.kl
    with raises("option-invalid", where="control"):
        prove(model, plans, dataset=files, **{**options, "control": "none"})  # type: ignore[arg-type]
    with raises("option-invalid", where="plans"):
        prove(model, [plans[0], plans[0]], dataset=files, **options)  # type: ignore[arg-type]


def test_held_out_text_suffices_for_long_contexts(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a number each text gives two chunks of the longest context at least; one that is asked for counts."""
    model = make_tiny("llama")
    add_tokenizer(model)
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file in files:
        file.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    monkeypatch.setattr(proof, "MAX_TOKENS", 64)

    def chunks(max_tokens: int | None) -> list[int]:
        groups, _ = read_held_out(read_layout(model), files, (16, 64), max_tokens)
        return [len(group.chunks) for group in groups]

    assert chunks(None) == [16, 4]
    assert chunks(128) == [8, 2]
    with raises("option-invalid", where="max_tokens"):
        chunks(64)


KEPT = "{role: linear, format: keep}"
FP8, FOUR = "{layers: '1', role: linear, format: fp8-dynamic}", "{layers: '0', role: ROLE, format: FORMAT}"


@pytest.mark.parametrize(
    ("family", "rules", "rounded"),
    [
        ("llama", (FP8, KEPT), {"absmax"}),
        ("llama", (FP8, FOUR.replace("ROLE", "down").replace("FORMAT", "nvfp4"), KEPT), {"weighted+folds"}),
        ("llama", (FP8, FOUR.replace("ROLE", "mlp").replace("FORMAT", "int4"), KEPT), {"weighted+folds"}),
        ("qwen3_moe", ("{role: attention, format: fp8-dynamic}", "{role: experts, format: int4}"), {"absmax"}),
    ],
)
def test_the_proof_is_of_the_file_that_is_written(
    family: str, rules: tuple[str, ...], rounded: set[str], make_tiny: MakeTiny, tmp_path: Path
) -> None:
    """KL of a plan with FP8, beside 4-bit weights or without, is that of its file by `fast` under its statistics."""
    settings: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 128, "dtype": torch.float32}
    if family == "llama":
        model = make_tiny(family, intermediate_size=128, **settings)
    else:
        model = make_mixture(family, tmp_path / "model", **settings)
    add_tokenizer(model)
    layout = read_layout(model)
    generator = torch.Generator().manual_seed(3)
    rows, held_out = torch.randint(3, 64, (2, 12, 40), generator=generator).tolist()
    statistics = calibrate(layout, make_dataset(rows, "rows"), tmp_path / "work", device="cpu")
    recipe, file = tmp_path / "mixed.yaml", tmp_path / "held-out.jsonl"
    lines = "".join(f"  - {rule}\n" for rule in rules)
    recipe.write_text(f"name: mixed\nrules:\n{lines}", encoding="utf-8")
    file.write_text("\n".join(json.dumps({"input_ids": row}) for row in held_out), encoding="utf-8")
    decided = decide(layout, load_recipe(recipe)).assignments
    formats = {group.name: decided[group.weights[0]].format for group in find_groups(layout) if group.layer is not None}
    found = prove(
        model,
        [Assigned(name="plan", choice={name: fmt.name for name, fmt in formats.items() if fmt is not None})],
        control="plan",
        statistics=statistics,
        work_dir=tmp_path / "work",
        dataset=[file],
        rounding="weighted",
        device="cpu",
    )
    known = tmp_path / "work" / "statistics.json"
    record = quantize(model, recipe, output_dir=tmp_path / "out", statistics=known, device="cpu")
    measured = HeldOut(model, held_out, torch.device("cpu"), profile=found.target, tokens_per_batch=128)
    written = float(np.mean(measured.divergences(tmp_path / "out")))
    assert found.plan("plan").overall.kl == pytest.approx(written, rel=1e-3)
    assert {one.scale_rule for one in record.tensors if one.format == "fp8-dynamic"} == rounded


def test_the_samples_of_a_set_have_their_own_lengths(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A set is held out by itself; with limits beside it, which it says itself, it is refused."""
    model = make_tiny("llama")
    add_tokenizer(model)
    layout = read_layout(model)
    rows = torch.randint(3, 64, (6, 20), generator=torch.Generator().manual_seed(3)).tolist()
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows), encoding="utf-8")
    (tmp_path / "set.yaml").write_text(SET, encoding="utf-8")
    held_out = (tmp_path / "set.yaml",)
    contexts = contexts_of(ProofSettings(held_out=held_out), (16, 64))
    groups, records = read_held_out(layout, held_out, contexts, None)
    assert [len(chunk.ids) for group in groups for chunk in group.chunks] == [20] * 5
    assert records[0].kind == "set"
    assert contexts_of(ProofSettings(held_out=(tmp_path / "rows.jsonl",)), (16, 64, 256)) == (64, 256)
    with raises("option-conflict", where="contexts"):
        read_held_out(layout, held_out, contexts_of(ProofSettings(held_out=held_out, contexts=(8,)), ()), None)
    with raises("option-conflict", where="max_tokens"):
        read_held_out(layout, held_out, contexts, 64)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_killed_proof_ends_in_the_same_figures(
    layers: int, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind any layer, the same call goes on there, to the same figures; other plans start anew."""
    model = make_tiny("llama", num_hidden_layers=2)
    add_tokenizer(model)
    layout = read_layout(model)
    rows = torch.randint(3, 64, (8, 40), generator=torch.Generator().manual_seed(3)).tolist()
    statistics = calibrate(layout, make_dataset(rows, "rows"), tmp_path / "statistics", device="cpu")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows), encoding="utf-8")
    names = [group.name for group in find_groups(layout) if group.layer is not None]
    plans = [Assigned(name=fmt, choice=dict.fromkeys(names, fmt)) for fmt in ("int4", "fp8-dynamic")]

    def measure(folder: Path, plans: list[Assigned]) -> Proof:
        options = {"control": "int4", "statistics": statistics, "dataset": [text], "device": "cpu"}
        return prove(model, plans, work_dir=folder, **options)  # type: ignore[arg-type]

    whole = measure(tmp_path / "whole", plans)
    commit, passed = FinishedUnits.commit, SharedPass._pass_layer
    ran: list[int] = []

    def stopping(self: FinishedUnits, entry: Mapping[str, Any]) -> None:
        commit(self, entry)
        if self.done == layers:
            raise KeyboardInterrupt

    def counted(self: SharedPass, index: int, *arguments: Any) -> None:
        ran.append(index)
        passed(self, index, *arguments)

    monkeypatch.setattr(FinishedUnits, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "work", plans)
    monkeypatch.setattr(FinishedUnits, "commit", commit)
    monkeypatch.setattr(SharedPass, "_pass_layer", counted)
    assert measure(tmp_path / "work", plans) == whole
    assert ran == [0, 1][layers:]
    assert measure(tmp_path / "work", plans) == whole
    assert ran == [0, 1][layers:]  # nothing is measured twice
    one = measure(tmp_path / "work", plans[:1])
    assert one.plans[0].overall.kl == whole.plans[0].overall.kl
    assert ran == [*[0, 1][layers:], 0, 1]


def judged(kl: Mapping[str, list[float]], contexts: list[int]) -> Proof:
    """A proof of plans with these KL, one number a chunk of 129 tokens; chunk n is of context contexts[n]."""
    groups = []
    number = 0
    for place, context in enumerate(dict.fromkeys(contexts)):
        chunks = []
        for _ in range(contexts.count(context)):
            positions = np.arange(1, 129)
            options = {"group": place, "first": 0, "source": "a", "conversation": False}
            chunks.append(Chunk(number=number, ids=(3,) * 129, target_positions=positions, **options))  # type: ignore[arg-type]
            number += 1
        groups.append(ChunkGroup(context, "", tuple(chunks)))
    found = {name: [np.full(128, value, np.float32) for value in values] for name, values in kl.items()}
    plans = [Assigned(name=name) for name in kl]
    return judge_plans(plans, "control", groups, found, (), rounding="plain", target="none")


def test_noise_is_no_win() -> None:
    """A plan whose gain is within two standard errors of the paired difference does not win, a steady one does."""
    control = [0.5, 0.6, 0.4, 0.7, 0.5, 0.6]
    noisy = [0.3, 0.8, 0.2, 0.9, 0.5, 0.4]
    steady = [value - 0.02 for value in control]
    found = judged({"control": control, "noisy": noisy, "steady": steady}, [128] * 6)
    assert [plan.beats_control for plan in found.plans] == [None, False, True]
    assert found.winner == "steady"
    assert found.plan("steady").overall.gain == pytest.approx(0.02)


def test_a_plan_that_is_a_control_has_to_beat_the_others() -> None:
    """Where the best control stores what the plan does, the next one is measured, and the verdict says so."""

    def mix(fmt: str, kl: float) -> Mix:
        options = {"group": Option(format=fmt, label=fmt, bytes=Bytes())}
        return Mix(options=options, kv_cache="keep", bytes=Bytes(), context=128, predicted=Predicted(kl, 0.0))

    kinds = {"uniform": mix("fp8-dynamic", 0.1), "matched": mix("int4", 0.2), "worse": mix("nvfp4", 0.3)}
    controls = [
        Control(name=name, kind="byte-matched", mix=one, recipe=None, allowed=True, fits=True)
        for name, one in kinds.items()
    ]
    candidates = [("plan", mix("fp8-dynamic", 0.1))]
    assert [name for name, _ in to_measure(candidates, controls)] == ["plan", "matched"]
    proof = judged({"control": [0.5, 0.6, 0.4], "plan": [0.1, 0.2, 0.0]}, [128] * 3)
    verdict = proving._verdict(proof, "plan", ["control"], "uniform")
    assert verdict.accepted
    assert verdict.statement.startswith("plan is uniform, and beats every other control: ")


def test_a_plan_must_not_lose_at_any_context() -> None:
    """A large gain at one context does not pay for a loss at another."""
    contexts = [128] * 4 + [129] * 4
    control = [0.5, 0.6, 0.4, 0.7] * 2
    plan = [0.1, 0.2, 0.1, 0.2, 0.52, 0.62, 0.42, 0.72]
    found = judged({"control": control, "plan": plan}, contexts)
    assert found.plan("plan").overall.gain == pytest.approx(0.19, abs=0.01)
    assert found.winner == "control"


def test_numbers_that_are_not_finite_never_win() -> None:
    """A plan with NaN is refused, and a control with NaN is an error."""
    found = judged({"control": [0.5, 0.6], "plan": [float("nan"), 0.1]}, [128, 128])
    assert found.winner == "control"
    with raises("activations-not-finite", where="control"):
        judged({"control": [float("nan"), 0.1], "plan": [0.5, 0.6]}, [128, 128])
