"""What leaves an equation in doubt that comes out false.

Layer L1, between `clipo_ds.equations` and `clipo_ds.verdicts`; no torch. A link that comes out false is called so only
when nothing around it leaves its extent or its meaning in doubt. The rules for that were found by reading what the
check flagged in human solutions of MATH and GSM8K and in texts of models; each names its example.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from clipo_ds.contexts import counts_in_residues, is_cut_off, is_denied_or_tried, states_quotient
from clipo_ds.equations import MAX_READ_AGAIN, Equation
from clipo_ds.expressions import Expression, is_remark, lost_power, parse_expression
from clipo_ds.mathtokens import Kind, Token, is_binary
from clipo_ds.mathunits import UNITS, first_names, mixes_measures, singular, units_of_product
from clipo_ds.mathwords import (
    ARTICLES,
    COMPARING_WORDS,
    COMPUTING_WORDS,
    CONNECTIVES,
    EXTENTS,
    FRACTION_WORDS,
    FUNCTION_WORDS,
    JOINING_WORDS,
    LABEL_WORDS,
    NUMBER_WORDS,
    ORDINALS,
    PRODUCT_SIGNS,
    PRONOUNS,
    RESULT_VERBS,
    WORTH_WORDS,
)
from clipo_ds.rationals import PI, Unknown

WORDS_BEFORE = 5
"""So many words before an equation may compute with it."""
SLIP = Fraction(1, 3)
"""Share by which a sum of differently named things is off at most where it is a slip, and counts nothing else."""


def in_doubt(equation: Equation) -> bool:
    """Whether a link that comes out false may only have been misread, or not been meant."""
    left, right = equation.left, equation.right
    return (
        equation.torn
        or (bool(left.features | right.features) and right.stop - left.start > MAX_READ_AGAIN)
        or left.ambiguous
        or right.ambiguous
        or _left_begins_in_doubt(equation)
        or _right_ends_in_doubt(equation)
        or _told_in_words(equation)
        or _is_share(equation)
        or _shares_words(equation)
        or _of_a_sum(equation)
        or _defines_operation(equation)
        or _names_factor(equation)
        or _lost_powers(equation)
        or _subtracts_from_x(equation)
        or _means_otherwise(equation)
    )


def _means_otherwise(equation: Equation) -> bool:
    """Whether the prose around says that this is no statement of arithmetic."""
    text = equation.source.text
    start, end = equation.span
    left, right = equation.left, equation.right
    if is_denied_or_tried(text, start, end):
        return True
    stated, actual = equation.stated_and_actual
    if stated is None or actual is None:
        return False
    if "pi" in left.features & right.features and _is_same_angle(equation, stated - actual):
        return True
    divides = any(token.text in ("/", "mod") or token.kind is Kind.FRACTION for token in _tokens(equation))
    return (
        (divides and states_quotient(text, start, end, stated, actual))
        or counts_in_residues(text, start, end, stated, actual)
        or is_cut_off(text, end, stated, actual, divides=divides)
        or text[equation.source.tokens[equation.relation].start - 1] == "!"  # 3+4!=8
    )


def _is_same_angle(equation: Equation, difference: Fraction) -> bool:
    """13 pi/6 = pi/6: whole turns are left out."""
    tokens = _tokens(equation)
    computes = any(token.text in tuple("()+*^") for token in tokens)
    divides = any(token.text == "/" or token.kind is Kind.FRACTION for token in tokens)
    computes |= equation.left.additions > 0 and not divides  # 24 pi - 9 pi
    return not computes and (difference / PI).limit_denominator(1000).denominator == 1


def _tokens(equation: Equation) -> list[Token]:
    return equation.source.tokens[equation.left.start : equation.right.stop]


# Where the left side begins.


def _left_begins_in_doubt(equation: Equation) -> bool:
    tokens, left = equation.source.tokens, equation.left
    first = tokens[left.start]
    before = tokens[left.start - 1] if left.start else None
    lone = left.operations == 0 and not equation.in_chain
    if lone and left.numbers_with_unit:
        return True  # the price of 2 pens = 3 * 4
    if before is None:
        return False
    if before.kind is Kind.RELATION:
        return "of" in left.features  # = 1/4 of the 2^8 = 256 sequences
    if before.kind is Kind.BREAK:
        return _break_in_doubt(equation, before)
    if first.kind is Kind.OPERATOR and not first.dollar:
        spaced = tokens[left.start + 1].gap
        if first.text == "+" or spaced or before.text.lower() not in CONNECTIVES:
            return True  # cars + 10 - 4, cake -1/4 cake: no sign, unlike "it is -3 + 5"
    if not first.gap and "$" not in equation.source.text[before.end : first.start]:
        return True  # 15 USD(6/1)
    return _words_compute(equation, lone and not first.dollar)


def _break_in_doubt(equation: Equation, before: Token) -> bool:
    """Whether what stands before the break before the left side may belong to it."""
    source, left = equation.source, equation.left
    first = source.tokens[left.start]
    sign = source.text[before.start : before.end]
    stuck = not first.gap or first.kind is Kind.OPERATOR
    if before.text in ("\n", "\\") or (before.text in (")", "]", "}", "|") and stuck):
        return True
    earlier = source.tokens[left.start - 2] if left.start > 1 else None
    if earlier is None or "\n" in source.text[before.end : first.start]:
        return False
    if is_binary(earlier) and sign in (".", ","):
        return True  # .5 + . 25 + .125
    if earlier.kind is not Kind.NUMBER:
        return _lists(equation, sign)
    if sign == "," and first.kind is Kind.NUMBER and first.end - first.start == 3 and earlier.end - earlier.start <= 3:
        return True  # 12, 600 / 70 = 180
    return (sign == ":" and left.operations == 0) or _lists(equation, sign)  # 12 : 18 = 2/3


def _lists(equation: Equation, sign: str) -> bool:
    """1/2, 2/8 = 2/4, 1/4: lists of fractions, of which the n-th equals the n-th."""
    tokens, stop = equation.source.tokens, equation.right.stop
    after = tokens[stop] if stop + 1 < len(tokens) else None
    if sign != "," or after is None or equation.left.operations > 1 or equation.right.operations > 1:
        return False
    following = tokens[stop + 1].kind in (Kind.NUMBER, Kind.FRACTION)
    return after.kind is Kind.BREAK and equation.source.text[after.start] == "," and following


def _words_compute(equation: Equation, plain_number: bool) -> bool:
    """Whether the words before the left side may belong to it, or name what it begins with."""
    source, start = equation.source, equation.left.start
    tokens = source.tokens
    at = start - 1
    while at > max(start - WORDS_BEFORE, 0) and tokens[at].kind is Kind.WORD and _is_article(tokens[at].text):
        at -= 1
    words = [token.text.lower() for token in tokens[max(at - 1, 0) : at + 1] if token.kind is Kind.WORD]
    word, earlier = words[-1] if words else "", words[0] if len(words) > 1 else ""
    if tokens[at].text.istitle() and word.endswith("s") and _is_range(equation):
        return True  # Floors 1-4 = 4 * 6
    if plain_number and word not in CONNECTIVES:
        return True  # interest in year 2 = 3 * 4
    if word == "of":
        averages = earlier in ("average", "mean", "median") and equation.left.additions > 0
        return averages or _noun_computes(earlier) or _number_before(tokens, at) is not None
    if word == "than":
        return _compares(equation, at)
    if word == "as" and earlier in EXTENTS:
        return True  # twice as many as 3 * 4
    if word in JOINING_WORDS and _number_before(tokens, at) is not None:
        return True  # 5 from 3 * 2
    if word in ("in", "per", "for", "each", "every") and tokens[start].value == 1:
        return _number_before(tokens, at) is not None  # 10 cards in 1 pack x 4
    if word in LABEL_WORDS or (singular(word) in LABEL_WORDS and _is_range(equation)):
        return earlier not in ORDINALS  # Step 1 - 3 + 4 = 7, Weeks 1-2; but not the first day 7 * 2
    if word in FRACTION_WORDS and earlier in ORDINALS - {"a", "an", "one"}:
        return False  # in the second half 7 * 2 = 13
    return word in COMPUTING_WORDS or word in NUMBER_WORDS


def _is_article(word: str) -> bool:
    """Whether a word leaves open what the words before it do: the, his, Tom's; but not that's and it's."""
    word = word.lower().replace("\u2019", "'")
    return word in ARTICLES or (word.endswith("'s") and word.removesuffix("'s") not in CONNECTIVES | PRONOUNS)


