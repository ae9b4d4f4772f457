"""A worded problem whose steps are drawn at random: a heap of things through two to four events."""

import random

from . import words
from .common import people, place, story

# What an event does to a heap of `n` >= 2 things: the sentence, the working, and how many there are then.
Happened = tuple[str, str, int]


def _gain(rng: random.Random, who: str, what: str, n: int) -> Happened:
    more, giver, day = rng.randint(2, 60), rng.choice(words.GIVERS), rng.choice(words.DAYS)
    said = (
        f"Then {giver} brings {more} more.",
        f"{who} finds another {more} {what}.",
        f"On {day} {who} buys {more} {what}.",
        f"On {day} {giver} adds {more} {what}.",
    )
    return rng.choice(said), f"With the new {what} there are {n} + {more} = {n + more}.", n + more


def _loss(rng: random.Random, who: str, what: str, n: int) -> Happened:
    if n < 4:
        return _gain(rng, who, what, n)
    gone = rng.randint(1, n - 2)
    said = (
        f"{who} gives {gone} to {rng.choice(words.GIVERS)}.",
        f"By {rng.choice(words.DAYS)} {gone} of them are lost.",
        f"{who} sells {gone} {what} at the market in {place(rng)}.",
        f"Unluckily {gone} of the {what} get broken or spoiled.",
    )
    return rng.choice(said), f"After that {n} - {gone} = {n - gone} {what} remain.", n - gone


def _multiply(rng: random.Random, who: str, what: str, n: int) -> Happened:
    times = rng.randint(2, 4)
    word = ("doubles", "triples", "quadruples")[times - 2]
    said = (f"{who} then {word} the number of {what}.", f"By {rng.choice(words.DAYS)} the collection {word}.")
    return rng.choice(said), f"Now there are {n} * {times} = {n * times} {what}.", n * times


def _packs(rng: random.Random, who: str, what: str, n: int) -> Happened:
    packs, each, holders = rng.randint(2, 9), rng.randint(3, 15), rng.choice(words.HOLDERS)
    new = packs * each
    working = f"The {holders} hold {packs} * {each} = {new}, which makes {n} + {new} = {n + new}."
    return f"{who} gets {packs} {holders} with {each} {what} in each.", working, n + new


def _fraction(rng: random.Random, who: str, what: str, n: int) -> Happened:
    words = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 10: "a tenth"}
    parts = [part for part in words if n % part == 0 and n >= 4]
    if not parts:
        return _loss(rng, who, what, n)
    part = rng.choice(parts)
    gone = n // part
    said = (f"{who} gives away {words[part]} of the {what}.", f"Then {words[part]} of the {what} are used up.")
    return rng.choice(said), f"That is {n} / {part} = {gone}, so {n} - {gone} = {n - gone} stay.", n - gone


def heap(rng: random.Random) -> str:
    """A number of things through two to four events."""
    who, what, n = people(rng, 1)[0], rng.choice(words.GOODS), rng.randint(8, 120)
    table, town = f"{n} {what} lie on {who}'s table.", f"In {place(rng)}, {who} owns {n} {what}."
    question, working = [rng.choice((f"{who} has {n} {what}.", table, town))], []
    for event in rng.sample((_gain, _loss, _multiply, _packs, _fraction), rng.randint(2, 4)):
        said, line, n = event(rng, who, what, n)
        question.append(said)
        working.append(line)
    question.append(rng.choice((f"How many {what} does that leave?", f"How many {what} are there in the end?")))
    return story(question, working, n)
