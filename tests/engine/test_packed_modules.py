"""The linears that vLLM joins, by its own model classes, are the groups that recipes, scales and emulation go by."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from snugfit.engines.fused import FUSED_GROUPS

VERSION = "0.32.0"  # of vLLM, whose classes said this
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
DENSE = frozenset({QKV, GATE_UP})
GATED_DELTA = frozenset({("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")})
# class -> the groups of two and more that it packs; None: vLLM runs transformers' own model, and fuses as it traces it
PACKED: Mapping[str, frozenset[tuple[str, ...]] | None] = {
    "LlamaForCausalLM": DENSE,
    "MistralForCausalLM": DENSE,
    "Ministral3ForCausalLM": DENSE,
    "Qwen2ForCausalLM": DENSE,
    "Qwen3ForCausalLM": DENSE,
    "Gemma2ForCausalLM": DENSE,
    "Gemma3ForCausalLM": DENSE,
    "Gemma4ForCausalLM": DENSE,
    "Phi3ForCausalLM": frozenset(),  # the file has them joined
    "GraniteForCausalLM": DENSE,
    "GraniteMoeHybridForCausalLM": frozenset({QKV}),
    "Glm4ForCausalLM": DENSE,
    "Qwen3NextForCausalLM": DENSE,
    "Qwen3_5ForCausalLM": DENSE | GATED_DELTA,
    "FalconH1ForCausalLM": DENSE,
    "Lfm2ForCausalLM": frozenset({QKV, ("w1", "w3")}),
    "OPTForCausalLM": frozenset({QKV}),
    "DeepseekV2ForCausalLM": frozenset({GATE_UP}),  # q_a_proj and kv_a_proj_with_mqa as the model is made
    "SmolLM3ForCausalLM": None,
    "Olmo2ForCausalLM": None,
    "GPTNeoXForCausalLM": None,
    "Gemma3ForConditionalGeneration": DENSE,
    "Gemma4ForConditionalGeneration": DENSE,
    "Mistral3ForConditionalGeneration": DENSE,
    "LlavaForConditionalGeneration": DENSE,
    "Qwen2VLForConditionalGeneration": frozenset(),  # the Qwen2 inside says it
    "Qwen2_5_VLForConditionalGeneration": DENSE,
    "Qwen3VLForConditionalGeneration": DENSE,
    "Qwen3_5ForConditionalGeneration": DENSE | GATED_DELTA,
    "SmolVLMForConditionalGeneration": DENSE,
    "Idefics3ForConditionalGeneration": DENSE,
}


@pytest.mark.parametrize("model", PACKED)
def test_what_vllm_packs_is_a_group(model: str) -> None:
    """Every group of linears that a vLLM class packs is one of ours, with the same members."""
    assert {frozenset(group) for group in PACKED[model] or ()} <= {frozenset(group) for group in FUSED_GROUPS}


@pytest.fixture(scope="module")
def models() -> Path:
    """The folder of vLLM's model classes, found without importing vLLM."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    code = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return Path(found) / "model_executor" / "models"


@pytest.mark.engine
@pytest.mark.parametrize("model", PACKED)
def test_the_table_is_what_the_installed_vllm_says(model: str, models: Path) -> None:
    """The classes of the installed vLLM, read and not imported, pack what the table says."""
    registry = ast.parse((models / "registry.py").read_text(encoding="utf-8"))
    entries = [node for node in ast.walk(registry) if isinstance(node, ast.Dict)]
    places = {
        key.value: ast.literal_eval(value)
        for entry in entries
        for key, value in zip(entry.keys, entry.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple)
    }
    module, name = places[model]
    if module == "transformers":
        assert PACKED[model] is None
        return
    packed = packed_modules(models, module, name)
    assert frozenset(tuple(group) for group in packed.values() if len(group) > 1) == PACKED[model]


def packed_modules(models: Path, module: str, name: str) -> dict[str, list[str]]:
    """The packed_modules_mapping of a class, its own or that of the first base which has one."""
    tree = ast.parse((models / f"{module}.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    imported = {
        alias.name: node.module.rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module
        and (node.level == 1 or node.module.startswith("vllm.model_executor.models."))
        for alias in node.names
    }

    def of(found: str) -> dict[str, list[str]]:
        if found in imported:
            home = models / f"{imported[found]}.py"
            return packed_modules(models, imported[found], found) if home.is_file() else {}
        if found not in classes:
            return {}
        for statement in classes[found].body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
            if any(isinstance(target, ast.Name) and target.id == "packed_modules_mapping" for target in targets):
                return value_of(statement.value)  # type: ignore[attr-defined]
        bases = [of(base.id) for base in classes[found].bases if isinstance(base, ast.Name)]
        return next((base for base in bases if base), {})

    def value_of(node: ast.expr) -> dict[str, list[str]]:
        if isinstance(node, ast.BinOp):
            return value_of(node.left) | value_of(node.right)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return of(node.value.id)
        value: dict[str, list[str]] = ast.literal_eval(node)
        return value

    return of(name)
