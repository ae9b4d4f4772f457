"""Documents of a stream, tokenized and packed during training."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...files import printable
from ..documents import Document, DocumentEncoder
from ..packing import pack_rows
from .reader import RowReader, SourceError
from .sources import Partition, Source

__all__ = ["PackedRowReader", "StreamedDocuments"]

logger = logging.getLogger(__name__)

# Documents per tokenizer call, enough to keep its threads busy.
DOCUMENTS = 64


@dataclass(frozen=True)
class StreamedDocuments:
    """
    A source whose documents are tokenized and packed during training: laid end to end, an EOS after each (and a BOS
    before each, if the tokenizer adds it), and cut into rows of L tokens. Documents without tokens are left out.

    Args:
        documents (`IterableDataset`):
            The documents, one per row.
        encoder ([`DocumentEncoder`]):
            Makes tokens of the rows.
        sequence_length (`int`):
            Tokens per row, L.
        held_out (`frozenset[int]`, *optional*):
            The hash of each document to leave out.

    Example:
        >>> from datasets import load_dataset
        >>> from hf_nexus.mixture import SourceConfig
        >>> from hf_nexus.mixture.documents import DocumentEncoder
        >>> from hf_nexus.mixture.stream.documents import StreamedDocuments
        >>> web = load_dataset("org/web", split="train", streaming=True)  # doctest: +SKIP
        >>> encoder = DocumentEncoder("web", SourceConfig("org/web"), tokenizer, ["text"])  # doctest: +SKIP
        >>> trainer = NexusTrainer(train_dataset={"web": StreamedDocuments(web, encoder, 1024)})  # doctest: +SKIP
    """

    documents: Any
    encoder: DocumentEncoder
    sequence_length: int
    held_out: frozenset[int] = frozenset()


class PackedRowReader(RowReader):
    """
    Reads the documents of one partition and returns packed rows. The state also holds the position in the current
    document, and the tokens of the pass. An incomplete row needs no state, because its tokens are not taken yet.
    """

    def __init__(
        self,
        packing: StreamedDocuments,
        source: Source,
        partition: Partition,
        state: dict[str, Any] | None = None,
    ):
        super().__init__(source, partition, state)
        self.packing = packing
        state = state or {"segment": 0, "token": 0, "skipped": 0, "tokens": 0}
        self._segment: int = state["segment"]
        self._token: int = state["token"]  # next token of that segment
        self._skipped: int = state["skipped"]  # unusable rows since the start of the run
        self._tokens: int = state["tokens"]  # tokens of this pass
        self._warned = False
        # The next documents as segments of text or tokens, `None` for an unusable row.
        self._documents: deque[list[Document | np.ndarray] | None] = deque()

    def take(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The next `count` rows: `input_ids`, `labels` and [`document_positions`], all `(L,)` int64."""
        rows: list[dict[str, torch.Tensor]] = []
        first = self._pass
        while len(rows) < count:
            rows += self._pack(count - len(rows))
            if not rows and self._pass > first + 1:
                part = self.packing.encoder.source.loss_on
                raise self.error(
                    f"no row of a whole pass has a token to train on (loss_on={part!r}). Raise sequence_length, or "
                    "check the columns."
                )
        return rows

    def _pack(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Read the next `count` rows, and return those with a token to train on."""
        tokens, length = np.empty((count, self.packing.sequence_length), dtype=np.int64), 0
        starts = np.zeros(tokens.size + 1, dtype=bool)
        while length < tokens.size:
            more = self._next_tokens()[: tokens.size - length]
            tokens.reshape(-1)[length : length + len(more)] = more
            length += len(more)
            self._token += len(more)
            self._tokens += len(more)
            starts[length] = self._document_ended
        columns = pack_rows(tokens, starts[:-1].reshape(tokens.shape), self.packing.encoder.end).items()
        tensors = {name: torch.from_numpy(values) for name, values in columns}
        return [{name: values[i] for name, values in tensors.items()} for i in range(len(tensors["labels"]))]

    @property
    def _document_ended(self) -> bool:
        """Whether all tokens of the current document are taken."""
        segments = self._documents[0] or []
        ends = self._segment == len(segments) - 1
        return ends and isinstance(segments[-1], np.ndarray) and self._token == len(segments[-1])

    def state(self) -> dict[str, Any]:
        """The position as JSON types."""
        inside = {"segment": self._segment, "token": self._token, "skipped": self._skipped, "tokens": self._tokens}
        return super().state() | inside

    def source_rows(self) -> int | None:
        """Packed rows of the whole source, estimated once a pass has ended."""
        return self._estimated_rows()

    def _end_pass(self) -> None:
        super()._end_pass()
        if not self._tokens:
            raise self.error("a whole pass over the documents gave no token. Check the text columns.")
        self._last_pass, self._tokens = self._tokens // self.packing.sequence_length, 0

    def _next_tokens(self) -> np.ndarray:
        """The rest of the current segment, or the next segment that has tokens."""
        while True:
            if not self._documents:
                self._documents.extend(self._read_documents())
            segments = self._documents[0] or []
            while self._segment < len(segments):
                tokens = self._tokens_of(segments, self._segment)
                if self._token < len(tokens):
                    return tokens[self._token :]
                self._segment, self._token = self._segment + 1, 0
            self._skipped += self._documents.popleft() is None
            self._segment = 0
            self._advance(1)

    def _read_documents(self) -> list[list[Document | np.ndarray] | None]:
        held_out = self.packing.held_out
        documents: list[list[Document | np.ndarray] | None] = []
        short: dict[int, Document] = {}
        for i, row in enumerate(self._peek(DOCUMENTS)):
            document = self._document(row, i)
            if document is None:
                documents.append(None)
            elif held_out and document.hash in held_out:
                documents.append([])
            else:
                documents.append([*document.segments()])
                if len(documents[i] or ()) == 1:
                    short[i] = document
        for i, tokens in zip(short, self.packing.encoder.encode(list(short.values())), strict=True):
            documents[i] = [tokens]
        return documents

    def _document(self, row: Any, ahead: int) -> Document | None:
        """The document of a row of the last peek, `None` if it is skipped."""
        block, encoder = self._current_block(), self.packing.encoder
        number = block.first_row + int(block.order[self._offset + ahead])
        try:
            return encoder.document(row, number)
        except Exception as error:
            name, shard = self.partition.source, "" if block.shard is None else f" of shard {block.shard}"
            problem = f"Source {name!r}: row {number}{shard} is unusable: {printable(error)}"
            if encoder.source.on_error != "skip":
                raise SourceError(f"{problem} To skip such rows, set sources.{name}.on_error to 'skip'.") from error
            if not self._warned:
                logger.warning("%s It is skipped, like further unusable rows, which are counted.", problem)
                self._warned = True
            return None

    def _tokens_of(self, segments: list[Document | np.ndarray], i: int) -> np.ndarray:
        """The tokens of a segment. Long documents keep the tokens of only one segment in memory."""
        segment = segments[i]
        if isinstance(segment, Document):
            (segment,) = self.packing.encoder.encode([segment], first=i == 0, last=i == len(segments) - 1)
            segments[i] = segment
            segments[:i] = [Document("")] * i
        return segment
