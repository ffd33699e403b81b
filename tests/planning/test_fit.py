"""`fit`: its answers on real shapes, agreement with the plan, bounded work, and clear errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.fp8_sources import Kind, as_fp8, as_mxfp4
from helpers.real_configs import GEMMA3_27B, LLAMA_8B, NEMO, QWEN3_NEXT_80B
from helpers.sparse_models import Tensor, deepseek_v3, minimax_m2, write_sparse_model
from helpers.tiny_mixtures import make_mixture
from snugfit.cli.app import app
from snugfit.errors import UserError
from snugfit.model.layout import read_layout
from snugfit.planning.fit import fit
from snugfit.quantization.plan import Plan, lay_out
from snugfit.recipes.recipe import builtin_names, load_recipe
from snugfit.records.fit import FitRow
from snugfit.vram.weights import is_served

TESTS = Path(__file__).parents[1]
CARD = "RTX 5060 Ti 16GB"
MakeTiny = Callable[..., Path]
DENSE = [name for name in builtin_names() if "-moe" not in name]


class Giant(NamedTuple):
    """A model of true size, the GPUs that it is split over, and the recipes that are refused for it."""

    build: Callable[[Path], Path]
    tp: int
    refused: frozenset[str]


def dense_tensors(config: dict[str, Any], dtype: str = "BF16") -> list[Tensor]:
    """Tensors of a Llama-like model of that shape."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    linears = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    found: list[Tensor] = [("model.embed_tokens.weight", dtype, (vocabulary, hidden))]
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        found += [(f"{base}.self_attn.{name}_proj.weight", dtype, shape) for name, shape in linears.items()]
        found += [(f"{base}.mlp.{name}_proj.weight", dtype, shape) for name, shape in mlp.items()]
        norms = ("input_layernorm", "post_attention_layernorm")
        found += [(f"{base}.{name}.weight", dtype, (hidden,)) for name in norms]
    return [*found, ("model.norm.weight", dtype, (hidden,)), ("lm_head.weight", dtype, (vocabulary, hidden))]


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral-Nemo in true size, its weights holes."""
    return write_sparse_model(tmp_path_factory.mktemp("nemo") / "nemo", NEMO, dense_tensors(NEMO))


@pytest.fixture(scope="module")
def hybrid(nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `nvfp4-fp8-hybrid` would write it."""
    plan = plan_of(nemo, "nvfp4-fp8-hybrid")
    tensors = [(info.name, info.dtype, info.shape) for infos in plan.outputs.values() for info in infos]
    return write_sparse_model(tmp_path_factory.mktemp("hybrid") / "hybrid", dict(plan.config), tensors)


def row_of(rows: tuple[FitRow, ...], name: str) -> FitRow:
    return next(row for row in rows if row.name == name or name in row.recipes)


def plan_of(model: Path, recipe: str) -> Plan:
    """The plan of a run that quantizes the model."""
    return lay_out(read_layout(model), load_recipe(recipe))


def run(*arguments: object) -> Any:
    """The result of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


# --- answers


def test_the_first_seed(nemo: Path) -> None:
    """The seed's hybrid: 9.74e9 bytes, 160 KiB a token; on its card 32k fit Aphrodite for a single user, not vLLM."""
    record = fit(nemo, CARD, context=32768, engine="aphrodite")
    row = row_of(record.rows, "nvfp4-fp8-hybrid")
    assert row.bytes == row.bytes_per_gpu == pytest.approx(9.74e9, rel=0.002)
    assert [cache.bytes_per_token for cache in row.caches] == [160 * 1024, 80 * 1024]
    assert row.caches[0].fits
    vllm = row_of(fit(nemo, CARD, context=32768, engine="vllm").rows, "nvfp4-fp8-hybrid")
    assert [cache.fits for cache in vllm.caches] == [False, True]


def test_order_is_the_answer(nemo: Path) -> None:
    """Rows that fit come first, by bits; then the others by missing memory; every recipe for dense models has a row."""
    record = fit(nemo, CARD, context=32768)
    fits = [row for row in record.rows if row.fits]
    assert record.rows[: len(fits)] == tuple(fits)
    bits = [round(row.bits_per_weight or 0, 2) for row in fits]
    assert bits == sorted(bits, reverse=True)
    missing = [-max(cache.headroom_bytes for cache in row.caches) for row in record.rows[len(fits) :]]
    assert missing == sorted(missing)
    assert sorted(name for row in record.rows for name in row.recipes) == DENSE
    assert record.rows[-1].name == "bf16, as it is"


