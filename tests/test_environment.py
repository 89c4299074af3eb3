"""What a run ran on is described without torch, without a GPU and outside a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipo_ds.environment import describe_environment

PACKAGE = Path(__file__).parents[1] / "clipo_ds"
DESCRIBE = """
import json
from clipo_ds.environment import describe_environment
print(json.dumps(describe_environment(world_size=2)))
"""


def describe_in(folder: Path) -> dict:
    """The description that a copy of the package in a folder gives."""
    output = subprocess.run([sys.executable, "-c", DESCRIBE], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(output.stdout)


def git(folder: Path, *arguments: str) -> str:
    identity = {name: "test" for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME")} | {
        name: "test@example.org" for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL")
    }
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **identity}).stdout


def test_versions_and_machine_are_described():
    facts = describe_environment(world_size=2)
    assert facts["world_size"] == 2
    assert {"torch", "deepspeed", "transformers", "peft"} <= set(facts["packages"])
    assert facts["cpu"] and facts["cpu_threads"] >= 1 and facts["memory_gb"] > 0
    assert isinstance(facts["gpus"], list)
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_package_s_own_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "clipo_ds").mkdir(parents=True)
    for name in ("__init__.py", "environment.py"):
        shutil.copy(PACKAGE / name, checkout / "clipo_ds" / name)
    (checkout / ".gitignore").write_text("__pycache__/\n.venv/\n")
    assert describe_in(checkout)["commit"] is None
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    commit = git(checkout, "rev-parse", "HEAD").strip()
    assert describe_in(checkout)["commit"] == commit
    (checkout / "notes.txt").touch()
    assert describe_in(checkout)["commit"] == f"{commit}+changes"
    # Installed into the environment of somebody else's repository, the package has no commit.
    site_packages = checkout / ".venv" / "site-packages"
    shutil.copytree(checkout / "clipo_ds", site_packages / "clipo_ds")
    assert describe_in(site_packages)["commit"] is None
