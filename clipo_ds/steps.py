"""Process checking: verifies the arithmetic that a text states, not its final answer.

Layer L1, no torch. `mathtext` reads a text into tokens, `expressions` evaluates the sides of an equation, `equations`
says whether they agree, `verdicts` judges one link, `doubts` what leaves it open, `restated` finds sums under a name;
here is where a text's equations are. This is what makes *process-wrong but outcome-correct* a number for any model: a
response whose answer is right and whose `StepCheck` is not consistent. The paper (CLIPO, arXiv 2603.10101) has no such
measure.

An equation counts when both of its sides are arithmetic and it computes something; running equalities a = b = c are
checked link by link. "Equals", "is equal to" and, behind a computation, "is 7" are equals signs. So is a name that
comes again in the next line with a simpler value: total = 31 + 15, total = 48. Sums of measures count in one unit:
1 hour + 30 minutes = 90 minutes.

Not counted are definitions, inequalities and congruences, a bare "12 = 12", other conversions of units, divisions with
a stated remainder, and equations with variables, unless no value of their one unknown makes them true (2x + 3x = 6x).
Nor is a link that comes out false while the words around it leave its extent or its meaning in doubt ("half of
10 + 3 = 8", "the price of 2 pens = 3 * 4"), or deny or ask it ("is 3 + 4 = 8? No"): the check would rather miss an
error than invent one.

A stated value that is the rounding of the exact one to the digits it shows is true: 17/3 = 5.67. Whole numbers shown
with `=` need three digits for that (1000/3 = 333 is rounded, 7/2 = 4 is false), one digit behind the point is none
(1/4 = 0.3 is false), and decimals may be cut from four digits on (200/3 = 66.66). With `≈` any digits will do, and the
last one may be off by one. Abused running equalities (3 + 4 = 7 - 2 = 5) are false, as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from clipo_ds.equations import Equation
from clipo_ds.expressions import Expression, begins_expression, parse_expression
from clipo_ds.mathtext import read_tokens
from clipo_ds.mathtokens import Kind, TokenList
from clipo_ds.restated import NamedSums
from clipo_ds.verdicts import judge, stated_and_actual

REACH_OF_OPERATOR = 4
"""An operator without an operand leaves what begins less than this many tokens later in doubt."""


@dataclass(frozen=True)
class FalseEquation:
    """One false link of a text."""

    text: str  # as it stands
    start: int  # position in the checked text
    end: int
    stated: Fraction | None  # value of the side that is a plain number, or of the right side; None without a value
    actual: Fraction | None  # value of the other side; None where it divides by zero


@dataclass(frozen=True)
class StepCheck:
    """What a text's arithmetic amounts to."""

    num_equations: int  # links that could be checked
    wrong: tuple[FalseEquation, ...]  # the false ones among them, in the order of the text

    @property
    def num_wrong(self) -> int:
        return len(self.wrong)

    @property
    def consistent(self) -> bool:
        """No stated equation is false. Vacuously true for a text that states none: ask `num_equations` first."""
        return not self.wrong


def check_steps(text: str) -> StepCheck:
    """Verify every arithmetic equation that a text states, with exact rational arithmetic.

    Time is linear in the length of the text; numbers that would outgrow `rationals.MAX_BITS` are not computed, and
    their equations not counted. Never raises on any text.

    >>> check = check_steps("She sold 48/2 = 24 clips in May, so 48 + 24 = 74 clips altogether.")
    >>> check.num_equations, check.num_wrong, check.consistent
    (2, 1, False)
    >>> check.wrong[0].text, check.wrong[0].stated, check.wrong[0].actual
    ('48 + 24 = 74', Fraction(74, 1), Fraction(72, 1))
    """
    source = read_tokens(text)
    links = _with_annotations(source, list(_links(source)))
    wrong = [
        FalseEquation(text[link.start : link.end], link.start, link.end, link.stated, link.actual)
        for link in links
        if not link.true
    ]
    return StepCheck(len(links), tuple(wrong))


@dataclass(frozen=True)
class _Link:
    """One judged equation, characters [start, end)."""

    start: int
    end: int
    true: bool
    stated: Fraction | None
    actual: Fraction | None


