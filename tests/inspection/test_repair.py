"""`repair`: lossless faults are gone, everything else stays, and the source is never touched."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.errors import raises
from helpers.tiny_families import all_tensors, same
from helpers.zoo import CASES, Case, head_under_a_class, inverted_globals, spoil
from inspection.conftest import Sound
from snugfit.dialects.rename import inverted, widened
from snugfit.inspection.doctor import doctor, open_evidence
from snugfit.inspection.repair import plan_repair, repair
from snugfit.model.weight_values import stored_slices
from snugfit.records.doctor import MAX_PLACES, REPAIR_SCHEMA

# the same damage is read as a sample and as a whole: one of them is enough
LOSSLESS = [case for case in CASES if case.lossless and case.asked.get("values") != "sample"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def linears(path: Path) -> dict[str, torch.Tensor]:
    """The dequantized weight of every module that is stored as codes."""
    evidence = open_evidence(path, ())
    return {
        name: torch.cat(
            list(
                stored_slices(
                    evidence.checkpoint,
                    evidence.layout.dialect,
                    name,
                    fmt,
                    evidence.layout.dialect.part_names(name, fmt, evidence.checkpoint.tensors),
                )
            )
        )
        for name, fmt in evidence.layout.formats.items()
    }


@pytest.mark.parametrize("case", LOSSLESS, ids=lambda case: f"{case.name}-{case.base}")
def test_a_lossless_fault_is_gone(case: Case, sound: Sound, tmp_path: Path) -> None:
    """The result is sound, with the values of the sound file; the spoiled one stays as it was; twice is as once."""
    spoiled = spoil(case, sound[case.base][0], tmp_path / "spoiled")
    before = digests(spoiled)
    planned = plan_repair(spoiled)
    assert digests(spoiled) == before
    record = repair(spoiled, output_dir=tmp_path / "out")
    assert record == planned
    assert record.schema == REPAIR_SCHEMA
    assert {finding.fault for finding in record.repaired} == {case.fault}
    assert record.left == ()
    assert digests(spoiled) == before
    found = doctor(tmp_path / "out", values="all")
    assert found.findings == ()
    # the damage made another weight of it
    plain = case.fault == "ignore-incomplete" or case.damage is head_under_a_class
    if not plain and case.fault != "experts-unread":
        one, other = linears(sound[case.base][0]), linears(tmp_path / "out")
        assert one.keys() == other.keys()
        exact = case.fault != "global-scale-inverted"
        assert all(torch.equal(one[n], other[n]) if exact else torch.allclose(one[n], other[n]) for n in one)
    again = repair(tmp_path / "out", output_dir=tmp_path / "again")
    assert (again.repaired, again.left, again.rewritten, again.left_out) == ((), (), (), ())
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_a_fault_at_more_places_than_a_record_lists(sound: Sound, tmp_path: Path) -> None:
    """Every global scale of a mixture is turned round, and the record names the first of them."""
    case = Case("global-scale-inverted", "mixtral", inverted_globals)
    spoiled = spoil(case, sound["mixtral"][0], tmp_path / "spoiled")
    record = repair(spoiled, output_dir=tmp_path / "out")
    assert [(f.count > MAX_PLACES, len(f.places)) for f in record.repaired] == [(True, MAX_PLACES)]
    one, other = linears(sound["mixtral"][0]), linears(tmp_path / "out")
    assert all(torch.allclose(one[name], other[name]) for name in one)
    assert doctor(tmp_path / "out", values="all", engine="vllm").findings == ()


def test_names_of_experts_come_back(sound: Sound, tmp_path: Path) -> None:
    """Renamed experts are the sound file's, tensor by tensor."""
    case = next(case for case in CASES if case.fault == "experts-unread")
    record = repair(spoil(case, sound["mixtral_int4"][0], tmp_path / "spoiled"), output_dir=tmp_path / "out")
    one, other = all_tensors(sound["mixtral_int4"][0]), all_tensors(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(same(one[name], other[name]) for name in one)
    assert record.renamed == sum(".experts." in name for name in one)


def test_unchanged_shards_are_shared(sound: Sound, tmp_path: Path) -> None:
    """A shard without a renamed tensor has the same inode; the renamed ones are alone in a new file."""
    spoiled = tmp_path / "spoiled"
    case = next(case for case in CASES if case.damage.__name__ == "unread_cache_scales")
    spoil(Case(case.fault, case.base, case.damage, shards="60KB"), sound["hybrid"][0], spoiled)
    record = repair(spoiled, output_dir=tmp_path / "out")
    shards = [name for name in record.linked if name.endswith(".safetensors")]
    assert shards
    assert record.rewritten
    for name in (*shards, "tokenizer.json"):
        assert (spoiled / name).stat().st_ino == (tmp_path / "out" / name).stat().st_ino
    assert all((spoiled / n).stat().st_ino != (tmp_path / "out" / n).stat().st_ino for n in record.rewritten)


def test_without_hard_links_files_are_copied(sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another disk the result has bytes of its own."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    repair(sound["nvfp4"][0], output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1
    assert digests(tmp_path / "out") == digests(sound["nvfp4"][0])


def test_what_is_not_lossless_is_left_and_named(sound: Sound, tmp_path: Path) -> None:
    """A missing scale stays missing, and the record says so."""
    case = next(case for case in CASES if case.damage.__name__ == "no_weight_scale")
    record = repair(spoil(case, sound[case.base][0], tmp_path / "spoiled"), output_dir=tmp_path / "out")
    assert record.repaired == ()
    assert [finding.fault for finding in record.left] == ["scale-missing"]


@pytest.mark.parametrize("damage", ["without_a_shard", "cut_off", "in_two_shards"])
def test_damaged_files_are_refused(damage: str, sound: Sound, tmp_path: Path) -> None:
    """No change of names brings a shard back: bad input, and nothing is written."""
    case = next(case for case in CASES if case.damage.__name__ == damage)
    spoiled = spoil(case, sound[case.base][0], tmp_path / "spoiled")
    code = {"without_a_shard": "weights-missing", "cut_off": "file-damaged", "in_two_shards": "tensor-duplicate"}
    with raises(code[damage]):
        repair(spoiled, output_dir=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoiled"]


@pytest.mark.parametrize("name", ["nvfp4", "hybrid", "fp8"])
def test_the_other_dialect_and_back(name: str, sound: Sound, tmp_path: Path) -> None:
    """ModelOpt's file of the same codes is sound and has the same values, and so has the one made of it."""
    repair(sound[name][0], output_dir=tmp_path / "modelopt", dialect="modelopt")
    repair(tmp_path / "modelopt", output_dir=tmp_path / "back", dialect="compressed-tensors")
    expected = linears(sound[name][0])
    for made in ("modelopt", "back"):
        found = doctor(tmp_path / made, values="all", base=sound[name][1])
        assert [f.fault for f in found.findings if f.severity != "note"] == []
        values = linears(tmp_path / made)
        assert values.keys() == expected.keys()
        for module, value in values.items():
            torch.testing.assert_close(value, expected[module], rtol=2**-22, atol=0.0)
    assert (tmp_path / "modelopt" / "hf_quant_config.json").is_file()
    assert not (tmp_path / "back" / "hf_quant_config.json").exists()
    codes = {n: t for n, t in all_tensors(sound[name][0]).items() if t.dtype == torch.uint8}
    back = all_tensors(tmp_path / "back")
    assert all(same(t, back[n]) for n, t in codes.items())


def test_modelopt_becomes_compressed_tensors(sound: Sound, tmp_path: Path) -> None:
    """A file of ModelOpt's has the same values in the other dialect, with its scales of inputs as divisors."""
    repair(sound["modelopt"][0], output_dir=tmp_path / "out", dialect="compressed-tensors")
    assert doctor(tmp_path / "out", values="all", base=sound["modelopt"][1]).findings == ()
    one, other = linears(sound["modelopt"][0]), linears(tmp_path / "out")
    for module, value in one.items():
        torch.testing.assert_close(other[module], value, rtol=2**-22, atol=0.0)
    name = "model.layers.0.mlp.down_proj"
    before, after = all_tensors(sound["modelopt"][0]), all_tensors(tmp_path / "out")
    product = before[f"{name}.input_scale"].float() * after[f"{name}.input_global_scale"].float()
    torch.testing.assert_close(product, torch.ones(1))


def test_a_format_without_a_form_in_the_dialect_is_refused(sound: Sound, tmp_path: Path) -> None:
    """ModelOpt has no such INT4, and a 16-bit model has no codes."""
    with raises("quantization-unknown"):
        repair(sound["int4"][0], output_dir=tmp_path / "out", dialect="modelopt")
    with raises("option-conflict", where="dialect"):
        repair(sound["plain"][0], output_dir=tmp_path / "out", dialect="modelopt")
    with raises("option-invalid", where="dialect"):
        repair(sound["nvfp4"][0], output_dir=tmp_path / "out", dialect="gguf")
    assert not (tmp_path / "out").exists()


class Stopped(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize("call", ["link", "pwrite", "ftruncate", "fsync", "rename"])
def test_stopped_at_any_moment_the_source_is_as_it_was(
    call: str, sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call to the system is the last one, there is no result, and every file of the source is the same."""
    case = next(case for case in CASES if case.damage.__name__ == "unread_cache_scales")
    spoiled = tmp_path / "spoiled"
    spoil(Case(case.fault, case.base, case.damage, shards="60KB"), sound["hybrid"][0], spoiled)
    before = digests(spoiled)
    for last in {"rename": (1,), "ftruncate": (1,)}.get(call, (1, 2, 5)):
        counter = [0]
        with monkeypatch.context() as patch:
            owner: Any = Path if call == "rename" else os
            real = getattr(owner, call)

            def stop(*args: Any, _real: Any = real, _last: int = last, _counter: list[int] = counter) -> Any:
                _counter[0] += 1
                if _counter[0] >= _last:
                    raise Stopped
                return _real(*args)

            patch.setattr(owner, call, stop)
            with pytest.raises(Stopped):
                repair(spoiled, output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert digests(spoiled) == before
    assert repair(spoiled, output_dir=tmp_path / "out").left == ()
    assert digests(spoiled) == before


def test_the_output_is_no_part_of_the_source(sound: Sound, tmp_path: Path) -> None:
    """Neither inside the checkpoint, nor where something is already; and the Hub is read only."""
    with raises("output-not-writable"):
        repair(sound["nvfp4"][0], output_dir=sound["nvfp4"][0] / "inside")
    with raises("output-exists"):
        repair(sound["nvfp4"][0], output_dir=sound["fp8"][0])
    with raises("model-not-found"):
        repair("org/name", output_dir=tmp_path / "out")


def test_bytes_of_scales() -> None:
    """16-bit floats become the same numbers in fp32, and reciprocals are rounded once, as torch rounds them."""
    values = torch.tensor([0.1, 3.0, 448.0, 6e4, 1e-4])
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        given = values.to(dtype)
        raw = bytes(given.view(torch.uint8).numpy())
        widen = widened(name)
        wide = raw if widen is None else widen(raw)
        assert torch.frombuffer(bytearray(wide), dtype=torch.float32).equal(given.float())
        found = torch.frombuffer(bytearray(inverted(name)(raw)), dtype=torch.float32)
        assert found.equal(given.float().reciprocal())


def test_the_record_is_json(sound: Sound) -> None:
    """It can be read again."""
    record = plan_repair(sound["nvfp4"][0])
    assert json.loads(record.to_json())["schema"] == REPAIR_SCHEMA
