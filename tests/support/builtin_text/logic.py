"""Logic puzzles, of kinds that no training source holds. Each has one solution, after `Verdict:`."""

import itertools
import random
from collections.abc import Callable

from .templates import Problem, people


def knights(rng: random.Random) -> str:
    """Knights tell the truth and knaves lie. Claims are drawn until one assignment is consistent with them."""
    names = people(rng, rng.randint(2, 4))
    worlds: list[tuple[bool, ...]] = []
    while len(worlds) != 1:
        claims = [_claim(rng, names, speaker) for speaker in range(len(names))]
        worlds = [
            world
            for world in itertools.product((True, False), repeat=len(names))
            if all(is_knight == holds(world) for is_knight, (_, holds) in zip(world, claims, strict=True))
        ]
    said = " ".join(f'{name} says: "{text}"' for name, (text, _) in zip(names, claims, strict=True))
    verdict = ", ".join(f"{name} is a {'knight' if w else 'knave'}" for name, w in zip(names, worlds[0], strict=True))
    return f"Knights never lie and knaves always do. {said} Who is what?\nVerdict: {verdict}"


def _claim(rng: random.Random, names: list[str], speaker: int) -> tuple[str, Callable[[tuple[bool, ...]], bool]]:
    other = rng.choice([index for index in range(len(names)) if index != speaker])
    count, name = rng.randint(1, len(names) - 1), names[other]
    return rng.choice((
        (f"{name} is a knave.", lambda world: not world[other]),
        (f"{name} is a knight.", lambda world: world[other]),
        (f"{name} and I are alike.", lambda world: world[other] == world[speaker]),
        (f"Only one of {name} and me is a knight.", lambda world: world[other] != world[speaker]),
        (f"Exactly {count} of us are knaves.", lambda world: world.count(False) == count),
    ))  # fmt: skip


def robot(rng: random.Random) -> str:
    place, heading, orders = 0j, 1j, []
    for _ in range(rng.randint(4, 9)):
        turn, steps = rng.choice(("on", "left", "about", "right")), rng.randint(1, 9)
        heading *= {"on": 1, "left": 1j, "about": -1, "right": -1j}[turn]
        place += steps * heading
        orders.append(f"{turn} {steps}")
    facing = {1j: "north", 1: "east", -1j: "south", -1: "west"}[heading]
    verdict = f"({int(place.real)}, {int(place.imag)}) facing {facing}"
    return f"A robot at (0, 0) looks north. It obeys: {', '.join(orders)}.\nVerdict: {verdict}"


def formula(rng: random.Random) -> str:
    values = {letter: rng.random() < 0.5 for letter in rng.sample("pqrst", 3)}
    text = rng.choice(list(values))
    for _ in range(rng.randint(2, 5)):
        text = f"({text} {rng.choice(('and', 'or', '!='))} {rng.choice(list(values))})"
        if rng.random() < 0.4:
            text = f"(not {text})"
    given = ", ".join(f"{letter} is {value}" for letter, value in values.items())
    return f"Where {given}, judge {text.replace('!=', 'xor')}.\nVerdict: {eval(text, values)}"


def cups(rng: random.Random) -> str:
    held = rng.sample(("bean", "coin", "die", "key", "pearl", "ring"), rng.randint(3, 5))
    start, swaps = ", ".join(held), []
    for _ in range(rng.randint(3, 8)):
        a, b = sorted(rng.sample(range(len(held)), 2))
        held[a], held[b] = held[b], held[a]
        swaps.append(f"{a + 1}<->{b + 1}")
    return f"Cups hold {start}. Swapped: {' '.join(swaps)}.\nVerdict: {', '.join(held)}"


def cipher(rng: random.Random) -> str:
    shift, plain = rng.randint(1, 25), " ".join(people(rng, rng.randint(3, 6))).lower()
    moved = "".join(letter if letter == " " else chr((ord(letter) - 97 + shift) % 26 + 97) for letter in plain)
    return f"Each letter was moved {shift} places down the alphabet: {moved}\nVerdict: {plain}"


PROBLEMS: dict[str, Problem] = {f.__name__: f for f in (knights, robot, formula, cups, cipher)}
