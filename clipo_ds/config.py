"""Recipes and flags into a checked `TrainConfig`, and back into YAML.

A recipe is YAML with what differs from the defaults of `clipo_ds.schema`; flags lie over it, the last one wins. Both
are read into one flat table, dotted path -> value and where it was said, so that an error names recipe, line and field.
Imports schema, fields, ds_config and types, and no torch.

Departure from the design: not jsonargparse. Its 4.53 keeps the fields of a section that may be null (`contrastive`,
`task`, `model.lora`) out of `--help`, answers a misspelt field there with a dump of the union's alternatives, lets a
doubled YAML key pass, and takes no single value for a list. Working round these took more than the reader below, which
leans on PyYAML, argparse and docstring_parser.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from clipo_ds.ds_config import read_ds_config
from clipo_ds.fields import (
    Field,
    build_parser,
    describe,
    fields_markdown,
    fields_of,
    is_section,
    is_union,
    known_fields,
    nearest,
    yaml_text,
)
from clipo_ds.schema import MAY_BE_INFINITE, TrainConfig
from clipo_ds.types import InputError

__all__ = [
    "RECIPES",
    "build_parser",
    "dump_config",
    "fields_markdown",
    "load_config",
    "nearest",
    "read_ds_config",
    "shipped_recipes",
    "split_train_arguments",
]

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"

_ON = object()  # the value of a section that is there, whatever its fields
_MISFIT = object()


@dataclass(frozen=True)
class _Setting:
    value: Any
    source: str  # "recipe demo, line 7" or "recipe demo, flag --seed"


_Settings = dict[str, _Setting]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: 1e-6 is a number; yes, 010, 12:30 and 2024-01-01 are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - replaces PyYAML's table of YAML 1.1


class _Dumper(yaml.SafeDumper):
    """Quotes text that either this module's reader or a YAML 1.1 reader would take for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks of Unicode bare, and reads a space.
        return self.represent_scalar(
            "tag:yaml.org,2002:str", data, style='"' if set(data) & set("\x85\u2028\u2029") else None
        )


_Dumper.add_representer(str, _Dumper.represent_str)

