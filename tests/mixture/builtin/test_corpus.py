"""The built-in corpus: enough text, the same each time, and training text apart from OOD text."""

import hashlib
import json
import os
import random
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from hf_nexus.mixture.builtin import corpus
from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES, BuiltinSource, builtin_documents
from hf_nexus.mixture.builtin.disjoint import without

TRAIN = [name for name, source in BUILTIN_SOURCES.items() if source.role == "train"]
OOD = [name for name, source in BUILTIN_SOURCES.items() if source.role == "ood"]
DIGESTS = """
import hashlib, json, sys
from itertools import islice
sys.modules["datasets"] = None  # Importing it fails.
from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES, builtin_documents
digests = {}
for name in reversed(BUILTIN_SOURCES):
    texts = builtin_documents(name) if "everything" in sys.argv else islice(BUILTIN_SOURCES[name].texts(), 50)
    digests[name] = hashlib.sha256("\\0".join(texts).encode()).hexdigest()
print(json.dumps(digests))
assert "matplotlib" not in sys.modules, "harvesting docstrings imported the package"
"""


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


def test_five_training_and_four_ood_sources_have_their_size() -> None:
    assert (len(TRAIN), len(OOD)) == (5, 4)
    for name in (*TRAIN, *OOD):
        size = sum(len(text.encode()) for text in builtin_documents(name))
        least, most = (1_000_000, 2_100_000) if name in TRAIN else (150_000, 600_000)
        assert least <= size <= most, (name, size)


@pytest.mark.parametrize("name", BUILTIN_SOURCES)
def test_documents_of_a_source_differ_and_hold_text(name: str) -> None:
    documents = builtin_documents(name)
    assert len(set(documents)) == len(documents) >= 100
    assert all(200 <= len(text.strip()) <= 16_000 for text in documents)
    assert all(text.endswith("\n") and "\r" not in text and "\0" not in text for text in documents)


def test_a_source_has_a_licence() -> None:
    for source in BUILTIN_SOURCES.values():
        assert source.license


def texts(name: str, everything: bool) -> list[str]:
    return builtin_documents(name) if everything else list(islice(BUILTIN_SOURCES[name].texts(), 50))


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_process_gives_the_same_bytes(everything: bool) -> None:
    """The hash seed, the locale, the order of calls and whether datasets can be imported do not matter."""
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", DIGESTS, *["everything"] * everything]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    here = {name: hashlib.sha256("\0".join(texts(name, everything)).encode()).hexdigest() for name in BUILTIN_SOURCES}
    assert json.loads(out.stdout.splitlines()[-1]) == here


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


@pytest.mark.parametrize("name", TRAIN)
def test_a_training_document_is_removed_from_an_ood_text(name: str) -> None:
    stolen = builtin_documents(name)[7]
    passages = list(without(f"Mine.\n{stolen}Mine too.\n", corpus._training_blocks()))
    assert "".join(passages).replace("\n", "").startswith("Mine.")
    assert not np.isin(all_runs(["x" * 100, *passages]), all_runs([stolen])).any()


def test_an_unknown_source_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"'maths'.*code, documentation, mathematics, reasoning, records"):
        builtin_documents("maths")


def test_too_little_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = BuiltinSource("ood", "CC0-1.0", lambda: ["a text of some length\n" * 100])
    monkeypatch.setitem(BUILTIN_SOURCES, "poor", poor)
    with pytest.raises(RuntimeError, match=r"'poor'.*2200 bytes in this environment and needs 150000.*builtin/poor"):
        builtin_documents("poor")


def test_callers_may_change_the_list_they_get() -> None:
    builtin_documents("records").clear()
    assert builtin_documents("records")
