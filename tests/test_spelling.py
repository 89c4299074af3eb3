"""One spelling for every way to write an answer, and the number that it is."""

from __future__ import annotations

from fractions import Fraction

import pytest

from clipo_ds.spelling import canonical, key, number, plain_latex


@pytest.mark.parametrize(
    "spelling",
    [
        r"\left( \frac{1}{2}, 1234 \right)",
        r"(\tfrac12,1{,}234)",
        r"$(\dfrac{1}2,\,1,\!234)$",
        r"\Big(\frac12,\ 1234\Big).",
        "( \u00bd, 1234 )",
    ],
)
def test_ways_to_write_a_tuple_have_one_key(spelling):
    assert key(spelling) == r"(\frac{1}{2},1234)"


def test_line_breaks_of_matrices_survive():
    assert canonical(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") == r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"


def test_exponents_and_indices_lose_single_braces_only():
    assert key(r"x^{2} + y_{10} + z^{n+1}") == "x^2+y_{10}+z^{n+1}"


def test_a_factorial_is_no_punctuation():
    assert canonical("5!") == "5!"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234,567", 1234567),
        ("-1,234.50", Fraction(-2469, 2)),
        ("2.5 million dollars", 2500000),
        ("12 dozen", 144),
        ("seventeen", 17),
        (r"-3\frac{1}{2}", Fraction(-7, 2)),
        ("3 1/2 feet", Fraction(7, 2)),
        ("12 km/h", 12),
        ("5 apples per day", 5),
        (r"100^\circ F", 100),
        ("101_2", 101),
    ],
)
def test_numbers_are_read(text, value):
    assert number(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "5x",
        "5 and 6",
        "5 or more",
        "1/0",
        r"5\pi",
        "5^2",
        "5+1",
        "5 - 1",
        "1,23",
        "3:2",
        "not 5",
        "5 if x > 0",
        "--5",
        "1.2.3",
    ],
)
def test_other_things_are_no_numbers(text):
    assert number(text) is None


def test_single_letters_are_units_only_where_asked():
    assert number("5 m") is None
    assert number("5 m", letters_are_units=True).value == 5
    assert number("5x", letters_are_units=True) is None


def test_a_rounded_decimal_needs_six_significant_digits():
    # 2/3 = 0.6666666...; within one unit of the last digit written.
    third = number(r"\frac{2}{3}")
    close = ["0.666667", "0.666666", "0.6666667"]
    assert all(number(text).equals(third) for text in close)
    assert not any(number(text).equals(third) for text in ("0.66667", "0.667", "0.666668", "-0.666667"))
    assert not number("0.0000672").equals(number("0.0000671"))


def test_plain_latex_keeps_text_commands():
    assert plain_latex(r"\$5\text{ cm}") == r"5\text{ cm}"
