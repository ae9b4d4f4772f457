"""Logic puzzles, problems of a kind that no training source holds: each has one solution, after `Verdict:`."""

import itertools
import random
import string
from collections.abc import Callable

from . import words

_NAMES = words.words("""
    Agrippa Aurelia Brutus Caelia Cassius Cicero Claudia Cornelia Crassus Drusilla Fabia Faustina Flavia Gaius Horatia
    Julia Lavinia Livia Lucius Marcus Octavia Ovid Plautus Quintus Regulus Sabina Seneca Servius Tacitus Titus Tullia
    Valerius
""")
_BEINGS = words.words("blips dreks florps gimbals kelps mokes nerfs plonks quibs snorks tovs vlims wuds yips zogs")


def islanders(rng: random.Random) -> str:
    """Knights tell the truth, knaves lie; statements are drawn until one assignment is left."""
    names = rng.sample(_NAMES, rng.randint(2, 4))
    everyone = list(itertools.product((True, False), repeat=len(names)))
    while True:
        claims = [_claim(rng, names, speaker) for speaker in range(len(names))]
        worlds = [w for w in everyone if all(w[i] == holds(w) for i, (_, holds) in enumerate(claims))]
        if len(worlds) == 1:
            break
    said = " ".join(f'{name} says: "{text}"' for name, (text, _) in zip(names, claims, strict=True))
    verdict = ", ".join(f"{n} is a {'knight' if w else 'knave'}" for n, w in zip(names, worlds[0], strict=True))
    return f"Knights never lie and knaves always do. {said} Who is what?\nVerdict: {verdict}"


def _claim(rng: random.Random, names: list[str], speaker: int) -> tuple[str, Callable[[tuple[bool, ...]], bool]]:
    other = rng.choice([index for index in range(len(names)) if index != speaker])
    kind, name = rng.randrange(5), names[other]
    if kind == 0:
        return f"{name} is a knave.", lambda w: not w[other]
    if kind == 1:
        return f"{name} is a knight.", lambda w: w[other]
    if kind == 2:
        return f"{name} and I are alike.", lambda w: w[other] == w[speaker]
    if kind == 3:
        return f"Only one of {name} and me is a knight.", lambda w: w[other] != w[speaker]
    count = rng.randint(1, len(names) - 1)
    return f"Exactly {count} of us are knaves.", lambda w: w.count(False) == count


def queue(rng: random.Random) -> str:
    """An order that clues leave no choice about; clues are added until they do."""
    names = rng.sample(_NAMES, rng.randint(3, 5))
    rank = {name: position for position, name in enumerate(names)}
    orders, clues = list(itertools.permutations(names)), []
    while len(orders) > 1:
        a, b = sorted(rng.sample(names, 2), key=rank.__getitem__)
        gap = rank[b] - rank[a] - 1
        text, holds = rng.choice((
            (f"{a} stands before {b}", lambda o, a=a, b=b: o.index(a) < o.index(b)),
            (f"{gap} stand between {a} and {b}", lambda o, a=a, b=b, gap=gap: abs(o.index(a) - o.index(b)) - 1 == gap),
            (f"{b} is number {rank[b] + 1}", lambda o, b=b, at=rank[b]: o.index(b) == at),
        ))  # fmt: skip
        left = [order for order in orders if holds(order)]
        if len(left) < len(orders):
            orders = left
            clues.append(text)
    return f"{len(names)} Romans queue. {'; '.join(clues)}. Who stands where?\nVerdict: {', '.join(orders[0])}"


def robot(rng: random.Random) -> str:
    x = y = heading = 0
    orders = []
    for _ in range(rng.randint(4, 10)):
        turn, steps = rng.choice(("left", "right", "about", "on")), rng.randint(1, 9)
        heading = (heading + {"on": 0, "right": 1, "about": 2, "left": 3}[turn]) % 4
        x += steps * (0, 1, 0, -1)[heading]
        y += steps * (1, 0, -1, 0)[heading]
        orders.append(f"{turn} {steps}")
    facing = ("north", "east", "south", "west")[heading]
    return f"A robot at (0, 0) looks north. It obeys: {', '.join(orders)}.\nVerdict: ({x}, {y}) facing {facing}"


