"""Exact arithmetic on fractions that cannot run away: what outgrows a bound, or is no number, is said to be unknown.

Layer L1, imports nothing of the package and no torch; used by `clipo_ds.expressions`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

MAX_BITS = 4096
"""Numerator and denominator longer than this together, in bits, are not computed."""
MAX_FACTORIAL = 200
MAX_DEGREE = 16
"""Roots of a higher degree are not computed,"""
MAX_ROOT_BITS = 512
"""nor roots of longer numbers."""
MAX_DENOMINATORS = {2: 12, 3: 60}
"""Largest denominator that a number shown to two or three decimals is taken to be rounded from."""
ROOT_DIGITS = 40
"""Significant digits of an irrational root; it is cut behind them."""


PI = Fraction("3.1415926535897932384626433832795028841971")
"""To as many digits as a root."""


class Unknown(NamedTuple):
    """Why there is no value: nothing that can be computed, or arithmetic that has none (division by zero)."""

    undefined: bool


Value = Fraction | Unknown

_NOT_COMPUTED = Unknown(undefined=False)
_UNDEFINED = Unknown(undefined=True)


def apply(left: Fraction, operator: str, right: Fraction) -> Value:
    """The value of `left operator right`.

    Operators: + - * / ^ mod root (the right-th root of left) choose (binomial coefficient) ! (right is ignored).

    >>> apply(Fraction(1, 2), "+", Fraction(1, 3)), apply(Fraction(27), "root", Fraction(3))
    (Fraction(5, 6), Fraction(3, 1))
    >>> apply(Fraction(1), "/", Fraction(0)), apply(Fraction(9), "^", Fraction(10**9))
    (Unknown(undefined=True), Unknown(undefined=False))
    """
    if operator == "+":
        return _bounded(left + right)
    if operator == "-":
        return _bounded(left - right)
    if operator == "*":
        return _bounded(left * right)
    if operator == "/":
        return _bounded(left / right) if right else _UNDEFINED
    if operator == "^":
        return _power(left, right)
    if operator == "root":
        return _root(left, int(right)) if right.denominator == 1 else _NOT_COMPUTED
    if left.denominator != 1 or right.denominator != 1:
        return _NOT_COMPUTED
    if operator == "mod":
        return left % right if right else _UNDEFINED
    if not 0 <= left <= MAX_FACTORIAL or right < 0:
        return _NOT_COMPUTED
    return Fraction(math.factorial(int(left)) if operator == "!" else math.comb(int(left), int(right)))


def unrounded(value: Fraction, decimals: int) -> Fraction:
    """The simple fraction without an end in decimals that a number shown to so many was rounded from; else itself.

    >>> unrounded(Fraction("1.667"), 3), unrounded(Fraction("4.125"), 3)
    (Fraction(5, 3), Fraction(33, 8))
    """
    simple = value.limit_denominator(MAX_DENOMINATORS.get(decimals, 100))
    # The last digit of a float may be off, by more in larger ones: 33.333333333333336.
    places = max(Fraction(2), abs(value) * Fraction(10**decimals, 2**52)) if decimals > 9 else Fraction(1, 2)
    endless = pow(10, 64, simple.denominator) != 0
    return simple if endless and abs(simple - value) * 10**decimals <= places else value


def _bounded(value: Fraction) -> Value:
    bits = value.numerator.bit_length() + value.denominator.bit_length()
    return value if bits <= MAX_BITS else _NOT_COMPUTED


def _power(base: Fraction, exponent: Fraction) -> Value:
    if base == 0:
        return base if exponent > 0 else Unknown(undefined=exponent < 0)
    if exponent.denominator != 1:
        return _root(base, exponent.denominator, exponent.numerator)
    if base in (1, -1):
        return base ** (int(exponent) % 2)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(exponent) if abs(exponent) * bits <= MAX_BITS else _NOT_COMPUTED


def _root(value: Fraction, degree: int, exponent: int = 1) -> Value:
    """The degree-th root to the power of `exponent`."""
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if value < 0 or not 2 <= degree <= MAX_DEGREE or bits > MAX_ROOT_BITS:
        return _NOT_COMPUTED
    top, bottom = _integer_root(value.numerator, degree), _integer_root(value.denominator, degree)
    if top**degree == value.numerator and bottom**degree == value.denominator:
        root = Fraction(top, bottom)
    else:
        scale = 10 ** (ROOT_DIGITS + len(str(bottom)))
        root = Fraction(_integer_root(value.numerator * scale**degree // value.denominator, degree), scale)
    return _power(root, Fraction(exponent))


def _integer_root(value: int, degree: int) -> int:
    """Largest integer whose degree-th power is at most `value`, by bisection."""
    if degree == 2:
        return math.isqrt(value)
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle)
    return low
