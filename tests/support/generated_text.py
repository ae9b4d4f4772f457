"""Reading generated text, apart from the code that wrote it."""

import itertools
import re
from fractions import Fraction

from hf_nexus.mixture.builtin.generated import common
from hf_nexus.mixture.builtin.generated.common import Problem


def written(problem: Problem, count: int = 80) -> list[str]:
    """One kind of problem, many times over."""
    return [text.rstrip("\n") for text in itertools.islice(common.documents("test", [problem]), count)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def value(text: str, **letters: int) -> Fraction:
    """The value of `3x^2 - (1/2)` and the like, exactly."""
    text = re.sub(r"(\d*)([a-z])", lambda term: f"{term[1] or 1}*({letters[term[2]]})", text)
    text = re.sub(r"\d+", lambda number: f"Fraction({number[0]})", text.replace("^", "**"))
    return eval(text, {"Fraction": Fraction})


def equalities(text: str) -> list[tuple[str, str]]:
    """The two sides of every `=` between plain arithmetic."""
    found = []
    for line in text.splitlines():
        for left, right in itertools.pairwise(line.split(" = ")):
            a = re.search(r"(?:^|(?<![-+*/^(]) )(\(*-?\d[-+*/^() \d]*)$", left)
            b = re.match(r"(\(*-?\d[-+*/^() \d]*?)(?=[.,]? [a-zA-Z]|[.,:]|$)", right)
            if a and b and a[1].count("(") == a[1].count(")"):
                found.append((a[1], b[1]))
    return found
