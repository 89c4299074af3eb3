"""Tokens -> the exact value of an arithmetic expression, with what the judge of an equation must know about its form.

Layer L1, beside `clipo_ds.mathtext`; no torch. A precedence parser over `fractions.Fraction`: sums, products, signs,
powers, factorials, percentages, fractions, mixed numbers, roots, binomials, units between numbers and operators. It
evaluates while it parses; no `eval`, and every number it holds is bounded (`clipo_ds.rationals`), so that a text cannot
make it slow: what outgrows the bound is unknown, not wrong.

Notation that has two customary meanings (2\\frac{1}{2}, 6/2(1+2), 50 - 20%) sets a feature; `READINGS` says which other
reading it has, and whoever judges an equation tries both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from clipo_ds.mathtokens import PI_SIGN, Kind, Token, TokenList
from clipo_ds.operands import OperandReader
from clipo_ds.rationals import Unknown, Value, apply, unrounded

MAX_DEPTH = 30
"""Brackets nested deeper than this are not read."""
READINGS = (
    "mixed",  # 2\frac{1}{2} is a product, not two and a half
    "tight",  # 6/2(1+2): what is written side by side is multiplied first
    "scale",  # 5 dozen: a unit, not 60
    "relative",  # 50 - 20%: a fifth of the 50 is taken off, as on a calculator
    "exclamation",  # 7! is said loudly
    "dash",  # a leading " - " is punctuation
    "of",  # = 6/7 of her 2 pints: the "of" belongs to the prose
    "fraction",  # 9 / 1/2, 6 / 1 / 3: the divisor is a fraction
    "scientific",  # 6 * 10^8 / 2 * 10^3: so is 2 * 10^3 one number
    "and",  # = 7 and 1/2 is not seven and a half
    "floor",  # [100/7]: the whole part, in square brackets
    "decimal",  # 2.857 stands for 20/7
    "superscript",  # 32 + 42 is 3^2 + 4^2, copied without its markup
    "pi",  # no customary reading: with 3 for pi it shows whether pi cancels
)
"""Features of an expression that has a second customary reading, and what that reading is."""


@dataclass(frozen=True)
class Expression:
    """One parsed expression, tokens [start, stop), trailing units included where the range ends behind them."""

    start: int
    stop: int
    value: Value
    operations: int  # binary operators, powers, factorials, roots, fractions
    additions: int
    numbers: int
    percents: int
    numbers_with_unit: int
    units: frozenset[str]  # unit words, lower case, without plural s; "dollar" for a currency sign
    ambiguous: bool  # 5 (6): a product, or a number and a remark; 3^15^2: a tower, or two powers in careless LaTeX
    features: frozenset[str]  # of READINGS


class _Parser(OperandReader):
    """One parse of one expression. Methods take a token index and the index where their range ends, and return
    a value (None once anything unknown was met) and the index after what they read."""

    def __init__(
        self, source: TokenList, readings: frozenset[str], unknown: tuple[str, Fraction] | None = None
    ) -> None:
        super().__init__(source)
        self.letter = unknown
        self.latex = source.latex
        self.readings = readings
        self.features: set[str] = set()
        self.unknown: Unknown | None = None
        self.operations = self.additions = self.numbers = self.percents = 0

    # Values. Every one of them goes through `combine`, which gives up on unknown operands and on overgrown numbers.

    def fail(self, undefined: bool = False) -> None:
        if self.unknown is None or not undefined:  # no arithmetic outweighs no value
            self.unknown = Unknown(undefined)

    def combine(
        self, left: Fraction | None, operator: str, right: Fraction | None, num_operations: int = 1
    ) -> Fraction | None:
        self.operations += num_operations
        self.additions += operator in "+-"
        if left is None or right is None:
            return None
        value = apply(left, operator, right)
        if isinstance(value, Unknown):
            self.fail(value.undefined)
            return None
        return value

    # Grammar.

    def sum(self, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        value, index = self.product(index, stop, depth, leading=True)
        while index < stop:
            token = self.tokens[index]
            if token.kind is not Kind.OPERATOR or token.text not in "+-" or not self.is_operand(index + 1, stop):
                break
            begin = index + 1
            term, index = self.product(begin, stop, depth)
            if self.is_percentage(begin, index):
                self.features.add("relative")
                if "relative" in self.readings:
                    term = self.combine(value, "*", term)
            value = self.combine(value, token.text, term)
        return value, index

    def product(self, index: int, stop: int, depth: int, leading: bool = False) -> tuple[Fraction | None, int]:
        value, index = self.signed(index, stop, depth, leading and depth == 0)
        divided = False
        while index < stop:
            token = self.tokens[index]
            if token.kind is Kind.OPERATOR and token.text in ("*", "/", "mod", "of", "%"):
                if not self.is_operand(index + 1, stop):
                    break
                if token.text == "of":
                    self.features.add("of")
                    if "of" in self.readings and depth == 0:
                        break
                read = self.divisor if token.text == "/" else self.signed
                right, index = read(index + 1, stop, depth)
                value = self.combine(value, {"%": "mod", "of": "*"}.get(token.text, token.text), right)
                divided |= token.text == "/"
            elif self.is_operand(index, stop, signed=False):
                if divided:
                    self.features.add("tight")
                right, index = self.beside(index, stop, depth)
                value = self.combine(value, "*", right)
            else:
                break
        return value, index

    def signed(self, index: int, stop: int, depth: int, leading: bool = False) -> tuple[Fraction | None, int]:
        negative = False
        while self.tokens[index].kind is Kind.OPERATOR and self.tokens[index].text in "+-":
            minus = self.tokens[index].text == "-"
            if leading and minus and index + 1 < stop and self.tokens[index + 1].gap:
                self.features.add("dash")
                minus = "dash" not in self.readings
            negative ^= minus
            index += 1
        value, index = self.power(index, stop, depth)
        while "tight" in self.readings and index < stop and self.is_operand(index, stop, signed=False):
            right, index = self.beside(index, stop, depth)
            value = self.combine(value, "*", right)
        return (-value if negative and value is not None else value), index

    def divisor(self, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        """What stands behind a division sign: one factor, or a fraction or a power of ten that is one number."""
        tokens = self.tokens
        upper = tokens[index].value
        if upper is not None and index + 2 < stop and tokens[index + 1].text == "/":
            lower = tokens[index + 2].value
            set_off = tokens[index].gap and not (tokens[index + 1].gap or tokens[index + 2].gap)
            if lower is not None and upper.denominator == lower.denominator == 1 and (set_off or upper < lower):
                self.features.add("fraction")
                if "fraction" in self.readings:
                    self.numbers += 1
                    divisor, index = self.signed(index + 2, stop, depth)
                    return self.combine(upper, "/", divisor), index
        value, index = self.signed(index, stop, depth)
        if [token.text for token in tokens[index : min(index + 3, stop)]] == ["*", "10", "^"]:
            self.features.add("scientific")
            if "scientific" in self.readings:
                power, index = self.signed(index + 1, stop, depth)
                return self.combine(value, "*", power), index
        return value, index

    def beside(self, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        """A factor written beside the one before: (1/2)(6), 3(4+5), 2\\sqrt{9}; two bare numbers are no product."""
        token, before = self.tokens[index], self.tokens[index - 1]
        if token.kind is Kind.NUMBER and token.text != PI_SIGN and (before.kind is not Kind.CLOSE or token.gap):
            self.fail()
        self.ambiguous |= token.kind is Kind.NUMBER and before.text == ")"  # (5)2: a factor, or a power
        if token.kind is Kind.OPEN and token.gap and before.kind is Kind.NUMBER:
            inside = self.tokens[index + 1 : min(self.partner[index], index + 9)]
            self.ambiguous |= all(part.kind in (Kind.NUMBER, Kind.WORD, Kind.SCALE) for part in inside)
        return self.power(index, stop, depth)

    def power(self, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        value, index = self.primary(index, stop, depth)
        while index < stop:
            token = self.tokens[index]
            if token.kind is Kind.SCALE:
                self.features.add("scale")
                if "scale" not in self.readings:  # 5 dozen is a number, not a product
                    value = self.combine(value, "*", token.value, num_operations=0)
            elif token.kind is not Kind.OPERATOR:
                break
            elif token.text == "!":
                self.features.add("exclamation")
                value = value if "exclamation" in self.readings else self.combine(value, "!", Fraction(0))
            elif token.text == "%" and not self.is_modulo(index, stop):
                self.percents += 1
                value = None if value is None else value / 100
            elif token.text == "^":
                exponent, index = self.exponent(index + 1, stop, depth)
                value = self.combine(value, "^", exponent)
                continue
            else:
                break
            index += 1
        return value, self.after_units(index, stop)

    def exponent(self, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        negative = index < stop and self.tokens[index].kind is Kind.OPERATOR and self.tokens[index].text == "-"
        index += negative
        if depth >= MAX_DEPTH or not self.is_operand(index, stop, signed=False):
            self.fail()
            return None, max(index, min(index + 1, stop))
        if self.latex and self.tokens[index].end - self.tokens[index].start > 1:
            self.ambiguous |= self.tokens[index].kind is Kind.NUMBER  # ^24 is ^{2}4 in LaTeX
        value, index = self.primary(index, stop, depth + 1)
        if index < stop and self.tokens[index].kind is Kind.OPERATOR and self.tokens[index].text == "^":
            self.ambiguous = True
            upper, index = self.exponent(index + 1, stop, depth + 1)
            value = self.combine(value, "^", upper)
        return (-value if negative and value is not None else value), index

    def primary(self, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        token = self.tokens[index]
        if token.kind is Kind.NUMBER:
            self.numbers += 1
            if token.currency:
                self.units.add("dollar")
            if token.text == PI_SIGN:
                self.features.add("pi")
                return (Fraction(3) if "pi" in self.readings else token.value), index + 1
            return self.mixed(token, index + 1, stop, depth)
        if token.kind is Kind.OPEN:
            return self.bracket(index, depth)
        if token.kind is Kind.ROOT:
            degree: Fraction | None = Fraction(2)
            if index + 1 < stop and self.tokens[index + 1].text == "[" and index + 1 in self.partner:
                degree, index = self.bracket(index + 1, depth)
                index -= 1
            value, index = self.argument(index + 1, stop, depth)
            return self.combine(value, "root", degree), index
        if token.kind in (Kind.FRACTION, Kind.BINOMIAL):
            upper, index = self.argument(index + 1, stop, depth)
            lower, index = self.argument(index, stop, depth)
            return self.combine(upper, "/" if token.kind is Kind.FRACTION else "choose", lower), index
        following = self.tokens[index + 1] if index + 1 < len(self.tokens) else None
        calls = following is not None and following.kind is Kind.OPEN and not following.gap
        if self.letter is not None and token.text == self.letter[0] and not calls:
            return self.letter[1], index + 1
        self.fail()
        return None, index + 1

    def argument(self, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        if index < stop and self.tokens[index].kind is Kind.NUMBER:
            return self.tokens[index].value, index + 1
        if index < stop and self.tokens[index].kind is Kind.OPEN:
            return self.bracket(index, depth)
        self.fail()
        return None, index

    def bracket(self, index: int, depth: int) -> tuple[Fraction | None, int]:
        close = self.partner[index]
        if depth >= MAX_DEPTH or not self.is_operand(index + 1, close):
            self.fail()
            return None, close + 1
        value, end = self.sum(index + 1, close, depth + 1)
        if end != close:
            self.fail()
        if self.tokens[index].text == "|":
            self.operations += 1
            value = None if value is None else abs(value)
        elif self.tokens[index].text == "[" and value is not None and value.denominator != 1:
            self.features.add("floor")
            value = Fraction(math.floor(value)) if "floor" in self.readings else value
        return value, close + 1

    def mixed(self, token: Token, index: int, stop: int, depth: int) -> tuple[Fraction | None, int]:
        """A number, and the fraction of a mixed number behind it: 2\\frac{1}{2}, 2 1/2."""
        value = token.value
        assert value is not None
        if "superscript" in self.readings:
            value = lost_power(token.text) or value
        if token.decimals > 1:
            self.features.add("decimal")
            value = unrounded(value, token.decimals) if "decimal" in self.readings else value
        if index >= stop or value.denominator != 1:
            return value, index
        following = self.tokens[index]
        if following.text == "and" and depth == 0:
            added, end = self.fraction_at(index + 1)
            in_chain = (
                index > 1
                and end < len(self.tokens)
                and {self.tokens[index - 2].kind, self.tokens[end].kind} == {Kind.RELATION}
            )  # = 2 and 3/6 = 2 and 1/2
            if added is not None and (self.ends_statement(end) or in_chain):  # = 3 and 2/3
                self.features.add("and")
                return (value, index) if "and" in self.readings else (value + added, end)
        if following.kind is Kind.FRACTION:
            self.features.add("mixed")
            if "mixed" not in self.readings:
                fraction, index = self.primary(index, stop, depth)
                return self.combine(value, "+", fraction), index
        elif (
            following.kind is Kind.NUMBER and following.gap and index + 2 < stop and self.tokens[index + 1].text == "/"
        ):
            upper, lower = following.value, self.tokens[index + 2].value
            whole = upper is not None and lower is not None and upper.denominator == lower.denominator == 1
            if self.tokens[index + 2].kind is Kind.NUMBER and whole and upper < lower:  # type: ignore[operator]
                return value + upper / lower, index + 3  # type: ignore[operator]
        return value, index


def parse_expression(
    source: TokenList,
    start: int,
    stop: int,
    readings: frozenset[str] = frozenset(),
    unknown: tuple[str, Fraction] | None = None,
) -> Expression:
    """Parse the longest expression that begins at token `start` and ends before token `stop`.

    `readings` names the features of `READINGS` that are to be read the other way. An operand must stand at `start`
    (`begins_expression`). `unknown` is a letter and the value to read it with.

    >>> from clipo_ds.mathtext import read_tokens
    >>> source = read_tokens("2 green hats + 3(4 - 1) hats are")
    >>> parse_expression(source, 0, len(source.tokens)).value
    Fraction(11, 1)
    """
    parser = _Parser(source, readings, unknown)
    value, end = parser.sum(start, stop, 0)
    if value is None or parser.unknown is not None:
        result: Value = parser.unknown or Unknown(undefined=False)
    else:
        result = value
    return Expression(
        start,
        end,
        result,
        parser.operations,
        parser.additions,
        parser.numbers,
        parser.percents,
        parser.numbers_with_unit,
        frozenset(parser.units),
        parser.ambiguous,
        frozenset(parser.features),
    )


def begins_expression(source: TokenList, index: int, stop: int) -> bool:
    return OperandReader(source).is_operand(index, stop)


def is_remark(source: TokenList, index: int) -> bool:
    """Whether the bracket that opens at a token says something in words: 7 (apples)."""
    return OperandReader(source).is_remark(index)


def lost_power(text: str) -> Fraction | None:
    """The value of digits that may be a square, a cube or a power of ten without its markup: 9 for 32, 1000 for 103."""
    if len(text) < 2 or not text.isdecimal() or len(text) > 3:
        return None
    base, exponent = divmod(int(text), 10)
    return Fraction(base**exponent) if exponent in (2, 3) or (base == 10 and exponent > 1) else None
