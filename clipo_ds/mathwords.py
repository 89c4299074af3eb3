"""What the readers of arithmetic in free text know about signs, LaTeX commands and English words.

Tables only, for `clipo_ds.mathtext` (what is a token) and `clipo_ds.doubts` (what leaves an equation in doubt).
Layer L1, imports nothing of the package and no torch.
"""

from __future__ import annotations

from fractions import Fraction


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Signs and commands -> the operators + - * / ^ % mod, and the relations = (equal), ~ (about equal), ? (any other).

SIGN_OPERATORS = {
    **dict.fromkeys("+\N{FULLWIDTH PLUS SIGN}", "+"),
    **dict.fromkeys("-\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}", "-"),
    **dict.fromkeys("*\N{MULTIPLICATION SIGN}\N{MULTIPLICATION X}\N{HEAVY MULTIPLICATION X}", "*"),
    **dict.fromkeys("\N{DOT OPERATOR}\N{MIDDLE DOT}\N{BULLET OPERATOR}\N{ASTERISK OPERATOR}", "*"),
    **dict.fromkeys("/\N{DIVISION SIGN}\N{FRACTION SLASH}\N{DIVISION SLASH}\N{HEAVY DIVISION SIGN}", "/"),
    "^": "^",
    "%": "%",
}
WORD_OPERATORS = {"times": "*", "plus": "+", "minus": "-", "mod": "mod", "of": "of"}
COMMAND_OPERATORS = {"times": "*", "cdot": "*", "cdotp": "*", "ast": "*", "div": "/", "bmod": "mod"}
RELATION_WORDS = _words("equal equals is are was were gives makes yields totals comes adds amounts results")
"""Words that may be an equals sign between a computation and a number."""
PRODUCT_SIGNS = frozenset({r"\cdot", r"\times", "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}"})
FRACTION_COMMANDS = _words("frac dfrac tfrac cfrac")
BINOMIAL_COMMANDS = _words("binom dbinom tbinom")
COMMAND_RELATIONS = {
    **dict.fromkeys(_words("approx approxeq simeq doteq thickapprox"), "~"),
    **dict.fromkeys(_words("ne neq le leq leqslant ge geq geqslant lt gt ll gg equiv cong sim nmid mid"), "?"),
    **dict.fromkeys(_words("propto in notin subset subseteq"), "?"),
}
TRANSPARENT_COMMANDS = _words(
    "text textbf textit textrm textsf texttt textnormal mathrm mathbf mathit mathsf mathtt mbox hbox fbox boxed "
    "boldsymbol bm emph underline displaystyle textstyle scriptstyle limits nolimits small large bf rm it "
    "big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr left right middle nonumber notag strut relax "
    "enspace thinspace noindent degree circ"
)
"""Commands that change no value; what stands in a group behind them is read as if they were not there."""
PROSE_COMMANDS = _words("text textrm textnormal mathrm mbox hbox rm")
"""Those of them whose group holds words, or units."""
SPACE_COMMANDS = _words("quad qquad hfill")
BREAK_COMMANDS = _words(
    "Rightarrow Longrightarrow rightarrow longrightarrow implies iff Leftrightarrow to therefore because hline cline "
    "par item newline mapsto Leftarrow impliedby longmapsto leftrightarrow Longleftrightarrow"
)
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# Letters: words and units, or variables.

GLUED_UNITS = _words(
    "cm mm km dm nm ft yd mi in inch inches kg mg lb lbs oz ml mL kL cL dL hr hrs min mins sec secs ms mph kph kmh "
    "GB MB KB TB gb mb kb tb Gb Mb kcal cal kW kWh kw kwh Hz kHz MHz GHz rpm USD EUR GBP CNY cents cent pts sq cc "
    "dollars minutes hours days weeks months years seconds meters metres miles feet pounds grams "
    "kgs kms cms mms gms kmph kmh mps ltr ltrs yrs wks mos bhp Rs rs THz kJ MJ kN kPa mA kV"
)
"""What may stand directly behind a number without being a variable."""
LETTER_UNITS = frozenset("msghlLNJWVKCF")
"""Letters that are a unit behind a number and a space, where the text uses them for nothing else."""
MONEY_BEFORE = _words("rs inr usd")
"""Currencies that are written before the amount, in lower case."""
SHORT_WORDS = _words(
    "of to in is it as at be by do go he if me my no on or so up us we an am pm ok ie eg vs mr ms dr st"
)
"""Two letters that are a word; any other two are a product of variables."""
CLAUSE_WORDS = _words(
    "is are was were has have had so then because since which that if gives give makes make leaves equals therefore "
    "thus hence but while when where we he she they it this there"
)
"""Words that no unit between a number and an operator holds."""
# Words around an equation that leave its extent or its meaning in doubt.

FRACTION_WORDS = _words(
    "half third thirds fourth fourths fifth fifths sixth tenth quarter quarters twice double triple thrice"
)
"""Words that compute with what follows them, also with an "of" between."""
PARTS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}
COMPUTING_WORDS = FRACTION_WORDS | _words(
    "sin cos tan sec csc cot log ln exp sqrt root lcm gcd gcf hcf max min floor ceil ceiling abs squared cubed minus "
    "plus less more divided multiplied mod modulo choose factorial negative"
)
JOINING_WORDS = _words("and or from to with over")
"""Words that may compute when a number stands before them: the sum of 3 and 4 + 5, 5 from 3 * 2."""
EXTENTS = _words("many much long old tall far fast large big heavy high wide often")
"""As many as 3 * 4: the words before may compute."""
FUNCTION_WORDS = _words(
    "square cube root power reciprocal inverse opposite negative logarithm factorial digit remainder quotient multiple "
    "divisor factor percent percentage"
)
"""Words that compute with what follows their "of": the square of 3 + 4."""
NUMBER_WORDS = _words("two three four five six seven eight nine ten eleven twelve")
ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth last next other each every per this that a an "
    "one whole entire same previous following"
)
"""Words that say which one it is, so that no number behind does: the third day, the second half."""
PRONOUNS = _words("it he she there what here let who this which")
"""With an 's they are a clause, where Tom's is an owner."""
ARTICLES = _words("the his her their its our my your these those all")
PREPOSITIONS = _words("in of for from at on with by to into")
"""What follows them is no unit of the number before: 30 days in a month."""
LABEL_WORDS = _words(
    "step day week month year case part question problem example equation eq figure number no option round level "
    "chapter section table line room item player person box group phase stage trial method page row column game team "
    "class grade version rule theorem exercise answer way scenario hour minute lesson test quiz trip set type plan"
)
"""Words whose number is a name."""
CONNECTIVES = _words(
    "that so since because then thus hence therefore and or have has get gets is as note see but where gives give "
    "find to if know also now means obtain be are was which implies yields equation equality fact"
)
"""Words that may stand before a plain number that an equation begins with."""
COMPARING_WORDS = _words(
    "more less fewer greater larger smaller times places followed short away digit digits zeros zeroes"
)
"""Words behind a number that make it no value of what came before: 3 * 4 is 2 more than 10."""
WORTH_WORDS = _words("point score mark credit calorie token coin ticket leg foot wheel head vote star")
"""What things are worth or have, so that their number is not summed."""
RESULT_VERBS = _words("earn earns make makes cost costs charge charges")
"""A quotient follows them, hardly ever a share: he earns 3/60 = 20 dollars."""
