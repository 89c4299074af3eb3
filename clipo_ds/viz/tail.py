"""Reading a jsonl file that another process appends to, without reading it whole each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAST_BYTES = 64 * 1024  # more than a row of metrics ever takes


def last_lines(path: Path) -> list[str]:
    """The last lines of a text file, however long it is; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            return file.read().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole line of a jsonl file."""
    whole = [line for line in last_lines(path) if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else None


class JsonLines:
    """The whole lines of a jsonl file that grows; a file that was put in its place is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.changed: float | None = None  # when the file was last written, seconds since the epoch
        self._inode: int | None = None  # of the file that `rows` comes from
        self._offset = 0

    def read(self) -> bool:
        """Take in what is new; returns whether `rows` has changed."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return False  # nothing has been recorded yet
        with file:
            facts = self.path.stat()
            replaced = facts.st_ino != self._inode or facts.st_size < self._offset
            if replaced:
                self._inode, self._offset, self.rows = facts.st_ino, 0, []
            self.changed = facts.st_mtime
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # the rest is still being written
        self._offset += len(whole)
        self.rows += [json.loads(line) for line in whole.splitlines()]
        return bool(whole) or replaced
