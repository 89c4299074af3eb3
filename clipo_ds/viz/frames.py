"""A run folder as tables: light columns of every rollout at once, embeddings and texts when they are asked for.

Imports records, pandas and pyarrow. What is read of 50,000 rollouts is a few numbers each (2 MB), then their embeddings
as the float16 that they are stored in (51 MB at 512 dimensions); a text is read when somebody wants to see it. A run
that is being written can be read at any moment; a newest file that is not whole yet is left out, and `notes` says so.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import is_numeric_dtype

from clipo_ds.records import SUPERSEDED, Run, embeddings, open_run
from clipo_ds.types import InputError

CELLS = (
    "right answer, right process",
    "right answer, wrong process",
    "right answer, process unknown",
    "wrong answer, right process",
    "wrong answer, wrong process",
    "wrong answer, process unknown",
)
RIGHT_BUT_WRONG = CELLS[1]
"""What a reader looks for: the answer is right and a step on the way is false."""

NUMBERS = (
    "group", "correct", "process_consistent", "reward", "contrastive_loss", "contrastive_reward", "advantage",
    "num_tokens", "truncated",
)  # fmt: skip
MORE_NUMBERS = ("outcome_reward", "prompt_uid", "dropped")  # of runs that the trainer wrote
RECORDED_PART, PART = "reward/", "weighted/"  # before the names of reward functions: their values, and times weight
OVERLONG = "overlong"  # the penalty, which stands among them
TEXTS = ("prompt", "response", "ground_truth", "extracted")
NUM_READERS = 2  # of files of embeddings, whose unpacking is most of the time that a picture needs
STALE_AFTER_S = 30.0  # and ten times as long as a step takes


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of a run, a row each.

    `frame` has the columns `step`, `place` (row in the step's file), `group` (within the step), `prompt` (the same
    number wherever the same prompt comes again), `cell` (one of CELLS), `outcome_reward`, `weighted/…` (the
    overlong penalty and each reward function, times its weight), `other_reward` (what is none of them and not
    contrastive), `dropped` (False where it was not recorded), and NUMBERS. Its index is 0 … N - 1; a
    *row* below is such a number.
    """

    run: Run
    frame: pd.DataFrame
    notes: tuple[str, ...] = ()  # sentences on what was left out

    @property
    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        return self.frame["step"].drop_duplicates().tolist()

    @property
    def reward_parts(self) -> list[str]:
        """The columns `weighted/…`."""
        return [name for name in self.frame.columns if name.startswith(PART)]

    def rows_of(self, step: int, group: int | None = None) -> np.ndarray:
        """Rows of one step, or of one group in it."""
        chosen = self.frame["step"] == step
        return np.flatnonzero(chosen if group is None else chosen & (self.frame["group"] == group))

    def embeddings(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Embeddings of rows, Float16[M, D], in their order; a rollout without one is NaN.

        Raises:
            InputError: The run has none, or they are of different sizes.
        """
        rows = np.arange(len(self.frame)) if rows is None else np.asarray(rows)
        parts = self._by_step(rows)
        found: np.ndarray | None = None
        readers = ThreadPoolExecutor(NUM_READERS)
        try:
            read = readers.map(lambda part: self._embeddings_of(part[0], part[2]), parts)
            for (step, at, _), vectors in zip(parts, read, strict=True):
                if found is None:
                    found = np.empty((len(rows), vectors.shape[1]), np.float16)
                elif found.shape[1] != vectors.shape[1]:
                    raise InputError(
                        f"`run` must have embeddings of one size, got {found.shape[1]} and, at step {step}, "
                        f"{vectors.shape[1]} in '{self.run.path}'"
                    )
                found[at] = vectors
        finally:
            readers.shutdown(cancel_futures=True)  # after an error, the other files stay closed
        return np.empty((0, 0), np.float16) if found is None else found

    def _embeddings_of(self, step: int, places: np.ndarray) -> np.ndarray:
        """Some embeddings of one step, Float16[M, D]; no more than these are kept of its file."""
        if "embedding" not in self.run.rollout_columns(step):
            raise InputError(
                f"`run` must have embeddings, got '{self.run.path}', whose step {step} has none; "
                "train with logging.save_embeddings true to see clusters"
            )
        return embeddings(self.run.rollouts(step, ["embedding"]))[places]

    def texts(self, rows: Sequence[int] | np.ndarray) -> pd.DataFrame:
        """The columns TEXTS of some rows, in their order, with the rows as index."""
        rows = np.asarray(rows, dtype=np.int64)
        parts = [
            self.run.rollouts(step, TEXTS).take(places).to_pandas().set_index(rows[at])
            for step, at, places in self._by_step(rows)
        ]
        return pd.concat(parts).loc[rows] if parts else pd.DataFrame(columns=TEXTS)

    def prompts(self) -> pd.Series:
        """The text of every prompt by its number, those that come most often first."""
        first = self.frame.drop_duplicates("prompt").index.to_numpy()
        texts = [
            pd.Series(self.run.rollouts(step, ["prompt"]).take(places)["prompt"].to_pylist(), index=first[at])
            for step, at, places in self._by_step(first)
        ]
        text = pd.concat(texts) if texts else pd.Series(dtype=str)
        visits = self.frame.drop_duplicates(["step", "group"])["prompt"].value_counts(sort=False)
        numbered = text.set_axis(self.frame["prompt"].to_numpy()[text.index])
        return numbered.loc[visits.sort_values(ascending=False, kind="stable").index]

    def _by_step(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """A step, positions in `rows` that belong to it, and their places in its file."""
        steps = self.frame["step"].to_numpy()[rows]
        places = self.frame["place"].to_numpy()[rows]
        order = np.argsort(steps, kind="stable")
        cuts = np.flatnonzero(np.diff(steps[order])) + 1
        return [(int(steps[at[0]]), at, places[at]) for at in np.split(order, cuts) if len(at)]


def open_rollouts(run: Run | str | Path | None = None, steps: Sequence[int] | None = None) -> Rollouts:
    """Read the light columns of a run's rollouts.

    Args:
        run: A run or its folder; None takes `chosen_run()`.
        steps: Read these only; None reads all.

    Raises:
        InputError: There is no run, it has no rollouts yet, or a file in its middle is damaged.
    """
    run = as_run(run)
    known = run.rollout_steps()
    chosen = known if steps is None else list(steps)
    tables: dict[int, pa.Table] = {}
    notes = []
    for step in chosen:
        try:
            tables[step] = _read_step(run, step)
        except InputError as error:
            if not known or step != known[-1]:
                raise
            notes.append(f"Step {step} is left out: its file is not whole yet ({_first_line(error)}).")
    if not tables:
        why = notes[0] if notes else "no step has been recorded yet"
        raise InputError(f"`run` must have rollouts, got '{run.path}': {why}")
    # Steps of equal columns together: a data frame of each would take as long as the reading, or longer.
    alike = [list(steps) for _, steps in itertools.groupby(tables, lambda step: tables[step].schema)]
    frame = pd.concat([_frame(run, {step: tables[step] for step in steps}) for steps in alike], ignore_index=True)
    _derive(frame)
    if not is_numeric_dtype(frame["prompt"]):  # texts: this run does not number its prompts
        frame["prompt"] = pd.factorize(frame["prompt"])[0]
    return Rollouts(run, frame, tuple(notes))


def newer(run: Run, known: Rollouts | None) -> Rollouts:
    """The rollouts of a run, of which only the steps that are new are read."""
    if known is None:
        return open_rollouts(run)
    steps = run.rollout_steps()
    if known.steps != steps[: len(known.steps)] or not _numbered(known):
        return open_rollouts(run)  # resumed from an earlier step, or prompts have to be numbered together
    new = steps[len(known.steps) :]
    if not new:
        return known
    try:
        later = open_rollouts(run, new)
    except InputError:
        return known  # the only new file is not whole yet
    return Rollouts(run, pd.concat([known.frame, later.frame], ignore_index=True), later.notes)


def as_run(run: Run | str | Path | None) -> Run:
    """Whatever names a run, opened; None takes `chosen_run()`.

    Raises:
        InputError: There is no such run.
    """
    if isinstance(run, Run):
        return run
    return open_run(chosen_run() if run is None else Path(run).expanduser())


def chosen_run(folder: str | Path = "../runs") -> Path:
    """The run that the variable CLIPO_DS_RUN names, or else the newest one under `folder`.

    Raises:
        InputError: There is none.
    """
    named = os.environ.get("CLIPO_DS_RUN")
    if named:
        return Path(named).expanduser()
    found = find_runs(folder)
    if not found:
        raise InputError(
            f"`run` must be a run folder, got none: there is no run under '{Path(folder).resolve()}'; "
            "train one (notebook 01), or name its folder or the variable CLIPO_DS_RUN"
        )
    return found[-1]


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders in a folder, also one level deeper (a comparison's), oldest first.

    What a resumed run has moved aside into its superseded/ is no run of its own.
    """
    configs = [*Path(folder).glob("*/config.yaml"), *Path(folder).glob("*/*/config.yaml")]
    runs = [file for file in configs if SUPERSEDED not in file.relative_to(folder).parts]
    return [file.parent for file in sorted(runs, key=lambda file: (file.stat().st_mtime, file))]


@dataclass(frozen=True)
class RunState:
    """Where a run stands, judged from its files alone."""

    step: int  # steps recorded
    num_steps: int
    silent_s: float  # seconds since something was written
    stale: bool  # not over, and silent for longer than it ever should be

    @property
    def word(self) -> str:
        """finished, running or stale."""
        if self.step >= self.num_steps:
            return "finished"
        return "stale" if self.stale else "running"


def run_state(run: Run) -> RunState:
    """Where a run stands now: a run is stale after ten times its step time, and 30 s, without a word."""
    rows = run.metrics()
    step, num_steps = (int(rows[-1]["step"]) if rows else 0), int(run.config["steps"])
    times = [row["time/step"] for row in rows[-20:] if row.get("time/step") is not None]
    written = [
        file.stat().st_mtime
        for name in ("config.yaml", "metrics.jsonl", "evaluations.jsonl")
        if (file := run.path / name).exists()
    ]
    silent = max(0.0, time.time() - max(written))
    late = is_late(silent, median(times) if times else 0.0)
    return RunState(step, num_steps, silent, step < num_steps and late)


def is_late(silent_s: float, step_s: float) -> bool:
    """Whether a run that is not over has been silent for longer than it should, a step taking `step_s` seconds."""
    return silent_s > max(STALE_AFTER_S, 10 * step_s)


def metrics_frame(run: Run) -> pd.DataFrame:
    """metrics.jsonl as numbers, `step` as index; the last word on a step that was written twice."""
    frame = pd.DataFrame(run.metrics())
    if frame.empty:
        return pd.DataFrame(index=pd.Index([], name="step"))
    frame = frame.drop_duplicates("step", keep="last").set_index("step")
    return frame.apply(pd.to_numeric, errors="coerce").astype(np.float64)


def cells(correct: pd.Series, process: pd.Series) -> pd.Categorical:
    """Which of CELLS each rollout is: `process` is True, False or missing."""
    known = process.notna().to_numpy()
    good = process.fillna(False).to_numpy(bool)
    code = np.where(known, np.where(good, 0, 1), 2) + np.where(correct.to_numpy(bool), 0, 3)
    return pd.Categorical.from_codes(code, categories=list(CELLS))


def _read_step(run: Run, step: int) -> pa.Table:
    """The light columns of one step as they were recorded."""
    there = run.rollout_columns(step)
    more = [name for name in MORE_NUMBERS if name in there]
    weights = _part_weights(run)
    recorded = [name for name in there if name in weights]
    return run.rollouts(step, [*NUMBERS, *more, *recorded, *([] if "prompt_uid" in more else ["prompt"])])


def _frame(run: Run, tables: dict[int, pa.Table]) -> pd.DataFrame:
    """Steps of equal columns one after the other, rewards as they were weighted."""
    frame = pa.concat_tables(tables.values()).to_pandas()
    weights = _part_weights(run)
    for name in [name for name in frame.columns if name in weights]:
        frame[PART + name.removeprefix(RECORDED_PART)] = (frame.pop(name) * weights[name]).astype(np.float32)
    if "dropped" not in frame:
        frame["dropped"] = False
    if "outcome_reward" not in frame:
        frame["outcome_reward"] = frame["reward"] - frame["contrastive_reward"].astype(np.float32).fillna(0.0)
    sizes = [len(table) for table in tables.values()]
    frame.insert(0, "step", np.repeat(np.array(list(tables), np.int32), sizes))
    frame.insert(1, "place", np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]))
    return frame.rename(columns={"prompt_uid": "prompt"})


