r"""Cheap comparison of two final answers: exact strings, exact numbers, lists, tuples, intervals and matrices of them.

Imports `clipo_ds.brackets`, `clipo_ds.spelling`, `clipo_ds.extraction` and the standard library. `same_answer` says
True or False only where that is certain and None where algebra is needed (`clipo_ds.symbolic`), so that nearly all
answers of GSM8K-like data cost microseconds.

Conventions, all of them what readers of the benchmarks expect: units, currency and degree signs are ignored; 18% is 18
and also 0.18; `x = 5` is 5; a list without brackets, or in braces, has no order, what stands in ( ) or [ ] has; a word
is compared as a word, whatever its case; 52_8 may be given as 52, but not as 52_9.
"""

from __future__ import annotations

import re
from functools import lru_cache

from clipo_ds.brackets import number_inside
from clipo_ds.extraction import choice_letter
from clipo_ds.spelling import canonical, key, number

MAX_ANSWER_CHARS = 1000  # longer answers are compared as strings only

_ASSIGNMENT = re.compile(
    r"((?:\\?[A-Za-z][A-Za-z ]*)(?:_\w+)?(?:\([\w, ]+\))?)\s*(?:=|\\(?:in|approx)(?![A-Za-z]))\s*([^=<>]+)", re.DOTALL
)
_LABEL = re.compile(r"[A-Za-z][A-Za-z ]{0,40}:\s+")
_APPROXIMATION = re.compile(r"(?<=\S)\s*\\approx.*", re.DOTALL)
_AND_OR = re.compile(r"(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])(?:\s*,)?")
_MATRIX = re.compile(r"\\begin\s*\{([pbB]?matrix|smallmatrix|array)\}\s*(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9 '.\-]*")
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=[a-z]{2})")
_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle"}


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
        end = len(text) - 1 if opening == "\\langle" else _closing(text)
        if closing and end == len(text) - 1:
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


def _all_same(pairs: list[tuple[str, str]]) -> bool | None:
    verdicts = [same_answer(a, t) for a, t in pairs]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _same_unordered(answers: tuple[str, ...], truths: tuple[str, ...]) -> bool | None:
    """Set equality: every element has an equal on the other side; False only where all elements are certain."""
    if len(answers) * len(truths) > 400:
        return None
    table = [[same_answer(a, t) for t in truths] for a in answers]
    if all(True in row for row in table) and all(True in column for column in zip(*table, strict=True)):
        return True
    return None if any(None in row for row in table) else False


def _same_sequence(answer: str, truth: str) -> bool | None:
    ours, theirs = sequence(answer), sequence(truth)
    if ours is None or theirs is None:
        # A list is not the one number asked for, unless it says that number again and again; nor the other way round.
        if ours and not ours[0] and number(truth):
            return _same_unordered(ours[1], (truth,))
        if theirs and number(answer):
            return _same_unordered((answer,), theirs[1])
        return None
    if len(ours[1]) == 1 == len(theirs[1]):
        return same_answer(ours[1][0], theirs[1][0]) if "[" not in (ours[0], theirs[0]) else None
    unordered = ("", "\\{")
    if theirs[0] in unordered and ours[0] in unordered:
        return _same_unordered(ours[1], theirs[1])
    if len(ours[1]) != len(theirs[1]):
        return None
    same = _all_same(list(zip(ours[1], theirs[1], strict=True)))
    if (ours[0], ours[2]) == (theirs[0], theirs[2]):
        return same
    if ours[0] and theirs[0] and all(number(e) for e in (*ours[1], *theirs[1])):
        return False  # (2, 4] is not (2, 4)
    return True if same and "" in (ours[0], theirs[0]) and "[" not in (ours[0], theirs[0]) else None


def _unassigned(answer: str, truth: str) -> tuple[str, str] | None:
    """Right-hand sides of `x = ...` where only one side has a name, or both the same; None when nothing changes."""
    ours, theirs = _ASSIGNMENT.fullmatch(answer), _ASSIGNMENT.fullmatch(truth)
    if ours and theirs:
        same_name = ours.group(1).replace(" ", "").lower() == theirs.group(1).replace(" ", "").lower()
        return (ours.group(2), theirs.group(2)) if same_name else None
    if not ours and not theirs:
        return None
    return ours.group(2) if ours else answer, theirs.group(2) if theirs else truth


def same_answer(answer: str, truth: str) -> bool | None:
    r"""Whether `answer` and `truth` are the same: True or False where that is certain, None where it takes algebra.

    Args:
        answer: a final answer as a response writes it (`clipo_ds.extraction.final_answer`).
        truth: one accepted answer (`clipo_ds.extraction.truth_answers`).

    >>> same_answer(r"\$1{,}234.00", "1234"), same_answer("x = 5", "6"), same_answer(r"\{3, 1\}", "1,3")
    (True, False, True)
    >>> same_answer(r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}") is None
    True
    """
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
    expected = number(right)
    if expected is not None:
        left = _LABEL.sub("", left, count=1)
        given = number(left, letters_are_units=True)
        if given is not None:
            return given.equals(expected)
    elif sequence(right) is None and is_words(truth):
        return _ARTICLE.sub("", left.lower()).replace(" ", "") == _ARTICLE.sub("", right.lower()).replace(" ", "")
    sides = _unassigned(left, right)
    if sides is not None:
        return same_answer(*sides)
    matrices = _matrix(left), _matrix(right)
    if matrices[0] and matrices[1]:
        return _same_matrix(matrices[0], matrices[1])
    if "\\approx" in left and _APPROXIMATION.sub("", left) != left:
        return same_answer(_APPROXIMATION.sub("", left), truth)  # 3/56 \approx 0.05 claims the fraction
    verdict = _same_sequence(left, right)
    if verdict is None and expected is not None and _has_words(left):
        return False
    return verdict


def _same_matrix(ours: list[list[str]], theirs: list[list[str]]) -> bool | None:
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        return False
    return _all_same([pair for a, t in zip(ours, theirs, strict=True) for pair in zip(a, t, strict=True)])


def _has_words(text: str) -> bool:
    r"""Words in what should be a number ("not 18", "18 if x > 0"): nothing that algebra may look into for a number."""
    return re.search(r"(?<![A-Za-z\\])(?!(?:sin|cos|tan|cot|log|exp|sqrt|frac)(?![a-z]))[A-Za-z]{3}", text) is not None
