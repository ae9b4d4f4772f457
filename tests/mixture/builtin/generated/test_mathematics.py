"""Mathematics: every answer is right."""

import json
import math
import re
from collections.abc import Callable
from fractions import Fraction

import pytest

from ....support.builtin_text.mathematics import PROBLEMS
from ....support.generated_text import numbers, value, written


def check_linear_equation(question: str, answer: str) -> bool:
    left, right = re.search(r"(?:Solve|in) (.*)\.", question)[1].split(" = ")
    x = numbers(answer)[0]
    return value(left, x) == value(right, x)


def check_linear_system(question: str, answer: str) -> bool:
    (x, y), (a, b, e, c, d, f) = numbers(answer), numbers(question.replace("- ", "-"))
    return a * x + b * y == e and c * x + d * y == f


def check_quadratic_equation(question: str, answer: str) -> bool:
    polynomial, roots = re.search(r"x\^2.*(?= = 0)", question)[0], numbers(answer)
    return len(set(roots)) == 2 and all(value(polynomial, root) == 0 for root in roots)


def check_derivative(question: str, answer: str) -> bool:
    polynomial, at = re.search(r"f\(x\) = (.*) at x = (-?\d+)", question).groups()
    step, x = Fraction(1, 10**9), int(at)
    slope = (value(polynomial, x + step) - value(polynomial, x - step)) / (2 * step)
    return abs(slope - int(answer)) < Fraction(1, 10**6)


def check_recurrence(question: str, answer: str) -> bool:
    rule = r"a\(1\) = (\d+), a\(2\) = (\d+) and a\(n\) = (\d+) \* a\(n-1\) - (\d+) \* a\(n-2\). Find a\(5\)"
    a, b, p, q = map(int, re.search(rule, question).groups())
    for _ in range(3):
        a, b = b, p * b - q * a
    return b == int(answer)


def check_series(question: str, answer: str) -> bool:
    count, first, second, _, last = numbers(question)
    terms = range(first, last + 1, second - first)
    return len(terms) == count and sum(terms) == int(answer)


def check_matrices(question: str, answer: str) -> bool:
    first, second = (json.loads(matrix) for matrix in re.findall(r"\[\[.*?\]\]", question))
    product = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*second)] for row in first]  # noqa: B905
    return json.loads(answer) == product


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "addition": lambda q, a: int(a) == sum(numbers(q)),
    "multiplication": lambda q, a: int(a) == math.prod(numbers(q)),
    "fractions": lambda q, a: Fraction(a) == value(re.search(r"\d.*\d", q)[0]),
    "percentage": lambda q, a: int(a) == numbers(q)[0] * Fraction(100 + numbers(q)[1], 100),
    "linear_equation": check_linear_equation,
    "linear_system": check_linear_system,
    "quadratic_equation": check_quadratic_equation,
    "derivative": check_derivative,
    "series": check_series,
    "recurrence": check_recurrence,
    "choices": lambda q, a: int(a) == math.comb(*reversed(numbers(q))),
    "triangle": lambda q, a: int(a) == math.hypot(*numbers(q)),
    "matrices": check_matrices,
    "long_division": lambda q, a: tuple(numbers(a)) == divmod(*numbers(q)),
    "expression": lambda q, a: int(a) == value(q.split(": ")[1]),
    "common_divisor": lambda q, a: int(a) == math.gcd(*numbers(q)),
}


def test_every_kind_of_problem_is_checked():
    assert CHECKS.keys() == PROBLEMS.keys()


@pytest.mark.parametrize("name", PROBLEMS)
def test_answers_of_mathematics(name):
    for text in written(PROBLEMS[name]):
        question, *_, answer = text.splitlines()
        assert CHECKS[name](question, answer.removeprefix("Answer: ")), text
