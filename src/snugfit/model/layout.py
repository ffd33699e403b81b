"""The one reading of a checkpoint: config.json and headers in, one description out. Imports no torch.

Every verb starts from `read_layout`, so that all of them see the same layers, weights and formats, and refuse the same
models with the same words. A defect does not raise here: it is a blocker, which `inspect` and `fit` print and which
`quantize`, `collect_statistics` and `evaluate` raise before they do anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from snugfit.dialects.dialect import Dialect, open_dialect, read_quant_config
from snugfit.dialects.headers import Headers
from snugfit.dialects.packed import WIDE, Packed, bits_of, method_of, quantization_of, split_name, weights_of
from snugfit.dialects.stale import is_stale
from snugfit.engines.kv_cache import attention_modules, has_scales, unknown_scales
from snugfit.engines.unquantized import unquantized
from snugfit.errors import UserError
from snugfit.formats.spec import TensorFormat
from snugfit.model.anatomy import find_decoder
from snugfit.model.language_config import (
    language_config,
    layer_count,
    layers_without_text,
    positive,
    with_defaults,
)
from snugfit.model.logical_weights import LogicalWeights, logical_weights, plain_weights, stacked_weights
from snugfit.model.loose import take_in
from snugfit.model.missing import check_missing, missing_note, unneeded
from snugfit.model.names import TensorName, parse_name
from snugfit.model.support import check_experts, check_layers, check_stacks, encoder_decoder, unsupported_family
from snugfit.model.tied import TiedEmbeddings, read_tied
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.open import open_headers
from snugfit.storage.safetensors_header import StoredTensor

# what the verbs that import no transformers say of their answers
NOT_CHECKED = (
    "not checked here: whether transformers builds this model with these names and shapes; a dry run checks it"
)


@dataclass(frozen=True, kw_only=True)
class Blocker:
    """A reason why a model cannot be quantized; with `runnable` it can still be run, so that it can be evaluated."""

    error: UserError
    runnable: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """What config.json and the headers say of a model.

    `config` is the language model's part of config.json under today's key names, with transformers' defaults.
    `decoder` is the name of the list of decoder layers in the file, such as model.layers ("" if no tensor's name has a
    number); `num_layers` is what the config states, else what the file has. `weights` are the logical weights, the
    file's own tensors if no recipe can start from them; `names` parses the name of each. `quantization` is what the
    checkpoint says of how it is quantized, {} if nothing, and `method` its name; `stale_method` is the name of a method
    that config.json states although every weight is plain, which all verbs ignore ("" for none). `not_needed` are
    tensors that the index names, no shard holds and nothing needs. `taken_in` are files that no index names, whose
    layers of multi-token prediction count as the model's.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    method: str
    dialect: Dialect
    num_layers: int
    decoder: str
    weights: LogicalWeights
    names: Mapping[str, TensorName]
    blockers: tuple[Blocker, ...]
    unreadable: UserError | None
    tied: TiedEmbeddings
    stale_method: str = ""
    not_needed: tuple[str, ...] = ()
    taken_in: tuple[str, ...] = ()

    @property
    def config_file(self) -> str:
        """The path of config.json, for errors."""
        return str(self.checkpoint.path / "config.json")

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the embeddings: config.json ties it, and the file has no other head."""
        return self.tied.tied

    @property
    def contradictions(self) -> tuple[str, ...]:
        """What config.json or the index states and the tensors refute, where the tensors decide."""
        found = []
        if self.stale_method:
            found.append(
                f"config.json states a quantization ({self.stale_method}), but every weight is plain: the tensors "
                "decide; remove quantization_config before you serve this model"
            )
        if self.tied.own_head:
            found.append(
                f"config.json ties the output head to the embeddings, but {self.tied.own_head} differs from them: the "
                "file's own head counts"
            )
        if self.not_needed:
            found.append(missing_note(self.not_needed))
        return tuple(found)

    @cached_property
    def cache_without_scales(self) -> str:
        """What is wrong with a declared FP8 KV cache whose scales are missing in some layers; "" if nothing."""
        try:
            if self.unreadable is not None or self.dialect.kv_cache_format() is None or not self.decoder:
                return ""
        except UserError:
            return ""
        prefixes = [f"{self.decoder}.{number}" for number in range(self.num_layers)]
        inside: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
        for name, parsed in self.names.items():
            if parsed.layer is not None and parsed.layer < self.num_layers:
                inside[prefixes[parsed.layer]].append(name)
        try:
            caching = attention_modules(inside.values(), self.config, where="")
        except UserError:  # a cache of another kind: every layer counts
            caching = [*prefixes]
        layers = [prefix for prefix, module in zip(prefixes, caching, strict=True) if module is not None]
        bare = sum(not has_scales(self.checkpoint.tensors, prefix) for prefix in layers)
        return f"no scales in {bare} of {len(layers)} layers, where engines take 1.0" if bare else ""

    def check_quantizable(self) -> None:
        """Raise the first blocker."""
        for blocker in self.blockers:
            raise blocker.error

    def check_runnable(self) -> None:
        """Raise the first blocker that concerns more than the way in which the weights are stored."""
        for blocker in self.blockers:
            if not blocker.runnable:
                raise blocker.error

    @cached_property
    def skipped_layers(self) -> frozenset[int]:
        """Decoder layers that text does not run, such as cross attention to pictures."""
        return frozenset(number for number in layers_without_text(self.config) if number < self.num_layers)

    @cached_property
    def not_quantizable(self) -> Mapping[str, str]:
        """Logical weights that no rule may quantize -> the reason."""
        reasons = {
            name: "transformers does not run this layer"
            for name, parsed in self.names.items()
            if parsed.layer is not None and parsed.layer >= self.num_layers
        }
        reasons |= {
            name: "text does not run this layer, so nothing can be calibrated in it"
            for name, parsed in self.names.items()
            if parsed.layer in self.skipped_layers
        }
        if self.tied_embeddings:
            reasons |= {name: "it is tied to the embeddings" for name, p in self.names.items() if p.role == "lm_head"}
        return reasons

    @cached_property
    def unquantized(self) -> Mapping[str, str]:
        """Weights of linears that engines only load in 16 bits -> the reason."""
        linears = {
            parsed.module: name
            for name, parsed in self.names.items()
            if parsed.layer is not None and parsed.layer < self.num_layers and name.endswith(".weight")
        }
        return {linears[module]: reason for module, reason in unquantized(linears).items()}

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, StoredTensor]]:
        """The file's tensors by module, under what follows the module's name ("weight", "weight_scale", ...)."""
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.checkpoint.tensors.items():
            module, suffix = split_name(name)
            found.setdefault(module, {})[suffix] = tensor
        return found

    @cached_property
    def packed(self) -> Mapping[str, list[Packed]]:
        """The weights that each module's tensors stand for, with the shapes that they have unpacked."""
        found = dict(self.packed_headers)
        for module, fmt in self.formats.items():
            if fmt.name in ("int4", "int8"):  # integer codes state their width in the config alone
                found[module] = weights_of(headers_of(self.modules[module]), int(fmt.name.removeprefix("int")))
        return found

    @cached_property
    def packed_headers(self) -> Mapping[str, list[Packed]]:
        """As `packed`, by the headers alone: with a damaged config, too."""
        bits = bits_of(self.quantization)
        return {module: weights_of(headers_of(tensors), bits) for module, tensors in self.modules.items()}

    @property
    def formats(self) -> Mapping[str, TensorFormat]:
        """Format of each linear that is stored quantized, by module; {} if `format_error` says why it is unknown."""
        return self._formats if isinstance(self._formats, Mapping) else {}

    @property
    def format_error(self) -> UserError | None:
        """Why the formats of the stored weights are unknown: no reader, or config and tensors that disagree."""
        return self._formats if isinstance(self._formats, UserError) else None

    @cached_property
    def _formats(self) -> Mapping[str, TensorFormat] | UserError:
        if self.unreadable is not None:
            return self.unreadable
        headers = {name: (tensor.dtype, tensor.shape) for name, tensor in self.checkpoint.tensors.items()}
        try:
            return self.dialect.read_formats(self.linears, headers)
        except UserError as error:
            return error

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Modules that are linears as far as names and shapes say."""
        return tuple(
            module
            for module, packed in self.packed_headers.items()
            if len(packed) == 1 and packed[0].parameter == "weight" and len(packed[0].shape) == 2
            if self.modules[module][packed[0].tensor].dtype not in WIDE or self._may_be_quantized(module)
        )

    def _may_be_quantized(self, module: str) -> bool:
        """Whether the name of a module with a plain 2-D weight may be a linear's that a file could store as codes."""
        role = parse_name(f"{module}.weight", (0, 0), self.decoder).role
        return role not in ("router", "embed", "norm") and "conv" not in module.rpartition(".")[2]


