"""A zoo of faults: each is found under its own code, and nothing else is; `repair` corrects what is lossless."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.zoo import CASES, Case, Patient, spoil
from inspection.conftest import Sound
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


def test_every_fault_has_a_case() -> None:
    """No code without a file that shows it."""
    assert {case.fault for case in CASES} == set(FAULTS)


def test_what_is_said_to_be_lossless_is_repaired_somewhere() -> None:
    """Each code that the table calls lossless has a case in which it is."""
    assert {case.fault for case in CASES if case.lossless} == {code for code, fault in FAULTS.items() if fault.lossless}
