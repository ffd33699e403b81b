"""Several processes that work on one run, started by torchrun: who this one is, and what they say to each other.

One process is a world of one: every function here works without torchrun, and then imports no torch. Results are put
together in the order of the ranks, so that a run gives the same bits each time.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from snugfit.errors import Unfinished, UserError

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = timedelta(hours=6)  # that one rank may work while others wait
_REPORTED = "reported"  # the key in the store that the main process sets when it has shown an error of all
_REPORT_PATIENCE = timedelta(minutes=1)  # for it to remove what the run has written, and show the error
_PIECE = 1 << 26  # values that are added up at once
_PACK = 1 << 26  # bytes of small tensors that are sent at once
_apart = False
_side: Any = None
_store: Any = None  # by which the processes found each other last
_connecting: threading.Thread | None = None
_joins = 0  # how often this process has joined the others

Result = TypeVar("Result")
Key = TypeVar("Key")
Parameters = ParamSpec("Parameters")


class OtherRankError(UserError):
    """The error of another rank, which reports it."""


def asked_for() -> int:
    """Number of processes that torchrun started, 1 without it."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if "RANK" in os.environ and given.isdecimal() else 1


def world_size() -> int:
    """Number of processes that have joined."""
    return int(_torch().get_world_size()) if _has_joined() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(_torch().get_rank()) if _has_joined() else 0


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if asked_for() > 1 else 0


def local_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if asked_for() > 1 else 1


def is_main() -> bool:
    """Whether this is the process that reports, and writes what belongs to all."""
    return rank() == 0


def is_main_to_be() -> bool:
    """As `is_main`, also before processes have joined."""
    return int(os.environ.get("RANK", "0")) == 0 if asked_for() > 1 else True


def rank_prefix() -> str:
    """What a message of another than the main process begins with."""
    return "" if is_main_to_be() else f"rank {os.environ['RANK']}: "


@contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """The processes that torchrun started work together inside, over NCCL for `device` cuda, over gloo for cpu.

    Nothing happens without torchrun, and where they have joined already.
    """
    if asked_for() == 1 or _has_joined():
        yield
        return
    import torch

    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    global _connecting, _joins, _store  # noqa: PLW0603
    _joins += 1
    # torchrun's store outlives a group: each time the processes find each other under names of their own
    whole, number, count = next(_torch().rendezvous("env://", timeout=_PATIENCE))
    _store = _torch().PrefixStore(f"joined {_joins}", whole)
    _torch().init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_store,
        rank=number,
        world_size=count,
        timeout=_PATIENCE,
    )
    if cuda:
        _connecting = threading.Thread(target=_connect, daemon=True)
        _connecting.start()
    try:
        yield
    except Exception:
        if not cuda:  # NCCL could wait for a process that has ended
            with suppress(RuntimeError):
                _leave()
        raise
    _connected()
    _leave()


def _leave() -> None:
    """End the connections: others hear of it at once, and gloo's threads do not end a process by a signal."""
    global _side  # noqa: PLW0603
    _side = None
    _torch().destroy_process_group()


def tell_reported() -> None:
    """Tell processes that `wait_until_reported` that this one, the main one, has shown the error of all."""
    if _store is not None and is_main_to_be():
        with suppress(RuntimeError):
            _store.set(_REPORTED, "")


def wait_until_reported() -> None:
    """Wait, a minute at most, for the main process's report: where one process ends, torchrun ends the others."""
    if _store is not None:
        with suppress(RuntimeError):
            _store.wait([_REPORTED], _REPORT_PATIENCE)


def _connect() -> None:
    """Have NCCL connect the GPUs, which takes half a second, while what needs no GPU is prepared."""
    import torch

    torch.cuda.set_device(local_rank())
    torch.distributed.broadcast(torch.zeros(1, device=f"cuda:{local_rank()}"), src=0)


def _connected() -> None:
    """Wait for what has begun to connect, before anything else goes over NCCL."""
    global _connecting  # noqa: PLW0603
    if _connecting is not None:
        _connecting.join()
        _connecting = None


