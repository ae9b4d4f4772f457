"""Generated text. Every problem is solved by the code that writes it."""

import random
from collections.abc import Iterator

from . import logic, mathematics, reasoning, records
from .templates import Problem

PROBLEMS: dict[str, dict[str, Problem]] = {
    "mathematics": mathematics.PROBLEMS,
    "reasoning": reasoning.PROBLEMS,
    "records": records.PROBLEMS,
    "logic": logic.PROBLEMS,
}
"""The kinds of problem of each source."""


def documents(source: str, length: int = 1200) -> Iterator[str]:
    """Endless documents of about `length` characters. No kind of problem occurs twice in a document."""
    index = 0
    while True:
        # A string seed is hashed with SHA-512, so it does not depend on PYTHONHASHSEED.
        rng = random.Random(f"{source}/{index}")
        text = ""
        for write in rng.sample(list(PROBLEMS[source].values()), len(PROBLEMS[source])):
            text += f"\n{write(rng)}\n"
            if len(text) >= length:
                break
        yield text[1:]
        index += 1
