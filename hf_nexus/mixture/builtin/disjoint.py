"""Removes from a text what it shares with other texts."""

from collections.abc import Iterable, Iterator

SHARED_RUN = 100
"""The number of characters in a run that training and OOD texts may not share."""

# Every run of SHARED_RUN characters contains a whole block that starts at a multiple of half its length.
_BLOCK = SHARED_RUN // 2


def blocks(documents: Iterable[str]) -> set[str]:
    """The consecutive blocks of half `SHARED_RUN` characters of each document, without a shorter rest."""
    return {text[at : at + _BLOCK] for text in documents for at in range(0, len(text) - _BLOCK + 1, _BLOCK)}


def without(text: str, known: set[str]) -> Iterator[str]:
    """
    The passages of a text that share no run of `SHARED_RUN` characters with the documents behind `known`.

    Every line that contains part of a known block is removed, and the text is cut there. This also removes some
    shared runs of half the length.

    Args:
        text (`str`):
            The text to cut.
        known (`set[str]`):
            The result of [`blocks`].
    """
    kept = 0  # Where the passage that is being read begins.
    for start in range(len(text) - _BLOCK + 1):
        if text[start : start + _BLOCK] in known:
            line = text.rfind("\n", 0, start) + 1
            if line > kept:
                yield text[kept : line - 1]
            end = text.find("\n", start + _BLOCK - 1)
            kept = len(text) if end < 0 else end + 1
    if kept < len(text):
        yield text[kept:]
