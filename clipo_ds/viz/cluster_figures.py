"""Embeddings as pictures: clusters, the trail of one prompt, separation and its course over training.

Tables in, plotly figures out; arrays in the traces are one-dimensional float32 and int32, which travel to the browser
as bytes, and no text of a rollout is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clipo_ds.types import InputError
from clipo_ds.viz.frames import CELLS, RIGHT_BUT_WRONG, Rollouts
from clipo_ds.viz.projections import Projection
from clipo_ds.viz.reading import CELL_COLOURS
from clipo_ds.viz.separation import FIGURES
from clipo_ds.viz.theme import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    SEQUENTIAL,
    SERIES,
    SYMBOLS,
    empty_figure,
    titled,
)

COLOURS = ("answer and process", "answer", "prompt", "length", "contrastive reward", "advantage", "step")
SHAPES = ("none", "answer", "process", "anchor", "truncated")
NUMBERS = {
    "length": ("num_tokens", "response length<br>(tokens)"),
    "contrastive reward": ("contrastive_reward", "contrastive<br>reward"),
    "advantage": ("advantage", "advantage"),
    "step": ("step", "step"),
}
NUM_COLOURED_PROMPTS = len(SERIES) - 1
MAX_HOVER_LINES = 6_000
"""Points up to which each brings its own hover line (40 characters); above, hovering names the rollout alone."""

PANELS = (
    ("silhouette within groups", "silhouette_group", BLUE),
    ("cosine margin", "margin", GREEN),
    ("probe AUC, answer", "probe_correct", ORANGE),
    ("probe AUC, process", "probe_process_among_correct", PURPLE),
)


@dataclass(frozen=True)
class Cloud:
    """A scatter plot and, for every trace of it, the rows that its points stand for."""

    figure: go.Figure
    rows: tuple[np.ndarray, ...]


def cluster_figure(
    table: Rollouts,
    projection: Projection,
    *,
    step: int | None = None,
    colour: str = "answer and process",
    shape: str = "none",
    prompts: Sequence[int] | None = None,
) -> Cloud:
    """The rollouts of a step where the projection puts them, those of all steps in pale behind them.

    Args:
        table: The rollouts.
        projection: Their places.
        step: One step, or None for all of them.
        colour: One of COLOURS.
        shape: One of SHAPES, told by the markers.
        prompts: Show these prompts' rollouts only (numbers as in the column `prompt`).

    Raises:
        InputError: An argument is none of these.
    """
    for name, value, known in (("colour", colour, COLOURS), ("shape", shape, SHAPES)):
        if value not in known:
            raise InputError(f"`{name}` must be of {', '.join(known)}, got {value!r}")
    frame = table.frame.iloc[projection.rows]
    shown = np.ones(len(frame), bool) if step is None else (frame["step"] == step).to_numpy()
    if prompts is not None:
        shown = shown & frame["prompt"].isin(list(prompts)).to_numpy()
    places = np.flatnonzero(shown)
    figure = go.Figure()
    rows: list[np.ndarray] = []
    # Always the same points, so that they are sent once and not with every step.
    behind = np.zeros(0, np.int64) if shown.all() else np.arange(len(shown))
    figure.add_scattergl(
        x=_narrow(projection.points[behind, 0]), y=_narrow(projection.points[behind, 1]), mode="markers",
        name="all rollouts", marker={"size": 4, "color": PALE, "opacity": 0.35}, hoverinfo="skip", visible=True,
    )  # fmt: skip
    rows.append(projection.rows[behind])
    seen = frame.iloc[places]
    hover = _hover_lines(seen) if len(places) <= MAX_HOVER_LINES else None
    numbers, words = _shape_words(seen, shape)
    values = _narrow(seen[NUMBERS[colour][0]].fillna(0.0)) if colour in NUMBERS else None
    for name, of_colour, marker in _layers(seen, colour):
        named = False
        # A trace a shape: one symbol is checked and sent once, and 20,000 are not.
        for number in range(len(words)):
            chosen = np.flatnonzero(of_colour & (numbers == number))
            own = places[chosen]
            figure.add_scattergl(
                x=_narrow(projection.points[own, 0]), y=_narrow(projection.points[own, 1]), mode="markers",
                name=f"{name} ({of_colour.sum():,})" if name else "rollouts", legendgroup=name or "rollouts",
                showlegend=bool(name) and not named and len(own) > 0,
                customdata=projection.rows[own].astype(np.int32),
                text=None if hover is None else hover[chosen],
                hovertemplate=(f"<b>{name}</b><br>" if name else "") + "rollout %{customdata}"
                + ("" if hover is None else "<br>%{text}") + "<extra></extra>",
                marker={**marker, "symbol": SYMBOLS[number]}
                if values is None
                else {**marker, "symbol": SYMBOLS[number], "color": values[chosen], "coloraxis": "coloraxis"},
            )  # fmt: skip
            named |= len(own) > 0
            rows.append(projection.rows[own])
    _shape_legend(figure, numbers, words)
    rows += [np.zeros(0, np.int64)] * (len(figure.data) - len(rows))
    axes = {"showgrid": False, "zeroline": False}
    names = [f"component {axis}" for axis in (1, 2)] if projection.method == "PCA" else [projection.method] * 2
    if projection.explained:
        names = [f"{n} ({share:.0%} of variance)" for n, share in zip(names, projection.explained, strict=True)]
    low, high = _limits(projection.points)
    titled(
        figure, _cluster_title(frame.iloc[places], step), _cluster_subtitle(projection, places, colour, shape),
        height=560, dragmode="pan", uirevision=f"{projection.method} {projection.centre}",
        xaxis={**axes, "title": names[0], "range": [low[0], high[0]]},
        yaxis={**axes, "title": names[1], "range": [low[1], high[1]]},
        legend={
            "orientation": "v", "x": 1.01, "yref": "paper", "y": 1.0, "yanchor": "top", "itemsizing": "constant",
        },
    )  # fmt: skip
    if colour in NUMBERS:
        figure.update_layout(
            coloraxis={"colorscale": SEQUENTIAL, "colorbar": {"title": NUMBERS[colour][1], "thickness": 14, "len": 0.6}}
        )
        figure.update_layout(legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0})
    return Cloud(figure, tuple(rows))


def trail_figure(table: Rollouts, projection: Projection, prompt: int, text: str = "") -> go.Figure:
    """Where one prompt's rollouts went over training, with the means of its right and of its wrong answers."""
    frame = table.frame.iloc[projection.rows].assign(x=projection.points[:, 0], y=projection.points[:, 1])
    own = frame[frame["prompt"] == prompt]
    if own.empty:
        return empty_figure(f"prompt #{prompt} is not among the {projection.note}")
    figure = go.Figure()
    figure.add_scattergl(
        x=_narrow(projection.points[:, 0]), y=_narrow(projection.points[:, 1]), mode="markers", hoverinfo="skip",
        name="all prompts", marker={"size": 3, "color": PALE, "opacity": 0.35},
    )  # fmt: skip
    for name, chosen, colour in (("right answers", own["correct"], GREEN), ("wrong answers", ~own["correct"], GREY)):
        answers = own[chosen]
        if answers.empty:
            continue
        figure.add_scattergl(
            x=_narrow(answers["x"]), y=_narrow(answers["y"]), mode="markers", name=name,
            marker={"size": 6, "color": colour, "opacity": 0.45},
            customdata=answers["step"].to_numpy(np.int32), hovertemplate="step %{customdata}<extra></extra>",
        )  # fmt: skip
        course = answers.groupby("step")[["x", "y"]].mean()
        figure.add_scatter(
            x=_narrow(course["x"]), y=_narrow(course["y"]), mode="lines+markers+text", name=f"mean of {name}",
            line={"color": colour, "width": 2, "shape": "spline"}, marker={"size": 9, "color": colour},
            text=[str(step) for step in course.index], textposition="top center", textfont={"size": 11, "color": INK},
            hovertemplate="mean at step %{text}<extra></extra>",
        )  # fmt: skip
    visits = own["step"].nunique()
    accuracy = own.groupby("step")["correct"].mean()
    title = f"Prompt #{prompt} in {visits} step{'s' if visits > 1 else ''}: right answers {accuracy.iloc[0]:.0%}"
    if visits > 1:
        title += f" at step {accuracy.index[0]}, {accuracy.iloc[-1]:.0%} at step {accuracy.index[-1]}"
    subtitle = f"{text + '; ' if text else ''}numbers are steps; {projection.method} of {projection.note}"
    low, high = _limits(projection.points)
    return titled(
        figure, title, subtitle, height=480,
        xaxis={"title": f"{projection.method} 1", "showgrid": False, "range": [low[0], high[0]]},
        yaxis={"title": f"{projection.method} 2", "showgrid": False, "range": [low[1], high[1]]},
    )  # fmt: skip


