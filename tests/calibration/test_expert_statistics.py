"""Calibration of experts: how many tokens each saw, how large its inputs were, and which saw too few."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.tiny_families import all_tensors, load, random_rows, same, write_rows
from helpers.tiny_mixtures import Source, make_mixture, rewrite
from quantization.test_mixtures import experts_of, from_nvfp4, in_pieces, role
from snugfit.calibration.observers import ExpertObserver
from snugfit.cli.app import app
from snugfit.errors import Unfinished
from snugfit.model import experts
from snugfit.model.experts import NoHooks
from snugfit.model.forward_pass import Batch
from snugfit.quantization.quantize import quantize
from snugfit.recipes.recipe import parse_recipe
from snugfit.records.quantize import RECORD_FILE
from snugfit.records.statistics import ExpertStatistics, LayerStatistics
from snugfit.records.statistics_file import STATISTICS_FILE, load_statistics

# of several lengths: batches are padded
LENGTHS = (70, 41, 3, 64, 30)
TOKENS = sum(LENGTHS)
ROWS = random_rows(LENGTHS, seed=2)
CHOSEN = 2
ALONE = parse_recipe(
    "name: a\nrules: [{role: experts, format: nvfp4, scale_rule: four-over-six}, {role: linear, format: keep}]",
    where="a.yaml",
)  # inputs of NVFP4 are not rounded while they are measured: what experts see is exact
FAMILIES = ["mixtral", "granitemoe", "minimax_m2", "gpt_oss"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples as a file."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Gives a tiny mixture of a family in fp32, made once; "starved": the router chooses only the first two experts."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "model"
            made[kind] = make_mixture("minimax_m2" if kind == "starved" else kind, folder, dtype=torch.float32)
            if kind == "starved":
                tensors = all_tensors(folder)
                for name, tensor in tensors.items():
                    if name.endswith("e_score_correction_bias"):  # beside scores from 0 to 1
                        tensor[:2] += 100
                rewrite(folder, tensors)
        return made[kind]

    return make


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(source: Source, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Quantizes a mixture's experts, once for each set of options, and gives the output."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, *, batch: int = 4096, **calibration: Any) -> Path:
        key = (kind, batch, *sorted(calibration.items()))
        if key not in made:
            out = tmp_path_factory.mktemp(kind) / "out"
            settings: dict[str, Any] = {
                "dataset": [rows],
                "device": "cpu",
                "tokens_per_batch": batch,
                "allow_unverified": True,
            }
            quantize(source(kind), ALONE, output_dir=out, **calibration, **settings)
            made[key] = out
        return made[key]

    return make


def layers_of(out: Path) -> list[LayerStatistics]:
    found = load_statistics(out).layers
    return [found[number] for number in sorted(found)]


def experts_in(out: Path) -> list[ExpertStatistics]:
    """Each layer's experts."""
    found = []
    for layer in layers_of(out):
        (one,) = layer.experts.values()
        found.append(one)
    return found


@dataclass
class Seen:
    """Tokens and largest inputs of a layer's experts in transformers' own model, routed and not."""

    tokens: Tensor
    gate_up: Tensor
    down: Tensor


def middle(family: str, parts: dict[tuple[str, str], Tensor], inputs: Tensor) -> Tensor:
    """Inputs of an expert's down projection, by the family's formula."""
    gate, up = (inputs @ parts[role, "weight"].t() for role in ("gate", "up"))
    if family == "gpt_oss":
        gate, up = gate + parts["gate", "bias"], up + parts["up", "bias"]
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return nn.functional.silu(gate) * up


def singles_of(pieces: Mapping[str, Tensor], layer: int, count: int) -> list[dict[tuple[str, str], Tensor]]:
    """Each expert's tensors in a layer, by (role, parameter)."""
    singles: list[dict[tuple[str, str], Tensor]] = [{} for _ in range(count)]
    for name, tensor in pieces.items():
        place, _, rest = name.partition(".experts.")
        if f".layers.{layer}." in f"{place}." and rest:
            number, leaf, kind = rest.split(".")
            singles[int(number)][role(leaf), kind] = tensor
    return singles


