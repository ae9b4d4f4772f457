"""
From documents to rows of L tokens, in three passes over Arrow files:

1. hash: a number for the text of each document, by which documents are held out;
2. tokenize: the tokens of each document with a BOS, if the tokenizer adds it, and an EOS, in parallel;
3. pack: the documents end to end, cut every L tokens: `(n, L)`.

Each pass is a `Dataset.map` into a cache file named after everything that its result depends on. Packing is a separate
pass in one process, which carries the incomplete row from batch to batch. A source loses fewer than L tokens, and with
`loss_on` also the rows without a target. Its rows depend neither on the batch size nor on the number of processes.
Tokens are on disk twice, at 4 bytes each, and the position of each token in its document once, at 2 bytes, or
4 above L = 65,536. With `loss_on`, labels are there as well.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from .documents import DocumentEncoder, unmarked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RowPacker", "SourcePacker", "count_targets", "document_positions", "largest_token", "pack_rows"]
__all__ += ["tokenizer_fingerprint"]

# In the name of every cache file. Raise it when the same documents and tokenizer give different rows.
CACHE_VERSION = 4
# Text whose tokens show the settings of a slow tokenizer: case, accents, spaces, digits, special tokens.
_PROBE = " The  Café\tNaïve's\n\n1234 567,89 <s></s> <pad> Ω中文🙂 don't. "
# Documents per batch, enough to keep the threads of a tokenizer busy. Batches of long documents are smaller.
BATCH_SIZE = 256
BYTES_PER_BATCH = 64 << 20
# Tokens per batch of the packing pass.
TOKENS_PER_BATCH = 1 << 20


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """
    Hash of everything in a tokenizer that affects the tokens of a document. Unlike a hash of the object, it stays the
    same after saving and loading, and across versions of transformers.
    """
    if not tokenizer.is_fast:  # it has the names of its files
        vocabulary = sorted(tokenizer.get_vocab().items())
        probe = tokenizer(_PROBE, split_special_tokens=tokenizer.split_special_tokens)["input_ids"]
        return Hasher.hash([type(tokenizer).__name__, vocabulary, probe, *_settings(tokenizer)])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation")  # both are left over from the tokenizer's last call
    backend.pop("padding")
    return Hasher.hash([json.dumps(backend, sort_keys=True), _settings(tokenizer)])


def _settings(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    template = tokenizer.chat_template
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if name in str(template)}
    return [tokenizer.eos_token_id, tokenizer.split_special_tokens, template, named]


def document_positions(starts: np.ndarray) -> np.ndarray:
    """
    The position of each token in its document, given which tokens start one, both (n, L). A document that is cut at
    the end of a row starts again in the next.
    """
    index = np.broadcast_to(np.arange(starts.shape[1]), starts.shape)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def pack_rows(tokens: np.ndarray, starts: np.ndarray, end: int | None = None) -> dict[str, np.ndarray]:
    """
    The columns of rows, given their tokens and which of these start a document, both (n, L).

    Documents also start after each token `end`. Tokens that are not trained on are marked as by [`DocumentEncoder`].
    If they leave no target in a row, it is left out. The first token of a document may not be a target.
    """
    if end is not None:
        starts[:, 1:] |= tokens[:, :-1] == end
    positions, trained = document_positions(starts), tokens >= 0
    if trained.all():
        return {"input_ids": tokens, "labels": tokens, "position_ids": positions}
    kept = trained.all(axis=1) | (trained & (positions > 0)).any(axis=1)
    labels = np.where(trained, tokens, -100)[kept]
    return {"input_ids": unmarked(tokens[kept]), "labels": labels, "position_ids": positions[kept]}


def count_targets(rows: Dataset) -> int:
    """Tokens of packed rows that are trained on, without the first token of each document."""
    count = 0
    for batch in rows.with_format("numpy").iter(1024):
        count += int(((batch["labels"] != -100) & (batch["position_ids"] > 0)).sum())
    return count


def largest_token(rows: Dataset) -> int:
    """The largest token of packed rows, all of which are read."""
    return max(int(batch["input_ids"].max()) for batch in rows.with_format("numpy").iter(1024))


class RowPacker:
    """
    Lays documents end to end and cuts them into rows. Tokens that fill no row wait for the next batch. If some tokens
    are not trained on (`masked`), rows store their labels. `end` is that of [`pack_rows`].
    """

    def __init__(self, sequence_length: int, masked: bool = False, end: int | None = None):
        self.sequence_length = sequence_length
        self.end = end
        self.rest = np.empty(0, dtype=np.int32)
        self.rest_starts = np.empty(0, dtype=bool)
        self.dtypes = {"input_ids": "int32", "position_ids": "uint16" if sequence_length <= 1 << 16 else "int32"}
        if masked:
            self.dtypes["labels"] = "int32"

    def __call__(self, table: pa.Table) -> pa.Table:
        """Ragged `input_ids` in, columns of shape `(n, L)` out; n may be 0."""
        tokens = pc.list_flatten(table["input_ids"]).to_numpy().astype(np.int32, copy=False)
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        starts = np.zeros(len(tokens), dtype=bool)
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        tokens, starts = np.concatenate([self.rest, tokens]), np.concatenate([self.rest_starts, starts])
        full = len(tokens) // self.sequence_length * self.sequence_length
        self.rest, self.rest_starts = tokens[full:].copy(), starts[full:].copy()  # views would keep the whole batch
        shape = -1, self.sequence_length
        found = pack_rows(tokens[:full].reshape(shape), starts[:full].reshape(shape), self.end)
        columns = {name: pa.array(found[name].reshape(-1).astype(dtype)) for name, dtype in self.dtypes.items()}
        return pa.table(
            {n: pa.FixedSizeListArray.from_arrays(values, self.sequence_length) for n, values in columns.items()}
        )


@dataclass
class SourcePacker:
    """The passes over one source. `fingerprint` is that of its tokenizer. `num_proc` processes hash and tokenize."""

    encoder: DocumentEncoder
    fingerprint: str
    cache_dir: Path
    num_proc: int | None = None

    def hash_documents(self, documents: Dataset) -> np.ndarray:
        """The hash of each document, `(len(documents),)` int64."""
        source = self.encoder.source
        if source.tokens_column and (column := documents.data.column(source.tokens_column)).null_count:
            # The numpy format of a batch fails, without a row number, if its first row is null.
            self.encoder.documents({source.tokens_column: [None]}, pc.index(pc.is_null(column), True).as_py())
        # What the checks of rows depend on: the next pass names no row. Those of text depend on nothing.
        checks = [self.fingerprint, source.loss_on, self.encoder.packed_length]
        key = [source.columns, None if "text_column" in source.columns else checks]
        hashed = self._map_batches("hash", documents, self._hash, {"hash": Value("int64")}, key, with_indices=True)
        return hashed.with_format("numpy")["hash"][:]

    def pack_documents(self, documents: Dataset, sequence_length: int, held_out: bool = False) -> Dataset:
        """
        The rows of documents: `input_ids`, `labels` and [`document_positions`], all `(L,)` int64 tensors.

        The source's `max_tokens` limits the documents, unless they are the held-out ones of a training source.

        Raises:
            ValueError: The documents do not fill one row.
        """
        limit = None if held_out else self.encoder.source.max_tokens
        tokenized = self._tokenize_up_to(documents, limit) if limit else self._tokenize(documents)
        tokens = int(_document_lengths(tokenized).sum()) if len(tokenized) else 0
        if tokens < sequence_length:
            raise self._too_few_tokens(documents, tokens, sequence_length, held_out)
        batch_size = max(1, TOKENS_PER_BATCH * len(tokenized) // tokens)
        pack = RowPacker(sequence_length, self.encoder.source.masked, self.encoder.end)
        arrow = tokenized.with_format("arrow")
        features = {name: List(Value(dtype), length=sequence_length) for name, dtype in pack.dtypes.items()}
        rows = self._map("pack", arrow, pack, features, [sequence_length], batch_size=batch_size)
        if not len(rows):
            raise ValueError(
                f"sources.{self.encoder.name}.loss_on: no row of {sequence_length} tokens has one to train on. Raise "
                "sequence_length, or check the columns."
            )
        if not self.encoder.source.masked:  # tokens and labels are the same bytes of the same file
            labels = rows.select_columns("input_ids").rename_column("input_ids", "labels")
            rows = concatenate_datasets([rows, labels], axis=1)
        return rows.with_format("torch")

    def _too_few_tokens(self, documents: Dataset, tokens: int, length: int, held_out: bool) -> ValueError:
        source, what, limit = self.encoder.source, "the documents", ""
        fix = "add documents"
        if held_out:
            what = f"the {len(documents)} held-out documents"
            fix = "raise eval_rows" if source.eval_rows is not None else "choose a larger eval_split"
        elif source.max_tokens:
            limit, fix = f" within max_tokens={source.max_tokens}", "raise max_tokens, or add documents"
        return ValueError(
            f"sources.{self.encoder.name}: {what} have {tokens} tokens{limit}, which fill no row of "
            f"sequence_length={length}. Shorten sequence_length, or {fix}."
        )

    def _tokenize_up_to(self, documents: Dataset, max_tokens: int) -> Dataset:
        """Whole documents from the start, up to a number of tokens. Tokenizes few more than these."""
        slices, total, start, size = [], 0, 0, 4 * BATCH_SIZE
        while start < len(documents) and total < max_tokens:
            stop = min(start + size, len(documents))
            slices.append(self._tokenize(documents.select(range(start, stop))))
            total += int(_document_lengths(slices[-1]).sum())
            # The missing tokens take about this many documents of the mean length so far.
            size = math.ceil(1.05 * (max_tokens - total) * stop / max(total, 1)) + BATCH_SIZE
            start = stop
        tokenized = concatenate_datasets(slices)
        keep = np.searchsorted(np.cumsum(_document_lengths(tokenized)), max_tokens, side="right")
        return tokenized.select(range(int(keep)))

    def _tokenize(self, documents: Dataset) -> Dataset:
        source = self.encoder.source
        key = [source.columns, source.loss_on, self.encoder.packed_length, self.fingerprint, self.encoder.bos_token_id]
        return self._map_batches("tokenize", documents, self._encode, {"input_ids": List(Value("int32"))}, key)

    def _hash(self, batch: Mapping[str, list], rows: list[int]) -> dict[str, list]:
        documents = self.encoder.documents(batch, first_row=rows[0])
        return {"hash": [document.hash for document in documents]}

    def _encode(self, batch: Mapping[str, list]) -> pa.Table:
        tokens = self.encoder.encode(self.encoder.documents(batch, first_row=0))  # bad rows failed when hashed
        return pa.table({"input_ids": pa.array([ids for ids in tokens if len(ids)], pa.list_(pa.int32()))})

    def _map_batches(self, step: str, documents: Dataset, *args: Any, **options: Any) -> Dataset:
        """A pass over documents in batches of a limited size, by several processes if the mixture says so."""
        # Each process would get a copy of all token files, which no cache file of `datasets` holds.
        in_place = self.encoder.source.tokens_column and not documents.cache_files
        num_proc = min(self.num_proc, len(documents)) if self.num_proc and not in_place else None
        size = max(1, documents.data.nbytes // max(1, documents.data.num_rows))  # mean bytes of a document
        batch_size = min(BATCH_SIZE, max(1, BYTES_PER_BATCH // size))
        return self._map(step, documents, *args, batch_size=batch_size, num_proc=num_proc, **options)

    def _map(
        self,
        step: str,
        documents: Dataset,
        function: Callable,
        features: Mapping[str, Any],
        key: list[Any],
        **options: Any,
    ) -> Dataset:
        # The fingerprint of `map` itself would hash the tokenizer object, which changes when it is saved. Hashing the
        # documents would copy those of token files into memory. The size of files is in their `info`.
        fingerprint = Hasher.hash([CACHE_VERSION, step, documents._fingerprint, documents.info, key])
        mapped = documents.map(
            function,
            batched=True,
            features=Features(features),
            remove_columns=documents.column_names,
            cache_file_name=str(self.cache_dir / f"{step}-{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc=f"{step.capitalize()} {self.encoder.name}",
            **options,
        )
        return mapped.with_format(None)


def _document_lengths(tokenized: Dataset) -> np.ndarray:
    return pc.list_value_length(tokenized.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)
