r"""Verification of final answers: is what a response settles on what the ground truth asks for?

`clipo_ds.extraction` finds the answers (its head says what counts as the final one), `clipo_ds.equality` decides most
of them by exact comparison, and only what needs algebra goes to math-verify in killable workers
(`clipo_ds.symbolic`). May import those three, `clipo_ds.math_worker` and `clipo_ds.types`; no torch.

Kinds of problems:

- ``math``: numbers, expressions, sets, tuples, intervals, matrices, words. The ground truth may be the bare answer, a
  worked solution (its last box counts) or end in ``#### 42``.
- ``choice``: one letter A to J, bare, in brackets or with the option's text.
- ``arithmetic``: what follows the last ``#``, compared as an integer or as a string (the built-in task).
"""

from __future__ import annotations

import atexit
import math
import os
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from clipo_ds.choices import choice_in_sentence, choice_letter
from clipo_ds.equality import MAX_ANSWER_CHARS, same_answer
from clipo_ds.extraction import final_answer, find_boxes, truth_answers
from clipo_ds.math_worker import Outcome
from clipo_ds.symbolic import SymbolicPool
from clipo_ds.thoughts import KNOWN_TAGS, ThoughtTags
from clipo_ds.types import InputError, Prompt

KINDS = ("math", "choice", "arithmetic")
_INTEGER = re.compile(r"-?[0-9]+")

Status = Literal["verified", "wrong", "no_answer", "timeout", "error", "no_truth"]


@dataclass(frozen=True)
class Verdict:
    """What the verifier found. `correct` is true for status ``verified`` only.

    status: ``verified``; ``wrong``; ``no_answer`` (the response settles on none); ``timeout`` (the comparison used up
    its CPU seconds, twice); ``error`` (the algebra raised, or ended its worker twice, for instance out of memory);
    ``no_truth`` (the ground truth states no answer).
    """

    correct: bool
    extracted: str | None  # the final answer as the response writes it; a choice as its letter
    status: Status


@dataclass(frozen=True)
class GroundTruthFailure:
    """A ground truth that does not verify against itself."""

    position: int  # in what was checked
    reason: str


