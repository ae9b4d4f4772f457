"""Mathematics with worked solutions: templates, and procedures whose number of steps varies."""

import random
import re

from .templates import Problem, signed, template, templates


def long_division(rng: random.Random) -> str:
    divisor, dividend = rng.randint(3, 40), rng.randint(500, 99999)
    lines, rest = [f"Divide {dividend} by {divisor} with remainder."], 0
    for digit in str(dividend):
        number = 10 * rest + int(digit)
        times, rest = divmod(number, divisor)
        lines.append(f"Bring down {digit}: {number} - {times} * {divisor} = {rest}")
    return "\n".join([*lines, f"Answer: {dividend // divisor} remainder {rest}"])


def expression(rng: random.Random) -> str:
    text = str(rng.randint(1, 20))
    for _ in range(rng.randint(3, 6)):
        sign, number = rng.choice("+-*"), rng.randint(2, 12)
        text = rng.choice((f"({text} {sign} {number})", f"({number} {sign} {text})"))
    text = text[1:-1]
    lines = [f"Evaluate step by step: {text}"]
    while innermost := re.search(r"\((\d+|\(-\d+\)) [-+*] (\d+|\(-\d+\))\)", text):
        reduced = text.replace(innermost[0], signed(eval(innermost[0])))
        lines.append(f"{text} = {reduced}")
        text = reduced
    return "\n".join([*lines, f"{text} = {eval(text)}", f"Answer: {eval(text)}"])


def common_divisor(rng: random.Random) -> str:
    common = rng.randint(1, 60)
    a, b = common * rng.randint(5, 120), common * rng.randint(5, 120)
    lines = [rng.choice((f"Find gcd({a}, {b}).", f"What is the greatest common divisor of {a} and {b}?"))]
    x, y = max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return "\n".join([*lines, f"Answer: {x}"])


PROBLEMS: dict[str, Problem] = {name: template(header, text) for name, header, text in templates("mathematics")}
PROBLEMS |= {problem.__name__: problem for problem in (long_division, expression, common_divisor)}
