"""Logic puzzles: each is solved again from its question alone, and has one solution."""

import itertools
import re
from collections.abc import Callable

import pytest

from ....support.builtin_text.logic import PROBLEMS
from ....support.generated_text import numbers, written


def solve_knights(text: str) -> set[str]:
    said = re.findall(r'(\w+) says: "([^"]*)"', text)
    names = [name for name, _ in said]

    def true(claim: str, speaker: str, world: dict[str, bool]) -> bool:
        named = [name for name in names if re.search(rf"\b{name}\b", claim)]
        if claim.startswith("Exactly"):
            return sum(not knight for knight in world.values()) == numbers(claim)[0]
        if "alike" in claim or "Only one" in claim:
            return (world[named[0]] == world[speaker]) == ("alike" in claim)
        return world[named[0]] == ("knight" in claim)

    worlds = (dict(zip(names, kinds, strict=True)) for kinds in itertools.product((True, False), repeat=len(names)))
    return {
        ", ".join(f"{name} is a {'knight' if knight else 'knave'}" for name, knight in world.items())
        for world in worlds
        if all(true(claim, name, world) == world[name] for name, claim in said)
    }


def solve_robot(text: str) -> set[str]:
    x = y = heading = 0
    for turn, steps in re.findall(r"(left|right|about|on) (\d+)", text):
        heading = (heading + ["on", "right", "about", "left"].index(turn)) % 4
        x += int(steps) * (0, 1, 0, -1)[heading]
        y += int(steps) * (1, 0, -1, 0)[heading]
    return {f"({x}, {y}) facing {('north', 'east', 'south', 'west')[heading]}"}


def solve_formula(text: str) -> set[str]:
    """From the inside: T and F are values."""
    given, formula = re.match(r"Where (.*), judge (.*)\.", text).groups()
    for letter, value in re.findall(r"(\w) is (\w+)", given):
        formula = re.sub(rf"\b{letter}\b", value[0], formula)
    truths = {"and": {"TT"}, "or": {"TT", "TF", "FT"}, "xor": {"TF", "FT"}, "not": {"F"}}
    while inner := re.search(r"\(([TF]?) ?(and|or|xor|not) ([TF])\)", formula):
        formula = formula.replace(inner[0], "T" if inner[1] + inner[3] in truths[inner[2]] else "F")
    return {{"T": "True", "F": "False"}[formula]}


def solve_cipher(text: str) -> set[str]:
    shift, coded = numbers(text)[0], text.split(": ")[1]
    moved = (chr((ord(sign) - 97 - shift) % 26 + 97) if sign.isalpha() else sign for sign in coded)
    return {"".join(moved)}


def solve_cups(text: str) -> set[str]:
    held = re.search(r"hold (.*?)\.", text)[1].split(", ")
    for a, b in re.findall(r"(\d)<->(\d)", text):
        order = list(range(len(held)))
        order[int(a) - 1], order[int(b) - 1] = int(b) - 1, int(a) - 1
        held = [held[index] for index in order]
    return {", ".join(held)}


SOLVERS: dict[str, Callable[[str], set[str]]] = {
    "knights": solve_knights,
    "robot": solve_robot,
    "formula": solve_formula,
    "cups": solve_cups,
    "cipher": solve_cipher,
}


def test_every_kind_of_puzzle_is_solved():
    assert SOLVERS.keys() == PROBLEMS.keys()


@pytest.mark.parametrize("name", PROBLEMS)
def test_puzzles_have_one_solution_and_it_is_given(name):
    for text in written(PROBLEMS[name]):
        question, verdict = text.split("\nVerdict: ")
        assert SOLVERS[name](question) == {verdict}, text