_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
for _class, _tag, _pattern, _first in (
    (_Loader, "null", r"~|null|Null|NULL|", "~nN"),
    (_Loader, "bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_Loader, "int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (_Loader, "float", _FLOAT, "-+0123456789."),
    (_Dumper, "float", _FLOAT, "-+0123456789."),
):
    first = [*_first, ""] if _tag == "null" else list(_first)
    _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), first)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str | Path, overrides: Sequence[str] | str = ()) -> TrainConfig:
    """Read a recipe, lay overrides over it, and check the whole.

    Args:
        recipe: A shipped recipe's name, or a YAML file (a run folder's `config.yaml` too).
        overrides: `--a.b=1`, `--a.b` and `1`, or `a.b=1`, later ones win. Values are YAML; `null` switches an optional
            section off, and setting one of its fields switches it on with defaults for the rest.

    Raises:
        InputError: In one line, the recipe (with the line) or the flag, the field, the value and what would be right.
    """
    path = _find_recipe(recipe)
    label = f"recipe {path.stem}" if path.parent == RECIPES else str(path)
    settings: _Settings = {}
    for name, setting in _read_recipe(path, label):
        _put(settings, name, setting)
    if "recipe" not in settings:
        settings["recipe"] = _Setting(str(recipe), label)
    for name, text in _split_overrides([*shlex.split(overrides)] if isinstance(overrides, str) else overrides):
        for inner, setting in _read_flag(name, text, f"{label}, flag --{name}"):
            _put(settings, inner, setting)
    return _build(TrainConfig, "", settings, label)


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML, every field said, which `load_config` reads back to an equal one."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def split_train_arguments(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe and the overrides of a command line of `scripts/train.py`.

    `--help` prints every field and exits. The launcher's `--local_rank` is dropped: ranks come from the environment.
    A run that is resumed goes on with the settings in its own folder, whether its recipe is given again or not.

    Raises:
        InputError: No recipe, two of them, another one than that of the run to resume, or something that is not a flag.
    """
    if {"-h", "--help"} & set(argv):
        build_parser(shipped_recipes()).print_help()
        raise SystemExit(0)
    recipes: list[str] = []
    overrides: list[str] = []
    given: dict[str, str] = {}
    for name, text in _split_overrides(argv):
        if name == "recipe":
            recipes.append(text)
        elif name != "local_rank":
            overrides.append(f"--{name}={text}")
            given[name] = text
    begun = _begun_run(given)
    if len(recipes) > 1 or (begun is None and not recipes):
        got = "nothing" if not recipes else " and ".join(recipes)
        raise InputError(f"`recipe` must be one of {', '.join(shipped_recipes())}, or a YAML file, got {got}")
    if begun is None:
        return recipes[0], overrides
    for again in recipes:
        _require_own_recipe(again, begun)
    # The folder may have been moved since its file was written.
    return str(begun / "config.yaml"), [f"--run_dir={begun}", *overrides]


def _require_own_recipe(recipe: str, run_dir: Path) -> None:
    own, again = _recipe_of(run_dir / "config.yaml"), _recipe_of(recipe)
    if Path(own).resolve() != Path(again).resolve():
        raise InputError(f"`recipe` must be that of the run in {run_dir} to resume it ({own}), got {again}")
    logger.info("going on with the settings in %s; recipe %s is not read again", run_dir / "config.yaml", again)


def _recipe_of(recipe: str | Path) -> str:
    """What a run of this recipe has in its field `recipe`: its name, unless the file says another."""
    named = dict(_read_recipe(_find_recipe(recipe), str(recipe))).get("recipe")
    return str(recipe if named is None else named.value)


def _begun_run(given: Mapping[str, str]) -> Path | None:
    """The folder of the run that flags ask to resume, where it is there."""
    resume = given.get("resume", "null")
    if resume == "null" or (resume == "auto" and "run_dir" not in given):
        return None
    folder = Path(given["run_dir"]) if resume == "auto" else Path(resume).resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def _find_recipe(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return RECIPES / f"{recipe}.yaml"
    if Path(recipe).is_file():
        return Path(recipe)
    near = nearest(str(recipe), shipped)
    hint = f"; did you mean `{near}`?" if near else ""
    raise InputError(f"`recipe` must be one of {', '.join(shipped)}, or an existing YAML file, got '{recipe}'{hint}")


def _read_recipe(path: Path, label: str) -> Iterator[tuple[str, _Setting]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: not UTF-8 text ({error})") from error
    node = _parse(text, label, numbered=True)
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{label}: `recipe` must hold fields like `steps: 100`, got {text.strip()[:40]!r}")
    yield from _flatten(node, "", label, set(), numbered=True)


def _read_flag(name: str, text: str, source: str) -> Iterator[tuple[str, _Setting]]:
    if name == "recipe":
        raise InputError(f"{source}: `recipe` must be given once, got another one among the overrides")
    field = known_fields().get(name)
    if field is None:
        raise _unknown(name, source)
    # Free text is taken as it stands ("Answer: yes", "# 1"), unless it is quoted, null, or a list where one is due.
    if _admits_text(field.hint) and text != "null" and text.strip()[:1] not in ("'", '"', "["):
        yield name, _Setting(text, source)
        return
    node = _parse(text, source, numbered=False)
    if node is not None:
        yield from _flatten(node, name, source, set(), numbered=False)
    else:
        yield name, _Setting("", source)


def _parse(text: str, label: str, *, numbered: bool) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark and numbered else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{label}{where}: not YAML: {what}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{label}: not YAML: {' '.join(str(error).split())}") from error


def _flatten(
    node: yaml.Node, path: str, label: str, seen: set[str], *, numbered: bool
) -> Iterator[tuple[str, _Setting]]:
    """Give (dotted path, setting) for every field under a node, with unknown and doubled keys refused."""
    field = known_fields().get(path)
    source = f"{label}, line {node.start_mark.line + 1}" if numbered else label
    if not isinstance(node, yaml.MappingNode) or (field is not None and field.section is None):
        yield path, _Setting(_construct(node, source), source)
        return
    if path:
        yield path, _Setting(_ON, source)
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        name = f"{path}.{key}" if path else key
        where = f"{label}, line {key_node.start_mark.line + 1}" if numbered else label
        if name not in known_fields():
            raise _unknown(name, where)
        if name in seen:
            raise InputError(f"{where}: `{name}` must be given once, got it twice")
        seen.add(name)
        yield from _flatten(value_node, name, label, seen, numbered=numbered)


def _construct(node: yaml.Node, source: str) -> Any:
    _require_single_keys(node, source)
    try:
        return _Loader("").construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{source}: not YAML: {error.problem}") from error


def _require_single_keys(node: yaml.Node, source: str) -> None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"{source}: `{key}` must be given once, got it twice")
    for inner in node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in pairs]:
        _require_single_keys(inner, source)


def _split_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of field and text from `--a.b=1`, `--a.b 1` and `a.b=1`."""
    remaining = iter(arguments)
    for argument in remaining:
        is_flag = argument.startswith("--")
        name, equals, text = argument.removeprefix("--").partition("=")
        if not re.fullmatch(r"\w[\w.-]*", name) or not (is_flag or equals):
            forms = "--field VALUE or --field=VALUE, a list written '[a, b]'"
            raise InputError(f"`overrides` must be {forms}, got {argument!r}")
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise InputError(f"`{name}` must be followed by a value (--{name} VALUE), got none")
        yield name, text


