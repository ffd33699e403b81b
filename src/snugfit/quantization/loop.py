"""The loop over layers: every unit is in its files before the next one is recorded as finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from snugfit import distributed
from snugfit.errors import Unfinished, UserError
from snugfit.evaluation.gpu_memory import MORE_TO_RESUME, gpu_memory_errors
from snugfit.quantization.commits import Commits
from snugfit.quantization.layer.write import begin_copies
from snugfit.quantization.recheck import check_finished
from snugfit.quantization.run import Made, Outcome, Run
from snugfit.quantization.samples import batches_of, embed, some_of, states_of
from snugfit.quantization.unit_work import divided_units, open_work
from snugfit.storage.background import Background
from snugfit.storage.shards import ShardWriter
from snugfit.storage.transfer import Transfer

# errors that only the work on a layer can show
LATE_ERRORS = frozenset({"activations-not-finite", "amax-invalid"})


def run_layers(run: Run, meanwhile: Callable[[], object] = lambda: None) -> Outcome:
    """Load, observe, choose, propagate and write unit after unit, from the first that is not finished.

    `meanwhile` is called when all are recorded, while the last files are digested and the disk takes them.
    """
    with Background() as background:
        made = make_layers(run, background)
        with run.clock("finish"):
            meanwhile()
            return made.outcome()


def make_layers(run: Run, background: Background, meanwhile: Callable[[], object] = lambda: None) -> Made:
    """As `run_layers`, without waiting for the disk; `meanwhile` is called while the last units are recorded."""
    prepared, clock = run.prepared, run.clock
    plan = prepared.plan
    expected = None
    try:
        with gpu_memory_errors(prepared.device, MORE_TO_RESUME, Unfinished), ExitStack() as stack:
            step = stack.enter_context(run.progress.bar(len(plan.units), run.title))
            remote = plan.checkpoint.remote is not None
            transfer = stack.enter_context(Transfer(prepared.device, remote=remote))
            writer = stack.enter_context(_open_writer(run, transfer))
            batches = batches_of(prepared, prepared.device)
            some = some_of(prepared, batches)
            states = states_of(run, batches, transfer, stack)
            with clock("check"):
                check_finished(run, writer, states)
            first = run.finished.done
            for _ in range(first):
                step()
            divided = divided_units(run)
            begun = {} if first else begin_copies(plan, 0, divided[0][0], writer, divided[0][1])
            with clock("embed"):
                embed(run, transfer, batches, some, states)
            work = open_work(run, first, divided, begun, batches, some, states, transfer, writer, stack)
            commits = Commits(run.finished, writer, stack)
            for number in range(first, len(plan.units)):
                started = time.perf_counter()
                if distributed.world_size() > 1 and prepared.method.observe is not None and not prepared.holds_states:
                    commits.wait()  # what a method observes may be other processes' hidden states
                records, measured, folds = work.quantize(number, commits.wait)
                last = number == len(plan.units) - 1
                saved = None if states is None or last else states.save(number, commits.wait)
                commits.start(records, measured, folds, saved)
                if remote and number == first:  # with a lost network something should be there to resume from
                    commits.wait()
                    work.ahead.widen(prepared.read_ahead_bytes(work.divisions))
                step()
                if number == max(1, first) + 1:  # the first one warms up
                    expected = _expect(run, number, started)
            meanwhile()
            with clock("finish"):
                commits.wait()
                if states is not None and distributed.is_main():  # all processes have read the last ones
                    background.submit(states.remove)
                files = writer.finish(background)
                return Made(files=files, lasts=prepared.lasts, resumed=first, expected_seconds=expected)
    except UserError as error:
        done = sum(1 for entry in run.finished.entries if "states" in entry or not run.runs_layers)
        if isinstance(error, Unfinished) or error.code not in LATE_ERRORS or done < 2:
            raise
        raise _kept(run, error) from None


def _open_writer(run: Run, transfer: Transfer) -> ShardWriter:
    """What writes to the weight files; the main process makes them."""
    if not distributed.is_main():
        distributed.barrier()
    shards, main = run.prepared.plan.shards, distributed.is_main()
    writer = ShardWriter(run.directory, shards, transfer, digests=main, lasts=run.prepared.lasts)
    if distributed.is_main():
        distributed.barrier()
    return writer


def _kept(run: Run, error: UserError) -> Unfinished:
    """The error of a layer behind finished ones, which stay."""
    done = run.finished.done - 1
    kept = f"{run.directory} keeps the {done} finished {'layer' if done == 1 else 'layers'}"
    how = "a recipe that differs in later layers alone resumes behind them"
    if error.code == "activations-not-finite":
        how = "another `dtype` needs `restart`, which removes them"
    return Unfinished(error.what, code=error.code, where=error.where, remedy=f"{error.remedy} {kept}; {how}.")


def _expect(run: Run, number: int, started: float) -> float:
    """Seconds that the whole run will take, by its second layer; reported if it is worth it."""
    left = (time.perf_counter() - started) * (len(run.prepared.plan.units) - 1 - number)
    run.progress.time_left(left)
    return run.clock.seconds["total"] + left
