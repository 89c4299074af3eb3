"""Scores of a model on problems: accuracy, mean@k, pass@k, maj@k, truncation, length and process consistency.

Layer L3: imports `clipo_ds.generation`, `clipo_ds.rewards` and `clipo_ds.unverified`, numpy, scipy and rich. With
several ranks each calls `run_problems` on its share, and `summarise` gets the rows of all:

    rows = run_problems(engine, own_prompts, judge, ...)      every rank
    result = summarise("gsm8k", all_rows)                     where the rows were gathered
    columns = response_columns(all_rows)                      the same, for the run folder

Every figure is a mean over problems, and problems are what is independent: the samples of one problem are not. The
intervals say so. For a rate r = sum_i a_i / sum_i b_i over P problems they are Wilson's at the effective number of
observations of a clustered sample,

    n_eff = r (1 - r) / v,    v = sum_i (a_i - r b_i)^2 / (sum_i b_i)^2,

with v the linearised variance of a ratio over clusters (Cochran, Sampling Techniques, 3rd ed., sec. 6.3) and the idea
of Korn and Graubard (1998), at most the number of observations and, where all problems agree (v = 0), the number of
problems. With one sample a problem that is Wilson's interval itself; it never leaves [0, 1] and is not of width 0 at
0% and 100%.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from clipo_ds.answers import Status
from clipo_ds.generation import RolloutEngine
from clipo_ds.rewards import Judge, Judgement
from clipo_ds.types import Group, Prompt
from clipo_ds.unverified import Unverified, unverified

CONFIDENCE = 0.95
OF_A_PROBLEM = ("uid", "prompt", "ground_truth")
OF_A_RESPONSE = ("extracted", "correct", "status", "process_consistent", "num_tokens", "truncated")


@dataclass(frozen=True)
class ProblemResult:
    """The n responses to one problem, judged."""

    uid: int
    source: str
    prompt: str
    ground_truth: str
    responses: tuple[str, ...]  # [n]
    correct: tuple[bool, ...]  # [n]
    extracted: tuple[str | None, ...]  # [n], final answers; None where a response states none
    process_consistent: tuple[bool | None, ...]  # [n], None where no step could be checked
    truncated: tuple[bool, ...]  # [n]
    num_tokens: tuple[int, ...]  # [n], response tokens
    status: tuple[Status, ...]  # [n], of the verdicts
    unverified: Unverified | None = None  # some of the answers could not be verified, and count as wrong


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval; all None where there was nothing to measure."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """The scores on one data set, over P problems with n samples each."""

    name: str
    num_problems: int
    num_samples: int
    accuracy: Estimate  # mean over problems of the share of right samples: mean@n, and plain accuracy for n = 1
    pass_at: dict[int, Estimate]  # by k = 1, 2, 4, ... up to n
    majority: Estimate  # maj@n
    truncated: Estimate  # share of responses that reached the length cap
    response_tokens: Estimate  # mean length
    process_consistent: Estimate  # share without a false step, of the responses whose steps could be checked
    process_consistent_among_correct: Estimate  # the same of the right responses alone
    num_process_checked: int  # responses whose steps could be checked
    num_process_checked_correct: int  # right ones among them
    num_timeouts: int  # responses whose verification was stopped at its time limit
    num_errors: int  # responses in whose verification the algebra failed

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able: `data` (the name), `accuracy`, `accuracy_low`, `accuracy_high`, `pass_at_4`, ...

        What is undefined is None. The accuracy stands under `mean_at_n` too, n the number of samples.
        """
        flat: dict[str, Any] = {"data": self.name}
        for entry in fields(self)[1:]:
            value = getattr(self, entry.name)
            if entry.name == "pass_at":
                for k, estimate in value.items():
                    flat |= _flat(f"pass_at_{k}", estimate)
            elif entry.name == "majority":
                flat |= _flat(f"maj_at_{self.num_samples}", value)
            elif isinstance(value, Estimate):
                flat |= _flat(entry.name, value)
            else:
                flat[entry.name] = value
        return flat | _flat(f"mean_at_{self.num_samples}", self.accuracy)


