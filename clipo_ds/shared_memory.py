"""Files through which the processes of a machine share something: weights for a sampler in memory, prompts among
temporary files; and what is left of them when their writer was killed.

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
PREFIX = "clipo_ds-shared-"  # whatever lies under such a name and is not locked may be removed
YOUNG_S = 10.0
"""A folder that was made less than so many seconds ago may not be locked yet."""


@contextlib.contextmanager
def shared_folder(place: Path | None = None) -> Iterator[Path]:
    """A folder for the block: in a place of `places()`, or in the first of them.

    Raises:
        OSError: The place has no room, may not be written, or cannot lock.
    """
    place = places()[0] if place is None else place
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place) as folder, _opened(Path(folder)) as number:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield Path(folder)


def remove_left_folders() -> None:
    """Remove the folders of processes that ended inside `shared_folder`."""
    for folder in [folder for place in places() for folder in place.glob(f"{PREFIX}*")]:
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


def places() -> list[Path]:
    """Where a machine's processes may share files: in memory, where that can be written, and among temporary files."""
    return [*([SHARED_MEMORY] if os.access(SHARED_MEMORY, os.W_OK) else []), Path(tempfile.gettempdir())]
