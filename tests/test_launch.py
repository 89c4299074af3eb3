"""Runs started from a notebook: detached, found again, stopped after a whole step, and their errors in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, SMALL

from clipo_ds.folder_lock import FolderLock
from clipo_ds.records import open_run
from clipo_ds.viz.launch import LaunchedRun, RunStatus, attach, launch, run_environment

SETTINGS = dict(flag.removeprefix("--").split("=", 1) for flag in SMALL if not flag.startswith("--recipe"))


def started(folder: Path, **settings: object) -> LaunchedRun:
    return launch("demo", run_dir=folder, accelerator="cpu", settings=SETTINGS | settings)


def wait_for_step(run: LaunchedRun, step: int, timeout_s: float = 120) -> RunStatus:
    deadline = time.monotonic() + timeout_s
    while (status := run.status()).step < step:
        assert not status.is_over and time.monotonic() < deadline, f"{status}\n{run.output()}"
        time.sleep(0.1)
    return status


def test_run_outlives_the_kernel_that_started_it_and_stops_with_a_whole_checkpoint(tmp_path):
    folder = tmp_path / "run"
    # A kernel is a Python process too: this one starts the run and is gone.
    code = (
        "import json, sys; from clipo_ds.viz.launch import launch; assert 'torch' not in sys.modules;"
        "launch('demo', run_dir=sys.argv[1], accelerator='cpu', settings=json.loads(sys.argv[2]))"
    )
    settings = json.dumps(SETTINGS | {"steps": 10000})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(folder), settings], env=environment, check=True)
    run = attach(folder)
    assert run.status().state == "starting"
    with pytest.raises(ValueError, match="`run_dir` must not hold a run that is going on"):
        started(folder)
    assert wait_for_step(run, 1).state == "running"
    assert run.stop().startswith("stopping: it finishes the step it is in")
    assert run.status().state in ("stopping", "stopped")
    run.stop()  # once more does not interrupt the step
    status = run.wait(60)
    assert status.state == "stopped" and status.is_over
    newest = folder / "checkpoints" / f"step_{status.step:06d}"
    assert open_run(folder).checkpoints()[status.step] == newest
    assert str(newest) in str(status)
    assert run.stop().startswith("nothing to stop: the run is stopped")
    # and it goes on from there
    resumed = launch(None, run_dir=folder, accelerator="cpu", settings={"resume": "auto", "steps": status.step + 1})
    last = resumed.wait(120)
    assert (last.state, last.step) == ("finished", status.step + 1), resumed.output()


def test_stopping_before_the_first_step_says_that_nothing_is_kept(tmp_path):
    run = started(tmp_path / "run", steps=10000)
    assert run.stop() == "stopping: if no step has begun, there will be no checkpoint"
    status = run.wait(60)
    assert (status.state, status.message) == ("stopped", "it has no checkpoint")


def test_killed_run_leaves_no_process(tmp_path):
    run = started(tmp_path / "run", steps=10000)
    assert run.stop(at_once=True) == "killed; it has no checkpoint"
    assert run.wait(20).state == "stopped"
    assert not [p for p in psutil.process_iter(["cmdline"]) if f"--run_dir={run.path}" in (p.info["cmdline"] or [])]


def test_error_of_the_user_is_shown_as_one_line(tmp_path):
    run = launch("dmeo", run_dir=tmp_path / "run", accelerator="cpu")
    status = run.wait(60)
    assert status.state == "failed"
    assert status.message.startswith("error: `recipe` must be one of ")
    assert "did you mean `demo`?" in status.message and "\n" not in status.message
    assert str(status).startswith("failed: error: ")


def test_error_of_the_program_is_shown_by_its_last_line(tmp_path):
    run = LaunchedRun(tmp_path / "run", pid=0, started=0.0, host="elsewhere")
    beside = tmp_path / "run.launch"
    beside.mkdir()
    (beside / "exit_code").write_text("1\n")
    run.log.write_text(
        "step 1/2\nTraceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: no more\n"
        "[2026-11-24 12:00:00,123] [ERROR] [launch.py:1:x] exits with return code = 1\n"
    )
    assert run.status().message == f"torch.OutOfMemoryError: no more (all of it in {run.log})"


def test_run_that_vanished_is_not_said_to_run(tmp_path):
    run = started(tmp_path / "run", steps=10000)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait(20).state == "failed"


def test_only_launched_runs_can_be_attached(tmp_path):
    with pytest.raises(ValueError, match="`run_dir` must be a run that `launch` started, got"):
        attach(tmp_path / "run")


def test_a_run_that_another_kernel_is_starting_is_not_started_again(tmp_path):
    (tmp_path / "run.launch").mkdir()
    with FolderLock.take(tmp_path / "run.launch"), pytest.raises(ValueError, match=f"which process {os.getpid()} on "):
        started(tmp_path / "run")
    assert not (tmp_path / "run.launch" / "launch.json").exists()


def test_missing_deepspeed_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`ds_config` must be at .*zero9\.json"):
        launch("demo", run_dir=tmp_path / "run", ds_config="zero9")


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_of_a_notebooks_run_sleep_while_they_wait_unless_told_otherwise(monkeypatch, given, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert run_environment("cpu")["OMP_WAIT_POLICY"] == expected
