"""Calls a function of a test on several ranks, each a process of its own on the CPU, without the DeepSpeed launcher."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from launching import TIME_LIMIT, free_port

from clipo_ds import distributed


def on_ranks(world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(ranks, *arguments)` on every rank, `ranks` being what a run gets, and insist that all come to an end.

    Args:
        work: A function at the top of a module, which the processes import; what it finds out it leaves in files.
    """
    port = free_port()
    processes = multiprocessing.spawn(_be, (world_size, port, work, arguments), nprocs=world_size, join=False)
    deadline = time.monotonic() + TIME_LIMIT
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in processes.processes:
            process.kill()


def _be(rank: int, world_size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Be one rank, told by the environment what the launcher would tell it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    work(distributed.start(), *arguments)
    distributed.stop()
    sys.stderr.flush()
    os._exit(0)  # as `run_ranks` does, and for its reason
