"""What the generators share: how documents are put together, and names."""

import random
from collections.abc import Callable, Iterator, Sequence

from . import words

Problem = Callable[[random.Random], str]


def people(rng: random.Random, count: int) -> list[str]:
    """`count` different first names."""
    return rng.sample(words.PEOPLE, count)


def invented(rng: random.Random) -> str:
    """An invented word of two syllables, for surnames and brands."""
    first = rng.choice(words.ONSETS) + rng.choice(words.VOWELS)
    return (first + rng.choice(words.ONSETS) + rng.choice(words.VOWELS) + rng.choice(words.CODAS)).capitalize()


def place(rng: random.Random) -> str:
    """An invented place name."""
    first = rng.choice(words.ONSETS) + rng.choice(words.VOWELS) + rng.choice(words.CODAS)
    return (first + rng.choice(words.PLACES)).capitalize()


def story(question: list[str], working: list[str], answer: int) -> str:
    """A worded problem: the question as one paragraph, the working one step a line, `#### answer` at the end."""
    return " ".join(question) + "\n" + "\n".join(working) + f"\n#### {answer}"


def documents(name: str, problems: Sequence[Problem], length: int = 1200) -> Iterator[str]:
    r"""
    Endless documents of a few problems each, no kind of problem twice in a document.

    Args:
        name (`str`):
            Name of the source; with the index of the document it seeds the generator.
        problems (`Sequence[Problem]`):
            Functions that write one problem each, given a `random.Random`.
        length (`int`, *optional*, defaults to `1200`):
            A document is closed once it has this many characters.

    Example:
        >>> from itertools import islice
        >>> from hf_nexus.mixture.builtin.generated.common import documents
        >>> list(islice(documents("dice", [lambda rng: f"I rolled {rng.randint(1, 6)}."]), 2))
        ['I rolled 3.\n', 'I rolled 4.\n']
    """
    index = 0
    while True:
        # A string seed is hashed with SHA-512, so it does not depend on PYTHONHASHSEED.
        rng = random.Random(f"{name}/{index}")
        written: list[str] = []
        for problem in rng.sample(problems, len(problems)):
            written.append(problem(rng))
            if sum(map(len, written)) >= length:
                break
        yield "\n\n".join(written) + "\n"
        index += 1
