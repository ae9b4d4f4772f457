"""The built-in corpus: harvested from what is installed, or written by a program. Nothing is downloaded.

The same environment gives the same bytes. OOD sources share no run of 100 characters with any training source.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal

from . import harvest
from .disjoint import blocks, without
from .generated import common, logic, mathematics, number_theory, reasoning, records

__all__ = ["BUILTIN_SOURCES", "BuiltinSource", "builtin_documents"]

# Bytes of UTF-8 at which a source is complete, and below which it is refused.
_SIZES = {"train": (2_000_000, 1_000_000), "ood": (500_000, 200_000)}


@dataclass(frozen=True)
class BuiltinSource:
    """
    One source of the built-in corpus.

    Args:
        name (`str`):
            What follows `builtin/` in the path of a source.
        role (`str`):
            `"train"`, or `"ood"` for a source that is evaluated and never trained on.
        license (`str`):
            The licence of the text: an SPDX name where there is one.
        description (`str`):
            One line for tables and cards.
        generated (`bool`):
            Whether a program wrote the text, as opposed to people.

    Example:
        >>> from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES
        >>> [name for name, source in BUILTIN_SOURCES.items() if source.generated]
        ['mathematics', 'reasoning', 'records', 'logic']
    """

    name: str
    role: Literal["train", "ood"]
    license: str
    description: str
    generated: bool


_PACKAGES = "mixed: that of each package"
BUILTIN_SOURCES: dict[str, BuiltinSource] = {
    source.name: source
    for source in (
        BuiltinSource("code", "train", "PSF-2.0", "Modules of Python's standard library", False),
        BuiltinSource("documentation", "train", _PACKAGES, "Python's help topics and docstrings of packages", False),
        BuiltinSource("mathematics", "train", "Apache-2.0", "Arithmetic, algebra, number theory, worked out", True),
        BuiltinSource("reasoning", "train", "Apache-2.0", "Worded problems in steps, `#### answer` last", True),
        BuiltinSource("records", "train", "Apache-2.0", "Invented tables in CSV, JSON, YAML, SQL and others", True),
        BuiltinSource("headers", "ood", "mixed: BSD-3-Clause mostly", "C++ headers that ship inside torch", False),
        BuiltinSource("licenses", "ood", _PACKAGES, "Licence texts of the installed packages", False),
        BuiltinSource("readmes", "ood", _PACKAGES, "READMEs of the installed packages", False),
        BuiltinSource("logic", "ood", "Apache-2.0", "Logic puzzles, of kinds that are nowhere in training", True),
    )
}
"""The sources of the built-in corpus by name: five for training, then the OOD sources."""


def builtin_documents(name: str) -> list[str]:
    """
    The documents of one source of the built-in corpus: no two are equal, and none ends inside a line.

    Training sources have about 2 MB each, OOD sources 0.3 to 0.5 MB. The first call for an OOD source takes a few
    seconds, as it makes every training source to keep the two apart; later calls in the same process take none.

    Args:
        name (`str`):
            One of [`BUILTIN_SOURCES`].

    Returns:
        `list[str]`: The documents, in an order that is the same each time.

    Raises:
        ValueError: If there is no such source.
        RuntimeError: If this environment does not hold enough text, for example because Python was installed without
            the sources of its standard library.

    Example:
        >>> from hf_nexus.mixture.builtin.corpus import builtin_documents
        >>> print(builtin_documents("reasoning")[0].splitlines()[1])
        The start is 14 * 60 + 13 = 853 minutes after midnight.
    """
    if name not in BUILTIN_SOURCES:
        raise ValueError(f"There is no built-in source {name!r}. Choose one of: {', '.join(BUILTIN_SOURCES)}.")
    return list(_documents(name))


@cache
def _documents(name: str) -> tuple[str, ...]:
    size, least = _SIZES[BUILTIN_SOURCES[name].role]
    documents: dict[str, None] = {}
    total = 0
    for text in _apart(name) if BUILTIN_SOURCES[name].role == "ood" else _texts(name):
        if total >= size:
            break
        if text not in documents:
            documents[text] = None
            total += len(text.encode())
    if total < least:
        raise RuntimeError(
            f"The built-in source {name!r} ({BUILTIN_SOURCES[name].description}) came to {total} bytes here; it needs "
            f"{least}. Install Python with its standard library and the packages of hf_nexus from wheels, or leave "
            f"builtin/{name} out of the mixture."
        )
    return tuple(documents)


def _texts(name: str) -> Iterable[str]:
    match name:
        case "code":
            return harvest.code()
        case "documentation":
            return harvest.documentation(_SIZES["train"][0])
        case "mathematics":
            return common.documents(name, mathematics.PROBLEMS + number_theory.PROBLEMS)
        case "reasoning":
            return common.documents(name, reasoning.PROBLEMS)
        case "records":
            return common.documents(name, records.PROBLEMS)
        case "headers":
            return harvest.headers()
        case "licenses":
            return harvest.licenses()
        case "readmes":
            return harvest.readmes()
    assert name == "logic", name
    return common.documents(name, logic.PROBLEMS)


def _apart(name: str) -> Iterator[str]:
    """The texts of an OOD source without what training holds as well."""
    known = _training_blocks()
    for text in _texts(name):
        for passage in without(text, known):
            yield from harvest.split(passage)


@cache
def _training_blocks() -> set[str]:
    train = (name for name, source in BUILTIN_SOURCES.items() if source.role == "train")
    return blocks(chain.from_iterable(map(_documents, train)))
