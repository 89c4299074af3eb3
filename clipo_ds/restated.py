"""Sums under a name, and the value that the next line states under the same name: total = 31 + 15, total = 48.

Layer L1, between `clipo_ds.equations` and `clipo_ds.steps`; no torch. A name is all that stands before the equals sign,
a coefficient included: 5b = 3 - 20 says nothing about b = -17/5. A value is restated where the name comes again with
nothing between, and what was a computation is now simpler. Two roots or two prices under one name are no such thing:
x = 1/2, x = 3.
"""

from __future__ import annotations

import re
from fractions import Fraction

from clipo_ds.equations import Equation
from clipo_ds.expressions import Expression
from clipo_ds.mathtokens import Kind, TokenList
from clipo_ds.mathwords import ARTICLES

MAX_NAME = 12
"""A name has at most so many tokens."""
INEXACT = 10**20
"""A value with a larger denominator came from an irrational root."""
_LISTING = re.compile(r"(?<!\\)\(|item|quad|\N{BULLET}")
"""What stands between the parts of a question, or of a list."""
_FILLERS = ARTICLES | {"so", "then", "thus", "therefore", "hence", "now"}


class NamedSums:
    """The last name of a text with what was stated under it."""

    def __init__(self, source: TokenList) -> None:
        self.source = source
        self.name: tuple[str, ...] = ()
        self.value: Expression | None = None
        self.stop = 0  # token behind it

    def read_name(self, start: int, relation: int) -> tuple[str, ...]:
        """What stands before the relation of a clause, without its case and the words that lead in; () for no name."""
        tokens = self.source.tokens[start:relation]
        if len(tokens) > MAX_NAME or not any(token.kind in (Kind.WORD, Kind.VARIABLE) for token in tokens):
            return ()
        words = [token.text.lower() for token in tokens]
        while words and words[0] in _FILLERS:
            words.pop(0)
        return tuple(words)

    def remember(self, start: int, relation: int, stop: int, value: Expression | None) -> None:
        """Note what the clause of tokens [start, stop) ends with, where nothing stands behind it."""
        whole = value is not None and value.stop == stop
        self.name, self.value, self.stop = self.read_name(start, relation), value if whole else None, stop

    def restate(self, start: int, relation: int, value: Expression | None) -> Equation | None:
        """The equation of the last value with this one, if a clause that begins at `start` restates it."""
        earlier, source = self.value, self.source
        if earlier is None or value is None or source.tokens[relation].text == "?" or not self.name:
            return None
        between = source.tokens[self.stop : start] if start - self.stop <= MAX_NAME else []
        if not between:
            return None
        said = [token.text.lower() for token in between if token.kind is not Kind.BREAK]
        if not _FILLERS.issuperset(said) or self.read_name(start, relation) != self.name:
            return None
        apart = source.text[source.tokens[self.stop].start : source.tokens[start].start]
        concludes = said or source.tokens[start].text.lower() in _FILLERS or "\n" in apart
        if _LISTING.search(apart) or (not concludes and ("," in apart or ";" in apart)):
            return None  # x = 2 + 3, x = 7
        approximate = source.tokens[relation].text == "~"
        if not self.computes(earlier, value, approximate) or not self.is_simpler(earlier, value):
            return None
        return Equation(source, earlier, value, relation, torn=False, in_chain=False, exact=None)

    def computes(self, earlier: Expression, value: Expression, approximate: bool) -> bool:
        """Whether the first statement left something to compute, and was no value already, as 1/2 is."""
        if earlier.operations == 0 or not isinstance(earlier.value, Fraction):
            return False
        shows_decimals = any(token.decimals for token in self.source.tokens[value.start : value.stop])
        if earlier.operations == 1 and self.divides(earlier):
            return earlier.value.denominator == 1 or shows_decimals or approximate
        return earlier.value.denominator < INEXACT or shows_decimals or approximate

    def divides(self, side: Expression) -> bool:
        tokens = self.source.tokens[side.start : side.stop]
        return any(token.text == "/" or token.kind is Kind.FRACTION for token in tokens)

    def is_simpler(self, earlier: Expression, value: Expression) -> bool:
        """Whether the second statement goes on with the first: a number, or fewer numbers, one of them the same."""
        if value.operations == 0:
            return True
        before, now = (
            {token.value for token in self.source.tokens[side.start : side.stop] if token.kind is Kind.NUMBER}
            for side in (earlier, value)
        )
        return value.numbers < earlier.numbers and bool(before & now)