def _derive(frame: pd.DataFrame) -> None:
    """Fill in what follows from the recorded columns: for all steps at once, or it costs as much for each of them."""
    frame["process_consistent"] = frame["process_consistent"].astype("boolean")
    for name in ("contrastive_loss", "contrastive_reward", "outcome_reward"):
        frame[name] = frame[name].astype(np.float32)
    frame["cell"] = cells(frame["correct"], frame["process_consistent"])
    parts = [name for name in frame.columns if name.startswith(PART)]
    known = frame["outcome_reward"] + frame["contrastive_reward"].fillna(0.0) + frame[parts].sum(axis=1)
    added_up = np.isclose(frame["reward"], known, rtol=1e-5, atol=1e-6)  # but for the rounding to float32
    frame["other_reward"] = np.where(added_up, np.float32(0), frame["reward"] - known)


def _part_weights(run: Run) -> dict[str, float]:
    """Weights of the overlong penalty and, by path and by name, of the run's reward functions, under the names of their
    columns; in records those whose name is taken go by their path."""
    functions = run.config.get("reward", {}).get("functions", [])
    paths = {function["function"]: function["weight"] for function in functions}
    weights = {path.rpartition(":")[2]: weight for path, weight in paths.items()} | paths | {OVERLONG: 1.0}
    return {f"{RECORDED_PART}{name}": weight for name, weight in weights.items()}


def _numbered(table: Rollouts) -> bool:
    return "prompt_uid" in table.run.rollout_columns(table.steps[-1])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
