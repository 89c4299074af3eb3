"""The contrastive term in a notebook, live while a run trains: curves, rewards, and one group in detail.

DynamicsView(run)       follows the run until it is finished
GroupView(run)          one group: similarities with the texts behind a cell, and what the term does to advantages
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from clipo_ds.records import Run
from clipo_ds.types import InputError
from clipo_ds.viz.dynamics_figures import (
    advantage_figure,
    contrastive_figure,
    decomposition_figure,
    learning_figure,
    ordered_group,
    reward_distribution_figure,
    similarity_figure,
    telling_groups,
)
from clipo_ds.viz.frames import Rollouts, as_run, metrics_frame, newer, open_rollouts, run_state
from clipo_ds.viz.interact import Plot, follow_steps, grow_slider, in_background, notes, said, state_badge
from clipo_ds.viz.reading import rollout_html, short
from clipo_ds.viz.still import View
from clipo_ds.viz.theme import boxed, empty_figure


class DynamicsView(View):
    """Learning curves and the contrastive term of a run, brought up to date as steps land.

    Args:
        run: A run, its folder, or None (`frames.chosen_run`).
        every_s: Seconds between two looks at a run that is not finished.
    """

    def __init__(self, run: Run | str | Path | None = None, *, every_s: float = 2.0) -> None:
        self._task: asyncio.Task[None] | None = None
        try:
            self.run = as_run(run)
            super().__init__(self._build())
            if run_state(self.run).word != "finished":
                self._task = in_background(self._follow(every_s), self.badge)
        except InputError as error:
            super().__init__([said(error)])
        self.add_class("clipo-dynamics")

    def _build(self) -> list[widgets.Widget]:
        self.badge = widgets.HTML(state_badge(run_state(self.run)))
        self._table: Rollouts | None = None
        self._seen: tuple[int, int] | None = None
        self.notes = notes(())
        self.plots = [Plot(figure) for figure in self._figures()]
        return [self.badge, self.notes, *self.plots]

    def _figures(self) -> list[Any]:
        metrics = metrics_frame(self.run)
        self._seen = self._fingerprint()
        curves = [learning_figure(metrics), contrastive_figure(metrics)]
        try:
            self._table = newer(self.run, self._table)
        except InputError as error:  # nothing recorded yet
            return [*curves, *[empty_figure(str(error).rpartition(": ")[2])] * 2]
        self.notes.value = notes(self._table.notes).value
        return [*curves, reward_distribution_figure(self._table), decomposition_figure(self._table)]

    def _fingerprint(self) -> tuple[int, int]:
        file = self.run.path / "metrics.jsonl"
        return (file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else (0, 0)

    def refresh(self) -> bool:
        """Bring everything up to date; returns whether the run is finished. The view calls it by itself."""
        state = run_state(self.run)
        self.badge.value = state_badge(state)
        if self._fingerprint() != self._seen:
            for plot, figure in zip(self.plots, self._figures(), strict=True):
                plot.show_figure(figure)
        return state.word == "finished"

    async def _follow(self, every_s: float) -> None:
        while not self.refresh():
            await asyncio.sleep(every_s)

    def close(self) -> None:
        """Stop following; the run itself goes on."""
        if self._task is not None:
            self._task.cancel()
        super().close()


class GroupView(View):
    """One group of one step: its G x G similarities, the two texts behind a cell, its advantages with and without.

    The steps to choose from grow as they land.

    Args:
        run: A run, its folder, or None (`frames.chosen_run`).
        every_s: Seconds between two looks at a run that is not finished.
    """

    def __init__(self, run: Run | str | Path | None = None, *, every_s: float = 2.0) -> None:
        self._task: asyncio.Task[None] | None = None
        try:
            self.table = open_rollouts(run)
            super().__init__(self._build())
            self._task = in_background(
                follow_steps(self.table.run, self.table.steps, self.grow, every_s), self._message
            )
        except InputError as error:
            super().__init__([said(error)])
        self.add_class("clipo-group")

    def grow(self) -> None:
        """Take in the steps that have landed; the group that is being read stays."""
        self.table = newer(self.table.run, self.table)
        grow_slider(self._step, self.table.steps, self._on_step)

    def close(self) -> None:
        """Stop following; the run itself goes on."""
        if self._task is not None:
            self._task.cancel()
        super().close()

    def _build(self) -> list[widgets.Widget]:
        steps = self.table.steps
        self._step = widgets.SelectionSlider(
            options=steps, value=steps[-1], description="step", continuous_update=False,
            layout=widgets.Layout(width="420px"),
        )  # fmt: skip
        self._group = widgets.Dropdown(
            options=self._choices(), description="group", layout=widgets.Layout(width="520px")
        )  # fmt: skip
        self.similarity, self.advantages = (Plot(figure) for figure in self._figures())
        self.panel = widgets.HTML(boxed('<span class="quiet">Click a cell of the matrix to read both texts.</span>'))
        self._listen()
        self._step.observe(self._on_step, "value")
        self._group.observe(self._on_group, "value")
        controls = widgets.HBox([self._step, self._group])
        self._message = notes(self.table.notes)
        return [self._message, controls, self.similarity, self.panel, self.advantages]

    def _choices(self) -> list[tuple[str, int]]:
        step = self._step.value
        groups = telling_groups(self.table, step)
        first = {group: self.table.rows_of(step, group)[0] for group in groups}
        texts = self.table.texts(list(first.values()))["prompt"]
        return [(f"{group}: {short(texts[row], 60, end=True)}", group) for group, row in first.items()]

    def _figures(self) -> list[Any]:
        step, group = self._step.value, self._group.value
        return [similarity_figure(self.table, step, group), advantage_figure(self.table, step, group)]

    def _on_step(self, _: dict) -> None:
        self._group.options = self._choices()  # which chooses the first one, and draws it where that is another
        self._draw()

    def _on_group(self, change: dict) -> None:
        if change["new"] is not None:
            self._draw()

    def _draw(self) -> None:
        for plot, figure in zip((self.similarity, self.advantages), self._figures(), strict=True):
            plot.show_figure(figure)

    def _listen(self) -> None:
        self.similarity.data[0].on_click(self._on_click)

    def _on_click(self, _trace: Any, points: Any, _: Any) -> None:
        if points.xs:
            self.read(*(int(str(name).split()[0]) - 1 for name in (points.ys[0], points.xs[0])))

    def read(self, first: int, second: int) -> None:
        """Show the texts of two rollouts of the group, numbered from 0 in the order of the matrix."""
        rows = ordered_group(self.table, self._step.value, self._group.value)
        chosen = dict.fromkeys((rows[first], rows[second]))
        columns = "".join(
            f'<div style="flex:1;min-width:0">{rollout_html(self.table, int(row))}</div>' for row in chosen
        )
        self.panel.value = boxed(f'<div style="display:flex;gap:24px">{columns}</div>')