def device() -> Any:
    """The torch device of this process's part of a run: its GPU if processes have joined over NCCL, else the CPU."""
    import torch

    if world_size() > 1 and "nccl" in str(_torch().get_backend_config()):
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def together(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that all processes which torchrun started call, and that joins them; `device` is its parameter."""

    @wraps(function)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        device = options.get("device")
        with joined(device if isinstance(device, str) else None):
            return function(*arguments, **options)

    return run


def gather_tensors(mine: Iterable[tuple[Key, Tensor]]) -> list[tuple[Key, Tensor]]:
    """The named tensors of all processes, on this device, in the order of the ranks; large ones go from GPU to GPU."""
    held = list(mine)
    return held if world_size() == 1 else exchanged(held, gather(stated(held)))


def stated(held: Iterable[tuple[Key, Tensor]]) -> list[tuple[Key, Any, Any]]:
    """What all processes have to know of the named tensors of one to take them in with `exchanged`."""
    return [(key, tensor.shape, tensor.dtype) for key, tensor in held]


def exchanged(
    held: Sequence[tuple[Key, Tensor]], said: Sequence[Sequence[tuple[Key, Any, Any]]]
) -> list[tuple[Key, Tensor]]:
    """As `gather_tensors`, where all processes know already what each one has `stated`."""
    import torch

    found = []
    for owner, some in enumerate(said):
        for place, (key, shape, dtype) in enumerate(some):
            if owner == rank():
                tensor = held[place][1].to(device()).contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=device())
            send(tensor, owner)
            found.append((key, tensor))
    return found


@contextmanager
def alone() -> Iterator[None]:
    """What this process does inside it does by itself, as a world of one."""
    global _apart  # noqa: PLW0603
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def barrier() -> None:
    """Wait until all processes are here."""
    gather(None)


def gather(value: Result, group: Any = None) -> list[Result]:
    """The values of all processes, in the order of their ranks; those of several have their tensors on the CPU."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _lost_ranks():
        _torch().all_gather_object(found, _moved(value, "cpu"), group=group)
    return found


def largest(found: Iterable[Tensor | None]) -> Tensor | None:
    """The elementwise largest of gathered tensors of one shape; None of none."""
    import torch

    given = [one for one in found if one is not None]
    return torch.stack(given).amax(0) if given else None


def added(found: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of gathered counts of one shape; None of none."""
    import torch

    given = [one for one in found if one is not None]
    return torch.stack(given).sum(0) if given else None


def tallied(said: Sequence[tuple[int, Tensor | None, Tensor | None]]) -> tuple[int, Tensor | None, Tensor | None]:
    """Of what all processes have counted, the largest of what they have seen, and what they have added up: of all."""
    counts, amaxes, sums = zip(*said, strict=True)
    return sum(counts), largest(amaxes), added(sums)


def from_main(value: Result) -> Result:
    """The main process's value; tensors in it are on this device."""
    if world_size() == 1:
        return value
    held: list[Any] = [_moved(value, "cpu") if is_main() else None]
    with _lost_ranks():
        _torch().broadcast_object_list(held, src=0)
    found: Result = _moved(held[0], device())
    return found


def by_main(work: Callable[[], Result]) -> Result:
    """What `work` gives in the main process, which alone does it; its UserError is raised as `in_all` raises it."""
    return cast("Result", from_main(in_all(lambda: work() if is_main() else None)))


def in_order(things: Sequence[Result]) -> list[Result]:
    """The things of all processes, those of the first one first."""
    return [one for some in gather(list(things)) for one in some]


def merged(found: Mapping[Key, Result]) -> dict[Key, Result]:
    """What all processes have found, by keys that differ; tensors in it are on this device."""
    return united(gather(dict(found)))


def united(said: Sequence[Mapping[Key, Result]]) -> dict[Key, Result]:
    """As `merged`, of what was gathered of all processes."""
    if world_size() == 1:
        return dict(said[0])
    return {key: _moved(value, device()) for one in said for key, value in one.items()}


def _moved(value: Any, where: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(where)
    if isinstance(value, dict):
        return {key: _moved(one, where) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(one, where) for one in value)
    return value


def send(tensor: Tensor, owner: int) -> None:
    """Give all processes the `tensor` of process `owner`, in place."""
    if world_size() > 1 and tensor.numel():
        import torch

        _connected()
        whole = tensor.contiguous()
        with _lost_ranks():
            _torch().broadcast(whole.view(-1).view(torch.uint8), src=owner)
        if whole.data_ptr() != tensor.data_ptr() or whole.stride() != tensor.stride():
            tensor.copy_(whole)


def send_many(things: Iterable[tuple[Tensor, int]]) -> None:
    """Give all processes many tensors, each that of its owner, in place: small ones of one owner go together."""
    if world_size() == 1:
        return
    by_owner: dict[int, list[Tensor]] = {}
    for tensor, owner in things:
        by_owner.setdefault(owner, []).append(tensor)
    for owner in sorted(by_owner):
        for pack in _packs(by_owner[owner]):
            _send_pack(pack, owner)


def _packs(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one device in lists of at most so many bytes, larger ones by themselves."""
    pack: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if pack and (held + tensor.nbytes > _PACK or tensor.device != pack[0].device):
            yield pack
            pack, held = [], 0
        pack.append(tensor)
        held += tensor.nbytes
    if pack:
        yield pack


def _send_pack(tensors: Sequence[Tensor], owner: int) -> None:
    if len(tensors) == 1:
        send(tensors[0], owner)
        return
    import torch

    sizes = [tensor.nbytes for tensor in tensors]
    flat = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8, device=tensors[0].device)
    parts = flat.split([_aligned(size) for size in sizes])
    views = [
        part[:size].view(tensor.dtype).view(tensor.shape)
        for part, size, tensor in zip(parts, sizes, tensors, strict=True)
    ]
    if owner == rank():
        for tensor, view in zip(tensors, views, strict=True):
            view.copy_(tensor)
    send(flat, owner)
    if owner != rank():
        for tensor, view in zip(tensors, views, strict=True):
            tensor.copy_(view)


def _aligned(size: int) -> int:
    """Bytes that a tensor of so many takes beside others, so that each begins where its type may."""
    return -(-size // 16) * 16


def add_up(tensor: Tensor, only: int | None = None) -> None:
    """Replace a contiguous tensor by the sum of all processes', added in the order of their ranks.

    With `only` that process alone gets the sum.
    """
    if world_size() == 1:
        return
    import torch

    adds = only in (None, rank())
    for part in tensor.view(-1).split(_PIECE):
        total = torch.zeros_like(part) if adds else part
        for owner in range(world_size()):
            term = part if owner == rank() else torch.empty_like(part)
            if owner != only:
                send(term, owner)
            if adds:
                total += term
        if adds:
            part.copy_(total)


def added_in_order(mine: Sequence[Tensor]) -> Tensor | None:
    """The sum of the terms of all processes, which all call it: those of the first one first, each one's in order.

    Each process adds its own to the sum of those before it: the bits are those of one process that has all, and none
    holds the terms of another. None if there are no terms; a single term may be returned itself.
    """
    import torch

    total: Tensor | None = None
    for owner, stated in enumerate(gather((mine[0].shape, mine[0].dtype) if mine else None)):
        if stated is None:
            continue
        if owner == rank():
            for term in mine:  # on the device that the sum is on: processes work on theirs
                total = term if total is None else total + term
        else:
            total = torch.empty(stated[0], dtype=stated[1], device=device())
        if total is not None and world_size() > 1:
            total = total.to(device()).contiguous()
            send(total, owner)
    return total


def in_all(work: Callable[[], Result]) -> Result:
    """What `work` gives in this process; if it raises a UserError in any, all raise one, which the main one reports."""
    if world_size() == 1:
        return work()
    error: UserError | None = None
    found: Any = None
    try:
        found = work()
    except UserError as raised:
        error = raised
    errors = gather(None if error is None else (type(error), error.what, error.code, error.where, error.remedy))
    first = next((one for one in errors if one is not None), None)
    if first is None:
        result: Result = found
        return result
    kind, what, code, where, remedy = first
    if is_main():
        raise kind(what, code=code, where=where, remedy=remedy) from None
    raise OtherRankError(what, code=code, where=where, remedy=remedy) from None


def share(costs: Sequence[int], processes: int | None = None) -> list[int]:
    """Which process does each of several pieces of work: from the largest, the one that has the least to do so far."""
    loads = [0] * (processes or world_size())
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += max(1, costs[place])
    return owners


def block(count: int, process: int | None = None, processes: int | None = None) -> range:
    """Which of `count` things in a row a process has, by default this one of all: each has a block of them."""
    number, total = rank() if process is None else process, processes or world_size()
    return range(number * count // total, (number + 1) * count // total)


def mine(things: Sequence[Result]) -> Sequence[Result]:
    """The `block` of things that this process has."""
    some = block(len(things))
    return things[some.start : some.stop]


def side_group() -> Any:
    """A group of all processes for one other thread; None for a world of one. All processes must ask for it."""
    global _side  # noqa: PLW0603
    if world_size() == 1:
        return None
    if _side is None:  # it takes half a second
        _side = _torch().new_group(backend="gloo", timeout=_PATIENCE)
    return _side


def _torch() -> Any:
    import torch

    return torch.distributed


def _has_joined() -> bool:
    if _apart or "torch" not in sys.modules:
        return False
    return bool(_torch().is_available() and _torch().is_initialized())


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """What torch raises where another process has ended, as an error that says so."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Unfinished(
            f"another process of this run ended, or cannot be reached ({str(error).splitlines()[0][:200]}).",
            code="rank-lost",
            where=f"rank {rank()}",
            remedy="Its own message says why; run the same command to resume.",
        ) from None