def _put(settings: _Settings, path: str, setting: _Setting) -> None:
    """Say one thing: it replaces what was said before, and switches on the sections around it."""
    if known_fields()[path].section is not None and setting.value is None:
        for inner in [name for name in settings if name.startswith(path + ".")]:
            del settings[inner]
    settings[path] = setting
    parent = path.rpartition(".")[0]
    while parent:
        if parent not in settings or settings[parent].value is None:
            settings[parent] = _Setting(_ON, setting.source)
        parent = parent.rpartition(".")[0]


def _build(cls: type, prefix: str, settings: _Settings, label: str) -> Any:
    """Make a dataclass from the settings under a prefix; what is not said keeps the schema's default."""
    values: dict[str, Any] = {}
    for field in (known_fields()[prefix + entry.name] for entry in dataclasses.fields(cls)):
        if field.path not in settings:
            continue
        setting = settings[field.path]
        name = field.path.removeprefix(prefix)
        if field.section is not None and setting.value is _ON:
            values[name] = _build(field.section, field.path + ".", settings, label)
        else:
            values[name] = _fit_or_raise(setting.value, field, setting.source)
    try:
        return cls(**values)
    except InputError as error:
        # A range error names the fields it is about: say where the first one that recipe or flags set was set.
        named = (plain or quoted for quoted, plain in re.findall(r"`([\w.]+)`|(\w+\.[\w.]*\w)", str(error)))
        source = next((settings[name].source for name in named if name in settings), label)
        raise InputError(f"{source}: {error}") from error


def _fit_or_raise(value: Any, field: Field, source: str) -> Any:
    fitted = _fit(value, field.hint, field.path, source)
    if fitted is _MISFIT:
        wanted = describe(field.hint)
        if isinstance(value, float):
            wanted = wanted.replace("a number", "a finite number")
        if field.section is not None:
            wanted = f"a section ({field.path}.…)" + (" or null" if field.optional else "")
        shown = repr(value) if isinstance(value, str) else yaml_text(value)
        raise InputError(f"{source}: `{field.path}` must be {wanted}, got {shown}")
    return fitted


def _fit(value: Any, hint: Any, path: str, source: str) -> Any:
    """The value as the type has it, or `_MISFIT`. Strict, but an integer is a number and one value is a list of one."""
    origin, args = get_origin(hint), get_args(hint)
    if is_union(hint):
        fits = (_fit(value, option, path, source) for option in args)
        return next((fitted for fitted in fits if fitted is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if isinstance(value, str) and value in args else _MISFIT
    if origin in (list, tuple):
        items = value if isinstance(value, list) else [value]
        kinds = args * len(items) if origin is list else args
        if value is None or len(kinds) != len(items):
            return _MISFIT
        pairs = enumerate(zip(items, kinds, strict=True))
        fitted = [_fit(item, kind, f"{path}[{i}]", source) for i, (item, kind) in pairs]
        return _MISFIT if any(item is _MISFIT for item in fitted) else origin(fitted)
    if origin is dict:
        return value if isinstance(value, dict) and all(isinstance(name, str) for name in value) else _MISFIT
    if is_section(hint):
        return _fit_item(value, hint, path, source) if isinstance(value, dict) else _MISFIT
    if hint is float:
        return float(value) if _is_number(value, path) else _MISFIT
    if isinstance(value, bool) and hint is not bool:
        return _MISFIT
    return value if isinstance(value, hint) else _MISFIT


def _is_number(value: Any, path: str) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) or (math.isinf(value) and path in MAY_BE_INFINITE)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023


def _fit_item(value: dict[Any, Any], cls: type, path: str, source: str) -> Any:
    """An item of a list of sections, such as one of `reward.functions`."""
    fields = {field.path: field for field in fields_of(cls, path + ".")}
    for key in value:
        if f"{path}.{key}" not in fields:
            raise _unknown(f"{path}.{key}", source, list(fields))
    for name, field in fields.items():
        if field.default is MISSING and name.removeprefix(path + ".") not in value:
            raise InputError(f"{source}: `{name}` must be given, got none")
    return cls(**{key: _fit_or_raise(item, fields[f"{path}.{key}"], source) for key, item in value.items()})


def _admits_text(hint: Any) -> bool:
    return hint is str or (
        get_origin(hint) not in (tuple, dict) and any(_admits_text(option) for option in get_args(hint))
    )


def _unknown(name: str, source: str, known: Sequence[str] | None = None) -> InputError:
    near = nearest(name, known_fields() if known is None else known)
    hint = f"; did you mean `{near}`?" if near else " (--help lists them)"
    parent = known_fields().get(name.rpartition(".")[0])
    if parent is not None and get_origin(parent.hint) is dict:
        hint = f"; give `{parent.path}` as {describe(parent.hint)}"
    return InputError(f"{source}: `{name}` is not a field{hint}")
