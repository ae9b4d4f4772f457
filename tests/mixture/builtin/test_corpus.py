"""The built-in corpus: enough text, the same each time, and training text kept apart from OOD text."""

import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from hf_nexus.mixture.builtin import corpus as builtin
from hf_nexus.mixture.builtin import disjoint, harvest
from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES, builtin_documents

TRAIN = [name for name, source in BUILTIN_SOURCES.items() if source.role == "train"]
OOD = [name for name, source in BUILTIN_SOURCES.items() if source.role == "ood"]
DIGESTS = """
import hashlib, json, sys
sys.modules["datasets"] = None  # Importing it fails.
from hf_nexus.mixture.builtin import BUILTIN_SOURCES, builtin_documents
digest = lambda name: hashlib.sha256("\\0".join(builtin_documents(name)).encode()).hexdigest()
print(json.dumps({name: digest(name) for name in reversed(BUILTIN_SOURCES)}))
assert "matplotlib" not in sys.modules, "harvesting docstrings imported the package"
"""


def digest(name: str) -> str:
    return hashlib.sha256("\0".join(builtin_documents(name)).encode()).hexdigest()


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
    """What both hold. A table of the lowest 26 bits leaves few candidates, which spares sorting all of `first`."""
    mask = np.uint64(2**26 - 1)
    table = np.zeros(2**26, dtype=bool)
    table[second & mask] = True
    return np.intersect1d(first[table[first & mask]], second)


def test_there_are_five_training_and_three_ood_sources_of_the_promised_size() -> None:
    assert len(TRAIN) >= 5 and len(OOD) >= 3
    for name in (*TRAIN, *OOD):
        size = sum(len(text.encode()) for text in builtin_documents(name))
        least, most = (1_000_000, 4_000_000) if name in TRAIN else (200_000, 1_000_000)
        assert least <= size <= most, (name, size)


@pytest.mark.parametrize("name", [*TRAIN, *OOD])
def test_documents_of_a_source_differ_and_hold_text(name: str) -> None:
    documents = builtin_documents(name)
    assert len(set(documents)) == len(documents) >= 100
    assert all(200 <= len(text.strip()) <= 16_000 for text in documents)
    assert all(text.endswith("\n") and "\r" not in text and "\0" not in text for text in documents)


@pytest.mark.parametrize("name", [*TRAIN, *OOD])
def test_a_source_says_what_it_is(name: str) -> None:
    source = BUILTIN_SOURCES[name]
    assert source.name == name and source.license and source.description and "\n" not in source.description
    assert source.generated == (name in {"mathematics", "reasoning", "records", "logic"})


def test_another_process_gives_the_same_bytes_whatever_its_hash_seed_locale_and_order_of_calls() -> None:
    # Nor does it matter whether datasets can be imported.
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}
    out = subprocess.run([sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == {name: digest(name) for name in (*TRAIN, *OOD)}


@pytest.fixture(scope="module")
def train_runs() -> np.ndarray:
    return all_runs([text for name in TRAIN for text in builtin_documents(name)])


@pytest.mark.parametrize("name", OOD)
def test_no_run_of_100_characters_is_shared_between_training_and_ood(name: str, train_runs: np.ndarray) -> None:
    documents = builtin_documents(name)
    shared = shared_runs(train_runs, all_runs(documents))
    where = next((text for text in documents if np.isin(runs(text), shared).any()), "") if len(shared) else ""
    assert not len(shared), f"{len(shared)} runs are shared, for one in:\n{where[:2000]}"


def test_the_check_for_shared_runs_sees_a_run_of_100_and_no_shorter_one() -> None:
    rng = random.Random(1)
    a, b, run = ("".join(rng.choices("abcdefgh ż龜", k=n)) for n in (3000, 700, 100))
    for shared, expected in ((run, 1), (run[:-1], 0)):
        first, second = all_runs([f"{a}1{shared}2{b}"]), all_runs([f"{b[:77]}3{shared}4{a[:500][::-1]}"])
        assert len(shared_runs(first, second)) == expected


@pytest.mark.parametrize("seed", range(30))
def test_without_leaves_no_shared_run_and_keeps_the_rest(seed: int) -> None:
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz  \n"
    train = "".join(rng.choices(letters, k=rng.randint(300, 3000)))
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 900))) for _ in range(4)]
    cuts = [train[at : at + rng.randint(100, 250)] for at in (rng.randrange(len(train) - 250) for _ in range(3))]
    mixed = "".join(part for pair in zip(texts, [*cuts, ""], strict=True) for part in pair)
    passages = list(disjoint.without(mixed, disjoint.blocks([train])))
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
    assert list(disjoint.without(text, disjoint.blocks(["something else " * 50]))) == [text]
    assert list(disjoint.without(text, disjoint.blocks([text]))) == []


@pytest.mark.parametrize("name", TRAIN)
def test_cutting_would_find_a_training_document_inside_an_ood_text(name: str) -> None:
    known = builtin._training_blocks()
    stolen = builtin_documents(name)[7]
    passages = list(disjoint.without(f"Mine.\n{stolen}Mine too.\n", known))
    assert "".join(passages).replace("\n", "").startswith("Mine.")
    assert not np.isin(all_runs(["x" * 100, *passages]), all_runs([stolen])).any()


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


def test_an_unknown_source_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'maths'.*code, documentation, mathematics, reasoning, records"):
        builtin_documents("maths")


def test_too_little_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest, "readmes", lambda: iter(["a README of some length\n" * 100]))
    builtin._documents.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"'readmes'.*2400 bytes here; it needs 200000.*builtin/readmes"):
            builtin_documents("readmes")
    finally:
        builtin._documents.cache_clear()


def test_callers_may_change_what_they_get() -> None:
    builtin_documents("records").clear()
    assert builtin_documents("records")
