"""A reference's predictions, kept in one file and used again: by later runs, or by people who do not have the model.

Of each scored token are stored the TOP most likely tokens with their log probabilities, the probability of all others,
a sample of SAMPLE of those others (with replacement, each by its probability), and the true token's loss: about 0.8 kB.
KL against it is exact over the stored tokens; over the others it is the sample's mean, which is unbiased: the error of
a mean over n tokens shrinks as 1/sqrt(n), is computed, and stands beside the figure.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from snugfit.errors import UserError
from snugfit.evaluation.divergence import Prediction, Softmax, StoredTop
from snugfit.records.evaluation import Floor
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.shards import file_digests

TOP = 64
SAMPLE = 32
SCHEMA = "snugfit.reference/1"
PARTS = ("ids", "logprobs", "tail", "sample_ids", "sample_logprobs", "losses")


@dataclass(frozen=True)
class Reference:
    """A stored reference: what it was made of (`key`), its predictions by scored token, `floors` by context."""

    key: Mapping[str, Any]
    description: Mapping[str, Any]
    offsets: NDArray[np.int64]
    arrays: Mapping[str, NDArray[Any]]
    floors: Mapping[int, Floor]
    bytes: int

    def predictions(self, device: torch.device) -> Any:
        """A function (row, first place, last place + 1) -> StoredTop on `device`."""

        def at(row: int, start: int, stop: int) -> StoredTop:
            where = slice(int(self.offsets[row]) + start, int(self.offsets[row]) + stop)
            parts = {name: torch.from_numpy(self.arrays[name][where]).to(device) for name in PARTS}
            return StoredTop(**{name: part.long() if "ids" in name else part for name, part in parts.items()})

        return at


class Collector:
    """Gathers the predictions of `measure`'s first entry, to be stored."""

    def __init__(self, rows: Sequence[Sequence[int]], places: Sequence[NDArray[np.int64]], vocabulary: int) -> None:
        """Room for every scored token."""
        self._rows, self._places = rows, places
        self.offsets = np.concatenate([[0], np.cumsum([len(p) for p in places])]).astype(np.int64)
        tokens, top = int(self.offsets[-1]), min(TOP, vocabulary)
        self.arrays: dict[str, NDArray[Any]] = {
            "ids": np.zeros((tokens, top), np.int32),
            "logprobs": np.zeros((tokens, top), np.float32),
            "tail": np.zeros(tokens, np.float32),
            "sample_ids": np.zeros((tokens, SAMPLE), np.int32),
            "sample_logprobs": np.zeros((tokens, SAMPLE), np.float32),
            "losses": np.zeros(tokens, np.float32),
        }

    def keep(self, row: int, start: int, prediction: Prediction) -> None:
        """Condense the predictions of places start.. of a row."""
        assert isinstance(prediction, Softmax)
        stop = start + prediction.logits.shape[0]
        targets = torch.from_numpy(np.asarray(self._rows[row])[self._places[row][start:stop]])
        seed = (row << 24) + start
        stored = condense(prediction, targets.to(prediction.logits.device), seed=seed)
        where = slice(int(self.offsets[row]) + start, int(self.offsets[row]) + stop)
        for name in PARTS:
            self.arrays[name][where] = getattr(stored, name).cpu().numpy()


def condense(prediction: Softmax, targets: Tensor, *, seed: int, top: int = TOP, sample: int = SAMPLE) -> StoredTop:
    """What is stored of predictions [n, V] and their true tokens [n]; the sample follows from `seed`."""
    normal = prediction.total.log().unsqueeze(-1)
    best, ids = prediction.logits.topk(min(top, prediction.logits.shape[-1]), dim=-1)
    rest = prediction.weights.scatter(-1, ids, 0.0)
    mass = rest.sum(-1)
    rest[~(mass > 0) | ~mass.isfinite()] = 1.0  # nothing left to draw from: whatever is drawn counts for nothing
    generator = torch.Generator(rest.device).manual_seed(seed)
    # fp32 sums would never reach the least likely tokens
    drawn = torch.multinomial(rest.double(), sample, replacement=True, generator=generator)
    loss = torch.where(prediction.finite, prediction.loss(targets), torch.nan)
    return StoredTop(
        ids=ids,
        logprobs=best - normal,
        losses=loss,
        tail=mass / prediction.total,
        sample_ids=drawn,
        sample_logprobs=prediction.logits.gather(-1, drawn) - normal,
    )