def _noun_computes(noun: str) -> bool:
    """Whether "noun of" computes with what follows, or counts it: half of 10 + 3, square of 3 + 4, packs of 2 + 1."""
    parts = set(noun.split("-")) | {singular(noun)}
    return bool(parts & (FRACTION_WORDS | FUNCTION_WORDS)) or (noun.endswith("s") and noun not in ("is", "was"))


def _number_before(tokens: list[Token], index: int) -> Fraction | None:
    """The number among the three tokens before `index` that stands in the prose, in no equation."""
    for near in range(index - 1, max(index - 4, -1), -1):
        if tokens[near].kind in (Kind.BREAK, Kind.RELATION, Kind.OPERATOR):
            return None
        if tokens[near].kind is Kind.NUMBER:
            return tokens[near].value if near == 0 or tokens[near - 1].kind in (Kind.WORD, Kind.BREAK) else None
    return None


def _compares(equation: Equation, at: int) -> bool:
    """Whether a "more than" or "less than" before the left side computes with it: 5 more than 3 * 2 = 11."""
    tokens = equation.source.tokens
    if any(token.text == "%" for token in tokens[max(at - 3, 0) : at]):
        return True  # 20% more than 3 * 2 = 7.2
    number = _number_before(tokens, at)
    if number is None:
        words = {token.text.lower() for token in tokens[max(at - 3, 0) : at] if token.kind is Kind.WORD}
        return bool(words & (FRACTION_WORDS | NUMBER_WORDS | {"times"}))
    left, right = equation.left.value, equation.right.value
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return True
    return right in (left + number, left - number, left * number, left * (number + 1), left / number if number else 0)


