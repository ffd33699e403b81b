"""`plan` from end to end on tiny models: what it writes, reuses, refuses, and how it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.plan_scores import made_up_scores, save
from helpers.plans import write_headers
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.cli.app import app
from snugfit.errors import Unfinished
from snugfit.model.layout import read_layout
from snugfit.planning import budgeted, make_plan, plan_cost
from snugfit.planning.gradients import GradientPass
from snugfit.planning.groups import find_groups
from snugfit.planning.limits import Budget, context_beside, read_place
from snugfit.planning.make_plan import plan
from snugfit.planning.plan_cost import estimate_plan
from snugfit.planning.samples import read_samples
from snugfit.progress import Progress
from snugfit.quantization.plan import lay_out
from snugfit.recipes.recipe import load_recipe
from snugfit.records.plan import PlanRecord
from snugfit.records.scores import KEEP, load_scores
from snugfit.report.plan import next_commands, plan_lines

MakeTiny = Callable[..., Path]
FILES = {
    *("recipe.yaml", "plan.json", "plan.md", "snugfit-scores.json", "snugfit-statistics.json"),
    *("kl-by-bytes.png", "kl-by-bytes.svg", "layers.png", "layers.svg"),
}


def write_rows(file: Path, seed: int, count: int = 16) -> Path:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 64, (count, 64), generator=generator).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take their time: only `made` draws them."""
    if "made" in request.fixturenames:
        request.getfixturevalue("made")
    monkeypatch.setattr(make_plan, "write_plan_plots", lambda *_: [])


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """Two layers in fp32, which 4 bits damage enough to be seen."""
    folder = make_tiny(num_hidden_layers=2, hidden_size=128, intermediate_size=128, dtype=torch.float32)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows to score and rows that are held out, as arguments of `plan`."""
    folder = tmp_path_factory.mktemp("texts")
    return {
        "dataset": write_rows(folder / "rows.jsonl", 1),
        "held_out": write_rows(folder / "held-out.jsonl", 2, 24),
        "max_seq_length": 64,
        "num_tokens": 256,
        "menu": ("nvfp4", "fp8-dynamic", "int4"),
        "device": "cpu",
    }


class Bars(Progress):
    """Remembers the names of progress bars."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[], None]]:
        """Remember the name, and count nothing."""
        del total
        self.titles.append(description)
        yield lambda: None


@pytest.fixture(scope="module")
def made(model: Path, texts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PlanRecord]:
    """A plan with 6 bits a weight, and its directory."""
    folder = tmp_path_factory.mktemp("plan") / "out"
    bars = Bars()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_cost, "ROUGH_SECONDS", 0.0)  # also of a tiny model the times are foreseen
        record = plan(model, output_dir=folder, bits_per_weight=7.5, progress=bars, **texts)
    assert len(set(bars.titles)) == len(bars.titles) > 2, "each part of a run has a bar of its own name"
    assert "calibrating" in bars.titles
    return folder, record


def test_a_plan_is_a_recipe_that_writes_what_was_planned(made: tuple[Path, PlanRecord], model: Path) -> None:
    """The recipe gives each group the record's format, its bytes are the record's, and all files are there."""
    folder, record = made
    assert {file.name for file in folder.iterdir()} == FILES
    layout = read_layout(model)
    written = lay_out(layout, load_recipe(folder / "recipe.yaml"))
    point = next(point for point in record.points if point.name == record.written)
    assert written.bytes == point.bytes
    if record.verdict.accepted:
        planned = {group.name: group.label for group in record.groups}
        for group in find_groups(layout):
            labels = {written.assignments[n].label() if n in written.assignments else KEEP for n in group.weights}
            assert labels == {planned[group.name]}
    assert record.plan.bits_per_weight <= 7.5
    assert sum(group.bytes for group in record.groups) + record.outside_bytes == record.plan.bytes
    assert json.loads((folder / "plan.json").read_text())["schema"] == "snugfit.plan/1"


