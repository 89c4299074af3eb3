"""Text with arithmetic in it -> tokens: plain prose, markdown, LaTeX and Unicode, each with its place in the text.

Layer L1, no torch. `clipo_ds.expressions` parses the tokens, `clipo_ds.equations` judges what they state. Three choices
keep the reading of free text precise:

- what is not arithmetic still becomes a token: a `VARIABLE` (letters of algebra, unknown LaTeX commands, times of day,
  version numbers, ellipses …) makes the expression it stands in unknown, so nothing is ever computed around it;
- markup that changes no value (dollar signs, `\\left`, `\\boxed{}`, alignment marks, emphasis) leaves no token at all;
- punctuation, line ends and arrows become `BREAK`, and so do brackets that hold more than one expression.

Reading is one pass of one regular expression whose parts look ahead a bounded way: time is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from clipo_ds.mathtokens import Kind, Token, TokenList, match_brackets, resolve_line_ends
from clipo_ds.mathwords import (
    BINOMIAL_COMMANDS,
    BREAK_COMMANDS,
    COMMAND_OPERATORS,
    COMMAND_RELATIONS,
    FRACTION_COMMANDS,
    GLUED_UNITS,
    SCALES,
    SHORT_WORDS,
    SIGN_OPERATORS,
    SPACE_COMMANDS,
    TRANSPARENT_COMMANDS,
    WORD_OPERATORS,
)

MAX_DIGITS = 300
"""A literal with more digits than this is not read as a number."""


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_OPERAND_AHEAD = re.compile(r"(?:\\?\$|\\left|\s|[(\[{]){0,12}(?:-?[0-9]|\.[0-9]|\\[dtc]?frac|\\sqrt|[½⅓⅔¼¾])")
_DIGIT_AHEAD = re.compile(r"\s?\$?[0-9.]")
_OF_AHEAD = re.compile(r"\s+(?:the\s+|these\s+|those\s+|his\s+|her\s+|their\s+|all\s+)?[\\$£€]*[0-9.(]")
_ARTICLE = re.compile(r"\s+(?:the|these|those|his|her|their|all)(?=\s)")
_UNIT_AFTER_HYPHEN = re.compile(r"[^\W\d_]{2,}")
_AFTER_ARTICLE = re.compile(r"\s+(?:[^\W\d_]{2}|[$0-9])")
_NO_WORD = re.compile(r"[A-Z]{3}|[b-df-hj-np-tv-xzB-DF-HJ-NP-TV-XZ]{3,5}")
_LABEL = re.compile(r"\((?:[0-9]{1,3}|[a-zA-Z]|[ivxIVX]{1,4})\)(?=\s)")
_NUMBER_TAIL = re.compile(r"(?:[.,:_][0-9]+)+|_|\.(?:[a-z]|\\(?:overline|dot|bar))|\s{0,2}(?:\\[lc]?dots|…|\.\.)")

_MASTER = re.compile(
    r"""
    (?P<annotation><<[^<>\n]{1,200}>>)
  | (?P<line>(?:[ \t]*\r?\n)+[ \t]*|\\\\(?:\[[^\]\n]{0,20}\])?)
  | (?P<space>[ \t\r\f\v\u00a0\u2009\u202f]+|\\[,;:!>\ /]|~)
  | (?P<asy>\[asy\])
  | (?P<drop>\\(?:hspace|vspace|tag|label|phantom|hphantom|vphantom|color|textcolor|ref|cite)\*?\{[^{}\n]{0,80}\}
      |\\(?:left|right)\s*\.
      |\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|°[CF]?|[`"\u201c\u201d'\u2019\u2018\u2032\u2033&\u200b])
  | (?P<environment>\\(?:begin|end)\{[^{}\n]{0,40}\}(?:\{[lcr|\ ]{0,40}\})?|\\[\[\]()])
  | (?P<brace>\\[{}]|\\operatorname\*?\s*\{[^{}\n]{0,40}\})
  | (?P<command>\\[A-Za-z]+\*?)
  | (?P<escaped>\\.)
  | (?P<number>
      (?:[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\{,\}\\!|\\,)[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?
      (?:[eE][+-]?[0-9]{1,3}(?![\w.]))?|\.[0-9]+)
  | (?P<vulgar>[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])
  | (?P<superscript>[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)
  | (?P<phrase>(?:divided|multiplied)\s{1,3}by\b)
  | (?P<compound>[^\W\d_]{3,}[-\u2011][0-9]+(?![0-9.]))
  | (?P<word>[^\W\d_]+(?:['\u2019\-\u2010][^\W\d_]{2,})*)
  | (?P<arrow>={1,2}>|-+>|[⇒→⟹⟶➜➔↦⇔∴—])
  | (?P<other>!=|≠|<=|>=|[<>≤≥≡≢∈∝\u223c]|:=|\+=|-=|\*=|/=)
  | (?P<approximately>≈|≃|≅|≒|≐)
  | (?P<rule>={3,}|-{3,}|_{2,}|\#+)
  | (?P<equal>={1,2}|\uff1d)
  | (?P<stars>\*{1,3})
  | (?P<ellipsis>…|\.{2,})
  | (?P<punctuation>[.,;:?\u3001\u3002\uff0c\uff1b\uff1a\uff1f•])
  | (?P<display>\$\$)
  | (?P<currency>[$€£¥¢₹])
  | (?P<open>[(\[{\uff08\u3010])
  | (?P<close>[)\]}\uff09\u3011])
  | (?P<root>√)
  | (?P<rest>.)
    """,
    re.VERBOSE | re.DOTALL,
)


class _Reader:
    """State of one pass: the tokens so far and what the next token depends on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[Token] = []
        self.annotations: list[Token] = []
        self.gap = False
        self.latex = "\\" in text
        self.dollar_end = self.currency_end = -1  # where the last dollar sign ended, and the last that is money
        self.digits_wanted = 0  # single-digit arguments that a \frac or \sqrt still takes
        self.braces: list[int | None] = []  # open braces: None transparent, else digits_wanted after the closing one
        self.in_root_index = False  # of \sqrt[3]{8}
        self.transparent_next = False
        self.asy_closes = True
        self.num_dollars = 0

    def emit(self, kind: Kind, start: int, end: int, text: str | None = None, value: Fraction | None = None,
             decimals: int = 0) -> None:  # fmt: skip
        shown = self.text[start:end] if text is None else text
        dollar, currency = self.dollar_end == start, self.currency_end == start
        self.tokens.append(Token(kind, shown, start, end, self.gap, value, decimals, dollar, currency))
        self.gap = False

    def after_operand(self) -> bool:
        if not self.tokens:
            return False
        last = self.tokens[-1]
        operand = (Kind.NUMBER, Kind.CLOSE, Kind.VARIABLE, Kind.WORD, Kind.SCALE)
        return last.kind in operand or (last.kind is Kind.OPERATOR and last.text in "%!")

    def glued(self, start: int) -> bool:
        """Whether the last token is a number that ends where this one starts."""
        return bool(self.tokens) and self.tokens[-1].kind is Kind.NUMBER and self.tokens[-1].end == start

    def read(self) -> None:
        position, length, match = 0, len(self.text), _MASTER.match
        while position < length:
            if self.digits_wanted and self.text[position] in "0123456789":
                digit = self.text[position]
                self.emit(Kind.NUMBER, position, position + 1, value=Fraction(int(digit)))
                self.digits_wanted -= 1
                position += 1
                continue
            found = match(self.text, position)
            assert found is not None and found.lastgroup is not None  # the last alternative takes any character
            name = found.lastgroup
            if name not in ("space", "open", "command"):
                self.digits_wanted = 0
            if name not in ("space", "open"):
                self.transparent_next = False
            position = getattr(self, f"on_{name}")(position, found.end()) or found.end()

    def on_annotation(self, start: int, end: int) -> None:
        self.annotations.append(Token(Kind.ANNOTATION, self.text[start + 2 : end - 2], start, end, self.gap))

    def on_line(self, start: int, end: int) -> None:
        latex = self.text[start] == "\\"
        blank = self.text.count("\n", start, end) > 1
        math = "math" if self.num_dollars % 2 else ""
        self.emit(Kind.LINE_END, start, end, "latex" if latex else "blank" if blank else math)
        self.gap = True

    def on_space(self, start: int, end: int) -> None:
        self.gap = True

    def on_asy(self, start: int, end: int) -> int | None:
        """Drawing code is no statement about numbers."""
        close = self.text.find("[/asy]", end) if self.asy_closes else -1
        self.asy_closes = close >= 0
        self.emit(Kind.BREAK, start, end)
        return close + len("[/asy]") if close >= 0 else None

    def on_drop(self, start: int, end: int) -> None:
        pass

    def on_environment(self, start: int, end: int) -> None:
        self.emit(Kind.BREAK, start, end, "")
        self.gap = True

    on_arrow = on_punctuation = on_environment

    def on_rule(self, start: int, end: int) -> None:
        joins = self.text[start:end] == "#" and self.after_operand() and self.text[end : end + 1].isdigit()
        if joins:  # 5#3, an operation that the text defines
            self.emit(Kind.VARIABLE, start, end)
        else:
            self.on_environment(start, end)

    def on_brace(self, start: int, end: int) -> None:
        self.emit(Kind.VARIABLE, start, end)

    on_ellipsis = on_brace

    def on_command(self, start: int, end: int) -> None:
        name = self.text[start + 1 : end].rstrip("*")
        if name in COMMAND_OPERATORS:
            self.emit(Kind.OPERATOR, start, end, COMMAND_OPERATORS[name])
        elif name == "sqrt" or name in FRACTION_COMMANDS or name in BINOMIAL_COMMANDS:
            kind = Kind.FRACTION if name in FRACTION_COMMANDS else Kind.BINOMIAL
            self.emit(Kind.ROOT if name == "sqrt" else kind, start, end)
            self.digits_wanted = 1 if name == "sqrt" else 2
            return
        elif name in COMMAND_RELATIONS:
            self.emit(Kind.RELATION, start, end, COMMAND_RELATIONS[name])
        elif name in TRANSPARENT_COMMANDS:
            self.transparent_next = True
            self.gap |= name not in ("left", "right")
        elif name in SPACE_COMMANDS:
            self.emit(Kind.LINE_END, start, end, "latex")
            self.gap = True
        elif name in BREAK_COMMANDS:
            self.on_environment(start, end)
        else:
            self.emit(Kind.VARIABLE, start, end)
        self.digits_wanted = 0

    def on_escaped(self, start: int, end: int) -> None:
        character = self.text[end - 1]
        if character == "%":
            self.emit(Kind.OPERATOR, start, end, "%")
        elif character == "$":
            self.dollar_end = end
            self.currency_end = end
        elif character in "*-+":
            self.emit(Kind.OPERATOR, start, end, character)
        elif character not in "_'\"":
            self.emit(Kind.VARIABLE, start, end)

    def on_number(self, start: int, end: int) -> int | None:
        digits = re.sub(r"[^0-9.eE+-]", "", self.text[start:end])
        tail = _NUMBER_TAIL.match(self.text, end)
        if len(digits) > MAX_DIGITS or tail:
            stop = tail.end() if tail else end
            self.emit(Kind.VARIABLE, start, stop)  # a version, a time, a decimal comma, a base, 0.333…
            return stop
        mantissa = digits.lower().partition("e")[0]
        value = Fraction(int(digits) if digits.isdigit() else digits)
        self.emit(Kind.NUMBER, start, end, value=value, decimals=len(mantissa.partition(".")[2]))
        return None

    def on_vulgar(self, start: int, end: int) -> None:
        value = Fraction(unicodedata.numeric(self.text[start])).limit_denominator(10)
        glued = self.glued(start)
        self.emit(Kind.NUMBER, start, end, value=value)
        if glued:  # 2½
            fraction, whole = self.tokens.pop(), self.tokens.pop()
            assert whole.value is not None
            self.tokens.append(whole._replace(value=whole.value + value, end=fraction.end, text=whole.text + "½"))

    def on_phrase(self, start: int, end: int) -> None:
        if _OPERAND_AHEAD.match(self.text, end):
            self.emit(Kind.OPERATOR, start, end, "/" if self.text[start] == "d" else "*")
        else:
            self.emit(Kind.WORD, start, end)

    def on_word(self, start: int, end: int) -> int | None:
        word, lower = self.text[start:end], self.text[start:end].lower()
        following = self.text[end : end + 1]
        glued = self.glued(start)
        if lower == "x" and self.after_operand():
            ahead = _DIGIT_AHEAD if glued else _OPERAND_AHEAD  # 2x\\sqrt{3} and 3x - 2 are algebra
            if ahead.match(self.text, end):
                self.emit(Kind.OPERATOR, start, end, "*")
                return None
        if following.isdigit() or following == "_":
            stop = end
            while stop < len(self.text) and (self.text[stop].isalnum() or self.text[stop] == "_"):
                stop += 1
            self.emit(Kind.VARIABLE, start, stop)
            return stop
        if lower in SCALES:
            self.emit(Kind.SCALE, start, end, lower, Fraction(SCALES[lower]))
        elif lower in ("percent", "pct") and self.after_operand():
            self.emit(Kind.OPERATOR, start, end, "%")
        elif lower in ("squared", "cubed") and self.after_operand():
            self.emit(Kind.OPERATOR, start, end, "^")
            self.emit(Kind.NUMBER, end, end, value=Fraction(2 if lower == "squared" else 3))
        elif lower in WORD_OPERATORS and self.word_operates(lower, end):
            self.emit(Kind.OPERATOR, start, end, WORD_OPERATORS[lower])
            if lower == "of":  # "20% of the 50 apples": the article is no unit
                article = _ARTICLE.match(self.text, end)
                return article.end() if article else None
        elif following == "(" or self.is_variable(word, glued, end):
            self.emit(Kind.VARIABLE, start, end)
        else:
            self.emit(Kind.WORD, start, end)
        return None

    def on_compound(self, start: int, end: int) -> None:
        self.emit(Kind.WORD, start, end)  # base-8

    def word_operates(self, word: str, end: int) -> bool:
        """Whether a word between operands is an operator: 3 times 4, and 20% of 50 or 1/2 of 30 but not 3 of 4."""
        if word != "of":
            if word == "mod" and self.tokens and self.tokens[-1].kind is Kind.WORD:
                return False
            return _OPERAND_AHEAD.match(self.text, end) is not None
        if _OF_AHEAD.match(self.text, end) is None or not self.tokens:
            return False
        last, before = self.tokens[-1], self.tokens[-2] if len(self.tokens) > 1 else None
        if last.kind is Kind.OPERATOR:
            return last.text == "%"
        if last.kind is Kind.CLOSE:
            return True
        divided = before is not None and (before.text == "/" or before.kind is Kind.FRACTION)
        small = last.value is not None and 0 < last.value < 1
        return last.kind is Kind.NUMBER and (divided or small)

    def is_variable(self, word: str, glued: bool, end: int) -> bool:
        if glued or word in GLUED_UNITS:
            return word not in GLUED_UNITS
        if len(word) == 2:
            return word.lower() not in SHORT_WORDS
        if len(word) > 2:
            return _NO_WORD.fullmatch(word) is not None
        return word not in ("a", "A", "I") or _AFTER_ARTICLE.match(self.text, end) is None

    def on_other(self, start: int, end: int) -> None:
        self.emit(Kind.RELATION, start, end, "?")

    def on_approximately(self, start: int, end: int) -> None:
        self.emit(Kind.RELATION, start, end, "~")

    def on_equal(self, start: int, end: int) -> None:
        self.emit(Kind.RELATION, start, end, "=")

    def on_superscript(self, start: int, end: int) -> None:
        digits = self.text[start:end].translate(_SUPERSCRIPTS)
        if not re.fullmatch(r"-?[0-9]{1,4}", digits):
            self.emit(Kind.VARIABLE, start, end)
            return
        self.emit(Kind.OPERATOR, start, end, "^")
        self.emit(Kind.NUMBER, start, end, value=Fraction(int(digits)))

    def on_stars(self, start: int, end: int) -> None:
        """`*` and `**` are operators between operands, and emphasis elsewhere."""
        operates = self.after_operand() and _OPERAND_AHEAD.match(self.text, end) is not None
        even = self.gap == self.text[end : end + 1].isspace()  # emphasis has space on one side only
        after_number = end - start == 1 and bool(self.tokens) and self.tokens[-1].kind is not Kind.WORD
        if operates and (even or after_number) and end - start < 3:
            self.emit(Kind.OPERATOR, start, end, "*" if end - start == 1 else "^")

    def on_currency(self, start: int, end: int) -> None:
        self.dollar_end = end
        self.num_dollars += 1
        if not self.latex:
            self.currency_end = end

    def on_display(self, start: int, end: int) -> None:
        self.num_dollars = 0
        self.on_environment(start, end)

    def on_open(self, start: int, end: int) -> int | None:
        character = self.text[start]
        if character == "{" and self.transparent_next:
            self.transparent_next = False
            self.braces.append(None)
            return None
        self.transparent_next = False
        if character == "{":
            self.braces.append(max(self.digits_wanted - 1, 0))
        elif not (character == "[" and self.tokens and self.tokens[-1].kind is Kind.ROOT):
            line_start = not self.tokens or self.tokens[-1].kind is Kind.LINE_END
            label = _LABEL.match(self.text, start) if line_start else None
            if label:
                self.emit(Kind.BREAK, start, label.end(), "")
                return label.end()
        else:
            self.emit(Kind.OPEN, start, end, "[")
            self.digits_wanted, self.in_root_index = 0, True
            return None
        self.digits_wanted = 0
        self.emit(Kind.OPEN, start, end, {"\uff08": "(", "\u3010": "["}.get(character, character))
        return None

    def on_close(self, start: int, end: int) -> None:
        character = {"\uff09": ")", "\u3011": "]"}.get(self.text[start], self.text[start])
        wanted = self.braces.pop() if character == "}" and self.braces else 0
        if wanted is None:
            return
        self.emit(Kind.CLOSE, start, end, character)
        self.digits_wanted = 1 if character == "]" and self.in_root_index else wanted
        self.in_root_index &= character != "]"

    def on_root(self, start: int, end: int) -> None:
        self.emit(Kind.ROOT, start, end)

    def on_rest(self, start: int, end: int) -> int | None:
        character = self.text[start]
        unit = _UNIT_AFTER_HYPHEN.match(self.text, end) if character in "-\u2010\u2011" else None
        after_name = bool(self.tokens) and self.tokens[-1].kind is Kind.VARIABLE and not self.gap
        compound = unit and (self.glued(start) or (after_name and len(unit[0]) > 3))
        if unit and compound and not self.is_variable(unit[0], False, unit.end()):  # a 3-page letter, the x-coordinate
            self.emit(Kind.WORD, end, unit.end())
            return unit.end()
        if character in SIGN_OPERATORS:
            self.emit(Kind.OPERATOR, start, end, SIGN_OPERATORS[character])
        elif character == "!":
            self.emit(Kind.OPERATOR if self.after_operand() and not self.gap else Kind.BREAK, start, end, "!")
        elif character == "|":
            self.emit(Kind.BREAK, start, end, "|")
        elif character in "_@" or unicodedata.category(character) in ("Sm", "Lm", "Lo", "Nd", "No"):
            self.emit(Kind.VARIABLE, start, end)
        else:
            self.emit(Kind.BREAK, start, end, "")
        return None


def read_tokens(text: str) -> TokenList:
    """Read a text.

    >>> [token.text for token in read_tokens(r"Total: $\\frac{1}{2} \\times 6$ apples").tokens]
    ['Total', '', '\\\\frac', '{', '1', '}', '{', '2', '}', '*', '6', 'apples']
    """
    reader = _Reader(text)
    reader.read()
    tokens = resolve_line_ends(reader.tokens, text)
    return TokenList(text, tokens, match_brackets(tokens), reader.annotations)
