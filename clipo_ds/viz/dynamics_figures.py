"""How the contrastive term moves, and what it does to the rewards: tables in, plotly figures out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clipo_ds.viz.frames import PART, RIGHT_BUT_WRONG, Rollouts
from clipo_ds.viz.theme import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SEQUENTIAL,
    SERIES,
    SKY,
    VERMILLION,
    empty_figure,
    titled,
)

# A panel: title, unit of its y axis, and its curves (metric, name, colour).
LEARNING = (
    ("reward", "reward", (("reward/mean", "outcome and other", BLUE), ("reward/total", "with contrastive", ORANGE))),
    ("right answers", "share of rollouts", (("accuracy/mean", "right answers", BLUE),)),
    (
        "no false step", "share of checked rollouts",
        (
            ("process/consistent_among_correct", "of right answers", GREEN),
            ("process/consistent", "of all", GREY),
        ),
    ),
)  # fmt: skip
CONTRASTIVE = (
    ("contrastive loss", "nats a valid anchor", (("contrastive/loss", "loss", BLUE),)),
    ("valid anchors", "share of right answers", (("contrastive/valid_share", "valid anchors", BLUE),)),
    (
        "similarity within groups", "cosine",
        (
            ("contrastive/positive_similarity", "right with right", GREEN),
            ("contrastive/negative_similarity", "right with wrong", GREY),
            ("margin", "margin", BLACK),
        ),
    ),
    (
        "contrastive reward by process", "reward a valid anchor",
        (
            ("contrastive/reward_process_right", "right process", GREEN),
            ("contrastive/reward_process_wrong", "wrong process", VERMILLION),
        ),
    ),
    ("at the floor", "share of valid anchors", (("contrastive/floor_share", "at the floor", PURPLE),)),
    ("head", "norm of its weights", (("contrastive/head_norm", "head norm", BLUE),)),
)  # fmt: skip
NO_TERM = "this run has no contrastive term (contrastive: null)"
SMOOTHING = 5  # steps of the running mean that is drawn over the single steps
QUANTILES = ((0.05, 0.95, 0.18), (0.25, 0.75, 0.35))


def learning_figure(metrics: pd.DataFrame) -> go.Figure:
    """Reward, accuracy, and process consistency over training."""
    if metrics.empty:
        return empty_figure("no step has been recorded yet")
    figure = _panels(metrics, LEARNING, columns=3)
    first, last = metrics.head(SMOOTHING), metrics.tail(SMOOTHING)
    title = f"Right answers {first['accuracy/mean'].mean():.0%} → {last['accuracy/mean'].mean():.0%}"
    key = "process/consistent_among_correct"
    if key in metrics and metrics[key].notna().any():
        title += f", of them without a false step {first[key].mean():.0%} → {last[key].mean():.0%}"
    return titled(figure, title, _smoothed(metrics), height=400, margin={"t": 112, "b": 116})


def contrastive_figure(metrics: pd.DataFrame) -> go.Figure:
    """Loss, valid anchors, similarities and margin, rewards by process, floor and head norm over training."""
    if metrics.empty:
        return empty_figure("no step has been recorded yet")
    if "contrastive/loss" not in metrics:
        return empty_figure(NO_TERM)
    positive, negative = (metrics.get(f"contrastive/{kind}_similarity") for kind in ("positive", "negative"))
    frame = metrics if positive is None or negative is None else metrics.assign(margin=positive - negative)
    has_head = frame.get("contrastive/head_norm", pd.Series(dtype=float)).fillna(0.0).any()
    figure = _panels(frame, CONTRASTIVE if has_head else CONTRASTIVE[:-1], columns=3)
    gap = metrics.get("contrastive/reward_gap", pd.Series(dtype=float)).dropna()
    title = "The contrastive term over training"
    if len(gap):
        better = "right" if gap.mean() > 0 else "wrong"
        title = f"The contrastive reward favours {better} processes by {abs(gap.mean()):.3f} a valid anchor"
    return titled(figure, title, _smoothed(metrics), height=680, margin={"t": 112, "b": 132})


def reward_distribution_figure(table: Rollouts) -> go.Figure:
    """The contrastive reward of valid anchors at every step: median, quartiles, and 5% to 95%."""
    anchors = table.frame[table.frame["contrastive_loss"].notna()]
    if anchors.empty:
        return empty_figure(NO_TERM if table.run.config.get("contrastive") is None else "no rollout is a valid anchor")
    by_step = anchors.groupby("step")["contrastive_reward"]
    figure = go.Figure()
    for low, high, opacity in QUANTILES:
        for edge, fill in ((high, None), (low, "tonexty")):
            values = by_step.quantile(edge)
            figure.add_scatter(
                x=values.index.to_numpy(np.int32), y=_narrow(values), mode="lines", line={"width": 0}, fill=fill,
                fillcolor=f"rgba(0,114,178,{opacity})", hoverinfo="skip", showlegend=fill is not None,
                name=f"{low:.0%} to {high:.0%}",
            )  # fmt: skip
    for cell, name, colour in (
        (None, "median", BLUE),
        (RIGHT_BUT_WRONG, "mean of anchors with a false step", VERMILLION),
    ):
        chosen = by_step.median() if cell is None else anchors[anchors["cell"] == cell].groupby("step")[
            "contrastive_reward"
        ].mean()  # fmt: skip
        figure.add_scatter(
            x=chosen.index.to_numpy(np.int32), y=_narrow(chosen), name=name,
            mode="lines" if cell is None else "markers", line={"color": colour, "width": 2},
            marker={"color": colour, "size": 6}, hovertemplate="step %{x}<br>%{y:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    floor = (table.run.config.get("contrastive") or {}).get("floor")
    title = "Contrastive reward of valid anchors"
    if floor is not None:
        at_floor = float((anchors["contrastive_reward"] <= floor + 1e-6).mean())
        figure.add_hline(y=floor, line={"color": GREY, "dash": "dot", "width": 1}, annotation_text="floor")
        title = f"{at_floor:.0%} of the valid anchors get the floor as their contrastive reward"
    return titled(
        figure, title, f"{len(anchors):,} valid anchors of {len(table.frame):,} rollouts", height=380,
        xaxis_title="step", yaxis_title="contrastive reward",
    )  # fmt: skip


def decomposition_figure(table: Rollouts) -> go.Figure:
    """Mean reward of each step by where it comes from, bars on top of each other."""
    colours = cycle(colour for colour in SERIES if colour not in (BLUE, ORANGE, SKY))
    parts = (
        ("outcome_reward", "outcome", BLUE),
        ("contrastive_reward", "contrastive", ORANGE),
        *((name, name.removeprefix(PART), next(colours)) for name in table.reward_parts),
        ("other_reward", "other", SKY),
    )
    trained = table.frame[~table.frame["dropped"]]
    means = trained.groupby("step")[[name for name, _, _ in parts]].mean().fillna(0.0)
    figure = go.Figure()
    for name, word, colour in parts:
        if name == "other_reward" and not means[name].any():
            continue
        figure.add_bar(
            x=means.index.to_numpy(np.int32), y=_narrow(means[name]), name=word, marker={"color": colour},
            hovertemplate="step %{x}<br>%{y:.3f}<extra>" + word + "</extra>",
        )  # fmt: skip
    size = means["contrastive_reward"].abs().sum() / max(float(means.abs().sum().sum()), 1e-12)
    return titled(
        figure, f"The contrastive part is {size:.0%} of the mean rewards, by size",
        "mean over the rollouts of a step that were trained on",
        height=340, barmode="relative", bargap=0.15, xaxis_title="step", yaxis_title="mean reward a rollout",
    )  # fmt: skip


def similarity_figure(table: Rollouts, step: int, group: int) -> go.Figure:
    """Cosine similarities of the rollouts of one group, right answers first, then wrong ones.

    Raises:
        InputError: The run has no embeddings.
    """
    rows = ordered_group(table, step, group)
    if len(rows) == 0:
        return empty_figure(f"step {step} has no group {group}")
    vectors = table.embeddings(rows).astype(np.float32)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    frame = table.frame.loc[rows]
    names = [_rollout_name(place, entry) for place, (_, entry) in enumerate(frame.iterrows(), start=1)]
    figure = go.Figure(
        go.Heatmap(
            z=(unit @ unit.T).round(3), x=names, y=names, zmin=-1, zmax=1, colorscale=SEQUENTIAL,
            colorbar={"title": "cosine", "thickness": 14}, xgap=1, ygap=1,
            hovertemplate="%{y} with %{x}<br>cosine %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    right = int(frame["correct"].sum())
    if 0 < right < len(rows):
        for line in (figure.add_vline, figure.add_hline):
            line(right - 0.5, line={"color": "white", "width": 6})
    figure.update_xaxes(tickangle=-90, showgrid=False, ticks="", constrain="domain", constraintoward="left")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", constrain="domain", scaleanchor="x")
    title = f"Group {group} of step {step}: {right} right answers, then {len(rows) - right} wrong ones"
    subtitle = "✓ / ✗: answer, then process (· unknown); click a cell to read both texts"
    return titled(figure, title, subtitle, height=660, width=680, margin={"l": 80, "b": 80})


def advantage_figure(table: Rollouts, step: int, group: int) -> go.Figure:
    """The advantages of one group as they were, and as they would be without the contrastive reward."""
    rows = ordered_group(table, step, group)
    if len(rows) == 0:
        return empty_figure(f"step {step} has no group {group}")
    frame = table.frame.loc[rows]
    normalize = _normalization(table.run.config)
    without = group_advantages(
        frame["reward"].to_numpy() - frame["contrastive_reward"].fillna(0.0).to_numpy(), normalize
    )
    names = [_rollout_name(place, entry) for place, (_, entry) in enumerate(frame.iterrows(), start=1)]
    figure = go.Figure()
    for word, values, colour in (
        ("without the contrastive term", without, GREY),
        ("as trained", frame["advantage"].to_numpy(), ORANGE),
    ):
        figure.add_bar(
            x=names, y=_narrow(values), name=word, marker={"color": colour},
            hovertemplate="%{x}<br>%{y:+.3f}<extra>" + word + "</extra>",
        )  # fmt: skip
    turned = int((np.sign(without) * np.sign(frame["advantage"].to_numpy()) < 0).sum())
    change = float(np.abs(frame["advantage"].to_numpy() - without).mean())
    return titled(
        figure,
        f"The contrastive term moves advantages by {change:.2f} on average; {turned} change sign",
        f"group {group} of step {step}; ✓ / ✗: answer, then process (· unknown)", height=360,
        xaxis={"title": "rollout", "tickangle": -90}, yaxis={"title": "advantage"},
        margin={"b": 110}, bargap=0.25, bargroupgap=0.05,
    )  # fmt: skip


def ordered_group(table: Rollouts, step: int, group: int) -> np.ndarray:
    """The rows of a group, right answers first, among them those with a right process."""
    rows = table.rows_of(step, group)
    frame = table.frame.loc[rows]
    order = np.lexsort([frame["process_consistent"].astype("Int8").fillna(-1).to_numpy() * -1, ~frame["correct"]])
    return rows[order]


def telling_groups(table: Rollouts, step: int) -> list[int]:
    """The groups of a step, those first in which right answers with a false step have siblings to be told from."""
    by_group = table.frame.iloc[table.rows_of(step)].groupby("group")
    wrong_process = by_group["cell"].agg(lambda cell: (cell == RIGHT_BUT_WRONG).sum())
    mixed = by_group["correct"].agg(lambda correct: correct.nunique() > 1)
    order = pd.DataFrame({"wrong": wrong_process, "mixed": mixed})
    return order.sort_values(["wrong", "mixed"], ascending=False, kind="stable").index.tolist()


def group_advantages(rewards: np.ndarray, normalize: str) -> np.ndarray:
    """The advantages of one group's rewards, as `clipo_ds.advantages` defines them, without torch.

    >>> group_advantages(np.array([1.0, 0.0, 1.0, 0.0]), "none")
    array([ 0.5, -0.5,  0.5, -0.5])
    """
    rewards = np.asarray(rewards, np.float64)
    if len(rewards) == 1:
        return rewards
    if np.ptp(rewards) < 1e-6:  # float32 sums of equal rewards
        return np.zeros(len(rewards))
    deviation = rewards - rewards.mean()
    return deviation / (rewards.std(ddof=1) + 1e-6) if normalize == "std" else deviation


def _normalization(config: dict) -> str:
    objective = config.get("objective") or {}
    return objective.get("advantage_normalize") or ("none" if objective.get("name") == "dr_grpo" else "std")


def _rollout_name(place: int, entry: pd.Series) -> str:
    process = "·" if pd.isna(entry["process_consistent"]) else "✓" if entry["process_consistent"] else "✗"
    return f"{place} {'✓' if entry['correct'] else '✗'}{process}"


def _panels(metrics: pd.DataFrame, panels: Sequence, columns: int) -> go.Figure:
    """Curves in panels: each step pale, their running mean strong."""
    rows = -(-len(panels) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=[title for title, *_ in panels], vertical_spacing=0.2,
        horizontal_spacing=0.09,
    )  # fmt: skip
    steps = metrics.index.to_numpy(np.int32)
    for number, (title, unit, curves) in enumerate(panels):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for name, word, colour in curves:
            values = metrics[name] if name in metrics else pd.Series(np.nan, metrics.index)
            figure.add_scatter(
                x=steps, y=_narrow(values), mode="lines", line={"color": colour, "width": 1}, opacity=0.3,
                hoverinfo="skip", showlegend=False, **place,
            )  # fmt: skip
            mean = values.rolling(SMOOTHING, min_periods=1, center=True).mean()
            figure.add_scatter(
                x=steps, y=_narrow(mean), mode="lines", line={"color": colour, "width": 2.5}, name=word,
                showlegend=len(curves) > 1, legendgroup=title, legendgrouptitle={"text": title}, **place,
                hovertemplate=f"step %{{x}}<br>{word} %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
        figure.update_yaxes(title_text=unit, **place)
        if unit.startswith("share"):
            figure.update_yaxes(tickformat=".0%", range=[-0.02, 1.03], **place)
    figure.update_xaxes(title_text="step")
    figure.update_annotations(font_size=13)
    return figure.update_layout(legend={"groupclick": "toggleitem"})


def _smoothed(metrics: pd.DataFrame) -> str:
    return f"{len(metrics)} steps; strong lines are running means over {SMOOTHING}"


def _narrow(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)
