r"""Where a response says its final answer, and which answers a ground truth accepts: text in, text out.

Imports `clipo_ds.thoughts`, `clipo_ds.stated`, `clipo_ds.choices` and the standard library. Whether two answers mean
the same is decided in `clipo_ds.equality` (cheap) and `clipo_ds.symbolic` (algebra); this file only finds them.

The final answer of a response, in this order (in what follows its thoughts; a thought that never closes leaves none):

1. the last ``\boxed{...}`` (or ``\fbox``). Boxes with nothing but a comma, "and", "or" or a ``name =`` between them are
   one answer with several parts, so ``\boxed{1} \boxed{2}`` claims both: listing guesses never earns what one of them
   would; so are boxes with the names of the parts ("\boxed{9} cups and \boxed{2} plates"). Other words between boxes
   are a change of mind, and the last one counts. An unclosed box is no answer.
2. the last ``<answer>...</answer>``;
3. what follows the last ``####`` with a number alone (GSM8K's mark, wherever in its line, the number with or without
   markup); text after the mark counts in the very last line only;
4. the rest of the sentence after the last "answer is" or "answer:", or the maths after "Answer" that fill a line; where
   options are asked for also "the correct option is (B)";
5. the whole response when it is one short line ("42", "x = 5").

A sentence about one number in 1 to 4 ("Answer: There are 12 pens.") stands for that number (`clipo_ds.stated`).

A number somewhere in the text is not an answer: a response that repeats the problem, or stops half-way, must not be
right by luck. What takes the last number as a fallback (math-verify's default) is more lenient; verl's box rule and
TRL's anchored rule are the model here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from clipo_ds.choices import unwrap_text
from clipo_ds.stated import MAX_PLAIN_CHARS, is_prose, stated_value
from clipo_ds.thoughts import KNOWN_TAGS, ThoughtTags

_TAIL_CHARS = 2000  # phrases are sought in the last characters only, so that a long response costs no more

_BOX_TOKEN = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)(?![A-Za-z])\s*\{|\\(?:boxed|fbox)(?![A-Za-z])\s*(?!\s*\{)|[{}]")
_BARE_BOX = re.compile(r"-?(?:\\[dt]?frac\s*(?:\{[^{}]*\}|\w)\s*(?:\{[^{}]*\}|\w)|\d[\d.,/]*|[A-Za-z](?![A-Za-z]))")
_JOINED = re.compile(
    r"(?:[\s$*.,;:&]|\\[()\[\],;!]|\\q?quad|\\(?:text|mbox)\s*\{[\s,]*(?:and|or)?\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))*"
    r"(?:(?:\\[a-z]+|[A-Za-z])(?:_\{?\w\}?)?(?:\([A-Za-z]\))?\s*=[\s$]*)?"  # x=, \theta =, k_1 =, g(x)=
)
_NO_NAME = (
    r"(?:is|are|was|were|be|but|not?|and|or|then|wait|so|hence|thus|hmm|actually|wrong|right|which|that|this|it|we|if|when"
    r"|because|since|instead|rather|sorry|maybe|first|finally|now|therefore|as|to|from)(?![A-Za-z])"
)
_NAME = rf"(?!{_NO_NAME})[a-z]{{2,}}(?![A-Za-z])"
_NAMES = rf"{_NAME}(?:\s+{_NAME})?"
_NAMED_PARTS = re.compile(  # "cups and", "cups,", ", plates:"
    rf"[\s$]*{_NAMES}\s*(?:,\s*(?:and|or)|[,;]|and|or)[\s$]+(?:[A-Za-z]\s*=[\s$]*)?|[\s$]*(?:[,;]|,?\s*and\s)\s*{_NAMES}\s*[:=][\s$]*"
)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_HASHES = re.compile(r"#{4,}")
_NUMBER_ALONE = re.compile(r"[-+\u2212]?(?:\\?[$\u20ac\u00a3]\s?)?[-+\u2212]?\.?\d[\d.,/]*\s?\\?%?")
_BEFORE_SHOWN = re.compile(
    r"[\s:=*_`~>]+|<[A-Za-z]{1,10}>|(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*(?=[:=*]))", re.IGNORECASE
)
_AFTER_SHOWN = re.compile(
    r"(?:[\s*_`~]|(?<=[\d$)}\]>*])\.|(?<=\s)#+|</[A-Za-z][^<>]{0,20}>|<\|[^<>]{1,30}\|>|\[[A-Z]{3,}\])+\Z"
)
_AROUND_SHOWN = re.compile(r"<([^<>]+)>|\[([^\[\],]+)\]|\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]")
_SUBJECT = (
    r"(?:\s+(?:to|for|of|in|here|choice|option)\b[^.\n=:,]{0,60}?|\s*\([^()\n]{0,40}\))?,?"
    r"(?:\s+(?:therefore|thus|then),?)?"
)
_IS = r"\s+(?:is|are|equals|must be|should be|will be|would be|comes (?:out )?to|turns out to be)\b(?!\s+not\b)"
_FILLED_LINE = (
    r"(?:(?:\$\$[^$\n]+\$\$|\$[^$\n]+\$|\\\([^\n]+\\\)|\\\[[^\n]+\\\])[\s*.]*$"
    r"|-?\$?\d[\d.,/]*\\?%?\**\.?\s*\Z)"  # a number alone ends the text too: "Answer 2" may be a heading
)
_ANSWER = (
    rf"\banswers?\b\**(?:{_SUBJECT}{_IS}"
    r"|[ \t*]*[:=]|[ \t*]*\n)"  # "**Answer:** 5", "## Answer" over a line of its own
    r"|\bans\b\.?[ \t*]*[:=]"
    rf"|^[ \t>#*]*(?:the\s+)?(?:final\s+|correct\s+)?ans(?:wer|\.)?[ \t*]+(?={_FILLED_LINE})"  # "Answer $9$"
)
_PHRASE = re.compile(_ANSWER, re.IGNORECASE | re.MULTILINE)
_CHOICE_PHRASE = re.compile(
    rf"{_ANSWER}|\b(?:correct|right|best|final|my)\s+(?:choice|option|pick)\b\**(?:{_IS}|[ \t*]*:)",
    re.IGNORECASE | re.MULTILINE,
)
_FILLER = re.compile(
    r"(?:\s|[:*=]|(?:therefore|thus|then|simply|just|equal to|given by|option|choice|for sure|definitely|certainly"
    r"|clearly|surely|obviously|indeed|most likely|probably)\b,?)*",
    re.IGNORECASE,
)
_MATHS = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
_REASON = re.compile(r"\s*[,;(]*\s*\b(?:because|since|so|which|where|hence)\b.*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<!\bsq)(?<!\bcu)\.(?=\s|\*|$)|\n")
_TRUTH_PHRASE = re.compile(
    r"\W*(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:the\s+)?(?:(?:final|correct|right)\s+)*"
    rf"(?:answer\b\**(?:{_SUBJECT}{_IS}|[ \t*]*[:=]|[ \t*]*\n)|ans\b\.?[ \t*]*[:=])",
    re.IGNORECASE,
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
    >>> last_boxes(r"\boxed{9} cups and \boxed{2} plates"), last_boxes(r"\boxed{3}, but that is wrong, so \boxed{4}.")
    (['9', '2'], ['4'])
    """
    boxes = find_boxes(text)
    if not boxes:
        return []
    parts = [boxes[-1].content]
    following = boxes[-1]
    for box in reversed(boxes[:-1]):
        between = text[box.end : following.start]
        joined = len(between) <= 60 and (
            _JOINED.fullmatch(between) or _NAMED_PARTS.fullmatch(unwrap_text(between).replace("\\ ", " "))
        )
        if box.end > following.start or not joined:
            break
        if box.content not in parts:
            parts.insert(0, box.content)
        following = box
    return parts


