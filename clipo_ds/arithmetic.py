"""The built-in task: chains of additions and subtractions, worked solutions, and the exact check of every step.

    problem     7+5-3+8
    prompt      7+5-3+8:                        (one character a token; lengths are `max_lengths`)
    response    7+5=12;12-3=9;9+8=17;#17        (`#` marks the final answer)

With `answer_modulus: m` the final answer is the chain's value modulo m while the steps still compute the value; the
prompt does not say so. No problem's running value falls below zero. Everything random comes from `TaskConfig.seed`.
Which problems may be trained on, tested on or seen by the warm start is settled by a hash of each problem, so these
sets have nothing in common whatever their sizes, and the warm start does not depend on them.

Layer L1: imports `clipo_ds.schema` and `clipo_ds.types`, no torch. The model that learns this task is made in
`clipo_ds.warm_start`. The paper (CLIPO, arXiv 2603.10101) has no such task: it exists so that right answers with wrong
steps can be made at will and counted without error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal
from zlib import crc32

from clipo_ds.schema import FlawRates, TaskConfig
from clipo_ds.types import InputError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = "0123456789+-=;#:"
"""Every character of prompts and responses."""
PROMPT_END = ":"

Flaw = Literal["slip", "lucky_slip", "skip", "false_equation", "copied_answer", "wrong_answer"]
FLAWS: tuple[Flaw, ...] = ("slip", "lucky_slip", "skip", "false_equation", "copied_answer", "wrong_answer")

Reason = Literal[
    "no steps", "malformed", "does not follow", "false equation", "incomplete", "no answer", "wrong answer"
]

Use = Literal["test", "train", "warm start"]
_USES: tuple[Use, ...] = ("test", "train", "train", "train", *(("warm start",) * 4))

_MAX_DRAWS_PER_PROBLEM = 1000
_NUMBER = r"-?[0-9]{1,18}"
_PROBLEM = re.compile(r"[0-9]{1,18}(?:[+-][0-9]{1,18})*")
_STEP = re.compile(rf"({_NUMBER}(?:[+-][0-9]{{1,18}})+)=({_NUMBER})")
_ANSWER = re.compile(rf"#({_NUMBER})")


def terms_of(expression: str) -> tuple[int, ...]:
    """Signed terms of a chain.

    >>> terms_of("7+5-3+8")
    (7, 5, -3, 8)
    """
    return tuple(int(term) for term in re.findall(r"[+-]?[0-9]+", expression))


def solve(problem: str, modulus: int | None = None) -> int:
    """The right final answer of a problem: the value of its chain, modulo `modulus` if there is one.

    Raises:
        InputError: `problem` is not a chain of whole numbers.

    >>> solve("7+5-3+8"), solve("7+5-3+8", modulus=2)
    (17, 1)
    """
    if not _PROBLEM.fullmatch(problem):
        raise InputError(f"`problem` must be a chain such as 7+5-3+8, got {problem!r}")
    value = sum(terms_of(problem))
    return value if modulus is None else value % modulus


# Problems.


@dataclass(frozen=True)
class Problems:
    """The problems of a task; no problem is in two sets, or twice in one."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    harder: tuple[str, ...]  # longer chains of larger numbers


def make_problems(task: TaskConfig) -> Problems:
    """Training and test problems of a task.

    Raises:
        InputError: the task has fewer distinct problems than asked for.
    """
    return Problems(
        train=_draw_distinct(task, "num_train_prompts", "train"),
        test=_draw_distinct(task, "num_test_prompts", "test"),
        harder=_draw_distinct(task, "num_test_prompts", "harder"),
    )


def use_of(task: TaskConfig, problem: str) -> Use:
    """What a problem may be used for; the harder ones are longer than all others, so they never meet these."""
    return _USES[crc32(f"{task.seed}/{problem}".encode()) % len(_USES)]


def draw_problem(task: TaskConfig, rng: Random, *, harder: bool = False) -> str:
    """One problem: a number of terms, then numbers, each uniform; a sign is + wherever - would go below zero."""
    if harder:
        num_terms, largest = rng.randint(task.max_terms + 1, task.harder_max_terms), task.harder_max_number
    else:
        num_terms, largest = rng.randint(task.min_terms, task.max_terms), task.max_number
    value = rng.randint(1, largest)
    problem = str(value)
    for _ in range(num_terms - 1):
        term = rng.randint(1, largest)
        minus = rng.random() < 0.5 and term <= value
        value += -term if minus else term
        problem += f"{'-' if minus else '+'}{term}"
    return problem


