"""Reasoning: each problem is solved again from its question alone."""

import math
import re
from collections.abc import Callable

import pytest

from ....support.builtin_text.reasoning import PROBLEMS
from ....support.generated_text import equations, numbers, value, written

LESS, PART = r"sold|lost|break|get off|spends|pays", r"one in (\d+)|One passenger in (\d+)|half"


def solve_shopping(text: str) -> int:
    n, p, m, q, paid = numbers(text)
    return paid - n * p - m * q


def solve_journey(text: str) -> int:
    h, v, k, w, detour = numbers(text)
    return h * v + k * w + detour


def solve_comparison(text: str) -> int:
    first, more, times = numbers(text)
    return first + (first + more) * (1 + times)


def solve_saving(text: str) -> int:
    start, earn, spend, weeks = numbers(text)
    return start + weeks * (earn - spend)


def solve_sharing(text: str) -> int:
    total, *shares = numbers(text)
    return total * shares[0] // sum(shares)


def solve_discount(text: str) -> int:
    price, rate, fee = numbers(text)
    return price - price * rate // 100 + fee


def solve_timetable(text: str) -> int:
    hour, minute, *lengths = numbers(text)
    return 60 * hour + minute + sum(lengths)


def solve_garden(text: str) -> int:
    width, height, path, each = numbers(text)
    return (width * height - path) * each


def solve_story(text: str) -> int:
    """Sentence by sentence."""
    opening, *sentences, _ = re.split(r"(?<=\.) ", text)
    n = numbers(opening)[0]
    for sentence in sentences:
        stated = numbers(sentence)
        if part := re.search(PART, sentence):
            n -= n // int(part[1] or part[2] or 2)
        elif re.search(LESS, sentence):
            n -= stated[0]
        else:
            n += math.prod(stated)
    return n


SOLVERS: dict[str, Callable[[str], int]] = {
    "shopping": solve_shopping,
    "journey": solve_journey,
    "comparison": solve_comparison,
    "saving": solve_saving,
    "sharing": solve_sharing,
    "discount": solve_discount,
    "timetable": solve_timetable,
    "garden": solve_garden,
    "outing": lambda text: math.ceil(sum(numbers(text)[:2]) / numbers(text)[2]),
    "things": solve_story,
    "passengers": solve_story,
    "account": solve_story,
}


def test_every_kind_of_problem_is_solved():
    assert SOLVERS.keys() == PROBLEMS.keys()


@pytest.mark.parametrize("name", PROBLEMS)
def test_answers_of_worded_problems(name):
    for text in written(PROBLEMS[name]):
        question, *working, answer = text.splitlines()
        assert answer == f"#### {SOLVERS[name](question)}", text
        assert len(working) >= 2 and value(equations(working[-1])[-1][1]) == int(answer[5:]) > 0, text
