"""From menus to mixes: exact bytes, the best mix by brute force, budgets, constraints, controls."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from helpers.fp8_sources import as_fp8
from helpers.plan_scores import made_up_scores, saturated
from helpers.plans import write_headers
from helpers.tiny_mixtures import make_mixture
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.planning.constraints import LoadedConstraints, load_constraints
from snugfit.planning.controls import find_controls, strongest
from snugfit.planning.explain import planned_groups
from snugfit.planning.fit import fit
from snugfit.planning.knapsack import Problem, Row, solve
from snugfit.planning.limits import Budget, context_beside, read_place
from snugfit.planning.search import Mix, least_amount, least_bytes, least_kl, make_mix, scored, simplest_near, within
from snugfit.planning.space import Choices, check_bytes, read_choices, recipe_of_mix
from snugfit.quantization.plan import lay_out
from snugfit.records.scores import KEEP, cache_of_layer

MakeTiny = Callable[..., Path]


def choices_of(layout: ModelLayout, constraints: LoadedConstraints | None = None, **budget: Any) -> Choices:
    """What may be chosen under a budget, all formats on the menu."""
    menu = budget.pop("menu", ("nvfp4", "nvfp4a16", "fp8-dynamic", "int4", "mxfp4", "fp8-block"))
    return read_choices(layout, read_place(layout, Budget(**budget)), menu, constraints)


def written_bytes(layout: ModelLayout, choices: Choices, mix: Mix) -> int:
    """Bytes of all tensors that a run of the mix's recipe would write."""
    recipe = recipe_of_mix(layout, mix.options, choices.space.menus, fp8_cache=mix.kv_cache == "fp8")
    return lay_out(layout, recipe).bytes


# --- bytes


