"""Several runs side by side: which arm each belongs to, means over seeds with intervals, differences paired by seed.

Imports records and scipy; tables of pandas come out. An interval is Student's over seeds, 95%, and there is none for a
single seed: what differs between two runs of one seed each may be chance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from clipo_ds.records import Run
from clipo_ds.types import InputError
from clipo_ds.viz.frames import as_run, find_runs, metrics_frame

NOT_THE_ARM = {"seed", "run_dir", "resume", "recipe", "ds_config"}
COMPARED = {"accuracy": "right answers", "process_consistent_among_correct": "no false step, of right answers"}


@dataclass(frozen=True)
class Arm:
    """The runs that differ in their seed only."""

    name: str
    runs: dict[int, Run]  # by seed


def open_arms(runs: Sequence[Run | str | Path] | str | Path | None = None) -> list[Arm]:
    """Runs by arm, the baselines (without the contrastive term) first, and else in the order of the runs.

    Args:
        runs: Run folders, or one folder that holds run folders, the oldest first; None takes what CLIPO_DS_RUNS names
            (paths with the system's path separator between them), or else ../runs.

    Raises:
        InputError: There are none, or two of the same arm and seed.
    """
    if runs is None:
        named = os.environ.get("CLIPO_DS_RUNS")
        runs = named.split(os.pathsep) if named else "../runs"
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    opened: list[Run] = []
    for path in paths:
        inside = [] if isinstance(path, Run) or (Path(path) / "config.yaml").is_file() else find_runs(path)
        opened += [as_run(found) for found in (inside or [path])]
    configs = [_flat(run.config) for run in opened]
    names = _arm_names(configs)
    arms: dict[str, dict[int, Run]] = {}
    for run, name in zip(opened, names, strict=True):
        seeds = arms.setdefault(name, {})
        seed = int(run.config.get("seed", 0))
        if seed in seeds:
            raise InputError(
                f"`runs` must hold one run of each arm and seed, got '{seeds[seed].path}' and '{run.path}', "
                f"both {name} with seed {seed}"
            )
        seeds[seed] = run
    order = sorted(arms, key=lambda name: "+" in name)
    return [Arm(name, dict(sorted(arms[name].items()))) for name in order]


def mean_with_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95% t interval; the latter is NaN for fewer than two values.

    >>> mean, half = mean_with_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 4)  # 4.3027 * 1 / sqrt(3)
    (2.0, 2.4841)
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return np.nan, np.nan
    if len(values) == 1:
        return float(values[0]), np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def curves(arms: Sequence[Arm], metric: str) -> pd.DataFrame:
    """A metric over training: columns `arm`, `step`, `mean`, `half` (of the 95% interval) and `seeds`."""
    rows = []
    for arm in arms:
        by_seed = [metrics_frame(run) for run in arm.runs.values()]
        courses = [frame[metric] for frame in by_seed if metric in frame]
        if not courses:
            continue
        together = pd.concat(courses, axis=1)
        for step, values in zip(together.index, together.to_numpy(), strict=True):
            mean, half = mean_with_interval(values)
            rows.append({"arm": arm.name, "step": step, "mean": mean, "half": half, "seeds": np.isfinite(values).sum()})
    return pd.DataFrame(rows, columns=["arm", "step", "mean", "half", "seeds"])


def last_evaluations(arms: Sequence[Arm]) -> pd.DataFrame:
    """The last evaluation of every run and test set: columns `arm`, `seed` and those of evaluations.jsonl."""
    rows = [
        {"arm": arm.name, "seed": seed, **row}
        for arm in arms
        for seed, run in arm.runs.items()
        for row in {row["data"]: row for row in run.evaluations()}.values()
    ]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["arm", "seed", "step", "data", *COMPARED])


def evaluation_summary(arms: Sequence[Arm], baseline: str) -> pd.DataFrame:
    """Each arm and test set: means over seeds and differences paired by seed against `baseline`.

    Columns `data`, `arm`, `figure` (a key of COMPARED), `seeds`, `mean`, `half`, `difference`, `difference_half` and
    `pairs`, shares between 0 and 1.

    Raises:
        InputError: There is no such arm.
    """
    names = [arm.name for arm in arms]
    if baseline not in names:
        raise InputError(f"`baseline` must be of {', '.join(names)}, got {baseline!r}")
    table = last_evaluations(arms)
    rows = []
    for data in table["data"].unique():
        for name in names:
            for figure in COMPARED:
                own, first = (_by_seed(table, data, arm, figure) for arm in (name, baseline))
                if own.empty:
                    continue
                mean, half = mean_with_interval(own.to_numpy())
                paired = (own - first).dropna() if name != baseline else own.iloc[:0]
                difference, difference_half = mean_with_interval(paired.to_numpy())
                rows.append(
                    {
                        "data": data, "arm": name, "figure": figure, "seeds": len(own), "mean": mean, "half": half,
                        "difference": difference, "difference_half": difference_half, "pairs": len(paired),
                    }
                )  # fmt: skip
    columns = ["data", "arm", "figure", "seeds", "mean", "half", "difference", "difference_half", "pairs"]
    return pd.DataFrame(rows, columns=columns)


def _by_seed(table: pd.DataFrame, data: str, arm: str, figure: str) -> pd.Series:
    rows = table[(table["data"] == data) & (table["arm"] == arm)]
    return rows.set_index("seed")[figure].astype(np.float64).dropna()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _arm_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Objective and term, then whatever else differs between runs of the same objective and term."""
    short = [_short_name(config) for config in configs]
    names = []
    for config, name in zip(configs, short, strict=True):
        peers = [other for other, own in zip(configs, short, strict=True) if own == name]
        keys = sorted({key for peer in peers for key in peer} - NOT_THE_ARM)
        differs = [key for key in keys if len({repr(peer.get(key)) for peer in peers}) > 1]
        said = ", ".join(f"{key} {config.get(key)}" for key in differs)
        names.append(f"{name} ({said})" if said else name)
    return names


def _short_name(config: Mapping[str, Any]) -> str:
    objective = config.get("objective.name", "run")
    if config.get("contrastive.weight") is None:
        return objective
    return f"{objective}+{'placebo' if config.get('contrastive.shuffle') else 'clipo'}"
