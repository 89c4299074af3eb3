"""A run in progress, in the notebook: badge, progress bar, stop button, curves and sampled rollouts that keep up.

`LiveRun` follows any run folder; one that `launch` started can be stopped from it too. `BeforeAfter` waits for the end
and compares the model before and after. Both work in asyncio tasks of the kernel, so every other cell runs meanwhile.
"""

from __future__ import annotations

import asyncio
import html
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from clipo_ds.records import Run, open_run
from clipo_ds.viz.frames import is_late
from clipo_ds.viz.interact import STATE_COLOURS, Plot, badge, duration, in_background, silence
from clipo_ds.viz.launch import ROOT, LaunchedRun, RunStatus, attach, run_environment, was_launched
from clipo_ds.viz.progress import before_after, live_figure, newest_rollouts
from clipo_ds.viz.still import View
from clipo_ds.viz.tail import JsonLines, last_row
from clipo_ds.viz.theme import boxed


class LiveRun(View):
    """The view of one run; shown by being a cell's last value.

    Args:
        run: What `launch` or `attach` gave, or the folder of any run.
        every_s: Seconds between two looks at the folder.
        num_rollouts: Rollouts of the newest step that are shown.

    Raises:
        InputError: `run` is a folder without a run in it.
    """

    _task: asyncio.Task[None] | None = None

    def __init__(self, run: LaunchedRun | str | Path, *, every_s: float = 0.5, num_rollouts: int = 6) -> None:
        self._launched = _find_launched(run)
        self._path = self._launched.path if self._launched is not None else open_run(str(run)).path
        self._num_rollouts = num_rollouts
        self._metrics = JsonLines(self._path / "metrics.jsonl")
        self._evaluations = JsonLines(self._path / "evaluations.jsonl")
        self._shown_step = 0
        self._answer = ""
        self._badge = widgets.HTML()
        self._progress = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="320px"))
        self._stop = widgets.Button(
            description="Stop", icon="stop", tooltip="end after the step in progress, with a checkpoint",
            layout=widgets.Layout(width="90px", display="none" if self._launched is None else None),
        )  # fmt: skip
        self._stop.add_class("clipo-stop")
        self._stop.on_click(self._on_stop)
        self._message = widgets.HTML()
        self._rollouts = widgets.HTML()
        self._read()
        self.figure = Plot(live_figure(self._metrics.rows, self._evaluations.rows))
        self.refresh()
        bar = widgets.HBox([self._badge, self._progress, self._stop], layout=widgets.Layout(align_items="center"))
        super().__init__([bar, self._message, self.figure, self._rollouts])
        self.add_class("clipo-live")
        self._task = in_background(self._follow(every_s), self._message)

    def refresh(self) -> RunStatus:
        """Bring everything up to date; the view does so by itself where an event loop runs."""
        status = self._status()
        if self._read():
            self.figure.show_figure(live_figure(self._metrics.rows, self._evaluations.rows))
        self._show_rollouts()
        self._show_status(status)
        return status

    def close(self) -> None:
        """Stop following; the run itself goes on."""
        if self._task is not None:
            self._task.cancel()
        super().close()

    def _status(self) -> RunStatus:
        if self._launched is not None:
            return self._launched.status()
        num_steps = int(open_run(self._path).config["steps"])
        last = last_row(self._metrics.path)
        step = 0 if last is None else int(last["step"])
        return RunStatus("running" if step < num_steps else "finished", step, num_steps, "")

    async def _follow(self, every_s: float) -> None:
        while not self.refresh().is_over:
            await asyncio.sleep(every_s)

    def _on_stop(self, _: widgets.Button) -> None:
        assert self._launched is not None, "the button is hidden"
        self._answer = self._launched.stop()
        self.refresh()

    def _read(self) -> bool:
        return any([self._metrics.read(), self._evaluations.read()])

    def _show_rollouts(self) -> None:
        if not (self._path / "config.yaml").is_file():
            return
        run = open_run(self._path)
        steps = run.rollout_steps()
        if steps and steps[-1] != self._shown_step:
            self._shown_step = steps[-1]
            self._rollouts.value = newest_rollouts(run, steps[-1], self._num_rollouts)

    def _show_status(self, status: RunStatus) -> None:
        times = [row["time/step"] for row in self._metrics.rows[-20:] if row.get("time/step") is not None]
        seconds = statistics.median(times) if times else 0.0
        written = [lines.changed for lines in (self._metrics, self._evaluations) if lines.changed is not None]
        silent = time.time() - max(written, default=time.time())
        is_stale = status.state == "running" and is_late(silent, seconds)
        state = "stale" if is_stale else status.state
        parts = [f"step {status.step} of {status.num_steps}" if status.num_steps else "no run folder yet"]
        if times and status.num_steps and not status.is_over:
            parts.append(f"{seconds:.1f} s a step, about {duration((status.num_steps - status.step) * seconds)} left")
        if is_stale:
            parts.append(silence(silent))
        if status.state == "starting" and self._launched is not None:
            parts.append(self._launched.output(1))
        parts.append(status.message or self._answer)
        said = html.escape(" · ".join(part for part in parts if part))
        self._badge.value = boxed(badge(state))
        self._progress.max = status.num_steps or 1
        self._progress.value = status.step
        self._progress.style.bar_color = STATE_COLOURS[state]
        self._stop.disabled = status.is_over or status.state == "stopping"
        self._message.value = f"{said}<br><code>{html.escape(str(self._path))}</code>"


