"""A zoo of faults: each is found under its own code, and nothing else is; `repair` corrects what is lossless."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.zoo import CASES, Case, Patient, spoil
from inspection.conftest import Sound
from snugfit.engines.releases import RELEASES
from snugfit.inspection.doctor import doctor
from snugfit.model.config_defaults import PREDICTION_KEYS
from snugfit.records.doctor import FAULTS, DoctorRecord


def diagnose(case: Case, path: Path, sound: Sound) -> DoctorRecord:
    return doctor(path, base=sound[case.base][1] if case.against else None, **case.asked)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.base}-{case.asked.get('values', '')}")
def test_a_fault_is_found_and_nothing_else(case: Case, sound: Sound, tmp_path: Path) -> None:
    """The one code, its severity, who is affected, and a place in the checkpoint."""
    record = diagnose(case, spoil(case, sound[case.base][0], tmp_path / "spoiled"), sound)
    assert {finding.fault for finding in record.findings} == {case.fault}, record.findings
    kind = FAULTS[case.fault]
    for finding in record.findings:
        assert finding.severity == kind.severity
        assert finding.affected
        assert finding.what
        assert finding.where
        assert finding.count >= 1
    assert record.exit_code == (0 if kind.severity == "note" else 1)
    assert record.verdict == ("sound" if kind.severity == "note" else kind.severity)


@pytest.mark.parametrize("key", PREDICTION_KEYS)
def test_prediction_is_stated_under_several_names(key: str, sound: Sound, tmp_path: Path) -> None:
    """Each key by which a family states layers of prediction that its file has not; a number of 0 states none."""

    def state(patient: Patient) -> None:
        patient.config[key] = 1

    def state_none(patient: Patient) -> None:
        patient.config[key] = 0

    folder = sound["minimax_m2"][0]
    (finding,) = doctor(spoil(Case("prediction-lost", "minimax_m2", state), folder, tmp_path / "one")).findings
    assert (finding.fault, finding.where) == ("prediction-lost", f"config.json: {key}")
    assert not doctor(spoil(Case("prediction-lost", "minimax_m2", state_none), folder, tmp_path / "none")).findings


@pytest.mark.parametrize(
    ("base", "fault"), [("mixtral", "expert-scales-unread"), ("granitemoe", "experts-not-stacked")]
)
def test_what_one_engine_makes_of_every_such_file(base: str, fault: str, sound: Sound) -> None:
    """What transformers does with experts is a note about it, silent for vLLM, and a lie where it alone is asked."""
    (finding,) = doctor(sound[base][0]).findings
    assert (finding.fault, finding.affected) == (fault, (RELEASES["transformers"].title,))
    assert not doctor(sound[base][0], engine="vllm").findings
    assert doctor(sound[base][0], engine="transformers").verdict == "will lie"
    assert doctor(sound[base][0], engine=["vllm-0.32", "transformers"]).verdict == "sound"


def test_families_of_experts_are_those_of_transformers() -> None:
    """The tables say for which families the installed transformers makes stacks of experts stored one by one."""
    from transformers import conversion_mapping

    release = RELEASES["transformers"]

    def stacks(kind: str) -> bool:
        sources = [one.source_patterns for one in conversion_mapping.get_checkpoint_conversion_mapping(kind) or ()]
        flat = [text for some in sources for text in ([some] if isinstance(some, str) else some)]
        return any(".experts.*." in text.replace("\\", "") or text.startswith("experts.*.") for text in flat)

    assert not any(stacks(kind) for kind in release.stacked_experts)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    assert known is not None
    found = {kind for kind in known if kind.islower() and not kind.endswith("vision_encoder") and stacks(kind)}
    assert found == release.experts_without_global


def test_every_fault_has_a_case() -> None:
    """No code without a file that shows it."""
    assert {case.fault for case in CASES} == set(FAULTS)


def test_what_is_said_to_be_lossless_is_repaired_somewhere() -> None:
    """Each code that the table calls lossless has a case in which it is."""
    assert {case.fault for case in CASES if case.lossless} == {code for code, fault in FAULTS.items() if fault.lossless}
