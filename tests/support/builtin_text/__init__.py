"""
The generator of four sources of the built-in corpus. Every problem is solved by the code that writes it.

    python -m tests.support.builtin_text    # writes the packed files of hf_nexus/mixture/builtin/ again
"""

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

# The size in bytes of UTF-8 at which the text of a source ends.
_SIZES = {"mathematics": 2_000_000, "reasoning": 2_000_000, "records": 2_000_000, "logic": 500_000}


def corpus(source: str) -> list[str]:
    """The documents of a source of the built-in corpus."""
    found: dict[str, int] = {}
    for text in documents(source):
        if sum(found.values()) >= _SIZES[source]:
            return list(found)
        found[text] = len(text.encode())
    raise AssertionError("the documents are endless")


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
