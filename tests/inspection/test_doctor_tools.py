"""What other tools write and engines take: findings name the engines that they concern, and no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from helpers.zoo import CASES, Case, Patient, head_under_a_class, renamed_experts, spoil
from inspection.conftest import Sound
from snugfit.inspection.doctor import doctor, without_consequences
from snugfit.records.doctor import Finding

NEWER = {"vLLM 0.32", "vLLM 0.33"}
VLLM = {"vLLM 0.24", *NEWER}


def case_of(damage: object) -> Case:
    return next(case for case in CASES if case.damage is damage)


def concerned(path: Path, fault: str, engine: str = "") -> set[str]:
    """The engines that findings of this code name; no other code is found."""
    record = doctor(path, engine=engine or ())
    assert {finding.fault for finding in record.findings} <= {fault}
    return {title.partition(" with")[0] for finding in record.findings for title in finding.affected}


def test_llm_compressors_mixtral_loads_in_newer_vllm(sound: Sound, tmp_path: Path) -> None:
    """gate_proj, up_proj and down_proj are mapped to w1, w3 and w2 there (models/mixtral.py), and nowhere else."""
    spoiled = spoil(case_of(renamed_experts), sound["mixtral_int4"][0], tmp_path / "spoiled")
    found = concerned(spoiled, "experts-unread")
    assert found == {"vLLM 0.24", "SGLang 0.5", "transformers 5"}
    assert doctor(spoiled, engine="vllm-0.33").verdict == "sound"


def test_formats_of_renamed_experts_are_looked_up_under_the_familys_names(sound: Sound, tmp_path: Path) -> None:
    """A target of the file's names alone finds nothing in newer vLLM; what else is wrong is said of others."""
    spoiled = spoil(case_of(renamed_experts), sound["mixtral_int4"][0], tmp_path / "spoiled")
    patient = Patient(spoiled)
    patient.group("int-4")["targets"] = [r"re:.*experts\.\d+\.(gate|up|down)_proj$"]
    patient.save()
    record = doctor(spoiled)
    found = {title: finding.fault for finding in record.findings for title in finding.affected}
    assert {found[title] for title in NEWER} == {"target-not-looked-up"}
    assert found["vLLM 0.24"] == found["SGLang 0.5"] == "experts-unread"


def test_a_head_needs_a_target_of_its_name(sound: Sound, tmp_path: Path) -> None:
    """Codes under the class Linear stop vLLM and SGLang; transformers, whose head is of that class, reads them."""
    spoiled = spoil(case_of(head_under_a_class), sound["fp8"][0], tmp_path / "spoiled")
    assert concerned(spoiled, "target-not-looked-up") == {*VLLM, "SGLang 0.5"}
    patient = Patient(spoiled)
    patient.group("float-8")["targets"] = ["Linear", "re:.*lm_head$"]
    patient.save()
    assert doctor(spoiled).findings == ()


def test_a_plain_head_under_a_class_is_plain_in_servers(sound: Sound, tmp_path: Path) -> None:
    """auto-round leaves `ignore` empty: vLLM and SGLang keep the head, transformers makes codes of it."""
    spoiled = spoil(case_of(head_under_a_class), sound["fp8"][0], tmp_path / "spoiled")
    patient = Patient(spoiled)
    del patient.tensors["lm_head.weight_scale"]
    patient.tensors["lm_head.weight"] = torch.randn(patient.tensors["lm_head.weight"].shape).bfloat16()
    patient.save()
    assert concerned(spoiled, "ignore-incomplete") == {"transformers 5"}
    assert doctor(spoiled, engine=["vllm", "sglang"]).verdict == "sound"


def test_consolidated_shards_without_an_index(sound: Sound, tmp_path: Path) -> None:
    """SGLang passes over consolidated.safetensors alone; shards of it, or more, it loads beside the model."""
    path = spoil(case_of(head_under_a_class), sound["fp8"][0], tmp_path / "spoiled")
    patient = Patient(path)
    patient.group("float-8")["targets"].append("lm_head")
    patient.save()
    for name, titles in (("consolidated", VLLM), ("consolidated-00001-of-00002", {*VLLM, "SGLang 0.5"})):
        file = path / f"{name}.safetensors"
        file.write_bytes((path / "model.safetensors").read_bytes())
        assert concerned(path, "files-beside") == titles
        file.unlink()


def test_a_consequence_stays_where_its_cause_does_not_concern_an_engine() -> None:
    """A finding is left out only if the one that makes it certain is said of the same engines."""

    def of(fault: str, *engines: str) -> Finding:
        return Finding(
            fault=fault, severity="will lie", where="w", what="x", affected=engines, remedy="", repairable=False,
            count=1, places=("w",),
        )  # fmt: skip

    cause = of("experts-unread", "A", "B")
    assert without_consequences([cause, of("target-not-looked-up", "B")]) == [cause]
    beyond = of("target-not-looked-up", "B", "C")
    assert without_consequences([cause, beyond]) == [cause, beyond]


def test_weights_without_a_reader_are_not_compared(sound: Sound, tmp_path: Path) -> None:
    """GPTQ's codes and what feeds them say nothing against the base; a norm that differs may hold their gains."""
    path = shutil.copytree(sound["plain"][0], tmp_path / "gptq")
    patient = Patient(path)
    for name in [name for name in patient.tensors if "_proj.weight" in name]:
        rows, columns = patient.tensors.pop(name).shape
        module = name.removesuffix(".weight")
        patient.tensors[f"{module}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        patient.tensors[f"{module}.qzeros"] = torch.zeros(columns // 64, rows // 8, dtype=torch.int32)
        patient.tensors[f"{module}.scales"] = torch.ones(columns // 64, rows, dtype=torch.float16)
    patient.config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
    patient.save()
    assert doctor(path, base=sound["plain"][0]).findings == ()
    patient.tensors["model.layers.0.input_layernorm.weight"].mul_(1.5)
    patient.save()
    record = doctor(path, base=sound["plain"][0])
    assert [finding.fault for finding in record.findings] == ["base-folded"]
    assert record.verdict == "sound"


def test_renamed_experts_are_compared_with_the_base(sound: Sound, tmp_path: Path) -> None:
    """Experts that llm-compressor renamed are the base's; a wrong one is still found."""
    renamed = spoil(case_of(renamed_experts), sound["mixtral_int4"][0], tmp_path / "spoiled")
    base = sound["mixtral_int4"][1]
    assert doctor(renamed, base=base, engine="vllm-0.33").findings == ()
    patient = Patient(renamed)
    name = "model.layers.0.block_sparse_moe.experts.1.up_proj.weight_scale"
    patient.tensors[name].mul_(2)
    patient.save()
    assert {f.fault for f in doctor(renamed, base=base, engine="vllm-0.33").findings} == {"base-weight-far"}


def test_a_single_damaged_file_is_one_finding(sound: Sound, tmp_path: Path) -> None:
    """What follows from a file without tensors is not reported beside it."""
    path = shutil.copytree(sound["nvfp4"][0], tmp_path / "cut")
    (path / "model.safetensors").write_bytes(b"cut off")
    assert [finding.fault for finding in doctor(path).findings] == ["shard-damaged"]
