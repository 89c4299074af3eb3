"""Where problems come from: files, shipped files, dataset folders and the Hub, read row by row and checked.

Layer L1: imports pyarrow, `clipo_ds.config` and `clipo_ds.types`; `datasets` only for a source that needs it.
A source is

    FILE.parquet, FILE.jsonl    a file
    recipes:FILE                a file shipped in clipo_ds/recipes
    FOLDER[:SPLIT]              a local folder that `datasets.load_dataset` reads
    ORG/NAME[/CONFIG][:SPLIT]   a dataset on the Hugging Face Hub; SPLIT may be left out where there is only one

and a row of any of them is read by these columns (of several the first that is there and not null):

    the problem       prompt (text, or a list of {role, content} messages, the last one the user's), question, problem
    the ground truth  reward_model.ground_truth, ground_truth, answer, solution (text or number). Outside reward_model a
                      text with lines like "#### 18", as GSM8K writes its answers, stands for the last one's 18
    its origin        data_source, else the name of the file or dataset

Every other column, `extra_info` among them, goes into the metadata as it is, for reward functions. That covers the
layout of RLVR trainers (data_source, prompt, ability, reward_model, extra_info) and those of GSM8K and MATH themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipo_ds.config import RECIPES
from clipo_ds.types import InputError

FILE_KINDS = (".parquet", ".jsonl")
OTHER_FILE_KINDS = (".arrow", ".csv", ".gz", ".json", ".pq", ".tsv", ".txt", ".zip", ".zst")
PROBLEM_COLUMNS = ("prompt", "question", "problem")
TRUTH_COLUMNS = ("ground_truth", "answer", "solution")
FORMS = "a .parquet or .jsonl file, `recipes:FILE`, a dataset folder or a Hugging Face dataset id (`org/name:split`)"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """A row that was read and checked, before templates and tokens."""

    where: str  # source and row, for messages
    messages: list[dict[str, str]]  # role and content; the last one is the user's
    ground_truth: str
    source: str
    metadata: dict[str, Any]


def read_problems(given: str, *, field: str, max_rows: int | None = None) -> Iterator[Problem]:
    """Read and check the rows of one source, one at a time.

    Args:
        given: The source, in a form that the module's docstring lists.
        field: The setting that named it, for messages.
        max_rows: Read at most this many rows; None reads all.

    Raises:
        InputError: The source is of no known form, missing, unreadable or empty, or a row is malformed; the message
            names source and row, counted from 0.
    """
    path = _file_of(given, field)
    if path is None:
        name, rows = _dataset_rows(given, field, max_rows)
    else:
        name, rows = path.stem, _file_rows(path, given, field)
    empty = True
    for where, row in islice(rows, max_rows):
        empty = False
        yield _parse_row(row, where, name)
    if empty:
        raise InputError(f"`{field}` must name data with at least one row, got {given!r} with none")


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """A short name for each source, to label its results: the file's stem, or the dataset id without its owner.

    Sources that share a name are called by what they were given as.

    >>> list(name_sources(["data/test/math.parquet", "org/gsm8k:test", "a/x.jsonl", "b/x.jsonl"]))
    ['math', 'gsm8k:test', 'a/x.jsonl', 'b/x.jsonl']
    """
    short = [_short_name(given) for given in sources]
    return {given if short.count(name) > 1 else name: given for given, name in zip(sources, short, strict=True)}


def _short_name(given: str) -> str:
    name = given.removeprefix("recipes:").rpartition("/")[2]
    return Path(name).stem if Path(name).suffix in FILE_KINDS else name


def _file_of(given: str, field: str) -> Path | None:
    """The file that a source names, or None if it names a dataset folder or id."""
    if given.startswith("recipes:"):
        path = RECIPES / given.removeprefix("recipes:")
        if path.suffix not in FILE_KINDS or not path.is_file():
            shipped = ", ".join(sorted(p.name for p in RECIPES.iterdir() if p.suffix in FILE_KINDS)) or "none"
            raise InputError(f"`{field}` must be `recipes:` and a shipped file ({shipped}), got {given!r}")
        return path
    path = Path(given).expanduser()
    if path.suffix in FILE_KINDS and not path.is_dir():
        if not path.is_file():
            raise InputError(f"`{field}` must name a file that exists, got {given!r}")
        return path
    if path.is_file() or path.suffix in OTHER_FILE_KINDS:
        raise InputError(f"`{field}` must be {FORMS}, got {given!r}")
    return None


def _file_rows(path: Path, given: str, field: str) -> Iterator[tuple[str, Row]]:
    """The rows of a file, with where they are; reading errors become `InputError`."""
    try:
        yield from _parquet_rows(path, given) if path.suffix == ".parquet" else _jsonl_rows(path, given)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        what = "parquet" if path.suffix == ".parquet" else "UTF-8 text"
        raise InputError(f"`{field}` must name a readable {what} file, got {given!r}: {_first_line(error)}") from error


def _parquet_rows(path: Path, given: str) -> Iterator[tuple[str, Row]]:
    index = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{given}, row {index}", row
                index += 1


def _jsonl_rows(path: Path, given: str) -> Iterator[tuple[str, Row]]:
    index = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{given}, row {index} (line {number})"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: the line must be one JSON object, got a syntax error: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: the line must be one JSON object, got {_shortened(row)}")
            yield where, row
            index += 1


def _dataset_rows(given: str, field: str, max_rows: int | None) -> tuple[str, Iterator[tuple[str, Row]]]:
    """Name and rows of a dataset folder or of a dataset on the Hub."""
    name, _, split = given.partition(":")
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        name, repository, config = folder.name, str(folder), None
    elif match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", name):
        repository, config = match.groups()
        name = repository
    else:
        raise InputError(f"`{field}` must be {FORMS}, got {given!r}")

    import datasets  # takes seconds to import, and most runs read files

    try:
        loaded = datasets.load_dataset(repository, config, split=split or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"`{field}` must be {FORMS}, got {given!r}: {_first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise InputError(
                f"`{field}` must name one split ({', '.join(loaded)}), as in '{given}:{next(iter(loaded))}', "
                f"got {given!r}"
            )
        loaded = next(iter(loaded.values()))
    if max_rows is not None:
        loaded = loaded.select(range(min(max_rows, len(loaded))))
    return name, ((f"{given}, row {i}", row) for i, row in enumerate(loaded))


def _parse_row(row: Row, where: str, name: str) -> Problem:
    column = next((c for c in PROBLEM_COLUMNS if row.get(c) is not None), None)
    if column is None:
        raise InputError(f"{where}: one of {', '.join(PROBLEM_COLUMNS)} must be given, got the columns {_columns(row)}")
    return Problem(
        where=where,
        messages=_messages(row[column], column, where),
        ground_truth=_ground_truth(row, where),
        source=str(row.get("data_source") or name),
        metadata={c: v for c, v in row.items() if c not in (column, "data_source", "reward_model")},
    )


def _messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where}: `{column}` must be the problem's text, got {value!r}")
        return [{"role": "user", "content": value}]
    whole = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not whole or not value or value[-1]["role"] != "user" or not value[-1]["content"].strip():
        raise InputError(
            f"{where}: `{column}` must be a text, or a list of messages with `role` and `content`, the last one the "
            f"user's, got {_shortened(value)}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _ground_truth(row: Row, where: str) -> str:
    if row.get("reward_model") is not None:
        model = row["reward_model"]
        if not isinstance(model, dict):
            raise InputError(f"{where}: `reward_model` must be an object with `ground_truth`, got {_shortened(model)}")
        return _truth_text(model.get("ground_truth"), "reward_model.ground_truth", where)
    column = next((c for c in TRUTH_COLUMNS if row.get(c) is not None), None)
    if column is None:
        raise InputError(
            f"{where}: one of reward_model.ground_truth, {', '.join(TRUTH_COLUMNS)} must be given, got the columns "
            f"{_columns(row)}"
        )
    truth = _truth_text(row[column], column, where)
    final = re.findall(r"^####[ \t]*(\S.*)$", truth, flags=re.MULTILINE)
    return final[-1].strip() if final else truth


def _truth_text(value: Any, column: str, where: str) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not (isinstance(value, str) and value.strip()):
        raise InputError(f"{where}: `{column}` must be a text or a number, got {_shortened(value)}")
    return str(value).strip()


def _columns(row: Row) -> str:
    return ", ".join(str(column) for column in row) or "(none)"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
