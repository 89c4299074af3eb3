"""A file that holds prompts for several processes: written once, then mapped into memory by each that reads it.

Readers share the machine's one copy and make a `Prompt` of it when it is asked for, whose columns for reward functions
are what the writer had: records are pickles, so read only files that this run wrote. Layer L1.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from clipo_ds.types import Prompt


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a file for `StoredPrompts`.

    Records come first, then the position in bytes at which each begins and the last ends, then their number; positions
    and number are int64.

    Raises:
        OSError: The place has no room for it, or may not be written.
    """
    ends = [0]
    with path.open("wb") as file:
        for prompt in prompts:
            ends.append(ends[-1] + file.write(pickle.dumps(prompt, pickle.HIGHEST_PROTOCOL)))
        file.write(np.array([*ends, len(ends) - 1], np.int64).tobytes())


class StoredPrompts(Sequence[Prompt]):
    """The prompts of a file that `write_prompts` wrote. The file may be removed while they are in use.

    Args:
        path: The file.

    Raises:
        OSError: It is not there, or may not be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = len(self._map)
        (count,) = np.frombuffer(self._map, np.int64, 1, size - 8)
        self._ends = np.frombuffer(self._map, np.int64, int(count) + 1, size - 8 * (int(count) + 2))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be below {len(self)}, got {index}")
        place = index % len(self)
        record: Prompt = pickle.loads(self._map[int(self._ends[place]) : int(self._ends[place + 1])])
        return record
