"""Read an installed engine again, and print what differs from the tables that `doctor` uses.

    python benchmarks/engine_facts.py PYTHON

PYTHON is the interpreter of an environment with vLLM, or with transformers and compressed-tensors. Sources are parsed,
nothing of the engine is imported. Exit code 0: the tables of src/snugfit/engines/ say what the sources say; 1: they
differ; 2: there is no engine of which the tables speak.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snugfit.engines.kv_cache import scale_names
from snugfit.engines.releases import ARGUMENT_KEYS, RELEASES, SCHEME_KEYS, EngineRelease

PACKAGES = ("vllm", "compressed_tensors", "transformers")
_FIND = """
import importlib.metadata as m, importlib.util as u, json, sys
found = {}
names = m.packages_distributions()
for name in sys.argv[1:]:
    spec = u.find_spec(name)
    if spec is not None:
        found[name] = [list(spec.submodule_search_locations)[0], m.version(names[name][0])]
print(json.dumps(found))
"""
_VLLM_CT = "model_executor/layers/quantization/compressed_tensors"


@dataclass(frozen=True)
class Package:
    """An installed package: its folder and version."""

    folder: Path
    version: str

    def text(self, name: str) -> str:
        """A source file, "" where the package has none of this name."""
        file = self.folder / name
        return file.read_text(encoding="utf-8") if file.is_file() else ""


def installed(python: str) -> dict[str, Package]:
    """The packages of an environment that the tables speak of."""
    command = [python, "-c", _FIND, *PACKAGES]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {name: Package(Path(folder), version) for name, (folder, version) in found.items()}


def release_of(packages: dict[str, Package]) -> EngineRelease | None:
    """The row of the table for what is installed: vLLM's of the same minor version, or transformers'."""
    if "vllm" in packages:
        minor = ".".join(packages["vllm"].version.split(".")[:2])
        return RELEASES.get(f"vllm-{minor}")
    return RELEASES["transformers"] if "compressed_tensors" in packages and "transformers" in packages else None


def differences(packages: dict[str, Package], release: EngineRelease) -> Iterator[str]:
    """What the table says and the sources do not."""
    library = packages["compressed_tensors"]
    yield from _library(library, release)
    if "vllm" in packages:
        yield from _vllm(packages["vllm"], release)


def _library(library: Package, release: EngineRelease) -> Iterator[str]:
    minor = ".".join(library.version.split(".")[:2])
    if release.compressed_tensors != minor:
        yield f"{release.title}: compressed-tensors {release.compressed_tensors} in the table, {minor} installed"
    for file, name, known in (
        ("quantization/quant_args.py", "QuantizationArgs", ARGUMENT_KEYS),
        ("quantization/quant_scheme.py", "QuantizationScheme", SCHEME_KEYS),
    ):
        fields, forbids = _fields(library.text(file), name)
        if fields != known:
            yield f"{name}: fields {sorted(fields ^ known)} are in one of table and source alone"
        if not forbids:
            yield f"{name} no longer forbids other fields"
    removed = "has been removed" in library.text("quantization/quant_args.py")
    if not release.name.startswith("vllm") and removed is not release.refuses_group_order:
        yield f"actorder group: removed is {removed}, the table says {release.refuses_group_order}"


def _fields(source: str, name: str) -> tuple[frozenset[str], bool]:
    """The fields of a pydantic class, and whether it forbids others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            return frozenset(fields), 'extra="forbid"' in ast.unparse(node).replace("'", '"')
    return frozenset(), False


def _vllm(engine: Package, release: EngineRelease) -> Iterator[str]:
    config = engine.text(f"{_VLLM_CT}/compressed_tensors.py")
    experts = engine.text(f"{_VLLM_CT}/compressed_tensors_moe/compressed_tensors_moe.py")
    facts = {
        "refuses_group_order": "activation ordering" in config and "no longer supported" in config,
        "drops_own_head": "maybe_untie_word_embeddings" not in engine.text("config/model.py"),
        "loads_consolidated": "consolidated*.safetensors"
        in engine.text("model_executor/model_loader/default_loader.py"),
        "forbids_argument_keys": "QuantizationArgs.model_validate" in config,
        "forbids_scheme_keys": "QuantizationScheme.model_validate" in config,
    }
    for name, found in facts.items():
        if getattr(release, name) is not found:
            yield f"{release.title}: {name} is {getattr(release, name)} in the table, {found} in the source"
    own_names = "ckpt_gate_proj_name" in experts
    if own_names is not (not release.expert_leaves):
        names = "their own" if own_names else "fixed"
        yield f"{release.title}: the source looks up experts under {names} names"
    yield from _cache_names(engine)


def _cache_names(engine: Package) -> Iterator[str]:
    """Names of cache scales that the table has and no pattern of the source reads."""
    base = engine.text("model_executor/layers/quantization/base_config.py")
    loader = engine.text("model_executor/model_loader/weight_utils.py")
    patterns = re.findall(r'r"(\\\.[^"]+\$)"', base + loader) + re.findall(r'r"(\(\?<!\\\.attn\)[^"]+\$)"', base)
    compiled = [re.compile(pattern) for pattern in patterns]
    others = re.compile(r"\.(attn\.)?(kv_scale|[kv]_scale)$|_proj\.output_scale$")
    for name in (*scale_names("model.layers.0", "k"), *scale_names("model.layers.0", "v")):
        if not any(pattern.search(name) for pattern in compiled) and not others.search(name):
            yield f"{name}: no pattern of vLLM reads it"


def main() -> int:
    """Compare one environment with the tables."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    packages = installed(sys.argv[1])
    release = release_of(packages)
    shown = ", ".join(f"{name} {package.version}" for name, package in packages.items()) or "none of vllm, transformers"
    if release is None:
        print(f"{shown}: the tables have no such release")
        return 2
    found = list(differences(packages, release))
    print(f"{shown}, as {release.title}: {len(found)} differences")
    for line in found:
        print(f"  {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