def test_the_plan_and_controls_are_measured_on_the_same_text(made: tuple[Path, PlanRecord]) -> None:
    """Plan, alternatives and controls that fit have measured figures; the verdict compares with the best control."""
    _, record = made
    measured = {point.name: point.measured[0].kl for point in record.points if point.measured}
    assert record.plan.name in measured
    assert {point.name for point in record.points if point.kind == "built-in" and point.fits} <= set(measured)
    assert "nvfp4" in measured
    controls = [kl for name, kl in measured.items() if not name.startswith("mix ")]
    verdict = record.verdict
    assert verdict.control is not None
    assert measured[verdict.control] == min(controls)
    assert verdict.gain == pytest.approx(min(controls) - measured[record.plan.name], abs=1e-9)
    assert verdict.accepted == (verdict.gain is not None and verdict.gain > 2 * (verdict.gain_error or 0))
    assert all(not point.measured for point in record.points if not point.fits)


def test_weighted_rounding_is_the_default_and_scores_keep_their_own(
    made: tuple[Path, PlanRecord], model: Path, tmp_path: Path
) -> None:
    """Without `rounding` a plan is weighted and says what writes the measured file; plain scores stay plain."""
    folder, record = made
    assert record.effort == "weighted"
    first, second = next_commands(record, "MODEL", folder)
    assert f"quantize MODEL --recipe {folder / 'recipe.yaml'}" in first
    assert f"--statistics {folder}" in second
    plain = save(made_up_scores(read_layout(model), formats=("nvfp4", "fp8-dynamic"), edges=(64,)), tmp_path / "s.json")
    old = plan(model, output_dir=tmp_path / "old", bits_per_weight=7.5, scores=plain, prove=False)
    assert old.effort == "plain"
    assert len(next_commands(old, "MODEL", tmp_path / "old")) == 1


def test_a_record_has_what_was_foreseen_beside_what_was_taken(made: tuple[Path, PlanRecord]) -> None:
    """Of each part of the run plan.json has the seconds that it took, and those of the estimate before it."""
    folder, record = made
    written = json.loads((folder / "plan.json").read_text())
    assert written["foreseen"] == record.foreseen
    assert written["seconds"].keys() == written["foreseen"].keys() == {"scoring", "search", "proof"}
    assert all(taken > 0 for taken in (*record.seconds.values(), *record.foreseen.values()))


def test_every_group_says_why(made: tuple[Path, PlanRecord]) -> None:
    """Each group has a cost and a reason with numbers; the costs of what is kept are 0."""
    _, record = made
    assert all(group.why for group in record.groups)
    assert all(group.cost == 0 for group in record.groups if group.format == KEEP)
    assert all(group.cost > 0 for group in record.groups if group.format != KEEP)
    simple = [point for point in record.points if point.name.startswith("mix in runs of 2 layers")]
    assert all(point.rules > 0 and point.measured for point in simple)
    head = next(group for group in record.groups if group.role == "lm_head")
    assert "output head" in head.refused["nvfp4"]


