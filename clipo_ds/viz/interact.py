"""What the views have in common: figures that survive a reload, errors in words, tasks beside the kernel's other work.

plotly's FigureWidget sends changes only, and inside a box nobody refreshes the state that a reloaded page (or Voila)
starts from. So `Plot` is made with its first figure, and after a change it brings that state up to date.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import time
from collections.abc import Callable, Coroutine, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import traitlets

from clipo_ds.records import Run
from clipo_ds.viz.frames import RunState, run_state
from clipo_ds.viz.plotly_script import PlotlyScript, figure_widget, plotly_script
from clipo_ds.viz.theme import CONFIG, boxed

SETTLE_S = 0.25  # without a further change, until the state for reloads is refreshed
MAX_DRAWING_S = 5.0  # longest wait for a browser to draw a figure: there may be no browser
MAX_WAIT_S = 10.0  # between two looks at a run that is followed
FIXED = ("uid", "type")  # of a trace
# Dark enough for white letters.
STATE_COLOURS = {
    "starting": "#5F6B7A", "running": "#0072B2", "stopping": "#A65300", "finished": "#00745A", "stopped": "#A65300",
    "failed": "#B3261E", "stale": "#A65300",
}  # fmt: skip


class AtRest:
    """Calls an action once nobody has asked for it for `after_s` seconds; at once where no event loop runs."""

    def __init__(self, action: Callable[[], None], after_s: float) -> None:
        self._action, self._after_s = action, after_s
        self._waiting: asyncio.TimerHandle | None = None

    def __call__(self) -> None:
        self.cancel()
        try:
            self._waiting = asyncio.get_running_loop().call_later(self._after_s, self._action)
        except RuntimeError:
            self._action()

    def cancel(self) -> None:
        """Forget that it was asked for."""
        if self._waiting is not None:
            self._waiting.cancel()


class Plot(figure_widget()):
    """A FigureWidget that takes whole figures, sends what differs, and can be reloaded."""

    _esm = Path(__file__).with_name("plot.js")
    # So that the figure's state is never taken anywhere without it.
    _script = traitlets.Instance(PlotlyScript).tag(sync=True, **widgets.widget_serialization)
    _drawn = traitlets.Bool(False).tag(sync=True)  # said by the browser
    picture = traitlets.Unicode("")  # what the browser drew last and left at rest, as a data URL

    def __init__(self, figure: go.Figure) -> None:
        self._script = plotly_script()
        super().__init__(figure)
        self._config = {**self._config, **CONFIG}
        self._given = figure.layout.to_plotly_json()
        self._settle = AtRest(self.refresh_stored_state, SETTLE_S)
        self.on_msg(self._on_picture)

    def _on_picture(self, _: object, content: dict[str, Any], __: object) -> None:
        if isinstance(content, dict) and "picture" in content:
            self.picture = content["picture"]

    async def drawn(self) -> None:
        """Wait until a browser has drawn the figure, for MAX_DRAWING_S at most."""
        loop, enough = asyncio.get_running_loop(), asyncio.Event()

        def on_drawn(change: object) -> None:
            loop.call_soon_threadsafe(enough.set)  # JupyterLab's messages to widgets come in a thread of their own

        self.observe(on_drawn, "_drawn")
        try:
            if not self._drawn:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(enough.wait(), MAX_DRAWING_S)
        finally:
            self.unobserve(on_drawn, "_drawn")

    def show_figure(self, figure: go.Figure) -> bool:
        """Become `figure`: in place where its traces are of the same kinds, else with new traces.

        Of the layout only what differs from the last figure is touched, so that a reader's zoom stays.

        Returns whether the traces are new ones, which know of no callbacks yet.
        """
        layout = figure.layout.to_plotly_json()
        changes = {key: value for key, value in layout.items() if value != self._given.get(key)}
        changes |= {key: None for key in self._given if key not in layout}
        self._given = layout
        same = [trace.type for trace in figure.data] == [trace.type for trace in self.data]
        with self.batch_update():
            if same:
                for old, new in zip(self.data, figure.data, strict=True):
                    gone = {key: None for key in old._props if key not in new._props}
                    old.update({key: v for key, v in (gone | new._props).items() if key not in FIXED}, overwrite=True)
            self.update_layout(changes, overwrite=True)
        if not same:
            self.data = []
            self.add_traces(figure.data)
        self._settle()
        return not same

    def refresh_stored_state(self) -> None:
        """Store data and layout as they stand; the browser keeps them and draws nothing."""
        self._widget_layout = deepcopy(self._layout_obj._props)
        self._widget_data = deepcopy(self._data)


def said(error: Exception) -> widgets.HTML:
    """What is wrong with the input, as a sentence in the notebook."""
    return widgets.HTML(boxed(f'<div class="error">{html.escape(str(error))}</div>'))


def notes(sentences: tuple[str, ...]) -> widgets.HTML:
    """What was left out, if anything was."""
    lines = "".join(f'<div class="note">{html.escape(sentence)}</div>' for sentence in sentences)
    return widgets.HTML(boxed(lines) if lines else "")


def badge(state: str) -> str:
    """The state of a run as a coloured label, HTML to be boxed."""
    return f'<span class="badge" style="background:{STATE_COLOURS[state]}">{html.escape(state)}</span>'


def state_badge(state: RunState) -> str:
    """Where the run stands, as HTML."""
    where = [f"step {state.step} of {state.num_steps}"] + ([silence(state.silent_s)] if state.word == "stale" else [])
    return boxed(f"{badge(state.word)} {' · '.join(where)}")


def silence(seconds: float) -> str:
    """What a run may be doing that has written nothing for so long."""
    return f"nothing new for {duration(seconds)}: it may be evaluating, or dead"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


async def follow_steps(run: Run, seen: list[int], grow: Callable[[], None], every_s: float) -> None:
    """Call `grow` when a run has other steps than `seen`, until it is finished.

    It takes a tenth of the time at most, so that the reader and the run itself get on, unless that would leave the
    picture behind for longer than MAX_WAIT_S.
    """
    cost_s = 0.0
    while True:
        is_over = run_state(run).word == "finished"  # asked first: by then its last step is on disk
        steps = run.rollout_steps()
        if steps != seen:
            began = time.monotonic()
            grow()
            seen, cost_s = steps, time.monotonic() - began
        if is_over:
            return
        await asyncio.sleep(max(every_s, min(9 * cost_s, MAX_WAIT_S)))


def grow_slider(
    slider: widgets.SelectionSlider,
    options: Sequence[Any],
    on_value: Callable[[dict[str, Any]], None],
    *,
    newest: int | None = None,
) -> None:
    """Give a slider more options without telling `on_value`, which listens to it; what was chosen stays chosen.

    With `newest`, the place of the newest step among the options, a reader who was there is taken along.
    """
    chosen = slider.value
    if newest is not None and chosen == slider.options[newest]:
        chosen = options[newest]
    slider.unobserve(on_value, "value")
    slider.options = list(options)
    slider.value = chosen if chosen in options else options[-1]
    slider.observe(on_value, "value")


def in_background(work: Coroutine[Any, Any, None], tell: widgets.HTML) -> asyncio.Task[None] | None:
    """Run `work` in the kernel's event loop, what goes wrong in it told by `tell`; None where no loop runs."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        work.close()
        return None

    def on_end(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            tell.value = said(RuntimeError(f"This view follows the run no longer: {error}")).value

    task = loop.create_task(work)
    task.add_done_callback(on_end)
    return task