def test_headroom_is_exact(nemo: Path) -> None:
    """The headroom is the memory for the cache less what the wanted context needs; the longest context uses all."""
    asked = row_of(fit(nemo, CARD, context=16384).rows, "nvfp4").caches[0]
    free = row_of(fit(nemo, CARD).rows, "nvfp4").caches[0]
    block = 16 * 160 * 1024
    assert asked.max_context == free.max_context
    assert 0 <= asked.headroom_bytes - (free.max_context - 16384) * 160 * 1024 < block


def test_recipes_that_store_the_same_are_one_row(nemo: Path) -> None:
    """Recipes that differ in scale rules or in the cache's scales share a row; an FP8 cache is then calibrated."""
    record = fit(nemo, CARD)
    row = row_of(record.rows, "nvfp4-fp8-hybrid")
    exact = {"nvfp4-fp8-hybrid-absmax", "nvfp4-fp8-hybrid-four-over-six"}
    assert {"nvfp4-fp8-hybrid", "nvfp4-fp8-hybrid-fp8kv", *exact} <= set(row.recipes)
    assert row.name == "nvfp4-fp8-hybrid"
    assert [cache.recipe for cache in row.caches] == ["nvfp4-fp8-hybrid", "nvfp4-fp8-hybrid-fp8kv"]
    assert [cache.recipe for cache in row_of(record.rows, "nvfp4").caches] == ["nvfp4", "nvfp4"]


def test_number_of_gpus_that_it_needs(nemo: Path) -> None:
    """A row that does not fit has the number of GPUs on which it fits, and on that number it does."""
    row = row_of(fit(nemo, CARD, context=32768).rows, "bf16, as it is")
    gpus = row.caches[0].gpus_needed
    assert gpus == 4
    fewer, enough = (
        row_of(fit(nemo, CARD, context=32768, tensor_parallel_size=n).rows, row.name).caches[0] for n in (2, 4)
    )
    assert not fewer.fits
    assert enough.fits


def test_more_sequences_need_more(nemo: Path) -> None:
    """Sequences at once share the cache: a quarter of the length for four of them, up to blocks."""
    one, four = (row_of(fit(nemo, "H100", max_num_seqs=n).rows, "bf16, as it is").caches[0] for n in (1, 4))
    assert one.max_context == 131072
    tight = [row_of(fit(nemo, CARD, max_num_seqs=n).rows, "nvfp4").caches[0].max_context for n in (1, 4)]
    assert tight[0] // 4 - 16 <= tight[1] <= tight[0] // 4
    assert four.max_context < 131072 or four.fits


def test_max_context_is_capped_by_the_model(nemo: Path) -> None:
    """No context is longer than the model was made for, and the table says so; asking for more is an error."""
    record = fit(nemo, "H200")
    assert {cache.max_context for row in record.rows for cache in row.caches} == {131072}
    assert "131,072 tokens (all)" in run("fit", nemo, "--gpu", "H200").stdout
    with raises("sequence-too-long", where="context") as caught:
        fit(nemo, "H200", context=131073)
    assert "131,072" in caught.value.what


def test_windows_and_states_reach_the_answer(tmp_path: Path) -> None:
    """Windows make long contexts cheap (Gemma 3), states cost at once (Qwen3-Next): the table's notes have both."""
    text = {**GEMMA3_27B["text_config"], "vocab_size": 262208}
    tied = [tensor for tensor in dense_tensors(text) if tensor[0] != "lm_head.weight"]
    gemma = write_sparse_model(tmp_path / "gemma", {**text, "model_type": "gemma3_text"}, tied)
    record = fit(gemma, "RTX PRO 6000", context=131072)
    assert record.windows == (1024,)
    assert record.rows[0].fits
    assert "a window of 1,024 tokens" in run("fit", gemma, "--gpu", "RTX PRO 6000").stdout
    shape = {**QWEN3_NEXT_80B, "intermediate_size": 512, "num_hidden_layers": 4}
    states = write_sparse_model(tmp_path / "qwen", shape, dense_tensors(shape))
    assert fit(states, "24GiB").state_bytes == 3 * 2 * (8192 * 3 + 32 * 128 * 128)
    assert "MiB of states a sequence" in run("fit", states, "--gpu", "24GiB").stdout


