"""
The built-in corpus: text of the installation and generated text. Nothing is downloaded.

The same environment gives the same bytes. OOD sources share no run of 100 characters with training sources.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Literal

from . import harvest
from .disjoint import blocks, without
from .generated import documents

__all__ = ["BUILTIN_SOURCES", "BuiltinSource", "builtin_documents"]

# The size in bytes of UTF-8 at which a source is complete, and the smallest size that is accepted.
_SIZES = {"train": (2_000_000, 1_000_000), "ood": (500_000, 150_000)}


@dataclass(frozen=True)
class BuiltinSource:
    """
    One source of the built-in corpus.

    Args:
        role (`str`):
            `"train"`, or `"ood"` for a source that is only evaluated.
        license (`str`):
            The licence of the text, as an SPDX identifier if there is one.
        texts (`Callable[[], Iterable[str]]`):
            Yields the texts, in an order that is the same each time.

    Example:
        >>> from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES
        >>> [name for name, source in BUILTIN_SOURCES.items() if source.role == "ood"]
        ['headers', 'licenses', 'readmes', 'logic']
    """

    role: Literal["train", "ood"]
    license: str
    texts: Callable[[], Iterable[str]]


_PACKAGES = "mixed: that of each package"
_OURS = "Apache-2.0"
BUILTIN_SOURCES = {
    "code": BuiltinSource("train", "PSF-2.0", harvest.code),
    "documentation": BuiltinSource("train", _PACKAGES, partial(harvest.documentation, _SIZES["train"][0])),
    "mathematics": BuiltinSource("train", _OURS, partial(documents, "mathematics")),
    "reasoning": BuiltinSource("train", _OURS, partial(documents, "reasoning")),
    "records": BuiltinSource("train", _OURS, partial(documents, "records")),
    "headers": BuiltinSource("ood", "mixed: BSD-3-Clause mostly", harvest.headers),
    "licenses": BuiltinSource("ood", _PACKAGES, harvest.licenses),
    "readmes": BuiltinSource("ood", _PACKAGES, harvest.readmes),
    "logic": BuiltinSource("ood", _OURS, partial(documents, "logic")),
}
"""The sources of the built-in corpus by name: five training sources, then the OOD sources."""


def builtin_documents(name: str) -> list[str]:
    """
    The documents of one source of the built-in corpus. All are different, and each ends at the end of a line.

    Training sources have about 2 MB each, OOD sources 0.3 to 0.5 MB. The first call for an OOD source takes a few
    seconds because it builds every training source. The result is cached in the process.

    Args:
        name (`str`):
            A name in [`BUILTIN_SOURCES`].

    Returns:
        `list[str]`: The documents, in an order that is the same each time.

    Raises:
        ValueError: If there is no such source.
        RuntimeError: If this environment has too little text, for example because Python was installed without the
            source files of its standard library.

    Example:
        >>> from hf_nexus.mixture.builtin.corpus import builtin_documents
        >>> print(builtin_documents("reasoning")[0].splitlines()[1])
        Then 74 - 15 = 59 are left.
    """
    if name not in BUILTIN_SOURCES:
        raise ValueError(f"There is no built-in source {name!r}. Choose one of: {', '.join(BUILTIN_SOURCES)}.")
    return list(_documents(name))


@cache
def _documents(name: str) -> tuple[str, ...]:
    source = BUILTIN_SOURCES[name]
    size, least = _SIZES[source.role]
    found: dict[str, None] = {}
    total = 0
    for text in source.texts() if source.role == "train" else _disjoint(source.texts()):
        if total >= size:
            break
        if text not in found:
            found[text] = None
            total += len(text.encode())
    if total < least:
        raise RuntimeError(
            f"The built-in source {name!r} has {total} bytes in this environment and needs {least}. Install Python "
            f"with its standard library and the packages of hf_nexus from wheels, or remove builtin/{name}."
        )
    return tuple(found)


def _disjoint(texts: Iterable[str]) -> Iterator[str]:
    """The texts without what they share with training sources."""
    known = _training_blocks()
    for text in texts:
        for passage in without(text, known):
            yield from harvest.split(passage)


@cache
def _training_blocks() -> set[str]:
    train = (name for name, source in BUILTIN_SOURCES.items() if source.role == "train")
    return blocks(chain.from_iterable(map(_documents, train)))
