"""Several processes that torchrun would start, forked from this one: torch is imported once.

As torchrun does, this process has the store by which they find each other, on a port that the system gives and that
nobody can take in between: it listens before they start.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def in_ranks(count: int, work: Callable[[int], object]) -> list[int]:
    """Exit codes of `work(rank)` in processes that find each other by gloo; 2 for a UserError, 1 for another error."""
    import torch

    rendezvous: Any = torch.distributed
    store = rendezvous.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            _run(rank, count, store.port, work)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


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
