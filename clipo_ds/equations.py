"""Whether one equation is true, and whether it can be judged at all.

Layer L1, between `clipo_ds.expressions` and `clipo_ds.steps`; no torch. An `Equation` is one link of a running
equality with both sides parsed. Its verdict is True, False, or None: nothing to count. A link that comes out false is
called so only when nothing around it leaves its extent or its meaning in doubt. The rules for that were found by
reading what the check flagged in human solutions of MATH and GSM8K; each names its example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from clipo_ds.expressions import Expression, parse_expression, singular
from clipo_ds.mathtokens import Kind, TokenList
from clipo_ds.mathwords import (
    COMPUTING_WORDS,
    CONNECTIVES,
    FRACTION_WORDS,
    JOINING_WORDS,
    LABEL_WORDS,
    PRODUCT_SIGNS,
    REMAINDER_WORDS,
    UNITS,
)
from clipo_ds.rationals import Unknown

APPROXIMATION_TOLERANCE = Fraction(1, 100)
"""Relative difference that an "about equal" allows between two sides neither of which is a plain number."""
FLOAT_PLACE, FLOAT_TOLERANCE = Fraction(1, 10**10), Fraction(1, 10**9)
"""A number shown to ten or more decimals may be off by this share: a calculator prints 0.30000000000000004."""
ROOT_TOLERANCE = Fraction(1, 10**25)
"""Absolute difference of two equal sides: irrational roots are cut."""
MIN_ROUNDED_DIGITS = 3
"""A whole number stated with an equals sign counts as a rounding from this many digits on."""
MAX_READ_AGAIN = 400
"""A longer equation, in tokens, is not read a second way: if the first one makes it false, it is not counted."""


@dataclass(frozen=True)
class Equation:
    """One link `left = right` with what its judgement depends on."""

    source: TokenList
    left: Expression
    right: Expression
    approximate: bool
    torn: bool  # an operator without an operand touches one of the sides: price * 3 + 4 = 10, 3 + 4 = 7 - tax
    in_chain: bool  # something was computed further left in the same running equality
    exact: Fraction | None  # what the left side is the rounding of, where the link before said so

    def judge(self) -> bool | None:
        """True, False, or None where there is nothing to count."""
        for side in (self.left, self.right):
            if isinstance(side.value, Unknown) and not side.value.undefined:
                return None
        if self.num_operations == 0 and not self.in_chain:
            return None
        if self.holds():
            return True
        return None if self.in_doubt() else False

    @property
    def num_operations(self) -> int:
        return self.left.operations + self.right.operations

    @property
    def span(self) -> tuple[int, int]:
        """Characters from the left side to the end of the right one, without its trailing units."""
        tokens, last = self.source.tokens, self.right.stop - 1
        while tokens[last].kind is Kind.WORD:
            last -= 1
        return tokens[self.left.start].start, tokens[last].end

    @property
    def stated_and_actual(self) -> tuple[Fraction | None, Fraction | None]:
        """Value of the plain number of the two sides (of the right one if neither or both are), and of the other."""
        left, right = (side.value if isinstance(side.value, Fraction) else None for side in (self.left, self.right))
        return (left, right) if self.left.operations == 0 < self.right.operations else (right, left)

    # Truth.
    def holds(self) -> bool:
        """Whether the link is true under any customary reading of its notation."""
        if self.sides_agree(self.left, self.right, self.exact):
            return True
        if self.right.stop - self.left.start > MAX_READ_AGAIN:
            return False
        features = sorted(self.left.features | self.right.features)
        for readings in (frozenset(chosen) for size in (1, 2) for chosen in combinations(features, size)):
            left = parse_expression(self.source, self.left.start, self.left.stop, readings)
            right = parse_expression(self.source, self.right.start, self.right.stop, readings)
            if left.stop == self.left.stop and self.sides_agree(left, right, None):
                return True
        return False

    def sides_agree(self, left: Expression, right: Expression, exact: Fraction | None) -> bool:
        if isinstance(left.value, Unknown) or isinstance(right.value, Unknown):
            return False
        for scale_left, scale_right in _percent_scales(left, right):
            a, b = left.value * scale_left, right.value * scale_right
            candidates = [a] if exact is None else [a, exact * scale_left]
            for value in candidates:
                if abs(value - b) <= ROOT_TOLERANCE:
                    return True
                if self.rounds(value, right, b, scale_right):
                    return True
            if self.rounds(b, left, a, scale_left):
                return True
            if self.approximate and abs(a - b) <= APPROXIMATION_TOLERANCE * max(abs(a), abs(b)):
                return _unit_of_last_place(self.source, left) is _unit_of_last_place(self.source, right) is None
        return False

    def rounds(self, value: Fraction, side: Expression, stated: Fraction, scale: Fraction) -> bool:
        """Whether `side` is a plain number and the rounding of `value` to the digits it shows."""
        place = _unit_of_last_place(self.source, side)
        if place is None:
            return False
        place *= scale
        if place <= FLOAT_PLACE and abs(value - stated) <= abs(value) * FLOAT_TOLERANCE:
            return True
        if self.approximate:
            return abs(value - stated) <= place * _trailing_zeros(stated / place)
        digits = len(str(abs(stated / place).numerator))
        shows_decimals = place < 1
        return abs(value - stated) * 2 <= place and (shows_decimals or digits >= MIN_ROUNDED_DIGITS)

    # Doubt.

    def in_doubt(self) -> bool:
        """Whether a link that comes out false may only have been misread."""
        many_readings = bool(self.left.features | self.right.features)
        return (
            self.torn
            or (many_readings and self.right.stop - self.left.start > MAX_READ_AGAIN)
            or self.left.ambiguous
            or self.right.ambiguous
            or self.left_begins_in_doubt()
            or self.right_ends_in_doubt()
            or self.units_in_doubt()
            or self.is_share()
            or self.defines_operation()
        )

    def left_begins_in_doubt(self) -> bool:
        tokens, start = self.source.tokens, self.left.start
        first = tokens[start]
        before = tokens[start - 1] if start else None
        lone = self.left.operations == 0 and not self.in_chain
        if lone and self.left.numbers_with_unit:
            return True  # the price of 2 pens = 3 * 4
        if before is None:
            return False
        if before.kind is Kind.RELATION:
            return "of" in self.left.features  # = 1/4 of the 2^8 = 256 sequences
        if before.kind is Kind.BREAK:
            stuck = not first.gap or first.kind is Kind.OPERATOR
            return before.text in ("\n", "\\") or (before.text in (")", "]", "}", "|") and stuck)
        if not first.gap and "$" not in self.source.text[before.end : first.start]:
            return True  # 15 USD(6/1)
        return self.words_compute(start, lone and not first.dollar)

    def words_compute(self, start: int, plain_number: bool) -> bool:
        """Whether the words before token `start` may belong to the left side, or name what it begins with."""
        before = self.source.tokens[max(start - 2, 0) : start]
        words = [token.text.lower() for token in before if token.kind is Kind.WORD]
        word = words[-1] if words else ""
        if word == "of":
            return len(words) > 1 and words[0] in FRACTION_WORDS  # half of 10 + 3 = 8
        if word in JOINING_WORDS and self.number_before(start - 1):
            return True  # 5 more than 3 * 2 = 11
        if plain_number and word not in CONNECTIVES:
            return True  # interest in year 2 = 3 * 4
        return word in COMPUTING_WORDS or word in LABEL_WORDS

    def number_before(self, index: int) -> bool:
        """Whether one of the three tokens before `index` is a number that stands in the prose, in no equation."""
        tokens = self.source.tokens
        for near in range(index - 1, max(index - 4, -1), -1):
            if tokens[near].kind in (Kind.BREAK, Kind.RELATION, Kind.OPERATOR):
                return False
            if tokens[near].kind is Kind.NUMBER:
                return near == 0 or tokens[near - 1].kind in (Kind.WORD, Kind.BREAK)
        return False

    def right_ends_in_doubt(self) -> bool:
        tokens, stop = self.source.tokens, self.right.stop
        after = tokens[stop] if stop < len(tokens) else None
        if after is None:
            return False
        if after.kind is Kind.BREAK:
            following = tokens[stop + 1].text.lower() if stop + 1 < len(tokens) else ""
            if after.text == "\\" or (after.text == "\n" and following in tuple("+-*/")):
                return True
            if after.text in ("(", "[", "{", "|") and not after.gap:
                return True
            return after.text == "(" and following in ("mod", "modulo", r"\mod")
        divides = any(token.text == "/" for token in tokens[self.left.start : self.left.stop])
        words = {token.text.lower() for token in tokens[stop : stop + 3]} | set(self.right.units)
        return after.text.lower() in ("mod", "modulo") or (divides and bool(words & REMAINDER_WORDS))

    def units_in_doubt(self) -> bool:
        following = self.source.tokens[self.right.stop : self.right.stop + 2]
        right_units = self.right.units | {singular(token.text) for token in following if token.kind is Kind.WORD}
        left, right = _first_names(self.left.units), _first_names(right_units)
        if left & UNITS.keys() and _mixes_measures(left | right):
            return True  # 1 hour + 30 minutes = 90 minutes
        if "triangle" in right and self.signs(self.left) | self.signs(self.right) == {"-"}:
            return True  # a 6-8-10 triangle
        if self.right.value == 1 and self.left.operations == 1 and self.left.numbers_with_unit > 1:
            return True  # 7 knicks / 2 knacks = 1, a conversion factor
        if self.num_operations == 0 and (left or right):
            return True  # … = 3 boxes = 36 eggs
        sums_things = self.left.additions == self.left.operations > 0
        all_named = self.left.numbers_with_unit == self.left.numbers
        return sums_things and all_named and bool(right) and not left & right  # 3 adults + 2 children = $40

    def signs(self, side: Expression) -> set[str]:
        """The operators of a side as they are written."""
        tokens = self.source.tokens[side.start : side.stop]
        return {self.source.text[token.start : token.end] for token in tokens if token.kind is Kind.OPERATOR}

    def is_share(self) -> bool:
        """2/5 = 10 (people): a proportion told as an equation."""
        left, right = self.left, self.right
        proper = isinstance(left.value, Fraction) and 0 < left.value < 1
        tokens = self.source.tokens[left.start : left.stop]
        divides = any(token.text == "/" or token.kind is Kind.FRACTION for token in tokens)
        return proper and divides and left.operations == 1 and right.operations == 0 and _is_whole(right)

    def defines_operation(self) -> bool:
        """3 * 2 = 3^2 + 3 \\cdot 2: a lone star before another sign for products is an operation the text defines."""
        left, right = self.signs(self.left), self.signs(self.right)
        return r"\ast" in left | right or (left == {"*"} and bool(right & PRODUCT_SIGNS))


def _first_names(units: frozenset[str]) -> set[str]:
    """Unit words with metres, meters and m made one."""
    return {UNITS[unit][1] if unit in UNITS else unit for unit in units}


def _mixes_measures(units: set[str]) -> bool:
    """Whether two units measure the same kind of thing: hours and minutes, dollars and cents."""
    dimensions = [UNITS[unit][0] for unit in units if unit in UNITS]
    return len(dimensions) > len(set(dimensions))


def _is_whole(side: Expression) -> bool:
    return isinstance(side.value, Fraction) and side.value.denominator == 1 and side.value > 0


def _percent_scales(left: Expression, right: Expression) -> Iterator[tuple[Fraction, Fraction]]:
    """Factors to compare two sides under: 40/200 * 100 = 20% and 100% - 30% = 70 leave a percent sign out."""
    yield Fraction(1), Fraction(1)
    if right.percents and not left.percents and right.operations == 0:
        yield Fraction(1), Fraction(100)
    if left.percents and not right.percents and left.percents == left.numbers and left.additions == left.operations:
        yield Fraction(100), Fraction(1)


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