def reference_key(
    checkpoint: Checkpoint,
    *,
    digests: Sequence[str],
    activations: str,
    arithmetic: str,
    floor_chunks: Sequence[int],
    vocabulary: int,
) -> dict[str, Any]:
    """What a stored reference depends on: texts, tokenizer, the model's bytes, arithmetic, version of these figures."""
    weights = file_digests(checkpoint.path, list(checkpoint.shards))
    model = hashlib.sha256(json.dumps([dict(checkpoint.config), weights], sort_keys=True).encode()).hexdigest()
    return {
        "schema": SCHEMA,
        "model": model,
        "tokenizer": tokenizer_digest(checkpoint.path),
        "texts": list(digests),
        "activations": activations,
        "arithmetic": arithmetic,
        "floor_chunks": list(floor_chunks),
        "vocabulary": vocabulary,
        "top": TOP,
        "sample": SAMPLE,
    }


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of the first tokenizer file that is there; "" without one."""
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        if (path / name).is_file():
            return hashlib.sha256((path / name).read_bytes()).hexdigest()
    return ""


def stored_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """Where a reference with this key is stored in `folder`."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"reference-{name}.safetensors"


def save_reference(
    path: Path,
    key: Mapping[str, Any],
    description: Mapping[str, Any],
    found: Collector,
    floors: Mapping[int, Floor],
) -> None:
    """Store a reference in a new file, whole or not at all."""
    kept = {str(context): asdict(floor) for context, floor in floors.items()}
    metadata = {name: json.dumps(value) for name, value in (("key", key), ("model", description), ("floors", kept))}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; safetensors lets nobody else read
        save_file({**found.arrays, "offsets": found.offsets}, partial, metadata=metadata)
        partial.chmod(mode)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def try_to_save(
    path: Path,
    key: Mapping[str, Any],
    description: Mapping[str, Any],
    found: Collector,
    floors: Mapping[int, Floor],
) -> str:
    """`save_reference`, and what came of it: what it holds is measured, so that a full disk need not cost the run."""
    try:
        save_reference(path, key, description, found, floors)
    except (OSError, SafetensorError) as error:
        return f"warning: {path}: the reference's predictions could not be stored ({error})"
    return f"{path}: the reference's predictions are stored here"


def load_reference(path: Path, *, remedy: str = "Give a model directory as --reference.") -> Reference:
    """A stored reference; UserError for a file that is none, is damaged, or of another version."""
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = stream.metadata() or {}
            key, description = (_mapping(metadata, name) for name in ("key", "model"))
            if key.get("schema") != SCHEMA:
                raise UserError(
                    f"a stored reference of version {key.get('schema')}, not {SCHEMA}.",
                    where=str(path),
                    remedy="Make it again with --reference-cache.",
                )
            _check_description(description)
            floors = TypeAdapter(dict[int, Floor]).validate_python(_mapping(metadata, "floors"))
            arrays = {name: stream.get_tensor(name) for name in (*PARTS, "offsets")}
            _check_arrays(arrays, key)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"not a stored reference ({line}).", where=str(path), remedy=remedy) from None
    return Reference(key, description, arrays.pop("offsets"), arrays, floors, path.stat().st_size)


def _mapping(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    value = json.loads(metadata[name])
    if not isinstance(value, dict):
        raise TypeError(f"{name} is no mapping")
    return value


def _check_description(description: Mapping[str, Any]) -> None:
    """ValueError where it does not say what tables ask of it."""
    for part in ("name", "arithmetic"):
        if not isinstance(description.get(part), str):
            raise ValueError(f"its model has no {part}")  # noqa: TRY004  # of a file, not of an argument


def _check_arrays(arrays: Mapping[str, NDArray[Any]], key: Mapping[str, Any]) -> None:
    """ValueError where dtypes, lengths, offsets, ids or the key's numbers do not hold together."""
    vocabulary = key.get("vocabulary")
    if type(vocabulary) is not int or vocabulary < 1:
        raise ValueError("its vocabulary has no size")
    offsets = arrays["offsets"]
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or offsets[0] or (np.diff(offsets) < 0).any():
        raise ValueError("its offsets are none")
    tokens, top = int(offsets[-1]), min(TOP, vocabulary)
    widths = {"ids": (top,), "logprobs": (top,), "sample_ids": (SAMPLE,), "sample_logprobs": (SAMPLE,)}
    for name in PARTS:
        wanted = (tokens, *widths.get(name, ()))
        dtype = np.int32 if name.endswith("ids") else np.float32
        if arrays[name].shape != wanted or arrays[name].dtype != dtype:
            raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}, not of shape {list(wanted)}")
        if dtype is np.int32 and tokens and not 0 <= arrays[name].min() <= arrays[name].max() < vocabulary:
            raise ValueError(f"{name} has tokens beyond the vocabulary of {vocabulary}")