def _draw_distinct(task: TaskConfig, field: str, use: Literal["train", "test", "harder"]) -> tuple[str, ...]:
    rng = Random(f"{task.seed}/{use}")
    wanted: int = getattr(task, field)
    drawn: dict[str, None] = {}
    for _ in range(_MAX_DRAWS_PER_PROBLEM * wanted):
        problem = draw_problem(task, rng, harder=use == "harder")
        if use_of(task, problem) == ("test" if use == "harder" else use):
            drawn[problem] = None
        if len(drawn) == wanted:
            return tuple(drawn)
    raise InputError(
        f"`task.{field}` must be at most the number of different problems that the task has for this use "
        f"(about {len(drawn)}), got {wanted}"
    )


def train_prompts(task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The training set, kind `arithmetic`, with `problem` and `modulus` as metadata."""
    return _prompts(make_problems(task).train, "arithmetic", task, tokenizer)


def test_prompts(task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Prompt]]:
    """The two test sets by name: `arithmetic` (in distribution) and `arithmetic_harder`."""
    problems = make_problems(task)
    sets = {"arithmetic": problems.test, "arithmetic_harder": problems.harder}
    return {name: _prompts(chosen, name, task, tokenizer) for name, chosen in sets.items()}


test_prompts.__test__ = False  # type: ignore[attr-defined]  # its name makes pytest take it for a test


def _prompts(
    problems: tuple[str, ...], source: str, task: TaskConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    texts = [problem + PROMPT_END for problem in problems]
    characters = str(tokenizer.decode(tokenizer(CHARACTERS, add_special_tokens=False)["input_ids"]))
    if characters.strip() != CHARACTERS:
        raise InputError(
            f"`model.path` must be a model whose tokenizer has the task's characters ({CHARACTERS}), "
            f"got {tokenizer.name_or_path!r}, which has {characters}"
        )
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        Prompt(
            uid=uid,
            text=text,
            token_ids=tuple(ids),
            ground_truth=str(solve(problem, task.answer_modulus)),
            source=source,
            kind="arithmetic",
            metadata={"problem": problem, "modulus": task.answer_modulus},
        )
        for uid, (problem, text, ids) in enumerate(zip(problems, texts, token_ids, strict=True))
    ]


def max_lengths(task: TaskConfig, *, harder: bool = False) -> tuple[int, int]:
    """Longest prompt and longest clean response of a task, in tokens; the response's end-of-sequence token counts."""
    num_terms, largest = (
        (task.harder_max_terms, task.harder_max_number) if harder else (task.max_terms, task.max_number)
    )
    digits, value_digits = len(str(largest)), len(str(largest * num_terms))
    prompt = num_terms * (digits + 1)
    response = (num_terms - 1) * (2 * value_digits + digits + 3) + 1 + value_digits + 1
    return prompt, response


# Worked solutions.


def worked_solution(problem: str, rng: Random, flaw: Flaw | None = None, modulus: int | None = None) -> str:
    """A worked solution, clean or with one flaw.

    slip            one step's value is off and the error flows on: wrong steps, wrong answer (a modulus may hide it)
    lucky_slip      the same, off by a multiple of the modulus: wrong steps, right answer
    skip            two steps are told as one: true steps, right answer; a problem of two terms has none to skip
    false_equation  one step states a wrong value but the true one flows on: a wrong step, right answer
    copied_answer   no steps, right answer
    wrong_answer    true steps, an answer that is not their result

    Raises:
        InputError: a lucky slip is asked for without a modulus.

    >>> worked_solution("7+5-3+8", Random(0))
    '7+5=12;12-3=9;9+8=17;#17'
    >>> worked_solution("7+5-3+8", Random(0), "skip")
    '7+5=12;12-3+8=17;#17'
    """
    terms = terms_of(problem)
    answer = solve(problem, modulus)
    if flaw == "copied_answer":
        return f"#{answer}"
    if flaw == "lucky_slip" and modulus is None:
        raise InputError("`task.answer_modulus` must be set for a lucky slip, got None")
    num_steps = len(terms) - 1
    spoilt = rng.randrange(num_steps) if num_steps else 0
    merged = rng.randrange(num_steps - 1) if flaw == "skip" and num_steps > 1 else -1
    value, steps, expression = terms[0], [], str(terms[0])
    for index, term in enumerate(terms[1:]):
        value += term
        expression += f"{term:+d}"
        if index == merged:
            continue
        stated = value
        if index == spoilt and flaw in ("slip", "lucky_slip", "false_equation"):
            stated = _wrong_value(value, rng, modulus if flaw == "lucky_slip" else None)
        steps.append(f"{expression}={stated}")
        value = value if flaw == "false_equation" else stated
        expression = str(value)
    answer = value if modulus is None else value % modulus
    if flaw == "wrong_answer":
        answer = _wrong_answer(answer, rng, modulus)
    return ";".join([*steps, f"#{answer}"])


def _wrong_value(value: int, rng: Random, modulus: int | None) -> int:
    """A wrong value near the true one, never negative; off by a multiple of the modulus if one is given."""
    unit = 1 if modulus is None else modulus
    offsets = [unit * size for size in (1, 2, 3, 10)]
    return rng.choice(
        [value + offset for offset in offsets] + [value - offset for offset in offsets if offset <= value]
    )


def _wrong_answer(answer: int, rng: Random, modulus: int | None) -> int:
    if modulus is not None:
        return (answer + rng.randrange(1, modulus)) % modulus
    return _wrong_value(answer, rng, None)


def draw_flaw(rates: FlawRates, rng: Random) -> Flaw | None:
    """A flaw with the probability of its rate, None with what is left."""
    point = rng.random()
    for flaw in FLAWS:
        point -= getattr(rates, flaw)
        if point < 0:
            return flaw
    return None


def warm_start_examples(task: TaskConfig) -> Iterator[tuple[str, str]]:
    """Endless (prompt, worked solution) pairs with the task's flaws; no problem of theirs is in `make_problems`."""
    rng = Random(f"{task.seed}/warm start")
    while True:
        problem = draw_problem(task, rng, harder=rng.random() < task.warm_start_harder_share)
        if use_of(task, problem) == "warm start":
            flaw = draw_flaw(task.flaws, rng)
            yield problem + PROMPT_END, worked_solution(problem, rng, flaw, task.answer_modulus)


# The check of a solution.


@dataclass(frozen=True)
class SolutionCheck:
    """What a response to a problem amounts to."""

    process_correct: bool  # true steps that use the problem's terms in order, up to the right answer
    answer_correct: bool
    num_steps: int  # equations before the answer, well formed or not
    first_wrong_step: (
        int | None
    )  # from 0; num_steps where only what follows the steps is wrong; None for a right process
    reason: Reason | None  # what is wrong there
    answer: int | None  # the final answer, None if there is none


def verify_solution(problem: str, response: str, modulus: int | None = None) -> SolutionCheck:
    """Check every step of a response, exactly.

    The process is correct when every step is a true equation, the first begins with the problem's first terms and each
    later one with the value before it, all terms are consumed in order, and the final answer is the last value (modulo
    `modulus`). Steps told as one are fine if the equation is true; an answer without steps is no process.

    Raises:
        InputError: `problem` is not a chain of whole numbers.

    >>> verify_solution("7+5-3+8", "7+5-3=9;9+8=17;#17").process_correct
    True
    >>> check = verify_solution("7+5-3+8", "7+5=13;12-3=9;9+8=17;#17")
    >>> check.process_correct, check.answer_correct, check.first_wrong_step, check.reason
    (False, True, 0, 'false equation')
    """
    right = solve(problem, modulus)
    *steps, last = response.strip().split(";")
    found = _ANSWER.fullmatch(last)
    answer = int(found[1]) if found else None
    if not found and last:
        steps.append(last)
    wrong, reason = _first_wrong_step(terms_of(problem), steps)
    if reason is None and answer != right:
        wrong, reason = len(steps), "no answer" if answer is None else "wrong answer"
    return SolutionCheck(reason is None, answer == right, len(steps), wrong, reason, answer)


def _first_wrong_step(terms: tuple[int, ...], steps: list[str]) -> tuple[int | None, Reason | None]:
    """Where the steps leave the way from the problem to its value, and how; (None, None) if they do not."""
    if not steps:
        # A lone number is its own value: there is nothing to work out.
        return (None, None) if len(terms) == 1 else (0, "no steps")
    value, left = terms[0], terms[1:]
    for index, step in enumerate(steps):
        match = _STEP.fullmatch(step)
        if not match:
            return index, "malformed"
        first, *rest = terms_of(match[1])
        stated = int(match[2])
        if first != value or tuple(rest) != left[: len(rest)]:
            return index, "does not follow"
        if first + sum(rest) != stated:
            return index, "false equation"
        value, left = stated, left[len(rest) :]
    return (len(steps), "incomplete") if left else (None, None)
