"""Which threads of a process compute with how many CPU cores.

torch starts as many threads as there are cores for the main thread, and as many again for every other thread that
copies a large tensor, as gloo's do. GNU OpenMP then counts more threads than cores and lets none of them wait awake for
the next operation: every short one pays two switches by the kernel, a third of a training step of a small model. Layer
L1, imports torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def share_cores(num_processes: int) -> None:
    """Take this process's share of a machine for the calling thread, once; `OMP_NUM_THREADS` goes before it.

    Args:
        num_processes: How many processes compute on this machine and see the same cores, at least 1.
    """
    count = torch.get_num_threads()
    use_cores(count if "OMP_NUM_THREADS" in os.environ else max(1, count // num_processes))


def use_cores(count: int) -> None:
    """Compute with `count` threads in the calling thread, and with one in every thread that has not computed yet."""
    torch.get_num_threads()  # or this thread would take what is set last, when it computes for the first time
    torch.set_num_threads(count)
    # It holds for the thread that sets it, and for all that compute for the first time afterwards.
    setter = threading.Thread(target=torch.set_num_threads, args=(1,))
    setter.start()
    setter.join()


@contextmanager
def one_core() -> Iterator[None]:
    """One thread for a while, so that sums do not depend on the number of cores; other threads as `use_cores`."""
    before = torch.get_num_threads()
    use_cores(1)
    try:
        yield
    finally:
        use_cores(before)