def _is_range(equation: Equation) -> bool:
    """Weeks 1-2: a range, no subtraction."""
    tokens = equation.source.tokens[equation.left.start : equation.left.stop]
    return len(tokens) > 2 and tokens[1].text == "-" and not (tokens[1].gap or tokens[2].gap)


# Where the right side ends.


def _right_ends_in_doubt(equation: Equation) -> bool:
    source, stop = equation.source, equation.right.stop
    tokens = source.tokens
    after = tokens[stop] if stop < len(tokens) else None
    if after is None:
        return False
    if after.kind is Kind.BREAK:
        following = tokens[stop + 1].text.lower() if stop + 1 < len(tokens) else ""
        if after.text == "\\" or (after.text == "\n" and following in tuple("+-*/")):
            return True
        if after.text in ("(", "[", "{", "|") and not after.gap:
            return True
        if source.text[after.start] == ":" and equation.right.operations == 0 and following[:1].isdigit():
            return "\n" not in source.text[after.start : tokens[stop + 1].start]  # 12/18 = 2 : 3
        return after.text == "(" and following in ("mod", "modulo", r"\mod")
    words = {token.text.lower() for token in tokens[stop : stop + 3] if token.kind is not Kind.BREAK}
    compares = bool(words & COMPARING_WORDS) and equation.left.operations > 0
    return after.text.lower() in ("mod", "modulo") or (compares and _is_worded(equation))


def _is_worded(equation: Equation) -> bool:
    """Whether the relation is a word: equals, is."""
    relation = equation.source.tokens[equation.relation]
    return equation.source.text[relation.start].isalpha()


