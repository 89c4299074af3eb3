"""Who writes into a folder: a lock file that one process has and that says which.

    lock.json    {"host": …, "pid": …, "started": …, "since": …}

The file is made with O_EXCL, which is atomic on network file systems as well, and it is locked by its process (flock)
for as long as that has it. The kernel opens the lock when the process ends, however it ends: so what a killed one left
is told from what is in use, also where containers number their processes anew. A file system may keep no locks, or keep
them for each machine alone: then the process that the file names decides, and of one on another machine nobody can tell
whether it lives. Layer L1, imports `clipo_ds.records`, psutil and no torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from clipo_ds.records import LOCK
from clipo_ds.types import InputError

if sys.platform != "win32":  # where runs are looked at, and none is trained
    import fcntl

PATIENCE_S = 3.0
"""How long to wait for a process that is ending, or one that has made its file and not yet written into it."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names."""

    host: str
    pid: int
    started: float  # its start, seconds since the epoch: a pid alone may be another's by now
    since: str  # when it took the folder

    @classmethod
    def this_process(cls) -> Holder:
        """What this process writes into its lock file."""
        return cls(
            socket.gethostname(), os.getpid(), psutil.Process().create_time(), time.strftime("%Y-%m-%d %H:%M:%S %Z")
        )

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine, as far as names tell."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether it is there; True of a process on another machine, where nobody can tell."""
        if not self.is_here:
            return True
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class FolderLock:
    """A folder that this process alone writes into, until `release`.

    Attributes:
        left_by: The dead process whose lock was taken over, or None.
    """

    def __init__(self, file: Path, number: int, left_by: Holder | None, *, made_folder: bool) -> None:
        self._file = file
        self._number = number
        self._made_folder = made_folder
        self.left_by = left_by

    @classmethod
    def take(cls, folder: Path, *, field: str = "run_dir", made_folder: bool = False) -> FolderLock:
        """Take a folder that exists.

        Args:
            field: The setting that named it, for the message.
            made_folder: Remove it when it is given back empty.

        Raises:
            InputError: Another process has it, or one on another machine had it and may still be alive.
        """
        file = folder / LOCK
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                _write_holder(number)
                _lock(number, waiting=True)  # for one that had a look at it
                return cls(file, number, None, made_folder=made_folder)
            except FileExistsError:
                pass
            with contextlib.suppress(FileNotFoundError):  # given back meanwhile
                number = os.open(file, os.O_RDWR)
                try:
                    return cls(file, number, _take_over(number, file, field), made_folder=made_folder)
                except _Unsettled as unsettled:
                    os.close(number)
                    if time.monotonic() > deadline:
                        raise _refusal(folder, field, unsettled.holder) from None
                except BaseException:
                    os.close(number)
                    raise
            time.sleep(0.05)

    def release(self) -> None:
        """Give the folder back; once more does nothing."""
        if self._number >= 0:
            if _is_file(self._number, self._file):  # unless somebody removed it and it is another's by now
                self._file.unlink()
            os.close(self._number)
            self._number = -1
            if self._made_folder:
                with contextlib.suppress(OSError):  # it holds something, as it should
                    self._file.parent.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_free(folder: Path, *, field: str = "run_dir") -> None:
    """Check that nobody has a folder, without taking it.

    Raises:
        InputError: As `FolderLock.take`.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        holder = _read_holder((folder / LOCK).read_bytes())
        if holder is not None and holder.is_alive:
            raise _refusal(folder, field, holder)


def fresh_folder(parent: Path, name: str, ending: str = "") -> Path:
    """Make a new folder called `name` and `ending`, or `name`-2, -3, … where others were quicker."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{name}{'' if number == 1 else f'-{number}'}{ending}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


class _Unsettled(Exception):
    """Not to be told yet: the file is empty, was put in another's place, or is locked by a process that is ending."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__()
        self.holder = holder


def _take_over(number: int, file: Path, field: str) -> Holder | None:
    """Make the open lock file of a dead process this one's; gives who left it, None where it does not say.

    Raises:
        InputError: Its process is alive, or may be.
        _Unsettled: Look again.
    """
    is_locked = not _lock(number)
    holder = _read_holder(os.pread(number, 4096, 0))
    if is_locked and holder is not None and (holder.is_alive or not holder.is_here):
        raise _refusal(file.parent, field, holder)
    if is_locked or not _is_file(number, file):
        raise _Unsettled(holder)
    if holder is None and time.time() - os.fstat(number).st_mtime < PATIENCE_S / 2:
        raise _Unsettled(None)
    if holder is not None and holder.is_alive:
        raise _refusal(file.parent, field, holder)
    _write_holder(number)
    return holder


def _lock(number: int, *, waiting: bool = False) -> bool:
    """Lock the file; False where somebody else has it locked. Where the file system keeps no locks, nobody has."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def _is_file(number: int, file: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(number), file.stat())
    except FileNotFoundError:
        return False


def _write_holder(number: int) -> None:
    os.ftruncate(number, 0)
    os.pwrite(number, (json.dumps(asdict(Holder.this_process())) + "\n").encode(), 0)


def _read_holder(text: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _refusal(folder: Path, field: str, holder: Holder | None) -> InputError:
    who = "another process" if holder is None else f"{holder} (since {holder.since})"
    rest = f"; if it is no more, remove {folder / LOCK}" if holder is None or not holder.is_here else ""
    return InputError(
        f"`{field}` must be a folder that no other run writes into, got '{folder}', which {who} has{rest}"
    )
