r"""Sets of real numbers, however they are written: intervals and their unions, inequalities, builder notation.

Imports `clipo_ds.spelling` and the standard library. Ends of intervals are whatever the caller makes of their text:
exact fractions here (`clipo_ds.equality`), any real number where algebra is at hand (`clipo_ds.algebra`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_VARIABLE = r"(?:\\[a-z]+|[A-Za-z])(?:_\w)?"
_RELATION = re.compile(r"\\(?:leqslant|geqslant|leq?|geq?|neq?|lt|gt)(?![A-Za-z])|<=|>=|!=|<|>|=")
_MEANING = {
    "leqslant": "<=", "leq": "<=", "le": "<=", "geqslant": ">=", "geq": ">=", "ge": ">=", "neq": "!=", "ne": "!=",
    "lt": "<", "gt": ">",
}  # fmt: skip
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|\\R(?![A-Za-z])|(?:the set of )?all real (?:numbers|values)(?: of [a-z])?|all reals",
    re.IGNORECASE,
)
_IN_REALS = re.compile(rf"^({_VARIABLE})\s*\\in\s*(?:\\mathbb\s*\{{?\s*R\s*\}}?|\\R(?![A-Za-z])|R)$")
_BUILDER = re.compile(
    rf"\\\{{\s*({_VARIABLE})\s*(?:\\in\s*(?:\\mathbb\s*\{{?\s*R\s*\}}?|\\R(?![A-Za-z])|R))?\s*(?:\\mid|\\vert|\||:)\s*(.*)\\\}}",
    re.DOTALL,
)
_MEMBER = re.compile(rf"({_VARIABLE})\s*\\in\s*(.*)", re.DOTALL)
_WITHOUT = re.compile(r"(.*?)\s*(?:\\setminus|\\backslash|-|except|but)\s*(?:\\\{(.*)\\\}|([^{}]*))", re.DOTALL)
_OR = re.compile(r"\\cup(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])|(?<![A-Za-z\\])or(?![A-Za-z])")
_AND = re.compile(r"\\(?:land|wedge|cap)(?![A-Za-z])|(?<![A-Za-z\\])and(?![A-Za-z])")
_UNMISTAKABLE = re.compile(
    r"[<>|]|\\(?:leq?|geq?|leqslant|geqslant|neq?|lt|gt|cup|cap|mid|in|setminus|mathbb|R)(?![A-Za-z])|!=|\breals?\b|:.*[<>]"
)


@dataclass(frozen=True)
class End:
    """Where an interval ends; `value` None is infinity."""

    value: Any
    closed: bool


Interval = tuple[End, End]
Value = Callable[[str], Any]  # a text as a number that can be ordered and compared, or None


class _NoSet(Exception):
    """The text describes no set that can be read here."""


@dataclass(frozen=True)
class RealSet:
    variable: str | None
    intervals: tuple[Interval, ...]  # disjoint, in order


def is_unmistakable(text: str) -> bool:
    """Whether a text can be nothing but a set or an inequality: (2, 3) may be a point, x > 2 may not."""
    return _UNMISTAKABLE.search(text) is not None


def read_set(text: str, value: Value) -> RealSet | None:
    r"""The set that an answer in canonical form describes, None where it is none that can be read.

    >>> from clipo_ds.spelling import number
    >>> exact = lambda text: (n := number(text)) and n.value
    >>> read_set(r"\{x|-2\le x < 1\}", exact).intervals == read_set("[-2,1)", exact).intervals
    True
    >>> read_set("x<-1 or x>3", exact) == read_set(r"x \in (-\infty, -1) \cup (3, \infty)", exact)
    True
    """
    if len(text) > 200:
        return None
    reader = _Reader(value)
    try:
        intervals = reader.read(text.strip())
    except _NoSet:
        return None
    return RealSet(reader.variable, tuple(intervals))


def same_set(ours: RealSet, theirs: RealSet) -> bool:
    """Equal sets; where both name their variable, it is the same one."""
    return ours.intervals == theirs.intervals and (
        None in (ours.variable, theirs.variable) or ours.variable == theirs.variable
    )


class _Reader:
    def __init__(self, value: Value) -> None:
        self._value = value
        self.variable: str | None = None

    def read(self, text: str) -> list[Interval]:
        builder = _BUILDER.fullmatch(text)
        if builder:
            self._name(builder[1])
            return self._conditions(builder[2])
        member = _MEMBER.fullmatch(text)
        if member and not _RELATION.search(member[2]):
            self._name(member[1])
            return self.read(member[2])
        return self._conditions(text)

    def _conditions(self, text: str) -> list[Interval]:
        pieces = [self._all_of(piece) for piece in _split(text, _OR)]
        return _union([interval for piece in pieces for interval in piece])

    def _all_of(self, text: str) -> list[Interval]:
        """Conditions joined by "and" or commas. Rays that never meet, joined by a comma, are alternatives."""
        for separator, may_be_or in ((_AND, False), (re.compile(","), True)):
            parts = _split(text, separator)
            if len(parts) > 1 and all(_RELATION.search(part) or _IN_REALS.match(part) for part in parts):
                sets = [self._piece(part) for part in parts]
                met = sets[0]
                for other in sets[1:]:
                    met = _intersection(met, other)
                if not met and not may_be_or:
                    raise _NoSet
                return met or _union([interval for some in sets for interval in some])
        return self._piece(text)

    def _piece(self, text: str) -> list[Interval]:
        text = text.strip()
        real = _IN_REALS.match(text)
        if real:
            self._name(real[1])
            return [_line()]
        if _REALS.fullmatch(text):
            return [_line()]
        if _RELATION.search(text):
            return self._inequality(text)
        without = _WITHOUT.fullmatch(text)
        if without and _REALS.fullmatch(without[1].strip()):
            points = [self._number(part) for part in (without[2] or without[3]).split(",")]
            result = [_line()]
            for point in points:
                result = _intersection(result, _all_but(point))
            return result
        if text.startswith(r"\{") and text.endswith(r"\}"):
            points = sorted(self._number(part) for part in text[2:-2].split(","))
            return [(End(p, True), End(p, True)) for p in points]
        if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
            ends = _split(text[1:-1], re.compile(","))
            if len(ends) == 2:
                low, high = self._end(ends[0], text[0] == "[", "-"), self._end(ends[1], text[-1] == "]", "")
                if low.value is not None and high.value is not None and not low.value < high.value:
                    raise _NoSet
                return [(low, high)]
        raise _NoSet

    def _inequality(self, text: str) -> list[Interval]:
        marks = list(_RELATION.finditer(text))
        sides = [
            text[a:b].strip()
            for a, b in zip([0, *(m.end() for m in marks)], [*(m.start() for m in marks), None], strict=True)
        ]
        relations = [_MEANING.get(mark.group().lstrip("\\"), mark.group()) for mark in marks]
        if len(sides) == 2:
            left, right = sides
            if re.fullmatch(_VARIABLE, right) and not _is_infinite(right):
                left, right, relations = right, left, [_FLIPPED[relations[0]]]
            self._name(left)
            return self._compared(relations[0], right)
        if len(sides) == 3 and not {"=", "!="} & set(relations) and relations[0][0] == relations[1][0]:
            self._name(sides[1])
            return _intersection(
                self._compared(_FLIPPED[relations[0]], sides[0]), self._compared(relations[1], sides[2])
            )
        raise _NoSet

    def _compared(self, relation: str, text: str) -> list[Interval]:
        if relation == "!=":
            result = [_line()]
            for part in text.split(","):
                result = _intersection(result, _all_but(self._number(part)))
            return result
        if _is_infinite(text):
            if (relation[0] == "<") == text.lstrip().startswith("-") or "=" in relation:
                raise _NoSet
            return [_line()]
        value = self._number(text)
        if relation == "=":
            return [(End(value, True), End(value, True))]
        end, free = End(value, "=" in relation), End(None, False)
        return [(free, end)] if relation[0] == "<" else [(end, free)]

    def _name(self, text: str) -> None:
        if not re.fullmatch(_VARIABLE, text) or text in (r"\pi", r"\infty", "e") or self.variable not in (None, text):
            raise _NoSet
        self.variable = text

    def _number(self, text: str) -> Any:
        value = self._value(text.strip())
        if value is None:
            raise _NoSet
        return value

    def _end(self, text: str, closed: bool, sign: str) -> End:
        if _is_infinite(text):
            if text.strip().startswith("-") != (sign == "-"):
                raise _NoSet
            return End(None, False)
        return End(self._number(text), closed)


def _is_infinite(text: str) -> bool:
    return re.fullmatch(r"[+-]?\s*\\infty", text.strip()) is not None


def _line() -> Interval:
    return End(None, False), End(None, False)


def _all_but(point: Any) -> list[Interval]:
    return [(End(None, False), End(point, False)), (End(point, False), End(None, False))]


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at the separators outside of brackets; any bracket closes any other."""
    parts, start = [], 0
    for match in separator.finditer(text):
        before = text[: match.start()]
        if sum(before.count(mark) for mark in "([{") == sum(before.count(mark) for mark in ")]}"):
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def _below(one: End, other: End) -> End:
    """The lower of two upper ends."""
    if one.value is None or other.value is None:
        return other if one.value is None else one
    if one.value == other.value:
        return End(one.value, one.closed and other.closed)
    return one if one.value < other.value else other