def _told_in_words(equation: Equation) -> bool:
    """Whether "is" says something else of a computation than its value: the last digit of 2^5 is 2."""
    if not _is_worded(equation):
        return False
    tokens, left = equation.source.tokens, equation.left
    before = tokens[left.start - 1] if left.start else None
    named = before is not None and before.kind is not Kind.BREAK
    if named and before is not None:
        word = before.text.lower()
        total = word == "of" and tokens[max(left.start - 2, 0)].text.lower() in ("total", "sum", "result")
        named = not (total or word in CONNECTIVES or _is_contraction(word) or word == "adding")
    computed = [token for token in tokens[left.start : left.stop] if is_binary(token) and token.text != "^"]
    after_maths = before is not None and before.kind is Kind.BREAK and "\\" in equation.source.text[before.start :][:2]
    return named or after_maths or not computed or equation.right.operations > 0


def _is_contraction(word: str) -> bool:
    return "'s" in word.replace("\u2019", "'") and not _is_article(word)


# What the sides are.


def units_in_doubt(equation: Equation) -> bool:
    source, left_side, right_side = equation.source, equation.left, equation.right
    tokens = source.tokens
    following = tokens[right_side.stop : right_side.stop + 2]
    right_units = right_side.units | {singular(token.text) for token in following if token.kind is Kind.WORD}
    left, right = first_names(left_side.units), first_names(right_units)
    if left & UNITS.keys() and mixes_measures(left | right) and not _cancels(equation, right):
        return True  # 1 hour + 30 minutes = 90 minutes
    if "triangle" in right and _signs(equation, left_side) | _signs(equation, right_side) == {"-"}:
        return True  # a 6-8-10 triangle
    if right_side.value == 1 and left_side.operations == 1 and left_side.numbers_with_unit > 1:
        return True  # 7 knicks / 2 knacks = 1, a conversion factor
    if equation.num_operations == 0 and (left or right):
        return True  # … = 3 boxes = 36 eggs
    measured = {unit for unit in left if unit in UNITS and UNITS[unit].dimension != "money"}
    if right_side.operations and left_side.operations == 0 and measured:
        return True  # … = 180 minutes = 180 * 60
    if _names_figure(equation) or _letters_are_unknowns(equation, right):
        return True
    sums_things = left_side.additions == left_side.operations > 0
    all_named = left_side.numbers_with_unit == left_side.numbers
    other_things = not left & right & UNITS.keys() and (len(left) > 1 or (bool(right) and not left & right))
    return sums_things and all_named and other_things and not _is_slip(equation, left, right)


def _letters_are_unknowns(equation: Equation, right: set[str]) -> bool:
    """2 L + 2 W = 30, 12 + 3 = 5 m + 1: letters that only look like units. Nor is it clear what m is beside h."""
    letters = {unit for unit in equation.left.units if len(unit) == 1}
    if equation.right.operations and any(len(unit) == 1 for unit in equation.right.units):
        return True
    minutes = "m" in letters and any(UNITS[unit].dimension == "time" for unit in equation.left.units if unit in UNITS)
    summed = equation.left.additions > 0 and bool(first_names(letters) - right)
    return bool(letters) and (not right or summed or (minutes and equation.left.additions > 0))


def _cancels(equation: Equation, right: set[str]) -> bool:
    """Whether the units of a product come out as the right side's: 3 weeks * 7 days/week = 22 days."""
    left = units_of_product(equation.source.tokens, equation.left.start, equation.left.stop)
    return bool(left) and left == {name for name in right if name in UNITS}


def _is_slip(equation: Equation, left: set[str], right: set[str]) -> bool:
    """15 red + 20 green = 36 marbles: a sum of things with other names, only a little off; no prices, no legs."""
    stated, actual = equation.right.value, equation.left.value
    if isinstance(stated, Unknown) or isinstance(actual, Unknown) or len(left) < 2:
        return False
    if right & (UNITS.keys() | WORTH_WORDS):
        return False  # 3 adults + 2 children = $40
    return abs(stated - actual) <= abs(actual) * SLIP


def _names_figure(equation: Equation) -> bool:
    """One 2 * 3 side = 2 * 3 * 4: what the left side computes is a name."""
    tokens, left, right = equation.source.tokens, equation.left, equation.right
    ends_named = tokens[left.stop - 1].kind is Kind.WORD and left.numbers_with_unit == 1
    before = tokens[left.start - 1] if left.start else None
    told = before is not None and before.kind is Kind.WORD
    return bool(left.operations and right.operations and ends_named and told and not left.units & right.units)