def formula(rng: random.Random) -> str:
    values = {letter: rng.random() < 0.5 for letter in rng.sample("pqrst", rng.randint(2, 4))}
    text = rng.choice(list(values))
    truth = values[text]
    for _ in range(rng.randint(2, 5)):
        letter, sign = rng.choice(list(values)), rng.choice(("and", "or", "xor", "implies"))
        b = values[letter]
        truth = {"and": truth and b, "or": truth or b, "xor": truth != b, "implies": not truth or b}[sign]
        text = f"({text} {sign} {letter})"
        if rng.random() < 0.4:
            truth, text = not truth, f"(not {text})"
    given = ", ".join(f"{letter} is {str(value).lower()}" for letter, value in values.items())
    return f"Where {given}, judge {text}.\nVerdict: {str(truth).lower()}"


def cipher(rng: random.Random) -> str:
    shift, plain = rng.randint(1, 25), " ".join(rng.sample((*_NAMES, *_BEINGS), rng.randint(3, 6))).lower()
    letters = string.ascii_lowercase
    coded = plain.translate(str.maketrans(letters, letters[shift:] + letters[:shift]))
    return f"Each letter was moved {shift} places down the alphabet: {coded}\nVerdict: {plain}"


def beings(rng: random.Random) -> str:
    """What follows from a chain of inclusions, ending in an exclusion."""
    kinds, name = rng.sample(_BEINGS, rng.randint(4, 6)), rng.choice(_NAMES)
    start, asked = rng.randrange(len(kinds) - 1), rng.randrange(len(kinds))
    premises = [f"all {a} are {b}" for a, b in itertools.pairwise(kinds[:-1])] + [f"no {kinds[-2]} are {kinds[-1]}"]
    rng.shuffle(premises)
    # Above its own kind in the chain all holds, the last kind is shut out, below nothing is known.
    verdict = "no" if asked == len(kinds) - 1 else "yes" if asked >= start else "unknown"
    ask = f"{name} is one of the {kinds[start]}. Is {name} one of the {kinds[asked]}?"
    return f"Suppose {'; '.join(premises)}. {ask}\nVerdict: {verdict}"


def cups(rng: random.Random) -> str:
    held = rng.sample(("pearl", "ring", "dice", "key", "bean", "coin"), rng.randint(3, 5))
    start, swaps = list(held), []
    for _ in range(rng.randint(3, 8)):
        a, b = sorted(rng.sample(range(len(held)), 2))
        held[a], held[b] = held[b], held[a]
        swaps.append(f"{a + 1}<->{b + 1}")
    return f"Cups hold {', '.join(start)}. Swapped: {' '.join(swaps)}.\nVerdict: {', '.join(held)}"


def machine(rng: random.Random) -> str:
    """A stack machine."""
    stack: list[str] = []
    orders = []
    for _ in range(rng.randint(6, 14)):
        kind = rng.choice(("push", "push", "pop", "swap", "copy")) if len(stack) > 1 else "push"
        orders.append(kind)
        if kind == "push":
            stack.append(rng.choice(string.ascii_uppercase))
            orders[-1] += f" {stack[-1]}"
        elif kind == "pop":
            stack.pop()
        elif kind == "swap":
            stack[-1], stack[-2] = stack[-2], stack[-1]
        else:
            stack.append(stack[-1])
    return f"Stack machine: {', '.join(orders)}.\nVerdict: bottom {' '.join(stack)} top"


def calendar(rng: random.Random) -> str:
    today, days = rng.randrange(7), rng.randint(8, 900)
    past = rng.random() < 0.5
    then = words.DAYS[(today + (-days if past else days)) % 7]
    ask = f"Which day was it {days} days ago?" if past else f"Which day will it be {days} days from now?"
    return f"It is {words.DAYS[today]}. {ask}\nVerdict: {then}"


PROBLEMS = (islanders, queue, robot, formula, cipher, beings, cups, machine, calendar)
