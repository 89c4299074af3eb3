r"""Brackets that say nothing: doubled ones anywhere in an answer, and a single pair around a plain number.

Imports the standard library only. Thirty brackets around 1 take a parser of LaTeX seconds, and twenty braces more than
a minute; here they are taken away in one pass over the text, however many there are.
"""

from __future__ import annotations

import re

_SIZE = r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*"
_MARK = re.compile(rf"(?<!\\)(?:\\\\)*(?P<mark>(?:{_SIZE})?[()\[\]]|[{{}}])")  # escaped ones are other brackets
_CLOSING = {"(": ")", "{": "}"}
_NUMBER_INSIDE = re.compile(r"\(\s*([+-]?\s*(?:\d+(?:\.\d+)?|\.\d+|\d+\s*/\s*\d+|\\frac\{\d+\}\{\d+\}))\s*\)")


def without_doubled(text: str) -> str:
    r"""`text` with every run of round brackets, or of braces, that open and close together cut down to one pair.

    >>> without_doubled(r"2\left(\left((x+1)\right)\right)"), without_doubled(r"\sqrt{{{3}}}")
    ('2(x+1)', '\\sqrt{3}')
    >>> without_doubled("((1),(2))")
    '((1),(2))'
    """
    marks = [(match["mark"][-1], *match.span("mark")) for match in _MARK.finditer(text)]
    partner: dict[int, int] = {}  # opening -> closing, by their numbers in `marks`
    opened: list[int] = []
    for number, (mark, _, _) in enumerate(marks):
        if mark in "([{":
            opened.append(number)
        elif opened:  # any bracket closes any other, as in (3, 4], but such a pair is never taken away
            opening = opened.pop()
            if _CLOSING.get(marks[opening][0]) == mark:
                partner[opening] = number
    cuts: list[tuple[int, int]] = []
    for opening, closing in partner.items():
        (kind, start, inside), (inner_kind, inner_start, _) = marks[opening], marks[opening + 1]
        (_, _, inner_end), (_, outside, end) = marks[closing - 1], marks[closing]
        doubled = kind == inner_kind and partner.get(opening + 1) == closing - 1
        if doubled and not text[inside:inner_start].strip() and not text[inner_end:outside].strip():
            cuts += [(start, inner_start), (inner_end, end)]
    kept, position = [], 0
    for start, end in sorted(cuts):
        kept.append(text[position:start])
        position = end
    return "".join(kept) + text[position:]


def number_inside(text: str) -> str:
    r"""The plain number that stands in a pair of round brackets of its own, else `text` as it is.

    >>> number_inside("(-3)"), number_inside("(1,234)"), number_inside("(x)")
    ('-3', '(1,234)', '(x)')
    """
    match = _NUMBER_INSIDE.fullmatch(text)
    return match[1] if match else text
