"""Scores by hand, their intervals against scipy and simulation, and the way from prompts to rows."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from clipo_ds.arithmetic import test_prompts as make_test_prompts
from clipo_ds.evaluate import (
    Estimate,
    ProblemResult,
    evaluation_table,
    majority_correct,
    pass_at_k,
    rate,
    response_columns,
    run_problems,
    summarise,
)
from clipo_ds.generation import TransformersEngine
from clipo_ds.records import RESPONSE_SCHEMA
from clipo_ds.rewards import Judge
from clipo_ds.schema import RewardConfig, RewardFunction, TaskConfig
from clipo_ds.warm_start import build_model, build_tokenizer

TASK = TaskConfig(hidden_size=32, num_layers=1, num_test_prompts=3)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 0}


def row(
    correct: list[bool],
    extracted: list[str | None] | None = None,
    consistent: list[bool | None] | None = None,
    **changes: object,
) -> ProblemResult:
    n = len(correct)
    values = {
        "uid": 0,
        "source": "set",
        "prompt": "1+1:",
        "ground_truth": "2",
        "responses": tuple(f"response {i}" for i in range(n)),
        "correct": tuple(correct),
        "extracted": tuple(extracted or ["1"] * n),
        "process_consistent": tuple(consistent or [None] * n),
        "truncated": (False,) * n,
        "num_tokens": (10,) * n,
        "status": tuple("verified" if right else "wrong" for right in correct),
    }
    return ProblemResult(**(values | changes))


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(numbers: tuple[int, int, int]) -> None:
    n, c, k = numbers
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_numbers_that_do_not_fit(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="`k` must be in"):
        pass_at_k(n, c, k)


def test_majority_counts_equal_answers() -> None:
    assert majority_correct([True, True, False], ["1/2", "0.5", "3"]) == 1.0  # both ways to write it are right
    assert majority_correct([True, False, False], ["4", "x = 3", "X=3"]) == 0.0  # spaces and case aside
    assert majority_correct([True, False, False], ["4", "3", "2"]) == pytest.approx(1 / 3)
    assert majority_correct([True, False, False], ["4", None, None]) == 1.0  # no answer, no vote
    assert majority_correct([False, False], [None, None]) == 0.0


def test_the_scores_of_a_small_set_by_hand() -> None:
    rows = [
        # one of four right; three checked, two of them consistent; the right one is not
        row([True, False, False, False], ["4", "3", "3", None], [False, True, True, None], num_tokens=(1, 2, 3, 4)),
        # three of four right; two of those checked, one consistent
        row([True, True, True, False], ["7", "7", "7", "1"], [True, False, None, None], truncated=(True, False) * 2),
    ]
    result = summarise("set", rows)
    assert (result.name, result.num_problems, result.num_samples) == ("set", 2, 4)
    assert result.accuracy.value == pytest.approx(0.5)
    # pass@2: 1 - C(3,2)/C(4,2) = 1/2 and 1 - C(1,2)/C(4,2) = 1; pass@4: 1 and 1
    assert {k: e.value for k, e in result.pass_at.items()} == pytest.approx({1: 0.5, 2: 0.75, 4: 1.0})
    assert result.majority.value == pytest.approx(0.5)
    assert result.truncated.value == pytest.approx(0.25)
    assert result.response_tokens.value == pytest.approx((2.5 + 10) / 2)
    assert result.process_consistent.value == pytest.approx(3 / 5) and result.num_process_checked == 5
    assert result.process_consistent_among_correct.value == pytest.approx(1 / 3)
    assert result.num_process_checked_correct == 3


def test_without_checkable_steps_there_is_no_process_score() -> None:
    result = summarise("set", [row([False], consistent=[True]), row([True])])
    assert result.process_consistent.value == 1.0
    assert result.process_consistent_among_correct == Estimate(None, None, None)
    assert result.num_process_checked_correct == 0


def test_pass_at_k_is_given_for_powers_of_two_and_the_number_of_samples() -> None:
    assert list(summarise("set", [row([True] * 6)]).pass_at) == [1, 2, 4, 6]
    assert list(summarise("set", [row([True])]).pass_at) == [1]


def test_the_flat_form_is_json_with_intervals_and_none_where_undefined() -> None:
    flat = summarise("set", [row([True, False]), row([False, False], status=("timeout", "error"))]).to_dict()
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat
    assert flat["data"] == "set" and flat["num_problems"] == 2 and flat["num_timeouts"] == flat["num_errors"] == 1
    assert flat["accuracy"] == flat["mean_at_2"] == flat["pass_at_1"] == 0.25
    assert flat["pass_at_2"] == 0.5 and flat["maj_at_2"] == pytest.approx(0.25)
    assert flat["accuracy_low"] < 0.25 < flat["accuracy_high"]
    assert flat["process_consistent_among_correct"] is None and flat["process_consistent_among_correct_low"] is None


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_one_sample_a_problem_gives_wilsons_interval(correct: list[bool]) -> None:
    estimate = summarise("set", [row([c]) for c in correct]).accuracy
    expected = stats.binomtest(sum(correct), len(correct)).proportion_ci(0.95, method="wilson")
    assert estimate.value == pytest.approx(sum(correct) / len(correct))
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_samples_of_one_problem_are_not_counted_as_independent() -> None:
    # Every problem is either always or never right: 16 samples of it say no more than one.
    certain = summarise("set", [row([i < 20] * 16) for i in range(50)]).accuracy
    single = summarise("set", [row([i < 20]) for i in range(50)]).accuracy
    assert (certain.low, certain.high) == pytest.approx((single.low, single.high))
    # Problems that differ by chance alone are as good as independent samples.
    stream = np.random.default_rng(0)
    mixed = summarise("set", [row(list(stream.random(16) < 0.4)) for _ in range(50)]).accuracy
    assert mixed.high - mixed.low < 0.45 * (single.high - single.low)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    # 40 problems of differing difficulty (Beta(0.5, 0.5), mean 1/2), 8 samples each.
    stream = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        difficulty = stream.beta(0.5, 0.5, 40)
        estimate = rate(stream.binomial(8, difficulty).astype(float), np.full(40, 8.0))
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98


def test_a_ratio_over_problems_of_unequal_weight_covers_its_truth() -> None:
    # Consistency among checked responses: problems bring 0 to 8 of them, with a level of their own around 0.7.
    stream = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        whole = stream.integers(0, 9, 60)
        part = stream.binomial(whole, stream.beta(7, 3, 60))
        estimate = rate(part.astype(float), whole.astype(float))
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98


def test_no_interval_has_width_zero_or_leaves_the_unit_interval() -> None:
    for share in ([1.0] * 5, [0.0] * 5, [0.5, 0.5], [1.0]):
        estimate = rate(np.array(share), np.ones(len(share)))
        assert 0 <= estimate.low < estimate.high <= 1 and estimate.low <= estimate.value <= estimate.high
    assert rate(np.zeros(3), np.zeros(3)) == Estimate(None)


def test_the_mean_length_has_students_interval() -> None:
    rows = [row([True], num_tokens=(n,)) for n in (10, 20, 60)]
    estimate = summarise("set", rows).response_tokens
    expected = stats.t.interval(0.95, 2, loc=30, scale=stats.sem([10, 20, 60]))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((30, *expected))
    assert summarise("set", rows[:1]).response_tokens == Estimate(10.0)


def test_rows_of_different_numbers_of_samples_or_none_are_refused() -> None:
    for rows in ([], [row([True]), row([True, False])]):
        with pytest.raises(ValueError, match="`rows` must have the same number of samples"):
            summarise("set", rows)


def test_the_table_shows_every_set_whatever_its_number_of_samples() -> None:
    results = [
        summarise("greedy", [row([True], consistent=[True]), row([False])]),
        summarise("sampled", [row([True, False, False, False]), row([True] * 4)]),
    ]
    console = Console(record=True, width=200)
    console.print(evaluation_table(results))
    text = console.export_text()
    assert "greedy" in text and "sampled" in text and "pass@4" in text and "mean@1/4" in text
    assert "50.0 [9.5, 90.5]" in text  # Wilson, one of two
    assert math.isclose(stats.binomtest(1, 2).proportion_ci(method="wilson").low, 0.0945, abs_tol=1e-4)


def test_the_columns_have_a_row_a_response_in_the_order_of_the_problems() -> None:
    rows = [row([True, False], consistent=[None, False], uid=5), row([False, True], ["1", None], uid=2)]
    columns = response_columns(rows)
    assert columns["uid"] == [2, 2, 5, 5] and columns["sample"] == [0, 1, 0, 1]
    assert columns["correct"] == [False, True, True, False] and columns["extracted"] == ["1", None, "1", "1"]
    assert columns["process_consistent"] == [None, None, None, False]
    assert columns["response"] == ["response 0", "response 1"] * 2
    assert set(columns) == set(RESPONSE_SCHEMA.names)


def make_engine() -> TransformersEngine:
    torch.manual_seed(0)
    return TransformersEngine(build_model(TASK), build_tokenizer())


def test_a_model_is_sampled_judged_and_summarised() -> None:
    prompts = [p for ps in make_test_prompts(TASK, build_tokenizer()).values() for p in ps]
    of_training = RewardConfig(functions=[RewardFunction("textwrap:wrap")])  # wants a column that no problem has
    with Judge(of_training, max_new_tokens=12) as judge:
        rows = run_problems(make_engine(), prompts, judge, samples=4, **SAMPLING)
        assert [(r.uid, r.prompt, r.ground_truth) for r in rows] == [(p.uid, p.text, p.ground_truth) for p in prompts]
        assert all(isinstance(text, str) for r in rows for text in r.responses)
        assert all(len(r.correct) == len(r.num_tokens) == len(r.responses) == 4 for r in rows)
        sources = dict.fromkeys(r.source for r in rows)
        results = [summarise(source, [r for r in rows if r.source == source]) for source in sources]
        assert [(r.name, r.num_problems) for r in results] == [("arithmetic", 3), ("arithmetic_harder", 3)]
        # Two ranks with half the problems each gather the same rows.
        halves = [
            run_problems(make_engine(), half, judge, samples=4, **SAMPLING) for half in (prompts[:2], prompts[2:])
        ]
        assert halves[0] + halves[1] == rows
        with pytest.raises(ValueError, match="`samples` must be 1 at temperature 0"):
            run_problems(make_engine(), prompts, judge, samples=2, **{**SAMPLING, "temperature": 0.0})
        assert run_problems(make_engine(), [], judge, samples=1, **SAMPLING) == []
