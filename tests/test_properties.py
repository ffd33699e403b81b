"""Properties of every recipe, header, set of names and plan, on examples that Hypothesis makes."""

from __future__ import annotations

import fnmatch
import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
import safetensors
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuzz.mutate import spoil_bytes, spoil_json
from helpers.cache_sizes import bytes_at
from snugfit.engines.fused import group_modules
from snugfit.engines.gpus import CARDS
from snugfit.engines.memory import ENGINE_NAMES, ENGINES, GIB
from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, INT4_GROUPS, KEEP
from snugfit.model.anatomy import find_decoder
from snugfit.model.names import LINEAR, ROLE_SETS, parse_name
from snugfit.model.positions import max_positions
from snugfit.recipes.assignment import Assignment
from snugfit.recipes.recipe import LoadedRecipe, parse_recipe
from snugfit.recipes.resolve import layer_numbers, resolve
from snugfit.storage.checkpoint import read_header
from snugfit.storage.safetensors_header import DTYPE_BYTES, TensorInfo, parse_header
from snugfit.storage.shards import plan_shards
from snugfit.vram.blocks import make_pool
from snugfit.vram.budget import Gpu, max_num_batched_tokens, read_widths
from snugfit.vram.fit import PlannedTensor, ServedModel, ServeSettings, fit_weights
from snugfit.vram.kv_cache import check_split
from snugfit.vram.kv_cache_config import read_cache

Result = TypeVar("Result")
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# --- recipes

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAFE_ROLES = (
    ["linear"],
    ["attention"],
    ["mlp"],
    ["o"],
    ["down"],
    ["gate", "up"],
    ["q", "k", "v"],
    ["attention", "down"],
)
ROLES = (*SAFE_ROLES, *SAFE_ROLES, ["q"], ["up"], ["k", "o"], ["router"])
GLOBS = (
    "*",
    "*.mlp.*",
    "*.self_attn.*",
    "*_proj",
    "*.o_proj",
    "*layers.0.*",
    "model.layers.1.mlp.down_proj",
    "re:.*mlp.*",
)


def tensors_of(layers: int, experts: int) -> list[TensorInfo]:
    """A llama's tensors, its MLPs split into `experts` if > 0; every format fits every linear."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        names += [f"{prefix}.self_attn.{leaf}.weight" for leaf in LEAVES[:4]]
        names += [f"{prefix}.input_layernorm.weight"]
        for middle in [f"experts.{n}." for n in range(experts)] or [""]:
            names += [f"{prefix}.mlp.{middle}{leaf}.weight" for leaf in LEAVES[4:]]
    return [TensorInfo(name, "BF16", (256,) if "norm" in name else (256, 256)) for name in names]


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """A rule that the recipe's schema accepts."""
    rule: dict[str, Any] = {"format": draw(st.sampled_from([*FORMATS, KEEP]))}
    kind = draw(st.integers(0, 5))
    if kind < 4:
        rule["role"] = list(draw(st.sampled_from(ROLES)))
    if kind > 2:
        rule["name"] = draw(st.sampled_from(GLOBS))
    if draw(st.integers(0, 3)) == 0:
        ends = st.integers(-5, 5)
        rule["layers"] = draw(st.one_of(ends.map(str), st.tuples(ends, ends).map(lambda pair: f"{pair[0]}..{pair[1]}")))
    scales = FORMATS[rule["format"]].scale_rules if rule["format"] != KEEP else ()
    if draw(st.booleans()) and scales:
        rule["scale_rule"] = draw(st.sampled_from(scales))
    if rule["format"] == "int4" and draw(st.booleans()):
        rule["group_size"] = draw(st.lists(st.sampled_from(INT4_GROUPS), min_size=1, max_size=3))
        rule["symmetric"] = draw(st.booleans())
    return rule


RECIPES = st.builds(
    lambda first, last: {
        "name": "drawn",
        "rules": [*first, *([{"role": LINEAR, "format": "fp8-dynamic"}] if last else [])],
    },
    st.lists(rules(), min_size=1, max_size=4),
    st.sampled_from([True, True, True, False]),
)
MODELS = st.builds(tensors_of, st.integers(1, 4), st.sampled_from([0, 0, 2]))


def wanted_rule(document: Mapping[str, Any], tensor: TensorInfo, layers: int) -> int | None:
    """The first rule that matches a tensor, by trying one after another."""
    name = parse_name(tensor.name, tensor.shape)
    for number, rule in enumerate(document["rules"]):
        roles = {role for wanted in rule.get("role", ()) for role in ROLE_SETS.get(wanted, {wanted})}
        linear = LINEAR in rule.get("role", ()) and name.layer is not None and name.role != "norm"
        if "role" in rule and not (name.role in roles or linear):
            continue
        pattern = rule.get("name", "*").replace("re:.*mlp.*", "*mlp*")
        if not fnmatch.fnmatchcase(name.module, pattern):
            continue
        if "role" not in rule and (name.layer is None or name.role == "norm") and rule.get("name") != name.module:
            continue
        if "layers" in rule:
            ends = [int(end) for end in rule["layers"].split("..")]
            low, high = (end + layers if end < 0 else end for end in (ends[0], ends[-1]))
            if name.layer is None or not low <= name.layer <= high:
                continue
        return number
    return None


