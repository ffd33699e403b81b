"""Which formats each group of a model may have, and the exact bytes of each: a plan's menu. No torch.

Bytes are those of quantization/decide.py (what a run writes) and vram/weights.py (what each GPU holds of it), so a
plan's bytes equal the bytes that are written. A format is on the menu of a group where its shapes allow it, a recipe
may say it, tensor parallelism can split it, and the engine has a kernel for it on the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from snugfit.engines.gpus import GENERATIONS
from snugfit.engines.kernels import Kernel, linear_kernel
from snugfit.errors import UserError
from snugfit.formats.spec import FORMATS, KEEP, TensorFormat
from snugfit.model.layout import ModelLayout
from snugfit.model.support import unverified_formats
from snugfit.planning.groups import EXPERTS, HEAD, Group, assignment_of, find_groups
from snugfit.quantization.decide import outputs_of
from snugfit.recipes.assignment import Assignment
from snugfit.storage.safetensors_header import TensorInfo
from snugfit.vram.fit import ServeSettings
from snugfit.vram.weights import bytes_on_gpu, is_served, kernel_format, split_error

# 4-bit floats, FP8 under one scale a channel, 4-bit integers; FP8 in blocks costs what FP8 in channels costs
DEFAULT_MENU = ("nvfp4", "nvfp4a16", "fp8-dynamic", "int4", "mxfp4")
# engines that were seen to load a quantized output head (engines/kernels.py: HEAD_ENGINES)
_HEAD_ENGINES = frozenset({"vllm"})
_OFFSET_DIGITS = 13  # of a tensor's place in a file, in the header: below 10 TB


@dataclass(frozen=True)
class Bytes:
    """Bytes of tensors: in the files, of these what engines load, of that what each GPU holds, and headers at most."""

    file: int = 0
    served: int = 0
    gpu: int = 0
    header: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        """The bytes of both."""
        file, served = self.file + other.file, self.served + other.served
        return Bytes(file, served, self.gpu + other.gpu, self.header + other.header)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A format that a group may have, as recipes name it (`keep` for what the source has), and its bytes.

    `label` says what the weights are then stored in; `group_size` is INT4's, None for other formats. `arithmetic` is
    the kernel's, such as W4A16; "" where the GPU is unknown.
    """

    format: str
    label: str
    bytes: Bytes
    group_size: int | None = None
    arithmetic: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupMenu:
    """A group's options, what is kept first, and the formats that it cannot have with the reason."""

    group: Group
    options: tuple[Option, ...]
    refused: Mapping[str, str]

    def option(self, fmt: str) -> Option:
        """The option of that format; KeyError where there is none."""
        return {one.format: one for one in self.options}[fmt]


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a plan is to run: the settings of `fit` with the model's KV heads, or None for anywhere."""

    settings: ServeSettings | None = None
    kv_heads: int | None = None

    @property
    def tp(self) -> int:
        """The number of GPUs in tensor parallelism."""
        return self.settings.tensor_parallel_size if self.settings else 1

    def kernel(self, fmt: TensorFormat | None, *, experts: bool) -> Kernel | None:
        """The kernel of a format where the GPU is known and the engine has one."""
        generation = self.settings.gpu.generation if self.settings else None
        if self.settings is None or generation is None:
            return None
        return linear_kernel(self.settings.engine.engine, kernel_format(fmt), generation, experts=experts)

    def why_no_kernel(self, fmt: TensorFormat | None, *, experts: bool) -> str:
        """Why the engine does not run a format on this GPU; "" if it does, or the GPU's generation is unknown."""
        if self.settings is None or self.settings.gpu.generation is None or fmt is None:
            return ""
        if self.kernel(fmt, experts=experts) is not None:
            return ""
        engine, generation = self.settings.engine, GENERATIONS[self.settings.gpu.generation]
        return f"no kernel of {engine.title} is known for {kernel_format(fmt)} on {generation}"


def read_options(layout: ModelLayout, server: Server) -> tuple[GroupMenu, ...]:
    """All options of each group of a model, in the order of the groups.

    UserError for a model that cannot be quantized or has no group.
    """
    sizes = _Sizes(layout, server)
    return tuple(_group_menu(layout, group, sizes) for group in find_groups(layout))


def on_menu(everything: Sequence[GroupMenu], menu: Sequence[str], server: Server) -> tuple[GroupMenu, ...]:
    """Of the options of each group those in `menu` (formats; none: DEFAULT_MENU), and what is kept.

    UserError for an unknown format, and where no group can have any format of the menu.
    """
    formats, found = _formats(menu, server), []
    for one in everything:
        offered = {option.format: option for option in one.options}
        options = tuple(offered[fmt] for fmt in (KEEP, *formats) if fmt in offered)
        found.append(replace(one, options=options, refused={f: one.refused[f] for f in formats if f in one.refused}))
    if all(len(one.options) == 1 for one in found):
        reasons = dict.fromkeys(reason for one in found for reason in one.refused.values())
        if not found:
            reasons = {"there is no linear": None}
        elif not set(formats) - {KEEP}:
            reasons = {"it has none but keep": None}
        why = "; ".join(reasons) or "the source stores them so already"
        what = f"no weight of this model can have a format of the menu: {why}."
        raise UserError(what, code="plan-impossible", where="menu", remedy=f"Formats: {', '.join(FORMATS)}.")
    return tuple(found)


