"""Arms against each other in a notebook: curves, paired differences, the evaluation table, problems won and lost.

Runs are told apart by what their config.yaml says, not by their names: objective, contrastive term, and whatever else
differs; runs that differ in their seed only are one arm.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from clipo_ds.records import Run
from clipo_ds.types import InputError
from clipo_ds.viz.compare_figures import curves_figure, differences_figure, problems_figure
from clipo_ds.viz.comparison import COMPARED, Arm, evaluation_summary, open_arms
from clipo_ds.viz.interact import Plot, said
from clipo_ds.viz.problems import Problems, compare_problems, responses_to
from clipo_ds.viz.reading import html_table, responses_table, short
from clipo_ds.viz.still import View
from clipo_ds.viz.theme import boxed

NUM_PROBLEMS = 5  # of the biggest wins, and as many losses
NUM_TEXTS = 3  # responses of each arm to a problem


class CompareView(View):
    """Several runs side by side.

    Args:
        runs: Run folders, one folder that holds them, or None (CLIPO_DS_RUNS, else ../runs).
        baseline: The arm that others are compared with; None takes the first without a contrastive term.
    """

    def __init__(
        self, runs: Sequence[Run | str | Path] | str | Path | None = None, *, baseline: str | None = None
    ) -> None:
        try:
            children = self._build(runs, baseline)
        except InputError as error:
            children = [said(error)]
        super().__init__(children)
        self.add_class("clipo-compare")

    def _build(
        self, runs: Sequence[Run | str | Path] | str | Path | None, baseline: str | None
    ) -> list[widgets.Widget]:
        self.arms = {arm.name: arm for arm in open_arms(runs)}
        names = list(self.arms)
        if baseline is not None and baseline not in names:
            raise InputError(f"`baseline` must be of {', '.join(names)}, got {baseline!r}")
        layout = widgets.Layout(width="420px")
        self._baseline = widgets.Dropdown(
            options=names, value=baseline or names[0], description="baseline", layout=layout
        )  # fmt: skip
        self._arm = widgets.Dropdown(options=names, value=names[-1], description="arm", layout=layout)
        self.curves = Plot(curves_figure(list(self.arms.values())))
        self.table = widgets.HTML()
        self.problems = widgets.HTML()
        summary = self._summary()
        self.differences = Plot(differences_figure(summary, self._baseline.value))
        won = self._wins()
        self.histogram = Plot(problems_figure(won, self._arm.value, self._baseline.value))
        self._write(summary, won)
        for control in (self._baseline, self._arm):
            control.observe(self._on_change, "value")
        return [
            self.curves, widgets.HBox([self._baseline, self._arm]), self.differences, self.table, self.histogram,
            self.problems,
        ]  # fmt: skip

    def _summary(self) -> pd.DataFrame:
        return evaluation_summary(list(self.arms.values()), self._baseline.value)

    def _wins(self) -> Problems:
        return compare_problems(self.arms[self._arm.value], self.arms[self._baseline.value])

    def _on_change(self, _: dict) -> None:
        summary, won = self._summary(), self._wins()
        self.differences.show_figure(differences_figure(summary, self._baseline.value))
        self.histogram.show_figure(problems_figure(won, self._arm.value, self._baseline.value))
        self._write(summary, won)

    def _write(self, summary: pd.DataFrame, won: Problems) -> None:
        self.table.value = boxed(evaluation_table(summary))
        self.problems.value = boxed(
            problems_html(self.arms[self._arm.value], self.arms[self._baseline.value], won.frame)
        )


def evaluation_table(summary: pd.DataFrame) -> str:
    """The last evaluations as HTML: means over seeds and paired differences, in percent and points, with intervals."""
    if summary.empty:
        return '<div class="note">None of these runs has been evaluated.</div>'
    lines = []
    for (data, arm), rows in summary.groupby(["data", "arm"], sort=False):
        own = rows.set_index("figure")
        cells = [
            f'<td style="text-align:left">{html.escape(data)}</td><td style="text-align:left">{html.escape(arm)}</td>'
        ]
        cells.append(f"<td>{own['seeds'].max()}</td>")
        for figure in COMPARED:
            entry = own.loc[figure] if figure in own.index else None
            cells.append(f"<td>{_percent(entry, 'mean', 'half')}</td>")
            cells.append(f"<td>{_percent(entry, 'difference', 'difference_half', '+')}</td>")
        lines.append("".join(cells))
    names = ["test set", "arm", "seeds"]
    for word in COMPARED.values():
        names += [f"{word}, %", "difference, points"]
    title = "<h4>Last evaluation: mean over seeds ± 95% t interval; differences paired by seed</h4>"
    return title + html_table(names, lines, text=("test set", "arm"))


def problems_html(arm: Arm, baseline: Arm, problems: pd.DataFrame) -> str:
    """The biggest wins and losses of an arm, each with responses of both, to be opened one by one."""
    wins = problems[problems["difference"] > 0].head(NUM_PROBLEMS)
    losses = problems[problems["difference"] < 0].iloc[::-1].head(NUM_PROBLEMS)
    parts = []
    for word, rows in (("wins", wins), ("losses", losses)):
        parts.append(f"<h4>Biggest {word} of {html.escape(arm.name)}</h4>" + ("" if len(rows) else "none"))
        parts += [_problem_html(arm, baseline, entry) for _, entry in rows.iterrows()]
    return "".join(parts)


def _problem_html(arm: Arm, baseline: Arm, problem: pd.Series) -> str:
    seed = int(problem["seed"])
    tables = [
        f"<div><b>{html.escape(one.name)}</b>: {problem[share]:.0%} right</div>"
        f"{responses_table(responses_to(one.runs[seed], problem).head(NUM_TEXTS))}"
        for one, share in ((arm, "share"), (baseline, "baseline_share"))
    ]
    where = f"seed {seed}, step {problem['step']}" + (f", {problem['data']}" if problem["data"] else "")
    head = f"{100 * problem['difference']:+.0f} points · {where} · {short(problem['prompt'], 90, end=True)}"
    return f"<details><summary>{html.escape(head)}</summary>{''.join(tables)}</details>"


def _percent(entry: pd.Series | None, value: str, half: str, sign: str = "") -> str:
    if entry is None or pd.isna(entry[value]):
        return "-"
    interval = "" if pd.isna(entry[half]) else f" ± {100 * entry[half]:.1f}"
    return f"{100 * entry[value]:{sign}.1f}{interval}"
