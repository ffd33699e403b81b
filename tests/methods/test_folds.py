"""Folds: which a family's layers have, that the model stays the same function, and what of them stands in the file."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import MakeTiny
from helpers.tiny_families import FAMILIES, all_tensors, load, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.machine import Clock
from snugfit.methods import folds
from snugfit.methods.calibrated import Calibrated
from snugfit.methods.folds import Fold, Scaling, factors, find_folds, is_same_function, scale
from snugfit.methods.method import Choice, Method, ObservedLayer, Purpose, WeightGroup
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration
from snugfit.quantization.plan import lay_out
from snugfit.quantization.prepare import prepare
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Run
from snugfit.recipes.recipe import parse_recipe
from snugfit.records.statistics_file import ExpertCalibration
from snugfit.storage.staging import resumable

RECIPE = parse_recipe("name: a\nrules:\n- {role: linear, format: nvfp4}\n", where="a.yaml")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = {
    Fold("input_layernorm", ATTENTION, is_norm=True),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), is_norm=True),
    Fold("self_attn.v_proj", ("self_attn.o_proj",), is_norm=False, heads=2, width=16),
    Fold("mlp.up_proj", ("mlp.down_proj",), is_norm=False),
}
GEMMA = {Fold("pre_feedforward_layernorm", fold.consumers, is_norm=True) if "post" in fold.producer else fold
         for fold in LLAMA}  # fmt: skip
NOT_NORMS = {fold for fold in LLAMA if not fold.is_norm}
MORE: Mapping[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8},  # attention and MLP read one norm
    "cohere": {"pad_token_id": 0},
    "phi": {},
    "nemotron": {"head_dim": 16},  # an offset LayerNorm, relu^2
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
# family -> folds that leave its layers the same; None: not the same in all layers
EXPECTED: Mapping[str, set[Fold] | None] = {
    "llama": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "qwen3_next": None,
    "olmo2": NOT_NORMS,  # its norms come behind
    "granitemoehybrid": None,
    "gemma4_text": None,
    "gpt_neox": {
        Fold("input_layernorm", ("attention.query_key_value",), is_norm=True),
        Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), is_norm=True),
    },
    "cohere2": NOT_NORMS,
    "bamba": None,
    "gptj": set(),
    "cohere": NOT_NORMS,
    "phi": set(),
    "nemotron": {
        Fold("input_layernorm", ATTENTION, is_norm=True),
        Fold("post_attention_layernorm", ("mlp.up_proj",), is_norm=True),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), is_norm=False, heads=2, width=16),
    },
    "opt": None,
}


def run_method(model: Path, out: Path, method: Method, **options: Any) -> dict[str, Tensor]:
    """The tensors that a run with this method writes."""
    rows = write_rows(out.with_suffix(".jsonl"), random_rows((70, 41, 3, 64), stop=60))
    calibration = Calibration(
        dataset=[rows],
        num_samples=32,
        max_seq_length=1024,
        device="cpu",
        tokens_per_batch=128,
        experts=ExpertCalibration(min_tokens_per_expert=0),
        **options,
    )
    prepared = prepare(lay_out(read_layout(model), RECIPE), calibration, method)
    with resumable(out) as (directory, work):
        finished = FinishedUnits(work, prepared.identity())
        settings: dict[str, Any] = {"clock": Clock(), "progress": SILENT}
        run_layers(Run(prepared=prepared, directory=directory, work=work, finished=finished, **settings))
    return all_tensors(out)


@dataclass
class FoldAll:
    """Folds all that leaves a layer the same with strong random factors, and keeps what the file would hold then."""

    correlates: bool = False
    same: list[set[Fold]] = field(default_factory=list)
    refused: list[set[Fold]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def observe(self, layer: ObservedLayer) -> None:
        """Find the folds of a layer, and note its tensors under them."""
        before = {name: parameter.clone() for name, parameter in layer.module.named_parameters()}
        found = {
            fold: is_same_function(layer, fold) for fold in find_folds(layer, lambda n: f"{n}.weight" in layer.targets)
        }
        assert all(torch.equal(before[name], p) for name, p in layer.module.named_parameters())
        self.same.append({fold for fold, same in found.items() if same})
        self.refused.append({fold for fold, same in found.items() if not same})
        generator = torch.Generator().manual_seed(len(self.same))
        chosen = []
        for fold, same in found.items():
            features = len(layer.module.get_parameter(f"{fold.producer}.weight"))
            if same:
                chosen.append((fold, torch.exp(torch.randn(features, generator=generator) * 0.7)))
        scaling = scale(layer.module, chosen, layer.dtypes)
        file_names = {module: name for name, module in layer.parameters.items()}
        for module in {*scaling.inputs, *scaling.outputs}:
            weight = layer.module.get_parameter(f"{module}.weight").data
            self.tensors[file_names[f"{module}.weight"]] = scaling.weight(module, weight)
        self.tensors |= {file_names[name]: tensor for name, tensor in scaling.tensors.items()}

    def input_roundings(self, _observed: Any) -> dict[str, Any]:
        """None."""
        return {}

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """The choices of round-to-nearest."""
        return ROUND_TO_NEAREST.choose(groups, purpose)


def with_tensors(model: Path, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A copy of a model with these tensors in place of its own, all of which it must have."""
    shutil.copytree(model, folder)
    left = set(tensors)
    for file in folder.glob("*.safetensors"):
        own = load_file(file)
        for name in left & set(own):
            own[name] = tensors[name].to(own[name].dtype).contiguous()
        left -= set(own)
        save_file(own, file, metadata={"format": "pt"})
    assert not left
    return folder