def sizes_outside(layout: ModelLayout, outputs: Mapping[str, Sequence[TensorInfo]], server: Server) -> Bytes:
    """Bytes of all that is written beside the groups: embeddings, norms, routers, scales of a KV cache."""
    inside = {name for group in find_groups(layout) for name in group.weights}
    sizes = _Sizes(layout, server)
    # experts that stay in one tensor of the source are written under its name
    stacks = {stack for stack, names in layout.weights.stacked.items() if inside.issuperset(names)}
    total = Bytes()
    for name, infos in outputs.items():
        if name not in inside and name not in stacks:
            total += sizes.of(name, infos)
    return total


def _formats(menu: Sequence[str], server: Server) -> tuple[str, ...]:
    """The formats to try; UserError for a name that no recipe may write."""
    for name in menu:
        if name not in (*FORMATS, KEEP):
            remedy = f"Formats: {', '.join((*FORMATS, KEEP))}."
            raise UserError(f"unknown format {name!r}.", code="option-invalid", where="menu", remedy=remedy)
    if menu:
        return tuple(name for name in FORMATS if name in menu)
    formats = [name for name in DEFAULT_MENU if name in FORMATS]
    pair = [server.kernel(TensorFormat(name), experts=False) for name in ("nvfp4", "nvfp4a16")]
    if pair[0] is not None and pair[1] is not None and pair[0].arithmetic == pair[1].arithmetic:
        formats.remove("nvfp4a16")  # nvfp4 runs weight-only there: the same bytes and the same arithmetic
    return tuple(formats)


def _group_menu(layout: ModelLayout, group: Group, sizes: _Sizes) -> GroupMenu:
    kept = assignment_of(layout, group, KEEP)
    options, refused = [_option(group, KEEP, kept, sizes)], {}
    for fmt in FORMATS:
        try:
            found = assignment_of(layout, group, fmt)
            reason = _why_not(layout, group, found, sizes.server)
        except UserError as error:
            found, reason = {}, error.what.rstrip(".")
        if reason:
            refused[fmt] = reason
        elif [one.format for one in found.values()] == [one.format for one in kept.values()]:
            continue
        elif all(one.keeps_codes for one in found.values()):
            refused[fmt] = "the source's own codes are kept by `keep`"
        else:
            options.append(_option(group, fmt, found, sizes))
    return GroupMenu(group=group, options=tuple(options), refused=refused)


def _why_not(layout: ModelLayout, group: Group, found: Mapping[str, Assignment], server: Server) -> str:
    """Why no engine would run a group like this; "" if one would."""
    experts = group.role == EXPERTS
    formats = {one.format for one in found.values() if one.format is not None}
    if experts:
        for error in unverified_formats(layout.checkpoint, [fmt.name for fmt in formats]):
            return error.what.rstrip(".")
    if group.role == HEAD and server.settings and server.settings.engine.engine not in _HEAD_ENGINES:
        return f"{server.settings.engine.title} was not seen to load a quantized output head"
    for fmt in formats:
        if reason := server.why_no_kernel(fmt, experts=experts):
            return reason
    for name, one in found.items():
        shape = layout.weights.tensors[name].shape
        if uneven := split_error(name, shape, one.format, server.tp, server.kv_heads):
            return uneven
    return ""


def _option(group: Group, fmt: str, found: Mapping[str, Assignment], sizes: _Sizes) -> Option:
    first = next(iter(found.values()))
    total = Bytes()
    for name, assignment in found.items():
        total += sizes.assigned(name, assignment)
    kernel = sizes.server.kernel(first.format, experts=group.role == EXPERTS)
    size = first.format.group_size if first.format is not None and first.format.name == "int4" else None
    return Option(
        format=fmt,
        label=first.format.label() if first.format else KEEP,
        bytes=total,
        group_size=size if fmt == "int4" else None,
        arithmetic=kernel.arithmetic if kernel else "",
    )


class _Sizes:
    """Bytes of weights; alike ones, such as those of a layer's experts, are computed once."""

    def __init__(self, layout: ModelLayout, server: Server) -> None:
        self._layout = layout
        self.server = server
        self._known: dict[object, Bytes] = {}

    def assigned(self, name: str, assignment: Assignment) -> Bytes:
        """Bytes of a weight as `assignment` has it stored."""
        info = self._layout.weights.tensors[name]
        # copied codes have the shapes of the source's own scales
        alike = name if assignment.keeps_codes else (info.shape, info.dtype, name.split(".")[-2:], len(name))
        key = repr((assignment.format, alike))
        if key not in self._known:
            stored = assignment if assignment.format is not None else None
            self._known[key] = self.of(name, outputs_of(self._layout.weights, name, stored))
        return self._known[key]

    def of(self, name: str, infos: Sequence[TensorInfo]) -> Bytes:
        """Bytes of the tensors that are written for `name`."""
        layout = self._layout
        served = is_served(name, layout.decoder, layout.num_layers) and name not in layout.tied.copies
        gpu = bytes_on_gpu(name, infos, self.server.tp, self.server.kv_heads) if served else 0
        total = sum(info.bytes for info in infos)
        return Bytes(total, total if served else 0, gpu, sum(map(_header_bytes, infos)))


def _header_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor's entry in the header of a shard and in the index, at most."""
    fields = len(info.dtype) + len(str(list(info.shape))) + 2 * _OFFSET_DIGITS
    around = len('"dtype":"","shape":,"data_offsets":[,],{}:') + len(': "model-00000-of-00000.safetensors",\n    ')
    return 2 * len(json.dumps(info.name)) + fields + around