def resolved(loaded: LoadedRecipe, tensors: Sequence[TensorInfo], layers: int) -> dict[str, Assignment] | None:
    """The assignments of a recipe, None if it is refused with a place."""
    found, error = attempt(lambda: resolve(loaded, tensors, num_layers=layers))
    if error is not None:
        assert error.where.startswith(loaded.where)
        assert error.remedy
    return found


def attempt(call: Callable[[], Result]) -> tuple[Result | None, UserError | None]:
    """The result, or the error that a user may see."""
    try:
        return call(), None
    except UserError as error:
        return None, error


def test_every_weight_gets_the_first_rule_that_matches() -> None:
    """Each linear gets exactly the first rule that matches it, or the recipe is refused; no group is split."""
    answered = {True: 0, False: 0}

    @quick
    @given(document=RECIPES, tensors=MODELS)
    def drawn(document: dict[str, Any], tensors: list[TensorInfo]) -> None:
        answered[accepted(document, tensors)] += 1

    drawn()
    assert min(answered.values()) > 20


def accepted(document: dict[str, Any], tensors: list[TensorInfo]) -> bool:
    """Whether the recipe is accepted for these tensors, which is rightly so, as are the rules that they get."""
    layers = 1 + max(parse_name(t.name, t.shape).layer or 0 for t in tensors)
    loaded = parse_recipe(yaml.safe_dump(document), where="drawn.yaml")
    found = resolved(loaded, tensors, layers)
    wanted = {t.name: rule for t in tensors if (rule := wanted_rule(document, t, layers)) is not None}
    linears = {t.name for t in tensors if t.name.endswith("_proj.weight")}
    used = set(wanted.values()) == set(range(len(document["rules"])))
    if found is None:
        groups = group_modules(name.removesuffix(".weight") for name in wanted)
        split = any(len({wanted[f"{member}.weight"] for member in group}) > 1 for group in groups)
        outside = any(document["rules"][wanted[name]]["format"] != KEEP for name in wanted.keys() - linears)
        routed = [{n for n in wanted if f"layers.{k}." in n and ".experts." in n} for k in range(layers)]
        split_experts = any(len({wanted[name] for name in names}) > 1 for names in routed)
        assert split or split_experts or outside or not used or linears - wanted.keys()
        return False
    assert used
    assert {name: assignment.rule for name, assignment in found.items()} == wanted
    assert linears <= found.keys()
    for assignment in found.values():
        rule = document["rules"][assignment.rule]
        assert (assignment.format.name if assignment.format else KEEP) == rule["format"]
    for group in group_modules(name.removesuffix(".weight") for name in found):
        assert len({(found[f"{m}.weight"].format, found[f"{m}.weight"].scale_rule) for m in group}) == 1
    return True


@quick
@given(document=RECIPES, tensors=MODELS, style=st.sampled_from([None, True, False]))
def test_a_stored_recipe_gives_the_same_assignments(
    document: dict[str, Any], tensors: list[TensorInfo], style: bool | None
) -> None:
    """A recipe's text as stored in a result, and the same written by YAML or JSON, give the same assignments."""
    layers = 1 + max(parse_name(t.name, t.shape).layer or 0 for t in tensors)
    first = parse_recipe(yaml.safe_dump(document, default_flow_style=style), where="a")
    again = parse_recipe(first.text, where="a")
    model = first.recipe.model_dump(mode="json", exclude_none=True)
    others = [parse_recipe(text, where="a") for text in (yaml.safe_dump(model), json.dumps(model))]
    assert first.digest == again.digest
    assert all(other.recipe == first.recipe for other in (again, *others))
    answers = [resolved(loaded, tensors, layers) for loaded in (first, again, *others)]
    assert all(one == answers[0] for one in answers)


@quick
@given(
    ends=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=4), layers=st.integers(1, 7)
)
def test_layer_numbers(ends: list[tuple[int, int]], layers: int) -> None:
    """Each range gives the model's layers between its ends, both included."""
    found = layer_numbers(", ".join(f"{low}..{high}" for low, high in ends), layers)
    counted = [(low + layers * (low < 0), high + layers * (high < 0)) for low, high in ends]
    assert found == {n for n in range(layers) if any(low <= n <= high for low, high in counted)}


# --- headers

