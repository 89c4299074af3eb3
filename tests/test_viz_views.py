"""Figures, views and report on a written run: what they say, and that bad input becomes a sentence."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import pytest
from written_run import FALSE_STEP, tear_newest, write_comparison, write_run

from clipo_ds.viz.cluster_figures import COLOURS, SHAPES, cluster_figure, trail_figure
from clipo_ds.viz.cluster_view import ClusterExplorer, separation_view, suspects_view, trail_view
from clipo_ds.viz.compare_view import CompareView
from clipo_ds.viz.dynamics_figures import advantage_figure, group_advantages, similarity_figure, telling_groups
from clipo_ds.viz.dynamics_view import DynamicsView, GroupView
from clipo_ds.viz.frames import RIGHT_BUT_WRONG, open_rollouts
from clipo_ds.viz.interact import Plot
from clipo_ds.viz.plotly_script import compiled_at_once, figure_widget, plotly_script
from clipo_ds.viz.projections import project

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("viz") / "run")


def click(plot: Plot, trace: int, point: int, x: object = 0.0, y: object = 0.0) -> None:
    """What the browser sends when a point is clicked."""
    points = {"xs": [x], "ys": [y], "point_indexes": [point], "trace_indexes": [trace]}
    plot._js2py_pointsCallback = {"event_type": "plotly_click", "points": points}


def html_of(widget: widgets.Widget) -> str:
    """All HTML in a widget and its children."""
    own = widget.value if isinstance(widget, widgets.HTML) else ""
    return own + "".join(html_of(child) for child in getattr(widget, "children", ()))


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_point_of_a_step_is_in_one_trace_whatever_the_colours_say(run, colour, shape):
    table = open_rollouts(run)
    cloud = cluster_figure(table, project(table), step=2, colour=colour, shape=shape)
    assert len(cloud.rows) == len(cloud.figure.data)
    shown = np.concatenate(cloud.rows[1:])
    assert sorted(shown) == table.rows_of(2).tolist()
    for trace, rows in zip(cloud.figure.data[1:], cloud.rows[1:], strict=True):
        if len(rows):
            assert trace.x.dtype == np.float32
            assert trace.customdata.tolist() == rows.tolist()


def test_the_title_says_what_is_seen_and_no_trace_holds_a_text(run):
    table = open_rollouts(run)
    figure = cluster_figure(table, project(table), step=2).figure
    assert figure.layout.title.text == "Step 2: 12 right answers of 24, 4 of them with a false step"
    assert figure.layout.title.subtitle.text.startswith("PCA of 72 of 72 rollouts")
    assert FALSE_STEP not in figure.to_json()
    assert figure.data[-1].name == f"{RIGHT_BUT_WRONG} (4)"


def test_the_axes_do_not_move_with_the_steps(run):
    table = open_rollouts(run)
    projection = project(table)
    ranges = {cluster_figure(table, projection, step=step).figure.layout.xaxis.range for step in (1, 2, 3, None)}
    assert len(ranges) == 1


def test_a_trail_has_a_mean_a_step(run):
    table = open_rollouts(run)
    figure = trail_figure(table, project(table), 101)
    assert [list(trace.text) for trace in figure.data if trace.name == "mean of right answers"] == [["1", "2", "3"]]
    assert figure.layout.title.text.startswith("Prompt #101 in 3 steps: right answers 50% at step 1")


def test_the_matrix_has_right_answers_first_and_ones_on_its_diagonal(run):
    table = open_rollouts(run)
    matrix = similarity_figure(table, 3, 1).data[0]
    assert np.diag(np.array(matrix.z)) == pytest.approx(1, abs=2e-3)
    assert list(matrix.x) == ["1 ✓✓", "2 ✓✓", "3 ✓✗", "4 ✗✗", "5 ✗✗", "6 ✗✗"]


def test_advantages_without_the_term_are_those_of_the_outcome_alone(run):
    figure = advantage_figure(open_rollouts(run), 1, 0)
    # Three right, three wrong: mean 0.5, standard deviation sqrt(6 * 0.25 / 5) = 0.5477; 0.5 / 0.5477 = 0.9129.
    assert figure.data[0].y.tolist() == pytest.approx([0.9129] * 3 + [-0.9129] * 3, abs=1e-3)
    assert group_advantages(np.array([2.0]), "std").tolist() == [2.0]
    assert group_advantages(np.array([0.3, 0.3, 0.3]), "std").tolist() == [0, 0, 0]


def test_groups_with_a_false_step_among_right_answers_come_first(run):
    table = open_rollouts(run)
    table.frame.loc[table.rows_of(1, 0), "cell"] = "right answer, right process"
    assert telling_groups(table, 1) == [1, 2, 3, 0]


# -- plots that survive a reload ---------------------------------------------------------------------------------------


def test_a_plot_stores_what_it_shows_and_has_no_share_button():
    plot = Plot(go.Figure(go.Scatter(x=[1], y=[2], text=["a"]), {"title": {"text": "one"}}))
    assert plot._config["showSendToCloud"] is False
    assert not plot.show_figure(go.Figure(go.Scatter(x=[3], y=[4]), {"title": {"text": "two"}}))
    assert list(plot._widget_data[0]["x"]) == [3]
    assert "text" not in {key for key, value in plot._widget_data[0].items() if value is not None}
    assert plot._widget_layout["title"]["text"] == "two"
    assert plot.show_figure(go.Figure([go.Scatter(x=[5], y=[6]), go.Bar(x=[1], y=[1])]))
    assert [trace["type"] for trace in plot._widget_data] == ["scatter", "bar"]
    assert plot.layout.title.text is None


def test_a_readers_zoom_stays_when_the_data_change():
    plot = Plot(go.Figure(go.Scatter(x=[1], y=[2]), {"xaxis": {"range": [0, 10]}}))
    plot.layout.xaxis.range = [4, 5]
    plot.show_figure(go.Figure(go.Scatter(x=[3], y=[4]), {"xaxis": {"range": [0, 10]}}))
    assert plot.layout.xaxis.range == (4, 5)


# -- views -------------------------------------------------------------------------------------------------------------


def test_the_explorer_moves_reads_and_lists(run):
    view = ClusterExplorer(run)
    assert view.figure.layout.title.text.startswith("Step 3: 12 right answers of 24")
    view._step.value = 1
    assert view.figure.layout.title.text.startswith("Step 1:")
    last = len(view.figure.data) - 1
    click(view.figure, last, 2)
    row = view._cloud.rows[last][2]
    assert f"Rollout {row} " in view.panel.value
    assert "<mark" in view.panel.value
    points = {"xs": [0.0] * 3, "ys": [0.0] * 3, "point_indexes": [0, 1, 5], "trace_indexes": [last, last, 0]}
    view.figure._js2py_pointsCallback = {"event_type": "plotly_selected", "points": points}
    assert "2 selected" in view.panel.value


def test_the_clusters_are_laid_out_and_shown_without_scikit_learn(run):
    code = (
        "import sys; from clipo_ds.viz.cluster_view import cluster_figure, open_rollouts, project\n"
        f"table = open_rollouts({str(run)!r}); cluster_figure(table, project(table, use_cache=False))\n"
        "assert not {'sklearn', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


def test_the_explorer_still_hears_clicks_after_its_traces_were_replaced(run):
    view = ClusterExplorer(run)
    view._colour.value = "contrastive reward"
    view._step.value = "all"
    click(view.figure, 1, 70)
    assert "Rollout 70 " in view.panel.value


@pytest.mark.parametrize(("wanted", "count"), [("#101", 6), ("problem 2", 6), ("2+2", 24), ("no such words", 0)])
def test_the_explorer_filters_by_prompt(run, wanted, count):
    view = ClusterExplorer(run)
    view._prompt.value = wanted
    assert sum(map(len, view._cloud.rows[1:])) == count


def test_a_projection_that_cannot_be_made_leaves_the_picture_and_says_why(run, monkeypatch):
    view = ClusterExplorer(run)
    title = view.figure.layout.title.text
    monkeypatch.setitem(sys.modules, "umap", None)
    view._method.value = "UMAP"
    assert "pip install umap-learn" in view._message.value
    assert view.figure.layout.title.text == title


def test_the_group_view_shows_the_two_texts_behind_a_cell(run):
    view = GroupView(run)
    click(view.similarity, 0, 0, x="3 ✓✗", y="1 ✓✓")
    assert view.panel.value.count("<h4>Rollout") == 2
    view._step.value = 1
    assert view.similarity.layout.title.text.startswith("Group 0 of step 1")


def test_the_comparison_shows_arms_and_problems(tmp_path):
    write_run(tmp_path / "grpo", config={"contrastive": None})
    write_run(tmp_path / "clipo", only_right=True)
    view = CompareView(tmp_path)
    assert view.histogram.layout.title.text == "grpo+clipo answers 8 problems better than grpo and 0 worse, of 8"
    assert "problem 0 &lt;b&gt;" in view.problems.value
    assert "None of these runs has been evaluated" in view.table.value


def test_the_differences_name_the_arms_that_are_drawn_and_no_other(tmp_path):
    view = CompareView(write_comparison(tmp_path))
    assert view.curves.layout.title.text == "Right answers in the last step: grpo 50%, grpo+clipo 83%"
    assert view.histogram.layout.title.subtitle.text == "problems of longer_sums, sums, last evaluation, paired by seed"
    assert "longer_sums problem" in view.problems.value
    assert view.differences.layout.yaxis.ticktext == ("grpo+clipo",)
    assert [trace.y.tolist() for trace in view.differences.data[:2]] == [[0.125], [-0.125]]  # two test sets, apart
    view._baseline.value, view._arm.value = "grpo+clipo", "grpo"
    assert view.differences.layout.yaxis.ticktext == ("grpo",)
    assert view.differences.layout.title.text == "4 of 4 differences exceed their 95% interval"


@pytest.mark.parametrize(
    "view", [ClusterExplorer, DynamicsView, GroupView, CompareView, separation_view, trail_view, suspects_view]
)
def test_a_run_that_is_not_there_is_a_sentence_in_the_notebook(view, tmp_path):
    assert "must be a run folder" in html_of(view(tmp_path / "nowhere"))


def test_a_run_without_embeddings_is_a_sentence_where_they_are_needed(tmp_path):
    run = write_run(tmp_path / "run", embeddings=False)
    for view in (ClusterExplorer, GroupView, separation_view, trail_view):
        assert "must have embeddings" in html_of(view(run))
    assert "finished" in html_of(DynamicsView(run))
    assert "have a false step" in html_of(suspects_view(run))


@pytest.mark.parametrize("view", [ClusterExplorer, GroupView, separation_view, trail_view, suspects_view, DynamicsView])
@pytest.mark.parametrize(
    "shape",
    [{"only_right": True}, {"steps": 1, "groups": 1, "group_size": 3}, {"steps": 1, "groups": 1, "group_size": 1}],
    ids=["one class", "three points", "one point"],
)
def test_one_class_and_a_few_points_are_shown(view, shape, tmp_path):
    shown = view(write_run(tmp_path / "run", **shape))
    assert 'class="error"' not in html_of(shown)


def test_a_torn_last_step_is_told_in_every_view(tmp_path):
    run = write_run(tmp_path / "run")
    tear_newest(run)
    for view in (ClusterExplorer, GroupView, separation_view, trail_view, DynamicsView):
        assert "Step 3 is left out" in html_of(view(run))


# -- report ------------------------------------------------------------------------------------------------------------


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_report_is_one_file_that_fetches_nothing(run, tmp_path):
    done = report(run, tmp_path / "out.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "12 of 36 right answers have a false step" in page
    assert page.count('class="plotly-graph-div"') == 11
    assert list(tmp_path.iterdir()) == [tmp_path / "out.html"]


def test_the_report_of_a_run_without_embeddings_says_what_is_missing(tmp_path):
    run = write_run(tmp_path / "run", embeddings=False)
    assert report(run, tmp_path / "out.html").returncode == 0
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "must have embeddings" in page
    assert page.count('class="plotly-graph-div"') == 5


def test_the_report_refuses_bad_arguments_in_one_line(run, tmp_path):
    done = report(tmp_path / "nowhere", tmp_path / "out.html")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: `run` must be a run folder")
    assert report(run, tmp_path / "no" / "out.html").returncode == 2


# -- imports -----------------------------------------------------------------------------------------------------------


def test_plotlys_script_is_sent_with_its_two_outer_functions_in_parentheses_and_nothing_else_changed():
    script, sent = str(figure_widget()._esm), gzip.decompress(plotly_script().gzipped).decode()
    assert sent == compiled_at_once(script)
    assert [sent.count(letter) - script.count(letter) for letter in "()"] == [2, 2]
    without = str.maketrans("", "", "()")
    assert sent.translate(without) == script.translate(without)


def test_a_script_of_another_form_is_sent_as_it_is():
    begin, end = '=f((D,h)=>{(function(Q,n){h=n()})(D,()=>{"use strict";', "return window.Plotly=Q,Q})});"
    parenthesised = '=f(((D,h)=>{(function(Q,n){h=n()})(D,(()=>{"use strict";' + "return window.Plotly=Q,Q}))}));"
    assert compiled_at_once(begin + end) == parenthesised
    for other in ("export default 1;", begin, end, end + begin, begin + end + end, begin + begin + end):
        assert compiled_at_once(other) == other


def test_the_clusters_are_imported_without_nbformat_and_other_figures_are_shown_all_the_same():
    code = (
        "import sys, clipo_ds.viz.cluster_view, plotly.graph_objects as go, plotly.io as pio\n"
        "assert {'jsonschema', 'nbformat'} & set(sys.modules) == set()\n"
        "pio.renderers.default = 'plotly_mimetype'\n"
        "go.Figure().show()  # asks nbformat for its version\n"
        "import nbformat\n"
        "nbformat.validate(nbformat.v4.new_notebook())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
