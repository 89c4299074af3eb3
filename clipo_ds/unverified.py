"""Answers that could not be verified: which problems they belong to, and what to say of them. Layer L3.

They count as wrong, which is right for most of them (a tower of powers is nobody's answer) and silently wrong for the
rest; so they are named. In the records their `status` is `timeout` or `error`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clipo_ds.rewards import Judgement
from clipo_ds.types import Prompt

NUM_NAMED = 5


@dataclass(frozen=True)
class Unverified:
    """A problem with answers that could not be verified."""

    where: str  # file and row
    num_timeouts: int
    num_errors: int
    endless_truth: bool  # its ground truth takes as long against 0


def unverified(judged: Iterable[tuple[Prompt, Sequence[Judgement]]]) -> list[Unverified]:
    """Those of the problems that have such answers, in order."""
    found = []
    for prompt, judgements in judged:
        count = [sum(j.status == status for j in judgements) for status in ("timeout", "error")]
        if any(count):
            where = prompt.where or f"{prompt.source}, problem {prompt.uid}"
            found.append(Unverified(where, *count, any(j.endless_truth for j in judgements)))
    return found


def unverified_in_words(problems: Sequence[Unverified], *, data: str = "") -> dict[str, str]:
    """Warnings by kind, as `metrics.warnings_in_words` gives them; none where there are no problems.

    Args:
        problems: Of all ranks.
        data: Name of the test set; empty for rollouts.
    """
    of, warnings = (f" to {data}" if data else ""), {}
    slow = [problem for problem in problems if problem.num_timeouts]
    if slow:
        warnings[f"verifier_timeout{of}"] = (
            f"{sum(problem.num_timeouts for problem in slow)} answers{of} used up the CPU seconds of "
            f"reward.verifier_timeout, each twice, and count as wrong (status timeout in the records): {_named(slow)}"
        )
    dead = [problem for problem in problems if problem.num_errors]
    if dead:
        warnings[f"verifier_error{of}"] = (
            f"the algebra failed on {sum(problem.num_errors for problem in dead)} answers{of}, which count as wrong "
            f"(status error in the records; is the machine short of memory?): {_named(dead)}"
        )
    for where in dict.fromkeys(problem.where for problem in problems if problem.endless_truth):
        warnings[f"endless_truth {where}"] = (
            f"{where}: the ground truth uses up reward.verifier_timeout even against 0; only an answer that is "
            "written just like it can be right"
        )
    return warnings


def _named(problems: Sequence[Unverified]) -> str:
    names = list(dict.fromkeys(problem.where for problem in problems))
    more = f"; and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return "; ".join(names[:NUM_NAMED]) + more
