"""Loading a mixture: every source read, held out, tokenized and packed, so that training starts from rows."""

import logging
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import MixtureConfig, SourceConfig
from .documents import DocumentReader, column_names, load_documents, require_chat_template, source_license
from .packing import SourcePacker, tokenizer_fingerprint
from .plan import check_map_style
from .stream.documents import StreamedDocuments, document_hash, read_texts

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Mixture", "load_mixture"]

logger = logging.getLogger(__name__)


@dataclass
class Mixture:
    """
    A loaded mixture. Rows are `{"input_ids": (L,), "labels": (L,)}`, the labels equal to the tokens: causal models of
    transformers shift them.

    Attributes:
        config ([`MixtureConfig`]):
            What was loaded.
        train (`dict[str, Dataset | StreamedDocuments]`):
            Rows of the training sources; of a streaming source, what makes them while training.
        eval (`dict[str, Dataset]`):
            Held-out rows of training sources, then the rows of OOD sources.
        weights (`dict[str, float]`):
            Shares of the training tokens.
        tokens (`dict[str, int | None]`), eval_tokens (`dict[str, int]`):
            Number of rows times L, for `train` and `eval`; for a streaming source what is stated, or `None`.
        licenses (`dict[str, str | None]`):
            Licence of each source, `None` where nothing states it.
        eos_token_id (`int`):
            The token that ends each document.
    """

    config: MixtureConfig
    train: "dict[str, Dataset | StreamedDocuments]"
    eval: "dict[str, Dataset]"
    weights: dict[str, float]
    tokens: dict[str, int | None]
    eval_tokens: dict[str, int]
    licenses: dict[str, str | None]
    eos_token_id: int


