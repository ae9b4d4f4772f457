"""Removal of shared text: nothing shared stays, and nothing else goes."""

import random

import pytest

from hf_nexus.mixture.builtin.disjoint import blocks, without


@pytest.mark.parametrize("seed", range(30))
def test_no_shared_run_stays_and_the_rest_does(seed: int) -> None:
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz  \n"
    train = "".join(rng.choices(letters, k=rng.randint(300, 3000)))
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 900))) for _ in range(4)]
    cuts = [train[at : at + rng.randint(100, 250)] for at in (rng.randrange(len(train) - 250) for _ in range(3))]
    mixed = "".join(part for pair in zip(texts, [*cuts, ""], strict=True) for part in pair)
    passages = list(without(mixed, blocks([train])))
    windows = {train[at : at + 100] for at in range(len(train) - 99)}
    assert not any(text[at : at + 100] in windows for text in passages for at in range(len(text) - 99))
    assert any(mixed[at : at + 100] in windows for at in range(len(mixed) - 99))
    # Only lines that a planted run touches are gone, and what is left stands in the original order.
    assert all(passage in mixed for passage in passages)
    gone = sum(map(len, mixed.splitlines())) - sum(len(line) for text in passages for line in text.splitlines())
    longest = max(map(len, mixed.splitlines()))
    assert gone <= sum(map(len, cuts)) + 2 * len(cuts) * longest


def test_without_returns_a_text_that_shares_nothing_as_it_is() -> None:
    text = "one\n\n two\nthree " * 30
    assert list(without(text, blocks(["something else " * 50]))) == [text]
    assert list(without(text, blocks([text]))) == []
