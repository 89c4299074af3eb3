r"""Equality of two answers by algebra: math-verify's parser, exact numbers, and a look at expressions in many points.

What runs in the workers of `clipo_ds.symbolic`, and the only place that imports math-verify and sympy (inside of
functions: they take a second). `equivalent` takes answers apart as `clipo_ds.equality` does and decides the parts.

What is decided here and not by math-verify's ``verify``, which rounds to six decimals and cuts what is below 1e-15:

- two exact numbers: equal to a thousand digits of their own size, and not provably unequal; 1/2006! is not 1/2004!. A
  decimal of at least six significant digits may be the rounded form of an exact number, as everywhere;
- two expressions in letters: equal in a handful of points with either sign, wherever the roots and logarithms in both
  are of positive numbers. Elsewhere their branches differ between forms that are one function to any reader;
- two equations: multiples of each other, or of the same solutions, if they have any (to ``verify`` all those that sympy
  cannot solve are alike);
- sets of real numbers with ends that take algebra (`clipo_ds.real_sets`).

The rest, inequalities and sets above all, is left to ``verify``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import total_ordering
from typing import Any

from clipo_ds.equality import same_answer
from clipo_ds.real_sets import is_unmistakable, read_set, same_set
from clipo_ds.spelling import canonical, number, plain_latex

_DIGITS = (40, 200, 1000)  # precisions at which two numbers are held against each other
_BEYOND_SYMPY = (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError)
"""What sympy raises where an expression is none that it can evaluate, compare or solve."""

_MAX_EXACT_DIGITS = 1_000_000  # of an integer that is written out; what is larger must be equal as it stands
_POINTS = tuple(
    tuple(Fraction(top, bottom) for top, bottom in row)
    for row in (
        ((7, 5), (11, 3), (13, 7), (19, 8), (5, 9), (23, 6)),
        ((3, 8), (17, 4), (8, 11), (29, 7), (14, 3), (2, 7)),
        ((31, 9), (4, 7), (37, 5), (6, 13), (9, 4), (41, 11)),
        ((-5, 3), (12, 7), (-8, 5), (15, 11), (-7, 6), (16, 9)),
        ((9, 7), (-13, 4), (11, 6), (-17, 9), (3, 5), (-19, 7)),
        ((-16, 5), (-3, 11), (-23, 8), (-5, 7), (-12, 5), (-8, 3)),
    )
)
_DEGREES = re.compile(r"((?<![\d.}])(?:\d+(?:\.\d+)?|\\frac\s*\{\d+\}\s*\{\d+\}))\s*\^\s*\{?\s*\\circ\s*\}?")
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_PRIME = re.compile(r"['\u2019\u2032]|\\prime(?![A-Za-z])")
_INVERSE = re.compile(r"\\?arc(?:sin|cos|tan|cot)|\\(?:sin|cos|tan|cot)\s*\^\s*\{\s*-\s*1\s*\}")


def equivalent(answer: str, truth: str) -> bool:
    r"""Whether two answers are equal (runs in a worker: may take for ever).

    An equation in an unknown is not the number on its right: ``x + 5 = 8`` is not 8. The letter i is the imaginary
    unit, and degrees equal their radians.

    >>> equivalent(r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"), equivalent("x + 5 = 8", "8")
    (True, False)
    >>> equivalent(r"\frac{1}{2006!}", r"\frac{1}{2004!}"), equivalent("1-2^{-99}", "1-2^{-98}")
    (False, False)
    """
    return same_answer(answer, truth, by_algebra) is True


def by_algebra(answer: str, truth: str) -> bool:
    """As `equivalent`, of answers that are not to be taken apart any further."""
    from math_verify import verify
    from math_verify.grader import is_assignment_relation, is_equation
    from sympy import Eq

    if "=" in answer and "=" in truth and len(_PRIME.findall(answer)) != len(_PRIME.findall(truth)):
        return False  # the parser reads y' = 2x as y = 2x
    verdict = _sets_equal(answer, truth)
    if verdict is not None:
        return verdict
    gold, pred = _parse(truth), _parse(answer)
    if not gold or not pred:
        return False
    is_open_equation = isinstance(pred[0], Eq) and not is_assignment_relation(pred[0]) and pred[0].lhs.free_symbols
    if is_open_equation and not is_equation(gold[0]):
        return False
    if _has_matrix(pred[0]) != _has_matrix(gold[0]):
        return False
    as_written = re.search(r"%|circ|degree|\u00b0", answer + truth) is not None  # for which verify has rules of its own
    for ours, theirs in _readings(answer, truth, pred, gold):
        if not ours or not theirs:
            continue
        verdict = None if as_written and ours is pred else _decided(answer, truth, ours[0], theirs[0])
        if verdict is None:
            verdict = verify(theirs, ours, allow_set_relation_comp=True, timeout_seconds=None)
        if verdict:
            return True
    return False


def _parse(answer: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    text = plain_latex(answer)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)  # the parser drops the sign, and takes the sine of 30
    try:
        return parse(rf"\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
    except _BEYOND_SYMPY:  # an inequality between complex numbers
        return []


def _readings(answer: str, truth: str, pred: list[Any], gold: list[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    r"""The pair as parsed, and what math-verify does not see: i as the imaginary unit, degrees against radians."""
    from sympy import Basic, I, Symbol

    yield pred, gold
    if isinstance(pred[0], Basic) and isinstance(gold[0], Basic):
        symbols = [symbol for side in (pred[0], gold[0]) for symbol in side.free_symbols if isinstance(symbol, Symbol)]
        names = {symbol.name for symbol in symbols}
        if names == {"i"} or len(set(symbols)) > len(names):
            # The parser gives one letter different assumptions ("5i" real, "5 i" not), which makes them two symbols.
            same = {s: I if s.name == "i" else Symbol(s.name, real=True) for s in symbols}
            yield [pred[0].xreplace(same)], [gold[0].xreplace(same)]
    if r"\pi" in answer + truth or _INVERSE.search(answer + truth):
        ours, theirs = canonical(answer), canonical(truth)
        if ours.endswith(r"^\circ") != theirs.endswith(r"^\circ"):
            left, right = (re.sub(r"^(.*)\^\\circ$", r"\\frac{(\1)\\pi}{180}", side) for side in (ours, theirs))
            yield _parse(left), _parse(right)
        if (r"\circ" in ours) != (r"\circ" in theirs):
            left, right = (_DEGREES.sub(r"(\\frac{\1\\pi}{180})", side) for side in (ours, theirs))
            yield _parse(left), _parse(right)


def _sets_equal(answer: str, truth: str) -> bool | None:
    """Equality of two sets of real numbers; None where one of the two is none that can be read."""
    ours, theirs = canonical(answer), canonical(truth)
    if not (is_unmistakable(ours) or is_unmistakable(theirs)):
        return None
    try:
        sets = read_set(ours, _real), read_set(theirs, _real)
        return same_set(sets[0], sets[1]) if sets[0] and sets[1] else None
    except _BEYOND_SYMPY:
        return None


def _decided(answer: str, truth: str, pred: Any, gold: Any) -> bool | None:
    """Equality of two numbers or of two expressions; None for anything else, and for what sympy cannot evaluate."""
    try:
        return _decided_by_value(answer, truth, pred, gold)
    except _BEYOND_SYMPY:
        return None


def _decided_by_value(answer: str, truth: str, pred: Any, gold: Any) -> bool | None:
    from sympy import Derivative, Eq, Expr, Float, Integral, Limit, Product, Sum, oo, zoo
    from sympy.core.function import AppliedUndef

    if any(not isinstance(side, Expr | Eq) for side in (pred, gold)) or isinstance(pred, Eq) != isinstance(gold, Eq):
        return None
    if any(side.has(oo, -oo, zoo, AppliedUndef, Integral, Derivative, Limit, Sum, Product) for side in (pred, gold)):
        return None
    if isinstance(pred, Eq):
        return _equations_equal(pred, gold)
    if not (pred.is_commutative and gold.is_commutative):
        return None
    rounded = [side.has(Float) for side in (pred, gold)]
    pred, gold = _rational(pred), _rational(gold)
    if pred.free_symbols or gold.free_symbols:
        return _equal_in_points(pred, gold)
    if rounded[0] != rounded[1]:
        decimal, exact = (number(canonical(answer)), gold) if rounded[0] else (number(canonical(truth)), pred)
        if decimal is not None and decimal.num_decimals is not None and not decimal.percent:
            return _is_rounded(decimal.value, decimal.num_decimals, decimal.num_significant, exact)
    return numbers_equal(pred, gold)


def _rational(expression: Any) -> Any:
    """Decimals as the fractions that they are written as."""
    from sympy import Float, Rational

    return expression.xreplace({f: Rational(str(f)) for f in expression.atoms(Float)})


def _has_matrix(expression: Any) -> bool:
    from sympy import Basic, MatrixBase, MatrixExpr

    return isinstance(expression, MatrixBase) or (
        isinstance(expression, Basic) and expression.has(MatrixBase, MatrixExpr)
    )


def _equations_equal(pred: Any, gold: Any) -> bool:
    """Whether two equations are multiples of each other, or have the same solutions, of which there is one."""
    from sympy import solve

    if pred.free_symbols != gold.free_symbols:
        return False
    sides = [_rational(equation.lhs - equation.rhs) for equation in (pred, gold)]
    if _equal_in_points(*sides, up_to_factor=True):
        return True
    solved = [solve(side, sorted(side.free_symbols, key=str), dict=True) for side in sides]
    return 0 < len(solved[0]) == len(solved[1]) and all(
        any(_solutions_equal(one, other) for other in solved[1 - i]) for i in (0, 1) for one in solved[i]
    )


def _solutions_equal(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(_expressions_equal(one[name], other[name]) for name in one)


def _expressions_equal(one: Any, other: Any) -> bool | None:
    return _equal_in_points(one, other) if one.free_symbols or other.free_symbols else numbers_equal(one, other)


def numbers_equal(left: Any, right: Any) -> bool:
    """Whether two exact numbers are equal, whatever their size: compared in digits of their own size."""
    from sympy import Abs, Rational, nan, simplify

    if left == right:
        return True
    for digits in _DIGITS:
        ours, theirs = _evaluated(left, digits), _evaluated(right, digits)
        size, apart = max(abs(ours), abs(theirs), key=_magnitude), Abs(ours - theirs)
        if nan in (ours, theirs, apart) or not apart.is_number:
            return False
        if apart > size * Rational(10) ** (8 - digits):
            return False
        if digits == _DIGITS[0] and _num_digits(size) > _MAX_EXACT_DIGITS:
            return False  # to write it out would take the machine's memory
        if digits == _DIGITS[0]:
            whole = left.doit(), right.doit()
            if all(side.is_Rational for side in whole):
                return bool(whole[0] == whole[1])
    difference = left - right
    if difference.is_zero is None:
        difference = simplify(difference)
    return difference.is_zero is not False


def _evaluated(expression: Any, digits: int) -> Any:
    """An expression in so many digits of its own size; zero where it cancels to nothing in far more than those."""
    from sympy import Float, Integer, N

    value = N(expression, digits)
    return Integer(0) if isinstance(value, Float) and value._prec < 20 else value


def _magnitude(value: Any) -> Any:
    from sympy import N

    return N(abs(value), 15)


def _num_digits(size: Any) -> float:
    """Decimal digits before or behind the point, as the exponent of a floating-point number tells them."""
    from sympy import Float

    value = Float(size, 15)
    return abs(value._mpf_[2] + value._mpf_[3]) * 0.30103 if value != 0 else 0.0


def _is_rounded(decimal: Fraction, num_decimals: int, num_significant: int, exact: Any) -> bool:
    """Whether a decimal is an exact number, or that number rounded to or cut off at its last place."""
    from sympy import N, Rational

    written = Rational(decimal.numerator, decimal.denominator)
    if num_significant < 6:
        return numbers_equal(written, exact)
    value = N(exact, num_significant + 20)
    if not value.is_real:
        return False
    beyond = abs(value) - abs(written) if value * written > 0 else Rational(10)
    unit = Rational(10) ** -num_decimals
    return bool(-unit / 2 <= beyond < unit)


def _equal_in_points(pred: Any, gold: Any, *, up_to_factor: bool = False) -> bool | None:
    """Equality of two expressions, or of their ratio, in all points where both are real; None where no point tells."""
    from sympy import I, Rational, nan, zoo

    names = sorted({symbol.name for symbol in pred.free_symbols | gold.free_symbols})
    if len(names) > len(_POINTS[0]):
        return None
    with_i = pred.has(I) or gold.has(I)
    tolerance = Rational(10) ** -40
    compared, factor = 0, None
    for point in _POINTS:
        values = {name: Rational(x.numerator, x.denominator) for name, x in zip(names, point, strict=False)}
        at = {symbol: values[symbol.name] for symbol in pred.free_symbols | gold.free_symbols}
        if not with_i and not all(_is_real_at(side, at) for side in (pred, gold)):
            continue
        ours, theirs = (_evaluated(side.subs(at), 60) for side in (pred, gold))
        if any(not value.is_number or value.has(nan, zoo) for value in (ours, theirs)):
            continue
        if up_to_factor:
            if theirs == 0 or ours == 0:
                continue
            factor = ours / theirs if factor is None else factor
            theirs = theirs * factor
        if abs(ours - theirs) > max(abs(ours), abs(theirs)) * tolerance:
            return False
        compared += 1
    return True if compared >= 3 else None


def _is_real_at(expression: Any, at: dict[Any, Any]) -> bool:
    """Whether every root and every logarithm in an expression is of what is not negative."""
    from sympy import N, Pow, log, preorder_traversal

    for part in preorder_traversal(expression):
        inside = None
        if isinstance(part, Pow) and not part.exp.is_integer:
            inside = part.base
        elif isinstance(part, log):
            inside = part.args[0]
        if inside is not None and inside.free_symbols:
            value = N(inside.subs(at))
            if not value.is_real or value < 0:
                return False
    return True


@total_ordering
class _Real:
    """A real number as the end of an interval."""

    def __init__(self, expression: Any) -> None:
        self.expression = expression

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Real) and numbers_equal(self.expression, other.expression)

    def __lt__(self, other: _Real) -> bool:
        return bool(self.expression < other.expression)

    __hash__ = None  # type: ignore[assignment]


def _real(text: str) -> _Real | None:
    """The real number that a text is, None where it is none, or a decimal that may be rounded."""
    from sympy import Expr, Float, oo

    plain = number(text)
    if plain is not None:
        from sympy import Rational

        return _Real(Rational(plain.value.numerator, plain.value.denominator))
    parsed = _parse(text)
    if not parsed or not isinstance(parsed[0], Expr) or parsed[0].free_symbols or parsed[0].has(Float, oo, -oo):
        return None
    return _Real(parsed[0]) if parsed[0].is_real else None
