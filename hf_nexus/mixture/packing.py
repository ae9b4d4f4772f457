"""
From documents to rows of L tokens, in three passes; each reads Arrow files and writes new ones, a batch at a time.

1. hash: one number for the text of each document, by which documents are held out;
2. tokenize: the tokens of each document and an EOS, in parallel;
3. pack: the documents end to end, cut every L tokens: `(n, L)`.

Each pass is a `Dataset.map` into a file named after everything that its result depends on, so it is done once. Packing
is a pass of its own, in one process that carries the incomplete row from batch to batch: a source loses fewer than L
tokens in all, and its rows depend neither on the size of the batches nor on the number of processes. It only copies
memory, so a billion tokens take it seconds. The price: tokens lie on disk twice, ragged and packed, at 4 bytes each.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .documents import DocumentReader

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

__all__ = ["RowPacker", "SourcePacker", "tokenizer_fingerprint"]

# Part of every file name. Raise it when the same documents and tokenizer give other rows than before.
CACHE_VERSION = 1
# Documents of a batch: few enough for books of a million characters, enough to keep the threads of a tokenizer busy.
BATCH_SIZE = 256
# Tokens of a batch that is packed.
TOKENS_PER_BATCH = 1 << 20


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """
    Hash of what decides the tokens of a document. Unlike a hash of the object, it survives saving and loading, and is
    the same in each version of transformers.

    Example:
        >>> from tempfile import mkdtemp
        >>> from transformers import AutoTokenizer
        >>> from hf_nexus.mixture.packing import tokenizer_fingerprint
        >>> from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
        >>> tokenizer, folder = train_tokenizer(["lazy dogs"], vocab_size=300), mkdtemp()
        >>> saved = tokenizer.save_pretrained(folder)
        >>> tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder)) == tokenizer_fingerprint(tokenizer)
        True
    """
    from datasets.fingerprint import Hasher

    if not tokenizer.is_fast:
        return Hasher.hash(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation")  # left over from the tokenizer's last call
    backend.pop("padding")
    settings = [tokenizer.eos_token_id, tokenizer.split_special_tokens, tokenizer.chat_template]
    return Hasher.hash([json.dumps(backend, sort_keys=True), settings])


class RowPacker:
    """
    Lays documents end to end and cuts them into rows, batch after batch; what fills no row waits for the next batch.

    Args:
        sequence_length (`int`):
            Tokens per row, L.

    Example:
        >>> import pyarrow as pa
        >>> from hf_nexus.mixture.packing import RowPacker
        >>> pack = RowPacker(4)
        >>> pack(pa.table({"input_ids": [[1, 2, 3], [4, 5]]}))["input_ids"].to_pylist()
        [[1, 2, 3, 4]]
        >>> pack(pa.table({"input_ids": [[6, 7, 8]]}))["input_ids"].to_pylist()
        [[5, 6, 7, 8]]
    """

    def __init__(self, sequence_length: int):
        self.sequence_length = sequence_length
        self.rest = np.empty(0, dtype=np.int32)

    def __call__(self, table: "pa.Table") -> "pa.Table":
        """Ragged `input_ids` in, rows of shape `(n, L)` out; n may be 0."""
        import pyarrow as pa
        import pyarrow.compute as pc

        tokens = pc.list_flatten(table["input_ids"]).to_numpy().astype(np.int32, copy=False)
        tokens = np.concatenate([self.rest, tokens])
        full = len(tokens) // self.sequence_length * self.sequence_length
        self.rest = tokens[full:].copy()  # a view would keep the whole batch alive
        return pa.table(
            {"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens[:full]), self.sequence_length)}
        )


@dataclass
class SourcePacker:
    """
    The passes over one source.

    Args:
        reader ([`DocumentReader`]):
            Reads the documents of the source.
        fingerprint (`str`):
            The [`tokenizer_fingerprint`] of the reader's tokenizer.
        cache_dir (`Path`):
            Folder of the files written.
        num_proc (`int`, *optional*):
            Processes that hash and tokenize.
    """

    reader: DocumentReader
    fingerprint: str
    cache_dir: Path
    num_proc: int | None = None

    def hash_documents(self, documents: "Dataset") -> np.ndarray:
        """A number for the text of each document, `(len(documents),)` int64, the same for the same text everywhere."""
        from datasets import Features, Value

        features = Features({"hash": Value("int64")})
        columns = self.reader.source.columns
        rendered_by = None if "text_column" in columns else self.fingerprint
        hashed = self._read("hash", documents, _hash_batch, features, [columns, rendered_by], with_indices=True)
        return hashed.with_format("numpy")["hash"][:]

    def pack_documents(
        self,
        documents: "Dataset",
        sequence_length: int,
        max_tokens: int | None = None,
        *,
        what: str = "the documents",
        fix: str = "add documents",
    ) -> "Dataset":
        """
        Rows of a source: `input_ids` and equal `labels`, both `(L,)`, given as int64 tensors.

        Args:
            documents (`Dataset`):
                What to tokenize.
            sequence_length (`int`):
                L.
            max_tokens (`int`, *optional*):
                Use whole documents from the start up to so many tokens; not much more is tokenized.
            what (`str`, *optional*), fix (`str`, *optional*):
                For the error: what is packed, and what can be done besides shorter rows.

        Raises:
            ValueError: the documents do not fill one row.
        """
        from datasets import Features, List, Value, concatenate_datasets

        tokenized = self._tokenize_up_to(documents, max_tokens) if max_tokens else self._tokenize(documents)
        tokens = int(_document_lengths(tokenized).sum()) if len(tokenized) else 0
        if tokens < sequence_length:
            limit = f" within max_tokens={max_tokens}" if max_tokens else ""
            raise ValueError(
                f"sources.{self.reader.name}: {what} have {tokens} tokens{limit}, which fill no row of "
                f"sequence_length={sequence_length}. Shorten sequence_length, or {fix}."
            )
        features = Features({"input_ids": List(Value("int32"), length=sequence_length)})
        batch_size = max(1, TOKENS_PER_BATCH * len(tokenized) // tokens)
        pack, arrow = RowPacker(sequence_length), tokenized.with_format("arrow")
        rows = self._map("pack", arrow, pack, features, [sequence_length], batch_size=batch_size)
        # Both columns are the same bytes of the same file.
        rows = concatenate_datasets([rows, rows.rename_column("input_ids", "labels")], axis=1)
        return rows.with_format("torch")

    def _tokenize(self, documents: "Dataset") -> "Dataset":
        from datasets import Features, List, Value

        features = Features({"input_ids": List(Value("int32"))})
        key = [self.reader.source.columns, self.fingerprint]
        return self._read("tokenize", documents, _tokenize_batch, features, key)

    def _tokenize_up_to(self, documents: "Dataset", max_tokens: int) -> "Dataset":
        from datasets import concatenate_datasets

        slices, total, start, size = [], 0, 0, 4 * BATCH_SIZE
        while start < len(documents) and total < max_tokens:
            stop = min(start + size, len(documents))
            slices.append(self._tokenize(documents.select(range(start, stop))))
            total += int(_document_lengths(slices[-1]).sum())
            # As many documents as the missing tokens take if the next ones are as long as those so far.
            size = math.ceil(1.05 * (max_tokens - total) * stop / max(total, 1)) + BATCH_SIZE
            start = stop
        tokenized = concatenate_datasets(slices)
        keep = np.searchsorted(np.cumsum(_document_lengths(tokenized)), max_tokens, side="right")
        return tokenized.select(range(int(keep)))

    def _read(self, step: str, documents: "Dataset", *args: Any, **options: Any) -> "Dataset":
        num_proc = min(self.num_proc, len(documents)) if self.num_proc else None
        given = {"reader": self.reader}
        return self._map(step, documents, *args, batch_size=BATCH_SIZE, num_proc=num_proc, fn_kwargs=given, **options)

    def _map(
        self, step: str, documents: "Dataset", function: Callable, features: "Features", key: list[Any], **options: Any
    ) -> "Dataset":
        from datasets.fingerprint import Hasher

        # The fingerprint that `map` makes itself would hash the tokenizer object, which changes when it is saved.
        fingerprint = Hasher.hash([CACHE_VERSION, step, Hasher.hash(documents), key])
        mapped = documents.map(
            function,
            batched=True,
            features=features,
            remove_columns=documents.column_names,
            cache_file_name=str(self.cache_dir / f"{step}-{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc=f"{step.capitalize()} {self.reader.name}",
            **options,
        )
        return mapped.with_format(None)


def _hash_batch(batch: Mapping[str, list], rows: list[int], reader: DocumentReader) -> "pa.Table":
    import pyarrow as pa

    texts = reader(batch, first_row=rows[0])
    digests = b"".join(blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return pa.table({"hash": np.frombuffer(digests, dtype="<i8")})


def _tokenize_batch(batch: Mapping[str, list], reader: DocumentReader) -> "pa.Table":
    import pyarrow as pa

    texts = reader(batch, first_row=0)
    tokens = reader.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    eos = reader.tokenizer.eos_token_id
    return pa.table({"input_ids": pa.array([[*ids, eos] for ids in tokens if ids], pa.list_(pa.int32()))})


def _document_lengths(tokenized: "Dataset") -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(tokenized.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)
