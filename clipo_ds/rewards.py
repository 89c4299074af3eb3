"""Verdicts become rewards: outcome, overlong penalty, user reward functions; and the process check beside them.

May import `clipo_ds.answers`, `clipo_ds.thoughts`, `clipo_ds.steps`, `clipo_ds.schema` and, when the built-in task is
judged, `clipo_ds.arithmetic`. What counts as correct is the verifier's verdict alone: no reward, bonus or penalty
changes it.

A user reward function is a plain Python function, called once for all responses of a rank with keyword arguments:

    def shorter_is_better(responses, correct, num_tokens, **kwargs):
        return [1.0 - n / 2048 if right else 0.0 for right, n in zip(correct, num_tokens)]

It may take any of ``prompts``, ``responses``, ``ground_truths``, ``sources`` (lists of str), ``extracted`` (of str or
None), ``correct``, ``truncated`` (of bool), ``num_tokens`` (of int), and every other column of the data by its name, as
a list; what it does not name it is not given, unless it takes ``**kwargs``. It returns a list with one number for each
response. The recipe names it by its import path, and its value times its weight is added to the reward; what it raises
ends the run with one line that names it:

    reward:
      functions:
        - {function: rewards.py:shorter_is_better, weight: 0.1}
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from clipo_ds.answers import AnswerVerifier, Status
from clipo_ds.schema import LARGEST_REWARD, RewardConfig, RewardFunction
from clipo_ds.steps import check_steps
from clipo_ds.thoughts import KNOWN_TAGS, ThoughtTags
from clipo_ds.types import Group, InputError, Prompt, Rollout

OVERLONG = "overlong"
TAKEN_NAMES = ("mean", "total", OVERLONG)
"""What `reward/…` means already in the records."""

_FIELD = "reward.functions"
_RANGE = f"between -{LARGEST_REWARD:g} and {LARGEST_REWARD:g}"
_ANYTHING = (Exception, SystemExit)  # that a user's code may raise


@dataclass(frozen=True)
class Judgement:
    """What one rollout is worth, part by part."""

    correct: bool  # the verifier's verdict
    extracted: str | None  # the final answer that the response states
    status: Status  # of the verdict: verified, wrong, no_answer, timeout, error, no_truth
    process_consistent: bool | None  # every step that could be checked is true; None when there was none to check
    outcome: float  # reward.correct or reward.wrong
    overlong: float  # in [-1, 0]
    other: dict[str, float]  # values of the user's reward functions by name, not weighted
    reward: float  # outcome + overlong + sum of weight times value
    endless_truth: bool = False  # status is timeout, and the ground truth takes as long against 0

    def value(self, name: str) -> float:
        """One of the rewards that `Judge.reward_names` lists, not weighted."""
        return self.overlong if name == OVERLONG else self.other[name]


def overlong_penalty(num_tokens: int, *, max_new_tokens: int, buffer: int) -> float:
    r"""Soft overlong punishment: falls from 0 to -1 over the last `buffer` tokens before the length cap.

    min(0, ((L_max - L_buf) - len) / L_buf), at least -1: DAPO (arXiv 2503.14476), equation 13.

    Args:
        num_tokens: length of the response, in tokens.
        max_new_tokens: L_max, the length cap in tokens.
        buffer: L_buf in tokens; 0 switches the penalty off.

    >>> [overlong_penalty(n, max_new_tokens=100, buffer=20) for n in (80, 90, 100)]
    [0.0, -0.5, -1.0]
    """
    if buffer == 0:
        return 0.0
    return max(-1.0, min(0.0, ((max_new_tokens - buffer) - num_tokens) / buffer))


class LoadedFunction:
    """A user's reward function with its weight, checked as far as it can be before it is called.

    Raises (from the constructor):
        InputError: the path has not the form `module:function` or `file.py:function`, cannot be imported, or names
            nothing that can be called with named arguments and gives a list: an async function, a generator.
    """

    def __init__(self, given: RewardFunction) -> None:
        if not abs(given.weight) <= LARGEST_REWARD:
            raise InputError(
                f"`{_FIELD}` must have finite weights {_RANGE}, got {given.weight!r} for '{given.function}'"
            )
        self.path = given.function
        self.weight = given.weight
        self._call = _import_function(given.function)
        kind = _gives_no_list(self._call)
        if kind is not None:
            raise InputError(f"`{_FIELD}` must name plain functions that return a list, got {self.path!r}, {kind}")
        try:
            parameters = inspect.signature(self._call).parameters.values()
        except ValueError as error:  # some functions written in C have none
            raise InputError(f"`{_FIELD}` must have a signature that Python can read, got {self.path!r}") from error
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise InputError(f"`{_FIELD}` must take its arguments by name, got {self.path!r} with positional-only ones")
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names = {p.name for p in named}
        self._required = [p.name for p in named if p.default is p.empty]

    def __call__(self, columns: dict[str, list[Any]]) -> list[float]:
        """One number for each response, at most LARGEST_REWARD in size; raises InputError for anything else."""
        missing = [name for name in self._required if name not in columns]
        if missing:
            raise InputError(
                f"`{_FIELD}` '{self.path}' must take columns that exist, got {missing[0]!r} "
                f"(there are {', '.join(sorted(columns))})"
            )
        given = {name: list(column) for name, column in columns.items() if self._takes_all or name in self._names}
        try:
            returned = self._call(**given)
        except _ANYTHING as error:  # and on one rank alone
            raise InputError(f"`{_FIELD}` '{self.path}' must not raise, got {_said(error)}") from error
        return self._checked(returned, len(columns["responses"]))

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Check that every prompt has the columns without which the function cannot be called.

        Raises:
            InputError: One has not.
        """
        of_every_response = _columns([], [], [])
        for name in self._required:
            if name in of_every_response:
                continue
            lacking = [prompt for prompt in prompts if name not in prompt.metadata]
            if lacking:
                raise InputError(
                    f"`{_FIELD}` '{self.path}' must take columns that every training prompt has, got {name!r}, which "
                    f"{len(lacking)} of them lack (the first is of {lacking[0].source} and has "
                    f"{', '.join(sorted([*of_every_response, *lacking[0].metadata]))})"
                )

    def _checked(self, returned: Any, num_responses: int) -> list[float]:
        rule = f"`{_FIELD}` '{self.path}' must return one number {_RANGE} for each of the {num_responses} responses"
        if not hasattr(returned, "__len__") or isinstance(returned, str | bytes | dict | set | frozenset):
            raise InputError(f"{rule}, got {type(returned).__name__}")
        try:
            values = list(returned)
        except _ANYTHING as error:  # an array without dimensions has a length only by name
            raise InputError(f"{rule}, got {type(returned).__name__} ({_said(error)})") from error
        if len(values) != num_responses:
            raise InputError(f"{rule}, got {len(values)} values")
        numbers = [_as_float(value) for value in values]
        for position, (value, number) in enumerate(zip(values, numbers, strict=True)):
            if not abs(number) <= LARGEST_REWARD:
                raise InputError(f"{rule}, got {_shown(value)} for response {position}")
            if abs(number * self.weight) > LARGEST_REWARD:
                raise InputError(
                    f"{rule}, also after its weight of {self.weight:g}, got {_shown(value)} for response {position}"
                )
        return numbers


