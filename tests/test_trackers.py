"""Trackers as a run starts them, once and again; W&B without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipo_ds.trackers import Trackers


def wandb_runs(run_dir: Path) -> list[str]:
    """Id of every W&B run that was begun for a run folder."""
    return [folder.name.rpartition("-")[2] for folder in sorted((run_dir / "trackers").glob("wandb/offline-run-*"))]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def start_and_log(run_dir: Path, step: int) -> str:
    """One start of a run with W&B; the name that W&B has for it."""
    trackers = Trackers.start(["wandb"], project="tests", run_dir=run_dir, config={"steps": 4}, cpu=True)
    (tracker,) = trackers._trackers
    trackers.log({"reward/mean": 0.5, "policy/kl_old": float("nan")}, step)
    trackers.finish()
    return tracker.tracker.name


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb_and_another_run_does_not(offline, tmp_path):
    names = [start_and_log(tmp_path / folder, step) for folder, step in (("first", 1), ("first", 2), ("second", 1))]
    assert names == ["first", "first", "second"]
    first, again = wandb_runs(tmp_path / "first")
    assert first == again
    assert wandb_runs(tmp_path / "second") != [first]
