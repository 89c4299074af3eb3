"""A notebook as a page: Voila on this machine only, behind a token, with nothing fetched from elsewhere."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from clipo_ds.records import open_run
from clipo_ds.types import InputError
from clipo_ds.viz.frames import chosen_run

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def dashboard_command(notebook: str, port: int) -> list[str]:
    """The command that serves a notebook.

    Raises:
        InputError: There is no such notebook.
    """
    file = Path(notebook) if notebook.endswith(".ipynb") else NOTEBOOKS / f"{notebook}.ipynb"
    if not file.is_file():
        have = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise InputError(f"`notebook` must be one of {have}, or a file, got '{notebook}'")
    return [
        sys.executable, "-m", "voila", str(file), "--template=clipo", "--no-browser", "--Voila.ip=127.0.0.1",
        f"--port={port}", "--Voila.port_retries=0", "--Voila.auto_token=True",
    ]  # fmt: skip


def dashboard_environment(run: Path, token: str) -> dict[str, str]:
    """What the server and its kernels are told: the run, the token (in no list of processes), the page's template."""
    path = os.pathsep.join(filter(None, [str(NOTEBOOKS / "dashboard"), os.environ.get("JUPYTER_PATH")]))
    return os.environ | {"CLIPO_DS_RUN": str(run.resolve()), "JUPYTER_TOKEN": token, "JUPYTER_PATH": path}


def main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/dashboard.py [RUN] [--notebook NAME] [--port 8866]`; serves until it is interrupted."""
    parser = argparse.ArgumentParser(prog="dashboard.py", description="Serve a notebook as a page on this machine.")
    parser.add_argument("run", metavar="RUN", nargs="?", help="run folder (default: the newest under runs/)")
    parser.add_argument(
        "--notebook", default="02_embedding_clusters", help="of notebooks/, or a file (default: 02_embedding_clusters)"
    )
    parser.add_argument("--port", type=int, default=8866, help="(default: 8866)")
    arguments = parser.parse_args(argv)
    try:
        run = open_run(arguments.run or chosen_run(NOTEBOOKS.parent / "runs"))
        command = dashboard_command(arguments.notebook, arguments.port)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    token = secrets.token_hex(16)
    sys.stdout.write(f"{run.path} on http://127.0.0.1:{arguments.port}/?token={token}\n")
    sys.stdout.flush()
    os.execve(command[0], command, dashboard_environment(run.path, token))
