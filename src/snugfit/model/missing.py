"""Tensors that the index names and no shard holds: which of them a model needs, as far as names say.

What transformers builds is checked against the headers again by every run; names also cover what it does not build
here, such as towers, and answer without transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from snugfit.errors import UserError
from snugfit.model.anatomy import is_prediction_head, is_tower
from snugfit.model.names import parse_name
from snugfit.storage.checkpoint import INDEX_NAME, Checkpoint
from snugfit.storage.safetensors_header import shown

# what models compute from their config; older files store it
_BUFFERS = re.compile(
    r"(.*\.)?(inv_freq|original_inv_freq|masked_bias|position_ids|num_batches_tracked|cos_cached|sin_cached)", re.DOTALL
)
_CORE = re.compile(r"norm|embed|wte|wpe|ln_|head|output")
_UNKNOWN_ROLES = ("other", "linear")


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that models compute from their config, as its name says."""
    return _BUFFERS.fullmatch(name) is not None


def unneeded(checkpoint: Checkpoint, decoder: str, num_layers: int, *, tied: bool) -> tuple[str, ...]:
    """Missing tensors that nothing needs: computed ones, a tied head, prediction layers, and names like no other."""
    if not checkpoint.missing:
        return ()
    stored = [*checkpoint.tensors]
    modules = {name.rpartition(".")[0] for name in stored}
    forms = {_form(name) for name in stored}

    def is_needed(name: str) -> bool:
        parsed = parse_name(name, (1, 1), decoder)
        if is_buffer(name) or is_prediction_head(name) or (tied and parsed.role == "lm_head"):
            return False
        if parsed.layer is not None and parsed.layer >= num_layers:
            return False
        if is_tower(name) or _form(name) in forms or parsed.module in modules:
            return True
        return not decoder or parsed.role not in _UNKNOWN_ROLES or (parsed.layer is None and bool(_CORE.search(name)))

    return tuple(name for name in checkpoint.missing if not is_needed(name))


def check_missing(checkpoint: Checkpoint, not_needed: tuple[str, ...]) -> Iterator[UserError]:
    """The first tensor that the index names, no shard holds, and the model needs."""
    needed = [name for name in checkpoint.missing if name not in set(not_needed)]
    if needed:
        more = f", and {len(needed) - 1} more are missing" if len(needed) > 1 else ""
        yield UserError(
            f"weight_map sends {shown(needed[0])} to {checkpoint.missing[needed[0]]}, which does not hold it{more}.",
            code="index-invalid",
            where=str(checkpoint.path / INDEX_NAME),
            remedy="Download the checkpoint again: index and shards do not belong together.",
        )


def missing_note(names: tuple[str, ...]) -> str:
    """What to say of missing tensors that nothing needs."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the index names tensors that no shard holds and nothing needs: {', '.join(map(shown, names[:3]))}{more}"


def _form(name: str) -> str:
    """A name without its numbers, as other layers have it."""
    return re.sub(r"\d+", "#", name)
