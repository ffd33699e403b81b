"""Takes in prediction layers that lie beside the index: a file such as mtp.safetensors, which no index names.

Releases ship their layers of multi-token prediction so, and engines read only what the index names. Headers decide, not
the file's name: all tensors of a file must belong to prediction layers that config.json states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from snugfit.errors import UserError
from snugfit.model.anatomy import is_prediction_head
from snugfit.model.language_config import language_config
from snugfit.model.names import parse_name
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.open import read_file_header

# keys by which families state prediction layers, those of PREDICTION_KEYS (config_defaults.py) and others like them
_STATES_PREDICTION = re.compile(r"(^|_)(mtp|nextn|multi_token)(_|$)")
# files at the top that hold other weights: adapters, and the whole model in the layout of its makers
_OTHER_WEIGHTS = ("adapter_", "consolidated")


def loose_files(checkpoint: Checkpoint) -> list[str]:
    """Safetensors at the top of a model that no index names."""
    return [
        name
        for name in checkpoint.other_files
        if "/" not in name and name.endswith(".safetensors") and not name.startswith(_OTHER_WEIGHTS)
    ]


def take_in(checkpoint: Checkpoint, decoder: str, num_layers: int) -> Checkpoint:
    """The checkpoint with those loose files as shards whose tensors all belong to prediction layers and are no others.

    The same checkpoint if there is no such file. A file that cannot be read is not taken in.
    """
    if not loose_files(checkpoint) or not _states_prediction(checkpoint.config):
        return checkpoint
    tensors = dict(checkpoint.tensors)
    taken: list[str] = []
    for file in loose_files(checkpoint):
        try:
            found = read_file_header(checkpoint, file)
        except UserError:
            continue
        if found and all(t.name not in tensors and _predicts(t.name, decoder, num_layers) for t in found):
            tensors |= {tensor.name: tensor for tensor in found}
            taken.append(file)
    if not taken:
        return checkpoint
    return replace(
        checkpoint,
        tensors=tensors,
        shards=(*checkpoint.shards, *taken),
        other_files=tuple(name for name in checkpoint.other_files if name not in taken),
        missing={name: file for name, file in checkpoint.missing.items() if name not in tensors},
    )


def taken_note(files: Sequence[str]) -> str:
    """What to say of files that were taken in."""
    return f"{', '.join(files)}: layers of multi-token prediction that no index names are taken in"


def _predicts(name: str, decoder: str, num_layers: int) -> bool:
    layer = parse_name(name, (), decoder).layer
    return is_prediction_head(name) if layer is None else layer >= num_layers


def _states_prediction(config: Mapping[str, Any]) -> bool:
    return any(
        bool(value) and _STATES_PREDICTION.search(key) is not None
        for level in (config, language_config(config))
        for key, value in level.items()
    )
