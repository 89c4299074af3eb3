"""Comparison of two answers without algebra: certain or None."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipo_ds.equality import same_answer
from clipo_ds.spelling import canonical

SAME = [
    # numbers with units, currency, commas, signs
    ("18 dollars", "18"),
    ("$18", "18"),
    (r"\$18", "18"),
    ("$18.00", "18"),
    ("US$18", "18"),
    ("€18", "18"),
    ("-$5", "-5"),
    (r"18\%", "18"),
    ("18%", "0.18"),
    ("18 percent", "18"),
    (r"5\text{ cm}", "5"),
    ("5 cm", "5"),
    ("5m", "5"),
    (r"864\text{ in}^2", r"864 \mbox{ inches}^2"),
    (r"100\, \text{m}/\text{s}", "100"),
    ("25^\\circ C", "25"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"1,\!234", "1234"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("1 234", "1234"),
    ("3 million", "3000000"),
    ("\u22125", "-5"),
    ("+5", "5"),
    ("025", "25"),
    ("18.", "18"),
    ("142.0", "142"),
    ("142", "142.0"),
    (".35625", "0.35625"),
    ("3.50", "3.5"),
    (r"\approx 8.24 \text{ mph}", "8.24"),
    # fractions and mixed numbers
    (r"\frac12", "1/2"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\tfrac12", "0.5"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", "-0.5"),
    (r"1\frac{4}{5}", "9/5"),
    ("1 4/5", r"1\frac{4}{5}"),
    ("\u00bd", "0.5"),
    (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}"),
    ("0.333333", "1/3"),
    (r"\frac{3}{56} \approx 0.0536", r"\frac{3}{56}"),
    # sets, tuples, intervals, matrices
    (r"\{1,2\}", "2,1"),
    ("3, 5, 7", "7, 5, 3"),
    ("1.5 and 2.5", "5/2, 3/2"),
    (r"x=1 \text{ or } x=-2", "1,-2"),
    ("(1, 2)", r"\left( 1,2 \right)"),
    ("(2,10]", r"\left(2, 10\right]"),
    (r"(-\infty, 2]", r"(-\infty,2]"),
    ("16/5, 3.2", "16/5"),
    (r"\begin{bmatrix} -\frac{1}{3} \\ 2/3 \end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"),
    ("1,234 and 5", "5, 1234"),
    # names, degrees, words, bases
    ("x = 5", "5"),
    ("5", "x=5"),
    ("x=5", "x = 5"),
    (r"\text{Total} = 18", "18"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("90", r"90^\circ"),
    ("10", r"10^\circ"),
    ("90\u00b0", r"90^{\circ}"),
    (r"90 \text{ degrees}", "90"),
    (r"\pi", "\u03c0"),
    ("Evelyn", r"\text{Evelyn}"),
    (r"\textbf{evelyn}", r"\text{Evelyn}"),
    ("an ellipse", r"\text{ellipse}"),
    (r"\text{Yes}", "yes"),
    (r"\text{four}", "4"),
    ("4", r"\mbox{four}"),
    ("52", "52_8"),
    ("52_{8}", "52_8"),
    (r"\text{(C)}", "C"),
    (r"\textbf{(C) } 5", r"\text{(C)}"),
    ("A, D, E", "E, D, A"),
    (r"\text{H, E}", "E,H"),
    # repeating decimals, powers of ten, mixed numbers and shares in words
    (r"\frac{4}{11}", r"0.\overline{36}"),
    (r"0.1\dot{6}", "1/6"),
    (r"0.\dot{1}4285\dot{7}", r"\frac17"),
    ("0.(3)", "1/3"),
    (r"-1.\bar{3}", "-4/3"),
    (r"1,500 \times 10^{-1}", "150"),
    ("5e3", "5,000"),
    ("1.5E-7", "0.00000015"),
    ("10^{-40}", r"10 \cdot 10^{-41}"),
    ("6 x 10^3", "6000"),
    (r"3 \times 10^8 \text{ m/s}", r"3\cdot10^8"),
    (r"2.314814814815 \times 10^{-3}", r"\frac{1}{432}"),
    ("3 and 1/2", "3.5"),
    ("7/2", r"3 \text{ and } \frac{1}{2}"),
    ("1/2, 3", "3 and 1/2"),  # which may be a list as well
    (r"3 \text{ out of } 5", r"\frac{3}{5}"),
    # times and measures
    ("20:34", r"8:34 \text{ PM}"),
    ("8:34", "8:34 p.m."),
    ("12:15 AM", "00:15"),
    ("noon", "12 PM"),
    ("2 hours and 30 minutes", "150 minutes"),
    ("5 feet 6 inches", "66 inches"),
    # names of symbols, equations with their value, functions
    ("pi", r"\pi"),
    ("2pi", r"2\pi"),
    (r"\varnothing", r"\emptyset"),
    (r"\{ \}", r"\emptyset"),
    (r"17 \bmod 5 = 2", "2"),
    ("2", r"\gcd(4, 6) = 2"),
    (r"17 \equiv 2 \pmod{5}", "2"),
    (r"\angle ABC = 30^\circ", "30"),
    ("f(x) = 2x + 3", "y = 2x + 3"),
    # systems, pairs, vectors
    ("y=3, x=2", "(x,y)=(2,3)"),
    ("x=2 and y=3", "(2,3)"),
    ("(2,3)", r"\begin{cases} y=3 \\ x=2 \end{cases}"),
    (r"\begin{cases} a+b=\frac12 \\ a-b=3 \end{cases}", r"\begin{cases} a-b=3 \\ a+b=0.5 \end{cases}"),
    (r"\begin{matrix} \frac12 \\ 1 \end{matrix}", "[0.5, 1]"),
    (r"\langle 2, 1 \rangle", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    # sets of real numbers
    ("[-2,1)", r"\{x|-2\leq x < 1\}"),
    ("x > 2", r"(2,\infty)"),
    (r"(-\infty,-1)\cup(3,\infty)", "x<-1 or x>3"),
    ("x > 3, x < -1", r"x \in (-\infty,-1)\cup(3,\infty)"),
    (r"\mathbb{R} \setminus \{3\}", r"x \ne 3"),
    ("all real numbers except 3", r"\{x \in \mathbb{R} : x \neq 3\}"),
    ("1 < x and x < 3", "3 > x > 1"),
    # other spellings of the same
    (r"\langle 1,2,3 \rangle", "(1,2,3)"),
    (r"\left[\begin{array}{l}1\\2\end{array}\right]", "(1,2)"),
    (r"\text{the empty set}", r"\varnothing"),
    (r"\emptyset", r"\text{no solution}"),
    ("(-oo, 2)", r"(-\infty,2)"),
    ("-2 <= x < 1", "[-2,1)"),
    (r"(-\infty,-1) U (3,\infty)", r"(-\infty,-1)\cup(3,\infty)"),
    ("0.333...", "1/3"),
    (r"0.1666\ldots", r"\frac16"),
    (r"33.\overline{3}\%", "1/3"),
    ("sqrt{2}", r"\sqrt2"),
    ("h(t) = 2t+1", "h = 2t+1"),
]

DIFFERENT = [
    ("17", "18"),
    ("-5", "5"),
    ("1.25", "1.2"),
    ("0.33", "1/3"),
    ("0.333334", "1/3"),
    ("1,235", "1234"),
    ("17%", "18"),
    ("18%", "1.8"),
    ("18 or 20", "18"),
    ("18, 20", "18"),
    ("1,2,3", "2"),
    ("not 18", "18"),
    ("at least 18", "18"),
    ("18 dollars and 50 cents", "18"),
    ("2", "1,2"),
    ("(1,2)", "(2,1)"),
    ("[2,10]", "(2,10)"),
    ("(2,10]", "(2,10)"),
    ("1,2", "1,3"),
    ("A, D", "A, D, E"),
    ("ACKE", "CAKE"),
    ("odd", r"\text{even}"),
    ("52_9", "52_8"),
    ("x=4", "5"),
    (r"\text{(B)}", "C"),
    ("C or D", "C"),
    ("", "5"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ("0.33", r"0.\overline{3}"),
    (r"0.\overline{13}", r"0.1\overline{3}"),
    ("5e2", "5000"),
    (r"5 \times 10^3", "5"),
    ("10^{-40}", "10^{-41}"),
    ("0.0000001", "0.0000002"),
    ("1.00000e-40", "1.00001e-40"),
    (r"2.314815 \times 10^{-4}", r"\frac{1}{432}"),
    ("3 and 1/2", "3"),
    (r"3 \text{ out of } 5", "3"),
    ("8 AM", "8 PM"),
    ("20:35", "8:34 PM"),
    ("20:34", "8:34 AM"),
    ("9 hours 12 minutes", "9 hours"),
    ("9", "9 hours 12 minutes"),
    ("2 hours 30 minutes", "2 hours 40 minutes"),
    (r"17 \bmod 5 = 2", "17"),
    ("f(x) = 2", "y = 3"),
    ("y=2, x=3", "(2,3)"),
    ("x=2, y=4", "(2,3)"),
    ("x=2, y=3, z=4", "(2,3)"),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", "(2,1)"),
    (r"\begin{bmatrix} 1 & 2 \end{bmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    ("[-2,1]", r"\{x|-2\leq x < 1\}"),
    ("x>3", r"x \ge 3"),
    ("x > 2", "y > 2"),
    ("(-1,3)", "x<-1 or x>3"),
    ("x<-1", "x<-1 or x>3"),
    ("0.333...", "0.333"),
]

UNDECIDED = [
    (r"\sqrt{16}", "4"),
    ("2+3", "5"),
    ("5!", "120"),
    ("2^{10}", "1024"),
    ("2x", "2"),
    ("1/0", "5"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    ("x(x+1)", "x^2+x"),
    ("x=5", "y=5"),
    (r"3 \pm 2", "5, 1"),
    (r"x > \sqrt{2}", r"(\sqrt{2},\infty)"),
    ("3:2", "3"),
]


@pytest.mark.parametrize(("answer", "truth"), SAME)
def test_same(answer, truth):
    assert same_answer(answer, truth) is True


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_different(answer, truth):
    assert same_answer(answer, truth) is False


@pytest.mark.parametrize(("answer", "truth"), UNDECIDED)
def test_undecided(answer, truth):
    assert same_answer(answer, truth) is None


def spellings(value: Fraction) -> list[str]:
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"$\dfrac{{{sign}{top}}}{{{bottom}}}$"]
    if bottom == 1:
        whole = int(value)
        forms += [
            f"{whole}",
            f"{whole:,}",
            f"{whole}.0",
            f"{whole} apples",
            rf"\${whole:,}",
            f"x = {whole}",
            f"{whole}%",
        ]
    if top > bottom > 1:
        forms.append(rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    return forms


fractions = st.builds(Fraction, st.integers(-(10**7), 10**7), st.integers(1, 60))


@given(fractions, st.data())
def test_every_spelling_of_a_number_is_the_same(value, data):
    one, other = (data.draw(st.sampled_from(spellings(value))) for _ in range(2))
    assert same_answer(one, other) is True


@given(fractions, fractions, st.data())
def test_spellings_of_different_numbers_are_different(left, right, data):
    if left not in (right, right * 100, right / 100):  # 5% is 5 and 0.05
        answer, truth = data.draw(st.sampled_from(spellings(left))), data.draw(st.sampled_from(spellings(right)))
        assert same_answer(answer, truth) is False


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True), st.randoms())
def test_lists_have_no_order_and_tuples_have(values, random):
    shuffled = random.sample(values, len(values))
    joined, mixed = ", ".join(map(str, values)), ", ".join(map(str, shuffled))
    assert same_answer(mixed, joined) is True
    assert same_answer(rf"\{{{mixed}\}}", joined) is True
    assert same_answer(f"({mixed})", f"({joined})") is (shuffled == values)
    assert same_answer(", ".join(map(str, values[1:])), joined) is False


alphabet = st.text(alphabet="0123456789.,/%$ -+=()[]{}<>:\\abxfrctenximdopsqu_^&|", max_size=60)


@given(alphabet, alphabet)
def test_no_pair_of_texts_makes_comparison_fail(answer, truth):
    assert same_answer(answer, truth) in (True, False, None)
    assert canonical(canonical(answer)) is not None


@given(alphabet)
def test_every_answer_that_is_not_blank_is_the_same_as_itself(answer):
    assert same_answer(answer, answer) is (canonical(answer).replace(" ", "").removesuffix("^\\circ") != "")


def test_adversarial_answers_are_quick():
    began = time.perf_counter()
    for unit in (
        "1,",
        "a ",
        "1 ",
        "(,",
        r"\frac",
        r"\text{",
        r"\text{a}",
        " and or",
        "_",
        "-",
        "1.",
        "{1}",
        "9",
        r"\sqrt",
        "x=",
        "x=1,",
        "1<x, ",
        "1:0",
        "1 h ",
        r"\cup",
        r"\pm",
        r"\begin{cases}",
        r"0.\overline{",
    ):
        for truth in ("5", "1,2,3", r"\text{word}", "(1,2)", r"\frac{1}{2}"):
            same_answer((unit * 1000)[:1000], truth)
    assert time.perf_counter() - began < 20


def test_answers_beyond_the_limit_are_compared_as_strings():
    assert same_answer("1+" * 2000 + "1", "1+" * 2000 + "1") is True
    assert same_answer("1+" * 2000 + "1", "2001") is False
