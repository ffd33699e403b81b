"""The linears that vLLM builds without a quantization config are those to which no recipe gives codes."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from snugfit.engines.fused import LOOKED_UP_AS
from snugfit.engines.mixtures import EXPERTS_LOOKED_UP_AS, UNSUPPORTED_FAMILIES
from snugfit.engines.unquantized import unquantized
from snugfit.model.names import KEPT_ROLES, parse_name

# of vLLM 0.32: classes whose linears without a quantization config are no linears of decoder layers of a language model
OUTSIDE = frozenset(
    {
        *("Conv2dSubsampling", "ConformerFeedForward", "EncoderMultiHeadAttention", "RelPosMultiHeadAttention"),
        *("FireRedASR2Adapter", "MultiHeadedAttentionSANM", "PositionwiseFeedForward", "Transformer"),
        *("Gemma3nMultimodalEmbedder", "InternLM2ForRewardModel", "JinaVLScorer", "LiLiCorrHead", "MLP2"),
        *("CandidateSelector", "DSparkConfidenceHead", "DFlashConfidenceHead", "NomicMoE"),
    }
)
# words in the names of classes that are not of the decoder either
OTHER_PARTS = ("vision", "visual", "audio", "patch", "mtp", "eagle", "projector", "siglip", "vit", "connector", "bert")
# (class, its linear in vLLM) -> the linears of a file that it holds, by their names in a decoder layer, and what is
# beside them
PLACES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("Indexer", "wk_weights_proj"): ("self_attn.indexer.wk", "self_attn.indexer.weights_proj"),
    ("MambaMixer", "in_proj"): ("mamba.in_proj", "mamba.x_proj"),
    ("MambaMixer", "x_proj"): ("mamba.x_proj",),
    ("MambaMixer", "dt_proj"): ("mamba.dt_proj", "mamba.x_proj"),
    ("MambaMixer", "out_proj"): ("mamba.out_proj", "mamba.x_proj"),
    ("Gemma4Router", "proj"): ("router.proj",),
    ("LongcatRouter", "classifier"): ("mlp.router.classifier",),
    ("DbrxRouter", "layer"): ("ffn.router.layer",),
}
# names that vLLM gives parts of decoder layers and looks formats up under, where its attribute has another name: the
# table's, or of families that are not quantized, or parts whose linears have no format
LOOKED_UP = {**LOOKED_UP_AS, **EXPERTS_LOOKED_UP_AS}
OTHER_NAMES = frozenset({"text_experts", "vision_experts", "mla_attn", "router", "mamba_decoder"})
_LINEARS = frozenset(
    {"ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear"}
    | {"GateLinear"}
)


@pytest.fixture(scope="module")
def classes() -> list[ast.ClassDef]:
    """The classes of the installed vLLM's models and state-space layers, read and not imported."""
    python = os.environ.get("SNUGFIT_VLLM_PYTHON")
    if not python:
        pytest.fail("SNUGFIT_VLLM_PYTHON must name the Python of a vLLM environment: run `make engine`")
    code = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    executor = Path(found) / "model_executor"
    files = [*(executor / "models").glob("*.py"), *(executor / "layers" / "mamba").rglob("*.py")]
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    inside = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return [c for c in inside if c.name not in OUTSIDE and not any(word in c.name.lower() for word in OTHER_PARTS)]


def made_in(parent: ast.ClassDef) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(attribute, class, keywords) of every module that a class makes."""
    for node in ast.walk(parent):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.targets[0])
            made = ast.unparse(node.value.func).rpartition(".")[2]
            if name.startswith("self."):
                keywords = {k.arg: ast.unparse(k.value) for k in node.value.keywords if k.arg}
                yield name.removeprefix("self."), made, keywords


@pytest.mark.engine
def test_linears_without_a_quantization_config_stay(classes: list[ast.ClassDef]) -> None:
    """Each is a router, a convolution, a head, or one of the table; a new one of another release fails here."""
    missing = []
    for parent in classes:
        for name, made, keywords in made_in(parent):
            if made not in _LINEARS or keywords.get("quant_config", "None") != "None" or "conv" in name:
                continue
            places = PLACES.get((parent.name, name), (f"mlp.{name}",))
            modules = [f"model.layers.0.{place}" for place in places]
            role = parse_name(f"{modules[0]}.weight", (8, 64)).role
            if name != "lm_head" and role not in KEPT_ROLES and modules[0] not in unquantized(modules):
                missing.append(f"{parent.name}.{name}")
    assert not missing


@pytest.mark.engine
def test_other_names_of_parts_are_in_the_tables(classes: list[ast.ClassDef]) -> None:
    """Where vLLM looks a part of a layer up under another name than its attribute's, the targets know that name."""
    missing = []
    for parent in classes:
        for name, made, keywords in made_in(parent):
            prefix = keywords.get("prefix", "")
            other = prefix.removeprefix("f'{prefix}.").removesuffix("'")
            plain = prefix == f"f'{{prefix}}.{other}'" and other.isidentifier()
            family = parent.name.lower().startswith(tuple(kind.replace("_", "") for kind in UNSUPPORTED_FAMILIES))
            known = made in _LINEARS or family or name in OTHER_NAMES or LOOKED_UP.get(name) == other
            if plain and other != name and made[0].isupper() and not known and "Embedding" not in made:
                missing.append(f"{parent.name}.{name} as {other}")
    assert not missing


@pytest.mark.engine
def test_the_table_is_of_this_vllm(classes: list[ast.ClassDef]) -> None:
    """Every linear of the table that the test names is in this release, without a quantization config."""
    found = {
        (parent.name, name)
        for parent in classes
        for name, made, keywords in made_in(parent)
        if made in _LINEARS and keywords.get("quant_config", "None") == "None"
    }
    assert PLACES.keys() <= found
