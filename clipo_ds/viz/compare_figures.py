"""Arms against each other as pictures: curves with bands over seeds, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clipo_ds.viz.comparison import COMPARED, Arm, curves
from clipo_ds.viz.problems import Problems
from clipo_ds.viz.theme import BLUE, GREY, ORANGE, SERIES, empty_figure, titled

NUM_IN_TITLE = 3
DASHES = ("solid", "dash", "dot")  # of arms beyond the number of colours
CURVES = {
    "accuracy/mean": "right answers, share of rollouts",
    "process/consistent_among_correct": "no false step, share of right answers",
    "reward/mean": "reward without the contrastive part",
    "response/length": "response length, tokens",
}


def curves_figure(arms: Sequence[Arm], metrics: Sequence[str] = tuple(CURVES)) -> go.Figure:
    """Training curves of every arm: mean over seeds, and the 95% interval of that mean as a band."""
    columns = min(2, len(metrics))
    figure = make_subplots(
        rows=-(-len(metrics) // columns), cols=columns, vertical_spacing=0.16, horizontal_spacing=0.1,
        subplot_titles=[CURVES.get(metric, metric) for metric in metrics],
    )  # fmt: skip
    for number, metric in enumerate(metrics):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        table, is_share = curves(arms, metric), metric.startswith(("accuracy", "process"))
        for order, arm in enumerate(arms):
            rows = table[table["arm"] == arm.name]
            steps, colour = rows["step"].to_numpy(np.int32), SERIES[order % len(SERIES)]
            dash = DASHES[order // len(SERIES) % len(DASHES)]
            if rows["half"].notna().any():
                for sign, fill in ((1, None), (-1, "tonexty")):
                    edge = rows["mean"] + sign * rows["half"]
                    figure.add_scatter(
                        x=steps, y=_narrow(edge.clip(0, 1) if is_share else edge), mode="lines", line={"width": 0},
                        fill=fill, fillcolor=_pale(colour), hoverinfo="skip", showlegend=False,
                        legendgroup=arm.name, **place,
                    )  # fmt: skip
            figure.add_scatter(
                x=steps, y=_narrow(rows["mean"]), mode="lines", line={"color": colour, "width": 2.5, "dash": dash},
                name=f"{arm.name} ({_seeds(len(arm.runs))})", legendgroup=arm.name, showlegend=number == 0, **place,
                hovertemplate="step %{x}<br>%{y:.3f}<extra>" + arm.name + "</extra>",
            )  # fmt: skip
        if is_share:
            figure.update_yaxes(tickformat=".0%", **place)
    figure.update_xaxes(title_text="step")
    figure.update_annotations(font_size=13)
    several = any(len(arm.runs) > 1 for arm in arms)
    subtitle = "mean over seeds, 95% t interval as band" if several else "one seed an arm: no intervals"
    subtitle = f"{len(arms)} arms, {sum(len(arm.runs) for arm in arms)} runs; {subtitle}"
    height = 340 * (-(-len(metrics) // columns))
    return titled(figure, _curves_title(arms), subtitle, height=height, margin={"t": 112, "b": 96})


def differences_figure(summary: pd.DataFrame, baseline: str) -> go.Figure:
    """Differences against the baseline arm, paired by seed, with their 95% intervals, in percentage points."""
    rows = summary[(summary["arm"] != baseline) & summary["difference"].notna()]
    if rows.empty:
        return empty_figure(f"no evaluation of another arm has a partner with its seed among those of {baseline}")
    sets, arms = rows["data"].unique(), rows["arm"].unique()[::-1]
    figure = make_subplots(rows=1, cols=len(COMPARED), subplot_titles=list(COMPARED.values()), shared_yaxes=True)
    for column, figure_name in enumerate(COMPARED, start=1):
        for order, data in enumerate(sets):
            own = rows[(rows["figure"] == figure_name) & (rows["data"] == data)].iloc[::-1]
            # Places and not names, so that test sets lie beside each other, and an arm not drawn any more goes.
            place = pd.Index(arms).get_indexer(own["arm"]) + 0.5 * ((len(sets) - 1) / 2 - order) / len(sets)
            figure.add_scatter(
                x=_narrow(100 * own["difference"]), y=_narrow(place), text=own["arm"], mode="markers", name=data,
                legendgroup=data, showlegend=column == 1, marker={"size": 10, "color": SERIES[order % len(SERIES)]},
                error_x={"array": _narrow(100 * own["difference_half"]), "thickness": 1.5, "width": 5},
                hovertemplate="%{text}<br>%{x:+.1f} points<extra>" + data + "</extra>", row=1, col=column,
            )  # fmt: skip
        figure.add_vline(x=0, line={"color": GREY, "dash": "dot"}, row=1, col=column)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title_text=f"difference from {baseline}, percentage points")
    figure.update_yaxes(tickvals=list(range(len(arms))), ticktext=list(arms), range=[-0.5, len(arms) - 0.5])
    clear = rows[rows["difference"].abs() > rows["difference_half"]]
    pairs = int(rows["pairs"].max())
    title = (
        f"{len(clear)} of {len(rows)} differences exceed their 95% interval" if pairs > 1 else "One seed: no intervals"
    )
    subtitle = f"last evaluation, paired by seed ({_seeds(pairs)})"
    height = 220 + 40 * len(arms) * len(sets)
    return titled(figure, title, subtitle, height=height, margin={"l": 140, "t": 112})


def problems_figure(problems: Problems, arm: str, baseline: str) -> go.Figure:
    """How many problems an arm gained and lost against the baseline, by how much."""
    if problems.frame.empty:
        return empty_figure(f"{arm} and {baseline} have no step with rollouts and no seed in common")
    difference = 100 * problems.frame["difference"]
    sides = (("worse", difference < 0, ORANGE), ("the same", difference == 0, GREY), ("better", difference > 0, BLUE))
    figure = go.Figure()
    for name, chosen, colour in sides:
        figure.add_histogram(
            x=_narrow(difference[chosen]), xbins={"start": -102.5, "end": 102.5, "size": 5}, name=name,
            marker={"color": colour}, hovertemplate="%{x} points<br>%{y} problems<extra></extra>",
        )  # fmt: skip
    widest = float(difference.abs().max()) + 5
    worse, _, better = (int(chosen.sum()) for _, chosen, _ in sides)
    return titled(
        figure, f"{arm} answers {better} problems better than {baseline} and {worse} worse, of {len(difference)}",
        problems.where, height=340, bargap=0.05, barmode="stack", yaxis={"title": "problems"},
        xaxis={"title": "difference in the share of right answers, percentage points", "range": [-widest, widest]},
    )  # fmt: skip


def _curves_title(arms: Sequence[Arm]) -> str:
    """Where right answers have come to, of the first arms."""
    last = curves(arms, "accuracy/mean").groupby("arm", sort=False)["mean"].last()
    said = [f"{arm} {share:.0%}" for arm, share in last.head(NUM_IN_TITLE).items()]
    return f"Right answers in the last step: {', '.join(said)}" + (", …" if len(last) > NUM_IN_TITLE else "")


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _narrow(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)
