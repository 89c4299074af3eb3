r"""Comparison of two final answers: exact strings and numbers, and lists, tuples, sets, systems and matrices of them.

Imports `clipo_ds.brackets`, `clipo_ds.spelling`, `clipo_ds.choices`, `clipo_ds.measures`, `clipo_ds.real_sets` and the
standard library. `same_answer` says True or False only where that is certain and None where algebra is needed, so that
nearly all answers of GSM8K-like data cost microseconds. Where algebra is at hand (`clipo_ds.algebra`) the same
comparison is made with it: answers are taken apart here in both cases, and algebra sees their parts.

Conventions, all of them what readers of the benchmarks expect: units, currency and degree signs are ignored; 18% is 18
and also 0.18; `x = 5` is 5, and `17 mod 5 = 2` is 2; a list without brackets, or in braces, has no order, what stands
in ( ) or [ ] has, and a column of numbers is such a tuple; a word is compared as a word, whatever its case; 52_8 may be
given as 52, but not as 52_9.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from clipo_ds.brackets import number_inside
from clipo_ds.choices import choice_letter
from clipo_ds.measures import same_measure, same_time
from clipo_ds.real_sets import is_unmistakable, read_set, same_set
from clipo_ds.spelling import canonical, key, number

MAX_ANSWER_CHARS = 1000  # longer answers are compared as strings only

Algebra = Callable[[str, str], bool]
"""Decides what takes algebra: whether an answer is the truth."""

_ASSIGNMENT = re.compile(
    r"((?:\\?[A-Za-z][A-Za-z ]*)(?:_(?:\w+|\{\w+\}))?(?:\([\w, ]+\))?"
    r"|\\(?:overline|angle|triangle|operatorname)\s*\{?[\w ]+\}?|\|[A-Za-z]+\||\[[A-Z]{3,}\]|\([a-z](?:,\s*[a-z])+\))"
    r"\s*(?:=|\\(?:in|approx)(?![A-Za-z]))\s*([^=<>]+)",
    re.DOTALL,
)
_ONE_ASSIGNMENT = re.compile(r"((?:\\[a-z]+|[A-Za-z])(?:_(?:\w|\{\w+\}))?)\s*=\s*([^=<>]+)", re.DOTALL)
_TUPLE_ASSIGNMENT = re.compile(r"\(([^()=]+)\)\s*=\s*\((.+)\)", re.DOTALL)
_FUNCTION = re.compile(r"[A-Za-z]\([A-Za-z]\)")
_SYSTEM = re.compile(
    r"(?:\\\{)?\s*\\begin\s*\{(cases|aligned|array|gathered)\}\s*(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL
)
_FREE_LETTER = re.compile(
    r"\\(?:bmod|mod|pmod|gcd|binom|frac|sqrt|cdot|times|div|log|ln|sin|cos|tan|pi|lfloor|rfloor|lceil|rceil|left"
    r"|right|equiv)(?![A-Za-z])|(?<![A-Za-z\\])(?:mod|gcd|lcm|log|ln|sin|cos|tan|max|min)(?![A-Za-z])|([A-Za-z])"
)
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_MODULUS = re.compile(r"\s*(?:\\pmod\s*\{?\d+\}?|\(\s*(?:\\bmod|\\mod|mod)\s*\{?\d+\}?\s*\))\s*$")
_LABEL = re.compile(r"[A-Za-z][A-Za-z ]{0,40}:\s+")
_APPROXIMATION = re.compile(r"(?<=\S)\s*\\approx.*", re.DOTALL)
_AND_OR = re.compile(r"(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])(?:\s*,)?")
_MATRIX = re.compile(
    r"\\begin\s*\{([pbBvV]?matrix|smallmatrix|array)\}\s*(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL
)
_IN_BRACKETS = re.compile(r"\A\s*[(\[]\s*(\\begin\s*\{array\}.*\\end\s*\{array\})\s*[)\]]\s*\Z", re.DOTALL)
_NO_SOLUTION = re.compile(r"(?:there\s+(?:is|are)\s+)?no\s+solutions?|\\emptyset", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9 '.\-]*")
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=[a-z]{2})")
_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}"}


def _closing(text: str) -> int:
    """Index where the bracket at the beginning closes, -1 when it never does; any bracket closes any other: (3, 4]."""
    depth = 0
    for i, mark in enumerate(text):
        depth += (mark in "([{") - (mark in ")]}")
        if depth == 0 and mark in ")]}":
            return i
    return -1


def _split_commas(text: str, pattern: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"[(\[{{]|[)\]}}]|{pattern}", text):
        mark = match.group()
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


@lru_cache(maxsize=16384)
def sequence(answer: str) -> tuple[str, tuple[str, ...], str] | None:
    r"""(opening bracket, elements, closing bracket) of a list, set, tuple or interval in canonical form, else None.

    >>> sequence("1,234 and 5"), sequence("(3, 4]"), sequence(r"\{1,2\}"), sequence("f(1,2)")
    (('', ('1,234', '5'), ''), ('(', ('3', '4'), ']'), ('\\{', ('1', '2'), '\\}'), None)
    """
    text = answer.strip()
    opening = next((b for b in _BRACKETS if text.startswith(b)), "")
    if opening:
        inner = text[len(opening) :]
        closing = next((c for c in _BRACKETS.values() if inner.endswith(c)), "")
        if closing and _closing(text) == len(text) - 1:
            elements = _split_commas(inner[: len(inner) - len(closing)], r"[,;]")
            return (opening, tuple(elements), closing) if elements else None
    text = _AND_OR.sub(", ", text)
    parts = _split_commas(text, r",(?=\s)|;")
    parts = [p for part in parts for p in ([part] if number(part) else _split_commas(part, ","))]
    return ("", tuple(parts), "") if len(parts) > 1 else None


def is_words(answer: str) -> bool:
    r"""Whether an answer is a word or a phrase, to be compared letter by letter and never as a product of variables.

    >>> is_words(r"\text{Evelyn}"), is_words("CAKE"), is_words("even"), is_words("xy"), is_words("2k+2")
    (True, True, True, False, False)
    """
    text = canonical(answer)
    if not _WORDS.fullmatch(text):
        return False
    marked = re.search(r"\\(?:text|mbox|mathrm|hbox)", answer) is not None and len(text) > 1
    return marked or re.search(r"[A-Za-z]{4}", text) is not None or (text.isupper() and len(text) >= 3)


def _matrix(text: str) -> list[list[str]] | None:
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match.group(2):
        return None
    rows = [row.strip() for row in match.group(2).split("\\\\")]
    return [[cell.strip() for cell in row.split("&")] for row in rows if row]


def _all_same(pairs: list[tuple[str, str]], algebra: Algebra | None) -> bool | None:
    verdicts = [same_answer(a, t, algebra) for a, t in pairs]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _same_unordered(answers: tuple[str, ...], truths: tuple[str, ...], algebra: Algebra | None) -> bool | None:
    """Set equality: every element has an equal on the other side; False only where all elements are certain."""
    if len(answers) * len(truths) > 400:
        return None
    table = [[same_answer(a, t) for t in truths] for a in answers]
    if algebra is not None:  # only for what has no equal yet, and not for all pairs
        for i, row in enumerate(table):
            for j, same in enumerate(row):
                if same is None and not (True in row and any(other[j] for other in table)):
                    row[j] = same_answer(answers[i], truths[j], algebra)
    if all(True in row for row in table) and all(True in column for column in zip(*table, strict=True)):
        return True
    return None if any(None in row for row in table) else False


def _same_sequence(answer: str, truth: str, algebra: Algebra | None) -> bool | None:
    ours, theirs = sequence(answer), sequence(truth)
    if theirs and not ours and _PLUS_MINUS.search(answer):
        ours = ("", (answer,), "")
    elif ours and not theirs and _PLUS_MINUS.search(truth):
        theirs = ("", (truth,), "")
    if ours is None or theirs is None:
        # A list is not the one answer asked for, unless it says that one again and again; nor the other way round.
        plain = not (is_unmistakable(answer) or is_unmistakable(truth))  # x < 1, x \ne 0 may be one set
        if ours and not ours[0] and (plain or number(truth)):
            return _same_unordered(ours[1], (truth,), algebra)
        if theirs and (number(answer) or (plain and not theirs[0])):
            return _same_unordered((answer,), theirs[1], algebra)
        return None
    if len(ours[1]) == 1 == len(theirs[1]):
        return same_answer(ours[1][0], theirs[1][0], algebra) if "[" not in (ours[0], theirs[0]) else None
    unordered = ("", "\\{")
    if theirs[0] in unordered and ours[0] in unordered:
        return _same_unordered(_alternatives(ours[1]), _alternatives(theirs[1]), algebra)
    if len(ours[1]) != len(theirs[1]):
        return None
    same = _all_same(list(zip(ours[1], theirs[1], strict=True)), algebra)
    if (ours[0], ours[2]) == (theirs[0], theirs[2]):
        return same
    if ours[0] and theirs[0] and all(number(e) for e in (*ours[1], *theirs[1])):
        return False  # (2, 4] is not (2, 4)
    return True if same and "" in (ours[0], theirs[0]) and "[" not in (ours[0], theirs[0]) else None


def _alternatives(elements: tuple[str, ...]) -> tuple[str, ...]:
    r"""Elements with the one \pm of each written out."""
    written: list[str] = []
    for element in elements:
        signs = "+-" if len(_PLUS_MINUS.findall(element)) == 1 else ()
        written += [_PLUS_MINUS.sub(sign, element) for sign in signs] or [element]
    return tuple(written)


def _unassigned(answer: str, truth: str) -> tuple[str, str] | None:
    """Right-hand sides of `x = ...` where only one side has a name, or both the same; None when nothing changes."""
    ours, theirs = _ASSIGNMENT.fullmatch(answer), _ASSIGNMENT.fullmatch(truth)
    if ours and theirs:
        names = {name.replace(" ", "").lower() for name in (ours.group(1), theirs.group(1))}
        # y = 2x and f(x) = 2x are one function, and so are h = 2t and h(t) = 2t
        called = {name[0] for name in names if _FUNCTION.fullmatch(name)}
        same_name = len(names) == 1 or (len(called) == 1 and bool(({"y"} | called) & names))
        return (ours.group(2), theirs.group(2)) if same_name else None
    if (not ours and not theirs) or "=" in (truth if ours else answer):
        return None
    return ours.group(2) if ours else answer, theirs.group(2) if theirs else truth


def _claimed_value(text: str) -> str | None:
    r"""The last side of an equation between numbers: 2 of ``17 \bmod 5 = 2``; None where a letter stands before it."""
    if not re.search(r"=|\\equiv", text):
        return None
    *sides, last = re.split(r"=|\\equiv(?![A-Za-z])", text)
    closed = all(re.search(r"\d", side) and not any(_FREE_LETTER.findall(side)) for side in sides)
    return _MODULUS.sub("", last).strip() if closed and re.search(r"\d", last) else None


@lru_cache(maxsize=4096)
def _system(text: str) -> tuple[str, ...] | None:
    """The equations of a system, or of a list of them; None for anything else."""
    match = _SYSTEM.fullmatch(text)
    if match:
        rows = [part for row in match[2].split("\\\\") for part in _split_commas(row.replace("&", ""), r",")]
    elif text.startswith(r"\{") and text.endswith(r"\}"):
        rows = _split_commas(text[2:-2], r"[,;]")
    else:
        rows = _split_commas(_AND_OR.sub(", ", text), r"[,;]|\\\\")
    rows = [row.strip() for row in rows if row.strip()]
    return tuple(rows) if len(rows) > 1 and all(row.count("=") == 1 for row in rows) else None


@lru_cache(maxsize=4096)
def _assignments(text: str) -> dict[str, str] | None:
    """What each of two or more unknowns is, by name; None for anything else."""
    whole = _TUPLE_ASSIGNMENT.fullmatch(text)
    if whole:
        names, values = _split_commas(whole[1], ","), _split_commas(whole[2], ",")
    else:
        matches = [_ONE_ASSIGNMENT.fullmatch(row) for row in _system(text) or ()]
        if not matches or None in matches:
            return None
        names, values = ([match[k].strip() for match in matches if match] for k in (1, 2))
    distinct = len(names) > 1 and len(set(names)) == len(names) == len(values)
    return dict(zip(names, values, strict=True)) if distinct else None


def _same_system(answer: str, truth: str, algebra: Algebra | None) -> bool | None:
    """Systems of equations; x = 2 and y = 3, in any order, is also the pair (2, 3): unknowns in alphabetical order."""
    ours, theirs = _assignments(answer), _assignments(truth)
    if ours and theirs:
        return _all_same([(ours[n], theirs[n]) for n in ours], algebra) if ours.keys() == theirs.keys() else False
    if ours or theirs:
        named, other = (ours, truth) if ours else (theirs, answer)
        assert named is not None
        listed = sequence(other)
        if listed is None or listed[0] != "(" or any("=" in element for element in listed[1]):
            return None
        values = [named[name] for name in sorted(named)]
        if len(values) != len(listed[1]):
            return False
        pairs = list(zip(values, listed[1], strict=True))
        return _all_same(pairs if ours else [(t, a) for a, t in pairs], algebra)
    rows, expected = _system(answer), _system(truth)
    if rows is None or expected is None or not (_SYSTEM.search(answer) or _SYSTEM.search(truth)):
        return None
    return _same_unordered(rows, expected, algebra) if len(rows) == len(expected) else None


def _exact_value(text: str) -> Fraction | None:
    value = number(text)
    return None if value is None else value.value


def _same_real_set(answer: str, truth: str) -> bool | None:
    if not (is_unmistakable(answer) or is_unmistakable(truth)):
        return None
    ours, theirs = read_set(answer, _exact_value), read_set(truth, _exact_value)
    return same_set(ours, theirs) if ours and theirs else None


def same_answer(answer: str, truth: str, algebra: Algebra | None = None) -> bool | None:
    r"""Whether `answer` and `truth` are the same: True or False where that is certain, None where it takes algebra.

    Args:
        answer: a final answer as a response writes it (`clipo_ds.extraction.final_answer`).
        truth: one accepted answer (`clipo_ds.extraction.truth_answers`).
        algebra: asked for parts, or for the whole, that would be None without it.

    >>> same_answer(r"\$1{,}234.00", "1234"), same_answer("x = 5", "6"), same_answer(r"\{3, 1\}", "1,3")
    (True, False, True)
    >>> same_answer("y=3, x=2", "(x,y)=(2,3)"), same_answer(r"x<-1 \text{ or } x>3", r"(-\infty,-1)\cup(3,\infty)")
    (True, True)
    >>> same_answer(r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}") is None
    True
    """
    verdict = _compared(answer, truth, algebra)
    if verdict is None and algebra is not None:
        return algebra(answer, truth)
    return verdict


def _compared(answer: str, truth: str, algebra: Algebra | None) -> bool | None:
    ours, theirs = key(answer), key(truth)
    if not ours or not theirs:
        return False
    if ours == theirs:
        return True
    if len(answer) > MAX_ANSWER_CHARS or len(truth) > MAX_ANSWER_CHARS:
        return False
    left, right = number_inside(canonical(answer)), number_inside(canonical(truth))
    if re.fullmatch(r"\(?[A-J]\)?", right):
        return choice_letter(answer) == right.strip("()")
    if right != truth and re.match(r"\(?[A-J]\)", right) and choice_letter(truth):
        return choice_letter(answer) == choice_letter(truth)
    if _NO_SOLUTION.fullmatch(left) and _NO_SOLUTION.fullmatch(right):
        return True
    for measured in (same_time(left, right), same_measure(left, right)):
        if measured is not None:
            return measured
    expected = number(right)
    if expected is not None:
        left = _LABEL.sub("", left, count=1)
        given = number(left, letters_are_units=True)
        if given is not None:
            return given.equals(expected)
    elif sequence(right) is None and is_words(truth):
        return _ARTICLE.sub("", left.lower()).replace(" ", "") == _ARTICLE.sub("", right.lower()).replace(" ", "")
    if len(left) >= 2 and left.lower() == right.lower() and is_words(answer):
        return True  # \text{Yes} for yes, which alone could be a product
    verdict = _same_system(left, right, algebra)
    if verdict is not None:
        return verdict
    sides = _unassigned(left, right)
    if sides is not None:
        return same_answer(*sides, algebra)
    claimed = [value for side in (left, right) if (value := _claimed_value(side)) is not None]
    if len(claimed) == 1:
        one, other = (claimed[0], truth) if _claimed_value(left) is not None else (answer, claimed[0])
        return same_answer(one, other, algebra)
    if left.count("=") == 1 == right.count("="):  # side by side; algebra knows more ways to be one equation
        if _all_same(list(zip(left.split("="), right.split("="), strict=True)), None):
            return True
    else:
        verdict = _same_real_set(left, right)
        if verdict is not None:
            return verdict
    matrices = tuple(_matrix(_IN_BRACKETS.sub(r"\1", side)) for side in (left, right))
    if matrices[0] and matrices[1]:
        return _same_matrix(matrices[0], matrices[1], algebra)
    if matrices[0] or matrices[1]:
        return _same_vector(matrices[0] or sequence(left), matrices[1] or sequence(right), algebra)
    if "\\approx" in left and _APPROXIMATION.sub("", left) != left:
        return same_answer(_APPROXIMATION.sub("", left), truth, algebra)  # 3/56 \approx 0.05 claims the fraction
    verdict = _same_sequence(left, right, algebra)
    if verdict is None and expected is not None and _has_words(left):
        return False
    return verdict


def _same_matrix(ours: list[list[str]], theirs: list[list[str]], algebra: Algebra | None) -> bool | None:
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        return False
    return _all_same([pair for a, t in zip(ours, theirs, strict=True) for pair in zip(a, t, strict=True)], algebra)


def _same_vector(ours: object, theirs: object, algebra: Algebra | None) -> bool | None:
    """A column or a row of a matrix against a tuple; None where one of the two is neither."""
    elements = [_vector(side) for side in (ours, theirs)]
    if elements[0] is None or elements[1] is None:
        return None
    if len(elements[0]) != len(elements[1]):
        return False
    return _all_same(list(zip(*elements, strict=True)), algebra)


def _vector(side: object) -> list[str] | None:
    if isinstance(side, tuple):  # as `sequence` gives it
        opening, elements, closing = side
        return list(elements) if (opening, closing) in (("(", ")"), ("[", "]")) else None
    if isinstance(side, list) and (len(side) == 1 or all(len(row) == 1 for row in side)):
        return [cell for row in side for cell in row]
    return None


def _has_words(text: str) -> bool:
    r"""Words in what should be a number ("not 18", "18 if x > 0"): nothing that algebra may look into for a number."""
    return re.search(r"(?<![A-Za-z\\])(?!(?:sin|cos|tan|cot|log|exp|sqrt|frac)(?![a-z]))[A-Za-z]{3}", text) is not None