@pytest.mark.parametrize("model", ["dense", "tied", "fp8", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_planned_bytes_are_the_bytes_that_are_written(model: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Whatever is chosen, the sum of the groups and of what lies outside is what the recipe writes."""
    if model in ("dense", "tied"):
        folder = make_tiny(hidden_size=128, intermediate_size=256, tie_word_embeddings=model == "tied")
    elif model == "fp8":
        as_fp8(make_tiny(hidden_size=128, intermediate_size=256), tmp_path / "fp8", "hf-block")
        folder = tmp_path / "fp8"
    else:
        folder = make_mixture(model, tmp_path / model)
    layout = read_layout(folder)
    choices = choices_of(layout, bytes=10**9, menu=())
    rng = random.Random(model)  # noqa: S311  # not for secrets
    for _ in range(4):
        options = {menu.group.name: rng.choice(menu.options) for menu in choices.space.menus}
        if all(one.format == KEEP for one in options.values()):
            continue
        mix = make_mix(options, KEEP, choices.space.outside[KEEP], None, 1)
        assert written_bytes(layout, choices, mix) == mix.bytes.file
        check_bytes(layout, mix, recipe_of_mix(layout, options, choices.space.menus, fp8_cache=False))


def test_each_gpu_holds_what_fit_says(make_tiny: MakeTiny) -> None:
    """Bytes on each of two GPUs, bits a weight and the longest context are those of `fit` for the same recipe."""
    folder = make_tiny(hidden_size=128, intermediate_size=256)
    layout = read_layout(folder)
    choices = choices_of(layout, gpu="16GiB", context=256, tensor_parallel_size=2)
    scores = made_up_scores(layout)
    controls = find_controls(layout, choices.everything, choices.space, scores, 256)
    record = fit(folder, "16GiB", context=256, tensor_parallel_size=2)
    for row in record.rows:
        for control in controls:
            if control.recipe in row.recipes and control.mix.kv_cache == KEEP:
                assert control.mix.bytes.gpu == row.bytes_per_gpu
                assert control.mix.bytes.served == row.bytes
                assert context_beside(choices.place, control.mix.bytes.gpu, fp8=False) == row.caches[0].max_context
    assert {control.recipe for control in controls} >= {"nvfp4-fp8-hybrid", "fp8-dynamic", "fp8-dynamic-fp8kv"}


def test_a_disk_holds_headers_and_other_files(make_tiny: MakeTiny) -> None:
    """The bytes that count against a disk are not less than those of the planned files, and hardly more."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    choices = choices_of(layout, disk=500_000)
    (mix,) = least_kl(choices.space, made_up_scores(layout), 512)
    recipe = recipe_of_mix(layout, mix.options, choices.space.menus, fp8_cache=False)
    files = sum(shard.bytes for shard in lay_out(layout, recipe).shards)
    counted = choices.space.limits[KEEP][0].amount(mix.bytes)
    assert files <= counted <= files + 400 * len(layout.weights.tensors) * 4


# --- search


def all_mixes(choices: Choices, cache: str = KEEP) -> list[Mix]:
    """Every mix of a small space."""
    names = [menu.group.name for menu in choices.space.menus]
    products = itertools.product(*(menu.options for menu in choices.space.menus))
    return [
        make_mix(dict(zip(names, options, strict=True)), cache, choices.space.outside[cache], None, 512)
        for options in products
    ]


def test_the_best_of_all_mixes_is_found(make_tiny: MakeTiny) -> None:
    """Brute force over all mixes of one layer: the same KL at every budget, two buckets and saturation included."""
    layout = read_layout(make_tiny(num_hidden_layers=1, hidden_size=128, intermediate_size=256))
    scores = made_up_scores(layout, ceiling=0.2, grows={"qkv": 3.0, "down": 0.3})
    choices = choices_of(layout, bytes=10**9, menu=("nvfp4", "fp8-dynamic", "int4"))
    mixes = all_mixes(choices)
    kl = {id(mix): scores.predict({n: one.format for n, one in mix.options.items()}, 512).kl for mix in mixes}
    sizes = sorted({mix.bytes.file for mix in mixes})
    for size in sizes[:: max(1, len(sizes) // 12)]:
        limited = choices_of(layout, bytes=size, menu=("nvfp4", "fp8-dynamic", "int4"))
        (found,) = least_kl(limited.space, scores, 512)
        best = min(kl[id(mix)] for mix in mixes if mix.bytes.file <= size)
        assert found.predicted.kl == pytest.approx(best, rel=1e-5)
        assert found.bytes.file <= size


def test_the_smallest_mix_under_a_kl_is_found(make_tiny: MakeTiny) -> None:
    """The reverse, by brute force: no smaller mix has at most that KL."""
    layout = read_layout(make_tiny(num_hidden_layers=1, hidden_size=128, intermediate_size=256))
    scores = made_up_scores(layout, edges=(512,), ceiling=0.5)
    choices = choices_of(layout, max_kl=1.0, menu=("nvfp4", "fp8-dynamic", "int4"))
    mixes = all_mixes(choices)
    kl = {id(mix): scores.predict({n: one.format for n, one in mix.options.items()}, 512).kl for mix in mixes}
    for most in (1e-4, 0.01, 0.05, 0.1, 0.3):
        found = least_bytes(choices.space, scores, 512, most)
        assert found is not None
        assert found.predicted.kl <= most * (1 + 1e-5)
        assert found.bytes.file == min(mix.bytes.file for mix in mixes if kl[id(mix)] <= most)


def test_buckets_of_positions_decide(make_tiny: MakeTiny) -> None:
    """Where attention's costs grow with position and others' fall, a long context gives attention more bits."""
    layout = read_layout(make_tiny(num_hidden_layers=4, hidden_size=128, intermediate_size=128))
    scores = made_up_scores(layout, edges=(64, 4096), grows={"qkv": 8.0, "o": 8.0, "gate_up": 0.1, "down": 0.1})
    size = max(mix.bytes.file for mix in least_kl(choices_of(layout, bits_per_weight=9.0).space, scores, 64))
    space = choices_of(layout, bytes=size, menu=("nvfp4", "fp8-dynamic")).space

    def attention_bytes(context: int) -> int:
        (mix,) = least_kl(space, scores, context)
        return sum(one.bytes.file for name, one in mix.options.items() if "self_attn" in name)

    assert attention_bytes(4096) > attention_bytes(64)


def test_the_next_best_differ(make_tiny: MakeTiny) -> None:
    """The k best come in order of KL, and each differs from the others in as many groups as asked."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    choices = choices_of(layout, bits_per_weight=9.0)
    found = least_kl(choices.space, made_up_scores(layout), 512, count=4, distance=2)
    assert len(found) == 4
    assert [mix.predicted.kl for mix in found] == sorted(mix.predicted.kl for mix in found)
    for a, b in itertools.combinations(found, 2):
        assert sum(a.options[name] != b.options[name] for name in a.options) >= 2
    again = least_kl(choices.space, made_up_scores(layout), 512, count=4, distance=2)
    assert [mix.formats for mix in again] == [mix.formats for mix in found]


def test_an_fp8_cache_and_weights_share_one_budget(make_tiny: MakeTiny) -> None:
    """A cheap FP8 cache is taken where its memory buys weights more bits, an expensive one is not."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256, max_position_embeddings=2**24))
    budget: dict[str, Any] = {"gpu": "16GiB", "context": 16_000_000}
    choices = choices_of(layout, **budget)
    assert set(choices.space.limits) == {KEEP, "fp8"}
    caches = []
    for price in (1e-6, 50.0):
        scores = made_up_scores(layout, cache=price, ceiling=1000.0)
        space = choices.space
        tight = {
            cache: tuple(replace(limit, bytes=650_000 + (300_000 if cache == "fp8" else 0)) for limit in limits)
            for cache, limits in space.limits.items()
        }
        caches.append(least_kl(space.with_limits(tight), scores, 512)[0].kv_cache)
    assert caches == ["fp8", KEEP]


def test_the_costliest_layers_of_an_fp8_cache_may_keep_16_bits(make_tiny: MakeTiny) -> None:
    """Layers whose FP8 cache costs most keep 16 bits where that costs less than what their bytes do for weights."""
    layout = read_layout(make_tiny(num_hidden_layers=4, hidden_size=128, max_position_embeddings=2**24))
    scores = made_up_scores(layout, cache=1.0, cache_of_layers=(0.1, 0.05, 0.7, 0.15), ceiling=1000.0)
    choices = choices_of(layout, gpu="16GiB", context=4_000_000).with_mixed_caches(scores, 512)
    one, two = "fp8 except layers 2", "fp8 except layers 2, 3"
    assert set(choices.space.limits) == {KEEP, "fp8", one, two}
    most = {cache: limits[0].bytes for cache, limits in choices.space.limits.items()}
    a_layer = 4_000_000 * layout.config["num_key_value_heads"] * layout.config["hidden_size"] // 4 * 2
    assert most["fp8"] - most[one] == pytest.approx(a_layer, rel=1e-3)
    assert most["fp8"] - most[two] == pytest.approx(2 * a_layer, rel=1e-3)
    assert choices.at(1000).limits[one][0].bytes > most[one]

    def best(sizes: Mapping[str, int]) -> Mix:
        limits = {
            cache: tuple(replace(limit, bytes=sizes[cache]) for limit in choices.space.limits[cache]) for cache in sizes
        }
        outside = {cache: choices.space.outside[cache] for cache in sizes}
        return least_kl(replace(choices.space, limits=limits, outside=outside), scores, 512)[0]

    plenty = dict.fromkeys((KEEP, "fp8", one, two), 700_000)
    assert best(plenty).kv_cache == KEEP
    del plenty[KEEP]
    found = best(plenty)
    assert found.kv_cache == two
    assert found.kept_caches == (2, 3)
    weights = {name: option.format for name, option in found.options.items()}
    expected = scores.predict(weights | {cache_of_layer(0): "fp8", cache_of_layer(1): "fp8"}, 512)
    assert found.predicted.kl == pytest.approx(expected.kl)
    least = least_amount(choices.space, choices.space.limits[two][0], two) or 0
    weights_cost = best({two: least}).predicted.kl - 0.15
    assert weights_cost > 0.15
    assert best(plenty | {two: least}).kv_cache == one


def test_layers_keep_16_bits_only_where_it_is_known(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Not beside windows, where one cache is demanded, under an engine without the option, or without their scores."""
    layout = read_layout(make_tiny(num_hidden_layers=4, max_position_embeddings=2**24))
    scores = made_up_scores(layout, cache=1.0, cache_of_layers=(0.25,) * 4)
    gpu: dict[str, Any] = {"gpu": "16GiB", "context": 4_000_000}
    windows = read_layout(make_tiny("mistral", num_hidden_layers=4, sliding_window=64, max_position_embeddings=2**24))
    demanded = constraints(tmp_path, "kv_cache: fp8")
    for choices, word in (
        (choices_of(windows, **gpu), "windows"),
        (choices_of(layout, demanded, **gpu), "asked for"),
        (choices_of(layout, engine="vllm-0.24", **gpu), "engine"),
        (choices_of(layout, bytes=10**9), "GPU"),
    ):
        assert word in choices.why_not_mixed()
        assert choices.with_mixed_caches(scores, 512) is choices
    unscored = choices_of(layout, **gpu).with_mixed_caches(made_up_scores(layout), 512)
    assert set(unscored.space.limits) == {KEEP, "fp8"}


def test_labels_are_limited() -> None:
    """With at most one format other than the free one, no choice uses two."""
    problem = Problem(
        costs=((0.0, 5.0, 9.0), (5.0, 0.0, 9.0)),
        rows=(Row(amounts=((1, 1, 4), (1, 1, 4)), limit=5),),
        labels=(("a", "b", "keep"), ("a", "b", "keep")),
        free="keep",
    )
    assert solve(problem) == (0, 1)
    limited = replace(problem, max_labels=1)
    found = solve(limited)
    assert found in {(0, 0), (1, 1)}
    assert solve(replace(problem, rows=(Row(amounts=((1, 1, 4), (1, 1, 4)), limit=1),))) is None


def test_random_knapsacks_are_solved_exactly() -> None:
    """Small problems with bytes, formats and cuts: the same cost as trying every choice."""
    rng = random.Random(3)  # noqa: S311  # not for secrets
    for _ in range(25):
        groups = rng.randint(1, 5)
        costs = tuple(tuple(rng.random() for _ in range(3)) for _ in range(groups))
        amounts = tuple(tuple(64 * rng.randint(1, 10**6) for _ in range(3)) for _ in range(groups))
        limit = rng.randint(sum(map(min, amounts)) - 100, sum(map(max, amounts)))
        problem = Problem(
            costs=costs,
            rows=(Row(amounts=amounts, limit=limit),),
            labels=(("a", "b", "c"),) * groups,
            max_labels=rng.choice((None, 2)),
            free="c",
        )
        fitting = [
            sum(group[place] for group, place in zip(costs, places, strict=True))
            for places in itertools.product(range(3), repeat=groups)
            if sum(group[place] for group, place in zip(amounts, places, strict=True)) <= limit
        ]
        found = solve(problem)
        assert (found is None) == (not fitting)
        if found is not None:
            cost = sum(group[place] for group, place in zip(costs, found, strict=True))
            assert cost == pytest.approx(min(fitting), abs=1e-5)


# --- budgets


def test_a_gpu_leaves_the_context(make_tiny: MakeTiny) -> None:
    """A plan for a GPU keeps its limit, and the context fits beside it, as `fit` counts."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    choices = choices_of(layout, gpu="RTX 5060 Ti 16GB", context=512)
    (mix,) = least_kl(choices.space, made_up_scores(layout), 512)
    assert within(mix, choices.space.limits[mix.kv_cache])
    assert (context_beside(choices.place, mix.bytes.gpu, fp8=False) or 0) >= 512


@pytest.mark.parametrize(
    ("budget", "where", "code"),
    [
        ({}, "gpu", "option-missing"),
        ({"gpu": "16GiB"}, "context", "option-missing"),
        ({"bytes": 0}, "bytes", "option-invalid"),
        ({"bits_per_weight": math.nan}, "bits_per_weight", "option-invalid"),
        ({"max_kl": -1.0}, "max_kl", "option-invalid"),
        ({"bytes": 1, "context": 0}, "context", "option-invalid"),
        ({"bytes": 1, "engine": "sglang"}, "engine", "option-conflict"),
        ({"gpu": "16GiB", "context": 10**6}, "context", "sequence-too-long"),
        ({"gpu": "a toaster", "context": 64}, "gpu", "option-invalid"),
    ],
)
def test_budgets_that_mean_nothing(budget: dict[str, Any], where: str, code: str, make_tiny: MakeTiny) -> None:
    """A missing budget, values out of range and arguments without effect are refused by name."""
    with raises(code, where=where):
        read_place(read_layout(make_tiny()), Budget(**budget))


@pytest.mark.parametrize(
    "budget", [{"bytes": 1000}, {"bits_per_weight": 1.0}, {"bits_per_weight": 1e-9}, {"disk": 5000}]
)
def test_impossible_budgets_name_the_nearest_that_works(budget: dict[str, Any], make_tiny: MakeTiny) -> None:
    """The error says what is missing, and the value that it names works."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    choices = choices_of(layout, **budget)
    scores = made_up_scores(layout)
    assert least_kl(choices.space, scores, 512) == []
    error = choices.impossible()
    (name,) = budget
    assert (error.code, error.where) == ("plan-impossible", name)
    value = float(error.remedy.partition(f"{name}=")[2].partition("`")[0])
    nearest: dict[str, Any] = {name: value if name == "bits_per_weight" else int(value)}
    works = choices_of(layout, **nearest)
    assert len(least_kl(works.space, scores, 512)) == 1
    if name != "bits_per_weight":
        assert least_kl(choices_of(layout, **{**nearest, name: int(value) - 64}).space, scores, 512) == []


def test_what_works_works_beside_constraints_and_other_limits(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """The nearest value counts few formats and another limit; of a model that is least as it is none is named."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    scores, few = made_up_scores(layout), constraints(tmp_path, "max_formats: 1")

    def value_of(choices: Choices, name: str) -> int:
        return int(choices.impossible().remedy.partition(f"{name}=")[2].partition("`")[0])

    for beside in ({}, {"disk": 450_000}):
        works = value_of(choices_of(layout, few, bytes=1000, **beside), "bytes")
        assert least_kl(choices_of(layout, few, bytes=works, **beside).space, scores, 512)
        assert not least_kl(choices_of(layout, few, bytes=works - 64, **beside).space, scores, 512)
    assert works > value_of(choices_of(layout, bytes=1000), "bytes")
    two = constraints(tmp_path, "max_formats: 1\nrules:\n  - {role: o, format: int4}\n  - {role: q, format: nvfp4}\n")
    error = choices_of(layout, two, max_kl=1.0).impossible()
    assert (error.code, error.where) == ("plan-impossible", "constraints")
    assert "()" not in error.what
    tied = make_tiny(hidden_size=128, intermediate_size=256, tie_word_embeddings=True)
    made = read_layout(write_headers(tied, "nvfp4", tmp_path / "made"))
    error = choices_of(made, menu=("fp8-dynamic",), bytes=1000).impossible()
    assert "smaller than it is" in error.remedy


def test_a_gpu_that_is_too_small_names_the_context_that_works(make_tiny: MakeTiny) -> None:
    """Where weights fit and the context does not, the longest context that fits is named."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256, max_position_embeddings=2**26))
    choices = choices_of(layout, gpu="16GiB", context=2**26)
    assert least_kl(choices.space, made_up_scores(layout), 512) == []
    error = choices.impossible()
    assert error.where == "gpu"
    context = int(error.remedy.partition("context=")[2].partition("`")[0])
    assert least_kl(choices_of(layout, gpu="16GiB", context=context).space, made_up_scores(layout), 512)


def test_a_cache_that_stays_in_fp8_counts_as_fp8(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Of a source with an FP8 cache of its own the context is named that its cache leaves room for, not half of it."""
    longest = 2**26
    made = make_tiny(hidden_size=128, intermediate_size=256, max_position_embeddings=longest)
    layout = read_layout(write_headers(made, "fp8-dynamic-fp8kv", tmp_path / "source"))
    choices = choices_of(layout, gpu="16GiB", context=longest)
    assert choices.fp8_kept
    error = choices.impossible()
    context = int(error.remedy.partition("context=")[2].partition("`")[0])
    least = least_amount(choices.space, choices.space.limits[KEEP][0], KEEP) or 0
    assert context == context_beside(choices.place, least, fp8=True)
    assert context > (context_beside(choices.place, least, fp8=False) or 0)


def test_limits_that_hold_one_by_one_and_not_together_are_named(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Where each limit has a mix of its own and all together none, they are named, and constraints only if given."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    one = choices_of(layout, bytes=1 << 40, disk=1 << 40)
    other = choices_of(layout, constraints(tmp_path, "max_formats: 1"), bytes=1 << 40, disk=1 << 40)
    for choices, where in ((one, "bytes"), (other, "constraints")):
        error = choices.impossible()
        assert (error.code, error.where) == ("plan-impossible", where)
        assert "(bytes, disk)" in error.what
        assert ("constraints" in error.what) == (where == "constraints")


# --- menus


def test_a_format_without_a_kernel_is_not_on_the_menu(make_tiny: MakeTiny) -> None:
    """SGLang has no linear kernel for MXFP4, and vLLM's NVFP4 there is NVFP4A16; a refusal has its reason."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    sglang = choices_of(layout, gpu="H100", context=256, engine="sglang").space.menus[0]
    assert "kernel" in sglang.refused["mxfp4"]
    assert sglang.option("nvfp4").arithmetic == "W4A16"
    vllm = choices_of(layout, gpu="H100", context=256, menu=()).space.menus[0]
    assert [one.format for one in vllm.options] == [KEEP, "nvfp4", "fp8-dynamic", "int4", "mxfp4"]
    assert vllm.option("nvfp4").arithmetic == "W4A16"
    blackwell = choices_of(layout, gpu="RTX 5090", context=256, menu=()).space.menus[0]
    assert {"nvfp4", "nvfp4a16"} <= {one.format for one in blackwell.options}


def test_codes_of_the_source_under_another_name_are_not_on_the_menu(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """NVFP4 codes are kept by `keep` alone: a recipe that calls them NVFP4A16 would change nothing."""
    made = make_tiny(hidden_size=128, intermediate_size=256)
    choices = choices_of(read_layout(write_headers(made, "nvfp4", tmp_path / "source")), max_kl=1.0)
    inside = [menu for menu in choices.space.menus if menu.group.layer is not None]
    assert all(one.format not in ("nvfp4", "nvfp4a16") for menu in inside for one in menu.options)
    assert "source's own codes" in inside[0].refused["nvfp4a16"]
    with raises("plan-impossible", where="menu") as error:
        choices_of(read_layout(made), menu=("keep",), bytes=1)
    assert "none but keep" in error.value.what


def test_weights_that_engines_look_up_for_all_layers_at_once(make_tiny: MakeTiny) -> None:
    """A state space beside attention has one format in all layers, in mixes and in controls: their recipes run."""
    mamba = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_n_heads": 4}
    layout = read_layout(make_tiny("falcon_h1", mamba_expand=1, head_dim=16, pad_token_id=0, **mamba))
    scores = made_up_scores(layout, edges=(64,))
    choices = choices_of(layout, menu=("nvfp4", "fp8-dynamic"), bits_per_weight=8.0)
    together = [one for one in choices.space.decisions if "mamba" in one.menus[0].group.name]
    assert [len(one.menus) for one in together] == [layout.num_layers] * 2
    mixes = least_kl(choices.space, scores, 64, count=3)
    controls = find_controls(layout, choices.everything, choices.space, scores, 64)
    assert any(control.kind == "byte-matched" for control in controls)
    for mix in (*mixes, *(control.mix for control in controls if control.fits)):
        recipe = recipe_of_mix(layout, mix.options, choices.everything, fp8_cache=False)
        assert lay_out(layout, recipe).bytes == mix.bytes.file
        check_bytes(layout, mix, recipe)


def test_codes_of_the_source_are_free(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """FP8 of the source is kept under `keep`, and no second FP8 is offered."""
    as_fp8(make_tiny(hidden_size=128, intermediate_size=256), tmp_path / "fp8", "hf-block")
    menus = choices_of(read_layout(tmp_path / "fp8"), bytes=10**9).space.menus
    inside = [menu for menu in menus if menu.group.layer is not None]
    assert {menu.option(KEEP).label for menu in inside} == {"fp8-block"}
    assert not any(one.format.startswith("fp8") for menu in inside for one in menu.options)


def test_a_menu_without_an_allowed_format(make_tiny: MakeTiny) -> None:
    """Shapes that no format of the menu allows, and unknown formats, are refused."""
    layout = read_layout(make_tiny(hidden_size=72, intermediate_size=72, head_dim=18))
    with raises("plan-impossible", where="menu"):
        choices_of(layout, bytes=10**9, menu=("mxfp4",))
    with raises("option-invalid", where="menu"):
        choices_of(layout, bytes=10**9, menu=("fp6",))


# --- constraints


def constraints(folder: Path, text: str) -> LoadedConstraints:
    file = folder / "constraints.yaml"
    file.write_text(text, encoding="utf-8")
    return load_constraints(file)


def formats_by_role(mix: Mix, choices: Choices) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = {}
    for menu in choices.space.menus:
        found.setdefault(menu.group.role, set()).add(mix.options[menu.group.name].format)
    return found


def test_constraints_hold(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Formats that are demanded, forbidden and limited in number: the plan keeps to all of it."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    loaded = constraints(
        tmp_path,
        "max_formats: 2\nkv_cache: keep\nrules:\n- {role: q, format: [fp8-dynamic, keep]}\n"
        "- {role: mlp, layers: -1, format: keep}\n- {role: linear, not: nvfp4a16}\n",
    )
    choices = choices_of(layout, loaded, bits_per_weight=9.5)
    (mix,) = least_kl(choices.space, made_up_scores(layout), 512)
    by_role = formats_by_role(mix, choices)
    assert by_role["qkv"] <= {"fp8-dynamic", KEEP}
    assert mix.options["model.layers.2.mlp.down_proj"].format == KEEP
    used = {one.format for one in mix.options.values()} - {KEEP}
    assert len(used) <= 2
    assert "nvfp4a16" not in used
    assert any("constraints.yaml:6" in reason for menu in choices.space.menus for reason in menu.refused.values())


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("rules:\n- {role: down, formt: keep}", "recipe-invalid", "constraints.yaml:2: rules[0].formt"),
        ("rules:\n- {role: down}", "recipe-invalid", "constraints.yaml:2: rules[0]"),
        ("rules:\n- {format: keep}", "recipe-invalid", "constraints.yaml:2: rules[0]"),
        ("rules:\n- {role: down, not: fp7}", "recipe-invalid", "constraints.yaml:2: rules[0].not"),
        ("max_formats: 0", "recipe-invalid", "constraints.yaml:1: max_formats"),
        ("run_length: 0", "recipe-invalid", "constraints.yaml:1: run_length"),
        ("run_length: 2.5", "recipe-invalid", "constraints.yaml:1: run_length"),
        ("- 1", "recipe-invalid", "constraints.yaml"),
        ("max_formats: [", "yaml-invalid", "constraints.yaml"),
        ("rules:\n- {role: experts, format: keep}", "recipe-rule-unmatched", "constraints.yaml:2: rules[0]"),
        (
            "rules:\n- {role: down, format: nvfp4}\n- {role: mlp, not: nvfp4}",
            "plan-impossible",
            "constraints.yaml:3: rules[1]",
        ),
    ],
)
def test_constraints_that_cannot_be(text: str, code: str, where: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Each mistake is named with its file, line and key."""
    with raises(code) as error:
        choices_of(read_layout(make_tiny()), constraints(tmp_path, text), bytes=10**9)
    assert where in error.value.where


def test_the_best_mix_in_runs_of_layers_is_found(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """With `run_length` runs of layers, the last one shorter, have one format at each place: the best of all such."""
    layout = read_layout(make_tiny(num_hidden_layers=3, hidden_size=128, intermediate_size=256))
    loaded = constraints(
        tmp_path, "run_length: 2\nrules:\n- {role: lm_head, format: keep}\n- {role: linear, not: keep}"
    )
    scores = made_up_scores(layout, grows={"qkv": 3.0, "down": 0.3})
    menu = ("nvfp4", "fp8-dynamic")
    choices = choices_of(layout, loaded, bytes=10**9, menu=menu)
    assert [one.layers for one in choices.space.decisions if "down" in one.menus[0].group.name] == ["0..1", "2"]
    mixes = []
    for formats in itertools.product(*(one.formats for one in choices.space.decisions)):
        options: dict[str, Any] = {}
        for decision, fmt in zip(choices.space.decisions, formats, strict=True):
            options |= decision.options(fmt)
        mixes.append(make_mix(options, KEEP, choices.space.outside[KEEP], scores, 512))
    assert len(mixes) == 2**8
    sizes = sorted({mix.bytes.file for mix in mixes})
    for size in sizes[:: max(1, len(sizes) // 8)]:
        limited = choices_of(layout, loaded, bytes=size, menu=menu)
        (found,) = least_kl(limited.space, scores, 512)
        assert found.predicted.kl == pytest.approx(min(m.predicted.kl for m in mixes if m.bytes.file <= size), rel=1e-5)
        assert found.bytes.file <= size
        assert written_bytes(layout, limited, found) == found.bytes.file
        for decision in limited.space.decisions:
            assert len({found.options[one.group.name].format for one in decision.menus}) == 1
    free = choices_of(layout, bytes=sizes[len(sizes) // 2], menu=menu)
    assert least_kl(free.space, scores, 512)[0].predicted.kl < min(
        m.predicted.kl for m in mixes if m.bytes.file <= sizes[len(sizes) // 2]
    )


def test_what_one_layer_cannot_have_its_run_cannot(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A rule on one layer holds for its run, and says so; runs without a common format are refused with their place."""
    layout = read_layout(make_tiny(num_hidden_layers=4))
    loaded = constraints(tmp_path, "run_length: 2\nrules:\n- {role: down, layers: 1, not: nvfp4}")
    menus = {menu.group.name: menu for menu in choices_of(layout, loaded, bytes=10**9).space.menus}
    for layer in range(4):
        menu = menus[f"model.layers.{layer}.mlp.down_proj"]
        assert ("nvfp4" in [one.format for one in menu.options]) == (layer > 1)
        assert ("layers 0..1" in menu.refused.get("nvfp4", "")) == (layer == 0)
    impossible_runs = constraints(
        tmp_path,
        "run_length: 2\nrules:\n- {role: down, layers: 0, format: keep}\n- {role: down, layers: 1, format: nvfp4}",
    )
    with raises("plan-impossible", where=str(tmp_path / "constraints.yaml")) as error:
        choices_of(layout, impossible_runs, bytes=10**9)
    assert "0..1" in error.value.what


def test_controls_in_runs_of_layers(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Where runs have one format, the byte-matched controls are of whole runs, and the reasons speak of runs."""
    layout = read_layout(make_tiny(num_hidden_layers=6, hidden_size=128, intermediate_size=256))
    scores = made_up_scores(layout)
    choices = choices_of(layout, constraints(tmp_path, "run_length: 2"), bits_per_weight=9)
    controls = [one for one in find_controls(layout, choices.everything, choices.space, scores, 512) if one.fits]
    matched = [one for one in controls if one.kind == "byte-matched"]
    assert matched
    assert all("runs of 2 layers" in one.name for one in matched)
    for one in matched:
        for decision in choices.space.decisions:
            assert len({one.mix.options[menu.group.name].format for menu in decision.menus}) == 1
    (mix,) = least_kl(choices.space, scores, 512)
    groups = planned_groups(choices.space, scores, mix)
    assert all("layers 2..3 together" in group.why for group in groups if group.layer in (2, 3))
    assert (least_amount(choices.space, choices.space.limits[KEEP][0], KEEP) or 0) <= mix.bytes.served


def test_a_simpler_mix_is_near_the_best(make_tiny: MakeTiny) -> None:
    """The longest runs of layers within 10 % of the least expected KL are found, or runs of two; none of one layer."""
    layout = read_layout(make_tiny(num_hidden_layers=8, hidden_size=128, intermediate_size=256))
    scores = made_up_scores(layout)
    choices = choices_of(layout, bits_per_weight=9)
    (best,) = least_kl(choices.space, scores, 512)
    found = simplest_near(choices.space, scores, best)
    assert found is not None
    length, simple = found
    assert within(simple, choices.space.limits[KEEP])
    assert simple.predicted.kl >= best.predicted.kl * (1 - 1e-6)
    assert length == 2 or simple.predicted.kl <= 1.1 * best.predicted.kl
    for decision in replace(choices.space, run_length=length).decisions:
        assert len({simple.options[menu.group.name].format for menu in decision.menus}) == 1
    single = choices_of(read_layout(make_tiny(num_hidden_layers=1)), bits_per_weight=9)
    one = made_up_scores(single.layout)
    assert simplest_near(single.space, one, least_kl(single.space, one, 512)[0]) is None


# --- controls


def test_controls_fill_the_budget(make_tiny: MakeTiny) -> None:
    """Between two built-in recipes lies a mix that fills the limit to a layer; the strongest one is the control."""
    layout = read_layout(make_tiny(num_hidden_layers=6, hidden_size=128, intermediate_size=256))
    scores = made_up_scores(layout)
    free = choices_of(layout, bytes=10**9)
    sizes = {c.name: c.mix.bytes.file for c in find_controls(layout, free.everything, free.space, scores, 512)}
    limit = (2 * sizes["nvfp4"] + sizes["fp8-dynamic"]) // 3
    choices = choices_of(layout, bytes=limit)
    found = find_controls(layout, choices.everything, choices.space, scores, 512)
    matched = next(c for c in found if c.name == "fp8-dynamic in 2 of 6 layers, nvfp4 in the others")
    assert matched.kind == "byte-matched"
    assert matched.mix.bytes.file <= limit
    upgraded = {name.split(".")[2] for name, one in matched.mix.options.items() if one.format == "fp8-dynamic"}
    assert upgraded == {"1", "4"}
    best = strongest(found)
    assert best is not None
    assert best.fits
    assert best.mix.predicted.kl == min(c.mix.predicted.kl for c in found if c.fits)
    (plan,) = least_kl(choices.space, scores, 512)
    assert plan.predicted.kl <= best.mix.predicted.kl
    assert strongest([c for c in found if not c.fits]) is None


def test_formats_without_scores_are_left_out(make_tiny: MakeTiny) -> None:
    """A format that was not scored is off the menu with the reason; a group without any score is an error."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    scores = made_up_scores(layout, formats=("nvfp4", "fp8-dynamic"), cache=None)
    space = scored(choices_of(layout, gpu="16GiB", context=256).space, scores)
    assert set(space.limits) == {KEEP}
    assert space.menus[0].refused["int4"] == "it was not scored"
    other = choices_of(layout, bytes=10**9, menu=("int4",)).space
    only = tuple(replace(menu, options=menu.options[1:]) for menu in other.menus if len(menu.options) > 1)
    narrow = replace(other, menus=only)
    with raises("scores-mismatch", where="scores"):
        scored(narrow, scores)


def test_saturation_is_the_formula(make_tiny: MakeTiny) -> None:
    """A mix's expected KL is c (1 - exp(-b / c)) of its groups' sum where there is one bucket."""
    layout = read_layout(make_tiny(hidden_size=128, intermediate_size=256))
    scores = made_up_scores(layout, edges=(512,), ceiling=0.3)
    choices = choices_of(layout, bytes=10**9)
    options = {menu.group.name: menu.options[-1] for menu in choices.space.menus}
    mix = make_mix(options, KEEP, choices.space.outside[KEEP], scores, 512)
    total = math.fsum(scores.cost(name, one.format, 512) for name, one in options.items())
    assert mix.predicted.kl == pytest.approx(saturated(total, 0.3))
