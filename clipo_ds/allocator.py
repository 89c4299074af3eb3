"""Memory that a training step on a CPU gets back at once instead of from the kernel.

A step frees gigabytes of activations and takes them again. The C library hands large blocks back to the kernel, and the
next step pays a page fault for every 4 kB of them, dearly on a virtual machine. Both functions change speed and never a
number. Imports neither torch nor anything of this package.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
# glibc's <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def use_huge_pages() -> None:
    """Let torch put tensors of 2 MB and more on huge pages where Linux has them; call it before torch is imported.

    `THP_MEM_ALLOC_ENABLE=0` in the environment keeps it off.
    """
    if HUGE_PAGES.exists():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next step; without glibc nothing happens.

    Not for a process that trains on GPUs: weights pass through its memory once and would stay in it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # which is never cut back
