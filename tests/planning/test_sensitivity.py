"""Scores of groups: against finite differences and measured KL; how they resume, merge, and are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import MakeTiny
from helpers.errors import raises
from helpers.tiny_families import FAMILIES
from helpers.tiny_mixtures import make_mixture
from snugfit.data.dataset import Dataset, make_dataset
from snugfit.model.layout import read_layout
from snugfit.planning import scoring_cost
from snugfit.planning.calibration import calibrate
from snugfit.planning.damage import merge_scores
from snugfit.planning.drawn import draw
from snugfit.planning.gradients import GradientPass
from snugfit.planning.samples import Samples, by_bucket, cut_rows, edges_of
from snugfit.planning.scoring_cost import estimate_scoring
from snugfit.planning.sensitivity import ScoreSettings, score_model, score_samples
from snugfit.planning.shared_pass import Assigned, SharedPass, branches_of
from snugfit.planning.variants import Key, LayerVariants, open_subject
from snugfit.quantization.resume import FinishedUnits
from snugfit.records.base import as_json
from snugfit.records.scores import KV_CACHE, Scores, cache_of_layer, check_model, load_scores, save_scores
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


def test_an_fp8_cache_is_scored_by_layer(model: Path, scores: Scores, tmp_path: Path) -> None:
    """Layers' costs add up to what the whole cache costs, each within a factor of two of what it costs alone."""
    names = [cache_of_layer(layer) for layer in range(2)]
    costs = [scores.costs[name]["fp8"].kl[0] for name in names]
    whole = scores.costs[KV_CACHE]["fp8"].kl[0]
    assert sum(costs) == pytest.approx(whole)
    plans = [Assigned(name=name, choice={name: "fp8"}) for name in (*names, KV_CACHE)]
    plans.append(Assigned(name="all", choice=dict.fromkeys(names, "fp8")))
    measured = measure(model, plans, tmp_path)
    assert measured["all"] == measured[KV_CACHE] == pytest.approx(whole, rel=1e-5)
    assert all(0.5 < cost / measured[name] < 2 for name, cost in zip(names, costs, strict=True))
    assert scores.predict(dict.fromkeys(names, "fp8"), 64).kl == pytest.approx(scores.predict({KV_CACHE: "fp8"}, 64).kl)


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
    """A work folder of other formats is refused rather than mixed up, one of another machine unless that is forced."""
    made = score(model, tmp_path, formats=("fp8-dynamic",))
    with raises("run-differs"):
        score(model, tmp_path)
    options = {"device": "cpu", "tokens_per_batch": 128}
    again = read_layout(model), samples(), ScoreSettings(formats=("fp8-dynamic",)), tmp_path
    with raises("machine-differs"):
        score_samples(*again, **options)  # type: ignore[arg-type]
    assert score_samples(*again, force_resume=True, **options) == made  # type: ignore[arg-type]


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
    changes = ('"edges"', '"edge"'), ('"kv_cache/1"', '"kv_cache/x"')
    documents = [as_json(json.loads(text.replace(old, new))) for old, new in changes]
    for broken in (text[:-9], *documents, text.replace("snugfit.scores/1", "snugfit.scores/9")):
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


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_gradients_are_finite_differences(
    family: str, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products g . dY of a group are the change of the loss that a part of dY makes in transformers' own model.

    Gemma 4's second layer makes keys and values for the third, which has none of its own.
    """
    from transformers import AutoModelForCausalLM

    own = {"num_hidden_layers": 2} if family == "llama" else FAMILIES[family]
    model = make_tiny(family, dtype=torch.float32, **own)
    layout = read_layout(model)
    part = samples(4)
    statistics = calibrate(layout, part.dataset, tmp_path, device="cpu", tokens_per_batch=256)
    subject = open_subject(layout, statistics, rounding="plain", target="none")
    make = LayerVariants.make

    def barely(self: LayerVariants, wanted: Iterable[Key]) -> None:
        """A hundredth of the rounding, where a layer's output is linear in it."""
        known = set(self._known)
        make(self, wanted)
        for key in self._known.keys() - known:
            for name, tensor in self._known[key].parameters.items():
                exact = self.exact.get_parameter(name).data
                tensor.copy_(exact + 0.01 * (tensor - exact))

    monkeypatch.setattr(LayerVariants, "make", barely)
    (tmp_path / "pass").mkdir()
    scored = GradientPass(
        subject, part.rows, {"int4": "int4"}, CPU, tokens_per_batch=64, folder=tmp_path / "pass", seed=0
    )
    sums = scored.run(FinishedUnits(tmp_path / "pass", {}))
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([row.ids for row in part.rows])

    def logits() -> torch.Tensor:
        found: torch.Tensor = exact(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return found

    with torch.no_grad():
        labels = torch.stack([draw(one, 0, row, 0) for row, one in enumerate(logits())])
        for name in (
            *("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_up"),
            *("model.layers.1.self_attn.qkv", "model.layers.0.self_attn.qkv"),
        ):
            variant = LayerVariants(subject, int(name.split(".")[2]), CPU).variant(name, "int4")
            weights = {
                exact.get_parameter(f"model.layers.{name.split('.')[2]}.{key}"): rounded
                for key, rounded in variant.parameters.items()
            }
            steps = {weight: rounded - weight for weight, rounded in weights.items()}
            losses = []
            for there, back in ((1, -1), (-1, 1)):
                for weight, step in steps.items():
                    weight.add_(there * step)
                losses.append(float(-logits().gather(-1, labels).double().sum()))
                for weight, step in steps.items():
                    weight.add_(back * step)
            change = (losses[0] - losses[1]) / 2
            assert change == pytest.approx(sum(sums[name, "int4"].signed), rel=0.05, abs=2e-4)


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


def test_a_family_that_shares_keys_and_values_is_scored(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4's later layers use keys and values of earlier ones; a run that is stopped starts its pass again."""
    model = make_tiny("gemma4_text", dtype=torch.float32, **FAMILIES["gemma4_text"])
    found = score(model, tmp_path / "whole", samples(8), formats=("int4",))
    costs = {g.name: found.costs[g.name]["int4"].kl[0] for g in found.groups if "int4" in found.costs[g.name]}
    assert {f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)} < set(costs)
    assert all(cost > 0 for cost in costs.values())
    commit = FinishedUnits.commit

    def stopping(self: FinishedUnits, entry: dict[str, object]) -> None:
        commit(self, entry)
        if (self._folder.name, self.done) == ("gradients", 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(FinishedUnits, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        score(model, tmp_path / "work", samples(8), formats=("int4",))
    monkeypatch.undo()
    assert score(model, tmp_path / "work", samples(8), formats=("int4",)).to_json() == found.to_json()
    estimate = estimate_scoring(read_layout(model), samples(8), ScoreSettings(formats=("int4",)), device="cpu")
    assert (estimate.seconds or 0) > 0


def test_fp8_is_scored_as_it_follows_the_effort_beside_4_bits(model: Path, tmp_path: Path) -> None:
    """Weighted scores give FP8 the scales that it has beside a 4-bit format, if one is scored; its names stay."""

    def weighted(*formats: str) -> Scores:
        settings = ScoreSettings(formats=formats, rounding="weighted", kv_cache=False)
        work = tmp_path / "-".join(formats)
        return score_samples(read_layout(model), samples(4), settings, work, device="cpu", tokens_per_batch=256)

    alone, beside = weighted("fp8-dynamic"), weighted("fp8-dynamic", "int4")
    assert (alone.fp8_follows, beside.fp8_follows) == (False, True)
    assert {fmt for by_format in beside.costs.values() for fmt in by_format} == {"fp8-dynamic", "int4"}
    assert {fmt for point in beside.points for fmt in point.formats.values()} == {"fp8-dynamic", "int4"}
    for group in beside.groups:
        same = alone.costs[group.name]["fp8-dynamic"] == beside.costs[group.name]["fp8-dynamic"]
        assert same == (group.layer is None)
    assert beside.points[0].name == "fp8-dynamic"
    assert beside.points[0].kl != alone.points[0].kl


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


def test_plans_are_measured_on_spread_rows_of_each_bucket() -> None:
    """Of many rows a part is measured, at least 2,000 scored tokens of each bucket and two rows, evenly spread."""
    few = cut_rows(rows(16, 2048), 2048, 4000)
    assert [few.buckets[place] for place in few.measured] == [0] * 4 + [1] * 2
    assert few.measured == (1, 3, 5, 7, 8, 10)
    many = cut_rows(rows(32, 2048), 2048, 32_000)
    assert few.measured_total < many.measured_total < many.total / 3
    assert cut_rows(rows(), 64, 640).measured == tuple(range(11))


def test_means_are_over_the_rows_that_were_measured() -> None:
    """Each bucket's mean is by tokens over the measured rows alone, with the error of their differences."""
    cut = cut_rows(rows(16, 2048), 2048, 4000)
    sums = {place: (2.0 + place % 2) * cut.rows[place].count for place in (1, 4, 9, 10)}
    means, errors = by_bucket(sums, cut)
    assert means == pytest.approx((2.5, 2.5))
    assert errors == pytest.approx((0.5, 0.5))


def test_an_estimate_says_what_scoring_takes(model: Path, scores: Scores, tmp_path: Path) -> None:
    """The estimate counts the plans that are measured and bounds the files; only with `timed` is anything run."""
    part = samples()
    settings = ScoreSettings(formats=FORMATS)
    found = estimate_scoring(read_layout(model), part, settings, device="cpu", tokens_per_batch=256)
    layers = [[group.name for group in scores.groups if group.layer == layer] for layer in range(2)]
    steps = branches_of([Assigned(name=point.name, choice=point.formats) for point in scores.points], layers)
    ran = sum(len({branch.number for branch in step.values()}) for step in steps[1:]) / len(layers)
    assert found.tokens == part.total
    # variants of attention and the FP8 cache run whole layers, others their part; mixes agree in a layer by chance
    assert 4 + len(FORMATS) < found.forwards - ran < 4 + 2 * len(FORMATS) + 0.5
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.disk_bytes > 0
    assert found.gpu_bytes == 0
    untimed = estimate_scoring(read_layout(model), part, settings, device="cpu", tokens_per_batch=256, timed=False)
    assert untimed == replace(found, seconds=None, proof_seconds=None, first_seconds=None)


def test_an_estimate_times_the_folds_of_a_proof(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under weighted rounding up is folded into down where mixes are proven, and nowhere else; plain has no folds."""
    made: list[Key] = []

    def make(self: LayerVariants, wanted: Iterable[Key], original: Callable[..., None] = LayerVariants.make) -> None:
        made.extend(keys := list(wanted))
        original(self, keys)

    monkeypatch.setattr(LayerVariants, "make", make)
    part, folded = samples(4), []
    for rounding, mixes in (("weighted", 3), ("weighted", 0), ("plain", 3)):
        made.clear()
        settings = ScoreSettings(formats=FORMATS, rounding=rounding)
        proof = (mixes, [len(row.ids) for row in part.rows])
        found = estimate_scoring(read_layout(model), part, settings, device="cpu", tokens_per_batch=256, proof=proof)
        assert bool(found.proof_seconds) == bool(mixes)
        folded.append(any(products for _, _, products in made))
    assert folded == [True, False, False]


def test_an_estimate_knows_how_many_passes_a_disk_takes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixes that the free disk does not hold at once are counted in several passes, and in no more bytes."""
    part = samples()
    settings = ScoreSettings(formats=FORMATS)
    layout = read_layout(model)
    state = part.total * 64 * 4
    found = []
    for size in (10**12, 6 * state):
        monkeypatch.setattr(scoring_cost, "disk_budget", lambda _, size=size: size)
        proof = (7, [len(row.ids) for row in part.rows])
        found.append(estimate_scoring(layout, part, settings, device="cpu", timed=False, proof=proof))
    plenty, little = found
    assert (plenty.proof_passes, plenty.proof_disk_bytes) == (1, 16 * state)
    assert (little.proof_passes, little.proof_disk_bytes) == (4, 6 * state)
    assert little.disk_bytes < plenty.disk_bytes
    assert little.forwards > plenty.forwards
