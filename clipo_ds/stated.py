r"""What a sentence that is declared to be the answer states: "There are 12 pens." states 12.

Imports the standard library only. Such sentences follow "Answer:" or ``####``, stand in boxes, or are a ground truth.
Read are plain sentences about one number alone, where it follows the verb or begins the sentence; whatever could make
it another number ("half of", "not", "12 more than", a second number) leaves the sentence as it is. So does the absence
of a verb: "multiples of 3" is no 3.
"""

from __future__ import annotations

import re

MAX_PLAIN_CHARS = 60
"""A text of at most this many characters, in one line, can be an answer that is no sentence."""

_VERB = (
    r"(?:is|are|was|were|has|have|had|equals|(?:can|will|would|must|should|could|may)(?:\s+[a-z]+)?|needs?|gets?|got|takes?"
    r"|took|costs?|makes?|made|spends?|spent|pays?|paid|sells?|sold|buys?|bought|weighs?|saves?|owes?|eats?|ate|reads?"
    r"|walks?|runs?|ran|earns?|received?s?|gives?|gave|lost|won|keeps?|kept|left|holds?|contains?|[a-z]{3,}ed)"
)
_FIGURE = (
    r"(?:\\?[$\u20ac\u00a3]\s?)?[-+\u2212]?(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?"
)
_MATHS = r"\$[^$]+\$|\\\([^\n]+?\\\)"
_ADVERB = (
    r"(?:\s+(?:him|her|them|me|us|you|now|then|exactly|only|just|simply|therefore|thus|still|equal to|a total of"
    r"|in total))*"
)
_WORDS = r"(?:\s+[A-Za-z][A-Za-z'\u2019-]*(?:\u00b2|\u00b3|\^[23]|/[a-z]+)?|\s*,(?=\s))*"
_AFTER_VERB = re.compile(
    rf"(?P<subject>[A-Za-z](?:[^\d$.!?]|{_MATHS})*?)\s{_VERB}{_ADVERB}:?\s+(?P<value>{_MATHS}|{_FIGURE})"
    rf"(?![\d^*/=+-])(?P<rest>{_WORDS})[.!]?"
)
_FIRST = re.compile(
    rf"(?:[Aa]\s+total\s+of\s+(?P<total>{_FIGURE})|(?P<value>{_FIGURE})(?=\s+\S+\s+[a-z]))"
    r"(?P<rest>(?:\s+[a-z][a-z'\u2019-]*){1,12})[.!]?"
)
_IN_DOUBT = re.compile(
    r"\b(?:not?|never|nor|cannot|none|\w+n['\u2019]t|than|halve?s?|half|thirds?|quarters?|twice|double|triple|times|or|if|unless"
    r"|except|without|between|minus|plus|over|under|above|below|hundreds?|thousands?|millions?|billions?|trillions?|dozens?"
    r"|least|most|more|less|fewer|older|younger|multiples?|divisors?|factors?|divisible|whenever|where|when"
    r"|percent|out|base|pi|sqrt|root|squared|cubed|factorial|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|about|approximately|roughly|nearly|almost)\b",
    re.IGNORECASE,
)
_NO_DOUBT = re.compile(r"\A\s+more(?=\s+[a-z])|\bleft\s+over\b")  # behind the number: "12 more pens are needed"
_LETTER = re.compile(r"\b(?![mghslLAaIi]\b)[A-Za-z]\b")  # an unknown, and no unit
_OF_MANY = re.compile(r"\b(?:every|all|any)\b", re.IGNORECASE)  # before the number: "all squares are 1"
_NO_PROSE = re.compile(
    r"\$\$.*?\$\$|\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\begin\s*\{(\w+)\}.*?\\end\s*\{\1\}"
    r"|\\[A-Za-z]+(?:\s*\{[A-Za-z ,.]*\})?",
    re.DOTALL,
)
_PLAIN_VERB = re.compile(rf"\b(?:there|he|she|they|we|it|i)\b|\b{_VERB}\s", re.IGNORECASE)


def stated_value(sentence: str) -> str | None:
    r"""The one number, or the maths, that a sentence states; None where it is no such sentence.

    >>> stated_value("There are 12 pens."), stated_value("The largest $n$ is $n_0$."), stated_value("4 jars are needed")
    ('12', '$n_0$', '4')
    >>> stated_value("There are 12 pens and 3 cups."), stated_value("Half of the 12 pens"), stated_value("even")
    (None, None, None)
    """
    text = sentence.replace("**", "").strip().strip("*").strip()
    if len(text) > 300 or " " not in text:
        return None
    found = _AFTER_VERB.fullmatch(text) or _FIRST.fullmatch(text)
    if found is None:
        return None
    name = "value" if found["value"] else "total"
    before = re.sub(_MATHS, " ", text[: found.start(name)])
    before = "" if name == "total" else before
    rest = _NO_DOUBT.sub(" ", found["rest"])
    if _IN_DOUBT.search(f"{before} {rest}") or _LETTER.search(rest) or _OF_MANY.search(before):
        return None
    return found[name].strip()


def is_prose(text: str) -> bool:
    r"""Whether a ground truth is a sentence or a solution, and no answer of its own.

    Long texts of at least six words outside of maths are; so are short sentences with two numbers or more, of which
    nobody can say which one is meant. Words ("no solution", "parallelogram"), LaTeX of any length and short remarks
    ("all reals except 2") are answers.

    >>> is_prose("He buys 3 boxes, so he has 12 pens."), is_prose("no solution"), is_prose("All numbers but 3 and 4")
    (True, False, False)
    """
    bare = _NO_PROSE.sub(" 1 ", text[:2000])
    words = re.findall(r"[A-Za-z]{2,}", bare)
    if len(text) > MAX_PLAIN_CHARS or "\n" in text.strip():
        return len(words) >= 6
    is_sentence = text.rstrip("*$ ").endswith((".", "!")) and text.lstrip("*$ ")[:1].isupper()
    return is_sentence and len(words) >= 4 and len(re.findall(r"\d+", bare)) >= 2 and bool(_PLAIN_VERB.search(bare))
