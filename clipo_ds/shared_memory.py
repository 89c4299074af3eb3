"""Files in memory through which weights go to a sampler, and what is left of them when their writer was killed.

A folder is locked by its writer for as long as it is in use. The kernel opens the lock when that process ends, however
it ends, also where another container shares the memory and numbers its processes anew. Layer L1.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "clipo_ds-"
YOUNG_S = 10.0
"""A folder that was made less than so many seconds ago may not be locked yet."""


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder for the block: in memory, or among temporary files where there is no such place."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=_place()) as folder, _opened(Path(folder)) as number:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield Path(folder)


def remove_left_folders() -> None:
    """Remove the folders of processes that ended inside `shared_folder`."""
    for folder in Path(_place() or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # It may vanish meanwhile, or be another user's.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            if time.time() - folder.stat().st_mtime > YOUNG_S:
                _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    with _opened(folder) as number:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield number
    finally:
        os.close(number)


def _place() -> Path | None:
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