def _as_float(value: Any) -> float:
    """The number that a user's function gave; infinite where a whole number is too large, NaN where it is none."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except _ANYTHING:  # of the value's own class
        return math.nan


def _gives_no_list(function: Callable[..., Any]) -> str | None:
    """What can be seen of a callable before any call: that it will not return a list of numbers, and why."""
    if inspect.isclass(function):
        return None if hasattr(function, "__len__") else "a class, whose objects are no lists"
    for called in (function, type(function).__call__):  # the function itself, or what an object does when called
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            return "an async one (let a plain function call asyncio.run)"
        if inspect.isgeneratorfunction(called):
            return "a generator (let it return a list instead of yielding)"
    return None


def _shown(value: Any) -> str:
    """A value in a few words, whatever its class makes of it."""
    try:
        return " ".join(reprlib.repr(value).split())
    except _ANYTHING:  # also of a whole number with more digits than Python prints
        return f"a value of type {type(value).__name__} that cannot be shown"


def _said(error: BaseException) -> str:
    """What a user's code raised in one line, with where it did; without, where the call or the import itself failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    where = f" ({own[0].filename}, line {own[0].lineno})" if own else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def _import_function(path: str) -> Callable[..., Any]:
    where, colon, name = path.rpartition(":")
    if not (colon and where and name):
        raise InputError(f"`{_FIELD}` must be `package.module:function` or `path/to/file.py:function`, got {path!r}")
    try:
        module = _import_file(where) if where.endswith(".py") else _import_module(where)
    except _ANYTHING as error:
        raise InputError(f"`{_FIELD}` must be importable, got {path!r} ({_said(error)})") from error
    try:
        function = attrgetter(name)(module)
    except AttributeError as error:
        raise InputError(f"`{_FIELD}` must name a function of {where}, got {path!r} ({error})") from error
    if not callable(function):
        raise InputError(f"`{_FIELD}` must name a function, got {path!r}, a {type(function).__name__}")
    return function