def _links(source: TokenList) -> Iterator[_Link]:
    """The links of a text that count, in its order."""
    sums = NamedSums(source)
    for start, stop in _clauses(source):
        relations = [i for i in range(start, stop) if source.tokens[i].kind is Kind.RELATION]
        edges = [start - 1, *relations, stop]
        parts = [_read_part(source, low + 1, high) for low, high in pairwise(edges)]  # part n ends at relation n
        told = parts[-1].first if not parts[-1].torn else None
        restated = sums.restate(start, relations[0], parts[1].first)
        if restated:
            yield from _judged(restated)
        yield from _clause_links(source, relations, parts)
        sums.remember(start, relations[0], stop, told)


def _judged(equation: Equation) -> Iterator[_Link]:
    true = judge(equation)
    if true is not None:
        yield _Link(*equation.span, true, *stated_and_actual(equation))


# Where the equations are.


def _clauses(source: TokenList) -> Iterator[tuple[int, int]]:
    """Token ranges without a break that hold at least one equality."""
    start, has_equality = 0, False
    for index, token in enumerate(source.tokens):
        if token.kind is Kind.BREAK:
            if has_equality:
                yield start, index
            start, has_equality = index + 1, False
        has_equality |= token.kind is Kind.RELATION and token.text in "=~"
    if has_equality:
        yield start, len(source.tokens)


def _clause_links(source: TokenList, relations: list[int], parts: list[_Part]) -> Iterator[_Link]:
    chain_computes = False  # whether an equality further left in this chain had an operation
    exact: Fraction | None = None  # the unrounded value of what the left side states
    for number, relation in enumerate(relations):
        left, right = parts[number].last, parts[number + 1].first
        whole = parts[number].first is not None and parts[number].first == left
        if not (whole and number):
            chain_computes, exact = False, None
        if left is None or right is None or source.tokens[relation].text == "?":
            chain_computes, exact = False, None
            continue
        torn = parts[number].dangling or parts[number + 1].torn
        true = None
        for link in _judged(Equation(source, left, right, relation, torn, chain_computes, exact)):
            true = link.true
            yield link
        chain_computes |= left.operations + right.operations > 0
        exact = left.value if true and isinstance(left.value, Fraction) else None


@dataclass(frozen=True)
class _Part:
    """What stands between two relations or breaks: the expression it begins with and the one it ends with."""

    first: Expression | None
    last: Expression | None
    dangling: bool  # an operator without an operand stands before `last`: price * 3 + 4
    torn: bool  # an operator without an operand follows `first`: 7 + price


def _read_part(source: TokenList, start: int, stop: int) -> _Part:
    tokens = source.tokens
    first = last = None
    dangling_operator, torn = -REACH_OF_OPERATOR, False
    index = start
    while index < stop:
        if begins_expression(source, index, stop):
            last = parse_expression(source, index, stop)
            if index == start:
                first = last
            index = last.stop
            if index < stop and tokens[index].kind is Kind.OPERATOR:
                torn |= last is first
        else:
            if tokens[index].kind is Kind.OPERATOR:
                dangling_operator = index
            index += 1
    if last is not None and last.stop < stop:
        last = None
    dangling = last is not None and last.start - dangling_operator < REACH_OF_OPERATOR
    return _Part(first, last, dangling, torn)


def _with_annotations(source: TokenList, links: list[_Link]) -> list[_Link]:
    """Add GSM8K's calculator annotations: one inside a counted equation belongs to it, another counts by itself."""
    if not source.annotations:
        return links
    merged = sorted(links, key=lambda link: link.start)
    extra: list[_Link] = []
    position = 0
    for annotation in source.annotations:
        own = read_tokens(annotation.text)
        judged = list(_links(own))
        while position < len(merged) and merged[position].end < annotation.start:
            position += 1
        inside = position < len(merged) and merged[position].start <= annotation.start
        for link in judged:
            moved = _Link(annotation.start, annotation.end, link.true, link.stated, link.actual)
            if not inside:
                extra.append(moved)
            elif merged[position].true and not link.true:
                merged[position] = moved
    return sorted(merged + extra, key=lambda link: link.start)