def with_uneven_norms(model: Path) -> Path:
    """The model with norms and biases that are not all alike."""
    generator = torch.Generator().manual_seed(3)
    for file in model.glob("*.safetensors"):
        own = load_file(file)
        changed = {
            n: t + 0.3 * torch.randn(t.shape, generator=generator) if t.dim() == 1 else t for n, t in own.items()
        }
        save_file({n: t.to(own[n].dtype) for n, t in changed.items()}, file, metadata={"format": "pt"})
    return model


@torch.no_grad()
def logits_of(model: Path) -> Tensor:
    """Logits [B, T, V] of a few rows."""
    found: Tensor = load(model)(input_ids=torch.tensor(random_rows((40, 40), stop=60)), use_cache=False).logits
    return found


@pytest.mark.parametrize("family", EXPECTED)
def test_the_model_stays_the_same_function(family: str, make_tiny: MakeTiny, tmp_path: Path) -> None:
    """With every fold that is found and not refused, by random factors, the whole model gives the same logits."""
    settings = FAMILIES.get(family, MORE.get(family, {}))
    model = with_uneven_norms(make_tiny(family, dtype=torch.float32, **settings))
    method = FoldAll()
    run_method(model, tmp_path / "out", method)
    expected = EXPECTED[family]
    assert any(method.same) == (expected != set())
    if expected is not None:
        assert all(found == expected for found in method.same)
    exact = logits_of(model)
    folded = logits_of(with_tensors(model, tmp_path / "folded", method.tensors))
    assert (folded - exact).norm() <= 1e-4 * exact.norm()
    assert not expected or not torch.equal(exact, folded)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "glm4_moe"])
def test_a_layer_with_routed_experts_keeps_its_norms(family: str, tmp_path: Path) -> None:
    """Nothing goes into a norm beside a router; v into o and a shared expert's up into down stay possible."""
    model = make_mixture(family, tmp_path / "model", dtype=torch.float32)
    method = FoldAll()
    run_method(model, tmp_path / "out", method)
    assert not any(fold.is_norm for fold in method.same[-1] | method.refused[-1])
    assert any(fold.heads == 2 for fold in method.same[-1])
    shared = any("shared" in fold.producer for fold in method.same[-1])
    assert shared == (family != "mixtral")
    assert any(fold.is_norm for fold in method.same[0]) == (family == "glm4_moe")  # its first layer is dense
    exact = logits_of(model)
    folded = logits_of(with_tensors(model, tmp_path / "folded", method.tensors))
    assert (folded - exact).norm() <= 1e-4 * exact.norm()


