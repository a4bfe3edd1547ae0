r"""Answers: found in a text, brought to one form for votes, compared exactly.

Numbers are compared as fractions, never as floats, so ``0.1`` is one tenth and ``1/3`` is not
``0.333``. What is no number is text: ``3/0``, a list, a range, a time of day, an expression.

Percent is a unit like any other, not a factor: ``50%`` is the same as ``50``, which is how most
data sets write such an answer, and is not ``0.5``. Units are compared, never converted: ``1 km``
differs from ``1000 m``.

Numbers of more than 600 digits, or with an exponent beyond 600, are compared as text; so no
answer, however it was made, can take much time or memory.
"""

# ruff: noqa: RUF001 - signs that look alike are what this file is about

from __future__ import annotations

import re
import unicodedata
from collections import deque
from fractions import Fraction

from loopos.errors import DataError

__all__ = ["extract_answer", "marked_answer", "normal_answer", "same_answer"]

#: Digits of a number, and its largest exponent. Python's own limit for text to int can be as low
#: as 640 in a program that embeds this library.
_MAX_DIGITS = 600
_LIMIT = 10**_MAX_DIGITS
#: Decimal places of a canonical number at most; longer ones are written as a fraction.
_MAX_PLACES = 20

#: One number without its sign. Repetitions are bounded: no text makes the search quadratic.
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,200}(?!,?\d)|\d{1,600}(?!\d))"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{0,600}}(?!\d))?|\.\d{{1,600}}(?!\d))"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)(?P<currency>[$€£¥₹]?)\s?(?P<sign2>[-+]?)"
    rf"(?:(?:(?P<whole>{_DIGITS})\s(?:and\s)?)?(?P<top>{_DIGITS})\s?/\s?(?P<bottom>{_DIGITS})"
    rf"|(?P<decimal>{_DECIMAL})"
    r"(?:[eE](?P<exponent>[-+]?\d{1,9})(?![\w.])|\s?[x*×]\s?10\^(?P<power>[-+]?\d{1,9})(?!\d))?)"
    r"(?P<unit>.*)",
    re.DOTALL,
)
_FRACTION_CHARACTERS = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
#: A number inside a text: a dash behind a word or a number is no sign.
_IN_TEXT = re.compile(
    r"(?:(?<![\w.)\]%])[-−+])?[$€£¥₹]?(?:(?<![\w.)\]%$€£¥₹])[-−])?"
    r"(?:(?<!\d)(?:\d{1,600} )?\d{1,600}\s?[/⁄]\s?\d{1,600}(?![\d/⁄])"
    rf"|(?:(?<!\d){_DIGITS}(?:\.\d{{1,600}})?|\.\d{{1,600}})"
    rf"(?:[eE][-+]?\d{{1,9}}\b|\s?[{_FRACTION_CHARACTERS}])?|[{_FRACTION_CHARACTERS}])\s?%?"
)
#: LaTeX's, where a single digit needs no braces.
_FRAC = re.compile(r"\\[dt]?frac\s?(?:\{([^{}]{1,600})\}|([0-9]))\s?(?:\{([^{}]{1,600})\}|([0-9]))")
#: An unknown that an answer names: x = 5.
_NAMED = re.compile(r"([^\W\d_])\s?=\s?(?=\S)")
_SIGNS = str.maketrans(dict.fromkeys("−–—‒‐‑﹣－", "-"))
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
#: What one writes for what; the plurals follow by rule.
_UNITS = {
    name: unit
    for unit, names in {
        "%": "% percent percentage pct",
        "dollar": "dollar usd buck $", "cent": "cent ¢", "euro": "euro eur €",
        "pound": "£ gbp lb pound",
        "yen": "yen jpy ¥", "rupee": "rupee inr ₹",
        "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre",
        "m": "m meter metre", "km": "km kilometer kilometre",
        "inch": "in inch inches", "foot": "ft foot feet", "yard": "yd yard", "mile": "mi mile",
        "mg": "mg milligram", "g": "g gram gramme", "kg": "kg kilogram kilo",
        "ounce": "oz ounce",
        "ml": "ml milliliter millilitre", "l": "l liter litre", "gallon": "gal gallon",
        "second": "s sec second", "minute": "min minute", "hour": "h hr hour",
        "day": "day", "week": "wk week", "month": "mo month", "year": "yr year",
        "mile/hour": "mph", "km/hour": "kmh kph", "degree": "degree deg °",
        "°c": "°c celsius", "°f": "°f fahrenheit",
        "person": "person people", "child": "child children", "man": "man men",
        "woman": "woman women", "mouse": "mouse mice", "loaf": "loaf loaves",
        "am": "am", "pm": "pm",
    }.items()
    for name in names.split()
}  # fmt: skip
#: Words of a unit that name no unit.
_FILLERS = frozenset(
    ("each", "left", "total", "in", "altogether", "remaining", "more", "of", "the", "a", "an")
)
#: After these words a number is part of something else.
_NO_UNIT = frozenset(
    ("is", "are", "was", "and", "or", "to", "than", "plus", "minus", "times", "by", "as", "if",
     "because", "so", "then", "out", "x", "not")
)  # fmt: skip
_MAX_UNIT_CHARACTERS, _MAX_UNIT_WORDS = 60, 6
_MARKERS = (
    (re.compile(r"####"), False),
    (re.compile(r"\banswer\s{0,9}\*{0,2}\s{0,9}:", re.IGNORECASE), False),
    (re.compile(r"\b(?:the|final)\s{1,9}answer\s{1,9}is\b\s{0,9}:?", re.IGNORECASE), True),
)
_SENTENCE_END = re.compile(r"(?<=\S)[.!?](?=\s)")