NAMES = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp", "Zs", "Co", "Cn")), min_size=1, max_size=12
)
DTYPES = st.sampled_from(sorted(DTYPE_BYTES))
TENSORS = st.lists(
    st.builds(TensorInfo, NAMES, DTYPES, st.lists(st.integers(0, 5), max_size=4).map(tuple)),
    max_size=8,
    unique_by=lambda tensor: tensor.name,
).filter(lambda tensors: all(tensor.name != "__metadata__" for tensor in tensors))


def read_by_safetensors(raw: bytes) -> dict[str, tuple[str, list[int]]] | None:
    """Tensors that the safetensors library reads in a file, None if it refuses."""
    try:
        return {name: (part["dtype"], list(part["shape"])) for name, part in safetensors.deserialize(raw)}  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None


def read_by_snugfit(raw: bytes) -> dict[str, tuple[str, list[int]]] | None:
    """Tensors that snugfit reads in a file, None for a UserError."""
    length = struct.unpack("<Q", raw[:8])[0]
    found, error = attempt(lambda: parse_header(raw[8 : 8 + length], "x", len(raw), where="x"))
    if found is None:
        assert error is not None
        assert error.where == "x"
        return None
    return {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in found}


@quick
@given(tensors=TENSORS, most=st.integers(1, 2000))
def test_planned_shards_are_what_safetensors_reads(
    tensors: list[TensorInfo], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any set of tensors is written to files that both libraries read, within the size limit, each tensor once."""
    shards = plan_shards(tensors, most)
    seen: dict[str, tuple[str, list[int]]] = {}
    folder = tmp_path_factory.mktemp("shards")
    for shard in shards:
        raw = shard.header + bytes(shard.bytes - len(shard.header))
        (folder / shard.name).write_bytes(raw)
        stored = read_header(folder / shard.name)
        assert {t.name: t.offset for t in stored} == dict(shard.offsets)
        assert read_by_snugfit(raw) == read_by_safetensors(raw)
        assert sum(t.bytes for t in shard.tensors) <= most or len([t for t in shard.tensors if t.bytes]) == 1
        seen |= read_by_snugfit(raw) or {}
    assert seen == {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in tensors}
    assert sum(len(shard.tensors) for shard in shards) == len(tensors)


@settings(quick, max_examples=500)
@given(tensors=TENSORS, seed=st.integers(0, 10**9), deep=st.booleans())
def test_no_header_is_read_that_safetensors_refuses(tensors: list[TensorInfo], seed: int, deep: bool) -> None:
    """snugfit reads no damaged header that the safetensors library refuses; if both read one, they agree."""
    (shard,) = plan_shards(tensors, 10**9)
    rng = random.Random(seed)  # noqa: S311
    text = shard.header[8:]
    words = ("__metadata__", "dtype", "shape", "data_offsets", "F32", "BF16")
    damaged = spoil_json(rng, json.loads(text), words) if deep else spoil_bytes(rng, text)
    raw = struct.pack("<Q", len(damaged)) + damaged + bytes(shard.bytes - len(shard.header))
    mine = read_by_snugfit(raw)
    assert mine is None or mine == read_by_safetensors(raw)


# --- names

FAMILIES = (
    ("model.layers", ("self_attn.q_proj.weight", "mlp.up_proj.weight")),
    ("transformer.h", ("attn.c_attn.weight", "mlp.c_fc.weight")),
    ("language_model.model.layers", ("self_attn.q_proj.weight", "mlp.experts.0.w1.weight")),
    ("gpt_neox.layers", ("attention.query_key_value.weight",)),
)
BESIDE = ("vision_tower.encoder.layers", "visual.blocks", "mtp.layers", "model.audio_tower.layers", "image_newline")


@quick
@given(
    family=st.sampled_from(FAMILIES),
    layers=st.integers(1, 6),
    more=st.integers(0, 2),
    towers=st.dictionaries(st.sampled_from(BESIDE), st.integers(1, 9)),
    order=st.randoms(use_true_random=False),
)
def test_the_decoder_is_found_in_any_order(
    family: tuple[str, tuple[str, ...]], layers: int, more: int, towers: dict[str, int], order: random.Random
) -> None:
    """The list of decoder layers does not depend on the order of names, also with towers and prediction heads."""
    head, leaves = family
    names = [f"{head}.{n}.{leaf}" for n in range(layers + more) for leaf in leaves]
    names += [f"{tower}.{n}.attn.qkv.weight" for tower, count in towers.items() for n in range(count)]
    names += ["lm_head.weight", "norm.weight", f"{head}.weird", "0.weight"]
    order.shuffle(names)
    assert find_decoder(names, layers) == head


# --- plans


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config of a dense, a windowed or a hybrid model, or of one with latent attention."""
    heads = draw(st.sampled_from([1, 2, 8, 12, 32, 64]))
    config: dict[str, Any] = {
        "model_type": draw(
            st.sampled_from(["llama", "mistral", "gemma2", "qwen3_next", "deepseek_v3", "gpt_oss", "jamba"])
        ),
        "num_hidden_layers": draw(st.integers(1, 48)),
        "hidden_size": heads * draw(st.sampled_from([16, 64, 128])),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4, 8, 16, 32) if heads % n == 0])),
        "intermediate_size": draw(st.integers(1, 30_000)),
        "vocab_size": draw(st.integers(1, 300_000)),
        "max_position_embeddings": draw(st.integers(1, 2**21)),
    }
    if draw(st.booleans()):
        config["head_dim"] = draw(st.integers(1, 512))
    if draw(st.booleans()):
        config["sliding_window"] = draw(st.one_of(st.none(), st.integers(0, 100_000)))
    if draw(st.booleans()):
        config |= {"num_experts": draw(st.integers(0, 300)), "num_experts_per_tok": draw(st.integers(1, 9))}
    return config


