"""What may stand between operators: operands, units, remarks, and how far each reaches.

Layer L1, between `clipo_ds.mathtokens` and `clipo_ds.expressions`, whose parser is built on it; no torch. Nothing is
evaluated here, and every question looks at a bounded number of tokens.
"""

from __future__ import annotations

from fractions import Fraction

from clipo_ds.mathtokens import Kind, TokenList
from clipo_ds.mathunits import singular
from clipo_ds.mathwords import CLAUSE_WORDS, PARTS, PREPOSITIONS

MAX_UNIT_WORDS = 5
"""Words between a number and an operator; more are prose."""

_WORDS = {Kind.WORD, Kind.SCALE}
_FRACTION_SHAPES: tuple[tuple[str | Kind, ...], ...] = (
    ("n", "/", "n"),
    ("(", "n", "/", "n", ")"),
    (Kind.FRACTION, "{", "n", "}", "{", "n", "}"),
    (Kind.FRACTION, "n", "n"),
)
"""Tokens of a fraction: a number, a sign or a kind each."""
_OPERANDS = (Kind.NUMBER, Kind.FRACTION, Kind.BINOMIAL, Kind.ROOT, Kind.VARIABLE)


class OperandReader:
    """Questions about the tokens of one expression, and the units met so far."""

    def __init__(self, source: TokenList) -> None:
        self.tokens, self.partner = source.tokens, source.partner
        self.units: set[str] = set()
        self.numbers_with_unit = 0
        self.ambiguous = False

    def is_operand(self, index: int, stop: int, *, signed: bool = True) -> bool:
        for _ in range(3):  # a few signs
            if index >= stop:
                return False
            token = self.tokens[index]
            if token.kind in _OPERANDS:
                return True
            if token.kind is Kind.OPEN:
                return not self.is_remark(index)
            if not (signed and token.kind is Kind.OPERATOR and token.text in "+-"):
                return False
            index += 1
        return False

    def is_remark(self, index: int) -> bool:
        """Whether a bracket set off by a space is no factor: 3 + 4 (apples) = 7, 80 * 0.8 (20% off) = 64."""
        close = self.partner[index]
        if not self.tokens[index].gap or close - index > 8:
            return False
        inside = self.tokens[index + 1 : close]
        kinds = {token.kind for token in inside}
        if kinds <= _WORDS:
            return True
        signs = {token.text for token in inside if token.kind is Kind.OPERATOR}
        told = Kind.WORD in kinds and (inside[0].kind in _WORDS or signs == {"%"})
        signed = inside[0].text in ("+", "-")  # 80 (80%), 0.9 (-10%)
        rate = self.tokens[index - 1].kind is Kind.NUMBER and self.is_percentage(index + 1 + signed, close)
        return (rate or (told and signs <= {"%"})) and kinds <= {*_WORDS, Kind.NUMBER, Kind.OPERATOR}

    def is_percentage(self, begin: int, end: int) -> bool:
        return end - begin == 2 and self.tokens[begin].kind is Kind.NUMBER and self.tokens[begin + 1].text == "%"

    def is_modulo(self, index: int, stop: int) -> bool:
        """17 % 5 as in code, but 70\\%(10) is a share of 10."""
        if index + 1 >= stop or self.tokens[index + 1].kind is not Kind.NUMBER:
            return False
        sign, following = self.tokens[index : index + 2]
        return sign.gap == following.gap and sign.end - sign.start == 1

    def fraction_at(self, index: int) -> tuple[Fraction | None, int]:
        """Value of a proper fraction 2/3, (2/3), \\frac{2}{3}, \\frac23 or ⅔ at a token, and the index after it."""
        if index < len(self.tokens):
            whole = self.tokens[index].value
            if whole is not None and 0 < whole < 1 and not self.tokens[index].decimals:
                return whole, index + 1
            if self.tokens[index].text in ("a", "one") and index + 1 < len(self.tokens):  # and a half
                return PARTS.get(self.tokens[index + 1].text), index + 2
        for shape in _FRACTION_SHAPES:
            tokens = self.tokens[index : index + len(shape)]
            if len(tokens) == len(shape) and all(
                token.kind is Kind.NUMBER if sign == "n" else sign in (token.text, token.kind)
                for sign, token in zip(shape, tokens, strict=True)
            ):
                upper, lower = (token.value for token in tokens if token.kind is Kind.NUMBER)
                proper = upper is not None and lower is not None and upper.denominator == lower.denominator == 1
                if proper and 0 < upper < lower:  # type: ignore[operator]
                    return upper / lower, index + len(shape)  # type: ignore[operator]
        return None, index

    def ends_statement(self, index: int) -> bool:
        """Whether nothing computes or relates behind what ends before token `index`."""
        if index >= len(self.tokens):
            return True
        token = self.tokens[index]
        return (
            token.kind is Kind.BREAK
            or token.text == "%"
            or (token.kind in _WORDS and token.text.lower() not in ("of", "and", "or", "is"))
        )

    def after_units(self, index: int, stop: int) -> int:
        """Skip unit words (3 green hats + …, $5/hat * …) where an operator or the range's end follows them."""
        words: list[str] = []
        end, last_word, in_prose, told = index, False, 0, False
        while end < stop and len(words) <= MAX_UNIT_WORDS:
            token = self.tokens[end]
            joins = not words and token.text in ("and", "or")
            if token.kind in (Kind.WORD, Kind.SCALE) and not joins and token.text.lower() not in CLAUSE_WORDS:
                words.append(singular(token.text))
                in_prose = in_prose or (len(words) if words[-1] in PREPOSITIONS else 0)
                end, last_word = self.after_exponent(end + 1, stop), True  # cm^2
            elif token.text == "/" and end + 1 < stop and self.is_rate(end + 1, last_word):
                words.append(singular(self.tokens[end + 1].text))
                end = self.after_exponent(end + 2, stop)  # m/s^2
            elif token.kind is Kind.OPEN and self.is_remark(end):
                close = self.partner[end]
                told = any(inside.kind is Kind.NUMBER for inside in self.tokens[end:close])
                end = close + 1
            else:
                break
        at_end = end == stop
        operator_follows = not at_end and self.tokens[end].kind is Kind.OPERATOR and self.is_operand(end + 1, stop)
        if words and operator_follows and self.tokens[end].text in "+-":  # 35 terms before -17: a sign, no subtraction
            operator = self.tokens[end]
            hyphen = not operator.gap and self.tokens[end - 1].kind is Kind.WORD  # magnitude-$\sqrt{2}$
            set_off = self.tokens[end + 1].gap or not operator.gap or self.unit_follows(end + 1, stop, words)
            operator_follows = not hyphen and set_off
        if len(words) > MAX_UNIT_WORDS or not (at_end or operator_follows):
            return index
        self.ambiguous |= told
        if words:
            self.units.update(words[: in_prose - 1] if in_prose > 1 else words)
            self.numbers_with_unit += 1
        return end

    def after_exponent(self, index: int, stop: int) -> int:
        """Skip the exponent of a unit; one in braces too, as in \\text{m}^{2}."""
        if index + 1 < stop and self.tokens[index].text == "^":
            if self.tokens[index + 1].kind is Kind.NUMBER:
                return index + 2
            if self.tokens[index + 1].text == "{" and self.partner.get(index + 1) == index + 3 < stop:
                return index + 4
        return index

    def unit_follows(self, index: int, stop: int, words: list[str]) -> bool:
        """Whether the number or fraction at a token has one of these units: 1 whole cake -1/4 cake."""
        behind = self.tokens[index + 1 : min(index + 4, stop)]
        return any(token.kind is Kind.WORD and singular(token.text) in words for token in behind)

    def is_rate(self, index: int, after_word: bool) -> bool:
        """Whether a slash is followed by a unit: $5/glass, 60 km/h, but not 12/n."""
        token = self.tokens[index]
        return token.kind is Kind.WORD or (after_word and token.kind is Kind.VARIABLE and token.text.isalpha())
