"""Streamed documents of a dataset."""

from typing import Any

from hf_nexus.mixture import SourceConfig
from hf_nexus.mixture.documents import DocumentEncoder
from hf_nexus.mixture.stream.documents import StreamedDocuments

from .tiny_tokenizer import tiny_tokenizer


def documents_of(dataset: Any, sequence_length: int, held_out: Any = (), **config: Any) -> StreamedDocuments:
    """The `text` column of a dataset, tokenized and packed during training."""
    source = SourceConfig(path="a.jsonl", streaming=True, **config)
    encoder = DocumentEncoder("a", source, tiny_tokenizer(), ["text"])
    return StreamedDocuments(dataset, encoder, sequence_length, frozenset(held_out))
