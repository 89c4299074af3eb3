"""Whether one equation is true under any customary reading of its notation.

Layer L1, between `clipo_ds.expressions` and `clipo_ds.doubts`; no torch. An `Equation` is one link of a running
equality with both sides parsed, or a value restated under a name; `clipo_ds.doubts` has the verdict on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise

from clipo_ds.expressions import Expression, is_remark, parse_expression
from clipo_ds.mathtokens import Kind, TokenList
from clipo_ds.rationals import Unknown

APPROXIMATION_TOLERANCE = Fraction(1, 100)
"""Relative difference that an "about equal" allows between two sides neither of which is a plain number."""
FLOAT_PLACE, FLOAT_TOLERANCE = Fraction(1, 10**10), Fraction(1, 10**9)
"""A number shown to ten or more decimals may be off by this share: a calculator prints 0.30000000000000004."""
ROOT_TOLERANCE = Fraction(1, 10**25)
"""Absolute difference of two equal sides: irrational roots are cut."""
MIN_ROUNDED_DIGITS = 3
"""A whole number stated with an equals sign counts as a rounding from this many digits on."""
MIN_CUT_DIGITS = 4
"""Decimals may also be cut, from this many digits on: 2000/3 = 666.66, but 17/3 is not 5.66."""
MIN_CUT_DECIMALS = 3
"""Or from this many decimals: 2/3 = 0.666."""
MAX_READ_AGAIN = 400
"""A longer equation, in tokens, is not read a second way: if the first one makes it false, it is not counted."""


@dataclass(frozen=True)
class Equation:
    """One link `left = right` with what its judgement depends on."""

    source: TokenList
    left: Expression
    right: Expression
    relation: int  # token that states it
    torn: bool  # an operator without an operand touches one of the sides: price * 3 + 4 = 10, 3 + 4 = 7 - tax
    in_chain: bool  # something was computed further left in the same running equality
    exact: Fraction | None  # what the left side is the rounding of, where the link before said so

    @property
    def approximate(self) -> bool:
        return self.source.tokens[self.relation].text == "~"

    @property
    def num_operations(self) -> int:
        return self.left.operations + self.right.operations

    @property
    def span(self) -> tuple[int, int]:
        """Characters from the left side to the end of the right one, without its trailing units and remarks."""
        tokens, last = self.source.tokens, self.right.stop - 1
        while True:
            if tokens[last].kind is Kind.WORD or tokens[last].text == "/":
                last -= 1
            elif tokens[last].text == ")" and is_remark(self.source, self.source.partner[last]):
                last = self.source.partner[last] - 1
            else:
                break
        return tokens[self.left.start].start, tokens[last].end

    @property
    def stated_and_actual(self) -> tuple[Fraction | None, Fraction | None]:
        """Value of the plain number of the two sides (of the right one if neither or both are), and of the other."""
        left, right = (side.value if isinstance(side.value, Fraction) else None for side in (self.left, self.right))
        return (left, right) if self.left.operations == 0 < self.right.operations else (right, left)

    def holds(self) -> bool:
        """Whether the link is true under any customary reading of its notation."""
        if self.sides_agree(self.left, self.right, self.exact):
            return True
        if self.right.stop - self.left.start > MAX_READ_AGAIN:
            return False
        features = sorted((self.left.features | self.right.features) - {"pi"})
        for readings in (frozenset(chosen) for size in (1, 2) for chosen in combinations(features, size)):
            left, right = self.read_again(self.left, readings), self.read_again(self.right, readings)
            if left.stop == self.left.stop and self.sides_agree(left, right, None):
                return True
        return False

    def pi_matters(self) -> bool:
        """Whether one side alone depends on pi: 2\\pi = 6, but not 30\\pi/60\\pi = 0.5."""
        return self.depends_on_pi(self.left) != self.depends_on_pi(self.right)

    def depends_on_pi(self, side: Expression) -> bool:
        return "pi" in side.features and all(
            parse_expression(self.source, side.start, side.stop, readings | {"pi"}).value
            != parse_expression(self.source, side.start, side.stop, readings).value
            for readings in (frozenset[str](), frozenset({"tight"}))
        )

    def read_again(self, side: Expression, readings: frozenset[str]) -> Expression:
        own = readings if side.operations else readings - {"decimal"}  # what is stated stands as it is
        return parse_expression(self.source, side.start, side.stop, own)

    def sides_agree(self, left: Expression, right: Expression, exact: Fraction | None) -> bool:
        if isinstance(left.value, Unknown) or isinstance(right.value, Unknown):
            return False
        for scale_left, scale_right in _percent_scales(self.source, left, right):
            a, b = left.value * scale_left, right.value * scale_right
            percent = scale_right > 1 or (scale_left > 1 and _takes_percents(self.source, left))
            candidates = [a] if exact is None else [a, exact * scale_left]
            for value in candidates:
                if abs(value - b) <= ROOT_TOLERANCE:
                    return True
                if self.rounds(value, right, b, scale_right, percent):
                    return True
            if self.rounds(b, left, a, scale_left, percent):
                return True
            if self.approximate and abs(a - b) <= APPROXIMATION_TOLERANCE * max(abs(a), abs(b)):
                return _unit_of_last_place(self.source, left) is _unit_of_last_place(self.source, right) is None
        return False

    def rounds(self, value: Fraction, side: Expression, stated: Fraction, scale: Fraction, percent: bool) -> bool:
        """Whether `side` is a plain number and the rounding of `value` to the digits it shows.

        `stated` is the side's value times `scale`; whole percentages may be rounded.
        """
        place = _unit_of_last_place(self.source, side)
        if place is None:
            return False
        place *= scale
        if place <= FLOAT_PLACE and abs(value - stated) <= abs(value) * FLOAT_TOLERANCE:
            return True
        if self.approximate:
            return abs(value - stated) <= place * _trailing_zeros(stated / place)
        digits = len(str(abs(stated / place).numerator))
        if abs(value - stated) * 2 <= place:
            if digits == 1 and value != stated and (value / place * 10).denominator == 1:
                return False  # 1/4 = 0.3
            return place < scale or percent or digits >= MIN_ROUNDED_DIGITS
        cut = 0 < (value - stated) * (1 if stated > 0 else -1) < place
        return cut and place < scale and (digits >= MIN_CUT_DIGITS or place * 10**MIN_CUT_DECIMALS <= scale)


def _percent_scales(source: TokenList, left: Expression, right: Expression) -> Iterator[tuple[Fraction, Fraction]]:
    """Factors to compare two sides under: 40/200 * 100 = 20% and 100% - 30% = 70 leave a percent sign out."""
    yield Fraction(1), Fraction(1)
    if right.percents and not left.percents and right.operations == 0:
        yield Fraction(1), Fraction(100)
    all_percents = left.percents == left.numbers and left.additions == left.operations
    if left.percents and not right.percents and (all_percents or _takes_percents(source, left)):
        yield Fraction(100), Fraction(1)


def _takes_percents(source: TokenList, side: Expression) -> bool:
    """Whether a side is multiplied by 100%: 2/7 * 100% = 28.57."""
    tokens = source.tokens[side.start : side.stop]
    for number, sign in pairwise(tokens):
        if number.value == 100 and sign.text == "%" and side.operations > side.additions:
            return True
    return False


def _unit_of_last_place(source: TokenList, side: Expression) -> Fraction | None:
    """Value of one unit in the last digit shown by a plain number: 1/100 for 5.67 and 12%, 10^11 for 1.1 * 10^12."""
    numbers = [token for token in source.tokens[side.start : side.stop] if token.kind is Kind.NUMBER]
    if not isinstance(side.value, Fraction) or not numbers:
        return None
    if side.operations == 0 and len(numbers) == 1 and numbers[0].value is not None:
        place = Fraction(1, 10 ** numbers[0].decimals)
        return place / 100 if side.percents else place
    if side.operations == 2 and len(numbers) == 3 and numbers[1].value == 10 and numbers[0].value:
        return abs(side.value / numbers[0].value) / 10 ** numbers[0].decimals
    return None


def _trailing_zeros(count: Fraction) -> int:
    """10 to the number of zeros that a whole number ends with (1 for zero)."""
    power, value = 1, int(count)
    while value and value % 10 == 0:
        power, value = power * 10, value // 10
    return power
