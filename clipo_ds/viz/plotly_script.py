"""plotly's script for the browser: sent once a kernel, packed, in a form that a browser reads once and not three times.

FigureWidget brings the script with every figure (plot.js says what that costs). Here one widget has it, and the figures
of the kernel share it.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import anywidget
import plotly.graph_objects as go
import traitlets

# The function that holds plotly.js, in the two that wrap it: where each begins, and where both end.
OPENING = re.compile(
    r"""(?P<outer>\([\w$]+,[\w$]+\)=>\{\(function\([\w$]+,(?P<factory>[\w$]+)\)\{[^{}]*?(?P=factory)\(\)\}\)"""
    r"""\([^{}]*?,)(?P<inner>\(\)=>\{"use strict";)"""
)
ENDING = re.compile(r"(?P<inner>return window\.Plotly=[\w$]+,[\w$]+\})(?P<outer>\)\})(?=\))")


class _ImportedLater(ModuleType):
    """Stands for a module in one place, and imports it when it is asked for something there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def figure_widget() -> type[go.FigureWidget]:
    """plotly's FigureWidget, imported without nbformat.

    plotly imports nbformat for the sake of its version, which `Figure.show` asks for. nbformat needs jsonschema, and
    that, where rfc3987_syntax is installed (it comes with JupyterLab), builds a grammar for more than a second. So
    plotly gets a stand-in, and `import nbformat` elsewhere imports nbformat, before and after.
    """
    if "nbformat" in sys.modules or importlib.util.find_spec("nbformat") is None:
        return go.FigureWidget
    sys.modules["nbformat"] = _ImportedLater("nbformat")
    try:
        return go.FigureWidget  # this is when plotly imports it
    finally:
        del sys.modules["nbformat"]


class PlotlyScript(anywidget.AnyWidget):
    """plotly's script, which all figures of a kernel share: 5 MB of text, 1.7 MB as it is sent."""

    _esm = Path(__file__).with_name("plotly_script.js")
    gzipped = traitlets.Bytes().tag(sync=True)


@functools.cache
def plotly_script() -> PlotlyScript:
    """The kernel's one script, sent where this is called first: before a view that takes long to read its run."""
    script = compiled_at_once(str(figure_widget()._esm))
    return PlotlyScript(gzipped=gzip.compress(script.encode(), compresslevel=1))


def compiled_at_once(script: str) -> str:
    """The same script, with the functions round plotly.js in parentheses.

    A browser reads a function's text once to find its end, and again when it is called, so that plotly.js, inside two
    functions, is read three times. A parenthesis before a function tells V8 that the call follows: it then compiles
    the function as it comes to it (https://v8.dev/blog/preparser#pife), which takes half a second less. A script of
    another form is left as it is.
    """
    openings, endings = list(OPENING.finditer(script)), list(ENDING.finditer(script))
    if (len(openings), len(endings)) != (1, 1) or openings[0].end() > endings[0].start():
        return script
    opening, ending = openings[0], endings[0]
    before, between, after = script[: opening.start()], script[opening.end() : ending.start()], script[ending.end() :]
    return f"{before}({opening['outer']}({opening['inner']}{between}{ending['inner']}){ending['outer']}){after}"
