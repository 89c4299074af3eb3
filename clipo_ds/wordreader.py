"""The words of a text with arithmetic in it: operators, relations, units, prose, or letters of algebra.

Layer L1, no torch; `clipo_ds.mathtext` builds its reader on this. What a word is depends on the tokens before it and on
a bounded stretch of the text behind it.
"""

from __future__ import annotations

from fractions import Fraction

from clipo_ds import mathpatterns as patterns
from clipo_ds.mathtokens import PI_SIGN, Kind, Token
from clipo_ds.mathwords import (
    GLUED_UNITS,
    LETTER_UNITS,
    MONEY_BEFORE,
    RELATION_WORDS,
    SCALES,
    SHORT_WORDS,
    WORD_OPERATORS,
)
from clipo_ds.rationals import PI

TRANSPARENT, PROSE = -1, -2
"""Kinds of groups in braces that leave no token: \\boxed{7}, and \\text{ m/s} whose letters are words."""


_SPECIAL_WORDS = frozenset(
    {"x", "pi", PI_SIGN, "sqrt", "percent", "pct", "squared", "cubed", *MONEY_BEFORE, *RELATION_WORDS, *SCALES}
    | WORD_OPERATORS.keys()
)


class WordReader:
    """State of one pass, the tokens so far and what the next token depends on; and how words are read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[Token] = []
        self.annotations: list[Token] = []
        self.gap = False
        self.latex = "\\" in text
        self.dollar_end = self.currency_end = -1  # where the last dollar sign ended, and the last that is money
        self.digits_wanted = 0  # single-digit arguments that a \frac or \sqrt still takes
        self.braces: list[int] = []  # open braces: digits_wanted after the closing one, or one of the two below
        self.prose = 0  # how many of them hold words
        self.in_root_index = False  # of \sqrt[3]{8}
        self.transparent_next = 0  # what the group behind a transparent command holds
        self.asy_closes = True
        self.num_dollars = 0

    def emit(self, kind: Kind, start: int, end: int, text: str | None = None, value: Fraction | None = None,
             decimals: int = 0) -> None:  # fmt: skip
        shown = self.text[start:end] if text is None else text
        dollar, currency = self.dollar_end == start, self.currency_end == start
        self.tokens.append(Token(kind, shown, start, end, self.gap, value, decimals, dollar, currency))
        self.gap = False

    def after_operand(self) -> bool:
        if not self.tokens:
            return False
        last = self.tokens[-1]
        operand = (Kind.NUMBER, Kind.CLOSE, Kind.VARIABLE, Kind.WORD, Kind.SCALE)
        return last.kind in operand or (last.kind is Kind.OPERATOR and last.text in "%!")

    def is_prose_unit(self, end: int) -> bool:
        """Whether a letter in a group of words may be a unit: 6 \\text{ m/s}, but not in 8\\text{C}3."""
        behind = self.after_operand() or (bool(self.tokens) and self.tokens[-1].text == "/")
        return behind and patterns.INDEXED.match(self.text, end) is None

    def glued(self, start: int) -> bool:
        """Whether the last token is a number that ends where this one starts."""
        return bool(self.tokens) and self.tokens[-1].kind is Kind.NUMBER and self.tokens[-1].end == start

    def on_phrase(self, start: int, end: int) -> None:
        if patterns.OPERAND_AHEAD.match(self.text, end):
            self.emit(Kind.OPERATOR, start, end, "/" if self.text[start] == "d" else "*")
        else:
            self.emit(Kind.WORD, start, end)

    def on_word(self, start: int, end: int) -> int | None:
        word, following = self.text[start:end], self.text[end : end + 1]
        lower = word.lower()
        named = following == "_" or (following.isascii() and following.isdigit())  # x1, a_n, but not cm²
        if lower in _SPECIAL_WORDS and (not named or lower == "x"):
            stop = self.read_special(lower, start, end)
            if stop is not None:
                return stop
        if named:
            stop = end
            while stop < len(self.text) and (self.text[stop].isalnum() or self.text[stop] == "_"):
                stop += 1
            self.emit(Kind.VARIABLE, start, stop)
            return stop
        if self.prose and word in LETTER_UNITS and self.is_prose_unit(end):
            self.emit(Kind.WORD, start, end)  # 6 \\text{ m/s}
        elif following == "(" or self.is_variable(word, self.glued(start), end):
            self.emit(Kind.VARIABLE, start, end)
        else:
            self.emit(Kind.WORD, start, end)
        return None

    def read_special(self, word: str, start: int, end: int) -> int | None:
        """Read a word that may be an operator, a relation or a number, and say where it ends; None where it is none."""
        if word == "x":
            if not (self.after_operand() and self.x_multiplies(start, end)):
                return None
            self.emit(Kind.OPERATOR, start, end, "*")
        elif word in (PI_SIGN, "pi"):
            self.emit(Kind.NUMBER, start, end, PI_SIGN, PI)
        elif word == "sqrt":
            if not patterns.BRACKET_AHEAD.match(self.text, end):
                return None
            self.emit(Kind.ROOT, start, end)
        elif word in MONEY_BEFORE:  # Rs 50, Rs. 50: as a dollar sign
            amount = None if self.after_operand() else patterns.AMOUNT_AHEAD.match(self.text, end)
            if amount is None:
                return None
            self.dollar_end = self.currency_end = end = amount.end()
        elif word in RELATION_WORDS:
            sign, end = self.relating(word, start, end) or ("", end)
            if not sign:
                return None
            self.emit(Kind.RELATION, start, end, sign)
        elif word in SCALES:
            self.emit(Kind.SCALE, start, end, word, Fraction(SCALES[word]))
        elif word in WORD_OPERATORS:
            if not self.word_operates(word, end):
                return None
            self.emit(Kind.OPERATOR, start, end, WORD_OPERATORS[word])
            if word == "of":  # "20% of the 50 apples": the article is no unit
                article = patterns.ARTICLE.match(self.text, end)
                end = article.end() if article else end
                maths = patterns.MATHS_AHEAD.match(self.text, end)
                end = maths.end() if maths else end
        elif not self.after_operand():
            return None
        elif word in ("percent", "pct"):
            self.emit(Kind.OPERATOR, start, end, "%")
        else:
            self.emit(Kind.OPERATOR, start, end, "^")
            self.emit(Kind.NUMBER, end, end, value=Fraction(2 if word == "squared" else 3))
        return end

    def x_multiplies(self, start: int, end: int) -> bool:
        """Whether an x behind an operand is a times sign: not in 2x\\sqrt{3}, 4 x-1, nor at the end of a line."""
        last = self.tokens[-1]
        if last.end == start and (last.kind is Kind.NUMBER or last.text == "}"):
            return patterns.DIGIT_AHEAD.match(self.text, end) is not None
        if self.gap and patterns.NEGATIVE_AHEAD.match(self.text, end):
            return True  # 5 x -3
        return patterns.FACTOR_AHEAD.match(self.text, end) is not None

    def on_compound(self, start: int, end: int) -> None:
        self.emit(Kind.WORD, start, end)  # base-8

    def word_operates(self, word: str, end: int) -> bool:
        """Whether a word between operands is an operator: 3 times 4, and 20% of 50 or 1/2 of 30 but not 3 of 4."""
        if word != "of":
            if word == "mod" and self.tokens and self.tokens[-1].kind is Kind.WORD:
                return False
            return patterns.OPERAND_AHEAD.match(self.text, end) is not None
        if patterns.OF_AHEAD.match(self.text, end) is None or not self.tokens:
            return False
        at, last = len(self.tokens) - 1, self.tokens[-1]
        own_maths = last.kind is Kind.BREAK and self.text[last.start : last.end] == r"\)"
        at -= own_maths  # \(25\%\) of 60
        if at < 0 or not self.is_share(at):
            return False
        if own_maths:
            self.tokens.pop()
        return True

    def is_share(self, at: int) -> bool:
        """Whether token `at` ends a percentage or a fraction."""
        last = self.tokens[at]
        if last.kind is not Kind.NUMBER:
            return last.kind is Kind.CLOSE or (last.kind is Kind.OPERATOR and last.text == "%")
        divided = any(token.text == "/" or token.kind is Kind.FRACTION for token in self.tokens[max(at - 1, 0) : at])
        divided |= at > 1 and self.tokens[at - 2].kind is Kind.FRACTION  # \frac12
        return divided or (last.value is not None and 0 < last.value < 1)

    def relating(self, word: str, start: int, end: int) -> tuple[str, int] | None:
        """The relation that a word states, and where it ends: 3 + 4 equals 7, is equal to 7, is 7, is about 7."""
        sign = "?" if patterns.NEGATED.search(self.text[max(start - 10, 0) : start]) else "="
        if word in ("equal", "equals"):
            to = patterns.TO.match(self.text, end)
            end = to.end() if to else end
            sides = self.after_operand() and patterns.OPERAND_AHEAD.match(self.text, end)
            return (sign, end) if sides or (sign == "?" and self.after_operand()) else None
        equal = patterns.EQUAL_TO.match(self.text, end)
        if equal and self.after_operand():
            return ("?" if equal["no"] else sign), equal.end()
        if word in ("comes", "adds", "amounts", "results"):
            comes = patterns.COMES_TO.match(self.text, end)
            if comes is None:
                return None
            end = comes.end()
        gives_us = patterns.US.match(self.text, end) if word in ("gives", "makes", "yields") else None
        end = gives_us.end() if gives_us else end
        about = patterns.ABOUT.match(self.text, end)
        stop = about.end() if about else end
        if sign == "=" and self.after_computation() and patterns.STATED_AHEAD.match(self.text, stop):
            return ("~" if about else "="), stop
        return None

    def after_computation(self) -> bool:
        """Whether the text just computed something (3 + 4, 2 * 5 apples); 5, 9/11 and 3-5 are no such thing."""
        at = len(self.tokens) - 1
        for _ in range(2):
            at -= at > 0 and self.tokens[at].kind is Kind.WORD
        if at < 2 or self.tokens[at].kind is not Kind.NUMBER:
            return at >= 2 and self.tokens[at].kind is Kind.CLOSE
        operator = self.tokens[at - 1]
        tight = operator.text in "-/" and not (operator.gap and self.tokens[at].gap)
        after_word = self.tokens[at - 2].kind is Kind.WORD and operator.text in "+-"
        return operator.kind is Kind.OPERATOR and not tight and not after_word

    def is_variable(self, word: str, glued: bool, end: int) -> bool:
        if glued or word in GLUED_UNITS:
            return word not in GLUED_UNITS
        if len(word) == 2:
            return word.lower() not in SHORT_WORDS
        if len(word) > 2:
            return patterns.NO_WORD.fullmatch(word) is not None
        return word not in ("a", "A", "I") or patterns.AFTER_ARTICLE.match(self.text, end) is None