@torch.no_grad()
def reference(family: str, path: Path, out: Path, folder: Path) -> list[Seen]:
    """Inputs of experts in transformers' model with the quantized weights, sample by sample, without padding."""
    whole, written = all_tensors(path), all_tensors(out)
    pieces = in_pieces(family, whole)
    for module, tensor in experts_of(pieces, 2).items():
        tensor.copy_(from_nvfp4(written, module))
    folder.mkdir()
    (folder / "config.json").write_bytes((path / "config.json").read_bytes())
    rewrite(folder, whole)
    model = load(folder)
    assert model.dtype == torch.float32
    model.set_experts_implementation("eager")
    mixtures = [module for module in model.modules() if experts.is_experts(module)]
    found = []
    for layer, mixture in enumerate(mixtures):
        singles = singles_of(pieces, layer, experts.count(mixture))
        seen = Seen(*(torch.zeros(2, len(singles)) for _ in range(3)))
        found.append(seen)

        def note(_: nn.Module, args: tuple[Tensor, ...], seen: Seen = seen, singles: Any = singles) -> None:
            hidden, index, _weights = args
            assert index.shape[1] == CHOSEN
            for expert, parts in enumerate(singles):
                routed = (index == expert).any(1)
                for kind, chosen in enumerate((routed, ~routed)):
                    mine = hidden[chosen]
                    if len(mine):
                        seen.tokens[kind, expert] += len(mine)
                        for largest, inputs in ((seen.gate_up, mine), (seen.down, middle(family, parts, mine))):
                            largest[kind, expert] = torch.maximum(largest[kind, expert], inputs.abs().max())

        mixture.register_forward_pre_hook(note)
    for row in ROWS:
        model(input_ids=torch.tensor([row]), use_cache=False)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_see_what_transformers_shows_them(family: str, source: Source, run: Run, tmp_path: Path) -> None:
    """Tokens and largest inputs of each expert, separately routed and forced, are those of hooks on transformers."""
    out = run(family)
    expected, found = reference(family, source(family), out, tmp_path / "reference"), experts_in(out)
    assert len(found) == len(expected) == 2
    for measured, hooked in zip(found, expected, strict=True):
        assert [*measured.routed] == hooked.tokens[0].tolist()
        assert [*measured.forced] == hooked.tokens[1].tolist()
        for got, meant in (
            ((measured.gate_up_routed, measured.gate_up_forced), hooked.gate_up),
            ((measured.down_routed, measured.down_forced), hooked.down),
        ):
            assert torch.allclose(torch.tensor(got), meant, rtol=1e-4, atol=0)
        assert measured.gate_up == pytest.approx(float(hooked.gate_up.max()), rel=1e-4)
        assert measured.down == pytest.approx(float(hooked.down.max()), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_sees_every_token_once(family: str, run: Run) -> None:
    """With `moe_calibrate_all_experts` each expert sees all real tokens, routed or forced, and no padding."""
    for layer, seen in zip(layers_of(run(family)), experts_in(run(family)), strict=True):
        assert set(seen.tokens) == {TOKENS}
        assert sum(seen.routed) == CHOSEN * TOKENS
        (module,) = layer.experts
        assert layer.inputs[f"{module}.gate_up"].tokens == TOKENS
        assert layer.inputs[f"{module}.gate_up"].amax == seen.gate_up
        assert layer.inputs[f"{module}.down"].tokens == CHOSEN * TOKENS
        assert layer.inputs[f"{module}.down"].amax == max(seen.down_routed)


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_differ_only_in_forced_tokens(family: str, run: Run) -> None:
    """Forced tokens change neither routed ones, nor inputs of later layers, nor any byte but experts' input scales."""
    everyone, routed = run(family), run(family, moe_calibrate_all_experts=False, min_tokens_per_expert=0)
    for one, other in zip(experts_in(everyone), experts_in(routed), strict=True):
        assert other.routed == one.routed
        assert other.gate_up_routed == one.gate_up_routed
        assert other.down_routed == one.down_routed
        assert set(other.forced) == {0}
        assert set(other.gate_up_forced + other.down_forced) == {0.0}
    for first, second in zip(layers_of(everyone), layers_of(routed), strict=True):
        assert first.inputs == second.inputs
        assert len(first.inputs) > 3
    one_file, other_file = all_tensors(everyone), all_tensors(routed)
    assert one_file.keys() == other_file.keys()
    assert all(same(one_file[n], other_file[n]) for n in one_file if not n.endswith("input_global_scale"))


@pytest.mark.parametrize("cap", [0, 1, 20, 50, TOKENS - 1])
def test_max_forced_tokens(cap: int, run: Run) -> None:
    """No expert sees more than `max_forced_tokens` forced tokens, whatever the router sends it; they are spread."""
    for capped, seen in zip(
        experts_in(run("mixtral", max_forced_tokens=cap, min_tokens_per_expert=0)),
        experts_in(run("mixtral")),
        strict=True,
    ):
        assert capped.routed == seen.routed
        assert max(capped.forced) <= cap
        assert all(a <= b for a, b in zip(capped.down_forced, seen.down_forced, strict=True))
        if cap >= 20:  # one of every few tokens: an expert that gets half of the tokens is forced half of these
            assert min(capped.forced) > 0


def test_batches_do_not_change_the_forced_tokens(run: Run) -> None:
    """Forced tokens are counted over all samples: the same for large batches and for one sample at a time."""
    for one, other in zip(
        experts_in(run("mixtral", max_forced_tokens=20)),
        experts_in(run("mixtral", batch=1, max_forced_tokens=20)),
        strict=True,
    ):
        assert (one.routed, one.forced) == (other.routed, other.forced)
        assert one.down_forced == pytest.approx(other.down_forced, rel=1e-5)


@dataclass
class Watch:
    """Calls ExpertObserver directly: the hidden state of a token is its number."""

    cap: int | None
    tokens: int
    forced: dict[int, list[int]] = field(default_factory=dict)

    def run(
        self, lengths: Sequence[Sequence[int]], routed: Callable[[int, int], bool], count: int = 4
    ) -> ExpertStatistics:
        """Batches of rows of these lengths; no statistic may see the pads' values. `routed`: (token, expert)."""
        found = ExpertObserver(NoHooks(), cap=self.cap, tokens=self.tokens)
        number = 0
        for batch in lengths:
            width = max(batch)
            hidden = torch.full((len(batch), width, 2), 1e9)
            for row, length in enumerate(batch):
                hidden[row, :length] = torch.arange(number, number + length)[:, None] + torch.tensor([1.0, -0.5])
                number += length
            flat = hidden.reshape(-1, 2)
            tokens = torch.zeros(len(batch), width, dtype=torch.int64)
            found.before(Batch(tuple(range(len(batch))), tokens, tuple(batch)))
            found.begin(flat, count)
            assert found.first(flat) is flat
            for expert in range(count):
                mine = [n for n, x in enumerate(flat[:, 0].tolist()) if x < 1e9 and routed(int(x) - 1, expert)]
                pads = (flat[:, 0] == 1e9).nonzero().squeeze(1)
                pads = pads[:0] if expert else pads  # routers choose experts for them too
                places = torch.cat((torch.tensor(mine, dtype=torch.int64), pads))
                found.second(expert, flat[places] * -3, places, forced=False)
                more = found.forced(expert, places)
                if more is not None:
                    self.forced.setdefault(expert, []).extend(int(x) - 1 for x in flat[more, 0].tolist())
                    found.second(expert, flat[more] * -3, more, forced=True)
        assert number == self.tokens
        return found.result()[0]


BATCHES = [(40, 7, 23), (30, 30), (1,), (5, 4, 3, 2, 1), (54,)]


@pytest.mark.parametrize("cap", [1, 3, 7, 20, 199, 200, 10_000])
def test_forced_tokens_are_spread_evenly(cap: int) -> None:
    """Each expert is forced every n-th real token, different ones for each, n as small as the cap allows."""
    watch = Watch(cap, 200)
    seen = watch.run(BATCHES, lambda *_: False)
    stride = -(-200 // cap) if cap < 200 else 1
    for expert in range(4):
        forced = watch.forced[expert]
        assert len(forced) == seen.forced[expert] <= cap
        assert len(forced) >= 200 // stride
        assert {b - a for a, b in itertools.pairwise(forced)} <= {stride}
    if stride >= 4:
        assert len({tuple(watch.forced[expert]) for expert in range(4)}) == 4
    assert seen.routed == (0, 0, 0, 0)


def test_routed_tokens_are_not_forced() -> None:
    """A token that the router sends to an expert is counted once, as routed; the largest inputs are separate."""
    watch = Watch(10_000, 200)
    seen = watch.run(BATCHES, lambda token, expert: token % 4 == expert)
    assert seen.routed == (50,) * 4
    assert seen.forced == (150,) * 4
    assert seen.gate_up_routed == (197.0, 198.0, 199.0, 200.0)
    assert seen.gate_up_forced == (200.0, 200.0, 200.0, 199.0)
    assert seen.down_routed == (3 * 197.0, 3 * 198.0, 3 * 199.0, 3 * 200.0)
    assert seen.down_forced == (600.0, 600.0, 600.0, 597.0)
    for expert, forced in watch.forced.items():
        assert forced == [token for token in range(200) if token % 4 != expert]


@pytest.mark.parametrize("cap", [None, 0])
def test_no_forced_tokens(cap: int | None) -> None:
    """Without a cap, or with a cap of 0, experts see only what the router sends them, and no padding."""
    seen = Watch(cap, 200).run(BATCHES, lambda _, expert: expert == 1)
    assert seen.routed == (0, 200, 0, 0)
    assert seen.forced == (0, 0, 0, 0)
    assert seen.gate_up_routed == (0.0, 200.0, 0.0, 0.0)
    assert seen.experts_below(1) == (0, 2, 3)


def test_starved_experts_are_an_error(source: Source, rows: Path, tmp_path: Path) -> None:
    """Experts that the router never chose are an error; the run resumes with a lower `min_tokens_per_expert`."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "moe_calibrate_all_experts": False}
    with raises("experts-uncovered", where="model.layers.0.block_sparse_moe.experts") as caught:
        quantize(source("starved"), "nvfp4-moe-four-over-six", output_dir=out, **options)
    assert isinstance(caught.value, Unfinished)
    assert all(word in caught.value.what for word in ("6 of 8", "32", "2 (0), 3 (0), 4 (0), 5 (0), 6 (0), 7 (0)"))
    assert "`moe_calibrate_all_experts`" in caught.value.remedy
    assert "`min_tokens_per_expert`" in caught.value.remedy
    assert not out.exists()
    # the same run resumes: the bytes do not depend on how many tokens are enough
    record = quantize(source("starved"), "nvfp4-moe-four-over-six", output_dir=out, min_tokens_per_expert=0, **options)
    assert record.resumed is not None
    for seen in experts_in(out):
        assert seen.routed == (TOKENS, TOKENS, 0, 0, 0, 0, 0, 0)
        assert set(seen.forced) == {0}
    scales = {float(t) for n, t in all_tensors(out).items() if n.endswith("input_global_scale") and "layers.1" in n}
    assert len(scales) == 2


@pytest.mark.parametrize(("least", "refused"), [(TOKENS, False), (TOKENS + 1, True)])
def test_forced_tokens_calibrate_starved_experts(
    least: int, refused: bool, source: Source, rows: Path, tmp_path: Path
) -> None:
    """With `moe_calibrate_all_experts` an expert to which no token is routed sees all tokens, and no more."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"dataset": [rows], "device": "cpu", "min_tokens_per_expert": least}
    if refused:
        with raises("experts-uncovered", where="model.layers.0.block_sparse_moe.experts") as caught:
            quantize(source("starved"), "nvfp4-moe-four-over-six", output_dir=out, **options)
        assert "8 of 8" in caught.value.what
        assert "`moe_calibrate_all_experts`" not in caught.value.remedy  # it is on already
        assert not out.exists()
        return
    quantize(source("starved"), "nvfp4-moe-four-over-six", output_dir=out, **options)
    for seen in experts_in(out):
        assert seen.routed == (TOKENS, TOKENS, 0, 0, 0, 0, 0, 0)
        assert seen.forced == (0, 0, *[TOKENS] * 6)
        assert min(seen.down_forced[2:]) > 0
        assert set(seen.gate_up_routed[2:] + seen.down_routed[2:]) == {0.0}


def test_experts_that_need_no_samples(source: Source, rows: Path, tmp_path: Path) -> None:
    """A recipe without input scales runs no samples, whatever routers choose."""
    record = quantize(
        source("starved"), "fp8-int4-moe-absmax", output_dir=tmp_path / "out", dataset=[rows], device="cpu"
    )
    assert record.dataset is None
    assert not (tmp_path / "out" / STATISTICS_FILE).exists()


@pytest.mark.parametrize("fmt", ["keep", "int4, scale_rule: absmax"])
def test_experts_without_input_scales_may_starve(fmt: str, source: Source, rows: Path, tmp_path: Path) -> None:
    """If only attention is calibrated, experts in a format without input scales may see no token."""
    attention = "role: attention, format: nvfp4, scale_rule: four-over-six"
    text = f"name: a\nrules:\n- {{role: experts, format: {fmt}}}\n- {{{attention}}}\n"
    settings: dict[str, Any] = {"dataset": [rows], "device": "cpu", "moe_calibrate_all_experts": False}
    quantize(source("starved"), parse_recipe(text, where="a.yaml"), output_dir=tmp_path / "out", **settings)


def command(model: Path, out: Path, rows: Path, *options: object) -> Any:
    given = [
        "quantize",
        model,
        "-r",
        "nvfp4-moe-four-over-six",
        "-o",
        out,
        "--dataset",
        rows,
        "--device",
        "cpu",
        *options,
    ]
    return CliRunner().invoke(app, [str(argument) for argument in given])


def test_the_command_names_starved_experts(source: Source, rows: Path, tmp_path: Path) -> None:
    """--no-moe-calibrate-all-experts refuses starved experts; --min-tokens-per-expert 0 accepts and records them."""
    out, routed = tmp_path / "out", "--no-moe-calibrate-all-experts"
    refused = command(source("starved"), out, rows, routed)
    named = "model.layers.0.block_sparse_moe.experts: ", "6 of 8", "32", "`--min-tokens-per-expert` 0"
    assert failed_with(refused, "experts-uncovered", *named)
    assert not out.exists()
    accepted = command(source("starved"), out, rows, routed, "--min-tokens-per-expert", 0)
    assert accepted.exit_code == 0, accepted.stderr
    arguments = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))["arguments"]
    assert (arguments["moe_calibrate_all_experts"], arguments["min_tokens_per_expert"]) == (False, 0)
    assert not load_statistics(out).all_experts


@pytest.mark.parametrize(
    ("option", "value"), [("--max-forced-tokens", -1), ("--min-tokens-per-expert", -1), ("--max-forced-tokens", "many")]
)
def test_impossible_numbers_of_tokens(option: str, value: object, source: Source, rows: Path, tmp_path: Path) -> None:
    """Negative numbers of tokens, and values that are not numbers, are refused with the option's name."""
    refused = command(source("mixtral"), tmp_path / "out", rows, option, value)
    assert failed_with(refused, "option-invalid", option)
    assert not list(tmp_path.iterdir())
