"""Start a run from a notebook: the DeepSpeed launcher in a session of its own, never training inside the kernel.

A run `runs/NAME` gets a folder `runs/NAME.launch` beside it (the run folder itself must be empty when training begins):

    launch.json       process id, host, command: how `attach` finds the run after a kernel restart
    output.log        everything the launcher and its ranks print
    exit_code         written when the launcher has ended
    stop_requested    there once `stop` has been called

Needs psutil and the scripts of the checkout that this package was imported from; no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from clipo_ds.folder_lock import FolderLock, fresh_folder
from clipo_ds.network import free_port
from clipo_ds.records import Run, open_run
from clipo_ds.viz.tail import last_lines, last_row

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ".launch"
STOPPED = 130  # exit code of a run that a signal ended after a whole step (clipo_ds.cli)
# The launcher's own words after a rank has failed; what the rank said stands before them.
LAUNCHER_LINE = re.compile(r"^\[\d{4}-\d\d-\d\d [\d:,]+\]")
ERROR_LINE = re.compile(r"^(?:\[rank\d+\]: )?(?:error: |[\w.]*(?:Error|Exception)\b)")
# Keeps the exit code where the kernel that started the run is gone by then; written beside and renamed.
RECORD_EXIT = '"$@"; echo $? > "$0.partial" && mv "$0.partial" "$0"'


@dataclass(frozen=True)
class RunStatus:
    """Where a launched run stands; `str()` is one line for people."""

    state: str  # starting | running | stopping | finished | stopped | failed
    step: int  # steps recorded
    num_steps: int | None  # None before the run folder exists
    message: str  # what went wrong, or how to go on

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("finished", "stopped", "failed")

    def __str__(self) -> str:
        steps = "" if self.num_steps is None else f" at step {self.step} of {self.num_steps}"
        return f"{self.state}{steps}" + (f": {self.message}" if self.message else "")


@dataclass(frozen=True)
class LaunchedRun:
    """A run that was started from a notebook, this one or an earlier kernel's."""

    path: Path  # the run folder; train.py makes it
    pid: int  # of the shell that waits for the launcher; it leads a session and process group of its own
    started: float  # its start, seconds since the epoch: a pid alone may be another's by now
    host: str

    @property
    def log(self) -> Path:
        """The file with everything the launcher and its ranks print."""
        return _launch_dir(self.path) / "output.log"

    def status(self) -> RunStatus:
        """Where the run stands now, from its files and its process."""
        run = self.run()
        last = last_row(self.path / "metrics.jsonl")
        step = 0 if last is None else int(last["step"])
        num_steps = None if run is None else int(run.config["steps"])
        asked = (_launch_dir(self.path) / "stop_requested").exists()
        alive = self._is_alive()  # before the exit code: it is written, then the process ends
        code = self._exit_code()
        if code is None and alive:
            state = "stopping" if asked else "running" if step else "starting"
            return RunStatus(state, step, num_steps, "")
        if code == 0:
            return RunStatus("finished", step, num_steps, "")
        if code == STOPPED or asked:
            return RunStatus("stopped", step, num_steps, self._what_is_kept(run))
        return RunStatus("failed", step, num_steps, self._last_error())

    def stop(self, *, at_once: bool = False) -> str:
        """Ask the run to end after the step it is in, with a whole checkpoint; returns what will happen, in words.

        Args:
            at_once: Kill it instead: only for a run that hangs. What is left is its newest checkpoint.
        """
        status = self.status()
        if status.is_over:
            return f"nothing to stop: the run is {status}"
        if self.host != socket.gethostname():
            return f"the run is on {self.host}, not on this machine: stop it there"
        (_launch_dir(self.path) / "stop_requested").touch()
        if at_once:
            self._signal_session(signal.SIGKILL)
            return f"killed; {self._what_is_kept(self.run())}"
        # The ranks alone: the launcher would kill them without waiting for the step.
        ranks = self._ranks()
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        if not ranks:
            self._signal_session(signal.SIGTERM)
        if status.state == "starting":
            return "stopping: if no step has begun, there will be no checkpoint"
        return "stopping: it finishes the step it is in and writes a checkpoint"

    def wait(self, timeout_s: float) -> RunStatus:
        """Block until the run is over.

        Raises:
            TimeoutError: It is not, after so many seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not (status := self.status()).is_over:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run {self.path} is not over after {timeout_s:g} s: {status}")
            time.sleep(0.2)
        return status

    def run(self) -> Run | None:
        """The run folder opened for reading; None as long as there is none."""
        try:
            changed = (self.path / "config.yaml").stat().st_mtime_ns
        except FileNotFoundError:
            return None
        return _opened(self.path, changed)

    def output(self, num_lines: int = 20) -> str:
        """The last lines of what the run printed."""
        return "".join(last_lines(self.log)[-num_lines:]).rstrip()

    def _is_alive(self) -> bool:
        if self.host != socket.gethostname():
            return True  # its end is known by the exit code alone
        with contextlib.suppress(ChildProcessError):  # not this kernel's child
            os.waitpid(self.pid, os.WNOHANG)
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _ranks(self) -> list[psutil.Process]:
        """The training processes: direct children of the per-node launcher."""
        try:
            below = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        ranks: list[psutil.Process] = []
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "deepspeed.launcher.launch" in process.cmdline():
                    ranks += process.children()
        return ranks

    def _signal_session(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _exit_code(self) -> int | None:
        try:
            return int((_launch_dir(self.path) / "exit_code").read_text())
        except FileNotFoundError:
            return None

    def _what_is_kept(self, run: Run | None) -> str:
        checkpoints = {} if run is None else run.checkpoints()
        if not checkpoints:
            return "it has no checkpoint"
        return f"its newest checkpoint is {checkpoints[max(checkpoints)]}"

    def _last_error(self) -> str:
        lines = [line for line in last_lines(self.log) if line.strip() and not LAUNCHER_LINE.match(line)]
        errors = [line for line in lines if ERROR_LINE.match(line)]
        said = (errors or lines or ["nothing was printed"])[-1].strip()
        return f"{said} (all of it in {self.log})"


def launch(
    recipe: str | None,
    *,
    run_dir: str | Path | None = None,
    ds_config: str = "zero3_cpu",
    num_accelerators: int = 1,
    accelerator: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> LaunchedRun:
    """Start `deepspeed scripts/train.py` on this machine and return at once.

    Args:
        recipe: Shipped recipe or YAML file; None only to go on with the run in `run_dir` (`resume`: "auto").
        run_dir: A new or empty folder; None names one under the checkout's `runs/`.
        ds_config: Name of a file in the checkout's `ds_configs/`, or a path.
        num_accelerators: Ranks on this machine: GPUs, or CPU processes.
        accelerator: `cpu` or `cuda`; None lets DeepSpeed find out.
        settings: Recipe fields by dotted name: `{"steps": 20, "contrastive.temperature": 0.1}`. Relative paths in it
            are taken from the checkout.

    Raises:
        ValueError: A run that was launched into `run_dir` is still going on, or is being launched elsewhere.
        FileNotFoundError: The launcher, the script or the DeepSpeed file is not there.
    """
    given = Path(ds_config)
    config_file = given.resolve() if given.suffix else ROOT / "ds_configs" / f"{ds_config}.json"
    script, launcher = ROOT / "scripts" / "train.py", Path(sys.executable).with_name("deepspeed")
    for file, what in ((launcher, "the launcher"), (script, "the training script"), (config_file, "`ds_config`")):
        if not file.is_file():
            raise FileNotFoundError(f"{what} must be at '{file}', but there is no such file")
    if run_dir is None:
        name = f"{Path(recipe or 'run').stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        beside = fresh_folder(ROOT / "runs", name, BESIDE)
        path = beside.with_name(beside.name.removesuffix(BESIDE))
    else:
        path = Path(run_dir).resolve()
        beside = _launch_dir(path)
        beside.mkdir(parents=True, exist_ok=True)
    command = [
        str(launcher), "--num_accelerators", str(num_accelerators), "--master_port", str(free_port()),
        str(script), f"--ds_config={config_file}", f"--run_dir={path}",
        *([f"--recipe={_recipe(recipe)}"] if recipe is not None else []),
        *(f"--{key}={_flag(value)}" for key, value in (settings or {}).items()),
    ]  # fmt: skip
    with FolderLock.take(beside):  # another kernel may start the same run at this moment
        if was_launched(path) and not (status := attach(path).status()).is_over:
            raise ValueError(f"`run_dir` must not hold a run that is going on, got '{path}', which is {status}")
        _start(beside, command, accelerator)
    return attach(path)


def _start(beside: Path, command: list[str], accelerator: str | None) -> None:
    """Start the launcher, and leave in the folder beside the run how to find it."""
    for old in ("exit_code", "stop_requested"):
        (beside / old).unlink(missing_ok=True)
    with (beside / "output.log").open("wb") as log:
        process = subprocess.Popen(
            ["/bin/sh", "-c", RECORD_EXIT, str(beside / "exit_code"), *command],
            cwd=ROOT, env=run_environment(accelerator), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    # The kernel need not wait for it: `status` collects the exit.
    process.returncode = 0
    facts = {
        "pid": process.pid,
        "started": psutil.Process(process.pid).create_time(),
        "host": socket.gethostname(),
        "command": command,
    }
    (beside / "launch.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def attach(run_dir: str | Path) -> LaunchedRun:
    """Find a run that was launched from a notebook, after a kernel restart for instance.

    Raises:
        ValueError: None was launched into this folder.
    """
    path = Path(run_dir).resolve()
    if not was_launched(path):
        raise ValueError(f"`run_dir` must be a run that `launch` started, got '{path}', which has no folder beside it")
    facts = json.loads((_launch_dir(path) / "launch.json").read_text(encoding="utf-8"))
    return LaunchedRun(path, facts["pid"], facts["started"], facts["host"])


@functools.lru_cache(maxsize=16)
def _opened(path: Path, changed: int) -> Run:
    """The run folder, whose YAML need not be parsed twice a second; `changed` is when that was written."""
    return open_run(path)


def was_launched(run_dir: str | Path) -> bool:
    """Whether `attach` finds a run here."""
    return (_launch_dir(Path(run_dir).resolve()) / "launch.json").is_file()


def _launch_dir(path: Path) -> Path:
    return path.with_name(f"{path.name}{BESIDE}")


def run_environment(accelerator: str | None) -> dict[str, str]:
    """For a script that a notebook starts: the kernel's environment, the package that the kernel imported in front."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    # Plain lines in the log; a kernel may say that it draws colours and bars.
    environment["TERM"] = "dumb"
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE"):
        environment.pop(name, None)
    # A notebook and its browser want the cores too, and a thread that waits wide awake for one that they hold up waits
    # long: beside them some steps of `demo` took 14 s instead of 1 s. That threads sleep costs 0.2 to 0.4 s a step.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if accelerator is not None:
        environment["DS_ACCELERATOR"] = accelerator
    if accelerator == "cpu":
        # The launcher would look for the user's GPU slots among the CPU's.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


def _recipe(recipe: str) -> str:
    """A YAML file by its whole path, since the run starts elsewhere; a name as it is."""
    file = Path(recipe)
    return str(file.resolve()) if file.suffix and file.is_file() else recipe


def _flag(value: Any) -> str:
    """A setting as the command line takes it: text as it is, everything else as YAML, which JSON is."""
    return value if isinstance(value, str) else json.dumps(value)
