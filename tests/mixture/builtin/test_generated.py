"""Generated text: it varies, and every equation and every answer in mathematics is right."""

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from hf_nexus.mixture.builtin.corpus import builtin_documents
from hf_nexus.mixture.builtin.generated import common, mathematics, number_theory, records
from hf_nexus.mixture.builtin.generated.common import Problem

from ...support.generated_text import equalities, numbers, value, written


@pytest.mark.parametrize("name", ["mathematics", "reasoning"])
def test_every_equation_that_is_written_down_holds(name: str) -> None:
    pairs = [pair for text in builtin_documents(name)[:300] for pair in equalities(text)]
    assert len(pairs) > 4000
    wrong = [pair for pair in pairs if value(pair[0]) != value(pair[1])]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("name", ["mathematics", "reasoning", "records", "logic"])
def test_generated_text_varies(name: str) -> None:
    problems = Counter(part for text in builtin_documents(name) for part in text.strip().split("\n\n"))
    assert len(problems) > 1500 and len(problems) / sum(problems.values()) > 0.98
    assert max(map(len, builtin_documents(name))) <= 3000


def test_a_longer_corpus_starts_with_the_shorter_one() -> None:
    documents = common.documents("records", records.PROBLEMS)
    assert list(itertools.islice(documents, 20)) == builtin_documents("records")[:20]


def check_division(question: str, answer: str) -> bool:
    return tuple(numbers(answer)) == divmod(*numbers(question))


def check_percentage(question: str, answer: str) -> bool:
    if question.startswith("What"):
        rate, base = numbers(question)
        return Fraction(answer) == Fraction(rate * base, 100)
    base, rate = numbers(question)
    return Fraction(answer) == Fraction(base * (100 + (rate if question.startswith("Increase") else -rate)), 100)


def check_linear(question: str, answer: str) -> bool:
    name, root = answer.split(" = ")
    left, right = question.removeprefix("Solve ").split(f" {name} in ")[-1].split("true: ")[-1].split(" = ")
    return value(left, **{name: int(root)}) == value(right, **{name: int(root)})


def check_system(question: str, answer: str) -> bool:
    x, y = numbers(answer)
    rows = [row.split(" = ") for row in question.split(": ")[1].split(" and ")]
    return len(rows) == 2 and all(value(left, x=x, y=y) == int(right) for left, right in rows)


def check_quadratic(question: str, answer: str) -> bool:
    poly, roots = re.search(r"\d*x\^2.*(?= = 0)", question)[0], set(numbers(answer))
    double = value(poly, x=min(roots) + 1) == value(poly, x=min(roots) - 1)
    return all(value(poly, x=root) == 0 for root in roots) and len(roots) == 1 + (not double)


def check_expansion(question: str, answer: str) -> bool:
    product = question[question.index("(") :]
    return all(value(product, x=x) == value(answer, x=x) for x in range(-3, 4))


def check_derivative(question: str, answer: str) -> bool:
    poly, at = re.search(r"f\(x\) = (.*) at x = (-?\d+)", question).groups()
    # A polynomial of degree at most 5 equals what interpolation at 6 points says, so its slope is this limit exactly.
    step, x = Fraction(1, 10**9), int(at)
    slope = (value(poly, x=x + step) - value(poly, x=x - step)) / (2 * step)  # type: ignore[arg-type]
    return abs(slope - int(answer)) < Fraction(1, 10**6)


def check_inequality(question: str, answer: str) -> bool:
    left, sign, right = re.search(r"inequality (.*) ([<>]=?) (.*)", question).groups()
    _, solved, bound = answer.split(" ")
    holds: dict[str, Callable[[Any, Any], bool]] = {
        "<": lambda a, b: a < b, ">": lambda a, b: a > b, "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b,
    }  # fmt: skip
    tried = range(int(bound) - 2, int(bound) + 3)
    return all(holds[sign](value(left, x=x), int(right)) == holds[solved](x, int(bound)) for x in tried)


def check_factors(question: str, answer: str) -> bool:
    number, *factors = numbers(answer)
    prime = all(factor > 1 and all(factor % smaller for smaller in range(2, factor)) for factor in factors)
    return prime and [number] == numbers(question) and math.prod(factors) == number