def test_unsuitable_recipes_are_listed(make_tiny: MakeTiny) -> None:
    """A recipe whose blocks do not divide the shapes is in the table, with the reason."""
    model = make_tiny("llama", intermediate_size=136)
    record = fit(model, "16GiB")
    odd = [row for row in record.rows if row.problem]
    assert odd == list(record.rows[-len(odd) :])
    assert all("136" in (row.problem or "") or "64" in (row.problem or "") for row in odd)
    assert f"impossible: {odd[0].name}" in run("fit", model, "--gpu", "16GiB").stdout


def test_splits_that_break_blocks_are_listed(tmp_path: Path) -> None:
    """Shapes that only divide on one GPU: the recipe is listed with the side that no longer divides."""
    shape = {**LLAMA_8B, "num_hidden_layers": 1, "intermediate_size": 14336 - 128}
    model = write_sparse_model(tmp_path / "model", shape, dense_tensors(shape))
    rows = fit(model, "H100", tensor_parallel_size=8).rows
    problem = row_of(rows, "int4-w4a16").problem or ""
    assert [word for word in ("1776 in_features", "down_proj", "128") if word not in problem] == []
    assert row_of(rows, "nvfp4").problem is None


# --- sources that are quantized


def test_quantized_model_as_it_is(nemo: Path, hybrid: Path) -> None:
    """A quantized checkpoint is taken as it is: its bytes, formats and kernels are those of the recipe that made it."""
    record = fit(hybrid, CARD, context=32768)
    row = next(row for row in record.rows if row.name.endswith("as it is"))
    made = row_of(fit(nemo, CARD, context=32768).rows, "nvfp4-fp8-hybrid")
    assert row.bytes == made.bytes
    assert set(row.formats) == set(made.formats)
    assert row.kernels == made.kernels
    assert [cache.headroom_bytes for cache in row.caches] == [cache.headroom_bytes for cache in made.caches]
    assert row.bits_per_weight == pytest.approx(made.bits_per_weight)
    again = fit(hybrid, CARD, recipes=["nvfp4-fp8-hybrid"]).rows
    assert any("already quantized" in str(one.problem) for one in again)


def test_unreadable_quantization_still_has_bytes(nemo: Path, tmp_path: Path) -> None:
    """A method without a reader (GPTQ) is named, and its bytes are what the file has."""
    config = {**NEMO, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    codes = ("model.layers.0.self_attn.q_proj.qzeros", "I32", (0,))  # plain weights alone would make it stale
    model = write_sparse_model(tmp_path / "gptq", config, [*dense_tensors(NEMO), codes])
    (row,) = fit(model, "24GiB").rows
    assert row.name == "gptq, as it is"
    assert row.bytes == row_of(fit(nemo, "24GiB").rows, "bf16, as it is").bytes


# --- it agrees with the plan


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_bytes_are_those_of_the_plan(kind: str, make_tiny: MakeTiny) -> None:
    """Every recipe's bytes are those that a run would write, where engines load all of them."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
    model = make_tiny(kind, **shape, tie_word_embeddings=kind == "qwen2")
    rows = fit(model, "16GiB").rows
    for name in DENSE:
        if load_recipe(name).recipe.kv_cache is None:
            assert row_of(rows, name).bytes == plan_of(model, name).bytes, name


def refused_recipes(model: Path) -> set[str]:
    """Names of recipes that are refused; all rows must have the plan's reasons, and the bytes that it would write."""
    rows = fit(model, "16GiB").rows
    plain = [name for name in builtin_names() if load_recipe(name).recipe.kv_cache is None]
    refused = {name: words for name in plain if (words := refusal(model, name)) is not None}
    for name in plain:
        row = row_of(rows, name)
        if name in refused:
            assert row.problem is not None, name
            assert refused[name] == row.problem, name
            continue
        plan = plan_of(model, name)
        served = {
            key: infos for key, infos in plan.outputs.items() if infos and is_served(key, plan.decoder, plan.num_layers)
        }
        formats = {plan.assignments[key].format for key in served if key in plan.assignments} - {None}
        assert (row.bytes, row.problem) == (sum(info.bytes for infos in served.values() for info in infos), None), name
        assert set(row.formats) == {fmt.label() for fmt in formats if fmt is not None}, name
    return set(refused)


def refusal(model: Path, recipe: str) -> str | None:
    """Why a run would be refused; None where it would not."""
    try:
        unverified = plan_of(model, recipe).unverified
    except UserError as error:
        return error.what.rstrip(".")
    return unverified[0].what.rstrip(".") if unverified else None


# experts of one layer in two formats
SPLITS = {"nvfp4-fp8-down", "nvfp4-fp8-down-absmax", "nvfp4-fp8-down-four-over-six"}
# 4-bit inputs of latent attention's kv_b_proj
LATENT = {"nvfp4", "nvfp4-absmax", "nvfp4-four-over-six", "mxfp4", "mxfp4-absmax"}


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "granitemoehybrid", "deepseek_v3", "qwen3_vl_moe"])
def test_bytes_of_experts_are_those_of_the_plan(family: str, tmp_path: Path) -> None:
    """Experts that are counted once weigh as much as experts that are listed, out of 3-D tensors too."""
    model = make_mixture(family, tmp_path / "model", wide=True, tie_word_embeddings=False)
    assert refused_recipes(model) >= SPLITS