def separation_course_figure(course: pd.DataFrame, step: int | None = None) -> go.Figure:
    """PANELS over training, each over the band that labels shuffled within groups give."""
    figure = make_subplots(rows=1, cols=len(PANELS), subplot_titles=[title for title, *_ in PANELS])
    for column, (_, name, colour) in enumerate(PANELS, start=1):
        rows = course[course["figure"] == name].dropna(subset="value")
        steps = rows["step"].to_numpy(np.int32)
        if len(rows) == 0:
            why = course.loc[course["figure"] == name, "why"]
            figure.add_annotation(
                text=f"never defined:<br>{why.iloc[-1] if len(why) else 'no steps'}", showarrow=False,
                font={"size": 11}, xref="x domain", yref="y domain", x=0.5, y=0.5, row=1, col=column,
            )  # fmt: skip
            continue
        for edge, fill in (("high", None), ("low", "tonexty")):
            figure.add_scatter(
                x=steps, y=_narrow(rows[edge]), mode="lines", line={"width": 0}, fill=fill,
                fillcolor="rgba(138,144,153,0.25)", hoverinfo="skip", showlegend=fill is not None and column == 1,
                name="labels shuffled within groups (95%)", row=1, col=column,
            )  # fmt: skip
        figure.add_scatter(
            x=steps, y=_narrow(rows["value"]), mode="lines+markers", line={"color": colour, "width": 2},
            marker={"size": 5}, showlegend=False, row=1, col=column,
            hovertemplate="step %{x}<br>%{y:.3f}<extra></extra>",
        )  # fmt: skip
        if step is not None:
            figure.add_vline(x=step, line={"color": GREY, "dash": "dot", "width": 1}, row=1, col=column)
        if name.startswith("probe"):
            figure.update_yaxes(range=[0, 1.03], row=1, col=column)
    shown, num_steps = course["step"].nunique(), course.attrs.get("num_steps", 0)
    axis = "step" if shown >= num_steps else f"step ({shown} of {num_steps} shown)"
    figure.update_xaxes(title_text=axis, title_standoff=6)
    figure.update_annotations(font_size=12.5)
    subtitle = "above the band: told by rollouts, not prompts; margin: right-right minus right-wrong; process if right"
    return titled(figure, _course_title(course), subtitle, height=340, margin={"t": 112})


