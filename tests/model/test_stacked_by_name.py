"""Files that hold all experts of a layer in 3-D tensors, without a row for their family: split by names and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.errors import raises
from helpers.plans import plan_of
from helpers.tiny_families import all_tensors, load, random_rows, same, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from snugfit.engines.mixtures import STACKED
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.evaluated_model import open_head, open_model, pass_layers
from snugfit.inspection.inspect import inspect
from snugfit.model.assemble import read_single
from snugfit.model.layout import read_layout
from snugfit.model.logical_weights import ExpertSizes
from snugfit.planning.fit import fit
from snugfit.quantization.collect import collect_statistics
from snugfit.quantization.quantize import plan_quantization, quantize

# kind -> the folder of a layer's experts
KINDS = {
    "qwen3_5_moe_text": "model.layers.1.mlp.experts",
    "gemma4_text": "model.layers.1.experts",
    "granitemoe_swa": "model.layers.1.block_sparse_moe.experts",
    "qwen3_vl_moe resaved": "model.language_model.layers.1.mlp.experts",
}
every_kind = pytest.mark.parametrize("kind", KINDS)
Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Gives a tiny mixture of a kind, made once; "resaved" as transformers 5 writes it, in another order of axes."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            family, _, resaved = kind.partition(" ")
            folder = tmp_path_factory.mktemp(family) / "model"
            made[kind] = make_mixture(family, folder, seed=3, dtype=torch.float32)
            if resaved:
                stored = all_tensors(made[kind])
                rewrite(made[kind], {n: t.transpose(1, 2) if t.dim() == 3 else t for n, t in stored.items()})
        return made[kind]

    return make


@every_kind
def test_no_row_is_needed(kind: str, sources: Sources) -> None:
    """Every stack is split into one weight [I, H], [I, H], [H, I] for each expert, with the values of its slice."""
    assert kind not in STACKED
    layout = read_layout(sources(kind))
    stored, module = all_tensors(sources(kind)), KINDS[kind]
    assert not layout.blockers
    both, down = stored[f"{module}.gate_up_proj"], stored[f"{module}.down_proj"]
    half = both.shape[1] // 2
    assert down.shape == (len(both), both.shape[2], half)
    for expert in range(len(both)):
        name = f"{module}.{expert}.{{}}_proj.weight"
        assert same(read_single(layout.weights, name.format("gate")), both[expert, :half].contiguous())
        assert same(read_single(layout.weights, name.format("up")), both[expert, half:].contiguous())
        assert same(read_single(layout.weights, name.format("down")), down[expert])


@every_kind
@torch.no_grad()
def test_logits_are_transformers_own(kind: str, sources: Sources) -> None:
    """The split experts give the logits of transformers' own model, so gate and up are not mistaken for each other."""
    model, rows = load(sources(kind)), random_rows([24, 24], stop=59)
    evaluated, cpu = open_model(sources(kind), activations="none"), torch.device("cpu")
    batches = pass_layers(evaluated, rows, cpu, tokens_per_batch=48)
    head = open_head(evaluated, cpu)
    logits = head(batches[0].hidden)
    expected = model(input_ids=batches[0].tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_a_run_quantizes_single_experts(kind: str, sources: Sources, tmp_path: Path) -> None:
    """A run writes each expert's codes under its own name, within FP8's error of the slice, as the dry run says."""
    rows = write_rows(tmp_path / "rows.jsonl", random_rows([64] * 3, stop=59))
    planned = plan_of(sources(kind), "fp8-dynamic")
    quantize(sources(kind), "fp8-dynamic", output_dir=tmp_path / "out", dataset=[rows])
    written, stored, module = all_tensors(tmp_path / "out"), all_tensors(sources(kind)), KINDS[kind]
    assert written.keys() == {info.name for infos in planned.outputs.values() for info in infos}
    for expert, both in enumerate(stored[f"{module}.gate_up_proj"].float()):
        for role, weight in zip(("gate", "up"), both.chunk(2), strict=True):
            name = f"{module}.{expert}.{role}_proj.weight"
            values = written[name].float() * written[f"{name}_scale"].float()
            assert ((values - weight).abs() <= weight.abs() / 16 + weight.abs().max() / 448 / 64).all()


def test_widths_that_do_not_fit_are_refused_by_every_verb(sources: Sources, tmp_path: Path) -> None:
    """Where config.json does not explain the shapes, every verb refuses with one code and names the tensor."""
    model = make_mixture("gemma4_text", tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 80}), encoding="utf-8")
    rows, tensor = write_rows(tmp_path / "rows.jsonl", random_rows([64] * 3, stop=59)), "experts.down_proj"
    calls: list[Callable[[], object]] = [
        lambda: plan_quantization(model, "fp8-dynamic"),
        lambda: quantize(model, "fp8-dynamic", output_dir=tmp_path / "out", dataset=[rows]),
        lambda: collect_statistics(model, output_dir=tmp_path / "seen", dataset=[rows]),
        lambda: evaluate([model], dataset=[rows], contexts=(32,)),
        lambda: fit(model, "24GiB", recipes=["fp8-dynamic"]),
    ]
    for call in calls:
        with raises("experts-unsupported", str(model)) as caught:
            call()
        assert tensor in caught.value.what
    assert any(tensor in remark for remark in inspect(model).remarks)
    assert any(tensor in note for note in fit(model, "24GiB").notes)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (64, 64), (64, 32), (32, 64)])
def test_the_order_of_the_axes_is_never_ambiguous(hidden: int, width: int, *, transposed: bool) -> None:
    """Two tensors of a layer show the order even where one is square; other sizes show none."""
    sizes = ExpertSizes(hidden, frozenset({width}), frozenset({4}))
    both, down = (4, 2 * width, hidden), (4, hidden, width)
    if transposed:
        both, down = (4, hidden, 2 * width), (4, width, hidden)
    assert sizes.is_transposed(both, down) is transposed
    assert sizes.is_transposed((5, *both[1:]), down) is None
    assert ExpertSizes(hidden + 1, sizes.widths, sizes.counts).is_transposed(both, down) is None
