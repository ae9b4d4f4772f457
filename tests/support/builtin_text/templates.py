"""
Templates of problems: numbers and words are drawn at random, and the solution is calculated.

The text files in this folder hold one template per paragraph. Its first line is the name and a header:
`a in 2..9; v in x|y; b = a * a` draws a number, draws a word and calculates. In the lines that follow, `{A|B}` is one
of the alternatives, `{a + 1}` is a value, and `{c := a + 1}` is a calculation, such as `7 + 1 = 8`.
"""

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

Problem = Callable[[random.Random], str]
_LINES = Path(__file__).with_name("words.txt").read_text("utf-8").splitlines()
_WORDS = {kind: words.split() for kind, words in (line.split(": ") for line in _LINES)}


class NotWholeError(ValueError):
    """A calculation does not give a whole number."""


def template(header: str, text: str) -> Problem:
    """The problem that a header and a text describe."""

    def write(rng: random.Random) -> str:
        while True:
            names: dict[str, Any] = setting(rng)
            draw(header, names, rng)
            try:
                return fill(text, names, rng)
            except NotWholeError:
                continue

    return write


def draw(header: str, names: dict[str, Any], rng: random.Random) -> None:
    """Add to `names` what the header defines."""
    for item in header.split("; "):
        name, kind, choices = item.split(" ", 2)
        low, _, high = choices.partition("..")
        if kind == "=":
            names[name] = _value(choices, names)
        elif high:
            names[name] = rng.randint(_value(low, names), _value(high, names))
        else:
            names[name] = rng.choice(choices.split("|"))


def fill(text: str, names: dict[str, Any], rng: random.Random) -> str:
    """Fill the slots of a text. The result of a calculation is added to `names`."""

    def slot(match: re.Match[str]) -> str:
        name, _, expression = match[1].rpartition(" := ")
        if "|" in expression:
            return rng.choice(expression.split("|"))
        value = _value(expression, names)
        if not name:
            return str(value)
        if value != int(value):
            raise NotWholeError
        shown = re.sub(r"\b[a-z]\w*", lambda used: signed(names[used[0]], used.start()), expression)
        names[name] = int(value)
        return f"{shown.replace(' ** ', '^')} = {names[name]}"

    return re.sub(r"{([^{}]+)}", slot, text)


def signed(number: int, start: int = 1) -> str:
    """The number as it is written `start` characters into an expression: `-3`, but `2 * (-3)`."""
    return f"({number})" if number < 0 and start else str(number)


def polynomial(*coefficients: int) -> str:
    """A polynomial in x, highest power first: `polynomial(-1, 0, 6)` is `-x^2 + 6`."""
    text = ""
    for power, number in zip(reversed(range(len(coefficients))), coefficients, strict=True):
        if number:
            factor = "" if abs(number) == 1 and power else str(abs(number))
            text += f" {'-' if number < 0 else '+'} {factor}{('', 'x', f'x^{power}')[min(power, 2)]}"
    return text.removeprefix(" + ").replace(" - ", "-", text.startswith(" -")) or "0"


def clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def _value(expression: str, names: dict[str, Any]) -> Any:
    return eval(_compiled(expression), {"polynomial": polynomial, "clock": clock, "Fraction": Fraction}, names)


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "template", "eval")


def templates(source: str) -> Iterator[tuple[str, str, str]]:
    """Name, header and text of each template of a source."""
    for paragraph in Path(__file__).with_name(f"{source}.txt").read_text("utf-8").strip().split("\n\n"):
        first, text = paragraph.split("\n", 1)
        name, header = first.split(": ", 1)
        yield name, header, text


def people(rng: random.Random, count: int) -> list[str]:
    return rng.sample(_WORDS["people"], count)


def _syllable(rng: random.Random) -> str:
    return "".join(rng.choice(_WORDS[kind]) for kind in ("onsets", "vowels", "codas"))


def setting(rng: random.Random) -> dict[str, str]:
    """The words that one problem may use."""
    who, other, third = people(rng, 3)
    goods, wares = rng.sample(_WORDS["goods"], 2)
    return {
        "who": who,
        "other": other,
        "third": third,
        "goods": goods,
        "wares": wares,
        "coins": rng.choice(_WORDS["coins"]),
        "town": (_syllable(rng) + rng.choice(_WORDS["towns"])).capitalize(),
        "surname": (_syllable(rng) + _syllable(rng)).capitalize(),
    }
