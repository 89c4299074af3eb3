"""A run as one HTML file that opens anywhere: plotly's script is inside, nothing is fetched.

The pictures are those of the notebooks. `write_pictures` makes PNGs of them, for a README, through kaleido, which needs
a Chromium.
"""

from __future__ import annotations

import html
import os
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from clipo_ds.records import Run
from clipo_ds.types import InputError
from clipo_ds.viz.cluster_figures import cluster_figure, separation_course_figure, separation_figure
from clipo_ds.viz.dynamics_figures import (
    advantage_figure,
    contrastive_figure,
    decomposition_figure,
    learning_figure,
    reward_distribution_figure,
    similarity_figure,
    telling_groups,
)
from clipo_ds.viz.frames import RIGHT_BUT_WRONG, Rollouts, as_run, metrics_frame, open_rollouts, run_state
from clipo_ds.viz.projections import project
from clipo_ds.viz.reading import suspects_html
from clipo_ds.viz.separation import separation_course, separation_of_step
from clipo_ds.viz.theme import CONFIG, boxed

MAX_REPORT_POINTS = 6_000  # 1 MB of HTML
NUM_SUSPECTS = 20
PICTURE_WIDTH = 1100
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{max-width: 1180px; margin: 24px auto; padding: 0 16px; font-family: system-ui, sans-serif; color: #2B2F36}}
h1 {{font-size: 22px}} h2 {{font-size: 17px; margin-top: 36px; border-bottom: 1px solid #E8EAED}}</style>
<script>{script}</script></head><body>{body}</body></html>
"""
SECTIONS = {
    "Learning": ("learning",),
    "Clusters of the embeddings": ("clusters_first", "clusters_last", "clusters_all"),
    "Separation, beside shuffled labels": ("separation", "separation_course"),
    "The contrastive term": ("contrastive", "reward_distribution", "decomposition"),
    "One group": ("similarity", "advantage"),
}


def report_figures(run: Run) -> tuple[dict[str, go.Figure], list[str]]:
    """The figures of a report by name, and sentences on those that cannot be drawn.

    Raises:
        InputError: The run has no rollouts.
    """
    table = open_rollouts(run)
    metrics = metrics_frame(run)
    figures = {
        "learning": learning_figure(metrics),
        "contrastive": contrastive_figure(metrics),
        "reward_distribution": reward_distribution_figure(table),
        "decomposition": decomposition_figure(table),
    }
    sentences = list(table.notes)
    try:
        figures |= _embedding_figures(table)
    except InputError as error:
        sentences.append(str(error))
    step, group = telling_step_and_group(table)
    figures["advantage"] = advantage_figure(table, step, group)
    return figures, sentences


def telling_step_and_group(table: Rollouts) -> tuple[int, int]:
    """The latest group with a right answer that has a false step, or else the first of the last step."""
    found = table.frame[table.frame["cell"] == RIGHT_BUT_WRONG]
    step = int(found["step"].iloc[-1]) if len(found) else table.steps[-1]
    return step, telling_groups(table, step)[0]


def write_report(run: Run | str | Path, path: str | Path) -> Path:
    """Write a run's report; returns where it is.

    Args:
        run: A run or its folder.
        path: The HTML file, which is replaced.

    Raises:
        InputError: There is no such run, it has no rollouts, or the file's folder is not there.
    """
    run, path = as_run(run), Path(path)
    if not path.absolute().parent.is_dir():
        raise InputError(f"`out` must be a file in a folder that is there, got '{path}'")
    figures, sentences = report_figures(run)
    state = run_state(run)
    title = f"{run.path.resolve().name}: step {state.step} of {state.num_steps}"
    body = [f"<h1>{html.escape(title)}</h1>", boxed(_facts(run))]
    body.append(boxed("".join(f'<div class="note">{html.escape(sentence)}</div>' for sentence in sentences)))
    for heading, names in SECTIONS.items():
        drawn = [figures[name] for name in names if name in figures]
        if drawn:
            body.append(f"<h2>{html.escape(heading)}</h2>")
            body += [pio.to_html(figure, full_html=False, include_plotlyjs=False, config=CONFIG) for figure in drawn]
    body.append("<h2>Right answers with a false step, those first that training reinforced most</h2>")
    body.append(boxed(suspects_html(open_rollouts(run), NUM_SUSPECTS)))
    page = PAGE.format(title=html.escape(title), script=_plotly_script(), body="\n".join(body))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def write_pictures(run: Run | str | Path, folder: str | Path, *, scale: float = 2.0) -> list[Path]:
    """Write the report's figures as PNGs, `scale` pixels for one; returns their files.

    Raises:
        InputError: As `write_report`, or kaleido finds no Chromium.
    """
    figures, _ = report_figures(as_run(run))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png" for name in figures]
    sizes = [
        {"width": figure.layout.width or PICTURE_WIDTH, "height": figure.layout.height} for figure in figures.values()
    ]
    try:
        pio.write_images(
            list(figures.values()), files, width=[size["width"] for size in sizes],
            height=[size["height"] for size in sizes], scale=scale,
        )  # fmt: skip
    except (RuntimeError, ValueError, ImportError) as error:
        raise InputError(f"`--png` needs kaleido and a Chromium: {error}") from error
    return files


def _embedding_figures(table: Rollouts) -> dict[str, go.Figure]:
    projection = project(table, max_points=MAX_REPORT_POINTS)
    first, last = table.steps[0], table.steps[-1]
    step, group = telling_step_and_group(table)
    return {
        "clusters_first": cluster_figure(table, projection, step=first).figure,
        "clusters_last": cluster_figure(table, projection, step=last).figure,
        "clusters_all": cluster_figure(table, projection).figure,
        "separation": separation_figure(separation_of_step(table, last), last),
        "separation_course": separation_course_figure(separation_course(table)),
        "similarity": similarity_figure(table, step, group),
    }


def _plotly_script() -> str:
    """plotly.js, which must not end the script element that it stands in."""
    return get_plotlyjs().replace("</script", "<\\/script")


def _facts(run: Run) -> str:
    config = run.config
    contrastive = config.get("contrastive")
    facts = {
        "folder": str(run.path.resolve()),
        "model": (config.get("model") or {}).get("path"),
        "objective": (config.get("objective") or {}).get("name"),
        "contrastive term": "none"
        if contrastive is None
        else ", ".join(
            f"{key} {contrastive.get(key)}" for key in ("loss", "level", "denominator", "temperature", "weight")
        ),
        "seed": config.get("seed"),
        "commit": run.environment.get("commit"),
    }
    items = (f"<div><b>{html.escape(name)}</b> {html.escape(str(value))}</div>" for name, value in facts.items())
    return "".join(items)
