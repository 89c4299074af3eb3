"""The verdict on an equation: true, false, or nothing to count.

Layer L1, between `clipo_ds.doubts` and `clipo_ds.steps`; no torch. Beside equations of numbers there are sums of
measures in several units, and equations in one unknown that no value of it makes true.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from clipo_ds.contexts import is_solved
from clipo_ds.doubts import in_doubt, units_in_doubt
from clipo_ds.equations import Equation
from clipo_ds.expressions import parse_expression
from clipo_ds.mathtokens import Kind
from clipo_ds.mathunits import first_names, measure_end, measured_total, mixes_measures
from clipo_ds.rationals import Unknown

PROBES = (Fraction(2), Fraction(5), Fraction(11))
"""Values at which an identity in one unknown is tried,"""
MAX_IDENTITY = 60
"""and so many tokens may each of its sides have."""


def judge(equation: Equation) -> bool | None:
    """True, False, or None where there is nothing to count."""
    if any(isinstance(side.value, Unknown) and not side.value.undefined for side in (equation.left, equation.right)):
        return _judge_identity(equation)
    if equation.num_operations == 0 and not equation.in_chain:
        return None
    if equation.pi_matters():
        return None
    totals = _totals(equation)
    if equation.holds() if totals is None else _totals_agree(equation, totals):
        return True
    if totals is None and units_in_doubt(equation):
        return None
    return None if in_doubt(equation) else False


def _judge_identity(equation: Equation) -> bool | None:
    """False for an equation in one unknown that should hold for all its values, and holds for none but 0.

    None for all others: 2x + 3 = 7 or 2x = 3x - 5 may be solved, and what is true may be a definition.
    """
    left, right, source = equation.left, equation.right, equation.source
    if left.operations == 0 or left.additions + right.additions == 0:
        return None
    name = _unknown_of(equation)
    if not name:
        return None
    differences = []
    for value in PROBES:
        sides = [parse_expression(source, s.start, s.stop, unknown=(name, value)).value for s in (left, right)]
        if isinstance(sides[0], Unknown) or isinstance(sides[1], Unknown) or sides[0] == sides[1]:
            return None
        differences.append(sides[0] - sides[1])
    never = any(len({d / p**power for d, p in zip(differences, PROBES, strict=True)}) == 1 for power in range(4))
    return False if never and not is_solved(source.text, *equation.span) and not in_doubt(equation) else None


def _unknown_of(equation: Equation) -> str:
    """The letter that is the only unknown of both sides, which have no roots and bars; or nothing."""
    names = []
    for side in (equation.left, equation.right):
        tokens = equation.source.tokens[side.start : side.stop]
        if len(tokens) > MAX_IDENTITY or any(token.kind is Kind.ROOT or token.text == "|" for token in tokens):
            return ""
        names.append({token.text for token in tokens if token.kind is Kind.VARIABLE})
    if names[0] != names[1] or len(names[0]) != 1:
        return ""
    (name,) = names[0]
    return name if len(name) == 1 and name.isalpha() and name not in "ie" else ""


def stated_and_actual(equation: Equation) -> tuple[Fraction | None, Fraction | None]:
    """The value that a judged equation states and the true one; None for a side that divides by zero."""
    totals = _totals(equation)
    if totals is not None and not totals.in_parts and isinstance(equation.right.value, Fraction) and totals.right:
        return equation.right.value, equation.right.value * totals.left / totals.right
    return equation.stated_and_actual


class _Totals(NamedTuple):
    """Both sides in the smallest unit."""

    left: Fraction
    right: Fraction
    in_parts: bool  # whether the right side has more units than the parser takes for it


def _totals_agree(equation: Equation, totals: _Totals) -> bool:
    """Whether they are the same, up to rounding: 1 hour + 40 minutes = 1.67 hours."""
    right = equation.right
    if totals.left == totals.right or totals.in_parts or not isinstance(right.value, Fraction) or not totals.right:
        return totals.left == totals.right
    actual = right.value * totals.left / totals.right
    return equation.rounds(actual, right, right.value, Fraction(1), percent=False)


def _totals(equation: Equation) -> _Totals | None:
    """What sums of times, lengths … in several units come to: 1 hour + 30 minutes = 90 minutes."""
    left, right, tokens = equation.left, equation.right, equation.source.tokens
    if left.operations != left.additions or not left.additions or right.operations:
        return None
    follows = right.stop < len(tokens) and tokens[right.stop].kind is Kind.WORD and not right.units
    end = measure_end(tokens, right.stop + follows)
    in_parts = end > right.stop + follows  # 2 hours and 30 minutes
    if not (in_parts or mixes_measures(first_names(left.units))):
        return None
    stated = measured_total(tokens, right.start, end)
    total = measured_total(tokens, left.start, left.stop) if stated else None
    return _Totals(total[0], stated[0], in_parts) if stated and total and stated[1] == total[1] else None
