"""The loop over layers is open to methods that observe a layer before they choose its codes, or change kept tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import snugfit.quantization.loop
from conftest import MakeTiny
from helpers.errors import raises
from helpers.fp8_sources import as_fp8
from helpers.tiny_families import FAMILIES, all_tensors, load, random_rows, same, write_rows
from helpers.tiny_mixtures import make_mixture
from snugfit.formats import nvfp4
from snugfit.machine import Clock
from snugfit.methods.method import Choice, Method, ObservedLayer, Purpose, WeightGroup
from snugfit.methods.round_to_nearest import ROUND_TO_NEAREST
from snugfit.methods.rounding import round_and_compare
from snugfit.model import experts, forward_pass
from snugfit.model.experts import NoHooks
from snugfit.model.forward_pass import Batch
from snugfit.model.layout import read_layout
from snugfit.progress import SILENT
from snugfit.quantization.loop import run_layers
from snugfit.quantization.options import Calibration
from snugfit.quantization.plan import lay_out
from snugfit.quantization.prepare import prepare
from snugfit.quantization.quantize import quantize
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.run import Run
from snugfit.quantization.samples import embed
from snugfit.recipes.recipe import LoadedRecipe, load_recipe, parse_recipe
from snugfit.records.statistics_file import STATISTICS_FILE, ExpertCalibration
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.shards import ShardWriter
from snugfit.storage.staging import resumable

LENGTHS = (70, 41, 3, 64, 30)  # several batches, with pads
OPTIONS: dict[str, Any] = {"device": "cpu", "tokens_per_batch": 128}
NORM, FACTOR = "input_layernorm.weight", 1.5


def run_method(model: Path, recipe: str | LoadedRecipe, out: Path, rows: Path, method: Method) -> dict[str, Tensor]:
    """The tensors that a run with this method writes."""
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    experts = ExpertCalibration(min_tokens_per_expert=0)
    calibration = Calibration(dataset=[rows], num_samples=32, max_seq_length=1024, experts=experts, **OPTIONS)
    prepared = prepare(lay_out(read_layout(model), loaded), calibration, method)
    with resumable(out) as (directory, work):
        finished = FinishedUnits(work, prepared.identity())
        settings: dict[str, Any] = {"clock": Clock(), "progress": SILENT}
        run_layers(Run(prepared=prepared, directory=directory, work=work, finished=finished, **settings))
    return all_tensors(out)


@dataclass
class Moments:
    """Sum of squares of each input feature [K], and the number of tokens."""

    squares: Tensor
    tokens: int = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs [n, K]."""
        self.squares += inputs.double().square().sum(0)
        self.tokens += len(inputs)

    @property
    def mean_square(self) -> Tensor:
        """The mean square of each input feature [K]."""
        return self.squares / self.tokens


class MeanSquareObserver:
    """Measures the mean square of each input feature of every linear, of real tokens only."""

    def __init__(self, observed: ObservedLayer) -> None:
        self.found: dict[str, Moments] = {}
        self.valid: Tensor | None = None
        for file_name, module_name in observed.linears.items():
            linear = observed.module.get_submodule(module_name)
            assert isinstance(linear, nn.Linear)
            moments = self.found[file_name] = Moments(torch.zeros(linear.in_features, dtype=torch.float64))
            linear.register_forward_pre_hook(lambda _, args, moments=moments: moments.add(self.real(args[0])))

    def before(self, batch: Batch) -> None:
        """Note which tokens of the next batch are real."""
        self.valid = batch.valid

    def real(self, inputs: Tensor) -> Tensor:
        """Inputs [B, T, K] of the real tokens [n, K]."""
        return inputs.flatten(0, 1) if self.valid is None else inputs[self.valid]

    def result(self) -> dict[str, Moments]:
        """What was measured, by the file's names of linears."""
        return self.found


def mean_squares(layer: ObservedLayer) -> dict[str, Moments]:
    """What an observer measures over all samples."""
    observer = MeanSquareObserver(layer)
    layer.run(observer.before)
    return observer.result()


