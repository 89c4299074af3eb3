"""JupyterLab in a real browser: a server with nothing of the user's, and a page that opens, runs, operates notebooks.

Playwright drives the Chromium that `find_chromium` names. A promise is never awaited inside the page, where nothing
would end the wait: the page keeps what came of it, and Python polls for that with a time limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import nbformat
from launching import ROOT, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

NOTEBOOKS = ROOT / "notebooks"
TIME_LIMIT_S = 120.0  # against hanging only: machines pause
# Said by JupyterLab or the browser itself, whatever the notebook: a favicon, extensions that are not there.
HARMLESS = re.compile(r"favicon|net::ERR_ABORTED")

LAB_SETTINGS = {
    # The news popup would cover the page, and ask the network.
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    # Every cell is in the page, also the ones that are scrolled away.
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}

# The notebook, its session and its kernel, all of them connected; "idle" alone shows before there is a kernel.
READY = """() => {
  const panel = window.jupyterapp?.shell?.currentWidget, session = panel?.sessionContext;
  return Boolean(panel?.context?.isReady && session?.isReady && session.kernelDisplayStatus === 'idle'
                 && session.session?.kernel?.connectionStatus === 'connected');
}"""

# What is wrong with the figures of a view, in words.
LAID_OUT = """(view, count) => {
  const found = document.querySelector(view), wrong = [];
  const plots = Array.from(found ? found.querySelectorAll('.js-plotly-plot') : []);
  if (plots.length !== count) wrong.push(`${plots.length} figures, not ${count}`);
  plots.forEach((plot, number) => {
    const layout = plot._fullLayout, say = what => wrong.push(`figure ${number}: ${what}`);
    if (!plot._fullData?.length && !layout?.annotations?.length) return say('nothing is drawn');
    if (layout.autosize && Math.abs(layout.width / found.clientWidth - 0.975) > 0.03)
      say(`${layout.width} px wide, in a view of ${found.clientWidth} px`);
    const box = name => plot.querySelector(name)?.getBoundingClientRect();
    const title = box('.gtitle'), subtitle = box('.gtitle-subtitle'), panel = box('.cartesianlayer .bglayer, .plot');
    if (!title) return;
    const edge = plot.getBoundingClientRect();
    if (title.top < edge.top - 1 || title.right > edge.right + 1) say('its title is cut off');
    if (subtitle && subtitle.right > edge.right + 1) say('its subtitle is cut off');
    if (subtitle && subtitle.top < title.top + 5) say('its subtitle is over its title');
    const last = subtitle && subtitle.height ? subtitle : title;
    if (last.bottom > edge.top + layout._size.t) say('its title runs into the panels');
  });
  return wrong;
}"""


def find_chromium() -> str | None:
    """The browser to drive: Debian's, any other on the path, or the one that Playwright has downloaded."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        downloaded = playwright.chromium.executable_path
    return downloaded if Path(downloaded).is_file() else None


@dataclass(frozen=True)
class Server:
    """A server of notebooks that only this test knows the token of."""

    url: str
    token: str
    folder: Path  # what it serves


@contextlib.contextmanager
def serve_lab(folder: Path, home: Path) -> Iterator[Server]:
    """JupyterLab over `folder`, with all of its settings and state under `home`."""
    for name, settings in LAB_SETTINGS.items():
        file = home / "lab-settings" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    port, token = free_port(), secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    with _serving(command, home, f"http://127.0.0.1:{port}/api?token={token}"):
        yield Server(f"http://127.0.0.1:{port}", token, folder)


@contextlib.contextmanager
def serve_dashboard(run: Path, notebook: Path, home: Path) -> Iterator[Server]:
    """`scripts/dashboard.py` on a run and a notebook."""
    port = free_port()
    command = [
        sys.executable, str(ROOT / "scripts" / "dashboard.py"), str(run), f"--notebook={notebook}", f"--port={port}",
    ]  # fmt: skip
    with _serving(command, home, f"http://127.0.0.1:{port}/voila/static/voila.js"):
        said = (home / "server.log").read_text()
        token = re.search(r"token=(\w+)", said)
        assert token is not None, said
        yield Server(f"http://127.0.0.1:{port}", token[1], notebook.parent)


