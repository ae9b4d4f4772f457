"""Harvested text: how it is cut, and whose it is."""

import random

from hf_nexus.mixture.builtin import harvest


def test_split_loses_only_short_pieces_and_blank_ends() -> None:
    rng = random.Random(2)
    lines = [rng.choice(("", "    ", "")) + "word " * rng.randint(0, 30) for _ in range(3000)]
    text = "\n".join(lines)
    pieces = list(harvest.split(text, size=800))
    assert all(200 <= len(piece) <= 4 * 800 + 200 for piece in pieces)
    kept = [line for piece in pieces for line in piece.split("\n") if line.strip()]
    given = [line.rstrip() for line in lines if line.strip()]
    assert kept == given[: len(kept)] and sum(map(len, given[len(kept) :])) < 200
    assert list(harvest.split("short\n\ntext")) == []


def test_only_what_hf_nexus_needs_is_harvested() -> None:
    packages = harvest.required_packages()
    assert {"torch", "transformers", "numpy", "tokenizers", "networkx", "sympy"} <= set(packages)
    assert not {"pytest", "hypothesis", "ruff", "mypy"} & set(packages)
    assert list(packages) == sorted(packages)
