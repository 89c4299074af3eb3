"""The notebooks, executed from top to bottom without a browser: no error in any cell."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import nbformat
import pytest
from browser import NOTEBOOKS, put_notebook
from launching import ROOT, SMALL
from nbclient import NotebookClient

from clipo_ds.viz.launch import attach

READERS = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb") if not path.name.startswith("01_"))


def execute(folder: Path, name: str) -> nbformat.NotebookNode:
    """Run a notebook as it lies in `folder`; raises on the first cell that fails."""
    notebook = nbformat.read(folder / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
        store_widget_state=True,
    )  # fmt: skip
    return client.execute()


@pytest.fixture(autouse=True)
def this_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_quickstart_starts_a_run_and_follows_it(tmp_path):
    folder = tmp_path / "run"
    settings = dict(flag.removeprefix("--").split("=", 1) for flag in SMALL if not flag.startswith("--recipe"))
    name = put_notebook(
        "01_quickstart.ipynb",
        tmp_path,
        f"recipe = 'demo'\nsettings = {settings | {'steps': 10000}!r}\nrun_dir = {str(folder)!r}",
    )
    try:
        execute(tmp_path, name)
        # The kernel is gone by now, the run is not.
        assert attach(folder).status().state in ("starting", "running")
    finally:
        with contextlib.suppress(ValueError):  # it was never started
            attach(folder).stop(at_once=True)


@pytest.mark.parametrize("name", READERS)
def test_notebook_reads_a_recorded_run(name, recorded_run, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPO_DS_RUN", str(recorded_run))
    monkeypatch.setenv("CLIPO_DS_RUNS", str(recorded_run))
    notebook = execute(tmp_path, put_notebook(name, tmp_path))
    kinds = {output.output_type for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs}
    assert kinds <= {"display_data", "execute_result"}
    assert 'class="error"' not in str(notebook.metadata["widgets"])


@pytest.mark.parametrize("name", ["01_quickstart.ipynb", *READERS])
def test_notebooks_are_thin_and_stored_without_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)
            assert len(cell.source.splitlines()) <= 5
