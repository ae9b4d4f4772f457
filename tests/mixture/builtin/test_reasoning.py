"""Worded problems: each is solved again from its question alone."""

import math
import re
from collections.abc import Callable

import pytest

from hf_nexus.mixture.builtin.generated import reasoning
from hf_nexus.mixture.builtin.generated.common import Problem

from ...support.generated_text import equalities, numbers, value, written


def solve_shopping(text: str) -> int:
    bill = sum(int(count) * int(price) for count, price in re.findall(r"(\d+) \w+ at (\d+) \w+ each", text))
    paid = re.search(r"pays with (\d+)", text)
    return int(paid[1]) - bill if paid else bill


def solve_journey(text: str) -> int:
    legs = re.findall(r"(\d+) hours by \w+ at (\d+) km", text)
    return sum(int(hours) * int(speed) for hours, speed in legs) + sum(map(int, re.findall(r"adds (\d+) km", text)))


def solve_comparison(text: str) -> int:
    first, more, times = numbers(text)
    second = first + more
    return first + second + second * times if "together" in text else second * times - first


def solve_ages(text: str) -> int:
    now, gap, years = numbers(text)
    return 2 * now + gap + 2 * years if "sum" in text else now + gap - years


def solve_saving(text: str) -> int:
    start, earn, spend, weeks = numbers(text)
    return start + weeks * (earn - spend)


def solve_sharing(text: str) -> int:
    names = re.match(r"(.*) share", text)[1].replace(" and ", ", ").split(", ")
    total, *shares = numbers(text)
    who = re.search(r"does (\w+) get", text)[1]
    return total * shares[names.index(who)] // sum(shares)


def solve_workshop(text: str) -> int:
    workers, rate, hours, flawed, days = numbers(text)
    return (workers * rate * hours - flawed) * days


def solve_discount(text: str) -> int:
    price, rate, fee = numbers(text)
    return price - price * rate // 100 + fee


def solve_garden(text: str) -> int:
    width, height, path, each = numbers(text)
    return (width * height - path) * each


def solve_heap(text: str) -> int:
    """Sentence by sentence."""
    words = {"half": 2, "third": 3, "quarter": 4, "fifth": 5, "tenth": 10, "doubles": 2, "triples": 3, "quadruples": 4}
    opening, *sentences, _ = re.split(r"(?<=\.) ", text)
    n = numbers(opening)[0]
    for said in sentences:
        stated, named = numbers(said), [words[word.rstrip(".")] for word in said.split() if word.rstrip(".") in words]
        if re.search(r"doubles|triples|quadruples", said):
            n *= named[0]
        elif named:
            n -= n // named[0]
        elif len(stated) == 2:
            n += stated[0] * stated[1]
        else:
            n += -stated[0] if re.search(r"gives|lost|sells|broken", said) else stated[0]
    return n


SOLVERS: dict[Problem, Callable[[str], int]] = {
    reasoning.heap: solve_heap,
    reasoning.shopping: solve_shopping,
    reasoning.journey: solve_journey,
    reasoning.comparison: solve_comparison,
    reasoning.ages: solve_ages,
    reasoning.saving: solve_saving,
    reasoning.outing: lambda text: math.ceil(sum(numbers(text)[:2]) / numbers(text)[2]),
    reasoning.sharing: solve_sharing,
    reasoning.workshop: solve_workshop,
    reasoning.discount: solve_discount,
    reasoning.timetable: lambda text: 60 * numbers(text)[0] + sum(numbers(text)[1:]),
    reasoning.garden: solve_garden,
}


@pytest.mark.parametrize("problem", reasoning.PROBLEMS, ids=lambda problem: problem.__name__)
def test_answers_of_worded_problems(problem: Problem) -> None:
    for text in written(problem):
        question, *working, answer = text.splitlines()
        assert answer == f"#### {SOLVERS[problem](question)}", text
        assert len(working) >= 2 and value(equalities(working[-1])[-1][1]) == int(answer[5:]), text
