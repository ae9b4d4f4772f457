"""The built-in corpus: the same text everywhere, and training text apart from OOD text."""

import hashlib
import random

import numpy as np
import pytest

from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES, builtin_documents

from ...support.builtin_text import PROBLEMS, corpus

TRAIN = [name for name, source in BUILTIN_SOURCES.items() if source.role == "train"]
OOD = [name for name, source in BUILTIN_SOURCES.items() if source.role == "ood"]
DIGESTS = {
    "code": "8d030a5627fe2dca",
    "documentation": "ecc678ecb9277326",
    "mathematics": "80cb8f1d01c9cd94",
    "reasoning": "08eba45d1aef7d3f",
    "records": "015f3030bd3ce43b",
    "headers": "48da8ed15fe9fb1a",
    "news": "53ab21e61852c052",
    "logic": "5356d683a70a4304",
}


def runs(text: str, length: int = 100) -> np.ndarray:
    """A 64-bit hash of every run of `length` characters, as polynomials modulo 2**64."""
    base = 0x9E3779B97F4A7C15
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    powers = np.cumprod(np.full(len(codes), base, dtype=np.uint64))
    inverses = np.cumprod(np.full(len(codes), pow(base, -1, 2**64), dtype=np.uint64))
    prefix = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(codes * powers)])
    return (prefix[length:] - prefix[:-length]) * inverses[: max(len(codes) - length + 1, 0)]


def all_runs(documents: list[str]) -> np.ndarray:
    return np.concatenate([runs(text) for text in documents if len(text) >= 100])


def shared_runs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The runs in both. A table of the lowest 26 bits leaves few candidates, so `first` need not be sorted."""
    mask = np.uint64(2**26 - 1)
    table = np.zeros(2**26, dtype=bool)
    table[second & mask] = True
    return np.intersect1d(first[table[first & mask]], second)


@pytest.mark.parametrize("name", BUILTIN_SOURCES)
def test_a_source_is_the_same_in_every_environment(name: str) -> None:
    """These are the bytes of Python 3.11, 3.12 and 3.13. Results in docs/ depend on them."""
    assert hashlib.sha256("\0".join(builtin_documents(name)).encode()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_generated_sources_are_those_of_the_generator(name: str) -> None:
    assert corpus(name) == builtin_documents(name)


@pytest.mark.parametrize("name", BUILTIN_SOURCES)
def test_documents_of_a_source_differ_and_hold_text(name: str) -> None:
    documents = builtin_documents(name)
    assert len(set(documents)) == len(documents) >= 18
    assert all(200 <= len(text.strip()) <= 16_000 for text in documents)
    assert all(text.endswith("\n") and "\r" not in text and "\0" not in text for text in documents)


def test_a_source_has_a_licence() -> None:
    for source in BUILTIN_SOURCES.values():
        assert source.license


@pytest.fixture(scope="module")
def train_runs() -> np.ndarray:
    return all_runs([text for name in TRAIN for text in builtin_documents(name)])


@pytest.mark.parametrize("name", OOD)
def test_training_and_ood_share_no_run_of_100_characters(name: str, train_runs: np.ndarray) -> None:
    documents = builtin_documents(name)
    shared = shared_runs(train_runs, all_runs(documents))
    where = next((text for text in documents if np.isin(runs(text), shared).any()), "") if len(shared) else ""
    assert not len(shared), f"{len(shared)} runs are shared, for one in:\n{where[:2000]}"


def test_a_shared_run_of_100_is_found_and_no_shorter_one() -> None:
    rng = random.Random(1)
    a, b, run = ("".join(rng.choices("abcdefgh ż龜", k=n)) for n in (3000, 700, 100))
    for shared, expected in ((run, 1), (run[:-1], 0)):
        first, second = all_runs([f"{a}1{shared}2{b}"]), all_runs([f"{b[:77]}3{shared}4{a[:500][::-1]}"])
        assert len(shared_runs(first, second)) == expected


def test_an_unknown_source_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"'maths'.*code, documentation, mathematics, reasoning, records"):
        builtin_documents("maths")


def test_callers_may_change_the_list_they_get() -> None:
    builtin_documents("records").clear()
    assert builtin_documents("records")
