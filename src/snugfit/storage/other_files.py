"""A model's files besides config, index and shards: which are copied with a quantized model, and why others are not.

Engines and transformers would load weights in other containers beside the quantized ones, and an adapter at the top
in their place (transformers loads the adapter's own base model). Names alone decide, so that a model on the Hub is
judged before anything is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from snugfit.storage.files import OTHER_WEIGHTS

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it first (peft: merge_and_unload)"
_INDEX = ".index.json"
# weights that a number or a part behind the ending numbers: model.onnx_data_1, model.ckpt.data-00000-of-00001
_NUMBERED_WEIGHTS = re.compile(r".*\.(onnx[._]data([._-]?\d+)?|data-\d+-of-\d+|gguf\.part.*|\d+\.distcp)", re.DOTALL)
# folders that trainers write: states of optimizers, and models of earlier steps
_TRAINING = re.compile(
    r"(checkpoint[-_].+|global_step[-_]?\d+|iter_\d+|(epoch|step)[-_]\d+|optim(izer)?([-_.].*|s|_states?)?"
    r"|pytorch_model_fsdp_\d+|ray_checkpoint.*|wandb|lightning_logs)",
    re.IGNORECASE,
)
_PREDICTION = re.compile(r"(^|[^a-z])(mtp|nextn|multi[-_]?token)([^a-z]|$)", re.IGNORECASE)
_SENTENCE_MODULE = re.compile(r"\d+_\w+/model\.safetensors")  # of sentence-transformers, whose modules.json names it


def is_weights(name: str) -> bool:
    """Whether a file holds weights, as its name says."""
    lower = name.lower()
    return lower.endswith((*OTHER_WEIGHTS, _INDEX)) or _NUMBERED_WEIGHTS.fullmatch(lower) is not None


def is_extra_model(name: str, names: Collection[str]) -> bool:
    """Whether a file holds safetensors that engines load from a folder of their own: an adapter, or a small module."""
    folder, _, file = name.rpartition("/")
    if not folder or _training_folder(name):
        return False
    if file == ADAPTER_WEIGHTS:
        return f"{folder}/{ADAPTER_CONFIG}" in names
    return "modules.json" in names and _SENTENCE_MODULE.fullmatch(name) is not None


def is_copied(name: str, names: Collection[str]) -> bool:
    """Whether the file `name` among `names`, all of a model's other files, is copied with a quantized model."""
    if _training_folder(name) or _is_lost_adapter(name, names):
        return False
    return not is_weights(name) or is_extra_model(name, names)


def not_copied(names: Iterable[str]) -> tuple[str, ...]:
    """Those of a model's other files that are not copied; a folder of a trainer, with a slash, for all in it."""
    known = frozenset(names)
    left = (name for name in sorted(known) if not is_copied(name, known))
    return tuple(dict.fromkeys(_training_folder(name) or name for name in left))


def notes_on_loss(names: Iterable[str]) -> list[str]:
    """What a person should know of files that are not copied: adapters, and weights that nothing names."""
    known = frozenset(names)
    notes = []
    adapters = sorted(
        name for name in known if not is_copied(name, known) and name.rpartition("/")[2].startswith("adapter_")
    )
    adapters = [name for name in adapters if not _training_folder(name)]
    if adapters:
        notes.append(
            f"{', '.join(adapters)}: an adapter beside the weights is neither applied nor copied; if the model needs "
            f"it, {MERGE}"
        )
    loose = [name for name in sorted(known) if "/" not in name and name.endswith(".safetensors")]
    predictions = [name for name in loose if _PREDICTION.search(name)]
    if predictions:
        notes.append(
            f"{', '.join(predictions)}: layers of multi-token prediction that no index names are lost: the result has "
            "no speculative decoding of its own"
        )
    others = [name for name in loose if name not in predictions and name not in adapters]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        notes.append(f"{', '.join(others[:3])}{more}: weights that the index does not name are neither read nor copied")
    return notes


def _is_lost_adapter(name: str, names: Collection[str]) -> bool:
    """Whether a file describes an adapter whose weights are not copied: one at the top, or with weights in a pickle."""
    folder, _, file = name.rpartition("/")
    if file != ADAPTER_CONFIG:
        return False
    return not folder or (
        f"{folder}/{ADAPTER_WEIGHTS}" not in names and f"{folder}/{ADAPTER_WEIGHTS[:-11]}bin" in names
    )


def _training_folder(name: str) -> str:
    """The outermost folder of a trainer in a file's path, with a slash behind it; "" if there is none."""
    parts = PurePosixPath(name).parts[:-1]
    found = next((n for n, part in enumerate(parts) if _TRAINING.fullmatch(part)), None)
    return "" if found is None else "/".join(parts[: found + 1]) + "/"