@dataclass
class DropLoudest:
    """A toy method: sets the weights of the loudest input feature to zero before rounding, and scales a norm."""

    observe: Callable[[ObservedLayer], dict[str, Moments]] = mean_squares
    correlates: bool = False
    purposes: list[Purpose] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def input_roundings(self, _observed: Any) -> dict[str, Any]:
        """None."""
        return {}

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """NVFP4 codes without the loudest feature; kept tensors as they are, but for the scaled norm."""
        self.purposes.append(purpose)
        for group in groups:
            if group.target is None:
                for name, weight in group.weights.items():
                    self.kept.append(name)
                    changed = name.endswith(NORM)
                    weight_16bit = weight * FACTOR if changed else weight
                    yield Choice(name=name, codes=None, weight_16bit=weight_16bit, changed=changed)
                continue
            for name, weight in group.weights.items():
                weight[:, self.loudest(name, purpose)] = 0
            settings = group.target.format, group.target.scale_rule, group.target.objective
            for one in round_and_compare(group.weights, *settings, values=purpose.runs):
                error = one.relative_error
                yield Choice(name=one.name, codes=one.weight, weight_16bit=one.values, relative_error=error)

    @staticmethod
    def loudest(name: str, purpose: Purpose) -> int:
        """The input feature with the largest mean square."""
        return int(purpose.observed[name.removesuffix(".weight")].mean_square.argmax())


@dataclass
class ObservedRounding:
    """Observes every layer, and then rounds to nearest."""

    observe: Callable[[ObservedLayer], dict[str, Moments]] = mean_squares
    correlates: bool = False
    observed: list[dict[str, Moments] | None] = field(default_factory=list)

    def input_roundings(self, _observed: Any) -> dict[str, Any]:
        """None."""
        return {}

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """The choices of round-to-nearest."""
        self.observed.append(purpose.observed)
        return ROUND_TO_NEAREST.choose(groups, purpose)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of several lengths."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows(LENGTHS, stop=64))


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Path:
    """A tiny llama in fp32: what differs is not the order of additions in 16 bits."""
    return make_tiny("llama", dtype=torch.float32)


def stored_weight(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """The dequantized values of a module in NVFP4."""
    parts = [tensors[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale")]
    return nvfp4.dequantize(nvfp4.NVFP4Weight(parts[0], parts[1], parts[2].reciprocal().reshape(())))


@torch.no_grad()
def expected_moments(model: Path, written: Mapping[str, Tensor]) -> list[dict[str, Moments]]:
    """Of each layer of transformers' model: its exact weights, behind layers with the weights that were written."""
    reference = load(model)
    found = []
    for number, layer in enumerate(reference.model.layers):
        prefix = f"model.layers.{number}"
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        measured = MeanSquareObserver(
            ObservedLayer(
                module=layer,
                prefix=f"{prefix}.",
                linears={name: name for name in linears},
                parameters={},
                dtypes={},
                targets={},
                experts=None,
                run=lambda *_args, **_options: None,
            )
        )
        for row in random_rows(LENGTHS, stop=64):  # one by one, so that nothing is padded
            reference(input_ids=torch.tensor([row]), use_cache=False)
        found.append({f"{prefix}.{name}": moments for name, moments in measured.result().items()})
        for module in linears.values():
            module._forward_pre_hooks.clear()
        for name, linear in linears.items():
            linear.weight.data = stored_weight(written, f"{prefix}.{name}")
        layer.input_layernorm.weight.data = written[f"{prefix}.{NORM}"]
    return found


def test_a_method_observes_the_exact_layer_behind_the_quantized_ones(model: Path, rows: Path, tmp_path: Path) -> None:
    """The observer sees the exact layer on hidden states of the quantized layers before it, and no pads.

    Its result reaches `choose`.
    """
    method = DropLoudest()
    written = run_method(model, "nvfp4-four-over-six", tmp_path / "out", rows, method)
    outside, *inside = method.purposes
    assert (outside.runs, outside.observed) == (False, None)
    assert all(purpose.runs for purpose in inside)
    expected = expected_moments(model, written)
    assert len(expected) == len(inside) == 3
    for purpose, layer in zip(inside, expected, strict=True):
        assert purpose.observed.keys() == layer.keys()
        for name, moments in layer.items():
            assert purpose.observed[name].tokens == moments.tokens == sum(LENGTHS)
            assert torch.allclose(purpose.observed[name].mean_square, moments.mean_square, rtol=1e-4), name


def test_a_methods_choices_are_written_and_run(model: Path, rows: Path, tmp_path: Path) -> None:
    """Codes and a changed kept tensor of the method are in the files; every other tensor is the source's."""
    method = DropLoudest()
    written, given = run_method(model, "nvfp4-four-over-six", tmp_path / "out", rows, method), all_tensors(model)
    for number, purpose in enumerate(method.purposes[1:]):
        prefix = f"model.layers.{number}"
        assert len(purpose.observed) == 7
        for module in purpose.observed:
            weight = stored_weight(written, module)
            loudest = method.loudest(module, purpose)
            assert not weight[:, loudest].any()
            rest = torch.arange(weight.shape[1]) != loudest
            exact = given[f"{module}.weight"]
            assert 0 < float((weight - exact)[:, rest].norm() / exact[:, rest].norm()) < 0.2
        assert torch.equal(written[f"{prefix}.{NORM}"], given[f"{prefix}.{NORM}"] * FACTOR)
    others = [name for name in given if name in written and not name.endswith(NORM)]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.post_attention_layernorm.weight"} <= {
        *others
    }
    assert all(same(written[name], given[name]) for name in others)
    # tensors outside the layers, which do not run, are copied from file to file without the method
    assert set(method.kept) == {n for n in given if n.startswith("model.layers.") and n.endswith("layernorm.weight")}


KEPT_EXPERTS = parse_recipe(
    "name: a\nrules: [{role: experts, format: keep}, {role: linear, format: nvfp4, scale_rule: absmax}]", where="a.yaml"
)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("llama", "nvfp4-four-over-six"),
        ("gemma4_text", "nvfp4-fp8-hybrid-four-over-six"),  # layers leave keys and values for later ones
        ("mixtral", "nvfp4-moe-four-over-six"),  # experts that the file has one by one
        ("granitemoe", "nvfp4-moe-four-over-six"),  # in one tensor
        ("granitemoe", KEPT_EXPERTS),
        ("fp8", "nvfp4-fp8-hybrid-four-over-six"),  # codes that stay, and codes that are dequantized
    ],
    ids=["dense", "shared keys", "single experts", "stacked experts", "kept experts", "FP8 source"],
)
def test_an_observation_changes_nothing(
    kind: str, recipe: str | LoadedRecipe, make_tiny: MakeTiny, rows: Path, tmp_path: Path
) -> None:
    """Rounding to nearest after an observation writes the same tensors as without one, whatever layers hold."""
    if kind == "fp8":
        dense = make_tiny("llama", hidden_size=128, head_dim=64, intermediate_size=256, num_hidden_layers=2)
        source = as_fp8(dense, tmp_path / "fp8", "hf-block")
    elif kind in FAMILIES:
        source = make_tiny(kind, **FAMILIES[kind])
    else:
        source = make_mixture(kind, tmp_path / "model")
    method = ObservedRounding()
    written = run_method(source, recipe, tmp_path / "observed", rows, method)
    quantize(source, recipe, output_dir=tmp_path / "plain", dataset=[rows], allow_unverified=True, **OPTIONS)
    expected = all_tensors(tmp_path / "plain")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n].view(torch.uint8), t.view(torch.uint8)) for n, t in expected.items())
    assert method.observed[0] is None
    for found in method.observed[1:]:
        assert found
        assert {moments.tokens for moments in found.values()} == {sum(LENGTHS)}