def test_scores_are_reused_for_another_budget(
    made: tuple[Path, PlanRecord], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scores of an earlier plan nothing is run but the search; more bytes cost less."""
    monkeypatch.setattr(make_plan, "_calibrated", None)
    monkeypatch.setattr(make_plan, "prove_mixes", None)
    folder, record = made
    more = plan(model, output_dir=tmp_path / "more", bits_per_weight=9.0, scores=folder, prove=False)
    assert more.verdict.accepted is None
    assert more.plan.expected.kl < record.plan.expected.kl
    assert (tmp_path / "more" / "snugfit-scores.json").read_bytes() == (folder / "snugfit-scores.json").read_bytes()


def test_the_same_seed_gives_the_same_plan(
    made: tuple[Path, PlanRecord], model: Path, texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in its proof resumes behind the scores, and ends in the same recipe and figures."""
    _, record = made

    def killed(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(make_plan, "prove_mixes", killed)
        with pytest.raises(KeyboardInterrupt):
            plan(model, output_dir=tmp_path / "out", bits_per_weight=7.5, **texts)
    assert (tmp_path / "out.partial").is_dir()
    again = plan(model, output_dir=tmp_path / "out", bits_per_weight=7.5, **texts)
    assert again.recipe == record.recipe
    assert again.points == record.points


def test_a_plan_that_loses_is_refused(
    made: tuple[Path, PlanRecord], model: Path, texts: dict[str, Any], tmp_path: Path
) -> None:
    """Scores that lie give a plan that loses: exit code 1, and the control's recipe, marked as such."""
    layout = read_layout(model)
    scores = made_up_scores(layout, formats=("nvfp4", "fp8-dynamic"), edges=(64,))
    # FP8 is said to cost what 4 bits cost, and 4 bits what FP8 costs
    turned = {
        name: {"nvfp4": c["fp8-dynamic"], "fp8-dynamic": c["nvfp4"]} if "nvfp4" in c else c
        for name, c in scores.costs.items()
    }
    lying = save(replace(scores, costs=turned), tmp_path / "lies.json")
    arguments = ["plan", model, "--bits-per-weight", "10", "--scores", lying, "-o", tmp_path / "out"]
    arguments += ["--dataset", texts["dataset"], "--held-out", texts["held_out"], "--device", "cpu"]
    arguments += ["--menu", "nvfp4,fp8-dynamic", "--max-seq-length", "64", "--num-tokens", "256"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 1, result.stderr
    assert "refused" in result.stdout
    record = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert record["verdict"]["accepted"] is False
    assert record["written"] == record["verdict"]["control"]
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.text.startswith("# CONTROL, not a plan:")
    point = next(point for point in record["points"] if point["name"] == record["written"])
    assert lay_out(layout, recipe).bytes == point["bytes"]


def test_the_smallest_and_the_longest(model: Path, tmp_path: Path) -> None:
    """`max_kl` gives the smallest file, and with a GPU the longest context, of at most that expected KL."""
    layout = read_layout(model)
    file = save(made_up_scores(layout), tmp_path / "scores.json")
    small = plan(model, output_dir=tmp_path / "small", max_kl=0.05, scores=file, prove=False)
    assert small.plan.expected.kl <= 0.05 * 1.0001
    less = plan(model, output_dir=tmp_path / "less", max_kl=0.02, scores=file, prove=False)
    assert less.plan.bytes > small.plan.bytes
    long = plan(
        model, output_dir=tmp_path / "long", max_kl=0.3, gpu="16GiB", bits_per_weight=9, scores=file, prove=False
    )
    assert long.context == 512
    assert long.plan.expected.kl <= 0.3
    with raises("recipe-changes-nothing", where="gpu"):
        plan(model, output_dir=tmp_path / "needless", max_kl=0.3, gpu="16GiB", scores=file)
    with raises("recipe-changes-nothing", where="max_kl"):
        plan(model, output_dir=tmp_path / "lossless", max_kl=1e-9, scores=file)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("recipe-changes-nothing", {"max_kl": 1e-9}),
        ("plan-impossible", {"max_kl": 1e-6, "bytes": small.plan.bytes}),
    ]
    for code, asked in refused:
        with raises(code, where="max_kl"):  # a dry run searches, too
            estimate_plan(model, timed=False, scores=file, prove=False, **asked)
    with raises("plan-impossible", where="max_kl") as error:
        plan(model, output_dir=tmp_path / "none", max_kl=1e-6, bytes=small.plan.bytes, scores=file, prove=False)
    least = float(error.value.remedy.partition("max_kl=")[2].partition("`")[0])
    found = plan(model, output_dir=tmp_path / "some", max_kl=least, bytes=small.plan.bytes, scores=file, prove=False)
    assert found.plan.bytes <= small.plan.bytes


def test_scores_outlive_a_budget_that_cannot_be(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """A KL that no mix has is found out behind the scoring: the same output takes another budget and the scores."""
    impossible = {**texts, "output_dir": tmp_path / "out", "prove": False, "bits_per_weight": 7.5}
    with raises("plan-impossible", where="max_kl") as error:
        plan(model, max_kl=1e-9, **impossible)
    assert isinstance(error.value, Unfinished)
    scored = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.partial").rglob("unit-*.json")}
    assert scored
    plan(model, max_kl=10.0, **impossible)
    assert (tmp_path / "out" / "recipe.yaml").is_file()


def test_a_full_gpu_stops_a_run_that_resumes(
    model: Path, texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished stays where memory runs out, and a smaller batch goes on behind it if that is forced."""
    options = {**texts, "output_dir": tmp_path / "out", "prove": False, "bits_per_weight": 10, "menu": "fp8-dynamic"}
    with monkeypatch.context() as patched:

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        patched.setattr(GradientPass, "_begin", full)
        with raises("gpu-memory-insufficient", where="device"):
            plan(model, **options)
    assert list((tmp_path / "out.partial").rglob("unit-*.json"))
    with raises("machine-differs"):
        estimate_plan(model, timed=False, tokens_per_batch=64, **options)
    with raises("run-differs"):
        estimate_plan(model, timed=False, **{**options, "num_tokens": 128})
    estimate_plan(model, timed=False, restart=True, **{**options, "num_tokens": 128})
    estimate_plan(model, timed=False, tokens_per_batch=64, force_resume=True, **options)
    with raises("machine-differs"):
        plan(model, tokens_per_batch=64, **options)
    plan(model, tokens_per_batch=64, force_resume=True, **options)
    assert (tmp_path / "out" / "recipe.yaml").is_file()


def test_a_gpu_decides_on_menu_and_profile(model: Path, tmp_path: Path) -> None:
    """On Hopper NVFP4 is weight-only, so there is one of both, and the record names kernels and what fits."""
    file = save(made_up_scores(read_layout(model)), tmp_path / "scores.json")
    options: dict[str, Any] = {"scores": file, "prove": False, "bits_per_weight": 7.5, "context": 256}
    found = plan(model, output_dir=tmp_path / "out", gpu="H100", **options)
    assert "nvfp4a16" not in found.menu
    assert {group.arithmetic for group in found.groups if group.format == "nvfp4"} <= {"W4A16"}
    assert (found.plan.max_context or 0) >= 256
    assert found.budget.gpu_title == "H100"
    room = plan_lines(found)[-1]
    assert room.startswith("used of `gpu`: ")
    assert "beside 256 tokens" in room
    assert "`bits_per_weight`: " in room
    assert any("vllm-blackwell" in note for note in found.notes)
    assert set(found.kv_caches) == {KEEP, "fp8"}


def test_a_model_of_one_layer(make_tiny: MakeTiny, texts: dict[str, Any], tmp_path: Path) -> None:
    """One layer has no depth, no front half and no runs: it is scored, planned and proven all the same."""
    model = make_tiny(num_hidden_layers=1, hidden_size=128, intermediate_size=128, dtype=torch.float32)
    add_tokenizer(model)
    found = plan(model, output_dir=tmp_path / "out", bits_per_weight=7.5, **texts | {"menu": ("nvfp4", "fp8-dynamic")})
    assert found.plan.bits_per_weight <= 7.5
    assert found.plan.measured
    assert not any("runs of" in point.name for point in found.points)


def test_layers_that_keep_a_16_bit_cache_are_told_to_the_engine(
    make_tiny: MakeTiny, texts: dict[str, Any], tmp_path: Path
) -> None:
    """Where memory is left beside an FP8 cache, the costliest layers keep 16 bits, and the command says so."""
    small = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 2**24}
    model = make_tiny(**small)
    add_tokenizer(model)
    layout = read_layout(model)
    scores = made_up_scores(layout, cache=3.0, cache_of_layers=(1.0, 0.5, 1.0, 0.5), edges=(64,))
    options: dict[str, Any] = {key: texts[key] for key in ("dataset", "held_out", "num_tokens", "device")}
    options |= {"scores": save(scores, tmp_path / "scores.json"), "gpu": "8GiB", "max_seq_length": 64}
    place = read_place(layout, Budget(gpu="8GiB", context=1000))
    whole, half = (context_beside(place, 600_000, fp8=True, kept_layers=kept) or 0 for kept in ((), (0, 2)))
    assert whole > half
    measured = plan(model, output_dir=tmp_path / "measured", context=half, **options)
    assert any(point.cache_kept_in and point.measured for point in measured.points)
    found = plan(model, output_dir=tmp_path / "out", context=half, prove=False, **options)
    assert found.plan.cache_kept_in == (0, 2)
    assert found.kv_cache == "fp8"
    assert (found.plan.max_context or 0) >= half
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.recipe.kv_cache == "fp8"
    assert "--kv-cache-dtype-skip-layers 0 2" in recipe.text
    assert "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 2" in next_commands(found, "MODEL", Path("OUT"))[0]
    text = (tmp_path / "out" / "plan.md").read_text(encoding="utf-8")
    assert "FP8 KV cache: costs 3 nats; with layers 0, 2 in 16 bits 1 nats" in text


@pytest.mark.parametrize(
    ("options", "code", "where"),
    [
        ({}, "option-missing", "gpu"),
        ({"bytes": 10**9}, "recipe-changes-nothing", "bytes"),
        ({"bytes": 1000}, "plan-impossible", "bytes"),
        ({"bits_per_weight": 8.0, "menu": "fp6"}, "option-invalid", "menu"),
        ({"bits_per_weight": 8.0, "alternatives": -1}, "option-invalid", "alternatives"),
        ({"bits_per_weight": 8.0, "tokens_per_batch": 0}, "option-invalid", "tokens_per_batch"),
        ({"bits_per_weight": 8.0, "max_seq_length": 8}, "option-invalid", "max_seq_length"),
        ({"bits_per_weight": 8.0, "max_seq_length": 2**40}, "sequence-too-long", "max_seq_length"),
        ({"bits_per_weight": 8.0, "constraints": "none.yaml"}, "file-missing", None),
        ({"bits_per_weight": 8.0, "scores": "none.json"}, "file-missing", None),
        ({"bits_per_weight": 8.0, "target": "marlin", "scores": "scores.json"}, "scores-mismatch", "scores"),
        ({"bits_per_weight": 8.0, "rounding": "weighted", "scores": "scores.json"}, "scores-mismatch", "scores"),
        ({"bits_per_weight": 8.0, "menu": "mxfp4", "scores": "fp8.json"}, "scores-mismatch", "scores"),
        ({"bits_per_weight": 5.5, "scores": "fp8.json"}, "plan-impossible", "bits_per_weight"),
    ],
)
def test_bad_input_leaves_nothing(
    options: dict[str, Any], code: str, where: str | None, model: Path, tmp_path: Path
) -> None:
    """Every refusal comes before anything is run or written."""
    layout = read_layout(model)
    save(made_up_scores(layout), tmp_path / "scores.json")
    save(made_up_scores(layout, formats=("fp8-dynamic",)), tmp_path / "fp8.json")
    if "scores" in options:
        options = {**options, "scores": tmp_path / options["scores"]}
    with raises(code) as error:
        plan(model, output_dir=tmp_path / "out", **options)
    assert where in (None, error.value.where)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_constraints_that_no_mix_keeps_are_refused_before_anything_is_run(
    model: Path, texts: dict[str, Any], tmp_path: Path
) -> None:
    """One format cannot be two; a dry run says so, and texts that are too short by the names of `plan`."""
    two = "max_formats: 1\nrules:\n  - {role: attention, format: nvfp4}\n  - {role: down, format: int4}\n"
    (tmp_path / "two.yaml").write_text(two, encoding="utf-8")
    with raises("plan-impossible", where="constraints"):
        estimate_plan(model, max_kl=1.0, constraints=tmp_path / "two.yaml", **texts)
    with raises("dataset-too-small", where="dataset") as error:
        estimate_plan(model, bits_per_weight=8.0, **{**texts, "max_seq_length": 256})
    assert "`max_seq_length`" in error.value.remedy


@pytest.mark.parametrize("kl", [0.1232, 0.12345, 1.0, 9.996, 1e-5])
def test_the_least_kl_that_is_named_is_not_below_what_works(kl: float) -> None:
    """What the error asks for is rounded up to three digits."""
    mix: Any = SimpleNamespace(predicted=SimpleNamespace(kl=kl))
    choices: Any = SimpleNamespace(place=SimpleNamespace(budget=SimpleNamespace(max_kl=kl / 2)))
    remedy = budgeted._too_lossy([mix], choices).remedy
    assert kl * 1.001 <= float(remedy.partition("max_kl=")[2].partition("`")[0]) <= kl * 1.012


def test_scores_of_several_files_are_merged(model: Path, tmp_path: Path) -> None:
    """Formats that were scored apart are chosen from together; the same file twice is refused by its path."""
    layout = read_layout(model)
    files = [save(made_up_scores(layout, formats=(fmt,)), tmp_path / fmt) for fmt in ("nvfp4", "fp8-dynamic")]
    options: dict[str, Any] = {"bits_per_weight": 7.5, "context": 256, "prove": False}
    plan(model, output_dir=tmp_path / "out", scores=files, **options)
    merged = load_scores(tmp_path / "out")
    assert merged.formats == ("nvfp4", "fp8-dynamic")
    assert all({"nvfp4", "fp8-dynamic"} <= set(costs) for name, costs in merged.costs.items() if "layers" in name)
    with raises("scores-mismatch", where=str(files[0])):
        plan(model, output_dir=tmp_path / "no", scores=[files[0], files[0]], **options)
    arguments = [argument for file in files for argument in ("--scores", str(file))]
    command = [
        "plan",
        str(model),
        "--bits-per-weight",
        "7.5",
        "--context",
        "256",
        "--dry-run",
        "--no-prove",
        *arguments,
    ]
    assert CliRunner().invoke(app, command).exit_code == 0


def test_what_scores_make_needless_is_refused(
    made: tuple[Path, PlanRecord], model: Path, texts: dict[str, Any], tmp_path: Path
) -> None:
    """Options about samples are refused beside scores, but where these have no statistics and the proof needs some."""
    alone = save(made_up_scores(read_layout(model), edges=(64,)), tmp_path / "scores.json")
    samples = {name: texts[name] for name in ("dataset", "max_seq_length", "num_tokens")}
    for scores, unused in ((made[0], samples | {"seed": 3}), (alone, {"seed": 3})):
        for name, value in unused.items():
            options: dict[str, Any] = {"scores": scores, name: value}
            with raises("option-conflict", where=name):
                estimate_plan(model, timed=False, bits_per_weight=8.0, **options)
    estimate_plan(model, timed=False, bits_per_weight=8.0, scores=alone, held_out=texts["held_out"], **samples)


def test_scores_of_another_model_are_refused(make_tiny: MakeTiny, model: Path, tmp_path: Path) -> None:
    """A file of scores belongs to one model's headers and weights."""
    other = read_layout(make_tiny(num_hidden_layers=2, hidden_size=128, intermediate_size=256))
    file = save(made_up_scores(other), tmp_path / "scores.json")
    with raises("scores-mismatch", where="scores"):
        plan(model, output_dir=tmp_path / "out", bits_per_weight=8.0, scores=file)
    assert load_scores(file).model == other.checkpoint.name


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    """Tables on stdout, notes on stderr, sizes with units, and one JSON document with `--json`."""
    file = save(made_up_scores(read_layout(model)), tmp_path / "scores.json")
    base = ["plan", str(model), "--scores", str(file), "--no-prove", "--bytes", "450kB"]
    result = CliRunner().invoke(app, [*base, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "KL to the original" in result.stdout
    assert "snugfit quantize" in result.stdout
    document = CliRunner().invoke(app, [*base, "--json", "-o", str(tmp_path / "json")]).stdout
    assert json.loads(document)["budget"]["bytes"] == 450_000
    assert failed_with(CliRunner().invoke(app, base), "option-missing", "--output-dir")
    assert failed_with(CliRunner().invoke(app, ["plan", "--bytes", "1GB"]), "option-missing", "MODEL")
    bad = CliRunner().invoke(app, ["plan", str(model), "--bytes", "heavy", "-o", str(tmp_path / "bad")])
    assert bad.exit_code == 2
    assert "not a size" in bad.stderr
    unknown = CliRunner().invoke(app, [*base, "--engine", "none", "-o", str(tmp_path / "bad")])
    assert failed_with(unknown, "option-invalid", "--engine")
    assert "Value error" not in unknown.stderr


def test_a_dry_run_says_what_planning_takes(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """It checks what the run checks, writes nothing, and counts the mixes and tokens that a run measures."""
    options = {name: value for name, value in texts.items() if name != "menu"}
    estimate = estimate_plan(model, bits_per_weight=7.5, menu=texts["menu"], **options)
    assert estimate.scored_tokens == 5 * 64
    assert estimate.held_out_tokens == 24 * 64
    assert estimate.mixes > 3
    assert (estimate.scoring_seconds or 0) > 0
    assert (estimate.search_seconds or 0) > 0
    assert (estimate.proof_seconds or 0) > 0
    assert "search" in estimate.line()
    assert estimate.disk_bytes > 0
    assert "planning takes about" in estimate.line()
    before = {file: file.stat().st_mtime_ns for file in model.iterdir()}
    arguments = ["plan", model, "--bits-per-weight", "7.5", "--dry-run", "-o", tmp_path / "out"]
    arguments += ["--dataset", texts["dataset"], "--held-out", texts["held_out"], "--max-seq-length", "64"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    assert "mixes on" in result.stdout
    assert not list(tmp_path.iterdir())
    assert before == {file: file.stat().st_mtime_ns for file in model.iterdir()}
    longer = [*arguments, "--held-out-contexts", "1"]
    assert failed_with(CliRunner().invoke(app, list(map(str, longer))), "option-invalid", "--held-out-contexts")


def test_plans_of_checkpoints_on_the_command_line(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """`--from` prints or writes the recipe of a checkpoint, `--diff` shows where another one differs."""
    source = make_tiny()
    made = write_headers(source, "nvfp4-fp8-hybrid", tmp_path / "made")
    shown = CliRunner().invoke(app, ["plan", "--from", str(made)])
    assert "format: nvfp4" in shown.stdout, shown.stderr
    applied = CliRunner().invoke(app, ["plan", str(source), "--from", str(made), "-o", str(tmp_path / "recipe")])
    assert applied.exit_code == 0, applied.stderr
    assert load_recipe(tmp_path / "recipe" / "recipe.yaml").text == shown.stdout
    diff = CliRunner().invoke(app, ["plan", "--from", str(made), "--diff", "fp8-dynamic"])
    assert "mlp.down_proj" in diff.stdout
    document = json.loads(CliRunner().invoke(app, ["plan", "--from", str(made), "--diff", "nvfp4", "--json"]).stdout)
    assert document["schema"] == "snugfit.plan-differences/1"
    assert document["different"] == 12
    assert failed_with(CliRunner().invoke(app, ["plan", "--diff", str(made)]), "option-missing", "--diff")
    alone = (["--json"], ["--bytes", "1GB"], ["--dry-run", "-o", str(tmp_path / "x")], ["--diff", "nvfp4", "-o", "x"])
    for more, option in zip(alone, ("--json", "--bytes", "--dry-run", "--output-dir"), strict=True):
        result = CliRunner().invoke(app, ["plan", "--from", str(made), *more])
        assert failed_with(result, "option-conflict", option), more
    assert not (tmp_path / "x").exists()


def test_scores_of_fp8_that_did_not_follow_are_refused(model: Path, tmp_path: Path) -> None:
    """Weighted scores of FP8 beside 4 bits, made before FP8 followed, are refused; plain ones and FP8 alone not."""
    layout = read_layout(model)
    options: dict[str, Any] = {"bits_per_weight": 12.0, "prove": False}

    def use(formats: tuple[str, ...], **given: Any) -> None:
        file = save(replace(made_up_scores(layout, formats=formats), **given), tmp_path / f"{len(given)}{formats}.json")
        estimate_plan(model, timed=False, scores=file, **options)

    mixed, alone = ("nvfp4", "fp8-dynamic"), ("fp8-dynamic",)
    with raises("scores-mismatch", where="scores"):
        use(mixed, effort="weighted")
    use(mixed, effort="weighted", fp8_follows=True)
    use(mixed, effort="plain")
    use(alone, effort="weighted")
    two = [tmp_path / f"{fmt}.json" for fmt in mixed]
    for fmt, file in zip(mixed, two, strict=True):
        save(replace(made_up_scores(layout, formats=(fmt,)), effort="weighted"), file)
    with raises("scores-mismatch", where="scores"):
        estimate_plan(model, timed=False, scores=two, **options)


def test_a_set_is_held_out_text(model: Path, texts: dict[str, Any], tmp_path: Path) -> None:
    """`held_out` takes a set with all of its samples, and refuses lengths beside it by the names of `plan`."""
    write_rows(tmp_path / "rows.jsonl", 2)
    sources = "calibration_set:\n  datasets:\n    - {dataset: rows.jsonl, num_samples: 5, category: Rows}\n"
    (tmp_path / "set.yaml").write_text(sources, encoding="utf-8")
    options = {**texts, "held_out": tmp_path / "set.yaml", "bits_per_weight": 7.5}
    assert estimate_plan(model, timed=False, **options).held_out_tokens == 5 * 64
    for name, value, where in (("max_tokens", 64, "max_tokens"), ("held_out_contexts", 8, "held_out_contexts")):
        with raises("option-conflict", where=where) as error:
            estimate_plan(model, timed=False, **{**options, name: value})
        assert "max_chunks" not in error.value.remedy
    with raises("option-conflict"):
        estimate_plan(model, timed=False, **{**options, "held_out": [tmp_path / "set.yaml", tmp_path / "rows.jsonl"]})


def test_a_set_says_how_many_samples_are_scored(model: Path, tmp_path: Path) -> None:
    """Rows are cut from all samples of a set, at most of its length, and not from as many as plain files give."""
    lines = [json.dumps({"input_ids": [number + 3] * (40 if number else 64)}) + "\n" for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    sources = "calibration_set:\n  max_seq_length: 50\n  datasets:\n    - {dataset: rows.jsonl, num_samples: 30}\n"
    (tmp_path / "set.yaml").write_text(sources, encoding="utf-8")
    layout = read_layout(model)

    def drawn(file: str, **options: int) -> tuple[tuple[int, ...], int]:
        found = read_samples(layout, [tmp_path / file], num_tokens=39 * 30, **options)
        return found.edges, len({row.ids[-1] for row in found.rows})

    assert drawn("set.yaml") == ((40,), 30)
    assert drawn("set.yaml", context=20) == ((20,), 30)
    assert drawn("rows.jsonl") == ((40,), 16)
