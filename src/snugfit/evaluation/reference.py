"""A reference's predictions in one file, used by later runs, or by people who do not have the model.

For each scored token the file has the TOP most likely tokens with their log probabilities, the probability of all other
tokens, a sample of SAMPLE of those others (with replacement, each by its probability), and the true token's loss: about
0.8 kB. KL against it is exact over the stored tokens; over the others it is the sample's mean, which is unbiased. Its
sampling error shrinks as 1/sqrt(n) with n tokens, is computed, and is shown beside the figure.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from snugfit.evaluation.chunks import Chunk, ChunkGroup
from snugfit.evaluation.divergence import Prediction, Softmax, StoredTop
from snugfit.evaluation.measure import Predictions
from snugfit.records.evaluation import EvaluatedCheckpoint, Floor
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.shards import file_digests

TOP = 64
SAMPLE = 32
SCHEMA = "snugfit.reference/1"
TOKENS_AT_ONCE = 1 << 16  # whose ids are checked in one read
PARTS = ("ids", "logprobs", "tail", "sample_ids", "sample_logprobs", "losses")


@dataclass(frozen=True, kw_only=True)
class StoredReference:
    """An open file of predictions: the inputs it was made from (`key`), the model, noise floors by context length.

    Scored tokens of chunk n are at offsets[n]..offsets[n + 1] of all parts, which are read from the file when needed.
    """

    key: Mapping[str, Any]
    description: EvaluatedCheckpoint
    offsets: NDArray[np.int64]
    floors: Mapping[int, Floor]
    parts: Mapping[str, Any] = field(repr=False)  # safetensors' slices

    def predictions(self, device: torch.device) -> Predictions:
        """What is stored of a chunk's scored tokens, on `device`."""

        def stored(chunk: Chunk, start: int, stop: int) -> StoredTop:
            first = int(self.offsets[chunk.number])
            found = {name: torch.from_numpy(self.parts[name][first + start : first + stop]) for name in PARTS}
            placed = {name: part.to(device) for name, part in found.items()}
            return StoredTop(**{name: part.long() if "ids" in name else part for name, part in placed.items()})

        return stored


class Collector:
    """Gathers the reference's predictions while they are measured, to store them."""

    def __init__(self, groups: Sequence[ChunkGroup], vocabulary: int) -> None:
        """Allocate arrays for every scored token."""
        counts = [count for group in groups for count in group.target_counts]
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        tokens, top = int(self.offsets[-1]), min(TOP, vocabulary)
        self.arrays: dict[str, NDArray[Any]] = {
            "ids": np.zeros((tokens, top), np.int32),
            "logprobs": np.zeros((tokens, top), np.float32),
            "tail": np.zeros(tokens, np.float32),
            "sample_ids": np.zeros((tokens, SAMPLE), np.int32),
            "sample_logprobs": np.zeros((tokens, SAMPLE), np.float32),
            "losses": np.zeros(tokens, np.float32),
        }

    def keep(self, chunk: Chunk, start: int, prediction: Prediction) -> None:
        """Condense the predictions of a chunk's scored tokens start.. ."""
        assert isinstance(prediction, Softmax)
        stop = start + prediction.logits.shape[0]
        targets = torch.from_numpy(np.asarray(chunk.ids)[chunk.target_positions[start:stop]])
        seed = (chunk.number << 24) + start
        stored = condense(prediction, targets.to(prediction.logits.device), seed=seed)
        first = int(self.offsets[chunk.number])
        where = slice(first + start, first + stop)
        for name in PARTS:
            self.arrays[name][where] = getattr(stored, name).cpu().numpy()


def condense(prediction: Softmax, targets: Tensor, *, seed: int, top: int = TOP, sample: int = SAMPLE) -> StoredTop:
    """The part of predictions [n, V] and their true tokens [n] that is stored; `seed` determines the sample."""
    normal = prediction.total.log().unsqueeze(-1)
    best, ids = prediction.logits.topk(min(top, prediction.logits.shape[-1]), dim=-1)
    rest = prediction.weights.scatter(-1, ids, 0.0)
    mass = rest.sum(-1)
    rest[~(mass > 0) | ~mass.isfinite()] = 1.0  # nothing left to draw from: any sample has weight 0
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
    """What a stored reference depends on: texts, tokenizer, the model's bytes, arithmetic, version of the figures."""
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
    """SHA-256 of the first tokenizer file that exists; "" without one."""
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        if (path / name).is_file():
            return hashlib.sha256((path / name).read_bytes()).hexdigest()
    return ""


