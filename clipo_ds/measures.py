r"""Times of day, and measures in several units ("2 hours 30 minutes", "5 feet 6 inches"), which are no plain numbers.

Imports the standard library only. Texts come in canonical form (`clipo_ds.spelling.canonical`).
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

_CLOCK = re.compile(
    r"(\d{1,2})(?:\s*:\s*(\d{2})(?:\s*:\s*(\d{2}))?)?\s*(?:([ap])\s?\.?\s?m\b\.?|(o'clock))?", re.IGNORECASE
)
_NAMED_TIMES = {"noon": (12 * 3600, "p"), "12 noon": (12 * 3600, "p"), "midnight": (0, "a"), "12 midnight": (0, "a")}

_UNITS = {
    "time": {
        "weeks?|wks?": 604800,
        "days?|d": 86400,
        "hours?|hrs?|h": 3600,
        "minutes?|mins?|m": 60,
        "seconds?|secs?|s": 1,
    },
    "length": {"feet|foot|ft": 12, "inch(?:es)?|in": 1},
    "metric length": {"kilomet(?:er|re)s?|km": 1000, "met(?:er|re)s?": 1},
    "mass": {"pounds?|lbs?": 16, "ounces?|oz": 1},
    "money": {"dollars?": 100, "cents?": 1},
}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)(?:\s*,?\s*and\s+|\s*,\s*|\s+|(?=\d)|$)")


@lru_cache(maxsize=4096)
def _clock(text: str) -> tuple[int, str | None] | None:
    """Seconds since midnight as written, and whether "a" or "p" m. is said."""
    if text.lower() in _NAMED_TIMES:
        return _NAMED_TIMES[text.lower()]
    match = _CLOCK.fullmatch(text.strip())
    if match is None or not (match[2] or match[4] or match[5]):
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
    half = match[4].lower() if match[4] else None
    if hours > 24 or minutes > 59 or seconds > 59 or (half and not 1 <= hours <= 12):
        return None
    return ((hours % 12 + (12 if half == "p" else 0)) if half else hours) * 3600 + minutes * 60 + seconds, half


def same_time(answer: str, truth: str) -> bool | None:
    """Whether two times of day are the same; None where one of them is none, or none says which half of the day.

    >>> same_time("20:34", "8:34 PM"), same_time("8:34", "8:34 p.m."), same_time("8 AM", "8 PM"), same_time("3:02", "5")
    (True, True, False, None)
    """
    ours, theirs = _clock(answer), _clock(truth)
    if ours is None or theirs is None or (ours[1] is None and theirs[1] is None):
        return None
    if ours[0] == theirs[0]:
        return True
    if None in (ours[1], theirs[1]):  # "8:34" for 8:34 PM leaves out what the problem says
        plain = ours[0] if ours[1] is None else theirs[0]
        return plain < 13 * 3600 and (ours[0] - theirs[0]) % (12 * 3600) == 0
    return False


@lru_cache(maxsize=4096)
def measure(text: str) -> tuple[str, Fraction, int] | None:
    """What is measured, how much in its smallest unit, and the number of units; None for anything else.

    >>> measure("2 hours 30 minutes"), measure("150 min"), measure("5 feet, 6 inches"), measure("9 d, 12 q")
    (('time', Fraction(9000, 1), 2), ('time', Fraction(9000, 1), 1), ('length', Fraction(66, 1), 2), None)
    """
    parts, position, text = [], 0, text.strip()
    while match := _PART.match(text, position):
        parts.append((Fraction(match[1]), match[2]))
        position = match.end()
    if not parts or position != len(text):
        return None
    for what, units in _UNITS.items():
        sizes = [
            next((size for names, size in units.items() if re.fullmatch(names, name, re.IGNORECASE)), None)
            for _, name in parts
        ]
        if None not in sizes and sizes == sorted(set(sizes), reverse=True):  # type: ignore[type-var]
            amount = sum((n * size for (n, _), size in zip(parts, sizes, strict=True)), Fraction(0))  # type: ignore[operator]
            return what, amount, len(parts)
    return None


def same_measure(answer: str, truth: str) -> bool | None:
    """Whether two measures are the same, of which one is in several units; None where that is not the question.

    >>> same_measure("2.5 hours", "2 hours 30 minutes"), same_measure("9 hours", "9 hours, 12 minutes")
    (True, False)
    >>> same_measure("9", "9 hours") is None
    True
    """
    ours, theirs = measure(answer), measure(truth)
    if max(side[2] if side else 0 for side in (ours, theirs)) < 2:
        return None
    return ours is not None and theirs is not None and ours[:2] == theirs[:2]
