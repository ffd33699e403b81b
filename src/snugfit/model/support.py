"""What can be calibrated and what no tested engine loads: families, experts, formats."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from snugfit.engines.mixtures import OUTSIDE, UNSERVED
from snugfit.errors import UserError
from snugfit.model.names import TensorName
from snugfit.model.sources import MXFP4_BLOCKS, language_configs
from snugfit.storage.checkpoint import Checkpoint

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def obstacles(checkpoint: Checkpoint, *, experts: Collection[str] = ()) -> tuple[UserError, ...]:
    """Why a run would be refused: experts outside transformers' interface, or that no engine was seen to load.

    `experts` are the formats that routed experts are to be written in.
    """
    found = list(outside_interface(checkpoint))
    for kind in dict.fromkeys(str(config.get("model_type")) for config in language_configs(checkpoint.config)):
        named = [fmt for fmt in experts if (kind, fmt) in UNSERVED or (kind, "") in UNSERVED]
        if named:
            reason = UNSERVED.get((kind, named[0])) or UNSERVED[kind, ""]
            what = f"no engine was seen to load experts of {kind} in {named[0]}: {reason}."
            packed = any(name.endswith(MXFP4_BLOCKS) for name in checkpoint.tensors)
            other = "" if packed else "Give them another format (`role: experts`, `format: keep` leaves them), or "
            remedy = f"{other}{'Add' if packed else 'add'} --no-engine to write them all the same."
            found.append(NoEngine(what, where=str(checkpoint.path / "config.json"), remedy=remedy))
    return tuple(found)


def outside_interface(checkpoint: Checkpoint) -> Iterator[UserError]:
    """Why the experts of this family cannot be calibrated, if so."""
    for kind in dict.fromkeys(str(config.get("model_type")) for config in language_configs(checkpoint.config)):
        if kind in OUTSIDE:
            yield UserError(
                f"{kind} runs its experts outside transformers' experts interface: {OUTSIDE[kind]}.",
                where=str(checkpoint.path / "config.json"),
                remedy="It needs an adapter in model/experts.py that shows each expert's inputs.",
            )


class NoEngine(UserError):  # noqa: N818  # the name is what it says
    """An obstacle that a user may choose to pass: the file will be right, and no engine is known to load it."""


def check_experts(checkpoint: Checkpoint, names: Collection[TensorName], layers: int) -> None:
    """UserError where a layer's experts are not as many as the config says, or have not the same weights each."""
    found: dict[int, dict[int, set[str]]] = {}
    for name in names:
        if name.layer is not None and name.expert is not None and name.parameter == "weight":
            found.setdefault(name.layer, {}).setdefault(name.expert, set()).add(name.module.rpartition(".")[2])
    where = str(checkpoint.path)
    counts = [config.get(key) for config in language_configs(checkpoint.config) for key in EXPERT_COUNTS]
    whole = {count for count in counts if isinstance(count, int) and not isinstance(count, bool)}
    if max(whole, default=0) > 1 and not any(name.routed for name in names):
        what = f"the config has {max(whole)} experts, and no tensor is one's."
        raise UserError(what, where=where, remedy="Config and weights do not belong together.")
    for layer, experts in found.items():
        leaves = set().union(*experts.values())
        count = max(whole, default=max(experts) + 1)
        extra = next((number for number in sorted(experts) if number >= count), None)
        if extra is not None:
            what = f"layer {layer} has an expert {extra}, though the config has {count} experts."
            raise UserError(what, where=where, remedy="Config and weights do not belong together.")
        for number in range(count):
            missing = sorted(leaves - experts.get(number, set()))
            if missing:
                kind = "multi-token prediction layer" if layer >= layers else "layer"
                raise UserError(
                    f"expert {number} of {kind} {layer} has no {missing[0]} (the config has {count} experts, "
                    f"{len(experts)} are there).",
                    where=where,
                    remedy="Download the checkpoint again: weights are missing.",
                )
