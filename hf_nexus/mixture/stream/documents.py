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
from .lanes import Lane
from .reader import BEGINNING, Held, PartReader, RowReader, SourceError, Span
from .sources import Block

__all__ = ["PackedRowReader", "StreamedDocuments"]

logger = logging.getLogger(__name__)

# Documents per tokenizer call at most. One for the next row is enough, and lanes are many.
DOCUMENTS = 64
# Documents or rows that a lane reads at least before it reports that none of them is of use.
PATIENCE = 64


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
    Reads the documents of a source, and returns packed rows. Each document is dealt to a lane, which packs its own.
    The documents of lanes in other processes are read if they share a part, but not tokenized.
    """

    def __init__(self, packing: StreamedDocuments, *reading: Any):
        super().__init__(*reading)
        states = reading[-1]
        self._packed: dict[int, list[PackedLane]] = {part: [] for part in self._parts}
        self._of_number: dict[int, PackedLane] = {}
        for lanes in self._of_part.values():
            for lane in lanes:
                packed = PackedLane(packing, self._parts[lane.part], lane, states.get(str(lane.number)))
                self._packed[lane.part].append(packed)
                self._of_number[lane.number] = packed

    def _take(self, each: int, spans: list[Span]) -> list[Any]:
        rows = []
        for lane, start, end in spans:
            packed = self._of_number[lane.number]
            rows += packed.take(end - packed.taken)[start - end :]  # other readers have taken the rows before
            self._parts[lane.part].forget(min(other.first for other in self._packed[lane.part]))
        return rows

    def _state(self, each: int, lane: Lane, end: int) -> dict[str, Any]:
        return self._of_number[lane.number].state()

    def source_rows(self) -> int | None:
        """Packed rows of the whole source, estimated once a pass has ended."""
        documents = self._rows_of_pass()
        known = [lane.rows_of(documents) for lane in self._of_number.values() if lane.known] if documents else []
        return max(known, default=None)


class PackedLane:
    """
    Packs the documents of one lane. Its state has the block of the next document, the position in it, and the number
    of rows taken. An incomplete row needs no state, because its tokens are not taken yet.
    """

    def __init__(self, packing: StreamedDocuments, part: PartReader, lane: Lane, state: dict[str, Any] | None):
        self.packing = packing
        self.part = part
        self.lane = lane
        start = dict.fromkeys(("offset", "segment", "token", "skipped", "tokens", "documents", "taken"), 0)
        state = state or {"at": BEGINNING, **start}
        self.first: int = state["at"]["first"]  # of the block, the first row that is still needed
        self._offset: int = state["offset"]  # documents of the lane in that block that were taken
        self._segment: int = state["segment"]
        self._token: int = state["token"]  # next token of that segment
        self._skipped: int = state["skipped"]  # unusable rows since the start of the run
        self._tokens: int = state["tokens"]  # tokens and documents since the start of the run
        self._read: int = state["documents"]
        self.taken: int = state["taken"]  # rows since the start of the run
        self._pass: int = state.get("pass", 0)  # of the last token
        self._token_at = self._row_at = self._read  # documents at the last token, and at the last row
        self._warned = False
        self._held: Held | None = None
        self._numbers = np.empty(0, dtype=np.int64)  # of its documents in the block
        # The next documents as segments of text or tokens, `None` for an unusable row.
        self._documents: deque[list[Document | np.ndarray] | None] = deque()

    def take(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The next `count` rows: `input_ids`, `labels` and [`document_positions`], all `(L,)` int64."""
        rows: list[dict[str, torch.Tensor]] = []
        dropped = 0
        while len(rows) < count:
            more = self._pack(count - len(rows))
            rows += more
            self.taken += len(more)
            dropped = 0 if more else dropped + 1
            if more:
                self._row_at = self._read
            elif dropped > PATIENCE and self._a_pass_since(self._row_at):
                part = self.packing.encoder.source.loss_on
                raise self.part.error(
                    f"no row of a whole pass has a token to train on (loss_on={part!r}). Raise sequence_length, or "
                    "check the columns."
                )
        return rows

    def _a_pass_since(self, documents: int) -> bool:
        """Whether the lane has read many documents since some number, and more than a pass has."""
        return self._read - documents > max(PATIENCE, 2 * (self.part.pass_rows or self._read))

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
            self._pass, self._token_at = self._current().at["pass"], self._read
            if self._document_ended:
                starts[length] = True
                self._next_document()
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
        return {
            "pass": self._pass,
            "at": self.part.position(self.first),
            "offset": self._offset,
            "segment": self._segment,
            "token": self._token,
            "skipped": self._skipped,
            "tokens": self._tokens,
            "documents": self._read,
            "taken": self.taken,
        }

    @property
    def known(self) -> bool:
        """Whether the lane has read enough to tell the length of documents."""
        return self._read >= PATIENCE

    def rows_of(self, documents: int) -> int:
        """The number of rows that documents give, estimated from those of this lane."""
        return documents * self._tokens // max(1, self._read) // self.packing.sequence_length

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
            self._next_document()
            if self._a_pass_since(self._token_at):
                raise self.part.error("a whole pass over the documents gave no token. Check the text columns.")

    def _next_document(self) -> None:
        self._skipped += self._documents.popleft() is None
        self._segment = self._token = 0
        self._offset += 1
        self._read += 1

    def _read_documents(self) -> list[list[Document | np.ndarray] | None]:
        held_out, held = self.packing.held_out, self._current()
        of_a_row = 1 + self.packing.sequence_length * self._read // max(1, self._tokens)
        numbers = self._numbers[self._offset : self._offset + min(DOCUMENTS, of_a_row)]
        documents: list[list[Document | np.ndarray] | None] = []
        short: dict[int, Document] = {}
        for i, row in enumerate(self.part.fetch(held, numbers)):
            document = self._document(row, held.block, numbers[i])
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

    def _current(self) -> Held:
        """The block of the current document, or of the next one."""
        while self._held is None or (self._offset == len(self._numbers)):
            if self._held is not None:
                self.first, self._offset = self._held.end, 0
            self._held = held = self.part.holding(self.first)
            self._numbers = held.dealt(self.lane)
            if self._offset > len(self._numbers):
                raise self.part.error(
                    f"training resumes at document {self._offset} of a block, which now has only "
                    f"{len(self._numbers)} for this lane. Restore the data of the checkpoint.",
                    held.at,
                )
        return self._held

    def _document(self, row: Any, block: Block, place: int) -> Document | None:
        """The document of a row, `None` if it is skipped."""
        encoder, number = self.packing.encoder, block.first_row + int(block.order[place])
        try:
            return encoder.document(row, number)
        except Exception as error:
            name, shard = self.part.partition.source, "" if block.shard is None else f" of shard {block.shard}"
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