@pytest.mark.parametrize("kind", ["hf-block", "hf-tensor-static", "ct-channel", "ct-block"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_bytes_of_fp8_sources_are_those_of_the_plan(family: str, kind: Kind, tmp_path: Path) -> None:
    """Of an FP8 mixture, in either dialect, what a recipe leaves in FP8 counts as it is, scales included."""
    model = as_fp8(make_mixture(family, tmp_path / "source", wide=True), tmp_path / "model", kind)
    latent = LATENT if family == "deepseek_v3" else set()
    assert refused_recipes(model) == SPLITS | latent | {"fp8-dynamic", "fp8-block"}


def test_an_expert_that_differs_is_counted_by_itself(tmp_path: Path) -> None:
    """One expert that the source left in 16 bits is not counted as one of its neighbours."""
    source = make_mixture("qwen3_moe", tmp_path / "source", wide=True)
    model = as_fp8(source, tmp_path / "model", "hf-block", keep=lambda name: "layers.0.mlp.experts.5." in name)
    assert refused_recipes(model) == SPLITS | {"fp8-dynamic"}  # fp8-block makes it what the others are


def test_experts_that_no_engine_loads(tmp_path: Path) -> None:
    """Recipes that quantize gpt-oss's experts are refused with a reason; one that keeps them is counted as planned."""
    model = make_mixture("gpt_oss", tmp_path / "model", wide=True)
    file = tmp_path / "mine.yaml"
    rules = "  - {role: experts, format: keep}\n  - {role: linear, format: fp8-dynamic}\n"
    file.write_text(f"name: mine\nrules:\n{rules}", encoding="utf-8")
    _, kept, refused = fit(model, "16GiB", recipes=[str(file), "nvfp4"]).rows
    assert kept.bytes == plan_of(model, str(file)).bytes
    assert [word for word in ("gpt_oss", "nvfp4") if word not in (refused.problem or "")] == []
    first, *others = fit(as_mxfp4(model, tmp_path / "mxfp4"), "16GiB").rows
    assert (first.name, first.problem) == ("mxfp4, as it is", None)
    assert 4.25 < (first.bits_per_weight or 0.0) < 16
    assert all(row.problem for row in others)


def test_families_outside_the_interface(tmp_path: Path) -> None:
    """Of a family that runs experts in its own way no recipe is tried, with a note; the model itself is counted."""
    model = make_mixture("llama4_text", tmp_path / "model", wide=True)
    record = fit(model, "16GiB")
    assert [(row.name, row.fits) for row in record.rows] == [("bf16, as it is", True)]
    assert any("llama4_text" in note for note in record.notes)
    with raises("experts-unsupported"):
        fit(model, "16GiB", recipes=["nvfp4"])


# --- models of true size

# FP8 in blocks is what they have; of FP8 for down alone, engines would want it of gate and up too; latent attention
# takes no 4-bit inputs, and vLLM finds no scales of its FP8 cache
GIANTS: dict[str, Giant] = {
    "minimax": Giant(minimax_m2, 2, frozenset({"fp8-block", "nvfp4-fp8-down"})),
    "deepseek": Giant(deepseek_v3, 8, frozenset({"fp8-block", "mxfp4", "fp8-dynamic-fp8kv"})),
}
MAX_CALLS_A_ROW = 3_000_000  # 2.5 million; quadratic in 96 thousand tensors it would be billions


def check_bounded_work(giant: Giant, model: Path) -> None:
    """`fit` of a giant takes some million calls (seconds) and under 1 GB, without torch or transformers."""
    script = (
        f"import json, sys\nsys.path.append({str(TESTS)!r})\n"
        "from helpers.work import count_calls\n"
        "from snugfit.planning.fit import fit\n"
        "from snugfit.machine import peak_rss_bytes\n"
        f"model, tp = {str(giant.build(model))!r}, {giant.tp}\n"
        "answer = lambda: fit(model, 'RTX PRO 6000', tensor_parallel_size=tp, context=65536)\n"
        "record, calls = count_calls(answer)\n"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules))\n"
        "rows = [[row.name, row.bytes, row.fits, row.problem] for row in record.rows]\n"
        "print(json.dumps({'rows': rows, 'heavy': heavy, 'peak': peak_rss_bytes(), 'calls': calls}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["peak"] < 1e9
    assert found["calls"] < MAX_CALLS_A_ROW * len(found["rows"])
    assert any(fits for _, _, fits, _ in found["rows"])
    assert {name for name, _, _, problem in found["rows"] if problem} == giant.refused


def test_giants_take_bounded_work(tmp_path: Path) -> None:
    """MiniMax-M2.1 takes some million calls (seconds) and under 1 GB; `make slow` says the same of DeepSeek-V3."""
    check_bounded_work(GIANTS["minimax"], tmp_path / "model")


def test_heads_of_prediction_are_not_counted(tmp_path: Path) -> None:
    """DeepSeek-V3 as it is weighs its 61 layers: engines do not load its head of multi-token prediction."""
    giant = GIANTS["deepseek"]
    rows = fit(giant.build(tmp_path / "model"), "RTX PRO 6000", tensor_parallel_size=giant.tp, context=65536).rows
    bytes_as_it_is = row_of(rows, "fp8-block, as it is").bytes or 0
    assert 671e9 < bytes_as_it_is < 676e9  # 671.0 billion weights: FP8, embeddings and head in 16 bits, scales
    assert {row.name for row in rows if row.problem} == giant.refused
    assert any(row.fits for row in rows)


# --- the command


def test_table(nemo: Path) -> None:
    """One screen: the best row first, assumptions and kernels below the table, and the next commands last."""
    lines = run("fit", nemo, "--gpu", CARD, "--context", "32k").stdout.splitlines()
    assert lines[0] == f"nemo on {CARD}, vLLM 0.32: 32,768 tokens"
    assert len(lines) < 25
    first = fit(nemo, CARD, context=32768).rows[0]
    assert lines[2].split()[0] == first.name
    assert "160.0 KiB a token in 16 bits, 80.0 KiB in FP8; made for 131,072 tokens" in "\n".join(lines)
    assert any(
        line.startswith("assumed, GiB: vLLM 0.32 may use 14.24 of the 15.48 that CUDA reports") for line in lines
    )
    assert any("nvfp4: FlashInfer CUTLASS (W4A4)" in line for line in lines)
    assert lines[-1].startswith(f"next: snugfit quantize {nemo} --recipe {first.name} --output-dir OUT; vllm serve OUT")
    assert lines[-1].endswith("--max-model-len 32768 --kv-cache-dtype fp8")


def test_unnamed_gpu_shows_every_generation(nemo: Path) -> None:
    """Without a generation the kernels of Ada, Hopper and both Blackwells are shown."""
    text = run("fit", nemo, "--gpu", "16G").stdout
    for name in ("Ada (sm89)", "Hopper (sm90)", "Blackwell (sm100)", "Blackwell (sm120)"):
        assert f"\n{name}: " in text
    assert "note: cards sold as 16 GB report less" in text


def test_json(nemo: Path) -> None:
    """`--json` prints one document with the schema's name, every row, and the arguments."""
    record = json.loads(run("fit", nemo, "--gpu", CARD, "--context", "32k", "--recipe", "nvfp4", "--json").stdout)
    assert record["schema"] == "snugfit.fit/1"
    assert record["context"] == 32768
    assert sorted(row["name"] for row in record["rows"]) == ["bf16, as it is", "nvfp4"]
    assert record["arguments"]["recipes"] == ["nvfp4"]
    assert record["gpu"]["generation"] == "Blackwell (sm120)"


def test_own_recipe(nemo: Path, tmp_path: Path) -> None:
    """`--recipe FILE` narrows the table to one's own."""
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nrules:\n  - {role: linear, format: nvfp4a16}\n", encoding="utf-8")
    rows = fit(nemo, CARD, recipes=[str(file)]).rows
    assert [row.recipes for row in rows if row.recipes] == [(str(file),)]


def test_engines_differ(nemo: Path) -> None:
    """Each engine has its own share and kernels; several sequences mean Aphrodite without its single-user mode."""
    for engine in ("vllm", "vllm-0.24", "vllm-0.19", "aphrodite", "sglang"):
        assert run("fit", nemo, "--gpu", "RTX 4090", "--engine", engine).stdout
    many = fit(nemo, "RTX 4090", engine="aphrodite", max_num_seqs=2)
    assert many.engine.title == "Aphrodite 0.10"
    problem = row_of(fit(nemo, "RTX 4090", engine="sglang").rows, "mxfp4").problem or ""
    assert [word for word in ("SGLang 0.5", "mxfp4", "Ada") if word not in problem] == []


BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({"gpu": "16 bananas"}, "option-invalid", "gpu", "16 bananas"),
    ({"gpu": "0"}, "option-invalid", "gpu", "'0'"),
    ({"tensor_parallel_size": 3}, "option-invalid", "tensor_parallel_size", "32 attention heads"),
    ({"tensor_parallel_size": 0}, "option-invalid", "tensor_parallel_size", "0"),
    ({"tensor_parallel_size": -2}, "option-invalid", "tensor_parallel_size", "-2"),
    ({"context": 0}, "option-invalid", "context", "0"),
    ({"context": 10 * 2**20}, "sequence-too-long", "context", "131,072"),
    ({"max_num_seqs": 0}, "option-invalid", "max_num_seqs", "0"),
    ({"gpu_memory_utilization": 1.5}, "option-invalid", "gpu_memory_utilization", "1.5"),
    ({"gpu_memory_utilization": math.nan}, "option-invalid", "gpu_memory_utilization", "nan"),
    ({"engine": "ollama"}, "option-invalid", "engine", "ollama"),
    ({"engine": "aphrodite", "gpu_memory_utilization": 0.9}, "option-conflict", "gpu_memory_utilization", "Aphrodite"),
    ({"recipes": ["nvfp5"]}, "recipe-not-found", "", "nvfp5"),
]


