"""Where problems come from: files, shipped files, dataset folders and the Hub, read row by row and checked.

Layer L1: imports pyarrow, `clipo_ds.config` and `clipo_ds.types`; `datasets` only for a source that needs it.
A source is

    FILE.parquet, FILE.jsonl    a file
    recipes:FILE                a file shipped in clipo_ds/recipes
    FOLDER[:SPLIT]              a local folder that `datasets.load_dataset` reads
    ORG/NAME[/CONFIG][:SPLIT]   a dataset on the Hugging Face Hub; SPLIT may be left out where there is only one

and a row of any of them is read by these columns (of several the first that is there and not null):

    the problem       prompt (text, or a list of {role, content} messages, the last one the user's, which may be written
                      as JSON text), question, problem
    the ground truth  reward_model.ground_truth, ground_truth, answer, solution (text or number; a number becomes its
                      shortest decimal without an exponent). Outside reward_model a text with lines like "#### 18", as
                      GSM8K writes its answers, stands for the last one's 18
    its origin        data_source, else the name of the file or dataset

Every other column, `extra_info` among them, goes into the metadata as it is, for reward functions. That covers the
layout of RLVR trainers (data_source, prompt, ability, reward_model, extra_info) and those of GSM8K and MATH themselves.
A row with an image, video or sound is refused: what the policy reads is text.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipo_ds.config import RECIPES
from clipo_ds.types import InputError

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10.0
FILE_KINDS = (".parquet", ".jsonl")
OTHER_FILE_KINDS = (".arrow", ".csv", ".gz", ".json", ".pq", ".tsv", ".txt", ".zip", ".zst")
PROBLEM_COLUMNS = ("prompt", "question", "problem")
TRUTH_COLUMNS = ("ground_truth", "answer", "solution")
FORMS = "a .parquet or .jsonl file, `recipes:FILE`, a dataset folder or a Hugging Face dataset id (`org/name:split`)"
MAX_DIGITS = 1000  # of a number that is a ground truth

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Read:
    """A row as a file or dataset holds it."""

    where: str  # source and row, for messages
    row: Row
    truths: Row  # the row again, with the numbers of its ground truth exact where Python's floats would not be


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
    try:
        path = _file_of(given, field)
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be entered, `~nobody`
        raise InputError(f"`{field}` must be {FORMS}, got {_shortened(given)}: {_first_line(error)}") from error
    if path is None:
        name, rows = _dataset_rows(given, field, max_rows)
    else:
        name, rows = path.stem, _file_rows(path, given, field)
    empty = True
    for read in islice(rows, max_rows):
        empty = False
        yield _parse_row(read, name)
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


def _file_rows(path: Path, given: str, field: str) -> Iterator[_Read]:
    """The rows of a file; reading errors become `InputError`."""
    try:
        yield from _parquet_rows(path, given) if path.suffix == ".parquet" else _jsonl_rows(path, given)
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        what = "parquet" if path.suffix == ".parquet" else "UTF-8 text"
        raise InputError(f"`{field}` must name a readable {what} file, got {given!r}: {_first_line(error)}") from error


def _parquet_rows(path: Path, given: str) -> Iterator[_Read]:
    index = 0
    with pq.ParquetFile(path) as file:
        short = _short_floats(file.schema_arrow)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield _Read(f"{given}, row {index}", row, _with_exact(row, short))
                index += 1


def _jsonl_rows(path: Path, given: str) -> Iterator[_Read]:
    index = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{given}, row {index} (line {number})"
            try:
                row, truths = json.loads(line), json.loads(line, parse_float=Decimal)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: the line must be one JSON object, got a syntax error: {error}") from error
            except (ValueError, ArithmeticError, RecursionError) as error:  # thousands of digits, or of brackets
                raise InputError(f"{where}: the line must be one JSON object, got: {_first_line(error)}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: the line must be one JSON object, got {_shortened(row)}")
            yield _Read(where, row, truths)
            index += 1


def _short_floats(schema: pa.Schema) -> dict[str, type[np.floating]]:
    """The columns of ground truths (dotted, where inside reward_model) that hold fewer digits than Python's floats."""
    kinds = {name: schema.field(name).type for name in TRUTH_COLUMNS if schema.names.count(name) == 1}
    model = schema.field("reward_model").type if schema.names.count("reward_model") == 1 else None
    if model is not None and pa.types.is_struct(model) and model.get_field_index("ground_truth") >= 0:
        kinds["reward_model.ground_truth"] = model.field("ground_truth").type
    numbers: dict[pa.DataType, type[np.floating]] = {pa.float16(): np.float16, pa.float32(): np.float32}
    return {name: numbers[kind] for name, kind in kinds.items() if kind in numbers}


def _with_exact(row: Row, short: Mapping[str, type[np.floating]]) -> Row:
    """The row with the decimals that its short floats stand for: 0.1, where Python has 0.10000000149011612."""
    exact = dict(row)
    for name, kind in short.items():
        outer, _, inner = name.partition(".")
        if not inner and row[name] is not None:
            exact[name] = Decimal(str(kind(row[name])))
        elif inner and row[outer] is not None and row[outer][inner] is not None:
            exact[outer] = {**row[outer], inner: Decimal(str(kind(row[outer][inner])))}
    return exact


