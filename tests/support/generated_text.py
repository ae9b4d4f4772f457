"""Reads generated text without the code that wrote it."""

import itertools
import random
import re
from fractions import Fraction

from .builtin_text.templates import Problem


def written(problem: Problem, count: int = 60) -> list[str]:
    return [problem(random.Random(f"test/{index}")) for index in range(count)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def value(text: str, x: int | Fraction = 0) -> Fraction:
    """The exact value of an expression such as `3x^2 - (1/2)`."""
    text = re.sub(r"(\d*)x", lambda term: f"{term[1] or 1}*({x})", text)
    text = re.sub(r"\d+", lambda number: f"Fraction({number[0]})", text.replace("^", "**"))
    return eval(text, {"Fraction": Fraction})


def equations(text: str) -> list[tuple[str, str]]:
    """The two sides of every `=` between plain numbers."""
    found = []
    for line in text.splitlines():
        for left, right in itertools.pairwise(line.split(" = ")):
            a = re.search(r"(?:^|(?<![-+*/^(]) |(?<=\w\())(\(*-?\d[-+*/^() \d]*)$", left)
            b = re.match(r"(\(*-?\d[-+*/^() \d]*?)(?=[.,)]?x? [a-zA-Z]|[.,:]|\)x|$)", right)
            if a and b and a[1].count("(") == a[1].count(")"):
                found.append((a[1], b[1]))
    return found