def run_problems(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
) -> list[ProblemResult]:
    """Sample and judge responses to this rank's problems; no other rank takes part.

    Args:
        engine: The sampler, with the weights to score.
        prompts: This rank's share; a sample depends on seed, `uid` and its number, not on the share.
        judge: Verifies answers and checks steps; its reward functions are not called.
        samples: Responses a problem.
        temperature: 0 decodes greedily.
        top_p: Nucleus threshold in (0, 1]; 1 is off.
        max_new_tokens: Length cap, tokens.
        seed: Seed of the samples.

    Returns:
        One row a problem, in the order of the prompts.

    Raises:
        ValueError: Several samples are asked for at temperature 0, where they would all be the same.
    """
    if samples > 1 and temperature == 0:
        raise ValueError(f"`samples` must be 1 at temperature 0, got {samples}")
    groups = engine.generate(
        prompts, samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=0, seed=seed
    )
    judged = judge.judge(groups, with_functions=False)
    return [_problem(group, judgements) for group, judgements in zip(groups, judged, strict=True)]


def summarise(name: str, rows: Sequence[ProblemResult]) -> EvaluationResult:
    """The scores of a data set from the rows of all its problems.

    Args:
        name: Of the data set.
        rows: In any order.

    Raises:
        ValueError: There are no rows, or they have different numbers of samples.
    """
    counts = {len(row.correct) for row in rows}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"`rows` must have the same number of samples, at least 1, got {sorted(counts)}")
    n = counts.pop()
    right = np.array([sum(row.correct) for row in rows])
    checked = [[c is not None for c in row.process_consistent] for row in rows]
    good = [[c is True for c in row.process_consistent] for row in rows]
    correct = [list(row.correct) for row in rows]
    ones = np.ones(len(rows))
    return EvaluationResult(
        name=name,
        num_problems=len(rows),
        num_samples=n,
        accuracy=rate(right, n * ones),
        pass_at={k: rate(np.array([pass_at_k(n, int(c), k) for c in right]), ones) for k in _powers_of_two(n)},
        majority=rate(np.array([majority_correct(row.correct, row.extracted) for row in rows]), ones),
        truncated=rate(np.array([sum(row.truncated) for row in rows]), n * ones),
        response_tokens=_mean([sum(row.num_tokens) / n for row in rows]),
        process_consistent=rate(_count(good), _count(checked)),
        process_consistent_among_correct=rate(_count(good, correct), _count(checked, correct)),
        num_process_checked=int(_count(checked).sum()),
        num_process_checked_correct=int(_count(checked, correct).sum()),
        num_timeouts=sum(row.status.count("timeout") for row in rows),
        num_errors=sum(row.status.count("error") for row in rows),
    )


