"""
The built-in corpus: text of Python 3.11, packed in this folder, and generated text. Nothing is downloaded.

The text is the same in every environment. OOD sources share no run of 100 characters with training sources.
"""

import lzma
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from .generated import documents

__all__ = ["BUILTIN_SOURCES", "BuiltinSource", "builtin_documents"]

# The size in bytes of UTF-8 at which generated text ends.
_SIZES = {"train": 2_000_000, "ood": 500_000}


@dataclass(frozen=True)
class BuiltinSource:
    """
    One source of the built-in corpus: its role, the licence of its text as an SPDX identifier, and a function that
    returns the texts, in an order that is the same each time.

    Example:
        >>> from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES
        >>> [name for name, source in BUILTIN_SOURCES.items() if source.role == "ood"]
        ['headers', 'news', 'logic']
    """

    role: Literal["train", "ood"]
    license: str
    texts: Callable[[], Iterable[str]]


def _packed(name: str) -> list[str]:
    """Pieces of files of Python 3.11.7, whose licence is in `python-license.txt`."""
    return lzma.decompress(Path(__file__).with_name(f"{name}.txt.xz").read_bytes()).decode().split("\0")


_PYTHON, _OURS = "PSF-2.0", "Apache-2.0"
BUILTIN_SOURCES = {
    "code": BuiltinSource("train", _PYTHON, partial(_packed, "code")),
    "documentation": BuiltinSource("train", _PYTHON, partial(_packed, "documentation")),
    "mathematics": BuiltinSource("train", _OURS, partial(documents, "mathematics")),
    "reasoning": BuiltinSource("train", _OURS, partial(documents, "reasoning")),
    "records": BuiltinSource("train", _OURS, partial(documents, "records")),
    "headers": BuiltinSource("ood", _PYTHON, partial(_packed, "headers")),
    "news": BuiltinSource("ood", _PYTHON, partial(_packed, "news")),
    "logic": BuiltinSource("ood", _OURS, partial(documents, "logic")),
}
"""The sources of the built-in corpus by name: five training sources, then the OOD sources."""


def builtin_documents(name: str) -> list[str]:
    """
    The documents of one of [`BUILTIN_SOURCES`], in an order that is the same each time. All are different, and each
    ends at the end of a line. Training sources have 1.2 to 2 MB each, OOD sources 50 to 500 kB. The result is cached
    in the process.

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
    found: dict[str, None] = {}
    total = 0
    for text in source.texts():
        if total >= _SIZES[source.role]:
            break
        if text not in found:
            found[text] = None
            total += len(text.encode())
    return tuple(found)
