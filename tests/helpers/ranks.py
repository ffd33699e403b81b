"""Several processes that torchrun would start, forked from this one: torch is imported once.

As under torchrun, the store by which they find each other is there before they start, on a port that the system gives.
It is in a process of its own: this one has no thread of the store's, which could hold a lock while it forks.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def in_ranks(count: int, work: Callable[[int], object]) -> list[int]:
    """Exit codes of `work(rank)` in processes that find each other by gloo; 2 for a UserError, 1 for another error."""
    (told, tell), (end, held) = os.pipe(), os.pipe()
    keeper = os.fork()
    if not keeper:
        os.close(held)
        _keep_store(tell, end)
    os.close(tell)
    os.close(end)
    with os.fdopen(told) as answer:
        port = int(answer.readline())
        children = []
        for rank in range(count):
            child = os.fork()
            if not child:
                _run(rank, count, port, work)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(held)
    os.waitpid(keeper, 0)
    return codes


def _keep_store(tell: int, end: int) -> None:
    """Hold a store and say its port, until nobody holds the other end of the pipe `end`."""
    import torch

    rendezvous: Any = torch.distributed
    try:
        store = rendezvous.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(tell, f"{store.port}\n".encode())
        os.read(end, 1)
    finally:
        os._exit(0)


def _run(rank: int, count: int, port: int, work: Callable[[int], object]) -> None:
    from snugfit.errors import UserError

    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    code = 1
    try:
        work(rank)
        code = 0
    except UserError as error:
        print(f"rank {rank}: {type(error).__name__} {error.code}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        code = 2
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