def response_columns(rows: Sequence[ProblemResult]) -> dict[str, list[Any]]:
    """The rows as the columns of `records.RESPONSE_SCHEMA`, a row a response, problems in the order of their `uid`."""
    flat = [(row, sample) for row in sorted(rows, key=lambda row: row.uid) for sample in range(len(row.correct))]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row, _ in flat] for name in OF_A_PROBLEM}
    columns |= {name: [getattr(row, name)[n] for row, n in flat] for name in OF_A_RESPONSE}
    return columns | {"sample": [n for _, n in flat], "response": [row.responses[n] for row, n in flat]}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is right.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Args:
        num_samples: n, at least k.
        num_correct: c in [0, n].
        k: At least 1.

    Raises:
        ValueError: The numbers do not fit together.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(f"`k` must be in [1, {num_samples}] with {num_correct} right of {num_samples}, got {k}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_correct(correct: Sequence[bool], extracted: Sequence[str | None]) -> float:
    """Probability that the commonest answer is right, ties drawn evenly (maj@k of Wang et al. 2022, arXiv 2203.11171).

    All right answers count as one, since each equals the truth however it is written; wrong ones are told apart by
    their text without spaces and case. A wrong response that states no answer has no vote.

    >>> majority_correct([True, True, False, False, False], ["1/2", "0.5", "3", "3", None])
    0.5
    """
    votes: Counter[str | None] = Counter()
    for is_right, answer in zip(correct, extracted, strict=True):
        if is_right or answer is not None:
            votes[None if is_right else "".join(str(answer).split()).lower()] += 1
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return (None in winners) / len(winners)


def rate(part: np.ndarray, whole: np.ndarray) -> Estimate:
    """The rate sum(part) / sum(whole) over independent problems with its 95% interval (see the module's docstring).

    Args:
        part: Float[P] with 0 <= part <= whole.
        whole: Float[P]; problems with 0 do not count.

    Returns:
        The estimate; without values where `whole` is 0 everywhere.
    """
    total = float(np.sum(whole))
    if total == 0:
        return Estimate(None)
    value = float(np.sum(part)) / total
    variance = float(np.sum((part - value * whole) ** 2)) / total**2
    spread = value * (1 - value)
    # Equal shares may differ by rounding.
    size = spread / variance if variance > 1e-12 * spread else float(np.count_nonzero(whole))
    return Estimate(value, *_wilson(value, min(size, total)))


def evaluation_table(results: Sequence[EvaluationResult]) -> Table:
    """The results as a table for the terminal, a row a data set, in percent with 95% intervals where they matter most.

    `to_dict` has every pass@k and every interval.
    """
    table = Table()
    table.add_column("data")
    ks = sorted({max(result.pass_at) for result in results} - {1})
    samples = sorted({result.num_samples for result in results})
    several = [n for n in samples if n > 1]
    columns = ["problems", "accuracy" if not several else f"mean@{'/'.join(map(str, samples))}"]
    columns += [f"pass@{k}" for k in ks] + ([f"maj@{'/'.join(map(str, several))}"] if several else [])
    columns += ["process-correct", "… among correct", "of", "truncated", "tokens"]
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        cells = [str(result.num_problems), _percent(result.accuracy)]
        cells += [_percent(result.pass_at.get(k, Estimate(None)), interval=False) for k in ks]
        if several:
            cells.append(_percent(result.majority if result.num_samples > 1 else Estimate(None), interval=False))
        cells.append(_percent(result.process_consistent, interval=False))
        cells.append(_percent(result.process_consistent_among_correct))
        cells += [str(result.num_process_checked_correct), _percent(result.truncated, interval=False)]
        table.add_row(result.name, *cells, f"{result.response_tokens.value:.0f}")
    return table


def _problem(group: Group, judged: Sequence[Judgement]) -> ProblemResult:
    return ProblemResult(
        uid=group.prompt.uid,
        source=group.prompt.source,
        prompt=group.prompt.text,
        ground_truth=group.prompt.ground_truth,
        responses=tuple(rollout.text for rollout in group.rollouts),
        correct=tuple(j.correct for j in judged),
        extracted=tuple(j.extracted for j in judged),
        process_consistent=tuple(j.process_consistent for j in judged),
        truncated=tuple(rollout.truncated for rollout in group.rollouts),
        num_tokens=tuple(len(rollout.token_ids) for rollout in group.rollouts),
        status=tuple(j.status for j in judged),
        unverified=next(iter(unverified([(group.prompt, judged)])), None),
    )


def _count(rows: Sequence[Sequence[bool]], among: Sequence[Sequence[bool]] | None = None) -> np.ndarray:
    """How many entries of each row hold (and hold in `among` too)."""
    among = rows if among is None else among
    return np.array(
        [sum(a and b for a, b in zip(row, other, strict=True)) for row, other in zip(rows, among, strict=True)]
    )


def _powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself."""
    return sorted({2**e for e in range(largest.bit_length())} | {largest})


def _wilson(value: float, size: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion seen in `size` observations, which need not be whole."""
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (value + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(value * (1 - value) / size + z**2 / (4 * size**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean(values: Sequence[float]) -> Estimate:
    """Mean over problems with Student's interval; no interval for a single one."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def _flat(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _percent(estimate: Estimate, *, interval: bool = True) -> str:
    if estimate.value is None:
        return "-"
    if not interval or estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f}"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
