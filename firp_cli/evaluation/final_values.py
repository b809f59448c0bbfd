"""Final values of answers: numbers, times of the day and LaTeX expressions, as zero-shot chat answers are scored.

Numbers are equal as fractions, however they are written. Other expressions are compared as text without the commands
that only change their looks: an equal value in another form counts as different.
"""

from __future__ import annotations

import re
from fractions import Fraction

from firp_cli.data.references import last_boxed

LOOKS = re.compile(r"\*\*|__|\\left|\\right|\\displaystyle|\\[!,;:]")  # emphasis, sizes and spacing
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
FRACTION = re.compile(r"\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
COMMAND = re.compile(r"\\[A-Za-z]+")
THIN_SPACE = re.compile("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
UNIT = re.compile(r"\^\{?\\circ\}?|\\degree|\\?%")
TIME = re.compile(r"(?<![\d:])(\d{1,2}):([0-5]\d)(?![\d:])")
# a minus that follows a word, a number or a bracket subtracts; digits after a letter, in an exponent or index are none
_NUMBER = r"""(?P<minus>(?<![\w)\]}])-[$€£¥]?|[$€£¥]-)?[$€£¥]?(?<![\w^])(?<![\^_]\{)
    (?:(?:(?P<whole>[0-9]+)[ ])?(?P<top>[0-9]+)[ ]?/[ ]?(?P<bottom>[0-9]+)
      |(?P<plain>[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"""
NUMBER = re.compile(_NUMBER, re.VERBOSE | re.ASCII)
_NAME, _UNIT_WORDS = r"(?:[A-Za-z\ ]+=|[A-Za-z]{2,}[A-Za-z\ ]*\s)?", r"(?:\s+[A-Za-z]{2,}[A-Za-z\s]*(?:\^\{?[23]\}?)?)?"
QUANTITY = re.compile(rf"\s*\$?{_NAME}\s*{_NUMBER}{_UNIT_WORDS}\s*\$?\.?\s*", re.VERBOSE | re.ASCII)
LONGEST_NUMBER = 100  # characters
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def numbers(text: str) -> list[Fraction]:
    """Return the numbers of a text in their order, without times of the day; a full hour is a number."""
    plain = TIME.sub(lambda match: match[1] if match[2] == "00" else " ", COMMAND.sub(" ", _plain(text)))
    return [value for match in NUMBER.finditer(plain) if (value := _value(match)) is not None]


def single_number(text: str) -> Fraction | None:
    """Return the number of an expression that is one number, perhaps with a unit or as the value of a name; None for
    others.
    """
    match = QUANTITY.fullmatch(UNIT.sub("", _plain(text)))
    return _value(match) if match else None


def times(text: str) -> list[tuple[int, int]]:
    """Return the times of the day, H:MM, of a text in their order."""
    return [(int(hour), int(minute)) for hour, minute in TIME.findall(text)]


def ends_with(text: str, expected: str) -> bool:
    """Return True if the final value of an answer is the expected one.

    The final value is the last boxed expression. In an answer without one, it is the number after the last `####`, else
    the last number or time of the text; where no number is expected, the last formula or the right side of it.
    """
    boxed, moment, wanted = last_boxed(text), times(expected), single_number(expected)
    if moment:
        return times(text if boxed is None else boxed)[-1:] == moment[-1:]
    if wanted is None:
        said = _last_formula(text) if boxed is None else [boxed]
        return normal_form(expected) in [normal_form(item) for item in said]
    if boxed is not None:
        return single_number(boxed) == wanted
    after = numbers(text.rpartition("####")[2])[:1] if "####" in text else []
    return (after or numbers(text)[-1:]) == [wanted]


def contains(text: str, expected: str) -> bool:
    """Return True if a number, a time or a text is in an answer, in any letter case, spacing and kind of quotes."""
    if moment := times(expected):
        return set(moment) <= set(times(text))
    wanted = single_number(expected)
    return _words(expected) in _words(text) if wanted is None else wanted in numbers(text)


def normal_form(expression: str) -> str:
    """Return a LaTeX expression without spaces, units and the commands that only change its looks."""
    return re.sub(r"\$|\s+", "", UNIT.sub("", _plain(expression))).rstrip(".")


def _plain(text: str) -> str:
    text = text.replace("{,}", ",").replace("\u2212", "-").replace("\\$", "$").replace("\\ ", " ")
    text = re.sub(r"\\[dtc]frac", r"\\frac", LOOKS.sub("", TEXT.sub(r" \1", text)))
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", re.sub(r"(?<=[0-9])\\frac", r" \\frac", text))
    return THIN_SPACE.sub("", FRACTION.sub(r"\1/\2", text))


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > LONGEST_NUMBER:
        return None
    if match["plain"]:
        value = Fraction(match["plain"].replace(",", ""))
    elif int(match["bottom"]) == 0:
        return None
    else:
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    return -value if match["minus"] else value


def _last_formula(text: str) -> list[str]:
    """Return the last formula of a text, and what follows its last equals sign."""
    formulas = [next(part for part in match.groups() if part) for match in FORMULA.finditer(text)]
    return [formulas[-1], formulas[-1].rpartition("=")[2]] if formulas else []


def _words(text: str) -> str:
    return " ".join(text.replace('"', "'").replace("`", "").split()).casefold()
