"""Scores of groups: against finite differences and measured KL; how they resume, merge, and are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import MakeTiny
from helpers.errors import raises
from helpers.tiny_mixtures import make_mixture
from snugfit.data.dataset import Dataset, make_dataset
from snugfit.model.layout import read_layout
from snugfit.planning.calibration import calibrate
from snugfit.planning.damage import merge_scores
from snugfit.planning.gradients import GradientPass, draw
from snugfit.planning.samples import Samples, cut_rows, edges_of
from snugfit.planning.scoring_cost import estimate_scoring
from snugfit.planning.sensitivity import ScoreSettings, score_model, score_samples
from snugfit.planning.shared_pass import Assigned, SharedPass
from snugfit.planning.variants import LayerVariants, open_subject
from snugfit.quantization.resume import FinishedUnits
from snugfit.records.base import as_json
from snugfit.records.scores import Scores, check_model, load_scores, save_scores
from snugfit.storage.checkpoint import fingerprint, header_digest

CPU = torch.device("cpu")
FORMATS = ("nvfp4", "fp8-dynamic")


def rows(count: int = 16, length: int = 64, seed: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return make_dataset(torch.randint(3, 64, (count, length), generator=generator).tolist(), f"rows-{seed}")


def samples(count: int = 16, seed: int = 3) -> Samples:
    return cut_rows(rows(count, seed=seed), 64, 64 * count)


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A tiny llama that computes in fp32, so that differences show."""
    return make_tiny("llama", num_hidden_layers=2, dtype=torch.float32)


def score(model: Path, work: Path, part: Samples | None = None, formats: tuple[str, ...] = FORMATS) -> Scores:
    settings = ScoreSettings(formats=formats)
    return score_samples(read_layout(model), part or samples(), settings, work, device="cpu", tokens_per_batch=256)


