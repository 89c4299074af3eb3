"""The tokens that a text with arithmetic is read into, and how line ends and brackets divide them.

Layer L1, no torch. `clipo_ds.mathtext` makes the tokens, `clipo_ds.expressions`
parses them.
"""

from __future__ import annotations

from enum import Enum, auto
from fractions import Fraction
from typing import NamedTuple

from clipo_ds.mathwords import LETTER_UNITS

PI_SIGN = "\N{GREEK SMALL LETTER PI}"
"""Text of the NUMBER token that is pi."""


class Kind(Enum):
    NUMBER = auto()
    OPERATOR = auto()  # text is one of + - * / ^ % ! mod of
    OPEN = auto()  # ( [ { |
    CLOSE = auto()
    FRACTION = auto()  # \frac, two arguments follow
    BINOMIAL = auto()
    ROOT = auto()  # \sqrt, an optional [n] and one argument follow
    WORD = auto()
    SCALE = auto()  # dozen, hundred, thousand, million …
    VARIABLE = auto()  # anything that is not arithmetic but belongs to an expression
    RELATION = auto()  # text is =, ~ (approximately) or ? (any other)
    BREAK = auto()
    ANNOTATION = auto()  # GSM8K's <<48/2=24>>
    LINE_END = auto()  # only while reading


class Token(NamedTuple):
    """One token; `start` and `end` are positions in the text."""

    kind: Kind
    text: str
    start: int
    end: int
    gap: bool  # white space stands before it
    value: Fraction | None = None  # of NUMBER and SCALE
    decimals: int = 0  # digits after the point of a NUMBER
    dollar: bool = False  # a dollar sign stands directly before it
    currency: bool = False  # and it means money


class TokenList(NamedTuple):
    text: str
    tokens: list[Token]
    partner: dict[int, int]  # index of an OPEN token -> index of its CLOSE, and back
    annotations: list[Token]
    latex: bool = False  # whether the text has LaTeX commands


def read_unit_letters(tokens: list[Token]) -> list[Token]:
    """Make words of the letters that are units: 60 m, 4 s, 6 m/s. A letter that stands anywhere else is a variable."""
    places = [i for i, token in enumerate(tokens) if token.kind is Kind.VARIABLE and token.text in LETTER_UNITS]
    if not places:
        return tokens
    units: list[int] = []
    variables: set[str] = set()
    for index in places:
        if _follows_number(tokens, index) or _follows_rate(tokens, index, units):
            units.append(index)
        else:
            variables.add(tokens[index].text)
    for index in units:
        if tokens[index].text not in variables:
            tokens[index] = tokens[index]._replace(kind=Kind.WORD)
    return tokens


def _follows_number(tokens: list[Token], index: int) -> bool:
    """Whether a letter stands behind a number and a space, and is no factor: 60 m, but not 8\\textbf{C}3."""
    factor = index + 1 < len(tokens) and tokens[index + 1].kind in (Kind.NUMBER, Kind.OPEN, Kind.VARIABLE, Kind.ROOT)
    return index > 0 and tokens[index - 1].kind is Kind.NUMBER and tokens[index].gap and not factor


def _follows_rate(tokens: list[Token], index: int, units: list[int]) -> bool:
    """Whether a letter ends a rate of units: km/h, m/s. `units` are the letters before that are units."""
    if index < 2 or tokens[index - 1].text != "/" or tokens[index - 1].gap:
        return False
    return tokens[index - 2].kind is Kind.WORD or units[-1:] == [index - 2]


def resolve_line_ends(tokens: list[Token], text: str) -> list[Token]:
    """Drop line ends inside an equation; the others become breaks.

    An equation goes on over one line end next to a relation or after a binary operator; after LaTeX's double backslash
    an operator continues it too, but a minus needs an alignment mark before it, as it may begin the next row. A plain
    new line that begins with an operator is a list item or a negative number. A break where this is in doubt keeps a
    text: a backslash where the expression before may go on, a line feed where the one after may have begun before.
    """
    kept: list[Token] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token.kind is not Kind.LINE_END:
            kept.append(token)
            continue
        run = [token]
        while position < len(tokens) and tokens[position].kind is Kind.LINE_END:
            run.append(tokens[position])
            position += 1
        latex = any(end.text == "latex" for end in run)
        mark = ""
        before = kept[-1] if kept else None
        after = tokens[position] if position < len(tokens) else None
        operator_follows = after is not None and is_binary(after)
        if latex and after is not None and after.text == "-" and "&" not in text[run[0].end : after.start]:
            mark = "\\"
        elif not latex and before is not None:
            in_math = operator_follows and any(end.text == "math" for end in run)
            mark = "\n" if in_math or before.kind in (Kind.VARIABLE, Kind.CLOSE) else ""
        open_before = before is not None and (before.kind is Kind.RELATION or is_binary(before))
        goes_on = after is not None and (after.kind is Kind.RELATION or (latex and operator_follows and not mark))
        if not (open_before or goes_on) or (not latex and any(end.text == "blank" for end in run)):
            kept.append(token._replace(kind=Kind.BREAK, text=mark))
    return kept


def is_binary(token: Token) -> bool:
    return token.kind is Kind.OPERATOR and token.text not in "%!"


def match_brackets(tokens: list[Token]) -> dict[int, int]:
    """Partners of the brackets that group one expression; all others become breaks, in place."""
    partner: dict[int, int] = {}
    closes = {"(": ")", "[": "]", "{": "}", "|": "|"}
    stack: list[int] = []

    def give_up(index: int) -> None:
        tokens[index] = tokens[index]._replace(kind=Kind.BREAK)

    for index, token in enumerate(tokens):
        if token.kind is Kind.OPEN:
            stack.append(index)
        elif token.kind is Kind.CLOSE and stack and closes[tokens[stack[-1]].text] == token.text:
            partner[index] = stack.pop()
            partner[partner[index]] = index
        elif token.kind in (Kind.RELATION, Kind.BREAK, Kind.CLOSE):
            if token.kind is Kind.CLOSE:
                give_up(index)
            while stack:
                give_up(stack.pop())
    while stack:
        give_up(stack.pop())
    return partner