def _import_module(name: str) -> ModuleType:
    # The launcher starts a script elsewhere, so the folder where the user stands is not on the path by itself.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _import_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    name = f"clipo_ds_reward_{file.stem}_{abs(hash(str(file))):x}"  # read anew each time: notebooks edit these files
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file '{file}'")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_functions(given: Sequence[RewardFunction]) -> dict[str, LoadedFunction]:
    """The functions by the name that records show: the function's own, or its whole path where that name is not unique
    or one of `TAKEN_NAMES`.

    Raises:
        InputError: one cannot be loaded, or one is given twice.
    """
    paths = [function.function for function in given]
    names = [path.rpartition(":")[2] for path in paths]
    repeated = next((path for path in paths if paths.count(path) > 1), None)
    if repeated is not None:
        raise InputError(f"`{_FIELD}` must name each function once, got {repeated!r} {paths.count(repeated)} times")
    return {
        (name if names.count(name) == 1 and name not in TAKEN_NAMES else path): LoadedFunction(function)
        for name, path, function in zip(names, paths, given, strict=True)
    }


class Judge:
    """Turns sampled groups into judgements. Owns the answer verifier's processes: a context manager, or call `close`.

    Args:
        config: the rewards, the user's functions and the verifier's limits.
        overlong_buffer: L_buf of the overlong penalty in tokens, 0 for none (`config.overlong_buffer`, where it is
            null, has been resolved to the objective's default by the caller).
        max_new_tokens: the length cap of a response in tokens.
        tags: those of thoughts, in which no answer is looked for.

    Raises:
        InputError: a reward function cannot be loaded.
    """

    def __init__(
        self, config: RewardConfig, *, overlong_buffer: int = 0, max_new_tokens: int, tags: ThoughtTags = KNOWN_TAGS
    ) -> None:
        self._config = config
        self._buffer = overlong_buffer
        self._max_new_tokens = max_new_tokens
        self._functions = load_functions(config.functions)
        self._tags = tags
        self._verifier = AnswerVerifier(config.verifier_workers, config.verifier_timeout, tags=tags)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._verifier.close()

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The rewards beside the outcome, by the name that records show: the overlong penalty, if there is one, and the
        user's functions."""
        return (*((OVERLONG,) if self._buffer > 0 else ()), *self._functions)

    def judge(self, groups: Sequence[Group], *, with_functions: bool = True) -> list[list[Judgement]]:
        """Judgements in the shape of `groups`: one list a group, one judgement a rollout.

        Args:
            groups: Any number of rollouts each.
            with_functions: Call the user's reward functions; an evaluation has no use for them, and its problems need
                not have their columns.

        Raises:
            InputError: a reward function raised, or returned something else than one number for each response.
            VerifierLost: as `AnswerVerifier.verify_many`.
        """
        flat = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        verdicts = self._verifier.verify_many(
            # A thought that the prompt's end opens is one that the response has to close.
            [self._tags.opened_by(prompt.text) + rollout.text for prompt, rollout in flat],
            [prompt.ground_truth for prompt, _ in flat],
            [prompt.kind for prompt, _ in flat],
        )
        extracted = [verdict.extracted for verdict in verdicts]
        functions = self._functions if with_functions and flat else {}
        columns = _columns(flat, [verdict.correct for verdict in verdicts], extracted) if functions else {}
        values = {name: function(columns) for name, function in functions.items()}
        judgements = []
        for i, ((prompt, rollout), verdict) in enumerate(zip(flat, verdicts, strict=True)):
            outcome = float(self._config.correct if verdict.correct else self._config.wrong)
            overlong = overlong_penalty(
                len(rollout.token_ids), max_new_tokens=self._max_new_tokens, buffer=self._buffer
            )
            other = {name: column[i] for name, column in values.items()}
            weighted = sum(functions[name].weight * value for name, value in other.items())
            judgements.append(
                Judgement(
                    correct=verdict.correct,
                    extracted=verdict.extracted,
                    status=verdict.status,
                    process_consistent=process_consistent(prompt, rollout.text),
                    outcome=outcome,
                    overlong=overlong,
                    other=other,
                    reward=outcome + overlong + weighted,
                    endless_truth=verdict.status == "timeout"
                    and self._verifier.takes_for_ever(prompt.ground_truth, prompt.kind),
                )
            )
        rest = iter(judgements)
        return [[next(rest) for _ in group.rollouts] for group in groups]