def separation_figure(scores: dict, step: int | None) -> go.Figure:
    """The FIGURES of one step, or of all of them, as dots beside the interval of their shuffled-label baselines."""
    defined = [name for name in reversed(FIGURES) if scores[name].value is not None]
    if not defined:
        return empty_figure(f"{_where(step)}: {next(iter(scores.values())).why}")
    words = [FIGURES[name] for name in defined]
    figure = go.Figure()
    for name, word in zip(defined, words, strict=True):
        figure.add_scatter(
            x=[scores[name].low, scores[name].high], y=[word, word], mode="lines", hoverinfo="skip",
            line={"color": GREY, "width": 8}, opacity=0.45, showlegend=name == defined[0],
            name="labels shuffled within groups (95%)",
        )  # fmt: skip
    figure.add_scatter(
        x=_narrow([scores[name].value for name in defined]), y=words, mode="markers", name="measured",
        marker={"size": 11, "color": BLUE}, hovertemplate="%{y}<br>%{x:.3f}<extra></extra>",
    )  # fmt: skip
    outside = sum(not scores[name].low <= scores[name].value <= scores[name].high for name in defined)
    return titled(
        figure, f"{_where(step)}: {outside} of {len(defined)} figures lie outside the band of shuffled labels",
        "original space, not the picture's; cosine, silhouette and AUC have no unit",
        height=360, xaxis={"title": "value"}, yaxis={"automargin": True, "showgrid": False},
    )  # fmt: skip