@dataclass(frozen=True)
class HalvedExperts:
    """Halves the weights of kept experts, and rounds the others to nearest."""

    observe: None = None
    correlates: bool = False

    def input_roundings(self, _observed: Any) -> dict[str, Any]:
        """None."""
        return {}

    def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
        """The halved experts, and the choices of round-to-nearest."""
        for choice in ROUND_TO_NEAREST.choose(groups, purpose):
            if choice.codes is None and is_expert(choice.name):
                assert choice.weight_16bit is not None
                yield replace(choice, weight_16bit=choice.weight_16bit / 2, changed=True)
            else:
                yield choice


def is_expert(name: str) -> bool:
    return ".experts." in name or "put_linear.weight" in name


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss"])
def test_kept_experts_can_be_changed(family: str, rows: Path, tmp_path: Path) -> None:
    """Experts that stay in 16 bits are run and written as the method changed them, one by one or stacked."""
    source = make_mixture(family, tmp_path / "model")
    written = run_method(source, KEPT_EXPERTS, tmp_path / "changed", rows, HalvedExperts())
    plain = run_method(source, KEPT_EXPERTS, tmp_path / "plain", rows, ROUND_TO_NEAREST)
    given = all_tensors(source)
    changed = [name for name in given if is_expert(name)]
    assert len(changed) >= 4
    for name in changed:
        assert same(written[name], given[name] / 2)
        assert same(plain[name], given[name])
    for name, ran in (("model.layers.0.self_attn.q_proj", False), ("model.layers.1.self_attn.q_proj", True)):
        scales = [float(tensors[f"{name}.input_global_scale"]) for tensors in (written, plain)]
        assert (scales[0] != scales[1]) == ran  # inputs of the second layer come from the experts of the first


