"""Units of measure beside numbers: which measure the same thing, what they add up to, and which cancel.

Layer L1, imports nothing of the package but the tokens; no torch. For `clipo_ds.doubts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from clipo_ds.mathtokens import Kind, Token


class Unit(NamedTuple):
    """A unit under its first name. `size` is in the smallest unit of its `system`, None where it has no exact one."""

    name: str
    dimension: str
    system: str
    size: Fraction | None


_MEASURES = {
    "time": "ms/millisecond=1 second/sec/s=1000 minute/min=60000 hour/hr/h=3600000 day=86400000 week/wk=604800000",
    "time calendar": "month/mo=1 year/yr=12 decade=120 century=1200",
    "time other": "fortnight",
    "length": "nm=1/1000000 mm/millimeter/millimetre=1 cm/centimeter/centimetre=10 dm=100 m/meter/metre=1000 "
    "km/kilometer/kilometre=1000000",
    "length imperial": "inch/inche/in=1 foot/feet/ft=12 yard/yd=36 mile/mi=63360",
    "mass": "mg/milligram=1 gram/g/gm=1000 kilogram/kg/kilo=1000000 tonne=1000000000",
    "mass imperial": "ounce/oz=1 pound/lb=16",
    "mass other": "ton",
    "volume": "ml/milliliter/millilitre=1 cl=10 liter/litre/l/ltr=1000",
    "volume imperial": "cup=1 pint=2 quart=4 gallon/gal=16",
    "volume other": "tablespoon teaspoon",
    "money": "cent/penny/pennie=1 nickel=5 dime=10 quarter=25 dollar/buck/usd=100",
    "money other": "euro/eur pence rupee/rs",
    "data": "byte bit kb/kilobyte mb/megabyte gb/gigabyte tb/terabyte",
    "frequency": "hz khz mhz ghz thz",
    "power": "watt/w kilowatt/kw megawatt/mw",
    "energy": "joule/j kj kilojoule calorie/cal kcal kilocalorie kwh",
    "angle": "degree radian",
    "count": "dozen pair score unit",
}
"""Dimension and system -> units: names with / between, the size after =."""


def _read_measures() -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for system, entries in _MEASURES.items():
        for entry in entries.split():
            names, _, size = entry.partition("=")
            first, *others = names.split("/")
            unit = Unit(first, system.split()[0], system, Fraction(size) if size else None)
            units.update(dict.fromkeys((first, *others), unit))
    return units


UNITS = _read_measures()
"""Unit word, lower case and without a plural s -> what it measures."""


def singular(word: str) -> str:
    word = word.lower()
    return word.removesuffix("s") if len(word) > 2 else word


def first_names(units: Iterable[str]) -> set[str]:
    """Unit words with metres, meters and m made one."""
    return {UNITS[unit].name if unit in UNITS else unit for unit in units}


def mixes_measures(units: Iterable[str]) -> bool:
    """Whether two units measure the same kind of thing: hours and minutes, dollars and cents."""
    dimensions = [UNITS[unit].dimension for unit in units if unit in UNITS]
    return len(dimensions) > len(set(dimensions))


def measured_total(tokens: list[Token], start: int, stop: int) -> tuple[Fraction, str] | None:
    """Sum of the measured numbers in tokens [start, stop), in the smallest unit of their system, and that system.

    None unless all there is are numbers with units of one system, and + or - or nothing between: 1 hour + 30 minutes.
    """
    total, sign, system, index = Fraction(0), 1, "", start
    while index < stop:
        number = tokens[index]
        if number.kind is not Kind.NUMBER or number.value is None:
            return None
        word = tokens[index + 1] if index + 1 < stop else None
        named = word is not None and word.kind is Kind.WORD
        unit = UNITS.get(singular(word.text) if named and word is not None else "dollar" if number.currency else "")
        if unit is None or unit.size is None or system not in ("", unit.system):
            return None
        total, system = total + sign * number.value * unit.size, unit.system
        index += 1 + named
        if index < stop and named and (tokens[index].kind is Kind.NUMBER or tokens[index].text == "and"):
            index += tokens[index].text == "and"  # 2 hours and 30 minutes
        elif index < stop:
            if tokens[index].kind is not Kind.OPERATOR or tokens[index].text not in "+-":
                return None
            sign = 1 if tokens[index].text == "+" else -1
            index += 1
            if index == stop:
                return None
    return total, system


def measure_end(tokens: list[Token], stop: int) -> int:
    """Where the measure ends of which a first part ends at token `stop`: 2 hours | and 30 minutes."""
    while stop < len(tokens):
        number = stop + (tokens[stop].text == "and")
        if number + 1 >= len(tokens) or tokens[number].kind is not Kind.NUMBER:
            break
        if tokens[number + 1].kind is not Kind.WORD or singular(tokens[number + 1].text) not in UNITS:
            break
        stop = number + 2
    return stop


def units_of_product(tokens: list[Token], start: int, stop: int) -> set[str] | None:
    """The units of measure that are left of a product of measured numbers: days of 3 weeks * 7 days/week.

    None for what is no plain product or quotient, and where a unit is left in a denominator or more than once.
    """
    powers: Counter[str] = Counter()
    divides = rate = False
    for index in range(start, stop):
        token = tokens[index]
        if token.kind is Kind.OPERATOR and token.text in "*/":
            rate = token.text == "/" and index + 1 < stop and tokens[index + 1].kind is Kind.WORD
            divides = divides if rate else token.text == "/"
        elif token.kind is Kind.WORD:
            word = singular(token.text)
            if word == "per":
                rate = True
            elif word in UNITS:
                powers[UNITS[word].name] += -1 if divides ^ rate else 1
                rate = False
        elif token.kind is not Kind.NUMBER:
            return None
    left = {name: power for name, power in powers.items() if power}
    return set(left) if all(power == 1 for power in left.values()) else None
