"""How every picture looks: one template, one palette that colour-blind readers can tell apart, one style sheet.

The colours are those of Okabe and Ito (2008). A wrong process has the vermillion that nothing else has: rollouts that a
reader must not miss, false equations, and curves of them.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#333333"
GREY, PALE, INK, GRID = "#8A9099", "#D3D7DD", "#2B2F36", "#E8EAED"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, GREY)
"""Colours of arms, prompt groups and other things without an order, in the order in which they are used."""

SEQUENTIAL = "Cividis"
"""From low to high, readable with any colour vision and in grey."""

SYMBOLS = ("circle", "x", "diamond", "square", "triangle-up", "cross")

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "showSendToCloud": False,  # plotly's "Share chart" would upload the data
    "plotlyServerURL": "",
    "responsive": True,
    "scrollZoom": True,
}

AXIS = {
    "gridcolor": GRID, "linecolor": GREY, "zeroline": False, "ticks": "outside", "tickcolor": GREY,
    "title": {"font": {"size": 13}, "standoff": 8},
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12.5, "color": INK},
        "title": {
            "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 10}, "font": {"size": 16},
            "subtitle": {"font": {"size": 12}},
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": list(SERIES),
        "margin": {"l": 64, "r": 24, "t": 96, "b": 84},
        "hoverlabel": {"bgcolor": "white", "bordercolor": GREY, "font": {"size": 12, "color": INK}, "align": "left"},
        "legend": {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0},
        "xaxis": AXIS,
        "yaxis": AXIS,
        "coloraxis": {"colorscale": SEQUENTIAL},
    }
)  # fmt: skip

STYLE = f"""<style>
.clipo {{font: 13px/1.45 {FONT}; color: {INK}}}
.clipo h4 {{margin: 10px 0 4px; font-size: 13px}}
.clipo pre {{white-space: pre-wrap; overflow-wrap: anywhere; background: #F7F8F9; color: {INK};
  border: 1px solid {GRID}; border-radius: 4px; padding: 8px 10px; margin: 4px 0; max-height: 320px; overflow-y: auto;
  font-size: 12.5px}}
.clipo mark {{background: #FBE3D5; color: inherit; border-bottom: 2px solid {VERMILLION}}}
.clipo .why {{color: {VERMILLION}; font-weight: 600}}
.clipo .quiet {{color: #5B616A}}
.clipo .note {{background: #FFF8E5; border-left: 4px solid {ORANGE}; padding: 6px 10px; margin: 6px 0}}
.clipo .error {{background: #FBE9E1; border-left: 4px solid {VERMILLION}; padding: 6px 10px; margin: 6px 0}}
.clipo .badge {{display: inline-block; border-radius: 4px; padding: 1px 8px; color: white; font-weight: 600}}
.clipo table {{border-collapse: collapse; font-size: 12.5px}}
.clipo th, .clipo td {{padding: 3px 10px; text-align: right; border-bottom: 1px solid {GRID}; vertical-align: top}}
.clipo th {{border-bottom: 1px solid {GREY}}}
.clipo td.text, .clipo th.text {{text-align: left; overflow-wrap: anywhere}}
.clipo td.text {{font-family: ui-monospace, monospace}}
</style>"""
"""Once before each piece of HTML: a notebook shows every output in a place of its own."""


def titled(figure: go.Figure, title: str, subtitle: str = "", **layout: Any) -> go.Figure:
    """Give a figure the theme, a title that says what is seen and a line on how it was made."""
    return figure.update_layout(template=TEMPLATE, title={"text": title, "subtitle": {"text": subtitle}}, **layout)


def empty_figure(sentence: str) -> go.Figure:
    """A figure with nothing but the reason why there is nothing."""
    figure = go.Figure()
    figure.add_annotation(text=sentence, showarrow=False, font={"size": 14}, x=0.5, y=0.5, xref="paper", yref="paper")
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return titled(figure, "", height=260)


def boxed(inner: str) -> str:
    """HTML of this package's, with its style sheet."""
    return f'{STYLE}<div class="clipo">{inner}</div>'
