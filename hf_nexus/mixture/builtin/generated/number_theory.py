"""More mathematics: number theory, series, counting, data and small geometry, with the steps written out."""

import math
import random
from fractions import Fraction


def euclid(rng: random.Random) -> str:
    common = rng.randint(1, 60)
    a, b = sorted((common * rng.randint(5, 120), common * rng.randint(5, 120)), reverse=True)
    lines = [rng.choice((f"Find gcd({a}, {b}).", f"What is the greatest common divisor of {a} and {b}?"))]
    x, y = a, b
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    lines.append(f"The last divisor is {x}, so lcm({a}, {b}) = {a} * {b} / {x} = {a * b // x}")
    return "\n".join([*lines, f"Answer: gcd {x}, lcm {a * b // x}"])


def factorization(rng: random.Random) -> str:
    number = math.prod(rng.choice((2, 2, 3, 3, 5, 7, 11, 13, 17, 19, 23)) for _ in range(rng.randint(3, 6)))
    lines = [rng.choice((f"Factor {number} into primes.", f"Write {number} as a product of primes."))]
    rest, divisor, factors = number, 2, []
    while rest > 1:
        if rest % divisor == 0:
            lines.append(f"{rest} / {divisor} = {rest // divisor}")
            factors.append(divisor)
            rest //= divisor
        else:
            divisor += 1
    return "\n".join([*lines, f"Answer: {number} = {' * '.join(map(str, factors))}"])


def modular_power(rng: random.Random) -> str:
    base, exponent, modulus = rng.randint(2, 40), rng.randint(5, 60), rng.randint(7, 97)
    lines = [rng.choice(("Compute", "Find by repeated squaring")) + f" {base}^{exponent} mod {modulus}."]
    value = 1
    for bit in bin(exponent)[2:]:
        square = value * value
        lines.append(f"square: {value} * {value} = {square}, mod {modulus} it is {square % modulus}")
        value = square % modulus
        if bit == "1":
            product = value * base
            lines.append(f"times {base}: {value} * {base} = {product}, mod {modulus} it is {product % modulus}")
            value = product % modulus
    return "\n".join([*lines, f"Answer: {value}"])


def base_conversion(rng: random.Random) -> str:
    number, base = rng.randint(50, 9000), rng.choice((2, 3, 5, 7, 8, 16))
    lines, digits, rest = [f"Write the decimal number {number} in base {base}."], "", number
    while rest:
        digit = "0123456789abcdef"[rest % base]
        lines.append(f"{rest} = {base} * {rest // base} + {rest % base}, digit {digit}")
        digits, rest = digit + digits, rest // base
    return "\n".join([*lines, f"Read the digits upwards.\nAnswer: {digits}"])


def modular_inverse(rng: random.Random) -> str:
    """The inverse modulo m, read off the multiple of m that lies one below a multiple of the number."""
    modulus = rng.randint(7, 300)
    a = rng.choice([number for number in range(2, modulus) if math.gcd(number, modulus) == 1])
    inverse = pow(a, -1, modulus)
    times = a * inverse // modulus
    return (
        f"{rng.choice(('Find', 'What is'))} the inverse of {a} modulo {modulus}.\n"
        f"{times} * {modulus} + 1 = {times * modulus + 1}, and {times * modulus + 1} / {a} = {inverse}\n"
        f"Check: {a} * {inverse} = {a * inverse} leaves 1.\nAnswer: {inverse}"
    )


def series(rng: random.Random) -> str:
    first, count = rng.randint(1, 90), rng.randint(4, 30)
    if rng.random() < 0.6:
        step = rng.randint(2, 40)
        last = first + (count - 1) * step
        total = count * (first + last) // 2
        return (
            f"Sum the {count} terms {first}, {first + step}, {first + 2 * step}, ..., {last}.\n"
            f"The last term is {first} + {count - 1} * {step} = {last}\n"
            f"{count} * ({first} + {last}) / 2 = {total}\nAnswer: {total}"
        )
    ratio, count = rng.randint(2, 9), rng.randint(4, 7)
    terms = [first * ratio**power for power in range(count)]
    total = sum(terms)
    return (
        f"A sequence starts with {first}; each term is {ratio} times the one before. Sum its first {count} terms.\n"
        f"{' + '.join(map(str, terms))} = {total}\n"
        f"Formula: {first} * ({ratio}^{count} - 1) / {ratio - 1} = {total}\nAnswer: {total}"
    )


def recurrence(rng: random.Random) -> str:
    p, q, a, b = rng.randint(1, 4), rng.randint(-3, 4), rng.randint(0, 9), rng.randint(1, 12)
    terms = [a, b]
    rule = f"a(n) = {p} * a(n-1) + {q} * a(n-2)" if q >= 0 else f"a(n) = {p} * a(n-1) - {-q} * a(n-2)"
    lines = [f"Let a(1) = {a}, a(2) = {b} and {rule}. Find a({(count := rng.randint(5, 8))})."]
    for index in range(3, count + 1):
        terms.append(p * terms[-1] + q * terms[-2])
        steps = f"{p} * ({terms[-2]}) + ({q}) * ({terms[-3]})"
        lines.append(f"a({index}): {steps} = {terms[-1]}")
    return "\n".join([*lines, f"Answer: {terms[-1]}"])


