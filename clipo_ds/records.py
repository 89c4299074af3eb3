"""The run folder: what one process writes while it trains and any other may read meanwhile.

    config.yaml  ds_config.json                        what runs
    environment.jsonl                                  what it ran on: an object a start, with its step and time
    metrics.jsonl  evaluations.jsonl                   an object a line, `step` first
    rollouts/step_000012.parquet                       a row a rollout, columns as ROLLOUT_SCHEMA says
    evaluations/step_000020-NAME.parquet               a row a response to a test set, columns as RESPONSE_SCHEMA says
    separate_evaluations/                              what was evaluated outside training, with its settings: an index
                                                       evaluations.jsonl, and a file of responses for each of its rows
    checkpoints/step_000100/                           written by `clipo_ds.checkpoint`
    superseded/                                        later steps that a resumed run made again: not read here
    lock.json                                          the process that writes, while it does

Lines are appended with one write, everything else is written beside and renamed, so a reader sees whole things only;
the one exception, a last line that is still being written, is left out. Layer L1, imports pyarrow and no torch: it
works on a laptop that has a copy of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from clipo_ds.environment import describe_environment
from clipo_ds.record_tables import RESPONSE_SCHEMA, ROLLOUT_SCHEMA, embeddings, empty_table, rollout_table
from clipo_ds.types import InputError

__all__ = [
    "RESPONSE_SCHEMA",
    "ROLLOUT_SCHEMA",
    "Run",
    "RunWriter",
    "check_run_dir",
    "describe_environment",
    "embeddings",
    "open_run",
]

METRICS, EVALUATIONS, ROLLOUTS, RESPONSES = "metrics.jsonl", "evaluations.jsonl", "rollouts", "evaluations"
SEPARATE = "separate_evaluations"
CONFIG, DS_CONFIG, STARTS = "config.yaml", "ds_config.json", "environment.jsonl"
SUPERSEDED, LOCK = "superseded", "lock.json"


# -- writing -----------------------------------------------------------------------------------------------------------


def check_run_dir(path: str | Path, *, resuming: bool = False) -> None:
    """Check that a new run can be put into a folder, without making it.

    Args:
        path: The folder.
        resuming: Whether a run in it would have been gone on with, for the message.

    Raises:
        InputError: It holds something already, or it cannot be made or written.
    """
    folder = Path(path)
    # The lock of a start that was killed before it wrote anything is no content.
    if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
        if resuming:
            raise InputError(
                f"`run_dir` must be the folder of a run, or a new or empty one, got '{folder}', which holds other "
                "files and no config.yaml; name another folder"
            )
        raise InputError(
            f"`run_dir` must be a new or empty folder, got '{folder}', which is not empty; "
            "go on with the run in it by --resume auto, or name another folder"
        )
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Check that a folder can be made, or written into where it is there.

    Raises:
        InputError: It cannot.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"`run_dir` must be a folder that can be made and written, got '{folder}'")


@dataclass(frozen=True)
class RunWriter:
    """The one writer of a run folder: rank 0."""

    path: Path

    @classmethod
    def create(
        cls, path: str | Path, *, config_yaml: str, ds_config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> RunWriter:
        """Make a run folder and say in it what runs.

        Raises:
            InputError: As `check_run_dir`.
        """
        check_run_dir(path)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        writer = cls(folder)
        writer.write_description(config_yaml=config_yaml, ds_config=ds_config, environment=environment)
        return writer

    def write_description(
        self, *, config_yaml: str, ds_config: Mapping[str, Any], environment: Mapping[str, Any], step: int = 0
    ) -> None:
        """Say what runs from now on, after `step`; what earlier starts ran on stays on record."""
        write_text(self.path / DS_CONFIG, json.dumps(ds_config, indent=2) + "\n")
        start = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **environment}
        write_text(self.path / STARTS, "".join(_line(row) for row in (*_read_jsonl(self.path / STARTS), start)))
        # Last, because this is what makes the folder a run for `open_run`.
        write_text(self.path / CONFIG, config_yaml)

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one step's metrics: flat keys, numbers, text or None; what is not finite becomes null.

        Raises:
            ValueError: A value is a mapping or a list.
        """
        for name, value in metrics.items():
            if isinstance(value, Mapping | list | tuple):
                raise ValueError(f"`metrics` must be flat, got {value!r} under {name!r}")
        self._append(METRICS, {"step": step, **metrics})

    def evaluated(self, step: int) -> set[str]:
        """The test sets whose evaluation after `step` is on record."""
        file = self.path / EVALUATIONS
        return {row["data"] for row in _read_jsonl(file) if row["step"] == step} if file.exists() else set()

    def write_evaluation(self, step: int, evaluation: Mapping[str, Any]) -> None:
        """Append the result of one evaluation after `step` (0 is before training); values may be nested."""
        self._append(EVALUATIONS, {"step": step, **evaluation})

    def write_responses(self, step: int, data: str, columns: Mapping[str, Sequence[Any]]) -> Path:
        """Write the responses of one evaluation after `step` on the test set `data`, in place of earlier ones.

        Returns the file; `columns` are those of RESPONSE_SCHEMA.
        """
        (self.path / RESPONSES).mkdir(exist_ok=True)
        file = self.path / RESPONSES / f"step_{step:06d}-{quote(data, safe='')}.parquet"
        _write_responses(file, columns)
        return file

    def write_separate_evaluation(
        self, step: int, data: str, evaluation: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]
    ) -> Path:
        """Keep an evaluation that was made outside training: never in place of another, the run's own included.

        Args:
            step: Of the checkpoint that was evaluated.
            data: Name of the test set.
            evaluation: The figures and what they were made with; values may be nested.
            columns: Those of RESPONSE_SCHEMA.

        Returns the file of the responses. Several processes may evaluate a run at once.
        """
        (self.path / SEPARATE).mkdir(exist_ok=True)
        stem = f"step_{step:06d}-{quote(data, safe='')}-{time.strftime('%Y%m%d-%H%M%S')}"
        file = _reserve(self.path / SEPARATE, stem, ".parquet")
        _write_responses(file, columns)
        self._append(f"{SEPARATE}/{EVALUATIONS}", {"step": step, "data": data, "file": file.name, **evaluation})
        return file

    def write_rollouts(self, step: int, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
        """Write one step's rollouts.

        Args:
            step: Names the file, and fills the column `step` if it is not given.
            columns: Those of ROLLOUT_SCHEMA (nullable ones may be left out), `embedding` Float[N, D] if wanted, and
                any others.

        Raises:
            ValueError: A column is missing, or of another length than the rest.
        """
        table = rollout_table(step, columns)
        (self.path / ROLLOUTS).mkdir(exist_ok=True)
        texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
        write_beside(
            _rollout_file(self.path, step),
            # A dictionary stores a group's prompt once; embeddings never repeat.
            lambda file: pq.write_table(table, file, compression="zstd", use_dictionary=texts),
        )

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        # Unbuffered: the line reaches the file in one write; at worst a reader finds the last line torn.
        line = _line(row).encode()
        with _named_in_errors(self.path / name), (self.path / name).open("ab", buffering=0) as file:
            taken = file.write(line)
            if taken < len(line):  # a disk that is nearly full takes a piece, and says so by the number alone
                file.truncate(file.tell() - taken)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder, finished or in progress; every method reads what is there at that moment."""

    path: Path
    config: dict[str, Any]  # the resolved configuration: sections are dicts
    ds_config: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """What the run has run on since its newest start; empty where that is not on record."""
        return (self.starts() or [{}])[-1]

    def starts(self) -> list[dict[str, Any]]:
        """What the run ran on, a dict a start; `step` is the one it went on from, `time` is in UTC."""
        return _read_jsonl(self.path / STARTS)

    def metrics(self) -> list[dict[str, Any]]:
        """One flat dict a step, None for what was not finite; `pandas.DataFrame(run.metrics())` is a table of them."""
        return _read_jsonl(self.path / METRICS)

    def evaluations(self) -> list[dict[str, Any]]:
        """One dict an evaluation and test set, `step` (0 is before training) and `data` among the keys."""
        return _read_jsonl(self.path / EVALUATIONS)

    def separate_evaluations(self) -> list[dict[str, Any]]:
        """One dict an evaluation made outside training (`scripts/evaluate.py`), in the order in which they were made.

        Beside the figures: `step` of the checkpoint, `data`, `source`, `time`, `settings`, and `file`, which
        `separate_responses` takes.
        """
        return _read_jsonl(self.path / SEPARATE / EVALUATIONS)

    def separate_responses(self, file: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The responses of one of `separate_evaluations()`, as `responses` gives those of the run itself.

        Raises:
            InputError: There is no such file, or it is damaged.
        """
        return _read_responses(self.path / SEPARATE / file, columns)

    def response_steps(self) -> dict[str, list[int]]:
        """The steps after which the responses to a test set were recorded, ascending, by the name of the set."""
        steps: dict[str, list[int]] = {}
        for step, data, _ in _response_files(self.path):
            steps.setdefault(data, []).append(step)
        return steps

    def responses(self, data: str, step: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The responses to a test set after a step, columns as RESPONSE_SCHEMA says, or those of them that are named.

        Raises:
            InputError: There are none, or the file is damaged.
        """
        files = {number: file for number, name, file in _response_files(self.path) if name == data}
        if step not in files:
            have = f"{', '.join(map(str, files)) or 'none'} for {data!r}"
            raise InputError(f"`step` must be a step with recorded responses ({have}), got {step}")
        return _read_responses(files[step], columns)

    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts are on disk, ascending."""
        return list(_rollout_files(self.path))

    def rollouts(self, step: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Rollouts of one step, or of all steps one after the other; `.to_pandas()` makes a data frame of them.

        Args:
            step: One of `rollout_steps()`; None reads them all.
            columns: Read these only (texts and embeddings are most of the bytes); None reads all.

        Raises:
            InputError: No such step or column, or a file is damaged. A newest file that cannot be read (the folder is
                being copied, say) is left out when all steps are asked for.
        """
        files = _rollout_files(self.path) if step is None else {step: self._rollouts_of(step)}
        tables: list[pa.Table] = []
        names: dict[str, None] = {}
        for number in files:
            try:
                with pq.ParquetFile(files[number]) as file:
                    own = file.schema_arrow.names
                    names |= dict.fromkeys(own)
                    tables.append(file.read(None if columns is None else [c for c in columns if c in own]))
            except FileNotFoundError:
                continue  # the run was resumed from an earlier step meanwhile
            except (OSError, pa.ArrowException) as error:
                if step is None and number == max(files):
                    break
                raise InputError(f"`{files[number]}` must be a whole parquet file: {error}") from error
        if not tables:
            return empty_table(columns)
        unknown = [column for column in columns or () if column not in names]
        if unknown:
            raise InputError(f"`columns` must be of {', '.join(names)}, got {', '.join(unknown)}")
        table = pa.concat_tables(tables, promote_options="permissive")
        return table if columns is None else table.select(columns)

    def rollout_columns(self, step: int) -> list[str]:
        """The columns that the rollouts of a step have, read from the file's footer alone.

        Raises:
            InputError: No such step, or its file is damaged.
        """
        file = self._rollouts_of(step)
        try:
            return pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"`{file}` must be a whole parquet file: {error}") from error

    def _rollouts_of(self, step: int) -> Path:
        """A step's file, found without listing the folder: who reads a thousand steps one by one would list it as
        often."""
        file = _rollout_file(self.path, step)
        if not file.is_file():
            files = _rollout_files(self.path)
            have = f"{min(files)} to {max(files)}" if files else "none yet"
            raise InputError(f"`step` must be a step with rollouts ({have}), got {step}")
        return file

    def checkpoints(self) -> dict[int, Path]:
        """The whole checkpoints, by step, ascending."""
        whole = (file.parent for file in (self.path / "checkpoints").glob("step_*/checkpoint.json"))
        return dict(sorted((int(folder.name.removeprefix("step_")), folder) for folder in whole))


def open_run(path: str | Path) -> Run:
    """Open a run folder for reading.

    Raises:
        InputError: It is no run folder.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise InputError(f"`run` must be a run folder, which holds a config.yaml, got '{folder}'")
    return Run(
        path=folder,
        config=yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")),
        ds_config=json.loads((folder / DS_CONFIG).read_text(encoding="utf-8")),
    )


# -- files -------------------------------------------------------------------------------------------------------------


def _rollout_file(folder: Path, step: int) -> Path:
    return folder / ROLLOUTS / f"step_{step:06d}.parquet"


def _rollout_files(folder: Path) -> dict[int, Path]:
    files = ((re.fullmatch(r"step_(\d{6,})\.parquet", f.name), f) for f in (folder / ROLLOUTS).glob("step_*.parquet"))
    return dict(sorted((int(match[1]), file) for match, file in files if match))


def _response_files(folder: Path) -> list[tuple[int, str, Path]]:
    """Step, test set and file, ascending."""
    files = sorted((folder / RESPONSES).glob("step_*-*.parquet"))
    parts = ((file.stem.removeprefix("step_").partition("-"), file) for file in files)
    return [(int(step), unquote(name), file) for (step, _, name), file in parts]


def _write_responses(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    table = pa.Table.from_pydict(dict(columns), schema=RESPONSE_SCHEMA)
    write_beside(file, lambda partial: pq.write_table(table, partial, compression="zstd"))


def _read_responses(file: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        return pq.read_table(file, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"`{file}` must be a whole parquet file: {error}") from error


def _reserve(folder: Path, stem: str, suffix: str) -> Path:
    """A file that no other process has, empty; numbered where the name is taken."""
    number = 1
    while True:
        file = folder / f"{stem}{f'-{number}' if number > 1 else ''}{suffix}"
        try:
            file.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return file


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []  # nothing has been recorded yet
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: the line must be a JSON object: {error}") from error
    with contextlib.suppress(ValueError):  # empty, or still being written
        rows.append(json.loads(last))
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value in JSON's types: numbers of numpy and torch unwrapped, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    write_beside(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it when it is whole; nothing is left of one that cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _named_in_errors(path):
            write(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Name the file in an `OSError` of the block: a disk that is full does not, nor does pyarrow."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
