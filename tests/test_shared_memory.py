"""Folders in memory: gone after use, and found again when their writer was killed in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipo_ds import shared_memory
from clipo_ds.shared_memory import remove_left_folders, shared_folder

KILLED = """
import os, signal
from clipo_ds.shared_memory import shared_folder
with shared_folder() as folder:
    (folder / "weights").write_text("many")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by_a_killed_process() -> Path:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return Path(done.stdout.strip())


def test_a_folder_is_gone_after_its_block() -> None:
    with shared_folder() as folder:
        (folder / "weights").write_text("many")
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not() -> None:
    left = left_by_a_killed_process()
    assert (left / "weights").exists()
    with shared_folder() as held:
        for folder in (left, held):
            os.utime(folder, (0, 0))
        remove_left_folders()
        assert held.exists() and not left.exists()


def test_a_folder_that_was_made_just_now_is_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    left = left_by_a_killed_process()
    remove_left_folders()
    assert left.exists()  # its maker may not have locked it yet
    monkeypatch.setattr(shared_memory, "YOUNG_S", 0.0)
    remove_left_folders()
    assert not left.exists()
