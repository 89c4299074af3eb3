"""The regular expressions by which free text with arithmetic in it is read: one for a token, others for what is ahead.

Layer L1, imports nothing of the package and no torch; used by `clipo_ds.mathtext`. Each looks ahead a bounded way, so
that a reading takes linear time.
"""

from __future__ import annotations

import re

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
OPERAND_AHEAD = re.compile(r"(?:\\?\$|\\left|\s|[(\[{]){0,12}(?:-?[0-9]|\.[0-9]|\\[dtc]?frac|\\sqrt|[½⅓⅔¼¾])")
DIGIT_AHEAD = re.compile(r"[ \t]?\$?(?:[0-9]|\.[0-9])")
FACTOR_AHEAD = re.compile(
    r"(?:\\?\$|\\left|[^\S\n]|[(\[{]){0,12}(?:(?:(?<=[(\[{])-)?[0-9]|\.[0-9]|\\[dtc]?frac|\\sqrt|[½⅓⅔¼¾])"
)
"""On the same line, negative in brackets only: what follows an x that is a times sign."""
NEGATIVE_AHEAD = re.compile(r"[^\S\n]+[-\u2212](?:[0-9]|\.[0-9])")
NAME_AHEAD = re.compile(r"[^\S\n]*(?:\\text\w*\{[^\S\n]*)?[^\W\d_]")
OF_AHEAD = re.compile(
    r"[\s}]{1,6}(?:\\\)|\$)?\s{0,3}(?:(?:the|these|those|his|her|their|all)[\s}]{1,4})?(?:\\\(\s?|[\\$£€{]){0,3}"
    r"(?:[0-9.(]|[dtc]?frac)"
)
MATHS_AHEAD = re.compile(r"\s{0,3}\\\(")
BRACKET_AHEAD = re.compile(r"\s?[({]")
AMOUNT_AHEAD = re.compile(r"\.?\s?(?=[0-9])")
STATED_AHEAD = re.compile(r"\s{1,3}(?:\\\(|[\\$£€]){0,2}-?\.?[0-9]")
"""A number comes next, nothing between: 3 + 4 is 7."""
EQUAL_TO = re.compile(r"\s{1,3}(?P<no>not\s{1,3})?(?:also\s{1,3})?equal\s{1,3}to\b")
COMES_TO = re.compile(r"\s{1,3}(?:up\s{1,3})?(?:to|in)(?=\s)")
TO = re.compile(r"\s{1,3}to(?=\s)")
US = re.compile(r"\s{1,3}(?:us|you|me|him|her|them)(?=\s)")
ABOUT = re.compile(r"\s{1,3}(?:approximately|about|roughly|around)(?=\s)")
NEGATED = re.compile(r"(?:\bnot|n['\u2019]t|\bnever|\bcannot|\blonger)\s{1,3}$")
UNSURE_EXPONENT = re.compile(r"(?!1e|[0-9]\.[0-9]+e|[0-9]e[-+]0)[0-9.,]+e[-+]", re.IGNORECASE)
"""12e-7 is an unknown e and a subtraction as likely as a power of ten; 1e-6, 2.5e-3 and 3e-05 are not."""
ARTICLE = re.compile(r"\s+(?:the|these|those|his|her|their|all)(?=\s)")
INDEXED = re.compile(r"\}\s?[0-9_(]")
UNIT_AFTER_HYPHEN = re.compile(r"[^\W\d_]{2,}")
AFTER_ARTICLE = re.compile(r"\s+(?:[^\W\d_]{2}|[$0-9])")
NO_WORD = re.compile(r"[A-Z]{3}|[b-df-hj-np-tv-xzB-DF-HJ-NP-TV-XZ]{3,5}")
LABEL = re.compile(r"\((?:[0-9]{1,3}|[a-zA-Z]|[ivxIVX]{1,4})\)(?=\s)")
NUMBER_TAIL = re.compile(r"(?:[.,:_][0-9]+)+|_|\.(?:[a-z]|\\(?:overline|dot|bar))|\s{0,2}(?:\\[lc]?dots|…|\.\.)")

MASTER = re.compile(
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
  | (?P<word>[^\W\d_\u00b2\u00b3\u00b9\u2070-\u2079]+(?:['\u2019\-\u2010][^\W\d_]{2,})*
      (?:(?<=[^\W\d_]{2})['\u2019][stdm](?![^\W\d_]))?)
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
