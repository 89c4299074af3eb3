"""The folder of a run while it runs: taken before anything is loaded, written when all is built. Layer L3.

Every method is called by all ranks; rank 0 alone looks at the disk and writes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipo_ds import checkpoint, distributed
from clipo_ds.distributed import Ranks
from clipo_ds.folder_lock import FolderLock, fresh_folder
from clipo_ds.records import RunWriter
from clipo_ds.resuming import holds_run, locate
from clipo_ds.schema import TrainConfig
from clipo_ds.superseded import Superseded, move_aside
from clipo_ds.types import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """A folder that no other run writes into until `release`."""

    path: Path
    lock: FolderLock | None  # on rank 0

    @classmethod
    def take(cls, config: TrainConfig, found: Path, checkpoint: Path | None, ranks: Ranks) -> RunFolder:
        """Take what `find_run_folder` has found, and make it where it is not there.

        A run without `run_dir` gets another name where the one that was found has become another run's.

        Raises:
            InputError: Another run is writing into it, or has done so since it was found.
        """
        locks: list[FolderLock] = []

        def take() -> Path:
            folder, lock = _take(config, found, checkpoint)
            locks.append(lock)
            if lock.left_by is not None:
                logger.warning("run folder %s is taken over from %s, which is no more", folder, lock.left_by)
            return folder

        return cls(distributed.from_main(take), locks[0] if ranks.is_main else None)

    def begin(self, description: Mapping[str, Any]) -> bool:
        """Make a run of the folder where it holds none yet, as `RunWriter.create` does; whether it held none."""

        def create() -> bool:
            is_new = not holds_run(self.path)
            if is_new:
                RunWriter.create(self.path, **description)
            return is_new

        return distributed.from_main(create)

    def go_on(self, step: int, description: Mapping[str, Any]) -> Superseded | None:
        """Leave in the folder what belongs to the steps up to `step`, and say what runs from there on.

        Returns what was moved aside, or None. No rank begins before all have come here.
        """

        def write() -> Superseded | None:
            checkpoint.remove_left(self.path)
            moved = move_aside(self.path, step)
            RunWriter(self.path).write_description(**description, step=step)
            return moved

        distributed.barrier()
        return distributed.from_main(write)

    def release(self) -> None:
        """Give the folder back; one that was made here and is still empty is removed."""
        if self.lock is not None:
            self.lock.release()


def _take(config: TrainConfig, folder: Path, resume_from: Path | None) -> tuple[Path, FolderLock]:
    has_fresh_name = config.run_dir is None and config.resume is None
    is_new = not folder.exists()
    if has_fresh_name:
        folder = fresh_folder(folder.parent, folder.name)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock.take(folder, made_folder=is_new or has_fresh_name)
    try:
        if locate(config, folder.name) != (folder, resume_from):
            raise InputError(
                f"`run_dir` must be a folder that no other run writes into, got '{folder}', into which one has written "
                "since this start; start again"
            )
    except InputError:
        lock.release()
        raise
    return folder, lock