@contextlib.contextmanager
def _serving(command: list[str], home: Path, probe: str) -> Iterator[None]:
    """A server, stopped at the end, with its settings and state under `home`."""
    private = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "lab-settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
    }  # fmt: skip
    own = {name: str(home / folder) for name, folder in private.items()} | {"PYTHONPATH": str(ROOT)}
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIME_LIMIT_S
        while not _answers(probe):
            said = (home / "server.log").read_text()[-3000:]
            assert process.poll() is None and time.monotonic() < deadline, f"the server did not start:\n{said}"
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=TIME_LIMIT_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@dataclass
class Browser:
    """One page, and what went wrong in it."""

    page: Page
    screenshots: Path
    errors: list[str] = field(default_factory=list)  # of the page's console
    foreign: list[str] = field(default_factory=list)  # requests that would have left this machine

    def __post_init__(self) -> None:
        def on_console(message: Any) -> None:
            if message.type == "error" and not HARMLESS.search(f"{message.text} {message.location}"):
                self.errors.append(f"{message.text} ({message.location.get('url', '')})")

        def on_request(request: Any) -> None:
            address = urlparse(request.url)
            if address.scheme in ("http", "https", "ws", "wss") and address.hostname != "127.0.0.1":
                self.foreign.append(request.url)

        self.page.on("console", on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", on_request)

    def open(self, server: Server, notebook: str) -> None:
        """Open a notebook in JupyterLab and wait until its kernel can be used."""
        self.page.goto(f"{server.url}/lab/tree/{notebook}?reset&token={server.token}")
        self.wait_until_ready()

    def open_dashboard(self, server: Server) -> None:
        """Open a notebook as a page; it is shown when every cell has run."""
        self.page.goto(f"{server.url}/?token={server.token}", timeout=1000 * TIME_LIMIT_S)

    def reload(self) -> None:
        """Save the notebook and load the page anew, as a user does."""
        self.command("docmanager:save")
        self.page.reload()
        self.wait_until_ready()

    def restart_kernel(self) -> None:
        """Restart the notebook's kernel, as its menu does, without the question."""
        self.page.evaluate(
            "() => { const panel = window.jupyterapp.shell.currentWidget; window.__done = null;"
            " panel.sessionContext.session.kernel.restart()"
            ".then(() => { window.__done = 'ok'; }, error => { window.__done = String(error); }); }"
        )
        self.page.wait_for_function("() => window.__done !== null", timeout=1000 * TIME_LIMIT_S)
        assert self.page.evaluate("() => window.__done") == "ok"
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait for the notebook, its session and its kernel."""
        self.page.wait_for_function(READY, timeout=1000 * TIME_LIMIT_S)
        assert self.page.locator(".jp-Dialog").count() == 0, self.page.locator(".jp-Dialog").first.inner_text()

    def command(self, name: str, *, timeout_s: float = TIME_LIMIT_S) -> None:
        """Run a JupyterLab command to its end."""
        self.page.evaluate(
            "name => { window.__done = null; window.jupyterapp.commands.execute(name)"
            ".then(() => { window.__done = 'ok'; }, error => { window.__done = String(error); }); }",
            name,
        )
        self.page.wait_for_function("() => window.__done !== null", timeout=1000 * timeout_s)
        assert self.page.evaluate("() => window.__done") == "ok", name

    def run_all(self, *, timeout_s: float = TIME_LIMIT_S) -> float:
        """Run every cell; returns seconds. Fails on a cell that did not run or shows an error."""
        began = time.monotonic()
        self.command("notebook:run-all-cells", timeout_s=timeout_s)
        cells = self.page.evaluate(
            "() => Array.from(window.jupyterapp.shell.currentWidget.content.widgets)"
            ".filter(cell => cell.model.type === 'code').map(cell => cell.model.executionCount)"
        )
        assert cells and all(cells), f"cells that have not run: {cells}"
        self.assert_clean()
        return time.monotonic() - began

    def assert_clean(self) -> None:
        """No error in a cell's output, none in the console, and nothing that left this machine."""
        shown = self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')
        assert shown.count() == 0, shown.first.inner_text()
        assert self.page.locator(".jp-RenderedText[data-mime-type*=error]").count() == 0
        assert self.errors == [], self.errors
        assert self.foreign == []

    def wait_for_text(self, where: str, text: str | re.Pattern[str], *, timeout_s: float = TIME_LIMIT_S) -> Locator:
        """Wait until an output says something; `where` keeps a cell's own source from counting."""
        found = self.page.locator(where).filter(has_text=text).first
        found.wait_for(timeout=1000 * timeout_s)
        return found

    def wait_for_points(
        self, figure: str = ".js-plotly-plot", *, least: int = 1, timeout_s: float = TIME_LIMIT_S
    ) -> None:
        """Wait until a figure is drawn with so many points at least, over all of its traces."""
        self.page.wait_for_function(
            "([where, least]) => Array.from(document.querySelectorAll(where)).some(plot => plot._fullData"
            " && plot._fullData.reduce((sum, trace) => sum + (trace.x ? trace.x.length : 0), 0) >= least)",
            arg=[figure, least],
            timeout=1000 * timeout_s,
        )

    def wait_for_curves(self, view: str, steps: int, *, timeout_s: float = TIME_LIMIT_S) -> None:
        """Wait until the first curve of every figure of a view has so many points."""
        self.page.wait_for_function(
            "([view, steps]) => Array.from(document.querySelectorAll(`${view} .js-plotly-plot`))"
            ".every(plot => plot._fullData?.[0]?.x?.length === steps)",
            arg=[view, steps],
            timeout=1000 * timeout_s,
        )

    def wait_for_figures(self, view: str, count: int, *, timeout_s: float = TIME_LIMIT_S) -> None:
        """Wait until a view has so many figures, each drawn, as wide as the view, with nothing over anything else.

        The subtitle must be under the title, and both above the panels.
        """
        arguments = {"arg": [view, count], "timeout": 1000 * timeout_s}
        try:
            self.page.wait_for_function(f"([view, count]) => ({LAID_OUT})(view, count).length === 0", **arguments)
        except Exception as error:  # playwright's, which is imported where it is needed
            self.screenshot(f"failed_{view[1:]}")
            found = self.page.evaluate(f"([view, count]) => ({LAID_OUT})(view, count)", [view, count])
            raise AssertionError(f"the figures of {view}: {found}; the page's console: {self.errors}") from error

    def wait_for_title(
        self, view: str, text: str | re.Pattern[str], *, figure: int = 0, timeout_s: float = TIME_LIMIT_S
    ) -> None:
        """Wait until a figure of a view, counted from 0, is drawn with a title."""
        title = self.page.locator(f"{view} .js-plotly-plot").nth(figure).locator(".gtitle").filter(has_text=text)
        title.wait_for(timeout=1000 * timeout_s)

    def press_slider(self, where: str, key: str) -> None:
        """Move a slider by a key."""
        handle = self.page.locator(f"{where} .widget-slider .noUi-handle").first
        handle.focus()
        handle.press(key)

    def click_point(self, figure: str) -> int:
        """Click a point of a scatter figure; returns the row that the click's own payload named (`customdata`).

        The point is the one furthest from the middle, the least likely to lie under another; hover labels lie.
        """
        return int(
            self._click(
                figure,
                """plot => {
                  const {xaxis, yaxis} = plot._fullLayout;
                  let best = [-1, 0, 0];
                  for (const trace of plot._fullData.filter(trace => trace.visible === true && trace.customdata)) {
                    for (let i = 0; i < trace.x.length; i++) {
                      const px = xaxis.l2p(trace.x[i]), py = yaxis.l2p(trace.y[i]);
                      const far = Math.hypot(px - xaxis._length / 2, py - yaxis._length / 2);
                      if (px >= 0 && px <= xaxis._length && py >= 0 && py <= yaxis._length && far > best[0])
                        best = [far, px, py];
                    }
                  }
                  return best.slice(1);
                }""",
            )["customdata"]
        )

    def click_cell(self, figure: str) -> str:
        """Click the last cell of the first row of a heatmap; returns the name of its column."""
        where = """plot => {
          const {xaxis, yaxis} = plot._fullLayout, side = plot._fullData[0].x.length;
          return [xaxis._length * (1 - 0.5 / side), yaxis._length * 0.5 / side];
        }"""
        return str(self._click(figure, where)["x"])

    def _click(self, figure: str, where: str) -> dict[str, Any]:
        """Click inside a figure's axes at `where` (JavaScript: plot -> [x, y]), once plotly sees the pointer there."""
        plot = self.page.locator(figure).first
        plot.scroll_into_view_if_needed()
        x, y = plot.evaluate(
            f"""plot => {{
              const [px, py] = ({where})(plot), box = plot.getBoundingClientRect(), {{xaxis, yaxis}} = plot._fullLayout;
              window.__clicked = window.__hovered = null;
              const kept = event => ({{x: event.points[0].x, customdata: event.points[0].customdata}});
              plot.on('plotly_hover', event => {{ window.__hovered = kept(event); }});
              plot.on('plotly_click', event => {{ window.__clicked = kept(event); }});
              return [box.left + xaxis._offset + px, box.top + yaxis._offset + py];
            }}"""
        )
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y)
        self.page.wait_for_function("() => window.__hovered !== null", timeout=1000 * TIME_LIMIT_S)
        self.page.mouse.click(x, y)
        self.page.wait_for_function("() => window.__clicked !== null", timeout=1000 * TIME_LIMIT_S)
        return self.page.evaluate("() => window.__clicked")

    def num_traces(self, figure: str = ".js-plotly-plot") -> int:
        """Traces of the first figure, as drawn."""
        return int(self.page.locator(figure).first.evaluate("plot => plot._fullData.length"))

    def screenshot(self, name: str, where: str | None = None) -> Path:
        """Keep a picture of the page, or of one element of it, for people to look at."""
        self.screenshots.mkdir(parents=True, exist_ok=True)
        path = self.screenshots / f"{name}.png"
        target = self.page if where is None else self.page.locator(where).first
        target.screenshot(path=path)
        return path


def put_notebook(name: str, folder: Path, parameters: str | None = None) -> str:
    """Copy a notebook, with its cell tagged `parameters` replaced where new ones are given; returns its name."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    if parameters is not None:
        (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source = parameters
    nbformat.write(notebook, folder / name)
    return name