def _without_markup(text: str) -> str:
    r"""A line without what stands around its answer.

    >>> [_without_markup(text) for text in (": **22**", "$22$", "<22>", "The answer is 22.</answer>", "$1,200", "22$")]
    ['22', '22', '22', '22', '$1,200', '22']
    """
    for _ in range(5):
        before = text
        text = _AFTER_SHOWN.sub("", text)
        start = _BEFORE_SHOWN.match(text)
        text = text[start.end() :] if start else text
        around = _AROUND_SHOWN.fullmatch(text)
        text = next(group for group in around.groups() if group).strip() if around else text
        if text.count("$") == 1 and not text.startswith(("$", "-$", r"\$")):
            text = text.rstrip("$")
        if text == before:
            break
    return text


def _after_hashes(text: str) -> str | None:
    """What GSM8K's marks show: the last number alone behind one, or any text behind one in the last line."""
    tail = text[-_TAIL_CHARS:].rstrip()
    stop = len(tail)
    for mark in reversed(list(_HASHES.finditer(tail))):
        line, _, below = tail[mark.end() : stop].partition("\n")
        shown = _without_markup(line)
        is_last = "\n" not in tail[mark.end() :]
        if not shown and below and stop == len(tail):
            shown = _without_markup(below.strip().partition("\n")[0])  # the mark over a line of its own
        if shown and (is_last or _NUMBER_ALONE.fullmatch(shown)):
            return shown
        stop = mark.start()
    return None