@pytest.mark.parametrize(
    ("method", "passes"), [(ROUND_TO_NEAREST, 1), (ObservedRounding(), 2)], ids=["plain", "observed"]
)
def test_layers_run_only_as_often_as_needed(
    method: Method, passes: int, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round-to-nearest runs each layer once over all samples; only a method that observes runs it again."""
    runs: list[int] = []
    tokens = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(layer: nn.Module, index: int, batches: list[Batch], *arguments: Any, **options: Any) -> Any:
            nonlocal tokens
            runs.append(index)
            tokens += sum(sum(batch.lengths) for batch in batches)
            return real(layer, index, batches, *arguments, **options)

        return counted

    for name in ("run_layer", "show_layer"):
        monkeypatch.setattr(forward_pass, name, counting(getattr(forward_pass, name)))
    run_method(model, "nvfp4-four-over-six", tmp_path / "out", rows, method)
    assert runs == [index for index in range(3) for _ in range(passes)]
    assert tokens == 3 * passes * sum(LENGTHS)


def test_a_method_that_observes_always_gets_samples(model: Path, rows: Path, tmp_path: Path) -> None:
    """A recipe without activation scales reads samples all the same if the method observes; the bytes stay the same."""
    method = ObservedRounding()
    written = run_method(model, "nvfp4a16-four-over-six", tmp_path / "out", rows, method)
    assert method.observed[0] is None  # outside the layers
    assert all(method.observed[1:])
    quantize(model, "nvfp4a16-four-over-six", output_dir=tmp_path / "plain", **OPTIONS)
    expected = all_tensors(tmp_path / "plain")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n].view(torch.uint8), t.view(torch.uint8)) for n, t in expected.items())


def test_statistics_do_not_replace_an_observation(model: Path, rows: Path, tmp_path: Path) -> None:
    """Statistics of an earlier run are refused for a method that measures the layers itself."""
    quantize(model, "nvfp4-four-over-six", output_dir=tmp_path / "first", dataset=[rows], **OPTIONS)
    calibration = Calibration(
        num_samples=32,
        max_seq_length=1024,
        experts=ExpertCalibration(),
        statistics=tmp_path / "first" / STATISTICS_FILE,
        **OPTIONS,
    )
    with raises("option-conflict", "statistics"):
        prepare(lay_out(read_layout(model), load_recipe("nvfp4-four-over-six")), calibration, ObservedRounding())


def test_an_observer_can_watch_routed_experts(rows: Path, tmp_path: Path) -> None:
    """The observed layer describes its routed experts, so that an observer sees their inputs, too."""
    source = make_mixture("qwen3_moe", tmp_path / "model")
    seen: list[int] = []

    class Experts(NoHooks):
        def begin(self, hidden: Tensor, count: int) -> None:
            assert hidden.dim() == 2
            seen.append(count)

    def watch(observed: ObservedLayer) -> None:
        assert observed.experts is not None
        experts.hook(observed.module.get_submodule(observed.experts.module), Experts())
        observed.run(lambda _: None)

    @dataclass(frozen=True)
    class Watching:
        observe: Callable[[ObservedLayer], None] = watch
        correlates: bool = False

        def input_roundings(self, _observed: Any) -> dict[str, Any]:
            """None."""
            return {}

        def choose(self, groups: Iterable[WeightGroup], purpose: Purpose) -> Iterator[Choice]:
            return ROUND_TO_NEAREST.choose(groups, purpose)

    run_method(source, "nvfp4-moe-four-over-six", tmp_path / "out", rows, Watching())
    assert seen
    assert len(set(seen)) == 1


def test_what_stays_is_copied_while_samples_are_embedded(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors outside the layers are in their files before the first layer is worked on, and written once."""
    name, kept = "model.embed_tokens.weight", all_tensors(model)
    copied = list[str]()
    real_copy = ShardWriter.copy

    def copy(writer: ShardWriter, checkpoint: Checkpoint, name: str, *, infinite: bool = False) -> None:
        copied.append(name)
        real_copy(writer, checkpoint, name, infinite=infinite)

    def embed_late(run: Run, *given: Any) -> None:
        def is_there() -> bool:
            for file in run.directory.glob("*.safetensors"):
                with safe_open(file, "pt") as opened:
                    if name in opened.keys() and torch.equal(opened.get_tensor(name), kept[name]):  # noqa: SIM118
                        return True
            return False

        end = time.monotonic() + 20
        while not is_there():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert not run.finished.done
        embed(run, *given)

    monkeypatch.setattr(snugfit.quantization.loop, "embed", embed_late)
    monkeypatch.setattr(ShardWriter, "copy", copy)
    made = run_method(model, "nvfp4-four-over-six", tmp_path / "out", rows, ROUND_TO_NEAREST)
    assert {name, "model.norm.weight"} <= set(copied)
    assert len(copied) == len(set(copied))
    assert torch.equal(made[name], kept[name])
