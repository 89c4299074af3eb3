"""What a view leaves in its notebook for when the kernel has gone: its texts, its figures as pictures, and what to do.

A widget lives in its kernel. After a restart its controls answer no more, and a page that is loaded anew says only that
no model was found. So beside every view stands a second output, hidden as long as the view is there, which JupyterLab
saves with the notebook; and a view whose kernel has gone says so in a line above itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import ipywidgets as widgets
from IPython.display import HTML, DisplayHandle, display

from clipo_ds.types import InputError
from clipo_ds.viz.interact import AtRest, Plot, said
from clipo_ds.viz.theme import boxed

P = ParamSpec("P")

REST_S = 1.0  # without a further change, until what is left is brought up to date
GONE = "The kernel behind this view has gone: run the notebook's cells again to have its controls back."

# A page that is loaded anew has its live views within seconds, where their kernel still runs: hence the delay. Of
# JupyterLab's own are the box of a cell's outputs (`jp-OutputArea`), the place of a widget, which then says only that
# its model was not found (`jupyter-widgets`), and the mark of a broken link at a widget without its kernel.
_STYLE = f"""<style>
.clipo-still {{display: none}}
.jp-OutputArea:has(.clipo-still):not(:has(.clipo-view)) .clipo-still
  {{display: block; max-height: 0; overflow: hidden; animation: clipo-still 0s 4s forwards}}
@keyframes clipo-still {{to {{max-height: none}}}}
.jp-OutputArea:has(.clipo-still):not(:has(.clipo-view)) .jupyter-widgets {{display: none}}
.clipo-view .jupyter-widgets-disconnected::before {{display: none}}
.clipo-view.jupyter-widgets-disconnected::before
  {{content: "{GONE}"; display: block; align-self: stretch; font: 13px/1.45 sans-serif; color: #1F2328;
    background: #FFF8E5; border-left: 4px solid #E69F00; padding: 6px 10px; margin: 6px 0}}
.clipo-still img {{max-width: 100%}}
</style>"""


class View(widgets.VBox):
    """A column of widgets that outlives its kernel as a picture."""

    def __init__(self, children: Sequence[widgets.Widget] = ()) -> None:
        self._left: DisplayHandle | None = None
        self._leave_soon = AtRest(self._leave, REST_S)
        super().__init__(children)
        self.add_class("clipo-view")
        self._listen_to_children()
        self.observe(self._listen_to_children, "children")

    def _ipython_display_(self) -> None:
        self._left = display(HTML(self._still()), display_id=True)
        display(self._repr_mimebundle_(), raw=True)

    def _listen_to_children(self, _: Any = None) -> None:
        for part in _parts(self):
            part.observe(self._on_change, "picture" if isinstance(part, Plot) else "value")

    def _on_change(self, _: Any) -> None:
        self._leave_soon()

    def _leave(self) -> None:
        if self._left is not None:
            self._left.update(HTML(self._still()))

    def _still(self) -> str:
        inner = "".join(_as_html(part) for part in _parts(self))
        return f'{_STYLE}<div class="clipo-still">{boxed(f"<div class=note>{GONE}</div>")}{inner}</div>'


def in_words(view: Callable[P, widgets.Widget]) -> Callable[P, widgets.Widget]:
    """A function that makes a view, made to say what is wrong with its input instead of raising it."""

    @functools.wraps(view)
    def careful(*args: P.args, **kwargs: P.kwargs) -> widgets.Widget:
        try:
            return view(*args, **kwargs)
        except InputError as error:
            return View([said(error)])

    return careful


def _parts(widget: widgets.Widget) -> list[Plot | widgets.HTML]:
    """The figures and texts of a view in reading order; its controls say nothing without a kernel."""
    if isinstance(widget, Plot | widgets.HTML):
        return [widget]
    return [part for child in getattr(widget, "children", ()) for part in _parts(child)]


def _as_html(part: Plot | widgets.HTML) -> str:
    if isinstance(part, widgets.HTML):
        return part.value
    return f'<img src="{part.picture}">' if part.picture else ""
