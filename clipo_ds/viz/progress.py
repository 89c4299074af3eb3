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
from great_tables import GT, loc, style
from plotly.subplots import make_subplots

from clipo_ds.records import Run

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
    ("contrastive loss", "contrastive/loss", None, False),
)
COLOURS = {
    "starting": "#5F6B7A", "running": "#0072B2", "stopping": "#B25E00", "finished": "#00745A", "stopped": "#B25E00",
    "failed": "#B3261E", "stale": "#B25E00",
}  # fmt: skip
EVALUATION_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#56B4E9")
PROCESS_WORDS = {True: "no false step", False: "a false step", None: "not checkable"}
MAX_CELL_CHARACTERS = 400


def badge(state: str) -> str:
    """The state as a coloured label."""
    return (
        f'<span class="clipo-badge" style="background:{COLOURS[state]};color:white;border-radius:4px;padding:3px 10px;'
        f'font-weight:600">{html.escape(state)}</span>'
    )


def live_figure(metrics: Rows, evaluations: Rows) -> go.FigureWidget:
    """The curves of `PANELS` as they stand; `draw` brings them up to date."""
    figure = make_subplots(rows=1, cols=len(PANELS), subplot_titles=[title for title, *_ in PANELS])
    figure.update_layout(
        height=330, margin={"l": 50, "r": 20, "t": 60, "b": 45}, template="plotly_white",
        legend={"orientation": "h", "y": 1.22, "x": 0},
    )  # fmt: skip
    figure.update_xaxes(title_text="step", rangemode="tozero")
    for column, (_, _, _, is_share) in enumerate(PANELS, start=1):
        if is_share:
            figure.update_yaxes(tickformat=".0%", range=[0, 1.03], row=1, col=column)
    figure.add_traces(_traces(metrics, evaluations))
    return go.FigureWidget(figure)


def draw(figure: go.FigureWidget, metrics: Rows, evaluations: Rows) -> None:
    """Bring the figure of `live_figure` up to date with all rows there are."""
    traces = _traces(metrics, evaluations)
    with figure.batch_update():
        for shown, new in zip(figure.data, traces, strict=False):
            shown.x, shown.y = new.x, new.y
    if len(traces) > len(figure.data):
        figure.add_traces(traces[len(figure.data) :])


def rollouts_table(run: Run, step: int, count: int) -> str:
    """Rollouts of a step worth reading, as an HTML table: right answers with a false step first."""
    columns = [
        "prompt", "response", "ground_truth", "correct", "process_consistent", "reward", "contrastive_reward",
        "advantage",
    ]  # fmt: skip
    frame = run.rollouts(step, columns).to_pandas()
    chosen = frame.loc[_worth_reading(frame)[:count]]
    words = pd.DataFrame(
        {
            "answer": ["right" if correct else "wrong" for correct in chosen["correct"]],
            "process": [PROCESS_WORDS[None if pd.isna(ok) else bool(ok)] for ok in chosen["process_consistent"]],
            "prompt": [_short(text) for text in chosen["prompt"]],
            "response": [_short(text) for text in chosen["response"]],
            "truth": [_short(text) for text in chosen["ground_truth"]],
            "reward": chosen["reward"],
            "contrastive": chosen["contrastive_reward"],
            "advantage": chosen["advantage"],
        }
    )
    table = (
        _table(words, f"Rollouts of step {step}", "right answers with a false step first")
        .fmt_number(["reward", "contrastive", "advantage"], decimals=2)
        .sub_missing(missing_text="")
        .tab_style(style.text(font="monospace"), loc.body(["prompt", "response", "truth"]))
    )
    for column, bad in (("answer", "wrong"), ("process", PROCESS_WORDS[False])):
        rows = [row for row, word in enumerate(words[column]) if word == bad]
        table = table.tab_style(style.text(color=COLOURS["failed"], weight="bold"), loc.body(column, rows))
    return table.as_raw_html()


