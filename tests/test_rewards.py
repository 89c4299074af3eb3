"""Rewards: parts that add up, user functions by import path, the overlong penalty, and the process check."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_ds.rewards import Judge, load_functions, overlong_penalty, process_consistent
from clipo_ds.schema import RewardConfig, RewardFunction
from clipo_ds.types import Group, InputError, Prompt, Rollout


def a_prompt(truth: str = "18", **changes) -> Prompt:
    values = {"uid": 0, "text": "How many?", "token_ids": (1,), "ground_truth": truth, "source": "mine", **changes}
    return Prompt(**values)


def a_rollout(text: str, num_tokens: int = 4, truncated: bool = False) -> Rollout:
    return Rollout(tuple(range(num_tokens)), (-0.5,) * num_tokens, text, truncated)


def a_group(*texts: str, **changes) -> Group:
    return Group(a_prompt(**changes), tuple(a_rollout(text) for text in texts))


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Helper:\n    factor: float = 2.0\n"
        "def length(responses, **kwargs):\n    return [float(len(r)) for r in responses]\n"
        "def all_names(prompts, responses, ground_truths, correct, **kwargs):\n"
        "    return [Helper().factor * c + len(t) for c, t in zip(correct, ground_truths)]\n"
        "def level(level):\n    return [x or 0 for x in level]\n"
        "def short(responses):\n    return [1.0]\n"
        "def none(responses):\n    return [None] * len(responses)\n"
        "def infinite(responses):\n    return [float('inf')] * len(responses)\n"
        "def scalar(responses):\n    return 1.0\n"
        "def large(responses):\n    return [0.0, 1e39]\n"
        "def whole(responses):\n    return [0, 10**400]\n"
        "def endless(responses):\n    return [0, 10**5000]\n"
        "def weighted(responses):\n    return [0.0, -2e28]\n"
        "def zero_d(responses):\n    import numpy\n    return numpy.array(1.0)\n"
        "def unordered(responses):\n    return {1.0, 2.0}\n"
        "def words(responses):\n    return ['good'] * len(responses)\n"
        "def array(responses):\n    import numpy\n    return numpy.ones(len(responses), dtype='float32')\n"
        "def broken(responses):\n    return [{'a': 1}[r] for r in responses]\n"
        "def overlong(responses):\n    return [2.0] * len(responses)\n"
        "def see(**kwargs):\n    seen.append(kwargs)\n    return [0] * len(kwargs['responses'])\n"
        "seen = []\n"
        "constant = 3\n"
    )
    return path


def judged(groups, *, overlong_buffer=0, max_new_tokens=100, **config):
    with Judge(RewardConfig(**config), overlong_buffer=overlong_buffer, max_new_tokens=max_new_tokens) as judge:
        return judge.judge(groups)


def test_reward_is_the_outcome_when_nothing_else_is_asked():
    [[right, wrong]] = judged([a_group(r"\boxed{18}", r"\boxed{17}")])
    assert (right.correct, right.extracted, right.status, right.outcome, right.reward) == (True, "18", "verified", 1, 1)
    assert (wrong.correct, wrong.extracted, wrong.status, wrong.outcome, wrong.reward) == (False, "17", "wrong", 0, 0)
    assert right.overlong == 0 and right.other == {} and right.process_consistent is None


def test_outcome_rewards_are_configurable():
    [[right, wrong]] = judged([a_group(r"\boxed{18}", "no idea")], correct=2.0, wrong=-0.5)
    assert (right.reward, wrong.reward) == (2.0, -0.5)


def test_judgements_keep_the_shape_of_unequal_groups():
    groups = [a_group(r"\boxed{18}"), a_group(*[rf"\boxed{{{n}}}" for n in range(3)], truth="2"), a_group(truth="5")]
    result = judged(groups)
    assert [[j.correct for j in group] for group in result] == [[True], [False, False, True], []]
    assert judged([]) == []


def test_parts_add_up_to_the_reward(functions):
    # 90 tokens of 100 with a buffer of 20: ((100 - 20) - 90) / 20 = -0.5. length(`\boxed{18}`) = 10, times 0.01 = 0.1.
    group = Group(a_prompt(), (a_rollout(r"\boxed{18}", num_tokens=90),))
    function = RewardFunction(f"{functions}:length", weight=0.01)
    [[j]] = judged([group], overlong_buffer=20, functions=[function])
    assert (j.outcome, j.overlong, j.other) == (1.0, -0.5, {"length": 10.0})
    assert j.reward == pytest.approx(1.0 - 0.5 + 0.1)


def test_a_bonus_never_turns_wrong_into_correct(functions):
    function = RewardFunction(f"{functions}:length", weight=100.0)
    [[j]] = judged([a_group(r"\boxed{17}")], functions=[function])
    assert j.reward > 100 and not j.correct and j.outcome == 0.0


def test_overlong_penalty_by_hand():
    # L_max 100, L_buf 20: nothing up to 80 tokens, then a straight line to -1 at the cap, and never less.
    lengths = (0, 79, 80, 81, 90, 100, 130)
    values = [overlong_penalty(n, max_new_tokens=100, buffer=20) for n in lengths]
    assert values == pytest.approx([0, 0, 0, -0.05, -0.5, -1, -1])
    assert overlong_penalty(100, max_new_tokens=100, buffer=0) == 0.0


@given(st.integers(0, 5000), st.integers(1, 2000))
def test_overlong_penalty_lies_between_minus_one_and_zero(num_tokens, buffer):
    value = overlong_penalty(num_tokens, max_new_tokens=2048, buffer=buffer)
    assert -1 <= value <= 0
    assert value >= overlong_penalty(num_tokens + 1, max_new_tokens=2048, buffer=buffer)


def test_functions_are_given_what_they_name(functions):
    group = Group(
        a_prompt(metadata={"level": 3, "prompts": "taken"}), (a_rollout(r"\boxed{18}", 7), a_rollout("?", 9, True))
    )
    paths = [RewardFunction(f"{functions}:{name}") for name in ("all_names", "level", "see")]
    [[right, wrong]] = judged([group, a_group(truth="1")], functions=paths)[:1]
    assert right.other == {"all_names": 2.0 + 2, "level": 3.0, "see": 0.0}
    assert wrong.other == {"all_names": 0.0 + 2, "level": 3.0, "see": 0.0}
    loaded = next(m for name, m in sys.modules.items() if name.startswith("clipo_ds_reward_my_rewards") and m.seen)
    assert loaded.seen[-1] == {
        "prompts": ["How many?"] * 2,
        "responses": [r"\boxed{18}", "?"],
        "ground_truths": ["18", "18"],
        "extracted": ["18", "?"],
        "correct": [True, False],
        "truncated": [False, True],
        "num_tokens": [7, 9],
        "sources": ["mine", "mine"],
        "level": [3, 3],
    }


def test_a_function_cannot_change_what_others_see(functions):
    functions.write_text(
        "def vandal(correct):\n    correct[:] = [True] * len(correct)\n    return [0.0] * len(correct)\n"
        "def count(correct):\n    return [float(c) for c in correct]\n"
    )
    paths = [RewardFunction(f"{functions}:{name}") for name in ("vandal", "count")]
    [[j]] = judged([a_group(r"\boxed{17}")], functions=paths)
    assert j.other == {"vandal": 0.0, "count": 0.0} and not j.correct


def test_numpy_values_are_taken(functions):
    [[j, _]] = judged([a_group("1", "2")], functions=[RewardFunction(f"{functions}:array", weight=0.5)])
    assert j.other == {"array": 1.0} and j.reward == 0.5


def test_a_function_of_an_installed_module_is_found(tmp_path, monkeypatch):
    (tmp_path / "a_module_in_the_working_folder.py").write_text(
        "def one(responses):\n    return [1] * len(responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    function = RewardFunction("a_module_in_the_working_folder:one")
    [[j]] = judged([a_group("?")], functions=[function])
    assert j.other == {"one": 1.0}


def test_same_names_are_told_apart_by_their_paths(functions, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("def length(responses):\n    return [0.0] * len(responses)\n")
    paths = [f"{functions}:length", f"{other}:length"]
    assert list(load_functions([RewardFunction(path) for path in paths])) == paths
    with pytest.raises(InputError, match="once"):
        load_functions([RewardFunction(paths[0]), RewardFunction(paths[0], weight=2.0)])


def test_names_that_records_have_already_are_told_apart_by_their_paths(functions):
    path = f"{functions}:overlong"
    given = [RewardFunction(f"{functions}:length"), RewardFunction(path)]
    with Judge(RewardConfig(functions=given), overlong_buffer=20, max_new_tokens=100) as judge:
        assert judge.reward_names == ("overlong", "length", path)
        [[j]] = judge.judge([Group(a_prompt(), (a_rollout("18", num_tokens=90),))])
    assert [j.value(name) for name in judge.reward_names] == [-0.5, 2.0, 2.0]
    assert Judge(RewardConfig(), max_new_tokens=100).reward_names == ()


def test_what_a_function_raises_is_one_line_that_names_it(functions):
    path = f"{functions}:broken"
    line = functions.read_text().splitlines().index("    return [{'a': 1}[r] for r in responses]") + 1
    with pytest.raises(InputError) as caught:
        judged([a_group("b")], functions=[RewardFunction(path)])
    assert str(caught.value) == (
        f"`reward.functions` '{path}' must not raise, got KeyError: 'b' ({functions.resolve()}, line {line})"
    )


def test_no_function_is_called_where_its_value_is_of_no_use(functions):
    with Judge(RewardConfig(functions=[RewardFunction(f"{functions}:broken")]), max_new_tokens=100) as judge:
        [[j]] = judge.judge([a_group("18")], with_functions=False)
    assert j.correct and j.other == {} and j.reward == 1.0


def test_columns_that_a_prompt_lacks_are_named_before_any_call(functions):
    [level] = load_functions([RewardFunction(f"{functions}:level")]).values()
    having, lacking = a_prompt(metadata={"level": 3}), a_prompt(source="other", metadata={"grade": 1})
    level.check_columns([having, having])
    with pytest.raises(
        InputError, match=r"got 'level', which 2 of them lack \(the first is of other and has .* grade, "
    ):
        level.check_columns([having, lacking, lacking])
    for name in ("length", "all_names", "see", "short"):  # what every response has, or what may be missing
        load_functions([RewardFunction(f"{functions}:{name}")])[name].check_columns([lacking])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "must be `package.module:function`"),
        (":function", "must be `package.module:function`"),
        ("no_such_module_at_all:f", "importable"),
        ("no/such/file.py:f", "there is no file"),
        ("math:no_such_function", "no_such_function"),
        ("math:pi", "must name a function"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_construction(path, message):
    with pytest.raises(InputError, match=message) as caught:
        Judge(RewardConfig(functions=[RewardFunction(path)]), max_new_tokens=10)
    assert "`reward.functions`" in str(caught.value) and path in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("\nraise ValueError('of the file')", r"ValueError: of the file \(.*file.py, line 2\)"),
        ("import sys; sys.exit('done')", "SystemExit: done"),
        ("def f(responses, /): return [0.0] * len(responses)", "positional-only"),
        ("async def f(responses): return [0.0] * len(responses)", "an async one"),
        ("async def f(responses):\n  for r in responses: yield 0.0", "an async one"),
        ("def f(responses):\n  for r in responses: yield 0.0", "a generator"),
        ("from functools import partial\nasync def g(k, responses): return []\nf = partial(g, 1)", "an async one"),
        ("class F:\n  async def __call__(self, responses): return []\nf = F()", "an async one"),
        ("class f:\n  def __init__(self, **columns): pass", "a class, whose objects are no lists"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_at_construction(tmp_path, text, message):
    (tmp_path / "file.py").write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        load_functions([RewardFunction(f"{tmp_path}/file.py:f")])


def test_a_function_that_ends_the_process_ends_the_run_instead(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\ndef f():\n    sys.exit(0)\n")
    with pytest.raises(InputError, match=r"must not raise, got SystemExit: 0 \(.*leaves.py, line 3\)"):
        judged([a_group("b")], functions=[RewardFunction(f"{tmp_path}/leaves.py:f")])


@pytest.mark.parametrize("weight", [math.nan, -math.inf, 1e39])
def test_a_weight_that_is_not_finite_or_too_large_is_refused(functions, weight):
    with pytest.raises(InputError, match="finite weights"):
        load_functions([RewardFunction(f"{functions}:length", weight=weight)])


def test_an_object_that_can_be_called_and_a_class_of_lists_are_functions_too(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class F:\n    def __call__(self, responses):\n        return [1] * len(responses)\nf = F()\n"
        "class G(list):\n    def __init__(self, responses):\n        super().__init__([2] * len(responses))\n"
    )
    [[j]] = judged([a_group("?")], functions=[RewardFunction(f"{tmp_path}/mine.py:{name}") for name in "fG"])
    assert j.other == {"f": 1.0, "G": 2.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "got 1 values"),
        ("none", "got None for response 0"),
        ("infinite", "got inf for response 0"),
        ("scalar", "got float"),
        ("large", r"must return one number between -1e\+30 and 1e\+30 for each .* got 1e\+39 for response 1"),
        ("whole", r"between -1e\+30 and 1e\+30 for each .* got 1000000.*000 for response 1"),
        ("endless", "got a value of type int that cannot be shown for response 1"),
        ("weighted", r"also after its weight of 100, got -2e\+28 for response 1"),
        ("zero_d", "got ndarray"),
        ("unordered", "got set"),
        ("words", "got 'good' for response 0"),
        ("level", "'level'"),
    ],
)
def test_what_a_function_returns_is_checked(functions, name, message):
    with pytest.raises(InputError, match=message) as caught:
        judged([a_group("1", "2")], functions=[RewardFunction(f"{functions}:{name}", weight=100.0)])
    assert "`reward.functions`" in str(caught.value) and name in str(caught.value)


def test_process_check_of_a_text_is_about_its_equations_not_its_answer():
    true, false, none = r"9*2=18, so \boxed{17}", r"9*2=19, so \boxed{18}", r"\boxed{18}"
    [[a, b, c]] = judged([a_group(true, false, none)])
    assert [(j.correct, j.process_consistent) for j in (a, b, c)] == [(False, True), (True, False), (True, None)]


def test_process_check_of_the_built_in_task_is_exact():
    pytest.importorskip("clipo_ds.arithmetic")
    prompt = a_prompt("9", kind="arithmetic", metadata={"problem": "7+5-3", "modulus": None})
    assert process_consistent(prompt, "7+5=12;12-3=9;#9") is True
    assert process_consistent(prompt, "7+5=13;12-3=9;#9") is False
    with pytest.raises(InputError, match="problem"):
        process_consistent(a_prompt("9", kind="arithmetic"), "7+5=12;12-3=9;#9")


def test_kinds_are_judged_each_in_its_way():
    groups = [a_group("The answer is (B).", r"\boxed{A or B}", truth="B", kind="choice"), a_group("#18", truth="18")]
    [[letter, both], _] = judged(groups)
    assert (letter.correct, letter.extracted, both.correct) == (True, "B", False)
