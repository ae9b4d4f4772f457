"""Worded problems of several steps: a story, the working one step a line, and `#### answer` at the end."""

import random

from . import words
from .common import people, place, story
from .heap import heap


def shopping(rng: random.Random) -> str:
    who, coins, shop = people(rng, 1)[0], rng.choice(words.COINS), place(rng)
    items = [(rng.randint(2, 12), what, rng.randint(2, 25)) for what in rng.sample(words.GOODS, rng.randint(2, 4))]
    costs = [count * price for count, _, price in items]
    wares = ", ".join(f"{count} {what} at {price} {coins} each" for count, what, price in items)
    question = [rng.choice((f"At the shop in {shop} {who} buys {wares}.", f"{who}'s list for {shop}: {wares}."))]
    working = [f"The {what} cost {count} * {price} = {count * price}." for count, what, price in items]
    total = sum(costs)
    working.append(f"Together that is {' + '.join(map(str, costs))} = {total} {coins}.")
    if rng.random() < 0.5:
        return story([*question, f"What is the bill in {coins}?"], working, total)
    paid = total + rng.randint(1, 80)
    question.append(f"{who} pays with {paid} {coins}. How many {coins} come back?")
    return story(question, [*working, f"The change is {paid} - {total} = {paid - total}."], paid - total)


def journey(rng: random.Random) -> str:
    who, start, end = people(rng, 1)[0], place(rng), place(rng)
    ways = rng.sample((("bus", 40, 80), ("train", 70, 160), ("bicycle", 12, 25), ("boat", 15, 40)), rng.randint(2, 3))
    legs = [(way, rng.randint(2, 6), rng.randint(slow, fast)) for way, slow, fast in ways]
    told = ", then ".join(f"{hours} hours by {way} at {speed} km per hour" for way, hours, speed in legs)
    question = [f"{who} travels from {start} to {end}: {told}."]
    working = [f"By {way}: {hours} * {speed} = {hours * speed} km." for way, hours, speed in legs]
    distances = [hours * speed for _, hours, speed in legs]
    total = sum(distances)
    working.append(f"In all {' + '.join(map(str, distances))} = {total} km.")
    if rng.random() < 0.5:
        return story([*question, "How many kilometres is the whole way?"], working, total)
    done = rng.randint(5, min(distances))
    question.append(f"A detour adds {done} km. How long was the way with it, in km?")
    return story(question, [*working, f"With the detour {total} + {done} = {total + done} km."], total + done)


def comparison(rng: random.Random) -> str:
    (a, b, c), what = people(rng, 3), rng.choice(words.GOODS)
    first, more, times = rng.randint(5, 60), rng.randint(2, 30), rng.randint(2, 5)
    second = first + more
    third = second * times
    question = [
        f"{a} has {first} {what}.",
        f"{b} has {more} {what} more than {a}.",
        f"{c} has {times} times as many as {b}.",
    ]
    working = [f"{b}: {first} + {more} = {second}.", f"{c}: {second} * {times} = {third}."]
    if rng.random() < 0.5:
        total = first + second + third
        working.append(f"All three: {first} + {second} + {third} = {total}.")
        return story([*question, f"How many {what} do the three have together?"], working, total)
    working.append(f"The difference is {third} - {first} = {third - first}.")
    return story([*question, f"How many more {what} does {c} have than {a}?"], working, third - first)


def ages(rng: random.Random) -> str:
    (a, b), now, gap = people(rng, 2), rng.randint(6, 40), rng.randint(2, 30)
    years, ago = rng.randint(2, 25), rng.randint(1, 5)
    question = [f"{a} is {now} years old and {b} is {gap} years older."]
    working = [f"{b} is {now} + {gap} = {now + gap}."]
    if rng.random() < 0.5:
        sides = (now + years, now + gap + years)
        question.append(f"What will the sum of their ages be in {years} years?")
        working.append(f"Then they are {now} + {years} = {sides[0]} and {now + gap} + {years} = {sides[1]}.")
        return story(question, [*working, f"The sum is {sides[0]} + {sides[1]} = {sum(sides)}."], sum(sides))
    question.append(f"How old was {b} {ago + gap} years ago?")
    return story(question, [*working, f"Then {b} was {now + gap} - {ago + gap} = {now - ago}."], now - ago)


def saving(rng: random.Random) -> str:
    who, coins, weeks = people(rng, 1)[0], rng.choice(words.COINS), rng.randint(3, 16)
    earn, spend, start = rng.randint(20, 90), rng.randint(3, 19), rng.randint(0, 200)
    kept = (earn - spend) * weeks
    question = [
        rng.choice((f"{who} has {start} {coins} in the bank.", f"{who}'s purse holds {start} {coins}.")),
        f"Each week {who} earns {earn} {coins} and spends {spend}.",
        f"How many {coins} are there after {weeks} weeks?",
    ]
    working = [
        f"A week leaves {earn} - {spend} = {earn - spend}.",
        f"{weeks} weeks leave {earn - spend} * {weeks} = {kept}.",
        f"With the start that is {start} + {kept} = {start + kept}.",
    ]
    return story(question, working, start + kept)