def _above(one: End, other: End) -> End:
    """The higher of two lower ends."""
    if one.value is None or other.value is None:
        return other if one.value is None else one
    if one.value == other.value:
        return End(one.value, one.closed and other.closed)
    return other if one.value < other.value else one


def _intersection(ours: list[Interval], theirs: list[Interval]) -> list[Interval]:
    result = []
    for low, high in ours:
        for other_low, other_high in theirs:
            start, stop = _above(low, other_low), _below(high, other_high)
            point = start.value is not None and start.value == stop.value
            if (
                start.value is None
                or stop.value is None
                or start.value < stop.value
                or (point and start.closed and stop.closed)
            ):
                result.append((start, stop))
    return _union(result)


def _union(intervals: list[Interval]) -> list[Interval]:
    result: list[Interval] = []
    for low, high in sorted(intervals, key=_Order):
        if result:
            last_low, last_high = result[-1]
            touch = last_high.value is None or low.value is None or low.value < last_high.value
            if touch or (low.value == last_high.value and (low.closed or last_high.closed)):
                result[-1] = (last_low, _higher(last_high, high))
                continue
        result.append((low, high))
    return result


def _higher(one: End, other: End) -> End:
    """The higher of two upper ends."""
    if one.value is None or other.value is None:
        return one if one.value is None else other
    if one.value == other.value:
        return End(one.value, one.closed or other.closed)
    return other if one.value < other.value else one


class _Order:
    """Sorts intervals by their lower end, closed before open."""

    def __init__(self, interval: Interval) -> None:
        self.low = interval[0]

    def __lt__(self, other: _Order) -> bool:
        if self.low.value is None or other.low.value is None:
            return self.low.value is None and other.low.value is not None
        if self.low.value == other.low.value:
            return self.low.closed and not other.low.closed
        return bool(self.low.value < other.low.value)
