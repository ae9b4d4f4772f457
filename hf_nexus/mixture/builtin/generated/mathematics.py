"""Mathematics: school arithmetic, equations and number theory, each with its steps written out."""

import math
import random
from fractions import Fraction
from typing import TypeAlias

Tree: TypeAlias = "int | tuple[Tree, str, Tree]"


def _signed(number: int | Fraction) -> str:
    """A number as it stands after an operator: `7`, `(-3)`."""
    return f"({number})" if number < 0 else str(number)


def _polynomial(coefficients: list[int], variable: str = "x") -> str:
    """`[6, 0, -1]` (constant first) as `-x^2 + 6`."""
    text = ""
    for power, number in reversed(list(enumerate(coefficients))):
        if number == 0:
            continue
        factor = "" if abs(number) == 1 and power else str(abs(number))
        symbol = ["", variable][power] if power < 2 else f"{variable}^{power}"
        sign = ("-" if number < 0 else "") if not text else (" - " if number < 0 else " + ")
        text += sign + factor + symbol
    return text or "0"


def _nonzero(rng: random.Random, low: int, high: int) -> int:
    return rng.choice([number for number in range(low, high + 1) if number])


def addition(rng: random.Random) -> str:
    numbers = [rng.randint(10, 10 ** rng.randint(2, 6)) for _ in range(rng.randint(2, 5))]
    ask = rng.choice(("Add {}.", "Find the sum of {}.", "What do {} come to?"))
    lines = [ask.format(", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}")]
    total = numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total} + {number} = {total + number}")
        total += number
    return "\n".join([*lines, f"Answer: {total}"])


def subtraction(rng: random.Random) -> str:
    small, large = sorted(rng.randint(100, 10 ** rng.randint(3, 6)) for _ in range(2))
    lines = [rng.choice((f"Subtract {small} from {large}.", f"Compute {large} - {small}.", f"{large} - {small} = ?"))]
    rest = large
    for index, digit in enumerate(str(small)):
        part = int(digit) * 10 ** (len(str(small)) - 1 - index)
        if part:
            lines.append(f"{rest} - {part} = {rest - part}")
            rest -= part
    return "\n".join([*lines, f"Answer: {rest}"])


def multiplication(rng: random.Random) -> str:
    a, b = rng.randint(12, 9999), rng.randint(12, 999)
    lines = [rng.choice((f"Multiply {a} by {b}.", f"Work out {a} * {b}.", f"What is the product of {a} and {b}?"))]
    parts = [a * int(digit) * 10**power for power, digit in enumerate(reversed(str(b)))]
    for power, digit in enumerate(reversed(str(b))):
        lines.append(f"{a} * {int(digit) * 10**power} = {parts[power]}")
    return "\n".join([*lines, f"{' + '.join(map(str, parts))} = {a * b}", f"Answer: {a * b}"])


def long_division(rng: random.Random) -> str:
    divisor, dividend = rng.randint(3, 40), rng.randint(500, 99999)
    ask = rng.choice(("Divide {} by {} with remainder.", "What is {} divided by {}, and what is left?"))
    lines = [ask.format(dividend, divisor)]
    rest, quotient = 0, ""
    for digit in str(dividend):
        rest = rest * 10 + int(digit)
        times = rest // divisor
        lines.append(f"Bring down {digit}: {rest} - {times} * {divisor} = {rest - times * divisor}")
        rest -= times * divisor
        quotient += str(times)
    check = f"Check: {int(quotient)} * {divisor} + {rest} = {dividend}"
    return "\n".join([*lines, check, f"Answer: {int(quotient)} remainder {rest}"])


