"""What doctor's checks look at: one reading of a checkpoint, and of each weight what the config asks and the file has.

Nothing here judges. Where layout's reading stops at the first contradiction, this one goes on to the next weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from snugfit.dialects.headers import holds_codes
from snugfit.dialects.packed import Packed
from snugfit.dialects.rename import COMPRESSED, MODELOPT
from snugfit.dialects.schemes import parse_scheme
from snugfit.dialects.targets import Targets, common_name
from snugfit.engines.releases import RELEASES, EngineRelease
from snugfit.engines.unquantized import unquantized
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model.language_config import layer_count
from snugfit.model.layout import ModelLayout, headers_of
from snugfit.model.names import TensorName, parse_name
from snugfit.model.support import check_experts, check_layers
from snugfit.records.doctor import FAULTS, Finding, Severity
from snugfit.storage.checkpoint import INDEX_NAME, Checkpoint, parse_index
from snugfit.storage.files import read_file
from snugfit.storage.safetensors_header import StoredTensor
from snugfit.vram.budget import Gpu

HUGGING_FACE = "fp8"
READ = ("", COMPRESSED, MODELOPT, HUGGING_FACE)  # dialects whose tensors have known names


@dataclass(frozen=True, slots=True)
class Module:
    """One weight matrix: its module's name, its tensors by suffix, and what the config asks of it.

    `asked` is None for a weight that no target names, `ignored` says that the config leaves it plain by name. `stored`
    says that the file holds codes. `refused` is why the config's format has no reader.
    """

    name: str
    parts: Mapping[str, StoredTensor]
    packed: Packed
    parsed: TensorName
    stored: bool
    asked: TensorFormat | None
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A checkpoint, how it was asked to be judged, and what was found on the way.

    `damage` is what storage.lenient says of index and shards, `weight_map` the index (None without one).
    """

    layout: ModelLayout
    engines: tuple[EngineRelease, ...]
    damage: tuple[tuple[str, UserError], ...] = ()
    weight_map: Mapping[str, str] | None = None
    gpu: Gpu | None = None
    tensor_parallel_size: int = 1
    # whether tokenizer and the other small files are looked at: not while a run still writes them
    small_files: bool = True

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint."""
        return self.layout.checkpoint

    @property
    def torn(self) -> tuple[UserError, ...]:
        """Damage of shards, from which values cannot be told apart; not that of an index."""
        return tuple(error for kind, error in self.damage if kind != "index")

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The quantization config, {} without one."""
        return self.layout.quantization

    @property
    def dialect(self) -> str:
        """compressed-tensors, modelopt or fp8; the method's name of others; "" for a 16-bit file."""
        method = self.layout.method
        return MODELOPT if method.startswith(MODELOPT) else method

    @property
    def config_file(self) -> str:
        """The name of config.json and the key, for places."""
        return "config.json: quantization_config"

    @cached_property
    def groups(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Config groups of compressed-tensors by name; groups that are no mapping are left out."""
        groups = self.quantization.get("config_groups")
        found = groups.items() if isinstance(groups, dict) else ()
        return tuple((str(name), group) for name, group in found if isinstance(group, dict))

    @cached_property
    def schemes(self) -> Mapping[int, TensorFormat | str]:
        """id of a config group -> the format that it describes, or why it has no reader."""
        found: dict[int, TensorFormat | str] = {}
        for _, group in self.groups:
            try:
                found[id(group)] = parse_scheme(group, where="")
            except UserError as error:
                found[id(group)] = error.what
        return found

    @cached_property
    def targets(self) -> Targets | None:
        """The targets of a compressed-tensors file, None where they cannot be read."""
        if self.dialect != COMPRESSED or self.layout.unreadable is not None:
            return None
        ignore = self.quantization.get("ignore")
        try:
            groups = [group for _, group in self.groups]
            return Targets(groups, ignore if isinstance(ignore, list) else [], where=self.config_file)
        except UserError:
            return None

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Every linear, and every table that is stored as codes, in the order of the file."""
        names = self.layout.linears
        asked, refused = self._asked(names)
        found = {}
        for name in names:
            packed = self.layout.packed_headers[name][0]
            parts = self.layout.modules[name]
            found[name] = Module(
                name,
                parts,
                packed,
                parse_name(f"{name}.weight", packed.shape, self.layout.decoder),
                holds_codes(headers_of(parts)),
                asked.get(name),
                refused.get(name, ""),
            )
        return found

    @cached_property
    def quantized(self) -> Mapping[str, Module]:
        """Those of `modules` that are stored as codes in the format that the config asks for."""
        return {
            name: module
            for name, module in self.modules.items()
            if module.stored and module.asked is not None and fits(module, module.asked)
        }

    def _asked(self, names: Sequence[str]) -> tuple[Mapping[str, TensorFormat], Mapping[str, str]]:
        """The format that the config asks for, by module; and why none can be read."""
        file_format, targets = self.layout.dialect.file_format, self.targets
        if self.dialect == COMPRESSED and targets is not None:
            return self._targeted(names, targets)
        if file_format is None or self.layout.unreadable is not None or self.dialect == COMPRESSED:
            return {}, {}
        headers = {name: headers_of(self.layout.modules[name]) for name in names}
        try:
            return file_format.formats_of(self.quantization, names, headers, where=""), {}
        except UserError:
            pass  # one weight is at fault: ask for each alone
        asked: dict[str, TensorFormat] = {}
        refused: dict[str, str] = {}
        for name in names:
            try:
                asked |= file_format.formats_of(self.quantization, [name], {name: headers[name]}, where="")
            except UserError as error:
                refused[name] = error.what
        return asked, refused

    def _targeted(self, names: Sequence[str], targets: Targets) -> tuple[Mapping[str, TensorFormat], Mapping[str, str]]:
        asked: dict[str, TensorFormat] = {}
        refused: dict[str, str] = {}
        for name in names:
            parts = self.layout.modules[name]
            try:
                group = targets.group_of(name)
                plain = not holds_codes(headers_of(parts))
                if group is None or (plain and targets.leaves_plain(name)):
                    continue
            except UserError as error:  # a pattern that takes too long
                refused[name] = error.what
                continue
            scheme = self.schemes[id(group)]
            if isinstance(scheme, str):
                refused[name] = scheme
            else:
                asked[name] = scheme
        return asked, refused

    def affected(self, chosen: Iterable[EngineRelease] | None = None) -> tuple[str, ...]:
        """Titles of engines: of all that were asked for, or of those of `chosen`."""
        names = {release.name for release in (self.engines if chosen is None else chosen)}
        return tuple(release.title for release in self.engines if release.name in names)

    def is_in_layers(self, module: Module) -> bool:
        """Whether a module belongs to a decoder layer that config.json states."""
        layer = module.parsed.layer
        return layer is not None and layer < self.layout.num_layers

    @cached_property
    def missing_layers(self) -> tuple[UserError, ...]:
        """Decoder layers that config.json states and the files do not have, one error at most."""
        layout = self.layout
        if not layout.decoder or layer_count(layout.config) is None:
            return ()
        return tuple(check_layers(layout.checkpoint, layout.names, layout.num_layers, layout.decoder))

    @cached_property
    def wrong_experts(self) -> tuple[UserError, ...]:
        """Experts that are missing, incomplete, or more than config.json states, one error at most."""
        return tuple(check_experts(self.checkpoint, self.layout.names.values(), self.layout.num_layers))

    @cached_property
    def unquantized(self) -> Mapping[str, str]:
        """Linears of the layers that engines build in 16 bits, by the names of the file -> the reason."""
        return unquantized(name for name, module in self.modules.items() if self.is_in_layers(module))

    @cached_property
    def known_names(self) -> frozenset[str]:
        """The names of all modules without the parts by which files, transformers and vLLM differ."""
        return frozenset(common_name(module) for module in self.layout.modules)


def finding(
    fault: str,
    places: Sequence[str],
    what: str,
    affected: Sequence[str],
    *,
    remedy: str = "",
    repairable: bool | None = None,
    severity: Severity | None = None,
) -> Iterator[Finding]:
    """One finding for all `places`; nothing where there is no place, and where nobody is affected."""
    if not places or not affected:
        return
    kind = FAULTS[fault]
    yield Finding(
        fault=fault,
        severity=severity or kind.severity,
        where=places[0],
        what=what,
        affected=tuple(affected),
        remedy=remedy or kind.remedy,
        repairable=kind.lossless if repairable is None else repairable,
        count=len(places),
        places=tuple(places),
    )


def fits(module: Module, fmt: TensorFormat) -> bool:
    """Whether the dtype of a module's codes is one of the format's, and its scales are those of its number kind."""
    codes = "weight" if "weight" in module.parts else module.packed.tensor
    if module.parts[codes].dtype not in fmt.spec.codes:
        return False
    scale = module.parts.get("weight_scale")
    if codes != "weight_packed" or scale is None or fmt.name not in ("nvfp4", "nvfp4a16", "mxfp4"):
        return True
    exponents = fmt.name == "mxfp4"
    return (scale.dtype == "U8") == exponents


def read_weight_map(checkpoint: Checkpoint) -> Mapping[str, str] | None:
    """The index of a checkpoint that was opened, None without one."""
    try:
        return parse_index(read_file(checkpoint.path, INDEX_NAME), where="")
    except (FileNotFoundError, UserError):
        return None


def releases(names: Sequence[str]) -> tuple[EngineRelease, ...]:
    """The releases of these names, in the table's order."""
    return tuple(release for name, release in RELEASES.items() if name in names)


def file_name(place: str | Path, root: Path) -> str:
    """A path below the checkpoint's directory without it."""
    text = str(place)
    return text.removeprefix(f"{root}/")
