"""What can be quantized: whether config.json and the tensors agree, which families run, which formats engines load.

Each function yields errors in place of raising them, so that `model/layout.py` can collect them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from snugfit.dialects.packed import WIDE
from snugfit.engines.mixtures import UNSUPPORTED_FAMILIES, UNVERIFIED_FORMATS
from snugfit.errors import UserError
from snugfit.model.config_defaults import EXPERT_COUNTS
from snugfit.model.family_defaults import ENCODER_DECODERS
from snugfit.model.language_config import shares_keys_and_values
from snugfit.model.logical_weights import MXFP4_BLOCKS, ExpertSizes, language_configs, model_types
from snugfit.model.names import TensorName
from snugfit.storage.checkpoint import Checkpoint

_MISMATCH_REMEDY = "Config and weights do not belong together."
# modules whose weight holds all experts, though their names do not say so
_STACKS = frozenset({"input_linear", "output_linear"})


def unsupported_family(checkpoint: Checkpoint) -> Iterator[UserError]:
    """Why this family's experts cannot be calibrated, or its attention not be run, if so."""
    yield from _shared_attention(checkpoint)
    for kind in model_types(checkpoint.config):
        if kind in UNSUPPORTED_FAMILIES:
            yield UserError(
                f"{kind} runs its experts outside transformers' experts interface: {UNSUPPORTED_FAMILIES[kind]}.",
                code="experts-unsupported",
                where=str(checkpoint.path / "config.json"),
                remedy="It needs an adapter in model/experts.py that shows each expert's inputs.",
            )


def encoder_decoder(checkpoint: Checkpoint) -> Iterator[UserError]:
    """The refusal of a model in which a decoder reads an encoder."""
    config = checkpoint.config
    kind = str(config.get("model_type"))
    if config.get("is_encoder_decoder") is True or kind in ENCODER_DECODERS:
        yield UserError(
            f"{kind} is an encoder-decoder: such models are not supported.",
            code="architecture-unsupported",
            where=str(checkpoint.path / "config.json"),
            remedy="Only models of one stack of decoder layers can be quantized.",
        )


def _shared_attention(checkpoint: Checkpoint) -> Iterator[UserError]:
    """Why transformers would not run this model's attention as it was trained, if so."""
    if any(shares_keys_and_values(config) for config in language_configs(checkpoint.config)):
        yield UserError(
            "some layers use the keys and values of others (use_cla), which transformers' model does not do.",
            code="architecture-unsupported",
            where=str(checkpoint.path / "config.json"),
            remedy="This family needs a reader of its own: please report it.",
        )


def unverified_formats(checkpoint: Checkpoint, expert_formats: Collection[str]) -> Iterator[UserError]:
    """Why no tested engine loads routed experts of this family in one of `expert_formats`, if so."""
    for kind in model_types(checkpoint.config):
        unverified = [
            fmt for fmt in expert_formats if (kind, fmt) in UNVERIFIED_FORMATS or (kind, "") in UNVERIFIED_FORMATS
        ]
        if unverified:
            reason = UNVERIFIED_FORMATS.get((kind, unverified[0])) or UNVERIFIED_FORMATS[kind, ""]
            stored_packed = any(name.endswith(MXFP4_BLOCKS) for name in checkpoint.tensors)
            other = "" if stored_packed else "Give them another format (`role: experts`, `format: keep`). "
            yield UserError(
                f"no tested engine loads experts of {kind} in {unverified[0]}: {reason}.",
                code="format-unverified",
                where=str(checkpoint.path / "config.json"),
                remedy=f"{other}Set `allow_unverified` to write them all the same.",
            )


def check_layers(
    checkpoint: Checkpoint, names: Mapping[str, TensorName], num_layers: int, decoder: str
) -> Iterator[UserError]:
    """The first decoder layer that config.json states and the files do not have."""
    present = {parsed.layer for parsed in names.values()}
    missing = next((number for number in range(num_layers) if number not in present), None)
    if missing is not None:
        yield UserError(
            f"no tensor of {decoder}.{missing}, but config.json states {num_layers} layers.",
            code="config-mismatch",
            where=str(checkpoint.path),
            remedy=_MISMATCH_REMEDY,
        )


def check_experts(checkpoint: Checkpoint, names: Collection[TensorName], num_layers: int) -> Iterator[UserError]:
    """The first routed expert that is missing, incomplete, or more than config.json states."""
    found: dict[int, dict[int, set[str]]] = {}
    for name in names:
        if name.layer is not None and name.expert is not None and name.parameter == "weight":
            found.setdefault(name.layer, {}).setdefault(name.expert, set()).add(name.module.rpartition(".")[2])
    where = str(checkpoint.path)
    counts = [config.get(key) for config in language_configs(checkpoint.config) for key in EXPERT_COUNTS]
    stated = {count for count in counts if isinstance(count, int) and not isinstance(count, bool)}
    if max(stated, default=0) > 1 and not any(name.routed for name in names):
        what = f"config.json states {max(stated)} experts, but the files have none."
        yield UserError(what, code="config-mismatch", where=where, remedy=_MISMATCH_REMEDY)
        return
    for layer, experts in found.items():
        count = max(stated, default=max(experts) + 1)
        extra = next((number for number in sorted(experts) if number >= count), None)
        if extra is not None:
            what = f"layer {layer} has an expert {extra}, but config.json states {count} experts."
            yield UserError(what, code="config-mismatch", where=where, remedy=_MISMATCH_REMEDY)
            return
        leaves = set().union(*experts.values())
        for number in range(count):
            missing = sorted(leaves - experts.get(number, set()))
            if missing:
                kind = "multi-token prediction layer" if layer >= num_layers else "layer"
                yield UserError(
                    f"expert {number} of {kind} {layer} has no {missing[0]} (config.json states {count} experts, "
                    f"the files have {len(experts)}).",
                    code="weights-missing",
                    where=where,
                    remedy="Download the checkpoint again: weights are missing.",
                )
                return


def check_stacks(
    checkpoint: Checkpoint, names: Collection[TensorName], stacked: Collection[str], num_layers: int
) -> Iterator[UserError]:
    """The first tensor of all experts of a layer that cannot be split: `stacked` are those that can."""
    for name in names:
        if name.layer is None or name.layer >= num_layers or name.full in stacked:
            continue
        tensor = checkpoint.tensors.get(name.full)
        if tensor is None or len(tensor.shape) != 3 or 1 in tensor.shape or tensor.dtype not in WIDE:
            continue
        if name.routed or name.module.rpartition(".")[2] in _STACKS:
            sizes = ExpertSizes.read(checkpoint.config)
            what = f"hidden_size {sizes.hidden or 'unknown'}, {_or_unknown(sizes.counts)} experts of width "
            yield UserError(
                f"{name.full} {list(tensor.shape)} holds all experts of a layer, in an order that config.json does not "
                f"explain: {what}{_or_unknown(sizes.widths)}.",
                code="experts-unsupported",
                where=str(checkpoint.path),
                remedy=f"{_MISMATCH_REMEDY} If they do, this family needs a row in engines/mixtures.py.",
            )
            return


def _or_unknown(numbers: Collection[int]) -> str:
    return " or ".join(map(str, sorted(numbers))) or "unknown"