def check_series(question: str, answer: str) -> bool:
    if question.startswith("Sum the"):
        count, first, second = numbers(question)[:3]
        return int(answer) == sum(first + index * (second - first) for index in range(count))
    first, ratio, count = numbers(question)
    return int(answer) == sum(first * ratio**index for index in range(count))


def check_recurrence(question: str, answer: str) -> bool:
    rule = r"a\(1\) = (\S+), a\(2\) = (\S+) and a\(n\) = (\S+) \* a\(n-1\) ([+-]) (\S+) \* a\(n-2\). Find a\((\d+)\)"
    a, b, p, sign, q, count = re.search(rule, question).groups()
    terms = [int(a), int(b)]
    while len(terms) < int(count):
        terms.append(int(p) * terms[-1] + int(sign + q) * terms[-2])
    return terms[-1] == int(answer)


def check_statistics(question: str, answer: str) -> bool:
    values = [Fraction(number) for number in numbers(question)]
    mean, median, spread = re.search(r"mean (\S+), median (\S+), range (\S+)", answer).groups()
    assert Fraction(spread) == max(values) - min(values)
    return Fraction(mean) == statistics.mean(values) and Fraction(median) == statistics.median(values)


def check_counting(question: str, answer: str) -> bool:
    k, n = numbers(question)
    return int(answer) == (math.perm(n, k) if "orders" in question else math.comb(n, k))


def check_matrices(question: str, answer: str) -> bool:
    first, second = (json.loads(matrix) for matrix in re.findall(r"\[\[.*?\]\]", question))
    product = [[sum(a * b for a, b in zip(row, column)) for column in zip(*second)] for row in first]  # noqa: B905
    return json.loads(answer) == product


def check_surface(question: str, answer: str) -> bool:
    a, b, c = numbers(question)
    return numbers(re.sub(r"\^\d", "", answer)) == [a * b * c, 2 * (a * b + b * c + c * a)]


CHECKS: dict[Problem, Callable[[str, str], bool]] = {
    mathematics.addition: lambda q, a: int(a) == sum(numbers(q)),
    mathematics.subtraction: lambda q, a: int(a) == max(map(abs, numbers(q))) - min(map(abs, numbers(q))),
    mathematics.multiplication: lambda q, a: int(a) == math.prod(numbers(q)),
    mathematics.long_division: check_division,
    mathematics.fractions: lambda q, a: a == str(value(re.search(r"\(.*\)", q)[0])),
    mathematics.percentage: check_percentage,
    mathematics.expression: lambda q, a: int(a) == value(q.split(": ")[1]),
    mathematics.linear_equation: check_linear,
    mathematics.linear_system: check_system,
    mathematics.quadratic: check_quadratic,
    mathematics.expansion: check_expansion,
    mathematics.derivative: check_derivative,
    mathematics.inequality: check_inequality,
    number_theory.euclid: lambda q, a: numbers(a) == [math.gcd(*numbers(q)), math.lcm(*numbers(q))],
    number_theory.factorization: check_factors,
    number_theory.modular_power: lambda q, a: int(a) == pow(*numbers(q)),
    number_theory.base_conversion: lambda q, a: int(a, numbers(q)[1]) == numbers(q)[0],
    number_theory.modular_inverse: lambda q, a: int(a) == pow(numbers(q)[0], -1, numbers(q)[1]),
    number_theory.series: check_series,
    number_theory.recurrence: check_recurrence,
    number_theory.statistics: check_statistics,
    number_theory.counting: check_counting,
    number_theory.triangle: lambda q, a: int(a) == math.hypot(*numbers(q)),
    number_theory.solids: check_surface,
    number_theory.matrices: check_matrices,
    number_theory.proportion: lambda q, a: numbers(q)[0] * numbers(q)[2] == int(a) * numbers(q)[1],
    number_theory.squares: lambda q, a: int(a) == numbers(q)[0] ** 2,
}


@pytest.mark.parametrize("problem", CHECKS, ids=lambda problem: problem.__name__)
def test_answers_of_mathematics(problem: Problem) -> None:
    assert set(CHECKS) == {*mathematics.PROBLEMS, *number_theory.PROBLEMS}
    for text in written(problem):
        question, *_, answer = text.splitlines()
        assert CHECKS[problem](question, answer.removeprefix("Answer: ")), text