def stored_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """The file in `folder` for a reference with this key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"reference-{name}.safetensors"


def save_reference(
    path: Path,
    key: Mapping[str, Any],
    description: EvaluatedCheckpoint,
    collected: Collector,
    floors: Mapping[int, Floor],
) -> None:
    """Store a reference in a new file, whole or not at all."""
    by_context = {str(context): asdict(floor) for context, floor in floors.items()}
    entries = {"key": key, "model": asdict(description), "floors": by_context}
    metadata = {name: json.dumps(value) for name, value in entries.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # from the umask; safetensors makes files that only their owner can read
        save_file({**collected.arrays, "offsets": collected.offsets}, partial, metadata=metadata)
        partial.chmod(mode)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_reference(path: Path, *, remedy: str = "Give a model directory as `reference`.") -> StoredReference:
    """Open a stored reference; UserError for another file, a damaged one, or one of another version."""
    try:
        # stays open: predictions are read when they are needed
        stream: Any = safe_open(path, framework="numpy")
        metadata = stream.metadata() or {}
        key = _mapping(metadata, "key")
        if key.get("schema") != SCHEMA:
            raise UserError(
                f"a stored reference of version {key.get('schema')}, not {SCHEMA}.",
                code="reference-invalid",
                where=str(path),
                remedy="Make it again with `reference_cache`.",
            )
        description = TypeAdapter(EvaluatedCheckpoint).validate_python(_mapping(metadata, "model"))
        floors = TypeAdapter(dict[int, Floor]).validate_python(_mapping(metadata, "floors"))
        offsets = stream.get_tensor("offsets")
        parts = {name: stream.get_slice(name) for name in PARTS}
        _check_parts(parts, offsets, key)
        size = path.stat().st_size
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"not a stored reference ({line}).", code="reference-invalid", where=str(path), remedy=remedy
        ) from None
    return StoredReference(
        key=key,
        description=replace(description, stored_bytes=size),
        offsets=offsets,
        floors=floors,
        parts=parts,
    )


def _mapping(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """The JSON object under `name`; ValueError where there is none."""
    value = json.loads(metadata.get(name, "null"))
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a mapping")  # noqa: TRY004  # in a file, not an argument
    return value


def _check_parts(parts: Mapping[str, Any], offsets: NDArray[Any], key: Mapping[str, Any]) -> None:
    """ValueError where dtypes, shapes, offsets, ids and the key's numbers do not agree."""
    vocabulary = key.get("vocabulary")
    if type(vocabulary) is not int or vocabulary < 1:
        raise ValueError("the key has no size of the vocabulary")
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or offsets[0] or (np.diff(offsets) < 0).any():
        raise ValueError("its offsets are not ascending numbers from 0 on")
    tokens, top = int(offsets[-1]), min(TOP, vocabulary)
    widths = {"ids": (top,), "logprobs": (top,), "sample_ids": (SAMPLE,), "sample_logprobs": (SAMPLE,)}
    for name, part in parts.items():
        shape, dtype = [tokens, *widths.get(name, ())], "I32" if name.endswith("ids") else "F32"
        if part.get_shape() != shape or part.get_dtype() != dtype:
            raise ValueError(f"{name} is {part.get_dtype()} {part.get_shape()}, not {dtype} {shape}")
        for start in range(0, tokens if dtype == "I32" else 0, TOKENS_AT_ONCE):
            ids = part[start : min(start + TOKENS_AT_ONCE, tokens)]
            if ids.min() < 0 or ids.max() >= vocabulary:
                raise ValueError(f"{name} has tokens beyond the vocabulary of {vocabulary}")