def outing(rng: random.Random) -> str:
    """Rounding up: how many vehicles a party needs."""
    pupils, teachers, seats = rng.randint(30, 260), rng.randint(2, 20), rng.randint(6, 55)
    vehicle, school, party = rng.choice(("buses", "boats", "vans", "carriages")), place(rng), pupils + teachers
    full, rest = divmod(party, seats)
    question = [
        f"The school of {school} takes {pupils} pupils and {teachers} teachers on an outing.",
        f"Each of the {vehicle} has {seats} seats. How many {vehicle} are needed?",
    ]
    working = [f"The party is {pupils} + {teachers} = {party} people.", f"{party} - {full} * {seats} = {rest}."]
    if rest:
        working.append(f"{full} {vehicle} are full and {rest} people are left over, so {full} + 1 = {full + 1}.")
    else:
        working.append(f"Nobody is left over: {party} / {seats} = {full}.")
    return story(question, working, full + (rest > 0))


def sharing(rng: random.Random) -> str:
    names, what = people(rng, rng.randint(2, 4)), rng.choice(words.GOODS)
    shares = [rng.randint(1, 7) for _ in names]
    one = rng.randint(2, 30)
    total, who = sum(shares) * one, rng.randrange(len(names))
    question = [
        f"{', '.join(names[:-1])} and {names[-1]} share {total} {what} in the ratio {':'.join(map(str, shares))}.",
        f"How many {what} does {names[who]} get?",
    ]
    working = [
        f"There are {' + '.join(map(str, shares))} = {sum(shares)} parts.",
        f"One part is {total} / {sum(shares)} = {one}.",
        f"{names[who]} has {shares[who]} of them: {shares[who]} * {one} = {shares[who] * one}.",
    ]
    return story(question, working, shares[who] * one)


def workshop(rng: random.Random) -> str:
    who, what, rate = people(rng, 1)[0], rng.choice(words.GOODS), rng.randint(3, 40)
    workers, hours, days = rng.randint(2, 12), rng.randint(3, 9), rng.randint(2, 14)
    flawed = rng.randint(1, rate)
    daily = rate * workers * hours
    question = [
        f"In {who}'s workshop {workers} people pack {rate} {what} an hour each, {hours} hours a day.",
        f"Every day {flawed} of the {what} are thrown out. How many good {what} come out of {days} days?",
    ]
    working = [
        f"A day yields {rate} * {workers} * {hours} = {daily}.",
        f"Good ones: {daily} - {flawed} = {daily - flawed}.",
        f"In {days} days: {daily - flawed} * {days} = {(daily - flawed) * days}.",
    ]
    return story(question, working, (daily - flawed) * days)


def discount(rng: random.Random) -> str:
    who, coins = people(rng, 1)[0], rng.choice(words.COINS)
    what = rng.choice(("bicycle", "coat", "desk", "guitar", "lamp", "sofa"))
    price, rate, fee = 20 * rng.randint(3, 60), rng.choice((5, 10, 15, 20, 25, 30, 40, 50)), rng.randint(2, 40)
    off = price * rate // 100
    question = [
        f"A {what} costs {price} {coins}. In the sale in {place(rng)} it is {rate} percent cheaper,",
        f"but delivery costs {fee} {coins}. What does {who} pay for the {what} with delivery?",
    ]
    working = [
        f"The reduction is {price} * {rate} / 100 = {off}.",
        f"The sale price is {price} - {off} = {price - off}.",
        f"With delivery: {price - off} + {fee} = {price - off + fee}.",
    ]
    return story(question, working, price - off + fee)


def timetable(rng: random.Random) -> str:
    who, hour, minute = people(rng, 1)[0], rng.randint(6, 14), rng.randint(0, 59)
    stages = [rng.randint(8, 95) for _ in range(rng.randint(2, 3))]
    tasks = ("cooking", "reading", "the walk", "the drive", "practice", "gardening", "the film")
    names = rng.sample(tasks, len(stages))
    start, total = 60 * hour + minute, sum(stages)
    end = start + total
    told = ", ".join(f"{name} takes {minutes} minutes" for name, minutes in zip(names, stages, strict=True))
    question = [
        f"{who} begins at {hour}:{minute:02d}: {told}, one after the other.",
        "How many minutes after midnight is everything done?",
    ]
    working = [
        f"The start is {hour} * 60 + {minute} = {start} minutes after midnight.",
        f"It all takes {' + '.join(map(str, stages))} = {total} minutes.",
        f"{start} + {total} = {end}, which is {end // 60}:{end % 60:02d} on the clock.",
    ]
    return story(question, working, end)


def garden(rng: random.Random) -> str:
    who, width, height, each = people(rng, 1)[0], rng.randint(4, 40), rng.randint(4, 40), rng.randint(2, 9)
    path = rng.randint(2, width * height // 2)
    free, plant = width * height - path, rng.choice(("roses", "carrots", "beans", "leeks", "poppies"))
    question = [
        f"{who}'s garden in {place(rng)} is {width} m long and {height} m wide; {path} square metres of it are paths.",
        f"On each remaining square metre grow {each} {plant}. How many plants is that?",
    ]
    working = [
        f"The area is {width} * {height} = {width * height}.",
        f"Without the paths: {width * height} - {path} = {free}.",
        f"Plants: {free} * {each} = {free * each}.",
    ]
    return story(question, working, free * each)


PROBLEMS = (
    heap, shopping, journey, comparison, ages, saving, outing, sharing, workshop, discount, timetable, garden
)  # fmt: skip