def extract_answer(text: str, marker: str | None = None) -> str | None:
    r"""Return the answer that a text gives, as it is written there, or None.

    Parameters
    ----------
    text : str
        Reasoning and answer.
    marker : str, optional
        Such as ``"Answer:"`` or ``"####"``, in any case: the answer is what follows its last
        occurrence up to the end of the line, and there is none where nothing follows.
        Without it the first of these that is there: what follows ``####``, ``Answer:``,
        ``the answer is`` (to the end of the sentence), the contents of ``\boxed{...}``, the last
        number in the text. Where another mark stands in what a mark stands before, as in
        ``Answer: The answer is 42.``, the answer is what follows that one.
    """
    _require_text(text)
    if marker is not None:
        if not marker:
            raise DataError("the marker of an answer is empty")
        found = _behind(re.compile(re.escape(marker), re.IGNORECASE), text, False)
        return None if found is None else _first_marked(found) or found
    found = marked_answer(text)
    if found is not None:
        return found
    last = _last(_IN_TEXT, text)
    return None if last is None else last[0].strip()


def marked_answer(text: str) -> str | None:
    """Return the answer that something in the text marks as such, None where nothing does."""
    _require_text(text)
    found = _first_marked(text)
    return None if found is None else _first_marked(found) or found


def normal_answer(text: str) -> str:
    """Return the form of an answer that all ways to write it share, for votes.

    Numbers lose currency, unit, the name of an unknown, thousands separators and needless zeros,
    and are written as a whole number, a decimal of at most 20 places, or else a reduced fraction:
    ``"$1,200.50"`` gives ``"1200.5"``, ``"x = 1 1/2 hours"`` ``"1.5"``, ``"2/6"`` ``"1/3"``. Text
    loses case, articles, punctuation and repeated spaces, lists of numbers the spaces at their
    commas: ``"(1, 2)"`` gives ``"(1,2)"``. The form of a form is itself.
    """
    return _settled(text)[0]


def same_answer(a: str, b: str) -> bool:
    """Whether two answers mean the same.

    Numbers are compared exactly. Their units count only where both have one, so ``5 apples`` is
    the same as ``5`` and not as ``5 pears``; plurals and common abbreviations (``km``, ``hrs``)
    are known. So is the name of an unknown: ``x = 5`` is the same as ``5`` and not as ``y = 5``. So
    the relation is not transitive. Text is compared by :func:`normal_answer`.
    """
    (first, *ours), (second, *theirs) = _settled(a), _settled(b)
    fits = (not one or not other or one == other for one, other in zip(ours, theirs, strict=True))
    return first == second and all(fits)


def _require_text(text: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"expected an answer as text, found {type(text).__name__}")


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0] if last else None


def _first_marked(text: str) -> str | None:
    """Return what stands behind the first kind of mark that there is, other marks included."""
    for pattern, sentence in _MARKERS:
        found = _behind(pattern, text, sentence)
        if found is not None:
            return found
    return _boxed(text)


