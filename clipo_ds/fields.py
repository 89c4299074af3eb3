"""The fields of the configuration as a table: what `--help`, the README and the reader of recipes know about them.

Everything comes from `clipo_ds.schema`: names, types and defaults from the dataclasses, meanings from the docstring
under each field. Imports schema and types only, and no torch.

`python -m clipo_ds.fields README.md` renews the table between the README's two markers.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from clipo_ds.schema import TrainConfig
from clipo_ds.types import InputError

README_MARKERS = ("<!-- fields -->", "<!-- /fields -->")

_WORDS: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Field:
    """One field, or one section, of the configuration."""

    path: str  # dotted, as in a flag: `contrastive.temperature`
    hint: Any  # resolved type
    default: Any  # MISSING where the user has to give one
    doc: str  # its docstring on one line

    @property
    def section(self) -> type | None:
        """The dataclass behind a section, None for a plain field."""
        options = get_args(self.hint) if is_union(self.hint) else (self.hint,)
        return next((option for option in options if isinstance(option, type) and is_section(option)), None)

    @property
    def optional(self) -> bool:
        return is_union(self.hint) and type(None) in get_args(self.hint)

    @property
    def default_text(self) -> str:
        """The default as one would write it in YAML; `on` for a section that is there unless switched off."""
        if self.section is not None:
            return "null" if self.default is None else "on"
        return "required" if self.default is MISSING else yaml_text(self.default)


def fields_of(cls: type, prefix: str = "") -> Iterator[Field]:
    """The fields of one dataclass, sections included but not entered."""
    hints = get_type_hints(cls)
    docs = {param.arg_name: " ".join((param.description or "").split()) for param in parse_from_object(cls).params}
    for entry in dataclasses.fields(cls):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        yield Field(prefix + entry.name, hints[entry.name], default, docs.get(entry.name, ""))


@functools.cache
def known_fields() -> dict[str, Field]:
    """Every field and section of `TrainConfig` by dotted path, a section before its fields."""

    def walk(cls: type, prefix: str) -> Iterator[Field]:
        for entry in fields_of(cls, prefix):
            yield entry
            if entry.section is not None:
                yield from walk(entry.section, entry.path + ".")

    return {entry.path: entry for entry in walk(TrainConfig, "")}


def is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def describe(hint: Any) -> str:
    """A type in the words of an error message.

    >>> describe(int | None), describe(list[str]), describe(Literal["k1", "k2"])
    ('an integer or null', 'a list of texts', 'one of k1, k2')
    """
    origin, args = get_origin(hint), get_args(hint)
    if is_union(hint):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(args) if len(args) > 1 else str(args[0])
    if origin is tuple:
        return f"a list of {len(args)} numbers"
    if origin is list:
        return f"a list of {'texts' if args[0] is str else describe(args[0])}"
    if origin is dict:
        return "{name: value, …}"
    if is_section(hint):
        return "{" + ", ".join(entry.name for entry in dataclasses.fields(hint)) + "}"
    return _WORDS[hint]


def yaml_text(value: Any) -> str:
    """A value as YAML has it: null, true, [a, b], {a: b}.

    >>> yaml_text(None), yaml_text((0.9, 0.999)), yaml_text({"think": True})
    ('null', '[0.9, 0.999]', '{think: true}')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(yaml_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {yaml_text(item)}" for name, item in value.items()) + "}"
    return str(value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted name that `name` most likely means, or None where none is near.

    The last part decides; the parts before it break ties, so a field that is put in the wrong section is found too.

    >>> nearest("contrastive.temprature", ["sampling.temperature", "contrastive.temperature", "steps"])
    'contrastive.temperature'
    >>> nearest("group_size", ["rollout.group_size", "steps"])
    'rollout.group_size'
    >>> nearest("colour", ["rollout.group_size", "steps"]) is None
    True
    """

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    section, _, leaf = name.rpartition(".")
    scores: dict[str, float] = {}
    for candidate in known:
        own_section, _, own_leaf = candidate.rpartition(".")
        if likeness(leaf, own_leaf) >= 0.65:
            scores[candidate] = likeness(leaf, own_leaf) + likeness(section, own_section) / 2
    return max(scores, key=lambda candidate: scores[candidate], default=None)


def build_parser(recipes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser whose `--help` lists every field with its docstring, type and default, a group a section.

    Args:
        recipes: Names of the shipped recipes, for the help text of `--recipe`.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="deepspeed scripts/train.py --ds_config FILE --recipe NAME [--section.field VALUE ...]",
        description="Train a policy with verifiable rewards and the contrastive term. A recipe gives what differs from "
        "the defaults below; flags come after it, the last one wins.",
        epilog="A section that may be null is switched off by `--contrastive null` and on by a flag of one of its "
        "fields. Lists and sections are YAML, --data.train '[a.parquet, b.parquet]'; one value goes without brackets.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32, width=110),
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {"": parser.add_argument_group("run")}
    names = ", ".join((*recipes, "or a YAML file"))
    groups[""].add_argument("--recipe", metavar="NAME", help=f"What to train: {names}. (required)")
    for entry in known_fields().values():
        if entry.path == "recipe":
            continue
        parent = entry.path.rpartition(".")[0]
        if entry.section is not None:
            groups[entry.path] = parser.add_argument_group(entry.path, entry.doc.replace("%", "%%"))
            if not entry.optional:
                continue
            parent = entry.path
            kind, text = "null", f"Switch the section off. (default: {entry.default_text})"
        else:
            choices = get_args(entry.hint) if get_origin(entry.hint) is Literal else ()
            kind = "{" + ",".join(choices) + "}" if choices else "VALUE"
            words = "" if choices else f"{describe(entry.hint)}; "
            text = f"{entry.doc} ({words}default: {entry.default_text})"
        groups[parent].add_argument(f"--{entry.path}", metavar=kind, help=text.replace("%", "%%"))
    return parser


def fields_markdown() -> str:
    """Every field as Markdown, a table a section: what the README holds between its two markers."""
    tables: dict[str, list[str]] = {"": []}
    for entry in known_fields().values():
        if entry.section is not None:
            state = f" Default: {entry.default_text}; `--{entry.path} null` switches it off." if entry.optional else ""
            tables[entry.path] = [f"### `{entry.path}`", "", entry.doc + state, ""]
    lines = ["### The run", ""]
    for section, head in tables.items():
        rows = [
            f"| `{entry.path}` | {describe(entry.hint)} | `{entry.default_text}` | {entry.doc.replace('|', '&#124;')} |"
            for entry in known_fields().values()
            if entry.section is None and entry.path.rpartition(".")[0] == section
        ]
        lines += [*head, "| field | value | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def readme_table(readme: str) -> tuple[str, str, str]:
    """Split a README into what stands before, between and after the two markers.

    Raises:
        InputError: A marker is missing.
    """
    start, end = README_MARKERS
    before, found_start, rest = readme.partition(start)
    between, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise InputError(f"`README` must hold the markers {start} and {end}, got a text without them")
    return before + start, between, end + after


def main(argv: Sequence[str]) -> None:
    """Write the table to the file named, between its markers, or to standard output."""
    if not argv:
        sys.stdout.write(fields_markdown())
        return
    path = Path(argv[0])
    before, _, after = readme_table(path.read_text(encoding="utf-8"))
    path.write_text(f"{before}\n{fields_markdown()}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
