"""What the prose around an equation says about it: that it is denied or only tried, a remainder, a last digit, cut off.

Layer L1, imports nothing of the package and no torch. For `clipo_ds.doubts`, which asks only about equations that come
out false. Every question looks at a bounded stretch of the text before or behind the equation.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

REACH = 90
"""Characters before and behind an equation that may say something about it."""

_ASKED = re.compile(r"[^.,!;:\n=]{0,40}\?")
_DENIED = re.compile(
    r"""
    \b(?:is|are|was|were)\s(?:\w+ly\s)?(?:not\s(?:\w+ly\s)?(?:true|correct|right|possible|valid|the\scase|equal|so\b
        |an?\s(?:\w+\s)?(?:true|valid|correct|solution)|satisfied)|false|untrue|wrong|incorrect|impossible|absurd|invalid|nonsense)
  | \bnot\s(?:true|correct|valid|possible|equal)
  | \b(?:is|was|are)n['\u2019]t\s(?:true|correct|right|possible|valid|the\scase|equal|so\b|a\s)
  | \bnever\s(?:true|equal|hold|correct) | \bcan['\u2019]t\sbe
  | \b(?:does|do|did|would|will|could)(?:\snot|n['\u2019]t)\s
        (?:hold|form|work|check|satisfy|match|equal|make\ssense|fit|agree|be\b)
  | \bcannot\sbe | \bcontradict | \babsurd | \bextraneous | \bfails?\b | \bno\ssolution
  | \(?\b(?:false|wrong|incorrect|impossible|nope|no)\b\s?(?:[).,!;}]|\Z)
  | ≠ | \\neq?(?![A-Za-z]) | \\not\s?= | !=(?=\s) | [✗✘❌✖]
    """,
    re.VERBOSE | re.IGNORECASE,
)
_TRIED = re.compile(
    r"""
    (?:\bif|\bnot|\bunless|\binstead\sof|\brather\sthan|n['\u2019]t)\W{0,4}$
  | \bnot\s(?:true|correct|possible|the\scase)\sthat\W{0,4}$
  | \b(?:whether|thought|believed|suppos\w+|assum\w+|pretend\w*|imagin\w+|guess\w*|claim\w*|trying
        |(?:check|see|test|verify|ask)\w*\sif)
        (?:\s\w+){0,3}\W{0,4}$
  | \bif\s(?:\w+\s){1,2}(?:were|was|had\sbeen)\W{0,4}$
  | \b(?:wrongly|incorrectly|mistaken\w*|falsely)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SOLVED = re.compile(
    r"=\s?0(?![.0-9])|(?<![\w./])0\s?=|\bboth\ssides|\bsol(?:v|ution)|\bno\s(?:real\s)?(?:values?|roots?)\b|\bequation|\bsubtract",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?]\s|\n")
_REMAINDER = re.compile(
    r"\bremain\w*|\bleft-?overs?\b|\brem\b|\br(?:[\s.}$\\]|quad){0,9}[0-9]|\bleaving\b|\bwith\b.{1,20}\bover\b|\bquotient|\bfloor\b"
    r"|\binteger\s(?:part|division)|\bround\w*\sdown|\bmod\b",
    re.IGNORECASE,
)
_WHOLE = re.compile(r"[^.!?\n]*\b(?:left|full|whole|complete|entire)\b", re.IGNORECASE)
_IN_UNITS = re.compile(
    r"[\s$\\){}]*(?:text)?[\s{]*(?:hour|hr|day|week|min|minute|year|month|feet|foot|ft|dollar|pound|lb|yard|dozen|kg|m)s?\b"
    r"[\s$\\(){},]*(?:and)?[\s$\\(){}]*[0-9]"
)
"""4 hours and 10 minutes, of 250 / 60 = 4."""
_DIGIT = re.compile(r"\b(?:digit|unit)s?\b|\bends?\s(?:in|with)\b", re.IGNORECASE)
_RESIDUE = re.compile(r"\bmod(?:ulo)?\b|\\p?mod|\bcongruen|\bresidue|\bremainder|\\equiv|≡", re.IGNORECASE)
_PARITY = re.compile(
    r"\bparity\b|\beven\b(?s:.){0,40}\bodd\b|\bodd\b(?s:.){0,40}\beven\b|\bbinary\b|\bxor\b", re.IGNORECASE
)


def _before(text: str, start: int) -> str:
    """The sentence before a place, of bounded length."""
    window = text[max(start - REACH, 0) : start]
    ends = [found.end() for found in _SENTENCE_END.finditer(window)]
    return window[ends[-1] :] if ends else window


def is_denied_or_tried(text: str, start: int, end: int) -> bool:
    """Whether the text says that its equation is false, asks, or only tries: "is 3 + 4 = 8? No, 3 + 4 \\neq 8"."""
    behind = text[end : end + REACH]
    return bool(_ASKED.match(behind) or _DENIED.search(behind) or _TRIED.search(_before(text, start)))


def states_quotient(text: str, start: int, end: int, stated: Fraction, actual: Fraction) -> bool:
    """Whether a division is given its whole part, and a remainder is told: 23 / 4 = 5 full boxes, 3 remain."""
    if stated.denominator != 1 or stated != math.floor(actual):
        return False
    behind = text[end : end + REACH]
    told = _IN_UNITS.match(behind) or _WHOLE.match(behind) or _REMAINDER.search(behind)
    return bool(told or _REMAINDER.search(_before(text, start)))


def counts_in_residues(text: str, start: int, end: int, stated: Fraction, actual: Fraction) -> bool:
    """Whether both sides differ by a multiple that the text leaves out: 9 * 3 = 7, said of the units digit."""
    if stated.denominator != 1 or actual.denominator != 1:
        return False
    around = text[max(start - 2 * REACH, 0) : end + REACH]
    return bool(
        (0 <= stated < 10 and (stated - actual) % 10 == 0 and _DIGIT.search(around))
        or (stated in (0, 1) and (stated - actual) % 2 == 0 and _PARITY.search(around))
        or (0 <= stated < actual and _RESIDUE.search(around))
    )


def is_cut_off(text: str, end: int, stated: Fraction, actual: Fraction, *, divides: bool) -> bool:
    """Whether the text ends inside its last number: 150 - 6.5 = 14, or 143, of 143.5; but 2.4 * 3 = 7 is a slip."""
    if text[end:].strip() or stated.denominator != 1 or text[end - 1 : end] not in tuple("0123456789"):
        return False
    shown, meant = str(int(stated)), str(int(actual))
    if shown == meant:
        return not divides and actual != stated and len(shown) > 2
    return len(shown) < len(meant) and meant.startswith(shown)


def is_solved(text: str, start: int, end: int) -> bool:
    """Whether the text solves its equation in an unknown: x + 3 = 3(x + 1), which leads to x = 0."""
    return _SOLVED.search(text[max(start - REACH, 0) : start] + " " + text[end : end + 2 * REACH]) is not None
