r"""One spelling for answers, and the exact number that an answer is: LaTeX, Unicode, commas, units, percent.

Imports `clipo_ds.brackets`, `clipo_ds.choices` and the standard library. Units, currency and degree signs are read and
dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from clipo_ds.brackets import without_doubled
from clipo_ds.choices import unwrap_text

_SYMBOLS = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u2013": "-",  # en dash
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
        "\u00f7": "/",
        "\u2044": "/",  # fraction slash
        "\u03c0": r"\pi ",
        "\u03b8": r"\theta ",
        "\u221e": r"\infty ",
        "\u221a": r"\sqrt ",
        "\u00b0": r"^\circ ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u2248": r"\approx ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2208": r"\in ",
        "\u00b1": r"\pm ",
        "\u2205": r"\emptyset ",
        "\u211d": r"\mathbb{R} ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u20ac": "$",  # currency signs go the way of the dollar
        "\u00a3": "$",
        "\u00a5": "$",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
        "\u2018": "'",
        "\u2019": "'",
    }
)
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:\{,\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))")
_NOISE = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lr]?)(?![A-Za-z])\.?|\\(?:display|text)style(?![A-Za-z])|(?<!\\)\\[!()\[\]$]"
    r"|\$|\*\*|`|\\phantom\s*\{[^{}]*\}"
)
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\s+")
_TOKEN = r"\s*(?:\{([^{}]*)\}|(\d|[A-Za-z]|\\[A-Za-z]+))"
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])" + _TOKEN + _TOKEN)
_SYMBOL_NAME = re.compile(r"(?<![A-Za-z\\])(pi|Pi|PI|theta|infinity|infty|inf|oo)(?![A-Za-z])|<=|>=")  # "pi/2", "2pi"
_SYMBOL_COMMANDS = {
    **dict.fromkeys(("pi", "Pi", "PI"), r"\pi "), "theta": r"\theta ", "<=": r"\le ", ">=": r"\ge ",
    **dict.fromkeys(("infinity", "infty", "inf", "oo"), r"\infty "),
}  # fmt: skip
_LETTER_UNION = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_EMPTY_SET = re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}|\b(?:the\s+)?empty\s+set\b", re.IGNORECASE)
_POINTED = re.compile(r"\\([lr])angle(?![A-Za-z])")
_DEGREE_WORD = re.compile(r"(?<=[\d}])\s*(?:\\text\s*\{\s*degrees?\s*\}|degrees?\b(?!\s*[A-Za-z]))")
_CALLED_ROOT = re.compile(r"(?<![A-Za-z])\s*\\?sqrt\s*\(([^()]*)\)")
_BARE_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*(?=\{|\d)")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\w)")
_SINGLE_BRACES = re.compile(r"([_^])\s*\{\s*(\w|\\circ)\s*\}")
_LEADING = re.compile(
    r"(?:\s|\\approx|\\sim|=|\b(?:about|approximately|exactly|roughly)\b|(?:USD?|EUR|GBP|INR|Rs\.?)(?=\s*[\d.-]))+",
    re.IGNORECASE,
)
_SPACED_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"([+-]?)\s*(?:({_DIGITS})?\s*\\frac\{{\s*([+-]?\d+)\s*\}}\{{\s*(\d+)\s*\}}"  # \frac{1}{2}, 3\frac{1}{2}
    rf"|(?:(\d+)\s+)?({_DIGITS})\s*/\s*(\d+)"  # 1/2, 3 1/2
    rf"|({_DIGITS}(?:\.\d*)?|\.\d+))\s*",  # 1,234.5
)
_MIXED_WITH_AND = re.compile(r"(?<=\d)\s+and\s+(?=(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)\s*/\s*(\d+))(?!\d))")
_OUT_OF = re.compile(r"(?<=\d)\s+out\s+of\s+(?=\d)")
_REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*?)(?:\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d)(?!\d))|\((\d+)\)|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)"
)
_DOTTED = re.compile(r"(\d*)\.(\d{3,40})\s*(?:\.{3}|\\[ldc]?dots(?![A-Za-z])|\u2026)")  # 0.333...
_DOTS = re.compile(r"(?<=\d{3})\.{3}\Z")
_REPEATED = re.compile(r"(\d*?)(\d{1,10}?)\2+")
_POWER_OF_TEN = re.compile(
    r"(?:\s*(?:\\times|\\cdot|\\ast|\*|x)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,5})\s*\}|([+-]?\d{1,5}))|[eE]([+-]?\d{1,5}))(?![\d.A-Za-z])\s*"
)
_BARE_POWER = re.compile(r"([+-]?\s*)(?=10\s*\^\s*\{?\s*[+-]?\d)")
_MAX_EXPONENT = 5000  # of ten; what is beyond is compared by algebra, in a process with limits
_PERCENT = re.compile(r"(?:\\?%|per\s?cent\b|percentage\b|pct\b)\s*", re.IGNORECASE)
_SCALE = re.compile(r"(hundred|thousand|million|billion|trillion|dozen)s?\b\s*(?:of\s+)?", re.IGNORECASE)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_BASE = re.compile(r"_\{?(\d+)\}?|_?\{?\(?base\s*(\d+)\)?\}?", re.IGNORECASE)
_UNIT_CHARS = re.compile(r"[A-Za-z]+|\^\{?-?[1-4]\}?|\\cdot|\^\\circ|[\s/.'{}-]")
_UNITS = re.compile(
    r"[cmkdn]m|ft|in|yd|mi|[km]?g|lbs?|oz|[mcdk]l|hrs?|min|sec|ms|[ap]m|[gmkt]b|[kM]?hz|[km]w|mph|km?ph|kmh|sq|cu|rs|ha|pt|qt"
    r"|bc|ad|st|nd|rd|th|of|on|to|at|by",
    re.IGNORECASE,
)
_UNIT_LETTERS = "mgshlLtJWVANKCF"
_NOT_UNITS = re.compile(
    r"and|but|not|plus|minus|times|over|mod|sin|cos|tan|sec|csc|cot|log|exp|max|sqrt|frac|than|least|most|then|else|where"
    r"|when|infinity|none|unknown|undefined|half|quarter|third",
    re.IGNORECASE,
)
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip


def plain_latex(answer: str) -> str:
    r"""`answer` with Unicode symbols, dollar signs, thousands marks, doubled brackets and ``sqrt(...)`` as plain LaTeX.

    >>> plain_latex("2\u221a(3)"), plain_latex(r"\$32,\!348"), plain_latex("-3\u03c0")
    ('2\\sqrt{3}', '32348', '-3\\pi ')
    """
    text = _THOUSANDS.sub("", answer.translate(_SYMBOLS)).replace(r"\$", "").replace("$", "")
    text = _BARE_ROOT.sub(r"\\sqrt", _CALLED_ROOT.sub(r"\\sqrt{\1}", without_doubled(text)))
    text = _EMPTY_SET.sub(r"\\emptyset ", text)
    text = _DEGREE_WORD.sub(r"^\\circ ", _LETTER_UNION.sub(r"\\cup ", text))
    return _SYMBOL_NAME.sub(lambda name: _SYMBOL_COMMANDS[name[0]], text)


@lru_cache(maxsize=16384)
def canonical(answer: str) -> str:
    r"""`answer` in one spelling: no spacing commands, no `\text`, no dollar signs, `\frac{a}{b}` for all fractions.

    >>> canonical(r"$\left( \tfrac12,\ 1{,}234 \right)$")
    '( \\frac{1}{2}, 1234 )'
    """
    text = unwrap_text(_SPACES.sub(" ", _NOISE.sub("", plain_latex(answer))))
    text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\cfrac", r"\frac")
    text = _SINGLE_BRACES.sub(r"\1\2", _SHORT_ROOT.sub(r"\\sqrt{\1}", text)).replace(r"\degree", r"^\circ")
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    text = _POINTED.sub(lambda mark: "(" if mark[1] == "l" else ")", text)
    text = _DOTS.sub(r"\\ldots", _SPACES.sub(" ", text).strip()).rstrip(".,;: ")
    return text[_LEADING.match(text).end() :] if _LEADING.match(text) else text  # type: ignore[union-attr]


def key(answer: str) -> str:
    """The canonical form without spaces; two answers with the same key are the same."""
    return canonical(answer).removesuffix(r"^\circ").replace(" ", "")


@dataclass(frozen=True)
class Number:
    """An exact number as an answer writes it."""

    value: Fraction
    num_decimals: int | None  # digits after the point; None for integers and fractions
    num_significant: int  # significant digits of a decimal, else 0
    percent: bool
    base: int | None  # 8 in 52_8, where `value` is that of the digits read in base ten

    def equals(self, other: Number) -> bool:
        """Equal values; a decimal with at least six significant digits may be the rounded form of the other number.

        >>> number("0.333333").equals(number("1/3")), number("0.33").equals(number("1/3"))
        (True, False)
        >>> number("18%").equals(number("18")), number("18%").equals(number("0.18"))
        (True, True)
        """
        if self.base != other.base and None not in (self.base, other.base):
            return False
        if self._close(self.value, other.value, other):
            return True
        if self.percent == other.percent:
            return False
        hundred = Fraction(1, 100)
        left = self.value * hundred if self.percent else self.value
        right = other.value * hundred if other.percent else other.value
        return self._close(left, right, other)

    def _close(self, left: Fraction, right: Fraction, other: Number) -> bool:
        if left == right:
            return True
        decimals = [
            (n.num_decimals, value) for n, value in ((self, left), (other, right)) if n.num_decimals is not None
        ]
        if not decimals or any(n.num_decimals is not None and n.num_significant < 6 for n in (self, other)):
            return False
        places, decimal = min(decimals)  # the coarser one, where both are decimals
        exact = right if decimal == left else left
        beyond = abs(exact) - abs(decimal) if exact * decimal > 0 else Fraction(1)
        unit = Fraction(10) ** -places
        return -unit / 2 <= beyond < unit  # rounded to its last place, or cut off there


def _is_unit(text: str, *, letters_are_units: bool) -> bool:
    """Whether what follows a number is a unit or a counted thing ("dollars per day", "cm^2"), not a factor."""
    words = re.findall(r"[A-Za-z]+", text)
    if not words or _UNIT_CHARS.sub("", text):
        return not text.replace(r"^\circ", "").strip()
    compound = re.match(r"\s*[A-Za-z]+\s*/", text) is not None  # km/h
    for word in words:
        letter = len(word) == 1 and (r"^\circ" in text or (word in _UNIT_LETTERS and (letters_are_units or compound)))
        if _NOT_UNITS.fullmatch(word) or not (letter or len(word) >= 3 or _UNITS.fullmatch(word)):
            return False
    return True


def _with_bar(dotted: re.Match[str]) -> str:
    r"""``0.1666...`` as ``0.1\overline{6}``, where the digits shown say what repeats: one thrice, several twice."""
    shown = _REPEATED.fullmatch(dotted[2])
    if shown is None or len(dotted[2]) - len(shown[1]) < 3:
        return dotted[0]
    return rf"{dotted[1]}.{shown[1]}\overline{{{shown[2]}}}"


def _repeating_value(match: re.Match[str]) -> Fraction:
    """The value of a decimal whose last digits repeat for ever."""
    sign, whole, fixed = match[1], match[2] or "0", match[3]
    block = match[4] or match[5] or match[6] or f"{match[7]}{match[8] or ''}{match[9] or ''}"
    value = Fraction(int(whole + fixed), 10 ** len(fixed)) + Fraction(
        int(block), (10 ** len(block) - 1) * 10 ** len(fixed)
    )
    return -value if sign == "-" else value


@lru_cache(maxsize=16384)
def number(answer: str, *, letters_are_units: bool = False) -> Number | None:
    r"""The number that an answer in canonical form is, units apart, or None when it is anything else.

    Args:
        answer: integer, decimal, fraction or mixed number, with thousands commas, currency, percent sign, unit.
        letters_are_units: read the single letter in "5 m" as a unit (not a variable).

    >>> number("-1,234.50 dollars").value, number(r"1\frac{4}{5}").value, number("3 million").value
    (Fraction(-2469, 2), Fraction(9, 5), Fraction(3000000, 1))
    >>> number(r"0.1\overline{6}").value, number("3 and 1/2").value, number("3 out of 5").value, number("2.5e3").value
    (Fraction(1, 6), Fraction(7, 2), Fraction(3, 5), Fraction(2500, 1))
    >>> number("5x") is None, number("18 or 20") is None, number("5 m", letters_are_units=True).value
    (True, True, Fraction(5, 1))
    """
    text = answer.strip()
    if text.lower() in _NUMBER_WORDS:
        return Number(Fraction(_NUMBER_WORDS.index(text.lower())), None, 0, False, None)
    repeating = _REPEATING.match(_DOTTED.sub(_with_bar, text))
    behind = repeating.string[repeating.end() :].strip() if repeating else ""
    if repeating and (not behind or _PERCENT.fullmatch(behind)):
        return Number(_repeating_value(repeating), None, 0, bool(behind), None)
    text = _OUT_OF.sub("/", _BARE_POWER.sub(r"\g<1>1\\times ", text, count=1) if _BARE_POWER.match(text) else text)
    mixed = _MIXED_WITH_AND.search(text)
    if mixed and int(mixed[1] or mixed[3]) < int(mixed[2] or mixed[4]):
        text = _MIXED_WITH_AND.sub(" ", text, count=1)
    match = _NUMBER.match(text.replace(" ", "") if _SPACED_THOUSANDS.fullmatch(text) else text)
    if match is None:
        return None
    sign, whole, top, bottom, whole_slash, top_slash, bottom_slash, plain = match.groups()
    decimals = significant = None
    if plain is not None:
        digits = plain.replace(",", "")
        value = Fraction(digits if digits[-1] != "." else digits[:-1])
        if "." in digits:
            decimals = len(digits) - digits.index(".") - 1
            significant = len(digits.replace(".", "").lstrip("0"))
    else:
        over = int((bottom or bottom_slash).replace(",", ""))
        if over == 0 or (whole and top.startswith(("+", "-"))):
            return None
        fraction = Fraction(int((top or top_slash).replace(",", "")), over)
        value = int((whole or whole_slash or "0").replace(",", "")) + fraction
    rest = match.string[match.end() :]
    power = _POWER_OF_TEN.match(match.string, len(match.string[: match.end()].rstrip())) if plain is not None else None
    if power:
        exponent = int(power[1] or power[2] or power[3])
        if abs(exponent) > _MAX_EXPONENT:
            return None
        value, rest = value * Fraction(10) ** exponent, match.string[power.end() :]
        decimals = None if decimals is None else decimals - exponent
    scale = _SCALE.match(rest)
    if scale:
        value, rest = value * _SCALES[scale.group(1).lower()], rest[scale.end() :]
    percent = _PERCENT.match(rest)
    rest = rest[percent.end() :] if percent else rest
    base = _BASE.fullmatch(rest)
    if base is None and rest and not _is_unit(rest, letters_are_units=letters_are_units):
        return None
    value = -value if sign == "-" else value
    return Number(value, decimals, significant or 0, bool(percent), int(base[1] or base[2]) if base else None)