def load_mixture(
    config: MixtureConfig, tokenizer: "PreTrainedTokenizerBase", *, cache_dir: str | Path | None = None
) -> Mixture:
    """
    Load, tokenize and pack the sources of a mixture.

    An EOS ends each document, and no row crosses sources. A document that is held out anywhere (by `eval_rows`, in an
    `eval_split` or in an OOD source) is trained on nowhere, whichever source it is in and however often. Everything is
    cached: a second call with the same files and tokenizer reads the rows from disk. Of several processes let one go
    first (`with args.main_process_first(): ...`), or each does the work.

    Nothing of a streaming source is read but what is held out: the first `eval_rows` different documents, or a split.

    Args:
        config ([`MixtureConfig`]):
            What to load.
        tokenizer (`PreTrainedTokenizerBase`):
            With an EOS token. It adds no other special tokens.
        cache_dir (`str` or `Path`, *optional*):
            Where `datasets` keeps its files, and the rows lie in a folder `hf_nexus`; by default its usual cache.

    Raises:
        ValueError: a source that cannot be loaded, holds something else than text, fills no row, or is too large.
        ImportError: `datasets` is not installed.

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
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Loading a mixture needs the datasets library: pip install datasets") from error
    _check(config, tokenizer)
    files = None if cache_dir is None else str(cache_dir)
    rows_dir = Path(files or datasets.config.HF_DATASETS_CACHE) / "hf_nexus"
    rows_dir.mkdir(parents=True, exist_ok=True)
    fingerprint = tokenizer_fingerprint(tokenizer)
    packers, licenses, documents, held_out = {}, {}, {}, {}
    for name, source in config.sources.items():
        whole = load_documents(name, source, source.split, files, source.streaming)
        reader = DocumentReader(name, source, tokenizer, available=column_names(whole))
        packers[name] = SourcePacker(reader, fingerprint, rows_dir, config.num_proc)
        licenses[name] = source_license(source, whole)
        if source.role == "ood":
            held_out[name] = _text_only(whole, source)
            continue
        documents[name] = _text_only(whole, source)
        if source.eval_split is not None:
            held_out[name] = _eval_split(reader, files)
        elif source.eval_rows is not None:
            hold_out = _first_documents if source.streaming else _hold_out
            held_out[name] = hold_out(packers[name], documents[name], source.eval_rows)
    hashes = np.concatenate([np.empty(0, np.int64), *(packers[n].hash_documents(d) for n, d in held_out.items())])
    train = {name: _train(packers[name], documents[name], hashes, config) for name in documents}
    order = [*config.train_sources, *config.ood_sources]
    evaluation = {name: _pack_eval(packers[name], held_out[name], config) for name in order if name in held_out}
    tokens = {name: _tokens(rows, config.sources[name], config.sequence_length) for name, rows in train.items()}
    eval_tokens = {name: len(rows) * config.sequence_length for name, rows in evaluation.items()}
    weights = config.weights({name: count for name, count in tokens.items() if count is not None})
    return Mixture(config, train, evaluation, weights, tokens, eval_tokens, licenses, tokenizer.eos_token_id)


def _check(config: MixtureConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    check_map_style(config)
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, which must end each document. Set tokenizer.eos_token.")
    for name, source in config.sources.items():
        if source.messages_column is not None:
            require_chat_template(name, source, tokenizer)


def _text_only(documents: "Dataset | IterableDataset", source: SourceConfig) -> Any:
    if documents.column_names is None:  # rows of a stream of which some may lack a column
        return documents
    # A dataset may have been saved with a format, such as tensors.
    return documents.select_columns(list(source.columns.values())).with_format(None)


def _hold_out(packer: SourcePacker, documents: "Dataset", count: int) -> "Dataset":
    """The documents with the `count` smallest hashes, each once, whatever their order."""
    distinct, first = np.unique(packer.hash_documents(documents), return_index=True)
    if count >= len(distinct):
        raise ValueError(
            f"sources.{packer.reader.name}.eval_rows: {count} documents are to be held out, but the source has only "
            f"{len(distinct)} different ones. Hold out fewer."
        )
    return documents.select(first[:count])


def _without(packer: SourcePacker, documents: "Dataset", held_out: np.ndarray, expected: int) -> "Dataset":
    """The documents whose hash is not among those held out."""
    # Hashed even if nothing is held out: this finds rows that are no text, by their number, before the slow pass.
    kept = np.flatnonzero(~np.isin(packer.hash_documents(documents), held_out))
    name, left_out = packer.reader.name, len(documents) - len(kept)
    if len(kept) == 0:
        raise ValueError(
            f"sources.{name}: all of its {len(documents)} documents are held out for evaluation, here or in an OOD "
            "source. Remove the overlap."
        )
    if left_out > expected:
        logger.warning(
            "Source %r: %d more documents are not trained on, because they are copies of held-out ones.",
            name,
            left_out - expected,
        )
    return documents.select(kept) if left_out else documents


def _first_documents(packer: SourcePacker, documents: "IterableDataset", count: int) -> "Dataset":
    """The first `count` different documents of a stream."""
    from datasets import Dataset

    reader = packer.reader
    found: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(documents):
        try:
            (text,) = read_texts(reader, [row], number)
        except Exception as error:
            if reader.source.on_error == "skip":
                continue
            raise ValueError(
                f"{error} To leave such rows out, set sources.{reader.name}.on_error to 'skip'."
            ) from error
        if text:
            found.setdefault(document_hash(text), {column: row[column] for column in reader.source.columns.values()})
        if len(found) == count:
            return Dataset.from_list(list(found.values()))
    raise ValueError(
        f"sources.{reader.name}.eval_rows: {count} documents are to be held out, but the source has only {len(found)} "
        "different ones. Hold out fewer."
    )


def _eval_split(reader: DocumentReader, cache_dir: str | None) -> "Dataset":
    """The documents of the split to evaluate on; that of a streaming source is not loaded with all other splits."""
    from datasets import Dataset

    name, source, split = reader.name, reader.source, str(reader.source.eval_split)
    if not source.streaming:
        return _text_only(load_documents(name, source, split, cache_dir), source)
    match = re.fullmatch(r"([^\[\]]+)(?:\[:(\d+)\])?", split)
    if match is None:
        raise ValueError(
            f"sources.{name}.eval_split: {split!r} cannot be read from a stream. Name a split, or the start of one as "
            "in 'validation[:1000]'."
        )
    documents = load_documents(name, source, match[1], cache_dir, streaming=True)
    columns = list(source.columns.values())
    rows = islice(documents, int(match[2]) if match[2] else None)
    return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])


def _train(
    packer: SourcePacker, documents: Any, held_out: np.ndarray, config: MixtureConfig
) -> "Dataset | StreamedDocuments":
    """The rows of a training source, or what makes them."""
    source = packer.reader.source
    if source.streaming:
        return StreamedDocuments(documents, packer.reader, config.sequence_length, frozenset(held_out.tolist()))
    return _pack_train(packer, _without(packer, documents, held_out, source.eval_rows or 0), config)


def _tokens(rows: "Dataset | StreamedDocuments", source: SourceConfig, sequence_length: int) -> int | None:
    return source.tokens if isinstance(rows, StreamedDocuments) else len(rows) * sequence_length


def _pack_train(packer: SourcePacker, documents: "Dataset", config: MixtureConfig) -> "Dataset":
    limit = config.sources[packer.reader.name].max_tokens
    what, fix = "the training documents", _more_documents(limit)
    return packer.pack_documents(documents, config.sequence_length, limit, what=what, fix=fix)


def _pack_eval(packer: SourcePacker, documents: "Dataset", config: MixtureConfig) -> "Dataset":
    source = config.sources[packer.reader.name]
    if source.role == "ood":
        limit = source.max_tokens
        return packer.pack_documents(documents, config.sequence_length, limit, fix=_more_documents(limit))
    fix = "raise eval_rows" if source.eval_rows is not None else "choose a larger eval_split"
    what = f"the {len(documents)} held-out documents"
    return packer.pack_documents(documents, config.sequence_length, what=what, fix=fix)


def _more_documents(max_tokens: int | None) -> str:
    return "raise max_tokens, or add documents" if max_tokens else "add documents"
