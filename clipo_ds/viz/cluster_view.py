"""Embedding clusters in a notebook: look, move through training, click to read, draw round some and list them.

    ClusterExplorer(run)        the picture, its numbers beside it, and the rollout that was clicked
    separation_view(run)        separation over training
    trail_view(run)             one prompt over training
    suspects_view(run)          right answers with a false step, worst first

Each takes a run, its folder or None (`frames.chosen_run`), and says what is wrong with it in a sentence.
"""

from __future__ import annotations

import asyncio
import html
import threading
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np

from clipo_ds.records import Run
from clipo_ds.types import InputError
from clipo_ds.viz.cluster_figures import (
    COLOURS,
    SHAPES,
    Cloud,
    cluster_figure,
    separation_course_figure,
    separation_figure,
    trail_figure,
)
from clipo_ds.viz.frames import RIGHT_BUT_WRONG, Rollouts, as_run, newer, open_rollouts
from clipo_ds.viz.interact import (
    AtRest,
    Plot,
    follow_steps,
    grow_slider,
    in_background,
    notes,
    said,
)
from clipo_ds.viz.plotly_script import plotly_script
from clipo_ds.viz.projections import CENTRES, METHODS, Projection, project, turned_like
from clipo_ds.viz.reading import (
    neighbours,
    rollout_html,
    rollouts_table,
    short,
    siblings,
    suspects_html,
)
from clipo_ds.viz.separation import separation_course, separation_of_step
from clipo_ds.viz.still import View, in_words
from clipo_ds.viz.theme import boxed

ALL_STEPS = "all"
MAX_LISTED = 60  # rollouts of a lasso that are listed
MAX_PROMPT_CHOICES = 400
NUMBERS_AFTER_S = 0.4  # without a further move of the slider, until the numbers of its step are computed
NUM_NEIGHBOURS = 6
HINT = "Click a point to read its reasoning; draw a lasso (toolbar) to list rollouts."


