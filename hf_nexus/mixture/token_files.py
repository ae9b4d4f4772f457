"""Token files of other tools: datatrove's `.ds` with its `.ds.index`, and Megatron's `.bin` with its `.idx`."""

import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["index_of", "read_token_files"]

# The types of tokens by their codes in an `.idx` file.
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def index_of(file: str) -> str:
    """The file that says where the documents of a token file end."""
    return f"{file[:-4]}.idx" if _of_megatron(file) else f"{file}.index"


def _of_megatron(file: str) -> bool:
    return file.lower().endswith(".bin")


def read_token_files(files: Sequence[str], fingerprint: str) -> "Dataset":
    """
    The documents of token files as a column `input_ids`. They stay on disk until they are used.

    Raises:
        ValueError: An index does not fit its tokens.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    found = []
    for file in files:
        borders, dtype = _read_idx(file) if _of_megatron(file) else _read_index(file)
        tokens = np.memmap(file, dtype, "r")
        if not len(borders) or borders[0] != 0 or (np.diff(borders) < 0).any():
            raise _damaged(file)
        if borders[-1] != len(tokens):
            raise ValueError(f"{index_of(file)!r} ends at {borders[-1]} tokens, but the file has {len(tokens)}")
        found.append((borders, tokens))
    widest = np.result_type(*(tokens.dtype for _, tokens in found))  # only other files are copied into memory
    tables = []
    for borders, tokens in found:
        wide = tokens.astype(widest, copy=False)
        values = pa.Array.from_buffers(pa.from_numpy_dtype(widest), len(wide), [None, pa.py_buffer(wide)])
        tables.append(pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(borders), values)}))
    return Dataset(InMemoryTable(pa.concat_tables(tables)), fingerprint=fingerprint)


def _read_index(file: str) -> tuple[np.ndarray, str]:
    """Borders of the documents of a `.ds` file, and the type of its tokens, which follows from its size."""
    borders = np.append(0, np.fromfile(index_of(file), "<i8"))
    size = os.path.getsize(file) / max(1, borders[-1])
    return borders, "<u2" if size <= 2 else "<u4"


def _read_idx(file: str) -> tuple[np.ndarray, str]:
    """Borders of the documents of a `.bin` file, each of one sequence or several, and the type of its tokens."""
    with open(index_of(file), "rb") as index:
        magic, version, code, sequences, borders = struct.unpack("<9sQBQQ", index.read(34).ljust(34, b"\0"))
        if (magic, version) != (b"MMIDIDX\x00\x00", 1) or code not in _TYPES:
            raise ValueError(f"{index_of(file)!r} is not an index of tokens of Megatron, version 1")
        lengths = np.fromfile(index, "<i4", sequences)
        index.seek(8 * sequences, os.SEEK_CUR)  # where the sequences begin
        documents = np.fromfile(index, "<i8", borders)
    if (documents > len(lengths)).any():
        raise _damaged(file)
    return np.append(0, lengths.cumsum(dtype=np.int64))[documents], _TYPES[code]


def _damaged(file: str) -> ValueError:
    return ValueError(f"{index_of(file)!r} is damaged, its documents do not follow each other. Copy it again")