def _behind(pattern: re.Pattern[str], text: str, sentence: bool) -> str | None:
    """Return what follows the last match up to the end of its line or sentence, if anything."""
    last = _last(pattern, text)
    if last is None:
        return None
    line = re.split(r"[\r\n]", text[last.end() :], maxsplit=1)[0]
    if sentence:
        line = _SENTENCE_END.split(line, maxsplit=1)[0]
    found = line.strip().strip("*").strip()
    if sentence:
        found = found.rstrip(".!?")
    return found or None


def _boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` holds, with braces in balance."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start = depth_at = start + len("\\boxed{")
    depth = 1
    while depth and depth_at < len(text):
        depth += {"{": 1, "}": -1}.get(text[depth_at], 0)
        depth_at += 1
    inside = text[start : depth_at - 1].strip()
    return None if depth or not inside else inside


def _simplified(text: str) -> str:
    """Return a text in plain characters, without what LaTeX and Markdown put around an answer."""
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)  # 1 234 567
    # Before compatibility forms are made: 3½ would become 31/2, and 5² would become 52.
    text = re.sub(f"[{_FRACTION_CHARACTERS}]", lambda m: " " + _spelt(m[0]), text)
    text = re.sub(r"(?<=\w)(?=[²³¹⁰⁴-⁹⁻])(?<![²³¹⁰⁴-⁹⁻])", "^", text)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS).replace("⁄", "/")
    if "\\" in text or "{" in text:
        text = _FRAC.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text)
        text = re.sub(r"\^(?:\\circ(?![a-zA-Z])|\{\\circ\})", "°", text)
        text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|boxed)\{([^{}]{0,600})\}", r" \1", text)
        text = re.sub(r"\\times|\\cdot", "*", text).replace("{,}", ",")
        text = re.sub(r"\\[!,;]|\\left|\\right|\\[()\[\]]", "", text)
        text = re.sub(r"\^\{([-+]?\d{1,9})\}", r"^\1", text)
        text = text.replace("\\%", "%").replace("\\$", "$")
    text = " ".join(text.split()).strip("*`\"'“”‘’ ")
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1]
    text = text.removeprefix("=").rstrip(".,;:!?= ").strip("*`\"'“”‘’ ")
    label = re.fullmatch(r"[(\[](\w+)[)\]]", text) or re.fullmatch(r"(\w)\)", text)
    return label[1] if label else text


def _spelt(character: str) -> str:
    return unicodedata.normalize("NFKC", character).replace("⁄", "/")


def _quantity(text: str) -> tuple[Fraction, str, str] | None:
    """Return number, unit and name of an answer that is a number, "" where it has none of these.

    The name is that of an unknown: ``x = 5``.
    """
    if len(text) > 8 * _MAX_DIGITS:
        return None
    text = _simplified(text)
    named = _NAMED.match(text)
    match = _QUANTITY.fullmatch(text, 0 if named is None else named.end())
    if match is None or (match["sign"] and match["sign2"]):
        return None
    value = _value(match)
    if value is None:
        return None
    rest = match["unit"]
    words = rest.split(maxsplit=1)
    if rest[:1] == " " and words[0].casefold() in _SCALES:
        value *= _SCALES[words[0].casefold()]
        rest = " " + words[1] if len(words) > 1 else ""
    unit = _unit(rest)
    if unit is None or max(abs(value.numerator), value.denominator) >= _LIMIT:
        return None
    currency = _CURRENCIES.get(match["currency"])
    if currency is not None:
        if unit not in ("", currency) and unit[0] != "/":
            return None
        unit = currency + unit.removeprefix(currency)
    name = "" if named is None else named[1].casefold()
    return (-value if "-" in (match["sign"], match["sign2"]) else value), unit, name


def _value(match: re.Match[str]) -> Fraction | None:
    def number(name: str) -> str:
        return (match[name] or "0").replace(",", "")

    if match["top"]:
        bottom = int(number("bottom"))
        return Fraction(int(number("top")), bottom) + int(number("whole")) if bottom else None
    whole, _, places = number("decimal").partition(".")
    exponent = int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > _MAX_DIGITS:
        return None
    if not (whole or places):
        return None
    value = Fraction(int(whole or "0")) + Fraction(int(places or "0"), 10 ** len(places))
    return value * Fraction(10) ** exponent