@pytest.mark.parametrize(("options", "code", "where", "named"), BAD, ids=[f"{options}" for options, *_ in BAD])
def test_bad_input(options: dict[str, Any], code: str, where: str, named: str, nemo: Path) -> None:
    """An impossible argument is an error at the parameter, which quotes the value."""
    with raises(code, where=where) as caught:
        fit(nemo, **{"gpu": "16GiB", **options})
    assert named in str(caught.value)


BAD_OPTIONS: list[tuple[list[str], str, str]] = [
    (["--gpu", "5070"], "option-invalid", "--gpu"),
    (["--gpu", "16GiB", "--context", "0"], "option-invalid", "--context"),
    (["--gpu", "16GiB", "--context=-1"], "option-invalid", "--context"),
    (["--gpu", "16GiB", "--tp", "3"], "option-invalid", "--tensor-parallel-size"),
    (
        ["--gpu", "16GiB", "--engine", "aphrodite", "--gpu-memory-utilization", "0.9"],
        "option-conflict",
        "--gpu-memory-utilization",
    ),
]


@pytest.mark.parametrize(("options", "code", "place"), BAD_OPTIONS, ids=[" ".join(row[0]) for row in BAD_OPTIONS])
def test_bad_options_are_exit_code_2(options: list[str], code: str, place: str, nemo: Path) -> None:
    """On the command line an impossible option is exit code 2, with nothing on stdout."""
    result = CliRunner().invoke(app, ["fit", str(nemo), *options])
    assert failed_with(result, code, place)
    assert result.stdout == ""


def test_missing_model_is_exit_code_2(tmp_path: Path) -> None:
    """A directory that does not exist is exit code 2."""
    result = CliRunner().invoke(app, ["fit", str(tmp_path / "none"), "--gpu", "16GiB"])
    assert failed_with(result, "model-not-found", tmp_path / "none")
    assert result.stdout == ""