def before_after_table(before: Rows, after: Rows, after_step: int) -> str:
    """The evaluation before training against the one after `after_step`, with 95% intervals, as an HTML table."""
    rows = []
    for first in before:
        last = next((row for row in after if row["data"] == first["data"]), None)
        if last is None:
            continue
        rows.append(
            {
                "test set": first["data"],
                "accuracy before": _interval(first, "accuracy"),
                "accuracy after": _interval(last, "accuracy"),
                "no false step among right answers, before": _interval(first, "process_consistent_among_correct"),
                "after": _interval(last, "process_consistent_among_correct"),
                "problems": last["num_problems"],
            }
        )
    title = f"Before training and after step {after_step}"
    return _table(pd.DataFrame(rows), title, "share, with its 95% interval").as_raw_html()


def _traces(metrics: Rows, evaluations: Rows) -> list[go.Scatter]:
    """One curve a panel, then diamonds, a trace a panel and test set, in the order in which the test sets came."""
    traces = []
    for column, (title, metric, _, is_share) in enumerate(PANELS, start=1):
        traces.append(
            go.Scatter(
                x=np.array([row["step"] for row in metrics], np.int32),
                y=_numbers(metrics, metric),
                name="rollouts trained on", legendgroup="rollouts", showlegend=column == 1,
                mode="lines", line={"color": COLOURS["running"], "width": 2},
                hovertemplate=f"step %{{x}}<br>{title} %{{y:{'.1%' if is_share else '.3f'}}}<extra></extra>",
                xaxis=_axis("x", column), yaxis=_axis("y", column),
            )
        )  # fmt: skip
    for place, data in enumerate(dict.fromkeys(row["data"] for row in evaluations)):
        rows = [row for row in evaluations if row["data"] == data]
        for column, (title, _, evaluated, _) in enumerate(PANELS, start=1):
            if evaluated is not None:
                traces.append(
                    go.Scatter(
                        x=np.array([row["step"] for row in rows], np.int32),
                        y=_numbers(rows, evaluated),
                        name=f"test set {data}", legendgroup=data, showlegend=column == 1,
                        mode="lines+markers", line={"dash": "dot", "width": 1},
                        marker={"symbol": "diamond", "size": 9},
                        marker_color=EVALUATION_COLOURS[place % len(EVALUATION_COLOURS)],
                        line_color=EVALUATION_COLOURS[place % len(EVALUATION_COLOURS)],
                        hovertemplate=f"after step %{{x}}<br>{title} %{{y:.1%}}<extra>{data}</extra>",
                        xaxis=_axis("x", column), yaxis=_axis("y", column),
                    )
                )  # fmt: skip
    return traces


def _axis(letter: str, column: int) -> str:
    return letter if column == 1 else f"{letter}{column}"


def _numbers(rows: Rows, key: str) -> np.ndarray:
    """A column as float32, NaN where there is no number: plotly sends it as bytes and leaves a gap."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], np.float32)


def _worth_reading(frame: pd.DataFrame) -> list[Any]:
    """Row labels: a right answer with a false step, a right one without, a wrong one, and again until none is left."""
    correct, wrong_step = frame["correct"], frame["process_consistent"].eq(False)
    kinds = [frame.index[correct & wrong_step], frame.index[correct & ~wrong_step], frame.index[~correct]]
    turns = [(turn, kind, row) for kind, rows in enumerate(kinds) for turn, row in enumerate(rows)]
    return [row for _, _, row in sorted(turns)]


def _table(frame: pd.DataFrame, title: str, subtitle: str) -> GT:
    return (
        GT(frame)
        .tab_header(title, subtitle)
        .tab_options(
            table_font_size="13px", heading_title_font_size="15px", data_row_padding="3px", heading_align="left"
        )
        .opt_align_table_header("left")
    )


def _interval(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "-"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return f"{row[key]:.1%}" + (f"  [{low:.1%}, {high:.1%}]" if low is not None and high is not None else "")


def _short(text: str) -> str:
    return text if len(text) <= MAX_CELL_CHARACTERS else text[:MAX_CELL_CHARACTERS] + " […]"
