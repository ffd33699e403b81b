"""`snugfit doctor` and `snugfit repair`: exit codes, JSON, annotations, and what a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.fp8_sources import as_fp8
from helpers.hub_server import COMMIT, files_of, serve
from helpers.tiny_tokenizer import add_tokenizer
from helpers.zoo import Patient, plain_down
from snugfit.cli.app import app
from snugfit.inspection.doctor import doctor
from snugfit.planning.fit import fit
from snugfit.progress import Progress
from snugfit.quantization import quantize as quantization
from snugfit.records.doctor import DOCTOR_SCHEMA, FAULTS, Finding
from storage.test_hub import MakeTiny, point_at

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def source(make_tiny: MakeTiny) -> Path:
    """A tiny llama with a tokenizer."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4}
    return add_tokenizer(make_tiny("llama", **wide))


@pytest.fixture
def sound(source: Path, tmp_path: Path) -> Path:
    """Its FP8 release."""
    return as_fp8(source, tmp_path / "sound", "hf-block")


@pytest.fixture
def broken(source: Path, tmp_path: Path) -> Path:
    """The same with a plain weight that the config does not leave out."""
    patient = Patient(as_fp8(source, tmp_path / "broken", "hf-block"))
    plain_down(patient)
    patient.save()
    return patient.path


def test_exit_codes(sound: Path, broken: Path, tmp_path: Path) -> None:
    """0 for a sound file, 1 for a fault, 2 for what is no checkpoint or no option's value."""
    assert RUNNER.invoke(app, ["doctor", str(sound)]).exit_code == 0
    assert RUNNER.invoke(app, ["doctor", str(broken)]).exit_code == 1
    assert failed_with(RUNNER.invoke(app, ["doctor", str(tmp_path / "nothing")]), "model-not-found", "nothing")
    assert failed_with(RUNNER.invoke(app, ["doctor", str(sound), "--engine", "tgi"]), "option-invalid", "--engine")
    assert failed_with(RUNNER.invoke(app, ["doctor", str(sound), "--gpu", "RTX 7"]), "option-invalid", "--gpu")
    both = ["doctor", str(sound), "--base", str(sound), "--values", "none"]
    assert failed_with(RUNNER.invoke(app, both), "option-conflict", "--values")


def test_a_person_reads_place_reason_and_remedy(broken: Path, sound: Path) -> None:
    """Each finding has its code, what is wrong, who is affected, and what helps; the verdict is the last line."""
    said = RUNNER.invoke(app, ["doctor", str(broken)]).stdout
    for words in ("[will lie] ignore-incomplete", "mlp.down_proj", "affected: all engines", "snugfit repair"):
        assert words in said
    assert "not checked: kernels: --gpu" in said
    assert said.splitlines()[-1] == "verdict: it loads, and computes something else"
    assert RUNNER.invoke(app, ["doctor", str(sound)]).stdout.splitlines()[-1] == "verdict: sound"


def test_json_is_one_document(broken: Path) -> None:
    """With schema, verdict, and findings as records."""
    record = json.loads(RUNNER.invoke(app, ["doctor", str(broken), "--json", "--values", "sample"]).stdout)
    assert (record["schema"], record["verdict"], record["values"]) == (DOCTOR_SCHEMA, "will lie", "sample")
    (finding,) = record["findings"]
    assert (finding["fault"], finding["repairable"]) == ("ignore-incomplete", True)
    assert "vLLM 0.32" in finding["affected"]


def test_annotations_of_github(broken: Path) -> None:
    """One workflow command for a finding, in one line, with what its syntax needs encoded."""
    done = RUNNER.invoke(app, ["doctor", str(broken), "--github"])
    command, verdict = done.stdout.splitlines()
    assert command.startswith("::error file=model.layers.0.mlp.down_proj,title=ignore-incomplete (will lie)::")
    assert verdict.endswith(": will lie")
    assert done.exit_code == 1


def test_only_what_concerns_an_engine(source: Path, tmp_path: Path) -> None:
    """A head that config.json ties is dropped by vLLM 0.24 alone among vLLM's releases."""
    patient = Patient(as_fp8(source, tmp_path / "tied", "hf-block"))
    patient.config["tie_word_embeddings"] = True
    patient.save()
    assert [f.affected for f in doctor(patient.path, engine="vllm").findings] == [("vLLM 0.24",)]
    assert doctor(patient.path, engine=["vllm-0.32", "vllm-0.33"]).verdict == "sound"
    with raises("option-invalid", where="tensor_parallel_size"):
        doctor(patient.path, tensor_parallel_size=0)
    with raises("option-invalid", where="values"):
        doctor(patient.path, values="some")


def test_repair_says_what_it_did(broken: Path, tmp_path: Path) -> None:
    """A dry run writes nothing and says the same; without an output directory it is bad input."""
    assert failed_with(RUNNER.invoke(app, ["repair", str(broken)]), "option-missing", "--output-dir")
    planned = RUNNER.invoke(app, ["repair", str(broken), "--dry-run"])
    assert planned.exit_code == 0
    assert "repaired: ignore-incomplete" in planned.stdout
    done = RUNNER.invoke(app, ["repair", str(broken), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert done.stdout == planned.stdout
    assert RUNNER.invoke(app, ["doctor", str(tmp_path / "out")]).exit_code == 0


def test_a_model_on_the_hub(broken: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, values and the base are read by range; the verdict is that of the directory."""
    with serve(files_of(broken)) as hub:
        point_at(hub, tmp_path / "cache", monkeypatch)
        record = doctor("org/name", values="all", base=source)
        huggingface_hub.close_session()
    assert record.revision == COMMIT
    assert {finding.fault for finding in record.findings} >= {"ignore-incomplete"}
    local = doctor(broken, values="all", base=source)
    assert {(f.fault, f.where) for f in record.findings} == {(f.fault, f.where) for f in local.findings}


def test_fit_uses_the_same_verdict(broken: Path, sound: Path) -> None:
    """A checkpoint that is quantized already and will not load is called so beside its memory."""
    notes = fit(broken, "RTX 5090", recipes=["fp8-dynamic"]).notes
    assert any("ignore-incomplete" in note for note in notes)
    assert not any("doctor" in note for note in fit(sound, "RTX 5090", recipes=["fp8-dynamic"]).notes)


def test_quantize_looks_at_its_own_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header checks run on every result before it appears; a fault of ours would be said, a note not."""
    seen: list[Path] = []

    class Lines(Progress):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def message(self, text: str) -> None:
            self.lines.append(text)

    def find(directory: Path, *, small_files: bool) -> tuple[Finding, ...]:
        assert not small_files
        seen.append(directory)
        kinds = ("scale-missing", "prediction-lost")
        return tuple(
            Finding(
                fault=k, severity=FAULTS[k].severity, where="x", what="y.", affected=(), remedy="", repairable=False
            )
            for k in kinds
        )

    quiet = Lines()
    quantization.quantize(source, "fp8-dynamic", output_dir=tmp_path / "one", device="cpu", progress=quiet)
    assert not any("doctor" in line for line in quiet.lines)
    monkeypatch.setattr(quantization, "check_files", find)
    lines = Lines()
    quantization.quantize(source, "fp8-dynamic", output_dir=tmp_path / "two", device="cpu", progress=lines)
    assert [path.name for path in seen] == ["two.partial"]
    assert [line for line in lines.lines if "doctor" in line] == ["doctor: scale-missing: x: y."]