def test_a_large_residual_hides_nothing(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Hidden states a thousand times as large as what a layer adds to them do not hide that it became another."""
    for family, dtype in (("nemotron", torch.bfloat16), ("cohere", torch.float32), ("gptj", torch.bfloat16)):
        model = with_uneven_norms(make_tiny(family, dtype=dtype, **MORE[family]))
        embeddings = [n for n in all_tensors(model) if "embed_tokens" in n or "wte" in n]
        large = {name: all_tensors(model)[name] * 1000 for name in embeddings}
        method = FoldAll()
        run_method(with_tensors(model, tmp_path / family, large), tmp_path / f"{family}-out", method)
        expected = EXPECTED[family]
        assert all(found == expected for found in method.same)


def test_a_norm_that_something_else_reads(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A norm that a linear without a target reads, too, is not found."""

    class OneKept(FoldAll):
        def observe(self, layer: ObservedLayer) -> None:
            kept = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
            found = find_folds(layer, lambda name: name not in kept)
            self.same.append(set(found))

    method = OneKept()
    run_method(make_tiny("llama"), tmp_path / "out", method)
    assert {fold.producer for fold in method.same[0]} == {"post_attention_layernorm", "self_attn.v_proj"}
    assert method.same[1] == LLAMA


def test_layers_that_are_built_alike_run_once(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """What is known of a layer's norms serves all layers with the same modules and linears, and no other."""
    known: dict[object, dict[str, str]] = {}
    runs: list[int] = []

    class Counted(FoldAll):
        def observe(self, layer: ObservedLayer) -> None:
            run, numbers = layer.run, list[bool]()

            def counted(*args: Any, **options: Any) -> None:
                numbers.append(True)
                run(*args, **options)

            given = replace(layer, run=counted)
            for kept in ((), ("mlp.gate_proj",)):
                found = find_folds(given, lambda name, kept=kept: not name.endswith(kept), known)  # type: ignore[misc]
                assert set(found) == set(find_folds(layer, lambda name, kept=kept: not name.endswith(kept)))  # type: ignore[misc]
                self.same.append(set(found))
            runs.append(len(numbers))

    method = Counted()
    run_method(make_tiny("llama"), tmp_path / "out", method)
    assert runs == [2, 0, 0]
    assert method.same[:2] * 2 == method.same[2:]
    assert method.same[0] == LLAMA != method.same[1]


def test_heads_that_several_queries_share() -> None:
    """Factors of v's features reach every query head's inputs of o, and means of squares come back."""
    fold = Fold("v", ("o",), is_norm=False, heads=3, width=2)
    of_v = torch.tensor([1.0, 2.0, 3.0, 4.0])  # two heads of width 2
    assert fold.to_consumer(of_v).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert torch.equal(fold.to_producer(fold.to_consumer(of_v)), of_v)
    assert fold.to_producer(torch.arange(12.0)).tolist() == [2, 3, 8, 9]


def test_factors() -> None:
    """s = x^a / w^b with a geometric mean of 1 over features that have both; 1 for the others; bounded."""
    x, w = torch.tensor([1.0, 16.0, 0.0, 256.0, 4.0]), torch.tensor([1.0, 4.0, 9.0, 0.0, 1.0])
    found = factors(x, w, (0.5, 0.25))
    assert found[2] == found[3] == 1
    raw = torch.tensor([1.0, 4**0.5 / 2**0.25, 2**0.5])
    torch.testing.assert_close(found[[0, 1, 4]], raw / raw.prod() ** (1 / 3))
    assert factors(torch.zeros(4), torch.ones(4), (0.5, 0.5)).tolist() == [1, 1, 1, 1]
    extreme = factors(torch.tensor([1e30, 1e-30]), torch.ones(2), (1.0, 0.0))
    assert extreme.isfinite().all()
    assert (extreme > 0).all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_factors_are_those_of_the_rounded_norm(stored: torch.dtype, offset: float) -> None:
    """Consumers make up for what the norm of the file's dtype really divides by, whatever dtype the layer runs in."""
    generator = torch.Generator().manual_seed(0)

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter((torch.rand(64, generator=generator) + 0.5 - offset).to(stored).float())

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * (self.weight + offset)

    layer = nn.ModuleDict({"norm": Norm(), "linear": nn.Linear(64, 8, bias=False)})
    layer.requires_grad_(False)
    weight = layer.get_parameter("norm.weight")
    weight[5] = -offset  # nothing comes out of this feature
    asked = torch.exp(torch.randn(64, generator=generator))
    fold = Fold("norm", ("linear",), is_norm=True)
    found = scale(layer, [(fold, asked)], {"norm.weight": stored})
    new = found.tensors["norm.weight"]
    assert new.dtype == stored
    inputs = torch.randn(10, 64, generator=generator)
    exact = layer["linear"](layer["norm"](inputs))
    folds.apply(layer, found)
    torch.testing.assert_close(layer["linear"](layer["norm"](inputs)), exact, rtol=1e-4, atol=1e-5)
    assert found.inputs["linear"][5] == 1
    near = found.inputs["linear"] / asked
    assert ((near[torch.arange(64) != 5] - 1).abs() < 0.05).all()


@pytest.mark.parametrize(("stored", "runs_in"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_folded_tensors_stand_in_the_file(
    stored: str, runs_in: str | None, make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and biases that folds changed are written in their own dtype, marked as changed; all others are not."""
    model = make_tiny("llama", dtype=getattr(torch, stored), attention_bias=True, mlp_bias=True)
    model = with_uneven_norms(model)
    monkeypatch.setattr("snugfit.methods.calibrated.STRENGTHS", ((0.5, 0.5),))
    scalings: list[Scaling] = []
    changed: set[str] = set()

    class Noted(Calibrated):
        def observe(self, layer: ObservedLayer) -> Any:
            found = super().observe(layer)
            assert found is not None
            scalings.append(found.scaling)
            return found

        def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
            for choice in super().choose(groups, purpose):
                if choice.changed:
                    changed.add(choice.name)
                yield choice

    written = run_method(model, tmp_path / "out", Noted("vllm-blackwell", gptq=True, folds=True), dtype=runs_in)
    source = all_tensors(model)
    expected = {f"model.layers.{n}.{name}": t for n, one in enumerate(scalings) for name, t in one.tensors.items()}
    assert expected
    assert changed == set(expected)
    for name in set(source) & set(written):
        assert written[name].dtype == source[name].dtype
        assert torch.equal(written[name], expected.get(name, source[name])), name
    assert any(not torch.equal(written[name], source[name]) for name in expected)
