"""A folder has one writer at a time; a dead one's lock is taken over, another machine's is not."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipo_ds import folder_lock
from clipo_ds.folder_lock import FolderLock, Holder, check_free, fresh_folder
from clipo_ds.records import LOCK
from clipo_ds.types import InputError

HOLDING = (
    "import sys, time; from pathlib import Path; from clipo_ds.folder_lock import FolderLock;"
    "lock = FolderLock.take(Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read(); lock.release()"
)


def holding(folder: Path) -> subprocess.Popen[str]:
    """A process that has taken a folder."""
    command = [sys.executable, "-c", HOLDING, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_taken_folder_is_refused_by_name_until_it_is_given_back(tmp_path):
    process = holding(tmp_path)
    facts = json.loads((tmp_path / LOCK).read_text())
    assert facts["pid"] == process.pid
    line = (
        f"`run_dir` must be a folder that no other run writes into, got '{tmp_path}', which process {process.pid} on "
        f"{facts['host']} (since {facts['since']}) has"
    )
    for refuse in (FolderLock.take, check_free):
        with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
            refuse(tmp_path)
    process.communicate("")
    check_free(tmp_path)
    with FolderLock.take(tmp_path) as lock:
        assert lock.left_by is None
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    process = holding(tmp_path)
    process.kill()
    process.wait()
    check_free(tmp_path)
    with FolderLock.take(tmp_path) as lock:
        assert lock.left_by is not None and lock.left_by.pid == process.pid
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == Holder.this_process().pid


def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path):
    """The file names this very process, but one that started an hour before."""
    holder = dataclasses.replace(Holder.this_process(), started=Holder.this_process().started - 3600)
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    FolderLock.take(tmp_path).release()


def test_a_lock_of_another_machine_is_refused_with_the_way_out(tmp_path):
    holder = dataclasses.replace(Holder.this_process(), host="node7", pid=42)
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    for refuse in (FolderLock.take, check_free):
        with pytest.raises(InputError, match=rf"process 42 on node7 .* if it is no more, remove {tmp_path}/{LOCK}$"):
            refuse(tmp_path)
    (tmp_path / LOCK).unlink()
    FolderLock.take(tmp_path).release()


def test_a_lock_that_was_never_written_is_taken_over_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE_S", 0.4)
    (tmp_path / LOCK).touch()  # its process was killed at once
    FolderLock.take(tmp_path).release()


def test_somebody_elses_lock_is_not_removed_with_ones_own(tmp_path):
    lock = FolderLock.take(tmp_path)
    (tmp_path / LOCK).unlink()  # by hand
    process = holding(tmp_path)
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    process.communicate("")


def _race(folder: str, number: int, start: object, won: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    try:
        FolderLock.take(Path(folder))
    except InputError:
        return
    won.put(number)  # type: ignore[attr-defined]
    won.close()  # type: ignore[attr-defined]
    won.join_thread()  # type: ignore[attr-defined]
    start.wait()  # type: ignore[attr-defined]


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_come_at_once_one_gets_the_folder(tmp_path, stale):
    if stale:
        holder = dataclasses.replace(Holder.this_process(), started=0.0)
        (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_race, args=(str(tmp_path), n, start, won)) for n in range(4)]
    for process in processes:
        process.start()
    won.get(timeout=60)
    # It waits for company that never comes, while the others leave, each with its refusal.
    deadline = time.monotonic() + 60
    while sum(process.is_alive() for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (winner,) = (process for process in processes if process.is_alive())
    assert won.empty()
    winner.kill()


def test_fresh_folders_of_one_name_are_different_ones(tmp_path):
    made = [fresh_folder(tmp_path / "runs", "demo-1", ending) for ending in ("", "", "", ".launch", ".launch")]
    assert [path.name for path in made] == ["demo-1", "demo-1-2", "demo-1-3", "demo-1.launch", "demo-1-2.launch"]


def test_a_folder_made_for_a_run_that_could_not_start_is_removed(tmp_path):
    (tmp_path / "run").mkdir()
    FolderLock.take(tmp_path / "run", made_folder=True).release()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    FolderLock.take(tmp_path / "mine").release()
    assert (tmp_path / "mine").exists()
