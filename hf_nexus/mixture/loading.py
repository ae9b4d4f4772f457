"""Loading a mixture: documents are read, held out, tokenized and packed, and training starts from rows."""

import logging
import re
from collections.abc import Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from .config import MixtureConfig, SourceConfig
from .documents import DocumentEncoder, check_tokenizer, load_documents, rows_of
from .packing import SourcePacker, count_targets, tokenizer_fingerprint
from .stream.documents import StreamedDocuments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Mixture", "load_mixture"]

logger = logging.getLogger(__name__)


@dataclass
class Mixture:
    """
    A loaded mixture. Rows are `{"input_ids": (L,), "labels": (L,), "position_ids": (L,)}`. The labels equal the
    tokens, because causal models of transformers shift them, or -100 where a token is not trained on. The positions
    restart at each document.

    Attributes:
        config ([`MixtureConfig`]):
            The configuration.
        train (`dict[str, Dataset | StreamedDocuments]`):
            Rows of the training sources. Those of a streaming source are made during training.
        eval (`dict[str, Dataset]`):
            Held-out rows of training sources, then the rows of OOD sources.
        licenses (`dict[str, str | None]`):
            Licence of each source, `None` if neither its configuration nor its `info` states it.
        eos_token_id (`int`):
            The token that ends each document.
        bos_token_id (`int`, *optional*):
            The token that starts each document, `None` if none does.
    """

    config: MixtureConfig
    train: dict[str, Dataset | StreamedDocuments]
    eval: dict[str, Dataset]
    licenses: dict[str, str | None]
    eos_token_id: int
    bos_token_id: int | None = None

    @property
    def tokens(self) -> dict[str, int | None]:
        """Tokens of each training source. For a streaming source these are configured, or `None`."""
        sources, length = self.config.sources, self.config.sequence_length
        return {
            n: len(rows) * length if isinstance(rows, Sized) else sources[n].tokens for n, rows in self.train.items()
        }

    @cached_property
    def targets(self) -> dict[str, int]:
        """Tokens that are trained on in the packed sources with a `loss_on` other than "all"."""
        masked = {n: rows for n, rows in self.train.items() if self.config.sources[n].masked}
        return {n: count_targets(rows) for n, rows in masked.items() if isinstance(rows, Sized)}

    @property
    def eval_tokens(self) -> dict[str, int]:
        """Tokens of each evaluation set."""
        return {name: len(rows) * self.config.sequence_length for name, rows in self.eval.items()}

    @property
    def weights(self) -> dict[str, float]:
        """Mixture weights of the training sources, which sum to 1 (those of the last stage)."""
        return self.config.weights(self.tokens)


def load_mixture(
    config: MixtureConfig, tokenizer: "PreTrainedTokenizerBase", *, cache_dir: str | Path | None = None
) -> Mixture:
    """
    Load, tokenize and pack the sources of a mixture.

    An EOS ends each document, and a BOS starts it if the tokenizer adds one. No row crosses sources. A document that
    is held out in one place (by `eval_rows`, an `eval_split` or an OOD source) is not trained on in any source.
    Everything is cached: a second call with the same files and tokenizer reads the rows from disk. With several
    processes, let one go first (`with args.main_process_first(): ...`), or each does the work.

    Of a streaming source, only the held-out documents are read: the first `eval_rows` different ones, or a split.

    Args:
        config ([`MixtureConfig`]):
            The sources.
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer with an EOS token. Special tokens other than EOS and BOS are not added.
        cache_dir (`str` or `Path`, *optional*):
            Cache folder of `datasets`, whose usual one is the default. Rows are in its folder `hf_nexus`.

    Raises:
        ValueError: A source cannot be loaded, holds something other than text, or fills no row.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.mixture import MixtureConfig, load_mixture
        >>> from hf_nexus.mixture.builtin.corpus import builtin_documents
        >>> from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
        >>> sources = {"logic": {"path": "builtin/logic", "max_tokens": 5000}}
        >>> config = MixtureConfig.from_dict({"sources": sources, "sequence_length": 64})
        >>> tokenizer = train_tokenizer(builtin_documents("logic")[:20], vocab_size=300)
        >>> mixture = load_mixture(config, tokenizer, cache_dir=mkdtemp())
        >>> mixture.train["logic"][0]["input_ids"].shape
        torch.Size([64])
    """
    _check_tokenizer(config, tokenizer)
    cache = None if cache_dir is None else str(cache_dir)
    rows_dir = Path(cache or datasets.config.HF_DATASETS_CACHE) / "hf_nexus"
    rows_dir.mkdir(parents=True, exist_ok=True)
    fingerprint, length = tokenizer_fingerprint(tokenizer), config.sequence_length

    packers, licenses, documents, hashes, held_out = {}, {}, {}, dict[str, Any](), dict[str, Any]()
    for name, source in (config.train_sources | config.ood_sources).items():  # the order of the evaluation sets
        loaded, columns = load_documents(name, source, source.split, cache, source.streaming)
        packed_length = length if source.packed else None
        encoder = DocumentEncoder(name, source, tokenizer, columns, config.add_bos_token, packed_length)
        packers[name] = SourcePacker(encoder, fingerprint, rows_dir, config.num_proc)
        licenses[name] = source.license or loaded.info.license or None
        documents[name] = _text_only(loaded, source)
        # Also if nothing is held out, because hashing reports rows that are not text by their number.
        hashes[name] = None if source.streaming else packers[name].hash_documents(documents[name])
        if (of_source := _held_out(packers[name], documents[name], hashes[name], cache)) is not None:
            held_out[name] = of_source

    held_out_hashes = np.concatenate([np.empty(0, np.int64), *(of for _, of in held_out.values())])
    train = {
        name: _train_rows(packers[name], documents[name], hashes[name], held_out_hashes, length)
        for name in config.train_sources
    }
    evaluation = {
        name: packers[name].pack_documents(rows, length, held_out=name in config.train_sources)
        for name, (rows, _) in held_out.items()
    }
    bos_token_id = next(iter(packers.values())).encoder.bos_token_id  # all sources have the same
    return Mixture(config, train, evaluation, licenses, tokenizer.eos_token_id, bos_token_id)


