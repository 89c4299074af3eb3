"""What a run shows in the terminal of rank 0: a line a step, a progress bar, a few rollouts, warnings, evaluations.

In a terminal the bar stays at the bottom; elsewhere (a log file, a pipe) there are plain lines only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clipo_ds.evaluate import EvaluationResult, evaluation_table
from clipo_ds.schema import LoggingConfig

STEPS_BETWEEN_WARNINGS = 20
MAX_SHOWN_CHARACTERS = 600


def wide_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; in a log file or a pipe, wide enough for the tables."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=140)


class Display:
    """The terminal of one run; `enabled` is False on all ranks but the first, where every call does nothing."""

    def __init__(
        self, logging: LoggingConfig, num_steps: int, *, enabled: bool, console: Console | None = None
    ) -> None:
        self._logging = logging
        self._num_steps = num_steps
        self._enabled = enabled
        self._console = console or wide_console(stderr=True)
        self._warned: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self._console, disable=not (enabled and self._console.is_terminal),
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=num_steps)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Show one line."""
        if self._enabled:
            self._console.print(escape(text), highlight=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float], rollouts: Mapping[str, Sequence[Any]]) -> None:
        """Show a step's line, and some of its rollouts every `logging.show_every` steps."""
        if not self._enabled:
            return
        self.say(step_line(step, self._num_steps, metrics))
        self._progress.update(self._task, completed=step)
        every = self._logging.show_every
        if every is not None and step % every == 0:
            for row in choose_rollouts(rollouts, self._logging.num_shown):
                self._console.print(rollout_panel(rollouts, row))

    def warn(self, warnings: Mapping[str, str], step: int) -> None:
        """Show warnings, each kind again only after a while."""
        for kind, text in warnings.items():
            if kind not in self._warned or step - self._warned[kind] >= STEPS_BETWEEN_WARNINGS:
                self._warned[kind] = step
                self.say(f"warning: step {step}: {text}")

    def evaluation(self, step: int, results: Mapping[str, EvaluationResult]) -> None:
        """Show the evaluation after a step (0: before the first)."""
        if self._enabled and results:
            self.say(f"evaluation after step {step}")
            self._console.print(evaluation_table(list(results.values())))


def step_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """One line: step, reward, accuracy, process consistency among right answers, contrastive loss, seconds."""
    parts = [
        f"step {step:>{len(str(num_steps))}}/{num_steps}",
        f"reward {_number(metrics['reward/total'])}",
        f"accuracy {_share(metrics['accuracy/mean'])}",
        f"process|correct {_share(metrics['process/consistent_among_correct'])}",
    ]
    if "contrastive/loss" in metrics:
        parts.append(f"contrastive {_number(metrics['contrastive/loss'])}")
    parts.append(f"{metrics['time/step']:.1f} s")
    return "  ".join(parts)


def choose_rollouts(rollouts: Mapping[str, Sequence[Any]], count: int) -> list[int]:
    """Rows worth reading: first a right answer with a false step, then a right one, a wrong one, then the next ones."""
    correct, consistent = rollouts["correct"], rollouts["process_consistent"]
    rows = range(len(correct))
    wanted = (
        lambda row: correct[row] and consistent[row] is False,
        lambda row: correct[row] and consistent[row] is not False,
        lambda row: not correct[row],
    )
    first = [next((row for row in rows if wants(row)), None) for wants in wanted]
    chosen = [row for row in first if row is not None]
    return (chosen + [row for row in rows if row not in chosen])[:count]


def rollout_panel(rollouts: Mapping[str, Sequence[Any]], row: int) -> Panel:
    """One rollout with its verdicts."""
    steps = {True: "no false step", False: "a false step", None: "steps not checkable"}
    answer = "right answer" if rollouts["correct"][row] else f"wrong answer (truth {rollouts['ground_truth'][row]})"
    title = f"{answer}, {steps[rollouts['process_consistent'][row]]}"
    contrastive = rollouts["contrastive_reward"][row]
    parts = [f"reward {rollouts['reward'][row]:.3f}", f"advantage {rollouts['advantage'][row]:.2f}"]
    if contrastive is not None:
        parts.insert(1, f"contrastive {contrastive:.3f}")
    text = _short(str(rollouts["prompt"][row])) + "\n" + _short(str(rollouts["response"][row]))
    return Panel(
        escape(text), title=escape(title), subtitle=escape(", ".join(parts)), title_align="left", subtitle_align="right"
    )


def before_and_after_table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """First against last evaluation: accuracy, and process consistency among right answers, a row a test set."""
    process = "process_consistent_among_correct"
    table = Table(title="before and after training")
    for name in ("data", "steps", "accuracy", "process-correct among correct", "problems"):
        table.add_column(name)
    for data in dict.fromkeys(row["data"] for row in evaluations):
        rows = [row for row in evaluations if row["data"] == data]
        first, last = rows[0], rows[-1]
        table.add_row(
            data,
            f"{first['step']} -> {last['step']}",
            f"{_share(first['accuracy'])} -> {_share(last['accuracy'])}",
            f"{_share(first[process])} -> {_share(last[process])}",
            str(last["num_problems"]),
        )
    return table


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + " […]"


def _share(value: float | None) -> str:
    return "   -  " if value is None or math.isnan(value) else f"{value:6.1%}"


def _number(value: float) -> str:
    return "  -  " if math.isnan(value) else f"{value:5.3f}"
