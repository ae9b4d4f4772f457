"""Word lists and invented names."""

import random
from pathlib import Path

_LINES = Path(__file__).with_name("words.txt").read_text("utf-8").splitlines()
_WORDS = {kind: words.split() for kind, words in (line.split(": ") for line in _LINES)}


def people(rng: random.Random, count: int) -> list[str]:
    return rng.sample(_WORDS["people"], count)


def _syllable(rng: random.Random) -> str:
    return "".join(rng.choice(_WORDS[kind]) for kind in ("onsets", "vowels", "codas"))


def setting(rng: random.Random) -> dict[str, str]:
    """The words that one problem may use."""
    who, other, third = people(rng, 3)
    goods, wares = rng.sample(_WORDS["goods"], 2)
    return {
        "who": who,
        "other": other,
        "third": third,
        "goods": goods,
        "wares": wares,
        "coins": rng.choice(_WORDS["coins"]),
        "town": (_syllable(rng) + rng.choice(_WORDS["towns"])).capitalize(),
        "surname": (_syllable(rng) + _syllable(rng)).capitalize(),
    }
