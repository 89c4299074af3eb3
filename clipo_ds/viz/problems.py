"""Problem by problem: what an arm answers that the baseline does not, and the other way round, with the texts.

Compared are the test sets whose responses every run of both arms has recorded, after the last step that two runs of a
seed have in common. Runs without such records (older ones, or `evaluation.every: null`) are compared by the rollouts of
training, where both arms met a prompt in the same step under the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from clipo_ds.records import Run
from clipo_ds.viz.comparison import Arm

COLUMNS = ("seed", "step", "data", "prompt", "share", "baseline_share", "difference")
VERDICTS = ("prompt", "correct")
TEXTS = ("prompt", "response", "correct", "process_consistent", "num_tokens")


@dataclass(frozen=True)
class Problems:
    """Problems that an arm and its baseline have both answered.

    `frame` has COLUMNS, the biggest win first and the biggest loss last; `data` is the test set, None for a problem of
    training.
    """

    frame: pd.DataFrame
    data: tuple[str, ...]  # the test sets compared; none where the rollouts of training are

    @property
    def where(self) -> str:
        """Which problems these are, in words."""
        if not self.data:
            return "training problems that both met in the same step under the same seed (no recorded test responses)"
        return f"problems of {', '.join(self.data)}, last evaluation, paired by seed"


def compare_problems(arm: Arm, baseline: Arm) -> Problems:
    """The share of right answers of an arm to every problem against the baseline's."""
    pairs = {seed: (arm.runs[seed], baseline.runs[seed]) for seed in sorted(set(arm.runs) & set(baseline.runs))}
    recorded = [set(run.response_steps()) for pair in pairs.values() for run in pair]
    data = tuple(sorted(set.intersection(*recorded))) if recorded else ()
    parts = []
    for seed, (own, other) in pairs.items():
        for name, step in _evaluations(own, other, data) if data else _training(own, other):
            shares = [_shares(run, name, step) for run in (own, other)]
            both = shares[0].to_frame("share").join(shares[1].rename("baseline_share"), how="inner")
            parts.append(both.reset_index().assign(seed=seed, step=step, data=name))
    if not parts:
        return Problems(pd.DataFrame(columns=list(COLUMNS)), data)
    found = pd.concat(parts).astype({"data": object})
    found["difference"] = found["share"] - found["baseline_share"]
    found = found.sort_values("difference", ascending=False, kind="stable").reset_index(drop=True)
    return Problems(found[list(COLUMNS)], data)


def responses_to(run: Run, problem: pd.Series) -> pd.DataFrame:
    """What a run answered to one row of `Problems.frame`, columns TEXTS."""
    return _answers(run, problem["data"], int(problem["step"]), TEXTS).query("prompt == @problem.prompt")


def _evaluations(own: Run, other: Run, data: tuple[str, ...]) -> list[tuple[str | None, int]]:
    """Each test set with the last step after which both runs have recorded their responses to it."""
    steps = [run.response_steps() for run in (own, other)]
    common = {name: set(steps[0][name]) & set(steps[1][name]) for name in data}
    return [(name, max(both)) for name, both in common.items() if both]


def _training(own: Run, other: Run) -> list[tuple[str | None, int]]:
    """The last half of the steps that both runs have."""
    common = sorted(set(own.rollout_steps()) & set(other.rollout_steps()))
    return [(None, step) for step in common[len(common) // 2 :]]


def _shares(run: Run, data: str | None, step: int) -> pd.Series:
    """The share of right answers to every prompt."""
    return _answers(run, data, step, VERDICTS).groupby("prompt", sort=False)["correct"].mean()


def _answers(run: Run, data: str | None, step: int, columns: tuple[str, ...]) -> pd.DataFrame:
    table = run.rollouts(step, columns) if data is None else run.responses(data, step, columns)
    return table.to_pandas()