def fractions(rng: random.Random) -> str:
    a, b = (Fraction(rng.randint(1, 15), rng.randint(2, 16)) for _ in range(2))
    sign = rng.choice("+-*/")
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
    lines = [rng.choice((f"Compute ({a}) {sign} ({b}).", f"Simplify ({a}) {sign} ({b}) to lowest terms."))]
    if sign in "+-":
        common = math.lcm(a.denominator, b.denominator)
        left, right = int(a * common), int(b * common)
        top = left + right if sign == "+" else left - right
        lines.append(f"The common denominator is {common}.")
        lines.append(f"({a}) {sign} ({b}) = ({left} {sign} {right})/{common} = {top}/{common} = {result}")
    else:
        other = b if sign == "*" else 1 / b
        top, bottom = a.numerator * other.numerator, a.denominator * other.denominator
        if sign == "/":
            lines.append(f"Dividing by {b} is multiplying by {other}.")
        lines.append(f"({a}) * ({other}) = {top}/{bottom} = {result}")
    return "\n".join([*lines, f"Answer: {result}"])


def percentage(rng: random.Random) -> str:
    rate, base = rng.choice((5, 10, 12, 15, 20, 25, 30, 40, 45, 60, 75, 80)), 20 * rng.randint(2, 400)
    share = Fraction(rate * base, 100)
    ask, step, result = rng.choice((
        (f"What is {rate} percent of {base}?", f"{share} is the part", share),
        (f"Increase {base} by {rate} percent.", f"{base} + {share} = {base + share}", base + share),
        (f"Decrease {base} by {rate} percent.", f"{base} - {share} = {base - share}", base - share),
    ))  # fmt: skip
    return f"{ask}\n{rate} * {base} / 100 = {share}\n{step}\nAnswer: {result}"


def _show(tree: Tree, top: bool = False) -> str:
    if isinstance(tree, int):
        return _signed(tree)
    text = f"{_show(tree[0])} {tree[1]} {_show(tree[2])}"
    return text if top else f"({text})"


def _reduce(tree: Tree) -> Tree:
    """Carries out the innermost operation furthest to the left."""
    if isinstance(tree, int):
        return tree
    left, sign, right = tree
    if not isinstance(left, int):
        return (_reduce(left), sign, right)
    if not isinstance(right, int):
        return (left, sign, _reduce(right))
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def expression(rng: random.Random) -> str:
    tree: Tree = rng.randint(1, 20)
    for _ in range(rng.randint(3, 5)):
        other: Tree = rng.randint(1, 12) if rng.random() < 0.7 else (rng.randint(2, 9), "+", rng.randint(1, 9))
        tree = (tree, rng.choice("+-*"), other) if rng.random() < 0.6 else (other, rng.choice("+-"), tree)
    lines = [rng.choice(("Evaluate step by step: ", "Reduce to a number: ", "Simplify: ")) + _show(tree, True)]
    while not isinstance(tree, int):
        before, tree = _show(tree, True), _reduce(tree)
        lines.append(f"{before} = {_show(tree, True)}")
    return "\n".join([*lines, f"Answer: {tree}"])


def linear_equation(rng: random.Random) -> str:
    name, root = rng.choice("xyztnk"), rng.randint(-15, 20)
    a, c = rng.sample([number for number in range(-9, 13) if number], 2)
    b = rng.randint(-30, 40)
    d = (a - c) * root + b
    left, right = _polynomial([b, a], name), _polynomial([d, c], name)
    moved = _polynomial([0, a - c], name)
    return (
        f"{rng.choice(('Solve', 'Find ' + name + ' in', 'For which ' + name + ' is it true:'))} {left} = {right}\n"
        f"Collect {name} on the left: {moved} = {d} - {_signed(b)} = {d - b}\n"
        f"Divide by {a - c}: {name} = {d - b} / {_signed(a - c)} = {root}\n"
        f"Check: {a} * {_signed(root)} + {_signed(b)} = {c} * {_signed(root)} + {_signed(d)} = {a * root + b}\n"
        f"Answer: {name} = {root}"
    )