def process_consistent(prompt: Prompt, response: str) -> bool | None:
    """Whether the steps that a response states hold; None when it states none that can be checked.

    The built-in task has exact steps (`clipo_ds.arithmetic.verify_solution`): True means that they lead from the
    problem to the answer, and an answer without steps is False. Elsewhere the arithmetic equations in the text are
    checked (`clipo_ds.steps.check_steps`), whatever the answer: True means "no false equation found".

    Raises:
        InputError: a prompt of kind arithmetic has no `problem` in its metadata.
    """
    if prompt.kind == "arithmetic":
        from clipo_ds.arithmetic import verify_solution

        problem = prompt.metadata.get("problem")
        if not isinstance(problem, str):
            raise InputError(f"`metadata.problem` must be the problem's text for kind arithmetic, got {problem!r}")
        return verify_solution(problem, response, prompt.metadata.get("modulus")).process_correct
    check = check_steps(response)
    return check.num_wrong == 0 if check.num_equations else None


def _columns(
    flat: Sequence[tuple[Prompt, Rollout]], correct: list[bool], extracted: list[str | None]
) -> dict[str, list[Any]]:
    """What reward functions may ask for; a data column whose name is taken is left out."""
    names = dict.fromkeys(name for prompt, _ in flat for name in prompt.metadata)
    return {name: [prompt.metadata.get(name) for prompt, _ in flat] for name in names} | {
        "prompts": [prompt.text for prompt, _ in flat],
        "responses": [rollout.text for _, rollout in flat],
        "ground_truths": [prompt.ground_truth for prompt, _ in flat],
        "extracted": extracted,
        "correct": correct,
        "truncated": [rollout.truncated for _, rollout in flat],
        "num_tokens": [len(rollout.token_ids) for _, rollout in flat],
        "sources": [prompt.source for prompt, _ in flat],
    }
