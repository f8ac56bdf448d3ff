"""Runs a function in several processes that form a process group, and never waits for ever.

The processes are forked from a server that imported torch once. What a job returns comes back
through a pipe; a process that has not answered in time is killed, and the test fails.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DIED = "died"  # stands for the result of a process that ended without one

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch_ext"])


def run(
    world: int,
    job: Callable[..., Any],
    *arguments: Any,
    seconds: float = 60,
    group_seconds: float = 30,
    may_die: tuple[int, ...] = (),
    backend: str = "gloo",
) -> list[Any]:
    """The results of ``job(rank, world, *arguments)`` on each rank, in order of ranks.

    ``seconds``: for all of it; ``group_seconds``: the process group's timeout; ``may_die``: ranks
    that may end without a result, or not end at all: they are killed once the others are done.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            given = (there, store, rank, world, group_seconds, backend, job, arguments)
            processes.append(_context.Process(target=_rank, args=given, daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
        deadline = time.monotonic() + seconds
        try:
            waited = [rank for rank in range(world) if rank not in may_die]
            found = {rank: _receive(pipes[rank], deadline, rank) for rank in waited}
            found |= {rank: _receive(pipes[rank], 0, rank) for rank in may_die}
        finally:
            for process in processes:
                process.kill()
                process.join(10)
    errors = [f"rank {rank}: {error}" for rank, (error, _) in sorted(found.items()) if error]
    assert not errors, "\n".join(errors)
    return [found[rank][1] for rank in range(world)]


def _receive(pipe: Connection, deadline: float, rank: int) -> tuple[str, Any]:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return ("no result in time", None) if deadline else ("", DIED)
    try:
        error, result = pipe.recv()
    except EOFError:
        return ("ended without a result", None) if deadline else ("", DIED)
    return error, result


def _rank(
    pipe: Connection,
    store: str,
    rank: int,
    world: int,
    group_seconds: float,
    backend: str,
    job: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=group_seconds),
        )
        result = job(rank, world, *arguments)
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    else:
        pipe.send(("", result))