class ClusterExplorer(View):
    """The clusters of a run, with the steps of one in progress as they land.

    Args:
        run: A run, its folder, or None.
        method: The projection to begin with.
        max_points: Rollouts to lay out and show at most; None takes `projections.MAX_POINTS`.
        every_s: Seconds between two looks at a run that is not finished.
    """

    def __init__(
        self,
        run: Run | str | Path | None = None,
        *,
        method: str = "PCA",
        max_points: int | None = None,
        every_s: float = 2.0,
    ) -> None:
        self._max_points = max_points
        self._task: asyncio.Task[None] | None = None
        plotly_script()  # the browser parses it while the run is read
        try:
            self.table = open_rollouts(run)
            self._projection = project(self.table, method, max_points=max_points)
            super().__init__(self._build(method))
            self._task = in_background(self._go_on(every_s), self._message)
            if self._task is None:
                self._show_numbers()
        except InputError as error:
            super().__init__([said(error)])
        self.add_class("clipo-clusters")

    def _build(self, method: str) -> list[widgets.Widget]:
        steps = self.table.steps
        self._scores: dict[int | None, dict] = {}  # by step; None stands for all of them
        self._vectors: np.ndarray | None = None
        self._drawn_round: list[np.ndarray] = []
        self._step = widgets.SelectionSlider(
            options=[*steps, ALL_STEPS], value=steps[-1], description="step", continuous_update=False,
            layout=widgets.Layout(width="420px"),
        )  # fmt: skip
        self._play = widgets.Play(min=0, max=len(steps) - 1, value=len(steps) - 1, interval=700, show_repeat=False)
        self._method = self._dropdown("projection", METHODS, method)
        self._centre = self._dropdown("centre", CENTRES, "none")
        self._colour = self._dropdown("colour", COLOURS, COLOURS[0])
        self._shape = self._dropdown("shape", SHAPES, SHAPES[0])
        self._prompts = self.table.prompts()
        self._prompt = widgets.Combobox(
            options=self._prompt_choices(), description="prompt", placeholder="#number, or words of the prompt",
            continuous_update=False, layout=widgets.Layout(width="420px"),
        )  # fmt: skip
        self._message = widgets.HTML()
        self._cloud = self._draw()
        self.figure = Plot(self._cloud.figure)
        self.panel = widgets.HTML(boxed(f'<span class="quiet">{HINT}</span>'))
        self.numbers: Plot | None = None
        self._showing = threading.Lock()
        # A browser that draws without a graphics card wants the cores for it.
        self._show_numbers_soon = AtRest(self._show_numbers, NUMBERS_AFTER_S)
        self._listen()
        self._play.observe(self._on_play, "value")
        for control in (self._step, self._colour, self._shape, self._prompt):
            control.observe(self._on_look, "value")
        for control in (self._method, self._centre):
            control.observe(self._on_project, "value")
        controls = widgets.VBox(
            [
                widgets.HBox([self._play, self._step, self._prompt]),
                widgets.HBox([self._colour, self._shape, self._method, self._centre]),
            ]
        )
        return [notes(self.table.notes), controls, self._message, self.figure, self.panel]

    @staticmethod
    def _dropdown(name: str, options: tuple[str, ...], value: str) -> widgets.Dropdown:
        return widgets.Dropdown(
            options=options, value=value, description=name, layout=widgets.Layout(width="250px")
        )  # fmt: skip

    def _prompt_choices(self) -> list[str]:
        return [_choice(number, text) for number, text in self._prompts.head(MAX_PROMPT_CHOICES).items()]

    # -- what is drawn

    def _chosen_step(self) -> int | None:
        step = self._step.value
        return None if step == ALL_STEPS else step

    def _draw(self) -> Cloud:
        return cluster_figure(
            self.table, self._projection, step=self._chosen_step(), colour=self._colour.value, shape=self._shape.value,
            prompts=self._chosen_prompts(),
        )  # fmt: skip

    def _chosen_prompts(self) -> list[int] | None:
        wanted = self._prompt.value.strip()
        if not wanted:
            return None
        number = wanted.removeprefix("#").split()[0] if wanted.startswith("#") else ""
        if number.isdigit():
            return [int(number)]
        return self._prompts.index[self._prompts.str.contains(wanted, case=False, regex=False)].tolist()

    async def _go_on(self, every_s: float) -> None:
        """What waits until the picture is drawn: the numbers below it, and the steps to come."""
        await self.figure.drawn()
        self._show_numbers()
        await follow_steps(self.table.run, self.table.steps, self.grow, every_s)

    def _show_numbers(self) -> None:
        step = self._chosen_step()
        if step not in self._scores:
            self._scores[step] = separation_of_step(self.table, step)
        figure = separation_figure(self._scores[step], step)
        # JupyterLab moves the slider in a thread of its own, while `_go_on` computes in this one.
        with self._showing:
            if step != self._chosen_step():
                return
            if self.numbers is None:
                self.numbers = Plot(figure)
                self.children = (*self.children, self.numbers)
            else:
                self.numbers.show_figure(figure)

    def redraw(self) -> None:
        """Draw what the controls say."""
        self._cloud = self._draw()
        if self.figure.show_figure(self._cloud.figure):
            self._listen()

    def _listen(self) -> None:
        for trace in self.figure.data:
            trace.on_click(self._on_click)
            trace.on_selection(self._on_selection)

    # -- what the reader does

    def _on_look(self, change: dict) -> None:
        self.redraw()
        if change["owner"] is self._step:
            self._show_numbers_soon()

    def _on_play(self, change: dict) -> None:
        self._step.value = self.table.steps[change["new"]]

    def _on_project(self, _: dict) -> None:
        self._message.value = boxed('<div class="note">Laying the points out; the first time may take a minute.</div>')
        try:
            self._projection = self._project()
        except InputError as error:
            self._message.value = said(error).value
            return
        self._message.value = ""
        self.redraw()

    def _project(self, *, use_cache: bool = True) -> Projection:
        return project(
            self.table, self._method.value, centre=self._centre.value, max_points=self._max_points, use_cache=use_cache
        )

    def grow(self) -> None:
        """Take in the steps that have landed; a reader who was at the last one is taken along."""
        if self._method.value != "PCA":
            note = f"Steps have landed after step {self.table.steps[-1]}: choose PCA to see them as they come."
            self._message.value = notes((note,)).value
            return
        self.table = newer(self.table.run, self.table)
        self._projection = turned_like(self._project(use_cache=False), self._projection)
        self._scores.pop(None, None)
        self._prompts = self.table.prompts()
        self._prompt.options = self._prompt_choices()
        self._play.max = len(self.table.steps) - 1
        grow_slider(self._step, [*self.table.steps, ALL_STEPS], self._on_look, newest=-2)
        self.redraw()
        self._show_numbers()

    def close(self) -> None:
        """Stop following; the run itself goes on."""
        if self._task is not None:
            self._task.cancel()
            self._show_numbers_soon.cancel()
        super().close()

    def _on_click(self, _trace: Any, points: Any, _: Any) -> None:
        if points.point_inds:
            self.read(int(self._cloud.rows[points.trace_index][points.point_inds[0]]))

    def read(self, row: int) -> None:
        """Show one rollout with its neighbours and siblings in the panel."""
        rows = self._projection.rows
        if self._vectors is None or len(self._vectors) != len(rows):
            self._vectors = self.table.embeddings(rows)
        near = neighbours(self._vectors, rows, row, NUM_NEIGHBOURS)
        kin = siblings(self.table, row)
        parts = [
            rollout_html(self.table, row),
            f"<details open><summary>Nearest in the original space, of {len(rows):,}</summary>",
            rollouts_table(self.table, [other for other, _ in near], [cosine for _, cosine in near]),
            f"</details><details><summary>Its {len(kin)} siblings</summary>{rollouts_table(self.table, kin)}</details>",
        ]
        self.panel.value = boxed("".join(parts))

    def _on_selection(self, _trace: Any, points: Any, _: Any) -> None:
        if points.trace_index == 0:
            self._drawn_round = []  # the first trace is the background, which is not listed
            return
        self._drawn_round.append(self._cloud.rows[points.trace_index][points.point_inds])
        if points.trace_index == len(self.figure.data) - 1:  # every trace is told of its own points, one by one
            chosen = np.concatenate(self._drawn_round)
            if len(chosen):
                self.list_rollouts(chosen)

    def list_rollouts(self, rows: np.ndarray) -> None:
        """Show a table of rollouts in the panel, right answers with a false step first."""
        frame = self.table.frame.loc[rows]
        order = np.argsort((frame["cell"] != RIGHT_BUT_WRONG).to_numpy(), kind="stable")
        shown = rows[order][:MAX_LISTED]
        more = f", {MAX_LISTED} of them shown" if len(rows) > MAX_LISTED else ""
        counts = " · ".join(f"{count} {cell}" for cell, count in frame["cell"].value_counts().items() if count)
        self.panel.value = boxed(
            f"<h4>{len(rows)} selected{more}</h4><div>{html.escape(counts)}</div>{rollouts_table(self.table, shown)}"
        )