def read_layout(model: str | Path | Checkpoint) -> ModelLayout:
    """The layout of a model: a directory, a Hub id, or a checkpoint that is open already.

    Reads headers alone. Raises UserError for a checkpoint whose files are damaged; every other defect is a blocker.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_headers(model)
    layout = _read(checkpoint)
    fuller = take_in(checkpoint, layout.decoder, layout.num_layers)
    if fuller is checkpoint:
        return layout
    found = _read(fuller)
    same_parts = (found.decoder, found.num_layers) == (layout.decoder, layout.num_layers)
    if not same_parts or len(found.blockers) > len(layout.blockers):  # prediction layers with defects of their own
        return layout
    return replace(found, taken_in=fuller.shards[len(checkpoint.shards) :])


def _read(checkpoint: Checkpoint) -> ModelLayout:
    config_file = str(checkpoint.path / "config.json")
    refused = [Blocker(error=error) for error in encoder_decoder(checkpoint)]
    blockers = [*refused, *(Blocker(error=error) for error in unsupported_family(checkpoint))]
    config = _language_config(checkpoint, blockers, config_file)
    stated = _stated_layers(config, blockers, config_file)
    hf_quant_config = None if checkpoint.remote else read_quant_config(checkpoint.path)
    quantization = quantization_of(checkpoint.config, hf_quant_config)
    method, stale_method = method_of(quantization), ""
    if is_stale(quantization, {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}):
        stale_method, method, quantization = method or "without quant_method", "", {}
        dialect, unreadable = open_dialect({}), None
    else:
        dialect, unreadable = _dialect(checkpoint, hf_quant_config, method, config_file)
    weights = _weights(checkpoint, dialect, unreadable, method, blockers)
    try:
        decoder = find_decoder(weights.tensors, stated or 1, where=str(checkpoint.path))
    except UserError as error:
        blockers.append(Blocker(error=error))
        decoder = ""
    names = {info.name: parse_name(info.name, info.shape, decoder) for info in weights.tensors.values()}
    if stated and decoder and not refused:
        blockers += [Blocker(error=error) for error in check_layers(checkpoint, names, stated, decoder)]
        blockers += [Blocker(error=error) for error in check_experts(checkpoint, names.values(), stated)]
        if not any(not blocker.runnable for blocker in blockers):
            stacks = _stacks(checkpoint, dialect, weights)
            blockers += [Blocker(error=e) for e in check_stacks(checkpoint, names.values(), stacks, stated)]
    blockers += [Blocker(error=error) for error in _unknown_scales(checkpoint, decoder)]
    num_layers = stated or 1 + max((name.layer for name in names.values() if name.layer is not None), default=-1)
    tied = read_tied(checkpoint, config, decoder)
    not_needed = unneeded(checkpoint, decoder, num_layers, tied=tied.tied)
    blockers = [*(Blocker(error=error) for error in check_missing(checkpoint, not_needed)), *blockers]
    return ModelLayout(
        checkpoint=checkpoint,
        config=config,
        quantization=quantization,
        method=method,
        dialect=dialect,
        num_layers=num_layers,
        decoder=decoder,
        weights=weights,
        names=names,
        blockers=tuple(blockers),
        unreadable=unreadable,
        tied=tied,
        not_needed=not_needed,
        stale_method=stale_method,
    )


def _language_config(checkpoint: Checkpoint, blockers: list[Blocker], config_file: str) -> Mapping[str, Any]:
    try:
        return with_defaults(checkpoint.config)
    except UserError as error:
        blockers.append(Blocker(error=error.at(config_file)))
        return language_config(checkpoint.config)


def _stated_layers(config: Mapping[str, Any], blockers: list[Blocker], config_file: str) -> int | None:
    """The layer count that the config states; None, and a blocker, where it states no possible count."""
    stated = layer_count(config)
    if stated is None and not blockers:
        try:
            positive(config, "num_hidden_layers")
        except UserError as error:
            blockers.append(Blocker(error=error.at(config_file)))
    return stated


def _dialect(
    checkpoint: Checkpoint, hf_quant_config: Mapping[str, Any] | None, method: str, config_file: str
) -> tuple[Dialect, UserError | None]:
    """The dialect that the checkpoint is stored in; if it cannot be read, that of 16-bit files, and the error."""
    if method == "mlx":  # declared under a key of its own, `quantization`
        what, remedy = "MLX's own format has no reader.", "Start from the original checkpoint."
        return open_dialect({}), UserError(what, code="quantization-unknown", where=config_file, remedy=remedy)
    try:
        return open_dialect(checkpoint.config, hf_quant_config, where=config_file), None
    except UserError as error:
        return open_dialect({}), error


def _weights(
    checkpoint: Checkpoint, dialect: Dialect, unreadable: UserError | None, method: str, blockers: list[Blocker]
) -> LogicalWeights:
    if unreadable is not None:
        blockers.append(Blocker(error=unreadable))
        return plain_weights(checkpoint, dialect)
    try:
        return logical_weights(checkpoint, dialect, method)
    except UserError as error:
        blockers.append(Blocker(error=error, runnable=True))
        return plain_weights(checkpoint, dialect)


def _stacks(checkpoint: Checkpoint, dialect: Dialect, weights: LogicalWeights) -> Collection[str]:
    """The tensors of all experts of a layer that can be split, also in a checkpoint that no recipe can start from."""
    try:
        return weights.stacked or stacked_weights(checkpoint, dialect).stacked
    except UserError:  # a blocker already
        return checkpoint.tensors


def _unknown_scales(checkpoint: Checkpoint, decoder: str) -> Iterator[UserError]:
    """The first scale inside attention that no engine is known to read: 1.0 in its place would be silently wrong."""
    for name in unknown_scales(checkpoint.tensors, decoder)[:1] if decoder else []:
        yield UserError(
            f"{name} seems to scale keys or values, under a name that is not known.",
            code="quantization-unknown",
            where=str(checkpoint.path),
            remedy="Give it the name self_attn.k_scale or self_attn.v_scale, or remove it.",
        )


def headers_of(tensors: Mapping[str, StoredTensor]) -> Headers:
    """Suffix -> (dtype, shape) of a module's tensors."""
    return {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in tensors.items()}
