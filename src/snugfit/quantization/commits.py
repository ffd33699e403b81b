"""Records units as finished, while later ones are worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from snugfit import distributed
from snugfit.quantization.layer.measured import Measured
from snugfit.quantization.resume import FinishedUnits
from snugfit.quantization.states import Saved
from snugfit.records.norm_folds import NormFold
from snugfit.records.quantize import TensorRecord
from snugfit.records.statistics import layer_to_json
from snugfit.storage.shards import ShardWriter


class Commits:
    """Records each unit as finished once it is in the files, while the next one is worked on.

    Of several processes all have a part of it, which they put together over connections of their own.
    """

    def __init__(self, finished: FinishedUnits, writer: ShardWriter, stack: ExitStack) -> None:
        self._finished, self._writer = finished, writer
        self._group = distributed.side_group()
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._last: Future[None] | None = None

    def start(
        self,
        records: Sequence[TensorRecord],
        measured: Measured,
        norm_folds: Sequence[NormFold],
        saved: Saved | None,
    ) -> None:
        """Record a unit as soon as the writes that were started for it, and for hidden states, are done."""
        wait, tensors = self._writer.pending_writes(), [dict(vars(record)) for record in records]
        statistics = None if measured.statistics is None else layer_to_json(measured.statistics)
        folds = [asdict(fold) for fold in norm_folds]
        before = self._last

        def commit() -> None:
            if before is not None:
                before.result()  # done; if it failed, so does this
            written = wait()
            entry = self._of_all(tensors, statistics, written, None if saved is None else saved())
            self._finished.commit(entry | {"norm_folds": folds})

        self._last = self._pool.submit(commit)

    def _of_all(
        self, tensors: Any, statistics: Any, written: dict[str, list[int] | None], saved: Any
    ) -> dict[str, Any]:
        """The entry of a unit, made of what all processes have done."""
        parts = distributed.gather((tensors, written, saved), self._group)
        others = [name for _, names, _ in parts for name in names if name not in written]
        self._writer.accept(others)
        states = {} if saved is None else saved | {"states": [piece for *_, one in parts for piece in one["states"]]}
        return states | {
            "tensors": [record for records, _, _ in parts for record in records],
            "statistics": statistics,
            "written": {name: crcs for _, names, _ in parts for name, crcs in names.items()},
        }

    def wait(self) -> None:
        """Until the last unit is recorded; raises what went wrong."""
        if self._last is not None:
            self._last.result()
