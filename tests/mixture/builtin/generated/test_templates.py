"""Templates: slots are filled, calculations are right, and generated text varies."""

import random
from collections import Counter
from itertools import islice

import pytest

from hf_nexus.mixture.builtin.corpus import builtin_documents

from ....support.builtin_text import PROBLEMS, documents
from ....support.builtin_text.templates import clock, draw, fill, polynomial, template
from ....support.generated_text import equations, value


def test_a_header_draws_numbers_and_words_and_calculates():
    seen = set()
    for seed in range(60):
        names = {"top": 3}
        draw("n in 1..top - 1; v in x|y; m = 10 * n + top", names, random.Random(seed))
        assert names["m"] == 10 * names["n"] + 3
        seen.add((names["n"], names["v"]))
    assert seen == {(1, "x"), (1, "y"), (2, "x"), (2, "y")}


def test_slots_hold_alternatives_values_and_calculations():
    names = {"a": -3, "b": -2}
    text = fill("{c := a * b ** 2 - a}; {c}; {b + 1}; {same|same}.", names, random.Random(0))
    assert text == "-3 * (-2)^2 - (-3) = -9; -9; -1; same."
    assert names["c"] == -9


def test_numbers_are_drawn_until_results_are_whole():
    problem = template("n in 1..9", "{half := n / 2}")
    written = {problem(random.Random(seed)) for seed in range(60)}
    assert written == {"2 / 2 = 1", "4 / 2 = 2", "6 / 2 = 3", "8 / 2 = 4"}


@pytest.mark.parametrize(
    ("coefficients", "text"),
    [((-1, 0, 6), "-x^2 + 6"), ((1, -1), "x - 1"), ((2, 1, 0, -3), "2x^3 + x^2 - 3"), ((0, 0), "0"), ((0, -4), "-4")],
)
def test_polynomials(coefficients, text):
    assert polynomial(*coefficients) == text


def test_clock():
    assert (clock(65), clock(1430)) == ("1:05", "23:50")


@pytest.mark.parametrize("name", ["mathematics", "reasoning"])
def test_every_equation_holds(name):
    pairs = [pair for text in builtin_documents(name)[:300] for pair in equations(text)]
    assert len(pairs) > 4000
    wrong = [pair for pair in pairs if value(pair[0]) != value(pair[1])]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("name", PROBLEMS)
def test_generated_text_varies(name):
    problems = Counter(part for text in builtin_documents(name) for part in text.strip().split("\n\n"))
    assert len(problems) > 1500 and len(problems) / sum(problems.values()) > 0.98
    assert max(map(len, builtin_documents(name))) <= 3000
    assert not any("{" in part or "}" in part for part in problems if name != "records")


def test_a_longer_corpus_starts_with_the_shorter_one():
    assert list(islice(documents("records"), 20)) == builtin_documents("records")[:20]