def linear_system(rng: random.Random) -> str:
    x, y = rng.randint(-9, 9), rng.randint(-9, 9)
    a, b, c, d = (_nonzero(rng, -6, 7) for _ in range(4))
    while a * d == b * c:
        d = _nonzero(rng, -6, 7)
    e, f, det = a * x + b * y, c * x + d * y, a * d - b * c

    def row(p: int, q: int) -> str:
        return f"{_polynomial([0, p])} {'-' if q < 0 else '+'} {_polynomial([0, abs(q)], 'y')}"

    ask = rng.choice(("Solve the system", "Solve together", "Find x and y"))
    return (
        f"{ask}: {row(a, b)} = {e} and {row(c, d)} = {f}\n"
        f"Determinant: {a} * {_signed(d)} - {_signed(b)} * {_signed(c)} = {det}\n"
        f"x = ({e} * {_signed(d)} - {_signed(b)} * {_signed(f)}) / {_signed(det)} = {x}\n"
        f"y = ({a} * {_signed(f)} - {_signed(e)} * {_signed(c)}) / {_signed(det)} = {y}\n"
        f"Answer: x = {x}, y = {y}"
    )


def quadratic(rng: random.Random) -> str:
    (p, q), a = sorted((rng.randint(-15, 15), rng.randint(-15, 15))), rng.randint(1, 6)
    poly = _polynomial([p * q, -(p + q), 1])
    factors = " * ".join("x" if r == 0 else f"(x {'-' if r > 0 else '+'} {abs(r)})" for r in (p, q))
    roots = f"x = {p}" if p == q else f"x = {p} or x = {q}"
    return (
        f"{rng.choice(('Solve', 'Find the roots:', 'Factor:'))} {_polynomial([a * p * q, -a * (p + q), a])} = 0\n"
        + (f"Divide by {a}: {poly} = 0\n" if a > 1 else "")
        + f"The numbers {p} and {q} fit: {p} + {_signed(q)} = {p + q}, {p} * {_signed(q)} = {p * q}\n"
        f"{poly} = {factors}\nAnswer: {roots}"
    )


def expansion(rng: random.Random) -> str:
    a, b, c, d = _nonzero(rng, -7, 9), _nonzero(rng, -9, 9), _nonzero(rng, -7, 9), _nonzero(rng, -9, 9)
    left, right = _polynomial([b, a]), _polynomial([d, c])
    result = _polynomial([b * d, a * d + b * c, a * c])
    return (
        f"{rng.choice(('Expand', 'Multiply out', 'Write without brackets'))} ({left}) * ({right})\n"
        f"x^2: {a} * {_signed(c)} = {a * c}\n"
        f"x: {a} * {_signed(d)} + {_signed(b)} * {_signed(c)} = {a * d + b * c}\n"
        f"constant: {b} * {_signed(d)} = {b * d}\nAnswer: {result}"
    )


def derivative(rng: random.Random) -> str:
    coefficients = [rng.randint(-9, 9) for _ in range(rng.randint(3, 5))] + [rng.randint(1, 6)]
    slopes = [power * number for power, number in enumerate(coefficients)][1:]
    at = rng.randint(-3, 3)
    terms = " + ".join(f"{_signed(number)} * {_signed(at)}^{power}" for power, number in enumerate(slopes))
    value = sum(number * at**power for power, number in enumerate(slopes))
    return (
        f"{rng.choice(('Differentiate', 'Find the slope of'))} f(x) = {_polynomial(coefficients)} at x = {at}\n"
        f"f'(x) = {_polynomial(slopes)}\nf'({at}) = {terms} = {value}\nAnswer: {value}"
    )


def inequality(rng: random.Random) -> str:
    a, bound, b = _nonzero(rng, -9, 9), rng.randint(-12, 15), rng.randint(-20, 20)
    sign = rng.choice(("<", ">", "<=", ">="))
    flipped = sign.translate(str.maketrans("<>", "><")) if a < 0 else sign
    note = "dividing by a negative number turns the sign" if a < 0 else "the sign stays"
    return (
        f"Solve the inequality {_polynomial([b, a])} {sign} {a * bound + b}\n"
        f"{_polynomial([0, a])} {sign} {a * bound}, because {a * bound + b} - {_signed(b)} = {a * bound}\n"
        f"Divide by {a}; {note}.\nAnswer: x {flipped} {bound}"
    )


PROBLEMS = (
    addition,
    subtraction,
    multiplication,
    long_division,
    fractions,
    percentage,
    expression,
    linear_equation,
    linear_system,
    quadratic,
    expansion,
    derivative,
    inequality,
)