def _after_phrase(text: str, kind: str = "math") -> str | None:
    """The rest of the sentence after the last "answer is" or "answer:"."""
    tail = text[-_TAIL_CHARS:]
    phrase = None
    for phrase in (_CHOICE_PHRASE if kind == "choice" else _PHRASE).finditer(tail):  # noqa: B007, the last one is wanted
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


def final_answer(text: str, kind: str = "math", tags: ThoughtTags = KNOWN_TAGS) -> str | None:
    r"""The answer that a response settles on, as written, or None when it states none; the module's head has the order.

    Args:
        text: the response.
        kind: ``arithmetic`` takes what follows the last ``#``, and nothing else; ``choice`` knows a few phrases more
            than ``math``.
        tags: those of thoughts.

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
    proper = tags.after(text)
    if proper is None:
        return None
    stated, bare = _stated_answer(proper, kind)
    return stated if stated is None or bare or kind == "choice" else stated_value(unwrap_text(stated)) or stated


def _stated_answer(text: str, kind: str) -> tuple[str | None, bool]:
    """The answer in a text without thoughts, and whether it is the text itself."""
    parts = last_boxes(text)
    if parts:
        return (", ".join(parts) if all(parts) else None), False
    tags = _ANSWER_TAG.findall(text)
    if tags:
        return tags[-1].strip() or None, False
    lines = text.strip()
    shown = _after_hashes(lines)
    if shown:
        return shown, False
    if r"\boxed" in lines[-_TAIL_CHARS:]:
        return None, False  # cut off inside the box
    phrase = _after_phrase(text, kind)
    if phrase is not None:
        return phrase, False
    return (lines if lines and len(lines) <= MAX_PLAIN_CHARS and "\n" not in lines else None), True


@lru_cache(maxsize=16384)
def truth_answers(ground_truth: str, kind: str = "math") -> tuple[str, ...]:
    r"""The answers that a ground truth accepts: one, or two where a worked solution ends in several joined boxes.

    A worked solution stands for its last box; when that box is joined to others ("$\boxed{4}$ or $\boxed{-4}$") the
    whole list is accepted as well. ``#### 42``, ``<answer>42</answer>`` and "The answer is 42" stand for 42, and so
    does a sentence about this one number; other prose has no answer, and anything else stands for itself. Empty when
    there is none.

    >>> truth_answers(r"so $a+b=-3+3=\boxed{0}$.")
    ('0',)
    >>> truth_answers(r"$k = \boxed{12}$ and $k = \boxed{18}$")
    ('12, 18', '18')
    >>> [truth_answers(truth) for truth in ("6*7=<<6*7=42>>42 are left.\n#### 42", "Answer: 42", "He has 42 left.")]
    [('42',), ('42',), ('42',)]
    >>> truth_answers("He buys 3 boxes of 14 pens each, so he takes three times fourteen of them home.")
    ()
    """
    text = ground_truth.strip()
    if kind == "arithmetic":
        answer = text.rpartition("#")[2].strip()
        return (answer,) if answer else ()
    if find_boxes(text):
        parts = last_boxes(text)
        answers = (", ".join(parts), parts[-1]) if len(parts) > 1 else tuple(parts)
        return tuple(answer for answer in answers if answer)
    declared = _declared_truth(text, kind)
    return (declared,) if declared else ()


def _declared_truth(text: str, kind: str) -> str | None:
    """The answer in a ground truth without a box."""
    tags = _ANSWER_TAG.findall(text)
    shown: str | None = tags[-1].strip() if tags else _after_hashes(text)
    prose = kind != "choice" and is_prose(text)
    last_line = text.rpartition("\n")[2]
    if not shown and (prose or _TRUTH_PHRASE.match(text) or _TRUTH_PHRASE.match(last_line)):
        shown = _after_phrase(text, kind)
    if shown:
        return stated_value(unwrap_text(shown)) or shown
    return stated_value(unwrap_text(text)) or (None if prose else text)
