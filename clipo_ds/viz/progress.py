"""What a run in progress looks like: badge, curves, the rollouts to read, and before against after.

Rows of the run folder in, a figure or HTML out; `clipo_ds.viz.live` keeps them up to date.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clipo_ds.records import Run
from clipo_ds.viz.frames import open_rollouts
from clipo_ds.viz.reading import html_table, rollouts_table
from clipo_ds.viz.theme import BLUE, SERIES, TEMPLATE, boxed

Rows = Sequence[Mapping[str, Any]]

# A panel: title, the metric whose course it shows, the evaluations' figure for the same thing, whether it is a share.
PANELS = (
    ("accuracy", "accuracy/mean", "accuracy", True),
    (
        "right answers, no false step",
        "process/consistent_among_correct",
        "process_consistent_among_correct",
        True,
    ),
    ("contrastive loss, nats", "contrastive/loss", None, False),
)


def live_figure(metrics: Rows, evaluations: Rows) -> go.Figure:
    """The curves of `PANELS` as they stand."""
    figure = make_subplots(rows=1, cols=len(PANELS), subplot_titles=[title for title, *_ in PANELS])
    figure.update_annotations(font_size=14)
    figure.update_layout(
        template=TEMPLATE, height=340, margin={"l": 56, "r": 16, "t": 40, "b": 84}, legend={"y": -0.26}
    )
    figure.update_xaxes(title={"text": "step", "standoff": 4})
    for column, (_, _, _, is_share) in enumerate(PANELS, start=1):
        if is_share:
            figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], row=1, col=column)
    figure.add_traces(_traces(metrics, evaluations))
    return figure


def newest_rollouts(run: Run, step: int, count: int) -> str:
    """Rollouts of a step worth reading, as HTML: right answers with a false step first."""
    table = open_rollouts(run, [step])
    rows = worth_reading(table.frame)[:count]
    title = f'<h4>Rollouts of step {step} <span class="quiet">right answers with a false step first</span></h4>'
    return boxed(title + rollouts_table(table, rows))


def worth_reading(frame: pd.DataFrame) -> list[int]:
    """Row labels by turns: a right answer with a false step, a right one without, a wrong one, each of another group.

    >>> frame = pd.DataFrame({
    ...     "group": [0, 0, 1, 1], "correct": [True, False, True, True],
    ...     "process_consistent": pd.array([True, False, False, None], "boolean"),
    ... })
    >>> worth_reading(frame)
    [2, 0, 1, 3]
    """
    correct, flawed = (
        frame["correct"].to_numpy(bool),
        frame["process_consistent"].eq(False).fillna(False).to_numpy(bool),
    )
    kind = np.select([correct & flawed, correct], [0, 1], 2)
    order = frame.assign(kind=kind, nth=frame.groupby(["group", kind]).cumcount()).sort_values("nth", kind="stable")
    turns = order.assign(turn=order.groupby("kind").cumcount()).sort_values(["turn", "kind"], kind="stable")
    return [int(row) for row in turns.index]


def before_after(before: Rows, after: Rows, after_step: int) -> str:
    """The evaluation before training against the one after `after_step`, with 95% intervals, as HTML."""
    names = ["test set", "accuracy before", "after", "right answers, no false step, before", "after", "problems"]
    lines = []
    for first in before:
        for last in after:
            if first["data"] == last["data"]:
                cells = [
                    f'<td class="text" style="white-space: nowrap">{html.escape(first["data"])}</td>',
                    *(
                        f'<td style="white-space: nowrap">{_interval(row, key)}</td>'
                        for key in ("accuracy", "process_consistent_among_correct")
                        for row in (first, last)
                    ),
                    f"<td>{last['num_problems']}</td>",
                ]
                lines.append("".join(cells))
    title = f'<h4>Before training and after step {after_step} <span class="quiet">with 95% intervals</span></h4>'
    return boxed(title + html_table(names, lines, text=("test set",)))


def _traces(metrics: Rows, evaluations: Rows) -> list[go.Scatter]:
    """One curve a panel, then diamonds, a trace a panel and test set, in the order in which the test sets came."""
    curves = [
        go.Scatter(
            x=_steps(metrics), y=_numbers(metrics, metric), name="rollouts trained on",
            legendgroup="rollouts", showlegend=column == 1, mode="lines", line={"color": BLUE, "width": 2},
            hovertemplate=f"step %{{x}}<br>{title} %{{y:{'.1%' if is_share else '.3f'}}}<extra></extra>",
            **_axes(column),
        )
        for column, (title, metric, _, is_share) in enumerate(PANELS, start=1)
    ]  # fmt: skip
    for place, data in enumerate(dict.fromkeys(row["data"] for row in evaluations)):
        rows = [row for row in evaluations if row["data"] == data]
        colour = SERIES[1 + place % (len(SERIES) - 1)]
        curves += [
            go.Scatter(
                x=_steps(rows), y=_numbers(rows, evaluated), name=f"test set {data}",
                legendgroup=data, showlegend=column == 1, mode="lines+markers", line={"dash": "dot", "color": colour},
                marker={"symbol": "diamond", "size": 9, "color": colour}, cliponaxis=False,
                hovertemplate=f"after step %{{x}}<br>{title} %{{y:.1%}}<extra>{data}</extra>",
                **_axes(column),
            )
            for column, (title, _, evaluated, _) in enumerate(PANELS, start=1)
            if evaluated is not None
        ]  # fmt: skip
    return curves


def _axes(column: int) -> dict[str, str]:
    number = "" if column == 1 else str(column)
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def _steps(rows: Rows) -> np.ndarray:
    return np.array([row["step"] for row in rows], np.int32)


def _numbers(rows: Rows, key: str) -> np.ndarray:
    """A column as float32, NaN where there is no number: plotly sends it as bytes and leaves a gap."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], np.float32)


def _interval(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "none to judge"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return f"{row[key]:.1%}" + (f" [{low:.1%}, {high:.1%}]" if low is not None and high is not None else "")
