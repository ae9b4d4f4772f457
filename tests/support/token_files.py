"""Token files, as datatrove and Megatron write them."""

import struct
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

__all__ = ["write_bin", "write_ds"]


def write_ds(path: Path, documents: list[list[int]], dtype: str = "<u2") -> None:
    """As datatrove's `TokenizedFile`: the tokens end to end, and the end of each document as `<Q`."""
    np.array([*chain.from_iterable(documents)], dtype).tofile(path)
    ends = np.cumsum([len(document) for document in documents])
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(f"{path}.metadata").write_text("gpt2\n12\n12 T")


def write_bin(
    path: Path, documents: list[list[int]], code: int = 8, dtype: str = "<u2", borders: Sequence[int] | None = None
) -> None:
    """As Megatron's `IndexedDatasetBuilder`, where each document has two sequences, or with other borders."""
    np.array([*chain.from_iterable(documents)], dtype).tofile(path)
    sizes = [length for document in documents for length in (len(document) // 2, len(document) - len(document) // 2)]
    pointers = np.cumsum([0, *sizes[:-1]]) * np.dtype(dtype).itemsize
    borders = range(0, len(sizes) + 1, 2) if borders is None else borders
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sizes), len(borders))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *pointers)
        + struct.pack(f"<{len(borders)}q", *borders)
    )
