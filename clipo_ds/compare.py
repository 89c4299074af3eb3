"""Arms against each other over seeds, in the same loop, on the same machine, from the same start.

An arm is an objective with or without the contrastive term: `grpo` is the baseline (`contrastive: null`),
`grpo+clipo` takes the recipe's contrastive section, `grpo+placebo` the same with its rewards shuffled within groups.
Differences are paired by seed against the first arm.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy import stats

from clipo_ds import distributed
from clipo_ds.config import load_config
from clipo_ds.objectives import OBJECTIVES
from clipo_ds.records import open_run
from clipo_ds.schema import TrainConfig
from clipo_ds.trainer import train
from clipo_ds.types import InputError

COMPARED = ("accuracy", "process_consistent_among_correct")


def arm_config(base: TrainConfig, arm: str, seed: int, run_dir: Path) -> TrainConfig:
    """The configuration of one run of one arm.

    Raises:
        InputError: The arm is not an objective with an optional `+clipo` or `+placebo`, or asks for a contrastive
            term that the recipe does not have.
    """
    objective, _, term = arm.partition("+")
    if objective not in OBJECTIVES or term not in ("", "clipo", "placebo"):
        raise InputError(f"`arms` must be of {', '.join(OBJECTIVES)} with an optional +clipo or +placebo, got {arm!r}")
    if term and base.contrastive is None:
        raise InputError(f"`arms` must do without +{term} where the recipe's contrastive section is null, got {arm!r}")
    contrastive = base.contrastive if term else None
    if term == "placebo" and contrastive is not None:
        contrastive = dataclasses.replace(contrastive, shuffle=True)
    return dataclasses.replace(
        base,
        seed=seed,
        run_dir=str(run_dir),
        contrastive=contrastive,
        objective=dataclasses.replace(base.objective, name=objective),
    )


def compare(recipe: str, overrides: Sequence[str], arms: Sequence[str], seeds: Sequence[int], out: Path) -> Path:
    """Train every arm with every seed and write `comparison.json`; called by all ranks.

    A run that is whole is not repeated, one that was cut short goes on from its newest checkpoint.

    Returns the path of the comparison file, with a row a run and test set.

    Raises:
        InputError: An arm is wrong, the recipe never evaluates, or `out` holds a run made with other settings.
    """
    base = load_config(recipe, overrides)
    if base.evaluation.every is None:
        raise InputError("`evaluation.every` must be a number of steps: arms are compared by their last evaluation")
    ranks = distributed.start()
    configs = {(arm, seed): arm_config(base, arm, seed, out / f"{arm}-seed{seed}") for arm in arms for seed in seeds}
    begun = distributed.from_main(lambda: {key for key, config in configs.items() if _is_begun(config)})
    rows: list[dict[str, Any]] = []
    # Seed by seed, so that a comparison that is cut short holds every arm equally often.
    for seed in seeds:
        for arm in arms:
            config = configs[arm, seed]
            run_dir = out / f"{arm}-seed{seed}"
            if not distributed.from_main(functools.partial(is_whole, run_dir, config.steps)):
                train(dataclasses.replace(config, resume="auto" if (arm, seed) in begun else None))
            if ranks.is_main:
                for data, last in last_evaluations(open_run(run_dir).evaluations()).items():
                    rows.append({"arm": arm, "seed": seed, "data": data, "run": str(run_dir), **last})
    path = out / "comparison.json"
    if ranks.is_main:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return path


def last_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The last row of every test set."""
    return {row["data"]: row for row in evaluations}


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row an arm and test set: mean over seeds and paired difference against the first arm, with 95% t intervals."""
    seeds = sorted({row["seed"] for row in rows})
    table = Table(
        title=f"last evaluation: mean over {len(seeds)} seed(s) ± 95% interval; Δ paired against the first arm"
    )
    for name in ("data", "arm", *(text for key in COMPARED for text in (key.replace("_", " "), "Δ"))):
        table.add_column(name)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for data in dict.fromkeys(row["data"] for row in rows):
        for arm in arms:
            cells = []
            for key in COMPARED:
                own, first = (_by_seed(rows, data, name, key) for name in (arm, arms[0]))
                cells.append(_interval([own[seed] for seed in own]))
                paired = [own[seed] - first[seed] for seed in own if seed in first]
                cells.append("" if arm == arms[0] else _interval(paired, signed=True))
            table.add_row(data, arm, *cells)
    return table


def _by_seed(rows: Sequence[Mapping[str, Any]], data: str, arm: str, key: str) -> dict[int, float]:
    chosen = (row for row in rows if row["data"] == data and row["arm"] == arm)
    return {row["seed"]: row[key] for row in chosen if row[key] is not None}


def _interval(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean in percent with the half-width of its 95% t interval, where there are two values or more."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    if len(values) < 2:
        return text
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{text} ± {100 * half:.1f}"


def _is_begun(config: TrainConfig) -> bool:
    """Whether the run of this very configuration has been begun."""
    found = Path(str(config.run_dir)) / "config.yaml"
    if not found.exists():
        return False
    own = load_config(str(found))
    data = dataclasses.replace(own.data, allow_changed=config.data.allow_changed)
    begun = dataclasses.replace(own, resume=None, recipe=config.recipe, data=data)
    if config.rollout.engine == "auto":  # the run holds what it was
        begun = dataclasses.replace(begun, rollout=dataclasses.replace(begun.rollout, engine="auto"))
    if begun != config:
        raise InputError(f"`out` must not hold runs made with other settings, got '{found.parent}'")
    return True


def is_whole(run_dir: Path, steps: int) -> bool:
    """Whether the run has come to its end, the evaluation after the last step included."""
    if not (run_dir / "evaluations.jsonl").exists():
        return False
    last = last_evaluations(open_run(run_dir).evaluations())
    return bool(last) and all(row["step"] == steps for row in last.values())
