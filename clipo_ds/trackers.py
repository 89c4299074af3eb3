"""Experiment trackers (TensorBoard, W&B, trackio, …) through accelerate; the run folder stays the record of truth.

A run that goes on after a stop goes on in the tracker's same run, where the tracker has such a thing: the name is the
run folder's, and an id made at the first start lies in `trackers/run_id` there.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from clipo_ds.types import InputError


class Trackers:
    """The trackers of a run on rank 0; on other ranks, and without any, every call does nothing."""

    def __init__(self, trackers: Sequence[GeneralTracker] = ()) -> None:
        self._trackers = list(trackers)

    @classmethod
    def start(
        cls, names: Sequence[str], *, project: str, run_dir: Path, config: Mapping[str, Any], cpu: bool
    ) -> Trackers:
        """Start the named trackers; files go into `run_dir`/trackers.

        Args:
            names: Names that `check_trackers` has let pass.
            project: Project name for trackers that have one.
            run_dir: The run folder; its name is the run's name.
            config: Flat run configuration to store, dotted keys.
            cpu: Whether the run is on a CPU (accelerate asks for the machine's state).
        """
        accelerate.PartialState(cpu=cpu)
        started = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            tracker = kind(project, **_own_run(name, kind, run_dir))
            tracker.start()
            tracker.store_init_configuration({key: _plain(value) for key, value in config.items()})
            started.append(tracker)
        return cls(started)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the finite numbers of one step."""
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(finite, step=step)

    def finish(self) -> None:
        """Flush and close."""
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker exists and is installed.

    Raises:
        InputError: accelerate does not know the name, or the tracker's package is not installed.
    """
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"`logging.trackers` must name some of {sorted(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
        if name not in installed:
            raise InputError(f"`logging.trackers` must name installed trackers, got {name!r}: pip install {name}")


def _own_run(name: str, kind: type[GeneralTracker], run_dir: Path) -> dict[str, Any]:
    """Where a tracker's files go, and what makes its run this one; what the user's environment says goes before it."""
    folder = run_dir / "trackers"
    if kind.requires_logging_directory:
        return {"logging_dir": str(folder)}
    if name == "wandb":
        chosen = {"name": run_dir.name, "id": _run_id(folder), "dir": str(folder)}
        variables = {"name": "WANDB_NAME", "id": "WANDB_RUN_ID", "dir": "WANDB_DIR"}
        return {"resume": "allow"} | {key: value for key, value in chosen.items() if not os.environ.get(variables[key])}
    if name == "trackio":  # it tells runs apart by their names alone
        return {"name": f"{run_dir.name}-{_run_id(folder)}", "resume": "allow"}
    return {}


def _run_id(folder: Path) -> str:
    """The id under which trackers know this run, made at its first start."""
    file = folder / "run_id"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