class BeforeAfter(View):
    """Waits for a run to end and shows its evaluation before training against that of its newest checkpoint.

    A run that went to its last step has evaluated itself; of one that was stopped the newest checkpoint is evaluated
    now, by `scripts/evaluate.py` in a process of its own, as the run evaluates.

    Args:
        run: What `launch` or `attach` gave, or the folder of any run.
        every_s: Seconds between two looks whether the run is over.

    Raises:
        InputError: `run` is a folder without a run in it.
    """

    _task: asyncio.Task[None] | None = None

    def __init__(self, run: LaunchedRun | str | Path, *, every_s: float = 1.0) -> None:
        self._launched = _find_launched(run)
        self._path = self._launched.path if self._launched is not None else open_run(str(run)).path
        self._view = widgets.HTML("waiting for the run to end")
        super().__init__([self._view])
        self.add_class("clipo-before-after")
        self._task = in_background(self._wait_and_show(every_s), self._view)

    def close(self) -> None:
        """Stop waiting."""
        if self._task is not None:
            self._task.cancel()
        super().close()

    async def _wait_and_show(self, every_s: float) -> None:
        while self._launched is not None and not self._launched.status().is_over:
            await asyncio.sleep(every_s)
        if not (self._path / "config.yaml").is_file():
            self._view.value = "the run ended before it began: there is nothing to evaluate"
            return
        run = open_run(self._path)
        recorded = run.evaluations()
        before = [row for row in recorded if row["step"] == 0]
        checkpoints = run.checkpoints()
        if not before or not checkpoints:
            missing = "evaluation before training" if not before else "checkpoint"
            self._view.value = f"the run has no {missing}: there is nothing to compare"
            return
        newest = max(checkpoints)
        after = [row for row in recorded if row["step"] == newest]
        if not after:
            self._view.value = f"evaluating the checkpoint of step {newest}"
            after = await _evaluate(run, checkpoints[newest])
        self._view.value = before_after(before, after, newest)


async def _evaluate(run: Run, checkpoint: Path) -> list[Mapping[str, Any]]:
    """Score a checkpoint on the run's own test sets, sampling as the run's evaluations do.

    Raises:
        RuntimeError: The script failed; the message is its last line.
    """
    evaluation, data = run.config["evaluation"], run.config["data"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        flags = {
            "model": checkpoint,
            "samples": evaluation["samples"],
            "temperature": evaluation["temperature"],
            "top_p": evaluation["top_p"],
            "max_new_tokens": evaluation["max_new_tokens"] or run.config["rollout"]["max_new_tokens"],
            "max_prompt_tokens": data["max_prompt_tokens"],
            "seed": run.config["seed"],
            "output": output,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "scripts" / "evaluate.py"),
            *(f"--{name}={value}" for name, value in flags.items()),
            cwd=ROOT, env=run_environment(None), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(said.decode(errors="replace").strip().rsplit("\n", 1)[-1])
        return json.loads(output.read_text(encoding="utf-8"))


def _find_launched(run: LaunchedRun | str | Path) -> LaunchedRun | None:
    if isinstance(run, LaunchedRun):
        return run
    return attach(run) if was_launched(run) else None
