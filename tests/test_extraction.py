"""Which part of a response is its final answer, and which answers a ground truth accepts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_ds.extraction import choice_in_sentence, choice_letter, final_answer, find_boxes, truth_answers


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"the answer is $\boxed 2$.", "2"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{18} dollars. The answer is 19.", "18"),
        (r"first \boxed{3}, but no, that was wrong, so \boxed{4}", "4"),
        (r"\boxed{3}. So x = \boxed{4}", "4"),
        (r"twice \boxed{3}, and again \boxed{3}", "3"),
        (r"$x=\boxed{1}$ or $x=\boxed{2}$", "1, 2"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1, 2, 3"),
        (r"\boxed{1} \boxed{2} \boxed{3}", "1, 2, 3"),
        (r"<think>It is \boxed{3}?</think>No: \boxed{4}", "4"),
        ("reasoning <answer> 7 </answer>", "7"),
        ("48/2 = <<48/2=24>>24\n#### 24", "24"),
        ("#### 24\n\nQuestion: another", "24"),
        ("The name is short.\n#### Evelyn", "Evelyn"),
        ("The answer is 18.", "18"),
        ("The answer is 18.5.", "18.5"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", r"$\frac{1}{2}$"),
        ("Thus, the answer is:\n\n\\[ x = 5 \\]", "x = 5"),
        ("**Answer:** 18 dollars", "18 dollars"),
        ("Some lines.\n\n## Answer\n\n42", "42"),
        ("I said the answer is 3. The correct answer is 5, because 2+3=5.", "5"),
        ("42", "42"),
        ("x = 5", "x = 5"),
    ],
)
def test_final_answer_is_found(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n ",
        r"\boxed{}",
        r"It is \boxed{18",  # cut off by the length cap
        r"The answer is \boxed{18",
        "Janet's ducks lay 16 eggs per day. She eats three and sells the rest, 18 of them.",
        "To find the answer, we first compute 48 / 2 = 24 and then go on to add the rest of it.",
        "#### Step 1: read the problem\nThere are 18 ducks, of which we know nothing more than that.",
        r"<think>\boxed{18}</think>",
    ],
)
def test_what_is_no_final_answer_is_none(response):
    assert final_answer(response) is None


def test_arithmetic_takes_what_follows_the_last_mark():
    assert final_answer("7+5=12;#12;12-3=9;# 9 ", "arithmetic") == "9"
    assert final_answer("7+5=12;12-3=9;9", "arithmetic") is None
    assert final_answer("7+5=12#", "arithmetic") is None


@pytest.mark.parametrize(
    ("truth", "answers"),
    [
        ("18", ("18",)),
        ("025", ("025",)),
        (r"Then $a+b=\boxed{0}$.", ("0",)),
        (r"our answer is $\boxed 2$.", ("2",)),
        (r"\boxed{144} is the area. [words] Our answer is then $5+7=\boxed{12}$.", ("12",)),
        (r"$x=\boxed{4}$ or $x=\boxed{-4}$", ("4, -4", "-4")),
        ("He has 6*7=<<6*7=42>>42.\n#### 42", ("42",)),
        (r"There are $\boxed{}$ primes.", ()),
        ("  ", ()),
    ],
)
def test_truth_answers(truth, answers):
    assert truth_answers(truth) == answers


@given(
    st.recursive(st.sampled_from(["1", "x+y", r"\pi", r"\{2\}"]), lambda inner: inner.map(r"\frac{{{}}}{{2}}".format))
)
def test_nested_braces_come_back_whole(content):
    assert final_answer(rf"so \boxed{{{content}}} {{and more}}") == content


def reference_boxes(text: str) -> list[str]:
    """Brace counting, one box at a time."""
    contents = []
    for start in range(len(text)):
        if text.startswith(r"\boxed{", start):
            depth = 0
            for end in range(start + 6, len(text)):
                depth += (text[end] == "{") - (text[end] == "}")
                if depth == 0:
                    contents.append(text[start + 7 : end].strip())
                    break
    return contents


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "1", " or ", "x"]), max_size=14).map("".join))
def test_boxes_are_those_that_counting_braces_finds(text):
    # Only where braces balance: a stray closing brace means nothing to either, an open one swallows what follows.
    if text.count("{") == text.count("}"):
        assert [box.content for box in find_boxes(text)] == reference_boxes(text)


def test_long_and_malformed_texts_take_linear_time():
    began = time.perf_counter()
    for text in (
        r"\boxed{" * 20_000,
        r"\boxed{5}" * 20_000,
        "{" * 50_000 + "}" * 50_000,
        "answer is " * 10_000,
        "#### " * 20_000,
    ):
        final_answer(text)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "answer",
    [
        "A",
        "(A)",
        "a",
        "(a)",
        "a)",
        "A.",
        "A. bank",
        "A) bank",
        "(A) bank",
        "A: bank",
        "A - bank",
        r"\text{A}",
        "$A$",
        "**A**",
        r"\text{(A) bank}",
        r"\textbf{(A) } bank",
        r"\textbf{(A)}\ 5",
        r"\mathrm{A}",
        "Option A",
        "A. Plan B",
        r"\text{A. bank}",
    ],
)
def test_all_ways_to_pick_an_option_count(answer):
    assert choice_letter(answer) == "A"


@pytest.mark.parametrize(
    "answer",
    [
        "A or B",
        "A, B",
        "A and B",
        "A/B",
        "AB",
        "A B",
        "Both A and B",
        "A. bank or B. mall",
        r"\text{A or B}",
        r"A \text{ or } B",
        "bank",
        "a bank",
        "",
        "not A",
        "A B C D E",
        "(A)(B)",
        r"\text{A}, \text{B}",
        "K",
    ],
)
def test_several_options_or_none_do_not_count(answer):
    assert choice_letter(answer) is None


def test_a_sentence_may_go_on_after_its_letter():
    assert choice_in_sentence("A because banks need security") == "A"
    assert choice_in_sentence("A or B because of that") is None
    assert choice_in_sentence("a bank") is None


@given(st.text(max_size=200))
def test_no_text_makes_extraction_fail(text):
    for kind in ("math", "choice", "arithmetic"):
        answer = final_answer(text, kind)
        assert answer is None or answer.strip()
    truth_answers(text)
    choice_in_sentence(text)
