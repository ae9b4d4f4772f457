"""Keeps texts apart: cuts out of one what another holds as well."""

from collections.abc import Iterable, Iterator

SHARED_RUN = 100
"""No run of this many characters is shared between a training and an OOD text."""

# Any run of SHARED_RUN characters covers a whole block that starts at a multiple of half its length.
_BLOCK = SHARED_RUN // 2


def blocks(documents: Iterable[str]) -> set[str]:
    """The consecutive blocks of half `SHARED_RUN` characters of each document; a shorter rest is left out."""
    return {text[at : at + _BLOCK] for text in documents for at in range(0, len(text) - _BLOCK + 1, _BLOCK)}


def without(text: str, known: set[str]) -> Iterator[str]:
    """
    The passages of a text that share no run of `SHARED_RUN` characters with the documents `known` was made of.

    Every line that touches a known block is left out, and the text is cut there, so that no new run arises from what
    stood before and after. That is stricter than needed: some shared runs of half the length go as well.

    Args:
        text (`str`):
            The text to cut.
        known (`set[str]`):
            What [`blocks`] returned.

    Example:
        >>> from hf_nexus.mixture.builtin.disjoint import blocks, without
        >>> notice = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software."
        >>> list(without(f"mine\\n{notice}\\nmine too", blocks([notice])))
        ['mine', 'mine too']
    """
    starts = [at for at in range(len(text) - _BLOCK + 1) if text[at : at + _BLOCK] in known]
    at, kept = 0, 0
    for start in starts:
        if start >= at:
            line = text.rfind("\n", 0, start) + 1
            if line > kept:
                yield text[kept : line - 1]
        end = text.find("\n", start + _BLOCK - 1)
        at = kept = len(text) if end < 0 else end + 1
    if kept < len(text):
        yield text[kept:]
