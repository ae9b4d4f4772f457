"""
The built-in corpus, packed in this folder: text of Python 3.11.7, whose licence is in `python-license.txt`, and
generated text. Nothing is downloaded. OOD sources share no run of 100 characters with training sources.
"""

import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["BUILTIN_SOURCES", "BuiltinSource", "builtin_documents"]


@dataclass(frozen=True)
class BuiltinSource:
    """
    One source of the built-in corpus: its role, and the licence of its text as an SPDX identifier.

    Example:
        >>> from hf_nexus.mixture.builtin.corpus import BUILTIN_SOURCES
        >>> [name for name, source in BUILTIN_SOURCES.items() if source.role == "ood"]
        ['headers', 'news', 'logic']
    """

    role: Literal["train", "ood"]
    license: str


_PYTHON, _OURS = "PSF-2.0", "Apache-2.0"
BUILTIN_SOURCES = {
    "code": BuiltinSource("train", _PYTHON),
    "documentation": BuiltinSource("train", _PYTHON),
    "mathematics": BuiltinSource("train", _OURS),
    "reasoning": BuiltinSource("train", _OURS),
    "records": BuiltinSource("train", _OURS),
    "headers": BuiltinSource("ood", _PYTHON),
    "news": BuiltinSource("ood", _PYTHON),
    "logic": BuiltinSource("ood", _OURS),
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
    return tuple(lzma.decompress(Path(__file__).with_name(f"{name}.txt.xz").read_bytes()).decode().split("\0"))