GPUS = st.one_of(st.sampled_from([c.reported_mib << 20 for c in CARDS]), st.integers(GIB, 300 * GIB))


@settings(quick, max_examples=200)
@given(
    config=configs(),
    size=GPUS,
    engine=st.sampled_from(sorted(ENGINE_NAMES)),
    tp=st.sampled_from([1, 1, 2, 4]),
    sequences=st.integers(1, 8),
    weights=st.integers(0, 10**11),
    tokens=st.lists(st.integers(1, 2**21), min_size=2, max_size=4),
)
@example(
    {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "vocab_size": 1},
    GIB,
    "vllm",
    1,
    1,
    0,
    [1, 2],
)
def test_longer_contexts_never_leave_more_memory(
    config: dict[str, Any], size: int, engine: str, tp: int, sequences: int, weights: int, tokens: list[int]
) -> None:
    """No size is negative; a longer context never leaves more memory, and an FP8 cache never needs more bytes."""
    cache = read_cache(config)
    uneven = attempt(lambda: check_split(cache, tp))[1]
    if uneven is not None:
        assert (uneven.code, uneven.where) == ("option-invalid", "tensor_parallel_size")
        return
    limit = max_positions(config) or 2**20
    model = ServedModel(cache, read_widths(config, cache), limit)
    tensors = [PlannedTensor("x.weight", (weights,), (TensorInfo("x.weight", "U8", (weights,)),), None)]
    found: dict[bool, list[Any]] = {}
    for fp8 in (False, True):
        settings_ = [
            ServeSettings(
                gpu=Gpu(size),
                engine=ENGINES[engine],
                tensor_parallel_size=tp,
                context=context,
                max_num_seqs=sequences,
            )
            for context in sorted(tokens)
        ]
        found[fp8] = [fit_weights(model, tensors, one, fp8=fp8) for one in settings_]
        headroom = [one.headroom_bytes for one in found[fp8]]
        assert headroom == sorted(headroom, reverse=True)
        for one, context in zip(found[fp8], sorted(tokens), strict=True):
            budget = one.budget
            assert min(one.weight_bytes, one.max_context, budget.activation_bytes, budget.other_bytes) >= 0
            assert budget.outside_budget_bytes >= 0
            assert one.max_context <= limit
            if budget.cache_bytes > 0 and context <= limit:
                assert one.fits == (one.max_context >= context)
    sizes = [cache.size(fp8=fp8, tp=tp) for fp8 in (False, True)]
    for context in tokens:
        plain, eight = (bytes_at(one, context) for one in sizes)
        assert 0 <= eight <= plain
        assert bytes_at(cache.size(tp=1), context) >= plain
    if not cache.states and not any(attention.index_bytes for attention in cache.attention):
        batch = max_num_batched_tokens(ENGINES[engine], Gpu(size))
        pools = [make_pool(cache, max_num_batched_tokens=batch, fp8=fp8, tp=tp) for fp8 in (False, True)]
        assert all(pools[1].bytes_needed(n, sequences) <= pools[0].bytes_needed(n, sequences) for n in tokens)


@quick
@given(config=configs(), available=st.lists(st.integers(0, 2**40), min_size=2, max_size=4), fp8=st.booleans())
def test_more_memory_never_holds_less(config: dict[str, Any], available: list[int], fp8: bool) -> None:
    """A larger pool holds contexts at least as long, and the stated context fits into it."""
    pool = make_pool(read_cache(config), max_num_batched_tokens=2048, fp8=fp8)
    lengths = [pool.max_context(size, 2**21) for size in sorted(available)]
    assert lengths == sorted(lengths)
    assert all(
        length == 0 or pool.bytes_needed(length) <= size
        for length, size in zip(lengths, sorted(available), strict=True)
    )