def _names_factor(equation: Equation) -> bool:
    """2 pi (radius) = 2 pi (2): the words in brackets are what a number is put in for."""
    tokens, left = equation.source.tokens, equation.left
    opens = [at for at in range(left.start, left.stop) if tokens[at].text == "("]
    return equation.right.operations > 0 and any(is_remark(equation.source, at) for at in opens)


def _lost_powers(equation: Equation) -> bool:
    """32 + 42 = 25, 5 x 103 = 5000: squares, cubes and powers of ten that lost their markup."""
    source, left, right = equation.source, equation.left, equation.right
    tokens = source.tokens[left.start : left.stop]
    long = [token.text for token in tokens if token.kind is Kind.NUMBER and token.end - token.start > 1]
    if right.stop - left.start > MAX_READ_AGAIN or not long or any(lost_power(text) is None for text in long):
        return False
    read, stated = (
        parse_expression(source, side.start, side.stop, frozenset({"superscript"})) for side in (left, right)
    )
    return any(equation.sides_agree(read, side, None) for side in (right, stated))


def _subtracts_from_x(equation: Equation) -> bool:
    """3 x -2 = 7: the x may be an unknown."""
    return any(
        equation.source.text[sign.start] == "x" and following.text == "-"
        for sign, following in pairwise(_tokens(equation))
        if sign.kind is Kind.OPERATOR
    )


def _signs(equation: Equation, side: Expression) -> set[str]:
    """The operators of a side as they are written."""
    source = equation.source
    tokens = source.tokens[side.start : side.stop]
    return {source.text[token.start : token.end] for token in tokens if token.kind is Kind.OPERATOR}


def _is_share(equation: Equation) -> bool:
    """2/5 = 10 (people): a proportion told as an equation. Not so 3 / 60 = 20, nor "earns 3/60 = 20"."""
    left, right, tokens = equation.left, equation.right, equation.source.tokens
    proper = isinstance(left.value, Fraction) and 0 < left.value <= 1  # so is 4/4 = 20
    whole = isinstance(right.value, Fraction) and right.value.denominator == 1 and right.value > 0
    slashes = [at for at in range(left.start, left.stop) if tokens[at].text == "/" or tokens[at].kind is Kind.FRACTION]
    if not (proper and whole and slashes and left.operations == 1 and right.operations == 0):
        return False
    before = tokens[left.start - 1] if left.start else None
    after_verb = before is not None and before.text.lower() in RESULT_VERBS
    spaced = tokens[slashes[0]].text == "/" and tokens[slashes[0]].gap and tokens[slashes[0] + 1].gap
    if left.value == 1:
        return not spaced
    turned = left.value * right.value == 1 and tokens[left.start].value not in (None, 1)  # type: ignore[operator]
    return not (after_verb or spaced or turned)  # turned: 5/30 = 6


def _shares_words(equation: Equation) -> bool:
    """1/3 of Ann = 60/3: a share of something that has no number."""
    left, right = equation.left, equation.right
    tokens = equation.source.tokens[left.start : left.stop if left.operations else right.stop]
    for share, word in pairwise(tokens):
        if word.kind is Kind.WORD and word.text.lower() == "of" and share.kind is not Kind.WORD:
            return True
    return False


def _of_a_sum(equation: Equation) -> bool:
    """5% of the $30 + $40 = $70: the equation is what the share is of."""
    tokens, left = equation.source.tokens, equation.left
    if "of" not in left.features:
        return False
    of = next(at for at in range(left.start, left.stop) if tokens[at].text == "of")
    return equation.sides_agree(parse_expression(equation.source, of + 1, left.stop), equation.right, None)


def _defines_operation(equation: Equation) -> bool:
    """3 * 2 = 3^2 + 3 \\cdot 2: a lone star before another sign for products is an operation the text defines."""
    left, right = _signs(equation, equation.left), _signs(equation, equation.right)
    return r"\ast" in left | right or (left == {"*"} and bool(right & PRODUCT_SIGNS))
