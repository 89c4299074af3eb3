r"""Where a response says its final answer, and which answers a ground truth accepts: text in, text out.

Imports the standard library only. Whether two answers mean the same is decided in `clipo_ds.equality` (cheap) and
`clipo_ds.symbolic` (math-verify); this file only finds them.

The final answer of a response, in this order (what follows the last ``</think>``, where there is one):

1. the last ``\boxed{...}`` (or ``\fbox``). Boxes with nothing but a comma, "and", "or" or a ``name =`` between them are
   one answer with several parts, so ``\boxed{1} \boxed{2}`` claims both: listing guesses never earns what one of them
   would. Boxes with words between them are a change of mind, and the last one counts. An unclosed box is no answer.
2. the last ``<answer>...</answer>``;
3. the last line of the form ``#### 42`` (GSM8K's; text after the marks counts in the very last line only);
4. the rest of the sentence after the last "answer is" or "answer:";
5. the whole response when it is one short line ("42", "x = 5").

A number somewhere in the text is not an answer: a response that repeats the problem, or stops half-way, must not be
right by luck. What takes the last number as a fallback (math-verify's default) is more lenient; verl's box rule and
TRL's anchored rule are the model here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

MAX_BARE_CHARS = 60  # a whole response of at most this many characters, in one line, is its own answer
_TAIL_CHARS = 2000  # phrases are sought in the last characters only, so that a long response costs no more

_BOX_TOKEN = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)(?![A-Za-z])\s*\{|\\(?:boxed|fbox)(?![A-Za-z])\s*(?!\s*\{)|[{}]")
_BARE_BOX = re.compile(r"-?(?:\\[dt]?frac\s*(?:\{[^{}]*\}|\w)\s*(?:\{[^{}]*\}|\w)|\d[\d.,/]*|[A-Za-z](?![A-Za-z]))")
_JOINED = re.compile(
    r"(?:[\s$*.,;:&]|\\[()\[\],;!]|\\q?quad|\\(?:text|mbox)\s*\{[\s,]*(?:and|or)?\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))*"
    r"(?:(?:\\[a-z]+|[A-Za-z])(?:_\{?\w\}?)?(?:\([A-Za-z]\))?\s*=[\s$]*)?"  # x=, \theta =, k_1 =, g(x)=
)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_HASHES = re.compile(r"^\s*####[ \t]*(\S.*?)\s*$", re.MULTILINE)
_HASHED_NUMBER = re.compile(r"^[ \t]*####[ \t]*([-+$]{0,2}\d[\d.,/]*[ \t]*%?)[ \t]*$", re.MULTILINE)
_PHRASE = re.compile(
    r"\banswers?\b\**(?:"
    r"(?:\s+(?:to|for|of|in|here|choice|option)\b[^.\n=:,]{0,60}?|\s*\([^()\n]{0,40}\))?,?(?:\s+(?:therefore|thus|then),?)?"
    r"\s+(?:is|are|equals|must be|should be|will be)\b(?!\s+not\b)"
    r"|[ \t*]*[:=]|[ \t*]*\n)",  # "**Answer:** 5", "## Answer" over a line of its own
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"(?:\s|[:*=]|(?:therefore|thus|then|simply|just|equal to|given by|option|choice)\b)*", re.IGNORECASE
)
_MATHS = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
_REASON = re.compile(r"\s*[,;(]*\s*\b(?:because|since|so|which|where|hence)\b.*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|\*|$)|\n")

_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|boldsymbol|emph|underline)"
    r"\s*\{([^{}]*)\}"
)
_LETTER_ALONE = re.compile(r"\(?\s*([A-Ja-j])\s*\)?\s*[.:]?")
_LETTER_LABEL = re.compile(
    r"(?:\(\s*([A-Ja-j])\s*\)|([A-Ja-j])\s*[.):]|([A-J])\s*(?:,|-+)|([B-HJ])\s(?!\s*[-+=]))\s*(\S.*)", re.DOTALL
)
_LETTER_FIRST = re.compile(r"\(?([A-J])\)?(?![A-Za-z'])(.*)", re.DOTALL)
_OTHER_LETTER = re.compile(
    r"(?:\b(?:or|and)\b|[,;/&])\s*\(?[A-J]\)?(?![A-Za-z'])|\(\s*[A-J]\s*\)|(?<![A-Za-z])[A-J][.)]\s"
)


class Box(NamedTuple):
    start: int  # position of the backslash
    end: int  # position after the closing brace
    content: str


def find_boxes(text: str) -> list[Box]:
    r"""Every closed ``\boxed`` or ``\fbox`` of `text` in order of its start, nested ones too, in one linear pass.

    >>> [box.content for box in find_boxes(r"\boxed{\frac{1}{2}} or \boxed 3, not \boxed{4")]
    ['\\frac{1}{2}', '3']
    """
    boxes: list[Box] = []
    open_braces: list[re.Match[str] | None] = []  # the box token that an open brace belongs to, None for a plain brace
    for token in _BOX_TOKEN.finditer(text):
        kind = token.group()
        if kind == "{":
            open_braces.append(None)
        elif kind == "}":
            opener = open_braces.pop() if open_braces else None
            if opener is not None:
                boxes.append(Box(opener.start(), token.end(), text[opener.end() : token.start()].strip()))
        elif kind.startswith((r"\boxed", r"\fbox")):
            if kind.endswith("{"):
                open_braces.append(token)
            elif bare := _BARE_BOX.match(text, token.end()):  # \boxed 2, as two ground truths of MATH have it
                boxes.append(Box(token.start(), bare.end(), bare.group().rstrip(".,")))
    return sorted(boxes)


def last_boxes(text: str) -> list[str]:
    r"""Contents of the last box and of the boxes joined to it, in order, without repetitions.

    >>> last_boxes(r"First $\boxed{7}$. No: $x=\boxed{4}$ or $x=\boxed{-4}$.")
    ['4', '-4']
    >>> last_boxes(r"I get \boxed{3}, but that is wrong, so it must be \boxed{4}.")
    ['4']
    """
    boxes = find_boxes(text)
    if not boxes:
        return []
    parts = [boxes[-1].content]
    following = boxes[-1]
    for box in reversed(boxes[:-1]):
        between = text[box.end : following.start]
        if box.end > following.start or len(between) > 60 or not _JOINED.fullmatch(between):
            break
        if box.content not in parts:
            parts.insert(0, box.content)
        following = box
    return parts


def _after_phrase(text: str) -> str | None:
    """The rest of the sentence after the last "answer is" or "answer:"."""
    tail = text[-_TAIL_CHARS:]
    phrase = None
    for phrase in _PHRASE.finditer(tail):  # noqa: B007, the last match is wanted
        pass
    if phrase is None:
        return None
    start = _FILLER.match(tail, phrase.end()).end()  # type: ignore[union-attr]  # matches the empty string too
    display = _MATHS.match(tail, start)
    if display:
        return (display.group(1) or display.group(2)).strip()
    end = _SENTENCE_END.search(tail, start)
    sentence = tail[start : end.start() if end else len(tail)]
    # "A. bank": the full stop belongs to the label, not to the sentence.
    if end and len(sentence.strip(" *($")) == 1 and sentence.strip(" *($").isalpha() and end.group() == ".":
        rest = tail[end.end() :].split("\n", 1)[0]
        sentence = f"{sentence}.{rest}" if rest.strip() else sentence
    return _REASON.sub("", sentence).strip(" \t*") or None


def final_answer(text: str, kind: str = "math") -> str | None:
    r"""The answer that a response settles on, as written, or None when it states none; the module's head has the order.

    Args:
        text: the response.
        kind: ``arithmetic`` takes what follows the last ``#``, and nothing else; ``math`` and ``choice`` are alike.

    >>> final_answer(r"So $x=\boxed{\dfrac{1}{2}}$.")
    '\\dfrac{1}{2}'
    >>> final_answer("The answer is 18 dollars. I hope it is correct.")
    '18 dollars'
    >>> final_answer("7+5=12;12-3=9;#9", "arithmetic")
    '9'
    >>> final_answer("Natalia sold 48 clips in April and half as many in May, and then she counted.") is None
    True
    """
    if kind == "arithmetic":
        _, mark, answer = text.rpartition("#")
        return answer.strip() or None if mark else None
    text = text.rpartition("</think>")[2]
    parts = last_boxes(text)
    if parts:
        return ", ".join(parts) if all(parts) else None
    tags = _ANSWER_TAG.findall(text)
    if tags:
        return tags[-1].strip() or None
    lines = text.strip()
    numbers = _HASHED_NUMBER.findall(lines[-_TAIL_CHARS:])
    last_line = _HASHES.fullmatch(lines[lines.rfind("\n") + 1 :])
    if last_line or numbers:
        return last_line.group(1) if last_line else numbers[-1]
    if r"\boxed" in lines[-_TAIL_CHARS:]:
        return None  # cut off inside the box
    phrase = _after_phrase(text)
    if phrase is not None:
        return phrase
    if lines and len(lines) <= MAX_BARE_CHARS and "\n" not in lines:
        return lines
    return None


@lru_cache(maxsize=16384)
def truth_answers(ground_truth: str, kind: str = "math") -> tuple[str, ...]:
    r"""The answers that a ground truth accepts: one, or two where a worked solution ends in several joined boxes.

    A worked solution stands for its last box; when that box is joined to others ("$\boxed{4}$ or $\boxed{-4}$") the
    whole list is accepted as well. ``#### 42`` stands for 42, and anything else for itself. Empty when there is none.

    >>> truth_answers(r"so $a+b=-3+3=\boxed{0}$.")
    ('0',)
    >>> truth_answers(r"$k = \boxed{12}$ and $k = \boxed{18}$")
    ('12, 18', '18')
    >>> truth_answers("He has 6*7=<<6*7=42>>42 left.\n#### 42")
    ('42',)
    """
    text = ground_truth.strip()
    if kind == "arithmetic":
        answer = text.rpartition("#")[2].strip()
        return (answer,) if answer else ()
    if find_boxes(text):
        parts = last_boxes(text)
        answers = (", ".join(parts), parts[-1]) if len(parts) > 1 else tuple(parts)
        return tuple(answer for answer in answers if answer)
    hashes = _HASHES.findall(text)
    answer = hashes[-1] if hashes else text
    return (answer,) if answer else ()


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
    return None if _OTHER_LETTER.search(text, label.end(which)) else label.group(which).upper()


def choice_in_sentence(answer: str) -> str | None:
    """As `choice_letter`, for what follows "the answer is": the sentence may go on after a capital letter.

    >>> choice_in_sentence("B because a bank needs security"), choice_in_sentence("B or C because of that")
    ('B', None)
    """
    letter = choice_letter(answer)
    if letter is not None:
        return letter
    first = _LETTER_FIRST.match(re.sub(r"[$*`]|\\[()]", "", unwrap_text(answer)).strip())
    if first is None or _OTHER_LETTER.search(first.group(2)):
        return None
    return first.group(1)
