"""What notebook 02 costs in a browser: opening a run of 50,000 rollouts x 512, a slider move, memory.

    python scripts/bench_viz_browser.py [--steps 50] [--folder DIR] [--moves 20]

Writes the run as `bench_viz.py` does and opens the notebook in a JupyterLab of its own, in headless Chromium (WebGL in
software), with 5,000 and with 20,000 points shown. A redraw lasts from the key that moves the slider to the frame after
plotly has drawn the new step. Prints one JSON object: seconds, MB. Needs the tools of the tests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from bench_viz import write_run
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import Browser, Server, find_chromium, put_notebook, serve_lab

from clipo_ds.viz.cluster_view import NUMBERS_AFTER_S

VIEW = ".clipo-clusters"
NUM_FIGURES = 2
EXPLORER = "ClusterExplorer(run)"
PEAK = "import resource\nf'peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB'"
# Keeps, for every key pressed on the slider, how long it took until the new step had been drawn and shown.
WATCH = """view => {
  const plot = document.querySelector(`${view} .js-plotly-plot`);
  const step = () => plot._fullLayout.title.text.split(':')[0];
  let began = null, before = null;
  window.__redraws = [];
  document.querySelector(`${view} .widget-slider .noUi-handle`).addEventListener('keydown', () => {
    began = performance.now();
    before = step();
  }, true);
  plot.on('plotly_afterplot', () => {
    if (began === null || step() === before) return;
    const start = began;
    began = null;
    requestAnimationFrame(() => requestAnimationFrame(() => window.__redraws.push(performance.now() - start)));
  });
}"""


def measure(browser: Browser, server: Server, run: Path, points: int, moves: int) -> dict[str, float]:
    """Open the notebook with so many points, move its slider, and ask the kernel for its memory."""
    folder = server.folder / f"{points}_points"  # another notebook each time, and so a fresh kernel
    folder.mkdir()
    file = folder / put_notebook("02_embedding_clusters.ipynb", folder, f"run = {str(run)!r}")
    notebook = json.loads(file.read_text())
    for cell in notebook["cells"]:
        if "".join(cell["source"]) == EXPLORER:
            cell["source"] = f"ClusterExplorer(run, max_points={points})"
    notebook["cells"].append({**notebook["cells"][1], "id": "peak", "source": PEAK})
    file.write_text(json.dumps(notebook))
    browser.open(server, f"{folder.name}/{file.name}")
    figures: dict[str, float] = {}
    began = time.monotonic()
    browser.page.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0; }")
    for _ in range(4):  # to the explorer's cell
        browser.command("notebook:run-cell-and-select-next")
    figures["imports_s"] = time.monotonic() - began
    browser.command("notebook:run-cell-and-select-next")
    browser.wait_for_points(f"{VIEW} .js-plotly-plot", least=points * 9 // 10)
    figures["open_s"] = time.monotonic() - began  # the imports included
    browser.run_all()
    browser.wait_for_figures(VIEW, NUM_FIGURES)
    browser.page.evaluate(WATCH, VIEW)
    for move in range(moves):
        browser.press_slider(VIEW, "ArrowLeft")
        browser.page.wait_for_function("count => window.__redraws.length === count", arg=move + 1)
        browser.page.wait_for_timeout(2_000 * NUMBERS_AFTER_S)
        browser.wait_until_ready()  # time enough, as a rule, for the numbers of this step
    redraws = [milliseconds / 1000 for milliseconds in browser.page.evaluate("() => window.__redraws")]
    figures |= {"redraw_median_s": statistics.median(redraws), "redraw_worst_s": max(redraws)}
    peak = browser.wait_for_text(".jp-OutputArea-output pre", "peak").inner_text()
    figures["kernel_peak_mb"] = float(peak.split()[1])
    figures["browser_mb"] = renderer_mb()
    browser.assert_clean()
    return figures


def renderer_mb() -> float:
    """Resident memory of the largest page of the browser that this process started."""
    below = psutil.Process().children(recursive=True)
    pages = [process for process in below if "--type=renderer" in process.cmdline()]
    return max(process.memory_info().rss for process in pages) / 2**20


def main() -> None:
    """Write the run, open it with few points and with many, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of 1,000 rollouts each")
    parser.add_argument("--moves", type=int, default=20, help="of the slider (default: 20)")
    parser.add_argument("--folder", help="where to keep the run")
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        path = Path(arguments.folder or temporary).absolute() / f"bench_{arguments.steps}"
        if not path.exists():
            write_run(path, arguments.steps)
        notebooks = Path(temporary) / "notebooks"
        notebooks.mkdir()
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        with serve_lab(notebooks, Path(temporary) / "jupyter") as server:
            for points in (5_000, 20_000):
                page = chromium.new_page(viewport={"width": 1400, "height": 1700})
                found = measure(Browser(page, Path(temporary)), server, path, points, arguments.moves)
                figures[f"{points}_points"] = {name: round(value, 3) for name, value in found.items()}
                page.close()
        chromium.close()
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
