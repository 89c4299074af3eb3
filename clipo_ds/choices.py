r"""Which option, A to J, an answer picks, and the text in it without LaTeX's text commands.

Imports the standard library only.
"""

from __future__ import annotations

import re

_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|boldsymbol|emph|underline)"
    r"\s*\{([^{}]*)\}"
)
_LETTER_ALONE = re.compile(r"\(?\s*([A-Ja-j])\s*\)?\s*[.:]?")
_LETTER_LABEL = re.compile(
    r"(?:\(\s*([A-Ja-j])\s*\)|([A-Ja-j])\s*[.):]|([A-J])\s*(?:,|-+)|([B-HJ])\s(?!\s*[-+=]))\s*(\S.*)", re.DOTALL
)
_LETTER_FIRST = re.compile(r"\(?([A-HJ]|I(?!\s+[a-z]))\)?(?![A-Za-z'])(.*)", re.DOTALL)
_LETTERS = r"\(?[A-J]\)?(?:(?:\s*,\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+)\(?[A-J]\)?){0,9}"
_DENIED = re.compile(  # "it cannot be A or C", "A and C are wrong"
    r"(?:\b(?:not|cannot|never|neither|rather than|instead of|other than|unlike|excludes?|eliminates?|rules? out)\b"
    r"|n['\u2019]t\b)"
    r"(?:(?!\bbut\b)[^.;!?\n])*"
    rf"|(?<![A-Za-z]){_LETTERS}\s+(?:is|are|can|could|would|does|do)\b\s*"
    r"(?:wrong|incorrect|impossible|false|not|n['\u2019]t|out\b|ruled|eliminated)[^.;!?\n]*",
    re.IGNORECASE,
)
_PICKED = re.compile(
    r"\(\s*([A-J])\s*\)"
    r"|\b(?:options?|choice|answer|pick|choose|select|go with|is|be|it's)\b[\s:*]*([A-J])"
    r"(?=[\s*]*(?:[.,;!]|$|is\b|because\b))"
    r"|(?<![A-Za-z'])([A-J])\s+is\s+(?:the\s+)?(?:correct|right|best)\b",
    re.IGNORECASE,
)
_OTHER_LETTER = re.compile(
    r"(?:\b(?:or|and|but)\b|[,;/&])\s*\(?[A-J]\)?(?![A-Za-z'])|\(\s*[A-J]\s*\)|(?<![A-Za-z])[A-J][.)]\s"
)


def unwrap_text(answer: str) -> str:
    r"""``\text{...}``, ``\textbf{...}``, ``\mathrm{...}`` and the like replaced by their contents, inner ones first.

    >>> unwrap_text(r"5\text{ cm}"), unwrap_text(r"\textbf{(A) } bank")
    ('5 cm', '(A)  bank')
    """
    for _ in range(4):
        unwrapped = _WRAPPER.sub(r"\1", answer)
        if unwrapped == answer:
            break
        answer = unwrapped
    return answer


def choice_letter(answer: str) -> str | None:
    r"""The option A to J that an answer picks, in upper case, or None when it picks none, or more than one.

    A letter alone counts in either case; a letter with the option's text needs its mark ("A. bank", "(a) bank",
    "A - bank"), because "a bank" is also English. A second letter joined to it ("A or B", "A, C") spoils it.

    >>> [choice_letter(a) for a in ("(A)", r"\text{A}", "A. bank", r"\textbf{(A) } bank", "b", "option C")]
    ['A', 'A', 'A', 'A', 'B', 'C']
    >>> [choice_letter(a) for a in ("A or B", "A, B", "a bank", "A. bank or B. mall", "bank")]
    [None, None, None, None, None]
    """
    text = unwrap_text(answer).replace("\\ ", " ").replace("\\,", " ").replace("~", " ")
    text = re.sub(r"[$*`{}]|\\[()]", "", text).strip().rstrip(".")
    text = re.sub(r"^(?:(?:the|correct|final|answer|option|choice|is)\b[\s:]*)+", "", text, flags=re.IGNORECASE)
    alone = _LETTER_ALONE.fullmatch(text)
    if alone:
        return alone.group(1).upper()
    label = _LETTER_LABEL.fullmatch(text)
    if label is None:
        return None
    which = next(i for i, letter in enumerate(label.groups(), start=1) if letter)
    rest = _DENIED.sub(" ", text[label.end(which) :])
    return None if _OTHER_LETTER.search(rest) else label.group(which).upper()


def choice_in_sentence(answer: str) -> str | None:
    """As `choice_letter`, for sentences: they may go on after a capital letter, or say which option it is; letters that
    they deny do not count.

    >>> choice_in_sentence("B because a bank needs security"), choice_in_sentence("B or C because of that")
    ('B', None)
    >>> choice_in_sentence("So it is (B), not C."), choice_in_sentence("Vitamin C is found in oranges")
    ('B', None)
    """
    letter = choice_letter(answer)
    if letter is not None:
        return letter
    text = _DENIED.sub(" ", re.sub(r"[$*`]|\\[()]", "", unwrap_text(answer)).strip())
    first = _LETTER_FIRST.match(text)
    if first:
        return None if _OTHER_LETTER.search(first.group(2)) else first.group(1)
    picked = {letter for match in _PICKED.finditer(text) if (letter := match[1] or match[2] or match[3]).isupper()}
    return picked.pop() if len(picked) == 1 and not _OTHER_LETTER.search(_PICKED.sub(" ", text)) else None