@in_words
def separation_view(run: Run | str | Path | None = None) -> widgets.Widget:
    """How far apart right and wrong lie over training, each figure over its shuffled-label band."""
    table = open_rollouts(run)
    return View([notes(table.notes), Plot(separation_course_figure(separation_course(table)))])


@in_words
def trail_view(run: Run | str | Path | None = None, *, method: str = "PCA") -> widgets.Widget:
    """Where one prompt's rollouts went over training; the prompts that came most often stand first."""
    table = open_rollouts(run)
    projection = project(table, method)
    prompts = table.prompts()
    seen = prompts[prompts.index.isin(table.frame["prompt"].iloc[projection.rows])].head(MAX_PROMPT_CHOICES)
    choice = widgets.Dropdown(
        options=[(_choice(number, text), number) for number, text in seen.items()], description="prompt",
        layout=widgets.Layout(width="520px"),
    )  # fmt: skip
    plot = Plot(_trail(table, projection, choice.value, seen))
    choice.observe(lambda change: plot.show_figure(_trail(table, projection, change["new"], seen)), "value")
    often = table.frame.drop_duplicates(["step", "prompt"])["prompt"].value_counts().max()
    hint = () if often > 1 else ("No prompt came twice in this run yet: there is no trail to follow, only places.",)
    return View([notes((*table.notes, *hint)), choice, plot])


@in_words
def suspects_view(run: Run | str | Path | None = None, *, limit: int = 20) -> widgets.Widget:
    """Right answers with a false step, those first that training reinforced most."""
    return View([widgets.HTML(boxed(suspects_html(open_rollouts(as_run(run)), limit)))])


def _trail(table: Rollouts, projection: Projection, prompt: int, texts: Any) -> Any:
    return trail_figure(table, projection, prompt, html.escape(short(texts[prompt], 70, end=True)))


def _choice(number: int, text: str) -> str:
    return f"#{number} {short(text, 60, end=True)}"
