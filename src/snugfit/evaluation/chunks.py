"""The chunks of an evaluation: rows of token ids with the positions that are scored, grouped by context length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snugfit.data import texts


@dataclass(frozen=True, eq=False, kw_only=True)
class Chunk:
    """A row of token ids; `target_positions` int64 [n] are the positions of its scored tokens.

    `number` counts the chunks of all groups; `group` is the place of its group, in whose arrays the figures of its
    scored tokens begin at `first`. `source` names the text, or file and line; `conversation`: only answers are scored.
    """

    number: int
    group: int
    first: int
    ids: tuple[int, ...]
    target_positions: NDArray[np.int64]
    source: str
    conversation: bool


@dataclass(frozen=True, eq=False)
class ChunkGroup:
    """All chunks of one context length (0: conversations and rows, each as long as it is).

    `digest` is SHA-256 over tokens and scored positions.
    """

    context: int
    digest: str
    chunks: tuple[Chunk, ...]

    @property
    def target_counts(self) -> tuple[int, ...]:
        """How many tokens of each chunk are scored."""
        return tuple(len(chunk.target_positions) for chunk in self.chunks)

    @property
    def target_positions(self) -> NDArray[np.int64]:
        """Positions of the scored tokens of all chunks in order, each within its chunk."""
        return np.concatenate([chunk.target_positions for chunk in self.chunks])


def group_chunks(found: Sequence[texts.Chunks]) -> tuple[ChunkGroup, ...]:
    """The groups in order, with all their chunks numbered."""
    groups: list[ChunkGroup] = []
    number = 0
    for place, cut in enumerate(found):
        chunks: list[Chunk] = []
        first = 0
        for ids, scored, source in zip(cut.rows, cut.scored, cut.sources, strict=True):
            # nothing predicts the first token
            positions = np.arange(1, len(ids)) if scored is None else np.asarray(scored, dtype=np.int64)
            chunks.append(
                Chunk(
                    number=number,
                    group=place,
                    first=first,
                    ids=ids,
                    target_positions=positions,
                    source=source,
                    conversation=scored is not None,
                )
            )
            number += 1
            first += len(positions)
        groups.append(ChunkGroup(cut.context, cut.digest, tuple(chunks)))
    return tuple(groups)