def _check_tokenizer(config: MixtureConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, which must end each document. Set tokenizer.eos_token.")
    if config.add_bos_token and tokenizer.bos_token_id is None:
        raise ValueError("add_bos_token: the tokenizer has no BOS token. Set tokenizer.bos_token, or leave it out.")
    for name, source in config.sources.items():
        check_tokenizer(name, source, tokenizer)


def _text_only(documents: Dataset | IterableDataset, source: SourceConfig) -> Any:
    if documents.column_names is not None:  # in a stream, a row may lack a column
        documents = documents.select_columns(list(source.columns.values()))
    # A saved dataset may have a format, such as tensors. Lists of integers would take ten times as long as arrays.
    return documents.with_format("numpy" if source.tokens_column else None)


# ---- Holding out ----


def _held_out(
    packer: SourcePacker, documents: Any, hashes: np.ndarray | None, cache_dir: str | None
) -> tuple[Dataset, np.ndarray] | None:
    """
    The documents of a source that are evaluated on, and their hashes; `None` if there are none. `hashes` are those of
    its documents, if they were read.
    """
    source = packer.encoder.source
    if source.role == "ood" and hashes is not None:
        return documents, hashes
    if source.eval_split is not None:
        split = _eval_split(packer.encoder, cache_dir)
        return split, packer.hash_documents(split)
    if source.eval_rows is None:
        return None
    if hashes is not None:
        return _smallest_hashes(packer, documents, hashes, source.eval_rows)
    return _first_documents(packer, documents, source.eval_rows)


def _smallest_hashes(
    packer: SourcePacker, documents: Dataset, hashes: np.ndarray, count: int
) -> tuple[Dataset, np.ndarray]:
    """The documents with the `count` smallest hashes, each once, independent of the order of documents."""
    distinct, first = np.unique(hashes, return_index=True)
    if count >= len(distinct):
        raise _too_few_documents(packer, count, len(distinct))
    return documents.select(first[:count]), distinct[:count]


def _first_documents(packer: SourcePacker, documents: IterableDataset, count: int) -> tuple[Dataset, np.ndarray]:
    """The first `count` different documents of a stream, and their hashes."""
    encoder, source = packer.encoder, packer.encoder.source
    found: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows_of(encoder.name, source, source.split, documents)):
        if document := encoder.document(row, number):  # neither skipped nor empty
            found.setdefault(document.hash, {column: row[column] for column in source.columns.values()})
        if len(found) == count:
            return _stored(list(found.values()), documents), np.array(list(found), dtype=np.int64)
    raise _too_few_documents(packer, count, len(found))


def _too_few_documents(packer: SourcePacker, wanted: int, found: int) -> ValueError:
    return ValueError(
        f"sources.{packer.encoder.name}.eval_rows: {wanted} documents are to be held out, but the source has only "
        f"{found} different ones. Hold out fewer."
    )


def _eval_split(encoder: DocumentEncoder, cache_dir: str | None) -> Dataset:
    """The documents of `eval_split`. For a streaming source, only the needed rows are read."""
    name, source, split = encoder.name, encoder.source, str(encoder.source.eval_split)
    if not source.streaming:
        return _text_only(load_documents(name, source, split, cache_dir)[0], source)
    match = re.fullmatch(r"([^\[\]]+)(?:\[:(\d+)\])?", split)
    if match is None:
        raise ValueError(
            f"sources.{name}.eval_split: {split!r} cannot be read from a stream. Name a split, or the start of one as "
            "in 'validation[:1000]'."
        )
    documents = _text_only(load_documents(name, source, match[1], cache_dir, streaming=True)[0], source)
    rows = [*islice(rows_of(name, source, split, documents), int(match[2]) if match[2] else None)]
    if not rows:
        raise ValueError(f"sources.{name}.eval_split: {split!r} has no rows. Name another split, or use eval_rows.")
    return _stored([{column: row.get(column) for column in source.columns.values()} for row in rows], documents)


def _stored(rows: list[dict[str, Any]], documents: Any) -> Dataset:
    """Rows of a stream as a dataset. Other types would reorder the keys of messages, and so change their text."""
    return Dataset.from_list(rows, features=documents.features, on_mixed_types="use_json")


# ---- Training rows ----


def _train_rows(
    packer: SourcePacker, documents: Any, hashes: np.ndarray | None, held_out_hashes: np.ndarray, length: int
) -> Dataset | StreamedDocuments:
    """The rows of a training source, without documents whose hash is held out."""
    if hashes is None:
        return StreamedDocuments(documents, packer.encoder, length, frozenset(held_out_hashes.tolist()))
    kept = np.flatnonzero(~np.isin(hashes, held_out_hashes))
    name, left_out = packer.encoder.name, len(documents) - len(kept)
    if len(kept) == 0:
        raise ValueError(
            f"sources.{name}: all of its {len(documents)} documents are held out for evaluation, in this or an OOD "
            "source. Remove the overlap."
        )
    copies = left_out - (packer.encoder.source.eval_rows or 0)
    if copies > 0:
        logger.warning("Source %r: %d more documents are copies of held-out ones and are left out.", name, copies)
    return packer.pack_documents(documents.select(kept) if left_out else documents, length)
