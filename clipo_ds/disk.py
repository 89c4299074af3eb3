"""Room on a disk, and what to say when there is none. Layer L1, no torch."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk without room, a quota that is used up, and a process that may not write files of this size."""


def free_bytes(folder: Path) -> int:
    """Bytes that can be written where a folder is or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def in_words(num_bytes: int) -> str:
    """A size for people.

    >>> in_words(999), in_words(1_430_000), in_words(45_200_000_000)
    ('999 bytes', '1.4 MB', '45.2 GB')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
