"""Answers that could not be verified are told from wrong ones: in the records, in the numbers and in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clipo_ds.cli import _guarded
from clipo_ds.evaluate import response_columns, run_problems, summarise
from clipo_ds.rewards import Judge
from clipo_ds.schema import RewardConfig
from clipo_ds.types import Group, InputError, Prompt, Rollout, VerifierLost
from clipo_ds.unverified import Unverified, unverified, unverified_in_words

ENDLESS = "9^{9^{9^{9}}}"


class Parrot:
    """An engine that gives the same two responses to every prompt."""

    def generate(self, prompts: list[Prompt], group_size: int, **settings: object) -> list[Group]:
        rollouts = [
            Rollout((1, 2), (-0.5, -0.5), text, False) for text in (r"\boxed{\sqrt{4}}", rf"\boxed{{{ENDLESS}}}")
        ]
        return [Group(prompt, tuple(rollouts)) for prompt in prompts]


def test_timeouts_are_recorded_counted_and_named_with_file_and_row():
    easy = Prompt(0, "p", (1,), "2", "mine", where="mine.jsonl, row 0 (line 1)")
    hard = replace(easy, uid=1, ground_truth=f"{ENDLESS}-1", where="mine.jsonl, row 1 (line 2)")
    settings = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9, "seed": 0}
    with Judge(RewardConfig(verifier_workers=2, verifier_timeout=0.5), max_new_tokens=9) as judge:
        rows = run_problems(Parrot(), [easy, hard], judge, **settings)
    assert response_columns(rows)["status"] == ["verified", "timeout", "timeout", "timeout"]
    result = summarise("mine", rows)
    assert (result.num_timeouts, result.num_errors) == (3, 0)
    failed = [row.unverified for row in rows]
    assert failed == [Unverified(easy.where, 1, 0, False), Unverified(hard.where, 2, 0, True)]
    assert unverified_in_words(failed, data="mine") == {
        "verifier_timeout to mine": "3 answers to mine used up the CPU seconds of reward.verifier_timeout, each twice, "
        "and count as wrong (status timeout in the records): mine.jsonl, row 0 (line 1); mine.jsonl, row 1 (line 2)",
        "endless_truth mine.jsonl, row 1 (line 2)": "mine.jsonl, row 1 (line 2): the ground truth uses up "
        "reward.verifier_timeout even against 0; only an answer that is written just like it can be right",
    }


def test_problems_without_a_row_and_long_lists_are_named_briefly():
    assert unverified_in_words([]) == {} == unverified_in_words(unverified([(Prompt(0, "p", (1,), "2", "mine"), [])]))
    problems = [Unverified(f"mine, problem {n}", 0, 2, False) for n in range(7)]
    assert unverified_in_words(problems) == {
        "verifier_error": "the algebra failed on 14 answers, which count as wrong (status error in the records; is the "
        "machine short of memory?): mine, problem 0; mine, problem 1; mine, problem 2; mine, problem 3; "
        "mine, problem 4; and 2 more"
    }


def test_a_lost_verifier_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def lose() -> None:
        raise VerifierLost("answers cannot be verified: a worker process of math-verify does not start: it said no")

    assert _guarded(lose) == 1
    assert capsys.readouterr().err == (
        "error: answers cannot be verified: a worker process of math-verify does not start: it said no\n"
    )


def test_a_limit_that_is_no_number_of_seconds_is_refused():
    for seconds in (0.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=r"`reward.verifier_timeout` must be positive and finite"):
            RewardConfig(verifier_timeout=seconds)
