"""Which part of a response is its final answer, and which answers a ground truth accepts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_ds.choices import choice_in_sentence, choice_letter
from clipo_ds.extraction import final_answer, find_boxes, truth_answers


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
        # GSM8K's mark wherever it stands, and markup around the number
        ("4 + 9 = $13.#### 13", "13"),
        ("The total is $#### 320.", "320"),
        ("Final answer: #### 48", "48"),
        ("#### 22####", "22"),
        ("#### $#### 22$", "22"),
        ("#### 22 #### ", "22"),
        ("########22", "22"),
        ("#### <22>", "22"),
        ("#### [22]", "22"),
        ("####: 22", "22"),
        ("**#### 22**", "22"),
        ("#### **22**.", "22"),
        ("####\n22", "22"),
        ("#### 22</answer>", "22"),
        ("#### The answer is 22.", "22"),
        ("#### 22 ###", "22"),
        ("#### <b>22</b>", "22"),
        ("#### <22>.", "22"),
        ("#### 22 [END]", "22"),
        ("#### The number of birds is **10**.", "10"),
        ("#### They need 12 more chairs.", "12"),
        ("so #### 22\n\nWe have used all that was said, so it must be right, I think.", "22"),
        ("#### 4 jars of oil will be needed.", "4"),
        ("#### She has 22 apples left.", "22"),
        # sentences that are declared to be the answer
        ("Answer: The total number of pens is 19.", "19"),
        ("Answer: There are 12 pens.", "12"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        (r"Final Answer: The largest $n$ is $\frac{1}{2}$.", r"$\frac{1}{2}$"),
        (r"\boxed{\text{He has 12 pens.}}", "12"),
        ("<answer>He needs exactly $34.</answer>", "$34"),
        ("The answer is 34 sq. units.", "34 sq. units"),
        ("Answer $ 9 $", "$ 9 $"),
        ("We add.\n\n**Final Answer** $9$.", "$9$"),
        ("Ans: 9", "9"),
        ("We add.\n\nAnswer 12", "12"),
        ("We add.\n\nAnswer **12**", "12"),
        ("Answer: It takes him 12 hours to finish.", "12"),
        ("Answer: Therefore, there are 12 pens.", "12"),
        ("Answer: There will be 12 pens left over.", "12"),
        ("Answer: A total of 12 pens.", "12"),
        ("Answer: the area of the triangle is 12 cm\N{SUPERSCRIPT TWO}.", "12"),
        # parts with their names
        (r"\boxed{9} cups and \boxed{2} plates", "9, 2"),
        (r"cups: \boxed{9}, plates: \boxed{2}", "9, 2"),
        (r"\boxed{4} cm or \boxed{5} cm", "4, 5"),
        (r"\boxed{3} \text{ cups and } \boxed{5} \text{ plates}", "3, 5"),
        (r"\boxed{3} is wrong, and so \boxed{4}", "4"),
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
        r"<think>\boxed{18}",
        "<think>3 + 4 = 7, so the answer is 7. But wait, is the dog one of them? Let me",
        "We put the answer $x=3$ into the equation, and see that both of its sides are the same.",
    ],
)
def test_what_is_no_final_answer_is_none(response):
    assert final_answer(response) is None


@pytest.mark.parametrize(
    "sentence",
    [
        "Half of the 12 pens.",
        "He has 5 more than Mary.",
        "All multiples of 3.",
        "The number is not 12.",
        "There are 12 or 13 pens.",
        "There are at least 12 pens.",
        "There are 12 pens and 3 cups.",
        "All cubes are 0 or 1.",
        "It is divisible by 3.",
        "It is 3x.",
        "It is 3 million.",
        "They are multiples of 3.",
        "The function is even.",
        "The area is 36 pi square units.",
        "The cost is 3 n dollars.",
        "He has 5 more than Mary has.",
    ],
)
def test_a_sentence_in_doubt_stays_a_sentence(sentence):
    assert final_answer(f"We see it.\nAnswer: {sentence}") == sentence.rstrip(".")
    assert final_answer(f"We see it.\n#### {sentence}").rstrip(".") == sentence.rstrip(".")
    assert truth_answers(sentence) in ((sentence,), ())


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
        # sentences
        ("The answer is 18", ("18",)),
        ("So the final answer is: $18$.", ("$18$",)),
        ("Answer: 18", ("18",)),
        ("**Answer:** 18", ("18",)),
        ("<answer> 18 </answer>", ("18",)),
        ("She makes 9*2 = 18 dollars.\nAnswer: 18", ("18",)),
        ("Ans: 18", ("18",)),
        ("Answer\n18", ("18",)),
        ("She sells 9 eggs.\nShe makes 9 * 2 dollars with them every day.\nThe answer is 18.", ("18",)),
        ("There are 18 pens left.", ("18",)),
        ("The answer is Evelyn.", ("Evelyn",)),
        # a solution that does not say which of its numbers is meant
        ("She sells 9 eggs for 2 dollars each, so every day she makes 9 * 2 = 18 dollars with them.", ()),
        ("She sells 9 eggs.\nThen she makes 9 * 2 = 18 dollars with them.", ()),
        ("He buys 3 boxes, so he has 12 pens.", ()),
        # what may look like prose, and is an answer
        ("no solution", ("no solution",)),
        ("There is no such number.", ("There is no such number.",)),
        ("n is divisible by 3", ("n is divisible by 3",)),
        ("all real numbers except 3 and 4", ("all real numbers except 3 and 4",)),
        ("no answer is possible", ("no answer is possible",)),
        (r"\text{All positive integers } n \text{ such that } n \equiv 1 \pmod 4 \text{ or } n = 2", None),
        (r"f(x) = \begin{cases} x^2 & \text{if } x \text{ is at least } 2 \\ 3x & \text{otherwise} \end{cases}", None),
    ],
)
def test_truth_answers(truth, answers):
    assert truth_answers(truth) == ((truth,) if answers is None else answers)


def test_a_long_option_is_a_truth_where_options_are_asked_for():
    truth = "(B) because the bank is the place where all of the money is kept by the people of that town"
    assert truth_answers(truth, "choice") == (truth,)


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
        "Answer $" * 10_000,
        "Answer 1\n" * 10_000,
        "Answer: a total of " * 6_000,
        r"\boxed{1} a and " * 6_000,
        "<think>" * 15_000,
        "Answer: The a is " * 6_000,
        "#### " * 20_000,
    ):
        final_answer(text)
        final_answer(text, "choice")
    for text in ("A" + " or A" * 20_000, r"\begin{cases}" * 8_000):
        choice_in_sentence(text)
        truth_answers(text)
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


@pytest.mark.parametrize(
    ("sentence", "letter"),
    [
        ("D, it can't be A or B", "D"),
        ("D. It cannot be A or C.", "D"),
        ("So the correct choice is (B).", "B"),
        ("Option C is correct.", "C"),
        ("I choose option B because of it", "B"),
        ("So it is (B), not (C).", "B"),
        ("B. A and C are wrong", "B"),
        ("B; A is impossible", "B"),
        ("Hence B is the correct choice.", "B"),
        ("D, not A but B", None),
        ("So it is (B) or (C).", None),
        ("(A) or maybe (B)", None),
        ("Vitamin C is found in oranges", None),
        ("It is not B", None),
        ("I think so", None),
    ],
)
def test_a_sentence_picks_one_option_and_may_deny_others(sentence, letter):
    assert choice_in_sentence(sentence) == letter


def test_a_choice_is_found_behind_its_own_phrases():
    assert final_answer("Banks are safe.\nSo the correct option is (B).", "choice") == "(B)"
    assert (
        final_answer("Banks are safe places to be.\nThe answer is for sure D, it can't be A or B", "choice")[0] == "D"
    )


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
