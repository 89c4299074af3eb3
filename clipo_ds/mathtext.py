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

from clipo_ds import mathpatterns as patterns
from clipo_ds.mathtokens import PI_SIGN, Kind, Token, TokenList, match_brackets, read_unit_letters, resolve_line_ends
from clipo_ds.mathwords import (
    BINOMIAL_COMMANDS,
    BREAK_COMMANDS,
    COMMAND_OPERATORS,
    COMMAND_RELATIONS,
    FRACTION_COMMANDS,
    LABEL_WORDS,
    PROSE_COMMANDS,
    SIGN_OPERATORS,
    SPACE_COMMANDS,
    TRANSPARENT_COMMANDS,
)
from clipo_ds.rationals import PI
from clipo_ds.wordreader import PROSE, TRANSPARENT, WordReader

MAX_DIGITS = 300
"""A literal with more digits than this is not read as a number."""


class _Reader(WordReader):
    """One pass over a text: what each kind of match becomes."""

    def read(self) -> None:
        text, position, length, match = self.text, 0, len(self.text), patterns.MASTER.match
        handlers = {name: getattr(self, f"on_{name}") for name in patterns.MASTER.groupindex}
        while position < length:
            if self.digits_wanted and text[position] in "0123456789":
                digit = text[position]
                self.emit(Kind.NUMBER, position, position + 1, value=Fraction(int(digit)))
                self.digits_wanted -= 1
                position += 1
                continue
            found = match(text, position)
            assert found is not None and found.lastgroup is not None  # the last alternative takes any character
            name, end = found.lastgroup, found.end()
            if name != "space":
                if name not in ("open", "command"):
                    self.digits_wanted = 0
                if name != "open":
                    self.transparent_next = 0
            position = handlers[name](position, end) or end

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
        elif name in ("lvert", "rvert"):
            self.emit(Kind.OPEN if name == "lvert" else Kind.CLOSE, start, end, "|")
        elif name == "pi":
            self.emit(Kind.NUMBER, start, end, PI_SIGN, PI)
        elif name in COMMAND_RELATIONS:
            self.emit(Kind.RELATION, start, end, COMMAND_RELATIONS[name])
        elif name in TRANSPARENT_COMMANDS:
            self.transparent_next = PROSE if name in PROSE_COMMANDS else TRANSPARENT
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
        tail = patterns.NUMBER_TAIL.match(self.text, end)
        if tail and tail[0].startswith(":") and self.tokens and self.tokens[-1].text.lower() in LABEL_WORDS:
            tail = None  # Day 3:2(1 + 5) = 12
        if len(digits) > MAX_DIGITS or tail or patterns.UNSURE_EXPONENT.match(self.text, start, end):
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

    def on_other(self, start: int, end: int) -> None:
        if self.text[start:end] == "!=" and not self.gap and self.after_operand():  # 5!=120, or 3+4!=8
            self.emit(Kind.OPERATOR, start, start + 1, "!")
            self.emit(Kind.RELATION, start + 1, end, "=")
        else:
            self.emit(Kind.RELATION, start, end, "?")

    def on_approximately(self, start: int, end: int) -> None:
        self.emit(Kind.RELATION, start, end, "~")

    def on_equal(self, start: int, end: int) -> None:
        self.emit(Kind.RELATION, start, end, "=")

    def on_superscript(self, start: int, end: int) -> None:
        digits = self.text[start:end].translate(patterns.SUPERSCRIPTS)
        if not re.fullmatch(r"-?[0-9]{1,4}", digits):
            self.emit(Kind.VARIABLE, start, end)
            return
        self.emit(Kind.OPERATOR, start, end, "^")
        self.emit(Kind.NUMBER, start, end, value=Fraction(int(digits)))

    def on_stars(self, start: int, end: int) -> None:
        """`*` and `**` are operators between operands, and emphasis elsewhere."""
        operates = self.after_operand() and patterns.OPERAND_AHEAD.match(self.text, end) is not None
        even = self.gap == self.text[end : end + 1].isspace()  # emphasis has space on one side only
        after_number = end - start == 1 and bool(self.tokens) and self.tokens[-1].kind is not Kind.WORD
        names = even and after_number and self.after_operand() and patterns.NAME_AHEAD.match(self.text, end)  # 3 * Ann
        if (operates and (even or after_number) and end - start < 3) or names:
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
            self.braces.append(self.transparent_next)
            self.prose += self.transparent_next == PROSE
            self.transparent_next = 0
            return None
        self.transparent_next = 0
        if character == "{":
            self.braces.append(max(self.digits_wanted - 1, 0))
        elif not (character == "[" and self.tokens and self.tokens[-1].kind is Kind.ROOT):
            line_start = not self.tokens or self.tokens[-1].kind is Kind.LINE_END
            label = patterns.LABEL.match(self.text, start) if line_start else None
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
        if wanted < 0:
            self.prose -= wanted == PROSE
            return
        self.emit(Kind.CLOSE, start, end, character)
        self.digits_wanted = 1 if character == "]" and self.in_root_index else wanted
        self.in_root_index &= character != "]"

    def on_root(self, start: int, end: int) -> None:
        self.emit(Kind.ROOT, start, end)

    def on_rest(self, start: int, end: int) -> int | None:
        character = self.text[start]
        unit = patterns.UNIT_AFTER_HYPHEN.match(self.text, end) if character in "-\u2010\u2011" else None
        after_name = bool(self.tokens) and self.tokens[-1].kind is Kind.VARIABLE and not self.gap
        compound = unit and (self.glued(start) or (after_name and len(unit[0]) > 3))
        if unit and compound and not self.is_variable(unit[0], False, unit.end()):  # a 3-page letter, the x-coordinate
            self.emit(Kind.WORD, end, unit.end())
            return unit.end()
        if character in SIGN_OPERATORS:
            self.emit(Kind.OPERATOR, start, end, SIGN_OPERATORS[character])
        elif character == "!":
            following = self.text[end : end + 1]
            if following.isdigit() and not self.after_operand():  # !5, a subfactorial
                self.emit(Kind.VARIABLE, start, end)
            else:
                self.emit(Kind.OPERATOR if self.after_operand() and not self.gap else Kind.BREAK, start, end, "!")
        elif character == "|":
            self.emit(self.kind_of_bar(start, end), start, end, "|")
        elif character in "_@" or unicodedata.category(character) in ("Sm", "Lm", "Lo", "Nd", "No"):
            self.emit(Kind.VARIABLE, start, end)
        else:
            self.emit(Kind.BREAK, start, end, "")
        return None

    def kind_of_bar(self, start: int, end: int) -> Kind:
        """|3 - 5| is an absolute value; with spaces inside, as in the rows of a table, a bar is a break."""
        if self.after_operand():
            return Kind.BREAK if self.gap and not self.text.endswith(r"\right", 0, start) else Kind.CLOSE
        inside = self.text[end : end + 1]
        return Kind.BREAK if inside.isspace() and not self.text.endswith(r"\left", 0, start) else Kind.OPEN


def read_tokens(text: str) -> TokenList:
    """Read a text.

    >>> [token.text for token in read_tokens(r"Total: $\\frac{1}{2} \\times 6$ apples").tokens]
    ['Total', '', '\\\\frac', '{', '1', '}', '{', '2', '}', '*', '6', 'apples']
    """
    reader = _Reader(text)
    reader.read()
    tokens = resolve_line_ends(read_unit_letters(reader.tokens), text)
    return TokenList(text, tokens, match_brackets(tokens), reader.annotations, reader.latex)
