"""Statistics from an importance matrix of llama.cpp: E[x^2] of the inputs of each linear, without running the model.

Names of GGUF are those of what a weight does, so the role of each linear decides which entry is its own: the linears
that share their inputs share one. llama.cpp's converter reorders output features of q and k of some families, but no
input features of the linears named here; others (of linear attention, Mamba, kv_b of latent attention) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.model.layout import ModelLayout, read_layout
from snugfit.model.names import TensorName, role_order
from snugfit.progress import SILENT, Progress
from snugfit.records.squares import encode_squares
from snugfit.records.statistics import ExpertStatistics, InputStatistics, LayerStatistics
from snugfit.records.statistics_file import DatasetUsed, Statistics, save_statistics
from snugfit.storage.checkpoint import fingerprint, header_digest
from snugfit.storage.importance_matrix import Importance, ImportanceMatrix, read_importance_matrix
from snugfit.storage.staging import check_outside
from snugfit.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# role -> GGUF's names of weights with the same inputs; behind those of an MLP stands what kind of experts it has
_ATTENTION_INPUT = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_ATTENTION: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("q", "k", "v", "qkv"), _ATTENTION_INPUT),
    "o": ("attn_output",),
}
_MLP: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gate", "up", "gate_up"), ("ffn_gate", "ffn_up", "ffn_gate_up")),
    "down": ("ffn_down",),
}
_ROUTED, _SHARED = "_exps", "_shexp"
# linears of latent attention, by the last part of their names
_LATENT: Mapping[str, tuple[str, ...]] = {
    "q_a_proj": ("attn_q_a", "attn_kv_a_mqa"),
    "kv_a_proj_with_mqa": ("attn_kv_a_mqa", "attn_q_a"),
    "q_b_proj": ("attn_q_b",),
}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.weight")
_KNOWN = frozenset(
    {name for names in (*_ATTENTION.values(), *_LATENT.values()) for name in names}
    | {name + kind for names in _MLP.values() for name in names for kind in ("", _ROUTED, _SHARED)}
)


def import_statistics(
    file: str | Path, model: str | Path, *, output: str | Path, progress: Progress = SILENT
) -> Statistics:
    """Statistics of `model` from `file`, an importance matrix that llama.cpp made of the same model.

    They hold E[x^2] of the inputs of its linears, and how many tokens reached each routed expert, but no ranges: they
    serve weighted scales, for formats without input scales. `output` is a new file for them. Reads headers of the
    model and a few bytes of its weights. Raises UserError where names or shapes differ.
    """
    check_outside(Path(output), [model])
    matrix = read_importance_matrix(Path(file))
    layout = read_layout(model)
    layout.check_quantizable()
    linears = _Linears(layout, matrix, str(file))
    layers = {number: linears.layer(number) for number in range(layout.num_layers)}
    linears.check_all_found()
    left_out = len(matrix.weights) - len(linears.used)
    progress.message(
        f"E[x^2] of the inputs of {linears.count:,} linears; {left_out} of {len(matrix.weights)} entries left out"
    )
    tokens = max(max(one.counts) for one in matrix.weights.values())
    source = ", ".join(Path(text.replace("\\", "/")).name for text in matrix.texts) or Path(file).name
    found = Statistics(
        snugfit=__version__,
        model=layout.checkpoint.name,
        header_digest=header_digest(layout.checkpoint),
        fingerprint=fingerprint(layout.checkpoint),
        datasets=(DatasetUsed(source, matrix.chunks, tokens, matrix.digest),),
        all_experts=False,
        max_forced_tokens=0,
        recipe=None,
        recipe_digest=None,
        layers=layers,
        ranges=False,
    )
    save_statistics(found, Path(output))
    return found


class _Linears:
    """Finds the entries of a model's linears, and notes which of them are used and which are missing."""

    def __init__(self, layout: ModelLayout, matrix: ImportanceMatrix, where: str) -> None:
        self._layout, self._matrix, self._where = layout, matrix, where
        self._names: dict[int, list[TensorName]] = {}
        for name in layout.names.values():
            inside = name.layer is not None and name.layer < layout.num_layers
            if inside and name.layer is not None and name.parameter == "weight" and name.full in layout.weights.tensors:
                self._names.setdefault(name.layer, []).append(name)
        self._missing: list[tuple[str, str]] = []
        self.used: set[str] = set()
        self.count = 0

    def layer(self, number: int) -> LayerStatistics:
        """What the file says of one layer; UserError for entries of other shapes."""
        names = self._names.get(number, [])
        routed = [name for name in names if name.expert is not None]
        others = {name.module: name for name in names if not name.routed and len(self._shape(name)) == 2}
        inputs = {}
        for group in group_modules(others):
            name = others[group[0]]
            entry = self._entry(number, name, self._shape(name)[-1], 1)
            if entry is not None:
                squares, counts = entry
                first = min(group, key=lambda module: role_order(module.rpartition(".")[2]))
                inputs[first] = InputStatistics(counts[0], 0.0, {}, encode_squares(squares))
                self.count += len(group)
        return LayerStatistics(inputs, dict(self._experts(number, routed)))

    def _experts(self, number: int, names: Sequence[TensorName]) -> Iterator[tuple[str, ExpertStatistics]]:
        if not names:
            return
        count = 1 + max(name.expert or 0 for name in names)
        first = names[0].full
        module = first[: first.index(".experts.") + len(".experts")]
        found = []
        for roles in (("gate", "up", "gate_up"), ("down",)):
            one = next(name for name in names if name.role in roles)
            found.append(self._entry(number, one, self._shape(one)[-1], count))
        gate_up, down = found
        if gate_up is None or down is None:
            return
        self.count += len(names)
        nothing = (0.0,) * count
        yield (
            module,
            ExpertStatistics(
                routed=gate_up[1],
                forced=(0,) * count,
                gate_up_routed=nothing,
                gate_up_forced=nothing,
                down_routed=nothing,
                down_forced=nothing,
                gate_up_squares=encode_squares(gate_up[0]),
                down_squares=encode_squares(down[0]),
            ),
        )

    def _shape(self, name: TensorName) -> tuple[int, ...]:
        return self._layout.weights.tensors[name.full].shape

    def _entry(
        self, number: int, name: TensorName, features: int, experts: int
    ) -> tuple[NDArray[np.float32], tuple[int, ...]] | None:
        """E[x^2] [experts, features] of the inputs of a linear, and tokens by expert; None if no entry can be its own.

        A missing one is noted.
        """
        wanted = _entries_of(name)
        if not wanted:
            return None
        places = [f"blk.{number}.{one}.weight" for one in wanted]
        present = [place for place in places if place in self._matrix.weights]
        if not present:
            self._missing.append((name.module, places[0]))
            return None
        self.used |= {*present}
        entry = self._matrix.weights[present[0]]
        if len(entry.squares) != experts * features or len(entry.counts) not in (1, experts):
            raise self._mismatch(
                f"{present[0]} has {len(entry.squares)} values and {len(entry.counts)} counts, "
                f"{name.module} has {f'{experts} experts of ' if experts > 1 else ''}{features} input features."
            )
        return _by_expert(entry, experts)

    def check_all_found(self) -> None:
        """UserError for linears without an entry, and for entries that should be of linears that the model lacks."""
        if self._missing:
            module, place = self._missing[0]
            more = f" and {len(self._missing) - 1} more have none" if len(self._missing) > 1 else ""
            raise self._mismatch(f"it has no {place} for {module}{more}.")
        for name in self._matrix.weights:
            match = _BLOCK.fullmatch(name)
            if match and match[2] in _KNOWN and name not in self.used and int(match[1]) < self._layout.num_layers:
                raise self._mismatch(f"it has {name}, and no linear of the model is that.")
            if match and int(match[1]) >= self._layout.num_layers + self._behind():
                raise self._mismatch(f"it has {name}, and the model has {self._layout.num_layers} layers.")

    def _behind(self) -> int:
        """Layers of multi-token prediction, which GGUF numbers behind the others."""
        layers = {name.layer for name in self._layout.names.values() if name.layer is not None}
        return sum(number >= self._layout.num_layers for number in layers)

    def _mismatch(self, what: str) -> UserError:
        remedy = f"Give an importance matrix of {self._layout.checkpoint.name}, or measure it: `collect_statistics`."
        return UserError(what, code="statistics-mismatch", where=self._where, remedy=remedy)


def _entries_of(name: TensorName) -> tuple[str, ...]:
    """GGUF's names of what has the same inputs as a linear; empty for one whose inputs may be reordered."""
    leaf = name.module.rpartition(".")[2]
    if leaf in _LATENT:
        return _LATENT[leaf]
    if name.role in _MLP:
        kind = _ROUTED if name.routed else _SHARED if name.shared else ""
        return tuple(one + kind for one in _MLP[name.role])
    return _ATTENTION.get(name.role, ())


def _by_expert(entry: Importance, experts: int) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    """E[x^2] [experts, K] and tokens by expert; an expert that no token reached has zeros.

    Where the file has one count for all, values of one stand for no data.
    """
    squares = entry.squares.reshape(experts, -1)
    counts = entry.counts if len(entry.counts) == experts else entry.counts * experts
    if experts > 1 and len(entry.counts) == 1:
        counts = tuple(0 if bool((row == 1).all()) else count for row, count in zip(squares, counts, strict=True))
    empty = [number for number, count in enumerate(counts) if not count]
    squares = squares.copy()
    squares[empty] = 0
    return squares, counts
