"""What an earlier run finished is read again before this one goes on behind it."""

from __future__ import annotations

from snugfit import distributed
from snugfit.model.names import may_be_infinite
from snugfit.quantization.resume import omitted
from snugfit.quantization.run import Run
from snugfit.quantization.states import RunStates
from snugfit.storage.shards import ShardWriter


def check_finished(run: Run, writer: ShardWriter, states: RunStates | None) -> None:
    """Read again what an earlier run wrote, and forget what the disk does not hold."""
    finished, units = run.finished, len(run.prepared.plan.units)
    if not finished.done:
        return
    good = 0
    if distributed.is_main():
        while good < finished.done and writer.holds(finished.entries[good]["written"]):
            good += 1
        if states is not None and good < units:
            good = states.resumable(finished.entries, good)
    good = distributed.from_main(good)
    # layers that pass more than hidden states on (Gemma 4's shared keys and values) run from the first one
    if run.prepared.skeleton.carries_state and run.runs_layers and good < units:
        good = 0
    finished.go_back(good)
    if states is not None and good < units:
        states.resume(finished.entries)
    left_out = omitted(finished) if writer.lasts else []
    for entry in finished.entries:
        writer.accept(entry["written"].keys() - set(left_out))
    if distributed.is_main():
        for name in left_out:
            writer.copy(run.prepared.plan.checkpoint, name, infinite=may_be_infinite(name))
        writer.pending_writes()()
    else:
        writer.accept(left_out)
    done = f"{max(0, good - 1)} of {run.prepared.plan.num_layers} layers"
    run.progress.message(f"resuming after {done}, from {run.directory}")