class AnswerVerifier:
    r"""Verifies many responses; owns the worker processes, which start when the first comparison needs algebra.

    Use it as a context manager, or call `close`. Methods may be called from any thread, from several at once.

    Args:
        workers: processes, at least 1.
        timeout: CPU seconds of a worker for one comparison (`verify_answer` says more).

    >>> with AnswerVerifier(workers=1) as verifier:
    ...     verdicts = verifier.verify_many(["... so \\boxed{7}", "I give up after 7 tries, sorry"], ["7", "7"], "math")
    >>> [(v.correct, v.extracted, v.status) for v in verdicts]
    [(True, '7', 'verified'), (False, 'I give up after 7 tries, sorry', 'wrong')]
    """

    def __init__(self, workers: int = 2, timeout: float = 5.0, *, tags: ThoughtTags = KNOWN_TAGS) -> None:
        if workers < 1:
            raise InputError(f"`workers` must be at least 1, got {workers!r}")
        self._tags = tags
        self._timeout = _checked_timeout(timeout, "timeout")
        self._pool = SymbolicPool(workers)
        self._endless: dict[str, bool] = {}  # accepted answers that were compared with 0: were they stopped?

    def __enter__(self) -> AnswerVerifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Comparisons that need no algebra still work."""
        self._pool.close()

    def verify_many(
        self,
        texts: Sequence[str],
        ground_truths: Sequence[str],
        kinds: str | Sequence[str] = "math",
        *,
        timeout: float | None = None,
    ) -> list[Verdict]:
        """Verdicts in the order of `texts`.

        Args:
            texts: N responses.
            ground_truths: N ground truths.
            kinds: N kinds, or one for all.
            timeout: CPU seconds for one comparison; None is the verifier's own limit.

        Raises:
            InputError: the lengths differ, or a kind is unknown.
            VerifierLost: algebra is needed, and its worker processes do not start or die at whatever they are asked.
            RuntimeError: algebra is needed, and the verifier is closed.
        """
        kinds = [kinds] * len(texts) if isinstance(kinds, str) else kinds
        if not len(texts) == len(ground_truths) == len(kinds):
            raise InputError(
                "`texts`, `ground_truths` and `kinds` must be of one length, "
                f"got {len(texts)}, {len(ground_truths)} and {len(kinds)}"
            )
        rows = zip(texts, map(str, ground_truths), kinds, strict=True)
        judged = [_judge_cheaply(*row, self._tags) for row in rows]
        # Equal comparisons are made once: the rollouts of a group share the truth and often the answer.
        open_pairs = dict.fromkeys(pair for _, pairs in judged for pair in pairs)
        seconds = self._timeout if timeout is None else timeout
        outcomes = dict(zip(open_pairs, self._pool.compare(list(open_pairs), seconds), strict=True))
        return [_settle(verdict, [outcomes[pair] for pair in pairs]) for verdict, pairs in judged]

    def takes_for_ever(self, ground_truth: str, kind: str = "math") -> bool:
        """Whether even a comparison of a ground truth with 0 is stopped at the time limit: no answer to it that needs
        algebra can be verified. Takes the workers; what was found once is remembered.

        Raises:
            VerifierLost, RuntimeError: as `verify_many`.
        """
        answers = [] if kind == "arithmetic" else truth_answers(ground_truth, kind)
        new = [answer for answer in answers if answer not in self._endless and len(answer) <= MAX_ANSWER_CHARS]
        outcomes = self._pool.compare([("0", answer) for answer in new], self._timeout)
        self._endless |= {answer: outcome == "timeout" for answer, outcome in zip(new, outcomes, strict=True)}
        return any(self._endless.get(answer, False) for answer in answers)


def _checked_timeout(timeout: float, name: str) -> float:
    if not 0 < timeout < math.inf:
        raise InputError(f"`{name}` must be positive and finite (CPU seconds), got {timeout!r}")
    return timeout


def _settle(verdict: Verdict, outcomes: list[Outcome]) -> Verdict:
    """The verdict once its open comparisons (one for each accepted answer) are back."""
    if not outcomes:
        return verdict
    status: Status = "wrong"
    if "same" in outcomes:
        status = "verified"
    elif "timeout" in outcomes:
        status = "timeout"
    elif "crash" in outcomes or "error" in outcomes:
        status = "error"
    return Verdict(status == "verified", verdict.extracted, status)


def _judge_cheaply(
    text: str, ground_truth: str, kind: str, tags: ThoughtTags = KNOWN_TAGS
) -> tuple[Verdict, list[tuple[str, str]]]:
    """The verdict, and the (answer, truth) pairs that only algebra can decide (then the verdict is provisional)."""
    if kind not in KINDS:
        raise InputError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}")
    truths = truth_answers(ground_truth, kind)
    answer = final_answer(text, kind, tags)
    if not truths:
        return Verdict(False, answer, "no_truth"), []
    if answer is None:
        return Verdict(False, None, "no_answer"), []
    if kind == "arithmetic":
        return _verdict(_same_integer(answer, truths[0]), answer), []
    if kind == "choice" and (expected := choice_letter(truths[-1])):
        letter = choice_letter(answer) if find_boxes(tags.after(text) or "") else choice_in_sentence(answer)
        return _verdict(letter == expected, letter or answer), []
    verdicts = [same_answer(answer, truth) for truth in truths]
    if True in verdicts:
        return _verdict(True, answer), []
    undecided = [(answer, truth) for truth, same in zip(truths, verdicts, strict=True) if same is None]
    return _verdict(False, answer), undecided


def _verdict(correct: bool, extracted: str) -> Verdict:
    return Verdict(correct, extracted[:MAX_ANSWER_CHARS], "verified" if correct else "wrong")


def _same_integer(answer: str, truth: str) -> bool:
    whole = all(_INTEGER.fullmatch(side) and len(side) <= MAX_ANSWER_CHARS for side in (answer, truth))
    return int(answer) == int(truth) if whole else answer == truth


_shared: AnswerVerifier | None = None
_shared_lock = threading.Lock()


def _shared_verifier() -> AnswerVerifier:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = AnswerVerifier(workers=min(2, os.cpu_count() or 1))
            atexit.register(_shared.close)
        return _shared


def _renew_lock() -> None:
    """In a forked child: a thread that held it is not there. (The workers are left to the parent by their pool.)"""
    global _shared_lock
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def verify_answer(text: str, ground_truth: str, *, kind: str = "math", timeout_s: float = 5.0) -> Verdict:
    r"""Verify one response.

    Args:
        text: the response.
        ground_truth: the answer, or a worked solution that ends in it.
        kind: math | choice | arithmetic.
        timeout_s: CPU seconds after which an algebraic comparison is stopped. It is then made once more, in a process
            of its own and beside no other, and counts as wrong when it is stopped again. What else the machine does
            takes no part in it: the clock on the wall ends a comparison only after 60 s + 20 * `timeout_s`, against a
            process that gets nowhere at all.

    Raises:
        InputError: unknown kind, or a limit that is not positive and finite.
        VerifierLost: algebra is needed, and the processes for it do not start or die at whatever they are asked.

    >>> verify_answer(r"She sells 9 eggs, so she makes \boxed{18 dollars}.", "18")
    Verdict(correct=True, extracted='18 dollars', status='verified')
    >>> verify_answer(r"\boxed{\frac{\sqrt{3}}{3}}", r"1/\sqrt{3}").correct
    True
    >>> verify_answer(r"It is \boxed{\text{(B) } library}.", "B", kind="choice").extracted
    'B'
    >>> verify_answer("7+5=12;12-3=9;#9", "9", kind="arithmetic").status
    'verified'
    >>> verify_answer("She has 18 eggs. She eats three, and then she", "18").status
    'wrong'
    """
    _checked_timeout(timeout_s, "timeout_s")
    return _shared_verifier().verify_many([text], [ground_truth], kind, timeout=timeout_s)[0]


def check_ground_truths(prompts: Iterable[Prompt]) -> list[GroundTruthFailure]:
    r"""The prompts whose ground truth does not verify against itself, in order; an empty list is good news.

    Each ground truth is put into a response, "The answer is \boxed{...}", and a worked solution is also taken as a
    response. Both must be verified. This catches truths without an answer, unbalanced braces and the like; it takes no
    worker and about 0.1 ms a row.

    >>> check_ground_truths([Prompt(0, "", (), r"There are $\boxed{}$.", "mine")])
    [GroundTruthFailure(position=0, reason='no_truth')]
    """
    checked = ((position, _self_check(prompt.ground_truth, prompt.kind)) for position, prompt in enumerate(prompts))
    return [GroundTruthFailure(position, reason) for position, reason in checked if reason is not None]


def _self_check(truth: str, kind: str) -> str | None:
    """Why a truth fails as its own answer, or None."""
    answers = truth_answers(truth, kind)
    if not answers:
        return "no_truth"
    responses = [f"#{answers[0]}" if kind == "arithmetic" else rf"The answer is \boxed{{{answers[0]}}}"]
    if find_boxes(truth):
        responses.append(truth)
    for response in responses:
        verdict, undecided = _judge_cheaply(response, truth, kind)
        if not verdict.correct:
            return "not equal to itself" if undecided else verdict.status
    return None