def _layers(frame: pd.DataFrame, colour: str) -> list[tuple[str, np.ndarray, dict]]:
    """Name, rollouts (Bool[N]) and marker of each colour; what must be seen comes last, on top."""
    if colour in NUMBERS:
        return [("", np.ones(len(frame), bool), {"size": 7})]
    if colour == "answer":
        parts = [("wrong answer", ~frame["correct"], GREY), ("right answer", frame["correct"], GREEN)]
    elif colour == "prompt":
        common = frame["prompt"].value_counts(sort=True).index[:NUM_COLOURED_PROMPTS]
        parts = [("other prompts", ~frame["prompt"].isin(common), PALE)]
        parts += [(f"prompt #{p}", frame["prompt"] == p, SERIES[i]) for i, p in enumerate(common)]
    else:
        order = sorted(CELLS, key=lambda cell: (cell == RIGHT_BUT_WRONG, cell.startswith("right")))
        parts = [(cell, frame["cell"] == cell, CELL_COLOURS[cell]) for cell in order]
    return [
        (name, chosen.to_numpy(bool), {"size": 10 if name == RIGHT_BUT_WRONG else 7, "color": ink, "opacity": 0.85})
        for name, chosen, ink in parts
    ]


def _shape_words(frame: pd.DataFrame, shape: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of the word that each rollout's marker says, and the words."""
    if shape == "answer":
        return (~frame["correct"]).to_numpy(np.int8), ("right answer", "wrong answer")
    if shape == "process":
        process = frame["process_consistent"].astype("Int8").fillna(2).to_numpy(np.int8)
        return np.choose(process, [1, 0, 2]), ("right process", "wrong process", "process unknown")
    if shape == "anchor":
        return frame["contrastive_loss"].isna().to_numpy(np.int8), ("valid anchor", "no anchor")
    if shape == "truncated":
        return frame["truncated"].to_numpy(np.int8), ("ended by itself", "cut at the length cap")
    return np.zeros(len(frame), np.int8), ("rollout",)


def _shape_legend(figure: go.Figure, numbers: np.ndarray, words: tuple[str, ...]) -> None:
    for number, word in enumerate(words if len(words) > 1 else ()):
        figure.add_scattergl(
            x=[None], y=[None], mode="markers", name=word, hoverinfo="skip", legendgroup="shape",
            showlegend=bool((numbers == number).any()),
            marker={"symbol": SYMBOLS[number], "color": INK, "size": 8},
        )  # fmt: skip


def _hover_lines(frame: pd.DataFrame) -> np.ndarray:
    parts = zip(frame["step"], frame["prompt"], frame["num_tokens"], frame["reward"], strict=True)
    return np.array([f"step {s} · prompt #{p} · {n} tokens · reward {r:.2f}" for s, p, n, r in parts], dtype=object)


def _where(step: int | None) -> str:
    return "All steps" if step is None else f"Step {step}"


def _cluster_title(frame: pd.DataFrame, step: int | None) -> str:
    if frame.empty:
        return f"{_where(step)}: none of these rollouts"
    right = int(frame["correct"].sum())
    wrong_process = int((frame["cell"] == RIGHT_BUT_WRONG).sum())
    of_them = f", {wrong_process:,} of them with a false step" if frame["process_consistent"].notna().any() else ""
    return f"{_where(step)}: {right:,} right answers of {len(frame):,}{of_them}"


def _cluster_subtitle(projection: Projection, places: np.ndarray, colour: str, shape: str) -> str:
    num_places = len(np.unique(projection.points[places], axis=0))
    hidden = f", {len(places) - num_places:,} lie exactly on another" if num_places < len(places) else ""
    centred = ", group means subtracted" if projection.centre == "group" else ""
    said = f"{projection.method} of {projection.note}{centred}{hidden}; colour: {colour}"
    return said + (f"; shape: {shape}" if shape != "none" else "")


def _course_title(course: pd.DataFrame) -> str:
    rows = course[course["figure"] == "silhouette_group"].dropna(subset="value")
    if rows.empty:
        return "Separation over training"
    first, last = rows.iloc[0], rows.iloc[-1]
    return (
        f"Silhouette of right against wrong within groups: {first['value']:.2f} at step {first['step']}, "
        f"{last['value']:.2f} at step {last['step']}"
    )


def _limits(points: np.ndarray) -> tuple[list[float], list[float]]:
    """Fixed axes for all steps, so that nothing jumps as the slider moves."""
    low, high = points.min(0), points.max(0)
    margin = np.where(high > low, 0.05 * (high - low), 1.0)
    return (low - margin).tolist(), (high + margin).tolist()


def _narrow(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)
