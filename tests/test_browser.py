"""The notebooks in JupyterLab, in a real browser: run, operated, reloaded, without an error or a request that leaves.

Pictures of what was seen go to the folder that CLIPO_DS_SCREENSHOTS names, for people to look at.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Server, find_chromium, put_notebook, serve_dashboard, serve_lab
from launching import SMALL, run
from written_run import write_comparison, write_run

from clipo_ds.records import RunWriter, open_run
from clipo_ds.viz.launch import attach

pytestmark = pytest.mark.browser

# Evaluated before training and never again, so that the stopped run's checkpoint is evaluated by the notebook.
QUICK = dict(flag.removeprefix("--").split("=", 1) for flag in SMALL if not flag.startswith("--recipe")) | {
    "steps": 100_000,
    "evaluation.every": 100_000,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """JupyterLab whose kernels find a run for notebooks 02 and 03 and a comparison for 04."""
    folder, runs = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPO_DS_RUN", str(write_run(runs / "one", steps=12, groups=8, group_size=8)))
        patch.setenv("CLIPO_DS_RUNS", str(write_comparison(runs / "several")))
        with serve_lab(folder, tmp_path_factory.mktemp("jupyter")) as running:
            yield running


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    executable = find_chromium()
    if executable is None:
        pytest.fail("there is no Chromium: `make browser` installs one")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def browser(chromium, tmp_path) -> Iterator[Browser]:
    screenshots = Path(os.environ.get("CLIPO_DS_SCREENSHOTS", tmp_path / "screenshots"))
    page = chromium.new_page(viewport={"width": 1400, "height": 1700})
    try:
        yield Browser(page, screenshots)
    finally:
        page.close()


def test_quickstart_runs_live_survives_a_reload_and_stops_with_a_checkpoint(server, browser, tmp_path):
    folder = tmp_path / "demo"
    name = put_notebook(
        "01_quickstart.ipynb",
        server.folder,
        f"recipe = 'demo'\nsettings = {QUICK!r}\nrun_dir = {str(folder)!r}",
    )
    browser.open(server, name)
    try:
        browser.run_all()
        browser.wait_for_text(".clipo-live .badge", "running")
        # three curves and four lines of test sets
        browser.wait_for_points(".clipo-live .js-plotly-plot", least=3 * 5 + 4)
        browser.wait_for_text(".clipo-live", re.compile(r"Rollouts of step \d+"))
        browser.page.wait_for_function(
            "() => { const plot = document.querySelector('.clipo-live .js-plotly-plot');"
            " return plot._fullLayout.width > 0.9 * plot.closest('.clipo-live').clientWidth; }"
        )
        browser.screenshot("01_quickstart_running")
        browser.reload()
        browser.wait_for_points(".clipo-live .js-plotly-plot", least=3 * 5 + 4)
        assert browser.num_traces(".clipo-live .js-plotly-plot") == 3 + 4
        browser.wait_for_text(".clipo-live", re.compile(r"Rollouts of step \d+"))
        browser.screenshot("01_quickstart_reloaded")
        browser.page.locator(".clipo-live .clipo-stop").click()
        browser.wait_for_text(".clipo-live .badge", "stopped")
        step = max(open_run(folder).checkpoints())
        assert step == open_run(folder).metrics()[-1]["step"]
        browser.wait_for_text(".clipo-before-after", f"Before training and after step {step}")
        browser.page.locator(".clipo-before-after").scroll_into_view_if_needed()
        browser.screenshot("01_quickstart_stopped")
        browser.assert_clean()
    finally:
        with contextlib.suppress(ValueError):  # it never started
            attach(folder).stop(at_once=True)


# Pictures of figures, decoded and of a size, in what views leave behind.
STILL_PICTURES = """still => Array.from(document.querySelectorAll(`${still} img`))
  .filter(picture => picture.complete && picture.naturalWidth > 300).length"""

# The views of a notebook by their class, and how many figures each has.
VIEWS = {
    "02_embedding_clusters": {".clipo-clusters": 2},
    "03_contrastive_dynamics": {".clipo-dynamics": 4, ".clipo-group": 2},
    "04_compare_runs": {".clipo-compare": 3},
}


@pytest.mark.parametrize("name", VIEWS)
def test_notebook_runs_and_its_figures_are_whole_also_when_narrow_and_after_a_reload(name, server, browser):
    browser.open(server, put_notebook(f"{name}.ipynb", server.folder))
    browser.run_all()
    for view, count in VIEWS[name].items():
        browser.wait_for_figures(view, count)
        browser.screenshot(f"{name}_{view[7:]}", view)
    browser.screenshot(name)
    browser.page.set_viewport_size({"width": 1250, "height": 1700})
    for view, count in VIEWS[name].items():
        browser.wait_for_figures(view, count)
    browser.screenshot(f"{name}_narrow")
    browser.reload()
    for view, count in VIEWS[name].items():
        browser.wait_for_figures(view, count)
    browser.screenshot(f"{name}_reloaded")
    browser.assert_clean()


def test_clusters_follow_the_slider_and_a_click_shows_exactly_that_rollout(server, browser):
    view, figure = ".clipo-clusters", ".clipo-clusters .js-plotly-plot"
    patient = "from clipo_ds.viz import interact\ninteract.MAX_DRAWING_S = 1e6\nrun = None"
    browser.open(server, put_notebook("02_embedding_clusters.ipynb", server.folder, patient))
    browser.run_all()
    browser.wait_for_figures(view, 2)  # the second one because the browser has said that it drew the first
    browser.press_slider(view, "ArrowLeft")  # from "the last" step to the one before it
    for plot in (0, 1):  # the points and the numbers below them
        browser.wait_for_title(view, "Step 11:", figure=plot)
    row = browser.click_point(figure)
    browser.wait_for_text(f"{view} h4", re.compile(rf"^Rollout {row}\b"))
    browser.screenshot("02_embedding_clusters_clicked")
    browser.reload()
    browser.wait_for_figures(view, 2)
    browser.wait_for_title(view, "Step 11:")
    browser.assert_clean()


def test_views_whose_kernel_has_gone_say_so_and_stay_as_pictures_when_the_page_is_loaded_anew(server, browser):
    browser.open(server, put_notebook("02_embedding_clusters.ipynb", server.folder))
    browser.run_all()
    still = ".jp-OutputArea .clipo-still"
    pictures = f"({STILL_PICTURES})('{still}')"
    browser.page.wait_for_function(f"() => {pictures} === 4", timeout=60_000)  # clusters, numbers, separation, trail
    assert not browser.page.locator(still).first.is_visible()
    browser.restart_kernel()
    browser.page.wait_for_function(
        "() => Array.from(document.querySelectorAll('.clipo-view')).every(view =>"
        " getComputedStyle(view, '::before').content.includes('run the notebook'))"
    )
    browser.screenshot("02_embedding_clusters_restarted")
    browser.reload()
    for text in ("run the notebook's cells again", "right answers have a false step"):
        browser.wait_for_text(f"{still} >> visible=true", re.compile(text, re.IGNORECASE))
    assert browser.page.evaluate(f"() => {pictures}") == 4
    browser.screenshot("02_embedding_clusters_without_kernel")
    assert browser.page.get_by_text("model not found").filter(visible=True).count() == 0


def test_the_group_follows_the_slider_and_a_click_on_a_cell_shows_both_texts(server, browser):
    view = ".clipo-group"
    browser.open(server, put_notebook("03_contrastive_dynamics.ipynb", server.folder))
    browser.run_all()
    browser.wait_for_figures(view, 2)
    browser.press_slider(view, "ArrowLeft")
    browser.wait_for_title(view, re.compile(r"Group \d+ of step 11"))
    browser.click_cell(f"{view} .js-plotly-plot")
    browser.wait_for_text(f"{view} h4", re.compile(r"^Rollout \d+"))
    assert browser.page.locator(f"{view} h4").filter(has_text="Rollout").count() == 2
    browser.screenshot("03_contrastive_dynamics_clicked")
    browser.assert_clean()


def test_points_appear_as_steps_of_a_run_land(server, browser, tmp_path):
    view, whole = ".clipo-dynamics", write_run(tmp_path / "whole", steps=5)
    path = write_run(tmp_path / "run", steps=2, config={"steps": 5})
    browser.open(server, put_notebook("03_contrastive_dynamics.ipynb", server.folder, f"run = {str(path)!r}"))
    browser.run_all()
    browser.wait_for_figures(view, 4)
    browser.wait_for_text(f"{view} .badge", "running")
    metrics = open_run(whole).metrics()
    for step in (3, 4, 5):
        name = f"rollouts/step_{step:06d}.parquet"
        (whole / name).rename(path / name)
        RunWriter(path).write_metrics(step, metrics[step - 1])
        browser.wait_for_curves(view, step)
    browser.wait_for_text(f"{view} .badge", "finished")
    browser.reload()
    browser.wait_for_figures(view, 4)
    browser.wait_for_curves(view, 5)
    browser.screenshot("03_contrastive_dynamics_live")
    browser.assert_clean()


def test_clusters_take_in_the_steps_of_a_run_as_they_land(server, browser, tmp_path):
    view, whole = ".clipo-clusters", write_run(tmp_path / "whole", steps=4)
    path = write_run(tmp_path / "run", steps=2, config={"steps": 4})
    browser.open(server, put_notebook("02_embedding_clusters.ipynb", server.folder, f"run = {str(path)!r}"))
    browser.run_all()
    browser.wait_for_title(view, "Step 2:")
    for step in (3, 4):
        name = f"rollouts/step_{step:06d}.parquet"
        (whole / name).rename(path / name)
        RunWriter(path).write_metrics(step, open_run(whole).metrics()[step - 1])
        browser.wait_for_title(view, f"Step {step}:")
        browser.wait_for_points(f"{view} .js-plotly-plot", least=24 * step)
    browser.wait_for_figures(view, 2)
    browser.assert_clean()


def test_the_comparison_follows_the_choice_of_arms(server, browser):
    view = ".clipo-compare"
    browser.open(server, put_notebook("04_compare_runs.ipynb", server.folder))
    browser.run_all()
    browser.wait_for_figures(view, 3)
    browser.wait_for_text(f"{view} .gtitle", "grpo+clipo answers")
    browser.page.locator(f"{view} select").first.select_option("grpo+clipo")
    browser.page.locator(f"{view} select").nth(1).select_option("grpo")
    browser.wait_for_text(f"{view} .gtitle", "grpo answers")
    browser.wait_for_figures(view, 3)
    browser.screenshot("04_compare_runs_chosen")
    browser.assert_clean()


def test_dashboard_shows_a_run_to_those_who_have_the_token(browser, tmp_path):
    import nbformat

    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("from clipo_ds.viz.live import LiveRun\nLiveRun(chosen_run())")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    notebook.cells[0].source = "from clipo_ds.viz.frames import chosen_run\n" + notebook.cells[0].source
    file = tmp_path / "page.ipynb"
    nbformat.write(notebook, file)
    with serve_dashboard(write_run(tmp_path / "run", steps=6), file, tmp_path / "home") as server:
        with urllib.request.urlopen(server.url) as stranger:
            assert "/login" in stranger.url
        browser.open_dashboard(server)
        browser.wait_for_text(".clipo-live .badge", "finished")
        browser.wait_for_points(".clipo-live .js-plotly-plot", least=3 * 6)
        browser.screenshot("dashboard")
        assert browser.foreign == []


def test_the_report_opens_offline_without_an_error_or_a_request(browser, tmp_path):
    done = run("report.py", str(write_run(tmp_path / "run")), str(tmp_path / "report.html"))
    assert done.returncode == 0, done.stderr
    browser.page.context.set_offline(True)
    asked: list[str] = []
    browser.page.on("request", lambda request: asked.append(request.url))
    page = (tmp_path / "report.html").as_uri()
    browser.page.goto(page)
    browser.wait_for_figures("body", 11)
    browser.screenshot("report")
    assert browser.errors == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [page]


def test_dashboard_of_no_run_is_refused_in_one_line(tmp_path):
    done = run("dashboard.py", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: `run` must be a run folder") and done.stderr.count("\n") == 1