def _unit(text: str) -> str | None:
    """Return the canonical unit behind a number, None where that is no unit."""
    spaced = text[:1] == " "
    text = text.strip().casefold()
    if not text:
        return ""
    if len(text) > _MAX_UNIT_CHARACTERS or re.search(r"[^\w\s%$€£¥₹¢°/^'.-]|_|(?<!\^)\d", text):
        return None
    text = re.sub(r"\.(?!\w)|\bper\b", lambda m: "/" if m[0] == "per" else "", text)
    text = re.sub(r"\s*/\s*", "/", text.replace("-", " ").replace(".", ""))
    words = [word for word in re.split(r"[\s]+", text) if word]
    if not words or len(words) > _MAX_UNIT_WORDS or words[0] in _NO_UNIT:
        return None
    parts = ["/".join(_one_unit(part) for part in word.split("/")) for word in words]
    known = all(part in _UNITS.values() for part in parts[0].split("/"))
    if not known and (not spaced or len(words[0]) < 2):  # 3x and 3 x are algebra
        return None
    kept = [part for part, word in zip(parts, words, strict=True) if word not in _FILLERS or known]
    return " ".join(dict.fromkeys(kept)) if kept else ""


def _one_unit(word: str) -> str:
    """Return the unit of a word: by the table, else without the ending of a plural."""
    base, power, exponent = word.partition("^")
    for ending, instead in (("", ""), ("s", ""), ("es", ""), ("ies", "y")):
        if base.endswith(ending):
            found = _UNITS.get(base[: len(base) - len(ending)] + instead)
            if found is not None:
                return found + power + exponent
    if len(base) > 3 and base.endswith("ies"):
        base = base[:-3] + "y"
    elif re.search(r"(?:ch|sh|ss|x)es$", base):
        base = base[:-2]
    elif len(base) > 2 and base.endswith("s") and not base.endswith("ss"):
        base = base[:-1]
    return base + power + exponent


def _settled(text: str) -> tuple[str, str, str]:
    """Return the canonical form of an answer, its unit and its name, "" for none and for text."""
    _require_text(text)
    # What is left of a text can be a number ("the 5"), or have another article in front.
    while True:
        quantity = _quantity(text)
        if quantity is not None:
            return _written(quantity[0]), *quantity[1:]
        form = _plain_text(text)
        if form == text:
            return form, "", ""
        text = form


def _written(value: Fraction) -> str:
    """Write a number: whole, or as a short decimal, or as a fraction."""
    for places in range(_MAX_PLACES + 1):
        if 10**places % value.denominator == 0:
            digits = str(abs(value.numerator) * 10**places // value.denominator)
            digits = digits.rjust(places + 1, "0")
            sign = "-" if value < 0 else ""
            return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
    return f"{value.numerator}/{value.denominator}"


def _plain_text(text: str) -> str:
    """Return a text without case, articles, punctuation and repeated spaces."""
    text = unicodedata.normalize("NFKC", _simplified(text).casefold())
    text = re.sub(r"['\"`“”‘’]", "", text)
    is_list = not re.search(r"[^\W\d_]{2}", text)  # a comma in words is punctuation
    if is_list:
        text = _without_spaces_at_commas(text)
    # Between digits these mean something: 10:30, 3.5.1, 1,2.
    text = re.sub(r"(?<!\d)[.,;:](?=\d)|[.,;:](?!\d)|[!?\\]", " ", text)
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", text)
    kept: list[str] = []
    for word in reversed(text.split()):
        if word in ("a", "an", "the") and kept and (len(kept[-1]) > 1 or kept[-1].isdigit()):
            continue
        kept.append(word)
    form = " ".join(reversed(kept))
    # A space keeps what is no thousands separator from being read as one: 1, 200.
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", ", ", form) if is_list else form


def _without_spaces_at_commas(text: str) -> str:
    """Write a list of numbers with bare commas, and its numbers without thousands separators.

    Between brackets a bare comma divides a list, unless others have a space: then it is a
    separator, as it is outside of brackets.
    """
    if re.search(r"\d,\s", text) or not re.search(r"[(\[{]", text):
        thousands = r"(?<![\d.,])\d{1,3}(?:,\d{3}){1,200}(?!,?\d)"
        text = re.sub(thousands, lambda m: m[0].replace(",", ""), text)
    return re.sub(r"(?<=\d)\s?,\s?(?=\d)", ",", text)