@pytest.fixture(scope="module")
def scores(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Its scores."""
    return score(model, tmp_path_factory.mktemp("scores"))


def measure(model: Path, plans: list[Assigned], folder: Path) -> dict[str, float]:
    layout = read_layout(model)
    statistics = calibrate(layout, samples().dataset, folder, device="cpu", tokens_per_batch=256)
    subject = open_subject(layout, statistics, rounding="plain", target="vllm-blackwell")
    token_rows = [row.ids for row in samples().rows]
    found = SharedPass(subject, token_rows, plans, CPU, tokens_per_batch=256, folder=folder).divergences()
    return {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}


def test_costs_are_the_kl_of_each_group_alone(model: Path, scores: Scores, tmp_path: Path) -> None:
    """Before any factor, costs of groups in the last layer are their measured KL within sampling error."""
    names = [group.name for group in scores.groups if group.layer == 1]
    plans = [Assigned(name=f"{name}/{fmt}", choice={name: fmt}) for name in names for fmt in FORMATS]
    measured = measure(model, plans, tmp_path)
    ratios = [scores.costs[name][fmt].kl[0] / measured[f"{name}/{fmt}"] for name in names for fmt in FORMATS]
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.12)
    assert max(ratios) / min(ratios) < 1.6


def test_best_plan_is_the_best_of_all_measured(model: Path, scores: Scores, tmp_path: Path) -> None:
    """Of all plans with five of eight groups in 4 bits, the one predicted best is measured within 5 % of the best."""
    names = [group.name for group in scores.groups if group.layer is not None]
    assert len(names) == 8
    plans = []
    for four in itertools.combinations(names, 5):
        choice = {name: "nvfp4" if name in four else "fp8-dynamic" for name in names}
        plans.append(Assigned(name="|".join(four), choice=choice))
    measured = measure(model, plans, tmp_path)
    predicted = {plan.name: scores.predict(plan.choice, 64).kl for plan in plans}
    best = min(plans, key=lambda plan: predicted[plan.name]).name
    assert measured[best] <= 1.05 * min(measured.values())
    errors = [abs(predicted[name] / measured[name] - 1) for name in measured]
    assert np.mean(errors) < 0.1
    assert max(errors) < 0.25


def test_prediction_is_between_keeping_all_and_the_ceiling(scores: Scores) -> None:
    """What is kept costs nothing, more groups cost more, and no plan is predicted above the ceiling."""
    names = [group.name for group in scores.groups if group.layer is not None]
    assert scores.predict({}, 64).kl == 0
    steps = [scores.predict(dict.fromkeys(names[:count], "nvfp4"), 64).kl for count in range(1, len(names) + 1)]
    assert steps == sorted(steps)
    assert steps[-1] < max(damage.ceiling for damage in scores.damage)
    assert scores.cost(names[0], "nvfp4", 64) > scores.cost(names[0], "fp8-dynamic", 64) > 0


def test_a_killed_run_ends_in_the_same_bytes(
    model: Path, scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped between any two layers resumes, and gives the file that an undisturbed one gives."""
    commit = FinishedUnits.commit
    for stop in (("gradients", 1), ("gradients", 3), ("gradients", 4), ("plans", 1), ("plans", 2)):
        work = tmp_path / f"{stop[0]}-{stop[1]}"

        def stopping(self: FinishedUnits, entry: dict[str, object], last: tuple[str, int] = stop) -> None:
            commit(self, entry)
            if (self._folder.name, self.done) == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(FinishedUnits, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            score(model, work)
        monkeypatch.undo()
        assert score(model, work).to_json() == scores.to_json()


def test_another_setting_needs_another_folder(model: Path, tmp_path: Path) -> None:
    """A work folder of other formats is refused rather than mixed up."""
    score(model, tmp_path, formats=("fp8-dynamic",))
    with raises("run-differs"):
        score(model, tmp_path)


def test_scores_survive_their_file(model: Path, make_tiny: MakeTiny, scores: Scores, tmp_path: Path) -> None:
    """A file of scores reads back the same, is refused for another model, and damaged files are refused."""
    file = tmp_path / "scores.json"
    save_scores(scores, file)
    again = load_scores(file)
    assert again.to_json() == scores.to_json()
    layout = read_layout(model)
    check_model(again, header_digest(layout.checkpoint), fingerprint(layout.checkpoint), where=str(file))
    other = read_layout(make_tiny("llama", num_hidden_layers=2, dtype=torch.float32, seed=1)).checkpoint
    with raises("scores-mismatch"):
        check_model(again, header_digest(other), fingerprint(other), where=str(file))
    with raises("output-exists"):
        save_scores(scores, file)
    text = file.read_text(encoding="utf-8")
    document = json.loads(text.replace('"edges"', '"edge"'))
    for broken in (text[:-9], as_json(document), text.replace("snugfit.scores/1", "snugfit.scores/9")):
        file.write_text(broken, encoding="utf-8")
        with raises("scores-invalid"):
            load_scores(file)
    document = json.loads(text)
    document["damage"][0]["ceiling"] = -1
    for changed, code in ((as_json(document), "scores-invalid"), (json.dumps(document), "record-changed")):
        file.write_text(changed, encoding="utf-8")
        with raises(code):
            load_scores(file)
    with raises("scores-mismatch", where="lm_head.x"):
        scores.predict({"lm_head.x": "nvfp4"}, 64)
    with raises("scores-mismatch"):
        scores.predict({scores.groups[0].name: "int4"}, 64)


def test_files_of_other_formats_and_other_samples_merge(model: Path, scores: Scores, tmp_path: Path) -> None:
    """Scores of two formats apart merge to those of both; scores of other samples average; a repeat is refused."""
    parts = [score(model, tmp_path / fmt, formats=(fmt,)) for fmt in FORMATS]
    merged = merge_scores([(part.formats[0], part) for part in parts])
    name = scores.groups[0].name
    assert merged.formats == FORMATS
    assert merged.costs[name] == scores.costs[name]
    assert merged.damage[0].factors.keys() == scores.damage[0].factors.keys()
    other = score(model, tmp_path / "other", samples(seed=4))
    both = merge_scores([("a", scores), ("b", other)])
    one, two = (part.costs[name]["nvfp4"].kl[0] for part in (scores, other))
    assert both.costs[name]["nvfp4"].kl[0] == pytest.approx((one + two) / 2)
    assert both.tokens == tuple(2 * tokens for tokens in scores.tokens)
    with raises("scores-mismatch", where="again"):
        merge_scores([("a", scores), ("again", scores)])
    with raises("scores-mismatch"):
        merge_scores([("a", scores), ("b", replace(other, fingerprint="0"))])


def test_gradients_are_finite_differences(model: Path, tmp_path: Path) -> None:
    """Products g . dY of a group are the change of the loss that a part of dY makes in transformers' own model."""
    from transformers import AutoModelForCausalLM

    layout = read_layout(model)
    part = samples(4)
    statistics = calibrate(layout, part.dataset, tmp_path, device="cpu", tokens_per_batch=256)
    subject = open_subject(layout, statistics, rounding="plain", target="none")
    (tmp_path / "pass").mkdir()
    scored = GradientPass(subject, part.rows, ["int4"], CPU, tokens_per_batch=64, folder=tmp_path / "pass", seed=0)
    sums = scored.run(FinishedUnits(tmp_path / "pass", {}))
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([row.ids for row in part.rows])

    def logits() -> torch.Tensor:
        found: torch.Tensor = exact(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return found

    with torch.no_grad():
        labels = torch.stack([draw(one, 0, row, 0) for row, one in enumerate(logits())])
        before = -logits().gather(-1, labels).sum()
        for name in ("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_up"):
            variant = LayerVariants(subject, int(name.split(".")[2]), CPU).variant(name, "int4")
            old = {}
            for key, rounded in variant.parameters.items():
                weight = exact.get_parameter(f"model.layers.{name.split('.')[2]}.{key}")
                old[weight] = weight.clone()
                weight.add_(0.02 * (rounded - weight))
            change = float(-logits().gather(-1, labels).sum() - before) / 0.02
            for weight, value in old.items():
                weight.copy_(value)
            assert change == pytest.approx(sum(sums[name, "int4"].signed), rel=0.05, abs=0.02)


def test_a_mixture_is_scored(tmp_path: Path) -> None:
    """Routed experts of a layer are one group with a cost, and so is an output head of its own."""
    model = make_mixture("qwen3_moe", tmp_path / "model")
    found = score(model, tmp_path / "work", samples(8), formats=("nvfp4",))
    roles = {group.role for group in found.groups}
    assert {"experts", "qkv", "o", "lm_head", "kv_cache"} <= roles
    for group in found.groups:
        if group.role not in ("lm_head", "kv_cache"):
            assert found.costs[group.name]["nvfp4"].kl[0] > 0
    shutil.rmtree(tmp_path / "work")


def test_positions_are_in_buckets(model: Path) -> None:
    """Buckets end at quarters of the context; a row is scored where no shorter row is."""
    assert edges_of(32768) == (512, 2048, 8192, 32768)
    assert edges_of(300) == (300,)
    cut = cut_rows(rows(4, 1100), 1024, 600)
    assert cut.edges == (256, 1024)
    assert {(len(row.ids), row.first) for row in cut.rows} == {(256, 1), (1024, 256)}
    assert min(cut.tokens) >= 600
    with raises("dataset-too-small"):
        cut_rows(rows(1, 64), 64, 64)
    with raises("option-invalid", where="formats"):
        score_model(model, formats="fp7", work_dir="nowhere")
    with raises("option-invalid", where="rounding"):
        score_model(model, formats="int4", work_dir="nowhere", rounding="best")


def test_an_estimate_says_what_scoring_takes(model: Path, scores: Scores, tmp_path: Path) -> None:
    """The estimate counts the plans that are measured and bounds the files; only with `timed` is anything run."""
    part = samples()
    settings = ScoreSettings(formats=FORMATS)
    found = estimate_scoring(read_layout(model), part, settings, device="cpu", tokens_per_batch=256)
    headless = [point for point in scores.points if "lm_head" not in point.name]
    assert found.tokens == part.total
    assert found.forwards == pytest.approx(4 + 2 * len(FORMATS) + len(headless), abs=1)
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.disk_bytes > 0
    assert found.gpu_bytes == 0
    untimed = estimate_scoring(read_layout(model), part, settings, device="cpu", tokens_per_batch=256, timed=False)
    assert untimed == replace(found, seconds=None, proof_seconds=None)
