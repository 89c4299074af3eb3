"""What notebook 02 costs in a browser: opening a run of 50,000 rollouts x 512, a slider move, memory.

    python scripts/bench_viz_browser.py [--steps 50] [--folder DIR] [--moves 20]

Writes the run as `bench_viz.py` does and opens the notebook in a JupyterLab of its own, in headless Chromium (WebGL in
software), with 5,000 and with 20,000 points shown. An opening runs from the first cell to the frame after the picture
has been drawn, in a fresh kernel and a fresh browser. Nobody is attached to that browser meanwhile: whoever is
(Playwright, the developer tools) makes V8 keep a stack for every error that plotly's script throws and catches, and
for that read the 5 MB four times more, 0.7 s that no reader waits. A redraw lasts from the key that moves the slider
to the frame after plotly has drawn the new step. Prints one JSON object: seconds, MB. Needs the tools of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from bench_viz import write_run
from playwright.sync_api import Playwright, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import TIME_LIMIT_S, Browser, Server, find_chromium, put_notebook, serve_lab

from clipo_ds.records import open_run

VIEW = ".clipo-clusters"
NUM_FIGURES = 2
EXPLORER = "ClusterExplorer(run)"
PEAK = "import resource\nf'peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB'"
OPENED = "opened"
HEAD_START_S = 1.5  # to let the browser go
HAS_WEBGL = "() => document.createElement('canvas').getContext('webgl') !== null"
# Begins when nobody is attached any more: runs the cells one by one up to the explorer's, and says when it is drawn.
OPEN_SOON = """([view, least, title, headStart]) => {
  const run = () => window.jupyterapp.commands.execute('notebook:run-cell-and-select-next'), figures = {};
  const numPoints = plot => (plot?._fullData ?? []).reduce((sum, trace) => sum + (trace.x?.length ?? 0), 0);
  setTimeout(async () => {
    window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0;
    const began = performance.now(), seconds = () => (performance.now() - began) / 1000;
    const look = setInterval(() => {  // plotly draws without a pause: whoever sees its points sees them drawn
      if (numPoints(document.querySelector(`${view} .js-plotly-plot`)) < least) return;
      clearInterval(look);
      requestAnimationFrame(() => requestAnimationFrame(() => {
        figures.open_s = seconds();  // the imports included
        window.__opened = figures;
        window.__saying = setInterval(() => { document.title = title; }, 500);  // JupyterLab has titles of its own
      }));
    }, 5);
    for (let cell = 0; cell < 4; cell++) await run();
    figures.imports_s = seconds();
    await run();
  }, 1000 * headStart);
}"""
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


def measure(playwright: Playwright, server: Server, run: Path, points: int, moves: int) -> dict[str, float]:
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
    shutil.rmtree(run / "viz", ignore_errors=True)  # the layouts that an earlier opening has kept
    with start_chromium() as address:
        with attached(playwright, address, server.folder) as browser:
            browser.open(server, f"{folder.name}/{file.name}")
            if not browser.page.evaluate(HAS_WEBGL):
                raise RuntimeError("this Chromium draws no WebGL, and so no points")
            asked = time.monotonic()
            browser.page.evaluate(OPEN_SOON, [VIEW, points * 9 // 10, OPENED, HEAD_START_S])
            browser.assert_clean()
        if time.monotonic() - asked > HEAD_START_S:
            raise RuntimeError("the browser was not let go in time, and the figures would be wrong: run it again")
        try:
            wait_until_opened(address)
        except TimeoutError:
            with attached(playwright, address, server.folder) as browser:
                browser.assert_clean()  # says which cell failed, if one did
            raise
        with attached(playwright, address, server.folder) as browser:
            browser.assert_clean()
            figures = dict(browser.page.evaluate("() => { clearInterval(window.__saying); return window.__opened; }"))
            browser.run_all()
            browser.wait_for_figures(VIEW, NUM_FIGURES)
            browser.page.evaluate(WATCH, VIEW)
            steps = open_run(run).rollout_steps()
            for move, step in zip(range(moves), steps[-2::-1], strict=False):
                browser.press_slider(VIEW, "ArrowLeft")
                browser.page.wait_for_function("count => window.__redraws.length === count", arg=move + 1)
                browser.wait_for_title(VIEW, f"Step {step}:", figure=1)  # the numbers, which come last
                browser.wait_until_ready()
            redraws = [milliseconds / 1000 for milliseconds in browser.page.evaluate("() => window.__redraws")]
            figures |= {"redraw_median_s": statistics.median(redraws), "redraw_worst_s": max(redraws)}
            peak = browser.wait_for_text(".jp-OutputArea-output pre", "peak").inner_text()
            figures["kernel_peak_mb"] = float(peak.split()[1])
            figures["browser_mb"] = renderer_mb()
            browser.assert_clean()
    return figures


@contextlib.contextmanager
def start_chromium() -> Iterator[str]:
    """A headless Chromium with a profile of its own; gives the address to attach to it at."""
    executable = find_chromium()
    if executable is None:
        raise RuntimeError("there is no Chromium: `make browser` installs one")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            executable, "--headless=new", "--no-sandbox", "--window-size=1400,1700",
            "--no-first-run", "--disable-background-networking", "--enable-unsafe-swiftshader",
            f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                said = Path(profile) / "DevToolsActivePort"  # two lines: the port, and a path
                wait_for(lambda: process.poll() is not None or (said.is_file() and "\n" in said.read_text()))
                if process.poll() is not None:
                    raise RuntimeError(f"{executable} ended at once, with exit code {process.returncode}")
                yield f"http://127.0.0.1:{said.read_text().split()[0]}"
            finally:
                process.terminate()


@contextlib.contextmanager
def attached(playwright: Playwright, address: str, folder: Path) -> Iterator[Browser]:
    """The one page of a Chromium, to be driven; at the end it is let go, and lives on."""
    chromium = playwright.chromium.connect_over_cdp(address)
    try:
        yield Browser(chromium.contexts[0].pages[0], folder)
    finally:
        chromium.close()


def wait_until_opened(address: str) -> None:
    """Ask the browser for its pages' titles, which needs nobody attached to them."""

    def has_opened() -> bool:
        with urllib.request.urlopen(f"{address}/json/list", timeout=TIME_LIMIT_S) as answer:
            return any(page["title"] == OPENED for page in json.load(answer))

    wait_for(has_opened)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: It does not within TIME_LIMIT_S.
    """
    deadline = time.monotonic() + TIME_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {TIME_LIMIT_S:.0f} s")
        time.sleep(0.2)


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
    if not 1 <= arguments.moves < arguments.steps:
        parser.error(f"--moves must be from 1 to {arguments.steps - 1} (one less than --steps), got {arguments.moves}")
    figures = {}
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        path = Path(arguments.folder or temporary).absolute() / f"bench_{arguments.steps}"
        if not path.exists():
            write_run(path, arguments.steps)
        notebooks = Path(temporary) / "notebooks"
        notebooks.mkdir()
        with serve_lab(notebooks, Path(temporary) / "jupyter") as server:
            for points in (5_000, 20_000):
                found = measure(playwright, server, path, points, arguments.moves)
                figures[f"{points}_points"] = {name: round(value, 3) for name, value in found.items()}
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
