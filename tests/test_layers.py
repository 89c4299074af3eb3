"""The house keeps its floors: who may import whom in the package, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clipo_ds"

# A file imports only lower layers, or files before it in its own.
LAYERS: dict[str, list[str]] = {
    "L0 pure maths": [
        "types",
        "grouping",
        "contrastive_kernels",
        "contrastive",
        "advantages",
        "objectives",
    ],
    "L1 text and files": [
        "schema.base",
        "schema.model",
        "schema.task",
        "schema.data",
        "schema.rollout",
        "schema.rewards",
        "schema.learning",
        "schema.running",
        "schema.train",
        "schema",
        "fields",
        "ds_config",
        "config",
        "sources",
        "brackets",
        "thoughts",
        "stated",
        "choices",
        "extraction",
        "spelling",
        "measures",
        "real_sets",
        "equality",
        "math_worker",
        "algebra",
        "symbolic",
        "answers",
        "data_digest",
        "templates",
        "data",
        "rationals",
        "mathwords",
        "mathpatterns",
        "mathtokens",
        "wordreader",
        "mathtext",
        "mathunits",
        "operands",
        "expressions",
        "equations",
        "contexts",
        "doubts",
        "verdicts",
        "restated",
        "steps",
        "arithmetic",
        "rewards",
        "batching",
        "environment",
        "network",
        "allocator",
        "cores",
        "shared_memory",
        "disk",
        "prompt_store",
        "record_tables",
        "records",
        "folder_lock",
        "superseded",
        "warm_start",
    ],
    "L2 engines": [
        "threads",
        "distributed",
        "gguf",
        "families",
        "original_names",
        "turns",
        "models",
        "sampling",
        "decoding",
        "library_decoding",
        "generation",
        "token_head",
        "scoring",
        "noise",
        "policy",
        "start_check",
        "checks",
        "weight_sync",
        "vllm_room",
        "vllm_loading",
        "vllm_engine",
        "vllm_checks",
        "vllm_client",
        "vllm_transfer",
        "vllm_server",
        "vllm_worker",
        "contrastive_term",
        "checkpoint",
        "trackers",
    ],
    "L3 loop": [
        "unverified",
        "evaluate",
        "display",
        "experience",
        "rows",
        "metrics",
        "parity",
        "update",
        "ahead",
        "resuming",
        "run_folder",
        "loading",
        "parts",
        "rescue",
        "periodic_evaluation",
        "trainer",
        "standalone",
        "compare",
        "serve",
    ],
    "L4 command line": ["cli"],
}
ORDER = [name for layer in LAYERS.values() for name in layer]
PURE = LAYERS["L0 pure maths"] + LAYERS["L1 text and files"]
ENGINES = {"deepspeed", "peft", "vllm"}
WITHOUT_TORCH = ["types", "schema", "config", "answers", "steps", "records"]

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`contrastive` for clipo_ds/contrastive.py, `viz.frames` for clipo_ds/viz/frames.py, `` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in FILES}
PICTURES = sorted(name for name in MODULES if name.split(".")[0] == "viz")


def imported(tree: ast.Module, *, at_import: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; with `at_import` only those that importing the module itself brings in."""
    for node in _nodes(tree, at_import):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports of this package are absolute"
            assert node.module is not None
            # `from clipo_ds import records` names a module, `from clipo_ds.records import Run` something inside one.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _nodes(parent: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(parent):
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _nodes(node, at_import)


def own_modules(tree: ast.Module, *, at_import: bool = False) -> set[str]:
    """Modules of this package that a module imports; the package's own exports count as ``."""
    found = set()
    for name in imported(tree, at_import=at_import):
        head, *rest = name.split(".")
        if head == "clipo_ds":
            inside = [".".join(rest[:length]) for length in range(len(rest), 0, -1)]
            found.add(next((module for module in inside if module in MODULES), ""))
    return found


def libraries(tree: ast.Module, *, at_import: bool = False) -> set[str]:
    """Top-level names of everything a module imports."""
    return {name.split(".")[0] for name in imported(tree, at_import=at_import)}


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def test_every_module_has_its_place_in_the_layers() -> None:
    placed = set(MODULES) - set(PICTURES) - {""}
    assert placed - set(ORDER) == set(), "give new modules a place in LAYERS"
    assert set(ORDER) - placed == set(), "LAYERS names modules that do not exist"


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    above = own_modules(parse(module)) - set(ORDER[: ORDER.index(module)])
    assert above == set(), f"clipo_ds.{module} reaches up (`` is the package itself) to {sorted(above)}"


@pytest.mark.parametrize("module", LAYERS["L0 pure maths"])
def test_pure_maths_needs_torch_alone(module: str) -> None:
    foreign = libraries(parse(module)) - set(sys.stdlib_module_names) - {"clipo_ds", "torch", "jaxtyping"}
    assert foreign == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(LAYERS["L2 engines"])))
def test_only_the_engine_layer_knows_deepspeed_peft_and_vllm(module: str) -> None:
    assert libraries(parse(module)) & ENGINES == set()


def test_the_pictures_read_records_only() -> None:
    for module in PICTURES:
        tree = parse(module)
        assert own_modules(tree) - set(PICTURES) <= {"folder_lock", "network", "records", "steps", "types"}, module
        assert "torch" not in libraries(tree), module


def test_nothing_depends_on_the_pictures() -> None:
    assert [module for module in set(MODULES) - set(PICTURES) if own_modules(parse(module)) & set(PICTURES)] == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_text_and_files_name_no_torch_when_imported(module: str) -> None:
    assert "torch" not in libraries(parse(module), at_import=True)


@pytest.mark.parametrize("module", ["", *WITHOUT_TORCH, *PICTURES])
def test_text_and_files_import_where_there_is_no_torch(module: str) -> None:
    name = f"clipo_ds.{module}".rstrip(".")
    blocked = ["torch", "transformers", *sorted(ENGINES)]
    # Not None in sys.modules, which scipy takes for an imported torch.
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(name)\n"
        f"sys.meta_path.insert(0, Missing())\nimport {name}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_package_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a module docstring is missing"


def test_the_type_checker_covers_exactly_the_pure_layers() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["mypy"]["files"] == [str(MODULES[module].relative_to(ROOT)) for module in PURE]
