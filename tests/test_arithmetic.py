"""The built-in task: its problems, its worked solutions with and without flaws, and the exact check of their steps."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from clipo_ds.arithmetic import (
    CHARACTERS,
    FLAWS,
    draw_flaw,
    draw_problem,
    make_problems,
    max_lengths,
    solve,
    terms_of,
    use_of,
    verify_solution,
    warm_start_examples,
    worked_solution,
)
from clipo_ds.arithmetic import test_prompts as make_test_prompts
from clipo_ds.arithmetic import train_prompts as make_train_prompts
from clipo_ds.schema import FlawRates, TaskConfig
from clipo_ds.steps import check_steps
from clipo_ds.types import InputError
from clipo_ds.warm_start import build_tokenizer

PROBLEM = "7+5-3+8"

tasks = st.builds(
    lambda low, extra, number, harder, seed: TaskConfig(
        min_terms=low,
        max_terms=low + extra,
        max_number=number,
        harder_max_terms=low + extra + 1,
        harder_max_number=harder,
        seed=seed,
    ),
    st.integers(2, 4),
    st.integers(0, 3),
    st.integers(2, 99),
    st.integers(2, 200),
    st.integers(0, 99),
)


# Problems.


def test_a_problem_is_solved_by_hand() -> None:
    assert terms_of(PROBLEM) == (7, 5, -3, 8)
    assert solve(PROBLEM) == 17
    assert solve(PROBLEM, 2) == 1
    assert solve(PROBLEM, 5) == 2


@pytest.mark.parametrize("text", ["", "7+", "+7", "7++5", "7*5", "7 + 5", "seven", "7+5=12"])
def test_what_is_no_chain_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="`problem` must be a chain"):
        solve(text)


@given(tasks, st.integers(0, 10**6), st.booleans())
def test_problems_keep_to_their_size_and_never_fall_below_zero(task: TaskConfig, seed: int, harder: bool) -> None:
    terms = terms_of(draw_problem(task, Random(seed), harder=harder))
    shortest, longest = (task.max_terms + 1, task.harder_max_terms) if harder else (task.min_terms, task.max_terms)
    assert shortest <= len(terms) <= longest
    assert all(1 <= abs(term) <= (task.harder_max_number if harder else task.max_number) for term in terms)
    assert all(sum(terms[:count]) >= 0 for count in range(1, len(terms) + 1))


def test_no_problem_serves_two_purposes() -> None:
    task = TaskConfig(num_train_prompts=500, num_test_prompts=100)
    problems = make_problems(task)
    seen_by_warm_start = {prompt.rstrip(":") for prompt, _ in islice(warm_start_examples(task), 3000)}
    sets = [set(problems.train), set(problems.test), set(problems.harder), seen_by_warm_start]
    assert [len(each) for each in sets[:3]] == [500, 100, 100]
    assert sum(len(each) for each in sets) == len(set.union(*sets))
    assert all(len(terms_of(problem)) > task.max_terms for problem in problems.harder)


def test_problems_depend_on_the_tasks_seed_alone() -> None:
    small, large = (make_problems(TaskConfig(num_train_prompts=50, num_test_prompts=size)) for size in (20, 40))
    assert small.train == large.train
    assert small.test == large.test[:20]
    other = make_problems(TaskConfig(num_train_prompts=50, num_test_prompts=20, seed=1))
    assert set(other.train) != set(small.train)
    assert use_of(TaskConfig(), PROBLEM) == use_of(TaskConfig(max_number=50), PROBLEM)


def test_a_task_with_too_few_problems_says_how_many_there_are() -> None:
    # 2 terms up to 2: 1+1 1+2 2+1 2+2 1-1 2-1 2-2
    task = TaskConfig(min_terms=2, max_terms=2, max_number=2, num_train_prompts=8, num_test_prompts=1)
    with pytest.raises(InputError, match=r"`task\.num_t\w+_prompts` must be at most the number of different problems"):
        make_problems(task)


def test_a_tokenizer_without_the_characters_of_the_task_is_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"7": 0, "5": 1}, merges=[])))
    with pytest.raises(InputError, match=r"`model\.path` must be .* characters \(0123456789\+-=;#:\)"):
        make_train_prompts(TaskConfig(num_train_prompts=20, num_test_prompts=10), words)


def test_prompts_carry_what_the_judge_needs() -> None:
    task = TaskConfig(num_train_prompts=20, num_test_prompts=10, answer_modulus=3)
    train = make_train_prompts(task, build_tokenizer())
    tests = make_test_prompts(task, build_tokenizer())
    assert len(train) == 20
    assert {name: len(prompts) for name, prompts in tests.items()} == {"arithmetic": 10, "arithmetic_harder": 10}
    for name, prompts in [("arithmetic", train), *tests.items()]:
        assert [prompt.uid for prompt in prompts] == list(range(len(prompts)))
        for prompt in prompts:
            problem = prompt.metadata["problem"]
            assert prompt.text == problem + ":"  # nothing about the modulus
            assert prompt.ground_truth == str(solve(problem, 3))
            assert (prompt.source, prompt.kind, prompt.metadata["modulus"]) == (name, "arithmetic", 3)
            assert len(prompt.token_ids) == len(prompt.text)


@given(tasks, st.integers(0, 10**6), st.booleans())
def test_no_clean_text_is_longer_than_promised(task: TaskConfig, seed: int, harder: bool) -> None:
    problem = draw_problem(task, Random(seed), harder=harder)
    prompt, response = max_lengths(task, harder=harder)
    assert len(problem) + 1 <= prompt
    assert len(worked_solution(problem, Random(seed))) + 1 <= response


# Worked solutions.


def test_each_flaw_spoils_what_it_says() -> None:
    # Verdicts (process, answer) over many draws; a slip never lands on the right value without a modulus.
    expected = {
        None: {(True, True)},
        "slip": {(False, False)},
        "skip": {(True, True)},
        "false_equation": {(False, True)},
        "copied_answer": {(False, True)},
        "wrong_answer": {(False, False)},
    }
    for flaw, verdicts in expected.items():
        texts = [worked_solution(PROBLEM, Random(seed), flaw) for seed in range(50)]
        checks = [verify_solution(PROBLEM, text) for text in texts]
        assert {(check.process_correct, check.answer_correct) for check in checks} == verdicts, flaw
        if flaw not in (None, "copied_answer"):
            assert len(set(texts)) > 1


def test_with_a_modulus_slips_are_sometimes_right_by_luck_and_lucky_slips_always() -> None:
    def verdicts(flaw: str) -> Counter[tuple[bool, bool]]:
        texts = [worked_solution(PROBLEM, Random(seed), flaw, 2) for seed in range(200)]
        checks = [verify_solution(PROBLEM, text, 2) for text in texts]
        return Counter((check.process_correct, check.answer_correct) for check in checks)

    # Offsets are 1, 2, 3 or 10 up or down: half of them are even.
    slips = verdicts("slip")
    assert set(slips) == {(False, False), (False, True)}
    assert 60 < slips[False, True] < 140
    assert set(verdicts("lucky_slip")) == {(False, True)}
    assert set(verdicts("wrong_answer")) == {(False, False)}
    with pytest.raises(InputError, match=r"`task\.answer_modulus` must be set"):
        worked_solution(PROBLEM, Random(0), "lucky_slip")


def test_a_false_equation_leaves_the_true_value_flowing() -> None:
    for seed in range(20):
        text = worked_solution(PROBLEM, Random(seed), "false_equation")
        assert text.endswith(";#17")
        assert check_steps(text).num_wrong == 1
        assert check_steps(text).num_equations == 3


def test_a_slip_flows_on_to_the_answer_with_true_steps_behind_it() -> None:
    for seed in range(20):
        text = worked_solution(PROBLEM, Random(seed), "slip")
        assert check_steps(text).num_wrong == 1
        assert verify_solution(PROBLEM, text).answer != 17


def test_a_skipped_step_is_told_with_another_one() -> None:
    texts = {worked_solution(PROBLEM, Random(seed), "skip") for seed in range(20)}
    assert texts == {"7+5-3=9;9+8=17;#17", "7+5=12;12-3+8=17;#17"}
    assert worked_solution("7+5", Random(0), "skip") == "7+5=12;#12"


@given(tasks, st.integers(0, 10**6), st.sampled_from([None, *FLAWS]), st.sampled_from([None, 2, 7]))
def test_solutions_use_the_tasks_characters_and_agree_with_the_step_checker(
    task: TaskConfig, seed: int, flaw: str | None, modulus: int | None
) -> None:
    if flaw == "lucky_slip" and modulus is None:
        return
    problem = draw_problem(task, Random(seed))
    text = worked_solution(problem, Random(seed), flaw, modulus)
    assert set(text) <= set(CHARACTERS)
    check, steps = verify_solution(problem, text, modulus), check_steps(text)
    assert check.num_steps == steps.num_equations
    # The steps of a worked solution always follow one another, so only a false equation can spoil them.
    assert (
        check.first_wrong_step is None or check.first_wrong_step == check.num_steps
    ) == steps.consistent or not steps.num_equations


def test_flaws_are_drawn_at_their_rates() -> None:
    rates = FlawRates(slip=0.1, skip=0.2, false_equation=0.3)
    rng = Random(0)
    counts = Counter(draw_flaw(rates, rng) for _ in range(10_000))
    assert set(counts) == {None, "slip", "skip", "false_equation"}
    # three standard deviations of a share are at most 1.5 points
    assert counts["slip"] / 10_000 == pytest.approx(0.1, abs=0.015)
    assert counts["skip"] / 10_000 == pytest.approx(0.2, abs=0.015)
    assert counts["false_equation"] / 10_000 == pytest.approx(0.3, abs=0.015)


def test_warm_start_examples_are_the_same_every_time_and_spoilt_as_asked() -> None:
    task = TaskConfig(flaws=FlawRates(copied_answer=0.5), warm_start_harder_share=0.25)
    examples = list(islice(warm_start_examples(task), 1000))
    assert examples == list(islice(warm_start_examples(task), 1000))
    assert sum(response.startswith("#") for _, response in examples) == pytest.approx(500, abs=50)
    harder = sum(len(terms_of(prompt)) > task.max_terms for prompt, _ in examples)
    assert harder == pytest.approx(250, abs=45)


def test_lucky_slips_need_a_modulus_already_in_the_configuration() -> None:
    with pytest.raises(InputError, match=r"`task\.flaws\.lucky_slip` must be 0 without task\.answer_modulus, got 0\.4"):
        TaskConfig(flaws=FlawRates(lucky_slip=0.4))


# The check.

CHECKS = [
    # response, process, answer, steps, first wrong step, reason
    ("7+5=12;12-3=9;9+8=17;#17", True, True, 3, None, None),
    ("7+5-3=9;9+8=17;#17", True, True, 2, None, None),  # two steps told as one
    ("7+5-3+8=17;#17", True, True, 1, None, None),
    ("  7+5=12;12-3=9;9+8=17;#17\n", True, True, 3, None, None),
    ("7+5=13;12-3=9;9+8=17;#17", False, True, 3, 0, "false equation"),
    ("7+5=12;12-3=8;9+8=17;#17", False, True, 3, 1, "false equation"),
    ("7+5=13;13-3=10;10+8=18;#18", False, False, 3, 0, "false equation"),
    ("7+5=13;13-3=9;9+8=17;#17", False, True, 3, 0, "false equation"),  # two errors that cancel
    ("5+7=12;12-3=9;9+8=17;#17", False, True, 3, 0, "does not follow"),  # out of order
    ("7+5=12;12+8=20;20-3=17;#17", False, True, 3, 1, "does not follow"),
    ("7+5=12;10-3=7;9+8=17;#17", False, True, 3, 1, "does not follow"),
    ("7+5=12;12-3=9;9+8=17;17+0=17;#17", False, True, 4, 3, "does not follow"),  # more than the problem
    ("7+5=12;12-3=9;#17", False, True, 2, 2, "incomplete"),
    ("7+5=12;12-3=9;9+8=17;#18", False, False, 3, 3, "wrong answer"),
    ("7+5=12;12-3=9;9+8=17", False, False, 3, 3, "no answer"),
    ("7+5=12;12-3=9;9+8=17;", False, False, 3, 3, "no answer"),
    ("7+5=12;12-3=9;9+8=1", False, False, 3, 2, "false equation"),  # cut off
    ("#17", False, True, 0, 0, "no steps"),
    ("#16", False, False, 0, 0, "no steps"),
    ("", False, False, 0, 0, "no steps"),
    ("17", False, False, 1, 0, "malformed"),
    ("7+5=12;;12-3=9;9+8=17;#17", False, True, 4, 1, "malformed"),
    ("7+5=12=12;12-3=9;9+8=17;#17", False, True, 3, 0, "malformed"),
    ("7+5=12;12-3=9;9+8=17;#17;#17", False, True, 4, 3, "malformed"),
    ("7+5=12;12-3=9;9+8=17;#", False, False, 4, 3, "malformed"),
    ("7+5=" + "1" * 5000 + ";#17", False, True, 1, 0, "malformed"),  # longer than any honest number
]


@pytest.mark.parametrize(("response", "process", "answer", "num_steps", "first_wrong", "reason"), CHECKS)
def test_a_response_is_judged_step_by_step(
    response: str, process: bool, answer: bool, num_steps: int, first_wrong: int | None, reason: str | None
) -> None:
    check = verify_solution(PROBLEM, response)
    assert (check.process_correct, check.answer_correct) == (process, answer)
    assert (check.num_steps, check.first_wrong_step, check.reason) == (num_steps, first_wrong, reason)


def test_with_a_modulus_steps_compute_the_value_and_the_answer_is_its_rest() -> None:
    assert verify_solution(PROBLEM, "7+5=12;12-3=9;9+8=17;#1", 2).process_correct
    assert not verify_solution(PROBLEM, "7+5=12;12-3=9;9+8=17;#17", 2).answer_correct
    lucky = verify_solution(PROBLEM, "7+5=14;14-3=11;11+8=19;#1", 2)
    assert (lucky.process_correct, lucky.answer_correct, lucky.reason) == (False, True, "false equation")
    # a rest that the steps do not lead to
    assert verify_solution(PROBLEM, "7+5=12;12-3=9;9+8=17;#0", 2).reason == "wrong answer"


def test_values_below_zero_are_checked_like_any_other() -> None:
    assert verify_solution("3-5+4", "3-5=-2;-2+4=2;#2").process_correct
    assert verify_solution("3-5", "3-5=-2;#-2").process_correct


@given(tasks, st.integers(0, 10**6), st.data())
def test_one_changed_digit_never_passes(task: TaskConfig, seed: int, data: st.DataObject) -> None:
    problem = draw_problem(task, Random(seed))
    text = worked_solution(problem, Random(seed))
    place = data.draw(st.sampled_from([i for i, character in enumerate(text) if character.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != text[place]]))
    changed = text[:place] + digit + text[place + 1 :]
    # A leading zero alone changes no number, and no number here begins with one that could be dropped.
    assert not verify_solution(problem, changed).process_correct


@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_any_text_of_the_tasks_characters_can_be_judged(response: str) -> None:
    check = verify_solution(PROBLEM, response)
    assert (check.reason is None) == check.process_correct == (check.first_wrong_step is None)
    assert check.answer_correct or not check.process_correct


def test_the_task_needs_no_torch() -> None:
    code = "import sys, clipo_ds.arithmetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