def statistics(rng: random.Random) -> str:
    values = [rng.randint(1, 99) for _ in range(rng.randint(5, 9))]
    ordered, count = sorted(values), len(values)
    middle = Fraction(ordered[(count - 1) // 2] + ordered[count // 2], 2)
    mean = Fraction(sum(values), count)
    title = rng.choice(("Data", "Measurements", "Scores", "Times"))
    return (
        f"{title}: {', '.join(map(str, values))}. Find mean, median and range.\n"
        f"Sum: {' + '.join(map(str, values))} = {sum(values)}, mean: {sum(values)} / {count} = {mean}\n"
        f"Sorted: {', '.join(map(str, ordered))}, median {middle}\n"
        f"Range: {ordered[-1]} - {ordered[0]} = {ordered[-1] - ordered[0]}\n"
        f"Answer: mean {mean}, median {middle}, range {ordered[-1] - ordered[0]}"
    )


def counting(rng: random.Random) -> str:
    n = rng.randint(4, 60)
    k = rng.randint(2, min(n, 5))
    what = rng.choice(("books", "cards", "flags", "letters", "players", "songs"))
    top = " * ".join(str(n - index) for index in range(k))
    ordered = math.perm(n, k)
    if rng.random() < 0.5:
        return f"In how many orders can {k} of {n} {what} stand in a row?\n{top} = {ordered}\nAnswer: {ordered}"
    bottom = " * ".join(str(number) for number in range(1, k + 1))
    return (
        f"How many ways are there to choose {k} of {n} {what}?\n"
        f"({top}) / ({bottom}) = {ordered} / {math.factorial(k)} = {math.comb(n, k)}\nAnswer: {math.comb(n, k)}"
    )


def triangle(rng: random.Random) -> str:
    m, n = sorted(rng.sample(range(1, 20), 2), reverse=True)
    scale = rng.randint(1, 15)
    a, b, c = scale * (m * m - n * n), scale * 2 * m * n, scale * (m * m + n * n)
    ask = rng.choice(("A right triangle has legs {} and {}.", "Draw the diagonal of a {} by {} rectangle."))
    return (
        f"{ask.format(a, b)} How long is the longest side?\n"
        f"{a}^2 + {b}^2 = {a * a} + {b * b} = {c * c}\n"
        f"The square root of {c * c} is {c}, since {c} * {c} = {c * c}\nAnswer: {c}"
    )


def solids(rng: random.Random) -> str:
    a, b, c = (rng.randint(2, 30) for _ in range(3))
    surface = 2 * (a * b + b * c + a * c)
    return (
        f"{rng.choice(('A box', 'A brick', 'A tank'))} measures {a} by {b} by {c} cm. Find volume and surface.\n"
        f"Volume: {a} * {b} * {c} = {a * b * c}\n"
        f"Surface: 2 * ({a} * {b} + {b} * {c} + {a} * {c}) = 2 * ({a * b} + {b * c} + {a * c}) = {surface}\n"
        f"Answer: volume {a * b * c} cm^3, surface {surface} cm^2"
    )


def matrices(rng: random.Random) -> str:
    (a, b, c, d), (e, f, g, h) = ([rng.randint(0, 12) for _ in range(4)] for _ in range(2))
    product = [a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h]
    return (
        f"Multiply the matrices [[{a}, {b}], [{c}, {d}]] and [[{e}, {f}], [{g}, {h}]].\n"
        f"{a} * {e} + {b} * {g} = {product[0]}\n{a} * {f} + {b} * {h} = {product[1]}\n"
        f"{c} * {e} + {d} * {g} = {product[2]}\n{c} * {f} + {d} * {h} = {product[3]}\n"
        f"Answer: [[{product[0]}, {product[1]}], [{product[2]}, {product[3]}]]"
    )


def proportion(rng: random.Random) -> str:
    a, factor, b = rng.randint(2, 30), rng.randint(2, 20), rng.randint(2, 40)
    return (
        f"{rng.choice(('Find x', 'Solve for x', 'Complete the proportion'))}: {a} / {b} = x / {b * factor}\n"
        f"x = {a} * {b * factor} / {b} = {a * factor}\nAnswer: {a * factor}"
    )


def squares(rng: random.Random) -> str:
    """A square by the binomial formula."""
    tens, ones = 10 * rng.randint(2, 150), rng.randint(1, 9)
    number = tens + ones
    parts = f"{tens**2} + {2 * tens * ones} + {ones**2} = {number**2}"
    return (
        f"{rng.choice(('Square', 'Without a calculator, square'))} {number}.\n"
        f"({tens} + {ones})^2 = {tens}^2 + 2 * {tens} * {ones} + {ones}^2 = {parts}\nAnswer: {number**2}"
    )


PROBLEMS = (
    euclid,
    factorization,
    modular_power,
    base_conversion,
    modular_inverse,
    series,
    recurrence,
    statistics,
    counting,
    triangle,
    solids,
    matrices,
    proportion,
    squares,
)
