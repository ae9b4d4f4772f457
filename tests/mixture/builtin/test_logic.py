"""Logic puzzles: each is solved again from its question alone, and has one solution."""

import datetime
import itertools
import re
from collections.abc import Callable

import pytest

from hf_nexus.mixture.builtin.generated import logic
from hf_nexus.mixture.builtin.generated.common import Problem

from ...support.generated_text import numbers, written

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def solve_islanders(text: str) -> set[str]:
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


def solve_queue(text: str) -> set[str]:
    clues = text.split("queue. ")[1].split(". Who")[0].split("; ")
    names = sorted(set(re.findall(r"[A-Z][a-z]+", " ".join(clues))))
    absent = numbers(text)[0] - len(names)  # Who no clue names: at most one, or their order would be open.

    def true(clue: str, order: tuple[str, ...]) -> bool:
        at = [order.index(name) for name in re.findall(r"[A-Z][a-z]+", clue)]
        if "before" in clue:
            return at[0] < at[1]
        return at[0] == numbers(clue)[0] - 1 if "number" in clue else abs(at[0] - at[1]) == numbers(clue)[0] + 1

    orders = itertools.permutations([*names, *["?"] * absent])
    return {", ".join(order) for order in orders if all(true(clue, order) for clue in clues)}


def solve_robot(text: str) -> set[str]:
    place, ahead = 0j, 1j
    for turn, steps in re.findall(r"(left|right|about|on) (\d+)", text):
        ahead *= {"left": 1j, "right": -1j, "about": -1, "on": 1}[turn]
        place += int(steps) * ahead
    facing = {1j: "north", 1: "east", -1j: "south", -1: "west"}[ahead]
    return {f"({int(place.real)}, {int(place.imag)}) facing {facing}"}


def solve_formula(text: str) -> set[str]:
    given, formula = re.match(r"Where (.*), judge (.*)\.", text).groups()
    values = {letter: truth == "true" for letter, truth in re.findall(r"(\w) is (\w+)", given)}
    # On truth values, != is exclusive or and <= is implication.
    formula = formula.replace("xor", "!=").replace("implies", "<=")
    return {str(bool(eval(re.sub(r"\(not", "(True !=", formula), {}, values))).lower()}


def solve_cipher(text: str) -> set[str]:
    shift, coded = numbers(text)[0], text.split(": ")[1]
    moved = (chr((ord(sign) - 97 - shift) % 26 + 97) if sign.isalpha() else sign for sign in coded)
    return {"".join(moved)}


def solve_beings(text: str) -> set[str]:
    inside = dict(re.findall(r"all (\w+) are (\w+)", text))
    apart = re.search(r"no (\w+) are (\w+)", text).groups()
    (kind,), (asked,) = re.findall(r"is one of the (\w+)\. ", text), re.findall(r"Is \w+ one of the (\w+)\?", text)
    kinds = [kind]
    while kinds[-1] in inside:
        kinds.append(inside[kinds[-1]])
    return {"yes" if asked in kinds else "no" if apart[0] in kinds and asked == apart[1] else "unknown"}


def solve_cups(text: str) -> set[str]:
    held = re.search(r"hold (.*?)\.", text)[1].split(", ")
    for a, b in re.findall(r"(\d)<->(\d)", text):
        order = list(range(len(held)))
        order[int(a) - 1], order[int(b) - 1] = int(b) - 1, int(a) - 1
        held = [held[index] for index in order]
    return {", ".join(held)}


def solve_machine(text: str) -> set[str]:
    stack = ""
    for order in text.removeprefix("Stack machine: ").rstrip(".").split(", "):
        stack = {"pop": stack[:-1], "swap": stack[:-2] + stack[:-3:-1], "copy": stack + stack[-1:]}.get(
            order, stack + order[-1]
        )
    return {f"bottom {' '.join(stack)} top"}


def solve_calendar(text: str) -> set[str]:
    start = datetime.date(2024, 1, 1) + datetime.timedelta(DAYS.index(re.search(r"It is (\w+)", text)[1]))
    days = numbers(text)[0]
    return {DAYS[(start + datetime.timedelta(-days if "ago" in text else days)).weekday()]}


PUZZLES: dict[Problem, Callable[[str], set[str]]] = {
    logic.islanders: solve_islanders,
    logic.queue: solve_queue,
    logic.robot: solve_robot,
    logic.formula: solve_formula,
    logic.cipher: solve_cipher,
    logic.beings: solve_beings,
    logic.cups: solve_cups,
    logic.machine: solve_machine,
    logic.calendar: solve_calendar,
}


@pytest.mark.parametrize("problem", logic.PROBLEMS, ids=lambda problem: problem.__name__)
def test_puzzles_have_one_solution_and_it_is_given(problem: Problem) -> None:
    for text in written(problem):
        question, verdict = text.split("\nVerdict: ")
        solutions = PUZZLES[problem](question)
        if problem is logic.queue:  # A name that no clue mentions takes the place that is left.
            solutions = {solution.replace("?", _missing(solution, verdict)) for solution in solutions}
        assert solutions == {verdict}, text


def _missing(solution: str, verdict: str) -> str:
    left = [name for name in verdict.split(", ") if name not in solution.split(", ")]
    assert len(left) <= 1
    return left[0] if left else ""