def _dataset_rows(given: str, field: str, max_rows: int | None) -> tuple[str, Iterator[_Read]]:
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

    if not folder.is_dir():
        _require_on_hub(name, Path(datasets.config.HF_DATASETS_CACHE), given, field)
    try:
        loaded = datasets.load_dataset(repository, config, split=split or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
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
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            # Its rows are refused; to decode it first would ask for libraries that nobody needs.
            loaded = loaded.cast_column(column, type(feature)(decode=False))
    short = _short_floats(loaded.features.arrow_schema)
    return name, (_Read(f"{given}, row {i}", row, _with_exact(row, short)) for i, row in enumerate(loaded))


def _require_on_hub(repository: str, cache: Path, given: str, field: str) -> None:
    """Ask the Hub for a dataset in one short request: those of `datasets` take half a minute and a line each.

    Where the Hub cannot be reached, a cached copy will do.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    if huggingface_hub.constants.is_offline_mode():
        return
    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        gated = isinstance(error, GatedRepoError)
        why = "gives it to accounts with access only (`hf auth login`)" if gated else "has no such dataset"
        raise InputError(f"`{field}` must be {FORMS}, got {given!r}: not a folder, and the Hub {why}") from error
    except (HTTPError, OSError) as error:
        if not any(cache.glob(repository.replace("/", "___"))):
            raise InputError(
                f"`{field}` must be {FORMS}, got {given!r}: not a folder, and the Hub cannot be reached "
                f"({_first_line(error)})"
            ) from error
        logger.warning("the Hugging Face Hub cannot be reached; looking for the cached copy of %s", repository)


def _parse_row(read: _Read, name: str) -> Problem:
    row, where = read.row, read.where
    column = next((c for c in PROBLEM_COLUMNS if row.get(c) is not None), None)
    if column is None:
        raise InputError(f"{where}: one of {', '.join(PROBLEM_COLUMNS)} must be given, got the columns {_columns(row)}")
    for other, value in row.items():
        if _is_media(value, named=_names_media(other)):
            raise InputError(f"{where}: the row must be text alone, got {_shortened(value)} in `{other}`")
    return Problem(
        where=where,
        messages=_messages(row[column], column, where),
        ground_truth=_ground_truth(read.truths, where),
        source=str(row.get("data_source") or name),
        metadata={c: v for c, v in row.items() if c not in (column, "data_source", "reward_model")},
    )


@functools.cache
def _names_media(column: str) -> bool:
    return re.fullmatch(r"(image|video|audio)s?(_?\d+)?", column, flags=re.IGNORECASE) is not None


def _is_media(value: Any, *, named: bool) -> bool:
    """Whether a column's value is a picture, video or sound (or a list of some): by its form, or by the column's name.

    Columns that say "none" are let pass: null, empty texts and lists.
    """
    if isinstance(value, list):
        return any(_is_media(item, named=named) for item in value)
    if isinstance(value, dict):
        named = named or value.keys() == {"bytes", "path"}  # as `datasets` stores them
        return named and any(value.values())
    return bool(value) and (named or type(value).__module__.startswith("PIL."))


def _messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str) and _is_written_list(value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: `{column}` must be a text or a list of messages, which may be JSON text, got "
                f"{_shortened(value)}: {_first_line(error)}"
            ) from error
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where}: `{column}` must be the problem's text, got {value!r}")
        value = [{"role": "user", "content": value}]
    whole = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not whole or not value or value[-1]["role"] != "user" or not value[-1]["content"].strip():
        raise InputError(
            f"{where}: `{column}` must be a text, or a list of messages with `role` and `content`, the last one the "
            f"user's, got {_shortened(value)}"
        )
    for message in value:
        _require_unicode(message["content"], column, where)
        if mark := _MEDIA_MARK.search(message["content"]):
            raise InputError(
                f"{where}: `{column}` must be text alone, got {mark[0]!r} in it, the place of what no policy here sees"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


# What datasets put into a text where a picture, video or sound belongs; <video> and <audio> are HTML.
_MEDIA_MARK = re.compile(r"<image(?:_?\d+)?>|<\|(?:image|video|audio)(?:_?\d+|_pad)?\|>")
_WRITTEN_ROLE = re.compile(r"""["'](?:role|from)["']\s*:\s*["'](?:system|user|assistant|human|gpt)["']""")


def _is_written_list(text: str) -> bool:
    """Whether a text is a list of messages that was turned into text, by JSON or by Python's `str`."""
    return text.lstrip()[:1] in ("[", "{") and _WRITTEN_ROLE.search(text) is not None


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
    if isinstance(value, str) and value.strip():
        _require_unicode(value, column, where)
        return value.strip()
    # The shortest decimal that is this float is what was meant; ints and decimals are exact as they are.
    number = Decimal(repr(value)) if isinstance(value, float) else value
    if isinstance(value, bool) or not isinstance(number, int | Decimal) or not Decimal(number).is_finite():
        raise InputError(f"{where}: `{column}` must be a text or a number, got {_shortened(value)}")
    if abs(Decimal(number).adjusted()) >= MAX_DIGITS:
        raise InputError(
            f"{where}: `{column}` must be a number of at most {MAX_DIGITS} digits, got {_shortened(value)}"
        )
    return _plain_decimal(Decimal(number))


def _plain_decimal(number: Decimal) -> str:
    """A number's shortest text without an exponent.

    >>> [_plain_decimal(Decimal(text)) for text in ("2.5e-05", "1E+16", "18.00", "-0.0", "100")]
    ['0.000025', '10000000000000000', '18', '0', '100']
    """
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _require_unicode(text: str, column: str, where: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where}: `{column}` must be Unicode text, got half a character (a lone surrogate) in it")


def _columns(row: Row) -> str:
    return ", ".join(f"{column} (null)" if value is None else str(column) for column, value in row.items()) or "(none)"


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than some thousand digits
        text = f"{type(value).__name__} of many digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
